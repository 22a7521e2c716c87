import inspect

import pytest
import torch
from torch.nn import functional as F

from lightning_fedfisher.extraction.layer_types.registry import READERS, read_call


def test_a_function_that_is_not_known_has_no_reading():
    assert read_call(F.relu, (torch.ones(2),), {}) is None
    assert read_call(torch.matmul, (torch.ones(2), torch.ones(2)), {}) is None


@pytest.mark.parametrize(
    "func", [f for f in READERS if inspect.isfunction(f)], ids=lambda f: f.__name__
)
def test_a_reader_takes_the_arguments_that_its_function_takes(func):
    theirs = list(inspect.signature(func).parameters.values())
    ours = list(inspect.signature(READERS[func]).parameters.values())
    assert len(ours) == len(theirs)
    for own, their in zip(ours[1:], theirs[1:], strict=True):  # the first is always positional
        assert (own.name, own.default) == (their.name, their.default)
