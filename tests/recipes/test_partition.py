import numpy as np
import pytest
from simulation.partition import class_histogram, leaves_one_alone, reference_partition


@pytest.mark.parametrize(
    ("per_class", "alpha", "sizes"),
    [
        (6000, 0.05, [15722, 14865, 18007, 3383, 8023]),  # FashionMNIST
        (6000, 0.1, [14962, 12151, 18845, 4849, 9193]),
        (6000, 0.2, [11342, 7179, 17385, 8292, 15802]),
        (5000, 0.1, [12467, 10127, 15703, 4042, 7661]),  # CIFAR-10
    ],
)
def test_published_client_sizes(per_class, alpha, sizes):
    labels = np.repeat(np.arange(10), per_class)
    parts = reference_partition(labels, clients=5, alpha=alpha, seed=3)
    assert [len(part) for part in parts] == sizes


@pytest.mark.parametrize("clients", [1, 5, 12])
def test_every_index_exactly_once(clients):
    labels = np.random.default_rng(0).integers(0, 7, size=1501)
    parts = reference_partition(labels, clients, alpha=1.0, seed=0)
    assert len(parts) == clients
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(1501))


@pytest.mark.parametrize(
    ("samples", "batch_size", "alone"),
    [(1, 8, False), (8, 8, False), (9, 8, True), (10, 8, False), (17, 8, True), (1, 1, False)],
)
def test_a_last_batch_of_one_is_known_if_there_are_others(samples, batch_size, alone):
    assert leaves_one_alone(samples, batch_size) is alone


def test_same_seed_same_partition_and_global_generator_untouched():
    labels = np.repeat(np.arange(4), 50)
    np.random.seed(7)
    before = np.random.get_state()[1].copy()
    first, second, other = (reference_partition(labels, 3, 1.0, seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(before, np.random.get_state()[1])
    for one, two in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, two)
    assert any(not np.array_equal(one, two) for one, two in zip(first, other, strict=True))


def test_a_client_is_shuffled():
    labels = np.repeat(np.arange(2), 500)
    (part,) = reference_partition(labels, clients=1, alpha=1.0, seed=0)
    assert 150 < class_histogram(labels, [part[:500]], 2)[0, 0] < 350


def test_a_class_without_samples_is_no_obstacle():
    parts = reference_partition(np.repeat([0, 2], 100), clients=2, alpha=10.0, seed=0)
    assert sum(map(len, parts)) == 200


def test_empty_clients_are_all_named_with_a_remedy():
    labels = np.arange(3)
    with pytest.raises(ValueError, match=r"clients \[.+, .+\] of 8 .* larger alpha, fewer clients"):
        reference_partition(labels, clients=8, alpha=0.5, seed=0)


def test_alpha_too_small_for_any_draw():
    with pytest.raises(ValueError, match="larger alpha"):
        reference_partition(np.repeat(np.arange(50), 10), clients=2, alpha=1e-4, seed=0)


@pytest.mark.parametrize(
    ("labels", "clients", "alpha", "message"),
    [
        (np.zeros((2, 2), int), 2, 1.0, "shape"),
        (np.zeros(4), 2, 1.0, "integers"),
        (np.zeros(0, int), 2, 1.0, "at least one sample"),
        (np.array([0, -1]), 2, 1.0, "negative"),
        (np.zeros(4, int), 0, 1.0, "clients"),
        (np.zeros(4, int), 2, 0.0, "alpha"),
        (np.zeros(4, int), 2, float("nan"), "alpha"),
    ],
)
def test_arguments_out_of_range(labels, clients, alpha, message):
    with pytest.raises(ValueError, match=message):
        reference_partition(labels, clients, alpha, seed=0)


def test_class_histogram():
    labels = np.array([0, 1, 1, 3, 0])
    parts = [np.array([0, 1, 2]), np.array([3, 4])]
    np.testing.assert_array_equal(
        class_histogram(labels, parts, classes=4), [[1, 2, 0, 0], [1, 0, 0, 1]]
    )
