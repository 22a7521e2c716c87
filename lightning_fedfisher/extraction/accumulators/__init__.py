"""Sums over samples: the second moments that a layer's curvature is made of.

May import: layer_types, tracing, curvature, layers.
"""
