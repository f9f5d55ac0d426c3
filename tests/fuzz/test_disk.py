"""Every writer on a disk that gets full or read-only: one line, and what was there before stays."""

import contextlib
import subprocess
import sys
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

import train.new
import train.stickers
import train.tokenizer
from apps.desktop.history import History
from apps.desktop.settings import Settings, save_settings
from convert import from_torch
from mlx_snapgen.checkpoint.model import save_pretrained
from mlx_snapgen.errors import MOST_CHARACTERS, run_command
from mlx_snapgen.files import new_folder, unlock_folder
from mlx_snapgen.lora.files import save_lora
from mlx_snapgen.metadata import save_picture
from mlx_snapgen.quantize.palettes import Palettes, palettes_file
from tests import tiny
from tests.fuzz.loaders import write_prepared
from tests.training.test_prepare import write_pictures
from train.data.stickers.render import write_imagefolder
from train.data.stickers.scenes import training_scene
from train.evaluation.previews import Previews
from train.loop.checkpoint import append_log, save_checkpoint, writing
from train.loop.plot import plot_log
from train.loop.run import claim

SIZE = "16m"


@pytest.fixture(scope="module")
def given(tmp_path_factory, model_folder):
    """What commands read, on another disk."""
    folder = tmp_path_factory.mktemp("given")
    (folder / "spm.model").write_bytes(tiny.tokenizer_bytes())
    network = tiny.make_components().transformer
    tiny.add_random_lora(network, rank=64)
    save_lora(folder / "lora.safetensors", network, name="style")
    return SimpleNamespace(
        model=model_folder,
        lora=folder / "lora.safetensors",
        network=network,
        pictures=write_pictures(folder / "pictures", 6),
        tokenizer=folder / "spm.model",
        components=tiny.make_components(),
    )


def command(main, *options):
    sys.argv = ["command", *map(str, options)]
    main()


def picture(k):
    return Image.fromarray(np.random.default_rng(k).integers(0, 255, (99, 99, 3), np.uint8))


def write_new(folder, k, given):
    sizes = ("--preset", given.model, "--autoencoder", given.model, "--tokenizer", given.tokenizer)
    command(train.new.main, *sizes, "-o", folder / f"{k}")


def write_model_with_palettes(folder, k, given):
    palettes = Palettes(4.0, {"head.linear": 4}, {"head.linear": 0.1}, ["a red apple"], ["full"])
    save_pretrained(folder / f"{k}", given.components, texts=palettes_file(palettes))


def write_run(folder, k, given):
    tree = {"layer": {"weight": mx.full((99, 99), k)}}
    trees = {name: tree for name in ("model", "ema", "optimizer")}
    with writing(folder):
        save_checkpoint(folder, trees, state={"step": k, "training": {}}, keep=0)
        append_log(folder, {"step": k, "loss": 0.5})


def write_settings(folder, k, given):
    try:
        claim(folder, {"data": [k] * 9999})
    finally:
        unlock_folder(folder)


def write_plot(folder, k, given):
    tiny.require("matplotlib")
    if k == 1:
        append_log(folder, {"step": 1, "loss": 0.5})
    with writing(folder):
        plot_log(folder)


def write_previews(folder, k, given):
    trainer = SimpleNamespace(
        averaged=contextlib.nullcontext, sample_path=lambda name: folder / f"{k}.png"
    )
    with writing(folder):
        Previews(given.components, ["a red apple"], widths=["tiny"])(trainer)


def write_chunk(folder, k, given):
    (folder / f"{k}" / "shards").mkdir(parents=True, exist_ok=True)
    write_prepared(folder / f"{k}")


def write_package(folder, k, given):
    """As convert.coreml writes its packages."""
    with new_folder(folder / f"{k}") as partial:
        for i in range(9):
            (partial / f"{i}.bin").write_bytes(bytes(9999))


WRITERS = {
    "train.new": write_new,
    "train.tokenizer": lambda folder, k, given: command(
        train.tokenizer.main,
        *("--data", given.pictures, "--vocab-size", 64, "-o", folder / f"{k}.model"),
    ),
    "train.stickers": lambda folder, k, given: command(
        train.stickers.main, *("--count", 2, "--seed", k, "-o", folder / f"{k}.png")
    ),
    "pictures of stickers": lambda folder, k, given: write_imagefolder(
        folder / f"{k}", [training_scene(0, 0)]
    ),
    "prepared set": write_chunk,
    "model with palettes": write_model_with_palettes,
    "run": write_run,
    "settings of a run": write_settings,
    "plot": write_plot,
    "previews": write_previews,
    "Core ML packages": write_package,
    "convert.from_torch": lambda folder, k, given: command(
        from_torch.main, given.lora, "--kind", "lora", "-o", folder / f"{k}.safetensors"
    ),
    "LoRA": lambda folder, k, given: save_lora(
        folder / f"{k}.safetensors", given.network, name="style"
    ),
    "picture": lambda folder, k, given: save_picture(picture(k), folder / "a.png"),
    "history of the window": lambda folder, k, given: History(folder, limit=1).add(
        "a", picture(k).tobytes()
    ),
    "settings of the window": lambda folder, k, given: save_settings(
        folder / "settings.json", Settings(draw=Settings().draw)
    ),
}
MAY_SUCCEED = {"settings of the window"}
"""Where some bytes are left in the last page of a full disk."""


def contents(folder):
    """The files, without those of a conversion that resumes."""
    found = {p.relative_to(folder): p for p in folder.rglob("*") if p.is_file()}
    return {str(name): p.read_bytes() for name, p in found.items() if str(name)[0] != "."}


@pytest.mark.parametrize("how", ["full", "read-only"])
@pytest.mark.parametrize("name", WRITERS)
def test_a_writer_ends_in_one_line_and_leaves_the_last_good_state(
    name, how, given, disk, font, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", sys.argv)
    folder = disk(SIZE)
    (work := folder / "work").mkdir()
    WRITERS[name](work, 1, given)
    if how == "full":
        filler = open(folder / "filler", "wb", buffering=0)  # noqa: SIM115
        with filler, pytest.raises(OSError, match="No space"):
            while True:
                filler.write(bytes(4096))
    else:
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    before = contents(work)
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: WRITERS[name](work, 2, given))
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    if ended.value.code == 0:
        assert how == "full" and name in MAY_SUCCEED
        return
    assert ended.value.code == 2
    (line,) = errors
    assert len(line) <= MOST_CHARACTERS + len("error: ") and str(folder) in line
    assert contents(work) == before
    if how == "full":
        (folder / "filler").unlink()
        WRITERS[name](work, 2, given)
        assert not list(work.rglob(".*"))
