"""Two real processes over the ring backend: the same training, one end, and no waiting for ever."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import train.loop.distributed
import train.loop.trainer
from train.loop.checkpoint import latest_checkpoint
from train.loop.config import TrainingConfig
from train.loop.trainer import Trainer
from train.objectives.base import LossObjective

ROOT = Path(__file__).parents[2]
STEPS = 8


class Doubling(LossObjective):
    def loss(self, model, batch, key, step):
        x = batch["x"] + 0.1 * mx.random.normal(batch["x"].shape, key=key)
        loss = (model(x) - 2 * batch["x"]).square().mean()
        return loss, {"loss": loss}


def trainer(run_dir, accumulate, before_batch=lambda number: None):
    def batches(number):
        before_batch(number)
        rng = np.random.default_rng(number)
        return {"x": mx.array(rng.normal(size=(8, 4)), mx.float32)}

    train.loop.trainer.plot_log = lambda run_dir: None
    # Another seed in each process: all must go on from the first one's weights.
    mx.random.seed(mx.distributed.init().rank())
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
    config = TrainingConfig(
        steps=STEPS,
        batch_size=8,
        accumulate=accumulate,
        learning_rate=1e-1,
        warmup_steps=3,
        checkpoint_every=2,
        log_every=1,
    )
    return Trainer(model, Doubling(), batches=batches, config=config, run_dir=run_dir)


def worker(folder, event=None, lost=1):
    """One process; `event` happens to the second in its step 5. The process `lost` ends when the
    two have found each other ("START"), or when they watch each other ("WATCHED").

    Batches are 0 2 4 ... in the first process and 1 3 5 ... in the second.
    """
    rank = mx.distributed.init().rank()
    if event == "START":
        train.loop.distributed.HANDSHAKE = 3.0
        if rank == lost:
            os._exit(9)
        event = None
    if event == "WATCHED":
        if rank == lost:
            train.loop.distributed.is_complete = lambda group: os._exit(9)
        event = None

    def before_batch(number):
        if event and number == 2 * 4 + 1:
            os.kill(os.getpid(), getattr(signal, event))
            time.sleep(0.2)

    train.loop.distributed.SILENCE = 3.0
    run = trainer(Path(folder) / str(rank), 1, before_batch)
    finished = run.run()
    print(json.dumps({"step": run.step, "finished": finished}), flush=True)
    sys.exit(run.exit_code)


def write_hosts(folder):
    """The file of two processes with free ports, for MLX_HOSTFILE."""
    ports = []
    for _ in range(2):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            ports.append(s.getsockname()[1])
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{p}"] for p in ports]))
    return hosts


def start(folder, *args, module=None):
    """Both processes, which run `worker(*args)` of another module, or that of this one.

    Only the first has the run's folder, as on two machines.
    """
    hosts = write_hosts(folder)
    given = args if module else (str(folder), *args)
    call = f"worker({', '.join(map(repr, given))})"
    return [
        subprocess.Popen(
            [sys.executable, "-c", f"import train, {module or __name__} as t; t.{call}"],
            cwd=ROOT,
            env=os.environ | {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


def finish(process):
    try:
        return process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        process.kill()
        raise


def weights(run_dir):
    folder = latest_checkpoint(run_dir)
    assert folder.name == f"step_{STEPS}"
    files = {p.name: mx.load(str(p)) for p in folder.glob("*.safetensors")}
    return {f"{f} {k}": np.array(v) for f, tree in files.items() for k, v in tree.items()}


def logged(run_dir):
    lines = (run_dir / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run that two processes must equal: one process, two micro-batches a step."""
    run_dir = tmp_path_factory.mktemp("alone")
    assert trainer(run_dir, 2).run()
    return run_dir


def test_two_processes_go_on_from_one_as_if_alone(tmp_path, alone):
    first = trainer(tmp_path / "0", 2)
    first._checkpoint = lambda: first.step == 4 and first.stop()
    assert not first.run()
    for process in start(tmp_path):
        out, err = finish(process)
        assert process.returncode == 0, err
        assert json.loads(out) == {"step": STEPS, "finished": True}
    assert not (tmp_path / "1").exists()
    expected, found = weights(alone), weights(tmp_path / "0")
    assert expected.keys() == found.keys() and len(found) == 18
    for key in expected:
        np.testing.assert_allclose(expected[key], found[key], atol=1e-6, err_msg=key)
    np.testing.assert_allclose(logged(alone), logged(tmp_path / "0"), rtol=1e-5)


@pytest.mark.parametrize("event", ["SIGKILL", "SIGSTOP"])
def test_a_lost_process_ends_the_job_with_a_way_on(tmp_path, alone, event):
    """Killed, mlx notices by itself; stopped, as a machine that went to sleep, only the watch."""
    first, second = start(tmp_path, event)
    try:
        _, err = finish(first)
    finally:
        second.kill()
        second.communicate()
    assert first.returncode == 1, err
    line = next(line for line in err.splitlines() if line.startswith("process"))
    assert line.startswith("process 1 of 2 is gone, training ends at step 4; last checkpoint: ")
    assert "step_4; resume, in every process, with: " in line
    assert "Traceback" not in err
    # One machine can finish what two began.
    assert trainer(tmp_path / "0", 2).run()
    expected, found = weights(alone), weights(tmp_path / "0")
    for key in expected:
        np.testing.assert_allclose(expected[key], found[key], atol=1e-6, err_msg=key)


@pytest.mark.parametrize("event", ["START", "WATCHED"])
@pytest.mark.parametrize("lost", [0, 1])
def test_a_process_that_ends_before_the_first_step_ends_the_job(tmp_path, lost, event):
    other = start(tmp_path, event, lost)[1 - lost]
    _, err = finish(other)
    assert other.returncode == 1, err
    assert f"process {lost} of 2 is gone, training ends at step 0; resume, in every" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("rank", [0, 1])
def test_a_sum_without_the_other_process_is_its_loss(monkeypatch, rank):
    """mlx may return what was in memory."""
    monkeypatch.setattr(mx.distributed, "all_sum", lambda x, group: mx.full(x.shape, 255))
    group, lost = SimpleNamespace(size=lambda: 2, rank=lambda: rank), []
    with pytest.raises(ValueError):
        train.loop.distributed.PeerWatch(group, lost.append)
    assert lost == [1 - rank]


@pytest.mark.parametrize("event", ["SIGINT", "SIGTERM"])
def test_a_signal_to_one_process_ends_all_at_the_same_step_with_its_code(tmp_path, event):
    ends = []
    for process in start(tmp_path, event):
        out, err = finish(process)
        assert process.returncode == 128 + getattr(signal, event), err
        ends.append(json.loads(out))
    assert ends[0] == ends[1] and not ends[0]["finished"]
    assert 4 < ends[0]["step"] < STEPS
    assert latest_checkpoint(tmp_path / "0").name == f"step_{ends[0]['step']}"
