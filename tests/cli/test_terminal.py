from lightning_fedfisher.cli.terminal import columns, complain, show


def test_lines_are_shown_without_control_characters(capsys):
    show("a\x1b[2J", "b\nc")
    assert capsys.readouterr().out == "a\\x1b[2J\nb\\nc\n"


def test_complaints_go_to_the_error_stream_line_by_line(capsys):
    complain("error: a\x07\nb")
    told = capsys.readouterr()
    assert (told.out, told.err) == ("", "error: a\\x07\nb\n")


def test_columns_are_aligned():
    rows = [("name", "n"), ("a", "100"), ("longer", "2")]
    assert columns(rows, "<>") == ["name      n", "a       100", "longer    2"]
