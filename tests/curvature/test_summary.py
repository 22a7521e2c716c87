import math
from dataclasses import replace

import pytest
import torch

from lightning_fedfisher.curvature.base import Identity
from lightning_fedfisher.curvature.diagonal import Diagonal
from lightning_fedfisher.curvature.kronecker import Kronecker
from lightning_fedfisher.curvature.summary import summarize_curvature


def _factor(size, seed):
    root = torch.randn(size, size + 2, dtype=torch.float64, generator=torch.manual_seed(seed))
    return root @ root.T / size


def test_it_says_what_the_dense_eigenvalues_say():
    curvature = Kronecker(_factor(5, 0), _factor(9, 1))
    values = torch.linalg.eigvalsh(curvature.dense()).flip(0)
    told = summarize_curvature("fc", curvature)
    assert told.layer == "fc"
    assert told.trace == pytest.approx(float(values.sum()))
    assert told.effective_rank == pytest.approx(float(values.sum() ** 2 / values.square().sum()))
    ranks = [round(k * 44 / 32) for k in range(33)]
    assert told.spectrum == pytest.approx(values[ranks].tolist(), rel=1e-9)


def test_eigenvalues_may_be_left_out():
    curvature = Kronecker(_factor(5, 0), _factor(9, 1))
    whole = summarize_curvature("fc", curvature)
    assert summarize_curvature("fc", curvature, spectrum=False) == replace(whole, spectrum=[])


def test_equal_eigenvalues_count_all_and_one_counts_one():
    assert summarize_curvature("a", Identity((4, 5))).effective_rank == pytest.approx(20)
    single = torch.zeros(4, 5)
    single[2, 3] = 1e-20  # whose square float32 does not know
    told = summarize_curvature("a", Diagonal(single))
    assert told.effective_rank == pytest.approx(1)
    assert told.spectrum == [pytest.approx(1e-20)] + [0] * 19


def test_no_curvature_has_no_rank():
    told = summarize_curvature("a", Diagonal(torch.zeros(40, 5)))
    assert (told.trace, told.effective_rank, told.spectrum) == (0, 0, [0] * 33)


def test_eigenvalues_that_cost_seconds_are_left_out_and_nothing_else():
    large = Kronecker(torch.eye(3), torch.eye(1025))
    told = summarize_curvature("a", large)
    assert told.spectrum == []
    assert told.effective_rank == pytest.approx(3 * 1025)
    assert told.trace == 3 * 1025
    assert not math.isnan(summarize_curvature("a", Diagonal(torch.ones(3, 1025))).spectrum[-1])
