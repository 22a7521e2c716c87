"""The `fedfisher` command.

May import: anything.
"""
