"""The charts of the page, as plotly figures.

May import: results, report.wording, _utils.
"""
