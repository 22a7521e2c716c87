"""What the losses that a module holds say about its labels and outputs.

A module that keeps ``nn.CrossEntropyLoss(ignore_index=255)`` as an attribute tells how its labels
and outputs are meant. Curvature that is extracted under another reading of them is wrong, and
nobody would notice: so what such a loss says is taken over, or refused by its name. A loss that is
called as a function says nothing here.

Label smoothing moves the labels and leaves the curvature of the loss as it is. The reduction is of
no importance: curvature is a mean over samples.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import Tensor, nn

from lightning_fedfisher.errors import UnsupportedModelError
from lightning_fedfisher.extraction.options import ExtractionOptions
from lightning_fedfisher.likelihoods import IGNORE_INDEX

# The likelihood whose logits a loss takes, by the loss; log-probabilities are logits as well.
_LIKELIHOODS: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.CrossEntropyLoss, "categorical"),
    (nn.NLLLoss, "categorical"),
    (nn.BCEWithLogitsLoss, "bernoulli"),
    (nn.MultiLabelSoftMarginLoss, "bernoulli"),
    (nn.MSELoss, "gaussian"),
)
# What makes probabilities of the logits of a likelihood, as autograd calls it.
_PROBABILITIES = {"categorical": "Softmax", "bernoulli": "Sigmoid"}
_WEIGHTS = ("weight", "pos_weight")
_NOT_THE_LOSS = "if it is not the loss of these outputs, pass forward= to say which they are"


def options_by_losses(model: nn.Module, options: ExtractionOptions) -> ExtractionOptions:
    """Takes over what a module's losses say, and refuses what a likelihood cannot express.

    Losses of several outputs may be held: those of another likelihood are left alone if there is
    one of the options' own. With ``forward=``, the user says which outputs are meant.

    Args:
        model: The module.
        options: Options of an extraction from it.

    Returns:
        The options, with the label that its losses ignore as `ExtractionOptions.ignore_index` if
        that was None.

    Raises:
        UnsupportedModelError: If a loss takes probabilities, belongs to another likelihood, has
            weights, or disagrees with another; all are named at once.

    Example:
        >>> model = nn.ModuleDict({"loss": nn.CrossEntropyLoss(ignore_index=255)})
        >>> options_by_losses(model, ExtractionOptions()).ignore_index
        255
    """
    held = _held(model)
    own = {path: loss for path, loss in held.items() if _likelihood(loss) == options.likelihood}
    offenders = []
    if not own and options.forward is None:
        offenders += [_of_another(path, loss, options.likelihood) for path, loss in held.items()]
    for path, loss in own.items():
        name = f"{path} is a {type(loss).__name__}"
        offenders += [
            f"{name} with {weights}: a likelihood has no class weights; train without, or balance "
            "the samples"
            for weights in _WEIGHTS
            if isinstance(getattr(loss, weights, None), Tensor)
        ]
        if getattr(loss, "label_smoothing", 0.0) and options.fisher == "empirical":
            offenders.append(
                f"{name} with label_smoothing, and the empirical Fisher is one of the labels as "
                'they are: pass fisher="normalised" or "exact"'
            )
    ignored = {
        path: loss.ignore_index
        for path, loss in own.items()
        if isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss)
    }
    if options.ignore_index is None and len(set(ignored.values())) > 1:
        told = ", ".join(f"{path}: {index}" for path, index in ignored.items())
        offenders.append(f"losses ignore different labels ({told}): pass ignore_index=")
    if offenders:
        raise UnsupportedModelError(offenders)
    index = next(iter(ignored.values()), IGNORE_INDEX)
    if options.ignore_index is not None or index == IGNORE_INDEX:
        return options
    return replace(options, ignore_index=index)


def _held(model: nn.Module) -> dict[str, nn.Module]:
    """The losses of `torch.nn` that a module holds, also in lists and tables, by their names."""
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.loss._Loss):
            found[path or type(module).__name__] = module
        for name, kept in vars(module).items():
            parts: Iterable[tuple[object, object]] = ()
            if type(kept) is dict and name != "_modules":
                parts = kept.items()
            elif type(kept) in (list, tuple):
                parts = enumerate(kept)
            for key, part in parts:
                if isinstance(part, nn.modules.loss._Loss):
                    found[f"{path}.{name}[{key!r}]".lstrip(".")] = part
    return found


def require_no_probabilities(
    last_operation: str, sums_to_one: bool, options: ExtractionOptions
) -> None:
    """Refuses a model that gives probabilities where a likelihood takes logits.

    With ``forward=``, the user says which outputs are meant.

    Args:
        last_operation: `ModelTrace.last_operation`.
        sums_to_one: `ModelTrace.sums_to_one`.
        options: Options of the extraction.

    Raises:
        UnsupportedModelError: If the model ends in what makes probabilities of logits.
    """
    made_by = _PROBABILITIES.get(options.likelihood)
    if made_by is None or options.forward is not None:
        return
    by_values = sums_to_one and options.likelihood == "categorical"
    if by_values or last_operation.startswith(made_by):
        raise UnsupportedModelError(
            [
                f"the outputs are probabilities, as a {made_by.lower()} gives them, and curvature "
                "is extracted at the logits: return these by forward= (what the "
                f"{made_by.lower()} is applied to), or the same outputs if they are logits"
            ]
        )


def _likelihood(loss: nn.Module) -> str:
    """Name of the likelihood whose logits a loss takes; empty if there is none."""
    return next((name for kind, name in _LIKELIHOODS if isinstance(loss, kind)), "")


def _of_another(path: str, loss: nn.Module, likelihood: str) -> str:
    """Says why a loss does not go with a likelihood."""
    name = f"{path} is a {type(loss).__name__}"
    if isinstance(loss, nn.BCELoss):
        return (
            f"{name}, which takes probabilities, and curvature is extracted at the logits: return "
            "these by forward= (what the sigmoid is applied to, or torch.logit of what it gives)"
        )
    if known := _likelihood(loss):
        return f'{name}, and likelihood="{likelihood}": pass likelihood="{known}"; {_NOT_THE_LOSS}'
    return f"{name}, which goes with no likelihood; {_NOT_THE_LOSS}"
