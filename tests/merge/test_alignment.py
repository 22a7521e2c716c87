"""What a layer's inputs become in the merged model: against integrals, closed cases and an oracle.

Here clients are further apart than training takes them, so that it matters.
"""

import dataclasses
import math
import warnings
from functools import partial

import pytest
import torch
from helpers.federation import quiet_trainer
from helpers.merging import assert_same, merge
from helpers.merging import interrupted as _interrupted
from helpers.merging import resumed as _resumed
from helpers.merging import with_header as _with_header
from oracles import merge as oracle
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedfisher import METHODS, ClientUpdate, FisherMergeModule, extract_curvature
from lightning_fedfisher.curvature.base import Identity
from lightning_fedfisher.curvature.input_map import InputMap
from lightning_fedfisher.curvature.kronecker import Kronecker
from lightning_fedfisher.layers import Layer, Source
from lightning_fedfisher.merge.alignment import Alignment, _rectified, align
from lightning_fedfisher.merge.layer_loader import LayerLoader
from lightning_fedfisher.merge.solvers import ConjugateGradient

CPU = torch.device("cpu")
ACTIVATIONS = ("identity", "relu")

# Of clients as unlike as these, a bound changes what is compared with the oracle.
_UNBOUNDED = dataclasses.replace(METHODS["fedfisher"], max_influence=math.inf)


def _moments(size, seed=0, rank=None):
    root = _weights(size, rank or 2 * size, seed)
    return root @ root.mT / root.shape[1]


def _weights(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(100 + seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def _of(moments, rows):
    """As the inputs' side of curvature alone."""
    return Kronecker(torch.eye(rows).to(moments), moments)


# The kernel


@pytest.mark.parametrize("cosine", [-1.0, -0.9, -0.3, 0.0, 0.4, 0.99, 1.0])
@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.3, 5.0)])
def test_the_kernel_is_the_integral_over_normal_variables(cosine, scales):
    # E[relu(a u) relu(b (c u + s v))] in polar coordinates: the radius integrates to 2.
    angles = (torch.arange(200_000).double() + 0.5) * (2 * math.pi / 200_000)
    one = angles.cos().clamp_min(0)
    two = (cosine * angles.cos() + math.sqrt(1 - cosine**2) * angles.sin()).clamp_min(0)
    a, b = scales
    expected = a * b * 2 * (one * two).mean()
    rows, columns = torch.tensor([a * a]).double(), torch.tensor([b * b]).double()
    found = _rectified(torch.tensor([[a * b * cosine]]).double(), rows, columns)
    torch.testing.assert_close(found, expected.view(1, 1), rtol=1e-8, atol=1e-8)


def test_the_kernel_is_what_samples_give():
    generator = torch.Generator().manual_seed(0)
    moments, one, two = _moments(3), _weights(2, 3, 1), _weights(4, 3, 2)
    root = torch.linalg.cholesky(moments)
    z = torch.randn(400_000, 3, generator=generator, dtype=torch.float64) @ root.mT
    sampled = (z @ one.mT).relu().mT @ (z @ two.mT).relu() / len(z)
    rows, columns = ((w @ moments @ w.mT).diagonal() for w in (one, two))
    found = _rectified(one @ moments @ two.mT, rows, columns)
    torch.testing.assert_close(found, sampled, rtol=0.02, atol=0.02)
    torch.testing.assert_close(found, oracle.rectified(one, two, moments), rtol=1e-9, atol=1e-9)


def test_the_kernel_of_nothing_is_nothing():
    rows = torch.tensor([0.0, 1.0, -1e-12]).double()
    found = _rectified(torch.ones(3, 3).double(), rows, rows)
    assert torch.equal(found, torch.diag(torch.tensor([0, 0.5, 0]).double()))


# Both maps


@pytest.mark.parametrize("rank", [None, 2], ids=["regular", "singular"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_maps_are_the_two_regressions(activation, rank):
    moments, client, merged = _moments(5, rank=rank), _weights(4, 5, 1), _weights(4, 5, 2)
    expected = oracle.maps(client, merged, moments, activation)
    found = align(client, merged, _of(moments, 4), activation)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert float((found[0] - found[1]).abs().max()) > 0.1


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e9])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_scale_of_the_moments_does_not_matter(activation, scale):
    moments, client, merged = _moments(5), _weights(4, 5, 1), _weights(4, 5, 2)
    expected = oracle.maps(client, merged, moments, activation)
    for ours, theirs in zip(
        align(client, merged, _of(scale * moments, 4), activation), expected, strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_units_that_did_not_change_stay(activation, dtype):
    weights, moments = _weights(4, 5).to(dtype), _of(_moments(5).to(dtype), 4)
    for found in align(weights, weights.clone(), moments, activation):
        assert found.dtype == torch.float64
        error = 1e-12 if dtype == torch.float64 else 1e-6
        torch.testing.assert_close(found, torch.eye(4).double(), rtol=0, atol=error)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_of_inputs_that_nothing_is_known_of_all_stays(activation):
    nothing = _of(torch.zeros(5, 5).double(), 4)
    for found in align(_weights(4, 5, 1), _weights(4, 5, 2), nothing, activation):
        assert torch.equal(found, torch.eye(4).double())


@pytest.mark.parametrize("dead", ["client", "merged", "both", "all of the client", "all of both"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_dead_units_do_no_harm(activation, dead):
    moments, client, merged = _moments(5), _weights(4, 5, 1), _weights(4, 5, 2)
    rows = slice(None) if "all" in dead else [1]
    if dead != "merged":
        client[rows] = 0
    if dead in ("merged", "both", "all of both"):
        merged[rows] = 0
    found = align(client, merged, _of(moments, 4), activation)
    assert all(torch.isfinite(units).all() for units in found)
    if dead == "both":  # known to be alike: nothing
        expected = oracle.maps(client, merged, moments, activation)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(ours[1], torch.eye(4).double()[1])
    if dead == "all of both":
        assert all(torch.equal(units, torch.eye(4).double()) for units in found)


def test_half_of_a_permutation_of_ten_equal_units_is_believed():
    # With uncorrelated units of one size the ridge weighs as much as what is known.
    same = torch.eye(10).double()
    permutation = same[[2, 0, 3, 1, 9, 4, 5, 6, 7, 8]]
    there, back = align(permutation, same, _of(same, 10), "identity")
    torch.testing.assert_close(there, (permutation + same) / 2)
    torch.testing.assert_close(back, (permutation.mT + same) / 2)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_renaming_units_renames_the_maps(activation):
    order = torch.tensor([2, 0, 3, 1])
    moments, client, merged = _moments(5), _weights(4, 5, 1), _weights(4, 5, 2)
    there, back = align(client, merged, _of(moments, 4), activation)
    renamed = align(client[order], merged[order], _of(moments, 4), activation)
    torch.testing.assert_close(renamed[0], there[order][:, order])
    torch.testing.assert_close(renamed[1], back[order][:, order])


@pytest.mark.parametrize("bias", [0, 1])
@pytest.mark.parametrize("positions", [1, 3])
def test_a_map_keeps_blocks_together_and_leaves_the_bias(positions, bias):
    units, inputs = _weights(4, 4), 4 * positions
    parameters = (("w", (3, inputs)), ("b", (3,)))[: 1 + bias]
    wide = oracle.wide(units, Layer("layer", parameters))
    matrix, change = _weights(3, inputs + bias, 1), InputMap(units, inputs)
    torch.testing.assert_close(change.on_columns(matrix), matrix @ wide)
    torch.testing.assert_close(change.transposed.on_columns(matrix), matrix @ wide.mT)
    assert change.on_columns(matrix.float()).dtype == torch.float32
    both = Alignment(change, change.transposed)
    torch.testing.assert_close(both.weights(matrix), matrix @ wide)
    moments = _moments(inputs + bias)
    found = both.curvature(_of(moments, 3))
    torch.testing.assert_close(found.column_factor, wide.mT @ moments @ wide)


# Whole networks: as wide as they are, no direction is without curvature


def _chain():
    return nn.Sequential(
        nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4, bias=False), nn.ReLU(), nn.Linear(4, 6)
    )


def _linear():
    return nn.Sequential(*(nn.Linear(5, 5) for _ in range(3)), nn.Linear(5, 6))


def _convolutional():
    return nn.Sequential(
        nn.Unflatten(1, (1, 6, 6)),
        nn.Conv2d(1, 3, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(3, 4, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 5),
        nn.ReLU(),
        nn.Linear(5, 6),
    )


def _mixed():
    """With a grouped convolution, of diagonal curvature, in the chain."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 6, 6)),
        nn.Conv2d(1, 4, 3),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.ReLU(),
        nn.Conv2d(4, 5, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(20, 6),
    )


class _Twins(nn.Module):
    """Two layers that read one, defined after them."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(6, 6), nn.Linear(6, 6)
        self.body = nn.Linear(5, 6)

    def forward(self, x):
        hidden = self.body(x).relu()
        return self.left(hidden).tanh() + self.right(hidden)


NETWORKS = {
    "chain": (_chain, 5, {"2": Source("0", "relu"), "4": Source("2", "relu")}),
    "linear": (_linear, 5, {str(n): Source(str(n - 1), "identity") for n in (1, 2, 3)}),
    "convolutional": (
        _convolutional,
        36,
        {
            "4": Source("1", "relu"),
            "7": Source("4", "relu"),
            "9": Source("7", "relu"),
        },
    ),
    "mixed": (_mixed, 36, {"8": Source("5", "relu")}),
    "twins": (_Twins, 5, {"left": Source("body", "relu"), "right": Source("body", "relu")}),
}


def _client(network, kind, seed, spread=0.5):
    """A client that went its own way from a common start."""
    make, inputs, _ = NETWORKS[network]
    torch.manual_seed(0)
    model, generator = make(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += spread * float(parameter.square().mean().sqrt()) * noise
    x = torch.randn(100 + 50 * seed, inputs, generator=generator) + 0.2 * seed
    y = torch.randint(0, 6, (len(x),), generator=generator)
    loader = DataLoader(TensorDataset(x, y), batch_size=50)
    found = extract_curvature(model, loader, kind, max_samples=None, progress=False)
    return ClientUpdate.from_model(model, found.header(len(x)), found.blocks)


CACHE = {}


def _clients(network, kind="kfac"):
    if (network, kind) not in CACHE:
        with torch.random.fork_rng():
            CACHE[network, kind] = [_client(network, kind, seed) for seed in range(3)]
    return CACHE[network, kind]


PRECISE = dataclasses.replace(
    _UNBOUNDED, name="own", solver=partial(ConjugateGradient, tolerance=1e-8, rcond=1e-3)
)


def _apart(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
@pytest.mark.parametrize("network", NETWORKS)
def test_problems_are_those_of_the_oracle(network, kind):
    """Each layer's, whatever the layers before have been merged to."""
    clients = _clients(network, kind)
    header = clients[0].header
    assert header.fed_by == NETWORKS[network][2]
    merged = {layer.name: _weights(*layer.shape).float() for layer in header.layers}
    problems = LayerLoader(clients, _UNBOUNDED, 2**30)
    for index, layer in enumerate(header.layers):
        problem = problems.read(index, CPU, list(merged.values())).problem
        shares, weights, curvatures = oracle.quadratic(clients, layer.name, merged)
        assert problem.client_weights == pytest.approx(shares)
        changed = header.fed_by.get(layer.name) is not None
        for client in range(3):
            assert problem.weights[client].dtype == torch.float32
            assert _apart(problem.weights[client], weights[client]) < 1e-5
            written = oracle.written_out(problem.curvatures[client])
            assert _apart(written, curvatures[client]) < 5e-3  # roots of rounded zeros
            own = clients[client].weights(layer)
            assert (_apart(problem.weights[client], own.double()) > 0.05) == changed
            before = problems.updates[client].block(layer)
            is_head = layer.name == header.output_layer
            is_linear = layer.is_linear and not (is_head or changed)
            before = _UNBOUNDED.transformed(before, is_head, is_linear=is_linear)
            assert (_apart(written, oracle.written_out(before)) > 0.05) == changed


@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
@pytest.mark.parametrize("network", NETWORKS)
def test_merges_are_those_of_the_oracle(network, kind, tmp_path):
    clients = _clients(network, kind)
    merged = merge(clients, tmp_path, method=PRECISE).merged_state_dict()
    expected, starts = oracle.fedfisher(clients)
    unaligned, _ = oracle.fedfisher(clients, aligns=False)
    for layer in clients[0].layers:
        wanted, start = expected[layer.name], starts[layer.name]
        shares, _, curvatures = oracle.quadratic(clients, layer.name, expected)
        system = sum(p * f for p, f in zip(shares, curvatures, strict=True))

        def away(matrix, system=system, wanted=wanted):
            # By the curvature, as where there is next to none rounding decides.
            offset = (matrix.double() - wanted).flatten()
            return math.sqrt(offset @ system @ offset)

        error, move = away(layer.join(merged)), away(start)
        assert error < 0.05 * move
        if layer.name in clients[0].header.fed_by:
            assert away(unaligned[layer.name]) > max(0.1 * move, 3 * error)


@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
@pytest.mark.parametrize("network", NETWORKS)
def test_one_client_and_identical_clients_are_returned(network, kind, tmp_path):
    for clients in (_clients(network, kind)[1:2], _clients(network, kind)[:1] * 3):
        merged = merge(clients, tmp_path).merged_state_dict()
        assert_same(merged, clients[0].parameters, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("network", ["chain", "linear", "convolutional", "twins"])
def test_a_layer_waits_for_the_one_it_reads(network, monkeypatch, tmp_path):
    seen, original = [], LayerLoader.read

    def recording(self, index, device, merged, prepared):
        before = self.alignments.waits_for(index)
        seen.append((index, before, None if before is None else merged[before].clone()))
        return original(self, index, device, merged, prepared)

    monkeypatch.setattr(LayerLoader, "read", recording)
    clients = _clients(network)
    names = [layer.name for layer in clients[0].layers]
    row = dataclasses.replace(_UNBOUNDED, steps_per_epoch=1)
    module = merge(clients, tmp_path, method=row)
    assert sorted(index for index, *_ in seen) == list(range(len(names)))
    for index, before, then in seen:
        source = NETWORKS[network][2].get(names[index])
        assert before == (None if source is None else names.index(source.layer))
        if before is not None:
            assert torch.equal(module.merged[before], then)  # solved by then
            assert float((then - module.merger.loader.average(before)).norm()) > 1e-3


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if not row.aligns])
def test_other_methods_wait_for_nothing(method):
    problems = LayerLoader(_clients("chain"), METHODS[method], 0)
    assert [problems.alignments.waits_for(index) for index in range(3)] == [None] * 3


@pytest.mark.parametrize("kind", ["diagonal", "dense"])
def test_curvature_that_holds_no_inputs_is_not_aligned(kind, tmp_path):
    clients = _clients("chain", kind)
    assert clients[0].header.fed_by == NETWORKS["chain"][2]
    problems = LayerLoader(clients, _UNBOUNDED, 0)
    assert [problems.alignments.waits_for(index) for index in range(3)] == [None] * 3
    merged = merge(clients, tmp_path, method=PRECISE).merged_state_dict()
    expected, starts = oracle.fedfisher(clients)
    for layer in clients[0].layers:
        move = float((expected[layer.name] - starts[layer.name]).norm())
        assert float((layer.join(merged) - expected[layer.name]).norm()) < 0.03 * move


def test_a_layer_is_not_aligned_where_either_side_holds_no_inputs(tmp_path):
    sources = {**NETWORKS["mixed"][2], "3": Source("1", "relu"), "5": Source("3", "relu")}
    # The matrix of a grouped convolution has inputs of its group alone: blocks that divide.
    clients = [_with_header(client, fed_by={"5": sources["5"]}) for client in _clients("mixed")]
    assert clients[0].header.kinds["3"] == "diagonal"
    problems = LayerLoader(clients, _UNBOUNDED, 0)
    assert [problems.alignments.waits_for(index) for index in range(4)] == [None] * 4
    merged = merge(clients, tmp_path, method=PRECISE).merged_state_dict()
    expected, starts = oracle.fedfisher(clients)
    for layer in clients[0].layers:
        shares, _, curvatures = oracle.quadratic(clients, layer.name, expected)
        system = sum(p * f for p, f in zip(shares, curvatures, strict=True))

        def away(matrix, system=system, wanted=expected[layer.name]):
            # By the curvature: a direction may count for one and not for the other.
            offset = (matrix.double() - wanted).flatten()
            return float(offset @ system @ offset) ** 0.5

        assert away(layer.join(merged)) < 0.03 * away(starts[layer.name])


# The same merge in other ways


@pytest.mark.parametrize("network", ["chain", "convolutional", "mixed"])
def test_the_order_of_clients_does_not_matter_when_aligned(network, tmp_path):
    clients = _clients(network)
    there = merge(clients, tmp_path, method=PRECISE).merged_state_dict()
    back = merge(clients[::-1], tmp_path, method=PRECISE).merged_state_dict()
    assert_same(there, back, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
@pytest.mark.parametrize("network", ["chain", "convolutional", "twins"])
def test_an_aligned_merge_in_no_memory_is_the_same(network, kind, tmp_path):
    clients = _clients(network, kind)
    freely = merge(clients, tmp_path)
    alone = merge(clients, tmp_path, memory_budget=0)
    assert_same(alone.merged_state_dict(), freely.merged_state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("network", ["chain", "convolutional", "twins"])
def test_what_is_known_of_merged_layers_stays_within_the_budget(network):
    clients = _clients(network)
    maps, alone = [], LayerLoader(clients, _UNBOUNDED, 2**30)
    merged = [alone.average(index) for index in range(len(alone.layers))]
    for index in range(len(merged)):
        alone.read(index, CPU, merged)
    for pairs in alone.alignments._maps.values():
        maps.append(sum(t.nbytes for pair in pairs for t in pair.values()))
    assert sum(maps) == alone.budget.reserved > 0
    for budget in (0, min(maps), sum(maps) - 1, sum(maps)):
        problems = LayerLoader(clients, _UNBOUNDED, budget)
        for index in range(len(merged)):
            problems.read(index, CPU, merged)
        held = [pairs for pairs in problems.alignments._maps.values() if isinstance(pairs, list)]
        size = sum(t.nbytes for pairs in held for pair in pairs for t in pair.values())
        assert size == problems.budget.reserved <= budget
        problems.forget()
        assert problems.budget.reserved == 0


STOPS = (1, 3, 5, 8)


@pytest.mark.parametrize("stop", STOPS)
def test_an_aligned_merge_that_is_interrupted_ends_as_it_would_have(stop, tmp_path):
    row = dataclasses.replace(_UNBOUNDED, steps_per_epoch=1)
    clients = _clients("convolutional")
    whole = merge(clients, tmp_path, method=row)
    assert len(whole.history) > max(STOPS)
    first, path = _interrupted(clients, tmp_path, stop, method=row)
    assert len(first.history) == stop
    second = _resumed(path, clients, tmp_path, method=row)
    assert_same(second.merged_state_dict(), whole.merged_state_dict(), rtol=0, atol=0)


def test_two_merges_by_one_module_are_alike(tmp_path):
    """Also where the first stopped short, and the second goes on where another was interrupted."""
    clients = _clients("chain")
    first, path = _interrupted(clients, tmp_path, 2)
    assert [state.progress for state in first.merger.states] == [1, 1, 0]
    module = FisherMergeModule(clients, max_iterations=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*has not converged")
        quiet_trainer(tmp_path, max_epochs=-1).fit(module)
        quiet_trainer(tmp_path, max_epochs=-1).fit(module, ckpt_path=path, weights_only=True)
        fresh = _resumed(path, clients, tmp_path, max_iterations=1)
    assert_same(module.merged_state_dict(), fresh.merged_state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("activation", ["identity", "relu"])
@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e-9, 1e-2, 1.0, 1e2, 1e9])
def test_units_of_another_scale_are_followed_but_not_without_bound(scale, activation):
    generator = torch.Generator().manual_seed(0)
    merged = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    maps = align(scale * merged, merged, Identity((5, 8)), activation)
    assert all(float(found.abs().max()) < 1e5 for found in maps)
    if scale in (1e-2, 1e2):  # up to the ridge
        assert max(float(found.abs().max()) for found in maps) > 50
