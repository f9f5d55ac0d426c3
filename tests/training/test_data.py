"""Opening data by its name: pictures during training, mixtures, reading ahead, exact resume."""

import json
import sys
import threading
import time
import tracemalloc
from collections import Counter
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from mlx_snapgen.cli.options import Parser
from mlx_snapgen.errors import UserError
from tests.training.test_records import (
    encoded,
    samples,
    write_folder,
    write_metadata,
    write_parquet,
    write_tar,
)
from train import prepare, tokenizer
from train.data.index import build_index
from train.data.mixture import Mixture, Prefetched
from train.data.open import is_prepared, open_data, open_records
from train.data.order import LocalOrder
from train.data.pictures import RecordPictures
from train.data.selection import Filter, held_out
from train.data.source import MAY_CHANGE, PictureSource, Record, Samples
from train.data.stickers.source import Stickers, ValidationStickers
from train.loop.run import claim, recorded
from train.options.data import add_data
from train.setup.data import data_from

BUCKETS = [(16, 32), (16, 16), (32, 16)]


def many(count):
    """Samples of three shapes."""
    shapes = [(20, 20), (20, 40), (40, 20)]
    return [
        (f"{k:04}", encoded(shapes[k % 7 % 3], k), f"picture {k}", f"no {k}") for k in range(count)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "folder"
    write_folder(path, many(150))
    return path


def pictures(path, **options):
    return RecordPictures(open_records([str(path)]), BUCKETS, **options)


# --- pictures -----------------------------------------------------------------------------------


def test_every_picture_comes_once_in_an_epoch_in_its_bucket(folder):
    source = pictures(folder, share=0, seed=3)
    epoch = source._order(1).epoch
    assert source.num_samples == epoch == 150
    batches = [source.batch(k, 1) for k in range(epoch)]
    assert len({caption for _, (caption,) in batches}) == epoch
    for found, (caption,) in batches:
        number = int(caption.split()[1])
        assert found.shape == (1, *[(16, 16), (16, 32), (32, 16)][number % 7 % 3], 3)
    numbers = [int(caption.split()[1]) for _, (caption,) in batches]
    assert numbers != sorted(numbers) and set(numbers) == set(range(150))


def test_formats_of_the_same_pictures_give_the_same_pixels(tmp_path):
    found = many(30)
    write_folder(tmp_path / "f", found)
    write_tar(tmp_path / "a.tar", found)
    write_parquet(tmp_path / "a.parquet", found, rows=1000)
    sources = [pictures(tmp_path / name, seed=1) for name in ("f", "a.tar", "a.parquet")]
    by_caption = []
    for source in sources:
        batches = [source.batch(k, 2) for k in range(40)]
        by_caption.append(
            {c: p for pixels, texts in batches for p, c in zip(pixels, texts, strict=True)}
        )
    first, *others = by_caption
    for other in others:
        common = set(first) & set(other)
        assert len(common) > 20
        assert all((first[caption] == other[caption]).all() for caption in common)
    # The order is the same too where records have the same order.
    assert sources[0].batch(5, 4)[1] == sources[1].batch(5, 4)[1]


def test_held_out_pictures_are_in_the_validation_part_alone(folder):
    source = pictures(folder, share=0.2, seed=0)
    part = source.validation()
    keys = {f"picture {k}" for k in range(150) if held_out(f"{k:04}.png", 0.2)}
    assert part.num_samples == len(keys) == 150 - source.num_samples and 10 < len(keys) < 60
    for view, expected in ((part, keys), (source, {f"picture {k}" for k in range(150)} - keys)):
        found = {c for k in range(view._order(1).epoch) for c in view.batch(k, 1)[1]}
        assert found == expected
        assert {c for k in range(20) for c in view.prompts(k, 5)} <= expected
    assert part.validation() is None and part.settings() == source.settings()


def test_small_sets_hold_out_nothing(tmp_path):
    write_folder(tmp_path / "f", many(99))
    assert pictures(tmp_path / "f", share=0.5).validation() is None
    assert pictures(tmp_path / "f", share=0.5).num_samples == 99


def test_captions_are_chosen_at_random_by_weight_for_each_sample(tmp_path):
    write_tar(tmp_path / "a.tar", samples())
    source = pictures(tmp_path / "a.tar", captions={"text": 3, "short": 1})
    captions = [c for k in range(200) for c in source.prompts(k, 4)]
    shares = Counter(c.split()[0] for c in captions)
    assert 140 < shares["no"] < 260 and shares["picture"] + shares["no"] == 800
    assert source.batch(7, 4)[1] == source.batch(7, 4)[1]


def test_a_damaged_picture_is_replaced_by_the_next_one_and_told_once(tmp_path, capsys):
    found = many(21)
    cut = found[4][1][: len(found[4][1]) // 2]
    found[4] = (found[4][0], cut, *found[4][2:])
    write_folder(tmp_path / "f", found)
    source = pictures(tmp_path / "f")
    seen = Counter(c for k in range(source._order(1).epoch) for c in source.batch(k, 1)[1])
    assert "picture 4" not in seen and sum(seen.values()) == 21
    for k in range(source._order(1).epoch):
        source.batch(k, 1)
    lines = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    assert len(lines) == 1 and "0004.png" in lines[0] and "another picture" in lines[0]


def test_a_picture_that_is_skipped_is_named_with_its_fault(tmp_path, capsys):
    """As the user finds it, also of several sets; the fault may be in the file of the caption."""
    found = many(9)
    found[2] = (found[2][0], found[2][1][:-40], *found[2][2:])
    write_folder(tmp_path / "f", found)
    write_tar(tmp_path / "a.tar", found)
    one = pictures(tmp_path / "f")
    both = RecordPictures(open_records([str(tmp_path / n) for n in ("f", "a.tar")]), BUCKETS)
    (tmp_path / "f" / "0003.txt").write_bytes(b"\xff")
    (tmp_path / "f" / "0005.png").unlink()
    (tmp_path / "f" / "0005.txt").unlink()
    expected = {
        f"skipped: {tmp_path}/f/0002.png: cannot be read (image file is truncated",
        f"skipped: {tmp_path}/f/0003.png: 0003.txt is not readable as UTF-8",
        f"skipped: {tmp_path}/f/0005.png: no such file",
    }
    for source, more in ((one, set()), (both, {"skipped: a.tar:set/0002: cannot be read (image"})):
        capsys.readouterr()
        read = sum(len(captions) for _, captions in source.batches(4))
        assert read == source.num_samples - 3 - len(more)
        lines = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
        assert len(lines) == len(expected | more)
        assert all(any(line.startswith(start) for line in lines) for start in expected | more)
        assert not any("another picture" in line for line in lines)


def test_skipped_records_are_counted_and_an_empty_set_is_an_error(tmp_path):
    found = samples()
    found[0] = ("00", b"no picture", "x", "")
    found[1] = ("01", found[1][1], " ", "")
    write_folder(tmp_path / "f", found)
    index = pictures(tmp_path / "f", filter=Filter(min_side=20)).index
    assert index.skipped == {
        "not a picture that can be read": 1,
        "empty caption": 1,
        "a side below 20 pixels": 2,
    }
    assert len(index.ends) == 8
    with pytest.raises(UserError, match=r"no picture with a caption in .*: 12 skipped, such as"):
        pictures(tmp_path / "f", filter=Filter(min_side=100))


def test_the_index_is_kept_until_a_file_or_setting_changes(folder, tmp_path, monkeypatch):
    first = pictures(folder, folder=tmp_path)
    monkeypatch.setattr("train.data.index.build_index", None)
    again = pictures(folder, folder=tmp_path)
    assert again.settings() == first.settings()
    assert (again.batch(3, 4)[0] == first.batch(3, 4)[0]).all()
    with pytest.raises(TypeError):  # it would be built again
        pictures(folder, folder=tmp_path, filter=Filter(min_side=2))
    monkeypatch.undo()
    (kept,) = tmp_path.iterdir()
    kept.write_bytes(kept.read_bytes()[:100])
    assert pictures(folder, folder=tmp_path).settings() == first.settings()


def test_parquet_is_read_in_an_order_local_to_row_groups(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    from train.data.readers import parquet

    monkeypatch.setattr(parquet, "PART", 80_000)
    write_parquet(tmp_path / "a.parquet", many(300), rows=10)
    source = pictures(tmp_path / "a.parquet", share=0)
    order = source._order(4)
    assert isinstance(order, LocalOrder) and 4 < len(order.counts) < 30
    reads = Counter()
    read_group = source.source._read

    tables = []

    def counted(number, group, captions_only):
        reads[group] += 1
        tables.append(read_group(number, group, captions_only))
        return tables[-1]

    monkeypatch.setattr(source.source, "_read", counted)
    monkeypatch.setattr(parquet, "KEPT", 200_000)
    for read in (lambda k: source.batch(k, 4)[1], lambda k: source.prompts(k, 4)):
        reads.clear()
        captions = [c for k in range(order.epoch) for c in read(k)]
        assert len(set(captions)) == len(captions) >= 300 - 3 * 3
        assert set(reads) == set(range(30)) and sum(reads.values()) < 60  # 300 at random
        assert captions != sorted(captions)
    assert tables[0][0].column_names == ["image", "text", "short"]
    assert tables[-1][0].column_names == ["text", "short"], "no pictures for the captions alone"


def test_a_compressed_tar_is_refused_before_it_is_indexed(tmp_path):
    write_tar(tmp_path / "a.tar.gz", samples())
    with pytest.raises(UserError, match=r"only be read in order.*train\.prepare"):
        pictures(tmp_path / "a.tar.gz")


# --- order --------------------------------------------------------------------------------------


def test_local_order_is_complete_and_stays_in_its_parts():
    counts = np.array([[10, 4], [8, 4], [12, 2], [10, 10]])
    order = LocalOrder(counts, batch_size=4, seed=7)
    assert order.epoch == 15
    met = [order(k) for k in range(order.epoch)]
    rows = {b: np.concatenate([r for bucket, r in met if bucket == b]) for b in (0, 1)}
    assert sorted(rows[0]) == list(range(40)) and sorted(rows[1]) == list(range(20))
    parts = np.searchsorted(np.cumsum(counts[:, 0]), rows[0], side="right")
    assert (np.diff(parts) != 0).sum() == 3  # one part after the other
    assert any((order(k)[1] != order(k + 15)[1]).any() for k in range(15))
    again = LocalOrder(counts, batch_size=4, seed=7)
    assert all((again(k)[1] == order(k)[1]).all() for k in (40, 3, 29))


# --- mixtures and reading ahead -----------------------------------------------------------------


class Numbered(PictureSource):
    """A source whose samples say where they come from."""

    def __init__(self, name, delay=0.0, fails=()):
        self.name, self.delay, self.fails = name, delay, fails
        self.threads, self.calls, self.made = set(), Counter(), set()

    def batch(self, number, count):
        self.threads.add(threading.current_thread().name)
        self.calls[number] += 1
        time.sleep(self.delay)
        if number in self.fails:
            raise UserError(f"batch {number} is damaged")
        self.made.add(number)
        return np.full((count, 2, 2, 3), number, np.uint8), [f"{self.name}{number}"] * count

    def read(self, number, count):
        pixels, captions = self.batch(number, count)
        return Samples(pixels.astype(np.float32), captions, other_latents={"teacher": pixels})

    def samples(self, number, count):
        return self.read(number, count).to_mlx()

    def settings(self):
        return {"data": self.name, "where": "here"}

    def validation(self):
        return None if self.name == "a" else Numbered("held " + self.name)


def test_a_mixture_has_the_shares_of_its_weights():
    mixture = Mixture([Numbered("a"), Numbered("b")], [1, 3], seed=0)
    captions = [mixture.batch(k, 2)[1][0] for k in range(200)]
    assert [c for c in captions if c[0] == "a"] == [f"a{k}" for k in range(50)]
    assert [c for c in captions if c[0] == "b"] == [f"b{k}" for k in range(150)]
    assert [mixture.samples(k, 2).captions[0] for k in range(200)] == captions
    assert isinstance(mixture.samples(0, 2).latents, mx.array)
    assert mixture.validation().batch(4, 1)[1] == ["held b4"]
    assert Mixture([Numbered("a")], [1], seed=0).validation() is None
    assert mixture.settings() == {
        "data": "mixture",
        "sources": [{"data": "a"}, {"data": "b"}],
        "weights": [1, 3],
        "seed": 0,
        "where": [{"where": "here"}] * 2,
    }


@pytest.mark.parametrize("numbers", [range(30), range(7, 40, 4), [0, 0, 1, 1, 2, 9, 3, 4, 5]])
def test_batches_are_the_same_when_read_ahead(numbers):
    source = Numbered("a", 0.001)
    ahead = Prefetched(source, ahead=3)
    for number in numbers:
        pixels, captions = ahead.batch(number, 2)
        expected = source.batch(number, 2)
        assert (pixels == expected[0]).all() and captions == expected[1]
        assert len(ahead._waiting) <= 3
        assert (ahead.samples(number, 2).latents == mx.array(pixels)).all()
    assert any(name.startswith("read ahead") for name in source.threads)


def test_pictures_are_the_same_when_read_ahead_also_after_a_resume(folder):
    source = pictures(folder, seed=5, share=0.1)
    straight = [source.batch(k, 3) for k in range(40)]
    ahead = Prefetched(pictures(folder, seed=5, share=0.1), threads=4)
    resumed = Prefetched(pictures(folder, seed=5, share=0.1))
    for k, (pixels, captions) in enumerate(straight):
        found = ahead.batch(k, 3) if k < 25 else resumed.batch(k, 3)
        assert (found[0] == pixels).all() and found[1] == captions


def test_stickers_are_the_same_when_read_ahead():
    source = Stickers(3, 20)
    try:
        straight = [source.batch(k, 3) for k in range(6)]
    except UserError as error:
        pytest.skip(str(error))
    ahead = Prefetched(source, threads=3)
    for k, (pixels, captions) in enumerate(straight):
        found = ahead.batch(k, 3)
        assert (found[0] == pixels).all() and found[1] == captions


def test_the_next_batches_are_ready_in_time():
    source = Numbered("a", 0.03)
    ahead = Prefetched(source, ahead=4, threads=4)
    ahead.batch(0, 1)
    until = time.monotonic() + 30
    while not source.made.issuperset(range(1, 5)):
        assert time.monotonic() < until
        time.sleep(0.01)
    for k in range(1, 5):
        ahead.batch(k, 1)
    assert max(source.calls.values()) == 1


def test_errors_come_where_the_batch_is_asked_for_and_threads_end():
    others = set(threading.enumerate())
    ahead = Prefetched(Numbered("a", fails={2}), ahead=4)
    ahead.batch(0, 1), ahead.batch(1, 1)
    with pytest.raises(UserError, match="batch 2 is damaged"):
        ahead.batch(2, 1)
    assert ahead.batch(3, 1)[1] == ["a3"]
    assert ahead.settings() == {"data": "a", "where": "here"}
    ahead.close()
    threads = [t for t in set(threading.enumerate()) - others if t.name.startswith("read ahead")]
    assert threads
    for thread in threads:
        thread.join(5)
    assert not any(thread.is_alive() for thread in threads)


# --- by name ------------------------------------------------------------------------------------

SIZE = {"size": (32, 32), "unit": 8, "seed": 0}


def test_stickers_with_settings():
    assert open_data(["stickers"], **SIZE) == Stickers(0)
    found = open_data(["stickers:nouns=100,categories=single_object+colors"], **{**SIZE, "seed": 4})
    assert found == Stickers(4, 100, ("single_object", "colors"))
    assert found.validation() == ValidationStickers(100)
    for spec, message in {
        "stickers:noun=3": "did you mean 'nouns'",
        "stickers:nouns=x": "not a whole number",
        "stickers:categories=colrs": "no category colrs.*did you mean 'colors'",
    }.items():
        with pytest.raises(UserError, match=message):
            open_data([spec], **SIZE)


def test_several_sources_have_weights_or_shares_by_their_size(folder, tmp_path):
    write_folder(tmp_path / "f", samples())
    write_tar(tmp_path / "a.tar", many(10))
    specs = [str(folder), str(tmp_path / "f")]
    mixture = open_data(specs, **SIZE)
    assert mixture.weights == [s.num_samples for s in mixture.sources]
    assert mixture.num_samples == sum(mixture.weights)
    assert open_data(specs, weights=[1, 1], **SIZE).weights == [1, 1]
    endless = open_data([*specs, "stickers"], **SIZE)
    assert endless.weights == [1, 1, 1] and endless.num_samples is None
    tars = open_data([str(tmp_path / "a.tar")] * 2, **SIZE)
    assert isinstance(tars, RecordPictures) and tars.num_samples == 20
    with pytest.raises(UserError, match="1 for 2"):
        open_data(specs, weights=[1], **SIZE)


def test_what_cannot_be_opened_is_told(folder, tmp_path):
    (tmp_path / "a.txt").write_text("x")
    for spec, message in {
        str(tmp_path / "none"): "no such file or folder",
        "sticker": "did you mean 'stickers'",
        str(tmp_path / "*.tar"): "no such file or folder",
        str(tmp_path / "a.txt"): "no file of pictures",
        str(tmp_path): "no picture with a caption",
    }.items():
        with pytest.raises(UserError, match=message):
            open_data([spec], **SIZE)
    prepared = tmp_path / "prepared"
    prepared.mkdir()
    (prepared / "index.json").write_text(json.dumps({"format_version": 1}))
    assert is_prepared(str(prepared)) and not is_prepared(str(folder))
    with pytest.raises(UserError, match=r"holds encoded pictures, .*train\.prepare"):
        open_data([str(prepared), str(folder)], **SIZE)


def test_prepared_folders_of_another_resolution_are_refused(tmp_path, monkeypatch):
    class Prepared(Numbered):
        resolution = 256

        def __init__(self, folder, *, captions, seed):
            super().__init__(f"{folder.name} {captions} {seed} ")

    monkeypatch.setitem(sys.modules, "train.data.prepared", SimpleNamespace(Prepared=Prepared))
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "index.json").write_text(json.dumps({"format_version": 1}))
    specs = [str(tmp_path / name) for name in ("a", "b")]
    mixture = open_data(specs, captions={"text": 1}, resolution=256, weights=[1, 1], **SIZE)
    assert mixture.samples(0, 1).captions[0][0] in "ab"
    assert {source.name[2:] for source in mixture.sources} == {"{'text': 1} 0 "}
    with pytest.raises(UserError, match="at 256 pixels, not at --resolution 512"):
        open_data(specs[:1], resolution=512, **SIZE)


def test_a_resumed_run_takes_the_same_pictures_elsewhere_but_no_others(tmp_path, monkeypatch):
    write_folder(tmp_path / "f", samples())
    run = tmp_path / "run"
    claim(run, open_data([str(tmp_path / "f")], **SIZE).settings(), may_change=MAY_CHANGE)
    monkeypatch.setattr("train.loop.run.latest_checkpoint", lambda folder: folder)
    moved = tmp_path / "g"
    (tmp_path / "f").rename(moved)
    claim(run, open_data([str(moved)], **SIZE).settings(), may_change=MAY_CHANGE)
    for changed in ({"seed": 1}, {"size": (64, 64)}, {"captions": {"text": 2.0}}):
        with pytest.raises(UserError, match="other"):
            claim(run, open_data([str(moved)], **SIZE | changed).settings(), may_change=MAY_CHANGE)
    (moved / "01.txt").write_text("another caption")
    with pytest.raises(UserError, match="other pictures"):
        claim(run, open_data([str(moved)], **SIZE).settings(), may_change=MAY_CHANGE)
    with pytest.raises(UserError, match="other data"):
        claim(run, Stickers().settings(), may_change=MAY_CHANGE)
    (moved / "01.txt").write_text("picture 1")
    claim(run, open_data([str(moved)], **SIZE).settings(), may_change=MAY_CHANGE)


def test_the_scenes_of_stickers_may_change_when_a_run_is_resumed(tmp_path, monkeypatch):
    claim(tmp_path, Stickers(num_nouns=100).settings(), may_change=MAY_CHANGE)
    monkeypatch.setattr("train.loop.run.latest_checkpoint", lambda folder: folder)
    claim(tmp_path, Stickers().settings(), may_change=MAY_CHANGE)
    assert recorded(tmp_path)["num_nouns"] is None


# --- options ------------------------------------------------------------------------------------


def parsed(*words):
    parser = Parser(prog="test")
    add_data(parser)
    return parser.parse_args(list(words))


def test_options_choose_the_data(folder):
    words = ["--resolution", "64", "--captions", "text", "--min-side", "20", "--held-out", "0"]
    source = data_from(parsed("--data", str(folder), *words), size=(32, 32), unit=8, seed=2)
    assert (64, 64) in source.sizes and source.seed == 2 and source.captions == {"text": 1.0}
    assert source.filter == Filter(min_side=20) and source.validation() is None
    plain = data_from(parsed("--data", str(folder)), size=(32, 32), unit=8, seed=0)
    assert (32, 32) in plain.sizes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--weights", "1", "2"], "--weights: 2 numbers for 1 SOURCE"),
        (["--weights", "0"], "--weights must be above 0"),
        (["--resolution", "33"], "multiple of 8"),
        (["--max-aspect", "0.5"], "--max-aspect must be at least 1"),
        (["--min-side", "0"], "--min-side must be at least 1"),
        (["--min-caption", "9", "--max-caption", "3"], "--max-caption 3 is below --min-caption"),
        (["--held-out", "1"], "--held-out must be at least 0 and below 1"),
        (["--captions", "text=0"], "--captions text=0"),
    ],
)
def test_wrong_values_are_one_line(folder, words, message):
    args = parsed("--data", str(folder), *words)
    with pytest.raises(UserError, match=message):
        data_from(args, size=(32, 32), unit=8, seed=0)


# --- large sets ---------------------------------------------------------------------------------


class Synthetic:
    """Many records that are made when they are asked for."""

    def __init__(self, count):
        self.total, self.picture = count, encoded((20, 20))

    def records(self, start=0):
        for k in range(start, self.total):
            yield self.at((f"folder/{k:09}.png",))

    def at(self, place):
        return Record(place[0], {"text": place[0]}, lambda most=-1: self.picture, tuple(place))

    def group(self, place):
        return 0


def test_an_index_takes_few_bytes_for_each_picture():
    count = 5000
    tracemalloc.start()
    index = build_index(Synthetic(count), BUCKETS, filter=Filter(), captions={}, share=0.01)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(index.ends) == count and index.place(4321) == ("folder/000004321.png",)
    assert kept < 100 * count and peak < 300 * count


def test_columns_of_captions_that_are_not_used_are_named(
    model_folder, tmp_path, monkeypatch, capsys
):
    """By every command that reads captions: of a folder, a tar, a table and a prepared set."""
    found = many(4)
    write_metadata(tmp_path / "f", found)
    write_tar(tmp_path / "a.tar", found)
    line = "{}: captions are from the column text; --captions chooses others: short"

    def said(command, *options):
        monkeypatch.setattr(sys, "argv", ["command", *map(str, options)])
        command.main()
        return [part for part in capsys.readouterr().err.splitlines() if "from the column" in part]

    for name in ("f", "a.tar"):
        path = tmp_path / name
        output = tmp_path / f"{name}.model"
        assert said(tokenizer, "--data", path, "--output", output) == [line.format(path)]
        given = [path, "--model", model_folder, "--resolution", 64, "--output", tmp_path / "set"]
        assert said(prepare, *given, "--dry-run") == [line.format(path)]
        both = ["--captions", "text", "short"]
        more = tmp_path / f"{name}-both.model"
        assert not said(tokenizer, "--data", path, "--output", more, *both)
    assert not said(prepare, *given, *both)
    output = tmp_path / "set.model"
    assert said(tokenizer, "--data", given[-1], "--output", output) == [line.format(given[-1])]
    write_folder(tmp_path / "one", found)
    assert not said(tokenizer, "--data", tmp_path / "one", "--output", tmp_path / "one.model")
