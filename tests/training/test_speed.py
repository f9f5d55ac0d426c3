"""The seconds of the parts of a training step: which parts there are, and what they train."""

import json
import sys

import mlx.core as mx
import pytest

from mlx_snapgen import benchmark
from mlx_snapgen.config import TransformerConfig
from train.loop import speed

TINY = TransformerConfig(
    hidden_size=64,
    head_dim=8,
    num_kv_heads=8,
    num_cross_kv_heads=1,
    blocks=(1, 1, 1),
    num_bands=2,
    text_dims=(8,),
    text_width=8,
    frequency_dim=8,
    latent_channels=4,
)


@pytest.fixture
def uncompiled(monkeypatch):
    """Compilers take longer than this network."""
    monkeypatch.setattr(speed.mx, "compile", lambda function, **_: function)


def test_every_part_of_a_step_is_timed(uncompiled, monkeypatch, capsys):
    steps = []
    gradients = speed.Flow.gradients

    def seen(self, model, batch, key, step):
        steps.append((model.transformer.config.hidden_size, step.shares))
        return gradients(self, model, batch, key, step)

    monkeypatch.setattr(speed.Flow, "gradients", seen)
    measure = speed.measure_training
    monkeypatch.setattr(
        speed, "measure_training", lambda **how: measure(TINY, side=8, batch_size=1, **how)
    )
    options = ["--suite", "training", "--repeats", "1", "--json"]
    monkeypatch.setattr(sys, "argv", ["benchmark", *options])
    benchmark.main()
    seconds = json.loads(capsys.readouterr().out)["seconds"]
    parts = ["full", "0.5 alone", "full + 0.5", "0.375 alone", "full + 0.375", "adamw", "muon"]
    assert list(seconds) == [*parts, "read", "wait"]
    assert all(value > 0 for value in seconds.values())
    # A warm-up and one repeat, in turn; then the full network between two batches.
    once = [(64, ()), (32, ()), (64, (0.5,)), (24, ()), (64, (0.375,))]
    assert steps == [*once, *once, (64, ()), (64, ())]
    lines = benchmark.training_table(dict.fromkeys(seconds, 2.0)).splitlines()
    assert lines[3].split() == ["full", "+", "0.5", "2.0000", "1.00", "2.00"]
    seconds |= {"full": 2.0, "full + 0.5": 2.0, "full + 0.375": 4.0, "adamw": 1.0, "muon": 3.0}
    *_, line = benchmark.training_table(seconds).splitlines()
    assert line.startswith("gradients of an elastic step: 1.50 times full's on average")
    assert line.endswith("adamw 25%, muon 50%")


def test_updates_change_the_weights_of_a_copy(uncompiled):
    model = speed._model(TINY)
    before = mx.array(model.transformer.down_blocks[0].ffn.linear1.weight)
    speed._update(model, speed.TrainingConfig(steps=10, optimizer="muon"))()
    assert mx.array_equal(model.transformer.down_blocks[0].ffn.linear1.weight, before)
