"""Second moments of inputs alone, against plain forward hooks and against K-FAC's factors."""

import pytest
import torch
from helpers.networks import BATCH, IMAGE, NETS, SEQUENCE, build_net, every_net, extract, make_data
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

from lightning_fedfisher.curvature.registry import INPUT_KINDS
from lightning_fedfisher.extraction import extract_curvatures
from lightning_fedfisher.extraction.layer_types import convolution as convolutions

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


def _reference_rows(module, inputs):
    """One row for each position of each sample: what the layer's matrix is multiplied by."""
    if isinstance(module, nn.Linear):
        rows = inputs.reshape(-1, inputs.shape[-1])
    elif isinstance(module, nn.Conv2d):
        patches = functional.unfold(
            inputs, module.kernel_size, module.dilation, module.padding, module.stride
        )
        rows = patches.mT.reshape(-1, patches.shape[1])
    else:
        assert isinstance(module, nn.Embedding)
        rows = functional.one_hot(inputs.flatten(), module.num_embeddings).double()
        rows[:, module.padding_idx] = 0  # counts as a position, and not as a token
    has_bias = getattr(module, "bias", None) is not None
    return torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1) if has_bias else rows


def _reference_moments(model, data):
    """``E[x x']`` over all positions of all samples, by layer name, from forward hooks."""
    rows = {}

    def note(name):
        return lambda module, args, _: rows.setdefault(name, []).append(
            _reference_rows(module, args[0])
        )

    handles = [
        module.register_forward_hook(note(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding)
    ]
    with torch.no_grad():
        model(data.tensors[0])
    for handle in handles:
        handle.remove()
    joined = {name: torch.cat(found) for name, found in rows.items()}
    return {name: every.T @ every / len(every) for name, every in joined.items()}


@pytest.mark.parametrize(
    ("net", "shape"),
    [
        ("lenet", IMAGE),
        ("residual", IMAGE),
        ("positions", SEQUENCE),
        ("called twice", (4,)),
        ("embedding with padding", SEQUENCE),
    ],
)
def test_a_block_is_the_second_moment_of_what_the_layer_is_given(net, shape):
    model, data = build_net(net), make_data(shape)
    found, expected = extract(model, data, "input_gram"), _reference_moments(model.eval(), data)
    assert found.blocks.keys() == expected.keys()
    for name, block in found.blocks.items():
        matrix = torch.randn(block.shape, dtype=torch.float64)
        on_rows = block.inputs_on == "rows"
        product = expected[name] @ matrix if on_rows else matrix @ expected[name]
        torch.testing.assert_close(block.apply(matrix), product, rtol=1e-12, atol=1e-12)


@every_net
@pytest.mark.parametrize("positions", [None, 2])
@pytest.mark.parametrize("patch", [1024, 4])
def test_it_is_what_is_left_of_kfac_without_the_gradients(monkeypatch, net, positions, patch):
    monkeypatch.setattr(convolutions, "_LARGEST_PATCH", patch)
    model, data = build_net(net), make_data(NETS[net][1])
    kfac = extract(model, data, "kfac", positions=positions)
    alone = extract(model, data, "input_gram", positions=positions, fisher="mc")
    beside = extract_curvatures(
        model, DataLoader(data, BATCH), ("input_gram", "kfac"), positions=positions, progress=False
    )["input_gram"]
    for found in (alone, beside):
        assert found.header(7).fisher == ""
        assert (found.fed_by, found.output_layer) == (kfac.fed_by, kfac.output_layer)
        for report in found.layer_reports:
            name, block = report.layer.name, found.blocks[report.layer.name]
            of_kfac = kfac.blocks[name]
            assert block.kind == report.kind == INPUT_KINDS.get(of_kfac.kind, "identity")
            if block.kind == "identity":
                assert report.backend == "none"
                assert report.reason
                continue
            assert report.reason == ""
            expected = of_kfac.of_inputs().tensors()
            assert block.tensors().keys() == expected.keys()
            for part, tensor in block.tensors().items():
                torch.testing.assert_close(tensor, expected[part], rtol=1e-12, atol=1e-12)


def test_layers_without_an_input_gram_are_named_with_the_reason():
    report = extract(build_net("transposed"), make_data(IMAGE), "input_gram").report
    assert "identity (none; a transposed convolution, with its inputs on the rows," in report
    report = extract(build_net("norms"), make_data(IMAGE), "input_gram").report
    assert "identity (none; a scale or shift has no input Gram)" in report
    assert "identity (none; a grouped convolution has no input Gram)" in report
    report = extract(build_net("recurrent"), make_data(SEQUENCE), "input_gram").report
    assert "torch.func" not in report
