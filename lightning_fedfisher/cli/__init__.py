"""The ``fedfisher`` command line: inspect, verify and merge updates, and show what came of it.

May import: everything. A module imports what it needs when its command runs, so that the others
start fast.
"""
