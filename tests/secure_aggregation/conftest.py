"""Updates of a few clients, with a diagonal curvature."""

import pytest
from helpers.client_sums import CLIENTS
from helpers.federation import tiny_updates


@pytest.fixture(scope="session")
def updates(tmp_path_factory):
    return tiny_updates(tmp_path_factory.mktemp("u"), CLIENTS, curvature="diagonal")
