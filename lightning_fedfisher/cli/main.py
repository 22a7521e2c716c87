"""The ``fedfisher`` command line: look at updates, check them, merge them, report on it.

The server needs no model code: names and shapes are in the updates, and the result is a state dict.
"""

from __future__ import annotations

import importlib
import json
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from glob import glob, has_magic
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import Trainer
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_fedfisher._utils.files import atomic_write
from lightning_fedfisher.cli.parser import parser
from lightning_fedfisher.curvature.registry import KINDS
from lightning_fedfisher.distributed.processes import is_rank_zero
from lightning_fedfisher.merge.compatibility import check_model, check_updates
from lightning_fedfisher.merge.memory_budget import peak_bytes
from lightning_fedfisher.merge.outliers import outliers_as_sent
from lightning_fedfisher.merge_module import FisherMergeModule
from lightning_fedfisher.results.from_merge import describe_federation
from lightning_fedfisher.results.model_card import model_card
from lightning_fedfisher.results.record import FederationRecord
from lightning_fedfisher.update.client_update import ClientUpdate

_BAD = 1  # exit status; 2 is for a command line that makes no sense


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: of the command line; `sys.argv` if None.

    Returns:
        The exit status: 0; 1 if an update or a model is refused.
    """
    flags = parser(__doc__).parse_args(arguments)
    run: Callable[[Namespace], int] = _COMMANDS[flags.command]
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    with warnings.catch_warnings():
        for category in (PossibleUserWarning, DeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)
        warnings.filterwarnings("ignore", message=".*no `val_dataloader`")
        warnings.showwarning = _show_warning
        try:
            return run(flags[flags.command])
        except (OSError, ValueError, MisconfigurationException) as error:
            _complain(f"error: {error}")
            return _BAD
        finally:
            logger.setLevel(level)


def _inspect(flags: Namespace) -> int:
    update = ClientUpdate.open(flags.file)
    facts = _facts(update)
    if flags.json:
        print(json.dumps(facts, indent=2))
        return 0
    header = update.header
    about = f"{header.curvature} curvature"
    if header.fisher:
        about += f" ({header.fisher} Fisher of {header.curvature_samples} samples)"
    lines = [
        f"{update.source}: {header.num_samples} samples, {about}",
        f"{update.upload_bytes:,} bytes, {facts['fedavg_uploads']:.2f} of a FedAvg upload",
        f"digest {update.digest}",
        f"model  {update.model_fingerprint}",
        *(f"{name}: {value}" for name, value in sorted(header.metadata.items())),
        "",
    ]
    titles = ("layer", "kind", "shape", "weights", "bits", "curvature", "bits")
    rows = [titles]
    for layer in facts["layers"]:
        shape = "x".join(map(str, layer["shape"]))
        cells = [(f"{layer[p]['bytes']:,}", f"{layer[p]['bits']:.1f}") for p in _PARTS]
        rows.append((layer["name"], layer["kind"], shape, *cells[0], *cells[1]))
    print("\n".join(map(_printable, [*lines, *_columns(rows)])))
    return 0


_PARTS = ("weights", "curvature")


def _facts(update: ClientUpdate) -> dict[str, Any]:
    """What `inspect` tells; bytes as in the file, bits for each number that they stand for."""
    header = update.header
    layers = []
    for layer in update.layers:
        kind = KINDS[header.kinds[layer.name]]
        numbers = sum(map(math.prod, kind.tensor_shapes(layer.shape).values()))
        sent = sum(update.sent_bytes(f"parameters/{name}") for name in layer.parameter_names)
        curved = update.sent_bytes(f"curvature/{layer.name}/")
        layers.append(
            {
                "name": layer.name,
                "kind": kind.kind,
                "shape": layer.shape,
                "weights": {"bytes": sent, "bits": 8 * sent / math.prod(layer.shape)},
                "curvature": {"bytes": curved, "bits": 8 * curved / max(numbers, 1)},
            }
        )
    return {
        "file": update.source,
        "bytes": update.upload_bytes,
        "fedavg_uploads": update.upload_bytes / max(update.fedavg_bytes, 1),
        "digest": update.digest,
        "model": update.model_fingerprint,
        "num_samples": header.num_samples,
        "curvature": header.curvature,
        "fisher": header.fisher,
        "likelihood": header.likelihood,
        "curvature_samples": header.curvature_samples,
        "output_layer": header.output_layer,
        "frozen": sorted(header.frozen),
        "buffers": {"bytes": update.sent_bytes("buffers/")},
        "metadata": dict(header.metadata),
        "layers": layers,
    }


def _verify(flags: Namespace) -> int:
    files, model = _expanded(flags.files), _made(flags.model)
    examined = check_updates(files)
    for found in examined:
        if found.update and model and not found.offenders:
            try:
                check_model(model, _without_values(found.update), found.update.header.frozen)
            except ValueError as error:
                found.offenders.append(f"{found.source}: {error}")
    for found in examined:
        if found.update and not found.offenders:
            header = found.update.header
            told = f"{header.num_samples} samples, {header.curvature} {header.fisher}".rstrip()
            print(_printable(f"ok       {found.source}: {told}"))
        else:
            print(_printable(f"REFUSED  {found.source}"))
            for reason in found.offenders:
                print("\n".join(f"         {_printable(line)}" for line in reason.splitlines()))
    usable = [found.update for found in examined if found.update and not found.offenders]
    print(f"{len(usable)} of {len(examined)} updates are usable")
    if len(usable) > 1 and (told := outliers_as_sent(usable)):
        _complain(f"warning: {told}")
    return 0 if len(usable) == len(examined) else _BAD


def _merge(flags: Namespace) -> int:
    output = Path(flags.output)
    if output.suffix != ".safetensors":
        raise ValueError(f"the output {output} must be named NAME.safetensors")
    files, model = _expanded(flags.files), _made(flags.model)
    if output.resolve() in {Path(file).resolve() for file in files}:
        raise ValueError(f"the output {output} is one of the updates: choose another name")
    trainer = Trainer(
        accelerator=flags.accelerator,
        devices=flags.devices,
        strategy="ddp" if flags.devices > 1 else "auto",
        max_epochs=-1,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=sys.stderr.isatty(),
    )
    merge = FisherMergeModule(
        files,
        model=model,
        method=flags.method,
        max_iterations=flags.max_iterations,
        max_influence=flags.max_influence,
        skip_invalid=flags.skip_invalid,
        memory_budget=flags.memory_budget,
    )
    card, record = output.with_suffix(".md"), output.with_suffix(".json")
    if flags.dry_run:
        if is_rank_zero():
            _tell_plan(merge, flags, [output, card, record])
        return 0
    output.parent.mkdir(parents=True, exist_ok=True)  # or it fails before the work
    started = time.perf_counter()
    trainer.fit(merge)
    seconds = time.perf_counter() - started
    if trainer.interrupted:
        raise ValueError("the merge was interrupted: nothing is written")
    if is_rank_zero():
        state = merge.merged_state_dict()
        if model is not None:  # which brings along what was frozen
            state = {n: t for n, t in model.state_dict().items() if isinstance(t, Tensor)}
        with atomic_write(output) as partial:
            # Copied: in this format the names of a shared parameter may not share memory.
            save_file({n: t.cpu().clone().contiguous() for n, t in state.items()}, partial)
        with atomic_write(card) as partial:
            partial.write_text(model_card(merge.result, output.name, ["fedfisher", *sys.argv[1:]]))
        config = {name: value for name, value in flags.items() if name != "config"}
        describe_federation(merge.result, output.name, seconds, config).save(record)
        print(f"{output}: {len(merge.updates)} updates merged by {merge.method}; {card} tells more")
    return 0


def _tell_plan(merge: FisherMergeModule, flags: Namespace, outputs: Sequence[Path]) -> None:
    weights = sum(layer.shape[0] * layer.shape[1] for layer in merge.layers)
    print(
        f"would merge {len(merge.updates)} updates, {len(merge.layers)} layers of {weights:,} "
        f"weights, by {merge.method} on {flags.devices} x {flags.accelerator}"
    )
    for update, client in zip(merge.updates, merge.result.clients, strict=True):
        told = f"  {update.source}: {update.num_samples} samples, weight {100 * client.weight:.1f}%"
        print(_printable(told))
    peak = peak_bytes(merge.updates, merge.merger.loader.budget)
    print(f"memory: about {peak / 1e6:,.1f} MB a process, beside Python's own")
    print(f"would write {', '.join(map(str, outputs))}")


def _report(flags: Namespace) -> int:
    try:
        from lightning_fedfisher.report.page import FILE_NAME, write_report
        from lightning_fedfisher.report.wording import count
    except ImportError as error:  # of an extra
        raise ValueError(str(error)) from error
    run = Path(flags.run)
    record = FederationRecord.load(run)
    output = Path(flags.output or (run / FILE_NAME if run.is_dir() else run.with_suffix(".html")))
    write_report(record, output)
    held = f"{count(len(record.clients), 'client')}, {count(len(record.merges), 'merge')}"
    print(_printable(f"{output}: {held}, {output.stat().st_size:,} bytes"))
    return 0


def _dashboard(flags: Namespace) -> int:
    try:
        from lightning_fedfisher.tracking.wandb_workspace import planned, report, save, workspace
    except ImportError as error:  # of an extra
        raise ValueError(str(error)) from error
    names = flags.entity, flags.project, flags.group
    if flags.dry_run:
        print(json.dumps(planned(*names), indent=2))
        return 0
    for made in (workspace(*names), report(*names)):
        print(_printable(save(made)))
    return 0


def _expanded(patterns: Sequence[str]) -> list[str]:
    """The files that patterns stand for, in order of their names; plain names as they are."""
    files: list[str] = []
    for pattern in patterns:
        found = sorted(glob(pattern, recursive=True)) if has_magic(pattern) else [pattern]
        if not found:
            raise ValueError(f"no file matches {pattern}")
        files += found
    return list(dict.fromkeys(files))


def _made(factory: str | None) -> nn.Module | None:
    """The model that a ``module.path:factory`` makes, looked for in the working folder as well."""
    if factory is None:
        return None
    module, _, name = factory.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        model = getattr(importlib.import_module(module), name)()
    except (ImportError, AttributeError, TypeError) as error:
        raise ValueError(f"--model {factory} makes no model: {error}") from error
    finally:
        sys.path.remove(os.getcwd())
    if not isinstance(model, nn.Module):
        raise ValueError(f"--model {factory} makes a {type(model).__name__}, not a torch module")
    return model


def _without_values(update: ClientUpdate) -> dict[str, Tensor]:
    """The state dict of an update's model, on no device."""
    state = {n: torch.empty(s, dtype=d, device="meta") for n, (s, d) in update.specs.items()}
    return state | {name: state[first] for name, first in update.header.aliases.items()}


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Text in columns: names to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = "<<>>>>>"
    return [
        "  ".join(f"{c:{to}{w}}" for c, to, w in zip(row, aligned, widths, strict=True))
        for row in rows
    ]


def _printable(text: str) -> str:
    """A line without what a terminal would obey: names and metadata are a stranger's."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _complain(text: str) -> None:
    if is_rank_zero():
        print("\n".join(map(_printable, text.splitlines())), file=sys.stderr)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    _complain(f"warning: {message}")


_COMMANDS = {
    "inspect": _inspect,
    "verify": _verify,
    "merge": _merge,
    "report": _report,
    "dashboard": _dashboard,
}

if __name__ == "__main__":
    sys.exit(main())
