"""`train.evaluate` on pictures, and on the prompts of GenEval and DPG-Bench."""

import dataclasses
import errno
import functools
import io
import itertools
import json
import os
import shutil
from importlib.util import find_spec
from types import SimpleNamespace

import mlx_snapgen  # noqa: F401

# isort: split
import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlx_snapgen.checkpoint.clip_towers import load_clip_towers
from mlx_snapgen.checkpoint.model import load_pretrained
from mlx_snapgen.draw import draw_pictures
from mlx_snapgen.errors import UserError
from mlx_snapgen.pictures import to_uint8
from mlx_snapgen.pipeline import SnapGenPipeline
from mlx_snapgen.sampling import get_noise
from mlx_snapgen.settings import DrawSettings
from mlx_snapgen.teachers.config import LIGHTNING
from mlx_snapgen.teachers.folder import load_flow_teacher, load_network
from tests.runtime.test_clip_towers import make_towers, some_pictures, write_folder
from tests.tiny import TEACHER, write_lightning_lora, write_teacher
from train import evaluate
from train.data.encoded import as_latents
from train.data.open import open_data
from train.data.prepared import Prepared
from train.data.source import Samples
from train.data.stickers import render
from train.data.stickers.source import Stickers
from train.evaluation import measures, validation
from train.evaluation.clip_measures import clip_score, cmmd, embed_pictures, embed_texts
from train.evaluation.measures import MeasuredRow, table
from train.evaluation.validation import flow_losses, held_out_batches, sample_seed

CAPTIONS = ["a red apple", "a blue car", "a cat", "an ice cream cone", "a green cat"]


@pytest.fixture(autouse=True)
def no_font(monkeypatch):
    """None of these commands needs the font of the stickers."""

    def fail(*_):
        raise AssertionError("the font was looked for")

    monkeypatch.setattr(render, "find_font", fail)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("clip") / "clip", make_towers())


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for i, picture in enumerate(some_pictures(*[(32, 64)] * 3, (64, 32), (70, 40))):
        Image.fromarray(picture).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(CAPTIONS[i])
    return folder


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["evaluate", *map(str, arguments)])
    evaluate.main()


FAST = ("--steps", 1, "--guidance", 1)


def test_table_leaves_out_what_is_not_measured():
    rows = [MeasuredRow("full", [0.5, 0.7]), MeasuredRow("tiny", [1.0, 2.0])]
    assert table(rows).splitlines() == [
        "|  | validation loss |",
        "| --- | ---: |",
        "| full | 0.6000 |",
        "| tiny | 1.5000 |",
    ]
    rows = [
        MeasuredRow("full", [0.5], 23.456, 0.1234, 1.0),
        MeasuredRow("held-out pictures", None, 30.0),
    ]
    assert table(rows).splitlines()[2:] == [
        "| full | 0.5000 | 23.46 | 0.123 | 1.00 |",
        "| held-out pictures |  | 30.00 |  |  |",
    ]


def test_measures_on_a_folder_of_pictures(
    model_folder, pictures, clip_folder, tmp_path, monkeypatch, capsys
):
    output = tmp_path / "out"
    # Each batch takes a second.
    clock = SimpleNamespace(perf_counter=functools.partial(next, itertools.count()))
    monkeypatch.setattr(measures, "time", clock)
    arguments = ["--model", model_folder, "--data", pictures, "--clip", clip_folder, *FAST]
    arguments += ["--model-widths", "full", "tiny", "--batch-size", 2, "--output", output]
    run(monkeypatch, *arguments)
    said = capsys.readouterr()
    assert said.out == (output / "table.md").read_text()
    assert "warning: the data keeps no pictures for validation" in said.err
    assert "5 pictures, compared with decoded latents" in said.err
    results = json.loads((output / "results.json").read_text())
    assert results["pictures"] == 5 and results["held_out_pictures"] == "decoded latents"
    assert results["noise_levels"][0] == 0.0625
    assert [row["name"] for row in results["rows"]] == ["full", "tiny", "training pictures"]
    assert results["settings"]["clip"] == str(clip_folder)
    plots = ["losses.png"] * bool(find_spec("matplotlib"))
    for name in ("sheet.png", *plots):
        assert Image.open(output / name).width > 100
    for row in results["rows"][:2]:
        assert row["cmmd"] > 0 and 0 <= row["clip_score"] <= 100
        assert len(row["validation_losses"]) == 8
        assert row["seconds_per_picture"] == pytest.approx(3 / 5)
    assert results["rows"][2]["clip_score"] > 0
    with pytest.raises(UserError, match="exists"):
        run(monkeypatch, *arguments)


def test_measures_on_several_folders(model_folder, pictures, tmp_path, monkeypatch, capsys):
    """The same pictures with any batch size."""
    other = tmp_path / "other"
    shutil.copytree(pictures, other)
    losses = []
    for size in (1, 4):
        arguments = ["--model", model_folder, "--data", pictures, other, *FAST]
        arguments += ["--model-widths", "tiny", "--batch-size", size, "--pictures", 5]
        run(monkeypatch, *arguments, "--output", tmp_path / str(size))
        assert "5 pictures;" in capsys.readouterr().err
        (row,) = json.loads((tmp_path / str(size) / "results.json").read_text())["rows"]
        losses.append(row["validation_losses"])
    np.testing.assert_allclose(*losses, rtol=1e-4)


class Held(Prepared):
    """A set with a part for validation, opened instead of --data."""

    def __init__(self):
        rng, self.counts = np.random.default_rng(0), [len(CAPTIONS)]
        self.latents = rng.normal(size=(5, 4, 8, 4)).astype(np.float32)

    def validation(self):
        return self

    def check_autoencoder(self, autoencoder):
        self.checked = autoencoder.config

    def check_text_states(self, configs):
        self.encoders = configs

    def check_files(self):
        pass

    def batches(self, count, *, most=5):
        for k in range(0, most, count):
            rows = slice(k, min(k + count, most))
            yield Samples(mx.array(self.latents[rows]), CAPTIONS[rows])


def test_numbers_are_those_of_their_parts(model_folder, clip_folder, tmp_path, monkeypatch, capsys):
    part = Held()
    monkeypatch.setattr(evaluate, "data_from", lambda *_, **__: part)
    arguments = ["--model", model_folder, "--data", "x", "--clip", clip_folder, *FAST]
    arguments += ["--model-widths", "tiny", "--seed", 7, "--pictures", 4, "--batch-size", 3]
    run(monkeypatch, *arguments, "--output", tmp_path / "out")
    assert "warning" not in capsys.readouterr().err
    tiny, held_out = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    model, clip = load_pretrained(model_folder), load_clip_towers(clip_folder)
    assert part.checked == model.autoencoder.config
    assert part.encoders == model.config.text_encoders
    batches = [*part.batches(4)][:1]
    losses = flow_losses(model.transformer, model.text_encoders, batches=batches, shares=[0.375])
    np.testing.assert_allclose(tiny["validation_losses"], losses[0.375], rtol=1e-4)
    real = to_uint8(model.autoencoder.decode(batches[0].latents))
    settings = DrawSettings(num_inference_steps=1, guidance_scale=1.0)
    drawn = draw_pictures(model, CAPTIONS[:4], seeds=[7, 8, 9, 10], settings=settings, share=0.375)
    x, y = (embed_pictures(clip, list(p)) for p in (drawn, real))
    texts = embed_texts(clip, CAPTIONS[:4])
    assert tiny["clip_score"] == pytest.approx(clip_score(x, texts), rel=1e-2)
    assert tiny["cmmd"] == pytest.approx(cmmd(x, y), rel=1e-2)
    assert held_out["clip_score"] == pytest.approx(clip_score(y, texts), rel=1e-2)


def test_the_bar_counts_the_pictures_of_a_folder(components, pictures, monkeypatch):
    totals = []
    monkeypatch.setattr(
        validation, "tqdm", lambda total, **_: totals.append(total) or io.StringIO()
    )
    for source in (open_data([str(pictures)], size=(64, 64), unit=32, seed=0), Stickers(0, 20)):
        for most in (3, 256):
            encoded = as_latents(source, components.autoencoder)
            monkeypatch.setattr(encoded, "batches", lambda *_, **__: [])
            held_out_batches(encoded, most)
    assert totals == [3, len(CAPTIONS), 3, 256]


def test_without_a_clip_only_the_loss_is_measured_and_prompts_make_the_sheet(
    model_folder, pictures, tmp_path, monkeypatch, capsys
):
    (tmp_path / "prompts.txt").write_text("# two\na cat\na red car\n")
    output = tmp_path / "out"
    arguments = ["--model", model_folder, "--data", pictures, *FAST, "--output", output]
    run(monkeypatch, *arguments, "--prompts-file", tmp_path / "prompts.txt")
    said = capsys.readouterr()
    assert said.out.splitlines()[0] == "|  | validation loss |"
    assert "with --clip also CLIP score and CMMD" in said.err
    # Three rows of widths with two pictures of 64 x 32 each.
    assert Image.open(output / "sheet.png").width == 2 * (64 + 6)


def test_a_full_disk_says_what_to_do(model_folder, pictures, tmp_path, monkeypatch):
    def full(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(measures, "whole_file", full)
    arguments = ["--model", model_folder, "--data", pictures, *FAST, "--model-widths", "tiny"]
    with pytest.raises(UserError, match=r"out \(No space left .*: run the same command again"):
        run(monkeypatch, *arguments, "--output", tmp_path / "out")


def test_an_interrupted_output_is_written_again_and_a_complete_one_refused(
    model_folder, pictures, tmp_path, monkeypatch, capsys
):
    output = tmp_path / "out"
    arguments = ["--model", model_folder, "--data", pictures, *FAST, "--output", output]

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(measures, "contact_sheet", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(monkeypatch, *arguments)
    assert f"{output}: run the same command again to start over" in capsys.readouterr().err
    (output / "small.png").write_bytes(b"of a wider model")
    (output / "mine.txt").write_text("stays")
    run(monkeypatch, *arguments, "--model-widths", "tiny")
    (row,) = json.loads((output / "results.json").read_text())["rows"]
    assert row["name"] == "tiny"
    assert (output / "sheet.png").is_file() and (output / "mine.txt").is_file()
    assert not (output / "small.png").exists()
    with pytest.raises(UserError, match="exists"):
        run(monkeypatch, *arguments)


def test_geneval_and_dpg_are_drawn_and_resumed(model_folder, tmp_path, monkeypatch, capsys):
    line = {"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": "a cat"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(line) + "\n")
    output = tmp_path / "geneval"
    arguments = ["--model", model_folder, *FAST, "--geneval", tmp_path / "metadata.jsonl"]
    run(monkeypatch, *arguments, "--output", output, "--per-prompt", 2)
    assert "evaluate_images.py" in capsys.readouterr().out
    assert json.loads((output / "00000" / "metadata.jsonl").read_text()) == line
    assert Image.open(output / "00000" / "samples" / "0001.png").size == (64, 32)
    (output / "00000" / "samples" / "0001.png").unlink()
    run(monkeypatch, *arguments, "--output", output, "--per-prompt", 2)
    assert (output / "00000" / "samples" / "0001.png").exists()
    with pytest.raises(UserError, match="pictures with other --seed"):
        run(monkeypatch, *arguments, "--output", output, "--seed", 3)
    (tmp_path / "metadata.jsonl").write_text(json.dumps(line | {"prompt": "a dog"}) + "\n")
    with pytest.raises(UserError, match="pictures with other prompts"):
        run(monkeypatch, *arguments, "--output", output)
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "1.txt").write_text("a cat")
    # The size of the options is drawn, also by a model that was trained on another one.
    trained = shutil.copytree(model_folder, tmp_path / "trained")
    config = json.loads((trained / "config.json").read_text())
    (trained / "config.json").write_text(json.dumps(config | {"trained_sizes": [[32, 64]]}))
    arguments = ["--model", trained, *FAST, "--dpg", tmp_path / "prompts"]
    with pytest.raises(UserError, match="reads squares"):
        run(monkeypatch, *arguments, "--output", tmp_path / "dpg")
    assert not (tmp_path / "dpg").exists()
    run(monkeypatch, *arguments, "--output", tmp_path / "dpg", "--height", 32, "--width", 32)
    assert Image.open(tmp_path / "dpg" / "images" / "1.png").size == (64, 64)
    assert "images 32" in capsys.readouterr().out


def test_a_public_model_is_measured(clip_folder, no_language_model, tmp_path, monkeypatch, capsys):
    """Its losses are those of its velocity; its pictures those of `SnapGenPipeline`."""
    config = dataclasses.replace(TEACHER, few_step=LIGHTNING)
    folder = write_teacher(tmp_path / "teacher", config)
    write_lightning_lora(folder / "few_step.safetensors", load_network(folder, TEACHER))
    part = Held()
    monkeypatch.setattr(evaluate, "data_from", lambda *_, **__: part)
    arguments = ["--model", folder, "--data", "x", "--clip", clip_folder, "--steps", 2]
    arguments += ["--seed", 7, "--pictures", 3]
    run(monkeypatch, *arguments, "--output", tmp_path / "out")
    row, held_out = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    teacher, autoencoder = load_flow_teacher(folder)
    assert part.checked == autoencoder.config
    sums = np.zeros(8)
    for samples in part.batches(1, most=3):
        condition = teacher.encode(samples.captions)
        x0, seed = samples.latents, sample_seed(samples.captions[0], samples.latents[0])
        eps = get_noise(seed, *x0.shape[1:])
        for k in range(8):
            t = (k + 0.5) / 8
            v = teacher.velocity((1 - t) * x0 + t * eps, mx.array([t]), condition)
            sums[k] += (v - (eps - x0)).square().mean().item() / 3
    np.testing.assert_allclose(row["validation_losses"], sums, rtol=1e-4)
    pipe = SnapGenPipeline.from_pretrained(folder)
    height, width = (8 * side for side in x0.shape[1:3])
    size = {"height": height, "width": width, "num_inference_steps": 2}
    drawn = [np.array(pipe(CAPTIONS[i], seed=7 + i, **size)[0]) for i in range(3)]
    clip = load_clip_towers(clip_folder)
    found = clip_score(embed_pictures(clip, drawn), embed_texts(clip, CAPTIONS[:3]))
    assert row["clip_score"] == pytest.approx(found, rel=1e-3) and held_out["clip_score"] > 0
    assert "3 pictures" in capsys.readouterr().err
    line = {"tag": "colors", "include": [], "prompt": "a red car"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(line) + "\n")
    arguments = ["--geneval", tmp_path / "metadata.jsonl", "--per-prompt", 2, "--batch-size", 2]
    arguments += ["--guidance", 3, "--no-few-step"]
    arguments += ["--height", 32, "--width", 48, "--steps", 2]
    run(monkeypatch, "--model", folder, *arguments, "--output", tmp_path / "list")
    settings = {"height": 32, "width": 48, "num_inference_steps": 2, "guidance_scale": 3.0}
    for seed in range(2):
        expected = pipe("a red car", seed=seed, few_step=False, **settings)[0]
        with Image.open(tmp_path / "list" / "00000" / "samples" / f"{seed:04}.png") as picture:
            difference = np.array(picture).astype(int) - np.array(expected)
        assert np.abs(difference).max() <= 1
    settings = json.loads((tmp_path / "list" / "settings.json").read_text())
    assert settings["model"] == str(folder) and settings["few_step"] is False
    for more, message in (
        ([], "is no model of stickers: give --data"),
        (["--data", "x", "--lora", "a.safetensors"], "cannot be measured: leave out --lora"),
    ):
        with pytest.raises(UserError, match=message):
            run(monkeypatch, "--model", folder, *more)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--geneval", "a", "--dpg", "b"], "--geneval and --dpg are two commands"),
        (["--geneval", "a", "--data", "b"], "--geneval and --data are two commands"),
        (["--data", "a", "--gallery", "--output", "o"], "--data and --gallery are two commands"),
        (["--dpg", "a"], "--dpg needs --output"),
        (["--dpg", "a", "--output", "o", "--model-widths", "full", "tiny"], "one width"),
        (["--clip", "a"], "--clip takes --data"),
        (["--data", "stickers", "--prompts-file", "a"], "--prompts-file takes --data"),
        (["--data", "a", "--prompts-file", "a"], "--prompts-file needs --output, the folder for"),
        (["--data", "a", "--width", "64"], "--width takes --prompts-file, --geneval or --dpg"),
        (["--data", "a", "--pictures", "0"], "--pictures must be at least 1"),
        (["--data", "a", "--held-out", "2"], "--held-out must be"),
        (["--geneval", "nowhere.jsonl", "--output", "o"], "cannot read nowhere.jsonl"),
    ],
)
def test_mistakes_are_said_before_a_model_is_loaded(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def load(*_, **__):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(evaluate, "load_pretrained", load)
    with pytest.raises(UserError, match=message):
        run(monkeypatch, *arguments)
    assert not list(tmp_path.iterdir())


def test_a_model_of_no_stickers_needs_data(components, model_folder, monkeypatch):
    plain = dataclasses.replace(components, vocabulary=None)
    monkeypatch.setattr(evaluate, "load_pretrained", lambda *_, **__: plain)
    with pytest.raises(UserError, match="give --data to measure it on pictures"):
        run(monkeypatch, "--model", model_folder)


def test_a_prepared_set_is_measured_on_its_held_out_part(
    model_folder, tmp_path, monkeypatch, capsys
):
    from tests.training.test_prepare import write_pictures
    from train import prepare

    monkeypatch.setattr(prepare, "LEAST_TO_HOLD_OUT", 1)
    pictures = write_pictures(tmp_path / "set", 12)
    arguments = ["--model", model_folder, "--resolution", 64, "--held-out", 0.4]
    arguments = ["prepare", pictures, "--output", tmp_path / "prepared", *arguments]
    monkeypatch.setattr("sys.argv", [str(argument) for argument in arguments])
    prepare.main()
    part = Prepared(tmp_path / "prepared").validation()
    assert part is not None and 0 < part.num_samples < 12
    arguments = ["--model", model_folder, "--data", tmp_path / "prepared", *FAST]
    run(monkeypatch, *arguments, "--output", tmp_path / "out")
    assert f"{part.num_samples} pictures;" in capsys.readouterr().err
    model = load_pretrained(model_folder)
    losses = flow_losses(
        model.transformer, model.text_encoders, batches=part.batches(2), shares=[0.375]
    )
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    np.testing.assert_allclose(results["rows"][2]["validation_losses"], losses[0.375], rtol=1e-4)
    other = tmp_path / "other"
    shutil.copytree(model_folder, other)
    weights = mx.load(str(other / "autoencoder.safetensors"))
    weights = {name: value + 0.01 for name, value in weights.items()}
    mx.save_safetensors(str(other / "autoencoder.safetensors"), weights)
    with pytest.raises(UserError, match="latents of another autoencoder"):
        run(monkeypatch, "--model", other, "--data", tmp_path / "prepared")
