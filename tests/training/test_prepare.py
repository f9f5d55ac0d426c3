"""`train.prepare`: encoded pictures on disk, the same bytes however often it was killed."""

import dataclasses
import errno
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from convert.sample_teacher import sample
from mlx_snapgen.checkpoint.model import load_pretrained, save_pretrained
from mlx_snapgen.draw import draw_latents
from mlx_snapgen.errors import UserError
from mlx_snapgen.files import lock_folder
from mlx_snapgen.formats import CONFIG
from mlx_snapgen.json_values import to_dict
from mlx_snapgen.networks.autoencoders.registry import make_autoencoder
from mlx_snapgen.networks.efficient_dit import encode_prompts
from mlx_snapgen.picture_files import decode
from mlx_snapgen.pictures import from_uint8, to_uint8
from mlx_snapgen.presets import PIXELS
from mlx_snapgen.public_config import MiniT2ITransformerConfig
from mlx_snapgen.settings import DrawSettings
from mlx_snapgen.teachers.config import MINIT2I, TeacherConfig
from mlx_snapgen.teachers.folder import load_flow_teacher
from tests import tiny
from tests.training.test_new import write_autoencoder
from train import prepare
from train.data.imagefolder import bucket_sizes, fit, nearest_bucket
from train.data.mixture import Mixture
from train.data.open import is_prepared
from train.data.prepared import Prepared
from train.data.shards import Sample, Shard, shard_path
from train.data.source import Record, Skipped
from train.options.prepare import parse
from train.preparation.drawn import DrawnSet
from train.preparation.encoders import Chunk, Picture
from train.preparation.pictures import PictureSet

SIZE = 64
EXIF_ORIENTATION = 0x0112


def write_pictures(folder, count, *, seed=0):
    """Noise of many shapes with captions, `folder`/000.png and so on."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        height, width = rng.integers(48, 144, 2)
        pixels = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels).resize((int(width), int(height)))
        picture.save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text(f"picture number {i}")
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures") / "set", 40)


def arguments(pictures, output, model, *more):
    given = [pictures, "--output", output, "--model", model, "--resolution", SIZE, *more]
    return [str(argument) for argument in given]


def run(monkeypatch, *given):
    monkeypatch.setattr(sys, "argv", ["train.prepare", *map(str, given)])
    prepare.main()


def contents(folder):
    """The files that must not depend on interruptions."""
    names = ["index.json", "skipped.jsonl", "settings.json"]
    paths = [folder / name for name in names] + sorted(folder.glob("shards/*"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.fixture
def small_shards(monkeypatch):
    """Shards of 6 records."""
    monkeypatch.setattr("train.prepare.MOST_IN_SHARD", 6)


@pytest.fixture(scope="session")
def prepared(pictures, model_folder, tmp_path_factory):
    """`pictures` in shards of 6, done without interruption."""
    folder = tmp_path_factory.mktemp("prepared") / "set"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.prepare.MOST_IN_SHARD", 6)
        run(patch, *arguments(pictures, folder, model_folder))
    return folder


def test_reading_back_equals_encoding(prepared, pictures, components):
    data = Prepared(prepared)
    buckets = bucket_sizes((SIZE, SIZE), 32)
    assert data.sizes == buckets and data.num_samples == 40
    seen = 0
    for samples in data.batches(3):
        for latents, caption in zip(samples.latents, samples.captions, strict=True):
            picture, _ = decode((pictures / f"{int(caption.split()[-1]):03d}.png").read_bytes())
            pixels = from_uint8(fit(picture, nearest_bucket(picture, buckets))[None])
            expected = components.autoencoder.encode(pixels)[0]
            assert latents.dtype == mx.float32
            assert mx.allclose(latents, expected, rtol=1e-3, atol=2e-3)
            seen += 1
    assert seen == 40


def test_batches_are_of_one_size_and_depend_on_number_and_seed(prepared):
    data = Prepared(prepared, seed=1)
    batches = [data.samples(number, 4) for number in range(12)]
    again, other = Prepared(prepared, seed=1), Prepared(prepared, seed=2)
    assert [again.read(number, 4).captions for number in range(11, -1, -1)] == [
        batch.captions for batch in batches[::-1]
    ]
    assert [other.read(number, 4).captions for number in range(12)] != [
        batch.captions for batch in batches
    ]
    assert len({batch.latents.shape for batch in batches}) > 1
    captions = [caption for number in range(10) for caption in data.prompts(number, 4)]
    assert len(set(captions)) == 40


def test_a_few_samples_are_of_all_sizes_for_every_seed(prepared):
    def chosen(most, *, seed, size=4):
        batches = list(Prepared(prepared, seed=seed).batches(size, most=most))
        assert all(len(batch.captions) <= size for batch in batches)
        shapes = {batch.latents.shape[1:3] for batch in batches}
        return {c for batch in batches for c in batch.captions}, shapes

    captions, shapes = chosen(20, seed=0)
    assert len(captions) == 20
    assert chosen(20, seed=1, size=3) == (captions, shapes)
    assert chosen(8, seed=2)[0] < captions and len(chosen(99, seed=0)[0]) == 40
    data = Prepared(prepared)
    frequent = [size for size, n in zip(data.sizes, data.counts, strict=True) if n >= 5]
    assert len(frequent) > 1 and {(h // 8, w // 8) for h, w in frequent} <= shapes


def test_captions_of_batches_are_read_without_latents(prepared, monkeypatch):
    data = Prepared(prepared, seed=1)
    expected = [data.read(number, 4) for number in range(8)]
    rows = Shard.rows

    def checked(self, name, *args):
        assert "latents" not in name
        return rows(self, name, *args)

    monkeypatch.setattr(Shard, "rows", checked)
    for source in (data, Mixture([data], [1], seed=0)):
        found = [source.prompt_batch(number, 4) for number in range(8)]
        assert [batch.prompts for batch in found] == [samples.captions for samples in expected]
        assert [tuple(side // 8 for side in batch.size) for batch in found] == [
            samples.latents.shape[1:3] for samples in expected
        ]


def test_settings_tell_sets_apart(prepared, model_folder, small_shards, monkeypatch, tmp_path):
    write_pictures(tmp_path / "others", 40, seed=0)
    (tmp_path / "others" / "001.txt").write_text("another caption")
    run(monkeypatch, *arguments(tmp_path / "others", tmp_path / "set", model_folder))
    one, other = Prepared(prepared), Prepared(tmp_path / "set")
    assert one.counts == other.counts and one.settings()["data"] == "prepared"
    assert one.settings() == Prepared(prepared).settings()
    assert one.settings()["index"] != other.settings()["index"]


def test_threads_read_the_same_with_few_open_files(prepared, monkeypatch):
    monkeypatch.setattr("train.data.prepared.OPEN_SHARDS", 1)
    before = len(os.listdir("/dev/fd"))
    data, expected = Prepared(prepared, seed=1), Prepared(prepared, seed=1)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda number: data.read(number, 4), range(40)))
    for number, samples in enumerate(found):
        again = expected.read(number, 4)
        assert samples.captions == again.captions
        assert np.array_equal(samples.latents, again.latents)
    assert len(os.listdir("/dev/fd")) <= before + 2


def test_report_and_pictures_of_the_set(prepared):
    report = json.loads((prepared / "report.json").read_text())
    assert report["read"] == report["kept"] == report["training"] == 40
    assert report["skipped"] == {} and sum(report["buckets"].values()) == 40
    assert report["bytes"] == sum(path.stat().st_size for path in prepared.glob("shards/*"))
    assert report["seconds"] > 0
    plots = ["sizes.png"] * bool(find_spec("matplotlib"))
    for name in ("sheet.png", *plots):
        assert Image.open(prepared / name).width > 100
    assert len(list(prepared.glob("shards/*"))) == 7


# --- interruptions ------------------------------------------------------------------------------

KILLS = 20


def _command(given, shard):
    """The command in another process."""
    sys.argv = ["train.prepare", *given]
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    prepare.MOST_IN_SHARD = shard
    prepare.main()


@pytest.fixture(scope="session")
def processes():
    """Starts processes that have imported everything, but not used MLX yet."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train.prepare"])
    return context


def test_killed_at_random_moments_it_resumes_with_the_same_bytes(
    pictures, model_folder, prepared, processes, tmp_path
):
    rng, stages = random.Random(0), []
    for attempt in itertools.count():
        if len(stages) >= KILLS:
            break
        output = tmp_path / str(attempt)
        given = arguments(pictures, output, model_folder)
        for shards in sorted(rng.choices(range(8), k=4)):
            if (output / "index.json").exists():
                break  # killed when all was written
            process = processes.Process(target=_command, args=(given, 6))
            process.start()
            while process.exitcode is None and len(list(output.glob("shards/*"))) < shards:
                time.sleep(0.001)
            process.join(rng.uniform(0, 0.02 if 0 < shards < 7 else 0.3))
            if process.exitcode is not None:
                break
            process.kill()
            process.join()
            stages.append(len(list(output.glob("shards/*"))))
        if not (output / "index.json").exists():
            process = processes.Process(target=_command, args=(given, 6))
            process.start()
            process.join()
            assert process.exitcode == 0
        assert contents(output) == contents(prepared)
        assert not list(output.rglob(".*"))
    assert any(0 < shards < 7 for shards in stages), "none was killed between two shards"


def _dies_in_a_write(given, shard, call):
    """The command; the process is killed at this call of a function that writes a shard."""
    calls, original = itertools.count(1), np.ascontiguousarray

    def ascontiguousarray(array):
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(array)

    np.ascontiguousarray = ascontiguousarray
    _command(given, shard)


def test_killed_while_it_writes_a_shard_it_resumes_with_the_same_bytes(
    pictures, model_folder, prepared, processes, tmp_path
):
    given = arguments(pictures, tmp_path / "set", model_folder)
    for call in (1, 25, 90):
        process = processes.Process(target=_dies_in_a_write, args=(given, 6, call))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    process = processes.Process(target=_command, args=(given, 6))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert contents(tmp_path / "set") == contents(prepared)


def test_two_commands_do_not_prepare_one_set(
    pictures, model_folder, prepared, small_shards, processes, monkeypatch, tmp_path
):
    """Two with parts of it do."""
    given = arguments(pictures, tmp_path / "set", model_folder)
    run(monkeypatch, *given, "--shard", "1/2")
    for shared in (False, True):
        ready, done = processes.Event(), processes.Event()
        other = processes.Process(target=_locks, args=(tmp_path / "set", shared, ready, done))
        other.start()
        assert ready.wait(60)
        try:
            if shared:
                run(monkeypatch, *given, "--shard", "2/2")
            else:
                with pytest.raises(UserError, match=r"another process prepares .*: wait for it"):
                    run(monkeypatch, *given)
        finally:
            done.set()
            other.join()
    assert contents(tmp_path / "set") == contents(prepared)


def _locks(folder, shared, ready, done):
    assert lock_folder(folder, shared=shared)
    ready.set()
    done.wait()


def test_parts_of_several_machines_equal_one_set(
    pictures, model_folder, prepared, small_shards, monkeypatch, tmp_path, capsys
):
    given = arguments(pictures, tmp_path / "set", model_folder)
    for part in (2, 3, 1):
        assert not (tmp_path / "set" / "index.json").exists()
        run(monkeypatch, *given, "--shard", f"{part}/3")
    assert "part 2 of 3 is done; 5 of 7 shards" in capsys.readouterr().out
    assert contents(tmp_path / "set") == contents(prepared)


def test_a_set_of_fewer_shards_than_parts(pictures, model_folder, monkeypatch, tmp_path, capsys):
    given = arguments(pictures, tmp_path / "set", model_folder)
    run(monkeypatch, *given, "--shard", "3/3")
    said = capsys.readouterr().out
    assert "(0 in part 3 of 3)" in said and "1 of 1 shards are still to come" in said
    run(monkeypatch, *given, "--shard", "1/3")
    assert "set is complete" in capsys.readouterr().out
    run(monkeypatch, *given, "--shard", "2/3")
    assert "nothing is left for part 2 of 3" in capsys.readouterr().out


def test_parts_in_separate_folders_are_joined_by_copying(
    pictures, model_folder, prepared, small_shards, monkeypatch, tmp_path
):
    copied = tmp_path / "of another machine"
    shutil.copytree(pictures, copied)
    for path in copied.iterdir():
        os.utime(path, (1, 1))
    for part, source in ((1, pictures), (2, copied)):
        output = tmp_path / str(part)
        run(monkeypatch, *arguments(source, output, model_folder), "--shard", f"{part}/2")
        assert not (output / "index.json").exists()
    # Files that a Mac adds to folders that it copies.
    (tmp_path / "2" / "shards" / "._000001.safetensors").touch()
    for path in (tmp_path / "2" / "shards").iterdir():
        shutil.copy(path, tmp_path / "1" / "shards")
    run(monkeypatch, *arguments(pictures, tmp_path / "1", model_folder), "--shard", "1/2")
    (tmp_path / "1" / "shards" / "._000001.safetensors").unlink()
    assert contents(tmp_path / "1") == contents(prepared)


def test_a_disk_that_gets_full_is_one_line_and_resumable(
    pictures, model_folder, prepared, small_shards, monkeypatch, disk
):
    given = arguments(pictures, (folder := disk("32k")) / "set", model_folder)
    with pytest.raises(UserError, match=r"disk of .* is full: .*run the same command again"):
        run(monkeypatch, *given)
    assert 0 < len(list(folder.glob("set/shards/*"))) < 7
    assert not list(folder.rglob(".*"))
    subprocess.run(["mount", "-o", "remount,size=2m", str(folder)], check=True)
    run(monkeypatch, *given)
    assert contents(folder / "set") == contents(prepared)


def test_sets_that_earlier_versions_began_are_resumed(
    pictures, model_folder, prepared, small_shards, monkeypatch, tmp_path
):
    """They have the times of the files in their settings."""
    given = arguments(pictures, tmp_path / "set", model_folder)
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "fingerprint", lambda source, _: source.fingerprint())
        run(patch, *given, "--shard", "1/2")
    run(monkeypatch, *given, "--shard", "2/2")
    assert Prepared(tmp_path / "set").num_samples == 40


def test_a_full_disk_is_one_line_and_resumable(
    pictures, model_folder, prepared, small_shards, monkeypatch, tmp_path
):
    given, calls = arguments(pictures, tmp_path / "set", model_folder), []

    def full(file):
        calls.append(file)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("train.data.shards.os.fsync", full)
    with pytest.raises(UserError, match=r"disk of .* is full: .*run the same command again"):
        run(monkeypatch, *given)
    assert len(list((tmp_path / "set").glob("shards/*"))) == 2
    run(monkeypatch, *given)
    assert contents(tmp_path / "set") == contents(prepared)


def test_finished_and_other_sets_are_refused(
    pictures, model_folder, prepared, small_shards, monkeypatch, tmp_path, capsys
):
    before = contents(prepared)
    run(monkeypatch, *arguments(pictures, prepared, model_folder))
    assert capsys.readouterr().out == f"{prepared} is complete\n"
    with monkeypatch.context() as patch:  # before a model is loaded
        patch.setattr("train.prepare.load_model", None)
        run(monkeypatch, *arguments(pictures, prepared, model_folder))
        assert capsys.readouterr().out == f"{prepared} is complete\n"
        with pytest.raises(UserError, match="a complete set already, with other --min-side: "):
            run(monkeypatch, *arguments(pictures, prepared, model_folder), "--min-side", 5)
        other = shutil.copytree(model_folder, tmp_path / "other")
        (other / "autoencoder.safetensors").write_bytes(b"other weights")
        with pytest.raises(TypeError):  # these are opened, to be compared
            run(monkeypatch, *arguments(pictures, prepared, other))
    with pytest.raises(UserError, match="is a complete set already, with other --min-side: choose"):
        run(monkeypatch, *arguments(pictures, prepared, model_folder), "--min-side", 5)
    assert not capsys.readouterr().out
    fewer = write_pictures(tmp_path / "fewer", 39)
    with pytest.raises(UserError, match="set already, with other files of pictures: choose"):
        run(monkeypatch, *arguments(fewer, prepared, model_folder))
    assert contents(prepared) == before
    output = tmp_path / "set"
    run(monkeypatch, *arguments(pictures, output, model_folder), "--shard", "1/2")
    with pytest.raises(UserError, match="an unfinished set with other --batch-size and --min-side"):
        more = "--min-side", 5, "--batch-size", 4
        run(monkeypatch, *arguments(pictures, output, model_folder, *more))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").touch()
    with pytest.raises(UserError, match="mine exists already"):
        run(monkeypatch, *arguments(pictures, tmp_path / "mine", model_folder))
    with pytest.raises(UserError, match="set is prepared already"):
        run(monkeypatch, *arguments(prepared, tmp_path / "again", model_folder))


def test_a_dry_run_prints_and_writes_nothing(pictures, model_folder, monkeypatch, tmp_path, capsys):
    run(monkeypatch, *arguments(pictures, tmp_path / "set", model_folder, "--dry-run"))
    assert re.fullmatch(
        r"40 pictures; about .* pictures/s, \d+ bytes each: .* second.* and 2.\.. kB of disk "
        r"\(.* free\)\n",
        capsys.readouterr().out,
    )
    assert list(tmp_path.iterdir()) == []


def test_slow_work_gets_a_hint(pictures, model_folder, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("train.preparation.work.LONG_SHARD", 0)
    run(monkeypatch, *arguments(pictures, tmp_path / "set", model_folder, "--dry-run"))
    assert re.search(
        r"a shard takes up to .*: give a smaller --shard-size", capsys.readouterr().err
    )


@pytest.mark.skipif(sys.platform != "linux", reason="measures memory on Linux only")
def test_memory_does_not_grow_with_the_set(model_folder, processes, tmp_path):
    write_pictures(tmp_path / "few", 10)
    (tmp_path / "many").mkdir()
    for i in range(600):
        for end in ("png", "txt"):
            os.link(tmp_path / f"few/{i % 10:03d}.{end}", tmp_path / f"many/{i:04d}.{end}")
    more = "--workers", "2", "--resolution", "128"
    output = tmp_path / "set"
    given = arguments(tmp_path / "many", output, model_folder, *more)
    process = processes.Process(target=_command, args=(given, 30))
    process.start()
    peaks = [0.0] * 21
    while process.exitcode is None and not shard_path(output, 19).exists():
        done = len(list(output.glob("shards/*")))
        pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
        peaks[done] = max(peaks[done], pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
        time.sleep(0.005)
    process.join()
    assert process.exitcode == 0
    # 450 pictures of 128 px alone are 22 MB.
    assert max(peaks[5:]) - max(peaks[:5]) < 10


# --- text states and teachers -------------------------------------------------------------------


def write_model(folder, components, **changes):
    """`components` as a model folder, and what it has."""
    changed = dataclasses.replace(components, **changes)
    config = dataclasses.replace(
        changed.config,
        transformer=changed.transformer.config,
        autoencoder=changed.autoencoder.config,
        text_encoders=tuple(encoder.config for encoder in changed.text_encoders),
    )
    changed = dataclasses.replace(changed, config=config)
    save_pretrained(folder, changed)
    return changed


@pytest.fixture(scope="module")
def clip_model(components, tmp_path_factory):
    """A model folder with a frozen CLIP as its second text encoder."""
    folder = tmp_path_factory.mktemp("clip") / "model"
    clip = tiny.make_clip(b"p i\npi c\nn u", 16, num_heads=2)
    return folder, write_model(folder, tiny.with_text_encoder(components, clip))


def test_text_states_equal_those_of_the_encoder(pictures, clip_model, monkeypatch, tmp_path):
    folder, model = clip_model
    more = "--text-states", "clip"
    run(monkeypatch, *arguments(pictures, tmp_path / "set", folder, *more))
    data, encoder = Prepared(tmp_path / "set"), model.text_encoders[1]
    samples = data.samples(0, 4)
    for caption, states in zip(samples.captions, samples.states["text_encoder_1"], strict=True):
        tokens, mask = encoder.tokenize([caption])
        kept = np.array(mask[0])
        expected = np.array(encoder(tokens, mask)[0])[kept]
        assert states.shape == expected.shape and states.dtype == np.float16
        assert np.allclose(states, expected, rtol=2e-3, atol=2e-3)
    tokens, mask = encoder.tokenize([""])
    empty = np.array(encoder(tokens, mask)[0])[np.array(mask[0])]
    assert np.allclose(data.empty_states["text_encoder_1"], empty, rtol=2e-3, atol=2e-3)
    data.check_text_states([encoder.config for encoder in model.text_encoders])
    with pytest.raises(UserError, match="text states of a clip text encoder that this model"):
        data.check_text_states(tiny.MODEL.text_encoders)


@pytest.mark.parametrize("name", ["transformer-0", "gemma"])
def test_text_states_of_trained_or_unknown_encoders_are_refused(
    name, pictures, model_folder, monkeypatch, tmp_path
):
    with pytest.raises(UserError, match=r"are trained, not frozen|no text encoder 'gemma'"):
        more = "--text-states", name
        run(monkeypatch, *arguments(pictures, tmp_path / "set", model_folder, *more))


@pytest.mark.usefixtures("no_language_model")
def test_a_teacher_adds_its_text_and_its_latents(pictures, model_folder, monkeypatch, tmp_path):
    config = dataclasses.replace(tiny.TEACHER, autoencoder=tiny.QWEN_AUTOENCODER)
    tiny.write_teacher(tmp_path / "teacher", config)
    more = "--teacher", tmp_path / "teacher"
    run(monkeypatch, *arguments(pictures, tmp_path / "set", model_folder, *more))
    teacher, autoencoder = load_flow_teacher(tmp_path / "teacher")
    data = Prepared(tmp_path / "set")
    assert data.samples(0, 3).states == data.samples(0, 3).other_latents == {}
    data.wanted.add("teacher")
    samples = data.samples(0, 3)
    for i, caption in enumerate(samples.captions):
        condition = teacher.encode([caption])
        states = samples.states["teacher"][i]
        assert np.allclose(states, np.array(condition.text[0])[: len(states)], atol=2e-3)
        assert len(states) == int(condition.mask.sum())
        picture, _ = decode((pictures / f"{int(caption.split()[-1]):03d}.png").read_bytes())
        pixels = from_uint8(fit(picture, nearest_bucket(picture, data.sizes))[None])
        expected = autoencoder.encode(pixels)[0]
        assert mx.allclose(samples.other_latents["teacher"][i], expected, rtol=1e-3, atol=2e-3)
    assert np.allclose(
        data.empty_states["teacher"], np.array(condition.empty_text[0])[:1], atol=2e-3
    )
    data.check_autoencoder(autoencoder, teacher="t")
    with pytest.raises(UserError, match="latents of another autoencoder"):
        data.check_autoencoder(autoencoder)


def test_a_teacher_with_the_same_autoencoder_adds_text_only(
    pictures, model_folder, monkeypatch, tmp_path
):
    more = "--teacher", model_folder
    run(monkeypatch, *arguments(pictures, tmp_path / "set", model_folder, *more))
    data, model = Prepared(tmp_path / "set"), load_pretrained(model_folder)
    data.wanted.add("teacher")
    samples = data.samples(0, 2)
    assert samples.other_latents == {}
    text, mask = encode_prompts(
        samples.captions, model.text_encoders, transformer=model.transformer
    )
    for i, states in enumerate(samples.states["teacher"]):
        expected = np.array(text[i])[np.array(mask[i])]
        assert states.shape == expected.shape and np.allclose(states, expected, atol=1e-2)
    assert len(data.empty_states["teacher"]) > 0


def test_the_unconditional_text_of_a_teacher_may_be_absent(
    pictures, model_folder, monkeypatch, tmp_path
):
    shutil.copytree(model_folder, tmp_path / "teacher")
    path = tmp_path / "teacher" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"unconditional": "absent"}))
    more = "--teacher", tmp_path / "teacher"
    run(monkeypatch, *arguments(pictures, tmp_path / "set", model_folder, *more))
    assert len(Prepared(tmp_path / "set").empty_states["teacher"]) == 0


# --- drawn sets ---------------------------------------------------------------------------------


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red apple\na blue car\n# no prompt\na green cat\n")
    return path


def drawing(output, teacher, prompts, *more):
    given = ["-o", output, "--draw-with", teacher, "--prompts-file", prompts, "--per-prompt", 3]
    return [*given, "--resolution", SIZE, "--seed", 5, *more]


def test_a_drawn_set_is_what_the_teacher_draws(
    model_folder, components, prompts, monkeypatch, tmp_path, capsys
):
    output = tmp_path / "set"
    more = "--batch-size", 2, "--steps", 3, "--guidance", 2
    monkeypatch.setattr("train.prepare.MOST_DRAWN_BATCHES", 2)
    run(monkeypatch, *drawing(output, model_folder, prompts, *more))
    data = Prepared(output)
    captions = [caption for batch in data.batches(9) for caption in batch.captions]
    assert captions == ["a red apple"] * 3 + ["a blue car"] * 3 + ["a green cat"] * 3
    (batch,) = data.batches(9)
    settings = DrawSettings(height=SIZE, width=SIZE, num_inference_steps=3, guidance_scale=2)
    expected = draw_latents(components, captions, seeds=range(5, 14), settings=settings)
    assert mx.allclose(batch.latents, expected, rtol=1e-3, atol=5e-3)
    data.check_autoencoder(components.autoencoder)
    assert "longer than" not in capsys.readouterr().err
    # The shards of a killed command are not drawn again.
    before = contents(output)
    (output / "index.json").unlink()
    shard_path(output, 1).unlink()
    run(monkeypatch, *drawing(output, model_folder, prompts, *more))
    assert contents(output) == before
    monkeypatch.setattr("train.prepare.open_drawing", None)  # a finished set needs no model
    run(monkeypatch, *drawing(output, model_folder, prompts, *more))
    with pytest.raises(UserError, match="is a complete set already, with other --seed: "):
        run(monkeypatch, *drawing(output, model_folder, prompts, *more, "--seed", 6))


@pytest.mark.skipif(sys.platform == "darwin", reason="names are UTF-8 there")
def test_the_name_of_a_teacher_may_not_be_utf8(
    model_folder, prompts, monkeypatch, tmp_path, capsys
):
    teacher = shutil.copytree(model_folder, tmp_path / os.fsdecode(b"\xff"))
    for _ in range(2):
        run(monkeypatch, *drawing(tmp_path / "set", teacher, prompts, "--steps", 1))
    assert capsys.readouterr().out.endswith("set is complete\n")
    assert Prepared(tmp_path / "set").num_samples == 9
    (tmp_path / "set" / "settings.json").unlink()
    assert is_prepared(str(tmp_path / "set"))


def test_a_prompt_that_is_cut_is_noted_once(
    model_folder, components, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr("train.preparation.drawn.MOST_NOTED", 2)
    path, long = tmp_path / "prompts.txt", " ".join(["an apple"] * 90)
    path.write_text(f"a cat\n{long} 1\n{long} 2\n{long} 3\n")
    more = "--steps", 1, "--guidance", 1, "--batch-size", 2
    run(monkeypatch, *drawing(tmp_path / "set", model_folder, path, *more))
    lines = [line for line in capsys.readouterr().err.splitlines() if "longer than" in line]
    encoders = components.text_encoders
    assert len(lines) == 2 * len(encoders)
    most = encoders[0].tokenizer.max_length
    assert lines[0].startswith('note: "an apple an apple')
    assert f"the prompt is longer than {most} tokens, cut: '" in lines[0]


def test_pictures_of_a_prompt_are_held_out_together(model_folder, monkeypatch, tmp_path):
    monkeypatch.setattr(prepare, "LEAST_TO_HOLD_OUT", 1)
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"cat {k}\n" for k in range(8)))
    more = "--steps", 1, "--guidance", 1, "--held-out", 0.5
    run(monkeypatch, *drawing(tmp_path / "set", model_folder, path, *more))
    data = Prepared(tmp_path / "set")
    train, held = (
        [caption for batch in part.batches(9) for caption in batch.captions]
        for part in (data, data.validation())
    )
    assert train and held and len(train + held) == 24
    assert not set(train) & set(held)


@pytest.mark.usefixtures("no_language_model")
def test_a_public_teacher_draws_for_a_model_with_another_autoencoder(
    model_folder, components, prompts, monkeypatch, tmp_path
):
    config = dataclasses.replace(tiny.TEACHER, autoencoder=tiny.QWEN_AUTOENCODER)
    tiny.write_teacher(tmp_path / "teacher", config)
    more = "--model", model_folder, "--steps", 2
    run(monkeypatch, *drawing(tmp_path / "set", tmp_path / "teacher", prompts, *more))
    data = Prepared(tmp_path / "set")
    data.wanted.add("teacher")
    (batch,) = data.batches(9)
    teacher, autoencoder = load_flow_teacher(tmp_path / "teacher")
    data.check_autoencoder(components.autoencoder)
    data.check_autoencoder(autoencoder, teacher="t")
    drawn = batch.other_latents["teacher"]
    pictures = from_uint8(to_uint8(autoencoder.decode(drawn)))
    expected = components.autoencoder.encode(pictures)
    assert mx.abs(batch.latents - expected).max() < 0.1  # of pictures in 8 bits
    picture = sample(
        teacher,
        autoencoder,
        prompt="a blue car",
        height=SIZE,
        width=SIZE,
        num_inference_steps=2,
        seed=5 + 4,
    )
    assert np.abs(to_uint8(autoencoder.decode(drawn[4:5]))[0] - np.array(picture, int)).max() < 4


# --- what is read and skipped -------------------------------------------------------------------


def test_large_pictures_give_no_warning(model_folder, monkeypatch, tmp_path, capsys):
    for k in range(12):
        (tmp_path / "source").mkdir(exist_ok=True)
        size = (63, 64) if k == 0 else (64, 64)
        Image.new("RGB", size, (k, 0, 0)).save(tmp_path / "source" / f"{k}.png")
        (tmp_path / "source" / f"{k}.txt").write_text(f"{k}")
    run(monkeypatch, *arguments(tmp_path / "source", tmp_path / "set", model_folder))
    report = json.loads((tmp_path / "set" / "report.json").read_text())
    assert report["changed"] == {"enlarged to the resolution": 1}
    assert "warning" not in capsys.readouterr().err


def test_pictures_are_turned_filtered_and_counted(
    model_folder, components, monkeypatch, tmp_path, capsys
):
    source = tmp_path / "source"
    write_pictures(source, 3)
    tall = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 120, 3), np.uint8))
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    tall.save(source / "turned.png", exif=exif)
    (source / "turned.txt").write_text("turned")
    Image.new("RGBA", (64, 64), (255, 0, 0, 128)).save(source / "glass.png")
    (source / "glass.txt").write_text("half transparent")
    Image.new("RGB", (20, 64)).save(source / "small.png")
    (source / "small.txt").write_text("a side of 20")
    Image.new("RGB", (64, 400)).save(source / "long.png")
    (source / "long.txt").write_text("a side of 400")
    (source / "damaged.png").write_bytes((source / "000.png").read_bytes()[:100])
    (source / "damaged.txt").write_text("the start of a picture")
    Image.new("RGB", (64, 64)).save(source / "silent.png")
    Image.new("RGB", (64, 64)).save(source / "long_text.png")
    (source / "long_text.txt").write_text("word " * 50)
    more = "--min-side", 32, "--max-caption", 40
    run(monkeypatch, *arguments(source, tmp_path / "set", model_folder, *more))
    report = json.loads((tmp_path / "set" / "report.json").read_text())
    assert report["read"] == 10 and report["kept"] == 5 and report["validation"] == 0
    assert report["skipped"] == {
        "a side below 32 pixels": 1,
        "aspect ratio above 4": 1,
        "caption too long": 1,
        "damaged picture": 1,
        "no caption": 1,
    }
    enlarged = 0
    for name in ("turned", "glass", "000", "001", "002"):
        picture, _ = decode((source / f"{name}.png").read_bytes())
        height, width = nearest_bucket(picture, bucket_sizes((SIZE, SIZE), 32))
        enlarged += picture.height < height or picture.width < width
    assert report["changed"] == {
        "enlarged to the resolution": enlarged,
        "transparent parts over white": 1,
    }
    assert 0 < enlarged < 5
    warning = f"warning: {enlarged} of 5 pictures are smaller than the resolution"
    assert warning in capsys.readouterr().err
    lines = (tmp_path / "set" / "skipped.jsonl").read_text().splitlines()
    assert {json.loads(line)["key"] for line in lines} == {
        "small.png",
        "long.png",
        "damaged.png",
        "silent.png",
        "long_text.png",
    }
    found = {}
    for batch in Prepared(tmp_path / "set").batches(1):
        found[batch.captions[0]] = batch.latents
    assert found["turned"].shape == (1, 16, 4, 4)
    upright = fit(tall.transpose(Image.Transpose.ROTATE_270), (128, 32))
    expected = components.autoencoder.encode(from_uint8(upright[None]))
    assert mx.allclose(found["turned"], expected, rtol=1e-3, atol=2e-3)


def test_several_captions_are_kept_and_chosen_by_weight(model_folder, monkeypatch, tmp_path):
    source = tmp_path / "source"
    write_pictures(source, 12)
    lines = [
        {"file_name": f"{i:03d}.png", "text": f"short {i}", "long": f"a long text {i}" if i else ""}
        for i in range(12)
    ]
    (source / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    more = "--captions", "text", "long"
    run(monkeypatch, *arguments(source, tmp_path / "set", model_folder, *more))
    assert Prepared(tmp_path / "set").columns == ["text", "long"]
    assert all(c.startswith("short") for c in Prepared(tmp_path / "set").prompts(0, 12))
    data = Prepared(tmp_path / "set", captions={"text": 1, "long": 3}, seed=3)
    captions = [caption for number in range(50) for caption in data.read(number, 4).captions]
    assert 0.6 < sum("long" in caption for caption in captions) / 200 < 0.8
    assert {caption for caption in captions if caption.endswith(" 0")} == {"short 0"}
    fixed = [
        {
            c
            for batch in Prepared(tmp_path / "set", captions=data.captions, seed=seed).batches(size)
            for c in batch.captions
        }
        for seed, size in ((3, 1), (4, 5))
    ]
    assert fixed[0] == fixed[1] and len(fixed[0]) == 12
    assert 5 <= sum("long" in caption for caption in fixed[0]) <= 11
    with pytest.raises(
        UserError,
        match=r"no caption column 'lang' \(did you mean 'long'\?\), only text, long: prepare the "
        "pictures with --captions lang",
    ):
        Prepared(tmp_path / "set", captions={"lang": 1})


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_tars_and_parquet_files_give_the_latents_of_the_folder(
    kind, pictures, prepared, model_folder, monkeypatch, tmp_path
):
    files = sorted(pictures.glob("*.png"))
    for i, part in enumerate((files[:25], files[25:])):
        path = tmp_path / f"part-{i}.{kind}"
        if kind == "tar":
            with tarfile.open(path, "w") as tar:
                for file in part:
                    tar.add(file, file.name)
                    tar.add(file.with_suffix(".txt"), file.with_suffix(".txt").name)
        else:
            tiny.require("pyarrow")
            from pyarrow import parquet, table

            rows = [{"bytes": file.read_bytes(), "path": file.name} for file in part]
            texts = [file.with_suffix(".txt").read_text() for file in part]
            parquet.write_table(table({"image": rows, "text": texts}), path)
    run(monkeypatch, *arguments(tmp_path / f"*.{kind}", tmp_path / "set", model_folder))
    found, expected = (
        {batch.captions[0]: batch.latents for batch in Prepared(folder).batches(1)}
        for folder in (tmp_path / "set", prepared)
    )
    assert found.keys() == expected.keys() and len(found) == 40
    assert all(mx.allclose(found[c], expected[c], atol=2e-3) for c in found)


def test_a_part_is_held_out(model_folder, monkeypatch, tmp_path):
    write_pictures(tmp_path / "source", 104)
    more = "--held-out", 0.2
    run(monkeypatch, *arguments(tmp_path / "source", tmp_path / "set", model_folder, *more))
    data = Prepared(tmp_path / "set")
    held = data.validation()
    assert 10 < held.num_samples < 35 and data.num_samples + held.num_samples == 104
    captions = [{c for batch in part.batches(4) for c in batch.captions} for part in (data, held)]
    assert len(captions[0] | captions[1]) == 104 and not captions[0] & captions[1]
    assert held.read(0, 4).captions == held.read(0, 4).captions


def test_no_usable_picture_is_one_line(model_folder, monkeypatch, tmp_path):
    write_pictures(tmp_path / "source", 2)
    more = "--min-side", 1000
    with pytest.raises(UserError, match=r"no picture can be used \(2: a side below 1000 pixels\)"):
        run(monkeypatch, *arguments(tmp_path / "source", tmp_path / "set", model_folder, *more))
    assert not (tmp_path / "set").exists()


# --- bad sets and options -----------------------------------------------------------------------


@pytest.fixture
def copied(prepared, tmp_path):
    return shutil.copytree(prepared, tmp_path / "copied")


def test_latents_of_another_model_are_refused(prepared, components):
    Prepared(prepared).check_autoencoder(components.autoencoder)
    other = tiny.randomize(make_autoencoder(tiny.AUTOENCODER), 99)
    with pytest.raises(UserError, match=r"latents of another autoencoder \(convolutional, 4 ch"):
        Prepared(prepared).check_autoencoder(other)
    with pytest.raises(UserError, match=r"no latents of the teacher: .* --teacher t$"):
        Prepared(prepared).check_autoencoder(other, teacher="t")
    mean = dataclasses.replace(tiny.AUTOENCODER, latents_mean=(0.0,) * 4)
    same = make_autoencoder(mean)
    same.update(components.autoencoder.parameters())
    with pytest.raises(UserError, match="latents of another autoencoder"):
        Prepared(prepared).check_autoencoder(same)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_shard_is_one_line(keep, copied):
    path = shard_path(copied, 3)
    path.write_bytes(path.read_bytes()[:keep])
    data = Prepared(copied)
    with pytest.raises(UserError, match=r"000003\.safetensors is damaged"):
        list(data.batches(4))


def test_a_shard_that_gets_shorter_while_it_is_open_is_one_line(copied):
    data = Prepared(copied)
    list(data.batches(4))
    path = shard_path(copied, 3)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(UserError, match=r"000003\.safetensors is damaged"):
        list(data.batches(4))


def test_missing_and_unfinished_sets_are_one_line(copied, tmp_path):
    index = json.loads((copied / "index.json").read_text())
    shard_path(copied, 2).unlink()
    with pytest.raises(UserError, match=r"incomplete, shards/000002\.safetensors is missing"):
        Prepared(copied).check_files()
    with pytest.raises(UserError, match=r"cannot read .*000002"):
        list(Prepared(copied).batches(4))
    (copied / "index.json").write_text('{"format_version": 1}')
    with pytest.raises(UserError, match="is damaged"):
        Prepared(copied)
    for captions in ([], {"text": 1}):
        (copied / "index.json").write_text(json.dumps(index | {"captions": captions}))
        with pytest.raises(UserError, match="is damaged"):
            Prepared(copied)
    (copied / "index.json").unlink()
    with pytest.raises(UserError, match=r"is not complete: run its train\.prepare again"):
        Prepared(copied)
    with pytest.raises(UserError, match=r"is not a set that train\.prepare wrote"):
        Prepared(tmp_path)


@pytest.mark.parametrize("side", [None, 0, -64, 2**31, 64.0, True, "64", [64], {}])
def test_a_damaged_size_in_the_settings_is_one_line(
    side, pictures, model_folder, copied, monkeypatch
):
    """It is what the command means by default; without an index the set is unfinished."""
    path = copied / "settings.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"resolution": side}))
    for _ in range(2):
        with pytest.raises(UserError, match=r"settings\.json is damaged: give another --output"):
            run(monkeypatch, pictures, "--output", copied, "--model", model_folder)
        (copied / "index.json").unlink(missing_ok=True)


def test_a_missing_shard_is_made_again(
    pictures, model_folder, prepared, copied, small_shards, monkeypatch
):
    shard_path(copied, 2).unlink()
    run(monkeypatch, *arguments(pictures, copied, model_folder))
    assert contents(copied) == contents(prepared)


def test_a_shard_of_another_set_is_noticed(
    pictures, model_folder, copied, small_shards, monkeypatch, tmp_path
):
    other = tmp_path / "other"
    more = "--held-out", 0.5
    run(monkeypatch, *arguments(pictures, other, model_folder, *more, "--min-side", 3))
    (copied / "index.json").unlink()
    shutil.copy(shard_path(other, 1), shard_path(copied, 1))
    with pytest.raises(UserError, match=r"000001\.safetensors belongs to another set"):
        run(monkeypatch, *arguments(pictures, copied, model_folder))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["x", "-o", "out"], "give --model"),
        (["-o", "out", "--model", "x"], "give a SOURCE"),
        (["x", "-o", "out", "--model", "x", "--steps", "3"], "--steps takes --draw-with"),
        (["x", "-o", "out", "--draw-with", "t", "--prompts-file", "f"], "takes no SOURCE"),
        (["-o", "out", "--draw-with", "t"], "takes --prompts-file"),
        (["x", "-o", "out", "--model", "m", "--shard", "3/2"], "give I/N such as 1/4"),
        (["x", "-o", "out", "--model", "m", "--captions", "a=2"], "weights in training"),
        (["x", "-o", "out", "--model", "m", "--held-out", "1"], "--held-out must be"),
        (["tests", "-o", "tests/out", "--model", "m"], "is inside tests"),
        (["no/such", "-o", "out", "--model", "m"], "no such file or folder"),
        (["stickers", "-o", "out", "--model", "m"], "are rendered in training"),
    ],
)
def test_bad_options_are_one_line_before_a_model_is_loaded(given, message, monkeypatch):
    monkeypatch.setattr(prepare, "load_model", None)
    with pytest.raises(UserError, match=message):
        run(monkeypatch, *given)


@pytest.mark.usefixtures("no_language_model")
def test_the_default_resolution_is_that_of_the_model_or_teacher(
    pictures, model_folder, monkeypatch, tmp_path
):
    def default(*given):
        args = parse([str(word) for word in ("-o", tmp_path / "set", *given)])
        teacher = Path(args.draw_with) if args.draw_with else None
        return prepare.default_resolution(args, teacher)

    shutil.copytree(model_folder, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_size": [64, 96]}))
    drawing = ["--prompts-file", "p", "--model", model_folder, "--draw-with"]
    assert default(pictures, "--model", tmp_path / "model") == 64  # as many pixels, about
    assert default(*drawing, tmp_path / "model") == 64
    assert default(*drawing, tiny.write_teacher(tmp_path / "teacher")) == 1024
    assert default(*drawing, minit2i(tmp_path / "minit2i")) == 512
    write_autoencoder(tmp_path / "vae", tiny.QWEN_AUTOENCODER)
    assert default(pictures, "--model", tmp_path / "vae") == 256
    # Earlier versions began sets at 256 pixels.
    given = [pictures, "--output", tmp_path / "set", "--model", tmp_path / "model"]
    run(monkeypatch, *given)
    assert Prepared(tmp_path / "set").resolution == 64
    path = tmp_path / "set" / "settings.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"resolution": 256}))
    assert default(pictures, "--model", tmp_path / "model") == 256


def minit2i(folder):
    """A teacher's folder without weights."""
    folder.mkdir()
    config = TeacherConfig("minit2i", MiniT2ITransformerConfig(), PIXELS, schedule=MINIT2I)
    (folder / CONFIG).write_text(json.dumps({"format_version": 1} | to_dict(config)))
    return folder


def test_a_teacher_draws_no_size_that_it_was_not_trained_on(prompts, monkeypatch, tmp_path):
    output, teacher = tmp_path / "set", minit2i(tmp_path / "minit2i")
    with pytest.raises(UserError, match=r"on 512x512 pixels, not on 64x64: .*--resolution 512"):
        run(monkeypatch, *drawing(output, teacher, prompts))
    assert not output.exists()


@pytest.mark.parametrize("side", [1, 72])
def test_other_resolutions_are_refused(side, pictures, model_folder, monkeypatch, tmp_path):
    given = arguments(pictures, tmp_path / "set", model_folder, "--resolution", side)
    with pytest.raises(UserError, match=f"--resolution {side}: give a multiple of 32"):
        run(monkeypatch, *given)


# --- the estimate ---------------------------------------------------------------------------------


class SlowStart:
    """An encoder and a teacher whose first batch of a size takes half a second longer."""

    batch_size, autoencoder, others, texts = 4, None, {}, {}

    def __init__(self):
        self.seen = set()

    def chunk(self, pictures):
        return Chunk(self.encode(pictures))

    def encode(self, pictures):
        if len(pictures) not in self.seen:
            time.sleep(0.5)
        self.seen.add(len(pictures))
        latents = np.zeros((1, 1, 1), np.float16)
        return [Sample(p.key, p.size, {"text": "a"}, latents) for p in pictures]


def test_the_estimate_is_without_the_start_and_of_all_records():
    """A record that is left out takes no place, and no time to encode."""
    records = [
        Skipped(str(i), "no caption") if i % 2 else Record(str(i), {}, bytes) for i in range(8)
    ]
    source = SimpleNamespace(records=lambda start=0: iter(records))

    def decode(record):
        return Picture(record.key, {"text": "a"}, (8, 8), np.zeros((8, 8, 3), np.uint8), [])

    work = PictureSet(source, decode, encoder=SlowStart(), chunk_size=8, workers=1)
    measured = work.measure(0)
    assert len(measured.samples) == 4 and measured.share == 4 / 7
    assert measured.nbytes == 4 / 7 * measured.samples[0].nbytes
    assert 0 < measured.seconds < 0.05


def test_the_estimate_of_a_drawn_set_is_of_the_second_batch(monkeypatch):
    given = {"per_prompt": 10, "seed": 0, "size": (8, 8), "column": "text", "chunk_size": 8}
    slow = SlowStart()
    work = DrawnSet(None, None, encoder=slow, prompts=["a"], **given)
    drawn = []

    def samples(begin, end):
        drawn.append(range(begin, end))
        return slow.encode([SimpleNamespace(key=str(k), size=(8, 8)) for k in range(begin, end)])

    monkeypatch.setattr(work, "_samples", samples)
    assert work.measure(0).seconds < 0.05
    chunks = list(work.chunks(lambda _: True, start=0, progress=lambda _: None))
    assert [len(chunk.samples) for _, chunk in chunks] == [8, 2]
    assert drawn == [range(4), range(4, 8), range(8, 10)]  # each once
