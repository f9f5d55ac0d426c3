"""Public teachers behind the trainers' interface: guidance, few steps, folders, distillation."""

import dataclasses
import json

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_snapgen.errors import UserError
from mlx_snapgen.lora.adapters import linear_layers
from mlx_snapgen.presets import FOUR_STEPS
from mlx_snapgen.teachers import folder as folders
from mlx_snapgen.teachers.checkpoint import CheckpointTeacher, load_teacher
from mlx_snapgen.teachers.config import KLEIN, LIGHTNING, TRANSFORMERS, Schedule
from mlx_snapgen.teachers.flow import FlowTeacher, shifted_levels
from tests.tiny import (
    AUTOENCODER,
    FLUX2,
    TEACHER,
    make_student,
    randomize,
    write_lightning_lora,
    write_teacher,
)
from train.data.conditions import Conditions
from train.data.prompts import PromptList
from train.data.simulation import STUDENT, Simulation, sized_prompts
from train.loop.teacher import same_latents
from train.objectives.distillation import Distillation
from train.objectives.elastic import ElasticStep
from train.objectives.kdmd import DMD, Distilled, DMDStep, critic_name

PROMPTS = ["a red car", "two cats"]
pytestmark = pytest.mark.usefixtures("no_language_model")


@pytest.fixture(scope="module")
def qwen_folder(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("qwen") / "teacher")


def inputs(height=4, width=6):
    x_t = mx.random.normal((2, height, width, 4), key=mx.random.key(0))
    return x_t, mx.array([0.3, 0.9])


def test_the_folder_tells_what_teacher_it_is(qwen_folder, model_folder):
    teacher, autoencoder = load_teacher(qwen_folder)
    assert teacher.config == TEACHER and autoencoder.config == AUTOENCODER
    assert teacher.feature_dims == 32
    condition = teacher.encode(PROMPTS)
    v, features = teacher.velocity_and_features(*inputs(), condition)
    assert v.shape == (2, 4, 6, 4) and features.shape == (2, 6, 32)
    assert isinstance(load_teacher(model_folder)[0], CheckpointTeacher)


@pytest.mark.parametrize("scale", [4.0, 1.5])
def test_guidance_keeps_the_length_of_each_patch(qwen_folder, scale):
    """Written out on packed tokens: 2 x 2 latents of 4 channels are one vector."""
    teacher, _ = load_teacher(qwen_folder)
    condition, (x_t, t) = teacher.encode(PROMPTS), inputs()
    v = np.array(teacher.network(x_t, t, condition.text, condition.mask))
    empty = [mx.repeat(y, 2, 0) for y in (condition.empty_text, condition.empty_mask)]
    v_empty = np.array(teacher.network(x_t, t, *empty))
    found = np.array(teacher.velocity(x_t, t, condition, guidance_scale=scale))
    np.testing.assert_array_equal(np.array(teacher.velocity(x_t, t, condition)), v)
    for b in range(2):
        for i in (0, 2):
            for j in (0, 2, 4):
                patch = (b, slice(i, i + 2), slice(j, j + 2))
                guided = v_empty[patch] + scale * (v[patch] - v_empty[patch])
                guided *= np.linalg.norm(v[patch]) / np.linalg.norm(guided)
                np.testing.assert_allclose(found[patch], guided, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["public", "checkpoint"])
def test_guided_velocity_and_features_take_one_pass_with_the_prompts(
    qwen_folder, model_folder, kind, monkeypatch
):
    teacher, _ = load_teacher(qwen_folder if kind == "public" else model_folder)
    condition, (x_t, t) = teacher.encode(PROMPTS), inputs(4, 8)
    given = []
    network = type(teacher.network).__call__

    def counted(self, x_t, t, text, *rest, **settings):
        given.extend(np.array(text))
        return network(self, x_t, t, text, *rest, **settings)

    monkeypatch.setattr(type(teacher.network), "__call__", counted)
    v, features = teacher.velocity_and_features(x_t, t, condition, guidance_scale=3.0)
    # Two prompts and two empty ones.
    prompts = np.array(condition.text)
    assert len(given) == 4
    assert sum(any(np.array_equal(row, prompt) for prompt in prompts) for row in given) == 2
    expected = teacher.velocity(x_t, t, condition, guidance_scale=3.0)
    np.testing.assert_array_equal(np.array(v), np.array(expected))
    plain, of_prompts = teacher.velocity_and_features(x_t, t, condition)
    np.testing.assert_allclose(np.array(features), np.array(of_prompts), atol=1e-4)
    assert float(mx.abs(v - plain).max()) > 1e-3


def test_the_few_step_lora_is_on_for_few_steps_alone(qwen_folder, tmp_path):
    plain, _ = load_teacher(qwen_folder)
    config = dataclasses.replace(TEACHER, few_step=LIGHTNING)
    folder = write_teacher(tmp_path / "teacher", config)
    updates = write_lightning_lora(folder / "few_step.safetensors", plain.network)
    assert len(updates) == 2 * 12
    teacher, _ = load_teacher(folder)
    condition, (x_t, t) = teacher.encode(PROMPTS), inputs()
    many = plain.velocity(x_t, t, condition, guidance_scale=3.0)
    few, few_features = teacher.velocity_and_features(x_t, t, condition, few_step=True)
    assert mx.array_equal(teacher.velocity(x_t, t, condition, guidance_scale=3.0), many)
    for layer, update in updates.items():
        linear_layers(plain.network)[layer].weight += update
    expected, features = plain.velocity_and_features(x_t, t, condition)
    assert mx.allclose(few, expected, rtol=1e-4, atol=1e-4 * mx.abs(expected).max())
    assert mx.allclose(few_features, features, rtol=1e-4, atol=1e-4 * mx.abs(features).max())
    assert not mx.allclose(few, teacher.velocity(x_t, t, condition), rtol=1e-2)


def test_without_a_few_step_mode_there_is_none(qwen_folder):
    teacher, _ = load_teacher(qwen_folder)
    assert not teacher.has_few_step
    with pytest.raises(UserError, match="no few-step mode: convert it with --few-step-lora"):
        teacher.velocity_and_features(*inputs(), teacher.encode(PROMPTS), few_step=True)


def test_a_freed_text_encoder_says_so(qwen_folder):
    teacher, _ = load_teacher(qwen_folder)
    teacher.free_text_encoder()
    with pytest.raises(UserError, match="text encoder was freed"):
        teacher.encode(PROMPTS)


def test_noise_levels():
    """exp(mu) by hand: 4096 tokens lie at 0.5 + 0.4 * 3840 / 7936."""
    shift = np.exp(0.5 + 0.4 * 3840 / 7936)
    raw = [shift * s / (1 + (shift - 1) * s) for s in (1, 2 / 3, 1 / 3)]
    expected = [1 - (1 - s) * (1 - 0.02) / (1 - raw[-1]) for s in raw] + [0]

    def levels(schedule, tokens, count):
        shift = schedule.time_shift(tokens, count)
        return shifted_levels(schedule, count, time_shift=shift)

    np.testing.assert_allclose(levels(TEACHER.schedule, 4096, 3), expected, rtol=1e-6)
    assert levels(TEACHER.schedule, 4096, 3)[-2] == pytest.approx(0.02)
    assert levels(LIGHTNING, 64, 4) == pytest.approx([1, 0.9, 0.75, 0.5, 0])
    assert levels(Schedule(terminal=0.02), 64, 1) == [1, 0]


def test_a_student_learns_from_it(qwen_folder):
    teacher, _ = load_teacher(qwen_folder)
    student = make_student(teacher.feature_dims)
    tokens, mask = student.text_encoders[0].tokenize(PROMPTS)
    batch = {"latents": inputs(4, 4)[0], "tokens_0": tokens, "mask_0": mask}
    batch |= teacher.encode(PROMPTS)._asdict()
    before = [np.array(p) for _, p in tree_flatten(teacher.network.parameters())]
    step = ElasticStep((0.5,), 1.0)
    grads, metrics = Distillation(teacher, 4.0).gradients(student, batch, mx.random.key(0), step)
    assert metrics["output"].item() > 0 and metrics["features_0.5"].item() > 0
    assert mx.abs(dict(tree_flatten(grads))["projectors.0.weight"]).max() > 0
    after = [np.array(p) for _, p in tree_flatten(teacher.network.parameters())]
    assert all(map(np.array_equal, before, after))


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({"kind": "qwen"}, r"unknown teacher kind 'qwen' \(did you mean 'qwen-image'\?\)"),
        ({"shedule": {}}, r"unknown key 'shedule' in TeacherConfig \(did you mean 'schedule'\?\)"),
        ({"format_version": 2}, "format version 2"),
        ({"transformer": {"rope_axes": [4, 4, 4]}}, "three even numbers"),
        ({"transformer": {"latent_channels": 16}}, "16 latent channels, the autoencoder gives 4"),
    ],
)
def test_a_teacher_json_that_is_wrong_is_one_line(tmp_path, change, hint):
    folder = write_teacher(tmp_path / "teacher")
    path = folder / "teacher.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=hint) as error:
        load_teacher(folder)
    assert "\n" not in str(error.value)


def test_a_folder_that_is_damaged_says_where(tmp_path):
    folder = write_teacher(tmp_path / "teacher")
    path = folder / "transformer-00001.safetensors"
    weights = mx.load(str(path))
    weights["ghost"] = weights.pop("img_in.weight")
    mx.save_safetensors(str(path), weights)
    with pytest.raises(UserError, match="does not fit its config"):
        load_teacher(folder)
    path.unlink()
    with pytest.raises(UserError, match="it has no transformer"):
        load_teacher(folder)


def test_k_dmd_takes_another_teacher(qwen_folder, components, model_folder):
    """Student and critic are told what the student's own encoders say, the teacher its own text."""
    own, _ = load_teacher(model_folder)
    teacher, autoencoder = load_teacher(qwen_folder)
    assert same_latents(autoencoder, autoencoder)
    assert not same_latents(components.autoencoder, autoencoder), "of other weights"
    model = Distilled(own.network, (1.0,), feature_dims=teacher.feature_dims, rank=2, alpha=2.0)
    batch = Simulation(
        model.network,
        dataclasses.replace(components.config, few_step=FOUR_STEPS),
        teacher=Conditions(teacher),
        student=Conditions(own),
        batch_size=2,
        prompts=sized_prompts(PromptList(PROMPTS), [(32, 32)], seed=0),
        share_of=lambda step: 1.0,
    )(0)
    prompts = PromptList(PROMPTS).prompts(0, 2)
    for ours, (text, mask) in (
        (("student_text", "student_mask"), own.read(prompts)),
        (("text", "mask"), teacher.encode(prompts)[:2]),
    ):
        for k in range(2):
            found = np.array(batch[ours[0]][k])[np.array(batch[ours[1]][k])]
            wanted = np.array(text[k])[np.array(mask[k])]
            np.testing.assert_allclose(found, wanted, atol=1e-5)
    objective = DMD(teacher, 4.0, teacher.has_few_step)
    grads, metrics = objective.gradients(model, batch, mx.random.key(0), DMDStep(1.0, True))
    assert set(metrics) == {"dmd_1", "critic_1"}
    for name in (STUDENT, critic_name(1.0)):
        moved = [mx.abs(g).max() for k, g in tree_flatten(grads) if name in k.split(".")]
        assert max(moved) > 0


def test_k_dmd_takes_a_teacher_of_two_sets_of_weights(components, model_folder, tmp_path):
    """FLUX.2 klein base, and klein as its few-step mode, which K-DMD uses like a LoRA."""
    config = dataclasses.replace(TEACHER, kind="flux2", transformer=FLUX2, few_step=KLEIN)
    folder = write_teacher(tmp_path / "teacher", config)
    few_step = randomize(folders.NETWORKS["flux2"](FLUX2), 5)
    path = folder / "few_step-00001.safetensors"
    mx.save_safetensors(str(path), dict(tree_flatten(few_step.parameters())))
    teacher, _ = load_teacher(folder)
    assert teacher.has_few_step and isinstance(teacher, FlowTeacher)
    condition, (x_t, t) = teacher.encode(PROMPTS), inputs()
    v, features = teacher.velocity_and_features(x_t, t, condition, few_step=True)
    expected = few_step(x_t, t, condition.text, condition.mask, return_features=True)
    assert mx.array_equal(v, expected[0]) and mx.array_equal(features, expected[1])
    assert not mx.allclose(v, teacher.velocity(x_t, t, condition), rtol=1e-2)

    own, _ = load_teacher(model_folder)
    model = Distilled(own.network, (1.0,), feature_dims=teacher.feature_dims, rank=2, alpha=2.0)
    simulation = Simulation(
        model.network,
        dataclasses.replace(components.config, few_step=FOUR_STEPS),
        teacher=Conditions(teacher),
        student=Conditions(own),
        batch_size=2,
        prompts=sized_prompts(PromptList(PROMPTS), [(32, 32)], seed=0),
        share_of=lambda step: 1.0,
    )
    objective = DMD(teacher, 4.0, teacher.has_few_step)
    step = DMDStep(1.0, True)
    grads, metrics = objective.gradients(model, simulation(0), mx.random.key(0), step)
    assert {"dmd_1", "critic_1"} < set(metrics)
    assert all(mx.isfinite(g).all() for _, g in tree_flatten(grads))


@pytest.mark.parametrize(
    ("kind", "billions"),
    [("qwen-image", 20.43), ("z-image", 6.15), ("flux2", 3.88), ("minit2i", 0.26)],
)
def test_the_defaults_are_the_public_sizes(kind, billions):
    """Arrays are lazy: nothing of this is allocated."""
    network = folders.NETWORKS[kind](TRANSFORMERS[kind]())
    count = sum(p.size for _, p in tree_flatten(network.parameters()))
    assert round(count / 1e9, 2) == billions


def test_a_text_encoder_that_was_moved_is_named(tmp_path):
    config = dataclasses.replace(TEACHER, text_encoder=str(tmp_path / "gone"))
    words = r"text encoder of .*/t: no model folder .*/gone; .* text_encoder in t/teacher\.json$"
    with pytest.raises(UserError, match=words):
        folders.load_prompts(tmp_path / "t", config, dtype=None)
