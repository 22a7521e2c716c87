"""What is decomposed, and in which precision."""

import pytest
import torch
from helpers.second_moments import SIZE

from lightning_fedfisher.curvature import linalg, powers


@pytest.fixture
def decomposed(monkeypatch):
    """Sizes and types of what is decomposed."""
    found, original = [], torch.linalg.eigh

    def noting(matrix):
        found.append((len(matrix), matrix.dtype))
        return original(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", noting)
    return found


@pytest.fixture
def large(monkeypatch):
    """Makes matrices of a few hundred rows count as large, as those of thousands do."""
    monkeypatch.setattr(linalg, "_SMALL", SIZE - 100)
    monkeypatch.setattr(powers, "_SMALL", SIZE - 100)
