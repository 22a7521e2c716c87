import pytest
import torch
from helpers.layer_calls import draw

from lightning_fedfisher.extraction.tracing.batch_axis import BatchAxis, possible_batch_axes


def _hits(owner, samples):
    """Where each sample is hit, from a tensor that says whose every entry is."""
    return [owner == sample for sample in range(samples)]


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_samples_are_found_in_any_dimension(axis):
    owner = torch.arange(3).view(3, 1, 1).expand(3, 3, 3).movedim(0, axis)
    assert possible_batch_axes([3, 3, 3], _hits(owner, 3)) == [BatchAxis(axis)]


def test_folded_samples_are_told_from_folded_frames():
    outer, inner = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([0, 1, 2, 0, 1, 2])
    assert possible_batch_axes([6], _hits(outer, 3)) == [BatchAxis(0, "outer")]
    assert possible_batch_axes([6], _hits(inner, 3)) == [BatchAxis(0, "inner")]


def test_what_is_ambiguous_or_mixed_is_not_known():
    nowhere = [torch.zeros(3, 3, dtype=torch.bool)] * 3
    assert possible_batch_axes([3, 3], nowhere) == [BatchAxis(0), BatchAxis(1)]
    assert possible_batch_axes([3, 3], [None] * 3) == [BatchAxis(0), BatchAxis(1)]
    assert possible_batch_axes([3], [None] * 3) == [BatchAxis(0)]
    assert possible_batch_axes([3], [torch.ones(3, dtype=torch.bool)] * 3) == []
    assert possible_batch_axes([4], [None] * 3) == []


def test_one_place_of_each_sample_may_not_tell_how_samples_are_folded():
    hits = [torch.arange(12) == 4 * sample + 3 for sample in range(3)]
    assert possible_batch_axes([12], hits) == [BatchAxis(0, "outer"), BatchAxis(0, "inner")]


@pytest.mark.parametrize("axis", [BatchAxis(0), BatchAxis(1), BatchAxis(0, "outer")])
def test_the_first_sample_is_the_first_part(axis):
    x = draw(6, 3, 2)
    samples = 2 if axis.folded else x.shape[axis.axis]
    frames = x.shape[axis.axis] // samples
    assert torch.equal(axis.first_sample(x, samples), axis.samples_first(x, samples)[:frames])
    assert axis.first_sample(x, samples).data_ptr() == x.data_ptr()


def test_the_first_of_samples_that_are_folded_frame_by_frame():
    x, axis = draw(6, 3), BatchAxis(0, "inner")
    assert torch.equal(axis.first_sample(x, 2), axis.samples_first(x, 2)[:3])
    hit = torch.tensor([0, 1, 0, 1, 0, 0]).bool()
    assert axis.hits_only(hit, 1, 2)
    assert not axis.hits_only(hit, 0, 2)


def test_samples_come_first_with_frames_next_to_each_other():
    x = draw(4, 3, 2)
    assert torch.equal(BatchAxis(1).samples_first(x, 3), x.transpose(0, 1))
    assert torch.equal(BatchAxis(0, "outer").samples_first(x, 2), x)
    mixed = BatchAxis(0, "inner").samples_first(x, 2)
    assert torch.equal(mixed, x[[0, 2, 1, 3]])


def test_a_tensor_fits_by_its_size():
    assert BatchAxis(1).fits(torch.ones(2, 3), 3)
    assert not BatchAxis(1).fits(torch.ones(3), 3)
    assert not BatchAxis(0).fits(torch.ones(6), 3)
    assert BatchAxis(0, "inner").fits(torch.ones(6), 3)
    assert not BatchAxis(0, "outer").fits(torch.ones(7), 3)
