"""Public teachers' transformers and LoRAs against diffusers, for `convert.parity`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from convert.public.keys.transformers import read_transformer
from mlx_snapgen.lora.adapters import linear_layers
from mlx_snapgen.lora.files import load_lora
from mlx_snapgen.networks.qwen_image import pack

Pairs = Iterator[tuple[str, mx.array, Any]]
"""What is compared: its name, ours, and the library's as a torch tensor."""

SIZE = (8, 12)
"""Height and width of the latents."""
LENGTHS = (7, 4)
"""Of the two texts."""


def make_qwen_image(folder: Path) -> None:
    import diffusers

    network = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 6, 6),
    )
    _filled(network).save_pretrained(folder)


def compare_qwen_image(folder: Path) -> Pairs:
    import diffusers

    theirs = diffusers.QwenImageTransformer2DModel.from_pretrained(folder).float().eval()
    yield "velocity", *_qwen_image_velocities(_ours(folder), theirs)


def make_z_image(folder: Path) -> None:
    import diffusers

    network = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=24,
        axes_dims=[4, 6, 6],
        axes_lens=[128, 64, 64],
    )
    _filled(network).save_pretrained(folder)


def compare_z_image(folder: Path) -> Pairs:
    """Z-Image counts t from the picture, and its velocity leads to the picture."""
    import diffusers
    import torch

    theirs = diffusers.ZImageTransformer2DModel.from_pretrained(folder).float().eval()
    ours = _ours(folder)
    x_t, t, text, mask = _inputs(ours.config)
    captions = [states[:length] for states, length in zip(torch.tensor(text), LENGTHS, strict=True)]
    pictures = [x.permute(2, 0, 1)[:, None] for x in torch.tensor(x_t)]
    with torch.no_grad():
        expected = theirs(pictures, 1 - torch.tensor(t), captions, return_dict=False)[0]
    expected = -torch.stack(expected)[:, :, 0].permute(0, 2, 3, 1)
    yield "velocity", ours(*map(mx.array, (x_t, t, text, mask))), expected


LORA = "lora.safetensors"


def make_lora(folder: Path) -> None:
    """A Qwen-Image transformer and a LoRA of it, as Qwen-Image-Lightning has its keys."""
    make_qwen_image(folder)
    rng = np.random.default_rng(0)
    tensors = {}
    for path, layer in linear_layers(read_transformer(folder)).items():
        if path.startswith("transformer_blocks.") and "_mod." not in path:
            rows, columns = layer.weight.shape
            down, up = rng.normal(size=(3, columns)), rng.normal(size=(rows, 3)) / columns
            tensors[f"{path}.lora_down.weight"] = mx.array(down.astype(np.float32))
            tensors[f"{path}.lora_up.weight"] = mx.array(up.astype(np.float32))
            tensors[f"{path}.alpha"] = mx.array(6.0)
    mx.save_safetensors(str(folder / LORA), tensors)


def compare_lora(folder: Path) -> Pairs:
    """How far the LoRA moves the velocity, so that one without effect is seen."""
    import diffusers

    theirs = diffusers.QwenImageTransformer2DModel.from_pretrained(folder).float().eval()
    ours = _ours(folder)
    plain = _qwen_image_velocities(ours, theirs)
    loader = diffusers.loaders.QwenImageLoraLoaderMixin
    state = loader.lora_state_dict(str(folder), weight_name=LORA)
    theirs.load_lora_adapter(state, prefix="transformer")
    load_lora(folder / LORA, ours)
    moved = _qwen_image_velocities(ours, theirs)
    yield "change", moved[0] - plain[0], moved[1] - plain[1]


def _ours(folder: Path) -> Any:
    network = read_transformer(folder)
    network.set_dtype(mx.float32)
    return network


def _filled(network: Any) -> Any:
    """Random weights everywhere, of the size of trained ones: much of a new network is zero."""
    import torch

    torch.manual_seed(0)
    network.eval().requires_grad_(False)
    for name, p in network.named_parameters():
        if p.ndim == 1:
            p.normal_("norm" in name and name.endswith("weight"), 0.1)
        else:
            p.normal_(0, p.shape[1] ** -0.5)
    return network


def _inputs(config: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Latents, t, text, zero where it is padded, and the text's mask."""
    rng = np.random.default_rng(0)
    mask = np.arange(max(LENGTHS))[None] < np.array(LENGTHS)[:, None]
    x_t = rng.normal(size=(2, *SIZE, config.latent_channels)).astype(np.float32)
    text = rng.normal(size=(2, max(LENGTHS), config.text_dims)).astype(np.float32)
    return x_t, np.array([0.2, 0.9], np.float32), text * mask[..., None], mask


def _qwen_image_velocities(ours: Any, theirs: Any) -> tuple[mx.array, Any]:
    """Of patches: ours, and the library's."""
    import torch

    x_t, t, text, mask = _inputs(ours.config)
    patch = ours.config.patch_size
    grid = [[(1, SIZE[0] // patch, SIZE[1] // patch)]] * len(x_t)
    packed = torch.tensor(np.array(pack(mx.array(x_t), patch)))
    with torch.no_grad():
        given = (torch.tensor(text), torch.tensor(mask), torch.tensor(t))
        expected = theirs(packed, *given, grid, return_dict=False)[0]
    return pack(ours(*map(mx.array, (x_t, t, text, mask))), patch), expected
