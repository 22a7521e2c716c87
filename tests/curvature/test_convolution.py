"""A factor over patches that is channels times kernel, with a bias beside it."""

import pytest
import torch

from lightning_fedfisher.curvature.convolution import ConvolutionKronecker
from lightning_fedfisher.curvature.input_map import InputMap


def _factor(size, rank, generator):
    root = torch.randn(size, rank, dtype=torch.float64, generator=generator)
    return root @ root.T / rank


def _dense(curvature):
    columns = torch.kron(curvature.channel_factor, curvature.kernel_factor)
    ones = torch.ones(int(curvature.has_bias), int(curvature.has_bias)).to(columns)
    return torch.kron(curvature.row_factor, torch.block_diag(columns, ones))


def _power(dense, exponent):
    values, vectors = torch.linalg.eigh(dense)
    return vectors @ torch.diag(values.clamp_min(0) ** exponent) @ vectors.T


def _close(found, expected, tolerance=1e-12):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def _convolution(has_bias, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows, channels, kernel = (_factor(size, 6, generator) for size in (3, 2, 4))
    return ConvolutionKronecker(rows, channels, kernel, has_bias)


@pytest.mark.parametrize("has_bias", [False, True])
def test_the_factor_of_patches_is_channels_times_kernel(has_bias):
    curvature = _convolution(has_bias)
    dense = _dense(curvature)
    matrix = torch.randn(curvature.shape, dtype=torch.float64)
    assert curvature.shape == (3, 8 + has_bias)
    assert curvature.kernel == 4

    def close(found, matrix_of):
        _close(found.apply(matrix), (matrix_of @ matrix.flatten()).view(curvature.shape), 1e-9)

    close(curvature, dense)
    close(curvature.to_kronecker(), dense)
    close(curvature.power(0.5), _power(dense, 0.5))
    _close(curvature.diagonal(), dense.diagonal().view(curvature.shape))
    _close(curvature.trace(), dense.trace())
    _close(curvature.norm(), dense.square().sum().sqrt())
    _close(curvature.eigenvalues().flatten().sort().values, torch.linalg.eigvalsh(dense))
    inverse = curvature.pseudo_inverse(1e-9)
    expected = torch.linalg.pinv(dense, hermitian=True) @ matrix.flatten()
    _close(inverse.solve(matrix), expected.view(curvature.shape), 1e-8)
    averaged = curvature.average_over_columns()
    blocks = dense.reshape(*curvature.shape, *curvature.shape)
    rows = torch.einsum("iaja->ij", blocks) / curvature.shape[1]
    close(averaged, torch.kron(rows, torch.eye(curvature.shape[1], dtype=torch.float64)))
    between = torch.randn(2, 2, dtype=torch.float64)
    for_others = curvature.with_inputs(InputMap(between, 8))
    assert isinstance(for_others, ConvolutionKronecker)
    blocks = torch.kron(between, torch.eye(4, dtype=torch.float64))
    columns = torch.block_diag(blocks, torch.eye(int(has_bias), dtype=torch.float64))
    wide = torch.kron(torch.eye(3, dtype=torch.float64), columns)
    close(for_others, wide @ dense @ wide.T)
    again = ConvolutionKronecker.from_tensors(curvature.tensors(), curvature.shape, kernel=4)
    assert again.has_bias == has_bias


@pytest.mark.parametrize("has_bias", [False, True])
def test_restricted_to_an_eigenbasis_it_is_the_same_operator(has_bias):
    mean, other = _convolution(has_bias), _convolution(has_bias, seed=1)
    inverse = mean.pseudo_inverse(0.05)
    restricted = inverse.restriction.write(other)
    coordinates = torch.randn(inverse.support.shape, dtype=torch.float64)
    expected = inverse.to_eigenbasis(other.apply(inverse.from_eigenbasis(coordinates)))
    _close(restricted.apply(coordinates), expected)
    assert restricted.shape == inverse.support.shape
    assert len(restricted.row_factor) * len(restricted.channel_factor) <= 6
