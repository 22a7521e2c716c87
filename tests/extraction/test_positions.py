"""Some positions of each sample stand for all: which, how many, and without bias."""

import pytest
import torch
from helpers.networks import build_net, extract, make_data
from oracles.curvature import are_equal
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_fedfisher.extraction import extract_curvatures
from lightning_fedfisher.extraction.layer_types import convolution as convolutions
from lightning_fedfisher.extraction.layer_types.conv_geometry import ConvGeometry
from lightning_fedfisher.extraction.positions import (
    check_positions,
    choose_nonzero,
    choose_positions,
    most_positions,
    shifted,
)

IMAGE = (1, 16, 16)
SPATIAL = {1: (11,), 2: (7, 9), 3: (4, 5, 6)}


@pytest.mark.parametrize(("available", "most"), [(8, 2), (7, 3), (576, 36), (5, 5), (9, 1)])
def test_every_position_has_the_same_chance(available, most):
    draws = 20_000
    uniforms = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    chosen = choose_positions(uniforms, available, most)
    assert chosen.shape == (draws, most)
    assert (chosen.diff(dim=1) > 0).all()  # none twice
    assert ((chosen >= 0) & (chosen < available)).all()
    shares = torch.bincount(chosen.flatten(), minlength=available) / draws
    torch.testing.assert_close(shares, torch.full_like(shares, most / available), atol=2e-3, rtol=0)


def test_all_positions_are_all_of_them():
    chosen = choose_positions(torch.rand(5, dtype=torch.float64), 6, 6)
    assert torch.equal(chosen, torch.arange(6).expand(5, 6))


def test_layers_choose_other_positions():
    uniforms = torch.rand(50, dtype=torch.float64)
    one, two = (choose_positions(shifted(uniforms, layer), 64, 4) for layer in (0, 1))
    assert (one != two).float().mean() > 0.5
    assert torch.equal(shifted(uniforms, 0), uniforms)


@pytest.mark.parametrize("positions", [0, -1, 2.0, "all", True])
def test_other_values_are_refused(positions):
    with pytest.raises(ValueError, match="positions must be at least 1, None or 'auto'"):
        check_positions(positions)


def test_auto_is_a_sixteenth_but_at_least_two():
    assert [most_positions("auto", n) for n in (1, 2, 3, 47, 48, 80, 3136)] == [
        1,
        2,
        2,
        2,
        3,
        5,
        196,
    ]
    assert [most_positions(10, n) for n in (3, 63)] == [3, 10]


@pytest.mark.parametrize("dimensions", SPATIAL)
@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize(
    ("stride", "padding", "dilation"), [(1, 0, 1), (2, 1, 1), (1, "same", 2), (3, 2, 2)]
)
def test_patches_at_positions_are_those_of_all(dimensions, frames, stride, padding, dilation):
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(3 * frames, 2, *SPATIAL[dimensions], generator=generator)
    kernel = (3, 2, 1)[:dimensions]
    geometry = ConvGeometry.from_arguments(kernel, stride, padding, dilation)
    layer = convolutions.Convolution(geometry, has_bias=True, channels=2)
    whole = layer.unfold_inputs(image, 3)
    positions = torch.randint(whole.shape[2], (3, 4), generator=generator)
    found = layer.unfold_inputs_at(image, 3, positions)
    assert torch.equal(
        found, whole.gather(2, positions.unsqueeze(1).expand(-1, whole.shape[1], -1))
    )


class _Net(nn.Module):
    """A convolution, a transposed one, and a linear layer over positions: all three readings."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.up = nn.ConvTranspose2d(3, 2, 2, stride=2, bias=False)
        self.mix = nn.Linear(2, 3)

    def forward(self, x):
        x = self.up(F.max_pool2d(F.relu(self.conv(x)), 4))
        return self.mix(x.flatten(2).mT).sum(1)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return _Net().double()


def test_factors_of_some_positions_estimate_those_of_all_without_bias(net):
    data = make_data(IMAGE, 6)
    exact = extract(net, data, fisher="exact")
    mean, rounds = {}, 300
    for seed in range(rounds):
        found = extract(net, data, fisher="exact", positions=7, seed=seed)
        for name, block in found.blocks.items():
            for part, tensor in block.tensors().items():
                key = name, part
                mean[key] = mean.get(key, 0) + tensor / rounds
    for (name, part), tensor in mean.items():
        expected = exact.blocks[name].tensors()[part]
        assert (tensor - expected).norm() < 0.06 * expected.norm(), (name, part)
    assert "some positions" not in exact.report
    some = extract(net, data, fisher="exact", positions=7)
    assert "kronecker (hooks; some positions): 2 layers, 39 weights: conv, mix" in some.report
    apart = some.blocks["conv"].column_factor
    assert (apart - exact.blocks["conv"].column_factor).norm() > 1e-3  # or nothing was left out


class _ReadsSome(nn.Module):
    """A linear layer over tokens, of which the logits read but a few."""

    def __init__(self, tokens):
        super().__init__()
        self.tokens = tokens
        self.mix, self.head = nn.Linear(4, 3), nn.Linear(3, 3)

    def forward(self, x):
        mixed = torch.tanh(self.mix(x.view(-1, 16, 4)))
        return self.head(mixed[:, self.tokens].sum(1))


@pytest.mark.parametrize("fisher", ["normalised", "exact"])
@pytest.mark.parametrize("tokens", [[0], [3], [2, 9]])
def test_gradients_are_taken_where_there_are_any(tokens, fisher):
    torch.manual_seed(0)
    net, data = _ReadsSome(tokens).double(), make_data((64,), 12)
    exact = extract(net, data, fisher=fisher).blocks["mix"]
    found = extract(net, data, fisher=fisher, positions=len(tokens)).blocks["mix"]
    torch.testing.assert_close(found.row_factor, exact.row_factor)
    assert (found.column_factor - exact.column_factor).norm() > 1e-2 * exact.column_factor.norm()


def test_gradients_at_some_of_the_positions_that_have_any_are_without_bias():
    torch.manual_seed(0)
    net, data = _ReadsSome([1, 5, 6, 7, 12]).double(), make_data((64,), 12)
    exact, rounds = extract(net, data).blocks["mix"].row_factor, 300
    mean = sum(
        extract(net, data, positions=2, seed=seed).blocks["mix"].row_factor / rounds
        for seed in range(rounds)
    )
    assert (mean - exact).norm() < 0.06 * exact.norm()


@pytest.mark.parametrize("most", [1, 2, 3, 5])
def test_every_position_with_a_gradient_has_the_same_chance(most):
    draws = 20_000
    uniforms = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    has = torch.tensor([False, True, False, True, True, False])
    chosen, scale = choose_nonzero(uniforms, has.expand(draws, 6), most)
    torch.testing.assert_close(scale, torch.full_like(scale, (3 / most) ** 0.5))
    shares = torch.bincount(chosen.flatten(), minlength=6) / (draws * most)
    torch.testing.assert_close(shares, has / 3.0, atol=2e-3, rtol=0)


def test_where_there_is_no_gradient_nothing_counts():
    chosen, scale = choose_nonzero(torch.zeros(2), torch.zeros(2, 4, dtype=torch.bool), 2)
    assert ((chosen >= 0) & (chosen < 4)).all()
    assert not scale.any()


def test_as_many_positions_as_there_are_change_nothing(net):
    data = make_data(IMAGE, 6)
    assert are_equal(extract(net, data, positions=256), extract(net, data, positions=None))


@pytest.mark.parametrize("fisher", ["normalised", "exact"])
def test_a_sample_has_the_same_positions_whatever_its_batch(net, fisher):
    data = make_data(IMAGE, 21)
    expected = extract(net, data, fisher=fisher, positions="auto", batch_size=21)
    for batch_size in (1, 4):
        found = extract(net, data, fisher=fisher, positions="auto", batch_size=batch_size)
        assert are_equal(found, expected, 1e-12)
    assert not are_equal(
        extract(net, data, fisher=fisher, positions="auto", seed=1), expected, 1e-3
    )


def test_the_report_tells_which_kinds_were_sampled(net):
    loader = DataLoader(make_data(IMAGE, 6), batch_size=4)
    found = extract_curvatures(net, loader, ("kfac", "diagonal", "input_gram"), progress=False)
    assert "kronecker (hooks; some positions)" in found["kfac"].report
    assert "input_gram (hooks; some positions)" in found["input_gram"].report
    assert "some positions" not in found["diagonal"].report


@pytest.mark.parametrize("kind", ["diagonal", "dense"])
def test_other_curvature_takes_all_positions(net, kind):
    data = make_data(IMAGE, 6)
    assert are_equal(extract(net, data, kind, positions=1), extract(net, data, kind))


def test_eigenvalues_of_ekfac_take_all_positions():
    # The gradient's second moment has the trace that it has, in whatever basis.
    model, data = build_net("lenet"), make_data((2, 8, 8), 6)
    dense = extract(model, data, "dense", fisher="exact")
    found = extract(model, data, "ekfac", fisher="exact", positions=1)
    for name, block in found.blocks.items():
        torch.testing.assert_close(block.trace(), dense.blocks[name].trace())
