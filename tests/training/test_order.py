"""The order of samples: complete, reproducible, and without memory."""

import numpy as np
import pytest

from train.data.order import BatchOrder, MixtureOrder, Shuffle


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64, 1000, 4097])
def test_shuffle_is_a_permutation(count):
    shuffled = Shuffle(count, (1, 2))(np.arange(count))
    assert sorted(shuffled) == list(range(count))


def test_shuffle_depends_on_the_seed_and_looks_random():
    first, second = (Shuffle(10_000, (0, k))(np.arange(10_000)) for k in range(2))
    assert (first == second).mean() < 0.01
    assert (np.diff(first) == 1).mean() < 0.01  # neighbors are separated
    assert abs(np.corrcoef(first, np.arange(10_000))[0, 1]) < 0.05


def test_shuffle_of_huge_sets_computes_single_indices():
    shuffle = Shuffle(10**15, (3,))
    assert len(set(shuffle(np.arange(1000)).tolist())) == 1000
    assert shuffle(999) == shuffle(np.array([5, 999]))[1]


def test_an_epoch_has_each_sample_once():
    order = BatchOrder([40, 20], batch_size=4, seed=5)
    assert order.epoch == 15
    met = [(bucket, int(row)) for k in range(15) for bucket, rows in [order(k)] for row in rows]
    assert sorted(met) == [(0, k) for k in range(40)] + [(1, k) for k in range(20)]
    assert [order(k)[0] for k in range(15)] != sorted(order(k)[0] for k in range(15))
    assert any((order(k)[1] != order(k + 15)[1]).any() for k in range(15))
    assert not any((np.diff(order(k)[1]) == 1).all() for k in range(15)), "batches are mixed"


def test_buckets_smaller_than_a_batch_keep_their_share():
    order = BatchOrder([3, 9, 0], batch_size=6, seed=0)
    met = [order(k) for k in range(4 * order.epoch)]
    assert np.mean([bucket == 1 for bucket, _ in met]) == 0.75
    small = next(rows for bucket, rows in met if bucket == 0)
    assert np.bincount(small).tolist() == [2, 2, 2]


def test_mixture_has_exact_shares_and_no_gaps():
    order = MixtureOrder([0.7, 0.2, 0.1], seed=1)
    met = [order(k) for k in range(1000)]
    for source, share in enumerate((700, 200, 100)):
        assert [n for s, n in met if s == source] == list(range(share))
    assert len({tuple(s for s, _ in met[k : k + 100]) for k in range(0, 1000, 100)}) == 10


@pytest.mark.parametrize("weights", [[12, 10**6], [1 / 3, 1 / 3, 1 / 3], [0.005, 0.99, 0.005], [1]])
def test_mixture_is_exact_for_any_weights(weights):
    order = MixtureOrder(weights, seed=1)
    numbers = range(0, 10**7, 99_991)  # far apart: nothing is counted up
    for number in numbers:
        source, place = order(number)
        share = weights[source] / sum(weights)
        assert abs(place - number * share) <= 100
    met = [order(k) for k in range(2000)]
    for source in range(len(weights)):
        places = [place for s, place in met if s == source]
        assert places == list(range(len(places)))
        assert abs(len(places) - 2000 * weights[source] / sum(weights)) < 2


def test_a_small_set_beside_a_large_one_is_rare():
    order = MixtureOrder([12, 10**6], seed=0)
    assert all(order(k)[0] == 1 for k in range(1000))
    first = next(k for k in range(0, 200_000, 100) if order(k)[1] < k)
    assert 40_000 < first < 50_000, "after half of 83,334 batches"
