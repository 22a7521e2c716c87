"""Random states that are put back: whoever draws in between leaves no trace."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def kept_random_states(gpus: Sequence[torch.device] = ()) -> Iterator[None]:
    """Puts the random states of Python, NumPy and PyTorch back afterwards.

    Args:
        gpus: The GPUs whose random state is kept as well, beside the CPU's.

    Yields:
        None.

    Example:
        >>> torch.manual_seed(0).initial_seed()
        0
        >>> with kept_random_states():
        ...     first = torch.rand(1)
        >>> torch.equal(first, torch.rand(1))
        True
    """
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(gpus):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
