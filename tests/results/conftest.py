"""The result of a merge of a few clients."""

import pytest
from helpers.federation import tiny_updates

from lightning_fedfisher import merge_updates


@pytest.fixture(scope="session")
def updates(tmp_path_factory):
    return tiny_updates(tmp_path_factory.mktemp("updates"), clients=3, epochs=1)


@pytest.fixture(scope="session")
def result(updates):
    return merge_updates(updates, max_influence=5.0)
