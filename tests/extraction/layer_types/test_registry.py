import inspect

import pytest
import torch
from helpers.layer_calls import draw
from torch.nn import functional as F

from lightning_fedfisher.extraction.layer_types.registry import READERS, open_attention, read_call


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


def test_attention_without_its_check_for_overrides_is_the_same_function():
    x, weights = draw(5, 2, 4), [draw(12, 4), draw(12), draw(4, 4), draw(4)]

    def run(function):
        return function(
            *(x, x, x, 4, 2, weights[0], weights[1], None, None, False, 0.0, weights[2]),
            weights[3],
            training=False,
        )

    torch.testing.assert_close(
        run(open_attention), run(F.multi_head_attention_forward), rtol=0, atol=0
    )
