"""Random features before a head: exact like any closed-form head, and worth more than a line."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedfisher import (
    ClientUpdate,
    MergeError,
    RandomFeatures,
    fit_closed_form_head,
    merge_updates,
)
from lightning_fedfisher.extraction import extract_curvature


def _crossed(samples=400, seed=0):
    """Two classes that no line tells apart: whether two inputs have the same sign."""
    x = torch.randn(samples, 6, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, (x[:, 0] * x[:, 1] > 0).long())


def _network(random_features=200, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        body = nn.Linear(6, 16)
        features = RandomFeatures(16, random_features, seed) if random_features else nn.Identity()
        return nn.Sequential(body, features, nn.Linear(16 + random_features, 2))


def _merged(network, data, parts):
    updates = [
        fit_closed_form_head(network, DataLoader(TensorDataset(*data[part]), 64), progress=False)
        for part in parts
    ]
    return merge_updates(updates, method="closed_form_head").state_dict


def test_they_are_the_scaled_inputs_and_rectified_sums_of_them():
    features = RandomFeatures(5, 4).double()
    x = torch.randn(4, 2, 5, dtype=torch.float64)
    own, drawn = features(x).split([5, 4], dim=-1)
    expected = x / x.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(own, expected)
    for index, weights in enumerate(features.weight):
        total = sum(w * expected[..., i] for i, w in enumerate(weights))
        torch.testing.assert_close(drawn[..., index], total.clamp_min(0) * 0.75**0.5)
    assert features.out_features == 9


def test_the_seed_alone_decides_the_weights():
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    one, same, other = RandomFeatures(8, 50), RandomFeatures(8, 50), RandomFeatures(8, 50, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(one.weight, same.weight)
    assert not torch.equal(one.weight, other.weight)
    # What other machines must draw as well.
    assert (127 * one.weight[0]).round().tolist() == [67, -73, 106, 8, 96, 77, -60, 36]
    assert one.weight.abs().max() <= 1
    assert abs(float(one.weight.var()) - 1 / 3) < 0.05


def test_a_head_sees_what_no_line_does():
    data, test = _crossed(), _crossed(1000, seed=1)
    x, y = test.tensors
    scores = []
    for network in (_network(0), _network()):
        state = _merged(network, data, [slice(0, 400)])
        network.load_state_dict(state, strict=False)
        scores.append(float((network(x).argmax(1) == y).float().mean()))
    linear, random = scores
    assert linear < 0.6
    assert random > 0.75


@pytest.mark.parametrize("random_features", [30, 500])  # fewer and more than samples
def test_the_merged_head_is_that_of_all_samples_in_one_place(random_features):
    data, network = _crossed(), _network(random_features)
    whole = _merged(network, data, [slice(0, 400)])
    order = data.tensors[1].argsort(stable=True)
    sorted_data = TensorDataset(*(tensor[order] for tensor in data.tensors))
    split = _merged(network, sorted_data, [slice(0, 7), slice(7, 190), slice(190, 400)])
    outputs = []
    for state in (whole, split):
        network.load_state_dict(state, strict=False)
        outputs.append(network(data.tensors[0]).detach())
    assert (outputs[0] - outputs[1]).abs().max() < 1e-5


def test_the_ridge_holds_where_there_are_more_features_than_samples():
    data, (x, y) = _crossed(150), _crossed(1000, seed=1).tensors
    network = _network(1000)
    network.load_state_dict(_merged(network, data, [slice(0, 150)]), strict=False)
    assert float((network(x).argmax(1) == y).float().mean()) > 0.75


def test_clients_of_another_seed_are_refused():
    loader = DataLoader(_crossed(50))
    heads = [fit_closed_form_head(_network(seed=s), loader, progress=False) for s in (0, 1)]
    with pytest.raises(MergeError, match=r"1\.weight"):
        merge_updates(heads, method="closed_form_head")
    tuned = []
    for seed in (0, 1):
        network = _network(20, seed)
        found = extract_curvature(network, loader, "kfac", progress=False)
        tuned.append(ClientUpdate.from_model(network, found.header(), found.blocks))
    with pytest.raises(MergeError, match=r"1\.weight"):
        merge_updates(tuned)


def test_the_weights_are_not_sent():
    network = _network(20)
    found = extract_curvature(network, DataLoader(_crossed(50)), "kfac", progress=False)
    update = ClientUpdate.from_model(network, found.header(), found.blocks)
    assert "1.weight" in update.header.frozen
    assert set(update.parameters) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert not update.buffers


def test_gradients_go_through():
    features = RandomFeatures(4, 6)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(features.double(), x)


@pytest.mark.parametrize("sizes", [(0, 5), (5, 0), (-1, 5)])
def test_no_features_are_refused(sizes):
    with pytest.raises(ValueError, match="at least 1"):
        RandomFeatures(*sizes)


def test_half_precision_is_the_modules():
    features = RandomFeatures(4, 6)
    x = torch.randn(3, 4)
    found = copy.deepcopy(features).to(torch.bfloat16)(x.to(torch.bfloat16))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), features(x), rtol=0.02, atol=0.02)


def test_a_default_device_is_taken():
    with torch.device("meta"):
        assert RandomFeatures(4, 6).weight.is_meta
