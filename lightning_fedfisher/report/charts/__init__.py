"""The charts of the page, as plotly figures.

May import: wording, results, curvature, _utils.
"""
