"""The merge methods: which curvature each needs, what it makes of it, and how it solves.

Add a merge method here: a row of `METHODS`. The code that merges asks a row what to do, and never
for its name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial

from lightning_fedfisher.curvature.base import Curvature, Identity
from lightning_fedfisher.curvature.powers import require_positive_exponent
from lightning_fedfisher.merge.influence_cap import DEFAULT_MAX_INFLUENCE
from lightning_fedfisher.merge.objective import Quadratic
from lightning_fedfisher.merge.ridge import RidgeRegression
from lightning_fedfisher.merge.solvers import ClosedForm, PublishedServer, Solver, exact_solver
from lightning_fedfisher.update.header import UpdateHeader

Transform = Callable[[Curvature], Curvature]
"""What a method makes of a client's curvature of a layer."""


@dataclass(frozen=True)
class MergeMethod:
    """How a method merges one layer.

    Make your own from a row of `METHODS` with `dataclasses.replace`, under a name of its own.

    Attributes:
        name: What it is called. A checkpoint tells methods apart by their names and numbers.
        solver: Makes the solver of a layer's quadratic.
        max_iterations: Steps after which it stops, unless its solver finishes before.
        steps_per_epoch: Steps that a solver makes between two evaluations of the merged model.
        transform: What it makes of a client's curvature before the power; None for nothing.
        output_transform: What stands for it in an output layer whose outputs are the logits of a
            softmax, and whose inputs are aligned, or about what they are in the clients: where
            these are alike (`carried_statistics`) and the model has running statistics of its own.
            None for the same as in any layer.
        power: Power that each client's curvature is raised to.
        inputs_power: Power of the factor over the inputs, where curvature has one (K-FAC,
            ``input_gram``), in linear layers that are not aligned and are not the output layer;
            None for the `power`, which convolutions take in any case.
        damping: Part of its mean diagonal entry that is added to the factor over the outputs
            before; not in the output layer of a softmax.
        linear_damping: Multiple of it in the layers that the `inputs_power` is for.
        curvatures: The curvatures it can merge, as an extraction is asked for them; any if empty.
        fishers: The Fisher types it is defined for; any if empty.
        client_weight_power: A client of ``n`` samples weighs ``n ** client_weight_power``.
        converges: Whether it promises the minimum rather than a number of steps.
        keeps_best: Whether it returns its best iterate on labelled samples, when given some.
        ignores_curvature: Whether all weights count the same. No curvature is read then.
        aligns: Whether a layer is merged after the one whose outputs it reads, with weights and
            curvature for the inputs that the merged model gives it (see `alignment`).
        max_influence: What a client may weigh in a layer, as a multiple of what the median client
            weighs (see `influence_cap`).
        takes_fits: Whether it merges least-squares fits alone (`closed_form_head`).

    Example:
        >>> from dataclasses import replace
        >>> cautious = replace(METHODS["fedfisher"], name="cautious", max_influence=2.0)
        >>> cautious.aligns, cautious.max_influence
        (True, 2.0)
    """

    name: str
    solver: Callable[[Quadratic], Solver]
    max_iterations: int
    steps_per_epoch: int
    transform: Transform | None = None
    output_transform: Transform | None = None
    power: float = 1.0
    inputs_power: float | None = None
    damping: float = 0.0
    linear_damping: float = 1.0
    curvatures: tuple[str, ...] = ()
    fishers: tuple[str, ...] = ()
    client_weight_power: float = 1.0
    converges: bool = False
    keeps_best: bool = False
    ignores_curvature: bool = False
    aligns: bool = False
    max_influence: float = math.inf
    takes_fits: bool = False

    def __post_init__(self) -> None:
        """Refuses powers that are not greater than zero, and a negative damping."""
        require_positive_exponent(self.power)
        if self.inputs_power is not None:
            require_positive_exponent(self.inputs_power)
        if not 0 <= self.damping < math.inf:
            raise ValueError(f"damping must not be negative, got {self.damping}")
        if not 0 <= self.linear_damping < math.inf:
            raise ValueError(f"linear_damping must not be negative, got {self.linear_damping}")

    def transformed(
        self,
        curvature: Curvature,
        is_output_layer: bool = False,
        damps: bool = True,
        is_linear: bool = False,
    ) -> Curvature:
        """Makes of a client's curvature of a layer what is merged.

        Args:
            curvature: The curvature, as it was sent.
            is_output_layer: Whether `output_transform` is for this layer.
            damps: Whether it is damped, as all but output layers are.
            is_linear: Whether the `inputs_power` is for this layer.
        """
        transform = self.transform_of(is_output_layer)
        made = curvature if transform is None else transform(curvature)
        return made.power(*self.powers(damps, is_linear))

    @property
    def takes_curvature_as_it_is(self) -> bool:
        """Whether it neither raises nor damps curvature."""
        return {self.power, self.inputs_power or self.power} == {1} and not self.damping

    def powers(self, damps: bool, is_linear: bool) -> tuple[float, float, float | None]:
        """What a layer's curvature is raised to.

        Args:
            damps: See `transformed`.
            is_linear: See `transformed`.

        Returns:
            Power, damping and the power of the inputs' factor, as `Curvature.power` takes them.
        """
        damping = self.damping if damps else 0.0
        if is_linear:
            return self.power, self.linear_damping * damping, self.inputs_power
        return self.power, damping, None

    def transform_of(self, is_output_layer: bool) -> Transform | None:
        """What is done before the power.

        Args:
            is_output_layer: Whether `output_transform` is for this layer.
        """
        own = self.output_transform if is_output_layer else None
        return self.transform if own is None else own

    def refusal(self, header: UpdateHeader) -> str | None:
        """Says why it cannot merge an update.

        Args:
            header: Header of the update.

        Returns:
            The reason, with what to do instead; None if it can merge the update.
        """
        if self.takes_fits and header.fit is None:
            return "holds no least-squares fit: make it by FedFisherCallback(closed_form_head=True)"
        if header.fit is not None and not self.takes_curvature_as_it_is:
            return (
                "holds a least-squares fit, and no power of its curvature has the fit of all "
                "samples: merge it by method='closed_form_head'"
            )
        if self.curvatures and header.curvature not in self.curvatures:
            wanted, found = f"curvature={self.curvatures[0]!r}", f"{header.curvature} curvature"
        elif self.fishers and header.fisher not in self.fishers:
            wanted, found = f"fisher={self.fishers[0]!r}", f"the {header.fisher} Fisher"
        else:
            return None
        return f"holds {found}: extract it with FedFisherCallback({wanted}, ...)"


def _of_inputs(curvature: Curvature) -> Curvature:
    return curvature.of_inputs()


def _ignored(curvature: Curvature) -> Curvature:
    return Identity(curvature.shape)


def _of_outputs(curvature: Curvature) -> Curvature:
    # The inputs of the output layer have a mean far larger than their spread. Weighing by their
    # second moment ties the clients to how much they prefer a class whatever the input, which is
    # about the classes they happened to hold. That weight goes only where the inputs keep about
    # their mean, aligned or normalised anew: else nothing but it keeps another from shifting all
    # classes.
    return curvature.average_over_columns()


# At power 1 the few steepest directions of each client rule, and the exact minimum forgets the
# rest; at power 1/2 the minimum itself is the model wanted, and no labels decide when to stop.
_SQUARE_ROOT = 0.5
# Closer to the plain quadratic where a layer reads about what it reads in the clients, as the
# layers of a fine-tuned transformer do.
_INPUTS_POWER = 0.7
# Of a few hundred samples the factor over the outputs is singular, and claims that what it did not
# see does not matter at all. Of logits it is singular on purpose: a constant changes nothing.
_DAMPING = 0.01
# Layers whose inputs and outputs nobody aligns believe it less; convolutions lose by more damping.
_LINEAR_DAMPING = 10.0
# The square root of float32's rounding, with room: what the power makes of eigenvalues that are 0.
# Of inputs to the power 0.7 it leaves out what has less than 5e-5 of the largest second moment.
_ROOT_RCOND = 1e-3
# Three hundredths above the minimum move no accuracy, and take a third to a half of the steps.
_RELATIVE_GAP = 3e-2
_PUBLISHED_STEPS = 2000
_PUBLISHED_STEPS_PER_EPOCH = 100
_CG_STEPS = 1000
_CG_STEPS_PER_EPOCH = 20

METHODS: dict[str, MergeMethod] = {
    method.name: method
    for method in (
        MergeMethod(
            "fedavg",
            ClosedForm,
            max_iterations=1,
            steps_per_epoch=1,
            transform=_ignored,
            ignores_curvature=True,
        ),
        MergeMethod(
            "fisher_merge",
            ClosedForm,
            max_iterations=1,
            steps_per_epoch=1,
            curvatures=("diagonal",),
        ),
        MergeMethod(
            "regmean",
            exact_solver,
            _CG_STEPS,
            _CG_STEPS_PER_EPOCH,
            transform=_of_inputs,
            curvatures=("input_gram", "kfac"),
            converges=True,
        ),
        MergeMethod(
            "fedfisher_diag",
            partial(PublishedServer, damping_inside=False),
            _PUBLISHED_STEPS,
            _PUBLISHED_STEPS_PER_EPOCH,
            curvatures=("diagonal",),
            fishers=("exact",),
            keeps_best=True,
        ),
        MergeMethod(
            "fedfisher_kfac",
            partial(PublishedServer, damping_inside=True),
            _PUBLISHED_STEPS,
            _PUBLISHED_STEPS_PER_EPOCH,
            curvatures=("kfac",),
            fishers=("exact",),
            keeps_best=True,
        ),
        MergeMethod(
            "fedfisher",
            partial(exact_solver, rcond=_ROOT_RCOND, relative_gap=_RELATIVE_GAP),
            _CG_STEPS,
            _CG_STEPS_PER_EPOCH,
            output_transform=_of_outputs,
            power=_SQUARE_ROOT,
            inputs_power=_INPUTS_POWER,
            damping=_DAMPING,
            linear_damping=_LINEAR_DAMPING,
            curvatures=("kfac", "ekfac", "diagonal", "input_gram", "dense"),
            client_weight_power=0.5,
            converges=True,
            aligns=True,
            max_influence=DEFAULT_MAX_INFLUENCE,
        ),
        MergeMethod(
            "closed_form_head",
            RidgeRegression,
            max_iterations=1,
            steps_per_epoch=1,
            curvatures=("input_gram",),
            converges=True,
            takes_fits=True,
        ),
    )
}
"""Every method, by its name.

The published ones are FedFisher's (arXiv 2403.12329), with its server's steps. RegMean (Jin et al.,
2023) takes the inputs' second moment, alone or from the K-FAC factors, which for convolutions is
that of unfolded patches; layers without one are averaged. ``closed_form_head`` takes the fits of
`fit_closed_form_head`, and gives the ridge regression of all clients' samples together.
"""


def find_method(method: str | MergeMethod) -> MergeMethod:
    """Looks a method up by its name.

    Args:
        method: A name in `METHODS`, or a row of your own.

    Returns:
        The row.

    Raises:
        ValueError: If there is no such name, or a row of your own bears the name of another.

    Example:
        >>> find_method("fedavg").max_iterations
        1
    """
    if not isinstance(method, MergeMethod):
        if method not in METHODS:
            raise ValueError(f"method {method!r} is not one of {', '.join(METHODS)}")
        return METHODS[method]
    known = METHODS.get(method.name)
    if known is not None and (changed := _differences(method, known)):
        raise ValueError(
            f"a method with another {' or '.join(changed)} than {method.name!r} needs a name of "
            "its own: dataclasses.replace(method, name=...)"
        )
    return method


# What `MergeOptions` may change of a method, and what changes no result.
_ADJUSTABLE = {"max_iterations", "steps_per_epoch", "keeps_best", "max_influence"}


def _differences(one: MergeMethod, other: MergeMethod) -> list[str]:
    """The fields in which two methods of one name differ and should not."""
    names = [field.name for field in fields(MergeMethod) if field.name not in _ADJUSTABLE]
    return [n for n in names if _told(getattr(one, n)) != _told(getattr(other, n))]


def _told(value: object) -> object:
    """A value to compare by: partial functions that are alike are not equal by themselves."""
    if isinstance(value, partial):
        return value.func, value.args, tuple(sorted(value.keywords.items()))
    return value
