"""Models are told apart by what they are, not by what they have learnt."""

import pytest
import torch
from helpers.small_updates import linear, update_of
from torch import nn

from lightning_fedfisher import ClientUpdate


def _tied():
    model = nn.Sequential(linear(), nn.Linear(3, 2))
    model[1].weight = model[0].weight
    return model


def _untied():
    return nn.Sequential(linear(), nn.Linear(3, 2))


def _frozen(value):
    model = _untied()
    model[1].requires_grad_(False)
    nn.init.constant_(model[1].weight, value)
    return model


MODELS = {
    "plain": _untied(),
    "shared": _tied(),
    "double": _untied().double(),
    "wider": nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)),
    "named": nn.ModuleDict({"a": linear(), "b": nn.Linear(3, 2)}),
    "frozen": _frozen(1.0),
    "frozen otherwise": _frozen(2.0),
    "with buffers": nn.Sequential(linear(), nn.Linear(3, 2), nn.BatchNorm1d(2, affine=False)),
}


def test_models_are_told_apart_by_their_fingerprint():
    found = {name: update_of(model).model_fingerprint for name, model in MODELS.items()}
    assert len(set(found.values())) == len(MODELS)
    other = update_of(_untied(), num_samples=8)
    assert other.model_fingerprint == found["plain"]
    assert other.digest != update_of(_untied()).digest


def test_clients_of_one_model_have_one_fingerprint(tmp_path):
    first = update_of(MODELS["with buffers"])
    opened = ClientUpdate.open(first.save(tmp_path / "first.safetensors"))
    other = nn.Sequential(linear(), nn.Linear(3, 2), nn.BatchNorm1d(2, affine=False))
    nn.init.constant_(other[1].weight, 7.0)
    other[2].running_mean.fill_(3)
    second = update_of(other, num_samples=9, metadata={"client": "second"}, output_layer="1")
    assert opened.architecture == first.architecture == second.architecture
    assert opened.model_fingerprint == first.model_fingerprint == second.model_fingerprint
    assert len(first.architecture) == 4 + 3
    assert first.architecture["2.running_mean"] == "(2,) float32"


@pytest.mark.parametrize("name", ["2.running_mean", "2.num_batches_tracked"])
def test_the_type_of_a_buffer_is_part_of_the_model(name):
    first = update_of(MODELS["with buffers"])
    other = nn.Sequential(linear(), nn.Linear(3, 2), nn.BatchNorm1d(2, affine=False))
    setattr(other[2], name[2:], getattr(other[2], name[2:]).to(torch.float64))
    second = update_of(other)
    assert second.model_fingerprint != first.model_fingerprint
    changed = {n for n, what in second.architecture.items() if first.architecture[n] != what}
    assert changed == {name}


def test_whose_other_name_it_is_is_part_of_the_model():
    models = [nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(3))) for _ in range(2)]
    models[0][2].weight = models[0][0].weight
    models[1][2].weight = models[1][1].weight
    first, second = map(update_of, models)
    assert first.architecture["2.weight"] == "another name of 0.weight"
    assert second.architecture["2.weight"] == "another name of 1.weight"
    assert first.model_fingerprint != second.model_fingerprint
