"""Random states: the same after a block that draws, even one that fails."""

import random

import numpy as np
import pytest
import torch

from lightning_fedfisher._utils.random_states import kept_random_states


def _draw():
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def _seed():
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)


def test_what_is_drawn_in_between_leaves_no_trace():
    _seed()
    expected = _draw()
    _seed()
    with kept_random_states():
        assert _draw() == expected
        assert _draw() != expected
    assert _draw() == expected


def test_a_failure_in_between_leaves_no_trace():
    _seed()
    expected = _draw()
    _seed()
    with pytest.raises(ZeroDivisionError), kept_random_states():
        sum(_draw()) / 0
    assert _draw() == expected
