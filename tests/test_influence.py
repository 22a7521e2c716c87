"""What one client weighs, against dense oracles, and what a hostile one can do."""

import dataclasses
import math
import warnings

import pytest
import torch
from federation import quiet_trainer, tiny_model, tiny_updates
from torch import nn

from lightning_fedfisher import (
    METHODS,
    ClientUpdate,
    FisherMergeModule,
    MergeError,
    UpdateHeader,
    find_layers,
    influence,
)
from lightning_fedfisher.buffers import merge_buffers
from lightning_fedfisher.curvature import Dense, Diagonal, Identity
from lightning_fedfisher.influence import draw_in, hold, measure, median, multiples, unusual
from lightning_fedfisher.kronecker import EigenKronecker, Kronecker, LookupKronecker
from lightning_fedfisher.quadratic import Quadratic

ROWS, COLUMNS = SHAPE = (3, 4)
KINDS = ("identity", "diagonal", "dense", "kronecker", "lookup", "ekfac")
SHARES = (5.0, 1.0, 3.0, 2.0, 7.0)


def _moment(size, generator):
    root = torch.randn(size, 2 * size, generator=generator).double()
    return root @ root.mT


def _curvature(kind, generator):
    match kind:
        case "identity":
            return Identity(SHAPE)
        case "diagonal":
            return Diagonal(torch.rand(SHAPE, generator=generator).double())
        case "dense":
            return Dense(_moment(ROWS * COLUMNS, generator), SHAPE)
        case "kronecker":
            return Kronecker(_moment(ROWS, generator), _moment(COLUMNS, generator))
        case "lookup":
            values = torch.rand(ROWS, generator=generator).double()
            return LookupKronecker(values, _moment(COLUMNS, generator))
    # As aligned inputs leave them, the bases are not orthogonal.
    bases = [torch.randn(n, n, generator=generator).double() for n in SHAPE]
    return EigenKronecker(*bases, torch.rand(SHAPE, generator=generator).double())


def _problem(kind="kronecker", clients=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(SHAPE, generator=generator).double() for _ in range(clients)]
    curvatures = [_curvature(kind, generator) for _ in range(clients)]
    return Quadratic(SHARES[:clients], weights, curvatures)


def _scaled(problem, client, share=1.0, offset=1.0, curvature=1.0):
    """One client made to weigh more."""
    shares, weights = list(problem.shares), list(problem.weights)
    curvatures = list(problem.curvatures)
    shares[client] *= share
    weights[client] = weights[client] * offset
    one = curvatures[client]
    curvatures[client] = Kronecker(curvature * one.output_factor, one.input_factor)
    return Quadratic(shares, weights, curvatures)


def _oracle(problem):
    flat = torch.stack([matrix.flatten() for matrix in problem.weights])
    middle = flat.quantile(0.5, dim=0)
    rows = []
    for share, weights, curvature in zip(problem.shares, flat, problem.curvatures, strict=True):
        dense, offset = curvature.dense().double(), weights - middle
        pull = share * (dense @ offset).norm()
        rows.append(torch.stack([share * dense.trace(), offset.norm(), pull]))
    table = torch.stack(rows)
    return table / table.quantile(0.5, dim=0)


@pytest.mark.parametrize("clients", [2, 3, 4, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_measure_is_that_of_the_oracle(kind, clients):
    problem = _problem(kind, clients)
    torch.testing.assert_close(measure(problem), _oracle(problem))


@pytest.mark.parametrize("clients", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("at_once", [1, 8, 2**22])
def test_the_median_is_torchs_quantile(clients, at_once, monkeypatch):
    monkeypatch.setattr(influence, "_AT_ONCE", at_once)
    tensors = list(torch.randn(clients, 3, 5).double())
    torch.testing.assert_close(median(tensors), torch.stack(tensors).quantile(0.5, dim=0))


def test_multiples_leave_zeros_out_and_keep_infinities():
    values = torch.tensor([[0.0, 0], [2, 0], [4, 0], [6, 0], [math.inf, 0]]).double()
    expected = torch.tensor([0.0, 0.4, 0.8, 1.2, math.inf]).double()
    torch.testing.assert_close(multiples(values)[:, 0], expected)
    assert not multiples(values)[:, 1].any()


def test_nobody_is_held_who_weighs_no_more_than_allowed():
    problem = _problem()
    weighed = measure(problem)
    assert hold(problem, weighed, float(weighed.max())) is problem
    assert hold(problem, weighed, 0.99 * float(weighed.max())) is not problem


@pytest.mark.parametrize("most", [1.0, 2.0, 10.0])
@pytest.mark.parametrize(
    "much", [{"share": 1e8}, {"curvature": 1e8}, {"share": 1e4, "curvature": 1e4}], ids=str
)
def test_nobody_keeps_more_information_or_pull_than_allowed(much, most):
    problem = _scaled(_problem(), 3, **much)
    weighed = measure(problem)
    held = hold(problem, weighed, most)
    # What is left of each share; all are scaled alike to sum to one.
    left = torch.tensor([a / b for a, b in zip(held.shares, problem.shares, strict=True)]).double()
    left /= left.max()
    assert float(weighed[3, 0]) > 1e6
    expected = (most / weighed[:, [0, 2]].amax(1)).clamp_max(1)
    torch.testing.assert_close(left, expected / expected.max())
    assert float((left * weighed[:, 0]).max()) <= most * (1 + 1e-6) or most == 1


@pytest.mark.parametrize("most", [1.5, 10.0])
def test_nobody_is_farther_away_than_allowed(most):
    problem = _scaled(_problem(), 1, offset=1e6)
    held = hold(problem, measure(problem), most)
    middle = torch.stack(list(problem.weights)).quantile(0.5, dim=0)
    distances = torch.stack([(w - middle).norm() for w in problem.weights])
    left = torch.stack([(w - middle).norm() for w in held.weights])
    torch.testing.assert_close(left, distances.clamp_max(most * distances.quantile(0.5)))


def test_what_is_measured_does_not_depend_on_units_or_order():
    problem = _problem()
    scaled = Quadratic(
        [7 * share for share in problem.shares],
        [3 * matrix for matrix in problem.weights],
        [Kronecker(5 * c.output_factor, c.input_factor) for c in problem.curvatures],
    )
    torch.testing.assert_close(measure(scaled), measure(problem))
    order = [3, 0, 4, 1, 2]
    turned = Quadratic(
        [problem.shares[i] for i in order],
        [problem.weights[i] for i in order],
        [problem.curvatures[i] for i in order],
    )
    torch.testing.assert_close(measure(turned), measure(problem)[order])


def test_what_needs_not_move_stays_the_same_object():
    tensors = list(torch.randn(3, 4))
    moved = draw_in(tensors, torch.tensor([1.0, 0.5, 1.0]))
    assert moved[0] is tensors[0]
    assert moved[2] is tensors[2]
    middle = torch.stack(tensors).median(dim=0).values
    torch.testing.assert_close(moved[1], (tensors[1] + middle) / 2)


def test_the_unusual_are_told_with_what_and_where():
    weighed = torch.ones(5, 3, 3).double()
    weighed[:, 1, 0] = torch.tensor([20.0, 50, 1, 30, 40])
    weighed[2, 1, 2] = 1e9
    told = unusual(weighed, ["ann", "bob", "cid"], list("vwxyz"), 10).splitlines()
    assert told[0] == (
        "bob has, of the median client's, 1e+09 times the pull in x, 50 times the information in "
        "w, z, y and 1 more layers"
    )
    assert "leaves each 10 times the median client's" in told[1]
    assert "leaves each any share" in unusual(weighed, ["ann", "bob", "cid"], list("vwxyz"))
    assert unusual(torch.full((1, 3, 3), 10.0), list("abc"), ["v"], 2) == ""
    told = unusual(torch.full((1, 3, 3), 9.0), ["a", "b", "c"], ["v"], usual=(9, 8, 9))
    assert told.splitlines()[0] == "a has, of the median client's, 9 times the distance in v"


# In a merge


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    """Seven clients alike enough, so that none is held at twice the median."""
    return tiny_updates(tmp_path_factory.mktemp("honest"), 7, epochs=2)


def _forged(update, samples=1, curvature=1.0, weights=None):
    model = tiny_model()
    state = update.parameters
    model.load_state_dict(state if weights is None else {n: weights(t) for n, t in state.items()})
    blocks = {
        name: Kronecker(curvature * block.output_factor, block.input_factor)
        for name, block in update.blocks.items()
    }
    header = dataclasses.replace(update.header, num_samples=samples * update.num_samples)
    forged = ClientUpdate.from_model(model, header, blocks)
    forged.source = "mallory"
    return forged


def _merge(updates, folder, **options):
    module = FisherMergeModule(updates, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet_trainer(folder, max_epochs=-1).fit(module)
    told = [str(warning.message) for warning in caught if "median client" in str(warning.message)]
    return module, told


def _apart(one, other):
    return math.sqrt(sum(float((t - other[name]).square().sum()) for name, t in one.items()))


def test_honest_clients_are_left_as_they_are(honest, tmp_path):
    free, _ = _merge(honest, tmp_path, max_influence=math.inf)
    default, told = _merge(honest, tmp_path)
    assert not told
    assert default.max_influence == METHODS["fedfisher"].max_influence == 10
    for name, tensor in default.merged_state_dict().items():
        assert torch.equal(tensor, free.merged_state_dict()[name])
    assert default.influence.shape == (4, 7, 3)
    assert 1 < float(default.influence.max()) < 10


ATTACKS = {
    "samples": {"samples": 10**8},
    "curvature": {"curvature": 1e8},
    "weights": {"weights": lambda tensor: 1e6 * tensor},
    "opposite": {"weights": lambda tensor: -tensor, "curvature": 1e8},
    "all": {"weights": lambda tensor: 1e6 * tensor, "curvature": 1e8, "samples": 10**3},
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_hostile_client_is_named_and_bounded(attack, honest, tmp_path):
    good = _merge(honest, tmp_path, max_influence=2)[0].merged_state_dict()
    spread = max(_apart(good, update.parameters) for update in honest)
    mallory = _forged(honest[0], **ATTACKS[attack])
    bounded, told = _merge([*honest, mallory], tmp_path, max_influence=2)
    assert "mallory has, of the median client's" in told[0]
    assert _apart(bounded.merged_state_dict(), good) < spread
    owned, told = _merge([*honest, mallory], tmp_path, max_influence=math.inf)
    assert "mallory" in told[0]
    assert "leaves each any share" in told[0]
    # The same client is free to take the model anywhere where nothing bounds it.
    moved = _apart(owned.merged_state_dict(), good)
    assert moved > 2 * _apart(bounded.merged_state_dict(), good)
    if "weights" in ATTACKS[attack] and attack != "opposite":
        assert moved > 1e4 * spread


def test_two_clients_cannot_judge_each_other(honest, tmp_path):
    _, told = _merge([honest[0], _forged(honest[1], curvature=1e8)], tmp_path)
    assert not told


def test_curvature_that_overflows_is_refused_by_name(honest, tmp_path):
    mallory = _forged(honest[0], curvature=1e16, weights=lambda tensor: 1e17 * tensor)
    for method in ("regmean", "fedavg"):
        FisherMergeModule([*honest, mallory], method=method)
    with pytest.raises(
        MergeError, match=r"mallory is too large for float32 in layer network\.\d"
    ) as e:
        _merge([*honest, _Overflowing(mallory.header, mallory._tensors, "mallory")], tmp_path)
    assert len(e.value.offenders) == 1


class _Overflowing(ClientUpdate):
    """What passed the reader in some other way."""

    def block(self, layer):
        block = super().block(layer)
        return Kronecker(1e18 * block.output_factor, 1e38 * block.input_factor.sign().abs())

    def verify(self):
        pass


@pytest.mark.parametrize("value", [0, 0.99, -1, math.nan])
def test_less_than_the_median_client_is_no_bound(value, honest):
    with pytest.raises(ValueError, match="max_influence must be at least 1"):
        FisherMergeModule(honest, max_influence=value)


def test_a_checkpoint_keeps_what_was_measured_and_its_bound(honest, tmp_path):
    first = FisherMergeModule(honest, max_influence=2)
    trainer = quiet_trainer(tmp_path, max_epochs=-1)
    trainer.fit(first)
    path = tmp_path / "merge.ckpt"
    trainer.save_checkpoint(path)
    again = FisherMergeModule(honest, max_influence=2)
    quiet_trainer(tmp_path, max_epochs=-1).fit(again, ckpt_path=path)
    assert torch.equal(again.influence, first.influence)
    assert first.influence.any(dim=2).all()
    with pytest.raises(ValueError, match="of another merge"):
        quiet_trainer(tmp_path, max_epochs=-1).fit(FisherMergeModule(honest), ckpt_path=path)


# Buffers


class _Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(3, affine=False)
        self.register_buffer("index", torch.arange(4))
        self.register_buffer("mask", torch.tensor([True, False]))


def _with_buffers(samples, mean, var, count=5, index=(0, 1, 2, 3)):
    torch.manual_seed(0)
    model = _Normed()
    model.norm.running_mean.fill_(mean)
    model.norm.running_var.fill_(var)
    model.norm.num_batches_tracked.fill_(count)
    model.index.copy_(torch.tensor(index))
    layers = find_layers(model)
    blocks = {layer.name: Identity(layer.shape) for layer in layers}
    kinds = dict.fromkeys(blocks, "identity")
    header = UpdateHeader(samples, "identity", "", "categorical", 0, layers, kinds)
    return ClientUpdate.from_model(model, header, blocks)


def test_a_hostile_client_does_not_own_the_buffers():
    honest = [_with_buffers(100 + k, 0.1 * k, 1 + 0.1 * k, count=k) for k in range(5)]
    mallory = _with_buffers(2**39, -1e12, 1e12, count=10**9, index=(10**6, 1, 2, 3))
    free = merge_buffers([*honest, mallory])
    assert float(free["norm.running_mean"].min()) < -1e11
    held = merge_buffers([*honest, mallory], max_influence=2)
    assert float(held["norm.running_mean"].abs().max()) < 0.5
    assert 0.5 < float(held["norm.running_var"].min()) < 2
    for merged in (free, held):
        assert merged["index"].tolist() == [0, 1, 2, 3]
        assert merged["mask"].tolist() == [True, False]
        assert merged["mask"].dtype == torch.bool
        assert int(merged["norm.num_batches_tracked"]) == 10**9


def test_honest_buffers_are_merged_as_without_a_bound():
    honest = [_with_buffers(100 + k, 0.1 * k, 1 + 0.1 * k, count=k) for k in range(5)]
    free, held = merge_buffers(honest), merge_buffers(honest, max_influence=10)
    for name, tensor in free.items():
        assert torch.equal(tensor, held[name]), name
    assert int(free["norm.num_batches_tracked"]) == 4
