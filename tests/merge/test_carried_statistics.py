"""Running statistics under other weights: those of the outputs on the clients' own inputs."""

import dataclasses
import math
import warnings

import pytest
import torch
from helpers.federation import NormedClassifier, tiny_data, tiny_loader
from helpers.merging import assert_same, merge
from torch import nn
from torch.nn import functional

from lightning_fedfisher import ClientUpdate, extract_curvature, merge_updates
from lightning_fedfisher.batch_norms import buffer_names
from lightning_fedfisher.errors import MergeError, UpdateError
from lightning_fedfisher.merge.carried_statistics import (
    ALIKE,
    carried_buffers,
    common_norms,
    similarity,
)
from lightning_fedfisher.merge.merger import Merger
from lightning_fedfisher.merge.options import MergeOptions
from lightning_fedfisher.update.header import QuantizedTensor


class Convolutional(nn.Module):
    """A convolution, a depthwise one and a linear layer, each before a norm; nothing in between."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(4, affine=False)
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4)
        self.norm2 = nn.BatchNorm2d(4)
        self.linear = nn.Linear(4, 5)
        self.norm3 = nn.BatchNorm1d(5)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        x = torch.relu(self.norm1(self.conv(x)))
        x = torch.relu(self.norm2(self.depthwise(x)))
        return self.head(torch.relu(self.norm3(self.linear(x.mean((2, 3))))))


def _data(seed, samples=40):
    generator = torch.Generator().manual_seed(seed)
    x = seed + torch.randn(samples, 2, 5, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (samples,), generator=generator)


def _update(model, batches, curvature="kfac", **options):
    """The update of a model in training mode, with running statistics anew."""
    kinds = {"estimate_statistics": True, "progress": False}
    found = extract_curvature(model.train(), batches, curvature, **kinds | options)
    return ClientUpdate.from_model(model, found.header(40), found.blocks, found.statistics)


def _model(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Convolutional().double()


def _client(seed, curvature="kfac", **options):
    model = _model(seed)
    return model, _update(model, [_data(seed)], curvature, positions=None, **options)


def _matrices(update, change=lambda name, matrix: matrix):
    return {layer.name: change(layer.name, update.weights(layer)) for layer in update.layers}


def test_under_its_own_weights_a_client_keeps_its_statistics():
    for curvature in ("kfac", "ekfac", "diagonal", "input_gram", "dense"):
        _, update = _client(0, curvature)
        assert len(common_norms([update])) == 3
        (found,) = carried_buffers([update], _matrices(update))
        assert len(found) == 2 * 3
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, update.buffer(name), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("path", ["norm1", "norm3"])
def test_under_other_weights_they_are_those_of_the_outputs(path):
    """Exact where inputs are those of the client and all positions were read."""
    model, update = _client(0)
    norm = common_norms([update])[path]
    generator = torch.Generator().manual_seed(7)

    def other(name, matrix):
        noise = torch.randn(matrix.shape, generator=generator, dtype=matrix.dtype)
        return noise if name == norm.layer else matrix

    matrices = _matrices(update, other)
    (found,) = carried_buffers([update], matrices)
    (layer,) = [layer for layer in update.layers if layer.name == norm.layer]
    # The network as it was when it was measured, with other weights of this one layer.
    own = dict(model.state_dict()) | update.buffers | layer.split(matrices[norm.layer])
    changed = Convolutional().double()
    changed.load_state_dict(own, strict=False)
    changed.eval().get_submodule(path).train().momentum = 1.0
    changed(_data(0)[0])
    mean, variance = buffer_names(path)
    state = changed.state_dict()
    # The curvature saw unbiased variances, and batches are normalised by biased ones.
    torch.testing.assert_close(found[mean], state[mean], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(found[variance], state[variance], rtol=3e-2, atol=1e-2)
    assert not torch.allclose(update.buffers[variance], state[variance], rtol=0.2)


def test_means_behind_a_grouped_convolution_are_exact_and_variances_scale():
    _, update = _client(0)
    weight = torch.tensor([[2.0], [0.5], [1.0], [-3.0]], dtype=torch.float64)
    matrices = _matrices(update, lambda name, m: weight * m if name == "depthwise" else m)
    (found,) = carried_buffers([update], matrices)
    mean, variance = buffer_names("norm2")
    torch.testing.assert_close(found[mean], weight[:, 0] * update.buffers[mean])
    torch.testing.assert_close(found[variance], weight[:, 0].square() * update.buffers[variance])


def test_variances_follow_the_law_of_total_variance():
    """Clients of the same weights and other data: the pooled statistics of all their samples."""
    model = _model(5)
    updates = [_update(model, [_data(seed)], positions=None) for seed in (0, 1)]
    merged = merge_updates(updates, method="fedavg").state_dict
    outputs = torch.cat([model.conv(_data(seed)[0]) for seed in (0, 1)]).transpose(0, 1).flatten(1)
    mean, variance = buffer_names("norm1")
    torch.testing.assert_close(merged[mean], outputs.mean(1))
    torch.testing.assert_close(merged[variance], outputs.var(1), rtol=1e-2, atol=0)


def test_similarity_is_the_correlation_of_outputs():
    _, update = _client(0)
    assert similarity([update, update]) == pytest.approx(1)
    other = _client(1)[1]
    found = similarity([update, other])
    assert found is not None
    layers, values = {layer.name: layer for layer in update.layers}, []
    for name in ("conv", "linear"):  # of a grouped convolution it is not known
        weights = [u.weights(layers[name]) for u in (update, other)]
        average = sum(weights) / 2
        medians = []
        for u, own in zip((update, other), weights, strict=True):
            gram, mean = u.block(layers[name]).column_factor, u.input_mean(layers[name])[0]
            mean = gram[-1] if name == "linear" else mean  # with a bias, of the same positions
            gram = gram - torch.outer(mean, mean)
            covariance = (average @ gram * own).sum(1)
            spread = (average @ gram * average).sum(1) * (own @ gram * own).sum(1)
            medians.append(float((covariance / spread.sqrt()).quantile(0.5)))
        values.append(sum(medians) / 2)
    assert found == pytest.approx(min(values))
    assert similarity([_client(0, "diagonal")[1]] * 2) is None


def _near(scale, seed):
    """A client that was fine-tuned from the same network as the others, a little."""
    model = _model(5)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter.add_(scale * parameter.std() * torch.randn_like(parameter))
    return _update(model, [_data(seed)], positions=None)


def test_one_client_in_four_does_not_decide_how_alike_they_are():
    updates = [_near(0.1, seed) for seed in range(3)]
    honest = similarity(updates)
    assert ALIKE < honest < 1
    tensors = dict(updates[0]._tensors)
    for name in ("conv", "linear"):
        weights = tensors[f"parameters/{name}.weight"]
        drawn = torch.randn(weights.shape, generator=torch.Generator().manual_seed(0))
        tensors[f"parameters/{name}.weight"] = 1e6 * drawn.to(weights)
    header = dataclasses.replace(updates[0].header, num_samples=10**6)
    hostile = ClientUpdate(header, tensors)
    assert similarity([*updates, hostile]) == pytest.approx(honest, abs=0.03)
    assert similarity([_near(2.0, seed) for seed in range(3)]) < ALIKE


def test_dead_outputs_are_left_out_and_come_alive():
    _, update = _client(0)
    tensors = dict(update._tensors)
    weights = tensors["parameters/conv.weight"].clone()
    weights[:3] = 0
    mean, variance = (tensors[f"buffers/{name}"].clone() for name in buffer_names("norm1"))
    mean[:3], variance[:3] = 0, 0
    names = (f"buffers/{name}" for name in buffer_names("norm1"))
    changed = (
        tensors
        | {"parameters/conv.weight": weights}
        | dict(zip(names, (mean, variance), strict=True))
    )
    dead = ClientUpdate(update.header, changed)
    assert similarity([dead, dead]) == pytest.approx(1)
    (found,) = carried_buffers([dead], _matrices(update))
    for name in buffer_names("norm1"):
        torch.testing.assert_close(found[name][:3], update.buffers[name][:3], rtol=0.05, atol=0.01)


def test_a_bias_moves_the_mean_alone():
    _, update = _client(0, "diagonal")

    def shifted(name, matrix):
        return torch.cat([matrix[:, :-1], matrix[:, -1:] + 3], 1) if "norm" not in name else matrix

    matrices = {
        layer.name: shifted(layer.name, update.weights(layer))
        for layer in update.layers
        if layer.name in ("depthwise", "linear")
    } | {layer.name: update.weights(layer) for layer in update.layers if layer.name == "conv"}
    (found,) = carried_buffers([update], matrices)
    for path in ("norm2", "norm3"):
        mean, variance = buffer_names(path)
        torch.testing.assert_close(found[mean], update.buffers[mean] + 3)
        torch.testing.assert_close(found[variance], update.buffers[variance])


def test_what_averaging_does_not_check_it_does_not_use():
    updates = [_client(seed)[1] for seed in (0, 1)]
    tensors = dict(updates[1]._tensors)
    tensors["curvature/conv/column_factor"] = torch.full((18, 18), torch.nan).double()
    broken = ClientUpdate(updates[1].header, tensors)
    result = merge_updates([updates[0], broken], method="fedavg")
    assert all(tensor.isfinite().all() for tensor in result.state_dict.values())
    with pytest.raises(MergeError, match="not finite"):
        merge_updates([updates[0], broken])


def test_packed_means_are_refused():
    _, update = _client(0)
    packed = {"input_means/conv": QuantizedTensor(0.1, "float64")}
    header = dataclasses.replace(update.header, quantized=packed)
    with pytest.raises(UpdateError, match="input_means/conv is packed and unknown"):
        ClientUpdate(header, update._tensors)


def test_only_what_all_clients_sent_is_carried():
    updates = [_client(0)[1], _client(1)[1]]
    without = _client(2, estimate_statistics=False)[1]
    assert not common_norms([*updates, without])
    header = dataclasses.replace(
        updates[1].header,
        normalized={k: v for k, v in updates[1].header.normalized.items() if k != "norm2"},
    )
    tensors = {n: t for n, t in updates[1]._tensors.items() if n != "input_means/depthwise"}
    fewer = ClientUpdate(header, tensors)
    assert set(common_norms([updates[0], fewer])) == {"norm1", "norm3"}
    with pytest.warns(UserWarning, match=r"clients that differ \(norm2.running_var\)"):
        merge_updates([updates[0], fewer], method="fedavg")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge_updates(updates, method="fedavg")
    with pytest.warns(UserWarning, match=r"unlike outputs \(similarity 0\.[0-8]"):
        merge_updates(updates)


def _tiny(seed, shared=False):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = NormedClassifier()
        torch.manual_seed(0 if shared else seed)
        nn.init.normal_(model.network[0].weight, 0, 0.3)
        nn.init.zeros_(model.network[0].bias)
    return _update(model, tiny_loader(seed, samples=40))


@pytest.mark.parametrize("method", ["fedavg", "regmean", "fedfisher"])
def test_the_trainer_and_the_function_carry_alike(method, tmp_path):
    updates = [_tiny(seed) for seed in range(3)]
    result = merge_updates(updates, method=method, max_influence=math.inf)
    module = merge(updates, tmp_path, method=method, max_influence=math.inf)
    assert_same(module.merged_state_dict(), result.state_dict)
    matrices = {
        layer.name: layer.join(result.state_dict).to(torch.float32) for layer in updates[0].layers
    }
    carried = carried_buffers(updates, matrices, moments=method != "fedavg")
    location = torch.stack([client["network.3.0.running_mean"] for client in carried])
    torch.testing.assert_close(result.state_dict["network.3.0.running_mean"], location.mean(0))
    assert (result.similarity is None) == (method != "fedfisher")


def test_statistics_are_near_those_of_samples():
    """Behind layers that are the same in all clients, as at the start of a network."""
    updates = [_tiny(seed, shared=True) for seed in range(3)]
    merged = merge_updates(updates, method="regmean").state_dict
    model = NormedClassifier()
    model.load_state_dict(merged)
    model.eval().network[3][0].train().momentum = 1.0
    with torch.no_grad():
        model(torch.cat([tiny_data(seed, 40).tensors[0] for seed in range(3)]))
    exact = model.network[3][0].running_var
    averaged = sum(u.buffers["network.3.0.running_var"] for u in updates) / 3

    def error(found):
        return float((found - exact).norm() / exact.norm())

    assert error(merged["network.3.0.running_var"]) < 0.3 * error(averaged)


def test_the_head_is_weighed_by_its_outputs_where_clients_are_alike(monkeypatch):
    updates = [_tiny(seed) for seed in range(3)]
    opened = Merger.open(updates, MergeOptions("fedfisher"))
    assert opened.similarity == similarity(updates)
    assert opened.loader.keeps_means == (opened.similarity >= ALIKE)
    for least, keeps in ((-1.0, True), (1.1, False)):
        monkeypatch.setattr("lightning_fedfisher.merge.merger.ALIKE", least)
        assert Merger.open(updates, MergeOptions("fedfisher")).loader.keeps_means is keeps
        options = {"model": NormedClassifier(), "statistics_loader": [tiny_data(3).tensors[0]]}
        sampled = Merger.open(updates, MergeOptions("fedfisher"), **options)
        assert sampled.loader.keeps_means is keeps
    assert Merger.open(updates, MergeOptions("regmean")).similarity is None


def test_what_a_stranger_sends_stays_finite():
    update = _client(0)[1]
    tensors = dict(update._tensors)
    tensors["input_means/conv"] = torch.full((1, 18), 1e18, dtype=torch.float64)
    tensors["curvature/conv/column_factor"] = 1e18 * torch.eye(18, dtype=torch.float64)
    hostile = ClientUpdate(update.header, tensors)
    hostile.verify()
    result = merge_updates(
        [update, update, update, hostile], max_influence=2.0, allow_duplicates=True
    )
    assert all(tensor.isfinite().all() for tensor in result.state_dict.values())
    first = _client(0)[1].buffers["norm1.running_var"]
    torch.testing.assert_close(result.state_dict["norm1.running_var"], first, rtol=0.5, atol=0.5)


def test_functional_convolutions_agree_with_the_means():
    """Padding is part of what a kernel reads: the mean of patches is not that of channels."""
    _, update = _client(0)
    layers = {layer.name: layer for layer in update.layers}
    patches = functional.unfold(_data(0)[0], 3, padding=1)
    torch.testing.assert_close(update.input_mean(layers["conv"])[0], patches.mean((0, 2)))
    assert update.input_mean(layers["linear"])[0, -1] == 1  # the column of the bias
