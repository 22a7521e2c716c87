"""Work shared by several processes (DDP): ranks, who does what, what is exchanged.

May import: nothing of this package.
"""
