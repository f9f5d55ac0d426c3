"""Knowledge distillation: eqs. 6-8 written out in numpy, who gets a gradient, and the loop."""

import dataclasses
import sys
import tracemalloc
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

import train.loop.trainer
from mlx_snapgen.checkpoint.config import ModelFolder
from mlx_snapgen.checkpoint.model import load_pretrained, save_pretrained
from mlx_snapgen.errors import UserError
from mlx_snapgen.networks.text_encoders.base import TextStates
from mlx_snapgen.teachers.base import Condition
from mlx_snapgen.teachers.checkpoint import CheckpointTeacher, load_teacher
from tests.tiny import STUDENT, make_components, make_student
from train import kd
from train.data.conditions import Conditions
from train.data.distillation import DistillationBatches
from train.data.encoded import EncodedBatches, EncodedPictures
from train.data.stickers.source import Stickers
from train.export import trained_model
from train.loop.checkpoint import latest_checkpoint, read_log
from train.loop.config import TrainingConfig
from train.loop.roles import distillation_roles
from train.loop.run import recorded
from train.loop.trainer import Trainer
from train.objectives.distillation import Distillation, fit_to_teacher, teacher_targets
from train.objectives.elastic import ElasticStep, SliceGradient, noisy, text_states
from train.objectives.projectors import LeastSquares, fit_projectors, new_projectors

WIDTHS = (1.0, 0.5, 0.375)
PROMPTS = ["a red car", "", "an apple next to a blue cat", "a green apple"]
FEATURES = 64  # of the teacher in conftest.py, which has two text encoders and this hidden size


@pytest.fixture
def parts(model_folder):
    """(student, teacher), the student's every weight moved off zero."""
    teacher, _ = load_teacher(model_folder)
    student = make_student(teacher.feature_dims)
    student.update(
        tree_map(lambda p: p + 0.1 * mx.random.normal(p.shape), student.trainable_parameters())
    )
    return student, teacher


def make_batch(student, teacher, seed=0):
    mx.random.seed(seed)
    tokens, mask = student.text_encoders[0].tokenize(PROMPTS)
    return {
        "latents": mx.random.normal((4, 4, 4, 4)),
        "tokens_0": tokens,
        "mask_0": mask,
        **teacher.encode(PROMPTS)._asdict(),
    }


def gradients(student, teacher, batch, key, shares, shift, guidance=1.0):
    step = ElasticStep(shares, shift)
    return Distillation(teacher, guidance).gradients(student, batch, key, step)


def forward(student, batch, x_t, t, width):
    """Velocity and projected features of the student."""
    mask = batch["mask_0"]
    states = student.text_encoders[0](batch["tokens_0"], mask)
    text, mask = student.transformer.encode_text([TextStates(states, mask)])
    v, features = student.transformer(x_t, t, text, mask, share=width, return_features=True)
    projector = student.projectors[WIDTHS.index(width)]
    return v, features @ projector.weight.T + projector.bias


def taught(teacher, batch, x_t, t, guidance):
    """Velocity (by the definition of guidance) and features of the teacher's network."""
    network = teacher.network
    v, features = network(x_t, t, batch["text"], batch["mask"], return_features=True)
    empty = mx.repeat(batch["empty_text"], len(t), 0), mx.repeat(batch["empty_mask"], len(t), 0)
    v_uncond = network(x_t, t, *empty)
    return np.array(v_uncond + guidance * (v - v_uncond)), np.array(features)


def mean_square(x):
    return (x**2).mean(axis=tuple(range(1, x.ndim)))


def by_hand(v, f, target, v_teacher, f_teacher, t, full):
    """Eqs. 6-8 and 5 in numpy: (metrics, d loss / d v, d loss / d f)."""
    v, f, target, t = (np.array(x, np.float64) for x in (v, f, target, t))
    task, output = mean_square(v - target), mean_square(v - v_teacher)
    # S, eq. 8: the logit-normal density of t over its value at t = 1/2.
    density = np.exp(-(np.log(t / (1 - t)) ** 2) / 2) / (t * (1 - t)) / np.sqrt(2 * np.pi)
    a = density / (4 / np.sqrt(2 * np.pi))
    ratio = task / output
    metrics = {
        "loss": task.mean(),
        "output": output.mean(),
        "features": mean_square(f - f_teacher).mean() / f_teacher.var(),
    }
    weights = (x[:, None, None, None] for x in (a, (1 - a) * ratio))
    count = v.size  # a mean over samples of a mean over each one's numbers
    grad_v = 2 / count * sum(w * (v - y) for w, y in zip(weights, (target, v_teacher), strict=True))
    if full is not None:
        metrics["distillation"] = mean_square(v - full).mean()
        grad_v = grad_v + 2 / count * (v - full)
    return metrics, grad_v, 2 / f.size * (f - f_teacher) / f_teacher.var()


def written_out(student, teacher, batch, key, width, full, guidance):
    """Metrics and gradients of one width by hand, and its velocity."""
    x_t, t, target = noisy(batch["latents"], key, shift=2.0)
    v_teacher, f_teacher = taught(teacher, batch, x_t, t, guidance)
    v, f = forward(student, batch, x_t, t, width)
    metrics, grad_v, grad_f = by_hand(v, f, target, v_teacher, f_teacher, t, full)
    params = student.trainable_parameters()

    def pulled(params):
        student.update(params)
        v, f = forward(student, batch, x_t, t, width)
        return (v * mx.array(grad_v, mx.float32)).sum() + (f * mx.array(grad_f, mx.float32)).sum()

    grads = mx.grad(pulled)(params)
    student.update(params)
    return metrics, dict(tree_flatten(grads)), np.array(v)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_full_width_is_equation_8(parts, guidance):
    student, teacher = parts
    batch, key = make_batch(student, teacher), mx.random.key(3)
    grads, metrics = gradients(student, teacher, batch, key, (), 2.0, guidance)
    expected_metrics, expected, _ = written_out(student, teacher, batch, key, 1.0, None, guidance)
    assert {k: float(v) for k, v in metrics.items()} == pytest.approx(expected_metrics, rel=1e-4)
    assert_close(grads, expected, widths=(1.0,))


def assert_close(grads, expected, widths):
    """`grads` are those of all parameters but the projectors of other widths."""
    found = dict(tree_flatten(grads))
    others = [f"projectors.{i}." for i, width in enumerate(WIDTHS) if width not in widths]
    expected = {k: v for k, v in expected.items() if not k.startswith(tuple(others))}
    for name, value in expected.items():
        scale = max(float(mx.abs(value).max()), 1e-2)
        np.testing.assert_allclose(
            np.array(found[name]), np.array(value), atol=2e-4 * scale, err_msg=name
        )
    assert found.keys() == expected.keys()


@pytest.mark.parametrize("width", WIDTHS[1:])
def test_every_width_is_equation_8_beside_the_full_network(parts, width, monkeypatch):
    """Both gradients by hand; how they are balanced is the elastic trainer's test."""
    student, teacher = parts
    batch, key = make_batch(student, teacher), mx.random.key(4)

    def in_place(whole, part):
        if isinstance(part, SliceGradient):
            return part.added_to(mx.zeros_like(whole), mx.array(1.0))
        return part

    balance = "train.objectives.elastic.add_balanced"
    monkeypatch.setattr(balance, lambda full, sub: tree_map(in_place, full, sub))
    grads, metrics = gradients(student, teacher, batch, key, (width,), 2.0)
    args = (student, teacher, batch, key)
    full_metrics, _, full = written_out(*args, 1.0, None, 1.0)
    sub_metrics, expected, _ = written_out(*args, width, full, 1.0)
    all_metrics = full_metrics | {f"{k}_{width:g}": v for k, v in sub_metrics.items()}
    assert {k: float(v) for k, v in metrics.items()} == pytest.approx(all_metrics, rel=1e-4)
    assert_close(grads, expected, widths=(1.0, width))


@pytest.mark.parametrize("width", WIDTHS)
def test_each_width_has_a_projector_of_its_own(parts, width):
    student, teacher = parts
    batch = make_batch(student, teacher)
    before = {k: np.array(v) for k, v in tree_flatten(teacher.network.parameters())}
    sub = tuple(w for w in (width,) if w != 1.0)
    grads, _ = gradients(student, teacher, batch, mx.random.key(5), sub, 1.0)
    assert grads.keys() == {"transformer", "text_encoders", "projectors"}
    trained = {other for other, given in zip(WIDTHS, grads["projectors"], strict=False) if given}
    assert trained == {1.0, width}
    assert all(float(mx.abs(g).max()) > 1e-6 for _, g in tree_flatten(grads["projectors"]))
    assert [p.weight.shape for p in student.projectors] == [(FEATURES, d) for d in (32, 16, 12)]
    trained = [k for k, _ in tree_flatten(student.trainable_parameters())]
    assert {k.split(".")[0] for k in trained} == {"transformer", "text_encoders", "projectors"}
    for name, value in tree_flatten(teacher.network.parameters()):
        np.testing.assert_array_equal(before[name], np.array(value), err_msg=name)


def test_projectors_start_at_the_best_fit(parts):
    """No number of a projector can move without the loss of the latents it was fitted to rising."""
    student, teacher = parts
    batches = [make_batch(student, teacher, seed) for seed in range(3)]
    fit_to_teacher(student, Distillation(teacher), batches, seed=7, shift=2.0)
    key, keys = mx.random.key(7), []
    for _ in batches:
        key, now = mx.random.split(key)
        keys.append(now)

    def loss():
        found = [
            gradients(student, teacher, batch, key, WIDTHS[1:], 2.0)[1]
            for batch, key in zip(batches, keys, strict=True)
        ]
        names = ("features", "features_0.5", "features_0.375")
        # Least squares weighs every number alike, the loss each batch by its features' variance.
        return sum(
            m[name].item() * variance(b, k)
            for m, b, k in zip(found, batches, keys, strict=True)
            for name in names
        )

    def variance(batch, key):
        x_t, t, _ = noisy(batch["latents"], key, shift=2.0)
        return taught(teacher, batch, x_t, t, 1.0)[1].var()

    best = loss()
    for projector in student.projectors:
        for values, step in ((projector.weight, 0.02), (projector.bias, -0.02)):
            values[0] += step
            assert loss() > best
            values[0] -= step


def test_projectors_are_fitted_as_by_lstsq():
    """In parts of several sizes, far from zero, also where the rows do not determine the fit."""
    rng = np.random.default_rng(0)
    for rows, spread in ((500, 1.0), (500, 1e-3), (9, 1.0)):
        x = 20 + spread * rng.normal(size=(rows, 12)) @ rng.normal(size=(12, 12))
        y = x @ rng.normal(size=(12, 5)) + 3 + 0.1 * rng.normal(size=(rows, 5))
        fit = LeastSquares()
        for part in np.array_split(np.arange(rows), 4):
            fit.add(x[part].astype(np.float32), y[part].astype(np.float32))
        weight, bias = fit.solution()
        x, y = x.astype(np.float32).astype(float), y.astype(np.float32).astype(float)
        best = np.linalg.lstsq(x - x.mean(0), y - y.mean(0), rcond=None)[0]
        found, wanted = x @ weight + bias, (x - x.mean(0)) @ best + y.mean(0)
        np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())
        if spread == 1:
            np.testing.assert_allclose(weight, best, atol=1e-4 * np.abs(best).max())


def test_features_are_not_kept_for_the_fit():
    """32 batches take no more memory than 2: the rows are summed up and dropped."""
    widths = (1.0, 0.5)

    def student(batch, share):
        return mx.random.normal((8, 64, round(32 * share)), key=batch["key"])

    def teacher(batch):
        return mx.random.normal((8, 64, 24), key=batch["key"])

    def fit(count):
        projectors = new_projectors(32, widths, feature_dims=24)
        batches = ({"key": mx.random.key(k)} for k in range(count))
        tracemalloc.start()
        fit_projectors(projectors, widths, batches=batches, student=student, teacher=teacher)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return peak

    fit(1)
    few, many = fit(2), fit(32)
    assert many < 1.5 * few


def test_no_gradient_goes_into_the_teacher(parts):
    student, teacher = parts
    batch, network = make_batch(student, teacher), teacher.network
    x_t, t, _ = noisy(batch["latents"], mx.random.key(6), shift=1.0)
    condition = Condition(*(batch[name] for name in Condition._fields))
    params = network.trainable_parameters()

    def told(params):
        network.update(params)
        return sum(
            y.square().sum()
            for y in teacher_targets(teacher, x_t, t=t, condition=condition, guidance_scale=3.0)
        )

    grads = mx.grad(told)(params)
    network.update(params)
    assert all(float(mx.abs(g).max()) == 0 for _, g in tree_flatten(grads))


def test_a_teacher_with_other_latents_gives_features_alone(parts):
    """It gets its own latents of the same pictures, with other noise at the same levels."""
    student, teacher = parts
    batch, key = make_batch(student, teacher), mx.random.key(8)
    theirs = mx.random.normal((4, 4, 4, 4), key=mx.random.key(9))
    seen = []
    given = teacher.velocity_and_features
    teacher.velocity_and_features = lambda x_t, t, *rest, **settings: (
        seen.append((np.array(x_t), np.array(t))) or given(x_t, t, *rest, **settings)
    )
    objective = Distillation(teacher, 3.0, same_latents=False)
    batch["teacher_latents"] = theirs
    _, metrics = objective.gradients(student, batch, key, ElasticStep((0.5,), 2.0))
    assert not any(name.startswith("output") for name in metrics)
    assert {"loss", "features", "features_0.5"} < metrics.keys()
    (x_teacher, t), *more = seen
    assert not more
    x_t, levels, _ = noisy(batch["latents"], key, shift=2.0)
    np.testing.assert_array_equal(t, np.array(levels))
    level = t[:, None, None, None]
    eps = (x_teacher - (1 - level) * np.array(theirs)) / level
    student_eps = (np.array(x_t) - (1 - level) * np.array(batch["latents"])) / level
    assert abs(eps.std() - 1) < 0.1
    assert abs(np.corrcoef(eps.ravel(), student_eps.ravel())[0, 1]) < 0.2
    full = student.transformer(
        x_t, levels, *student.transformer.encode_text(text_states(student, batch))
    )
    target = (student_eps - np.array(batch["latents"])) - np.array(full)
    assert metrics["loss"].item() == pytest.approx(np.square(target).mean(), rel=1e-3)


def test_a_caption_is_encoded_once_for_the_teacher(parts):
    """Prepared states replace the text encoder; the result is the same."""
    _, teacher = parts
    asked, encode = [], teacher.encode
    teacher.encode = lambda prompts: asked.extend(prompts) or encode(prompts)
    conditions = Conditions(teacher)
    first = conditions(PROMPTS)
    again = conditions(PROMPTS[::-1])
    assert asked == ["", *(p for p in PROMPTS if p)]
    assert asked.count("") == 1
    np.testing.assert_array_equal(np.array(first.text), np.array(again.text)[::-1])
    stored = [np.array(first.text[k])[np.array(first.mask[k])] for k in range(4)]
    with_states = Conditions(teacher)
    with_states.stored = True
    from_data = with_states(PROMPTS, {"teacher": stored})
    for ours, theirs in zip(first, from_data, strict=True):
        np.testing.assert_array_equal(np.array(ours), np.array(theirs))
    # Shorter padding than the text encoder's own does not change the teacher's velocity.
    x_t, t = mx.random.normal((4, 4, 4, 4)), mx.array([0.1, 0.4, 0.6, 0.9])
    found = teacher.velocity(x_t, t, first, guidance_scale=3.0)
    expected = teacher.velocity(x_t, t, encode(PROMPTS), guidance_scale=3.0)
    np.testing.assert_allclose(np.array(found), np.array(expected), atol=1e-4)


def test_absent_text_stays_absent_for_the_teacher(parts):
    _, teacher = parts
    absent = CheckpointTeacher(teacher.network, teacher.text_encoders, unconditional=None)
    condition = Conditions(absent)(PROMPTS)
    assert not condition.empty_mask.any() and not condition.mask[1].any()
    assert all(condition.mask[k].any() for k in (0, 2, 3))
    x_t, t = mx.random.normal((4, 4, 4, 4)), mx.array([0.1, 0.4, 0.6, 0.9])
    found = absent.velocity(x_t, t, condition, guidance_scale=3.0)
    expected = absent.velocity(x_t, t, absent.encode(PROMPTS), guidance_scale=3.0)
    chosen = mx.array([0, 2, 3])
    np.testing.assert_allclose(np.array(found[chosen]), np.array(expected[chosen]), atol=1e-4)
    alone = absent.velocity(x_t, t, condition)
    np.testing.assert_allclose(np.array(found[1]), np.array(alone[1]), atol=1e-5)


def test_a_teacher_on_another_grid_is_refused(parts):
    student, teacher = parts
    batch = make_batch(student, teacher)
    student.transformer.config = dataclasses.replace(student.transformer.config, patch_size=1)
    student.transformer.patch_embed.weight = student.transformer.patch_embed.weight[:, :4]
    student.transformer.head.linear.weight = student.transformer.head.linear.weight[:4]
    student.transformer.head.linear.bias = student.transformer.head.linear.bias[:4]
    with pytest.raises(UserError, match="16 tokens, its teacher of 4"):
        gradients(student, teacher, batch, mx.random.key(0), (), 1.0)
    with pytest.raises(UserError, match="16 tokens, its teacher of 4"):
        fit_to_teacher(student, Distillation(teacher), [batch], seed=0, shift=1.0)


# --- the loop -----------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    """No curves; steps are few, so compiling them would take longer than they do."""
    monkeypatch.setattr(train.loop.trainer, "plot_log", lambda run_dir: None)
    mx.disable_compile()
    yield
    mx.enable_compile()


def trainer(parts, run_dir, stop_at=None, **options):
    student, teacher = parts
    settings = {"steps": 4, "learning_rate": 5e-3, "warmup_steps": 2, "checkpoint_every": 2}
    return Trainer(
        student,
        Distillation(teacher),
        batches=lambda k: make_batch(student, teacher, k % 2),
        config=TrainingConfig(**settings | {"log_every": 1} | options),
        run_dir=run_dir,
        arguments=lambda step: ElasticStep((WIDTHS[1 + step % 2],), 1.0),
        validate=lambda t: (t.step == stop_at and t.stop()) or {},
        roles=distillation_roles(WIDTHS),
    )


@pytest.mark.parametrize(("dtype", "steps", "share"), [(mx.float32, 24, 0.9), (mx.bfloat16, 8, 1)])
def test_every_width_learns_from_the_teacher(
    parts, tmp_path, quick, monkeypatch, dtype, steps, share
):
    monkeypatch.setattr(TrainingConfig, "dtype", dtype)
    student, teacher = parts
    batch = {k: mx.repeat(v, 2, 0) for k, v in make_batch(student, teacher).items()}
    batch |= {k: batch[k][:1] for k in ("empty_text", "empty_mask")}

    def losses():
        found = {}
        for width in WIDTHS[1:]:
            key = mx.random.key(9)
            found |= gradients(student, teacher, batch, key, (width,), 1.0)[1]
        return {k: float(v) for k, v in found.items()}

    before = losses()
    assert trainer(parts, tmp_path, steps=steps, checkpoint_every=steps).run()
    after = losses()
    for width in ("", "_0.5", "_0.375"):
        for name in ("output", "features"):
            assert after[name + width] < share * before[name + width], name + width
    assert {"output", "features_0.5", "distillation_0.375"} < set().union(*read_log(tmp_path))


def test_a_run_resumes_bit_identical(parts, tmp_path, quick):
    student, _ = parts
    start = tree_map(mx.array, student.trainable_parameters())
    whole = trainer(parts, tmp_path / "a")
    assert whole.run()
    expected = {k: np.array(v) for k, v in tree_flatten(whole.model.parameters())}
    student.update(start)
    assert not trainer(parts, tmp_path / "b", stop_at=2).run()
    student.update(tree_map(mx.zeros_like, start))
    resumed = trainer(parts, tmp_path / "b")
    assert resumed.run()
    for name, value in tree_flatten(resumed.model.parameters()):
        np.testing.assert_array_equal(expected[name], np.array(value), err_msg=name)
    counts = {name: state["step"].item() for name, state in resumed.optimizers.state.items()}
    assert counts == {"model": 4, "projector_1000": 4, "projector_500": 2, "projector_375": 2}


def test_command_trains_resumes_and_starts_another_run(model_folder, tmp_path, monkeypatch, quick):
    """From a teacher's folder to a run that flow matching and export can go on from."""
    save_pretrained(tmp_path / "student", make_components(STUDENT))

    def pictures(source, number, count):
        rng = np.random.default_rng((source.seed, number))
        drawn = rng.integers(0, 255, (count, 32, 32, 3), np.uint8)
        return drawn, [PROMPTS[(number * count + k) % 4] for k in range(count)]

    monkeypatch.setattr(Stickers, "batch", pictures)

    def command(run_dir, *options):
        common = ["--run-dir", str(tmp_path / run_dir), "--teacher", str(model_folder)]
        common += ["--steps", "2", "--batch-size", "2", "--data", "stickers", "--resolution", "32"]
        common += ["--validation-prompts", "a cat", "--validation-pictures", "0"]
        monkeypatch.setattr(sys, "argv", ["kd", *common, *map(str, options)])
        kd.main()

    own = ("--model", tmp_path / "student")
    command("a", *own)
    command("a", *own)
    assert latest_checkpoint(tmp_path / "a").name == "step_2"
    command("b", *own, "--init-from", tmp_path / "a", "--model-widths", "full", "--guidance", "2")
    assert recorded(tmp_path / "a")["data"] == "stickers"
    model = ModelFolder.open(recorded(tmp_path / "a")["model"])
    save_pretrained(tmp_path / "made", trained_model(model, tmp_path / "a"))
    assert load_pretrained(tmp_path / "made").config.transformer.widths == WIDTHS
    command("c", "--model", model_folder)
    trained = mx.load(str(latest_checkpoint(tmp_path / "c") / "ema.safetensors"))
    hidden = load_pretrained(model_folder).config.transformer.hidden_size
    assert trained["projectors.0.weight"].shape == (FEATURES, hidden)
    fitted, fit = [], kd.fit_to_teacher

    def seen(student, objective, batches, **options):
        fitted.extend(batches)
        fit(student, objective, fitted, **options)

    monkeypatch.setattr(kd, "fit_to_teacher", seen)
    command("e", *own, "--noises-per-picture", "8", "--steps", "1", "--model-widths", "full")
    latents = np.concatenate([np.array(batch["latents"]) for batch in fitted])
    assert len(np.unique(latents, axis=0)) == 16, "eight batches of different pictures"
    with pytest.raises(UserError, match="--tokenizer was removed"):
        command("d", *own, "--tokenizer", "t.model")


def test_the_teacher_gets_the_captions_that_the_student_gets(parts, components):
    """A caption dropped for every text encoder of the student is dropped for the teacher."""
    _, teacher = parts
    black = np.zeros((4, 32, 32, 3), np.uint8)
    source = SimpleNamespace(batch=lambda *_: (black, [p or "two cars" for p in PROMPTS]))
    encoded = EncodedPictures(source, components.autoencoder)
    encoders = components.text_encoders
    data = EncodedBatches(encoded, encoders, batch_size=4, seed=0, drop_caption=0.4)
    distilled = DistillationBatches(data, Conditions(teacher))
    batches = [distilled(k) for k in range(8)]
    kept = np.array([[b[f"mask_{i}"].sum(1) > 2 for i in (0, 1)] for b in batches]).any(1)
    told = np.array([b["mask"].sum(1) > b["empty_mask"].sum() for b in batches])
    np.testing.assert_array_equal(told, kept)
    assert 0 < told.mean() < 1
    assert all(np.array_equal(data(k)["tokens_0"], batches[k]["tokens_0"]) for k in range(2))
