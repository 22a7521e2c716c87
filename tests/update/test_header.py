"""Every field of a header is there and of its type, whoever wrote it."""

import dataclasses
import json
import math
import re

import pytest
from helpers.small_updates import header_of, linear
from helpers.update_files import (
    ENTRY,
    MATRIX,
    feed,
    forge,
    make_header,
    matrix_fields,
    read,
    refusal,
    resize,
    set_field,
    sign,
    write_raw,
)
from torch import nn

from lightning_fedfisher import ClientUpdate
from lightning_fedfisher.curvature.base import Identity
from lightning_fedfisher.layers import Source, find_layers
from lightning_fedfisher.update.header import QuantizedTensor
from lightning_fedfisher.update.safetensors_layout import MAX_NAME, MAX_TENSORS


def _fit(error, observations=1.0):
    return set_field("fit", {"squared_error": error, "observations": observations})


MALFORMED = {
    "size 0": (resize([0]), "layer norm"),
    "size negative": (resize([-3]), "layer norm"),
    "size huge": (resize([2**40, 2**40]), "layer norm"),
    "size huge, one row": (resize([1, 2**62]), "parameters/norm.weight"),
    "size float": (resize([3.0]), "expected int, got 3.0"),
    "size bool": (resize([True]), "expected int, got True"),
    "size string": (resize("3"), "expected int, got '3'"),
    "num_samples bool": (set_field("num_samples", True), "got True"),
    "num_samples float": (set_field("num_samples", 12.0), "got 12.0"),
    "num_samples string": (set_field("num_samples", "12"), "got '12'"),
    "num_samples nan": (set_field("num_samples", float("nan")), "holds NaN"),
    "num_samples null": (set_field("num_samples", None), "got None"),
    "curvature_samples bool": (set_field("curvature_samples", False), "got False"),
    "fisher list": (set_field("fisher", ["exact"]), "got ['exact']"),
    "metadata number": (set_field("metadata", {"epochs": 3}), "expected str, got 3"),
    "metadata list": (set_field("metadata", [["a", "b"]]), "header is missing or malformed"),
    "frozen at a number": (set_field("frozen", {"v": 0}), "expected str, got 0"),
    "activation null": (feed("conv", "norm", None), "expected str, got None"),
    "activation list": (feed("conv", "norm", ["relu"]), "expected str, got ['relu']"),
    "source number": (feed("conv", 3), "expected str, got 3"),
    "source of two fields": (
        set_field("fed_by", {"conv": ["norm", "relu"]}),
        "missing or malformed",
    ),
    "source without activation": (set_field("fed_by", {"conv": {"layer": "norm"}}), "malformed"),
    "source with more": (
        set_field("fed_by", {"conv": {"layer": "norm", "activation": "relu", "gain": 2}}),
        "missing or malformed",
    ),
    "sources list": (set_field("fed_by", []), "header is missing or malformed"),
    "head null": (set_field("output_layer", None), "expected str, got None"),
    "schema 1": (set_field("schema", 1), "its schema is 1, this version reads 2"),
    "schema string": (set_field("schema", "2"), "its schema is '2'"),
    "error negative": (_fit(-0.5), "leaves -0.5"),
    "error nan": (_fit(float("nan")), "holds NaN"),
    "error huge": (_fit(1e300), "leaves 1e+300"),
    "error whole": (_fit(1), "expected float, got 1"),
    "error string": (_fit("0.5"), "expected float, got '0.5'"),
    "fit of nothing": (_fit(0.5, 0.0), "a fit of 0.0 observations"),
    "fit list": (set_field("fit", [0.5, 1.0]), "missing or malformed"),
    "fit of one field": (set_field("fit", {"squared_error": 0.5}), "missing or malformed"),
    "field unknown": (set_field("unknown", 1), "unknown"),
    "deep value": (set_field("num_samples", json.loads("[" * 900 + "]" * 900)), "expected int"),
}

# Of the header; the last one is there for least-squares fits alone.
NAMES = dataclasses.asdict(make_header("identity", (), {})).keys()


@pytest.mark.parametrize(("change", "reason"), MALFORMED.values(), ids=MALFORMED)
def test_a_field_of_another_type_is_refused(change, reason, file):
    forge(file, change)
    assert reason in refusal(file)


@pytest.mark.parametrize("name", [*sorted(NAMES - {"fit", "normalized"}), "schema", "digests"])
def test_every_header_field_is_needed(name, tmp_path):
    path = tmp_path / "client.safetensors"
    fields = matrix_fields()
    write_raw(path, {ENTRY: sign(fields)}, MATRIX)
    assert read(path).parameters["w"].tolist() == [[0, 1, 2], [3, 4, 5]]
    del fields[name]
    write_raw(path, {ENTRY: sign(fields)}, MATRIX)
    assert name in refusal(path)


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {},
        {"format": "pt"},
        *(
            {ENTRY: text}
            for text in (
                "",
                "null",
                "3",
                "[]",
                '"text"',
                "{}",
                '{"header": "{}"}',
                '{"header": {}, "digest": ""}',
                '{"header": "\\ud800", "digest": ""}',
                sign("{}").replace('"digest": "', '"digest": "0'),
                sign("[]"),
                sign("null"),
                sign("{"),
                sign("9" * 5000),
                "[" * 100_000,
                '{"a":' * 100_000,
                sign("[" * 100_000),
                sign('{"schema":' * 100_000),
            )
        ),
    ],
    ids=lambda metadata: str(metadata)[:60],
)
def test_missing_or_malformed_headers_are_refused(metadata, tmp_path):
    path = tmp_path / "client.safetensors"
    write_raw(path, metadata, MATRIX)
    assert "its header is missing or malformed" in refusal(path)


@pytest.mark.parametrize("schema", [True, 0, 1, 2.0, 3])
def test_schema_is_exactly_a_number(schema, file):
    forge(file, set_field("schema", schema))
    assert "schema" in refusal(file)


@pytest.mark.parametrize("kind", ["diagonal", "kronecker", "dense"])
def test_sizes_too_long_to_print_are_refused(kind, tmp_path):
    shape = [1, 10**4000, 10**4000]
    fields = matrix_fields(layers=[{"name": "w", "parameters": [["w", shape]]}])
    fields["kinds"] = {"w": kind}
    path = tmp_path / "client.safetensors"
    write_raw(path, {ENTRY: sign(fields)}, MATRIX)
    assert "w" in refusal(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_samples": True},
        {"num_samples": 12.0},
        {"num_samples": "12"},
        {"curvature_samples": 1.5},
        {"fisher": None},
        {"metadata": {"epochs": 3}},
        {"output_layer": None},
        {"fed_by": {0: Source("", "relu")}},
        {"fed_by": {"": Source(1, "relu")}},
        {"fed_by": {"": Source("", None)}},
    ],
    ids=str,
)
def test_a_client_cannot_write_what_no_server_reads(changes, tmp_path):
    linear = nn.Linear(3, 2)
    layers = find_layers(linear)
    blocks = {layer.name: Identity(layer.shape) for layer in layers}
    with pytest.raises(TypeError, match="expected"):
        make_header("identity", layers, blocks, **changes)


@pytest.mark.parametrize(
    "how",
    [
        QuantizedTensor(0.0, "float32"),
        QuantizedTensor(-1.0, "float32"),
        QuantizedTensor(math.nan, "float32"),
        QuantizedTensor(math.inf, "float32"),
        QuantizedTensor(1, "float32"),
        QuantizedTensor(1.0, "int32"),
        QuantizedTensor(1.0, "float32", -1),
        QuantizedTensor(1.0, "float32", 1.5),
        QuantizedTensor(1.0, "float32", 1, math.inf),
        QuantizedTensor(1.0, "float32", 1, -1.0),
        QuantizedTensor(1.0, "float32", 1, math.nan),
    ],
)
def test_impossible_packings_are_refused(how):
    with pytest.raises((TypeError, ValueError)):
        dataclasses.replace(header_of(linear()), quantized={"parameters/head.bias": how})


# What a header may hold, however it is signed


def _long(name="n" * (MAX_NAME + 1)):
    layer = {"name": name, "parameters": [["w", [2, 3]]]}
    return {
        "curvature": {"curvature": name},
        "fisher": {"fisher": name},
        "likelihood": {"likelihood": name},
        "output layer": {"output_layer": name},
        "layer": {"layers": [layer]},
        "parameter": {"layers": [{"name": "w", "parameters": [[name, [2, 3]]]}]},
        "kind of": {"kinds": {name: "identity"}},
        "kind": {"kinds": {"w": name}},
        "metadata": {"metadata": {name: "x"}},
        "alias": {"aliases": {name: "w"}},
        "alias of": {"aliases": {"v": name}},
        "frozen": {"frozen": {name: "0"}},
        "digest": {"frozen": {"v": name}},
        "reader": {"fed_by": {name: {"layer": "w", "activation": "relu"}}},
        "source": {"fed_by": {"w": {"layer": name, "activation": "relu"}}},
        "activation": {"fed_by": {"w": {"layer": "w", "activation": name}}},
        "norm": {"normalized": {name: {"layer": "w", "groups": 1}}},
        "normed": {"normalized": {"v": {"layer": name, "groups": 1}}},
    }


@pytest.mark.parametrize("where", _long())
def test_names_are_no_longer_than_can_be_shown(where, tmp_path):
    path = tmp_path / "client.safetensors"
    write_raw(path, {ENTRY: sign(matrix_fields(**_long()[where]))}, MATRIX)
    told = refusal(path)
    assert "a name of 1025 characters, more than 960" in told
    assert len(told) < len(str(path)) + 200


def test_what_a_client_adds_may_be_long(tmp_path):
    path = tmp_path / "client.safetensors"
    write_raw(path, {ENTRY: sign(matrix_fields(metadata={"note": "n" * 10**5}))}, MATRIX)
    assert len(ClientUpdate.open(path).header.metadata["note"]) == 10**5


@pytest.mark.parametrize(
    "fields",
    [
        {"layers": [{"name": "a", "parameters": []}] * (MAX_TENSORS + 1)},
        *(
            {table: dict.fromkeys(map(str, range(MAX_TENSORS + 1)), value)}
            for table, value in {
                **dict.fromkeys(("kinds", "metadata", "aliases", "frozen"), "x"),
                "fed_by": {"layer": "w", "activation": "relu"},
                "normalized": {"layer": "w", "groups": 1},
                "quantized": {"step": 1.0, "dtype": "float32"},
            }.items()
        ),
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_tables_are_no_longer_than_a_file_has_tensors(fields, tmp_path):
    path = tmp_path / "client.safetensors"
    write_raw(path, {ENTRY: sign(matrix_fields(**fields))}, MATRIX)
    assert "a table of 16385 entries, more than 16384" in refusal(path)


def test_the_reasons_to_refuse_a_header_are_as_short_as_it_is(tmp_path):
    """Of thousands of layers, each with a name as long as may be: some reasons, and a number."""
    path, long = tmp_path / "client.safetensors", "c" * 960
    layers = [{"name": f"{k}{long}"[:960], "parameters": [["w", [2, 3]]]} for k in range(4000)]
    fields = matrix_fields(layers=layers, curvature=long, kinds={n["name"]: long for n in layers})
    write_raw(path, {ENTRY: sign(fields)}, MATRIX)
    told = refusal(path)
    assert len(told) < path.stat().st_size / 50
    assert told.count("\n") == 21
    assert re.search(r"and \d{4} more$", told)


@pytest.mark.parametrize(
    "value", ["x" * 10**6, ["x" * 10**6] * 9, 10**4000, {"a" * 10**6: 1}], ids=["", "", "", ""]
)
@pytest.mark.parametrize("field", ["num_samples", "layers", "quantized", "schema", "another"])
def test_a_value_is_not_repeated_in_full(field, value, tmp_path):
    path = tmp_path / "client.safetensors"
    write_raw(path, {ENTRY: sign(matrix_fields(**{field: value}))}, MATRIX)
    assert len(refusal(path)) < 4000


def test_an_unknown_field_is_not_repeated_in_full(tmp_path):
    path = tmp_path / "client.safetensors"
    write_raw(path, {ENTRY: sign(matrix_fields(**{"y" * 10**6: 1}))}, MATRIX)
    assert len(refusal(path)) < 4000
