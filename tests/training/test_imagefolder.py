"""Reading a person's pictures: captions, skipped files, orientation, and aspect buckets."""

import csv
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlx_snapgen.errors import UserError
from train.data.imagefolder import (
    Example,
    PictureFolder,
    bucket_sizes,
    find_captions,
    fit,
    nearest_bucket,
    read_folder,
    read_picture,
)
from train.data.readers.folder import PictureFolderRecords

BUCKETS = bucket_sizes((128, 128), 32)
EXIF_ORIENTATION = 0x0112


def picture(path, size=(128, 128), color="red"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


def metadata(folder, *entries):
    lines = [e if isinstance(e, str) else json.dumps(e) for e in entries]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def test_captions_from_metadata_and_from_txt(tmp_path):
    for name in ("a.png", "b.jpg", "sub/c.webp", "d.PNG"):
        picture(tmp_path / name)
    metadata(
        tmp_path,
        {"file_name": "a.png", "text": "a red\n square "},
        "",
        {"file_name": "sub/c.webp", "caption": "another", "more": 1},
    )
    (tmp_path / "a.txt").write_text("not this one: the metadata tell")
    (tmp_path / "b.txt").write_text("\ufeffein schönes Bild\n", encoding="utf-8")
    (tmp_path / "d.txt").write_text("d")
    examples, skipped = read_folder(tmp_path, BUCKETS)
    assert [(e.path.name, e.caption) for e in examples] == [
        ("a.png", "a red square"),
        ("b.jpg", "ein schönes Bild"),
        ("d.PNG", "d"),
        ("c.webp", "another"),
    ]
    assert skipped == []
    assert all(e.pixels.shape == (128, 128, 3) and e.pixels.dtype == np.uint8 for e in examples)


def test_a_picture_with_two_captions_comes_twice(tmp_path):
    picture(tmp_path / "a.png")
    metadata(tmp_path, *({"file_name": "a.png", "text": t} for t in ("one", "two")))
    assert [caption for _, caption in find_captions(tmp_path)[0]] == ["one", "two"]


def test_unusable_files_are_skipped_and_reported(tmp_path):
    picture(tmp_path / "good.png")
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "noise.png").write_bytes(b"no picture at all")
    picture(tmp_path / "cut.jpg", (400, 400))
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:700])
    (tmp_path / "photo.heic").write_bytes(b"ftypheic")
    picture(tmp_path / "silent.png")
    picture(tmp_path / "blank.png")
    (tmp_path / "blank.txt").write_text(" \n")
    picture(tmp_path / "latin.png")
    (tmp_path / "latin.txt").write_bytes("schön".encode("latin-1"))
    for name in ("noise", "cut", "photo"):
        (tmp_path / f"{name}.txt").write_text(name)
    (tmp_path / "._good.png").write_bytes(b"what macOS leaves behind")
    picture(tmp_path / ".hidden" / "x.png")
    (tmp_path / "notes.md").write_text("no picture")
    metadata(tmp_path, {"file_name": "gone.png", "text": "gone"})
    examples, skipped = read_folder(tmp_path, BUCKETS)
    assert [e.path.name for e in examples] == ["good.png"]
    told = {line.split(": ")[0].rsplit("/", 1)[1]: line for line in skipped}
    assert set(told) == {
        *("noise.png", "cut.jpg", "photo.heic"),
        *("silent.png", "blank.png", "latin.png", "gone.png"),
    }
    assert len(skipped) == len(told) and not any("\n" in line for line in skipped)
    assert "not a picture" in told["noise.png"] and "cannot be read" in told["cut.jpg"]
    assert "no caption" in told["silent.png"] and "empty caption" in told["blank.png"]


def test_an_empty_set_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no folder"):
        read_folder(tmp_path / "nowhere", BUCKETS)
    with pytest.raises(UserError, match="no picture with a caption"):
        read_folder(tmp_path, BUCKETS)
    (tmp_path / "noise.png").write_bytes(b"no picture at all")
    (tmp_path / "noise.txt").write_text("noise")
    with pytest.raises(UserError, match="1 skipped, such as "):
        read_folder(tmp_path, BUCKETS)


@pytest.mark.parametrize(
    "line",
    ["{", "[]", "3", '{"text": "a"}', "[" * 100_000, '{"file_name": 1, "text": "a"}'],
)
def test_a_damaged_line_of_metadata_is_skipped(tmp_path, line):
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    metadata(tmp_path, {"file_name": "a.png", "text": "fine"}, line)
    examples, skipped = read_folder(tmp_path, BUCKETS)
    assert [e.caption for e in examples] == ["fine"]
    assert any("metadata.jsonl, line 2: expected" in text for text in skipped)


def test_pictures_stand_as_their_exif_tag_says(tmp_path):
    image = Image.new("RGB", (60, 40), "white")
    image.paste("red", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6  # to be turned a quarter clockwise
    image.save(tmp_path / "a.png", exif=exif)
    turned = read_picture(tmp_path / "a.png")
    assert turned.size == (40, 60)
    assert turned.getpixel((35, 5)) == (255, 0, 0) and turned.getpixel((5, 5)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_becomes_white(tmp_path, mode):
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (4, 0, 8, 8))
    image.convert(mode).save(tmp_path / "a.png")
    shown = read_picture(tmp_path / "a.png")
    assert shown.mode == "RGB"
    assert shown.getpixel((1, 1)) == (255, 255, 255) and shown.getpixel((6, 1)) == (0, 0, 0)


def test_half_transparent_is_mixed_with_white_and_other_modes_become_rgb(tmp_path):
    Image.new("RGBA", (4, 4), (0, 0, 0, 128)).save(tmp_path / "a.png")
    assert read_picture(tmp_path / "a.png").getpixel((1, 1)) == (127, 127, 127)
    deep = np.full((4, 4), 0x80FF, np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert read_picture(tmp_path / "deep.png").getpixel((1, 1)) == (128, 128, 128)
    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(tmp_path / "c.jpg")
    assert np.allclose(read_picture(tmp_path / "c.jpg").getpixel((1, 1)), (254, 0, 0), atol=3)


@pytest.mark.parametrize("size", [(128, 128), (1024, 1024), (32, 64), (96, 160)])
def test_buckets_have_about_the_models_pixels_and_sides_it_takes(size):
    buckets = bucket_sizes(size, 32)
    assert size in buckets and size[::-1] in buckets and len(buckets) == len(set(buckets)) <= 17
    for height, width in buckets:
        assert height % 32 == width % 32 == 0
        assert 0.75 * size[0] * size[1] < height * width <= size[0] * size[1]
        assert abs(math.log(width / height)) <= math.log(4) + 0.1


@pytest.mark.parametrize(
    ("size", "bucket"),
    [
        ((500, 480), (128, 128)),
        ((400, 300), (96, 160)),
        ((500, 400), (128, 128)),
        ((1600, 900), (96, 160)),
        ((900, 1600), (160, 96)),
        ((900, 90), (64, 256)),
        ((20, 90), (256, 64)),
    ],
)
def test_each_picture_gets_the_bucket_nearest_in_shape(size, bucket):
    assert nearest_bucket(Image.new("RGB", size), BUCKETS) == bucket


def test_pictures_are_cropped_in_the_middle_and_not_stretched():
    image = Image.new("RGB", (400, 200), "white")
    image.paste("red", (0, 0, 60, 200))
    image.paste("blue", (190, 90, 210, 110))
    pixels = fit(image, (100, 100))
    assert pixels.shape == (100, 100, 3)
    assert not (pixels[:, :, 1] < 100)[:40].any()  # the red edge is cut away
    blue = np.argwhere(pixels[..., 0] < 128)
    assert (blue.min(0) == [45, 45]).all() and (blue.max(0) == [54, 54]).all()
    small = fit(Image.new("RGB", (3, 2), "red"), (64, 128))
    assert small.shape == (64, 128, 3) and (small == [255, 0, 0]).all()


def test_mirror_images_are_turned_left_to_right():
    pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    folder = PictureFolder([Example(Path("a.png"), "a", pixels)], flip=True)
    plain, mirrored = (example.pixels for example in folder.buckets[0])
    assert (plain == pixels).all() and (mirrored == np.fliplr(pixels)).all()


def test_a_table_of_metadata_is_read_like_its_lines(tmp_path):
    """Also with a byte-order mark, other ends of lines, and line breaks in a cell."""
    rows = [
        {"file_name": "a.png", "tags": "x, y", "text": 'a "red" car'},
        {"file_name": "sub/b.png", "tags": "", "text": "two\nlines"},
        {"file_name": "a.png", "tags": "z", "text": "the car again, ü"},
        {"file_name": "none.png", "tags": "z", "text": "not there"},
    ]
    for name in ("lines", "table"):
        (tmp_path / name / "sub").mkdir(parents=True)
        for picture in ("a.png", "sub/b.png", "c.png"):
            (tmp_path / name / picture).touch()
        (tmp_path / name / "c.txt").write_text("beside it")
    text = "\n".join(map(json.dumps, rows))
    (tmp_path / "lines" / "metadata.jsonl").write_text(text)
    with open(tmp_path / "table" / "metadata.csv", "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)

    def found(name):
        records = list(PictureFolderRecords(tmp_path / name).records())
        return [(r.key, getattr(r, "captions", None) or r.reason) for r in records]

    assert found("table") == found("lines")
    assert found("table")[2] == ("a.png#1", {"text": "the car again, ü", "tags": "z"})
    assert found("table")[-1] == ("c.png", {"text": "beside it"})
    (tmp_path / "table" / "metadata.jsonl").write_text(json.dumps(rows[0]))
    assert [key for key, _ in found("table")][:2] == ["a.png", "c.png"]


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("metadata.csv", "id;text\n1;cat\n2;dog\n", "file_name and text, got .* id;text$"),
        ("metadata.csv", b"\xff\xfe", "file_name and text, got no table$"),
        ("metadata.csv", "file_name,text\na.png\n", "expected the columns .* text, got a.png$"),
        ("metadata.jsonl", '{"image": "a.png", "text": "a"}', "got the columns image, text$"),
    ],
)
def test_metadata_of_other_columns_names_them(name, text, line, tmp_path):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    (tmp_path / "a.png").touch()
    (tmp_path / "a.txt").write_text("a cat")
    captions, skipped = find_captions(tmp_path)
    assert captions == [(tmp_path / "a.png", "a cat")]
    assert len(skipped) == 1 and re.search(line, skipped[0]), skipped


def test_a_line_with_another_column_of_captions_names_it(tmp_path):
    lines = [{"file_name": "a.png", "text": "a"}, {"file_name": "b.png", "about": "b"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for line in lines:
        (tmp_path / line["file_name"]).touch()
    assert find_captions(tmp_path)[1] == [f"{tmp_path / 'b.png'}: no text; it has: about"]
