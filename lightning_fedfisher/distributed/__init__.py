"""Work shared by several processes (DDP): ranks, who does what, what is exchanged.

May import: nothing of this package.
"""

from lightning_fedfisher.distributed.processes import Shard, is_rank_zero

__all__ = ["Shard", "is_rank_zero"]
