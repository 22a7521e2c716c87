"""The command line as a whole: what every command does alike."""

import warnings

import pytest
from lightning_utilities.core.rank_zero import rank_zero_only

from lightning_fedfisher.cli.main import main


def test_no_file(folder, capsys):
    assert main(["verify", "nobody-*.safetensors"]) == 1
    assert "no file matches nobody-*.safetensors" in capsys.readouterr().err
    assert main(["inspect", "nobody.safetensors"]) == 1
    assert "nobody.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["merge"], ["inspect"], ["merge", "a", "--method", "x"]])
def test_a_command_line_that_makes_no_sense_exits_with_2(arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2


def test_an_error_of_another_rank_is_told(monkeypatch, capsys):
    monkeypatch.setattr(rank_zero_only, "rank", 2, raising=False)
    assert main(["inspect", "nobody.safetensors"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("rank 2: error: ")
    assert "nobody.safetensors" in told


def test_warnings_are_one_line_each_without_the_code_that_raised_them(monkeypatch, capsys):
    from lightning_fedfisher.cli import inspect

    def run(flags):
        warnings.warn("look\x1b here", UserWarning, stacklevel=1)
        warnings.warn("not told", DeprecationWarning, stacklevel=1)
        return 0

    monkeypatch.setattr(inspect, "run", run)
    assert main(["inspect", "a"]) == 0
    assert capsys.readouterr().err == "warning: look\\x1b here\n"
