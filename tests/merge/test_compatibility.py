"""Which updates go into a merge: one bad file among ten, wherever it stands."""

import dataclasses
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from helpers.federation import quiet_trainer, tiny_model, tiny_updates
from torch import nn

from lightning_fedfisher import METHODS, ClientUpdate, FisherMergeModule, MergeError
from lightning_fedfisher.curvature.base import Identity
from lightning_fedfisher.layers import Layer, find_layers
from lightning_fedfisher.merge.compatibility import check_updates
from lightning_fedfisher.merge.without_trainer import merge_updates
from lightning_fedfisher.update.file_format import write_file
from lightning_fedfisher.update.header import UpdateHeader

CLIENTS = 10


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    tiny_updates(folder, clients=CLIENTS, epochs=1)
    tiny_updates(folder / "diagonal", clients=1, epochs=1, curvature="diagonal")
    tiny_updates(folder / "exact", clients=1, epochs=1, fisher="exact")
    return folder


@pytest.fixture
def files(trained, tmp_path):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    return [tmp_path / f"client-{client}.safetensors" for client in range(CLIENTS)]


def _changed(path, **changes):
    update = ClientUpdate.open(path)
    header = dataclasses.replace(update.header, **changes)
    ClientUpdate(header, dict(update._tensors)).save(path)


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def _flip(path):
    content = bytearray(path.read_bytes())
    content[-60] ^= 1
    path.write_bytes(content)


def _put(path, name, change):
    update = ClientUpdate.open(path)
    tensors = dict(update._tensors)
    tensors[name] = change(tensors[name].clone())
    ClientUpdate(update.header, tensors).save(path)


def _foreign(path):
    model = nn.Sequential(nn.Linear(4, 2))
    layers = find_layers(model)
    blocks = {layer.name: Identity(layer.shape) for layer in layers}
    kinds = dict.fromkeys(blocks, "identity")
    header = UpdateHeader(9, "identity", "", "categorical", 0, layers, kinds)
    ClientUpdate.from_model(model, header, blocks).save(path)


def _other_file(kind):
    return lambda path: shutil.copy(path.parent / kind / "client-0.safetensors", path)


FACTOR = "curvature/network.2/row_factor"
BAD = {
    "missing": (lambda path: path.unlink(), "there is no update file"),
    "truncated": (_truncate, "it is truncated or damaged"),
    "flipped bit": (_flip, "parameters/network.7.weight does not match its digest"),
    "not a number": (
        lambda path: _put(path, "parameters/network.5.bias", lambda t: t.fill_(torch.nan)),
        "parameters/network.5.bias holds 6 values that are not finite",
    ),
    "too large": (
        lambda path: _put(path, "parameters/network.5.bias", lambda t: t.fill_(1e19)),
        "parameters/network.5.bias holds values up to 1.0e+19",
    ),
    "asymmetric": (
        lambda path: _put(path, FACTOR, lambda t: t + t.triu(1)),
        f"{FACTOR} is not symmetric",
    ),
    "indefinite": (
        lambda path: _put(path, FACTOR, lambda t: -t),
        f"{FACTOR} is not positive semi-definite",
    ),
    "another model": (_foreign, "is of another model than"),
    "another kind": (_other_file("diagonal"), "curvature is diagonal, not kfac"),
    "another Fisher": (_other_file("exact"), "fisher is exact, not normalised"),
    "another wiring": (lambda path: _changed(path, fed_by={}), "ran its layers otherwise than"),
    "too many samples": (lambda path: _changed(path, num_samples=2**41), "num_samples is more"),
    "no samples": (lambda path: _changed(path, num_samples=0), "an empty client has no say"),
}


def _spoil(files, index, bad):
    spoil, reason = BAD[bad]
    if bad in ("too many samples", "no samples"):  # such an update cannot be made
        update = ClientUpdate.open(files[index])
        object.__setattr__(update.header, "num_samples", 2**41 if bad[:3] == "too" else 0)
        update.save(files[index])
    else:
        spoil(files[index])
    return reason


def _merged(module):
    quiet_trainer(".", max_epochs=-1).fit(module)
    return module.merged_state_dict()


@pytest.mark.parametrize("index", [0, 4, 9])
@pytest.mark.parametrize("bad", BAD)
def test_one_bad_file_among_ten_is_named_and_may_be_left_out(bad, index, files):
    reason = _spoil(files, index, bad)
    with pytest.raises(MergeError) as error:
        FisherMergeModule(files)
    assert all(str(files[index]) in offender for offender in error.value.offenders)
    assert reason in error.value.offenders[-1]
    assert len(error.value.offenders) == (2 if bad == "another model" else 1)  # no curvature either
    with pytest.warns(UserWarning, match="1 of 10 updates left out") as caught:
        module = FisherMergeModule(files, skip_invalid=True)
    assert [u.source for u in module.updates] == [str(f) for i, f in enumerate(files) if i != index]
    assert reason in str(caught[0].message)
    assert files[index].name in str(caught[0].message)


def test_the_nine_left_are_merged_as_by_themselves(files):
    _flip(files[3])
    with pytest.warns(UserWarning, match="left out"):
        module = FisherMergeModule(files, skip_invalid=True)
    alone = _merged(FisherMergeModule(files[:3] + files[4:]))
    for name, tensor in _merged(module).items():
        assert torch.equal(tensor, alone[name])


def test_nothing_is_said_where_nothing_is_left_out(files):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(FisherMergeModule(files, skip_invalid=True).updates) == CLIENTS


def test_all_bad_is_refused_whatever_is_skipped(files):
    for file in files:
        _truncate(file)
    with pytest.raises(MergeError) as error:
        FisherMergeModule(files, skip_invalid=True)
    assert len(error.value.offenders) == CLIENTS


def test_of_two_halves_the_first_is_right(files):
    for file in files[5:]:
        _changed(file, fed_by={})
    with pytest.raises(MergeError) as error:
        FisherMergeModule(files)
    assert [str(f) in o for f, o in zip(files[5:], error.value.offenders, strict=True)] == [
        True
    ] * 5
    _changed(files[0], fed_by={})
    with pytest.raises(MergeError) as error:
        FisherMergeModule(files)
    assert [o.split()[0] for o in error.value.offenders] == [str(file) for file in files[1:5]]


def test_all_offenders_are_told_at_once(files):
    spoiled = [bad for bad in BAD if bad != "another model"][: CLIENTS - 2]
    reasons = [_spoil(files, index, bad) for index, bad in enumerate(spoiled)]
    with pytest.raises(MergeError) as error:
        FisherMergeModule(files)
    for reason, offender in zip(reasons, error.value.offenders, strict=True):
        assert reason in offender


def test_examined_without_a_method_curvature_matters_still(files):
    _other_file("diagonal")(files[2])
    found = check_updates(files)
    assert [bool(one.offenders) for one in found] == [index == 2 for index in range(CLIENTS)]
    assert found[2].update is not None
    for_fedavg = check_updates(files, METHODS["fedavg"])
    assert not any(one.offenders for one in for_fedavg)
    assert check_updates([]) == []


def test_updates_in_memory_are_examined_alike(files):
    updates = [ClientUpdate.open(file) for file in files]
    model = tiny_model()
    model.load_state_dict({n: 1e19 * t for n, t in updates[0].parameters.items()})
    updates[5] = ClientUpdate(
        updates[0].header,
        {n: (t if "param" not in n else 1e19 * t) for n, t in updates[0]._tensors.items()},
        "mallory",
    )
    (bad,) = [one for one in check_updates(updates) if one.offenders]
    assert bad.source == "mallory"
    assert "more than 1e+09" in bad.offenders[0]


@pytest.mark.parametrize("bad", ["missing", "not a number", "another wiring"])
@pytest.mark.parametrize("index", [0, 4, 9])
def test_whatever_is_left_out_the_nine_are_merged_as_by_themselves(index, bad, files):
    _spoil(files, index, bad)
    with pytest.warns(UserWarning, match="1 of 10 updates left out"):
        module = FisherMergeModule(files, skip_invalid=True)
    alone = FisherMergeModule(files[:index] + files[index + 1 :])
    one, other = _merged(module), _merged(alone)
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert torch.equal(module.influence, alone.influence)


def test_of_ten_one_may_be_left(files):
    for file in files[:7] + files[8:]:
        _flip(file)
    with pytest.warns(UserWarning, match="9 of 10 updates left out") as caught:
        module = FisherMergeModule(files, skip_invalid=True)
    assert [update.source for update in module.updates] == [str(files[7])]
    told = str(caught[0].message)
    assert [file.name in told for file in files] == [index != 7 for index in range(CLIENTS)]


@pytest.mark.parametrize("odd", [2, 4])
def test_updates_in_memory_and_in_files_are_counted_as_alike(odd, files):
    for file in files[:odd]:
        _changed(file, fed_by={})
    here = _trained_here(files[odd], files[odd].parent)
    sound = [*files[odd : 2 * odd - 1], *[here] * 2]
    with pytest.raises(MergeError) as error:
        FisherMergeModule([*files[:odd], *sound])
    assert [offender.split()[0] for offender in error.value.offenders] == [
        str(file) for file in files[:odd]
    ]
    assert FisherMergeModule(sound).updates[-1] is here


def _trained_here(path, folder):
    """An update as a callback leaves it, whose tables are in the order of the model."""
    (update,) = tiny_updates(folder / "here", clients=1, epochs=1)
    opened = ClientUpdate.open(path)
    assert update.architecture == opened.architecture
    assert list(update.architecture) != list(opened.architecture)
    return update


@pytest.mark.parametrize("index", [0, 4, 9])
def test_a_buffer_that_hides_behind_a_parameter_is_refused(index, files):
    update = ClientUpdate.open(files[index])
    tensors = dict(update._tensors)
    tensors["buffers/network.5.bias"] = tensors["parameters/network.5.bias"].clone()
    write_file(files[index], update.header, tensors)
    with pytest.raises(MergeError) as error:
        FisherMergeModule(files)
    (offender,) = error.value.offenders
    assert str(files[index]) in offender
    assert "network.5.bias is a buffer, and a parameter too" in offender
    with pytest.warns(UserWarning, match="1 of 10 updates left out"):
        assert len(FisherMergeModule(files, skip_invalid=True).updates) == CLIENTS - 1


def test_what_is_not_read_is_not_judged(files):
    _flip(files[3])
    _truncate(files[6])
    found = check_updates(files, verify=False)
    assert [bool(one.offenders) for one in found] == [index == 6 for index in range(CLIENTS)]
    found = check_updates(files)
    assert [bool(one.offenders) for one in found] == [index in (3, 6) for index in range(CLIENTS)]
    assert [one.update is None for one in found] == [index in (3, 6) for index in range(CLIENTS)]
    assert [one.source for one in found] == [str(file) for file in files]


def test_a_bad_file_has_no_part_in_what_most_are_like(files):
    # Five of another wiring, of which two are damaged: three are fewer than four.
    for file in files[:5]:
        _changed(file, fed_by={})
    _flip(files[0])
    _flip(files[1])
    files[9].unlink()
    reasons = ["does not match", "does not match", *["ran its layers otherwise"] * 3, "no update"]
    with pytest.raises(MergeError) as error:
        FisherMergeModule(files)
    bad = [*files[:5], files[9]]
    for file, reason, offender in zip(bad, reasons, error.value.offenders, strict=True):
        assert file.name in offender
        assert reason in offender


def test_a_majority_that_the_method_refuses_decides_nothing(files):
    for file in files[:6]:
        _other_file("diagonal")(file)
    with pytest.raises(MergeError) as error:
        FisherMergeModule(files, method="regmean")
    assert {o.split()[0] for o in error.value.offenders} == {str(file) for file in files[:6]}
    with pytest.warns(UserWarning, match="6 of 10 updates left out"):
        module = FisherMergeModule(files, method="regmean", skip_invalid=True)
    assert len(module.updates) == 4


def _regrouped(path, change):
    """The same parameters of the same shapes and kinds, in other layers."""
    update = ClientUpdate.open(path)
    layers = {layer.name: layer for layer in update.layers}
    kinds, tensors = dict(update.header.kinds), dict(update._tensors)
    change(layers, kinds, tensors)
    header = dataclasses.replace(update.header, layers=tuple(layers.values()), kinds=kinds)
    header = dataclasses.replace(header, curvature="kfac", fed_by={}, output_layer="")
    ClientUpdate(header, tensors).save(path)


def _take(layers, tensors, name, bias):
    """Gives a layer another bias, or none, and a curvature of the shape that it has then."""
    weight = layers[name].parameters[0]
    layers[name] = Layer(name, (weight,) if bias is None else (weight, bias))
    rows, columns = layers[name].shape
    tensors[f"curvature/{name}/row_factor"] = torch.eye(rows)
    tensors[f"curvature/{name}/column_factor"] = torch.eye(columns)


def _apart(layers, kinds, tensors):
    """A bias in a layer of its own."""
    name = next(iter(layers))
    bias = layers[name].parameters[1]
    _take(layers, tensors, name, None)
    layers[bias[0]], kinds[bias[0]] = Layer(bias[0], (bias,)), "diagonal"
    tensors[f"curvature/{bias[0]}/values"] = torch.ones(bias[1][0], 1)


def _turned(layers, kinds, tensors):
    """A bias before its weight: the first column, and no longer the last."""
    name, layer = next(iter(layers.items()))
    layers[name] = Layer(name, layer.parameters[::-1])


@pytest.mark.parametrize("change", [_apart, _turned])
@pytest.mark.parametrize("method", ["fedavg", "regmean", "fedfisher"])
@pytest.mark.parametrize("index", [0, 6])
def test_layers_of_other_parameters_are_left_out_by_name(change, method, index, files):
    files = files[:7]
    for file in files:
        _changed(file, fed_by={}, output_layer="")
    _regrouped(files[index], change)
    ClientUpdate.open(files[index]).verify()
    with pytest.raises(MergeError, match="is of another model than") as error:
        merge_updates(files, method=method)
    (offender,) = error.value.offenders
    assert offender.startswith(str(files[index]))
    assert "layer network." in offender
    with pytest.warns(UserWarning, match="1 of 7 updates left out"):
        merge_updates(files, method=method, skip_invalid=True)


def test_of_thousands_of_differences_some_are_told(files):
    model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(600)))
    layers = find_layers(model)
    kinds = {layer.name: "identity" for layer in layers}
    header = UpdateHeader(9, "identity", "", "categorical", 0, layers, kinds)
    many = ClientUpdate.from_model(model, header, {})
    (offender,) = check_updates([*files[:3], many])[3].offenders
    assert offender.count(", not ") == 20
    assert "more" in offender
    assert len(offender) < 4000


def test_whatever_else_is_wrong_with_a_file_is_a_refusal_by_name(files, monkeypatch):
    def failing(header, shapes):
        raise RuntimeError("out of range" if header.num_samples else "")

    monkeypatch.setattr("lightning_fedfisher.update.client_update.inconsistencies", failing)
    (found,) = check_updates(files[:1])
    assert found.update is None
    (offender,) = found.offenders
    assert str(files[0]) in offender
    assert "it is malformed (RuntimeError('out of range'))" in offender


@pytest.mark.parametrize("large", ["parameters/network.0.weight", "curvature/network.2/row_factor"])
@pytest.mark.parametrize("method", ["fedavg", "regmean", "fedfisher"])
def test_what_float32_cannot_merge_is_left_out_by_name(large, method, files):
    times = 1e18 if large.startswith("parameters") else 1e25
    _put(files[4], large, lambda tensor: torch.full_like(tensor, times))
    if method == "fedavg" and large.startswith("curvature"):
        merge_updates(files, method=method)  # which reads none
        return
    with pytest.raises(MergeError, match=f"client-4.*\n.*{large} holds values up to"):
        merge_updates(files, method=method)
    with pytest.warns(UserWarning, match="1 of 10 updates left out"):
        merge_updates(files, method=method, skip_invalid=True)


def test_a_bad_file_is_left_out_where_lightning_was_never_imported(files):
    files[3].unlink()
    script = f"""
import sys, warnings
from lightning_fedfisher import merge_updates
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    found = merge_updates({[str(file) for file in files[:5]]}, method="fedavg", skip_invalid=True)
(left_out,) = [str(one.message) for one in told if "left out" in str(one.message)]
print(len(found.clients), "client-3" in left_out, "lightning.pytorch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == ["4", "True", "False"], done.stderr
