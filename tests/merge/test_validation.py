"""Scores of the merged model: those of its likelihood, on a copy, of every sample once."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_fedfisher.likelihoods.registry import LIKELIHOODS
from lightning_fedfisher.merge.validation import require_one_loader, validate

CPU = torch.device("cpu")


def test_scores_are_averages_over_samples_whatever_the_batches():
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 4), torch.randn(11, 3), torch.arange(11) % 4
    state = {"weight": torch.randn(4, 3)}  # what is missing stays the model's
    before = model.weight.clone()
    batches = DataLoader(TensorDataset(x, y), batch_size=4)
    scores, samples = validate(model, state, batches, LIKELIHOODS["categorical"], CPU)
    logits = nn.functional.linear(x, state["weight"], model.bias)
    assert samples == 11
    assert scores["val_nll"] == pytest.approx(float(nn.functional.cross_entropy(logits, y)))
    accuracy = 100 * float((logits.argmax(1) == y).float().mean())
    assert scores["val_accuracy"] == pytest.approx(accuracy)
    assert torch.equal(model.weight, before)
    assert model.training


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_every_likelihood_has_a_score(likelihood):
    model, x = nn.Linear(3, 2), torch.randn(6, 3)
    y = torch.tensor([0, 1, 0, 1, 1, 0])
    labels = y if LIKELIHOODS[likelihood].softmax else torch.stack([y, 1 - y], dim=1).float()
    scores, _ = validate(model, {}, [(x, labels)], LIKELIHOODS[likelihood], CPU)
    assert scores["val_nll"] == pytest.approx(
        float(LIKELIHOODS[likelihood].nll(model(x), labels).mean())
    )


def test_loaders_that_part_the_samples_are_refused():
    data = TensorDataset(torch.zeros(4, 1))
    parted = DataLoader(data, sampler=DistributedSampler(data, num_replicas=2, rank=0))
    with pytest.raises(ValueError, match="use_distributed_sampler=False"):
        require_one_loader(parted)
    for several in ([parted, parted], {"a": parted}, [{"a": parted}]):
        with pytest.raises(ValueError, match="pass one validation loader"):
            require_one_loader([several] if isinstance(several, dict) else several)
    require_one_loader(DataLoader(data))
