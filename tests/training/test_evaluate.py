"""Scores follow GenEval's rules, the validation loss its formula, the command its promises."""

import dataclasses
import json
from types import SimpleNamespace

import mlx_snapgen  # noqa: F401

# isort: split
import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map
from PIL import Image

from mlx_snapgen.checkpoint.model import load_pretrained
from mlx_snapgen.draw import draw_pictures
from mlx_snapgen.errors import UserError
from mlx_snapgen.lora.adapters import add_lora, train_only
from mlx_snapgen.lora.files import save_lora
from mlx_snapgen.networks.efficient_dit import encode_prompts
from mlx_snapgen.sampling import denoise, get_noise, get_schedule
from mlx_snapgen.settings import DrawSettings
from train import evaluate
from train.data.stickers.captions import Placed, Scene, plain_caption
from train.data.stickers.render import render
from train.data.stickers.scenes import HELD_OUT_CATEGORIES, noun_scene
from train.data.stickers.source import ValidationStickers
from train.data.stickers.vocabulary import NOUNS, known_nouns
from train.evaluation import validation
from train.evaluation.stickers.detector import Detection
from train.evaluation.stickers.geneval import (
    SIX,
    Prompt,
    accuracies,
    fixed_prompts,
    is_correct,
    relations,
)
from train.evaluation.stickers.report import Row, table
from train.evaluation.stickers.score import gallery_prompts, judge, noun_prompts, quick_score

NOUN = {noun.name: noun for noun in NOUNS}


def scene(category, *things, relation=None):
    """A scene of (noun, color) things."""
    placed = tuple(Placed(NOUN[name], color, 48, 0, 0) for name, color in things)
    return Scene(category, placed, "white", relation=relation)


def seen(noun, color=None, box=(0, 0, 40, 40), score=1.1):
    return Detection(noun, color, box, score)


# --- prompts ----------------------------------------------------------------------------------


def test_prompts_are_fixed_and_longer_lists_begin_with_shorter_ones():
    prompts = fixed_prompts(8, 100)
    assert [p.scene.category for p in prompts] == [c for c in SIX for _ in range(8)]
    longer = fixed_prompts(25, 100)
    by_number = {prompt.number: prompt for prompt in longer}
    assert len(by_number) == 150
    assert all(by_number[prompt.number] == prompt for prompt in prompts)
    assert len({p.scene.placed for p in longer}) > 140


def test_half_of_the_prompts_are_plain_and_a_quarter_of_the_combinations_held_out():
    prompts = fixed_prompts(24, 100)
    for k, prompt in enumerate(prompts):
        if k % 2 == 0:
            assert prompt.text == plain_caption(prompt.scene)
    for category in SIX:
        held_out = [p.held_out for p in prompts if p.scene.category == category]
        assert sum(held_out) == (6 if category in HELD_OUT_CATEGORIES else 0)


# --- judgment --------------------------------------------------------------------------------


def test_relations_need_distance_and_direction():
    box = (40, 40, 20, 20)
    assert relations((0, 40, 20, 20), box) == {"left"}
    assert relations((80, 40, 20, 20), box) == {"right"}
    assert relations((40, 0, 20, 20), box) == {"above"}
    assert relations((40, 80, 20, 20), box) == {"below"}
    assert relations((0, 0, 20, 20), box) == {"left", "above"}
    assert relations(box, box) == set()
    # The dead zone is a tenth of 20 + 20: four pixels.
    assert relations((44, 40, 20, 20), box) == set()
    # Offset (40, 20), after the dead zone (36, 16): cosines .80 and .36 with the axes.
    assert relations((80, 60, 20, 20), box) == {"right"}


def test_single_object_needs_the_object():
    apple = scene("single_object", ("apple", None))
    assert is_correct(apple, [seen("cat"), seen("apple", "red")])
    assert not is_correct(apple, [seen("cat")])
    assert not is_correct(apple, [])


def test_two_objects_needs_both():
    both = scene("two_objects", ("apple", None), ("cat", None))
    assert is_correct(both, [seen("cat"), seen("apple", "red")])
    assert not is_correct(both, [seen("cat"), seen("cat")])


def test_counting_is_exact():
    three = scene("counting", *[("cat", None)] * 3)
    assert is_correct(three, [seen("cat")] * 3)
    assert is_correct(three, [seen("cat")] * 3 + [seen("dog")])
    for wrong in (0, 1, 2, 4):
        assert not is_correct(three, [seen("cat")] * wrong)


def test_colors_belong_to_their_objects():
    one = scene("colors", ("apple", "blue"))
    assert is_correct(one, [seen("apple", "blue")])
    assert not is_correct(one, [seen("apple", "red"), seen("car", "blue")])
    two = scene("color_attribution", ("apple", "blue"), ("car", "green"))
    assert is_correct(two, [seen("car", "green"), seen("apple", "blue")])
    assert not is_correct(two, [seen("car", "blue"), seen("apple", "green")])


def test_position_asks_the_best_detection_of_each():
    left = scene("position", ("apple", None), ("cat", None), relation="left")
    here, there = (0, 40, 30, 30), (80, 40, 30, 30)
    assert is_correct(left, [seen("apple", box=here), seen("cat", box=there)])
    assert not is_correct(left, [seen("apple", box=there), seen("cat", box=here)])
    assert not is_correct(left, [seen("apple", box=here), seen("cat", box=here)])
    assert not is_correct(left, [seen("apple", box=here)])


def test_accuracies_average_categories_not_pictures():
    prompts = [
        Prompt("", scene(category, ("cat", None)), held_out=k == 1, number=k)
        for category in SIX
        for k in range(2)
        if category in HELD_OUT_CATEGORIES or k == 0
    ]
    correct = [p.scene.category in ("colors", "counting") or p.held_out for p in prompts]
    scores = accuracies(prompts, correct)
    assert scores["counting"] == scores["colors"] == 1
    assert scores["single_object"] == 0 and scores["position"] == 0.5
    assert scores["overall"] == pytest.approx((0 + 0.5 + 1 + 1 + 0.5 + 0.5) / 6)
    assert scores["held_out"] == 1
    only_seen = [dataclasses.replace(p, held_out=False) for p in prompts]
    assert accuracies(only_seen, correct)["held_out"] is None


# --- ceilings ---------------------------------------------------------------------------------


def test_rendered_prompts_score_near_one_and_shuffled_ones_near_zero(font):
    prompts = fixed_prompts(8, 100)
    pictures = np.stack([render(prompt.scene) for prompt in prompts])
    right = accuracies(prompts, judge(prompts, pictures, num_nouns=100)[0])
    assert right["overall"] >= 0.97 and right["held_out"] >= 0.97
    shuffled = np.roll(pictures, -11, axis=0)
    assert accuracies(prompts, judge(prompts, shuffled, num_nouns=100)[0])["overall"] <= 0.05


# --- validation loss --------------------------------------------------------------------------


class _Encoder:
    """States that hold the prompt's length."""

    def tokenize(self, prompts):
        tokens = mx.array([[len(prompt)] for prompt in prompts], mx.int32)
        return tokens, mx.ones(tokens.shape, mx.bool_)

    def __call__(self, tokens, mask):
        return tokens[..., None].astype(mx.float32)


class _Velocity:
    """v = a x_t + b t + c (prompt length) share."""

    dtype = mx.float32

    def encode_text(self, states):
        ((text, mask),) = states
        return text, mask

    def __call__(self, x_t, t, text, mask, share):
        last = 0.01 * text.reshape(-1, 1, 1, 1) * share
        return 0.3 * x_t + 0.5 * t[:, None, None, None] + last


def test_validation_losses_are_the_formula():
    rng = np.random.default_rng(0)
    x0, eps = rng.normal(size=(2, 5, 4, 4, 3)).astype(np.float32)
    captions = ["a", "bc", "def", "ghij", "klmno"]
    data = validation.ValidationSet(mx.array(x0), mx.array(eps), captions)
    stub = SimpleNamespace(transformer=_Velocity(), text_encoders=[_Encoder()])
    losses = validation.validation_losses(stub, data, share=0.5, batch_size=2)
    lengths = np.array([len(caption) for caption in captions]).reshape(-1, 1, 1, 1)
    for k in range(8):
        t = (k + 0.5) / 8
        v = 0.3 * ((1 - t) * x0 + t * eps) + 0.5 * t + 0.01 * lengths * 0.5
        assert losses[k] == pytest.approx(np.mean((v - (eps - x0)) ** 2), rel=1e-5)


def test_validation_set_is_the_same_every_time(font, components):
    first, again = (
        validation.validation_set(components, ValidationStickers(100), count=6) for _ in range(2)
    )
    assert mx.array_equal(first.latents, again.latents) and mx.array_equal(first.noise, again.noise)
    shorter = validation.validation_set(components, ValidationStickers(100), count=3)
    assert mx.array_equal(first.noise[:3], shorter.noise)
    assert not mx.array_equal(first.noise[0], first.noise[1])
    seed = validation.noise_seed(1, first.captions[1])
    assert mx.array_equal(first.noise[1:2], get_noise(seed, *first.latents.shape[1:]))
    # The digest is part of the metric: losses of different days compare only while it stays.
    assert validation.noise_seed(0, "an apple") == PINNED_SEED


PINNED_SEED = 2436758733


# --- sampling ---------------------------------------------------------------------------------


def test_pictures_do_not_depend_on_their_batch(components):
    prompts, seeds = ["a red apple", "a cat", "a blue car"], [5, 6, 7]
    together = draw_pictures(components, prompts, seeds=seeds, batch_size=3)
    apart = draw_pictures(components, prompts, seeds=seeds, batch_size=2)
    assert together.shape == (3, 32, 64, 3) and together.dtype == np.uint8
    assert np.abs(together.astype(int) - apart).max() <= 1
    assert np.abs(together[0].astype(int) - together[1]).max() > 20


@pytest.mark.parametrize("guidance", [0.0, 1.0, 3.0])
def test_sampling_is_the_samplers_formula(components, guidance):
    """Guidance 0 is the picture of the empty prompt, 1 that of the prompt alone."""
    settings = DrawSettings(num_inference_steps=3, guidance_scale=guidance, time_shift=2.0)
    (picture,) = draw_pictures(components, ["a red apple"], seeds=[5], settings=settings, share=0.5)
    transformer = components.transformer
    conditions = [
        encode_prompts([prompt], components.text_encoders, transformer=components.transformer)
        for prompt in ("", "a red apple")
    ]

    def velocity(x_t, sigma):
        t = mx.array([sigma])
        without, given = (transformer(x_t, t, text, mask, share=0.5) for text, mask in conditions)
        return (1 - guidance) * without + guidance * given

    *_, last = denoise(velocity, get_noise(5, 4, 8, 4), get_schedule(3, 2.0))
    expected = np.array(components.autoencoder.decode(last.x_t)[0])
    expected = np.rint((np.clip(expected, -1, 1) + 1) * 127.5)
    assert np.abs(picture - expected).max() <= 1


def test_sampling_refuses_pictures_that_are_not_finite(components):
    broken = dataclasses.replace(components, transformer=_Nan(components.transformer))
    with pytest.raises(UserError, match="not finite"):
        draw_pictures(broken, ["a cat"], seeds=[0])


class _Nan:
    def __init__(self, transformer):
        self.encode_text, self.dtype = transformer.encode_text, transformer.dtype

    def __call__(self, x_t, t, text, mask, **settings):
        return mx.full(x_t.shape, float("nan"))


def test_sampling_refuses_a_width_that_the_model_lacks(components):
    with pytest.raises(UserError, match="holds the widths"):
        draw_pictures(components, ["a cat"], seeds=[0], share=0.7)


def test_quick_score_of_a_random_model_is_about_nothing(font, components):
    scores = quick_score(components, 100, per_category=1, steps=1, share=0.375)
    assert set(SIX) < set(scores) and scores["overall"] <= 0.2


# --- the command ------------------------------------------------------------------------------


def test_table_has_a_line_per_row_and_gaps_where_a_ceiling_has_no_number():
    scores = dict.fromkeys(SIX, 0.5) | {"overall": 0.5, "overall_error": 0.04, "held_out": 0.25}
    rows = [
        Row("tiny", scores, [0.5, 0.7], 0.125, []),
        Row("rendered scenes", scores | {"held_out": None}, [], None, []),
    ]
    head, rule, tiny, ceiling = table(rows).splitlines()
    assert "| single object | two objects | counting |" in head
    assert len({line.count("|") for line in (head, rule, tiny, ceiling)}) == 1
    assert tiny.endswith("| 0.500 ± 0.040 | 0.25 | 0.6000 | 0.12 |")
    assert ceiling.endswith("| 0.500 ± 0.040 |  |  |  |")


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["evaluate", *map(str, arguments)])
    evaluate.main()


def test_command_writes_table_results_and_sheets(font, model_folder, tmp_path, monkeypatch, capsys):
    output = tmp_path / "scores"
    arguments = ["--model", model_folder, "--output", output, "--num-nouns", 100]
    arguments += [
        "--per-category",
        1,
        "--validation-scenes",
        2,
        "--model-widths",
        "tiny",
        "--steps",
        1,
    ]
    run(monkeypatch, *arguments)
    assert (output / "table.md").read_text() == capsys.readouterr().out
    results = json.loads((output / "results.json").read_text())
    assert [row["name"] for row in results["rows"]] == [
        "tiny",
        "rendered scenes",
        "reconstructed scenes",
    ]
    assert results["rows"][1]["scores"]["overall"] == 1
    assert len(results["rows"][0]["validation_losses"]) == 8
    assert results["settings"]["guidance"] == 3.0
    for name in ("tiny", "rendered_scenes", "reconstructed_scenes"):
        assert Image.open(output / f"{name}.png").width > 128
    with pytest.raises(UserError, match="exists"):
        run(monkeypatch, *arguments)


def test_stickers_are_scored_if_they_are_the_data(font, model_folder, monkeypatch, capsys):
    arguments = ["--model", model_folder, "--data", "stickers:nouns=100", "--model-widths", "tiny"]
    arguments += ["--per-category", 1, "--validation-scenes", 2, "--steps", 1, "--no-ceilings"]
    run(monkeypatch, *arguments)
    said = capsys.readouterr().out
    run(monkeypatch, *arguments[:2], *arguments[4:], "--num-nouns", 100)
    again = capsys.readouterr().out
    assert said.splitlines()[2].split("|")[1:11] == again.splitlines()[2].split("|")[1:11]


def test_gallery(font, model_folder, tmp_path, monkeypatch):
    arguments = ["--model", model_folder, "--output", tmp_path / "look", "--num-nouns", 100]
    run(monkeypatch, *arguments, "--gallery", "--steps", 1, "--guidance", 1)
    assert [p.name for p in (tmp_path / "look").iterdir()] == ["gallery.png"]
    texts = gallery_prompts(40, 100)
    assert len(set(texts)) == 40 and texts[0] == "an apple"


def test_one_noun_is_scored_with_and_without_a_lora(
    font, model_folder, tmp_path, monkeypatch, capsys
):
    network = load_pretrained(model_folder).transformer
    mx.random.seed(0)
    add_lora(network, 2, alpha=2.0, targets=["self_attention.*_proj"])
    train_only(network, "default")
    network.update(tree_map(lambda p: p + 0.2, network.trainable_parameters()))
    save_lora(tmp_path / "zebra.safetensors", network)
    arguments = [
        "--model",
        model_folder,
        "--noun",
        "zebra",
        "--num-nouns",
        100,
        "--model-widths",
        "tiny",
    ]
    arguments += ["--per-category", 4, "--steps", 1]
    for name, lora in (("before", []), ("after", ["--lora", tmp_path / "zebra.safetensors"])):
        run(monkeypatch, *arguments, *lora, "--output", tmp_path / name)
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == "| | zebra |" and lines[2] == "| tiny | 0.000 ± 0.000 |"
        assert lines[3] == "| rendered scenes | 1.000 ± 0.000 |"
        assert (tmp_path / name / "table.md").read_text().splitlines() == lines
    drawn = [(tmp_path / name / "tiny.png").read_bytes() for name in ("before", "after")]
    assert drawn[0] != drawn[1]
    with pytest.raises(UserError, match="did you mean 'zebra'"):
        run(monkeypatch, "--model", model_folder, "--noun", "zebr", "--output", tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_prompts_of_a_noun_are_drawn_apart_from_its_training_pictures():
    prompts = noun_prompts("zebra", 20)
    assert (
        all("zebra" in p.text.lower() for p in prompts) and len({p.number for p in prompts}) == 20
    )
    assert prompts[:7] == noun_prompts("zebra", 7)
    learned_from = [noun_scene("zebra", 0, k) for k in range(20)]
    assert sum(p.scene == s for p, s in zip(prompts, learned_from, strict=True)) <= 2


def test_mistakes_are_said(model_folder, tmp_path, monkeypatch):
    for arguments, message in [
        (["--per-category", 0], "at least 1"),
        (["--seed", -1], "not be negative"),
        (["--gallery"], "needs --output"),
        ([], "give --num-nouns"),
        (["--num-nouns", 100, "--model-widths", "tinny"], "invalid choice: 'tinny'"),
    ]:
        with pytest.raises(UserError, match=message):
            run(monkeypatch, "--model", model_folder, *arguments)


def test_known_nouns_must_be_the_first_of_the_vocabulary(components):
    names = [noun.name for noun in NOUNS[:30]]
    good = dataclasses.replace(components, vocabulary={"nouns": names})
    assert known_nouns(good) == 30
    with pytest.raises(UserError, match="another vocabulary"):
        known_nouns(dataclasses.replace(good, vocabulary={"nouns": names[::-1]}))
