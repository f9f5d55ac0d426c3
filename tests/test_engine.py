"""The training loop: it learns, resumes exactly, and refuses what it cannot resume."""

import dataclasses
import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_snapgen.errors import UserError
from train.engine import (
    Trainer,
    TrainingConfig,
    checkpoints,
    latest_checkpoint,
    learning_rate_schedule,
    load_ema,
)


def gradients(model, batch, key):
    def loss_fn(params):
        model.update(params)
        x = batch["x"] + 0.1 * mx.random.normal(batch["x"].shape, key=key)
        loss = (model(x) - 2 * batch["x"]).square().mean()
        return loss, {"loss": loss}

    (_, metrics), grads = mx.value_and_grad(loss_fn)(model.trainable_parameters())
    return grads, metrics


def trainer(run_dir, steps, hidden=8, **options):
    mx.random.seed(0)
    model = nn.Sequential(nn.Linear(4, hidden), nn.Linear(hidden, 4))
    config = TrainingConfig(
        steps=20,
        learning_rate=1e-1,
        warmup_steps=3,
        checkpoint_every=4,
        log_every=1,
        **options,
    )
    made = Trainer(
        model,
        gradients,
        lambda k: {"x": mx.array(np.random.default_rng(k).normal(size=(8, 4)), mx.float32)},
        config,
        run_dir,
        # Ending early must not change the schedule, so a stop is asked for instead.
        validate=lambda t: setattr(t, "_stop", t.step >= steps) or {},
    )
    return made


def flat(run):
    trees = {"model": run.model.parameters(), "ema": run.ema_parameters, "opt": run.optimizer.state}
    return {k: np.array(v) for k, v in tree_flatten(trees)}


def test_resumed_run_is_bit_identical(tmp_path):
    straight = trainer(tmp_path / "a", 20)
    assert straight.run()
    first = trainer(tmp_path / "b", 8)
    assert not first.run()
    assert first.step == 8
    second = trainer(tmp_path / "b", 20)
    assert second.run()
    expected, resumed = flat(straight), flat(second)
    assert expected.keys() == resumed.keys()
    for key in expected:
        np.testing.assert_array_equal(expected[key], resumed[key], err_msg=key)


def test_it_learns_and_logs(tmp_path):
    run = trainer(tmp_path, 20)
    run.run()
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert len(losses) == 20
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert [c.name for c in checkpoints(tmp_path)] == ["step_16", "step_20"]


def test_average_follows_its_definition(tmp_path):
    run = trainer(tmp_path, 20, ema_decay=0.5)
    name = "layers.0.weight"
    average = np.array(dict(tree_flatten(run.ema_parameters))[name])
    for step in range(3):
        run.config = dataclasses.replace(run.config, steps=step + 1)
        run.run()
        decay = min(0.5, (2 + step) / (11 + step))
        current = np.array(dict(tree_flatten(run.model.parameters()))[name])
        average = decay * average + (1 - decay) * current
        found = np.array(dict(tree_flatten(run.ema_parameters))[name])
        np.testing.assert_allclose(found, average, atol=1e-6)


def test_foreign_and_damaged_checkpoints_are_refused_in_one_line(tmp_path):
    trainer(tmp_path, 8).run()
    with pytest.raises(UserError, match="is of another model: 'layers") as error:
        trainer(tmp_path, 20, hidden=6).run()
    assert "\n" not in str(error.value)
    weights = latest_checkpoint(tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UserError, match=r"step_8 is damaged .* to resume from .*step_4"):
        trainer(tmp_path, 20).run()


def test_averaged_weights_of_a_run(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint"):
        load_ema(tmp_path)
    run = trainer(tmp_path, 20)
    run.run()
    for key, value in tree_flatten(run.ema_parameters):
        np.testing.assert_array_equal(np.array(load_ema(tmp_path)[key]), np.array(value))


def test_schedule_warms_up_and_decays():
    config = TrainingConfig(steps=100, warmup_steps=10, learning_rate=1.0, final_learning_rate=0.1)
    rate = learning_rate_schedule(config)
    values = [float(rate(mx.array(s))) for s in range(100)]
    assert np.argmax(values) == 10
    assert values[0] == pytest.approx(0.1)
    assert values[-1] == pytest.approx(0.1, abs=1e-2)
    assert all(np.diff(values[:10]) > 0) and all(np.diff(values[11:]) < 0)
