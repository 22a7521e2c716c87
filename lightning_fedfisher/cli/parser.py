"""The flags of the ``fedfisher`` commands."""

from __future__ import annotations

from jsonargparse import ArgumentParser

from lightning_fedfisher._utils.environment import package_version
from lightning_fedfisher.merge.memory_budget import DEFAULT_MEMORY_BUDGET
from lightning_fedfisher.merge.methods import METHODS

_FILES = "update files, folders of them, or quoted patterns"
_MODEL = "module.path:factory, a function without arguments that makes the model to check against"


def make_parser(description: str | None) -> ArgumentParser:
    """Makes the parser of the command line.

    Args:
        description: The text above the help of the whole program.

    Returns:
        A parser that stores the chosen command as ``command`` and its flags under that name.
    """
    parser = ArgumentParser(prog="fedfisher", description=description, version=package_version())
    subcommands = parser.add_subcommands(dest="command", title="commands")
    for name, (make, told) in _COMMANDS.items():
        subcommands.add_subcommand(name, make(), help=told)
    return parser


def _plan() -> ArgumentParser:
    """Makes the parser of ``fedfisher plan``."""
    parser = ArgumentParser(
        description="Tells what the curvature of a model takes: memory and upload of a client, and "
        "memory of the server. No data and no weights are needed: the model is made on the meta "
        "device. What its layers compute is told by the types of its modules."
    )
    parser.add_argument("model", type=str, help="module.path:factory, which makes the model")
    parser.add_argument(
        "--curvature", nargs="+", default=["kfac", "input_gram", "diagonal"], help="kinds to plan"
    )
    parser.add_argument("--clients", type=int, default=10, help="clients that the server merges")
    parser.add_argument(
        "--upload-budget", type=float | None, default=1.0, help="bytes of a file in FedAvg uploads"
    )
    parser.add_argument(
        "--memory-budget",
        type=int,
        default=DEFAULT_MEMORY_BUDGET,
        help="bytes of curvature that the server holds at a time",
    )
    return parser


def _inspect() -> ArgumentParser:
    """Makes the parser of ``fedfisher inspect``."""
    parser = ArgumentParser(description="Tells what an update file holds, without reading it all.")
    parser.add_argument("file", type=str, help="update file")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _verify() -> ArgumentParser:
    """Makes the parser of ``fedfisher verify``."""
    parser = ArgumentParser(
        description="Reads update files whole and checks everything: digests, finiteness, shapes, "
        "whether the curvature is positive semi-definite, and whether they belong together. "
        "Clients that weigh far more than the median client are reported. Exits with 1 if a file "
        "is refused."
    )
    parser.add_argument("--config", action="config", help="YAML file of flags")
    parser.add_argument("files", type=str, nargs="+", help=_FILES)
    parser.add_argument("--model", type=str | None, help=_MODEL)
    return parser


def _merge() -> ArgumentParser:
    """Makes the parser of ``fedfisher merge``."""
    parser = ArgumentParser(
        description="Merges update files into one model, a safetensors file of its state dict, "
        "with a model card beside it, and a record for `fedfisher report`."
    )
    parser.add_argument("--config", action="config", help="YAML file of flags")
    parser.add_argument("files", type=str, nargs="+", help=_FILES)
    parser.add_argument("--output", type=str, required=True, help="file to write: NAME.safetensors")
    parser.add_argument("--method", choices=list(METHODS), default="fedfisher", help="merge method")
    parser.add_argument("--model", type=str | None, help=_MODEL)
    parser.add_argument("--accelerator", type=str, default="auto", help="Lightning accelerator")
    parser.add_argument("--devices", type=int, default=1, help="devices, or processes on a CPU")
    parser.add_argument(
        "--max-influence",
        type=float | None,
        help="most that a client may weigh, as a multiple of the median client; by default the "
        "method's own limit: 2 for fedfisher, none for the published methods",
    )
    parser.add_argument("--max-iterations", type=int | None, help="solver steps a layer at most")
    parser.add_argument(
        "--memory-budget",
        type=int,
        default=DEFAULT_MEMORY_BUDGET,
        help="bytes of curvature to hold at a time",
    )
    parser.add_argument(
        "--skip-invalid", action="store_true", help="leave out updates that are refused"
    )
    parser.add_argument(
        "--allow-duplicates", action="store_true", help="count copies of an update as clients"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check all, tell what would be done, write nothing"
    )
    return parser


def _report() -> ArgumentParser:
    """Makes the parser of ``fedfisher report``."""
    parser = ArgumentParser(
        description="Draws the record of a federation: one HTML page with the methods compared and "
        "charts of clients and merges, to be read without a network, or printed."
    )
    parser.add_argument(
        "run", type=str, metavar="RUN_DIR", help="folder with a record.json, or a record"
    )
    parser.add_argument(
        "--output", type=str | None, metavar="FILE", help="page to write; RUN_DIR/report.html"
    )
    return parser


def _dashboard() -> ArgumentParser:
    """Makes the parser of ``fedfisher dashboard``."""
    parser = ArgumentParser(
        description="Saves a W&B workspace and a W&B report of one federation, whose runs share a "
        "group, and prints their addresses. Exits with 1 if W&B does not take them."
    )
    parser.add_argument("--entity", type=str, required=True, help="user or team of W&B")
    parser.add_argument("--project", type=str, required=True, help="project of the runs")
    parser.add_argument("--group", type=str, required=True, help="group of the runs")
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would be saved as JSON, need no network"
    )
    return parser


_COMMANDS = {
    "plan": (_plan, "tell what a model's curvature will take"),
    "inspect": (_inspect, "tell what an update file holds"),
    "verify": (_verify, "check update files"),
    "merge": (_merge, "merge update files into one model"),
    "report": (_report, "draw a federation on one HTML page"),
    "dashboard": (_dashboard, "save a W&B workspace and report"),
}
