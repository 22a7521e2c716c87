"""What hostile clients can do to a merge, and what a cap on their influence leaves of it."""

import dataclasses
import math
import warnings

import pytest
import torch
from helpers.federation import quiet_trainer, tiny_model, tiny_updates

from lightning_fedfisher import (
    METHODS,
    ClientUpdate,
    FisherMergeModule,
    MergeError,
    merge_updates,
)
from lightning_fedfisher.curvature.kronecker import Kronecker
from lightning_fedfisher.merge.influence_cap import cap
from lightning_fedfisher.merge.objective import Quadratic
from lightning_fedfisher.merge.typical_curvature import TypicalCurvature

ROWS, COLUMNS = SHAPE = (3, 4)
KINDS = ("identity", "diagonal", "dense", "kronecker", "lookup", "ekfac", "lookup ekfac")
SHARES = (5.0, 1.0, 3.0, 2.0, 7.0)


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
    loose, told = _merge(honest, tmp_path, max_influence=10)
    assert not told
    for name, tensor in loose.merged_state_dict().items():
        assert torch.equal(tensor, free.merged_state_dict()[name])
    assert loose.influence.shape == (4, 7, 3)
    assert 1 < float(loose.influence.max()) < 7.5


def test_the_default_bound_is_twice_the_median_client(honest, tmp_path):
    default, _ = _merge(honest, tmp_path)
    assert default.max_influence == METHODS["fedfisher"].max_influence == 2
    free = _merge(honest, tmp_path, max_influence=math.inf)[0].merged_state_dict()
    spread = max(_apart(free, update.parameters) for update in honest)
    assert _apart(default.merged_state_dict(), free) < 0.2 * spread


def test_a_client_below_the_bound_and_near_it_is_told(honest, tmp_path):
    most = 1.2 * float(_merge(honest, tmp_path, max_influence=10)[0].influence.max())
    module, (told,) = _merge(honest, tmp_path, max_influence=most)
    assert float(module.influence.max()) < most
    assert f"max_influence caps each of these at {most:g} times" in told
    assert "of one that you do not trust" in told


def test_a_copy_under_another_name_counts_once(honest, tmp_path):
    path = tmp_path / "copy.safetensors"
    honest[2].save(path)
    alone = merge_updates(honest)
    with pytest.warns(UserWarning, match="counts once") as caught:
        copied = merge_updates([*honest, path, honest[2]])
    text = next(str(w.message) for w in caught if "counts once" in str(w.message))
    assert f"{path} is a copy of {honest[2].source}" in text
    assert len(text.splitlines()) == 3
    assert "allow_duplicates=True" in text
    assert [client.digest for client in copied.clients] == [update.digest for update in honest]
    for name, tensor in alone.state_dict.items():
        assert torch.equal(tensor, copied.state_dict[name])
    twice = merge_updates([*honest, path], allow_duplicates=True)
    assert len(twice.clients) == len(honest) + 1
    assert _apart(twice.state_dict, alone.state_dict) > 1e-4


def test_who_alone_informs_a_direction_does_not_decide_it():
    # The first input is dark in all clients but one, who has no other.
    honest = [torch.tensor([[0.0, 0.1 * k]]) for k in range(5)]
    curvature = Kronecker(torch.eye(1), torch.diag(torch.tensor([0.05, 1.0])))
    mallory = Kronecker(torch.eye(1), torch.diag(torch.tensor([1.0, 0.0])))
    problem = Quadratic([1] * 6, [*honest, torch.tensor([[1.0, 0.0]])], [curvature] * 5 + [mallory])
    typical = TypicalCurvature.of(problem.curvatures)
    found = {}
    for most, compared in ((2.0, None), (2.0, typical), (1e3, typical)):
        held = cap(problem, torch.ones(6, 3).double(), most, compared)
        total = sum(c.column_factor[0, 0] for c in held.curvatures)
        found[most, compared is None] = float(held.curvatures[-1].column_factor[0, 0] / total)
    assert found[2.0, True] == found[1e3, False] == pytest.approx(0.8)
    assert found[2.0, False] < 0.5


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
    assert "does not cap it" in told[0]
    # The same client is free to take the model anywhere where nothing bounds it.
    moved = _apart(owned.merged_state_dict(), good)
    assert moved > 2 * _apart(bounded.merged_state_dict(), good)
    if "weights" in ATTACKS[attack] and attack != "opposite":
        assert moved > 1e4 * spread


def test_two_clients_cannot_judge_each_other(honest, tmp_path):
    _, told = _merge([honest[0], _forged(honest[1], curvature=1e8)], tmp_path)
    assert not told


def test_curvature_that_overflows_is_refused_by_name(honest, tmp_path):
    mallory = _forged(honest[0], curvature=1e16, weights=lambda tensor: 1e8 * tensor)
    for method in ("regmean", "fedavg"):
        FisherMergeModule([*honest, mallory], method=method)
    with pytest.raises(
        MergeError, match=r"mallory is too large for float32 in layer network\.\d"
    ) as e:
        _merge([*honest, _Overflowing(mallory.header, mallory._tensors, "mallory")], tmp_path)
    assert len(e.value.offenders) == 1


class _Overflowing(ClientUpdate):
    """What passed the reader in some other way."""

    def block(self, layer, *how, **options):
        block = super().block(layer, *how, **options)
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
    other = FisherMergeModule(honest, max_influence=3)
    with pytest.raises(ValueError, match="of another merge"):
        quiet_trainer(tmp_path, max_epochs=-1).fit(other, ckpt_path=path)


def test_a_bound_that_nobody_reaches_changes_no_bit(honest, tmp_path):
    default, _ = _merge(honest, tmp_path, max_influence=math.inf)
    for most in (10, 1e6):
        module, told = _merge(honest, tmp_path, max_influence=most)
        assert not told
        for name, tensor in module.merged_state_dict().items():
            assert torch.equal(tensor, default.merged_state_dict()[name])
    tight, _ = _merge(honest, tmp_path, max_influence=1)
    assert _apart(tight.merged_state_dict(), default.merged_state_dict()) > 1e-3


def test_identical_clients_weigh_alike_and_are_returned(honest, tmp_path):
    module, told = _merge([honest[2]] * 5, tmp_path, max_influence=1, allow_duplicates=True)
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
    header = dataclasses.replace(honest[0].header, num_samples=honest[0].num_samples + 1)
    mallory = _Overflowing(header, honest[0]._tensors, "mallory")
    with pytest.raises(MergeError) as error:
        _merge([*clients[:3], mallory, *clients[3:]], tmp_path, method="regmean")
    (offender,) = error.value.offenders
    assert offender.startswith("mallory is too large for float32 in layer network.")


def test_a_merge_that_goes_on_keeps_what_was_measured_before(honest, tmp_path):
    clients = [*honest, _forged(honest[0], curvature=1e4)]
    row = dataclasses.replace(METHODS["fedfisher"], steps_per_epoch=1)
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
