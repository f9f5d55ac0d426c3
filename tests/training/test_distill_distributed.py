"""Distillation on prepared data over two processes equals one process with twice the batch."""

import dataclasses
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import train.loop.trainer
from mlx_snapgen.checkpoint.model import save_pretrained
from mlx_snapgen.config import SamplerConfig
from tests.tiny import STUDENT, make_components, randomize
from tests.training.test_distributed import finish, start
from tests.training.test_prepare import arguments, run, write_pictures
from train import kd, kdmd
from train.loop.checkpoint import latest_checkpoint

COMMON = ("--steps", 2, "--batch-size", 2, "--resolution", 64, "--validation-prompts", "a cat")
COMMANDS = {
    "kd": (kd, ("--guidance", 2, "--optimizer", "adamw", "--teacher", "{}/teacher")),
    "kdmd": (kdmd, ("--rank", 2, "--student-every", 2, "--few-steps", 2, "--output", "{}/few")),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model and its teacher, and pictures prepared with it."""
    made = tmp_path_factory.mktemp("distributed")
    config = dataclasses.replace(STUDENT, sampler=SamplerConfig(num_inference_steps=1))
    components = make_components(config)
    save_pretrained(made / "student", components)
    randomize(components.transformer, 50)
    save_pretrained(made / "teacher", components)
    pictures = write_pictures(made / "pictures", 14)
    with pytest.MonkeyPatch.context() as patch:
        run(patch, *arguments(pictures, made / "data", made / "student"))
    return made


def worker(folder, name, run_dir, accumulate):
    """The command, in this process."""
    train.loop.trainer.plot_log = lambda run_dir: None
    command, own = COMMANDS[name]
    folder, run_dir = Path(folder), Path(run_dir)
    given = ["--model", folder / "student", "--data", folder / "data", "--run-dir", run_dir]
    given += [*COMMON, *own, "--accumulate", accumulate]
    texts = [str(option).replace("{}/few", f"{run_dir}.safetensors") for option in given]
    sys.argv = ["command", *(text.replace("{}", str(folder)) for text in texts)]
    mx.disable_compile()
    try:
        command.main()
    finally:
        mx.enable_compile()


@pytest.mark.parametrize("name", COMMANDS)
def test_two_processes_distill_as_one(folder, tmp_path, monkeypatch, name):
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(train.loop.trainer, "plot_log", train.loop.trainer.plot_log)
    worker(folder, name, tmp_path / "alone", 2)
    together = str(tmp_path / "together")
    lines = []
    for process in start(tmp_path, str(folder), name, together, 1, module=__name__):
        _, err = finish(process)
        assert process.returncode == 0, err
        lines += err.splitlines()
    assert lines.count("no validation loss: the data keeps no pictures for it") == (name == "kd")
    runs = [latest_checkpoint(tmp_path / run) for run in ("alone", "together")]
    alone, both = (mx.load(str(run / "optimizer.safetensors")) for run in runs)
    assert alone.keys() == both.keys()
    # Adam's averages of the gradients. Where those are rounding errors, its steps are random.
    for key, value in alone.items():
        if key.endswith((".m", ".step")):
            scale = max(float(mx.abs(value).max()), 1e-3)
            np.testing.assert_allclose(
                np.array(both[key]), np.array(value), atol=1e-4 * scale, err_msg=key
            )
    alone, both = (mx.load(str(run / "model.safetensors")) for run in runs)
    for key, value in alone.items():
        assert float(mx.abs(both[key] - value).mean()) < 1e-5, key
