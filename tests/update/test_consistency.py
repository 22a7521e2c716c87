"""Headers and tensors that contradict each other are refused, with every contradiction named."""

import dataclasses
import re

import pytest
import torch
from helpers.small_updates import ASKED, header_of, linear, update_of
from helpers.update_files import (
    content,
    drop_tensor,
    feed,
    forge,
    make_header,
    put_tensor,
    read,
    refusal,
    set_field,
)
from torch import nn

from lightning_fedfisher import ClientUpdate, UpdateError
from lightning_fedfisher.curvature.base import Identity
from lightning_fedfisher.curvature.registry import INPUT_KINDS, KINDS
from lightning_fedfisher.layers import Layer, Source, find_layers
from lightning_fedfisher.update.consistency import inconsistencies


def _kind(value):
    return lambda fields, tensors: fields["kinds"].update({"norm": value})


def _cover_twice(fields, tensors):
    norm = next(layer for layer in fields["layers"] if layer["name"] == "norm")
    fields["layers"].append({"name": "again", "parameters": norm["parameters"][:1]})
    fields["kinds"]["again"] = "identity"


def _cover_twice_in_one_layer(fields, tensors):
    norm = next(layer for layer in fields["layers"] if layer["name"] == "norm")
    norm["parameters"].append(norm["parameters"][0])


LIES = {
    "parameter missing": (drop_tensor("parameters/conv.bias"), "parameters/conv.bias"),
    "curvature missing": (drop_tensor("curvature/norm/values"), "curvature/norm/values"),
    "parameter extra": (put_tensor("parameters/more", torch.ones(2)), "parameters/more"),
    "curvature extra": (put_tensor("curvature/norm/more", torch.ones(2)), "curvature/norm/more"),
    "group extra": (put_tensor("more", torch.ones(2)), "more"),
    "parameter shape": (put_tensor("parameters/conv.bias", torch.ones(4)), "parameters/conv.bias"),
    "parameter transposed": (
        put_tensor("parameters/conv.weight", torch.ones(1, 3, 3, 3)),
        "parameters/conv.weight",
    ),
    "curvature shape": (
        put_tensor("curvature/norm/values", torch.ones(2, 3)),
        "curvature/norm/values",
    ),
    "kind unknown": (_kind("kfac2"), "layer norm: unknown curvature kfac2"),
    "kind of another block": (_kind("kronecker"), "curvature/norm/row_factor"),
    "kind is a class path": (_kind("builtins.eval"), "layer norm"),
    "no kinds": (set_field("kinds", {}), "layer norm"),
    "parameter in two layers": (_cover_twice, "parameter norm.weight belongs to two layers"),
    "parameter twice in a layer": (_cover_twice_in_one_layer, "layer norm: 3 parameters in one"),
    "no layers": (set_field("layers", []), "parameters/conv.weight"),
    "layer of nothing": (set_field("layers", [{"name": "norm", "parameters": []}]), "layer norm"),
    "num_samples 0": (set_field("num_samples", 0), "num_samples is 0"),
    "num_samples negative": (set_field("num_samples", -5), "num_samples is -5"),
    "curvature_samples negative": (set_field("curvature_samples", -1), "curvature_samples is -1"),
    "alias of nothing": (
        set_field("aliases", {"v": "nothing"}),
        "v cannot be another name of nothing",
    ),
    "alias is a parameter": (
        set_field("aliases", {"norm.weight": "norm.weight"}),
        "norm.weight cannot be another name",
    ),
    "frozen and trained": (set_field("frozen", {"norm.weight": "0"}), "norm.weight is frozen and"),
    "source is no layer": (feed("norm", "more"), "layer norm cannot read more: one of them is"),
    "reader is no layer": (feed("more", "norm"), "layer more cannot read norm: one of them is"),
    "source of a bias": (feed("norm", "conv.bias"), "layer norm cannot read conv.bias"),
    "activation unknown": (feed("conv", "norm", "gelu"), "layer conv: unknown activation gelu"),
    "activation empty": (feed("conv", "norm", ""), "layer conv: unknown activation"),
    "more units than inputs": (feed("norm", "conv"), "norm cannot read conv: its inputs do not"),
    "no whole block": (feed("conv", "größe/头"), "conv cannot read größe/头: its inputs do not"),
    "reads itself": (feed("conv", "conv"), "layer conv reads its own outputs"),
    "a fit of no layer": (
        set_field("fit", {"squared_error": 0.5, "observations": 1.0}),
        "a fit is told",
    ),
    "head is no layer": (
        set_field("output_layer", "conv.weight"),
        "the output layer conv.weight is no layer",
    ),
}


@pytest.mark.parametrize(("change", "reason"), LIES.values(), ids=LIES)
def test_a_header_that_contradicts_the_tensors_is_refused(change, reason, file):
    forge(file, change)
    assert reason in refusal(file)


def test_forging_itself_is_not_what_is_refused(file, saved):
    forge(file, lambda fields, tensors: None)
    assert content(read(file)) == saved[1]


def _double_name(fields, tensors):
    fields["layers"] = [{"name": "x", "parameters": [[name, [3]]]} for name in ("a", "b")]
    fields["kinds"] = {"x": "diagonal"}
    tensors.clear()
    tensors["parameters/a"], tensors["parameters/b"] = torch.ones(3), torch.ones(3)
    tensors["curvature/x/values"] = torch.ones(3, 1)
    fields["digests"] = {}


def test_duplicate_layer_names_are_refused(file):
    forge(file, _double_name)
    assert "x" in refusal(file)


def test_a_missing_buffer_is_refused(file):
    forge(file, drop_tensor("buffers/norm.running_var"))
    assert "buffers/norm.running_var" in refusal(file)


def test_all_that_misleads_is_named_at_once(file):
    def change(fields, tensors):
        fields["output_layer"] = "nothing"
        fields["fed_by"] = {
            "conv": {"layer": "conv", "activation": "relu"},
            "norm": {"layer": "conv", "activation": "relu"},
            "größe/头": {"layer": "conv", "activation": "tanh"},
            "more": {"layer": "conv", "activation": "relu"},
        }

    forge(file, change)
    message = refusal(file)
    for reason in (
        "the output layer nothing is no layer",
        "layer conv reads its own outputs",
        "layer norm cannot read conv: its inputs do not divide",
        "layer größe/头: unknown activation tanh",
        "layer more cannot read conv: one of them is no layer",
    ):
        assert reason in message


def test_a_source_that_divides_is_not_what_is_refused(file):
    forge(file, feed("größe/头", "conv"))
    assert read(file).header.fed_by == {"größe/头": Source("conv", "relu")}


def _in_line(layers=4, **changes):
    """A header of square layers, and shapes to match."""
    model = nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(layers)))
    found = find_layers(model)
    blocks = {layer.name: Identity(layer.shape) for layer in found}
    header = make_header("identity", found, blocks, **changes)
    return header, {f"parameters/{name}": tuple(p.shape) for name, p in model.named_parameters()}


def test_a_chain_of_sources_is_consistent():
    sources = {str(n): Source(str(n - 1), "identity") for n in (3, 1, 2)}
    assert inconsistencies(*_in_line(fed_by=sources, output_layer="3")) == []


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_layers_that_read_each_other_in_a_circle_are_refused(length):
    ring = {str(n): Source(str((n + 1) % length), "relu") for n in range(length)}
    (offender,) = inconsistencies(*_in_line(fed_by=ring))
    assert re.fullmatch(r"layer \d reads its own outputs", offender)


def test_a_kind_that_its_extraction_cannot_give_is_refused():
    header = header_of(linear(), "kronecker", curvature="diagonal")
    tensors = {"parameters/weight": torch.ones(2, 3), "parameters/bias": torch.ones(2)}
    tensors |= {"curvature/weight/row_factor": torch.eye(2)}
    tensors |= {"curvature/weight/column_factor": torch.eye(4)}
    with pytest.raises(UpdateError, match="kronecker is not diagonal curvature"):
        ClientUpdate(header, tensors)
    ClientUpdate(dataclasses.replace(header, curvature="kfac"), tensors)


@pytest.mark.parametrize("kind", [*ASKED, "identity"])
@pytest.mark.parametrize("asked", [*dict.fromkeys(ASKED.values()), "identity", "", "kronecker"])
def test_kinds_are_those_that_an_extraction_gives(asked, kind):
    given = {(asked, kind) for kind, asked in ASKED.items()} | {("identity", "identity")}
    given |= {("kfac", "diagonal"), ("ekfac", "diagonal")}  # of layers without a matrix product
    given |= {("input_gram", INPUT_KINDS.get(kind, "identity")) for kind in ASKED}
    header = header_of(linear(), kind, curvature=asked)
    shapes = {"parameters/weight": (2, 3), "parameters/bias": (2,)}
    (name,) = header.kinds
    parts = KINDS[kind].tensor_shapes((2, 4))
    shapes |= {f"curvature/{name}/{part}": shape for part, shape in parts.items()}
    found = inconsistencies(header, shapes)
    expected = [] if (asked, kind) in given else [f"layer {name}: {kind} is not {asked} curvature"]
    assert found == expected


@pytest.mark.parametrize("name", ["num_samples", "curvature_samples"])
def test_counts_nobody_has_are_refused(name):
    update_of(linear(), **{name: 2**40})
    with pytest.raises(UpdateError, match=f"{name} is more than"):
        update_of(linear(), **{name: 2**40 + 1})


@pytest.mark.parametrize(
    ("header", "tensor", "reason"),
    [
        ({}, "buffers/weight", "weight is a buffer, and a parameter too"),
        ({"frozen": {"scale": "0"}}, "buffers/scale", "scale is a buffer, and a parameter too"),
        (
            {"frozen": {"scale": "0"}, "aliases": {"scale": "weight"}},
            None,
            "scale cannot be another name of weight",
        ),
    ],
    ids=str,
)
def test_a_name_stands_for_one_tensor(header, tensor, reason):
    update = update_of(linear())
    tensors = dict(update._tensors) | ({tensor: torch.ones(2, 3)} if tensor else {})
    with pytest.raises(UpdateError) as error:
        ClientUpdate(dataclasses.replace(update.header, **header), tensors)
    assert error.value.offenders == (reason,)


def test_a_layer_that_is_no_channels_times_kernel_is_refused():
    # Two vectors of a stranger's: their five columns are not those of a convolution and its bias.
    layer = Layer("odd", (("odd.a", (2, 1, 3)), ("odd.b", (2, 2))))
    header = make_header("kfac", [layer], {"odd": Identity(layer.shape)})
    header = dataclasses.replace(header, kinds={"odd": "convolution_kronecker"})
    (offender, *_) = inconsistencies(header, {"odd.a": (2, 1, 3), "odd.b": (2, 2)})
    assert offender == "layer odd: 5 columns are no channels of 3 elements and a bias"


@pytest.mark.parametrize("length", [950, 2000])
def test_a_client_is_told_of_names_that_no_server_reads(length, tmp_path):
    """The longest names that a client may send are read; of a buffer no header tells."""
    model = linear()
    model.register_buffer("b" * length, torch.zeros(1))
    model.register_parameter("p" * 950, nn.Parameter(torch.zeros(2, 3)))
    if length > 960:
        with pytest.raises(UpdateError, match="has a name of 2008 characters, more than 1024"):
            update_of(model)
        return
    opened = ClientUpdate.open(update_of(model).save(tmp_path / "long.safetensors"))
    opened.verify()
    assert sorted(map(len, opened.specs)) == [4, 6, 950, 950]
