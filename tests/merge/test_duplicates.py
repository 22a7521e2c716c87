"""Copies of an update are left out, with a warning that names them all."""

import warnings

import pytest
from helpers.federation import tiny_updates

from lightning_fedfisher.merge.duplicates import without_duplicates


def test_copies_are_named_and_left_out(tmp_path):
    updates = tiny_updates(tmp_path, curvature="identity", epochs=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert without_duplicates(updates) == updates
    sent = [updates[0], updates[1], updates[0], updates[2], updates[1], updates[0]]
    with pytest.warns(UserWarning, match="counts once, unless allow_duplicates=True") as caught:
        found = without_duplicates(sent)
    assert [update is other for update, other in zip(found, updates, strict=True)] == [True] * 3
    assert len(str(caught[0].message).splitlines()) == 4
