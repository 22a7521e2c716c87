"""Plans against what extraction, files and merges of the same model come to."""

import pytest
import torch
from helpers.networks import NETS, build_net, extract, make_data
from torch import nn

from lightning_fedfisher import ClientUpdate, FedFisherError, UnsupportedModelError, plan_update
from lightning_fedfisher.extraction.layer_report import CURVATURE_TYPES
from lightning_fedfisher.merge.memory_budget import peak_bytes
from lightning_fedfisher.merge.merger import Merger
from lightning_fedfisher.merge.options import MergeOptions


def _mlp(device="cpu", dtype=torch.float32):
    factory = {"device": device, "dtype": dtype}
    layers = nn.Linear(8, 40, **factory), nn.ReLU(), nn.Linear(40, 3, **factory)
    return nn.Sequential(*layers)


@pytest.mark.parametrize("curvature", CURVATURE_TYPES)
@pytest.mark.parametrize("net", ["lenet", "embedding", "residual", "norms", "attention"])
def test_bytes_are_those_of_the_update(curvature, net):
    model = build_net(net).float()
    shape = NETS[net][1]
    data = [(x.float(), y) for x, y in make_data(shape)]
    loader = [(torch.stack([x for x, _ in data]), torch.stack([y for _, y in data]))]
    found = extract(model, loader, curvature)
    update = ClientUpdate.from_model(model, found.header(7), found.blocks)
    plan = plan_update(
        model, curvature, forward=lambda m: m(torch.zeros(2, *shape)), upload_budget=None
    )
    assert {p.layer.name: p.kind for p in plan.layers} == update.header.kinds
    for planned in plan.layers:
        tensors = update.blocks[planned.layer.name].tensors().values()
        assert planned.curvature_bytes == sum(tensor.nbytes for tensor in tensors)
    tensors = [*update.parameters.values(), *update.buffers.values()]
    fedavg = sum(tensor.nbytes for tensor in tensors)
    assert plan.weights_bytes + plan.buffer_bytes == fedavg == update.fedavg_bytes
    assert plan.file_bytes == plan.upload_bytes == fedavg + plan.curvature_bytes
    assert 0 < update.upload_bytes - plan.file_bytes < 10_000  # the header
    merger = Merger.open(
        [update] * 3, MergeOptions("fedavg", memory_budget=1000, allow_duplicates=True)
    )
    again = plan_update(model, curvature, clients=3, memory_budget=1000)
    if {p.kind for p in again.layers} == {p.kind for p in plan.layers}:
        assert again.server_bytes == peak_bytes(update.header, 3, merger.loader.budget)


def test_a_model_on_the_meta_device_is_planned_alike():
    real, meta = (plan_update(_mlp(device), "kfac") for device in ("cpu", "meta"))
    assert real == meta
    sides = (40, 9, 3, 41)
    assert [p.factor_sides for p in real.layers] == [sides[:2], sides[2:]]
    assert real.curvature_bytes == 4 * sum(side**2 for side in sides)
    assert real.decomposition == sum(side**3 for side in sides)
    assert real.largest.layer.name == "2"
    assert real.weights_bytes == 4 * (9 * 40 + 41 * 3)
    finishing = 2 * real.curvature_bytes + max(p.curvature_bytes for p in real.layers)
    assert real.client_bytes == real.weights_bytes + finishing
    assert plan_update(_mlp(), "identity").client_bytes == 0
    assert real.upload_bytes == real.weights_bytes  # at budget 1


def test_low_precision_is_extracted_in_float32():
    half, full = (plan_update(_mlp("meta", dtype)) for dtype in (torch.bfloat16, torch.float32))
    assert 2 * half.weights_bytes == full.weights_bytes
    assert half.curvature_bytes == full.curvature_bytes
    assert plan_update(_mlp("meta", torch.float64)).curvature_bytes == 2 * full.curvature_bytes


def test_advice_names_what_takes_less():
    plan = plan_update(_mlp(), "kfac")
    times = [
        plan_update(_mlp(), curvature).curvature_bytes / plan.weights_bytes
        for curvature in ("kfac", "input_gram", "diagonal")
    ]
    assert times[0] > 3
    assert plan.advice == (
        "kfac takes {:.1f} times the weights' numbers: curvature='input_gram' {:.1f}, "
        "'diagonal' {:.1f}".format(*times)
    )
    assert plan.advice in plan.report
    for curvature in ("diagonal", "identity"):
        assert plan_update(_mlp(), curvature).advice == ""
    square = nn.Linear(30, 30, bias=False)
    assert plan_update(square, "kfac").advice == ""  # twice
    assert "dense takes" in plan_update(square, "dense").advice


def test_the_report_tells_how_kinds_were_found():
    model = NETS["embedding"][0]()
    guessed, ran = (
        plan_update(model, forward=forward).report
        for forward in (None, lambda m: m(torch.zeros(1, 4, 5)))
    )
    assert "told by the types of their modules" in guessed
    assert "told by a forward pass on the meta device" in ran
    for line in ("embedding_kronecker: 1 layer", "kronecker: 2 layers", "for 10 clients"):
        assert line in guessed
        assert line in ran


def test_everything_wrong_is_named_at_once():
    with pytest.raises(FedFisherError) as error:
        plan_update(_mlp(), "hessian", clients=0, upload_budget=0.0, memory_budget=-1)
    told = error.value.offenders
    assert [line.split()[0].partition("=")[0] for line in told] == [
        "curvature",
        "clients",
        "upload_budget",
        "memory_budget",
    ]
    with pytest.raises(UnsupportedModelError, match="no parameters that are trained"):
        plan_update(nn.ReLU())
