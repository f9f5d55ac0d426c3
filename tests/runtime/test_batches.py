"""Pictures of a batch are those that are drawn alone, bit for bit on the CPU."""

import json
import os
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlx_snapgen.checkpoint.memory import default_batch_size, needed_bytes, transformer_bytes
from mlx_snapgen.draw import draw_latents, draw_pictures
from mlx_snapgen.errors import UserError
from mlx_snapgen.generate import main
from mlx_snapgen.metadata import read_metadata
from mlx_snapgen.networks import layers, products
from mlx_snapgen.open_model import open_model
from mlx_snapgen.pipeline import SnapGenPipeline
from mlx_snapgen.settings import DrawSettings, ModelChoice
from tests.tiny import with_streams

PROMPTS = ("a cat", "three apples on a blue background", "a green car to the left of a cat")
pytestmark = pytest.mark.filterwarnings("ignore::mlx_snapgen.prompt_check.PromptWarning")
SMALLEST = DrawSettings(num_inference_steps=1)


@pytest.fixture(params=[1, 2], ids=["one stream", "two streams"])
def streams(request, monkeypatch):
    with_streams(request.param, monkeypatch)


@pytest.fixture(scope="module")
def pipe(model_folder):
    return SnapGenPipeline.from_pretrained(model_folder)


def drawn(steps):
    """Latents and pictures of the final steps, by their index."""
    return {s.image: (np.array(s.x0), np.array(s.preview())) for s in steps if s.final}


def levels():
    """How far a picture of a batch may be from the one drawn alone."""
    return 0 if mx.default_device().type == mx.DeviceType.cpu else 1


def check_equal(pipe, settings, prompts=PROMPTS):
    """Draw the prompts in one batch and one by one."""
    together = list(pipe.generate_prompts(prompts, settings))
    assert {step.batch for step in together} == {range(len(prompts))}
    for k, (latents, picture) in drawn(together).items():
        [alone] = drawn(pipe.generate(replace(settings, prompt=prompts[k]))).values()
        assert levels() or np.array_equal(latents, alone[0])
        assert np.abs(picture.astype(int) - alone[1]).max() <= levels()


@pytest.mark.usefixtures("streams")
@pytest.mark.parametrize("width", ["full", "small", "tiny"])
def test_pictures_of_the_default_model_do_not_depend_on_their_batch(width):
    pipe = SnapGenPipeline.from_pretrained(model_width=width)
    # In the few-step mode, whose LoRA has products with few outputs, and with guidance.
    check_equal(pipe, DrawSettings(num_inference_steps=1, seed=3))
    guided = DrawSettings(num_inference_steps=1, few_step=False, guidance_scale=4.0, seed=5)
    check_equal(pipe, guided, PROMPTS[:2])
    start = Image.fromarray(np.tile(np.arange(128, dtype=np.uint8), (128, 1))).convert("RGB")
    check_equal(pipe, DrawSettings(num_inference_steps=2, image=start, strength=0.5), PROMPTS[:2])


def test_pictures_of_one_prompt_have_the_next_seeds_and_their_own_noise(pipe):
    steps = drawn(pipe.generate("a cat", seed=4, num_images=5, batch_size=2))
    for k, (latents, _) in steps.items():
        [alone] = drawn(pipe.generate("a cat", seed=4 + k)).values()
        assert np.array_equal(latents, alone[0])
    assert list(steps) == [0, 1, 2, 3, 4]


@pytest.mark.usefixtures("streams")
def test_long_attention_is_cut_as_for_one_picture(pipe, monkeypatch):
    monkeypatch.setattr(layers, "PART_OF_SCORES", 300)
    check_equal(pipe, SMALLEST)
    check_equal(pipe, DrawSettings(num_inference_steps=1, guidance_scale=3.0), PROMPTS[:2])


@pytest.mark.parametrize("each", [1, 2])
def test_products_with_other_bits_are_multiplied_picture_by_picture(monkeypatch, each):
    x = mx.random.normal((each * 3, 8, 32), key=mx.random.key(0))
    weight = mx.random.normal((5, 32), key=mx.random.key(1))
    asked = []
    monkeypatch.setattr(products, "_rows_are_equal", lambda *a: asked.append(a))
    with products.apart(3):
        out = products.product(x, weight)
    assert asked == [((each, 3, 8, 5, 32), False)]
    for k in range(3):
        assert mx.array_equal(out[k::3], x[k::3] @ weight.T)
    assert products.pictures_apart() == 1


def test_rows_that_a_product_rounds_in_another_way_are_found(monkeypatch):
    assert products._rows_are_equal((1, 2, 64, 64, 32), True)

    def other(x, weight, bias):
        return x @ weight.T + 1e-6 * len(x)

    monkeypatch.setattr(products, "_product", other)
    assert not products._rows_are_equal((1, 2, 64, 64, 33), False)


@pytest.mark.parametrize("shape", [(2, 5, 8), (3, 8)])
@pytest.mark.parametrize("types", [(mx.float32,) * 3, (mx.bfloat16,) + (mx.float32,) * 2])
def test_gradients_of_a_trained_product_are_those_of_a_product(shape, types):
    """Also in type: a LoRA in float32 leaves the gradients of a network in bfloat16 as they are."""
    shapes = shape, (4, 8), (4,)
    for count in (2, 3):  # without a bias and with one
        arrays = [mx.random.normal(s, key=mx.random.key(i)) for i, s in enumerate(shapes[:count])]
        arrays = [x.astype(dtype) for x, dtype in zip(arrays, types, strict=False)]
        grad = mx.grad(lambda *p: products.product(*p).square().sum(), argnums=tuple(range(count)))
        expected = grad(*arrays)
        with products.trained():
            found = grad(*arrays)
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == b.dtype and mx.allclose(a, b, rtol=1e-5, atol=1e-5)


def test_the_evaluation_draws_what_is_drawn_alone(components):
    done = []

    def draw(prompts, seeds):
        return draw_pictures(
            components, prompts, seeds=seeds, settings=SMALLEST, progress=done.append
        )

    together = draw(PROMPTS, [4, 2, 7])
    # Each step and each decoded picture.
    assert len(done) == SMALLEST.num_inference_steps + len(PROMPTS)
    assert sum(done) == pytest.approx(len(PROMPTS))
    for picture, prompt, seed in zip(together, PROMPTS, (4, 2, 7), strict=True):
        assert np.array_equal(picture, draw([prompt], [seed])[0])


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_network_gets_the_noise_level_of_each_row(components, guidance_scale):
    seen = []

    def network(x_t, t, *text, **more):
        seen.append((len(x_t), t.tolist()))
        return components.transformer(x_t, t, *text, **more)

    settings = DrawSettings(num_inference_steps=1, guidance_scale=guidance_scale)
    mx.eval(draw_latents(components, PROMPTS, seeds=[1, 2, 3], settings=settings, network=network))
    rows = 3 if guidance_scale == 1 else 6
    assert seen == [(rows, [1.0] * rows)]


# --- how many -----------------------------------------------------------------------------------


def test_the_default_is_what_half_of_the_memory_holds(monkeypatch):
    assert default_batch_size(0, 128, 128) == 8
    assert default_batch_size(0, 256, 256) == 4
    assert default_batch_size(0, 1024, 1024) == 1
    assert default_batch_size(0, 1024, 1024, most=3) == 3
    three = needed_bytes(1 << 20, 128, 128, pictures=3, guided=True)
    monkeypatch.setattr("mlx_snapgen.checkpoint.memory.machine_memory", lambda: 2 * three)
    assert default_batch_size(1 << 20, 128, 128) == 3
    monkeypatch.setattr("mlx_snapgen.checkpoint.memory.machine_memory", lambda: 2 * three - 2)
    assert default_batch_size(1 << 20, 128, 128) == 2


def test_pictures_are_denoised_together_and_decoded_one_by_one():
    one, four, guided = (
        needed_bytes(0, 512, 512, pictures=pictures, guided=guided) - needed_bytes(0, 0, 0)
        for pictures, guided in ((1, False), (4, False), (4, True))
    )
    assert one < four < 4 * one and guided == 2 * four
    # 16 pictures of 1024 x 1024 take less than 8 GiB.
    assert needed_bytes(1 << 28, 1024, 1024, pictures=16) < 8 << 30


def test_a_batch_beyond_the_memory_is_refused_with_one_that_fits(pipe, model_folder, monkeypatch):
    transformer = transformer_bytes(open_model(ModelChoice(str(model_folder))), ModelChoice())
    most = needed_bytes(transformer, 32, 64, pictures=2, guided=True)
    monkeypatch.setattr("mlx_snapgen.checkpoint.memory.machine_memory", lambda: most)
    with pytest.raises(UserError, match=r"with a batch of 200 needs .*: choose --batch-size \d"):
        pipe.generate("a cat", batch_size=200, num_images=200)
    with pytest.raises(UserError, match="with a batch of 200"):
        next(pipe.generate_prompts(["a cat"], DrawSettings(batch_size=200)))
    # There are no more pictures than these.
    pipe.generate("a cat", batch_size=200, num_images=2)
    for size in (0, 257, 1.5):
        with pytest.raises(UserError, match="batch_size must be a whole number from 1 to 256"):
            pipe.generate("a cat", batch_size=size)


def test_low_memory_draws_one_by_one(model_folder):
    pipe = SnapGenPipeline.from_pretrained(model_folder, low_memory=True)
    steps = pipe.generate("a cat", num_images=2, num_inference_steps=2)
    assert [(s.image, s.index) for s in steps] == [(0, 0), (0, 1), (1, 0), (1, 1)]


# --- the command --------------------------------------------------------------------------------


@pytest.fixture
def run(model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fast = ("--steps", "1", "--guidance", "1", "--seed", "7", "--model", str(model_folder))
    return lambda *arguments: main([*arguments, *fast])


def test_a_batch_of_a_prompts_file_has_several_prompts(run, capsys):
    Path("prompts.txt").write_text("a red apple\na blue cat\n")
    for size in (3, 1):
        more = ("--num-images", "2", "--batch-size", str(size), "--output", f"{size}/")
        run("--prompts-file", "prompts.txt", "--json", *more)
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [(line["prompt"], line["seed"]) for line in lines] == [
            (prompt, seed) for prompt in ("a red apple", "a blue cat") for seed in (7, 8)
        ]
        assert "batch_size" not in lines[0]
    names = ["a-blue-cat-1.png", "a-blue-cat.png", "a-red-apple-1.png", "a-red-apple.png"]
    for name in names:
        assert np.array_equal(Image.open(f"3/{name}"), Image.open(f"1/{name}"))
        assert read_metadata(f"3/{name}") == read_metadata(f"1/{name}")
    assert sorted(os.listdir("3")) == names


def test_the_prompts_before_a_bad_line_are_drawn(run):
    Path("prompts.txt").write_bytes(b"a red apple\na blue cat\n\xff\n")
    with pytest.raises(UserError, match="line 3"):
        run("--prompts-file", "prompts.txt", "--batch-size", "8", "--output", "out/")
    assert sorted(os.listdir("out")) == ["a-blue-cat.png", "a-red-apple.png"]


def test_an_interrupted_batch_keeps_the_finished_pictures(run, capsys, monkeypatch):
    saved = []

    def save(*arguments, **more):
        if len(saved) == 3:
            raise KeyboardInterrupt
        saved.append(arguments)
        return Path("saved.png")

    monkeypatch.setattr("mlx_snapgen.generate.save_picture", save)
    with pytest.raises(KeyboardInterrupt):
        run("a cat", "--num-images", "6", "--batch-size", "5")
    captured = capsys.readouterr()
    assert captured.out.count("saved.png (seed") == 3
    assert captured.err == (
        "lost 2 unfinished pictures of this batch; --batch-size 1 draws one by one\n"
    )
