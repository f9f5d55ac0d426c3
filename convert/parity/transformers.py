"""Public teachers' transformers and LoRAs against diffusers, for `convert.parity`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from convert.parity.originals import fill, flux2, library, qwen_image, z_image
from mlx_snapgen.lora.adapters import linear_layers
from mlx_snapgen.lora.files import load_lora
from mlx_snapgen.networks.layers import pack
from mlx_snapgen.public.keys.transformers import read_transformer

Pairs = Iterator[tuple[str, mx.array, Any]]
"""Outputs to compare: name, ours, and the library's, a torch tensor."""

SIZE = (8, 12)
"""Height and width of the latents."""
LENGTHS = (7, 4)
"""Lengths of the two texts."""


def make_qwen_image(folder: Path) -> None:
    fill(qwen_image()).save_pretrained(folder)


def compare_qwen_image(folder: Path) -> Pairs:
    diffusers = library("diffusers")
    theirs = diffusers.QwenImageTransformer2DModel.from_pretrained(folder).float().eval()
    yield "velocity", *_qwen_image_velocities(_ours(folder), theirs)


def make_z_image(folder: Path) -> None:
    fill(z_image()).save_pretrained(folder)


def compare_z_image(folder: Path) -> Pairs:
    """In the original, t is 1 at the picture, and the velocity points to the picture."""
    diffusers, torch = library("diffusers"), library("torch")
    theirs = diffusers.ZImageTransformer2DModel.from_pretrained(folder).float().eval()
    ours = _ours(folder)
    x_t, t, text, mask = _inputs(ours.config)
    captions = [states[:length] for states, length in zip(torch.tensor(text), LENGTHS, strict=True)]
    pictures = [x.permute(2, 0, 1)[:, None] for x in torch.tensor(x_t)]
    with torch.no_grad():
        expected = theirs(pictures, 1 - torch.tensor(t), captions, return_dict=False)[0]
    expected = -torch.stack(expected)[:, :, 0].permute(0, 2, 3, 1)
    yield "velocity", ours(*map(mx.array, (x_t, t, text, mask))), expected


def make_flux2(folder: Path) -> None:
    fill(flux2()).save_pretrained(folder)


def compare_flux2(folder: Path) -> Pairs:
    """All words count in the original, so both get the first text's length."""
    diffusers, torch = library("diffusers"), library("torch")
    theirs = diffusers.Flux2Transformer2DModel.from_pretrained(folder).float().eval()
    ours = _ours(folder)
    x_t, t, text, _ = _inputs(ours.config)
    pipeline = diffusers.Flux2KleinPipeline
    grid = torch.empty(1, 1, SIZE[0] // 2, SIZE[1] // 2)
    packed = torch.tensor(np.array(pack(mx.array(x_t), 2)))
    with torch.no_grad():
        expected = theirs(
            packed,
            torch.tensor(text),
            torch.tensor(t),
            pipeline._prepare_latent_ids(grid),
            pipeline._prepare_text_ids(torch.tensor(text[:1])),
            return_dict=False,
        )[0]
    yield "velocity", pack(ours(*map(mx.array, (x_t, t, text))), 2), expected


LORA = "lora.safetensors"


def make_lora(folder: Path) -> None:
    """Write a Qwen-Image transformer and a LoRA of it, with the keys of Qwen-Image-Lightning."""
    make_qwen_image(folder)
    rng = np.random.default_rng(0)
    tensors = {}
    layers: dict[str, Any] = dict(linear_layers(read_transformer(folder)))
    for path, layer in layers.items():
        if path.startswith("transformer_blocks.") and "_mod." not in path:
            rows, columns = layer.weight.shape
            down, up = rng.normal(size=(3, columns)), rng.normal(size=(rows, 3)) / columns
            tensors[f"{path}.lora_down.weight"] = mx.array(down.astype(np.float32))
            tensors[f"{path}.lora_up.weight"] = mx.array(up.astype(np.float32))
            tensors[f"{path}.alpha"] = mx.array(6.0)
    mx.save_safetensors(str(folder / LORA), tensors)


def compare_lora(folder: Path) -> Pairs:
    """Compares the change that the LoRA makes, so that a LoRA without effect is detected."""
    diffusers = library("diffusers")
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


def _inputs(config: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Latents, t, text (zero at the padding), and the mask of the text."""
    rng = np.random.default_rng(0)
    mask = np.arange(max(LENGTHS))[None] < np.array(LENGTHS)[:, None]
    x_t = rng.normal(size=(2, *SIZE, config.latent_channels)).astype(np.float32)
    text = rng.normal(size=(2, max(LENGTHS), config.text_dims)).astype(np.float32)
    return x_t, np.array([0.2, 0.9], np.float32), text * mask[..., None], mask


def _qwen_image_velocities(ours: Any, theirs: Any) -> tuple[mx.array, Any]:
    """The velocities of patches: ours, and the library's."""
    torch = library("torch")
    x_t, t, text, mask = _inputs(ours.config)
    patch = ours.config.patch_size
    grid = [[(1, SIZE[0] // patch, SIZE[1] // patch)]] * len(x_t)
    packed = torch.tensor(np.array(pack(mx.array(x_t), patch)))
    with torch.no_grad():
        given = (torch.tensor(text), torch.tensor(mask), torch.tensor(t))
        expected = theirs(packed, *given, grid, return_dict=False)[0]
    return pack(ours(*map(mx.array, (x_t, t, text, mask))), patch), expected
