"""Fine-tuning: the gradient, the batches, and the command from a folder to a LoRA."""

import dataclasses
import json
import os
import shlex
import sys

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from PIL import Image

import train.loop.trainer
import train.lora
from mlx_snapgen.checkpoint.model import load_pretrained
from mlx_snapgen.errors import UserError
from mlx_snapgen.lora.adapters import add_lora, train_only
from mlx_snapgen.lora.files import load_lora
from mlx_snapgen.pipeline import SnapGenPipeline
from mlx_snapgen.sampling import add_noise
from train.data.encoded import EncodedFolder, encode_captions
from train.data.imagefolder import PictureFolder, bucket_sizes, read_folder
from train.data.prior import draw_prior
from train.evaluation.drift import Validation
from train.evaluation.estimate import Estimate, estimate
from train.loop.checkpoint import read_log
from train.objectives.base import ShareStep
from train.objectives.elastic import noisy
from train.objectives.finetune import FineTuning, step_share, velocity
from train.options.lora import TARGETS, parse

WIDE, TALL = (32, 64), (64, 32)
BUCKETS = bucket_sizes(WIDE, 32)
COLORS = ("red", "green", "blue", "yellow")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Few steps are done long before the compiler is, the curves drawn, or the time measured."""
    monkeypatch.setattr(train.loop.trainer, "plot_log", lambda run_dir: None)
    monkeypatch.setattr(train.lora, "estimate", lambda *_, **__: Estimate(0.5, 2.0, 3_100_000_000))
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture
def folder(tmp_path):
    """Three wide pictures and one tall one, a damaged one, and prompts of old."""
    data = tmp_path / "robot"
    data.mkdir()
    for k, color in enumerate(COLORS):
        size = (30, 70) if k == 3 else (300, 160)
        Image.new("RGB", size, color).save(data / f"{k}.png")
        (data / f"{k}.txt").write_text(f"a {color} robot")
    (data / "broken.png").write_bytes(b"no picture")
    (data / "broken.txt").write_text("broken")
    (tmp_path / "known.txt").write_text("a red car\n\ntwo cats\na blue apple\n")
    return data


@pytest.fixture
def adapted(model_folder):
    """The random model with adapters that are moved off zero."""
    components = load_pretrained(model_folder)
    mx.random.seed(0)
    network = components.transformer
    add_lora(network, 2, alpha=2.0, targets=TARGETS, name=train.lora.NAME)
    train_only(network, train.lora.NAME)
    return components


def move(network, seed=3):
    mx.random.seed(seed)
    network.update(
        tree_map(lambda p: p + 0.1 * mx.random.normal(p.shape), network.trainable_parameters())
    )


def pictures(components, folder, **settings):
    settings = {"batch_size": 3, "drop_caption": 0.0} | settings
    choice = {name: settings.pop(name) for name in ("seed", "flip") if name in settings}
    source = PictureFolder(read_folder(folder, BUCKETS)[0], **choice)
    return EncodedFolder(components, source, **settings)


def run(monkeypatch, folder, model_folder, *options):
    """The command in `folder`'s parent, with its short defaults."""
    monkeypatch.chdir(folder.parent)
    short = "--steps 4 --batch-size 2 --rank 2 --checkpoint-every 2 --prior-pictures 2"
    known = ["--prior-prompts", "known.txt", "--validation-prompts", "a robot"]
    argv = [
        "lora",
        "--data",
        str(folder),
        "--model",
        str(model_folder),
        *short.split(),
        *known,
        *options,
    ]
    monkeypatch.setattr(sys, "argv", argv)
    train.lora.main()


# --- batches ------------------------------------------------------------------------------------


def test_pictures_of_other_shapes_give_latents_of_other_sizes(adapted, folder):
    data = pictures(adapted, folder)
    batches = [data(k) for k in range(30)]
    shapes = {b["latents"].shape for b in batches}
    assert shapes == {(3, 4, 8, 4), (3, 8, 4, 4)}
    tall = sum(b["latents"].shape[1] == 8 for b in batches)
    assert 1 <= tall <= 20  # one picture in four


def test_a_batch_is_its_number_and_captions_belong_to_pictures(adapted, folder):
    data = pictures(adapted, folder, seed=2)
    for number in (0, 5):
        first, second = data(number), data(number)
        assert first.keys() == second.keys()
        assert all(mx.array_equal(first[name], second[name]).item() for name in first)
    assert any(not mx.array_equal(data(0)["mask_0"], data(k)["mask_0"]).item() for k in range(1, 9))
    examples, _ = read_folder(folder, BUCKETS)
    encoded = {}
    for example in examples:
        latents = adapted.autoencoder.encode(mx.array(example.pixels[None]) / 127.5 - 1)
        states = encode_captions(adapted.text_encoders, [example.caption])
        encoded[np.array(latents).tobytes()] = np.array(states["states_1"][0])
    for number in range(6):
        batch = data(number)
        for latents, states in zip(batch["latents"], batch["states_1"], strict=True):
            nearest = min(
                encoded,
                key=lambda k: np.abs(
                    np.frombuffer(k, np.float32) - np.array(latents).ravel()
                ).max(),
            )
            np.testing.assert_allclose(np.array(states), encoded[nearest], atol=1e-5)


def test_the_validation_loss_is_that_of_levels_spread_over_the_path(adapted, folder):
    data, errors = pictures(adapted, folder), []
    for bucket in data.buckets:
        x0 = bucket["latents"]
        eps = mx.random.normal(x0.shape, key=mx.random.key(0))
        for level in (0.125, 0.375, 0.625, 0.875):
            t = mx.full((len(x0),), level)
            v = velocity(adapted.transformer, bucket, add_noise(x0, eps, level), t=t, share=1.0)
            errors += np.square(np.array(v - (eps - x0))).mean((1, 2, 3)).tolist()
    assert Validation(adapted, data, []).loss() == pytest.approx(np.mean(errors), rel=1e-4)


@pytest.mark.parametrize(("unconditional", "prompt"), [("empty prompt", ""), ("absent", None)])
def test_dropped_captions_are_the_unconditional_text(adapted, folder, unconditional, prompt):
    adapted.config = dataclasses.replace(adapted.config, unconditional=unconditional)
    prior = draw_prior(adapted, ["a car", "two cats"])
    data = pictures(adapted, folder, drop_caption=1.0, prior=prior)
    empty = encode_captions(adapted.text_encoders, [prompt])
    assert bool(empty["mask_0"].any()) is (prompt is not None)
    batch = data(0)
    for part in ("", "prior_"):
        for i in range(2):
            for name in (f"states_{i}", f"mask_{i}"):
                want = np.broadcast_to(np.array(empty[name]), batch[part + name].shape)
                np.testing.assert_array_equal(np.array(batch[part + name]), want)
    drops = [pictures(adapted, folder, drop_caption=0.5)(k) for k in range(8)]
    count = 2 if prompt is not None else 0  # tokens
    equal = [np.array(row).sum() == count for b in drops for row in b["mask_0"]]
    assert 0 < sum(equal) < len(equal)


def test_flipping_adds_the_mirror_images(adapted, folder):
    image = Image.new("RGB", (64, 32), "white")
    image.paste("black", (0, 0, 20, 32))
    for k in range(4):
        image.save(folder / f"{k}.png")
    plain, flipped = (pictures(adapted, folder, flip=flip).buckets[0] for flip in (False, True))
    assert len(plain["latents"]) == 4 and len(flipped["latents"]) == 8
    mirror = np.ascontiguousarray(np.array(image)[None, :, ::-1])
    mirrored = adapted.autoencoder.encode(mx.array(mirror) / 127.5 - 1)
    np.testing.assert_allclose(np.array(flipped["latents"][4:5]), np.array(mirrored), atol=1e-5)


def test_the_source_has_the_pictures_of_the_encoded_batches(adapted, folder):
    source = PictureFolder(read_folder(folder, BUCKETS)[0], seed=4, flip=True)
    encoded = EncodedFolder(adapted, source, batch_size=3, drop_caption=0.0)
    for number in range(4):
        pixels, captions = source.batch(number, 3)
        latents = adapted.autoencoder.encode(mx.array(pixels) / 127.5 - 1)
        np.testing.assert_allclose(encoded(number)["latents"], latents, atol=1e-5)
        states = encode_captions(adapted.text_encoders, captions)
        np.testing.assert_allclose(encoded(number)["states_0"], states["states_0"], atol=1e-5)


def test_every_other_step_is_of_full_width():
    widths = [step_share((1.0, 0.5, 0.375), seed=0, step=step) for step in range(400)]
    assert widths == [step_share((1.0, 0.5, 0.375), seed=0, step=step) for step in range(400)]
    assert 160 < widths.count(1.0) < 240 and 60 < widths.count(0.5) < 140
    assert {step_share((1.0,), seed=0, step=step) for step in range(9)} == {1.0}
    assert {step_share((0.5, 0.375), seed=0, step=step) for step in range(30)} == {0.5, 0.375}


# --- the step -----------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1.0, 0.375])
def test_gradient_is_flow_matching_and_holds_to_the_model_without_the_lora(
    adapted, folder, model_folder, width
):
    prior = draw_prior(adapted, ["a car", "two cats"])
    network = adapted.transformer
    batch, key = pictures(adapted, folder, prior=prior)(0), mx.random.key(7)
    objective, step = FineTuning(2.0, 0.5), ShareStep(width)
    _, metrics = objective.gradients(network, batch, key, step)
    assert metrics[f"prior_{width:g}"].item() == 0  # a new LoRA changes nothing
    move(network)
    grads, metrics = objective.gradients(network, batch, key, step)
    plain = load_pretrained(model_folder).transformer
    keys, params = mx.random.split(key), network.trainable_parameters()

    def expected(params):
        network.update(params)
        x_t, t, v = noisy(batch["latents"], keys[0], shift=2.0)
        diffusion = (velocity(network, batch, x_t, t=t, share=width) - v).square().mean()
        x_t, t, _ = noisy(batch["prior_latents"], keys[1], shift=2.0)
        kept = velocity(plain, batch, x_t, t=t, share=width, part="prior_")
        drift = (
            (velocity(network, batch, x_t, t=t, share=width, part="prior_") - kept).square().mean()
        )
        return diffusion + 0.5 * drift, (diffusion, drift)

    (_, values), want = mx.value_and_grad(expected)(params)
    network.update(params)
    assert values[1].item() > 1e-4
    found = [metrics[f"{name}_{width:g}"].item() for name in ("loss", "prior")]
    np.testing.assert_allclose(found, [v.item() for v in values], rtol=1e-4)
    want, grads = dict(tree_flatten(want)), dict(tree_flatten(grads))
    assert want.keys() == grads.keys()
    for name in want:
        np.testing.assert_allclose(
            np.array(grads[name]), np.array(want[name]), atol=1e-5, err_msg=name
        )


def test_estimate_measures_and_changes_nothing(adapted, folder):
    network = adapted.transformer
    before = {k: np.array(v) for k, v in tree_flatten(network.parameters())}
    data = pictures(adapted, folder, batch_size=4)
    needed = estimate(adapted, data(0), shares={1.0: 0.5, 0.5: 0.5})
    assert needed.step > 0 and needed.picture > 0
    more = estimate(adapted, pictures(adapted, folder, batch_size=64)(0), shares={1.0: 1.0})
    assert more.memory > needed.memory > 1e5
    for name, value in tree_flatten(network.parameters()):
        np.testing.assert_array_equal(np.array(value), before[name], err_msg=name)


@pytest.mark.parametrize(
    ("steps", "long"), [(10, "25 seconds"), (400, "4 minutes"), (20_000, "2.8 hours")]
)
def test_estimate_is_said_in_fitting_units(steps, long):
    told = Estimate(0.5, 2.0, 3_100_000_000).text(steps, 10)
    assert told.startswith(f"about {long} ({steps:,} steps of 0.50 s, 10 pictures")
    assert told.endswith("3.1 GB of memory")


# --- the command --------------------------------------------------------------------------------


def test_fine_tuning_lowers_the_loss_and_the_lora_is_the_trained_network(
    folder, model_folder, monkeypatch, capsys
):
    losses, trained = [], {}

    def spy(self, trainer):
        metrics = validate(self, trainer)
        losses.append(metrics["validation_loss"])
        trained.update(tree_flatten(trainer.ema_parameters))
        return metrics

    validate = Validation.__call__
    monkeypatch.setattr(Validation, "__call__", spy)
    options = "--steps 20 --learning-rate 0.03 --checkpoint-every 10 --output out/r.safetensors"
    run(monkeypatch, folder, model_folder, *options.split())
    told = capsys.readouterr()
    assert "skipped: " in told.err and "broken.png" in told.err
    assert "estimate: about 18 seconds (20 steps" in told.out and "3.1 GB of memory" in told.out
    assert "4 pictures (3 of 64x32, 1 of 32x64 pixels), 1 skipped" in told.out

    components = load_pretrained(model_folder)
    add_lora(components.transformer, 2, alpha=2.0, targets=TARGETS)
    before = Validation(components, pictures(components, folder), []).loss()
    assert losses[-1] < 0.8 * before, (losses, before)
    log = read_log(folder.parent / "runs" / "robot")
    assert {"validation_loss", "prior_drift", "loss_1", "prior_0.5"} <= {k for e in log for k in e}
    samples = folder.parent / "runs" / "robot" / "samples"
    assert [p.name for p in sorted(samples.iterdir())] == [
        "0000010_previews.png",
        "0000020_previews.png",
    ]

    path = folder.parent / "out" / "r.safetensors"
    fresh = load_pretrained(model_folder).transformer
    load_lora(path, fresh)
    components.transformer.load_weights(list(trained.items()), strict=False)
    x_t = mx.random.normal((1, 8, 4, 4), key=mx.random.key(0))
    text = mx.random.normal((1, 5, 32), key=mx.random.key(1))
    for width in (1.0, 0.5, 0.375):
        a, b = (
            net(x_t, mx.array([0.4]), text, None, share=width)
            for net in (fresh, components.transformer)
        )
        np.testing.assert_allclose(np.array(a), np.array(b), atol=1e-5)
        plain = load_pretrained(model_folder).transformer(x_t, mx.array([0.4]), text, share=width)
        assert float(mx.abs(a - plain).max()) > 1e-3
    pipe = SnapGenPipeline.from_pretrained(model_folder, loras=[(path, 1.0)], model_width="tiny")
    assert pipe("a car and a red robot")[0].size == (64, 32)


def test_a_stopped_run_continues_to_the_same_lora(folder, model_folder, monkeypatch):
    run(monkeypatch, folder, model_folder, "--output", "a.safetensors", "--run-dir", "a")
    validate = Validation.__call__

    def stop(self, trainer):
        trainer.stop()
        return validate(self, trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Validation, "__call__", stop)
        run(monkeypatch, folder, model_folder, "--output", "b.safetensors", "--run-dir", "b")
    assert not (folder.parent / "b.safetensors").exists()
    run(monkeypatch, folder, model_folder, "--output", "b.safetensors", "--run-dir", "b")
    a, b = (mx.load(str(folder.parent / f"{name}.safetensors")) for name in "ab")
    assert a.keys() == b.keys()
    assert all(mx.array_equal(a[name], b[name]).item() for name in a)


def test_a_run_folder_belongs_to_its_pictures_and_an_output_is_never_replaced(
    folder, model_folder, monkeypatch
):
    run(monkeypatch, folder, model_folder)
    made = folder.parent / "robot.safetensors"
    before = made.read_bytes()
    with pytest.raises(UserError, match=r"robot\.safetensors exists already"):
        run(monkeypatch, folder, model_folder)
    assert made.read_bytes() == before
    with pytest.raises(UserError, match="other --rank and --alpha"):
        run(monkeypatch, folder, model_folder, "--output", "b.safetensors", "--rank", "3")
    with pytest.raises(UserError, match="a run with other --model-widths"):
        run(monkeypatch, folder, model_folder, "--output", "b.safetensors", "--model-widths=full")
    (folder / "0.txt").write_text("something else")
    with pytest.raises(UserError, match="other pictures"):
        run(monkeypatch, folder, model_folder, "--output", "b.safetensors")
    settings = json.loads((folder.parent / "runs" / "robot" / "settings.json").read_text())
    assert settings["rank"] == 2


def test_dry_run_tells_and_writes_nothing(folder, model_folder, monkeypatch, capsys):
    monkeypatch.setattr(train.lora, "estimate", estimate)
    before = sorted(folder.parent.rglob("*"))
    run(monkeypatch, folder, model_folder, "--dry-run")
    assert "estimate: about" in capsys.readouterr().out
    assert sorted(folder.parent.rglob("*")) == before
    # What would be in the way of files is not in the way of none.
    (folder.parent / "robot.safetensors").touch()
    (folder.parent / "runs" / "robot").mkdir(parents=True)
    (folder.parent / "runs" / "robot" / "index.json").touch()
    run(monkeypatch, folder, model_folder, "--dry-run")
    with pytest.raises(UserError, match=r"ending in \.safetensors"):
        run(monkeypatch, folder, model_folder, "--dry-run", "--output", "lora.bin")


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (".", "pics"),
        ("../pics/", "pics"),
        ("..", None),
        ("/", "pictures"),
        ("a.b", "a.b"),
        ("two words", "two words"),
        ("./~cat", "~cat"),
        ("./-cat", "cat"),
        ("köpek", "köpek"),
        (os.fsdecode(b"caf\xe9"), os.fsdecode(b"caf\xe9")),
        ("A" * 243, "A" * 243),
        ("A" * 244, "a" * 80),
        ("ö" * 127, "ö" * 40),
        (os.fsdecode(b"Caf\xe9 " * 49), "caf-" * 19 + "caf"),
    ],
)
def test_the_default_names_are_those_of_the_folder(tmp_path, monkeypatch, data, name):
    (tmp_path / "pics").mkdir()
    monkeypatch.chdir(tmp_path / "pics")
    args = parse([f"--data={data}"])
    name = name or tmp_path.name
    assert (str(args.output), str(args.run_dir)) == (f"{name}.safetensors", f"runs/{name}")
    for path in (args.output, args.run_dir):
        path.mkdir(parents=True)


def test_one_folder_is_taken(capsys):
    with pytest.raises(UserError, match="takes one folder, got a and b"):
        parse(["--data", "a", "--data", "b"])
    with pytest.raises(UserError, match="unexpected 'b'; see --help"):
        parse(["--data", "a", "b"])
    with pytest.raises(SystemExit):
        parse(["--help"])
    assert "--data FOLDER  " in capsys.readouterr().out


def test_the_command_to_draw_is_one_for_a_shell(folder, model_folder, monkeypatch, capsys):
    (folder / "0.txt").write_text('a "robot" of $5')
    folder = folder.rename(folder.with_name("my robot"))
    run(monkeypatch, folder, model_folder)
    command = shlex.split(capsys.readouterr().out.splitlines()[-1])
    drawn = ['a "robot" of $5', "--model", str(model_folder), "--lora", "my robot.safetensors"]
    assert command == ["python", "-m", "mlx_snapgen.generate", *drawn]


def test_without_prompts_of_old_a_foreign_model_is_told_of(
    folder, model_folder, monkeypatch, capsys
):
    (folder.parent / "known.txt").write_text("\n")
    with pytest.raises(UserError, match=r"known\.txt has no prompts"):
        run(monkeypatch, folder, model_folder)
    argv = ["lora", "--data", str(folder), "--model", str(model_folder), "--dry-run"]
    monkeypatch.setattr(sys, "argv", argv)
    train.lora.main()
    assert "--prior-prompts" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--steps 0", "--steps must be at least 1"),
        ("--rank 0", "--rank must be at least 1"),
        ("--prior-weight -1", "must not be negative"),
        ("--drop-caption 1", "--drop-caption must be"),
        ("--learning-rate 0", "--learning-rate must lie"),
        ("--output lora.bin", "ending in .safetensors"),
        ("--targets nothing.*", "no linear layer matches 'nothing"),
        ("--model nowhere", "no model folder nowhere"),
        ("--prior-prompts nowhere.txt", "cannot read nowhere.txt"),
    ],
)
def test_mistakes_are_said(folder, model_folder, monkeypatch, options, message):
    with pytest.raises(UserError, match=message):
        run(monkeypatch, folder, model_folder, *options.split())


def test_a_folder_that_is_not_there_is_said(folder, model_folder, monkeypatch):
    with pytest.raises(UserError, match=r"no folder .*nowhere"):
        run(monkeypatch, folder.with_name("nowhere"), model_folder)
