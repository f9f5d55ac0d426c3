"""The first use of a public model, from a folder and from a hub: fetched, converted, resumed."""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from huggingface_hub import constants
from PIL import Image

from convert.parity.originals import (
    flux2_klein_pipeline,
    qwen_image_pipeline,
    z_image_pipeline,
)
from mlx_snapgen.errors import UserError
from mlx_snapgen.generate import main
from mlx_snapgen.metadata import read_metadata
from mlx_snapgen.open_model import describe_model, describe_public, open_model
from mlx_snapgen.pipeline import SnapGenPipeline
from mlx_snapgen.public import estimate, first_use, teachers
from mlx_snapgen.public.description import CONFIGS
from mlx_snapgen.public.estimate import kept_bytes
from mlx_snapgen.public.files import needed_files
from mlx_snapgen.public.teachers import convert_teacher
from mlx_snapgen.sampling import get_noise
from mlx_snapgen.settings import ModelChoice
from tests.hub import CHUNK, Hub
from tests.layout.graph import ROOT
from tests.tiny import COMMIT, require
from train import prepare
from train.data.prepared import Prepared
from train.loop.run import digest_files
from train.loop.teacher import open_teacher

require("mlx_lm", "torch", "diffusers", "transformers")

SIZE = {"height": 48, "width": 80, "num_inference_steps": 2, "seed": 7}
OPTIONS = ("--height", "48", "--width", "80", "--steps", "2", "--seed", "7")


@pytest.fixture(scope="module")
def public(tmp_path_factory):
    """Tiny Z-Image-Turbo in diffusers' format, and its pipeline's picture."""
    import torch

    folder, pipeline = tmp_path_factory.mktemp("public") / "turbo [x]", z_image_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder)
    noise = torch.tensor(np.array(get_noise(7, 6, 10, 4))).permute(0, 3, 1, 2)
    picture = pipeline(
        "a red car",
        guidance_scale=0.0,
        num_inference_steps=2,
        height=48,
        width=80,
        latents=noise,
        output_type="np",
    ).images[0]
    return folder, 255 * picture


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, and weights of the tiny networks that can be quantized."""
    monkeypatch.setenv("MLX_SNAPGEN_CACHE", str(tmp_path / "cache [x]"))
    monkeypatch.setattr(first_use, "GROUP_SIZE", 32)
    monkeypatch.setattr(first_use, "DTYPE", None)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache [x]"


@pytest.fixture
def hub(public, tmp_path, monkeypatch):
    shutil.copytree(public[0], tmp_path / "remote")
    # Other variants and a copy of the whole model, which nobody needs.
    for name in ("turbo.safetensors", "transformer/diffusion_pytorch_model.fp16.safetensors"):
        (tmp_path / "remote" / name).write_bytes(b"not needed")
    (tmp_path / "remote" / "tokenizer" / "words [x].txt").write_bytes(b"needed, as all in there")
    made = Hub(tmp_path / "remote")
    made.answer(monkeypatch, tmp_path / "hub")
    yield made
    made.close()


def refused(model, *options):
    with pytest.raises(UserError) as error:
        main(["a red car", "--model", str(model), *OPTIONS, *options])
    assert "\n" not in str(error.value)
    return str(error.value)


def pixels(path):
    with Image.open(path) as picture:
        return np.array(picture)


def test_a_folder_in_diffusers_format_draws_the_pipelines_picture(public, cache, capsys):
    folder, expected = public
    for name in ("first", "second"):
        arguments = ["--model", str(folder), "--quantize", "none", "--output", f"{name}.png"]
        main(["a red car", *OPTIONS, *arguments])
        assert np.abs(pixels(f"{name}.png") - expected).max() < 0.6
    err = capsys.readouterr().err
    assert err.count("Z-Image-Turbo (") == 1 and "converting it once, without quantization" in err
    assert "fetching" not in err and f"drawing {SIZE['width']} x {SIZE['height']} takes" in err
    assert re.search(r"Z-Image-Turbo \((\d\.\d million|\d+,\d+) weights", err)
    assert len([*cache.iterdir()]) == 1
    assert read_metadata("first.png")["quantize"] == 0
    assert read_metadata("first.png")["model"] == str(folder)
    more = [folder / ".DS_Store", folder / "drawn.png", folder / ".git" / "objects" / "ab"]
    try:
        for path in more:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"no part of the model")
        main(["--config-from-image", "first.png", "--trust-settings", "--output", "third.png"])
    finally:
        for path in more:
            path.unlink()
    assert np.array_equal(pixels("third.png"), pixels("first.png"))
    assert len([*cache.iterdir()]) == 1


def test_the_quantization_is_chosen_by_the_machines_memory(public, cache, monkeypatch, capsys):
    folder, expected = public
    monkeypatch.setattr(estimate, "machine_memory", lambda: 1 << 28)
    main(["a red car", *OPTIONS, "--model", str(folder), "--output", "a.png"])
    assert "converting it once, in 4 bits" in capsys.readouterr().err
    [target] = cache.iterdir()
    assert target.name.endswith("-4bit")
    text = json.loads((target / "text_encoder" / "config.json").read_text())
    assert text["quantization"] == {"bits": 4, "group_size": 32}
    assert read_metadata("a.png")["quantize"] == 4
    assert 0.6 < np.abs(pixels("a.png") - expected).mean() < 60
    monkeypatch.setattr(estimate, "machine_memory", lambda: 1 << 40)
    pipe = SnapGenPipeline.from_pretrained(folder)
    assert pipe.choice.quantize == 4, "what is in the cache is used"
    assert np.array_equal(np.array(pipe("a red car", **SIZE)[0]), pixels("a.png"))
    pipe = SnapGenPipeline.from_pretrained(folder, quantize=8)
    assert pipe.choice.quantize == 8 and len([*cache.iterdir()]) == 2


@pytest.mark.parametrize("name", ["qwen-image", "klein", "klein-base"])
def test_every_public_model_draws(name, tmp_path):
    """Not quantized as convert.teacher converts it; in 8 bits nearly the same."""
    made = {
        "qwen-image": qwen_image_pipeline,
        "klein": partial(flux2_klein_pipeline, is_distilled=True),
        "klein-base": flux2_klein_pipeline,
    }[name]()
    made.save_pretrained(tmp_path / name)
    convert_teacher(tmp_path / name, tmp_path / "teacher")
    expected, whole, packed = (
        np.array(SnapGenPipeline.from_pretrained(folder, quantize=bits)("a car", **SIZE)[0])
        for folder, bits in (("teacher", None), (name, 0), (name, 8))
    )
    assert np.array_equal(whole, expected)
    difference = np.abs(packed.astype(float) - expected)
    assert 0 < difference.mean() < 8


def test_an_interrupted_conversion_resumes(public, cache, monkeypatch):
    folder, expected = public

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(first_use, "convert_teacher", interrupt)
        with pytest.raises(KeyboardInterrupt):
            SnapGenPipeline.from_pretrained(folder, quantize=0)
    [parts] = cache.iterdir()
    assert {path.name for path in parts.iterdir()} == {"transformer", "text_encoder"}
    monkeypatch.setattr(first_use, "convert", None)
    pipe = SnapGenPipeline.from_pretrained(folder, quantize=0)
    assert np.abs(np.array(pipe("a red car", **SIZE)[0]) - expected).max() < 0.6
    assert [path.name for path in cache.iterdir()] == [parts.name.removesuffix(".parts")]


def test_a_killed_check_of_the_text_encoder_leaves_nothing(public, cache, tmp_path, monkeypatch):
    code = (
        "import os, signal, sys\n"
        "from mlx_snapgen.open_model import open_model\n"
        "from mlx_snapgen.public import teachers\n"
        "from mlx_snapgen.settings import ModelChoice\n"
        "teachers.load_qwen = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)\n"
        "open_model(ModelChoice(sys.argv[1], quantize=0))\n"
    )
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    command = [sys.executable, "-c", code, str(public[0])]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    [links] = cache.glob("*.parts/.snapgen-*")
    assert any(path.is_symlink() for path in links.iterdir())
    assert not [*(tmp_path / "tmp").iterdir()]
    target = open_model(ModelChoice(str(public[0]), quantize=0)).path
    assert [*cache.iterdir()] == [target] and not [*cache.rglob(".snapgen-*")]


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def without_a_layer(path):
    weights = mx.load(str(path))
    name = next(name for name in weights if name.endswith("layers.1.mlp.up_proj.weight"))
    mx.save_safetensors(str(path), {k: v for k, v in weights.items() if k != name})


def with_another_shape(path):
    weights = mx.load(str(path))
    name = next(name for name in weights if name.endswith("layers.1.mlp.up_proj.weight"))
    mx.save_safetensors(str(path), weights | {name: weights[name][:-1]})


@pytest.mark.parametrize(
    ("name", "damage", "hint"),
    [
        ("tokenizer/tokenizer.json", cut, "tokenizer.json in "),
        ("tokenizer/tokenizer.json", Path.unlink, "which has no tokenizer.json"),
        ("text_encoder/model.safetensors", cut, "text_encoder/model.safetensors is truncated"),
        ("text_encoder/model.safetensors", without_a_layer, "up_proj"),
        ("text_encoder/model.safetensors", with_another_shape, "up_proj"),
        ("vae/diffusion_pytorch_model.safetensors", cut, "model.safetensors is truncated"),
    ],
)
def test_damage_is_found_before_anything_is_converted(
    public, tmp_path, cache, monkeypatch, name, damage, hint
):
    """By the first use and by `convert_teacher`."""
    shutil.copytree(public[0], tmp_path / "model")
    damage(tmp_path / "model" / name)
    for module in (first_use, teachers):
        monkeypatch.setattr(module, "convert", None)
    message = refused(tmp_path / "model", "--quantize", "none")
    assert hint in message and str(tmp_path / "model") in message
    assert not [path for path in cache.glob("*") if path.suffix != ".lock"]
    with pytest.raises(UserError, match=re.escape(hint)):
        convert_teacher(tmp_path / "model", tmp_path / "teacher")
    assert not (tmp_path / "teacher").exists()


@pytest.mark.parametrize(
    ("part", "key", "value", "hint"),
    [
        ("text_encoder", "hidden_size", "wide", "'hidden_size' must be a whole number"),
        ("text_encoder", "num_hidden_layers", 10**6, "'num_hidden_layers' must be 0 to 256"),
        ("text_encoder", "bos_token_id", "x", "Validation error for field 'bos_token_id'"),
        ("text_encoder", "max_position_embeddings", [1], "for field 'max_position_embeddings'"),
        ("text_encoder", "hidden_act", "gelu", "'hidden_act' \"gelu\" is not supported"),
        ("text_encoder", "attention_bias", True, "'attention_bias' true is not supported"),
        ("text_encoder", "layer_types", ["sliding_attention"] * 2, "'layer_types' "),
        (
            "text_encoder",
            "rope_scaling",
            {"rope_type": "dynamic"},
            "'rope_type' \"dynamic\"",
        ),
        (
            "text_encoder",
            "rope_parameters",
            {"partial_rotary_factor": 0.5},
            "factor' 0.5 is",
        ),
        ("transformer", "n_layers", 2.5, "'num_layers' must be a whole number"),
        ("transformer", "t_scale", 2.0, "only t_scale 1000.0 is supported"),
        ("vae", "latent_channels", "x", "'latent_channels' must be a whole number"),
        ("vae", "act_fn", "relu", "only an AutoencoderKL with act_fn silu"),
        ("vae", "scaling_factor", 0, "'scaling_factor' must not be 0"),
        ("scheduler", "shift", 1e9, "shifts of at most"),
        ("scheduler", "shift", 0, "'shift' must be positive, got 0"),
        ("scheduler", "stochastic_sampling", True, "'stochastic_sampling' true is not"),
        ("scheduler", "num_train_timesteps", 500, "'num_train_timesteps' 500 is not"),
        ("scheduler", "_class_name", "UniPCMultistepScheduler", "'_class_name' \"UniPCMul"),
        ("scheduler", "use_beta_sigmas", True, "'use_beta_sigmas' true is not supported"),
    ],
)
def test_a_wrong_value_names_its_file(public, tmp_path, monkeypatch, part, key, value, hint):
    shutil.copytree(public[0], tmp_path / "model")
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    path = tmp_path / "model" / part / name
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    monkeypatch.setattr(first_use, "convert", None)
    message = refused("model", "--quantize", "none")
    start = message.removeprefix("cannot read ")
    assert hint in message and start.startswith(f"model/{part}/{name}: "), message


def test_weights_that_are_no_file_are_named(public, tmp_path):
    shutil.copytree(public[0], tmp_path / "model")
    path = tmp_path / "model" / "vae" / "diffusion_pytorch_model.safetensors"
    path.unlink()
    path.symlink_to("gone")
    assert (
        refused("model") == f"model/{path.relative_to(tmp_path / 'model')} is a link to gone, "
        "which does not exist"
    )
    path.unlink()
    for make, hint in ((os.mkfifo, "it is a pipe, not a file"), (os.mkdir, "Is a directory")):
        make(path)
        assert hint in refused("model")
        path.unlink() if path.is_fifo() else path.rmdir()


def test_a_cache_that_cannot_be_written_to_is_one_line(public, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("MLX_SNAPGEN_CACHE", str(tmp_path / "file"))
    told = f"{tmp_path / 'file'} is a file, not a folder: set MLX_SNAPGEN_CACHE to another folder"
    assert refused(public[0], "--quantize", "none") == told


HOLD = """
import sys, time
from pathlib import Path
from mlx_snapgen.files import lock_folder
assert lock_folder(Path(sys.argv[1]))
print("locked", flush=True)
time.sleep(300)
"""


@pytest.mark.parametrize("is_killed", [True, False])
def test_a_second_first_use_waits_for_the_first(public, cache, monkeypatch, is_killed):
    """It takes over from one that is killed, and uses the result of one that finishes."""
    folder, expected = public
    monkeypatch.setattr(first_use, "POLL", 0.01)
    open_model(ModelChoice(str(folder), quantize=0))
    [target] = cache.iterdir()
    ready, parts = target.rename(cache.parent / "ready"), cache / f"{target.name}.parts"
    parts.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, parts], cwd=ROOT, stdout=subprocess.PIPE
    ) as first:
        assert first.stdout.readline() == b"locked\n"
        lines, reports = [], []

        def say(line):
            lines.append(line)
            if first.poll() is None and not is_killed:
                ready.rename(target)
                shutil.rmtree(parts)
                monkeypatch.setattr(first_use, "convert", None)
            first.kill()

        found = open_model(
            ModelChoice(str(folder), quantize=0),
            say=say,
            converting=lambda name, done, total: reports.append((name, 0 <= done <= total)),
        ).path
    assert reports[0] == ("Z-Image-Turbo", True), "a server sees that its worker is alive"
    assert "another process converts Z-Image-Turbo into" in lines[0]
    assert len(lines) == 1 + is_killed and found == target
    assert [*cache.iterdir()] == [target]
    pipe = SnapGenPipeline.from_pretrained(folder, quantize=0)
    assert np.abs(np.array(pipe("a red car", **SIZE)[0]) - expected).max() < 0.6


def test_damaged_parts_of_an_interrupted_conversion_are_converted_again(public, cache, monkeypatch):
    folder, expected = public
    with monkeypatch.context() as patch:
        patch.setattr(first_use, "convert_teacher", lambda *_, **__: os.kill(os.getpid(), 2))
        with pytest.raises(KeyboardInterrupt):
            open_model(ModelChoice(str(folder), quantize=0))
    [parts] = cache.iterdir()
    (parts / "transformer" / "report.json").unlink()
    os.truncate(parts / "text_encoder" / "model.safetensors", 1000)
    pipe = SnapGenPipeline.from_pretrained(folder, quantize=0)
    assert np.abs(np.array(pipe("a red car", **SIZE)[0]) - expected).max() < 0.6


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("teacher.json", None),
        ("teacher.json", b"{"),
        ("autoencoder.safetensors", None),
        ("transformer-00001.safetensors", b"x" * 1000),
        ("text_encoder/config.json", b'{"model_type": "gpt2"}'),
        ("text_encoder/tokenizer.json", None),
        ("text_encoder/model.safetensors", b""),
        ("text_encoder", None),
    ],
)
def test_a_damaged_model_in_the_cache_is_named_with_the_way_out(public, cache, name, data):
    folder, _ = public
    open_model(ModelChoice(str(folder), quantize=0))
    [target] = cache.iterdir()
    if (path := target / name).is_dir():
        shutil.rmtree(path)
    elif data is None:
        path.unlink()
    else:
        path.write_bytes(data)
    told = refused(folder)
    assert told.startswith(f"delete {target} and run the command again: it is damaged (")
    assert "get it again" not in told
    shutil.rmtree(target)
    main(["a red car", *OPTIONS, "--model", str(folder), "--quantize", "none"])


@pytest.mark.parametrize(
    ("name", "keys", "value"),
    [
        ("tokenizer_config.json", ["model_max_length"], "x"),
        ("tokenizer_config.json", ["model_max_length"], []),
        ("tokenizer_config.json", ["eos_token"], 3),
        ("tokenizer.json", ["post_processor", "single"], []),
        ("tokenizer.json", ["model", "vocab", "r"], 10**6),
    ],
)
def test_wrong_values_of_a_tokenizer_are_one_line(public, cache, name, keys, value):
    folder, _ = public
    open_model(ModelChoice(str(folder), quantize=0))
    [target] = cache.iterdir()
    path = target / "text_encoder" / name
    values = found = json.loads(path.read_text())
    for key in keys[:-1]:
        found = found[key]
    found[keys[-1]] = value
    path.write_text(json.dumps(values))
    assert name in refused(folder)


def test_only_the_needed_files_are_fetched_once(public, hub, capsys):
    options = [*OPTIONS, "--model", "someone/turbo", "--output", "a/"]
    main(["a red car", *options, "--quantize", "none"])
    err = capsys.readouterr().err
    assert "license apache-2.0): fetching " in err
    assert re.search(r"fetching \d\.\d MB in ", err)
    assert np.abs(pixels("a/a-red-car.png") - public[1]).max() < 0.6
    metadata = read_metadata("a/a-red-car.png")
    assert (metadata["model"], metadata["revision"]) == ("someone/turbo", COMMIT)
    unneeded = {"turbo.safetensors", "transformer/diffusion_pytorch_model.fp16.safetensors"}
    assert hub.names() == set(hub.sizes()) - unneeded
    assert len(hub.asked) == len(hub.names()), "every file once"
    hub.asked.clear()
    main(["a red car", *options])
    assert not hub.asked
    assert np.array_equal(pixels("a/a-red-car-1.png"), pixels("a/a-red-car.png"))


def test_a_model_is_described_by_its_configs_alone(public, hub):
    choice = ModelChoice("someone/turbo", quantize=0)
    found = describe_model(choice)
    assert not [name for name in hub.names() if name.endswith(".safetensors")]
    assert found.name == open_model(choice).config.name == "Z-Image-Turbo"
    assert describe_model(ModelChoice(str(public[0]))).name == found.name


def test_a_cached_model_draws_without_a_network(hub, monkeypatch):
    pipe = SnapGenPipeline.from_pretrained("someone/turbo", quantize=0)
    [expected] = pipe("a red car", **SIZE)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    again = SnapGenPipeline.from_pretrained("someone/turbo")
    assert np.array_equal(np.array(again("a red car", **SIZE)[0]), np.array(expected))


def test_a_connection_cut_in_the_middle_resumes(public, hub, capsys):
    name = "transformer/diffusion_pytorch_model.safetensors"
    hub.cut[name] = 2
    pipe = SnapGenPipeline.from_pretrained("someone/turbo", quantize=0)
    starts = [start for asked, start in hub.asked if asked == name]
    assert starts == [0, CHUNK, 2 * CHUNK]
    assert capsys.readouterr().err.count("\n") == 1
    assert np.abs(np.array(pipe("a red car", **SIZE)[0]) - public[1]).max() < 0.6


def test_a_download_that_stopped_resumes_with_the_same_command(hub, tmp_path):
    """The hub client keeps finished files, and since its version 2 no partial ones."""
    name = "text_encoder/model.safetensors"
    hub.cut[name], hub.is_dying = 20, True
    told = refused("someone/turbo", "--quantize", "none")
    assert told.startswith("the download of someone/turbo stopped (")
    assert told.endswith("run the same command again to resume")
    [snapshot] = (tmp_path / "hub").glob("*/snapshots/*")
    kept = {name for name in hub.sizes() if (snapshot / name).is_file()}
    assert "transformer/config.json" in kept
    hub.asked.clear()
    hub.cut.clear()
    main(["a red car", *OPTIONS, "--model", "someone/turbo", "--quantize", "none"])
    assert name in hub.names() and not hub.names() & kept


def test_what_the_hub_refuses_is_one_line(hub, tmp_path, monkeypatch):
    assert "neither a folder here nor a repository" in refused("someone/else")
    path = hub.folder / "vae" / "diffusion_pytorch_model.safetensors"
    path.rename(tmp_path / "away")
    assert "is incomplete: vae has no weights" in refused("someone/turbo")
    (tmp_path / "away").rename(path)
    hub.is_gated = True
    assert refused("someone/turbo").startswith("someone/turbo is gated: ask for access")
    hub.is_gated = False
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    with monkeypatch.context() as patch:
        patch.setattr(estimate.shutil, "disk_usage", lambda _: usage)
        assert "MB more, or choose --quantize 4" in refused("someone/turbo", "--quantize", "none")
    assert not [n for n in hub.names() if n.endswith(".safetensors")]


REFUSED = [
    (["--model-width", "tiny"], "this model has no width 'tiny'"),
    (["--text-encoders", "clip"], "has one text encoder"),
    (["--guidance", "4"], "has no guidance"),
    (["--negative-prompt", "blue"], "takes no negative prompt"),
    (["--attention-modulation"], "has no attention modulation"),
    (["--batch-size", "2"], "draws pictures one by one"),
    (["--edit", "whole.png"], "cannot edit pictures"),
    (["--height", "33"], "multiple of 16"),
    (["--height", "100000", "--width", "100000", "--force-size"], "more than the"),
    (["--image", "cut.png"], "cut.png: cannot be read"),
    (["--image", "whole.png", "--mask", "other.png"], "both must have the same size"),
    (["--seed", str(2**63 - 2), "--num-images", "9"], "seed must be a whole number"),
    (["--quantize", "8"], "transformer of Z-Image-Turbo cannot be quantized, because 4096"),
    (["--vocabulary"], "has no vocabulary.json"),
]


def test_options_are_refused_before_any_weights(hub, cache, monkeypatch):
    """Also by the prompt loop when it starts."""
    monkeypatch.setattr(first_use, "GROUP_SIZE", 4096)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    Image.fromarray(pixels).save("whole.png")
    Image.fromarray(pixels[:32]).save("other.png")
    Path("cut.png").write_bytes(Path("whole.png").read_bytes()[:9000])
    for options, hint in REFUSED:
        assert hint in refused("someone/turbo", *options)
        if "cannot be" not in hint and options != ["--vocabulary"]:
            with pytest.raises(UserError, match=re.escape(hint)):
                main(["--interactive", "--model", "someone/turbo", *OPTIONS, *options])
    monkeypatch.setattr("mlx_snapgen.teachers.memory.machine_memory", lambda: 4 << 30)
    large = ["--height", "2048", "--width", "4096", "--quantize", "none"]
    told = refused("someone/turbo", *large)
    assert re.search(r"4096 x 2048 needs about 9\.\d GiB .* choose \d+ x \d+ pixels or", told)
    assert not [name for name in hub.names() if name.endswith(".safetensors")]
    assert not cache.exists()


def test_a_text_encoder_is_checked_before_anything_is_quantized(public, cache, monkeypatch):
    monkeypatch.setattr(first_use, "GROUP_SIZE", 4096)
    monkeypatch.setattr(first_use, "quantizable", lambda *_: {"layers"})
    monkeypatch.setattr(first_use, "convert", None)
    told = refused(public[0], "--quantize", "4")
    assert "the text encoder of Z-Image-Turbo cannot be quantized" in told
    assert told.endswith("choose --quantize none") and not cache.exists()


def test_a_text_encoder_that_cannot_be_quantized_is_refused_before_any_weights(hub, monkeypatch):
    path = hub.folder / "text_encoder" / "config.json"
    odd = {"hidden_size": 33, "intermediate_size": 65, "head_dim": 17, "num_attention_heads": 2}
    path.write_text(json.dumps(json.loads(path.read_text()) | odd))
    told = refused("someone/turbo", "--quantize", "4")
    assert "the text encoder of Z-Image-Turbo cannot be quantized, because 32 divides" in told
    assert not [name for name in hub.names() if name.endswith(".safetensors")]


def test_the_disk_needs_room_for_the_rest_alone(hub, public, tmp_path, cache, monkeypatch):
    """Of an interrupted conversion, and of an interrupted download."""
    model = describe_public("someone/turbo", revision=None, base=None)
    files, parts = needed_files(model), cache / "turbo.parts"
    parts.mkdir(parents=True)
    kept, fetched = kept_bytes(model, files, bits=0, text=9), sum(files.own.values())
    free = kept + fetched - sum((model.folder / name).stat().st_size for name in CONFIGS)
    usage = type(shutil.disk_usage(tmp_path))

    def describe(room):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, room))
        return estimate.describe_work(model, files, parts=parts, bits=0, text=9)

    assert "converting it once" in describe(free)
    told = r"needs \d+\.\d MB of disk, and .* has \d+\.\d MB: free 1 byte more, or choose"
    with pytest.raises(UserError, match=told):
        describe(free - 1)
    with pytest.raises(UserError, match=r"has 0 bytes: free \d+\.\d MB more"):
        describe(0)
    (parts / "transformer").mkdir()
    (parts / "transformer" / "a.safetensors").write_bytes(bytes(1000))
    # Those of a process that was killed while it checked the text encoder.
    (parts / "link").symlink_to(next(folder for folder in public[0].rglob("*.safetensors")))
    blobs = model.folder.parent.parent / "blobs"
    (blobs / "a.incomplete").write_bytes(bytes(500))
    # Newer versions of the hub's client do not resume it.
    (blobs / "b.1234abcd.incomplete").write_bytes(bytes(300))
    assert "converting it once" in describe(free - 1500)
    with pytest.raises(UserError, match=r"more, or .*; delete .*blobs/[*].[*].incomplete$"):
        describe(free - 1501)
    (parts / "transformer" / "b.safetensors").write_bytes(bytes(2 * kept))
    assert "converting it once" in describe(fetched)


def test_a_full_disk_is_one_line_and_the_conversion_resumes(public, cache, monkeypatch):
    folder, expected = public

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("mlx_snapgen.public.convert.write_tensors", full)
        told = refused(folder, "--quantize", "none")
    assert "No space left on device; run the command again to resume" in told
    pipe = SnapGenPipeline.from_pretrained(folder, quantize=0)
    assert np.abs(np.array(pipe("a red car", **SIZE)[0]) - expected).max() < 0.6


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({"_class_name": "StableDiffusionPipeline"}, "is a StableDiffusionPipeline, which cannot"),
        (None, "is not a model that can be drawn with: it has neither"),
    ],
)
def test_other_models_are_refused_before_any_weights(hub, change, hint):
    path = hub.folder / "model_index.json"
    if change is None:
        path.unlink()
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert hint in refused("someone/turbo")
    assert hub.names() <= {"model_index.json"}


def test_a_transformer_of_another_network_is_refused_before_any_weights(hub):
    path = hub.folder / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": "SD3Transformer"}))
    assert "got SD3Transformer" in refused("someone/turbo")
    assert not [name for name in hub.names() if name.endswith(".safetensors")]


def test_what_does_not_fit_into_memory_is_one_line_with_what_does(public, monkeypatch):
    pipe = SnapGenPipeline.from_pretrained(public[0], quantize=0)

    def memory(count):
        monkeypatch.setattr("mlx_snapgen.teachers.memory.machine_memory", lambda: count)

    memory(4 << 30)
    with pytest.raises(UserError, match=r"4096 x 2048 needs about 9\.\d GiB .* has 4\.0: choose"):
        pipe.generate("a red car", height=2048, width=4096)
    with pytest.raises(UserError, match=r"choose \d+ x \d+ pixels or the model conv") as error:
        pipe.generate("a red car", height=2048, width=4096)
    width, height = map(int, re.findall(r"(\d+) x (\d+) pixels", str(error.value))[0])
    assert width > 2048 and abs(width - 2 * height) <= 32
    pipe.generate("a red car", height=height, width=width)
    memory(1 << 20)
    with pytest.raises(UserError, match="choose the model converted with --quantize 4"):
        pipe.generate("a red car", height=48, width=80)


def test_a_teacher_is_any_public_model(public, hub, tmp_path, monkeypatch):
    """A repository at a revision for train.kd, a folder in diffusers' format for train.prepare."""
    chosen = argparse.Namespace(
        teacher="someone/turbo", teacher_revision=COMMIT[:7], teacher_base=None
    )
    teacher, _, digest = open_teacher(chosen)
    assert teacher.has_few_step and not list(tmp_path.glob("turbo*"))
    converted = open_model(ModelChoice("someone/turbo", revision=COMMIT[:7])).path
    assert digest == digest_files(converted)
    fetched = len(hub.asked)
    (tmp_path / "prompts.txt").write_text("a red car\na cat\n")
    arguments = ["--draw-with", public[0], "--prompts-file", "prompts.txt", "--resolution", 32]
    arguments += ["--steps", 1, "--output", "set"]
    monkeypatch.setattr("sys.argv", ["prepare", *map(str, arguments)])
    prepare.main()
    [chunk] = Prepared(tmp_path / "set").batches(2)
    assert chunk.latents.shape == (2, 4, 4, 4) and len(hub.asked) == fetched
    assert sorted(chunk.captions) == ["a cat", "a red car"]
