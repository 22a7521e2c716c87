from lightning_utilities.core.rank_zero import rank_zero_only

from lightning_fedfisher.distributed.progress import progress_bar


def test_all_items_come_in_their_order_and_nothing_is_drawn_at_once(capsys, monkeypatch):
    for rank in (0, 1):
        monkeypatch.setattr(rank_zero_only, "rank", rank, raising=False)
        assert list(progress_bar(range(3), "work")) == [0, 1, 2]
        assert list(progress_bar(iter("ab"), "work", total=2)) == ["a", "b"]
    told = capsys.readouterr()
    assert told.out == told.err == ""
