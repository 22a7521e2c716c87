"""A federation on one HTML page, drawn from its record.

May import: results, merge, curvature, _utils. Needs the extra `report`.
"""

try:
    import jinja2 as jinja2
    import plotly.graph_objects as graph_objects
except ImportError as error:
    raise ImportError(
        "a report needs plotly and jinja2: pip install 'lightning-fedfisher[report]'"
    ) from error
