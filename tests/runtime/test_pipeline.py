"""The pipeline: seeds, guidance, sizes and previews, in numbers; and what it refuses or notices."""

import dataclasses
import itertools
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image

import mlx_snapgen
from mlx_snapgen.checkpoint.model import load_pretrained, save_pretrained
from mlx_snapgen.draw import draw_latents
from mlx_snapgen.errors import UserError
from mlx_snapgen.networks.efficient_dit import encode_prompts
from mlx_snapgen.networks.text_encoders.base import TextStates
from mlx_snapgen.pipeline import SnapGenPipeline
from mlx_snapgen.prompt_check import PromptWarning
from mlx_snapgen.sampling import get_noise, get_schedule
from mlx_snapgen.teachers.checkpoint import load_teacher


@pytest.fixture(scope="module")
def pipe(model_folder):
    return SnapGenPipeline.from_pretrained(model_folder)


def draw(pipe, prompt="a red apple", **settings):
    return [np.array(picture) for picture in pipe(prompt, **settings)]


def last(steps):
    *_, step = steps
    return step.x0


# --- numbers ------------------------------------------------------------------------------------


def test_the_picture_is_the_euler_integral_of_the_guided_velocity(pipe, components):
    """The whole pipeline written out once more, with one pass per prompt."""
    texts = []
    for prompt in ("a blue cat", "green"):
        states = [e.tokenize([prompt]) for e in components.text_encoders]
        states = [
            TextStates(e(*s), s[1]) for e, s in zip(components.text_encoders, states, strict=True)
        ]
        texts.append(components.transformer.encode_text(states))
    x = get_noise(5, 4, 8, 4)
    schedule = get_schedule(3, 2.0)
    for sigma, following in itertools.pairwise(schedule):
        cond, uncond = (
            components.transformer(x, mx.array([sigma]), text, mask) for text, mask in texts
        )
        x = x + (following - sigma) * (uncond + 2.5 * (cond - uncond))
    pixels = (mx.clip(components.autoencoder.decode(x), -1, 1) + 1) * 127.5
    settings = {"negative_prompt": "green", "guidance_scale": 2.5, "num_inference_steps": 3}
    [picture] = draw(pipe, "a blue cat", seed=5, **settings)
    assert picture.shape == (32, 64, 3)
    assert np.abs(picture - np.array(pixels)[0]).max() < 0.6
    assert picture.std() > 10


@pytest.mark.parametrize(("given", "shift"), [(None, 2.0), (1.0, 1.0), (5.0, 5.0)])
def test_the_noise_levels_have_the_models_shift_or_the_callers(pipe, given, shift):
    steps = pipe.generate("a red apple", seed=1, num_inference_steps=3, time_shift=given)
    assert [step.sigma for step in steps] == pytest.approx(get_schedule(3, shift)[:-1])


def test_a_shift_by_resolution_follows_the_picture_size(components, tmp_path):
    sampler = dataclasses.replace(components.config.sampler, time_shift=None)
    config = dataclasses.replace(components.config, sampler=sampler)
    save_pretrained(tmp_path / "m", dataclasses.replace(components, config=config))
    pipe = SnapGenPipeline.from_pretrained(tmp_path / "m")
    for size, shift in ((32, 1.0), (384, 1 + 1 / 3)):
        steps = pipe.generate("a red apple", height=size, width=size, num_inference_steps=3)
        step = next(steps)
        assert step.metadata["time_shift"] == pytest.approx(shift)
        assert next(steps).sigma == pytest.approx(get_schedule(3, shift)[1])


def test_picture_k_of_a_batch_is_the_one_its_seed_draws_alone(pipe):
    together = draw(pipe, seed=3, num_images=3)
    for k, picture in enumerate(together):
        assert np.array_equal(picture, draw(pipe, seed=3 + k)[0])
    assert not np.array_equal(together[0], together[1])


def test_finished_pictures_of_a_batch_are_decoded_in_any_order(pipe):
    settings = {"num_inference_steps": 1, "num_images": 3, "seed": 4}
    steps, pictures = list(pipe.generate("a red apple", **settings)), draw(pipe, **settings)
    for k in (2, 0, 1, 1, 2):
        assert np.array_equal(np.array(steps[k].preview()), pictures[k])
    assert np.array_equal(np.array(steps[0].decode(steps[1].x0 + 0)), pictures[1])


def test_pictures_of_a_batch_are_decoded_in_other_threads(pipe):
    settings = {"num_inference_steps": 2, "num_images": 4, "seed": 4}
    steps, pictures = list(pipe.generate("a red apple", **settings)), draw(pipe, **settings)
    with ThreadPoolExecutor(3) as pool:
        previews = list(pool.map(lambda step: step.preview(), steps))
    for k, picture in enumerate(pictures):
        assert np.array_equal(np.array(previews[4 + k]), picture)


def test_an_interrupted_decoding_can_be_repeated(pipe, monkeypatch):
    settings = {"num_inference_steps": 1, "num_images": 3, "seed": 4}
    steps, pictures = list(pipe.generate("a red apple", **settings)), draw(pipe, **settings)

    def interrupt(latents):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipe.autoencoder, "decode", interrupt)
        steps[0].preview()
    for k, picture in enumerate(pictures):
        assert np.array_equal(np.array(steps[k].preview()), picture)


def test_nothing_random_comes_from_outside(pipe):
    mx.random.seed(1)
    first = draw(pipe, seed=9)
    mx.random.seed(2)
    assert np.array_equal(first, draw(pipe, seed=9))


def test_without_a_seed_pictures_differ(pipe):
    first, second = draw(pipe, seed=None), draw(pipe, seed=None)
    assert not np.array_equal(first, second)


def test_guidance_zero_is_the_negative_prompt_and_one_the_prompt(pipe):
    only = last(pipe.generate("a blue cat", guidance_scale=1))
    led_by_cat = last(pipe.generate("a blue cat", guidance_scale=1.000001))
    assert mx.allclose(only, led_by_cat, atol=1e-3)
    zero = last(pipe.generate("a red apple", negative_prompt="a blue cat", guidance_scale=0))
    assert mx.allclose(only, zero, atol=1e-4)
    assert not mx.allclose(only, last(pipe.generate("a red apple", guidance_scale=1)), atol=1e-2)


def test_unconditional_is_absent_text_for_models_that_say_so(components, tmp_path):
    config = dataclasses.replace(components.config, unconditional="absent")
    save_pretrained(tmp_path / "m", dataclasses.replace(components, config=config))
    pipe = SnapGenPipeline.from_pretrained(tmp_path / "m")
    network, masks = pipe.transformer, []

    class Recording:
        encode_text, dtype = network.encode_text, network.dtype

        def __call__(self, x_t, t, text, mask, **settings):
            masks.append(np.array(mask))
            return network(x_t, t, text, mask, **settings)

    pipe.transformer = Recording()
    absent = last(pipe.generate("a red apple", negative_prompt="  "))
    assert not masks[0][0].any() and masks[0][1].any()
    named = last(pipe.generate("a red apple", negative_prompt="a blue cat"))
    assert masks[-1].any(axis=1).all()
    plain = SnapGenPipeline(components)
    assert mx.array_equal(named, last(plain.generate("a red apple", negative_prompt="a blue cat")))
    assert not mx.allclose(absent, last(plain.generate("a red apple")), atol=1e-2)
    # Batches and teachers take the same text.
    [batch] = draw_latents(pipe.components, ["a red apple"], seeds=[0], network=network)
    assert mx.allclose(batch, absent[0], atol=1e-4)
    for folder, present in ((tmp_path / "m", False), (None, True)):
        if folder is None:
            save_pretrained(folder := tmp_path / "plain", components)
        condition = load_teacher(folder)[0].encode(["a red apple", "a cat"])
        assert bool(condition.empty_mask.any()) is present
        assert condition.empty_text.shape == (1, *condition.text.shape[1:])
        assert condition.mask.any(axis=1).all()


@pytest.mark.parametrize(("scale", "batch"), [(1, 1), (1.0, 1), (0, 2), (3, 2)])
def test_the_second_pass_runs_only_when_it_counts(model_folder, scale, batch):
    pipe = SnapGenPipeline.from_pretrained(model_folder)
    seen = []
    network = pipe.transformer

    class Recording:
        encode_text, dtype = network.encode_text, network.dtype

        def __call__(self, x_t, *args, **settings):
            seen.append(x_t.shape[0])
            return network(x_t, *args, **settings)

    pipe.transformer = Recording()
    pipe("a red apple", guidance_scale=scale)
    assert seen == [batch, batch]


def test_the_text_is_encoded_once_for_all_pictures(model_folder):
    pipe = SnapGenPipeline.from_pretrained(model_folder)
    encoder, calls = pipe.text_encoders[0], []

    class Recording:
        config, tokenizer, tokenize = encoder.config, encoder.tokenizer, encoder.tokenize

        def __call__(self, tokens, mask):
            calls.append(tokens.shape)
            return encoder(tokens, mask)

    pipe.text_encoders[0] = Recording()
    pipe("a red apple", num_images=2)
    assert calls == [(1, 16), (1, 16)]  # the prompt and the negative one


def test_steps_carry_previews_and_end_in_the_picture(pipe):
    steps = list(pipe.generate("a red apple", num_inference_steps=3, num_images=2, seed=4))
    assert [(s.image, s.seed, s.index, s.final) for s in steps] == [
        (k, 4 + k, i, i == 2) for i in range(3) for k in range(2)
    ]
    assert {step.batch for step in steps} == {range(2)}
    assert [s.sigma for s in steps[::2]] == get_schedule(3, 2.0)[:3]
    pictures = draw(pipe, num_inference_steps=3, num_images=2, seed=4)
    assert np.array_equal(np.array(steps[4].preview()), pictures[0])
    assert np.array_equal(np.array(steps[5].preview()), pictures[1])
    assert not np.array_equal(np.array(steps[0].preview()), pictures[0])


def test_the_callback_sees_every_step(pipe):
    seen = []
    pipe("a red apple", num_inference_steps=2, num_images=2, callback=seen.append)
    assert [(s.image, s.index) for s in seen] == [(0, 0), (1, 0), (0, 1), (1, 1)]


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 32), (96, 64)])
def test_other_sizes(pipe, height, width):
    [picture] = draw(pipe, height=height, width=width, num_inference_steps=1)
    assert picture.shape == (height, width, 3)


# --- loading ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "width"), [("full", 1.0), ("small", 0.5), ("tiny", 0.375)])
def test_model_width_draws_what_the_supernetwork_draws_at_it(components, model_folder, name, width):
    pipe = SnapGenPipeline.from_pretrained(model_folder, model_width=name)
    assert pipe.transformer.config.hidden_size == round(64 * width)
    whole = SnapGenPipeline(load_pretrained(model_folder))
    network = whole.transformer
    x_t, t = get_noise(0, 4, 8, 4), mx.array([0.7])
    text, mask = encode_prompts(["a red apple"], whole.text_encoders, transformer=whole.transformer)
    expected = network(x_t, t, text, mask, share=width)
    assert mx.allclose(pipe.transformer(x_t, t, text, mask), expected, atol=1e-5)


def test_model_widths_that_are_not_there(model_folder, components, tmp_path):
    with pytest.raises(UserError, match="did you mean 'tiny'"):
        SnapGenPipeline.from_pretrained(model_folder, model_width="tinny")
    SnapGenPipeline.from_pretrained(model_folder, model_width="small").save_pretrained(
        tmp_path / "small"
    )
    with pytest.raises(UserError, match="no width 'tiny', only full"):
        SnapGenPipeline.from_pretrained(tmp_path / "small", model_width="tiny")


def test_saved_and_loaded_pipelines_draw_the_same(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "m")
    again = SnapGenPipeline.from_pretrained(tmp_path / "m")
    assert np.array_equal(draw(pipe, seed=1), draw(again, seed=1))


def test_quantized_pipelines_draw_nearly_the_same(pipe, model_folder):
    exact = last(pipe.generate("a red apple"))
    errors = {}
    for bits in (4, 8):
        rounded = SnapGenPipeline.from_pretrained(model_folder, quantize=bits)
        x = last(rounded.generate("a red apple"))
        errors[bits] = (mx.abs(x - exact).mean() / mx.abs(exact).mean()).item()
        with pytest.raises(UserError, match="quantized in memory"):
            rounded.save_pretrained(model_folder.parent / "quantized")
    assert 0 < errors[8] < 0.05 < errors[4] < 1


def test_half_precision_draws_nearly_the_same(pipe, model_folder):
    half = SnapGenPipeline.from_pretrained(model_folder, dtype=mx.bfloat16)
    step = list(half.generate("a red apple"))[-1]
    assert step.metadata["dtype"] == "bfloat16"
    assert step.x0.dtype == mx.float32
    exact = last(pipe.generate("a red apple"))
    assert 0 < mx.abs(step.x0 - exact).mean() < 0.1 * mx.abs(exact).mean()


def test_the_package_offers_the_pipeline():
    assert mlx_snapgen.SnapGenPipeline is SnapGenPipeline
    with pytest.raises(AttributeError):
        _ = mlx_snapgen.nothing


# --- what it refuses ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": " \n"}, "prompt is empty"),
        ({"prompt": ["a", "b"]}, "prompt is empty"),
        ({"height": 100}, "height must be a positive multiple of 32 pixels: 100 is not, 96 is"),
        ({"width": 0}, "0 is not, 32 is"),
        ({"width": -64}, "-64 is not, 32 is"),
        ({"width": "tiny"}, "model_width"),
        ({"num_inference_steps": 0}, "num_inference_steps must be a whole number from 1"),
        ({"num_inference_steps": 1.5}, "num_inference_steps must be a whole number"),
        ({"guidance_scale": float("nan")}, "finite number"),
        ({"guidance_scale": -0.5}, "guidance_scale must be a finite number from 0, got -0.5"),
        ({"num_images": 0}, "num_images must be"),
        ({"seed": -1}, "seed must be a whole number from 0"),
        ({"seed": 2**63 - 1, "num_images": 2}, "seed must be"),
    ],
)
def test_impossible_arguments_are_named_before_any_work(pipe, settings, message):
    with pytest.raises(UserError, match=message):
        pipe.generate(**{"prompt": "a red apple"} | settings)


def test_numpy_numbers_are_numbers(pipe):
    settings = {"seed": np.int64(3), "num_inference_steps": np.int32(2)}
    assert np.array_equal(draw(pipe, **settings), draw(pipe, seed=3, num_inference_steps=2))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_latents_that_are_not_finite_are_an_error(model_folder, value):
    pipe = SnapGenPipeline.from_pretrained(model_folder)
    pipe.transformer.head.linear.bias = mx.full(pipe.transformer.head.linear.bias.shape, value)
    with pytest.raises(UserError, match="latents are not finite at step 1 of 2"):
        pipe("a red apple")


def test_pixels_that_are_not_finite_are_an_error(model_folder):
    pipe = SnapGenPipeline.from_pretrained(model_folder)
    pipe.autoencoder.decoder.out.bias = mx.full((12,), float("nan"))
    with pytest.raises(UserError, match="pictures are not finite"):
        pipe("a red apple")


# --- what it notices ----------------------------------------------------------------------------


def notices(pipe, prompt, **settings):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipe.generate(prompt, **settings)
    assert all(w.category is PromptWarning for w in caught)
    return [str(w.message) for w in caught]


@pytest.mark.parametrize(
    "prompt", ["a red apple", "An  APPLE", "two apples", "an automobile", "a blue ice cream cone"]
)
def test_known_prompts_pass_without_a_word(pipe, prompt):
    assert notices(pipe, prompt) == []


def test_a_prompt_that_names_nothing_known_is_noticed_and_drawn(pipe):
    [notice] = notices(pipe, "a red ice")
    assert "names nothing that this model can draw" in notice
    assert "apple, car" in notice
    with pytest.warns(PromptWarning):
        assert len(pipe("a red ice")) == 1


def test_a_long_prompt_is_noticed_with_what_is_cut(pipe):
    prompt = "a red apple next to a blue car next to a green cat next to a blue apple next to a car"
    found = [notice for notice in notices(pipe, prompt) if "longer than" in notice]
    assert len(found) == 2  # one for each text encoder
    kept = pipe.text_encoders[0].tokenizer.encode(prompt)[:14]
    cut = found[0].split("'")[1]
    assert "16 tokens" in found[0]
    assert prompt.endswith(cut)
    assert len(pipe.text_encoders[0].tokenizer.encode(prompt.removesuffix(cut))) == len(kept)


def test_characters_without_a_token_are_noticed(pipe):
    found = notices(pipe, "an apple 蘋果")
    assert "mean nothing here: 蘋果" in found[0]
    found = notices(pipe, "an apple 蘋\u200d\ufe0f")
    assert found[0].endswith("mean nothing here: 蘋")


def test_a_negative_prompt_without_guidance_is_noticed(pipe):
    assert notices(pipe, "an apple", negative_prompt="red") == []
    assert "no effect" in notices(pipe, "an apple", negative_prompt="red", guidance_scale=1)[0]


def test_a_model_without_vocabulary_knows_no_unknown_words(model_folder, tmp_path):
    copy = shutil.copytree(model_folder, tmp_path / "m")
    (copy / "vocabulary.json").unlink()
    assert notices(SnapGenPipeline.from_pretrained(copy), "a red ice") == []


def test_the_shared_model_is_as_it_was(components, model_folder):
    fresh = load_pretrained(model_folder)
    for name, value in tree_flatten(fresh.transformer.parameters()):
        assert mx.array_equal(value, dict(tree_flatten(components.transformer.parameters()))[name])
    assert dataclasses.asdict(fresh.config) == dataclasses.asdict(components.config)


def test_an_empty_picture_is_said(pipe):
    [step] = pipe.generate("a red apple", seed=1, num_inference_steps=1)
    for alpha, expected in (
        (0, ["the picture is empty: try another seed, or other words"]),
        (9, []),
    ):
        clear = Image.new("RGBA", (4, 4), (0, 0, 0, alpha))
        drawn = dataclasses.replace(step, decode=lambda _, clear=clear: clear)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert drawn.preview() is clear
        assert [warning.message.problem for warning in caught] == expected
