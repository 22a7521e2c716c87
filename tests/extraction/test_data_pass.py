"""The pass over the samples: which run together, what is told of it, and how it falls back."""

import itertools

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedfisher.distributed.processes import Shard
from lightning_fedfisher.extraction import extract_curvature
from lightning_fedfisher.extraction.backends import backpack
from lightning_fedfisher.extraction.data_pass import _similar_samples
from lightning_fedfisher.extraction.fisher_types import Directions
from lightning_fedfisher.extraction.tracing import ModelTracer


def _directions(counts):
    rows = [row for row, count in enumerate(counts) for _ in range(count - 1)]
    first = torch.zeros(len(counts), 2)
    return Directions(first, torch.tensor(rows, dtype=torch.long), lambda i: first[i], 1.0)


@pytest.mark.parametrize(
    "counts", [[1] * 8, [10] * 12, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [1] * 30 + [40, 2], [5]]
)
def test_samples_that_run_together_hold_no_more_than_three_quarters_of_a_batch(counts):
    chunks = [chunk.tolist() for chunk in _similar_samples(_directions(counts))]
    assert sorted(itertools.chain(*chunks)) == list(range(len(counts)))
    for chunk in chunks:
        most = max(counts[sample] for sample in chunk)
        # As many as fit, and one at least.
        assert len(chunk) <= max(1, 3 * len(counts) // (2 * (most + 1)))
        assert most <= 2 * min(counts[sample] for sample in chunk)


def _loader(samples=7, batch_size=3):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 4, generator=generator)
    return DataLoader(TensorDataset(x, torch.arange(samples) % 3), batch_size=batch_size)


def test_progress_is_told_of_the_samples_of_this_process():
    told = []

    def tell(done, total):
        told.append((done, total))

    model = nn.Linear(4, 3)
    extract_curvature(model, _loader(), on_progress=tell, progress=False)
    assert told == [(3, 7), (6, 7), (7, 7)]
    told.clear()
    extract_curvature(model, _loader(), on_progress=tell, shard=Shard(1, 2), progress=False)
    assert told == [(3, 3)]
    told.clear()
    extract_curvature(model, list(_loader()), on_progress=tell, progress=False)
    assert told == [(3, None), (6, None), (7, None)]


def test_progress_starts_anew_where_a_pass_does():
    told = []
    hungry = nn.Linear(4, 3)
    hungry.register_forward_pre_hook(_refuse_batches_of_more_than(3))
    with pytest.warns(UserWarning, match="memory did not suffice"):
        extract_curvature(
            hungry, _loader(batch_size=6), on_progress=lambda done, _: told.append(done)
        )
    assert told == [3, 6, 7]


def _refuse_batches_of_more_than(most):
    def hook(module, args):
        if len(args[0]) > most and most != len(args[0]) - 1:
            raise torch.OutOfMemoryError("no memory")

    return hook


def test_a_diagonal_goes_on_without_backpack_where_that_fails_on_the_way(monkeypatch):
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    expected = extract_curvature(model, _loader(), "diagonal")
    assert {report.layer.name for report in expected.layer_reports} == {"weight"}
    assert "backpack" in expected.report

    def refuse(self, batch, logits, directions, uniforms):
        raise backpack.BackpackError("weight is used without its module")

    monkeypatch.setattr(backpack.BackpackDiagonal, "backward", refuse)
    found = extract_curvature(model, _loader(), "diagonal")
    assert "not by BackPACK, as weight is used without its module" in found.report
    torch.testing.assert_close(found.blocks["weight"].values, expected.blocks["weight"].values)


def _counted(monkeypatch):
    """The traces that are made from now on."""
    traced, original = [], ModelTracer.trace

    def trace(tracer, logits):
        traced.append(original(tracer, logits))
        return traced[-1]

    monkeypatch.setattr(ModelTracer, "trace", trace)
    return traced


@pytest.mark.parametrize("kind", ["kfac", "ekfac", "diagonal"])
def test_a_known_trace_spares_another(monkeypatch, kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    first = extract_curvature(model, _loader(), kind)
    traced = _counted(monkeypatch)
    again = extract_curvature(model, _loader(), kind, trace=first.trace)
    assert traced == []
    assert again.trace is first.trace
    assert again.report == first.report
    for name, block in again.blocks.items():
        for part, tensor in block.tensors().items():
            assert torch.equal(tensor, first.blocks[name].tensors()[part])


def test_a_model_that_has_changed_since_is_traced_anew(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    other = extract_curvature(nn.Sequential(nn.Linear(4, 3)).double(), _loader()).trace
    expected = extract_curvature(model, _loader())
    traced = _counted(monkeypatch)
    found = extract_curvature(model, _loader(), trace=other)
    assert len(traced) == 1
    for name, block in found.blocks.items():
        torch.testing.assert_close(block.diagonal(), expected.blocks[name].diagonal())
