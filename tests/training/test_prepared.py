"""Prepared sets of any size: start, memory and order of a hundred million samples."""

import json
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest

from mlx_snapgen.errors import UserError
from mlx_snapgen.json_values import to_dict
from tests.layout.graph import ROOT
from tests.tiny import AUTOENCODER
from train.data.prepared import Prepared
from train.data.shards import Shard, shard_path, write_shard
from train.preparation.encoders import CaptionEncoder, make_samples
from train.preparation.report import count_shards

SAMPLES, SHARDS, BUCKETS, BATCH = 10**8, 48_829, 17, 256


def write_index(folder, samples=SAMPLES, shards=SHARDS, buckets=BUCKETS):
    """The index of a set at 256 px whose shards do not exist."""
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.ones(buckets))
    counts = rng.multinomial(samples // shards, shares, shards)
    counts[0, 0] += samples - counts.sum()
    held = rng.multinomial(samples // shards // 100, shares, shards)
    index = {
        "format_version": 1,
        "resolution": 256,
        "autoencoders": {"model": {"config": to_dict(AUTOENCODER), "digest": "0" * 32}},
        "captions": ["text"],
        "text_states": {},
        "buckets": [[128 + 16 * i, 512 - 16 * i] for i in range(buckets)],
        "shards": [
            {"file": f"shards/{i:06d}.safetensors", "counts": row, "validation": other}
            for i, (row, other) in enumerate(zip(counts.tolist(), held.tolist(), strict=True))
        ],
    }
    folder.mkdir(exist_ok=True)
    (folder / "index.json").write_text(json.dumps(index))
    return folder


MEASURE = """
import json, os, sys, time
from tests.tiny import memory
from train.data.prepared import Prepared

before, started = memory(os.getpid()), time.perf_counter()
data = Prepared(sys.argv[1], seed=7)
order = data.order(256)
first = order(int(sys.argv[2]))
seconds = time.perf_counter() - started
started = time.perf_counter()
batches = [first, *(order(int(sys.argv[2]) + i) for i in range(1, 20))]
each = (time.perf_counter() - started) / 19
print(json.dumps({
    "samples": data.num_samples,
    "seconds": seconds,
    "seconds_of_a_batch": each,
    "megabytes": memory(os.getpid()) - before,
    "batches": [[bucket, rows.tolist()] for bucket, rows in batches],
}))
"""


def measured(folder, number):
    """What another process finds: time, memory and 20 batches from batch `number`."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder), str(number)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_text_states_are_stored_in_the_16_bits_of_their_encoder(dtype, tmp_path):
    states = (10 * mx.random.normal((1, 5, 8), key=mx.random.key(0))).astype(dtype)
    mask = mx.array([[True, True, True, False, False]])
    encode = CaptionEncoder("text_encoder_0", 8, lambda _: (states, mask), lambda: (states, mask))
    (sample,) = make_samples(
        ["a"],
        [{"text": "x"}],
        latents=np.ones((1, 4, 4, 2), np.float16),
        others={},
        size=(32, 32),
        texts={"text_encoder_0": encode},
    )
    write_shard(tmp_path / "shard", [sample], held_out=0)
    with Shard(tmp_path / "shard") as shard:
        found = shard.row("train/32x32/states/text_encoder_0/text", 0)
    expected = np.array(states[0, :3].astype(mx.float32))
    if dtype == mx.bfloat16:
        assert np.array_equal(found, expected)
    else:
        assert np.array_equal(found, expected.astype(np.float16))


def test_values_beyond_16_bits_are_refused():
    large = mx.full((1, 2, 2), 1e5)
    mask = mx.array([[True, False]])
    encode = CaptionEncoder("teacher", 2, lambda _: (large, mask), lambda: (large, mask))
    with pytest.raises(UserError, match="the states of teacher are not finite in 16 bits"):
        encode(["x"])
    encode = CaptionEncoder(
        "teacher", 2, lambda _: (large.astype(mx.bfloat16), mask), lambda: (large, mask)
    )
    assert encode(["x"])[0].shape == (1, 2)


@pytest.mark.skipif(sys.platform != "linux", reason="measures memory on Linux only")
def test_a_hundred_million_samples_start_at_once_and_resume_in_the_same_order(tmp_path):
    folder = write_index(tmp_path / "set")
    begun, resumed = measured(folder, 123_450), measured(folder, 123_460)
    assert begun["samples"] == SAMPLES
    assert resumed["batches"][:10] == begun["batches"][10:]
    assert begun["seconds"] < 5 and begun["megabytes"] < 200
    assert all(len(set(rows)) == BATCH for _, rows in begun["batches"])
    counts = Prepared(folder).counts
    assert all(max(rows) < counts[bucket] for bucket, rows in begun["batches"])


def test_an_epoch_has_every_sample_about_once(tmp_path):
    data = Prepared(write_index(tmp_path / "set", samples=10_000, shards=10, buckets=3), seed=1)
    order = data.order(16)
    seen = [set() for _ in data.counts]
    for number in range(order.epoch):
        bucket, rows = order(number)
        assert not seen[bucket] & set(rows.tolist())
        seen[bucket] |= set(rows.tolist())
    assert sum(map(len, seen)) > 10_000 - 3 * 16


@pytest.mark.parametrize("metadata", [["settings"], None, {"settings": 3}])
def test_metadata_of_a_shard_that_is_no_text_is_damage(tmp_path, metadata):
    path = tmp_path / "000000.safetensors"
    header = json.dumps({"__metadata__": metadata}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(UserError, match="is damaged: delete it"):
        Shard(path)


@pytest.mark.parametrize("damaged", [b'"rea\xffon"', b'"reason\n', b'"\n{}\n[]"'])
def test_damaged_counts_are_told(tmp_path, damaged):
    path = shard_path(tmp_path, 0)
    skipped = [{"key": "a", "reason": "no caption", "detail": ""}]
    write_shard(path, [], held_out=0, skipped=skipped)
    assert count_shards(tmp_path, chunks=1, buckets=[]).skipped == {"no caption": 1}
    path.write_bytes(path.read_bytes().replace(b'"reason"', damaged))
    with pytest.raises(UserError, match="is damaged: delete it"):
        count_shards(tmp_path, chunks=1, buckets=[])


if __name__ == "__main__":
    from pathlib import Path

    found = measured(write_index(Path(sys.argv[1])), 123_450)
    found.pop("batches")
    print(found)
