"""What clients are called: by the part of their files' paths that tells them apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path


def client_names(sources: Sequence[str]) -> list[str]:
    """Names clients by their updates' files.

    Args:
        sources: paths, one for each client.

    Returns:
        The paths without the folders, file name or suffix that all have in common; numbers for
        sources that are not told apart, as updates in memory are not.
    """
    counts = Counter(sources)
    if len(counts) < len(sources):
        return [s if counts[s] == 1 else f"client-{index}" for index, s in enumerate(sources)]
    paths = [Path(source) for source in sources]
    if len({path.suffix for path in paths}) == 1:
        paths = [path.with_suffix("") for path in paths]
    parts = [list(path.parts) for path in paths]
    for end in (0, -1):
        while all(len(own) > 1 and own[end] == parts[0][end] for own in parts):
            for own in parts:
                del own[end]
    return ["/".join(own) for own in parts]
