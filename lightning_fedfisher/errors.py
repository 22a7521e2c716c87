"""What this package refuses: one base class, and every reason in one message.

May import: nothing of this package.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from typing_extensions import override

# Of a stranger's file: lines, and characters of each. Two names of the longest kind fit.
_MOST_TOLD, _LONGEST_LINE = 20, 2500


class FedFisherError(ValueError):
    """A model, an update or a merge is refused; the message names all that is wrong with it.

    Attributes:
        offenders: One line for each thing that is refused, with the reason and, where there is one,
            a remedy.

    Example:
        >>> try:
        ...     raise MergeError(["a.safetensors is damaged", "b.safetensors is empty"])
        ... except FedFisherError as error:
        ...     len(error.offenders)
        2
    """

    def __init__(self, heading: str, offenders: Sequence[str]) -> None:
        """Writes one message of all reasons.

        Args:
            heading: First line of the message, which says what is refused.
            offenders: One line for each reason.
        """
        self.offenders = tuple(offenders)
        super().__init__("\n".join([heading, *(f"  - {offender}" for offender in offenders)]))

    @override
    def __reduce__(self) -> tuple[Any, ...]:
        # Pickled as it is, for process pools: subclasses are made from other arguments.
        return Exception.__new__, (type(self), *self.args), vars(self)


class UnsupportedModelError(FedFisherError):
    """The curvature of a model would be missing or wrong for some of its parameters.

    Example:
        >>> print(UnsupportedModelError(["rnn.weight_hh_l0: freeze it"]))
        The curvature of this model cannot be extracted as asked:
          - rnn.weight_hh_l0: freeze it
    """

    def __init__(self, offenders: Sequence[str]) -> None:
        """Lists every parameter or module refused.

        Args:
            offenders: One line for each, with the reason and remedy.
        """
        super().__init__("The curvature of this model cannot be extracted as asked:", offenders)


class UpdateError(FedFisherError):
    """An update cannot be used: it is corrupt, not finite, or contradicts itself.

    Attributes:
        source: The file, or a phrase for an update in memory.
        offenders: One line for each tensor or field that is refused, with the reason. Of the many
            of a hostile file the first 20, and a line with the number of the others.

    Example:
        >>> error = UpdateError("client.safetensors", ["parameters/weight is missing"])
        >>> error.source, error.offenders
        ('client.safetensors', ('parameters/weight is missing',))
    """

    def __init__(self, source: str, offenders: Sequence[str]) -> None:
        """Lists every tensor or field refused.

        Args:
            source: The file, or a phrase for an update in memory.
            offenders: One line for each, with the reason.
        """
        self.source = source
        told = [_cut(offender) for offender in offenders[:_MOST_TOLD]]
        if len(offenders) > _MOST_TOLD:
            told.append(f"and {len(offenders) - _MOST_TOLD} more")
        super().__init__(f"{source} is not a usable client update:", told)


class MergeError(FedFisherError):
    """Updates cannot be merged: some are unusable, or they do not belong together.

    Example:
        >>> print(MergeError(["a.safetensors is damaged", "b.safetensors is empty"]))
        These updates cannot be merged:
          - a.safetensors is damaged
          - b.safetensors is empty
    """

    def __init__(self, offenders: Sequence[str]) -> None:
        """Lists every update refused.

        Args:
            offenders: One line for each, with the reason.
        """
        super().__init__("These updates cannot be merged:", offenders)


class BudgetError(FedFisherError):
    """An update does not fit into the bytes that it may take.

    Example:
        >>> str(BudgetError("at least 9 bytes are needed, there is room for 5: raise the budget"))
        'at least 9 bytes are needed, there is room for 5: raise the budget'
    """

    def __init__(self, reason: str) -> None:
        """Says what does not fit.

        Args:
            reason: How large it is and how large it may be, with the remedy.
        """
        super().__init__(reason, ())


def _cut(line: str) -> str:
    """Cuts off a line that a stranger's text makes too long."""
    return line if len(line) <= _LONGEST_LINE else f"{line[:_LONGEST_LINE]}..."
