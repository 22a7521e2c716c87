import json
import math
from dataclasses import replace

import pytest
from helpers.records import federation

from lightning_fedfisher.results.record import FederationRecord, MergeRecord


def test_a_record_is_what_was_saved(tmp_path):
    record = federation()
    record.save(tmp_path / "new" / "record.json")
    assert FederationRecord.load(tmp_path / "new" / "record.json") == record
    assert FederationRecord.load(tmp_path / "new") == record
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["record.json"]


def test_numbers_that_json_does_not_know_are_kept(tmp_path):
    merge = MergeRecord("m", [{"residual": math.inf}], ["a"], [[math.inf, math.nan]])
    FederationRecord("t", [], [merge]).save(tmp_path / "record.json")
    (loaded,) = FederationRecord.load(tmp_path).merges
    assert loaded.history == merge.history
    assert loaded.distances[0][0] == math.inf
    assert math.isnan(loaded.distances[0][1])


def _changed(record, tmp_path, change):
    record.save(tmp_path / "record.json")
    saved = json.loads((tmp_path / "record.json").read_text())
    change(saved)
    (tmp_path / "record.json").write_text(json.dumps(saved))
    return tmp_path / "record.json"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda saved: saved.update(schema=2), "schema: Input should be 1"),
        (lambda saved: saved.pop("schema"), "schema: Field required"),
        (lambda saved: saved["federation"].pop("title"), "federation.title: Field required"),
        (
            lambda saved: saved["federation"]["clients"][1].update(num_samples="x"),
            "federation.clients.1.num_samples: Input should be a valid integer",
        ),
        (
            lambda saved: saved["federation"].update(clients=[{}] * 4),
            "federation.clients.2.name: Field required; and 3 more",
        ),
        (lambda saved: saved.update(more=1), "more: "),
    ],
)
def test_what_is_no_record_is_refused_with_what_is_wrong(change, told, tmp_path):
    path = _changed(federation(), tmp_path, change)
    with pytest.raises(ValueError, match="is not the record of a federation") as refused:
        FederationRecord.load(path)
    assert str(path) in str(refused.value)
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00"])
def test_what_is_no_json_is_refused(text, tmp_path):
    (tmp_path / "record.json").write_text(text)
    with pytest.raises(ValueError, match=r"record\.json is not the record of a federation: file: "):
        FederationRecord.load(tmp_path)


def test_a_folder_without_a_record_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"record\.json"):
        FederationRecord.load(tmp_path)


def test_a_strangers_field_is_told_in_a_line(tmp_path):
    (tmp_path / "record.json").write_text('{"schema": 1, "a\\u001b[2J\\nb": 1}')
    with pytest.raises(ValueError, match=r"a\\x1b\[2J\\nb: ") as told:
        FederationRecord.load(tmp_path)
    assert str(told.value).isprintable()


def test_names_that_are_no_text_do_not_stop_a_record(tmp_path):
    replace(federation(), config={"files": ["a\udcff.safetensors"]}).save(tmp_path / "record.json")
    found = FederationRecord.load(tmp_path)
    assert found == replace(federation(), config={"files": ["a?.safetensors"]})


def test_an_old_record_is_not_lost_by_a_failed_save(tmp_path):
    record = federation()
    record.save(tmp_path / "record.json")
    with pytest.raises(ValueError, match="serialize"):
        replace(record, config={"a": object()}).save(tmp_path / "record.json")
    assert FederationRecord.load(tmp_path) == record
