"""A LoRA of MiniT2I, which draws squares of pixels."""

import functools

import numpy as np
import pytest
from PIL import Image

import train.lora
from convert.parity.minit2i import make_whole_minit2i
from mlx_snapgen.pipeline import SnapGenPipeline
from tests.tiny import require
from train.loop.checkpoint import read_log

require("torch", "transformers")


@pytest.mark.usefixtures("quick")
def test_a_lora_is_trained(run, tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_SNAPGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    public = tmp_path / "MiniT2I"
    public.mkdir()
    make_whole_minit2i(public)
    data = tmp_path / "robot"
    data.mkdir()
    for k, size in enumerate(((90, 64), (64, 64))):
        Image.new("RGB", size, ("red", "blue")[k]).save(data / f"{k}.png")
        (data / f"{k}.txt").write_text(f"a robot {k}")
    short = "--steps 2 --rank 2 --checkpoint-every 2 --resolution 64 --batch-size 2 --quantize none"
    run(train.lora, "--data", data, "--model", public, *short.split())
    *_, last = read_log(tmp_path / "runs" / "robot")
    assert last["validation_loss"] > 0
    pipe = functools.partial(SnapGenPipeline.from_pretrained, public, quantize=0)
    steps = {"num_inference_steps": 2, "seed": 3}
    [plain], [tuned] = (
        pipe(loras=loras)("a robot", **steps) for loras in ((), (("robot.safetensors", 1.0),))
    )
    assert not np.array_equal(np.array(plain), np.array(tuned))
