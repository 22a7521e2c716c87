"""What all tests share: no network, and an option that renews snapshots."""

from __future__ import annotations

import os

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--renew-snapshots",
        action="store_true",
        help="write the snapshots anew, after a change that is meant",
    )


@pytest.fixture
def renews_snapshots(request: pytest.FixtureRequest) -> bool:
    """Whether snapshots are written before they are compared."""
    return request.config.getoption("--renew-snapshots") or "RENEW_SNAPSHOTS" in os.environ


@pytest.fixture(autouse=True)
def offline_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    """No run of any test, nor of a process that it starts, asks for W&B's servers."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
