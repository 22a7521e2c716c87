"""The flags of the `fedfisher` commands."""

from __future__ import annotations

from jsonargparse import ArgumentParser

from lightning_fedfisher import __version__
from lightning_fedfisher.merge.methods import METHODS
from lightning_fedfisher.merge.options import DEFAULT_MEMORY_BUDGET

_MODEL = "module.path:factory, a function without arguments that makes the model to check against"


def parser(description: str | None) -> ArgumentParser:
    """What reads the command line.

    Args:
        description: of the program.

    Returns:
        A parser with a subcommand for each command.
    """
    whole = ArgumentParser(prog="fedfisher", description=description, version=__version__)
    commands = whole.add_subcommands(dest="command", title="commands")

    inspect = ArgumentParser(description="Tells what an update file holds, without reading it all.")
    inspect.add_argument("file", type=str, help="update file")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    commands.add_subcommand("inspect", inspect, help="tell what an update file holds")

    verify = ArgumentParser(
        description="Reads update files whole and checks everything: digests, finiteness, shapes, "
        "curvature that is none, and whether they belong together. Clients that weigh far more "
        "than the median client are reported. Exits with 1 if a file is refused."
    )
    verify.add_argument("--config", action="config", help="YAML file of flags")
    verify.add_argument("files", type=str, nargs="+", help="update files, or quoted patterns")
    verify.add_argument("--model", type=str | None, help=_MODEL)
    commands.add_subcommand("verify", verify, help="check update files")

    merge = ArgumentParser(
        description="Merges update files into one model, a safetensors file of its state dict, "
        "with a model card beside it, and a record for `fedfisher report`."
    )
    merge.add_argument("--config", action="config", help="YAML file of flags")
    merge.add_argument("files", type=str, nargs="+", help="update files, or quoted patterns")
    merge.add_argument("--output", type=str, required=True, help="file to write: NAME.safetensors")
    merge.add_argument("--method", choices=list(METHODS), default="fedfisher", help="merge method")
    merge.add_argument("--model", type=str | None, help=_MODEL)
    merge.add_argument("--accelerator", type=str, default="auto", help="Lightning accelerator")
    merge.add_argument("--devices", type=int, default=1, help="devices, or processes on a CPU")
    merge.add_argument(
        "--max-influence",
        type=float | None,
        help="what a client may weigh, as a multiple of the median client; by default as the "
        "method has it",
    )
    merge.add_argument("--max-iterations", type=int | None, help="solver steps a layer at most")
    merge.add_argument(
        "--memory-budget",
        type=int,
        default=DEFAULT_MEMORY_BUDGET,
        help="bytes of curvature to hold at a time",
    )
    merge.add_argument(
        "--skip-invalid", action="store_true", help="go on without updates that are refused"
    )
    merge.add_argument(
        "--dry-run", action="store_true", help="check all, tell what would be done, write nothing"
    )
    commands.add_subcommand("merge", merge, help="merge update files into one model")

    report = ArgumentParser(
        description="Draws the record of a federation: one HTML page with the methods compared and "
        "charts of clients and merges, to be read without a network, or printed."
    )
    report.add_argument(
        "run", type=str, metavar="RUN_DIR", help="folder with a record.json, or a record"
    )
    report.add_argument(
        "--output", type=str | None, metavar="FILE", help="page to write; RUN_DIR/report.html"
    )
    commands.add_subcommand("report", report, help="draw a federation on one HTML page")

    dashboard = ArgumentParser(
        description="Saves a W&B workspace and a W&B report of one federation, whose runs share a "
        "group, and prints their addresses. Exits with 1 if W&B does not take them."
    )
    dashboard.add_argument("--entity", type=str, required=True, help="user or team of W&B")
    dashboard.add_argument("--project", type=str, required=True, help="project of the runs")
    dashboard.add_argument("--group", type=str, required=True, help="group of the runs")
    dashboard.add_argument(
        "--dry-run", action="store_true", help="print what would be saved as JSON, need no network"
    )
    commands.add_subcommand("dashboard", dashboard, help="save a W&B workspace and report")
    return whole
