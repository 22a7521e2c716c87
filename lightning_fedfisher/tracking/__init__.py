"""What is told to W&B and other loggers.

May import: results, update, curvature, merge, _utils.
"""
