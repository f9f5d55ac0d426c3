"""Commands killed at random moments: the same command resumes, and ends as if never killed.

`KILLS=500 SEED=7 python -m pytest tests/training/test_kills.py` kills more often, at other moments.
Ctrl-C and SIGTERM come in between.
"""

import contextlib
import functools
import importlib
import itertools
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
from tests.training.test_distributed import write_hosts
from tests.training.test_prepare import write_pictures
from train.evaluation.estimate import Estimate
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
COMMANDS = [
    *("train.autoencoder", "train.export", "train.flow", "train.kd", "train.kdmd", "train.lora"),
    *("train.palettes", "train.prepare"),
]
EVERY = 4
"""Steps between checkpoints."""
STEPS = 2 * EVERY
TRAINING = [
    *("--steps", STEPS, "--batch-size", 2, "--model-widths", "full", "small"),
    *("--checkpoint-every", EVERY, "--validation-prompts", "a cat", "--resolution", 64),
]
FLOW = [*TRAINING, "--optimizer", "adamw", "--validation-pictures", 2, "--held-out", 0.2]
KDMD = [*TRAINING, "--rank", 2, "--student-every", 2, "--few-steps", 2]
TUNING = ["--steps", STEPS, "--batch-size", 2, "--checkpoint-every", EVERY]
LORA = [*TUNING, "--rank", 2, "--prior-pictures", 2, "--validation-prompts", "a cat"]
STARTED = "the command starts"
"""In the log: a signal that comes before finds Python's own handlers."""


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
    values["image_size"] = [64, 64]
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
    call, _, plots = call.partition(" ")
    if not plots:
        train.loop.trainer.plot_log = lambda run_dir: None  # slow
    if not call.startswith("train."):
        run_command(functools.partial(globals()[call], folder, *given))
    command = importlib.import_module(call)
    for name in (call, "train.options.common", "train.options.supernetwork", "train.options.kdmd"):
        module = importlib.import_module(name)
        if hasattr(module, "TrainingConfig"):
            every = {"checkpoint_every": EVERY} if name == "train.autoencoder" else {}
            module.TrainingConfig = functools.partial(TrainingConfig, log_every=3, **every)
    if call == "train.prepare":
        command.MOST_IN_SHARD, command.MOST_DRAWN_BATCHES = 12, 1
    if call == "train.lora":
        command.estimate = lambda *_, **__: Estimate(0.5, 2.0, 10**9)
    if call == "train.palettes":
        command.HELD_OUT = importlib.import_module("train.options.palettes").HELD_OUT = 2
    sys.argv = [call, *map(str, given)]
    print(STARTED, flush=True)
    run_command(command.main)


def run_rank(rank, hosts, *arguments):
    """`run` as one of two processes; it starts when they have found each other."""
    os.environ |= {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)}
    mx.distributed.init()
    run(*arguments)


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

    def flow(data, folder, plots=""):
        given = ["--model", model, "--run-dir", folder / "run", "--data", data, *FLOW]
        return f"train.flow{plots}", folder, *given

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

    def kd(folder):
        given = ["--model", model, "--run-dir", folder / "run", "--data", prepared, *FLOW]
        return "train.kd", folder, *given, "--teacher", model

    def lora(folder):
        given = ["--data", few, "--model", model, "--run-dir", folder / "run", *LORA]
        return (
            "train.lora",
            folder,
            *given,
            "--prior-prompts",
            prompts,
            "-o",
            folder / "x.safetensors",
        )

    def palettes(folder):
        given = ["--model", model, "--run-dir", folder / "run", "--pictures", 4, *TUNING]
        return "train.palettes", folder, *given, "--prompts-file", prompts, "-o", folder / "model"

    def draw(folder):
        given = ["--draw-with", model, "--prompts-file", prompts, "--per-prompt", 3, "--steps", 2]
        return "train.prepare", folder, *given, "--batch-size", 2, "-o", folder / "set", *SIZE

    def export(folder):
        return "train.export", folder, "--run", base / "run", "--output", folder / "model"

    made(*prepare(base))
    prepared, prompts = base / "set", base / "prompts.txt"
    prompts.write_text("a cat\na red car\na blue apple\na green cat\n")
    few = write_pictures(base / "few", 6)
    made(*flow(prepared, base))
    return {
        "prepare": prepare,
        "prepare, drawn": draw,
        "flow on pictures": functools.partial(flow, pictures, plots=" with plots"),
        "flow on a prepared set": functools.partial(flow, prepared),
        "kd": kd,
        "kdmd": kdmd,
        "lora": lora,
        "palettes": palettes,
        "autoencoder": autoencoder,
        "export": export,
        "file of a LoRA": lambda folder: ("write_lora", folder, model),
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
    *("prepare", "prepare, drawn", "flow on pictures", "flow on a prepared set", "kd", "kdmd"),
    *("lora", "palettes", "autoencoder", "export", "file of a LoRA"),
]
TOGETHER = "two processes"


def wanted(name):
    """Kills of a command, its part of `KILLS`."""
    names = [*NAMES, TOGETHER]
    return KILLS // len(names) + (names.index(name) < KILLS % len(names))


def log_of(folder):
    path = Path(f"{folder}.log")
    return path.read_text() if path.exists() else ""


def check_complete(expected, folder, process):
    log = log_of(folder)
    # Killed behind its last write, the command finds its work done.
    complete = process.exitcode == 2 and re.search("error: .* already: choose.*\n$", log)
    assert process.exitcode == 0 or complete, log
    assert "Traceback" not in log
    assert not list(folder.rglob(".*")), log
    assert_same(expected, contents(folder), log)


def check_interrupted(folder, log, *, code, number):
    """The end of a command after Ctrl-C or SIGTERM; returns its exit code and the step saved."""
    assert "Traceback" not in log and "Exception" not in log, log
    stopped = re.search(r"stopped at step (\d+)", log)
    if stopped:
        assert code == 128 + number, log
        assert latest_checkpoint(folder / "run").name == f"step_{stopped[1]}"
    elif code not in (0, 2):
        # Nothing to save yet, or all saved.
        assert code in (-number, 128 + number), log
        assert "finishing the step" not in log
    return code, stopped and stopped[1]


@pytest.mark.parametrize("name", NAMES)
def test_killed_at_random_moments_it_ends_as_if_never_killed(name, calls, processes, tmp_path):
    folders = (tmp_path / str(k) for k in itertools.count())
    is_command = calls[name](tmp_path)[0].startswith("train.")
    signals = [signal.SIGKILL, signal.SIGKILL, signal.SIGINT, signal.SIGTERM]

    def start(folder):
        folder.mkdir(exist_ok=True)
        before = log_of(folder)
        process = processes.Process(target=run, args=calls[name](folder), daemon=True)
        process.start()
        while is_command and process.is_alive() and STARTED not in log_of(folder)[len(before) :]:
            time.sleep(0.005)
        return process, before

    started = time.perf_counter()
    process, _ = start(tmp_path / "straight")
    process.join()
    seconds = time.perf_counter() - started
    expected = contents(tmp_path / "straight")
    check_complete(expected, tmp_path / "straight", process)

    rng, kills, ends, folder = random.Random(f"{SEED} {name}"), 0, [], next(folders)
    while kills < wanted(name):
        process, before = start(folder)
        number, begun = rng.choice(signals) if is_command else signal.SIGKILL, time.perf_counter()
        process.join(rng.uniform(0, seconds))
        is_hit = process.exitcode is None
        try:
            if is_hit:
                os.kill(process.pid, number)
        except ProcessLookupError:  # it has just ended
            is_hit = False
        process.join()
        kills += is_hit and number == signal.SIGKILL
        if is_hit and number != signal.SIGKILL:
            log = log_of(folder)[len(before) :]
            ends.append(check_interrupted(folder, log, code=process.exitcode, number=number))
        if not is_hit:
            # The machine may be less busy by now.
            seconds = min(seconds, time.perf_counter() - begun)
        if not is_hit or process.exitcode in (0, 2):
            check_complete(expected, folder, process)
            folder = next(folders)
    process, _ = start(folder)
    process.join()
    check_complete(expected, folder, process)
    print(f"{name}: {seconds:.2f} s, {kills} kills, {ends}")


def test_of_two_processes_one_is_killed_and_the_other_ends_in_order(calls, processes, tmp_path):
    folders = (tmp_path / str(k) for k in itertools.count())

    def start(folder):
        folder.mkdir(exist_ok=True)
        command, _, *given = calls["flow on a prepared set"](folder)
        hosts, logs = write_hosts(tmp_path), [Path(f"{folder}-{rank}") for rank in range(2)]
        before = [log_of(log) for log in logs]
        both = [
            processes.Process(
                target=run_rank, args=(rank, hosts, command, log, *given), daemon=True
            )
            for rank, log in enumerate(logs)
        ]
        for process in both:
            process.start()
        for process, log, text in zip(both, logs, before, strict=True):
            while process.is_alive() and STARTED not in log_of(log)[len(text) :]:
                time.sleep(0.005)
        return both, lambda rank: log_of(logs[rank])[len(before[rank]) :]

    def check(folder, both, log):
        for rank, process in enumerate(both):
            process.join()
            assert process.exitcode == 0, log(rank)
            assert "Traceback" not in log(rank)
        assert not list(folder.rglob(".*"))
        assert_same(expected, contents(folder), log(0))

    started = time.perf_counter()
    both, log = start(tmp_path / "straight")
    for process in both:
        process.join()
    seconds = time.perf_counter() - started
    expected = contents(tmp_path / "straight")
    check(tmp_path / "straight", both, log)

    rng, kills, lost, folder = random.Random(f"{SEED} {TOGETHER}"), 0, [], next(folders)
    while kills < wanted(TOGETHER):
        both, log = start(folder)
        rank, begun = rng.randrange(2), time.perf_counter()
        both[0].join(rng.uniform(0, seconds))
        if all(process.exitcode is None for process in both):
            both[rank].kill()
            kills += 1
            for process in both:
                process.join(300)  # on a busy machine the other one may load its model for long
            other = both[1 - rank]
            assert other.exitcode in (0, 1), f"{other.exitcode} {log(1 - rank)}"
            assert "Traceback" not in log(1 - rank), log(1 - rank)
            gone = f"process {rank} of 2 is gone, training ends at step "
            assert other.exitcode == 0 or gone in log(1 - rank), log(1 - rank)
            lost.append((rank, other.exitcode))
        else:
            seconds = min(seconds, time.perf_counter() - begun)
            check(folder, both, log)
            folder = next(folders)
    both, log = start(folder)
    check(folder, both, log)
    print(f"{TOGETHER}: {seconds:.2f} s, {kills} kills, {lost}")


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
        latest, begun = seconds if interrupts else min(0.5, seconds), time.perf_counter()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(rng.uniform(AWAKE, latest))
        interrupts += process.returncode is None
        if process.returncode is None:
            os.killpg(process.pid, number)  # as a terminal does
        else:
            seconds = min(seconds, time.perf_counter() - begun)
        _, log = process.communicate()
        if "init_import_site" in log:
            continue  # on a busy machine Python starts for longer than `AWAKE`
        ends.append(check_interrupted(folder, log, code=process.returncode, number=number))
        if process.returncode == 0:
            check(folder, process, log)
            folder = tmp_path / str(interrupts)
    process = start(folder)
    check(folder, process, process.communicate()[1])
    print(f"{seconds:.2f} s", ends)
