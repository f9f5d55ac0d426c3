"""Settings in text chunks of PNG files, wherever other programs put them."""

import json
import struct
import zlib

import huggingface_hub.errors
import pytest
from PIL import Image

from mlx_snapgen.errors import UserError
from mlx_snapgen.generate import main
from mlx_snapgen.metadata import (
    MAX_PIXELS,
    MAX_TEXT,
    encode_png,
    foreign,
    read_metadata,
    read_settings,
    record_choice,
    record_settings,
    save_picture,
)
from mlx_snapgen.settings import BUILT_IN, DrawSettings, ModelChoice
from tests.tiny import MODEL

VALUES = {"mlx_snapgen": "1", "prompt": "a red apple, café 蘋果"}
PLAIN = encode_png(Image.new("RGB", (8, 8)))
TEXT = json.dumps(VALUES, ensure_ascii=False).encode()
ASCII = json.dumps(VALUES).encode()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


CHUNKS = {
    "tEXt": chunk(b"tEXt", b"parameters\0" + ASCII),
    "zTXt": chunk(b"zTXt", b"parameters\0\0" + zlib.compress(ASCII)),
    "iTXt": chunk(b"iTXt", b"parameters\0\0\0en\0Parameter\0" + TEXT),
    "compressed iTXt": chunk(b"iTXt", b"parameters\0\1\0\0\0" + zlib.compress(TEXT)),
}


def before(data):
    """A PNG with a chunk before its pixels."""
    return PLAIN[:33] + data + PLAIN[33:]


def after(data):
    return PLAIN[:-12] + data + PLAIN[-12:]


@pytest.mark.parametrize("place", [before, after])
@pytest.mark.parametrize("kind", CHUNKS)
def test_every_kind_of_chunk_is_read(tmp_path, kind, place):
    path = tmp_path / "a.png"
    comment = chunk(b"tEXt", b"Comment\0" + bytes(10))
    path.write_bytes(place(comment + CHUNKS[kind] + comment))
    Image.open(path).load()
    assert read_metadata(path) == VALUES


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (chunk(b"zTXt", b"parameters\0\0" + zlib.compress(bytes(MAX_TEXT + 1))), "larger than"),
        (chunk(b"tEXt", b"parameters\0" + bytes(MAX_TEXT + 1)), "larger than"),
        (struct.pack(">I", 2**31 - 1) + b"tEXtparameters\0{", "damaged"),
        (chunk(b"zTXt", b"parameters\0\0x"), "damaged"),
        (CHUNKS["tEXt"][:-1] + b"?", "damaged"),
        (chunk(b"iTXt", b"parameters\0\0"), "another program"),
        (chunk(b"iTXt", b"parameters\0\0\0\0\0\xff"), "readable"),
        (chunk(b"tEXt", b"parameters\0" + b"[" * 100_000), "another program"),
    ],
)
def test_damaged_chunks_are_one_line(tmp_path, data, words):
    path = tmp_path / "a.png"
    path.write_bytes(after(data))
    with pytest.raises(UserError, match=words) as error:
        read_settings(path)
    assert len(str(error.value)) < 300 and "\n" not in str(error.value)


# --- settings of strangers ----------------------------------------------------------------------

GOOD = {"mlx_snapgen": "0.1.0", "prompt": "two owls", "negative_prompt": "", "seed": 4,
        "num_inference_steps": 6, "guidance_scale": 2.0, "height": 128, "width": 96,
        "model": None, "revision": None, "model_width": "tiny", "quantize": 8, "loras": [],
        "text_encoders": None}  # fmt: skip


def stored(folder, **values):
    """A picture with settings, some of them changed."""
    return save_picture(Image.new("RGB", (8, 8)), folder / "a.png", metadata=GOOD | values)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", -1),
        ("seed", 2**63),
        ("height", 0),
        ("height", 10**30),
        ("width", -32),
        ("num_inference_steps", 0),
        ("num_inference_steps", 1001),
        ("guidance_scale", 1e300),
        ("guidance_scale", 10**400),
        ("guidance_scale", float("nan")),
        ("guidance_scale", float("inf")),
        ("quantize", 99),
        ("model_width", "huge"),
        ("prompt", "x" * 10_001),
        ("prompt", "\ud800"),
        ("negative_prompt", "\udfff"),
        ("model", "x" * 1001),
        ("model", "owner/na\nme"),
        ("revision", "\x1b[2J"),
        ("loras", [{"path": "x", "weight": 1e300}]),
        ("loras", [{"path": "x\0", "weight": 1.0}]),
        ("loras", [{"path": "x", "weight": 1.0}] * 65),
        ("text_encoders", ["x" * 1001]),
        ("dtype", []),
        ("device", {"type": "cpu"}),
        ("mlx", 1),
    ],
)
def test_values_out_of_range_are_refused(tmp_path, name, value):
    path = tmp_path / "a.png"
    data = json.dumps(GOOD | {name: value}).encode()
    path.write_bytes(before(chunk(b"tEXt", b"parameters\0" + data)))
    with pytest.raises(UserError, match=f"no usable '{name}'"):
        read_settings(path)


def test_settings_may_not_ask_for_huge_pictures(tmp_path, model_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    side = int(MAX_PIXELS**0.5)
    assert read_settings(stored(tmp_path, height=side, width=side)).settings.height == side
    path = stored(tmp_path, height=side + 32, width=side, model_width="full", quantize=None)
    with pytest.raises(UserError, match="choose both height and width yourself"):
        read_settings(path)
    again = ["--config-from-image", str(path), "--model", str(model_folder), "--steps", "1"]
    with pytest.raises(UserError, match="choose both"):
        main([*again, "--height", "32"])
    main([*again, "--height", "32", "--width", "64", "-o", "small.png"])
    assert read_metadata("small.png")["prompt"] == "two owls"


def test_the_model_of_a_stranger_is_not_fetched_unasked(tmp_path, monkeypatch):
    asked = []

    def download(repo, **_):
        asked.append(repo)
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network in tests")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    for values, words in (
        ({"model": "owner/other"}, "with the model owner/other:"),
        ({"model": "owner/other", "revision": "a" * 40}, f"revision {'a' * 12}:"),
        ({"loras": [{"path": "/their/style.safetensors", "weight": 1}]}, "the LoRA /their/style"),
    ):
        path = str(stored(tmp_path, **values))
        with pytest.raises(UserError, match=words) as error:
            main(["--config-from-image", path])
        assert "--trust-settings" in str(error.value)
    assert asked == []
    path = str(stored(tmp_path, model="owner/other"))
    with pytest.raises(UserError, match="cannot be fetched"):
        main(["--config-from-image", path, "--trust-settings"])
    assert set(asked) == {"owner/other"}


def test_a_picture_of_an_earlier_built_in_model_names_it(tmp_path):
    settings = DrawSettings("a red apple", height=128, width=128, seed=3).resolved(MODEL)
    for number, (name, model) in enumerate({"stickers": "stickers", BUILT_IN: None}.items()):
        values = {"mlx_snapgen": "1", "model_name": name}
        values |= record_settings(settings) | record_choice(ModelChoice())
        path = tmp_path / f"{number}.png"
        save_picture(Image.new("RGB", (8, 8)), path, metadata=values)
        choice = read_settings(path).choice
        assert choice.model == model
        assert foreign(choice, ModelChoice()) == (f"the model {name}" if model else "")


def test_foreign_names_what_is_not_in_use():
    used = ModelChoice("owner/name", loras=(("a.safetensors", 1.0),))
    assert foreign(used, used) == ""
    assert foreign(ModelChoice("owner/name", loras=(("a.safetensors", 0.5),)), used) == ""
    assert foreign(ModelChoice(), used) == f"the model {BUILT_IN}"
    assert foreign(ModelChoice("owner/name", "main"), used) == "revision main"
    loras = tuple((f"{n}.safetensors", 1.0) for n in range(60))
    assert len(foreign(ModelChoice("owner/name", loras=loras), used)) == 200
