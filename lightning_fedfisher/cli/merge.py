"""``fedfisher merge``: update files to one model, with a card and a record beside it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from jsonargparse import Namespace
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_fedfisher._utils.files import atomic_write, require_writable
from lightning_fedfisher._utils.unwrapping import unwrapped
from lightning_fedfisher.cli.inputs import expand_patterns, make_model
from lightning_fedfisher.cli.terminal import show
from lightning_fedfisher.distributed.processes import is_rank_zero
from lightning_fedfisher.merge.compatibility import open_updates
from lightning_fedfisher.merge.memory_budget import peak_bytes
from lightning_fedfisher.merge.merger import Merger
from lightning_fedfisher.merge.options import MergeOptions
from lightning_fedfisher.merge.result import MergeResult, contributions
from lightning_fedfisher.merge.without_trainer import merge_updates
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
        OSError: If the output cannot be written, which is found before the merge; of the three
            files all are written or none.
    """
    output = Path(flags.output)
    if output.suffix != ".safetensors":
        raise ValueError(f"the output {output} must be named NAME.safetensors")
    files, model = expand_patterns(flags.files), make_model(flags.model)
    if output.resolve() in {Path(file).resolve() for file in files}:
        raise ValueError(f"the output {output} is one of the updates: choose another name")
    card, record = output.with_suffix(".md"), output.with_suffix(".json")
    require_writable(output, card, record)  # or it fails after the work
    if flags.dry_run:
        _tell_plan(files, flags, model, [output, card, record])
        return 0
    try:
        result = _merge(files, flags, model)
    except KeyboardInterrupt:
        raise ValueError("the merge was interrupted: nothing is written") from None
    if not is_rank_zero():
        return 0
    state = dict(result.state_dict)
    if model is not None:  # which brings along what was frozen
        unwrapped(model).load_state_dict(state, strict=False)
        state = {n: t for n, t in model.state_dict().items() if isinstance(t, Tensor)}
    config = {name: value for name, value in flags.items() if name != "config"}
    described = describe_federation(result, output.name, config)
    about = model_card(result, output.name, ["fedfisher", *sys.argv[1:]])
    with atomic_write(output) as partial, atomic_write(card) as partial_card:  # all or none
        # Copied: in this format the names of a shared parameter may not share memory.
        save_file({n: t.cpu().clone().contiguous() for n, t in state.items()}, partial)
        # The names of files may hold lone surrogates, which UTF-8 cannot encode.
        partial_card.write_text(about, encoding="utf-8", errors="replace")
        described.save(record)
    show(f"{output}: {len(result.clients)} updates merged by {result.method}; {card} tells more")
    return 0


def _merge(files: Sequence[str], flags: Namespace, model: nn.Module | None) -> MergeResult:
    options = {
        "model": model,
        "method": flags.method,
        "max_iterations": flags.max_iterations,
        "max_influence": flags.max_influence,
        "skip_invalid": flags.skip_invalid,
        "allow_duplicates": flags.allow_duplicates,
        "memory_budget": flags.memory_budget,
    }
    if (device := _device(flags)) is not None:
        return merge_updates(files, device=device, **options)
    from lightning_fedfisher.cli.merge_on_trainer import merge_on_trainer

    return merge_on_trainer(files, flags.accelerator, flags.devices, options)


def _device(flags: Namespace) -> str | None:
    """The device on which this process merges alone; None if that takes a Trainer."""
    accelerator = flags.accelerator
    if flags.devices != 1:
        return None
    if torch.cuda.is_available() and accelerator in ("auto", "gpu", "cuda"):
        return "cuda"
    return "cpu" if accelerator in ("auto", "cpu") else None


def _tell_plan(
    files: Sequence[str], flags: Namespace, model: nn.Module | None, outputs: Sequence[Path]
) -> None:
    """Checks all that a merge would, and prints what it would do, for ``--dry-run``."""
    if _device(flags) is None:
        from lightning_fedfisher.cli.merge_on_trainer import check_devices

        check_devices(flags.accelerator, flags.devices)
    options = MergeOptions(
        flags.method,
        max_iterations=flags.max_iterations,
        max_influence=flags.max_influence,
        skip_invalid=flags.skip_invalid,
        allow_duplicates=flags.allow_duplicates,
        memory_budget=flags.memory_budget,
    )
    updates = open_updates(files, options.row, options.skip_invalid, decode=True)
    merger = Merger.open(updates, options, model)
    if not is_rank_zero():
        return
    weights = sum(layer.shape[0] * layer.shape[1] for layer in merger.layers)
    show(
        f"would merge {len(merger.updates)} updates, {len(merger.layers)} layers of {weights:,} "
        f"weights, by {flags.method} on {flags.devices} x {flags.accelerator}"
    )
    for client in contributions(merger.updates, merger.loader.client_weights):
        told = f"{client.num_samples} samples, {100 * client.weight:.1f}% of the weight"
        show(f"  {client.source}: {told}")
    header, clients = merger.updates[0].header, len(merger.updates)
    peak = peak_bytes(header, clients, merger.loader.budget)
    show(f"memory: about {peak / 1e6:,.1f} MB a process, beside Python's own")
    show(f"would write {', '.join(map(str, outputs))}")
