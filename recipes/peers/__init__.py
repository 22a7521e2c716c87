"""Merge methods of others, to compare with.

They read the same updates as ours, and nothing here is part of the package.
"""
