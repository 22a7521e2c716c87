"""A model is looked at on a few samples, each of which must have logits of its own."""

import pytest
import torch
from helpers.networks import Net
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedfisher import UnsupportedModelError
from lightning_fedfisher.extraction.batches import BatchRunner
from lightning_fedfisher.extraction.preview import trace_model
from lightning_fedfisher.extraction.sampling import partition_samples
from lightning_fedfisher.layers import find_layers


def _trace(forward, batches=None):
    torch.manual_seed(0)
    model = Net(forward, head=nn.Linear(4, 3))
    data = TensorDataset(torch.randn(9, 4), torch.arange(9) % 3)
    samples = partition_samples(batches or DataLoader(data, batch_size=4))
    return trace_model(model, find_layers(model), BatchRunner(None, None), samples)


def test_a_sample_whose_logits_depend_on_others_is_noticed_in_any_layer():
    with pytest.raises(UnsupportedModelError, match="depend on the other samples"):
        _trace(lambda net, x: net.head(x - x.mean(0)))


def test_a_model_that_takes_no_single_sample_is_traced_all_the_same():
    def forward(net, x):
        if len(x) == 1:
            raise RuntimeError("a batch of one")
        return net.head(x)

    assert _trace(forward).calls == (("head",),)


def test_memory_that_runs_out_is_no_answer():
    def forward(net, x):
        if len(x) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return net.head(x)

    with pytest.raises(torch.OutOfMemoryError):
        _trace(forward)


def test_of_a_stream_a_few_samples_of_the_first_batch_are_looked_at():
    seen = []

    def forward(net, x):
        seen.append(len(x))
        return net.head(x)

    _trace(forward, [(torch.randn(50, 4), torch.zeros(50, dtype=torch.long))])
    assert seen == [50, 3, 3, 1, 3]
