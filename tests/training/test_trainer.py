"""The training loop: it learns, resumes exactly, and refuses what it cannot resume."""

import dataclasses
import errno
import gc
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

import mlx_snapgen.files
import train.loop.checkpoint
import train.loop.plot
import train.loop.trainer
from mlx_snapgen.config import TransformerConfig
from mlx_snapgen.errors import UserError
from mlx_snapgen.files import save_tensors
from mlx_snapgen.networks import attention
from mlx_snapgen.networks.efficient_dit import EfficientDiT
from tests.tiny import make_components
from train.loop import optimizer
from train.loop.checkpoint import append_log, checkpoints, latest_checkpoint, load_ema, read_log
from train.loop.config import TrainingConfig, warmup_of
from train.loop.distributed import SAME
from train.loop.optimizer import Role, scheduled_rate
from train.loop.run import claim
from train.loop.trainer import Trainer
from train.objectives.base import LossObjective

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    """Drawing the curves takes longer than all the rest of these runs."""
    monkeypatch.setattr(train.loop.trainer, "plot_log", lambda run_dir: None)


class Doubling(LossObjective):
    """The model is to double its input, of which it sees a noisy version."""

    def __init__(self, noise=0.1, metrics=lambda model, batch, key, step: {}):
        self.noise, self.metrics = noise, metrics

    def loss(self, model, batch, key, step):
        x = batch["x"] + self.noise * mx.random.normal(batch["x"].shape, key=key)
        x = x.astype(model.layers[0].weight.dtype)
        loss = (model(x).astype(mx.float32) - 2 * batch["x"]).square().mean()
        return loss, {"loss": loss} | self.metrics(model, batch, key, step)


def batches(k):
    return {"x": mx.array(np.random.default_rng(k).normal(size=(8, 4)), mx.float32)}


def trainer(
    run_dir,
    stop_at=None,
    hidden=8,
    objective=None,
    batches=batches,
    arguments=None,
    roles=None,
    **options,
):
    mx.random.seed(0)
    model = nn.Sequential(nn.Linear(4, hidden), nn.Linear(hidden, 4))
    settings = {
        "steps": 20,
        "learning_rate": 1e-1,
        "warmup_steps": 3,
        "checkpoint_every": 4,
        "log_every": 1,
    }
    return Trainer(
        model,
        objective or Doubling(),
        batches=batches,
        config=TrainingConfig(**settings | options),
        run_dir=run_dir,
        arguments=arguments or (lambda step: None),
        roles=roles or [Role("model")],
        # Ending early must not change the schedule, so a stop is asked for instead.
        validate=lambda t: (t.step == stop_at and t.stop()) or {},
    )


def flat(run):
    trees = {
        "model": run.model.parameters(),
        "ema": run.ema_parameters,
        "opt": run.optimizers.state,
    }
    return {k: np.array(v) for k, v in tree_flatten(trees)}


def assert_same(expected, found):
    assert expected.keys() == found.keys()
    for key in expected:
        np.testing.assert_array_equal(expected[key], found[key], err_msg=key)


def test_resumed_run_is_bit_identical(tmp_path):
    straight = trainer(tmp_path / "a")
    assert straight.run()
    first = trainer(tmp_path / "b", stop_at=8)
    assert not first.run()
    assert first.step == 8
    second = trainer(tmp_path / "b")
    assert second.run()
    assert_same(flat(straight), flat(second))


LONG = {"steps": 60, "checkpoint_every": 2, "seed": 3}


def worker(run_dir):
    """Runs in a process of its own."""
    train.loop.trainer.plot_log = lambda run_dir: None

    def slow(k):
        time.sleep(0.02)  # a busy machine may look at the run folder only now and then
        return batches(k)

    trainer(Path(run_dir), batches=slow, **LONG).run()


def start(call):
    code = f"import train, tests.training.test_trainer as t; t.{call}"
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )


def test_a_run_killed_at_any_moment_resumes_bit_identical(tmp_path):
    straight = trainer(tmp_path / "a", **LONG)
    assert straight.run()
    run_dir = tmp_path / "b"
    moments = random.Random(time.time())
    for target in (5, 20, 40):
        process = start(f"worker({str(run_dir)!r})")
        while not (found := latest_checkpoint(run_dir)) or int(found.name[5:]) < target:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.02))
        process.kill()
        process.communicate()
    (run_dir / ".step_7.partial").mkdir()
    with open(run_dir / "log.jsonl", "a") as f:
        f.write('{"step": 59, "loss": 0}\n{"step": 6')
    resumed = trainer(run_dir, **LONG)
    assert resumed.run()
    assert_same(flat(straight), flat(resumed))
    assert [e["step"] for e in read_log(run_dir) if "loss" in e] == list(range(1, 61))
    assert sorted(p.name for p in run_dir.iterdir()) == ["log.jsonl", "step_58", "step_60"]


@pytest.mark.parametrize("at", ["saving", "deleting"])
def test_a_run_that_dies_amid_a_checkpoint_resumes_from_the_one_before(tmp_path, monkeypatch, at):
    straight = trainer(tmp_path / "a")
    assert straight.run()

    def save(path, arrays):
        if "step_12" in str(path) and path.stem == "ema":
            raise MemoryError
        save_tensors(path, arrays)

    def delete(folder):
        (folder / "model.safetensors").unlink()
        raise MemoryError

    with monkeypatch.context() as patch:
        if at == "saving":
            patch.setattr(train.loop.checkpoint, "save_tensors", save)
            kept = SimpleNamespace(rmtree=lambda *_, **__: None)  # a killed process deletes nothing
            patch.setattr(train.loop.checkpoint, "shutil", kept)
        else:
            patch.setattr(train.loop.checkpoint, "shutil", SimpleNamespace(rmtree=delete))
        with pytest.raises(MemoryError):
            trainer(tmp_path / "b").run()
    left = [c.name for c in checkpoints(tmp_path / "b")]
    assert left == (["step_4", "step_8"] if at == "saving" else ["step_8", "step_12"])
    resumed = trainer(tmp_path / "b")
    assert resumed.run()
    assert_same(flat(straight), flat(resumed))


def test_it_learns_and_logs(tmp_path):
    trainer(tmp_path).run()
    losses = [entry["loss"] for entry in read_log(tmp_path) if "loss" in entry]
    assert len(losses) == 20
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert [c.name for c in checkpoints(tmp_path)] == ["step_16", "step_20"]


def test_average_follows_its_definition(tmp_path):
    run = trainer(tmp_path, ema_decay=0.5)
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


def test_micro_batches_equal_one_large_batch(tmp_path):
    def large(k):
        return {"x": mx.concatenate([batches(3 * k + m)["x"] for m in range(3)])}

    whole = trainer(tmp_path / "a", objective=Doubling(noise=0.0), batches=large)
    parts = trainer(tmp_path / "b", objective=Doubling(noise=0.0), accumulate=3)
    assert whole.run() and parts.run()
    expected, found = flat(whole), flat(parts)
    for key in expected:
        np.testing.assert_allclose(expected[key], found[key], atol=1e-5, err_msg=key)
    losses = [[e["loss"] for e in read_log(tmp_path / name) if "loss" in e] for name in "ab"]
    np.testing.assert_allclose(*losses, rtol=1e-4)


def test_micro_batches_have_noise_and_data_of_their_own(tmp_path):
    def noted(model, batch, key, step):
        return {"noise": mx.random.normal(key=key), "first": batch["x"][0, 0]}

    trainer(tmp_path, objective=Doubling(metrics=noted), accumulate=2, steps=3, seed=5).run()
    for step, entry in enumerate(read_log(tmp_path)[:3]):
        keys = mx.random.split(mx.random.key(5 * 1_000_003 + step), 2)
        noise = np.mean([mx.random.normal(key=key).item() for key in keys])
        first = np.mean([batches(2 * step + m)["x"][0, 0].item() for m in range(2)])
        np.testing.assert_allclose([entry["noise"], entry["first"]], [noise, first], atol=1e-6)


def test_accumulation_needs_the_memory_of_one_micro_batch(tmp_path):
    def peak(name, size, accumulate):
        batch = {"x": mx.ones((size, 4))}
        run = trainer(
            tmp_path / name, None, 256, batches=lambda k: batch, steps=1, accumulate=accumulate
        )
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        run.run()
        return mx.get_peak_memory() - before

    assert peak("b", 1024, 8) < 0.3 * peak("a", 8192, 1)


def test_bfloat16_computes_roughly_the_same_over_float32_weights(tmp_path, monkeypatch):
    seen = []

    def spy(model, batch, key, step):
        seen.append({p.dtype for _, p in tree_flatten(model.trainable_parameters())})
        return {}

    exact = trainer(tmp_path / "a")
    assert exact.run()
    monkeypatch.setattr(TrainingConfig, "dtype", mx.bfloat16)
    rough = trainer(tmp_path / "b", objective=Doubling(metrics=spy))
    assert rough.run()
    assert seen and all(dtypes == {mx.bfloat16} for dtypes in seen)
    expected, found = flat(exact), flat(rough)
    assert {k: v.dtype for k, v in expected.items()} == {k: v.dtype for k, v in found.items()}
    assert not all(np.array_equal(expected[k], found[k]) for k in expected)
    for name in ("model.layers.0.weight", "ema.layers.1.weight"):
        np.testing.assert_allclose(expected[name], found[name], atol=0.05)


def deep_network(middle=24):
    config = TransformerConfig(
        hidden_size=32,
        head_dim=8,
        num_kv_heads=4,
        num_cross_kv_heads=2,
        widths=(1.0, 0.5),
        blocks=(1, middle, 1),
        num_bands=2,
        latent_channels=4,
        text_dims=(8,),
        text_width=8,
        frequency_dim=16,
    )
    mx.random.seed(0)
    network = EfficientDiT(config)
    network.update(tree_map(lambda p: p + 0.1 * mx.random.normal(p.shape), network.parameters()))
    mx.eval(network.parameters())
    return network


@pytest.mark.parametrize("width", [1.0, 0.5])
def test_checkpointed_blocks_give_the_same_gradients_in_less_memory(width):
    network = deep_network()
    x_t, text = mx.random.normal((32, 8, 8, 4)), mx.random.normal((32, 5, 8))
    mask = mx.arange(5)[None] < mx.array([[4]] * 32)
    params = network.trainable_parameters()

    def loss(params, text):
        network.update(params)
        return network(x_t, mx.full((32,), 0.3), text, mask, share=width).square().mean()

    found, peaks = [], []
    for enabled in (False, True):
        network.checkpoint_blocks(enabled)
        gc.collect()  # what earlier tests left would be freed in between
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        grads = mx.grad(loss, argnums=(0, 1))(params, text)
        mx.eval(grads)
        peaks.append(mx.get_peak_memory() - before)
        found.append({k: np.array(v) for k, v in tree_flatten(grads)})
        network.update(params)
    assert max(np.abs(v).max() for v in found[0].values()) > 1e-3
    for key in found[0]:
        np.testing.assert_allclose(found[0][key], found[1][key], atol=1e-6, err_msg=key)
    assert peaks[1] < 0.6 * peaks[0], peaks


@pytest.mark.parametrize("width", [1.0, 0.5])
def test_saved_memory_includes_that_of_attention_scores(monkeypatch, width):
    """Of 512 x 512 pixels: the gradients are the same, whichever way the scores are computed."""
    network = deep_network(middle=2)
    x_t, text = mx.random.normal((1, 64, 64, 4)), mx.random.normal((1, 40, 8))
    mask = mx.arange(40)[None] < 30
    params = network.trainable_parameters()
    network.checkpoint_blocks()

    def loss(params, text):
        network.update(params)
        return network(x_t, mx.array([0.3]), text, mask, share=width).square().mean()

    found, peaks = [], []
    for many in (2**60, 2**16):
        monkeypatch.setattr(attention, "MANY_SCORES", many)
        monkeypatch.setattr(attention, "PART_SCORES", 2**14)
        gc.collect()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        grads = mx.grad(loss, argnums=(0, 1))(params, text)
        mx.eval(grads)
        peaks.append(mx.get_peak_memory() - before)
        found.append({k: np.array(v) for k, v in tree_flatten(grads)})
        network.update(params)
    for key, value in found[0].items():
        atol = 1e-4 * max(np.abs(value).max(), 1e-4)  # that of some biases is 0
        np.testing.assert_allclose(found[1][key], value, atol=atol, rtol=0, err_msg=key)
    assert peaks[1] < 0.6 * peaks[0], peaks


# `timeout` signals the process, and then its group.
@pytest.mark.parametrize(
    ("number", "times"), [(signal.SIGINT, 1), (signal.SIGTERM, 1), (signal.SIGTERM, 2)]
)
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(tmp_path, capsys, number, times):
    def interrupted(k):
        if k == 5:
            for _ in range(times):
                os.kill(os.getpid(), number)
            time.sleep(0.1)
        return batches(k)

    before = signal.getsignal(number)
    run = trainer(tmp_path, batches=interrupted)
    assert not run.run()
    assert latest_checkpoint(tmp_path).name == "step_6"
    assert "stopped at step 6; resume with: " in capsys.readouterr().err
    assert signal.getsignal(number) == before
    resumed, straight = trainer(tmp_path), trainer(tmp_path / "straight")
    assert resumed.run() and straight.run()
    assert_same(flat(straight), flat(resumed))


def stubborn(run_dir):
    """Gets two Ctrl-C within one step; runs in a process of its own."""

    def interrupted(k):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(2 * SAME)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(600)

    trainer(Path(run_dir), batches=interrupted).run()


def test_a_second_signal_ends_the_process_at_once(tmp_path):
    process = start(f"stubborn({str(tmp_path)!r})")
    process.communicate(timeout=300)
    assert process.returncode == 130
    assert checkpoints(tmp_path) == []


def hung_up(run_dir, reader):
    """Gets SIGHUP twice, as from a shell and the system; runs in a process of its own."""

    def interrupted(k):
        if k == 5:
            if not reader:
                ours, theirs = os.pipe()
                os.dup2(theirs, 2)
                os.close(ours)
                os.close(theirs)
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(2 * SAME)
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.1)
        return batches(k)

    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it
    run = trainer(Path(run_dir), batches=interrupted)
    run.run()
    print("on a closed terminal", flush=True)
    sys.exit(run.exit_code)


@pytest.mark.parametrize("reader", [True, False])
def test_a_closed_terminal_ends_the_run_as_sigterm_does(tmp_path, reader):
    """Also if nothing can be printed any more, as a terminal or a pipe without a reader."""
    process = start(f"hung_up({str(tmp_path)!r}, {reader})")
    _, said = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGHUP
    assert latest_checkpoint(tmp_path).name == "step_6"
    assert ("stopped at step 6; resume with: " in said) == reader
    resumed, straight = trainer(tmp_path), trainer(tmp_path / "straight")
    assert resumed.run() and straight.run()
    assert_same(flat(straight), flat(resumed))


@pytest.mark.parametrize("at", ["picture", "log"])
def test_a_validation_that_a_kill_cut_off_is_made_up(tmp_path, monkeypatch, at):
    """Killed between the checkpoint of step 8 and its validation, or before its line is logged."""

    def validate(run):
        if at == "picture" and dies and run.step == 8:
            raise MemoryError
        run.sample_path("cat").write_text(str(run.step))
        return {"score": 0.5 * run.step}

    def append(run_dir, entry):
        if at == "log" and dies and "score" in entry and entry["step"] == 8:
            raise MemoryError
        append_log(run_dir, entry)

    monkeypatch.setattr(train.loop.trainer, "append_log", append)
    for dies in (True, False, False):  # the last does nothing
        run = trainer(tmp_path)
        run.validate = validate
        if dies:
            with pytest.raises(MemoryError):
                run.run()
            assert latest_checkpoint(tmp_path).name == "step_8"
        else:
            assert run.run()
    scores = [(e["step"], e["score"]) for e in read_log(tmp_path) if "score" in e]
    assert scores == [(s, 0.5 * s) for s in (4, 8, 12, 16, 20)]
    assert len(list((tmp_path / "samples").iterdir())) == 5


def test_the_last_step_is_logged_and_leaves_no_trace_if_more_follow(tmp_path):
    """So that short runs have curves, and longer ones the same log as without a break."""
    steps = {}
    for name, runs in {"a": (13, 25), "b": (25,), "c": (20, 25)}.items():
        for count in runs:
            assert trainer(tmp_path / name, steps=count, log_every=10, learning_rate=1e-3).run()
            entries = [e for e in read_log(tmp_path / name) if "loss" in e]
            steps[name, count] = [e["step"] for e in entries]
    assert steps["a", 13] == [10, 13] and steps["c", 20] == [10, 20]
    assert steps["a", 25] == steps["b", 25] == steps["c", 25] == [10, 20, 25]


def test_a_line_of_the_log_is_the_mean_of_its_steps_also_across_a_stop(tmp_path):
    assert trainer(tmp_path / "a", log_every=10).run()
    assert not trainer(tmp_path / "b", log_every=10, stop_at=4).run()
    assert trainer(tmp_path / "b", log_every=10).run()
    one, two = ([e["loss"] for e in read_log(tmp_path / n) if "loss" in e] for n in "ab")
    assert one == two and len(one) == 2


def test_two_processes_do_not_train_in_one_folder(tmp_path):
    code = (
        "import sys, pathlib, train.loop.checkpoint as c\n"
        "c.lock_run(pathlib.Path(sys.argv[1]))\n"
        "print('locked', flush=True)\n"
        "sys.stdin.read()\n"
    )
    first = subprocess.Popen(
        [sys.executable, "-c", f"import train\n{code}", str(tmp_path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert first.stdout.readline() == "locked\n"
    for call in (trainer(tmp_path).run, lambda: claim(tmp_path, {"data": "a"})):
        with pytest.raises(UserError, match=r"another process trains in .*: wait for it") as error:
            call()
        assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []
    first.kill()
    first.communicate()
    claim(tmp_path, {"data": "a"})
    assert trainer(tmp_path).run()
    # Ended, the run is free for others.
    second = subprocess.run(
        [sys.executable, "-c", f"import train\n{code}", str(tmp_path)],
        cwd=ROOT,
        input="",
        capture_output=True,
        text=True,
    )
    assert second.stdout == "locked\n", second.stderr


def test_a_drive_without_locks_is_no_obstacle(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(mlx_snapgen.files.fcntl, "flock", flock)
    claim(tmp_path, {"data": "a"})
    assert trainer(tmp_path, steps=4).run()


def test_a_compiler_that_ctrl_c_ends_is_started_again(tmp_path, monkeypatch):
    """On the CPU mlx starts compilers, which get the Ctrl-C of a terminal, too; then mlx fails."""
    straight = trainer(tmp_path / "a")
    assert straight.run()
    evaluate, failed = mx.eval, []

    def interrupted(*arrays):
        if not failed:
            failed.append(True)
            os.kill(os.getpid(), signal.SIGINT)
            raise RuntimeError("Could not load C++ shared library")
        evaluate(*arrays)

    run = trainer(tmp_path / "b", batches=lambda k: batches(k))
    monkeypatch.setattr(mx, "eval", interrupted)
    assert not run.run()
    assert failed and run.exit_code == 128 + signal.SIGINT
    assert latest_checkpoint(tmp_path / "b").name == "step_1"
    resumed = trainer(tmp_path / "b")
    assert resumed.run() and resumed.exit_code == 0
    assert_same(flat(straight), flat(resumed))


def test_a_run_that_stopped_before_its_first_step_validates_no_step_0(tmp_path):
    run = trainer(tmp_path)
    run.stop()
    assert not run.run()
    assert latest_checkpoint(tmp_path).name == "step_0"
    resumed, validated = trainer(tmp_path), []
    resumed.validate = lambda t: validated.append(t.step) or {}
    assert resumed.run()
    assert validated and 0 not in validated


def test_a_full_disk_ends_a_run_in_one_line_with_its_last_checkpoint(disk):
    """Checkpoints of 2 x 4 layers do not fit a third time."""
    folder = disk("400k")
    run = trainer(folder / "run", hidden=1000, keep_checkpoints=0)
    with pytest.raises(UserError) as error:
        run.run()
    saved = latest_checkpoint(folder / "run")
    assert str(error.value) == (
        f"cannot write to {folder / 'run'} (No space left on device); the last checkpoint is "
        f"{saved}: free some space and run the same command again to resume"
    )
    assert not list(folder.rglob(".*"))
    straight = trainer(folder.parent / "straight", hidden=1000)
    assert straight.run()
    subprocess.run(["mount", "-o", "remount,size=4m", str(folder)], check=True)
    resumed = trainer(folder / "run", hidden=1000)
    assert resumed.run()
    assert_same(flat(straight), flat(resumed))


def test_a_disk_that_turns_read_only_ends_a_run_in_one_line(disk):
    folder = disk("4m")
    run = trainer(folder / "run")
    run.validate = lambda run: (
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True) and {}
    )
    with pytest.raises(UserError, match=r"Read-only file system\); the last .*step_4: when"):
        run.run()
    # The next run ends as soon as it starts.
    with pytest.raises(UserError, match=r"Read-only file system\); the last .*step_4: when"):
        trainer(folder / "run").run()


def test_foreign_and_damaged_checkpoints_are_refused_in_one_line(tmp_path):
    trainer(tmp_path, stop_at=8).run()
    with pytest.raises(UserError, match=r"does not fit this model.*layers") as error:
        trainer(tmp_path, hidden=6).run()
    assert "\n" not in str(error.value)
    for name, length in (("ema", 100), ("optimizer", -1), ("state", 20)):
        path = next(latest_checkpoint(tmp_path).glob(f"{name}.*"))
        whole = path.read_bytes()
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"step_8 is damaged .* to resume from .*step_4") as e:
            trainer(tmp_path).run()
        assert "\n" not in str(e.value)
        path.write_bytes(whole)
    for folder in checkpoints(tmp_path):
        (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"step_8 is damaged .* delete it to start again"):
        trainer(tmp_path).run()


def test_settings_that_change_the_data_must_stay_on_resume(tmp_path, capsys):
    trainer(tmp_path, stop_at=8, accumulate=2).run()
    for options, match in (
        ({"accumulate": 2, "batch_size": 32}, "with --batch-size 64, not 32: give 64"),
        ({"accumulate": 2, "seed": 1}, "with --seed 0, not 1: give 0"),
        ({"accumulate": 2, "optimizer": "muon"}, "with --optimizer adamw, not muon: give adamw"),
        ({}, r"with 2 micro-batches a step \(processes x --accumulate\), not 1 x 1"),
    ):
        with pytest.raises(UserError, match=match):
            trainer(tmp_path, **options).run()
    capsys.readouterr()
    trainer(tmp_path, stop_at=12, accumulate=2, learning_rate=0.05, log_every=2).run()
    lines = capsys.readouterr().err.splitlines()
    assert "resuming with other settings: --learning-rate 0.1 -> 0.05" in lines


def test_a_checkpoint_without_the_newer_settings_is_resumed(tmp_path):
    trainer(tmp_path, stop_at=8).run()
    path = tmp_path / "step_8/state.json"
    state = json.loads(path.read_text())
    del state["training"]["accumulate"]
    state["training"]["precision"] = "auto"  # as earlier versions recorded
    path.write_text(json.dumps({"step": 8, "training": state["training"]}))
    assert trainer(tmp_path).run()


def test_averaged_weights_of_a_run(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint"):
        load_ema(tmp_path)
    run = trainer(tmp_path)
    run.run()
    for key, value in tree_flatten(run.ema_parameters):
        np.testing.assert_array_equal(np.array(load_ema(tmp_path)[key]), np.array(value))


def test_steps_may_differ_in_static_arguments_and_metrics(tmp_path):
    traced = []

    def alternating(model, batch, key, odd):
        traced.append(odd)
        return {"odd": mx.array(1.0)} if odd else {"even": mx.array(2.0)}

    run = trainer(
        tmp_path,
        objective=Doubling(metrics=alternating),
        arguments=lambda step: step % 2 == 1,
        log_every=5,
        accumulate=2,
    )
    assert run.run()
    entries = [e for e in read_log(tmp_path) if "loss" in e]
    assert [e["step"] for e in entries] == [5, 10, 15, 20]
    assert all(e["odd"] == 1 and e["even"] == 2 for e in entries)
    # Each is traced for the first micro-batch of a step and for the others, and then compiled.
    assert len(traced) <= 8


def test_roles_have_optimizers_and_clips_of_their_own(tmp_path):
    """Each role is as it would be if the other had a gradient of no size."""
    roles = [Role("first", lambda path: ".0." in path), Role("second", lambda path: ".1." in path)]

    def run(name, largest):
        made = trainer(tmp_path / name, roles=roles, max_grad_norm=largest, steps=4)
        assert made.run()
        return made, flat(made)

    made, found = run("a", 1e9)
    assert {"opt.first.step", "opt.second.step"} <= found.keys()
    assert "opt.first.layers.0.weight.m" in found and "opt.first.layers.1.weight.m" not in found
    # Without a clip, Adam treats every number alone: roles change nothing.
    whole = trainer(tmp_path / "b", max_grad_norm=1e9, steps=4)
    assert whole.run()
    alone = flat(whole)
    for name in ("model.layers.0.weight", "model.layers.1.bias", "ema.layers.1.weight"):
        np.testing.assert_allclose(found[name], alone[name], atol=1e-6)
    entry = read_log(tmp_path / "a")[0]
    norms = entry["grad_norm_first"], entry["grad_norm_second"]
    assert np.hypot(*norms) == pytest.approx(read_log(tmp_path / "b")[0]["grad_norm"], rel=1e-5)
    resumed = trainer(tmp_path / "a", roles=roles, max_grad_norm=1e9, steps=4)
    assert resumed.run()
    assert_same(flat(made), flat(resumed))


class Pair(nn.Module):
    """A student and a critic that have nothing to do with each other."""

    def __init__(self):
        super().__init__()
        self.student, self.critic = mx.zeros((4,)), mx.zeros((4,))


class Turns:
    """Large gradients of the student, on its turn, and small ones of the critic in every step."""

    def gradients(self, model, batch, key, step):
        grads = {"critic": mx.array([0.5, -0.3, 0.2, 0.1])}
        if step:
            grads["student"] = 20 * (model.student - mx.array([1.0, -2.0, 3.0, 0.5]))
        return grads, {}


def pair(run_dir, roles, steps, *, every):
    config = TrainingConfig(
        steps=steps,
        learning_rate=1e-2,
        final_learning_rate=1e-2,
        warmup_steps=1,
        betas=(0.0, 0.99),
        weight_decay=0.0,
    )
    made = Trainer(
        Pair(),
        Turns(),
        batches=batches,
        config=config,
        run_dir=run_dir,
        arguments=lambda step: (step + 1) % every == 0,
        roles=roles,
    )
    assert made.run()
    return made


PAIR = [
    Role("student", lambda path: path == "student"),
    Role("critic", lambda path: path == "critic"),
]


def test_a_role_with_few_turns_moves_as_far_as_alone(tmp_path):
    """One step count for both would correct the student's first averages as if they were old."""
    alone = pair(tmp_path / "alone", PAIR[:1], 4, every=1)
    often = pair(tmp_path / "often", PAIR, 20, every=5)
    np.testing.assert_allclose(
        np.array(often.model.student), np.array(alone.model.student), rtol=1e-6
    )
    states = often.optimizers.state
    assert (states["student"]["step"].item(), states["critic"]["step"].item()) == (4, 20)


def test_a_large_gradient_of_one_role_does_not_shrink_that_of_another(tmp_path):
    made = pair(tmp_path, PAIR, 5, every=5)
    critic = made.optimizers.state["critic"]["critic"]["m"]
    np.testing.assert_allclose(np.array(critic), [0.5, -0.3, 0.2, 0.1], rtol=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_checkpoint_of_one_optimizer_is_resumed_by_role(tmp_path, optimizer):
    roles = [Role("first", lambda path: ".0." in path), Role("second", lambda path: ".1." in path)]
    before = trainer(tmp_path, steps=8, optimizer=optimizer, stop_at=4)
    assert not before.run()
    expected = flat(before)
    resumed = trainer(tmp_path, steps=8, optimizer=optimizer, roles=roles)
    resumed.load(latest_checkpoint(tmp_path))
    found = flat(resumed)
    for key, value in found.items():
        *tree, name = key.split("opt.first.") if "opt.first." in key else key.split("opt.second.")
        np.testing.assert_array_equal(value, expected["opt." + name if tree else key], err_msg=key)
    counts = [value for key, value in found.items() if key.endswith("step")]
    assert len(counts) == (2 if optimizer == "adamw" else 4) and set(map(int, counts)) == {4}
    assert resumed.run()


def test_a_role_without_gradients_stays_as_it_is(tmp_path):
    class FirstOnly(Doubling):
        def gradients(self, model, batch, key, step):
            grads, metrics = super().gradients(model, batch, key, step)
            return {"layers": grads["layers"][:1]}, metrics

    roles = [Role("first", lambda path: ".0." in path), Role("second", lambda path: ".1." in path)]
    made = trainer(tmp_path, objective=FirstOnly(), roles=roles, steps=3)
    before = {k: np.array(v) for k, v in tree_flatten(made.model.parameters())}
    assert made.run()
    after = dict(tree_flatten(made.model.parameters()))
    assert not np.array_equal(after["layers.0.weight"], before["layers.0.weight"])
    np.testing.assert_array_equal(after["layers.1.weight"], before["layers.1.weight"])
    states = made.optimizers.state
    assert (states["first"]["step"].item(), states["second"]["step"].item()) == (3, 0)


def test_a_loss_that_is_not_finite_ends_the_run_before_it_is_saved(tmp_path):
    run = trainer(tmp_path, batches=lambda k: {"x": batches(k)["x"] * (1 if k < 7 else np.nan)})
    with pytest.raises(UserError, match=r"not finite at step 8: .* resume from .*step_4"):
        run.run()
    assert [c.name for c in checkpoints(tmp_path)] == ["step_4"]
    run = trainer(tmp_path / "new", batches=lambda k: {"x": batches(k)["x"] * np.nan})
    with pytest.raises(UserError, match=r"at step 1: lower the learning rate and start again"):
        run.run()


def test_validation_is_logged_and_may_write_pictures(tmp_path):
    run = trainer(tmp_path)

    def validate(run):
        run.sample_path("cat").write_bytes(b"")
        return {"score": 0.5 * run.step}

    run.validate = validate
    run.run()
    scores = [(e["step"], e["score"]) for e in read_log(tmp_path) if "score" in e]
    assert scores == [(s, 0.5 * s) for s in (4, 8, 12, 16, 20)]
    names = sorted(p.name for p in (tmp_path / "samples").iterdir())
    assert names == [f"{s:07d}_cat.png" for s, _ in scores]


def test_the_bar_names_what_follows_the_steps(tmp_path, capsys):
    """Nothing that a checkpoint needs time for is silent, and nothing is named that is not done."""
    run = trainer(tmp_path, steps=4)
    run.validate = None
    assert run.run()
    said = capsys.readouterr().err
    places = [said.index(f"{text} ...") for text in ("saving step_4", "drawing loss.png")]
    assert places == sorted(places)
    assert "validation" not in said and "sample pictures" not in said
    # Without a bar of 4 steps out of 2.
    shorter = trainer(tmp_path, steps=2)
    assert shorter.run()
    said = capsys.readouterr().err
    assert said.endswith(f"{tmp_path} is complete, with 4 steps\n") and "step/s" not in said


def test_pictures_without_metrics_leave_no_line_in_the_log(tmp_path, monkeypatch):
    calls = []
    for _ in range(2):
        run = trainer(tmp_path, steps=4, log_every=2)
        run.validate = lambda run: calls.append(run.step) or {}
        assert run.run()
    assert calls == [4]  # not once more when the run is complete
    assert all("loss" in entry for entry in read_log(tmp_path))


def test_curves_are_drawn(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    assert train.loop.plot.plot_log(tmp_path) is None
    log = [
        {"step": s, "time": 0.0, "loss": 1 / s, "loss_0.5": 2 / s, "balance": s - 3}
        for s in range(1, 9)
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in log) + '{"step": 9')
    assert train.loop.plot.plot_log(tmp_path).read_bytes().startswith(b"\x89PNG")
    names = ("loss_0.5", "validation_tiny", "grad_norm_projector_375", "grad_norm", "psnr")
    panels = ["loss", "validation", "grad_norm_projector", "grad_norm", "psnr"]
    assert list(map(train.loop.plot.panel_of, names)) == panels
    shown = ["loss_small", "validation_tiny", "grad_norm_projector_tiny", "grad_norm", "psnr"]
    assert list(map(train.loop.plot.shown_name, names)) == shown
    assert train.loop.plot.shown_name("loss_1") == "loss_full"
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for _ in range(2):
        assert train.loop.plot.plot_log(tmp_path) is None
    assert capsys.readouterr().err.count("matplotlib") == 2  # one line that names it twice


def test_schedule_warms_up_and_decays():
    config = TrainingConfig(steps=100, warmup_steps=10, learning_rate=1.0, final_learning_rate=0.1)

    def rate(step, own_step):
        return float(scheduled_rate(config, mx.array(step), own_step=mx.array(own_step)))

    values = [rate(s, s) for s in range(100)]
    assert np.argmax(values) == 10
    assert values[0] == pytest.approx(0.1)
    assert values[-1] == pytest.approx(0.1, abs=1e-2)
    assert all(np.diff(values[:10]) > 0) and all(np.diff(values[11:]) < 0)
    # A role that is trained in every fifth step warms up in ten steps of its own, and ends alike.
    fifth = [rate(s, s // 5) for s in range(0, 100, 5)]
    rising = [values[s // 5] * max(values[s], s < 10) for s in range(0, 50, 5)]
    assert fifth[:10] == pytest.approx(rising, rel=1e-5)
    assert fifth[10:] == pytest.approx(values[50::5])


def test_muon_steps_are_those_of_mlx(monkeypatch):
    # Groups of several matrices, of two after a full one, and of one.
    shapes = [(8, 8)] * 5 + [(8, 24)] * 3 + [(24, 8)] * 2 + [(12, 4)]
    shapes += [(8, 3, 3, 8)] * 2  # convolutions
    monkeypatch.setattr(optimizer, "BATCHED", 3 * 64)
    mx.random.seed(0)
    start = {"layers": [{"weight": mx.random.normal(shape)} for shape in shapes]}
    steps = [tree_map(lambda p: mx.random.normal(p.shape), start) for _ in range(3)]
    found = []
    for muon in (optim.Muon(0.02, weight_decay=0.0), optimizer.Muon(0.02)):
        weights = start
        muon.init(weights)
        for gradients in steps:
            weights = muon.apply_gradients(gradients, {**weights, "other": mx.zeros(3)})
        found.append(dict(tree_flatten([weights, muon.state])))
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        np.testing.assert_allclose(found[1][name], value, atol=1e-6, err_msg=name)


def test_muon_takes_the_convolutions_of_an_autoencoders_blocks():
    model = make_components().autoencoder
    taken = [n for n, w in tree_flatten(model.parameters()) if optimizer.is_hidden_matrix(n, w)]
    assert len(taken) == 10
    assert all(re.search(r"coder\.blocks\d\.0\.conv\d\.weight$", name) for name in taken)


def test_muon_takes_the_matrices_inside_blocks_and_resumes_exactly(tmp_path):
    def muon(run_dir, steps):
        mx.random.seed(0)
        # `nn.Sequential` keeps its parts in `layers`, as the blocks of a text encoder are.
        model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
        config = TrainingConfig(
            steps=12,
            optimizer="muon",
            learning_rate=1e-2,
            warmup_steps=2,
            checkpoint_every=6,
            log_every=1,
        )
        return Trainer(
            model,
            Doubling(),
            batches=batches,
            config=config,
            run_dir=run_dir,
            validate=lambda t: (t.stop() if t.step >= steps else None) or {},
        )

    straight = muon(tmp_path / "a", 12)
    before = np.array(straight.model.layers[0].weight)
    assert straight.run()
    change = np.array(straight.model.layers[0].weight) - before
    # Orthogonalized steps use all directions alike; Adam's or SGD's would be far from it.
    singular = np.linalg.svd(change, compute_uv=False)
    assert singular[-1] > 0.2 * singular[0]
    assert not muon(tmp_path / "b", 6).run()
    resumed = muon(tmp_path / "b", 12)
    assert resumed.run()
    expected = dict(tree_flatten(straight.model.parameters()))
    for name, value in tree_flatten(resumed.model.parameters()):
        np.testing.assert_array_equal(np.array(value), np.array(expected[name]), err_msg=name)
    with pytest.raises(UserError, match="'sgd' is not one of adamw, muon"):
        TrainingConfig(steps=1, optimizer="sgd")


def test_the_averages_leave_the_model_after_an_error_too(tmp_path):
    made = trainer(tmp_path, steps=3)
    assert made.run()
    own = {k: np.array(v) for k, v in tree_flatten(made.model.parameters())}
    averages = dict(tree_flatten(made.ema_parameters))
    with pytest.raises(KeyboardInterrupt), made.averaged():
        for name, value in tree_flatten(made.model.trainable_parameters()):
            np.testing.assert_array_equal(value, averages[name])
        raise KeyboardInterrupt
    for name, value in tree_flatten(made.model.parameters()):
        np.testing.assert_array_equal(value, own[name])
    assert any(not np.array_equal(own[name], value) for name, value in averages.items())


def test_short_runs_have_a_short_warm_up():
    assert [warmup_of(steps, 200) for steps in (1, 60, 1200, 6000)] == [1, 10, 200, 200]
