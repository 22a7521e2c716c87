"""Layers are assigned to ranks by their costs."""

from lightning_fedfisher.distributed.assignment import assign_layers, oversized_layers


def test_layers_are_assigned_by_cost_each_once():
    shapes = [(10, 10), (100, 100), (20, 20), (99, 99), (5, 5)]
    assigned = assign_layers(shapes, 2)
    assert sorted(index for indices in assigned for index in indices) == [0, 1, 2, 3, 4]
    assert assigned == [[1], [4, 0, 2, 3]]
    assert assign_layers(shapes[:1], 3) == [[0], [], []]


def test_only_layers_above_an_equal_part_are_oversized():
    shapes = [(10, 10), (100, 100), (20, 20), (99, 99), (5, 5)]
    assert [oversized_layers(shapes, ranks) for ranks in (1, 2, 3)] == [{}, {1: 0}, {1: 0, 3: 1}]
    assert oversized_layers(shapes[:1], 1) == {}
    assert oversized_layers(shapes[:1], 3) == {0: 0}
