"""Merge problems as they are read from updates: what is read, how often, and for whom."""

import dataclasses
import math
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers.merging import OF_NETWORKS, small_classifier, small_data, update_of
from torch import nn
from torch.utils.data import TensorDataset

from lightning_fedfisher import ClientUpdate, MergeError
from lightning_fedfisher.merge.layer_loader import LayerLoader
from lightning_fedfisher.merge.methods import METHODS
from lightning_fedfisher.merge.without_trainer import merge_updates
from lightning_fedfisher.update import file_format, verification
from lightning_fedfisher.update.file_format import write_file

CPU = torch.device("cpu")


def _updates(kind, activation=nn.ReLU):
    return [update_of(small_classifier(activation, seed=s), small_data(s), kind) for s in range(2)]


def _curvature_of(method):
    """A kind of curvature that the method accepts."""
    return METHODS[method].curvatures[0] if METHODS[method].curvatures else "kfac"


def _averages(loader):
    return [loader.average(index) for index in range(len(loader.layers))]


def _noting(method):
    """The method, and a list of which of its transforms was asked for: whether the outputs'."""
    told = []

    def noting(is_output_layer, curvature):
        told.append(is_output_layer)
        return curvature

    transforms = {"transform": partial(noting, False), "output_transform": partial(noting, True)}
    return replace(METHODS[method], name="own", **transforms), told


def _assert_same_problem(one, other):
    """To the bit."""
    assert one.client_weights == other.client_weights
    for ours, theirs in zip(one.weights, other.weights, strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(one.curvatures, other.curvatures, strict=True):
        assert ours.kind == theirs.kind
        assert ours.tensors().keys() == theirs.tensors().keys()
        for name, tensor in ours.tensors().items():
            assert torch.equal(tensor, theirs.tensors()[name])


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize("method", OF_NETWORKS)
def test_a_method_is_told_which_layer_is_an_aligned_output_layer(method, activation):
    updates = _updates(_curvature_of(method), activation)
    row, told = _noting(method)
    aligned = METHODS[method].aligns and activation is nn.ReLU
    outputs = {"2": [False, aligned], "0": [False, False], "": [False, False]}
    for output_layer, expected in outputs.items():
        headers = [replace(update.header, output_layer=output_layer) for update in updates]
        renamed = [
            ClientUpdate.from_model(small_classifier(activation), header, update.blocks)
            for header, update in zip(headers, updates, strict=True)
        ]
        loader = LayerLoader(renamed, row, 2**30)
        merged = _averages(loader)
        for index in range(2):
            told.clear()
            loader.read(index, CPU, merged)
            assert told == [expected[index]] * 2


@pytest.mark.parametrize("method", OF_NETWORKS)
def test_only_what_is_aligned_is_read_more_than_once(method, monkeypatch):
    kind = _curvature_of(method)
    updates = _updates(kind)
    reads, original = [], ClientUpdate.block
    monkeypatch.setattr(
        ClientUpdate,
        "block",
        lambda u, layer, *a, **k: (reads.append(layer.name), original(u, layer, *a, **k))[1],
    )
    loader = LayerLoader(updates, METHODS[method], 2**30)
    merged = _averages(loader)
    for index in range(2):
        loader.read(index, CPU, merged)
    aligned = METHODS[method].aligns and kind == "kfac"
    expected = ["0"] * (4 if aligned else 2) + ["2"] * 2
    assert reads == ([] if METHODS[method].ignores_curvature else expected)


@pytest.fixture
def openings(monkeypatch):
    """How often each update file was opened, by its name."""
    counts, original = Counter(), file_format.open_regular

    def opening(path):
        counts[path.name] += 1
        return original(path)

    monkeypatch.setattr(file_format, "open_regular", opening)
    return counts


def _opened(updates, folder):
    """The same updates, of files."""
    paths = [update.save(folder / f"{k}.safetensors") for k, update in enumerate(updates)]
    return [ClientUpdate.open(path) for path in paths]


@pytest.mark.parametrize("budget", [0, 2**30])
@pytest.mark.parametrize("method", OF_NETWORKS)
def test_a_read_opens_each_file_once(method, budget, openings, tmp_path):
    kind = _curvature_of(method)
    loader = LayerLoader(_opened(_updates(kind), tmp_path), METHODS[method], budget)
    merged = _averages(loader)
    each, aligned = Counter(["0.safetensors", "1.safetensors"]), METHODS[method].aligns
    # What has become of the layer before an aligned one is found out once, in an opening before.
    for index, expected in ((0, each), (1, each + each if aligned else each), (1, each)):
        openings.clear()
        loader.read(index, CPU, merged)
        assert openings == expected


@pytest.mark.parametrize("budget", [0, 300, 2**30])
@pytest.mark.parametrize("kind", ["kfac", "ekfac", "diagonal", "dense"])
def test_reading_twice_gives_the_same_problem_and_changes_no_size(kind, budget, tmp_path):
    updates = _updates(kind)
    loader = LayerLoader(_opened(updates, tmp_path), METHODS["fedfisher"], budget)
    sizes, merged = list(loader.budget.sizes), _averages(loader)
    in_memory = LayerLoader(updates, METHODS["fedfisher"], budget)
    for index in range(2):
        first, second = (loader.read(index, CPU, merged) for _ in range(2))
        for other in (second, in_memory.read(index, CPU, merged)):
            _assert_same_problem(first.problem, other.problem)
            assert torch.equal(first.influence, other.influence)
            assert first.nbytes == other.nbytes
    assert loader.budget.sizes == in_memory.budget.sizes == sizes


@pytest.mark.parametrize("kind", ["kfac", "ekfac", "diagonal"])
def test_a_layer_prepared_beforehand_is_read_as_any(kind):
    row, told = _noting("fedfisher")
    updates = _updates(kind)
    at_once, beforehand = (LayerLoader(updates, row, 2**30) for _ in range(2))
    merged = _averages(at_once)
    expected = at_once.read(1, CPU, merged).problem
    prepared = beforehand.offload(1, beforehand.curvatures(1, CPU), CPU)
    told.clear()
    problem = beforehand.read(1, CPU, merged, prepared).problem
    assert not told
    _assert_same_problem(problem, expected)


@pytest.mark.parametrize("method", OF_NETWORKS)
def test_client_weights_are_powers_of_the_sample_counts(method):
    updates = [
        update_of(small_classifier(seed=client), small_data(client), "kfac", samples)
        for client, samples in enumerate((400, 100, 25))
    ]
    power = 0.5 if method == "fedfisher" else 1.0
    assert METHODS[method].client_weight_power == power
    expected = [20 / 35, 10 / 35, 5 / 35] if power == 0.5 else [400 / 525, 100 / 525, 25 / 525]
    row = dataclasses.replace(METHODS[method], max_influence=math.inf)
    loader = LayerLoader(updates, row, 2**30)
    for index, layer in enumerate(updates[0].layers):
        problem = loader.read(index, CPU, []).problem
        assert problem.client_weights == pytest.approx(expected)
        average = sum(p * u.weights(layer).double() for p, u in zip(expected, updates, strict=True))
        torch.testing.assert_close(problem.average.double(), average, rtol=1e-5, atol=1e-6)
        assert torch.equal(loader.average(index), problem.average)


# What a whole merge costs, in counts


@pytest.fixture
def decoded(monkeypatch):
    """How often each tensor was read from a file or decoded for use, by its name."""
    counts, original = Counter(), ClientUpdate._read

    def reading(self, name, *how):
        counts[name] += 1
        return original(self, name, *how)

    monkeypatch.setattr(ClientUpdate, "_read", reading)
    return counts


def _packed(folder, activation):
    """Updates of files whose weights and factors are quantized."""
    paths = []
    for seed in range(2):
        model = nn.Sequential(nn.Linear(40, 60), activation(), nn.Linear(60, 30))
        data = TensorDataset(torch.randn(20, 40), torch.randint(30, (20,)))
        update = update_of(model, data, "kfac").compressed(0.9)
        assert update.header.quantized
        paths.append(update.save(folder / f"{seed}.safetensors"))
    return paths


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize("method", ["fedavg", "fedfisher", "regmean"])
def test_a_merge_reads_each_tensor_once(method, activation, decoded, tmp_path, monkeypatch):
    paths = _packed(tmp_path, activation)
    checked = []
    monkeypatch.setattr(verification, "decode_root", lambda *_: checked.append(1))
    decoded.clear()
    merge_updates(paths, method=method)
    assert not checked  # opening looks at digests alone
    weights = {name for name in decoded if name.startswith("parameters/")}
    assert len(weights) == 4
    curvature = {name for name in decoded if name.startswith("curvature/")}
    assert len(curvature) == (0 if method == "fedavg" else 4)
    # What a layer that another reads has become follows from its weights and inputs: once more.
    again = method == "fedfisher" and activation is nn.ReLU
    first = {"parameters/0.weight", "parameters/0.bias"} | {n for n in curvature if "/0/" in n}
    for name, times in decoded.items():
        assert times == 2 * (2 if again and name in first else 1), name


def test_what_cannot_be_decoded_is_refused_when_it_is_merged(tmp_path):
    paths = _packed(tmp_path, nn.Tanh)
    update = ClientUpdate.open(paths[1])
    name = "curvature/2/row_factor"
    forged = dict(update._tensors) | {name: torch.zeros(9, dtype=torch.uint8)}
    write_file(paths[1], update.header, forged)
    with pytest.raises(MergeError, match=f"{name} cannot be unpacked") as error:
        merge_updates(paths)
    assert str(paths[1]) in str(error.value)
    # Whoever wants to go on without it has it decoded before.
    with pytest.warns(UserWarning, match="1 of 2 updates left out"):
        result = merge_updates(paths, skip_invalid=True)
    assert len(result.clients) == 1
    # What is not looked at is not judged.
    assert len(merge_updates(paths, method="fedavg").clients) == 2


def test_a_layer_is_decomposed_once_for_each_factor_and_their_mean(tmp_path, monkeypatch):
    paths = _packed(tmp_path, nn.Tanh)
    sizes, original = [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda a: (sizes.append(len(a)), original(a))[1])
    merge_updates(paths)
    # The factors of each of two clients are no larger than their 20 samples; the means are.
    assert Counter(sizes) == Counter({20: 8, 40 + 1: 1, 60: 1, 60 + 1: 1, 30: 1})
