"""The merge methods by name: which curvature each needs, what it makes of it, how it solves.

A method is a row of `METHODS`; the code that merges knows no method's name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

from lightning_fedfisher.curvature.base import Curvature, Identity
from lightning_fedfisher.merge.influence_cap import USUAL
from lightning_fedfisher.merge.objective import Quadratic
from lightning_fedfisher.merge.solvers import ClosedForm, PublishedServer, Solver, exact_solver

MethodName = Literal[
    "fedavg", "fisher_merge", "regmean", "fedfisher_diag", "fedfisher_kfac", "fedfisher"
]


@dataclass(frozen=True)
class MergeMethod:
    """How a method merges one layer.

    Attributes:
        curvatures: kinds of curvature it can merge; any if empty.
        fishers: Fisher types it is defined for; any if empty.
        transform: what it makes of a client's curvature; the flag tells whether the layer is the
            head, whose outputs are the logits of a softmax, and aligned.
        solver: how it minimises.
        iterations: steps after which it stops, if its solver has not finished before.
        sweep: steps between two looks at the model.
        share_power: a client of ``n`` samples counts as ``n ** share_power``.
        converges: whether it promises the minimum, rather than a number of steps.
        keeps_best: whether it returns its best iterate on labelled samples, when given some.
        aligns: whether a layer is merged after the one whose outputs it reads, with weights and
            curvature for the inputs that the merged model gives it (see `alignment`).
        max_influence: what a client may weigh in a layer, as a multiple of what the median client
            does (see `influence`).
    """

    curvatures: tuple[str, ...]
    fishers: tuple[str, ...]
    transform: Callable[[Curvature, bool], Curvature]
    solver: Callable[[Quadratic], Solver]
    iterations: int
    sweep: int
    share_power: float = 1.0
    converges: bool = False
    keeps_best: bool = False
    aligns: bool = False
    max_influence: float = math.inf

    def refusal(self, curvature: str, fisher: str) -> str | None:
        """Why it cannot merge such an update, or None if it can.

        Args:
            curvature: kind the update was extracted with.
            fisher: Fisher type it was extracted with.

        Returns:
            The reason, with what to extract instead.
        """
        if self.curvatures and curvature not in self.curvatures:
            wanted, found = f"curvature={self.curvatures[0]!r}", f"{curvature} curvature"
        elif self.fishers and fisher not in self.fishers:
            wanted, found = f"fisher={self.fishers[0]!r}", f"the {fisher} Fisher"
        else:
            return None
        return f"holds {found}: extract it with FedFisherCallback({wanted}, ...)"


def _unchanged(curvature: Curvature, head: bool) -> Curvature:
    return curvature


def _forget(curvature: Curvature, head: bool) -> Curvature:
    return Identity(curvature.shape)


def _regress(curvature: Curvature, head: bool) -> Curvature:
    return curvature.of_inputs()


def _temper(curvature: Curvature, head: bool) -> Curvature:
    # At power 1 the few steepest directions of each client rule, and the exact minimum forgets the
    # rest; at power 1/2 the minimum itself is the model wanted, and no labels decide when to stop.
    # The inputs of the head have a mean far larger than their spread. Weighing by their second
    # moment ties the clients to how much they prefer a class whatever the input, which is about
    # the classes they happened to hold; so the head is weighed by its outputs alone. Only where it
    # is aligned: else nothing but that weight keeps a new mean from shifting all classes.
    return (curvature.average_over_columns() if head else curvature).power(0.5)


# The square root of float32's rounding, with room: what the power makes of eigenvalues that are 0.
_TEMPERED_ROUNDING = 1e-3
_PUBLISHED_STEPS = 2000
_PUBLISHED_LOOK = 100

METHODS: dict[MethodName, MergeMethod] = {
    "fedavg": MergeMethod((), (), _forget, ClosedForm, iterations=1, sweep=1),
    "fisher_merge": MergeMethod(
        ("diagonal",),
        (),
        _unchanged,
        ClosedForm,
        iterations=1,
        sweep=1,
    ),
    "regmean": MergeMethod(
        ("kfac",),
        (),
        _regress,
        exact_solver,
        iterations=1000,
        sweep=20,
        converges=True,
    ),
    "fedfisher_diag": MergeMethod(
        ("diagonal",),
        ("exact",),
        _unchanged,
        partial(PublishedServer, damping_inside=False),
        iterations=_PUBLISHED_STEPS,
        sweep=_PUBLISHED_LOOK,
        keeps_best=True,
    ),
    "fedfisher_kfac": MergeMethod(
        ("kfac",),
        ("exact",),
        _unchanged,
        partial(PublishedServer, damping_inside=True),
        iterations=_PUBLISHED_STEPS,
        sweep=_PUBLISHED_LOOK,
        keeps_best=True,
    ),
    "fedfisher": MergeMethod(
        ("kfac", "ekfac", "diagonal", "dense"),
        (),
        _temper,
        partial(exact_solver, rcond=_TEMPERED_ROUNDING),
        iterations=1000,
        sweep=20,
        share_power=0.5,
        converges=True,
        aligns=True,
        max_influence=USUAL,
    ),
}
"""Every method.

The published ones are FedFisher's (arXiv 2403.12329), with its server's steps. RegMean (Jin et al.,
2023) has the inputs' second moment from the K-FAC factor, which for convolutions is that of
unfolded patches; layers without one are averaged.
"""

assert set(METHODS) == set(get_args(MethodName))
