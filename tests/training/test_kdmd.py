"""K-DMD: who is trained when, and the student's gradient against the paper's formula."""

import dataclasses
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_snapgen.checkpoint.model import load_pretrained
from mlx_snapgen.config import SamplerConfig
from mlx_snapgen.draw import draw_latents
from mlx_snapgen.lora.adapters import active_adapters, add_lora, set_lora_weights
from mlx_snapgen.presets import FOUR_STEPS
from mlx_snapgen.sampling import add_noise, get_noise
from mlx_snapgen.settings import DrawSettings
from mlx_snapgen.teachers.base import Condition
from mlx_snapgen.teachers.checkpoint import CheckpointTeacher
from tests.tiny import MODEL
from train.data.conditions import Conditions
from train.data.mixture import Mixture
from train.data.prompts import PromptList
from train.data.simulation import STUDENT, STUDENT_TEXT, Simulation, sized_prompts
from train.data.source import Source, shares_of
from train.loop.config import TrainingConfig
from train.loop.optimizer import Role
from train.loop.roles import kdmd_roles
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
    set_lora_weights(network, {"few_step": 0.0})
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


@pytest.mark.parametrize(("width", "weighted"), [*((w, False) for w in WIDTHS), (WIDTHS[1], True)])
def test_student_gradient_is_equation_9(parts, width, weighted):
    """x0_critic - x0_teacher, normalized, times d x0_hat / d theta: nothing flows elsewhere.

    With weights, each channel is multiplied by its own.
    """
    model, teacher = parts
    batch, key = make_batch(model, teacher), mx.random.key(2)
    step = DMDStep(width, student_turn=True)
    weights = mx.arange(batch["x_t"].shape[-1]) / 3 if weighted else None
    objective = DMD(teacher, 4.0, False, 1.5, weights)
    found = dict(tree_flatten(objective.gradients(model, batch, key, step)[0]))
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
    tau = sample_tau(keys[2], 3, shift=1.5)
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
    direction = mx.array(direction / direction.size) * (weights if weighted else 1)
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


@pytest.mark.parametrize(
    ("student_turn", "shift", "weighted"),
    [(False, 3.0, False), (True, 1.5, True), (True, None, False)],
)
def test_critic_learns_the_velocity_at_its_samples_own_noise_level(
    parts, student_turn, shift, weighted
):
    """Flow matching written out: the network gets the t that its input was noised to.

    A shift of None is by resolution: 1 for these small latents.
    """
    model, teacher = parts
    batch, key, width = make_batch(model, teacher), mx.random.key(5), 0.375
    step = DMDStep(width, student_turn)
    weights = mx.arange(batch["x_t"].shape[-1]) / 3 if weighted else None
    objective = DMD(teacher, 4.0, False, shift, weights)
    grads, metrics = objective.gradients(model, batch, key, step)
    text, mask = (batch[name] for name in STUDENT_TEXT)
    x_t, sigma, network = batch["x_t"], batch["sigma"], model.network
    with active_adapters(network, "student"):
        v = network(x_t, sigma, text, mask, share=width)
    x0 = x_t - expand(sigma, x_t) * v
    keys = mx.random.split(key, 4)
    t = sample_tau(keys[0], 3, shift=1.0 if shift is None else shift)
    eps = mx.random.normal(x0.shape, key=keys[1])
    noised = (1 - expand(t, x0)) * x0 + expand(t, x0) * eps
    params = model.trainable_parameters()

    def loss(params):
        model.update(params)
        with active_adapters(network, critic_name(width)):
            found = network(noised, t, text, mask, share=width)
        return ((found - (eps - x0)).square() * (weights if weighted else 1)).mean()

    value, expected = mx.value_and_grad(loss)(params)
    model.update(params)
    assert metrics["critic_0.375"].item() == pytest.approx(value.item(), rel=1e-5)
    found, largest = dict(tree_flatten(grads)), 0.0
    for name, wanted in tree_flatten(expected):
        if critic_name(width) in name.split("."):
            np.testing.assert_allclose(
                np.array(found[name]), np.array(wanted), atol=2e-6, err_msg=name
            )
            largest = max(largest, mx.abs(wanted).max().item())
    assert largest > 1e-3


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


def kdmd_trainer(parts, run_dir, roles, steps=6):
    model, teacher = parts
    config = TrainingConfig(
        steps=steps,
        betas=(0.0, 0.99),
        weight_decay=0.0,
        learning_rate=1e-3,
        warmup_steps=1,
        checkpoint_every=3,
    )
    return Trainer(
        model,
        DMD(teacher, 4.0, True),
        batches=lambda k: make_batch(model, teacher, k),
        config=config,
        run_dir=run_dir,
        arguments=lambda step: DMDStep(WIDTHS[step // 3 % 2], (step + 1) % 3 == 0),
        roles=roles,
        validate=lambda t: (t.step == 3 and steps != 3 and t.stop()) or {},
    )


def test_each_role_counts_its_own_steps(parts, tmp_path, uncompiled):
    """Also after a resume, where another width has its turn than the last time."""
    roles = kdmd_roles(WIDTHS)
    owners = [
        [role.name for role in roles if role.owns(path)]
        for path, _ in tree_flatten(parts[0].trainable_parameters())
    ]
    assert all(len(names) == 1 for names in owners)
    start = tree_map(mx.array, parts[0].trainable_parameters())
    assert not kdmd_trainer(parts, tmp_path, roles).run()
    parts[0].update(start)
    resumed = kdmd_trainer(parts, tmp_path, roles)
    assert resumed.run()
    counts = {name: state["step"].item() for name, state in resumed.optimizers.state.items()}
    assert counts == {
        "student": 2,
        "critic_1000": 3,
        "critic_375": 3,
        "projector_1000": 1,
        "projector_375": 1,
    }


def test_runs_with_one_optimizer_for_all_roles_resume(parts, tmp_path, uncompiled):
    assert not kdmd_trainer(parts, tmp_path, [Role("model")]).run()
    resumed = kdmd_trainer(parts, tmp_path, kdmd_roles(WIDTHS))
    assert resumed.run()
    counts = {name: state["step"].item() for name, state in resumed.optimizers.state.items()}
    assert (counts["student"], counts["critic_1000"], counts["critic_375"]) == (4, 3, 6)


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


def simulation(parts, sampler=FOUR_STEPS, **settings):
    model, teacher = parts
    return Simulation(
        model.network,
        dataclasses.replace(MODEL, few_step=sampler),
        teacher=Conditions(teacher),
        **{
            "batch_size": 2,
            "prompts": sized_prompts(PromptList(PROMPTS), [(32, 32)], seed=0),
            "share_of": lambda step: 0.375,
        }
        | settings,
    )


@pytest.mark.parametrize("fresh_noise", [False, True])
@pytest.mark.parametrize("steps", [1, 3, 4])
def test_simulation_to_the_end_is_drawing(parts, components, fresh_noise, steps):
    """The student meets in training what the exported model draws: same levels, same steps."""
    model, _ = parts
    sampler = SamplerConfig(steps, guidance_scale=1.0, time_shift=2.5, fresh_noise=fresh_noise)
    made = simulation(parts, sampler)
    config, seeds = made.config, [7, 8, 9]
    drawing = dataclasses.replace(components, config=config, transformer=model.network)
    settings = DrawSettings(height=32, width=64)
    drawn = draw_latents(
        drawing, PROMPTS, seeds=seeds, settings=settings, share=0.375, adapter=STUDENT
    )
    condition = made.teacher(PROMPTS)
    simulated = made.path(
        condition.text,
        condition.mask,
        levels=made.levels((32, 64)),
        share=0.375,
        noise=lambda draw: mx.concatenate([get_noise(s, 4, 8, 4, draw) for s in seeds]),
    )
    np.testing.assert_allclose(np.array(simulated), np.array(drawn), atol=2e-6)
    assert float(mx.abs(simulated).max()) > 0.5


def test_simulation_stops_at_a_step_of_drawing(parts):
    """Also by the number of steps, the time shift and the size of the pictures."""
    sampler = dataclasses.replace(FOUR_STEPS, num_inference_steps=2, time_shift=None)
    sizes = [(32, 32), (32, 64), (512, 512)]
    prompts = sized_prompts(PromptList(PROMPTS), sizes[:2], seed=0)
    made = simulation(parts, sampler, prompts=prompts)
    batches = [made(k) for k in range(6)]
    assert {b["x_t"].shape for b in batches} == {(2, 4, 4, 4), (2, 4, 8, 4)}
    assert {float(b["sigma"][0]) for b in batches} == {1.0, 0.5}
    assert made.levels(sizes[2])[1] > 0.5, "more noise for larger pictures"
    euler, fresh = (
        simulation(parts),
        simulation(parts, dataclasses.replace(FOUR_STEPS, fresh_noise=True)),
    )
    late = next(k for k in range(20) if float(euler(k)["sigma"][0]) == 0.5)
    difference = np.array(euler(late)["x_t"] - fresh(late)["x_t"])
    assert difference.std() > 0.2 * np.array(euler(late)["x_t"]).std()


def test_backward_simulation_follows_the_student(parts):
    model, _ = parts
    made = simulation(parts)
    batches = [made(n) for n in range(12)]
    levels = {float(b["sigma"][0]) for b in batches}
    assert levels == {float(mx.array(s)) for s in (1.0, 0.9, 0.75, 0.5)}
    again = made(5)
    np.testing.assert_array_equal(np.array(again["x_t"]), np.array(batches[5]["x_t"]))
    late = next(n for n, b in enumerate(batches) if b["sigma"][0] < 0.8)
    model.update(tree_map(lambda p: p * 1.5, model.trainable_parameters()))
    assert not np.array_equal(np.array(made(late)["x_t"]), np.array(batches[late]["x_t"]))


def test_sizes_come_as_often_as_in_the_data():
    class Pictures(Source):
        size_shares = shares_of([(32, 32), (32, 64), (64, 32)], [90, 0, 10])

    class Prepared(Source):
        size_shares = shares_of([(16, 16), (32, 32)], [1, 1])

    class Unnamed(Source):
        pass

    shares = Pictures().size_shares
    assert list(shares.items()) == [((32, 32), 0.9), ((64, 32), 0.1)]
    both = Mixture([Pictures(), Prepared(), Unnamed()], [1, 2, 9], seed=0).size_shares
    assert both == pytest.approx({(32, 32): 1.9 / 3, (16, 16): 1 / 3, (64, 32): 0.1 / 3})
    prompts = PromptList(PROMPTS)
    batch = sized_prompts(prompts, list(shares), seed=0, weights=list(shares.values()))
    found = [batch(k, 1).size for k in range(400)]
    assert 20 <= found.count((64, 32)) <= 60
    even = sized_prompts(prompts, list(shares), seed=0)
    assert 160 <= [even(k, 1).size for k in range(400)].count((64, 32)) <= 240


def test_student_steps_meet_all_prompts_of_a_list():
    """Every fifth batch, of a list that has five batches."""
    prompts = PromptList([str(k) for k in range(160)], seed=1)
    student = [set(prompts.prompts(step, 32)) for step in range(4, 200, 5)]
    assert set.union(*student) == {str(k) for k in range(160)}
    assert all(len(batch) == 32 for batch in student)
    assert prompts.prompts(7, 32) == PromptList(prompts.items, seed=1).prompts(7, 32)


def test_all_micro_batches_of_a_step_simulate_the_same_width(parts, monkeypatch):
    monkeypatch.setattr(mx.distributed, "init", lambda: SimpleNamespace(size=lambda: 2))
    asked = []
    made = simulation(parts, accumulate=3, share_of=lambda step: asked.append(step) or 1.0)
    first, second, *_ = (made(number) for number in range(12))
    assert asked == [0] * 6 + [1] * 6
    assert not mx.array_equal(first["x_t"], second["x_t"])


@pytest.mark.parametrize("student_turn", [False, True])
def test_recomputed_blocks_give_the_same_gradients(parts, student_turn):
    """The backward pass runs them again, and must have the adapters of the forward pass."""
    model, teacher = parts
    batch, key = make_batch(model, teacher), mx.random.key(6)
    found = []
    for enabled in (False, True):
        model.network.checkpoint_blocks(enabled)
        step = DMDStep(0.375, student_turn)
        grads, _ = DMD(teacher, 4.0, True).gradients(model, batch, key, step)
        found.append(dict(tree_flatten(grads)))
    assert found[0].keys() == found[1].keys()
    assert all(max(mx.abs(g).max() for g in grads.values()) > 1e-3 for grads in found)
    for name, value in found[0].items():
        np.testing.assert_allclose(
            np.array(found[1][name]), np.array(value), atol=1e-5, err_msg=name
        )


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
