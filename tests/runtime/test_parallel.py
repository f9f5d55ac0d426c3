"""Parts of a network at once on several streams of the CPU: the same numbers."""

import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_snapgen import _blas
from mlx_snapgen.checkpoint.module import matrices
from mlx_snapgen.networks import attention, elastic, layers
from mlx_snapgen.networks.efficient_dit import EfficientDiT
from mlx_snapgen.networks.parallel import (
    at_once,
    by_tokens,
    each_on_a_core,
    on_all_cores,
    part_count,
)
from mlx_snapgen.networks.products import apart, by_pictures, pictures_apart
from tests.tiny import TRANSFORMER, randomize, with_streams

CONFIG = replace(TRANSFORMER, blocks=(1, 3, 2), num_bands=3, widths=(1.0,))
pytestmark = pytest.mark.skipif(
    mx.default_device().type == mx.DeviceType.gpu, reason="one stream on a GPU"
)


@pytest.fixture(params=[2, 3])
def count(request, monkeypatch):
    with_streams(request.param, monkeypatch)
    return request.param


def arrays(*shapes):
    return [mx.random.normal(s, key=mx.random.key(i)) for i, s in enumerate(shapes)]


@pytest.fixture
def step():
    """A step with text of two lengths."""
    network = randomize(EfficientDiT(CONFIG), 0)
    x_t, text = arrays((2, 12, 20, 4), (2, 9, 32))
    mask = mx.arange(9)[None] < mx.array([[9], [4]])
    return partial(network, x_t, mx.array([0.5, 0.5]), text, mask)


@pytest.mark.parametrize("how", [{}, {"modulate_attention": True, "return_features": True}])
@pytest.mark.parametrize("bits", [0, 8])
def test_a_step_is_the_same(step, count, how, bits):
    if bits:
        chosen = set(matrices(step.func, 32))
        nn.quantize(step.func, 32, bits, class_predicate=lambda path, _: path in chosen)
    expected, found = step(**how), on_all_cores(step, tokens=60)(**how)
    for a, b in zip(*((x if how else [x]) for x in (expected, found)), strict=True):
        assert mx.allclose(a, b, rtol=1e-5, atol=1e-5) and mx.abs(a).max() > 0.1


def test_all_streams_compute(step, count, monkeypatch):
    """Products, attention in parts and in bands, and the FFN."""
    used = {}

    def spy(owner, name):
        function = getattr(owner, name)

        def call(*args, **kwargs):
            used.setdefault(name, set()).add(str(mx.default_stream(mx.cpu)))
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    for owner, name in (
        (elastic, "product"),
        (attention, "attend"),
        (layers, "exponential_weights"),
        (layers, "float32_on_cpu"),
    ):
        spy(owner, name)
    on_all_cores(step, tokens=60)()
    assert {name: len(streams) for name, streams in used.items()} == dict.fromkeys(used, count)


def test_parts_have_no_parts(count):
    assert part_count(100) == 1

    @partial(on_all_cores, tokens=60)
    def counted():
        counts = [part_count(100)]
        at_once([lambda: counts.append(part_count(100))] * 2)
        at_once([lambda: counts.append(part_count(100))])
        return mx.array(counts)

    assert counted().tolist() == [count, 1, 1, count]


@pytest.mark.parametrize("tokens", [1, 7])
def test_tokens_come_back_in_their_order(count, tokens):
    [x] = arrays((2, tokens, 3))
    run = on_all_cores(by_tokens, tokens=60)
    assert mx.array_equal(run(lambda x: 2 * x, x), 2 * x)
    same, negative = run(lambda x: (x, -x), x)
    assert mx.array_equal(same, x) and mx.array_equal(negative, -x)


@pytest.mark.parametrize("rows", [1, 2])
def test_pictures_of_a_batch_are_computed_in_groups(count, rows):
    """`rows` of the batch are of a picture."""
    x, y = arrays((rows * 5, 3, 2), (rows * 5, 4))
    groups = []

    def function(x, absent, y):
        groups.append((str(mx.default_stream(mx.cpu)), pictures_apart(), len(x), part_count(100)))
        return x * y[:, None, :1]

    @partial(on_all_cores, tokens=0, pictures=5)
    def run():
        with apart(5):
            return by_pictures(function, x, None, y)

    assert mx.array_equal(run(), x * y[:, None, :1])
    assert len({stream for stream, *_ in groups}) == len(groups) == count
    assert sum(pictures for _, pictures, *_ in groups) == 5
    assert all((size, parts) == (rows * pictures, 1) for _, pictures, size, parts in groups)


@pytest.mark.parametrize("bits", [0, 8])
def test_a_step_in_groups_is_the_same(step, count, bits):
    """With a mask of its own for each picture."""
    if bits:
        chosen = set(matrices(step.func, 32))
        nn.quantize(step.func, 32, bits, class_predicate=lambda path, _: path in chosen)

    def run():
        with apart(2):
            return step()

    found = on_all_cores(run, tokens=0, pictures=2)()
    assert mx.array_equal(found, run()) and mx.abs(found).max() > 0.1
    assert mx.allclose(found, step(), rtol=1e-5, atol=1e-5)


def test_one_picture_is_one_group(count):
    run = partial(by_pictures, lambda x: x + len(x))
    assert on_all_cores(run, tokens=0, pictures=2)(mx.zeros(2)).tolist() == [2, 2]


def test_independent_calls_keep_their_order(count):
    used = []

    def call(k):
        used.append(str(mx.default_stream(mx.cpu)))
        return mx.array([k])

    results = each_on_a_core([partial(call, k) for k in range(count)])
    assert [x.item() for x in results] == list(range(count))
    assert len(set(used)) == len(used) == count


def test_blas_has_one_thread_inside_only(count):
    if _blas._library is None:
        pytest.skip("needs OpenBLAS")
    before, inside = _blas.blas_threads(), []

    @partial(on_all_cores, tokens=60)
    def fail():
        inside.append((_blas._library.openblas_get_num_threads(), _blas.blas_threads()))
        raise ValueError

    for _ in range(2):
        with _blas.one_blas_thread(), pytest.raises(ValueError):
            fail()
    assert inside == [(1, before)] * 2
    assert _blas._library.openblas_get_num_threads() == before


@pytest.mark.parametrize("kind", [None, 0, 1, 2])
def test_threads_are_those_of_a_library_that_sets_them_for_all(kind, monkeypatch):
    """Not those of OpenMP (2), which each thread sets for itself."""
    library = SimpleNamespace(
        openblas_get_num_threads=lambda: 4,
        openblas_get_config=lambda: b"OpenBLAS 0.3.21 NO_LAPACKE DYNAMIC_ARCH",
    )
    if kind is not None:
        library.openblas_get_parallel = lambda: kind
    monkeypatch.setattr(_blas, "_library", None)
    monkeypatch.setattr(_blas, "_loaded", None)
    monkeypatch.setattr(_blas, "_threads", 1)
    monkeypatch.setattr(_blas.ctypes, "CDLL", lambda *_, **__: library)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    monkeypatch.delenv("SNAPGEN_OPENBLAS", raising=False)
    monkeypatch.delitem(sys.modules, "mlx.core")
    assert _blas.load_openblas() == _blas._NAMES[0]
    assert _blas.blas_threads() == (4 if kind == 1 else 1)
    assert _blas.blas_version() == "0.3.21"


def test_without_several_threads_nothing_is_evaluated(monkeypatch):
    with_streams(1, monkeypatch)
    monkeypatch.setattr(mx, "eval", None)
    assert on_all_cores(lambda: at_once([lambda: part_count(100)] * 2), tokens=60)() == [1, 1]


def test_few_tokens_are_one_part(count):
    for tokens, parts in ((0, 1), (1, count)):
        counted = on_all_cores(lambda: mx.array(part_count(100)), tokens=tokens)
        assert counted().item() == parts
