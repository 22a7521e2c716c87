"""A merge from sums over clients, so that nobody sees a single update.

May import: merge, update, curvature, errors.
"""
