"""The memory of a model of this project, estimated before it is loaded."""

import json

import pytest

import mlx_snapgen  # noqa: F401

# isort: split
import mlx.core as mx

from mlx_snapgen import settings
from mlx_snapgen.checkpoint import memory
from mlx_snapgen.checkpoint.config import ModelFolder
from mlx_snapgen.checkpoint.model import load_pretrained, save_pretrained
from mlx_snapgen.errors import UserError
from mlx_snapgen.networks.layers import flat_parameters
from mlx_snapgen.pipeline import SnapGenPipeline
from mlx_snapgen.settings import ModelChoice


def test_the_transformer_is_estimated_from_headers(model_folder):
    folder = ModelFolder.open(model_folder)
    found = memory.transformer_bytes(folder, ModelChoice())
    loaded = load_pretrained(model_folder).transformer
    exact = sum(value.nbytes for value in flat_parameters(loaded).values())
    assert found == exact
    small = SnapGenPipeline.from_pretrained(model_folder, model_width="tiny").transformer
    exact = sum(value.nbytes for value in flat_parameters(small).values())
    tiny = ModelChoice(model_width="tiny")
    assert 0.4 * exact < memory.transformer_bytes(folder, tiny) < 1.2 * exact
    packed = memory.transformer_bytes(folder, ModelChoice(quantize=4))
    assert packed == int(found / 4 * (0.5 + 0.25))
    merged = ModelChoice(loras=(("a.safetensors", 1.0),), model_width="tiny", quantize=4)
    assert memory.transformer_bytes(folder, merged) == found


@pytest.mark.parametrize("quantization", [None, {}])
def test_packed_weights_of_unknown_bits_are_said(components, tmp_path, quantization):
    folder = tmp_path / "packed"
    how = {"bits": 8, "group_size": 32}
    save_pretrained(folder, components, quantize={"transformer": how})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization": quantization}))
    with pytest.raises(UserError, match="does not fit"):
        SnapGenPipeline.from_pretrained(folder)


@pytest.mark.parametrize(
    ("has_cuda", "device", "info", "expected"),
    [
        (True, mx.gpu, {"total_memory": 10, "free_memory": 1}, (10, "this GPU has")),
        (True, mx.gpu, {"total_memory": 10**15}, (None, "this machine has")),  # weights pass it
        (True, mx.gpu, {}, (None, "this machine has")),
        (True, mx.cpu, {"total_memory": 10}, (None, "this machine has")),
        (False, mx.gpu, {"memory_size": 10**9}, (None, "this machine has")),  # Metal: shared
    ],
)
def test_memory_is_that_of_the_gpu_if_it_has_its_own(
    has_cuda, device, info, expected, model_folder, monkeypatch
):
    least, text = expected
    whole = settings.machine_memory()
    monkeypatch.setattr(mx.cuda, "is_available", lambda: has_cuda)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(device))
    monkeypatch.setattr(mx, "device_info", lambda: info)
    assert settings.machine_memory() == (least or whole)
    assert settings.has_memory() == text
    if least:
        folder = ModelFolder.open(model_folder)
        with pytest.raises(UserError, match=r"GiB of memory, and this GPU has 0\.0: choose"):
            memory.check_memory(folder, ModelChoice())


def test_what_does_not_fit_is_one_line_before_it_is_loaded(model_folder, monkeypatch):
    pipe = SnapGenPipeline.from_pretrained(model_folder)
    folder = ModelFolder.open(model_folder)
    whole = memory.transformer_bytes(folder, ModelChoice())
    monkeypatch.setattr(memory, "BASE_BYTES", 0)
    needed = memory.needed_bytes(whole, 32, 64, guided=True)
    monkeypatch.setattr(memory, "machine_memory", lambda: needed - 1)
    with pytest.raises(UserError, match=r"at 64 x 32 needs about .* GiB") as error:
        pipe.generate("a red apple", height=32, width=64)
    assert "choose --model-width small or --quantize 4" in str(error.value)
    monkeypatch.setattr(memory, "machine_memory", lambda: needed)
    pipe.generate("a red apple", height=32, width=64)
    with pytest.raises(UserError, match=r"choose 64 x 32 pixels$"):
        pipe.generate("a red apple", height=64, width=96)
    monkeypatch.setattr(memory, "machine_memory", lambda: whole - 1)
    monkeypatch.setattr("mlx_snapgen.pipeline.load_pretrained", None)
    with pytest.raises(UserError, match=r"^\S+ needs about .*: choose --model-width small or"):
        SnapGenPipeline.from_pretrained(model_folder)
    monkeypatch.setattr(memory, "machine_memory", lambda: 10)
    with pytest.raises(UserError, match=r": choose a smaller model$"):
        SnapGenPipeline.from_pretrained(model_folder)
