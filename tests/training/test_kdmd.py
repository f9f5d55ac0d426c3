"""K-DMD: who is trained when, and the student's gradient against the paper's formula."""

from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_snapgen.checkpoint.model import load_pretrained
from mlx_snapgen.lora.adapters import active_adapters, add_lora
from mlx_snapgen.sampling import add_noise
from mlx_snapgen.teachers.base import Condition
from mlx_snapgen.teachers.checkpoint import CheckpointTeacher
from train.data.prompts import PromptList
from train.data.simulation import STUDENT_TEXT, Simulation
from train.loop.config import TrainingConfig
from train.loop.trainer import Trainer
from train.objectives.kdmd import DMD, Distilled, DMDStep, critic_name, fit_to_few_step, sample_tau
from train.objectives.losses import expand

WIDTHS = (1.0, 0.375)
PROMPTS = ["a red car", "two cats", "an apple"]


@pytest.fixture
def parts(model_folder):
    """(model, teacher) over one network, every adapter moved off zero."""
    components = load_pretrained(model_folder)
    network = components.transformer
    mx.random.seed(0)
    add_lora(network, 2, alpha=4.0, targets=["self_attention.*_proj"], name="few_step")
    teacher = CheckpointTeacher(network, components.text_encoders, few_step="few_step")
    model = Distilled(network, WIDTHS, feature_dims=teacher.feature_dims, rank=3, alpha=3.0)
    for layer in network.modules():
        for adapter in getattr(layer, "adapters", {}).values():
            adapter.b = 0.1 * mx.random.normal(adapter.b.shape)
    return model, teacher


def make_batch(model, teacher, seed=0):
    channels = model.network.config.latent_channels
    mx.random.seed(seed)
    condition = teacher.encode(PROMPTS)
    return {
        "x_t": mx.random.normal((3, 4, 4, channels)),
        "sigma": mx.array([1.0, 0.75, 0.5]),
        **condition._asdict(),
        **dict(zip(STUDENT_TEXT, (condition.text, condition.mask), strict=True)),
    }


def test_only_adapters_and_projectors_train(parts):
    model, _ = parts
    names = [k for k, _ in tree_flatten(model.trainable_parameters())]
    allowed = {"student", "projectors", *map(critic_name, WIDTHS)}
    assert names and all(allowed & set(name.split(".")) for name in names)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("few_step", [False, True])
def test_gradients_reach_the_width_and_role_whose_turn_it_is(parts, width, few_step):
    model, teacher = parts
    objective = DMD(teacher, 4.0, few_step)
    batch, key = make_batch(model, teacher), mx.random.key(1)
    other = critic_name(WIDTHS[1 - WIDTHS.index(width)])
    for student_turn in (False, True):
        grads, metrics = objective.gradients(model, batch, key, DMDStep(width, student_turn))
        parts_of = [set(k.split(".")) for k, _ in tree_flatten(grads)]
        assert any(critic_name(width) in p for p in parts_of)
        assert not any(other in p or "few_step" in p for p in parts_of)
        assert any("student" in p for p in parts_of) == student_turn
        assert any("projectors" in p for p in parts_of) == (student_turn and few_step)
        assert (f"dmd_{width:g}" in metrics) == student_turn
        assert (f"features_{width:g}" in metrics) == (student_turn and few_step)


@pytest.mark.parametrize("width", WIDTHS)
def test_student_gradient_is_equation_9(parts, width):
    """x0_critic - x0_teacher, normalized, times d x0_hat / d theta: nothing flows elsewhere."""
    model, teacher = parts
    batch, key = make_batch(model, teacher), mx.random.key(2)
    step = DMDStep(width, student_turn=True)
    found = dict(tree_flatten(DMD(teacher, 4.0, False).gradients(model, batch, key, step)[0]))
    condition = Condition(*(batch[n] for n in Condition._fields))
    x_t, sigma = batch["x_t"], batch["sigma"]
    network, params = model.network, model.trainable_parameters()

    def student(params):
        model.update(params)
        with active_adapters(network, "student"):
            v = network(x_t, sigma, condition.text, condition.mask, share=width)
        return x_t - expand(sigma, x_t) * v

    keys = mx.random.split(key, 4)
    x0 = student(params)
    tau = sample_tau(keys[2], 3)
    x_tau = add_noise(x0, mx.random.normal(x0.shape, key=keys[3]), expand(tau, x0))
    with active_adapters(network, critic_name(width)):
        v_critic = network(x_tau, tau, condition.text, condition.mask, share=width)
    with active_adapters(network):
        v_cond = network(x_tau, tau, condition.text, condition.mask)
        empty = mx.repeat(condition.empty_text, 3, 0), mx.repeat(condition.empty_mask, 3, 0)
        v_uncond = network(x_tau, tau, *empty)
    v_teacher = v_uncond + 4 * (v_cond - v_uncond)
    s = np.array(tau)[:, None, None, None]
    x0_teacher = np.array(x_tau) - s * np.array(v_teacher)
    direction = s * (np.array(v_teacher) - np.array(v_critic))
    direction /= np.abs(np.array(x0) - x0_teacher).mean((1, 2, 3), keepdims=True)
    direction = mx.array(direction / direction.size)
    expected = mx.grad(lambda p: (student(p) * direction).sum())(params)
    model.update(params)
    compared = 0
    for name, value in tree_flatten(expected):
        if "student" in name.split("."):
            np.testing.assert_allclose(
                np.array(found[name]), np.array(value), atol=2e-6, err_msg=name
            )
            compared += float(mx.abs(value).max()) > 1e-6
    assert compared > 10


@pytest.fixture
def uncompiled():
    """Three steps are done long before the compiler is."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def test_training_changes_each_role_on_its_turn_only(parts, tmp_path, uncompiled):
    model, teacher = parts
    before = {k: np.array(v) for k, v in tree_flatten(model.parameters())}
    config = TrainingConfig(
        steps=3, betas=(0.0, 0.99), weight_decay=0.0, learning_rate=1e-3, warmup_steps=1
    )
    Trainer(
        model,
        DMD(teacher, 4.0, True),
        batches=lambda k: make_batch(model, teacher, k),
        config=config,
        run_dir=tmp_path,
        arguments=lambda step: DMDStep(1.0, student_turn=False),
    ).run()
    changed = {
        k for k, v in tree_flatten(model.parameters()) if not np.array_equal(before[k], np.array(v))
    }
    assert changed and all(critic_name(1.0) in k.split(".") for k in changed)


def test_critic_learns_what_the_student_draws(parts):
    model, teacher = parts
    objective = DMD(teacher, 1.0, False)
    batch = make_batch(model, teacher)
    losses = []
    for _ in range(30):
        grads, metrics = objective.gradients(
            model, batch, mx.random.key(0), DMDStep(1.0, student_turn=False)
        )
        losses.append(metrics["critic_1"].item())
        flat = dict(tree_flatten(grads))
        params = [
            (k, v - 0.3 * flat[k]) if k in flat else (k, v)
            for k, v in tree_flatten(model.trainable_parameters())
        ]
        model.update(tree_unflatten(params))
    assert losses[-1] < 0.9 * losses[0]


def test_backward_simulation_follows_the_student(parts):
    model, teacher = parts
    channels = model.network.config.latent_channels
    simulation = Simulation(
        model.network,
        teacher,
        shape=(4, 4, channels),
        batch_size=2,
        prompts=PromptList(PROMPTS),
        share_of=lambda step: 0.375,
    )
    batches = [simulation(n) for n in range(12)]
    levels = {float(b["sigma"][0]) for b in batches}
    assert levels == {float(mx.array(s)) for s in (1.0, 0.9, 0.75, 0.5)}
    again = simulation(5)
    np.testing.assert_array_equal(np.array(again["x_t"]), np.array(batches[5]["x_t"]))
    late = next(n for n, b in enumerate(batches) if b["sigma"][0] < 0.8)
    model.update(tree_map(lambda p: p * 1.5, model.trainable_parameters()))
    assert not np.array_equal(np.array(simulation(late)["x_t"]), np.array(batches[late]["x_t"]))


def test_processes_of_a_step_simulate_the_same_width(parts, monkeypatch):
    model, teacher = parts
    monkeypatch.setattr(mx.distributed, "init", lambda: SimpleNamespace(size=lambda: 2))
    asked = []
    shape = (4, 4, model.network.config.latent_channels)
    simulation = Simulation(
        model.network,
        teacher,
        shape=shape,
        batch_size=2,
        prompts=PromptList(PROMPTS),
        share_of=lambda step: asked.append(step) or 1.0,
    )
    first, second, _, _ = (simulation(number) for number in range(4))
    assert asked == [0, 0, 1, 1]
    assert not mx.array_equal(first["x_t"], second["x_t"])


def test_projectors_start_at_the_best_fit(parts):
    model, teacher = parts
    batches = [make_batch(model, teacher, seed) for seed in range(2)]
    fit_to_few_step(model, teacher, batches)

    def loss():
        objective, key = DMD(teacher, 4.0, True), mx.random.key(0)
        found = [
            (width, objective.gradients(model, batch, key, DMDStep(width, True))[1])
            for batch in batches
            for width in WIDTHS
        ]
        return [metrics[f"features_{width:g}"].item() for width, metrics in found]

    best = np.mean(loss())
    for projector in model.projectors:
        for values in (projector.weight, projector.bias):
            values[0] += 0.02
            assert np.mean(loss()) > best
            values[0] -= 0.02


def test_adapters_that_are_off_leave_the_teacher_exact(parts, model_folder):
    model, teacher = parts
    plain = load_pretrained(model_folder).transformer
    batch = make_batch(model, teacher)
    condition = Condition(*(batch[n] for n in Condition._fields))
    v = teacher.velocity(batch["x_t"], batch["sigma"], condition)
    expected = plain(batch["x_t"], batch["sigma"], condition.text, condition.mask)
    np.testing.assert_array_equal(np.array(v), np.array(expected))
    few, _ = teacher.velocity_and_features(batch["x_t"], batch["sigma"], condition, few_step=True)
    assert float(mx.abs(few - v).max()) > 1e-4
