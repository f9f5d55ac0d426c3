"""Damaged LoRAs in the layouts of several tools: one line, or the numbers that ComfyUI has."""

import json
import math
import random
import re
import warnings

import mlx_snapgen  # noqa: F401

# isort: split
import mlx.core as mx
import numpy as np
import pytest

from mlx_snapgen.errors import UserError
from mlx_snapgen.lora.adapters import adapted_layers, linear_layers, remove_lora
from mlx_snapgen.lora.files import load_lora
from mlx_snapgen.networks.flux2 import Flux2Transformer
from mlx_snapgen.networks.layers import flat_parameters
from tests.tiny import FLUX2

LAYERS = ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.ff.linear_in", "x_embedder")
LAYOUTS = {
    "diffusers": ("transformer.{}", "lora_A", "lora_B"),
    "peft": ("base_model.model.{}", "lora_A", "lora_B"),
    "comfy": ("diffusion_model.{}", "lora_A", "lora_B"),
    "kohya": ("lora_unet_{}", "lora_down", "lora_up"),
}
PREFIXES = ("transformer.", "base_model.model.", "diffusion_model.", "lora_unet_")
COUNT = 60
"""Files of each layout."""


@pytest.fixture(scope="module")
def network():
    return Flux2Transformer(FLUX2)


def good(layout, layers, rng):
    """Tensors by name, as a tool writes them; half of the files have alphas."""
    prefix, down, up = LAYOUTS[layout]
    numbers, tensors = np.random.default_rng(rng.randrange(1 << 30)), {}
    has_alpha = layout == "kohya" or rng.random() < 0.5
    for path in LAYERS:
        rows, columns = layers[path].weight.shape
        name = prefix.format(path.replace(".", "_") if layout == "kohya" else path)
        rank = rng.randrange(1, 5)
        tensors[f"{name}.{down}.weight"] = numbers.normal(size=(rank, columns)).astype(np.float32)
        tensors[f"{name}.{up}.weight"] = numbers.normal(size=(rows, rank)).astype(np.float32)
        if has_alpha:
            tensors[f"{name}.alpha"] = np.float32(rng.choice((1, 2.5, 8, 16)))
    return tensors


def damage(tensors, rng):
    """Change one tensor or name, as a broken disk, another version or a fault of a tool does."""
    keys = list(tensors)
    key = rng.choice(keys)
    value = np.array(tensors[key])
    rows = np.atleast_1d(value)
    stem = re.sub(r"\.(lora_\w+\.weight|alpha)$", "", key)
    alpha = f"{stem}.alpha"

    def spoil(number):
        if value.size:
            value.flat[rng.randrange(value.size)] = number
        tensors[key] = value

    def again():
        old = next(prefix for prefix in PREFIXES if key.startswith(prefix))
        tensors[rng.choice(("", *PREFIXES[:3])) + key.removeprefix(old)] = value

    def of_alphas(number):
        for name in {re.sub(r"\.(lora_\w+\.weight|alpha)$", "", key) for key in keys}:
            tensors[f"{name}.alpha"] = np.float32(number)

    ways = (
        lambda: spoil(rng.choice((np.nan, np.inf, -np.inf))),
        lambda: tensors.update({alpha: np.float32(rng.choice((0, -2, -1e30, np.nan, np.inf)))}),
        lambda: tensors.update({alpha: rng.choice((np.int64(4), np.bool_(True), np.uint8(3)))}),
        lambda: tensors.update({alpha: np.float32(rng.choice(([4], [[4]], [4, 4], [])))}),
        lambda: of_alphas(rng.choice((0, -0.0, 1e7, -3))),
        lambda: tensors.pop(key),
        lambda: tensors.pop(alpha, None),
        lambda: tensors.update({key: value.T}),
        lambda: tensors.update({key: rows[:0]}),
        lambda: tensors.update({key: rows[..., :0]}),
        lambda: tensors.update({key: rows[: len(rows) // 2]}),
        lambda: tensors.update({key: value[..., None, None]}),
        lambda: tensors.update({key: value.reshape(-1)}),
        lambda: tensors.update({key: np.float32(value.sum())}),
        lambda: tensors.update({key: value.astype(rng.choice((np.float16, np.int8, np.bool_)))}),
        lambda: tensors.update({key: value.astype(np.complex64)}),
        lambda: tensors.update({key.replace("transformer_blocks", "layers"): tensors.pop(key)}),
        lambda: tensors.update({key.replace(".0.", ".99."): tensors.pop(key)}),
        lambda: tensors.update({key.replace(".weight", ".default.weight"): value}),
        lambda: tensors.update({f"{stem}.{rng.choice(('dora_scale', 'diff_b', 'w'))}": value}),
        lambda: tensors.update({f"{stem}.lora_mid.weight": value, f"\n{key}": value}),
        again,
        again,
    )
    rng.choice(ways)()


CONFIGS = (
    *({}, {"r": 4}, {"lora_alpha": 8}, {"lora_alpha": 0}, {"lora_alpha": -4}, {"lora_alpha": None}),
    *({"lora_alpha": 1e300}, {"lora_alpha": True}, {"lora_alpha": [8]}, {"use_rslora": True}),
    *({"alpha_pattern": {"to_q": 3}}, {"alpha_pattern": {"gone": 3}}, {"alpha_pattern": [3]}),
    *({"use_dora": True}, {"peft_type": "LOHA"}, {"init_lora_weights": "pissa_niter_4"}, [], "x"),
)


def expected(tensors, config):
    """Path -> alpha / rank * B A of what is stored, without the loader's help."""
    found = {}
    for path in LAYERS:
        ends = (path, path.replace(".", "_"))

        def part(names, ends=ends):
            return next(
                (
                    value
                    for key, value in tensors.items()
                    for end in ends
                    if re.search(
                        rf"(^|[._]){re.escape(end)}\.({names})(\.default)?(\.weight)?$", key
                    )
                ),
                None,
            )

        a, b, alpha = part("lora_A|lora_down"), part("lora_B|lora_up"), part("alpha")
        if a is None:
            continue
        rank = len(a)
        if alpha is None:
            patterns = config.get("alpha_pattern") or {}
            given = config.get("lora_alpha")
            alpha = rank if given is None else given
            alpha = next((n for end, n in patterns.items() if path.endswith(end)), alpha)
            alpha *= math.sqrt(rank) if config.get("use_rslora") else 1
        found[path] = float(np.reshape(alpha, ())) / rank * (b.astype(float) @ a.astype(float))
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_damaged_file_is_one_line_or_what_it_says(network, layout, tmp_path):
    layers, faults, loaded = linear_layers(network), [], 0
    names = list(flat_parameters(network))
    for number in range(COUNT):
        rng = random.Random(f"{layout} {number}")
        tensors, config, header = good(layout, layers, rng), {}, {}
        for _ in range(rng.choice((0, 1, 1, 2))):
            damage(tensors, rng)
        if layout in ("diffusers", "peft") and rng.random() < 0.4:
            config = rng.choice(CONFIGS)
            header = {"lora_adapter_metadata": json.dumps(config)}
        path = tmp_path / f"{number}.safetensors"
        mx.save_safetensors(str(path), {k: mx.array(v) for k, v in tensors.items()}, header)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                load_lora(path, network, name="x")
        except UserError as error:
            wrong = "\n" in str(error) or str(path) not in str(error) or len(str(error)) > 600
        else:
            loaded += 1
            effects = {
                path: np.array(adapter.scale * (adapter.b @ adapter.a))
                for path, layer in adapted_layers(network).items()
                for adapter in [layer.adapters["x"]]
            }
            right = expected(tensors, config)
            wrong = effects.keys() != right.keys() or not any(map(np.any, right.values()))
            wrong = wrong or not all(
                np.allclose(effects[name], right[name], rtol=1e-4, atol=1e-4) for name in right
            )
            remove_lora(network)
        if wrong or list(flat_parameters(network)) != names:
            faults.append(number)
    assert not faults
    assert COUNT // 5 < loaded < COUNT * 4 // 5
