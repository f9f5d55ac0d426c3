"""LoRAs of public models: quantized weights, exact resume, previews, and what diffusers reads."""

import dataclasses
import gc
import json
import weakref
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image

import train.lora
from mlx_snapgen.checkpoint.module import dequantize_on_cpu
from mlx_snapgen.errors import UserError
from mlx_snapgen.formats import CONFIG
from mlx_snapgen.lora.adapters import linear_layers, train_only
from mlx_snapgen.lora.files import load_lora
from mlx_snapgen.pipeline import SnapGenPipeline
from mlx_snapgen.settings import DrawSettings
from mlx_snapgen.teachers import folder as teacher_folder
from mlx_snapgen.teachers.config import KLEIN, KLEIN_BASE, Z_IMAGE
from mlx_snapgen.teachers.folder import (
    NETWORKS,
    TeacherFolder,
    load_flow_teacher,
    load_network,
    quantizable,
)
from tests import tiny
from tests.tiny import add_random_lora, randomize
from train.evaluation.models import PublicModel
from train.evaluation.public import PublicValidation
from train.loop.checkpoint import read_log
from train.loop.trainer import Trainer
from train.objectives.base import value_and_grad
from train.options.lora import fill, parse
from train.preparation.drawn import open_drawing

SHORT = dataclasses.replace(KLEIN_BASE, num_inference_steps=2)
MODELS = {
    "qwen-image": dataclasses.replace(
        tiny.TEACHER, schedule=dataclasses.replace(tiny.TEACHER.schedule, num_inference_steps=2)
    ),
    "z-image": dataclasses.replace(
        tiny.TEACHER,
        kind="z-image",
        transformer=tiny.Z_IMAGE,
        schedule=dataclasses.replace(Z_IMAGE, num_inference_steps=2),
    ),
    "flux2": dataclasses.replace(
        tiny.TEACHER,
        kind="flux2",
        transformer=tiny.FLUX2,
        autoencoder=tiny.FLUX2_AUTOENCODER,
        schedule=SHORT,
    ),
}
HOW = {"bits": 8, "group_size": 32}
pytestmark = pytest.mark.usefixtures("no_language_model", "quick")


def pack(network):
    layers = {key.removesuffix(".weight") for key in quantizable(network, HOW["group_size"])}
    nn.quantize(network, **HOW, class_predicate=lambda path, _: path in layers)
    return network


def write_packed(folder, config):
    """A teacher's folder whose transformer is quantized."""
    tiny.write_teacher(folder, config)
    network = pack(randomize(NETWORKS[config.kind](config.transformer), 0))
    weights = dict(tree_flatten(network.parameters()))
    mx.save_safetensors(str(folder / "transformer-00001.safetensors"), weights)
    values = json.loads((folder / CONFIG).read_text()) | {"quantization": HOW}
    (folder / CONFIG).write_text(json.dumps(values))
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {kind: write_packed(root / kind, config) for kind, config in MODELS.items()}


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """Three wide pictures and a tall one."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "robot"
    folder.mkdir()
    for k, color in enumerate(("red", "green", "blue", "yellow")):
        Image.new("RGB", (30, 70) if k == 3 else (300, 160), color).save(folder / f"{k}.png")
        (folder / f"{k}.txt").write_text(f"a {color} robot")
    return folder


@pytest.fixture
def tuned(run, pictures):
    """Runs the command on a model with short defaults."""

    def call(model, *options):
        short = "--steps 4 --rank 2 --checkpoint-every 2 --resolution 64 --batch-size 2"
        run(train.lora, "--data", pictures, "--model", model, *short.split(), *options)

    return call


# --- gradients ----------------------------------------------------------------------------------


def gradients(network, **settings):
    keys = mx.random.split(mx.random.key(1), 2)
    x_t, text = (
        mx.random.normal((2, 4, 6, 4), key=keys[0]),
        mx.random.normal((2, 9, 24), key=keys[1]),
    )
    mask = mx.arange(9) < mx.array([[9], [5]])
    t = mx.array([0.3, 0.8])
    (loss, _), grads = value_and_grad(
        network, lambda: (network(x_t, t, text, mask).square().mean(), None)
    )
    return loss.item(), dict(tree_flatten(grads))


@pytest.mark.parametrize("kind", MODELS)
def test_gradients_pass_packed_weights_and_blocks_that_are_computed_again(kind, monkeypatch):
    monkeypatch.setattr("mlx_snapgen.networks.attention.MANY_SCORES", 1)
    network = pack(randomize(NETWORKS[kind](MODELS[kind].transformer), 0))
    dense = NETWORKS[kind](MODELS[kind].transformer)
    for path, layer in linear_layers(network).items():
        target = dict(dense.named_modules())[path]
        packed = isinstance(layer, nn.QuantizedLinear)
        target.weight = (
            mx.dequantize(layer.weight, layer.scales, layer.biases, **HOW)
            if packed
            else layer.weight
        )
    others = {
        k: v
        for k, v in tree_flatten(network.parameters())
        if k in dict(tree_flatten(dense.parameters()))
    }
    dense.load_weights([(k, v) for k, v in others.items() if v.dtype == mx.float32], strict=False)
    dequantize_on_cpu(network)
    results = []
    for net, again in ((dense, False), (network, False), (network, True)):
        if not again:
            net.freeze()
            add_random_lora(net, "default")
            train_only(net, "default")
        net.checkpoint_blocks(again)
        results.append(gradients(net))
    (loss, expected), *found = results
    assert len(expected) == 2 * len(linear_layers(dense))
    for other, grads in found:
        assert other == pytest.approx(loss, rel=1e-5) and grads.keys() == expected.keys()
        for name, value in grads.items():
            scale = mx.abs(expected[name]).max().item()
            assert mx.abs(value - expected[name]).max().item() < 1e-4 * scale + 1e-9, name


@pytest.mark.parametrize("kind", MODELS)
def test_blocks_that_are_computed_again_need_less_memory(kind, monkeypatch):
    monkeypatch.setattr("mlx_snapgen.networks.attention.MANY_SCORES", 1)
    monkeypatch.setattr("mlx_snapgen.networks.attention.PART_SCORES", 2**16)
    layers = {"num_single_layers": 6} if kind == "flux2" else {"num_layers": 6}
    network = NETWORKS[kind](dataclasses.replace(MODELS[kind].transformer, **layers))
    network.freeze()
    add_random_lora(network, "default")
    train_only(network, "default")
    x_t, text = mx.random.normal((1, 32, 32, 4)), mx.random.normal((1, 32, 24))
    peaks = []
    for again in (False, True):
        network.checkpoint_blocks(again)
        mx.eval(network.parameters(), x_t, text)
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        _, grads = value_and_grad(
            network, lambda: (network(x_t, mx.array([0.3]), text).square().mean(), None)
        )
        mx.eval(grads)
        peaks.append(mx.get_peak_memory() - before)
        del grads
    assert peaks[1] < 0.4 * peaks[0], peaks


# --- the command --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_a_lora_is_trained_on_packed_weights_and_draws(
    kind, models, tuned, pictures, monkeypatch, capsys
):
    encoders, loads = [], []
    load = teacher_folder.load_qwen

    def spy(*args, **settings):
        reader = load(*args, **settings)
        encoders.append(weakref.ref(reader))
        return reader

    def start(self):
        gc.collect()
        loads.append([encoder() for encoder in encoders])
        return begin(self)

    begin = Trainer.run
    monkeypatch.setattr(teacher_folder, "load_qwen", spy)
    monkeypatch.setattr(Trainer, "run", start)
    tuned(models[kind], "--learning-rate", "0.03", "--output", "made/robot.safetensors")
    assert loads == [[None]]
    said = capsys.readouterr()
    assert f"(rank 2) of {MODELS[kind].name} in 8 bits takes about" in said.out
    assert "estimate: about" in said.out and "--lora made/robot.safetensors" in said.out
    log = read_log(pictures.parent / "runs" / "robot")
    losses = [entry["validation_loss"] for entry in log if "validation_loss" in entry]
    assert len(losses) == 2 and all(map(np.isfinite, losses))
    samples = pictures.parent / "runs" / "robot" / "samples"
    assert len(list(samples.glob("*_previews.png"))) == 2
    tensors = mx.load("made/robot.safetensors")
    assert all(key.endswith(("lora_A.weight", "lora_B.weight")) for key in tensors)
    network = load_network(models[kind], dataclasses.replace(MODELS[kind], quantization=HOW))
    assert len(load_lora("made/robot.safetensors", network)) == len(tensors) // 2
    size = {"height": 32, "width": 32, "seed": 1, "num_inference_steps": 2}
    drawn = [
        np.array(SnapGenPipeline.from_pretrained(models[kind], loras=loras)("a robot", **size)[0])
        for loras in ((), (("made/robot.safetensors", 1.0),))
    ]
    assert not np.array_equal(*drawn)


@pytest.mark.parametrize("kind", MODELS)
def test_evaluation_and_prepared_sets_draw_the_pictures_of_the_pipeline(kind, models):
    """Bit for bit, with the model's own guidance."""
    folder, pipe = models[kind], SnapGenPipeline.from_pretrained(models[kind])
    size = {"height": 32, "width": 48}
    prompts, seeds = ["a robot", "a cat"], [3, 4]
    steps = [
        [*pipe.generate(prompt, seed=seed, **size)][-1]
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    teacher, autoencoder = load_flow_teacher(folder)
    some = {"settings": DrawSettings(**size), "share": 1.0, "progress": lambda _: None}
    drawn = PublicModel(teacher, autoencoder).draw(prompts, seeds=seeds, batch_size=1, **some)
    assert np.array_equal(drawn, [np.array(step.preview()) for step in steps])
    data = SimpleNamespace(
        latents=[mx.zeros_like(steps[0].x0)], condition=lambda prompt: teacher.encode([prompt])
    )
    validation = PublicValidation(
        TeacherFolder(folder, teacher.config), teacher.network, data, prompts=prompts
    )
    for_a_set, _ = open_drawing(
        folder, size=(32, 48), num_inference_steps=None, guidance_scale=None
    )
    for step, prompt, seed in zip(steps, prompts, seeds, strict=True):
        assert mx.array_equal(validation.draw(prompt, seed=seed), step.x0)
        assert mx.array_equal(for_a_set([prompt], [seed]), step.x0)
    first = next(pipe.generate(prompts[0], seed=3, **size)).x0
    assert mx.array_equal(validation.draw(prompts[0], seed=3, steps=1), first)


def test_training_lowers_the_loss(models, tuned, pictures):
    tuned(models["flux2"], "--steps", "30", "--checkpoint-every", "15", "--learning-rate", "0.03")
    log = read_log(pictures.parent / "runs" / "robot")
    first, last = [entry["validation_loss"] for entry in log if "validation_loss" in entry]
    assert last < first


def test_a_stopped_run_continues_to_the_same_lora(models, tuned, pictures, monkeypatch):
    model = models["z-image"]
    tuned(model, "--output", "a.safetensors", "--run-dir", "a")
    validate = PublicValidation.__call__

    def stop(self, trainer):
        trainer.stop()
        return validate(self, trainer)

    with monkeypatch.context() as patch:
        patch.setattr(PublicValidation, "__call__", stop)
        tuned(model, "--output", "b.safetensors", "--run-dir", "b")
    assert not (pictures.parent / "b.safetensors").exists()
    tuned(model, "--output", "b.safetensors", "--run-dir", "b")
    a, b = (mx.load(f"{name}.safetensors") for name in "ab")
    assert a.keys() == b.keys()
    assert all(mx.array_equal(a[name], b[name]).item() for name in a)
    with pytest.raises(UserError, match="resolution: give another --run-dir"):
        tuned(model, "--output", "c.safetensors", "--run-dir", "b", "--resolution", "32")
    text = (model / CONFIG).read_text()
    (model / CONFIG).write_text(text.replace('"bits": 8', '"bits": 4'))
    try:
        with pytest.raises(UserError, match="other --quantize: give another --run-dir"):
            tuned(model, "--output", "c.safetensors", "--run-dir", "b")
    finally:
        (model / CONFIG).write_text(text)


def test_dry_run_writes_nothing(models, tuned, pictures, capsys):
    before = sorted(pictures.parent.rglob("*"))
    tuned(models["flux2"], "--dry-run")
    assert "estimate: about" in capsys.readouterr().out
    assert sorted(pictures.parent.rglob("*")) == before


def test_a_distilled_model_is_noted_and_too_little_memory_refused(
    models, tuned, tmp_path, monkeypatch, capsys
):
    config = dataclasses.replace(MODELS["flux2"], schedule=KLEIN, few_step=KLEIN)
    model = write_packed(tmp_path / "klein", config)
    tuned(model, "--dry-run")
    assert "note: FLUX.2 klein is distilled" in capsys.readouterr().err
    monkeypatch.setattr(train.lora, "machine_memory", lambda: 1000)
    with pytest.raises(UserError, match=r"this machine has 0\.0 GB: choose a smaller --resolution"):
        tuned(model, "--dry-run")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--targets nothing.*", "no linear layer matches 'nothing"),
        ("--prior-weight 2", "without prior preservation"),
        ("--resolution 40", "--resolution 40: give a multiple of 16 pixels, such as 32 or 48"),
        ("--model-widths tiny", "no width 'tiny'"),
        ("--quantize 4", "stored with 8 bits"),
        ("--rank 0", "--rank must be at least 1"),
        ("--base other", r"--base takes a model that is one \.safetensors file"),
    ],
)
def test_mistakes_are_one_line(models, tuned, options, message):
    with pytest.raises(UserError, match=message) as error:
        tuned(models["flux2"], *options.split())
    assert "\n" not in str(error.value)


def test_a_model_of_this_project_has_its_own_resolution(model_folder, tuned):
    with pytest.raises(UserError, match="--quantize and --resolution are for public models"):
        tuned(model_folder)


def test_defaults_are_those_of_the_model_and_in_the_help(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = ("steps", "batch_size", "checkpoint_every", "learning_rate", "prior_weight")
    own, other = (400, 8, 100, 1e-3, 4), (1000, 1, 250, 1e-4, 0)
    for public, values in ((None, own), (MODELS["flux2"], other)):
        args = parse(["--data", "pictures", "--drop-caption", "0"])
        fill(args, public)
        assert tuple(getattr(args, name) for name in names) == values
        assert args.drop_caption == 0 and isinstance(args.targets, list)
    with pytest.raises(SystemExit):
        parse(["--help"])
    help = " ".join(capsys.readouterr().out.split())
    assert "AdamW learning rate (default: 0.001; for a public model 0.0001)" in help
