"""Drawings against diffusers' pipelines, from files to pictures, for `convert.parity`."""

import contextlib
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np
from PIL import Image

from convert.parity.originals import (
    flux2_klein_pipeline,
    library,
    qwen_image_pipeline,
    z_image_pipeline,
)
from convert.parity.transformers import Pairs
from mlx_snapgen.lora.adapters import linear_layers
from mlx_snapgen.networks.layers import pack
from mlx_snapgen.pipeline import SnapGenPipeline
from mlx_snapgen.pipeline_base import PictureWarning, Pipeline
from mlx_snapgen.public.keys.transformers import read_transformer
from mlx_snapgen.public.teachers import convert_teacher
from mlx_snapgen.public_pipeline import PublicPipeline
from mlx_snapgen.sampling import get_noise
from mlx_snapgen.settings import DrawSettings

PROMPT = "two cats: \u00e4, on a table that is green"
SIZE = (48, 80)
"""Height and width in pixels of the drawing and the picture that it starts from."""
REFERENCES = ((90, 75), (64, 130))
"""Of the pictures to edit; they are cut to 80x64 and 64x128."""
SEED = 5
SETTINGS = DrawSettings(PROMPT, height=SIZE[0], width=SIZE[1], seed=SEED, num_inference_steps=4)


def make_z_images(folder: Path) -> None:
    """Z-Image-Turbo and Z-Image, and pictures."""
    make(folder, turbo=z_image_pipeline(), base=z_image_pipeline(shift=6.0))


def make_whole_qwen_image(folder: Path) -> None:
    """Qwen-Image, and pictures."""
    make(folder, base=qwen_image_pipeline())


def make_kleins(folder: Path) -> None:
    """klein and klein base, and pictures."""
    pipelines = [flux2_klein_pipeline(is_distilled=is_distilled) for is_distilled in (True, False)]
    make(folder, turbo=pipelines[0], base=pipelines[1])


def make(folder: Path, **pipelines: Any) -> None:
    """Pipelines by name, pictures to start from (0.png) and to edit (1.png, 2.png), and a mask."""
    rng = np.random.default_rng(0)
    for name, pipeline in pipelines.items():
        pipeline.save_pretrained(folder / name)
    for k, size in enumerate((SIZE, *REFERENCES)):
        pixels = rng.integers(0, 256, (*size, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{k}.png")
    # Its edges are those of patches of latents. Of a patch that is cut, the pipelines look at some
    # pixels only, while here a cell of latents is redrawn for any of its pixels.
    mask = np.zeros(SIZE, np.uint8)
    mask[16:, 32:64] = 255
    Image.fromarray(mask).save(folder / "mask.png")


def compare_z_image_prompt(folder: Path) -> Pairs:
    return _compare_prompt(folder, "ZImagePipeline")


def compare_qwen_prompt(folder: Path) -> Pairs:
    return _compare_prompt(folder, "QwenImagePipeline")


def compare_z_image_img2img(folder: Path) -> Pairs:
    return _compare(folder, "ZImageImg2ImgPipeline", masked=False)


def compare_z_image_inpaint(folder: Path) -> Pairs:
    return _compare(folder, "ZImageInpaintPipeline", masked=True)


def compare_qwen_img2img(folder: Path) -> Pairs:
    return _compare(folder, "QwenImageImg2ImgPipeline", masked=False)


def compare_qwen_inpaint(folder: Path) -> Pairs:
    return _compare(folder, "QwenImageInpaintPipeline", masked=True)


def compare_klein_prompt(folder: Path) -> Pairs:
    """Also the states of the text encoder."""
    ours, theirs = _pipelines(folder, "base", "Flux2KleinPipeline")
    assert isinstance(ours, PublicPipeline)
    with library("torch").no_grad():
        states, _ = theirs.encode_prompt([PROMPT, ""])
    yield "prompts", ours.teacher.encode([PROMPT, ""]).text, states
    yield from _compare_prompt(folder, "Flux2KleinPipeline")


def compare_klein_inpaint(folder: Path) -> Pairs:
    """Also with a second picture that the network sees."""
    name = "Flux2KleinInpaintPipeline"
    yield from _compare(folder, name, masked=True)
    reference = str(folder / "1.png")
    settings = _settings(folder, masked=True, num_inference_steps=2, strength=0.9)
    ours, theirs = _pipelines(folder, "turbo", name)
    yield "edited", *drawn(ours, theirs, settings, edit=(reference,))


def compare_klein_edit(folder: Path) -> Pairs:
    for name, count, scale in (("turbo", 1, 1.0), ("base", 2, 4.0)):
        ours, theirs = _pipelines(folder, name, "Flux2KleinPipeline")
        edit = tuple(str(folder / f"{k + 1}.png") for k in range(count))
        settings = {"num_inference_steps": 3, "edit": edit, "guidance_scale": scale}
        yield f"{count} edited", *drawn(ours, theirs, SETTINGS, **settings)


def _compare_prompt(folder: Path, name: str) -> Pairs:
    """Without and with guidance, and with a LoRA."""
    few = _few_steps(folder)
    for what, model, scale in (("4 steps", few, 1.0), ("guided", "base", 3.5)):
        ours, theirs = _pipelines(folder, model, name)
        yield what, *drawn(ours, theirs, SETTINGS, guidance_scale=scale)
    yield _with_lora(folder, few, name)


def _with_lora(folder: Path, model: str, name: str) -> tuple[str, mx.array, Any]:
    """A random LoRA of all layers in the blocks, at 0.8."""
    rng, tensors = np.random.default_rng(0), {}
    network: Any = read_transformer(folder / model / "transformer")
    layers: dict[str, Any] = dict(linear_layers(network))
    for path, layer in layers.items():
        if path.split(".")[0] in network.BLOCKS:
            rows, columns = layer.weight.shape
            down, up = rng.normal(size=(3, columns)), rng.normal(size=(rows, 3)) / columns
            for part, matrix in (("lora_A", down), ("lora_B", up)):
                tensors[f"transformer.{path}.{part}.weight"] = mx.array(matrix.astype(np.float32))
    lora = folder / "lora.safetensors"
    mx.save_safetensors(str(lora), tensors, {"format": "pt"})
    ours, theirs = _pipelines(folder, model, name, loras=((str(lora), 0.8),))
    theirs.load_lora_weights(str(lora), adapter_name="lora")
    theirs.set_adapters("lora", 0.8)
    return "with LoRA", *drawn(ours, theirs, SETTINGS, guidance_scale=1.0)


def _few_steps(folder: Path) -> str:
    return "turbo" if (folder / "turbo").is_dir() else "base"


def _compare(folder: Path, name: str, *, masked: bool) -> Pairs:
    """With strengths that divide the steps and that do not, without and with guidance."""
    few, whole = _few_steps(folder), 1.0 if masked else 0.5
    for model, steps, strength, scale in ((few, 4, 0.6, 1.0), ("base", 3, whole, 3.5)):
        ours, theirs = _pipelines(folder, model, name)
        settings = _settings(folder, masked=masked, num_inference_steps=steps, strength=strength)
        what = "guided" if scale > 1 else f"{strength:g} of {steps}"
        yield what, *drawn(ours, theirs, settings, guidance_scale=scale)


def _settings(folder: Path, *, masked: bool, **settings: Any) -> DrawSettings:
    mask = str(folder / "mask.png") if masked else None
    return replace(SETTINGS, image=str(folder / "0.png"), mask=mask, **settings)


def _pipelines(folder: Path, model: str, name: str, **choice: Any) -> tuple[Pipeline, Any]:
    """Ours, and diffusers' of a class."""
    here = folder / f"{model}-here"
    if not here.exists():
        convert_teacher(folder / model, here)
    diffusers = library("diffusers")
    diffusers.utils.logging.disable_progress_bar()
    theirs = getattr(diffusers, name).from_pretrained(folder / model)
    theirs.set_progress_bar_config(disable=True)
    return SnapGenPipeline.from_pretrained(here, **choice), theirs


def drawn(ours: Pipeline, theirs: Any, settings: DrawSettings, **more: Any) -> tuple[mx.array, Any]:
    """Pictures (1, H, W, 3) in [0, 1], before what must not change is pasted: ours, and theirs.

    Args:
        settings, more: with prompt, size and seed.
    """
    settings = replace(settings, **more)
    height, width, seed = settings.height, settings.width, settings.seed
    assert height is not None and width is not None and seed is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PictureWarning)
        *_, last = ours.generate(settings)
    found = mx.clip(ours.autoencoder.decode(last.x0) / 2 + 0.5, 0, 1)
    values, kind = last.metadata, ours.config.kind
    given = {
        "prompt": settings.prompt,
        "height": height,
        "width": width,
        "num_inference_steps": values["num_inference_steps"],
        "guidance_scale": values["guidance_scale"],
    }
    if kind == "z-image":
        given["guidance_scale"] -= 1
    if kind == "qwen-image":
        # The other scale is for models that are distilled for it.
        given["true_cfg_scale"] = given.pop("guidance_scale")
        given["negative_prompt"] = " " if given["true_cfg_scale"] > 1 else None
    edit = [Image.open(str(path)) for path in settings.edit]
    if settings.image is not None:
        given |= {"image": Image.open(str(settings.image)), "strength": settings.strength}
    elif edit:
        given["image"] = edit
    if settings.mask is not None:
        given["mask_image"] = Image.open(str(settings.mask))
        if edit:
            given["image_reference"] = edit[0]
    channels = ours.config.autoencoder.latent_channels
    noise = get_noise(seed, height // 8, width // 8, channels)
    if kind == "flux2":
        noise = pack(noise, 2).reshape(1, height // 16, width // 16, 4 * channels)
    with _random_numbers(theirs, np.array(noise).transpose(0, 3, 1, 2)):
        expected = theirs(**given, output_type="pt").images
    return found, expected.permute(0, 2, 3, 1)


@contextlib.contextmanager
def _random_numbers(pipeline: Any, noise: np.ndarray) -> Iterator[None]:
    """The noise (1, C, h, w) of a pipeline, and the mean of its encoder instead of a sample."""
    module, torch = sys.modules[type(pipeline).__module__], library("torch")

    def randn_tensor(shape: Any, **_: Any) -> Any:
        return torch.tensor(noise).reshape(shape)

    def retrieve_latents(output: Any, **_: Any) -> Any:
        return output.latent_dist.mode()

    replaced: dict[str, Any] = {"randn_tensor": randn_tensor}
    if hasattr(module, "retrieve_latents"):
        replaced["retrieve_latents"] = retrieve_latents
    with mock.patch.multiple(module, **replaced):
        yield
