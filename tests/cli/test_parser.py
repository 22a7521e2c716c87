import re
from pathlib import Path

import pytest

import lightning_fedfisher
from lightning_fedfisher.cli import parser
from lightning_fedfisher.cli.parser import make_parser
from lightning_fedfisher.merge.methods import METHODS


def test_every_command_has_a_module_of_its_name():
    folder = Path(parser.__file__).parent
    for name in parser._COMMANDS:
        assert "\ndef run(flags: Namespace) -> int:\n" in (folder / f"{name}.py").read_text()


def test_merge_has_defaults_and_knows_every_method():
    read = make_parser(None).parse_args
    merge = read(["merge", "a", "b", "--output", "m.safetensors"]).merge
    assert merge.files == ["a", "b"]
    assert (merge.method, merge.devices, merge.memory_budget) == ("fedfisher", 1, 2**30)
    assert merge.max_influence is merge.max_iterations is merge.model is None
    for method in METHODS:
        command = ["merge", "a", "--output", "m.safetensors", "--method", method]
        assert read(command).merge.method == method


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit, match="0"):
        make_parser("About it.").parse_args(["--help"])
    told = capsys.readouterr().out
    assert "About it." in told
    for name, (_, what) in parser._COMMANDS.items():
        assert re.search(rf"{name} +{what}", told)


def test_the_version_is_the_packages(capsys):
    with pytest.raises(SystemExit, match="0"):
        make_parser(None).parse_args(["--version"])
    assert lightning_fedfisher.__version__ in capsys.readouterr().out
