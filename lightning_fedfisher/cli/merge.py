"""``fedfisher merge``: update files to one model, with a card and a record beside it."""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import Trainer
from safetensors.torch import save_file
from torch import Tensor

from lightning_fedfisher._utils.files import atomic_write
from lightning_fedfisher._utils.progress import is_rank_zero
from lightning_fedfisher.cli.inputs import expand_patterns, make_model
from lightning_fedfisher.cli.terminal import show
from lightning_fedfisher.merge_module import FisherMergeModule
from lightning_fedfisher.results.from_merge import describe_federation
from lightning_fedfisher.results.model_card import model_card


def run(flags: Namespace) -> int:
    """Merges update files and writes the model, its card and its record.

    Args:
        flags: Those of `make_parser`'s ``merge``.

    Returns:
        The exit status, 0.

    Raises:
        ValueError: If an update, the model or the value of a flag is refused.
    """
    with _quiet_lightning():
        return _merge(flags)


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Mutes Lightning's advice, and turns its complaints about flags into a `ValueError`."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PossibleUserWarning)
        warnings.filterwarnings("ignore", message=".*no `val_dataloader`")
        try:
            yield
        except MisconfigurationException as error:
            raise ValueError(str(error)) from error
        finally:
            logger.setLevel(level)


def _merge(flags: Namespace) -> int:
    output = Path(flags.output)
    if output.suffix != ".safetensors":
        raise ValueError(f"the output {output} must be named NAME.safetensors")
    files, model = expand_patterns(flags.files), make_model(flags.model)
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
            partial.write_text(model_card(merge, output.name, ["fedfisher", *sys.argv[1:]]))
        config = {name: value for name, value in flags.items() if name != "config"}
        describe_federation(merge, output.name, seconds, config).save(record)
        print(f"{output}: {len(merge.updates)} updates merged by {merge.method}; {card} tells more")
    return 0


def _tell_plan(merge: FisherMergeModule, flags: Namespace, outputs: Sequence[Path]) -> None:
    """Prints what a merge would do, for ``--dry-run``."""
    weights = sum(layer.shape[0] * layer.shape[1] for layer in merge.layers)
    print(
        f"would merge {len(merge.updates)} updates, {len(merge.layers)} layers of {weights:,} "
        f"weights, by {merge.method} on {flags.devices} x {flags.accelerator}"
    )
    for update, share in zip(merge.updates, merge.problems.shares, strict=True):
        told = f"  {update.source}: {update.num_samples} samples, a share of {100 * share:.1f}%"
        show(told)
    print(f"memory: about {merge.problems.peak_bytes / 1e6:,.1f} MB a process, beside Python's own")
    print(f"would write {', '.join(map(str, outputs))}")
