"""What clients are called: by the part of their files' paths that tells them apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def client_names(sources: Sequence[str]) -> list[str]:
    """Names clients by their updates' files.

    Args:
        sources: paths, one for each client.

    Returns:
        The paths without the folders, file name or suffix that all have in common; numbers where
        that does not tell all of them apart, as with updates in memory.
    """
    if len(set(sources)) < len(sources):
        return [f"client-{index}" for index in range(len(sources))]
    paths = [Path(source) for source in sources]
    if len({path.suffix for path in paths}) == 1:
        paths = [path.with_suffix("") for path in paths]
    parts = [list(path.parts) for path in paths]
    for end in (0, -1):
        while all(len(own) > 1 and own[end] == parts[0][end] for own in parts):
            for own in parts:
                del own[end]
    return ["/".join(own) for own in parts]
