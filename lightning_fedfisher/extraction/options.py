"""The options of an extraction: their meaning, their defaults, and which values are refused."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import Any, TypedDict

from lightning_fedfisher.curvature.registry import CurvatureType
from lightning_fedfisher.errors import FedFisherError
from lightning_fedfisher.extraction.batches import BatchRunner, Forward
from lightning_fedfisher.extraction.fisher_types import FISHER_TYPES, FisherType
from lightning_fedfisher.extraction.layer_report import CURVATURE_TYPES
from lightning_fedfisher.extraction.positions import Positions, check_positions
from lightning_fedfisher.extraction.sampling import MaxSamples, check_max_samples
from lightning_fedfisher.likelihoods.registry import LIKELIHOODS


@dataclass(frozen=True, kw_only=True)
class ExtractionOptions:
    """What curvature is extracted, and over which samples.

    Attributes:
        curvature: Kind of curvature: ``"identity"`` (none, no pass over the samples at all),
            ``"diagonal"``, ``"input_gram"`` (second moments of the layers' inputs, which take no
            labels and no backward pass, and no memory for a layer's outputs), ``"kfac"``,
            ``"ekfac"`` or ``"dense"``. A layer without Kronecker factors gets an exact diagonal
            instead of ``"kfac"`` or ``"ekfac"``, and the identity instead of ``"input_gram"``.
        fisher: Fisher type: ``"normalised"``, ``"exact"``, ``"mc"`` or ``"empirical"`` (see
            `fisher_types`).
        likelihood: Name of the likelihood of the labels given the logits: ``"categorical"`` (any
            number of positions after the classes, unobserved ones labelled -100), ``"bernoulli"``
            or ``"gaussian"``, or any other key of `LIKELIHOODS`.
        max_samples: Most samples to average over. A number takes a seeded random subset of this
            size, ``"auto"`` takes every twelfth sample but at least 300, and None takes all. Of an
            iterable without indices, a number takes the first samples, rounded up to whole batches,
            and ``"auto"`` takes all.
        batch_size: Number of samples in a batch; None keeps the loader's own. It is halved, with a
            warning, for as long as memory does not suffice.
        seed: Seed of the subset and of all draws.
        positions: Most positions of each sample (pixels of a feature map, tokens of a text) that a
            layer's Kronecker factors are computed from: ``"auto"`` takes a sixteenth of them but at
            least 2, at random, which costs no accuracy (see the recipes' positions study), and None
            takes all. Diagonal and dense curvature and EKFAC's eigenvalues always take all.
        draws: Number of directions that are drawn for each sample, for the Fisher types that draw.
        tolerance: Share of each batch's trace, from 0 to below 1, that the exact Fisher type may
            leave out to save backward passes.
        forward: Function that maps ``(module, batch)`` to logits, or to ``(logits, labels)``. None
            stands for batches ``(x, y)`` and logits ``module(x)``.
        ignore_index: Label that stands for "not observed", such as 255 for a pixel that belongs to
            nothing; the likelihoods' own are -100 (classes) and NaN. None asks the losses of
            `torch.nn` that the module holds (see `held_losses`).
        estimate_statistics: Whether BatchNorm layers in training mode get running statistics anew,
            on the same samples, before the curvature is extracted. The model's own lag behind its
            weights, and a merge learns what they are for other weights (see
            `running_statistics`). Those in eval mode stay as they are.

    Raises:
        FedFisherError: If options are unknown or out of range; all are named at once.

    Example:
        >>> ExtractionOptions(fisher="exact").curvature
        'kfac'
        >>> ExtractionOptions(curvature="hessian", draws=0)
        Traceback (most recent call last):
            ...
        lightning_fedfisher.errors.FedFisherError: These options of an extraction cannot be used:
          - curvature='hessian' is not one of identity, diagonal, input_gram, kfac, ekfac, dense
          - draws must be at least 1, a whole number, got 0
    """

    curvature: CurvatureType = "kfac"
    fisher: FisherType = "normalised"
    likelihood: str = "categorical"
    max_samples: MaxSamples = "auto"
    batch_size: int | None = None
    seed: int = 0
    positions: Positions = "auto"
    draws: int = 1
    tolerance: float = 5e-6
    forward: Forward | None = None
    ignore_index: float | None = None
    estimate_statistics: bool = False

    def __post_init__(self) -> None:
        """Refuses what is unknown or out of range, all at once."""
        known: tuple[tuple[str, str, Collection[str]], ...] = (
            ("curvature", self.curvature, CURVATURE_TYPES),
            ("fisher", self.fisher, FISHER_TYPES),
            ("likelihood", self.likelihood, LIKELIHOODS),
        )
        offenders = [
            f"{name}={given!r} is not one of {', '.join(choices)}"
            for name, given, choices in known
            if given not in choices
        ]
        for check, given in (
            (check_max_samples, self.max_samples),
            (check_positions, self.positions),
        ):
            try:
                check(given)
            except ValueError as error:
                offenders.append(str(error))
        for name, count in (("batch_size", self.batch_size), ("draws", self.draws)):
            if count is not None and not (isinstance(count, Integral) and int(count) >= 1):
                offenders.append(f"{name} must be at least 1, a whole number, got {count!r}")
        if isinstance(self.ignore_index, bool | str):
            offenders.append(f"ignore_index must be a number, got {self.ignore_index!r}")
        if not isinstance(self.estimate_statistics, bool):
            told = f"got {self.estimate_statistics!r}"
            offenders.append(f"estimate_statistics must be True or False, {told}")
        if not 0 <= self.tolerance < 1:
            offenders.append(f"tolerance must lie in [0, 1), got {self.tolerance}")
        if offenders:
            raise FedFisherError("These options of an extraction cannot be used:", offenders)

    def runner(self, prepare: Callable[[Any], Any] | None = None) -> BatchRunner:
        """Gives what runs a model on batches, and gets logits and labels as these options say.

        Args:
            prepare: Function applied to each batch first; None leaves it as the loader gives it.
        """
        if self.ignore_index is None:
            return BatchRunner(self.forward, prepare)
        mark = LIKELIHOODS[self.likelihood].mark_unobserved
        return BatchRunner(self.forward, prepare, partial(mark, value=self.ignore_index))


class OptionOverrides(TypedDict, total=False):
    """The fields of `ExtractionOptions` that a call may change, each by a keyword of its name."""

    fisher: FisherType
    likelihood: str
    max_samples: MaxSamples
    batch_size: int | None
    seed: int
    positions: Positions
    draws: int
    tolerance: float
    forward: Forward | None
    ignore_index: float | None
    estimate_statistics: bool
