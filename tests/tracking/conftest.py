import pytest
import wandb
from helpers.wandb_runs import fit_client, open_run

from lightning_fedfisher import ClientUpdate


@pytest.fixture
def logger(tmp_path):
    """The logger of a server's run that is open."""
    opened = open_run(tmp_path)
    yield opened
    wandb.finish()


@pytest.fixture(scope="session")
def update(tmp_path_factory):
    """A client's update, opened from its file."""
    path = tmp_path_factory.mktemp("update") / "u.safetensors"
    return ClientUpdate.open(fit_client(path, False).path)
