"""Heads by sums: the same as by updates, in float64 and in fixed point, and sums of sums."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedfisher import UpdateError, fit_closed_form_head, merge_updates
from lightning_fedfisher.secure_aggregation import from_fixed, head_from_sums, head_sums, to_fixed
from lightning_fedfisher.update import ClientUpdate

CLIENTS = (3, 20, 1, 40)


def _model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 3))


def _updates():
    generator = torch.Generator().manual_seed(0)
    updates = []
    for client, samples in enumerate(CLIENTS):
        x = torch.randn(samples, 5, generator=generator) + 0.3 * client
        y = torch.randint(0, 3, (samples,), generator=generator)
        loader = DataLoader(TensorDataset(x, y), batch_size=8)
        updates.append(fit_closed_form_head(_model(), loader, progress=False))
    return updates


def _add(sums):
    return {name: sum(own[name] for own in sums) for name in sums[0]}


def _merged(updates):
    return merge_updates(updates, method="closed_form_head").state_dict


def _assert_close(one, other, close):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=close, atol=close)


def test_the_head_of_the_sums_is_that_of_the_updates():
    updates = _updates()
    total = head_from_sums(_add([head_sums(update) for update in updates]), updates[2])
    assert (total.num_samples, total.header.curvature_samples) == (64, 64)
    _assert_close(_merged([total]), _merged(updates), 1e-8)


def test_sums_of_sums_may_be_merged_further():
    updates = _updates()
    regions = [
        head_from_sums(_add([head_sums(update) for update in some]), updates[0])
        for some in (updates[:2], updates[2:])
    ]
    _assert_close(_merged(regions), _merged(updates), 1e-8)
    again = head_from_sums(_add([head_sums(region) for region in regions]), updates[0])
    _assert_close(_merged([again]), _merged(updates), 1e-8)


def test_fixed_point_with_masks_gives_the_same():
    updates = _updates()
    sent = [to_fixed(head_sums(update), len(updates), divisors={}) for update in updates]
    mask = {name: torch.randint(-(2**62), 2**62, t.shape) for name, t in sent[0].items()}
    sent[0] = {name: tensor + mask[name] for name, tensor in sent[0].items()}
    sent[1] = {name: tensor - mask[name] for name, tensor in sent[1].items()}
    total = head_from_sums(from_fixed(_add(sent)), updates[0])
    _assert_close(_merged([total]), _merged(updates), 1e-7)


def test_an_update_without_a_fit_is_refused():
    (update, *_) = _updates()
    with torch.no_grad():
        tensors = {name: update._tensors[name] for name in update._tensors}
    plain = ClientUpdate(dataclasses.replace(update.header, fit=None), tensors)
    with pytest.raises(UpdateError, match="holds no least-squares fit"):
        head_sums(plain)


def test_what_can_be_no_sum_is_refused_all_at_once():
    updates = _updates()
    total = _add([head_sums(update) for update in updates])
    total |= {"unknown": torch.ones(()), "samples": torch.tensor(-1.0)}
    total["inputs_times_inputs"] = -total["inputs_times_inputs"]
    total["squared_labels"] = torch.ones(2)
    del total["labels_times_inputs"]
    with pytest.raises(UpdateError) as error:
        head_from_sums(total, updates[0])
    told = "\n".join(error.value.offenders)
    for name in ("unknown", "samples", "inputs_times_inputs", "squared", "labels_times_inputs"):
        assert name in told
    less = _add([head_sums(update) for update in updates])
    less["squared_labels"] /= 10
    with pytest.raises(UpdateError, match="less than what labels_times_inputs explain"):
        head_from_sums(less, updates[0])
    assert len(error.value.offenders) == 5
