"""What this package refuses: one base class, and every reason in one message.

May import: nothing of this package.
"""

from __future__ import annotations

from collections.abc import Sequence


class FedFisherError(ValueError):
    """A model, an update or a merge is refused; the message names all that is wrong with it.

    Attributes:
        offenders: one line for each thing refused, with the reason and, where there is one, a
            remedy.

    Example:
        >>> try:
        ...     raise MergeError(["a.safetensors is damaged", "b.safetensors is empty"])
        ... except FedFisherError as error:
        ...     len(error.offenders)
        2
    """

    def __init__(self, heading: str, offenders: Sequence[str]) -> None:
        """Writes one message.

        Args:
            heading: what is refused, the first line of the message.
            offenders: one line for each reason.
        """
        self.offenders = tuple(offenders)
        super().__init__("\n".join([heading, *(f"  - {offender}" for offender in offenders)]))


class UnsupportedModelError(FedFisherError):
    """The curvature of a model would be missing or wrong for some of its parameters."""

    def __init__(self, offenders: Sequence[str]) -> None:
        """Lists every parameter or module refused.

        Args:
            offenders: one line for each, with the reason and remedy.
        """
        super().__init__("The curvature of this model cannot be extracted as asked:", offenders)


class UpdateError(FedFisherError):
    """An update cannot be used: it is corrupt, not finite, or contradicts itself."""

    def __init__(self, source: str, offenders: Sequence[str]) -> None:
        """Lists every tensor or field refused.

        Args:
            source: the file, or a word for an update in memory.
            offenders: one line for each, with the reason.
        """
        super().__init__(f"{source} is not a usable client update:", offenders)


class MergeError(FedFisherError):
    """Updates cannot be merged: some are unusable, or they do not belong together."""

    def __init__(self, offenders: Sequence[str]) -> None:
        """Lists every update refused.

        Args:
            offenders: one line for each, with the reason.
        """
        super().__init__("These updates cannot be merged:", offenders)


class BudgetError(FedFisherError):
    """An update does not fit into the bytes that it may take."""

    def __init__(self, reason: str) -> None:
        """Says what does not fit.

        Args:
            reason: how large it is and how large it may be, with the remedy.
        """
        super().__init__(reason, ())
