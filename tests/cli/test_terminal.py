import sys
from io import BytesIO, TextIOWrapper

import pytest
from lightning_utilities.core.rank_zero import rank_zero_only

from lightning_fedfisher.cli.terminal import columns, complain, show


def test_lines_are_shown_without_control_characters(capsys):
    show("a\x1b[2J", "b\nc")
    assert capsys.readouterr().out == "a\\x1b[2J\nb\\nc\n"


def test_complaints_go_to_the_error_stream_line_by_line(capsys):
    complain("error: a\x07\nb")
    complain("error: a\u2028warning: b\r")
    told = capsys.readouterr()
    lines = ["error: a\\x07", "b", r"error: a\u2028warning: b\r", ""]
    assert (told.out, told.err) == ("", "\n".join(lines))


def test_what_fails_on_another_rank_is_told_with_the_rank(capsys, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 3, raising=False)
    complain("warning: not told")
    complain("error: a\nb", of_any_rank=True)
    assert capsys.readouterr().err == "rank 3: error: a\nb\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_a_terminal_of_any_encoding_shows_names_in_any_script(encoding, monkeypatch):
    for name, tell in (("stdout", show), ("stderr", complain)):
        stream = TextIOWrapper(BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, name, stream)
        tell("größe β")
        stream.flush()
        shown = stream.buffer.getvalue().decode(encoding)
        assert shown.strip() == "größe β".encode(encoding, "backslashreplace").decode(encoding)


def test_columns_are_aligned():
    rows = [("name", "n"), ("a", "100"), ("longer", "2")]
    assert columns(rows, "<>") == ["name      n", "a       100", "longer    2"]
