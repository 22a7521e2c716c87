"""``fedfisher report``, run as a user runs it but for the process."""

import sys

import pytest
from helpers.records import federation

from lightning_fedfisher.cli.main import main


def test_command_writes_beside_the_record(tmp_path, capsys):
    federation().save(tmp_path / "record.json")
    assert main(["report", str(tmp_path)]) == 0
    assert f"{tmp_path / 'report.html'}: 5 clients, 3 merges" in capsys.readouterr().out
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "new" / "page.html")]) == 0
    one, other = (tmp_path / name for name in ("report.html", "new/page.html"))
    assert one.read_bytes() == other.read_bytes()


def test_command_tells_what_is_wrong(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "record.json" in line
    (tmp_path / "record.json").write_text("{}")
    assert main(["report", str(tmp_path)]) == 1
    assert "is not the record of a federation" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("output", "told"),
    [
        ("record.json/report.html", "a file stands where a folder is needed"),
        ("/dev/null", "a device or a pipe"),
        ("", "it is a folder: name a file in it"),
    ],
)
def test_command_says_why_a_page_cannot_be_written(output, told, tmp_path, capsys):
    federation().save(tmp_path / "record.json")
    assert main(["report", str(tmp_path), "--output", str(tmp_path / output)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path / output} cannot be written: " in line
    assert told in line
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]


def test_command_names_a_missing_extra(tmp_path, capsys, monkeypatch):
    federation().save(tmp_path / "record.json")
    for name in [n for n in sys.modules if n.startswith("lightning_fedfisher.report")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert main(["report", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install 'lightning-fedfisher[report]'" in line
