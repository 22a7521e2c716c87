import pytest

from lightning_fedfisher.curvature import KINDS
from lightning_fedfisher.extraction.layer_report import (
    CURVATURE_TYPES,
    LayerReport,
    block_kind,
    format_layer_reports,
    too_large,
)
from lightning_fedfisher.extraction.layer_types.embedding import Embedding
from lightning_fedfisher.extraction.layer_types.linear import Linear
from lightning_fedfisher.extraction.layer_types.scale_shift import ScaleShift
from lightning_fedfisher.layers import Layer

LINEAR, TABLE = Linear(has_bias=True), Embedding(tokens=3, padding=None)
SHIFT = ScaleShift(None, True, (3,), trailing=True)


@pytest.mark.parametrize(
    ("curvature", "layer_types", "kind"),
    [
        ("kfac", [LINEAR, LINEAR], "kronecker"),
        ("ekfac", [LINEAR], "ekfac"),
        ("kfac", [TABLE], "embedding_kronecker"),
        ("ekfac", [TABLE], "embedding_ekfac"),
        ("ekfac", [SHIFT], "diagonal"),
        ("kfac", None, "diagonal"),
        ("kfac", [LINEAR, TABLE], "diagonal"),
        ("dense", [SHIFT], "dense"),
        ("dense", None, "dense"),
    ],
)
def test_a_block_is_of_the_kind_asked_for_if_the_layer_has_it(curvature, layer_types, kind):
    assert block_kind(curvature, layer_types) == kind


@pytest.mark.parametrize("curvature", CURVATURE_TYPES)
def test_every_block_is_of_a_kind_that_is_known(curvature):
    assert block_kind(curvature, None) in KINDS


def test_layers_alike_are_one_line_that_names_the_first_three():
    layers = [Layer(f"fc{k}", ((f"fc{k}.weight", (2, 3)),)) for k in range(4)]
    reports = [LayerReport(layer, "kronecker", "hooks") for layer in layers]
    reports.append(LayerReport(layers[0], "diagonal", "torch.func", "of a reason"))
    assert format_layer_reports(reports).splitlines() == [
        "kronecker (hooks): 4 layers, 24 weights: fc0, fc1, fc2, ...",
        "diagonal (torch.func; of a reason): 1 layer, 6 weights: fc0",
    ]


def test_factors_that_are_too_large_are_not_made():
    many = Layer("head", (("head.weight", (30_000, 8)), ("head.bias", (30_000,))))
    wide = Layer("head", (("head.weight", (8, 30_000)),))
    table = Layer("table", (("table.weight", (30_000, 8)),))
    assert block_kind("kfac", [LINEAR], many) == block_kind("ekfac", [LINEAR], wide) == "diagonal"
    assert block_kind("input_gram", [LINEAR], wide) == "identity"
    assert block_kind("input_gram", [LINEAR], many) == "input_gram"  # which has none of the outputs
    assert block_kind("kfac", [TABLE], table) == "embedding_kronecker"  # whose tokens have none
    assert too_large("kfac", [LINEAR], many) == "a factor of 30000 rows would be too large"
    assert too_large("dense", [LINEAR], many) == ""
