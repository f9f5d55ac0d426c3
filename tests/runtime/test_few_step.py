"""The few-step mode: a LoRA in the model's folder, and sampling with fresh noise."""

import dataclasses
import itertools
import json
import warnings
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from PIL import Image

from mlx_snapgen import sampling
from mlx_snapgen.checkpoint.model import FEW_STEP, load_fused, load_pretrained, save_pretrained
from mlx_snapgen.config import SamplerConfig
from mlx_snapgen.draw import draw_latents, draw_pictures
from mlx_snapgen.errors import UserError
from mlx_snapgen.lora.adapters import add_lora, fuse_lora, remove_lora, set_lora_weights, train_only
from mlx_snapgen.lora.files import load_lora, save_lora
from mlx_snapgen.networks.efficient_dit import EfficientDiT, encode_prompts
from mlx_snapgen.pipeline import SnapGenPipeline
from mlx_snapgen.settings import DrawSettings
from tests.tiny import add_random_lora, velocity
from train import evaluate
from train.data.stickers.source import PREVIEW_PROMPTS, ValidationStickers
from train.evaluation.previews import previews_of
from train.evaluation.validation import validation_losses, validation_set
from train.loop.trainer import Trainer
from train.objectives.elastic import TextToLatents

MODE = SamplerConfig(2, guidance_scale=1.0, time_shift=3.0, fresh_noise=True)


@pytest.fixture(scope="module")
def folder(model_folder, tmp_path_factory):
    """The random model with a random few-step LoRA."""
    made = load_pretrained(model_folder)
    targets = ["*_proj", "ffn.linear*"]
    add_random_lora(made.transformer, FEW_STEP, targets=targets, alpha=8.0)
    made.config = dataclasses.replace(made.config, few_step=MODE)
    path = tmp_path_factory.mktemp("few") / "model"
    save_pretrained(path, made)
    return path


def test_fresh_noise_is_put_on_the_estimates():
    """Three steps written out, the last of which adds none."""
    x = noise = sampling.get_noise(1, 2, 2, 1)
    levels = sampling.get_schedule(3, 2.0)
    draws = {k: sampling.get_noise(1, 2, 2, 1, k) for k in (1, 2)}
    for k, (sigma, following) in enumerate(itertools.pairwise(levels)):
        x0 = x - sigma * (0.3 * x + sigma)
        x = (1 - following) * x0 + following * draws[k + 1] if k < 2 else x0
    *_, last = sampling.denoise(lambda x, s: 0.3 * x + s, noise, levels, draws.__getitem__)
    np.testing.assert_allclose(np.array(last.x_t), np.array(x), rtol=1e-5)
    assert not np.allclose(np.array(draws[1]), np.array(draws[2]))
    assert not np.allclose(np.array(draws[1]), np.array(noise))


def test_the_folder_keeps_base_and_lora_apart(folder, model_folder):
    base, plain = load_pretrained(model_folder), load_pretrained(folder)
    assert plain.config.few_step is None
    ours, theirs = (dict(tree_flatten(c.transformer.parameters())) for c in (base, plain))
    assert ours.keys() == theirs.keys()
    assert all(mx.array_equal(ours[k], theirs[k]) for k in ours)
    both = load_pretrained(folder, few_step=True)
    assert both.config.few_step == MODE
    np.testing.assert_array_equal(velocity(both.transformer), velocity(base.transformer))
    set_lora_weights(both.transformer, {FEW_STEP: 1.0})
    load_lora(folder / "few_step.safetensors", base.transformer)
    fuse_lora(base.transformer)
    np.testing.assert_allclose(velocity(both.transformer), velocity(base.transformer), atol=1e-4)
    assert mx.abs(velocity(both.transformer) - velocity(plain.transformer)).max() > 0.1


@pytest.mark.parametrize("name", ["full", "tiny"])
def test_the_mode_draws_with_the_lora_and_without_guidance(folder, name):
    """Two steps without guidance of a network with the LoRA fused, written out."""
    width = {"full": 1.0, "tiny": 0.375}[name]
    model = load_pretrained(folder)
    load_lora(folder / "few_step.safetensors", model.transformer)
    fuse_lora(model.transformer)
    text, mask = encode_prompts(["a cat"], model.text_encoders, transformer=model.transformer)
    x = sampling.get_noise(4, 4, 8, 4)
    for k, (sigma, following) in enumerate(itertools.pairwise(sampling.get_schedule(2, 3.0))):
        x0 = x - sigma * model.transformer(x, mx.array([sigma]), text, mask, share=width)
        x = sampling.add_noise(x0, sampling.get_noise(4, 4, 8, 4, k + 1), following)
    expected = (np.clip(np.array(model.autoencoder.decode(x)[0]), -1, 1) + 1) * 127.5
    pipe = SnapGenPipeline.from_pretrained(folder, model_width=name)
    [picture] = pipe("a cat", seed=4)
    assert np.abs(np.array(picture) - expected).max() < 0.6
    batched = load_pretrained(folder, few_step=True)
    [again] = draw_pictures(batched, ["a cat"], seeds=[4], share=width)
    assert np.abs(again - expected).max() < 0.6


def test_the_number_of_steps_chooses_the_mode(folder, model_folder):
    pipe = SnapGenPipeline.from_pretrained(folder)
    base = SnapGenPipeline.from_pretrained(model_folder)

    def first(pipe, **settings):
        return next(iter(pipe.generate("a cat", seed=1, **settings))).metadata

    for settings, few in (
        ({}, True),
        ({"num_inference_steps": 4}, True),
        ({"num_inference_steps": 5}, False),
        ({"num_inference_steps": 2, "few_step": False}, False),
        ({"num_inference_steps": 9, "few_step": True}, True),
    ):
        found = first(pipe, **settings)
        assert found["few_step"] is few
        assert found["guidance_scale"] == (1.0 if few else 3.0)
        assert found["time_shift"] == (3.0 if few else 2.0)
    for settings in ({"num_inference_steps": 5}, {"few_step": False}):
        ours, theirs = (np.array(p("a cat", seed=1, **settings)[0]) for p in (pipe, base))
        np.testing.assert_array_equal(ours, theirs)
    assert first(base)["few_step"] is False
    with pytest.raises(UserError, match="no few-step mode"):
        base("a cat", few_step=True)


def test_a_width_that_the_mode_was_not_trained_at_is_told(folder, components, tmp_path, capsys):
    """Also after an export of an export, and not with the steps of the base."""
    model = load_pretrained(folder, few_step=True)
    file, first = tmp_path / "few.safetensors", tmp_path / "first"
    save_lora(file, model.transformer, name=FEW_STEP, widths=["full", "small"])
    fresh = load_pretrained(folder)
    load_lora(file, fresh.transformer, weight=0.0, name=FEW_STEP)
    fresh.config = dataclasses.replace(fresh.config, few_step=MODE)
    save_pretrained(first, fresh)
    save_pretrained(tmp_path / "second", load_pretrained(first, few_step=True))
    text = "the few-step mode of (first|second) was trained at model width full, small, not at tiny"
    for name in ("first", "second"):
        pipe = SnapGenPipeline.from_pretrained(tmp_path / name, model_width="tiny")
        with pytest.warns(UserWarning, match=text):
            next(pipe.generate("a cat"))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            next(pipe.generate("a cat", few_step=False))
            next(SnapGenPipeline.from_pretrained(tmp_path / name).generate("a cat"))
    load_fused(first, ["tiny"], name="models/mine")  # as the user gave it
    assert "note: the few-step mode of models/mine was trained at" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="few.safetensors was trained at model width full, small"):
        next(
            SnapGenPipeline.from_pretrained(
                folder, model_width="tiny", loras=((str(file), 1.0),)
            ).generate("a cat", few_step=False)
        )


def test_an_untrained_model_is_told(components, tmp_path):
    plain = dataclasses.replace(components, transformer=EfficientDiT(components.config.transformer))
    save_pretrained(tmp_path / "new", plain)
    with pytest.warns(UserWarning, match="new is not trained yet: it draws noise"):
        next(SnapGenPipeline.from_pretrained(tmp_path / "new").generate("a cat"))


def test_two_pictures_at_once_do_not_disturb_each_other(folder):
    pipe = SnapGenPipeline.from_pretrained(folder)
    few, many = (pipe.generate("a cat", seed=2, few_step=mode) for mode in (True, False))
    pairs = list(zip(few, many, strict=True))
    alone = [list(pipe.generate("a cat", seed=2, few_step=mode)) for mode in (True, False)]
    for pair, one, other in zip(pairs, *alone, strict=True):
        assert mx.array_equal(pair[0].x0, one.x0) and mx.array_equal(pair[1].x0, other.x0)


def test_attention_modulation_reaches_the_network(folder):
    pipe = SnapGenPipeline.from_pretrained(folder)
    seen = []
    network = pipe.transformer

    class Recording:
        encode_text, dtype, named_modules = (
            network.encode_text,
            network.dtype,
            network.named_modules,
        )

        def __call__(self, *args, **settings):
            seen.append(settings["modulate_attention"])
            return network(*args, **settings)

    pipe.transformer = Recording()
    [step, *_] = pipe.generate("a cat", attention_modulation=True)
    assert step.metadata["attention_modulation"] is True
    list(pipe.generate("a cat"))
    assert seen == [True, True, False, False]


def test_saving_again_keeps_the_mode(folder, tmp_path):
    SnapGenPipeline.from_pretrained(folder, model_width="small").save_pretrained(tmp_path / "s")
    again, first = (
        SnapGenPipeline.from_pretrained(tmp_path / "s"),
        SnapGenPipeline.from_pretrained(folder, model_width="small"),
    )
    for settings in ({}, {"few_step": False}):
        ours, theirs = (np.array(p("a cat", seed=1, **settings)[0]) for p in (again, first))
        np.testing.assert_array_equal(ours, theirs)


def test_another_lora_goes_on_top_of_both_modes(folder):
    style = folder / "few_step.safetensors"
    plain, styled = (
        SnapGenPipeline.from_pretrained(folder, loras=loras) for loras in ([], [(style, 0.5)])
    )
    for mode in (True, False):
        ours, theirs = (np.array(p("a cat", few_step=mode)[0], int) for p in (plain, styled))
        assert np.abs(ours - theirs).max() > 5


def test_half_a_mode_is_refused(folder, tmp_path):
    made = load_pretrained(folder, few_step=True)
    remove_lora(made.transformer)
    with pytest.raises(UserError, match="takes both"):
        save_pretrained(tmp_path / "a", made)
    made = load_pretrained(folder, few_step=True)
    made.config = dataclasses.replace(made.config, few_step=None)
    with pytest.raises(UserError, match="takes both"):
        save_pretrained(tmp_path / "b", made)


def test_previews_show_the_averages_and_leave_the_model_alone(components, font, tmp_path):
    model = TextToLatents(components.config, [e.tokenizer for e in components.text_encoders])
    model.transformer.update(components.transformer.parameters())
    before = [mx.array(p) for _, p in tree_flatten(model.parameters())]
    previews = previews_of(
        model,
        components.autoencoder,
        PREVIEW_PROMPTS,
        size=(128, 128),
        time_shift=2.0,
        widths=["full", "tiny"],
    )

    def sample_path(name):
        return tmp_path / f"{name}.png"

    sheets = []
    for factor in (1.0, 3.0):
        averages = tree_map(lambda p, f=factor: f * p, model.trainable_parameters())
        trainer = SimpleNamespace(model=model, ema_parameters=averages, sample_path=sample_path)
        trainer.averaged = lambda trainer=trainer: Trainer.averaged(trainer)
        assert previews(trainer) == {}
        sheets.append(np.asarray(Image.open(tmp_path / "previews.png")))
    assert not np.array_equal(*sheets)
    after = [p for _, p in tree_flatten(model.parameters())]
    assert all(mx.array_equal(a, b) for a, b in zip(before, after, strict=True))
    own = dataclasses.replace(
        components, transformer=model.transformer, text_encoders=model.text_encoders
    )
    own.config = dataclasses.replace(own.config, image_size=(128, 128))
    expected = draw_pictures(
        own,
        list(PREVIEW_PROMPTS),
        seeds=range(len(PREVIEW_PROMPTS)),
        settings=DrawSettings(time_shift=2.0),
    )
    for k in (0, 7):
        assert np.array_equal(sheets[0][:128, 134 * k : 134 * k + 128], expected[k])


@pytest.mark.parametrize("option", ["--few-step", "--no-few-step"])
def test_the_validation_loss_is_of_the_mode_that_draws(folder, font, tmp_path, monkeypatch, option):
    command = ["evaluate", "--model", str(folder), "--num-nouns", "100", "--per-category", "1"]
    command += ["--validation-scenes", "2", "--widths", "tiny", "--steps", "1", "--no-ceilings"]
    monkeypatch.setattr("sys.argv", [*command, "--output", str(tmp_path), option])
    evaluate.main()
    (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    components = load_pretrained(folder, few_step=True)
    set_lora_weights(components.transformer, {FEW_STEP: float(option == "--few-step")})
    expected = validation_losses(
        components, validation_set(components, ValidationStickers(100), count=2), share=0.375
    )
    assert row["validation_losses"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("option", ["--few-step", "--no-few-step"])
def test_a_note_says_that_the_loss_is_without_the_mode(
    folder, tmp_path, monkeypatch, capsys, option
):
    Image.new("RGB", (64, 32)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a cat")
    command = [
        "evaluate",
        "--model",
        str(folder),
        "--data",
        str(tmp_path),
        "--model-widths",
        "full",
    ]
    monkeypatch.setattr("sys.argv", [*command, "--pictures", "1", option])
    evaluate.main()
    note = "the validation loss is that of the model without its few-step mode"
    assert (note in capsys.readouterr().err) == (option == "--few-step")


def test_a_core_ml_export_has_it_fused(folder):
    fused = load_fused(folder, ["small"])
    assert fused.config.few_step == MODE
    expected = load_pretrained(folder, share=0.5, few_step=True)
    base = velocity(expected.transformer)
    set_lora_weights(expected.transformer, {FEW_STEP: 1.0})
    np.testing.assert_allclose(
        velocity(fused.transformer), velocity(expected.transformer), rtol=1e-4, atol=1e-5
    )
    assert mx.abs(velocity(fused.transformer) - base).max() > 0.01
    without = load_fused(folder, ["small"], few_step=False)
    assert without.config.few_step is None
    np.testing.assert_array_equal(velocity(without.transformer), base)


def test_the_mode_may_be_an_adapter_of_another_name(folder):
    model = load_pretrained(folder, few_step=True)
    add_lora(model.transformer, 2, alpha=2.0, targets=["*_proj"], name="student")
    train_only(model.transformer, "student")
    student = tree_map(lambda v: 0.3 + v, model.transformer.trainable_parameters())
    model.transformer.update(student)
    set_lora_weights(model.transformer, {FEW_STEP: 0.0, "student": 0.0})
    drawn = {
        (adapter, few_step): np.array(
            draw_latents(
                model,
                ["a cat"],
                seeds=[1],
                settings=DrawSettings(num_inference_steps=2, few_step=few_step),
                adapter=adapter,
            )
        )
        for adapter in (FEW_STEP, "student")
        for few_step in (False, True)
    }
    assert np.allclose(drawn["student", False], drawn[FEW_STEP, False])
    assert not np.allclose(drawn["student", True], drawn["student", False])
    assert not np.allclose(drawn["student", True], drawn[FEW_STEP, True])


def test_pictures_do_not_depend_on_the_batch(components):
    prompts, seeds = ["a red apple", "a blue car", "a cat"], (5, 6, 7)
    settings = DrawSettings(num_inference_steps=1, guidance_scale=1)
    together, alone = (
        draw_pictures(components, prompts, seeds=seeds, settings=settings, batch_size=size)
        for size in (3, 1)
    )
    assert np.abs(together.astype(int) - alone).max() <= 1
    assert (together[0] != together[1]).any()
