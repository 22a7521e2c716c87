"""A federation on one HTML page, drawn from its record.

May import: results, merge, curvature, _utils. Needs the extra `report`.
"""

try:
    import jinja2  # noqa: F401
    import plotly.graph_objects  # noqa: F401
except ImportError as error:
    raise ImportError(
        "a report needs plotly and jinja2: pip install 'lightning-fedfisher[report]'"
    ) from error
