"""Inputs of a model's layers from a forward pass alone."""

import torch
from helpers.networks import IMAGE, build_net, extract, make_data
from torch import nn

from lightning_fedfisher.extraction.backends.output_gradients import OutputGradients


def test_it_takes_no_labels_and_no_backward_pass(monkeypatch):
    seen, model, data = [], build_net("lenet"), make_data(IMAGE)

    def forward(module, batch):
        logits = module(batch)
        seen.append(logits.requires_grad)
        return logits

    monkeypatch.setattr(OutputGradients, "backward", None)
    batches = [data.tensors[0][:3], data.tensors[0][3:]]
    found = extract(model, batches, "input_gram", forward=forward)
    assert seen[-2:] == [False, False]  # the pass itself; the model is traced with gradients
    expected = extract(model, data, "input_gram")
    assert found.num_samples == len(data)
    for name, block in found.blocks.items():
        torch.testing.assert_close(block.column_factor, expected.blocks[name].column_factor)


def test_a_layer_that_some_batches_leave_out_has_no_gram():
    class Changing(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            after = self.first(x)
            return after if (x < 0).all() else self.second(after)

    data = [(sign * torch.ones(2, 3), torch.zeros(2).long()) for sign in (1, -1)]
    found = extract(Changing(), data, "input_gram", max_samples=None)
    assert {name: block.kind for name, block in found.blocks.items()} == {
        "first": "input_gram",
        "second": "identity",
    }
