"""An update is not written over another one."""

import warnings
from pathlib import Path

import pytest
import torch
from helpers.merging import small_classifier, small_data, update_of

from lightning_fedfisher.update.output_path import path_beside_others


@pytest.fixture(scope="module")
def updates():
    """Updates of clients that tell nothing of themselves but what they computed."""
    return [update_of(small_classifier(seed=seed), small_data(seed)) for seed in range(3)]


def _write(path, update):
    own = path_beside_others(path, update)
    return update.save(own)


def test_another_update_is_left_and_told(updates, tmp_path):
    path = tmp_path / "update.safetensors"
    assert _write(path, updates[0]) == path
    before = path.read_bytes()
    for number, update in enumerate(updates[1:], 2):
        with pytest.warns(UserWarning, match="holds another update") as told:
            own = _write(path, update)
        assert own == tmp_path / f"update-{number}.safetensors"
        assert str(own) in str(told[0].message)
    assert path.read_bytes() == before


def test_a_client_that_runs_again_from_the_same_seed_has_its_file(updates, tmp_path):
    path = tmp_path / "update.safetensors"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            assert _write(path, updates[0]) == path
    for _ in range(2):
        with pytest.warns(UserWarning, match="holds another update"):
            assert _write(path, updates[1]).name == "update-2.safetensors"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("content", [b"", b"no update"])
def test_a_file_that_is_no_update_is_left_as_well(updates, content, tmp_path):
    (tmp_path / "update.safetensors").write_bytes(content)
    with pytest.warns(UserWarning, match="perhaps another client's"):
        own = _write(tmp_path / "update.safetensors", updates[0])
    assert own.name == "update-2.safetensors"
    assert (tmp_path / "update.safetensors").read_bytes() == content


def test_what_a_client_tells_of_itself_makes_another_update(updates, tmp_path):
    path = tmp_path / "update.safetensors"
    _write(path, updates[0])
    model, data = small_classifier(seed=0), small_data(0)
    other = update_of(model, data, num_samples=77)
    assert torch.equal(other.parameters["0.weight"], updates[0].parameters["0.weight"])
    with pytest.warns(UserWarning, match="holds another update"):
        assert _write(path, other) != path


def test_nothing_is_asked_where_there_is_no_file():
    assert path_beside_others(Path("nowhere/u.safetensors"), None) == Path("nowhere/u.safetensors")
