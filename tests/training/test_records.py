"""Sets of captioned pictures: the same records from every format, and what is skipped and why."""

import gzip
import io
import itertools
import json
import os
import tarfile
import unicodedata
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from mlx_snapgen.errors import UserError
from mlx_snapgen.picture_files import decode
from train.data.open import is_there, open_records
from train.data.readers import tars
from train.data.readers.captions import default_column
from train.data.readers.folder import PictureFolderRecords
from train.data.readers.tars import TarRecords
from train.data.selection import Filter, choose_column, held_out, parse_captions
from train.data.source import Record, Skipped

COUNT = 12


def encoded(size=(20, 16), seed=0, kind="PNG"):
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def samples(count=COUNT):
    """(name, contents, text, short) of each picture."""
    return [(f"{k:02}", encoded((16 + k, 20), k), f"picture {k}", f"no {k}") for k in range(count)]


def write_folder(folder, found):
    folder.mkdir()
    for name, data, text, _ in found:
        (folder / f"{name}.png").write_bytes(data)
        (folder / f"{name}.txt").write_text(text)


def write_metadata(folder, found):
    folder.mkdir()
    lines = []
    for name, data, text, short in found:
        (folder / f"{name}.png").write_bytes(data)
        lines.append(json.dumps({"file_name": f"{name}.png", "text": text, "short": short}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def write_tar(path, found, *, kind="json"):
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for name, data, text, short in found:
            values = {"text": text, "short": short, "width": 20}
            caption = json.dumps(values) if kind == "json" else text
            for suffix, contents in (("png", data), (kind, caption.encode())):
                info = tarfile.TarInfo(f"set/{name}.{suffix}")
                info.size = len(contents)
                tar.addfile(info, io.BytesIO(contents))


def write_parquet(path, found, *, raw=False, rows=5):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    pictures = [data if raw else {"bytes": data, "path": f"{n}.png"} for n, data, _, _ in found]
    table = pa.table(
        {
            "id": list(range(len(found))),
            "short": [short for *_, short in found],
            "image": pictures,
            "text": [text for _, _, text, _ in found],
        }
    )
    parquet.write_table(table, path, row_group_size=rows)


def make(tmp_path, kind):
    path = tmp_path / {"folder": "f", "metadata": "m"}.get(kind, f"set.{kind}")
    if kind == "folder":
        write_folder(path, samples())
    elif kind == "metadata":
        write_metadata(path, samples())
    elif kind.startswith("tar"):
        write_tar(path, samples())
    else:
        write_parquet(path, samples())
    return open_records([str(path)])


KINDS = ("folder", "metadata", "tar", "tar.gz", "parquet")


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_has_the_same_records(tmp_path, kind):
    source = make(tmp_path, kind)
    found = list(source.records())
    assert source.count() in (COUNT, None if kind == "tar.gz" else COUNT)
    for record, (_, data, text, short) in zip(found, samples(), strict=True):
        assert record.read() == data and record.read(10) == data[:10]
        assert next(iter(record.captions.values())) == text
        assert kind == "folder" or record.captions["short"] == short
        assert "width" not in record.captions and "id" not in record.captions
    assert len({record.key for record in found}) == COUNT
    for start in (1, 5, 7, COUNT, COUNT + 3):
        assert [r.key for r in source.records(start)] == [r.key for r in found[start:]]


@pytest.mark.parametrize("kind", KINDS)
def test_records_can_be_read_again_at_their_place(tmp_path, kind):
    source = make(tmp_path, kind)
    found = list(source.records())
    place = json.loads(json.dumps(found[3].place))
    if kind == "tar.gz":
        with pytest.raises(UserError, match=r"only be read in order.*train\.prepare"):
            source.at(place)
        return
    again = source.at(place)
    assert (again.key, again.captions, again.read()) == (
        *(found[3].key, found[3].captions),
        samples()[3][1],
    )
    assert again.place == found[3].place


@pytest.mark.parametrize("kind", ["metadata", "tar", "tar.gz", "parquet"])
def test_without_a_text_column_the_first_of_the_first_record_is_the_caption(tmp_path, kind):
    rows = [{"short": "s0", "long": "l0"}, {"long": "l1", "short": "s1"}, {"n": 1, "long": "l2"}]
    path = tmp_path / f"set.{kind}"
    if kind == "metadata":
        path.mkdir()
        lines = [{"file_name": f"{k}.png", **row} for k, row in enumerate(rows)]
        (path / "metadata.jsonl").write_text("bad\n" + "\n".join(map(json.dumps, lines)))
        for k in range(3):
            (path / f"{k}.png").write_bytes(encoded())
    elif kind == "parquet":
        pa = pytest.importorskip("pyarrow")
        columns = {name: [row.get(name) for row in rows] for name in ("short", "long")}
        from pyarrow import parquet

        parquet.write_table(pa.table({"image": [encoded()] * 3, **columns}), path)
    else:
        with tarfile.open(path, "w:gz" if kind == "tar.gz" else "w") as tar:
            for k, row in enumerate(rows):
                for suffix, data in (("png", encoded()), ("json", json.dumps(row).encode())):
                    info = tarfile.TarInfo(f"{k}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    source = open_records([str(path)])
    found = [r for r in source.records() if isinstance(r, Record)]
    if kind != "tar.gz":
        found += [source.at(r.place) for r in found]
    chosen = [Filter().with_captions(r, {}) for r in found]
    texts = [getattr(r, "captions", None) for r in chosen]
    assert texts == [{"short": "s0"}, {"short": "s1"}, None] * (1 if kind == "tar.gz" else 2)
    assert chosen[2].detail == "no short; it has: long; choose with --captions"
    wrong = Filter().with_captions(found[0], {"shrt": 1})
    assert "no shrt (did you mean 'short'?); it has: short, long; choose" in wrong.detail


def test_the_default_column_prefers_names_like_text_and_what_others_have():
    assert default_column([{"url": "u", "n": 1, "llava_caption": "c"}]) == "llava_caption"
    assert default_column([{"n": 1}, {"short": "s"}]) == "short"
    assert default_column([{"short": "s", "caption": None}]) == "text"
    assert default_column([]) == "text"


def test_raw_bytes_and_lists_of_captions_in_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    write_parquet(tmp_path / "raw.parquet", samples(3), raw=True)
    found = list(open_records([str(tmp_path / "raw.parquet")]).records())
    assert [r.read() for r in found] == [data for _, data, _, _ in samples(3)]
    table = pa.table({"img": [encoded()], "sentences": [["one", "two"]], "other": ["x"]})
    parquet.write_table(table, tmp_path / "lists.parquet")
    columns = ["sentences", "sentences.2"]
    (record,) = open_records([str(tmp_path / "lists.parquet")], columns=columns).records()
    assert record.captions == {"sentences": "one", "sentences.2": "two"}


def test_parquet_with_a_caption_that_is_not_utf8_skips_its_row(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    ends = pa.py_buffer(np.array([0, 5, 10, 15], np.int32).tobytes())
    texts = pa.Array.from_buffers(pa.string(), 3, [None, ends, pa.py_buffer(b"a catb\xffcata dog")])
    parquet.write_table(pa.table({"image": [encoded()] * 3, "text": texts}), tmp_path / "a.parquet")
    records = open_records([str(tmp_path / "a.parquet")])
    for found in (records.records(), map(records.at, [(0, 0, 0), (0, 0, 1), (0, 0, 2)])):
        first, second, third = found
        assert (first.captions, third.captions) == ({"text": "a cat"}, {"text": "a dog"})
        assert (second.key, second.reason) == ("a.parquet:1", "caption not in UTF-8")
    records = open_records([str(tmp_path / "a.parquet")], pictures_only=True)
    for found in (records.records(), map(records.at, [(0, 0, 0), (0, 0, 1), (0, 0, 2)])):
        assert [record.captions["text"] for record in found] == ["a cat", "", "a dog"]


def test_pictures_alone_do_without_captions_that_cannot_be_read(tmp_path):
    (tmp_path / "f").mkdir()
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in (("a.png", encoded()), ("a.txt", b"\xff"), ("b.png", encoded())):
            (tmp_path / "f" / name).write_bytes(data)
            tar.add(tmp_path / "f" / name, name)
    for name in ("f", "a.tar"):
        records = open_records([str(tmp_path / name)], pictures_only=True).records()
        assert [any(record.captions.values()) for record in records] == [False, False]
        first = next(iter(open_records([str(tmp_path / name)]).records()))
        assert first.reason == "caption not in UTF-8"


def test_parquet_whose_names_are_not_utf8_is_one_line(tmp_path):
    pytest.importorskip("pyarrow")
    write_parquet(tmp_path / "a.parquet", samples(2))
    damaged = (tmp_path / "a.parquet").read_bytes().replace(b"bytes", b"\xffytes")
    (tmp_path / "a.parquet").write_bytes(damaged)
    with pytest.raises(UserError, match=r"cannot read .*a\.parquet as parquet: 'utf-8' codec"):
        open_records([str(tmp_path / "a.parquet")])


def test_parquet_without_a_column_names_those_that_there_are(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    write_parquet(tmp_path / "a.parquet", samples(2))
    with pytest.raises(UserError, match=r"no column shrt.*did you mean 'short'.*id, short, image"):
        open_records([str(tmp_path / "a.parquet")], columns=["shrt"])
    parquet.write_table(pa.table({"url": ["x"], "text": ["y"]}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"b\.parquet has no column of pictures; .*: url, text"):
        open_records([str(tmp_path / "b.parquet")])
    parquet.write_table(pa.table({"image": [b"x"], "n": [1]}), tmp_path / "c.parquet")
    with pytest.raises(UserError, match="no column of texts; its columns: image, n"):
        open_records([str(tmp_path / "c.parquet")])
    (tmp_path / "d.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match=r"cannot read .*d\.parquet as parquet"):
        open_records([str(tmp_path / "d.parquet")])


def test_rows_without_a_picture_or_caption_are_skipped(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    pictures = [
        {"bytes": encoded(), "path": None},
        {"bytes": None, "path": "a.png"},
        None,
        {"bytes": encoded(), "path": None},
        {"bytes": encoded(), "path": None},
    ]
    table = pa.table({"image": pictures, "text": ["a", "b", "c", " ", None]})
    parquet.write_table(table, tmp_path / "a.parquet")
    found = list(open_records([str(tmp_path / "a.parquet")]).records())
    assert [getattr(r, "reason", "") for r in found] == [
        *("", "picture not in the file", "no picture"),
        *("empty caption", "empty caption"),
    ]


@pytest.mark.parametrize("kind", ["tar", "tar.gz"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.97])
def test_a_truncated_tar_gives_its_whole_samples_and_one_line(tmp_path, kind, share):
    whole = tmp_path / "whole.tar"
    write_tar(whole, samples())
    data = whole.read_bytes()
    end = len(data.rstrip(b"\0"))
    data = gzip.compress(data) if kind == "tar.gz" else data[:end]
    cut = tmp_path / f"cut.{kind}"
    cut.write_bytes(data[: int(share * len(data))])
    found = list(open_records([str(cut)]).records())
    records, last = found[:-1], found[-1]
    expected = list(open_records([str(whole)]).records())
    assert 0 < len(records) < COUNT
    for record, other in zip(records, expected, strict=False):
        assert (record.read(), record.captions) == (other.read(), other.captions)
    assert isinstance(last, Skipped) and last.reason == "damaged tar"
    assert last.detail.count("\n") == 0 and "get the file again" in last.detail


def test_tar_cut_at_every_byte_never_loses_or_invents_a_sample(tmp_path):
    path = tmp_path / "a.tar"
    write_tar(path, samples(3), kind="txt")
    data = path.read_bytes()
    texts = [text for _, _, text, _ in samples(3)]
    end = len(data.rstrip(b"\0"))
    for cut in range(0, end, 97):
        path.write_bytes(data[:cut])
        *records, last = TarRecords([path]).records()
        assert isinstance(last, Skipped)
        assert [r.captions["text"] for r in records] == texts[: len(records)]
        assert all(decode(r.read()) for r in records)


def test_a_tar_with_something_else_in_the_middle_is_reported(tmp_path):
    path = tmp_path / "a.tar"
    write_tar(path, samples())
    data = bytearray(path.read_bytes())
    middle = len(data) // 512 // 2 * 512
    data[middle : middle + 4096] = b"x" * 4096
    path.write_bytes(data)
    *records, last = TarRecords([path]).records()
    assert 3 < len(records) < COUNT and last.reason == "damaged tar"
    (tmp_path / "b.tar").write_bytes(b"no tar at all")
    (only,) = TarRecords([tmp_path / "b.tar"]).records()
    assert only.reason == "damaged tar" and "no tar file" in only.detail


def test_names_of_tar_members(tmp_path):
    def add(tar, name, data):
        info = tarfile.TarInfo(name)
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))

    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT):
        long = "long" * (30 if form == tarfile.USTAR_FORMAT else 60)
        path = tmp_path / f"{form}.tar"
        with tarfile.open(path, "w", format=form) as tar:
            tar.addfile(tarfile.TarInfo("empty"))
            add(tar, "./._a.jpg", b"what macOS leaves behind")
            add(tar, f"{long}/schön.v1.JPG", b"1")
            add(tar, f"{long}/schön.JPG", b"picture")
            add(tar, f"{long}/schön.txt", "\ufeffein\u2028Bild".encode())
            add(tar, f"{long}/schön.short.txt", b"kurz")
            add(tar, "b.txt", b"no picture")
            add(tar, "c.png", b"no caption")
            add(tar, "d.png", b"d")
            add(tar, "d.txt", "schön".encode("latin-1"))
            add(tar, "e.png", b"e")
            add(tar, "e.json", b"[" * 100_000)
            add(tar, "f.png", b"f")
            add(tar, "f.json", json.dumps({"caption": "f \ud800"}).encode())
        first, *damaged, last, no_picture, no_caption = TarRecords([path]).records()
        assert first.captions == {"text": "ein Bild", "short": "kurz"}
        assert first.read() == b"picture" and first.key == f"{form}.tar:{long}/schön"
        assert [r.reason for r in damaged] == ["caption not in UTF-8", "damaged JSON"]
        assert [r.reason for r in (no_picture, no_caption)] == ["no picture", "no caption"]
        assert last.captions == {"caption": "f ?"}


def test_members_that_do_not_follow_each_other(tmp_path, monkeypatch):
    """As in a tar of a folder without --sort=name; a sample twice, and one without its caption."""
    names = ["c.txt", "a.png", "b.png", "x.png", "a.png", "c.png", "a.txt", "b.txt"]
    for suffix, mode in ((".tar", "w"), (".tar.gz", "w:gz")):
        with tarfile.open(tmp_path / f"set{suffix}", mode) as tar:
            for name in names:
                info = tarfile.TarInfo(name)
                info.size = 1
                tar.addfile(info, io.BytesIO(name[:1].encode()))
    source = TarRecords([tmp_path / "set.tar"])

    def found(source):
        return [
            (r.key[-1], r.reason) if isinstance(r, Skipped) else (r.key[-1], r.captions["text"])
            for r in source.records()
        ]

    expected = [("a", "no caption"), ("c", "c"), ("a", "a"), ("b", "b"), ("x", "no caption")]
    assert found(source) == expected and source.count() == 5
    for record in source.records():
        if isinstance(record, Record):
            assert record.read() == record.key[-1].encode()
            assert source.at(record.place).captions == record.captions
    assert [r.key for r in source.records(2)] == [f"set.tar:{name}" for name in "abx"]
    packed = list(TarRecords([tmp_path / "set.tar.gz"]).records())
    assert len(packed) == 8 and "follow each other" in packed[0].detail
    monkeypatch.setattr(tars, "WAITING", 1)
    assert sum(isinstance(r, Record) for r in source.records()) < 3


def test_several_files_and_patterns_are_one_set(tmp_path):
    for k in range(3):
        (tmp_path / f"part{k}").mkdir()
        write_tar(tmp_path / f"part{k}" / "a.tar", samples(2))
    joined = open_records([str(tmp_path / "*" / "a.tar")])
    assert [r.key for r in joined.records()] == [
        f"part{k}/a.tar:set/0{n}" for k in range(3) for n in range(2)
    ]
    listed = open_records([str(tmp_path / f"part{k}" / "a.tar") for k in range(3)])
    assert [r.key for r in listed.records(3)] == [r.key for r in joined.records(3)]
    write_folder(tmp_path / "folder", samples(2))
    both = open_records([str(tmp_path / "part0" / "a.tar"), str(tmp_path / "folder")])
    keys = ["0:a.tar:set/00", "0:a.tar:set/01", "1:00.png", "1:01.png"]
    assert [r.key for r in both.records()] == keys and both.count() == 4
    assert [r.key for r in both.records(3)] == keys[3:]
    third = list(both.records())[2]
    assert both.at(third.place).key == keys[2] and both.at(third.place).read() == third.read()


@pytest.mark.parametrize("name", ["set [a]", "set[0]", "x*?[", "[!b]"])
def test_brackets_in_a_folder_of_a_pattern(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for folder in (name, "set a", "set0"):
        (tmp_path / folder / "b[1]").mkdir(parents=True)
        write_tar(tmp_path / folder / "b[1]" / "1.tar", samples(1))
    patterns = (f"{name}/*/*.tar", f"{name}/b[[]1]/[0-9].tar", f"{name}/b[1]/?.tar")
    for pattern in (*patterns, str(tmp_path / patterns[0])):
        assert is_there(pattern)
        found = open_records([pattern])
        assert found.count() == 1 and found.settings() == open_records([pattern]).settings()
    assert open_records(["set[0-9]/*/1.tar"]).count() == 1
    assert not is_there(f"{name}/[2-9].tar")


def test_class_folders_with_a_template(tmp_path):
    for name in ("tabby_cat", "sea-lion"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(encoded())
        (tmp_path / name / "2.jpg").write_bytes(encoded(kind="JPEG"))
    (tmp_path / "sea-lion" / "2.txt").write_text("a sea lion that swims")
    (tmp_path / "top.png").write_bytes(encoded())
    found = list(open_records([str(tmp_path)], template="a photo of a {}").records())
    assert [r.captions["text"] for r in found if isinstance(r, Record)] == [
        *("a photo of a sea lion", "a sea lion that swims"),
        *("a photo of a tabby cat", "a photo of a tabby cat"),
    ]
    assert [(r.key, r.reason) for r in found if isinstance(r, Skipped)] == [
        ("top.png", "no caption")
    ]
    assert sum(isinstance(r, Skipped) for r in open_records([str(tmp_path)]).records()) == 4
    with pytest.raises(UserError, match=r"put \{\} where the name belongs"):
        open_records([str(tmp_path)], template="a photo")


TERABYTE = 2**40


def test_files_that_do_not_fit_into_memory_are_skipped(tmp_path):
    folder, path = tmp_path / "f", tmp_path / "set.tar"
    write_folder(folder, samples())
    for name in ("03.png", "05.txt"):
        os.truncate(folder / name, TERABYTE)
    for member in ("png", "txt"):
        write_tar(path, samples(1), kind="txt")
        with open(path, "r+b") as file:
            name, data, text, _ = samples(2)[1]
            small = {"png": text.encode(), "txt": data}[member]
            file.seek(1536 + -(-len(samples()[0][1]) // 512) * 512)
            for end, size in ({"png": "txt", "txt": "png"}[member], len(small)), (member, TERABYTE):
                info = tarfile.TarInfo(f"set/{name}.{end}")
                info.size = size
                file.write(info.tobuf())
                file.write(small + bytes(-len(small) % 512) if end != member else b"")
            file.truncate(file.tell() + TERABYTE + 1024)
        found = {r.key: r for r in open_records([str(path)]).records()}
        assert list(found) == ["set.tar:set/00", "set.tar:set/01"]
        if member == "txt":
            assert found["set.tar:set/01"].reason == "caption cannot be read"
        else:
            with pytest.raises(OSError, match="File too large"):
                found["set.tar:set/01"].read()
    records = {r.key: r for r in open_records([str(folder)]).records()}
    assert len(records) == COUNT
    assert records["05.png"].reason == "caption cannot be read"
    with pytest.raises(OSError, match="File too large"):
        records["03.png"].read()
    (folder / "metadata.jsonl").touch()
    os.truncate(folder / "metadata.jsonl", TERABYTE)
    with pytest.raises(UserError, match=r"metadata.jsonl: a line has more than 4 MiB"):
        list(open_records([str(folder)]).records())


def test_large_members_of_a_compressed_tar_are_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(tars, "MAX_BYTES", 1 << 16)
    monkeypatch.setattr(tars, "MOST_LINE", 1 << 10)
    path, (first, second, third) = tmp_path / "set.tar.gz", samples(3)
    first = (first[0], first[1] + bytes(1 << 17), *first[2:])
    write_tar(path, [first, (*second[:2], "a" * 2000, ""), third], kind="txt")
    large, skipped, good = open_records([str(path)]).records()
    for most in (-1, 10):
        with pytest.raises(OSError, match="File too large"):
            large.read(most)
    assert skipped.reason == "caption cannot be read"
    assert (good.captions, good.read()) == ({"text": third[2]}, third[1])
    # A size that no disk has, and nothing after it.
    info = tarfile.TarInfo("set/00.png")
    info.size = 2**80
    path.write_bytes(gzip.compress(info.tobuf(tarfile.GNU_FORMAT) + bytes(1000)))
    [damaged] = open_records([str(path)]).records()
    assert (damaged.reason, damaged.detail[:14]) == ("damaged tar", "it is cut off;")


def test_odd_names_and_lines_in_a_folder(tmp_path):
    def put(name, data=None):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(encoded() if data is None else data)

    put("a.JPG")
    put("a.TXT", b"upper")
    put(unicodedata.normalize("NFD", "schön.png"))
    put(unicodedata.normalize("NFC", "schön.txt"), b"nice")
    put("cut.jfif")
    put("cut.txt", b"jfif")
    put("word.docx")
    put("word.txt", b"not a picture")
    put("sub/b.png")
    put("alone.txt", b"alone")
    os.symlink(tmp_path / "gone.png", tmp_path / "dead.png")
    put("dead.txt", b"dead")
    lines = [
        {"file_name": "sub/../sub/b.png", "text": "one\u2028line", "short": "s", "n": 1},
        {"file_name": str(tmp_path / "sub" / "b.png"), "text": None, "short": "again"},
    ]
    text = "\r\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    put("metadata.jsonl", b"\xef\xbb\xbf" + text.encode() + b'\n{\n{"file_name": "\\ud800"}\n')
    found = list(PictureFolderRecords(tmp_path).records())
    assert {r.key: dict(r.captions) for r in found if isinstance(r, Record)} == {
        "sub/b.png": {"text": "one line", "short": "s"},
        "sub/b.png#1": {"text": "", "short": "again"},
        "a.JPG": {"text": "upper"},
        "cut.jfif": {"text": "jfif"},
        unicodedata.normalize("NFD", "schön.png"): {"text": "nice"},
    }
    assert {r.key: r.reason for r in found if isinstance(r, Skipped)} == {
        "metadata.jsonl, line 3": "damaged line of metadata",
        "metadata.jsonl, line 4": "damaged line of metadata",
        "dead.png": "no such file",
        "word.docx": "not a picture by its name",
    }
    assert PictureFolderRecords(tmp_path).count() == len(found)
    again = [PictureFolderRecords(tmp_path).at(r.place) for r in found if isinstance(r, Record)]
    assert [r.key for r in again] == [r.key for r in found if isinstance(r, Record)]


def test_a_fingerprint_changes_with_the_files(tmp_path):
    write_folder(tmp_path / "f", samples(2))
    before = open_records([str(tmp_path / "f")]).fingerprint()
    assert before == open_records([str(tmp_path / "f")]).fingerprint()
    (tmp_path / "f" / "01.txt").write_text("changed caption")
    assert before != open_records([str(tmp_path / "f")]).fingerprint()


@pytest.mark.parametrize("names", [["f"], ["a.tar", "b.tar"], ["f", "a.tar"]])
def test_copies_on_another_machine_have_one_fingerprint_without_times(names, tmp_path):
    found = []
    for machine in ("one", "other"):
        folder = tmp_path / machine
        folder.mkdir()
        write_folder(folder / "f", samples(2))
        for name in ("a.tar", "b.tar"):
            (folder / name).write_bytes(bytes(1024))
        for path in folder.rglob("*.*"):
            os.utime(path, (1, len(machine)))
        found.append(open_records([str(folder / name) for name in names]))
    one, other = found
    assert one.fingerprint(times=False) == other.fingerprint(times=False)
    assert one.fingerprint() != other.fingerprint()
    path = tmp_path / "other" / names[-1]
    (path / "new.png" if path.is_dir() else path).write_bytes(b"more")
    assert one.fingerprint(times=False) != other.fingerprint(times=False)


# --- what is used -------------------------------------------------------------------------------


def record(**captions):
    return Record("key", captions, lambda: b"")


def test_filter_gives_each_record_one_reason():
    keep = Filter(min_side=100, max_aspect=2, min_caption=3, max_caption=10)
    sizes = [(100, 100), (99, 300), (100, 201), (200, 100), (201, 100)]
    reasons = [getattr(keep.check_size("key", size), "reason", None) for size in sizes]
    narrow = "aspect ratio above 2"
    assert reasons == [None, "a side below 100 pixels", narrow, None, narrow]
    texts = ["four", "to", "a caption too long", ""]
    found = [keep.with_captions(record(text=text), {}) for text in texts]
    assert [getattr(f, "reason", None) for f in found] == [
        *(None, "caption too short", "caption too long", "no caption")
    ]


def test_filter_keeps_the_chosen_columns():
    given = record(text="main", short="s", alt="", other="o")
    assert Filter().with_captions(given, {}).captions == {"text": "main"}
    chosen = Filter().with_captions(given, {"short": 1, "text": 2, "alt": 1}).captions
    assert chosen == {"short": "s", "text": "main"}
    none = Filter().with_captions(given, {"alt": 1})
    assert none.reason == "no caption" and "it has: text, short, other" in none.detail
    assert Filter().with_captions(record(text="", other="o"), {}).reason == "no caption"
    assert Filter(min_caption=2).with_captions(given, {"short": 1, "text": 1}).captions == {
        "text": "main"
    }


def test_captions_are_chosen_by_weight():
    weights = parse_captions(["long=3", "short", "gone=100"])
    assert weights == {"long": 3, "short": 1, "gone": 100}
    draws = (np.arange(1000) + 0.5) / 1000
    texts = {"short": "s", "long": "l"}
    assert Counter(choose_column(texts, weights, draw=d) for d in draws) == {
        "long": 750,
        "short": 250,
    }
    assert choose_column(texts, {}, draw=0.99) == "short"
    for wrong in (["a=0"], ["a=-1"], ["a=x"], ["a=nan"], ["a", "a=2"]):
        with pytest.raises(UserError, match="--captions"):
            parse_captions(wrong)


def test_about_the_share_is_held_out_and_more_stay_held_out():
    keys = [f"{k}.png" for k in range(10_000)]
    small, large = ({k for k in keys if held_out(k, share)} for share in (0.01, 0.1))
    assert 60 < len(small) < 140 and 900 < len(large) < 1100 and small < large
    assert not any(held_out(k, 0) for k in keys) and held_out("\udcff", 1)


def test_memory_of_a_tar_does_not_grow(tmp_path):
    import tracemalloc

    write_tar(tmp_path / "a.tar", list(itertools.islice(itertools.cycle(samples()), 3000)))
    source = TarRecords([tmp_path / "a.tar"])
    tracemalloc.start()
    assert sum(isinstance(r, Record) for r in source.records()) == 3000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 500_000
