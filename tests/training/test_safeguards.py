"""Safeguards whose absence no loss curve shows: the gradient clip, the flush to the disk."""

import os
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from train.loop.checkpoint import save_checkpoint
from train.loop.config import TrainingConfig
from train.loop.optimizer import Optimizers, Role
from train.loop.run import BLOCK, BLOCKS, digest_files


class Weights(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = mx.zeros((4,))


def trained(gradients, largest):
    """Weights after a step with each of the gradients, and the norms before the clip."""
    model = Weights()
    config = TrainingConfig(steps=9, learning_rate=0.1, max_grad_norm=largest, warmup_steps=0)
    optimizers = Optimizers(config, [Role("all")])
    optimizers.init(model.trainable_parameters())
    norms = []
    for step, gradient in enumerate(gradients):
        found = optimizers.update(model, {"weight": mx.array(gradient)}, step=mx.array(step))
        norms.append(found["grad_norm"].item())
    return np.array(model.weight), norms


def test_a_large_gradient_is_clipped():
    """Adam divides by the size of earlier gradients, so one outlier is felt in later steps only."""
    usual, outlier = np.array([0.3, -0.2, 0.1, 0.1]), np.array([300.0, 500.0, -100.0, 200.0])
    size = np.linalg.norm(outlier)
    found, norms = trained([usual, outlier, usual], 1.0)
    by_hand, _ = trained([usual, outlier / size, usual], 1e9)
    np.testing.assert_allclose(found, by_hand, rtol=1e-4)
    assert norms[1] == pytest.approx(size, rel=1e-5)
    unclipped, _ = trained([usual, outlier, usual], 1e9)
    assert np.abs(unclipped - by_hand).max() > 0.01


def test_a_checkpoint_is_flushed_before_it_has_its_name(tmp_path, monkeypatch):
    """Without it, a power cut can leave files of the right name and length full of zeros."""
    flushed, renamed = [], []
    fsync, rename = os.fsync, Path.rename

    def flush(fd):
        flushed.append(os.fstat(fd).st_ino)
        return fsync(fd)

    def move(path, target):
        renamed.append((Path(target).name, list(flushed)))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(Path, "rename", move)
    tree = {"weight": mx.ones((2,))}
    trees = {name: tree for name in ("model", "ema", "optimizer")}
    folder = save_checkpoint(tmp_path, trees, state={"step": 1}, keep=1)
    files = {path.stat().st_ino for path in (*folder.iterdir(), folder)}
    assert len(files) == 5
    ((name, before),) = renamed
    assert name == "step_1" and files <= set(before)
    assert tmp_path.stat().st_ino in flushed[len(before) :]


def test_files_of_other_weights_have_another_digest(tmp_path):
    """Also large ones, of which only parts are read; folders may move."""
    weights = np.random.default_rng(0).integers(256, size=5 << 20, dtype=np.uint8)
    for name in ("one", "other"):
        (tmp_path / name / "text_encoder").mkdir(parents=True)
        (tmp_path / name / "model.safetensors").write_bytes(weights.tobytes())
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "text_encoder" / "config.json").write_text("{}")
        (tmp_path / name / "README.md").write_text(name)
    one, other = tmp_path / "one", tmp_path / "other"
    found = {digest_files(one)}
    assert found == {digest_files(other)}
    for change in (
        lambda: (other / "model.safetensors").write_bytes((weights + 1).tobytes()),
        lambda: (other / "model.safetensors").write_bytes(weights[:-1].tobytes()),
        lambda: (other / "text_encoder" / "config.json").write_text("[]"),
        lambda: (other / "config.json").rename(other / "other.json"),
        lambda: (other / "other.json").unlink(),
    ):
        change()
        found.add(digest_files(other))
    assert len(found) == 6


@pytest.mark.parametrize("size", [1, BLOCK, BLOCK + 1, BLOCK * BLOCKS, BLOCK * BLOCKS + 7])
def test_the_ends_of_a_file_are_in_its_digest(tmp_path, size):
    path = tmp_path / "model.safetensors"
    found = set()
    for place in (None, 0, -1):
        data = bytearray(size)
        if place is not None:
            data[place] = 1 if place else 2
        path.write_bytes(data)
        found.add(digest_files(tmp_path))
    assert len(found) == 3
