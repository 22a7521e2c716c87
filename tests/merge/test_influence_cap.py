"""What one client weighs, against dense oracles, and what a hostile one can do."""

import dataclasses
import itertools
import math
import warnings

import pytest
import torch
from helpers.federation import quiet_trainer, tiny_model, tiny_updates
from oracles import merge as oracle
from torch import nn

from lightning_fedfisher import METHODS, ClientUpdate, FisherMergeModule, MergeError
from lightning_fedfisher.curvature.base import Identity
from lightning_fedfisher.curvature.dense import Dense
from lightning_fedfisher.curvature.diagonal import Diagonal
from lightning_fedfisher.curvature.embedding import EmbeddingEigenKronecker, EmbeddingKronecker
from lightning_fedfisher.curvature.kronecker import EigenKronecker, Kronecker
from lightning_fedfisher.layers import find_layers
from lightning_fedfisher.merge import influence_cap as influence
from lightning_fedfisher.merge.buffers import merge_buffers
from lightning_fedfisher.merge.influence_cap import (
    draw_in,
    hold,
    hold_values,
    measure,
    median,
    multiples,
    unusual,
)
from lightning_fedfisher.merge.objective import Quadratic
from lightning_fedfisher.update.header import UpdateHeader

ROWS, COLUMNS = SHAPE = (3, 4)
KINDS = ("identity", "diagonal", "dense", "kronecker", "lookup", "ekfac", "lookup ekfac")
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
            return EmbeddingKronecker(values, _moment(COLUMNS, generator))
    # As aligned inputs leave them, the bases are not orthogonal.
    bases = [torch.randn(n, n, generator=generator).double() for n in SHAPE]
    spectrum = torch.rand(SHAPE, generator=generator).double()
    if kind == "lookup ekfac":
        return EmbeddingEigenKronecker(bases[1], spectrum)
    return EigenKronecker(*bases, spectrum)


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
    curvatures[client] = Kronecker(curvature * one.row_factor, one.column_factor)
    return Quadratic(shares, weights, curvatures)


def _raw(problem, middle=None):
    """What each client weighs, by the median weights of this problem or of another."""
    flat = torch.stack([matrix.flatten() for matrix in problem.weights])
    middle = flat.quantile(0.5, dim=0) if middle is None else middle.flatten()
    rows = []
    for share, weights, curvature in zip(problem.shares, flat, problem.curvatures, strict=True):
        identity = torch.eye(ROWS * COLUMNS).double()
        dense = identity if curvature.kind == "identity" else oracle.written_out(curvature)
        pull = share * (dense @ (weights - middle)).norm()
        rows.append(torch.stack([share * dense.trace(), (weights - middle).norm(), pull]))
    return torch.stack(rows)


def _oracle(problem):
    table = _raw(problem)
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


@pytest.mark.parametrize("size", [1.0, 1e6])
def test_what_overflows_is_infinite_whatever_the_others_weigh(size):
    weights = [matrix.float() for matrix in _problem().weights]
    curvatures = [Diagonal(torch.full(SHAPE, size * (1 + k))) for k in range(5)]
    curvatures[2] = Diagonal(torch.full(SHAPE, 3e38))  # twelve of them are more than float32 holds
    found = measure(Quadratic(SHARES, weights, curvatures))
    others = [0, 1, 3, 4]
    assert found[2, [0, 2]].isinf().all()
    assert found[2, 1].isfinite()
    assert found[others].isfinite().all()
    shares = torch.tensor(SHARES).double()[others] * torch.tensor([1.0, 2, 4, 5])
    torch.testing.assert_close(found[others, 0] / found[0, 0], shares / shares[0])


def test_weights_that_are_not_finite_are_that_clients_alone():
    problem = _problem()
    weights = [*problem.weights[:4], torch.full(SHAPE, math.nan).double()]
    found = measure(Quadratic(problem.shares, weights, problem.curvatures))
    assert found[4, 1:].isinf().all()
    assert found[:4].isfinite().all()


def test_clients_without_information_have_no_part_in_the_median():
    problem = _problem("diagonal")
    curvatures = list(problem.curvatures)
    curvatures[0] = curvatures[4] = Diagonal(torch.zeros(SHAPE).double())
    found = measure(Quadratic(SHARES, problem.weights, curvatures))
    traces = torch.tensor(SHARES[1:4]) * torch.stack([c.values.sum() for c in curvatures[1:4]])
    assert found[0, 0] == found[4, 0] == found[0, 2] == found[4, 2] == 0
    torch.testing.assert_close(found[1:4, 0], traces / traces.median())


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


def _times(curvature, factor):
    parts = curvature.tensors()
    name = "spectrum" if "spectrum" in parts else next(iter(parts))
    return type(curvature).from_tensors(parts | {name: factor * parts[name]}, SHAPE)


def _unit(held, problem):
    """What became of a share that was not reduced, when all were scaled to sum to one."""
    return max(new / old for new, old in zip(held.shares, problem.shares, strict=True))


@pytest.mark.parametrize("most", [2.0, 10.0])
@pytest.mark.parametrize("much", ["share", "curvature"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_client_has_a_bounded_share_of_the_information(kind, much, most):
    problem = _problem(kind)
    shares, weights, curvatures = map(list, _parts(problem))
    weights = weights[:1] * 5  # so that nobody has a pull, and information alone is held
    if much == "share" or kind == "identity":
        shares[3] *= 1e8
    else:
        curvatures[3] = _times(curvatures[3], 1e8)
    problem = Quadratic(shares, weights, curvatures)
    before = _raw(problem)[:, 0]
    assert before[3] > 0.999 * before.sum()
    held = hold(problem, measure(problem), most)
    left = _raw(held)[:, 0]
    assert float(left[3] / left.sum()) <= most / (most + (5 - 1) / 2)
    assert float(left[3]) == pytest.approx(most * _unit(held, problem) * float(before.median()))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", KINDS)
def test_whatever_clients_send_they_are_within_the_bounds(kind, seed):
    dice = torch.Generator().manual_seed(seed)
    shares, weights, curvatures = _parts(_problem(kind, seed=seed))
    shares = [n * float(10 ** (4 * torch.randn(1, generator=dice))) for n in shares]
    weights = [m * 10 ** (2 * torch.randn(1, generator=dice)) for m in weights]
    problem = Quadratic(shares, weights, curvatures)
    before, weighed = _raw(problem), measure(problem)
    held = hold(problem, weighed, 2.0)
    after = _raw(held, median(weights))
    after[:, [0, 2]] /= _unit(held, problem)
    assert (before > 2.1 * before.median(dim=0).values).any()
    assert (after <= 2.0 * before.median(dim=0).values * (1 + 1e-6)).all()
    for old, new, distance in zip(weights, held.weights, weighed[:, 1], strict=True):
        assert (old is new) == (distance <= 2)


def test_what_is_held_does_not_depend_on_units_or_order():
    problem = _scaled(_problem(), 3, share=1e4, offset=1e4)
    held = hold(problem, measure(problem), 2.0)
    other = Quadratic(
        [7 * share for share in problem.shares],
        [3 * matrix for matrix in problem.weights],
        [Kronecker(5 * c.row_factor, c.column_factor) for c in problem.curvatures],
    )
    scaled = hold(other, measure(other), 2.0)
    torch.testing.assert_close(torch.tensor(scaled.shares), torch.tensor(held.shares))
    order = [3, 0, 4, 1, 2]
    other = Quadratic(*([part[i] for i in order] for part in _parts(problem)))
    turned = hold(other, measure(other), 2.0)
    for place, client in enumerate(order):
        torch.testing.assert_close(scaled.weights[client], 3 * held.weights[client])
        torch.testing.assert_close(turned.weights[place], held.weights[client])
        assert turned.shares[place] == pytest.approx(held.shares[client])


def _parts(problem):
    return problem.shares, problem.weights, problem.curvatures


def test_what_is_measured_does_not_depend_on_units_or_order():
    problem = _problem()
    scaled = Quadratic(
        [7 * share for share in problem.shares],
        [3 * matrix for matrix in problem.weights],
        [Kronecker(5 * c.row_factor, c.column_factor) for c in problem.curvatures],
    )
    torch.testing.assert_close(measure(scaled), measure(problem))
    order = [3, 0, 4, 1, 2]
    turned = Quadratic(*([part[i] for i in order] for part in _parts(problem)))
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
        name: Kronecker(curvature * block.row_factor, block.column_factor)
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
        return Kronecker(1e18 * block.row_factor, 1e38 * block.column_factor.sign().abs())

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
    assert torch.equal(again.distances, first.distances)
    assert first.influence.any(dim=2).all()
    with pytest.raises(ValueError, match="of another merge"):
        quiet_trainer(tmp_path, max_epochs=-1).fit(FisherMergeModule(honest), ckpt_path=path)


def test_a_bound_that_nobody_reaches_changes_no_bit(honest, tmp_path):
    default, _ = _merge(honest, tmp_path)
    for most in (10, 1e6):
        module, told = _merge(honest, tmp_path, max_influence=most)
        assert not told
        for name, tensor in module.merged_state_dict().items():
            assert torch.equal(tensor, default.merged_state_dict()[name])
    tight, _ = _merge(honest, tmp_path, max_influence=1)
    assert _apart(tight.merged_state_dict(), default.merged_state_dict()) > 1e-3


def test_identical_clients_weigh_alike_and_are_returned(honest, tmp_path):
    module, told = _merge([honest[2]] * 5, tmp_path, max_influence=1)
    assert not told
    assert (module.influence[:, :, 0] == 1).all()
    assert not module.influence[:, :, 1:].any()
    for name, tensor in module.merged_state_dict().items():
        torch.testing.assert_close(tensor, honest[2].parameters[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("place", [0, 4, 7])
def test_what_a_hostile_client_is_told_for_is_what_it_did(place, honest, tmp_path):
    told = {}
    for attack, options in ATTACKS.items():
        clients = [*honest[:place], _forged(honest[0], **options), *honest[place:]]
        module, (message,) = _merge(clients, tmp_path, max_influence=2)
        (told[attack],) = [line for line in message.splitlines() if line.startswith("mallory")]
        assert int(module.influence.amax(dim=(0, 2)).argmax()) == place
        assert "network." in told[attack]
    assert "information" in told["samples"]
    assert "information" in told["curvature"]
    assert "distance" not in told["curvature"]
    assert "distance" in told["weights"]
    assert "information" not in told["weights"]
    assert all(what in told["all"] for what in ("information", "distance", "pull"))


@pytest.mark.parametrize("attack", ["samples", "weights"])
@pytest.mark.parametrize("method", ["fedavg", "regmean"])
def test_published_methods_are_bounded_where_wanted(method, attack, honest, tmp_path):
    good = _merge(honest, tmp_path, method=method)[0].merged_state_dict()
    spread = max(_apart(good, update.parameters) for update in honest)
    mallory = _forged(honest[0], **ATTACKS[attack])
    clients = [*honest, mallory]
    bounded = _merge(clients, tmp_path, method=method, max_influence=2)[0].merged_state_dict()
    assert _apart(bounded, good) < spread
    owned = _merge(clients, tmp_path, method=method)[0].merged_state_dict()
    if attack == "samples":
        assert _apart(owned, mallory.parameters) < 0.1 * _apart(bounded, mallory.parameters)
    else:
        assert _apart(owned, good) > 1e3 * spread


def test_clients_are_held_alike_from_disk(honest, tmp_path):
    clients = [*honest, _forged(honest[0], **ATTACKS["all"])]
    there, _ = _merge(clients, tmp_path, max_influence=2, memory_budget=0)
    here, _ = _merge(clients, tmp_path, max_influence=2)
    assert torch.equal(there.influence, here.influence)
    for name, tensor in there.merged_state_dict().items():
        assert torch.equal(tensor, here.merged_state_dict()[name])


@pytest.mark.parametrize("size", [1.0, 1e7])
def test_overflow_is_refused_by_name_whatever_the_others_weigh(size, honest, tmp_path):
    clients = [_forged(update, curvature=size) for update in honest]
    for index, client in enumerate(clients):
        client.source = f"client {index}"
    mallory = _Overflowing(honest[0].header, honest[0]._tensors, "mallory")
    with pytest.raises(MergeError) as error:
        _merge([*clients[:3], mallory, *clients[3:]], tmp_path, method="regmean")
    (offender,) = error.value.offenders
    assert offender.startswith("mallory is too large for float32 in layer network.")


def test_a_merge_that_goes_on_keeps_what_was_measured_before(honest, tmp_path):
    clients = [*honest, _forged(honest[0], curvature=1e4)]
    row = dataclasses.replace(METHODS["fedfisher"], sweep=1)
    options = {"method": row, "memory_budget": 0, "max_influence": 3}  # a layer after the other
    whole, _ = _merge(clients, tmp_path, **options)
    first = FisherMergeModule(clients, **options)
    trainer = quiet_trainer(tmp_path, max_epochs=len(whole.history) // 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(first)
    measured = first.influence.any(dim=2).all(dim=1)
    assert measured.any()
    assert not measured.all()
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    again = FisherMergeModule(clients, **options)
    with pytest.warns(UserWarning, match="of the median client's") as caught:
        quiet_trainer(tmp_path, max_epochs=-1).fit(again, ckpt_path=tmp_path / "half.ckpt")
    assert torch.equal(again.influence, whole.influence)
    assert any(
        "4 more layers" in str(w.message) or "1 more layers" in str(w.message) for w in caught
    )
    for name, tensor in again.merged_state_dict().items():
        assert torch.equal(tensor, whole.merged_state_dict()[name])


@pytest.mark.parametrize("most", [1, 3, math.inf])
def test_a_checkpoint_of_another_bound_is_of_another_merge(most, honest, tmp_path):
    first = FisherMergeModule(honest, max_influence=2)
    trainer = quiet_trainer(tmp_path, max_epochs=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(first)
    trainer.save_checkpoint(tmp_path / "merge.ckpt")
    other = FisherMergeModule(honest, max_influence=most)
    with pytest.raises(ValueError, match="of another merge"):
        quiet_trainer(tmp_path, max_epochs=-1).fit(other, ckpt_path=tmp_path / "merge.ckpt")


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


def _mixed(value, dtype=torch.float32):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)
            self.register_buffer("constant", torch.tensor([1.0, value], dtype=dtype))

    torch.manual_seed(0)
    model = Mixed()
    layers = find_layers(model)
    blocks = {layer.name: Identity(layer.shape) for layer in layers}
    kinds = dict.fromkeys(blocks, "identity")
    header = UpdateHeader(9, "identity", "", "categorical", 0, layers, kinds)
    return ClientUpdate.from_model(model, header, blocks)


@pytest.mark.parametrize("most", [1, 2, 10])
@pytest.mark.parametrize("place", [0, 3, 5])
def test_nobody_moves_what_most_agree_on(place, most):
    honest = [_with_buffers(100 + k, 0.5, 2.0) for k in range(5)]
    mallory = _with_buffers(100, 1e12, 1e15)
    clients = [*honest[:place], mallory, *honest[place:]]
    held = merge_buffers(clients, max_influence=most)
    assert held["norm.running_mean"].tolist() == [0.5] * 3
    assert held["norm.running_var"].tolist() == [2.0] * 3
    assert float(merge_buffers(clients)["norm.running_mean"][0]) > 1e11


def test_half_of_the_clients_are_not_most():
    clients = [_mixed(value) for value in (3.0, 1.0, 9.0, 3.0)]
    assert merge_buffers(clients, 10)["constant"].tolist() == [1, 4]
    assert merge_buffers([*clients, clients[0]], 10)["constant"].tolist() == [1, 3]


@pytest.mark.parametrize("most", [2, math.inf])
def test_a_merge_bounds_the_buffers_as_the_layers(most):
    clients = [_with_buffers(100 + k, 0.1 * k, 1.0) for k in range(5)]
    clients.append(_with_buffers(100, 1e12, 1.0))
    module = FisherMergeModule(clients, method="fedavg", max_influence=most)
    assert (float(module.merged_state_dict()["norm.running_mean"][0]) < 0.5) == (most == 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("most", [1, 2, math.inf])
def test_the_largest_numbers_of_a_type_merge_to_numbers(most, dtype):
    largest = torch.finfo(dtype).max
    clients = {value: _mixed(value, dtype) for value in (-largest, largest, 0.0)}
    for values in itertools.product(clients, repeat=4):
        merged = merge_buffers([clients[value] for value in values], most)["constant"]
        assert merged.dtype == dtype
        assert torch.isfinite(merged).all(), values
        assert merged[0] == 1
        assert min(values) <= float(merged[1]) <= max(values)


def test_a_constant_that_most_hold_is_kept_whatever_it_is():
    lowest = torch.finfo(torch.float32).min
    clients = [_mixed(lowest), _mixed(-lowest), _mixed(lowest)]
    assert merge_buffers(clients, 2)["constant"].tolist() == [1, lowest]


def test_a_variance_that_float16_cannot_hold_is_the_largest_that_it_can():
    clients = [_with_buffers(10, mean, 1.0) for mean in (-3e4, 3e4)]
    for client in clients:
        for name in ("running_mean", "running_var"):
            client._tensors[f"buffers/norm.{name}"] = client.buffers[f"norm.{name}"].half()
    merged = merge_buffers(clients)
    assert merged["norm.running_mean"].tolist() == [0, 0, 0]
    assert merged["norm.running_var"].tolist() == [torch.finfo(torch.float16).max] * 3


@pytest.mark.parametrize("most", [10, math.inf])
def test_buffers_are_those_of_the_pooled_samples(most):
    generator = torch.Generator().manual_seed(0)
    data = [torch.randn(40, 3, generator=generator).double() + 0.1 * k for k in range(4)]
    clients = []
    for rows in data:
        client = _with_buffers(len(rows), 0.0, 1.0)
        client._tensors["buffers/norm.running_mean"] = rows.mean(0)
        client._tensors["buffers/norm.running_var"] = rows.var(0, unbiased=False)
        clients.append(client)
    merged, pooled = merge_buffers(clients, most), torch.cat(data)
    torch.testing.assert_close(merged["norm.running_mean"], pooled.mean(0))
    torch.testing.assert_close(merged["norm.running_var"], pooled.var(0, unbiased=False))


@pytest.mark.parametrize(
    ("attack", "bound"),
    [
        ({"mean": 1e12, "var": 1.2}, 1.5),
        ({"mean": 0.2, "var": 1e12}, 1.5),
        ({"samples": 2**39, "mean": 0.9, "var": 1.2}, 1.5),
    ],
    ids=str,
)
def test_each_statistic_is_held_by_itself(attack, bound):
    honest = [_with_buffers(100 + k, 0.1 * k, 1 + 0.1 * k) for k in range(5)]
    mallory = _with_buffers(**{"samples": 100} | attack)
    held = merge_buffers([*honest, mallory], max_influence=2)
    assert 0.1 < float(held["norm.running_mean"][0]) < 0.6
    assert 1.0 < float(held["norm.running_var"][0]) < bound
    order = [3, 5, 0, 4, 1, 2]
    turned = merge_buffers([[*honest, mallory][i] for i in order], max_influence=2)
    for name, tensor in held.items():
        torch.testing.assert_close(turned[name], tensor)


def test_what_is_held_of_plain_values_is_the_median_clients():
    shares = [1.0, 2.0, 3.0, 4.0, 1e6]
    values = [torch.tensor([x, 0.0]).double() for x in (-2.0, -1.0, 0.0, 1.0, 1e9)]
    held, drawn = hold_values(shares, values, 2.0)
    assert held == pytest.approx([1, 2, 3, 4, 6])
    # Those at the median have no part: of 1, 1, 2 and 1e9 the median is 1.5.
    assert [float(v[0]) for v in drawn] == pytest.approx([-2, -1, 0, 1, 3])
    assert all(one is other for one, other in zip(drawn[:4], values[:4], strict=True))
    same, still = hold_values(shares, values, math.inf)
    assert same == shares
    assert all(one is other for one, other in zip(still, values, strict=True))


@pytest.mark.parametrize(
    ("values", "merged"),
    [
        ([3, 3, 9], 3),
        ([9, 3, 3], 3),
        ([3, 3, 9, 9], 9),
        ([3, 5, 9, 3], 9),
        ([3, 3, 3, 9], 3),
        ([7, 7, 7, 2], 7),
        ([4, 6], 6),
        ([5], 5),
    ],
    ids=str,
)
def test_whole_numbers_are_what_most_agree_on_or_the_largest(values, merged):
    clients = [_with_buffers(9, 0.0, 1.0, index=(0, 1, 2, value)) for value in values]
    for most in (1, math.inf):
        found = merge_buffers(clients, most)["index"]
        assert found.dtype == torch.int64
        assert found.tolist() == [0, 1, 2, merged]
