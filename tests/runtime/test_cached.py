import mlx.core as mx
import pytest

from mlx_snapgen.networks.cached import bounded_cache

KIB = 256


@pytest.fixture
def calls():
    return []


@pytest.fixture
def pair(calls):
    """(x, x) of so many KiB together, with the latest 8 KiB kept."""

    @bounded_cache(8 * 1024)
    def make(kib, value):
        calls.append((kib, value))
        return (mx.full((kib * KIB // 2,), value), mx.full((kib * KIB // 2,), value))

    return make


def test_the_latest_results_are_kept(pair, calls):
    for value in (0.0, 1.0, 0.0, 2.0, 0.0, 1.0):  # 1 goes when 2 comes
        assert pair(4, value)[0][0] == value
    assert calls == [(4, 0.0), (4, 1.0), (4, 2.0), (4, 1.0)]


def test_a_small_result_takes_the_place_of_nothing_that_fits_beside_it(pair, calls):
    for kib in (4, 2, 2, 4):
        pair(kib, 0.0)
    assert calls == [(4, 0.0), (2, 0.0)]


def test_what_is_larger_than_the_bound_is_not_kept(pair, calls):
    small = pair(4, 0.0)
    pair(16, 0.0)
    pair(16, 0.0)
    assert pair(4, 0.0) is small
    assert calls == [(4, 0.0), (16, 0.0), (16, 0.0)]
