"""What examples in docstrings find: an empty working folder, and the same random numbers.

They are beside the code, which no `conftest.py` in `tests/` reaches.
"""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _a_desk_for_examples(request: pytest.FixtureRequest) -> None:
    if isinstance(request.node, pytest.DoctestItem):
        import torch

        request.getfixturevalue("monkeypatch").chdir(request.getfixturevalue("tmp_path"))
        torch.manual_seed(0)
