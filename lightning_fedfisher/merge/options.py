"""What can be asked of a merge, stated once for the function, the Lightning module and the CLI."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lightning_fedfisher.merge.memory_budget import DEFAULT_MEMORY_BUDGET
from lightning_fedfisher.merge.methods import MergeMethod, find_method


@dataclass(frozen=True)
class MergeOptions:
    """What can be asked of a merge.

    Attributes:
        method: Name of the merge method, a key of `METHODS`, or a row of your own.
        keep_best: Whether to return the iterate that is best on the validation samples rather than
            the last one. None leaves that to the method: the published ones do, ours does not.
        max_iterations: Solver steps to make for a layer at most. None leaves that to the method.
        max_influence: What a client may weigh in a layer, as a multiple of what the median client
            weighs (see `influence_cap`). None leaves that to the method: 2 for ours, no bound for
            the published ones.
        skip_invalid: Whether to merge without the updates that would be refused, with a warning.
        memory_budget: Bytes of clients' weights and curvature to hold at a time. Beyond it, layers
            wait for their turn. The curvature of a layer that exceeds it alone is offloaded to
            disk, in the folder for temporary files, and so are alignments.
        allow_duplicates: Whether an update that is there twice, to the digest, counts twice. It
            counts once otherwise, with a warning.

    Raises:
        ValueError: If the method is unknown or a number is out of range.

    Example:
        >>> MergeOptions("fedfisher", max_influence=2).row.max_influence
        2.0
    """

    method: str | MergeMethod = "fedfisher"
    keep_best: bool | None = None
    max_iterations: int | None = None
    max_influence: float | None = None
    skip_invalid: bool = False
    memory_budget: int = DEFAULT_MEMORY_BUDGET
    allow_duplicates: bool = False

    def __post_init__(self) -> None:
        find_method(self.method)
        if self.max_iterations is not None and self.max_iterations < 1:
            raise ValueError(f"max_iterations must be at least 1, got {self.max_iterations}")
        if self.max_influence is not None and not self.max_influence >= 1:
            raise ValueError(f"max_influence must be at least 1, got {self.max_influence}")
        if self.memory_budget < 0:
            raise ValueError(f"memory_budget must be at least 0 bytes, got {self.memory_budget}")

    @property
    def row(self) -> MergeMethod:
        """The method, with what these options change of it."""
        method = find_method(self.method)
        if self.max_influence is not None:
            method = replace(method, max_influence=float(self.max_influence))
        if self.max_iterations is not None:
            method = replace(method, max_iterations=self.max_iterations)
        if self.keep_best is not None:
            method = replace(method, keeps_best=self.keep_best)
        return method
