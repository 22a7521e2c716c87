"""Running statistics of the merged model: PyTorch's own of these samples, whatever the batches."""

import copy
import random

import pytest
import torch
from helpers.federation import NormedClassifier, tiny_data, tiny_loader
from helpers.merging import assert_same, interrupted, merge, resumed, update_of
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader

from lightning_fedfisher.merge.merger import Merger
from lightning_fedfisher.merge.options import MergeOptions
from lightning_fedfisher.merge.running_statistics import estimate_statistics, estimator
from lightning_fedfisher.merge.without_trainer import merge_updates

CPU = torch.device("cpu")


def _network(seed=0, drop=0.5):
    """Two normalisation layers, and what must not act: dropout."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(2, 3, 2),
            nn.BatchNorm2d(3),
            nn.ReLU(),
            nn.Dropout(drop),
            nn.Flatten(),
            nn.Linear(12, 4),
            nn.BatchNorm1d(4, momentum=0.3),
            nn.GroupNorm(2, 4),
        ).double()


def _images(samples, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return 2 + torch.randn(samples, 2, 3, 3, generator=generator, dtype=torch.float64)


def _norms(state):
    return {name: tensor for name, tensor in state.items() if "running" in name}


def _trained_on(seed):
    """A client of its own: other weights, and other statistics."""
    model = NormedClassifier()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for parameter in model.parameters():
            nn.init.normal_(parameter, 0, 0.3)
        model.network[-1].weight.data.mul_(0.1)  # or it would be sure of everything
    update_bn(tiny_loader(seed), model)
    return model.eval()


@pytest.fixture(scope="module")
def updates():
    """Three clients of a network with batch normalisation."""
    return [update_of(_trained_on(seed), tiny_data(seed), "kfac") for seed in range(3)]


def _exact(model, state, loader):
    """PyTorch's own statistics of a state."""
    found = copy.deepcopy(model)
    found.load_state_dict(state)
    update_bn(loader, found)
    return _norms(found.state_dict())


@pytest.mark.parametrize("labelled", [True, False])
def test_they_are_pytorchs_own_with_nothing_dropped(labelled):
    model, other, images = _network(), _network(seed=5, drop=0), _images(12)
    expected = _exact(other, other.state_dict(), images.split(4))
    batches = [(x, torch.zeros(len(x))) if labelled else x for x in images.split(4)]
    found, samples = estimate_statistics(model, batches, other.state_dict(), CPU)
    assert samples == 12
    assert found.keys() == expected.keys()
    assert len(found) == 4
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-12, atol=1e-12)


def test_a_short_last_batch_counts_for_its_samples():
    images = _images(10)
    found, _ = estimate_statistics(_network(), images.split(7), {}, CPU)
    outputs = _network()[0](images)
    torch.testing.assert_close(found["1.running_mean"], outputs.mean((0, 2, 3)))
    within = [part.transpose(0, 1).flatten(1).var(dim=1) for part in outputs.split(7)]
    torch.testing.assert_close(found["1.running_var"], 0.7 * within[0] + 0.3 * within[1])


def test_a_layer_that_runs_twice_has_the_mean_of_its_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3, affine=False).double()

        def forward(self, x):
            return self.norm(x) + self.norm(x + 100)

    x = torch.randn(12, 3, dtype=torch.float64)
    expected = _exact(Twice(), Twice().state_dict(), x.split(4))
    found, _ = estimate_statistics(Twice(), x.split(4), {}, CPU)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor)


def test_sums_of_many_batches_do_not_stall():
    x = 3 + torch.randn(4000, 2)
    model = nn.Sequential(nn.BatchNorm1d(2)).bfloat16()
    found, _ = estimate_statistics(model, x.bfloat16().split(8), {}, CPU)
    assert found["0.running_mean"].dtype == torch.bfloat16
    torch.testing.assert_close(found["0.running_mean"].float(), x.mean(0), rtol=0.02, atol=0)
    torch.testing.assert_close(found["0.running_var"].float(), x.var(0), rtol=0.03, atol=0)


def test_a_last_batch_of_one_is_left_out():
    images = _images(9)
    found, samples = estimate_statistics(_network(), images.split(4), {}, CPU)
    expected, _ = estimate_statistics(_network(), images[:8].split(4), {}, CPU)
    assert samples == 8
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor)


def test_model_and_random_numbers_are_left_alone():
    model = _network().train()
    before, draws, python = (
        copy.deepcopy(model.state_dict()),
        torch.get_rng_state(),
        random.getstate(),
    )

    def drawing(images):
        return torch.stack(images) * (1 + random.random())

    shuffled = DataLoader(_images(6), batch_size=3, shuffle=True, collate_fn=drawing)
    estimate_statistics(model, shuffled, _network(seed=3).state_dict(), CPU)
    assert torch.equal(torch.get_rng_state(), draws)
    assert random.getstate() == python
    assert all(module.training for module in model.modules())
    assert model[6].momentum == 0.3
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_what_cannot_be_estimated_is_refused_before_any_work():
    with pytest.raises(ValueError, match=r"pass model=\.\.\."):
        estimator(None, [])
    with pytest.raises(ValueError, match="has no BatchNorm with running statistics"):
        estimator(nn.Linear(2, 2), [])
    with pytest.raises(ValueError, match="pass a DataLoader or a list"):
        estimator(_network(), iter([]))
    refused = {
        "no batch of two samples or more": [],
        "a batch of str holds no tensor": ["text"],
        "expected scalar type|same dtype|should be the same": [_images(4).float()],
        "no batch of two": [_images(1)],
        "of its first batch": _images(4),  # the samples themselves are no batches
    }
    for message, loader in refused.items():
        with pytest.raises(ValueError, match=message):
            estimator(_network(), loader)
    huge = {"0.weight": torch.full((3, 2, 2, 2), float("inf"), dtype=torch.float64)}
    with pytest.raises(ValueError, match=r"1\.running_mean, 1\.running_var, 6\.running_mean"):
        estimate_statistics(_network(), [_images(4)], huge, CPU)


@pytest.mark.parametrize("method", ["fedavg", "regmean", "fedfisher"])
def test_a_merge_has_the_statistics_of_its_own_weights(updates, method, tmp_path):
    loader = DataLoader(tiny_data(9, 40), batch_size=20)
    model = NormedClassifier()
    options = {"method": method, "model": model, "statistics_loader": loader}
    result = merge_updates(updates, **options)
    assert result.unlabelled_samples == 40
    assert result.server_labels == 0
    expected = _exact(model, result.state_dict, loader)
    assert len(expected) == 2
    plain = merge_updates(updates, method=method)
    assert plain.unlabelled_samples == 0
    for name, tensor in expected.items():
        torch.testing.assert_close(result.state_dict[name], tensor)
        assert not torch.allclose(plain.state_dict[name], tensor, rtol=0.01)
    module = merge(updates, tmp_path, **options)
    assert module.result.unlabelled_samples == 40
    for name, tensor in module.merged_state_dict().items():
        assert torch.equal(tensor, result.state_dict[name]), name
        assert torch.equal(model.state_dict()[name], tensor), name


def test_scores_are_those_of_the_model_that_is_returned(updates, tmp_path):
    loader = DataLoader(tiny_data(9, 40), batch_size=20)
    options = {"model": NormedClassifier(), "statistics_loader": loader}
    result = merge_updates(updates, validation_loader=loader, **options)
    model = NormedClassifier().eval()
    model.load_state_dict(result.state_dict)
    x, y = loader.dataset.tensors
    nll = float(nn.functional.cross_entropy(model(x), y).detach())
    assert result.history[-1]["val_nll"] == pytest.approx(nll)
    module = merge(updates, tmp_path, loader, **options)
    assert module.history == list(result.history)


def test_the_best_iterate_has_statistics_of_its_own(updates):
    loader = DataLoader(tiny_data(9, 40), batch_size=20)
    model, options = NormedClassifier(), {"statistics_loader": loader, "keep_best": True}
    result = merge_updates(updates, model=model, validation_loader=loader, **options)
    for name, tensor in _exact(model, result.state_dict, loader).items():
        torch.testing.assert_close(result.state_dict[name], tensor)


def test_a_head_behind_new_statistics_is_weighed_by_its_outputs(updates):
    """Its merge is a mean over clients for each class: the inputs' second moment has no say."""
    model, loader = NormedClassifier(), DataLoader(tiny_data(9, 40), batch_size=20)
    kept = Merger.open(updates, MergeOptions("fedfisher"), model, loader)
    head = kept.layers[-1]
    assert head.name == updates[0].header.output_layer
    for merger, alike in ((kept, True), (Merger.open(updates, MergeOptions("fedfisher")), False)):
        for client in range(3):
            curvature = merger.loader.curvature(len(kept.layers) - 1, client, CPU)
            column, other = torch.zeros(head.shape), torch.zeros(head.shape)
            column[0, 0], other[0, 1] = 1, 1
            seen, again = curvature.apply(column)[:, 0], curvature.apply(other)[:, 1]
            assert seen.any()
            assert torch.allclose(seen, again, rtol=1e-4, atol=0) == alike


def test_refusals_come_before_updates_are_read(updates):
    loader = tiny_loader()
    for options in (
        {"statistics_loader": loader},
        {"statistics_loader": loader, "model": nn.Flatten()},
        {"statistics_loader": [1], "model": NormedClassifier()},
        {"statistics_loader": loader, "model": NormedClassifier(), "method": "closed_form_head"},
    ):
        with pytest.raises(ValueError, match="statistics"):
            merge_updates(["missing.safetensors"], **options)


def test_a_merge_goes_on_with_samples_or_not_at_all(updates, tmp_path):
    loader = DataLoader(tiny_data(9, 40), batch_size=20, shuffle=True)
    options = {"model": NormedClassifier(), "statistics_loader": loader}
    _, path = interrupted(updates, tmp_path, 1, **options)
    with pytest.raises(ValueError, match="is of another merge"):
        resumed(path, updates, tmp_path, model=NormedClassifier())
    found = resumed(path, updates, tmp_path, **options).merged_state_dict()
    assert_same(found, dict(merge_updates(updates, **options).state_dict), rtol=0, atol=0)
