"""An update is written for a trial and leaves nothing."""

import pytest
import torch
from torch import nn

from lightning_fedfisher import ClientUpdate, UpdateError, extract_curvature
from lightning_fedfisher.update.writing_rehearsal import rehearse_writing


def _update():
    model = nn.Linear(2, 2)
    batches = [(torch.eye(2), torch.tensor([0, 1]))]
    found = extract_curvature(model, batches, progress=False)
    return ClientUpdate.from_model(model, found.header(2), found.blocks)


def test_nothing_is_left_and_the_file_is_not_touched(tmp_path):
    path = tmp_path / "runs" / "update.safetensors"
    rehearse_writing(_update(), path)
    assert list(path.parent.iterdir()) == []
    path.write_text("of another run")
    rehearse_writing(_update(), path)
    assert path.read_text() == "of another run"


def test_what_cannot_be_written_is_told(tmp_path):
    (tmp_path / "runs").write_text("a file")
    path = tmp_path / "runs" / "update.safetensors"
    with pytest.raises(OSError, match="cannot be written"):
        rehearse_writing(_update(), path)
    assert [p.name for p in tmp_path.iterdir()] == ["runs"]


def test_what_the_reader_refuses_is_refused_and_removed(tmp_path, monkeypatch):
    def refuse(update, **options):
        raise UpdateError(update.source, ["of another kind"])

    monkeypatch.setattr(ClientUpdate, "verify", refuse)
    with pytest.raises(UpdateError, match="of another kind"):
        rehearse_writing(_update(), tmp_path / "update.safetensors")
    assert list(tmp_path.iterdir()) == []
