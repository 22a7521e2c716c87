"""What the recipes share: a simulated federation, its studies and their tables.

Imports nothing of the scripts beside it.
"""
