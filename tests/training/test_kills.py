"""Commands killed at random moments: the same command resumes, and ends as if never killed.

`KILLS=500 SEED=7 python -m pytest tests/training/test_kills.py` kills more often, at other moments.
"""

import contextlib
import functools
import importlib
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import train.loop.trainer
from mlx_snapgen.checkpoint.model import load_pretrained, save_pretrained
from mlx_snapgen.errors import run_command
from mlx_snapgen.lora.files import save_lora
from tests import tiny
from tests.training.test_prepare import write_pictures
from train.loop.checkpoint import TREES, latest_checkpoint, read_log
from train.loop.config import TrainingConfig

KILLS = int(os.environ.get("KILLS", "20"))
"""Kills of all commands together."""
INTERRUPTS = -(-KILLS // 5)
"""Of `train.flow`, each in a new process."""
AWAKE = 0.1
"""Seconds in which Python itself starts, with a traceback of its own after Ctrl-C."""
ROOT = Path(__file__).parents[2]
SEED = int(os.environ.get("SEED", "0"))
COMMANDS = ["train.autoencoder", "train.export", "train.flow", "train.kdmd", "train.prepare"]
EVERY = 4
"""Steps between checkpoints."""
STEPS = 2 * EVERY
TRAINING = [
    *("--steps", STEPS, "--batch-size", 2, "--model-widths", "full", "small"),
    *("--checkpoint-every", EVERY, "--validation-prompts", "a cat", "--resolution", 64),
]
FLOW = [*TRAINING, "--optimizer", "adamw", "--validation-pictures", 2, "--held-out", 0.2]
KDMD = [*TRAINING, "--rank", 2, "--student-every", 2, "--few-steps", 2]


@pytest.fixture(scope="module")
def processes():
    """Starts processes that have imported everything, but not used MLX yet."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*COMMANDS, "matplotlib.figure", __name__])
    return context


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures") / "set", 100)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model whose previews are drawn in one step."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    config = tiny.STUDENT
    save_pretrained(folder, tiny.make_components(config))
    path = folder / "config.json"
    values = json.loads(path.read_text())
    values["sampler"] |= {"num_inference_steps": 1, "guidance_scale": 1.0}
    path.write_text(json.dumps(values))
    return folder


# --- in a process of its own ----------------------------------------------------------------------


def run(call, folder, *given):
    """`call`, a command's module or a function here, with its output in `folder`.log."""
    log = open(f"{folder}.log", "a")  # noqa: SIM115
    for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
        stream.flush()
        os.dup2(log.fileno(), number)
    mx.disable_compile()  # it would take longer than all the rest; see test_trainer.py
    if call != "train.flow":
        train.loop.trainer.plot_log = lambda run_dir: None  # slow
    if not call.startswith("train."):
        globals()[call](folder, *given)
        return
    command = importlib.import_module(call)
    for name in (call, "train.options.supernetwork", "train.options.kdmd"):
        module = importlib.import_module(name)
        if hasattr(module, "TrainingConfig"):
            every = {"checkpoint_every": EVERY} if name == "train.autoencoder" else {}
            module.TrainingConfig = functools.partial(TrainingConfig, log_every=3, **every)
    if call == "train.prepare":
        command.MOST_IN_SHARD = 12
    sys.argv = [call, *map(str, given)]
    run_command(command.main)


def write_lora(folder, model):
    network = load_pretrained(model).transformer
    tiny.add_random_lora(network)
    save_lora(folder / "style.safetensors", network, name="style")


# --- what is killed -------------------------------------------------------------------------------


SIZE = ["--resolution", 64, "--held-out", 0.2]


@pytest.fixture(scope="module")
def calls(pictures, model, processes, tmp_path_factory):
    """Name -> folder -> the arguments of `run`."""
    base = tmp_path_factory.mktemp("base")

    def flow(data, folder):
        given = ["--model", model, "--run-dir", folder / "run", "--data", data, *FLOW]
        return "train.flow", folder, *given

    def made(*arguments):
        process = processes.Process(target=run, args=arguments)
        process.start()
        process.join()
        assert process.exitcode == 0, Path(f"{arguments[1]}.log").read_text()

    def prepare(folder):
        given = [pictures, "--output", folder / "set", "--model", model, *SIZE]
        return "train.prepare", folder, *given

    def kdmd(folder):
        given = ["--model", model, "--run-dir", folder / "run", "--data", prepared, *KDMD]
        return "train.kdmd", folder, *given, "--output", folder / "student.safetensors"

    def autoencoder(folder):
        given = ["--run-dir", folder / "run", "--data", pictures, "--steps", STEPS, "--crop", 16]
        sizes = ["--batch-size", 2, "--channels", 4, "--latent-channels", 2]
        return "train.autoencoder", folder, *given, *sizes, *SIZE

    def export(folder):
        return "train.export", folder, "--run", base / "run", "--output", folder / "model"

    made(*prepare(base))
    prepared = base / "set"
    made(*flow(prepared, base))
    return {
        "prepare": prepare,
        "flow on pictures": functools.partial(flow, pictures),
        "flow on a prepared set": functools.partial(flow, prepared),
        "kdmd": kdmd,
        "autoencoder": autoencoder,
        "export": export,
        "lora": lambda folder: ("write_lora", folder, model),
    }


def contents(folder):
    """What must not depend on kills: the files, weights as arrays, logs without times.

    Of the checkpoints the last: an interrupted run has others before it.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        old = path.parent.name.startswith("step_") and path.parent.name != f"step_{STEPS}"
        if path.is_dir() or path.name == "report.json" or old:
            continue
        if path.name == "log.jsonl":
            entries = read_log(path.parent)
            times = ("time", "seconds_per_step")
            found[name] = [{k: v for k, v in e.items() if k not in times} for e in entries]
        elif path.parent.name.startswith("step_") and path.stem in TREES:
            found[name] = {k: np.array(v) for k, v in mx.load(str(path)).items()}
        else:
            found[name] = path.read_bytes()
    return found


def assert_same(expected, found, log):
    assert expected.keys() == found.keys(), log
    for name, value in expected.items():
        if isinstance(value, dict):
            assert value.keys() == found[name].keys()
            for key in value:
                np.testing.assert_array_equal(value[key], found[name][key], err_msg=f"{name} {key}")
        else:
            assert value == found[name], f"{name}: {log}"


NAMES = [
    *("prepare", "flow on pictures", "flow on a prepared set", "kdmd", "autoencoder", "export"),
    "lora",
]


@pytest.mark.parametrize("name", NAMES)
def test_killed_at_random_moments_it_ends_as_if_never_killed(name, calls, processes, tmp_path):
    def start(folder):
        folder.mkdir(exist_ok=True)
        process = processes.Process(target=run, args=calls[name](folder))
        process.start()
        return process

    def check(folder, process):
        log = Path(f"{folder}.log").read_text()
        # Killed behind its last write, the command finds its work done.
        complete = process.exitcode == 2 and re.search("error: .* already: choose.*\n$", log)
        assert process.exitcode == 0 or complete, log
        assert "Traceback" not in log
        assert not list(folder.rglob(".*")), log
        assert_same(expected, contents(folder), log)

    started = time.perf_counter()
    straight = start(tmp_path / "straight")
    straight.join()
    seconds = time.perf_counter() - started
    expected = contents(tmp_path / "straight")
    check(tmp_path / "straight", straight)

    rng, kills, folder = random.Random(f"{SEED} {name}"), 0, tmp_path / "0"
    wanted = KILLS // len(NAMES) + (NAMES.index(name) < KILLS % len(NAMES))
    while kills < wanted:
        process = start(folder)
        process.join(rng.uniform(0, seconds))
        if process.exitcode is None:
            process.kill()
            process.join()
            kills += 1
        else:
            check(folder, process)
            folder = tmp_path / str(kills)
    process = start(folder)
    process.join()
    check(folder, process)
    print(f"{name}: {seconds:.2f} s, {kills} kills")


def test_interrupted_at_random_moments_it_saves_and_ends_in_order(calls, tmp_path):
    """From the first moment on, while the command imports, loads, compiles, trains and saves."""

    def start(folder):
        folder.mkdir(exist_ok=True)
        command, _, *given = calls["flow on a prepared set"](folder)
        return subprocess.Popen(
            [sys.executable, "-m", command, *map(str, given)],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def check(folder, process, log):
        assert process.returncode == 0, log
        assert not list(folder.rglob(".*")), log
        assert_same(expected, contents(folder), log)

    started = time.perf_counter()
    process = start(tmp_path / "straight")
    _, log = process.communicate()
    seconds = time.perf_counter() - started
    expected = contents(tmp_path / "straight")
    check(tmp_path / "straight", process, log)

    rng, interrupts, folder, ends = random.Random(f"{SEED} interrupts"), 0, tmp_path / "0", []
    while interrupts < INTERRUPTS:
        process = start(folder)
        number = rng.choice([signal.SIGINT, signal.SIGTERM]) if interrupts else signal.SIGINT
        # The first one while the command imports.
        latest = seconds if interrupts else min(0.5, seconds)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(rng.uniform(AWAKE, latest))
        interrupts += process.returncode is None
        if process.returncode is None:
            os.killpg(process.pid, number)  # as a terminal does
        _, log = process.communicate()
        assert "Traceback" not in log and "Exception" not in log, log
        ends.append((process.returncode, stopped := re.search(r"stopped at step (\d+)", log)))
        if stopped:
            assert process.returncode == 128 + number, log
            assert latest_checkpoint(folder / "run").name == f"step_{stopped[1]}"
        elif process.returncode == 0:
            check(folder, process, log)
            folder = tmp_path / str(interrupts)
        else:
            # Nothing to save yet, or all saved.
            assert process.returncode in (-number, 128 + number), log
            assert "finishing the step" not in log
    process = start(folder)
    check(folder, process, process.communicate()[1])
    print(f"{seconds:.2f} s", [(code, s and s[1]) for code, s in ends])
