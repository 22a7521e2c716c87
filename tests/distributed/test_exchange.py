"""Items that ranks make by turns reach the one that owns them."""

import pytest
import torch

from lightning_fedfisher.curvature.diagonal import Diagonal
from lightning_fedfisher.distributed.exchange import Item, gather_at_owner


@pytest.mark.parametrize(("ranks", "owner"), [(1, 0), (2, 0), (2, 1), (3, 1), (7, 6)])
def test_ranks_take_turns_and_the_owner_gets_all_in_order(ranks, owner, monkeypatch):
    sent, made, received = {}, [], []
    curvatures = [Diagonal(torch.full((2, 3), float(client))) for client in range(5)]
    everyone = [rank for rank in range(ranks) if rank != owner] + [owner]
    for rank in everyone:

        def send(objects, destination, rank=rank):
            assert destination == owner
            sent.setdefault(rank, []).extend(objects)

        def receive(objects, source):
            objects[:] = [sent[source].pop(0)]

        def make_item(client, rank=rank):
            made.append((client, rank))
            return Item(client, curvatures[client].tensors())

        monkeypatch.setattr("torch.distributed.get_rank", lambda rank=rank: rank)
        monkeypatch.setattr("torch.distributed.get_world_size", lambda: ranks)
        monkeypatch.setattr("torch.distributed.send_object_list", send)
        monkeypatch.setattr("torch.distributed.recv_object_list", receive)
        received = list(gather_at_owner(5, owner, make_item, torch.device("cpu")))
        assert rank == owner or not received
    assert sorted(client for client, _ in made) == [0, 1, 2, 3, 4]
    assert len({rank for _, rank in made}) == min(ranks, 5)
    assert not any(sent.values())
    for ours, theirs in zip(received, curvatures, strict=True):
        assert torch.equal(ours.tensors["values"], theirs.values)
    assert [item.label for item in received] == [0, 1, 2, 3, 4]
