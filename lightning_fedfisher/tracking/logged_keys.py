"""Every name under which a client, a server or a simulation logs something.

The loggers, the dashboards' panels and the tests spell no name themselves. A key is a name, or
several joined by slashes: ``residual``, ``residual/LAYER``, ``fedfisher/trace/LAYER``. This module
imports nothing but the standard library.
"""

from __future__ import annotations

# Lightning's own
GLOBAL_STEP = "trainer/global_step"
EPOCH = "epoch"

# A client's, below the prefix of its callback
CLIENT_PREFIX = "fedfisher"
"""What the keys of a client start with; further callbacks beside the first add their own name."""
EXTRACTED_SAMPLES = "extracted_samples"
EXTRACTION_SECONDS = "extraction_seconds"
CURVATURE_SAMPLES = "curvature_samples"
UPLOAD_BYTES = "upload_bytes"
TRACE = "trace"  # by layer
EFFECTIVE_RANK = "effective_rank"  # by layer
CURVATURE = "curvature"  # a table
SPECTRUM = "spectrum"  # a chart
UPDATE = "update"  # the file's name, in the summary
DIGEST = "digest"  # the file's, in the summary

# The server's
ITERATIONS = "iterations"  # of all layers, and by layer
OBJECTIVE = "objective"
RESIDUAL = "residual"  # of all layers, and by layer
VAL_ACCURACY = "val_accuracy"
VAL_NLL = "val_nll"
DISTANCE = "distance"  # by client
INFLUENCE = "influence"  # by client
CLIENTS = "clients"  # a table
MERGED_MODEL = "merged_model"  # the file's name, in the summary

# A whole federation's, in the server's run
COMPARISON = "comparison"  # a table
PARTITION = "partition"  # a table
ACCURACY = "accuracy"  # a chart
CONFUSION_BEFORE = "confusion/before"  # a chart
CONFUSION_AFTER = "confusion/after"  # a chart

# A simulation's, which knows the clients' data and tests every model
DATA_CLASSES = "data/classes"  # a chart
TEST_ACCURACY = "test/accuracy"
TEST_NLL = "test/nll"
TEST_CALIBRATION_ERROR = "test/calibration_error"
SERVER_SECONDS = "server_seconds"


def join(*names: str) -> str:
    """Joins names into one key.

    Args:
        *names: A prefix, one of this module's names, the name of a layer or client.

    Returns:
        The names with slashes between them.

    Example:
        >>> join(CLIENT_PREFIX, TRACE, "network.0")
        'fedfisher/trace/network.0'
    """
    return "/".join(names)


# Patterns of keys for W&B's panels, in the syntax that Go and JavaScript share.

LOSS_PATTERN = "^(?:(?:train|training|val|valid|validation)[_/])?loss(?:_epoch)?$"
"""What training modules usually call their loss, by epoch."""


def exactly(name: str) -> str:
    """Makes the pattern that matches one key alone.

    Args:
        name: The key.

    Returns:
        A regular expression.

    Example:
        >>> exactly(RESIDUAL)
        '^residual$'
    """
    return f"^{name}$"


def of_each(name: str) -> str:
    """Makes the pattern that matches a server's key of every layer or every client.

    Args:
        name: What the keys start with.

    Returns:
        A regular expression.

    Example:
        >>> of_each(RESIDUAL)
        '^residual/.+$'
    """
    return f"^{name}/.+$"


def of_each_layer_of_clients(name: str) -> str:
    """Makes the pattern that matches a client's key of every layer, whichever callback logged it.

    Args:
        name: What the keys start with, below the callback's prefix.

    Returns:
        A regular expression.

    Example:
        >>> of_each_layer_of_clients(TRACE)
        '^fedfisher/(?:[^/]+/)?trace/.+$'
    """
    return f"^{CLIENT_PREFIX}/(?:[^/]+/)?{name}/.+$"
