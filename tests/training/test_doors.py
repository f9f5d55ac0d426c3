"""A user's pictures through train.new, train.flow and train.export, prepared and as they are."""

import gc
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image

from mlx_snapgen.checkpoint.config import load_config
from mlx_snapgen.checkpoint.model import load_pretrained
from mlx_snapgen.draw import draw_latents
from mlx_snapgen.errors import UserError
from mlx_snapgen.networks.efficient_dit import encode_prompts
from mlx_snapgen.networks.text_encoders.clip import ClipTextEncoder
from tests import tiny
from tests.runtime.test_clip import MERGES, write_folder
from tests.training.test_new import SIZES, write_autoencoder
from train import autoencoder, export, flow, new, prepare, tokenizer
from train.data.prepared import Prepared
from train.evaluation.validation import flow_losses
from train.loop.checkpoint import latest_checkpoint, load_ema, read_log
from train.loop.trainer import Trainer
from train.options import supernetwork
from train.setup.supernetwork import step_arguments

pytestmark = pytest.mark.usefixtures("quick")

COLORS = {"red": (255, 0, 0), "blue": (0, 0, 255), "green": (0, 255, 0)}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """120 plain pictures of two shapes, with captions."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for k in range(120):
        name = list(COLORS)[k % 3]
        size = (64, 64) if k % 2 else (128, 32)
        pixels = np.clip(np.array(COLORS[name]) + rng.normal(0, 8, (*size[::-1], 3)), 0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{k:03d}.png")
        (folder / f"{k:03d}.txt").write_text(f"a {name} car number {k}")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """An untrained model with a public CLIP and a text encoder of its own."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "sizes.json").write_text(json.dumps(SIZES))
    (folder / "own.model").write_bytes(tiny.tokenizer_bytes())
    write_autoencoder(folder / "qwen", tiny.QWEN_AUTOENCODER)
    write_folder(folder / "clip", tiny.make_clip(MERGES, 48, num_heads=3), "hugging face")
    argv = ["new", folder / "my-model", "--preset", folder / "sizes.json", "--autoencoder"]
    argv += [folder / "qwen", "--text-encoder", folder / "clip", "--tokenizer"]
    argv += [folder / "own.model", "--encoder-size", "32", "--resolution", "64"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(word) for word in argv])
        new.main()
    path = folder / "my-model" / "config.json"
    config = json.loads(path.read_text())
    config["sampler"]["num_inference_steps"] = 1  # of the previews
    path.write_text(json.dumps(config))
    return folder / "my-model"


def options(model, run_dir, data, *more):
    given = ["--model", model, "--run-dir", run_dir, "--batch-size", 4, "--data", data]
    if more and isinstance(more[0], Path):  # a further set
        given, more = [*given, more[0]], more[1:]
    given += ["--validation-prompts", "a red car", "--validation-pictures", 2, "--optimizer"]
    return [*given, "adamw", "--drop-caption", 0.3, *more]


@pytest.fixture(scope="module")
def prepared(pictures, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared") / "set"
    argv = ["prepare", pictures, "--output", folder, "--model", model, "--resolution", "64"]
    argv += ["--held-out", "0.2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(word) for word in argv])
        prepare.main()
    return folder


def weights(run_dir):
    checkpoint = latest_checkpoint(run_dir)
    return {tree: mx.load(str(checkpoint / f"{tree}.safetensors")) for tree in ("model", "ema")}


@pytest.mark.parametrize("kind", ["prepared", "pictures"])
def test_a_resumed_run_has_the_same_weights(kind, model, run, tmp_path, request):
    data = request.getfixturevalue(kind)
    common = ["--accumulate", 2, "--held-out", 0.2, "--model-widths", "full", "small"]
    run(flow, *options(model, tmp_path / "a", data, *common, "--steps", 2))
    run(flow, *options(model, tmp_path / "b", data, *common, "--steps", 2, "--checkpoint-every", 1))
    # Killed after one step.
    (tmp_path / "b" / "step_2").rename(tmp_path / "gone")
    run(flow, *options(model, tmp_path / "b", data, *common, "--steps", 2))
    one, two = weights(tmp_path / "a"), weights(tmp_path / "b")
    for tree in one:
        for name, value in one[tree].items():
            np.testing.assert_array_equal(np.array(value), np.array(two[tree][name]), err_msg=name)
    log = read_log(tmp_path / "a")[-1]
    assert {"validation_full", "validation_small"} <= log.keys()


def test_an_exported_model_has_the_velocities_of_its_run(
    prepared, model, run, tmp_path, monkeypatch
):
    run(flow, *options(model, tmp_path / "run", prepared, "--steps", 2, "--learning-rate", 1e-2))
    record = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert (record["data"], record["model_name"]) == ("prepared", "my-model")
    monkeypatch.chdir(tmp_path)  # the record does not depend on the command's folder
    run(export, "--run", tmp_path / "run", "--quantize", 0, "--output", tmp_path / "made")
    made, start = load_pretrained(tmp_path / "made"), load_pretrained(model)
    averaged = load_ema(tmp_path / "run")
    for name, value in tree_flatten(made.transformer.parameters()):
        expected = averaged[f"transformer.{name}"].astype(mx.bfloat16)
        assert mx.array_equal(value.astype(mx.bfloat16), expected), name
    for name, value in tree_flatten(made.text_encoders[1].parameters()):
        expected = averaged[f"text_encoders.0.{name}"].astype(mx.bfloat16)
        assert mx.array_equal(value.astype(mx.bfloat16), expected), name
    assert made.config.text_encoders == start.config.text_encoders
    assert made.config.unconditional == "absent"
    assert not (tmp_path / "made" / "text_encoder_0.safetensors").exists()
    text, mask = encode_prompts(["a red car"], made.text_encoders, transformer=made.transformer)
    x_t = mx.random.normal((1, 8, 8, 4), key=mx.random.key(0))
    v = made.transformer(x_t, mx.array([0.5]), text, mask)
    before = start.transformer(x_t, mx.array([0.5]), text, mask)
    assert mx.isfinite(v).all() and not mx.allclose(v, before, atol=1e-4)


def test_stages_start_from_the_run_before(pictures, model, run, tmp_path):
    run(flow, *options(model, tmp_path / "64", pictures, "--steps", 1))
    more = [
        "--steps",
        1,
        "--resolution",
        96,
        "--init-from",
        tmp_path / "64",
        "--learning-rate",
        1e-9,
    ]
    run(flow, *options(model, tmp_path / "96", pictures, *more))
    one, two = weights(tmp_path / "64")["ema"], weights(tmp_path / "96")["ema"]
    for name, value in one.items():
        assert mx.allclose(value, two[name], atol=1e-5), name
    sheets = [next((tmp_path / stage / "samples").iterdir()) for stage in ("64", "96")]
    sizes = [Image.open(path).size for path in sheets]
    assert sizes[0] != sizes[1]
    # The size of the training is that of the exported model.
    run(export, "--run", tmp_path / "96", "--output", tmp_path / "made")
    made = load_config(tmp_path / "made")
    assert made.image_size == (96, 96)
    record = json.loads((tmp_path / "96" / "settings.json").read_text())
    assert made.trained_sizes and set(made.trained_sizes) <= set(map(tuple, record["buckets"]))
    run(export, "--run", tmp_path / "96", "--resolution", 32, "--output", tmp_path / "small")
    assert load_config(tmp_path / "small").image_size == (32, 32)
    with pytest.raises(UserError, match="33: give a multiple of 32 pixels, such as 32 or"):
        run(export, "--run", tmp_path / "96", "--resolution", 33, "--output", tmp_path / "odd")


def test_previews_and_export_have_the_resolution_of_prepared_data(prepared, model, run, tmp_path):
    path = tmp_path / "large" / "config.json"
    shutil.copytree(model, path.parent)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_size": [96, 96]}))
    more = ["--steps", 1, "--time-shift", 2.5, "--model-widths", "full"]
    run(flow, *options(path.parent, tmp_path / "run", prepared, *more))
    sheet = Image.open(next((tmp_path / "run" / "samples").iterdir()))
    assert 64 <= sheet.width < 96
    run(export, "--run", tmp_path / "run", "--output", tmp_path / "made")
    made = load_config(tmp_path / "made")
    assert (made.image_size, made.sampler.time_shift) == ((64, 64), 2.5)
    assert load_config(path.parent).sampler.time_shift is None


def test_validation_takes_no_more_pictures_at_a_time_than_training(
    prepared, model, run, tmp_path, monkeypatch
):
    drawn, measured = [], []

    def draw(components, prompts, **options):
        drawn.append(len(prompts))
        return draw_latents(components, prompts, **options)

    def measure(*networks, batches, **options):
        measured.extend(len(samples.captions) for samples in batches)
        return flow_losses(*networks, batches=batches, **options)

    monkeypatch.setattr("mlx_snapgen.draw.draw_latents", draw)
    monkeypatch.setattr("train.evaluation.validation.flow_losses", measure)
    more = ["--steps", 1, "--model-widths", "full", "--validation-pictures", 7, "--batch-size", 3]
    more += ["--validation-prompts", "a car", "a cat", "a dog", "a hat"]
    run(flow, *options(model, tmp_path / "run", prepared, *more))
    assert drawn == [3, 1]
    assert max(measured) <= 3 and sum(measured) == 7


def test_the_time_shift_is_the_models(prepared, model, model_folder, tmp_path):
    """By resolution for a model of train.new; a number for others, and for --time-shift."""

    def shift(*given):
        args = supernetwork.new_parser("flow", "").parse_args(list(map(str, given)))
        folder = supernetwork.check(args)
        return step_arguments(args, folder.config)(0).shift

    assert shift(*options(model, tmp_path / "run", prepared)) is None
    assert shift(*options(model_folder, tmp_path / "run", prepared)) == 2.0
    assert shift(*options(model, tmp_path / "run", prepared, "--time-shift", 3)) == 3.0


def test_the_full_width_is_always_trained(prepared, model, run, tmp_path):
    given = options(model, tmp_path / "run", prepared, "--steps", 1, "--model-widths", "tiny")
    run(flow, *given)
    assert read_log(tmp_path / "run")[-1].keys() == {"step", "time", "validation_tiny"}
    one = weights(tmp_path / "run")["model"]["transformer.head.linear.weight"]
    before = load_pretrained(model).transformer.head.linear.weight
    rows = slice(24, None)  # tiny has 3/8 of the 64 columns
    assert not mx.allclose(one[:, rows], before[:, rows], rtol=0, atol=1e-9)
    help = " ".join(supernetwork.new_parser("flow", "").format_help().split())
    assert "every step trains full too" in help


def test_help_lists_prepared_folders_where_they_are_taken(monkeypatch, capsys):
    for command, taken in ((autoencoder, False), (tokenizer, True)):
        monkeypatch.setattr("sys.argv", ["train", "--help"])
        with pytest.raises(SystemExit):
            command.main()
        said = " ".join(capsys.readouterr().out.split())
        assert "folder of pictures, .tar" in said
        assert ("a folder that train.prepare wrote" in said) == taken


def test_latents_of_another_model_are_refused(prepared, model_folder, run, tmp_path):
    with pytest.raises(UserError, match="latents of another autoencoder"):
        run(flow, *options(model_folder, tmp_path / "run", prepared))
    assert not (tmp_path / "run").exists()


def test_prepared_text_states_are_those_of_the_encoder(
    pictures, prepared, model, run, tmp_path, monkeypatch
):
    """The same weights with stored states, but for their rounding to 16 bits."""
    given = ["--output", tmp_path / "set", "--model", model, "--resolution", 64]
    run(prepare, pictures, *given, "--held-out", 0.2, "--text-states", "clip")
    more = ["--steps", 1, "--model-widths", "full", "--validation-pictures", 0]
    loaded, train_model = [], Trainer.run

    def counted(self):
        gc.collect()
        loaded.append(sum(type(x) is ClipTextEncoder for x in gc.get_objects()))
        return train_model(self)

    monkeypatch.setattr(Trainer, "run", counted)
    for name, data in (("a", prepared), ("b", tmp_path / "set")):
        run(flow, *options(model, tmp_path / name, data, *more))
    assert loaded[1] == loaded[0] - 1, "the encoder is freed"
    sheets = [np.asarray(Image.open(tmp_path / x / "samples/0000001_previews.png")) for x in "ab"]
    np.testing.assert_allclose(*(sheet.astype(int) for sheet in sheets), atol=2)
    one, two = (weights(tmp_path / name)["ema"] for name in ("a", "b"))
    for name, value in one.items():
        assert mx.allclose(value, two[name], atol=1e-4), name
    clip = model.parent / "clip"
    config = json.loads((model / "config.json").read_text())
    config["text_encoders"][0]["source"] = str(clip.rename(model.parent / "moved"))
    other = tmp_path / "other"
    shutil.copytree(model, other)
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="text states of a clip text encoder"):
        run(flow, *options(other, tmp_path / "c", tmp_path / "set", *more))
    (model.parent / "moved").rename(clip)


def test_several_prepared_sets(prepared, model, run, tmp_path, capsys):
    more = ["--weights", 3, 1, "--steps", 1, "--model-widths", "full", "--accumulate", 3]
    more += ["--noises-per-picture", 2]
    run(flow, *options(model, tmp_path / "run", prepared, prepared, *more))
    count = 2 * Prepared(prepared).num_samples
    said = f"1 step: 12 samples, {12 / count:.2g} passes over {count} pictures\n"
    assert said in capsys.readouterr().out
    assert read_log(tmp_path / "run")[-1].keys() == {"step", "time", "validation_full"}


def test_killed_at_random_moments_it_resumes_to_the_same_weights(prepared, model, tmp_path):
    """With reading ahead, in processes of their own."""
    rng = random.Random(0)

    def start(name):
        more = ["--steps", 10, "--model-widths", "full", "--validation-pictures", 0]
        given = options(model, tmp_path / name, prepared, *more, "--checkpoint-every", 1)
        command = [sys.executable, "-m", "train.flow", *map(str, given)]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    assert start("a").wait() == 0
    for moment in (2, 5, 7):
        process = start("b")
        while process.poll() is None and not (tmp_path / "b" / f"step_{moment}").exists():
            time.sleep(0.01)
        time.sleep(0.2 * rng.random())
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert start("b").wait() == 0
    one, two = weights(tmp_path / "a"), weights(tmp_path / "b")
    for tree in one:
        for name, value in one[tree].items():
            np.testing.assert_array_equal(np.array(value), np.array(two[tree][name]), err_msg=name)
