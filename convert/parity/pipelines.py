"""Whole teachers, from prompt to picture, against diffusers' pipelines, for `convert.parity`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from convert.parity.originals import flux2_klein_pipeline, library
from convert.parity.transformers import Pairs
from mlx_snapgen.fitting import fit_reference
from mlx_snapgen.networks.autoencoders.base import Autoencoder
from mlx_snapgen.networks.layers import pack, unpack
from mlx_snapgen.pictures import from_uint8
from mlx_snapgen.public.teachers import convert_teacher
from mlx_snapgen.sampling import denoise
from mlx_snapgen.teachers.flow import FlowTeacher, noise_levels
from mlx_snapgen.teachers.folder import load_flow_teacher

PROMPTS = ["a red car", "two cats: \u00e4, {} and <|im_end|>, on a table that is green"]

SIZE = (48, 80)
"""Height and width of the picture in pixels."""

REFERENCES = ((90, 75), (64, 130))
"""Sizes of the pictures to edit; they are cut to 80x64 and 64x128."""


def make_flux2_klein(folder: Path) -> None:
    """klein base and klein."""
    for name, is_distilled in (("base", False), ("klein", True)):
        flux2_klein_pipeline(is_distilled=is_distilled).save_pretrained(folder / name)


def compare_flux2_klein(folder: Path) -> Pairs:
    for name in ("base", "klein"):
        convert_teacher(folder / name, folder / f"{name}-here")
    teacher, autoencoder = load_flow_teacher(folder / "base-here")
    distilled, _ = load_flow_teacher(folder / "klein-here")
    pipeline, klein = (_pipeline(folder / name) for name in ("base", "klein"))
    with library("torch").no_grad():
        states, _ = pipeline.encode_prompt(PROMPTS)
    yield "prompts", teacher.encode(PROMPTS).text, states
    pictures = random_pictures()
    for what, ours, theirs, scale, references in (
        ("4 steps", distilled, klein, 1.0, []),
        ("guided", teacher, pipeline, 4.0, []),
        ("edited", distilled, klein, 1.0, pictures[:1]),
        ("edited 2", teacher, pipeline, 4.0, pictures),
    ):
        settings = {"guidance_scale": scale, "references": references}
        settings["num_inference_steps"] = 3 if scale > 1 else 4
        yield what, *flux2_klein_pictures(ours, autoencoder, pipeline=theirs, **settings)


def _pipeline(folder: Path) -> Any:
    diffusers = library("diffusers")
    diffusers.utils.logging.disable_progress_bar()
    pipeline = diffusers.Flux2KleinPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def random_pictures() -> list[Image.Image]:
    """Pictures of `REFERENCES` pixels."""
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 256, (*size, 3)).astype(np.uint8)) for size in REFERENCES
    ]


def flux2_klein_pictures(
    teacher: FlowTeacher,
    autoencoder: Autoencoder,
    *,
    pipeline: Any,
    num_inference_steps: int,
    guidance_scale: float,
    references: Sequence[Image.Image] = (),
    prompts: Sequence[str] = PROMPTS,
    size: tuple[int, int] = SIZE,
) -> tuple[mx.array, Any]:
    """Pictures (B, H, W, 3) in [0, 1], from the same noise: ours, and the pipeline's."""
    torch = library("torch")
    height, width = size
    grid = height // 16, width // 16
    packed = teacher.config.transformer.latent_channels * 4
    noise = np.random.default_rng(1).normal(size=(len(prompts), *grid, packed)).astype(np.float32)
    drawn = pipeline(
        prompt=[*prompts],
        image=[*references] or None,
        height=height,
        width=width,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        latents=torch.tensor(noise).permute(0, 3, 1, 2),
        output_type="pt",
    ).images

    fitted = [fit_reference(picture, unit=16) for picture in references]
    latents = [autoencoder.encode(from_uint8(np.array(picture)[None])) for picture in fitted]
    condition = teacher.encode(prompts)
    start = unpack(mx.array(noise.reshape(len(prompts), -1, packed)), grid, patch=2)
    count = pack(start, 2).shape[1]
    levels = noise_levels(teacher.config.schedule, count, num_inference_steps=num_inference_steps)

    def velocity(x_t: mx.array, sigma: float) -> mx.array:
        t = mx.full((len(x_t),), sigma)
        return teacher.velocity(
            x_t, t, condition, guidance_scale=guidance_scale, references=latents
        )

    *_, last = denoise(velocity, start, levels)
    found = mx.clip(autoencoder.decode(last.x_t) / 2 + 0.5, 0, 1)
    return found, drawn.permute(0, 2, 3, 1)
