"""Records of what a merge did: what reports, dashboards and model cards read.

May import: merge, update, curvature, _utils.
"""
