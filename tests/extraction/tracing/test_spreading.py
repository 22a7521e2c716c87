"""Parameters are followed to where every sample gets a copy; `test_spread` runs whole models."""

import torch
from torch import nn

from lightning_fedfisher.extraction.tracing.spreading import ParameterFollower, spread


def _parameter(*shape):
    return nn.Parameter(torch.randn(shape, dtype=torch.float64))


def test_only_calls_with_one_followed_tensor_are_followed():
    one, two = _parameter(2), _parameter(2)
    follower = ParameterFollower([one, two])
    assert follower.meets(torch.add, (one, two), {}) is None
    assert follower.meets(torch.add, (torch.zeros(3, 5), one), {}) is None  # which will fail
    assert follower.meets(torch.add, (torch.zeros(2), one), {}) is None  # nobody gets a copy
    changed = one.exp()
    follower.note(torch.add, (one, two), {}, changed)
    assert follower.meets(torch.mul, (torch.zeros(3, 2), changed), {}) is None
    follower.note(torch.exp, (one,), {}, changed)
    followed, shape = follower.meets(torch.mul, (torch.zeros(3, 2), changed), {})
    assert shape == (3, 2)
    torch.testing.assert_close(
        spread(followed.parameter, followed.rebuild, shape), one.exp().expand(3, 2)
    )
    detached = one.detach()
    follower.note(torch.Tensor.detach, (one,), {}, detached)
    assert follower.meets(torch.mul, (torch.zeros(3, 2), detached), {}) is None
    with torch.no_grad():
        changed.mul_(2)
    assert follower.meets(torch.mul, (torch.zeros(3, 2), changed), {}) is None  # not any more
    follower.forget()
    assert follower.meets(torch.mul, (torch.zeros(3, 2), changed), {}) is None
