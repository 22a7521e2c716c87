"""The algebra of one layer's curvature: each kind of Fisher information as an operator.

May import: nothing of this package.
"""
