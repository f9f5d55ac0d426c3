"""Draw a picture with a teacher, to see that it arrived whole.

python -m convert.sample_teacher qwen-image "a red apple on a table" --output apple.png
python -m convert.sample_teacher qwen-image "a red apple" --output apple.png --few-step
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import mlx_snapgen  # noqa: F401  before mlx, so that the fast BLAS gets in first

# isort: split
import mlx.core as mx
import numpy as np
from PIL import Image
from tqdm import tqdm

from mlx_snapgen.errors import UserError, run_command
from mlx_snapgen.metadata import save_picture
from mlx_snapgen.networks.autoencoders.base import Autoencoder
from mlx_snapgen.sampling import denoise, get_noise
from mlx_snapgen.teachers.flow import FlowTeacher, noise_levels
from mlx_snapgen.teachers.folder import load_flow_teacher


def sample(
    teacher: FlowTeacher,
    autoencoder: Autoencoder,
    prompt: str,
    height: int = 1024,
    width: int = 1024,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    few_step: bool = False,
    seed: int = 0,
) -> Image.Image:
    """One picture of `height` x `width` pixels, by Euler steps along the teacher's velocity.

    The text encoder is freed before denoising.

    Args:
        num_inference_steps, guidance_scale: None for what the teacher's schedule says.
        few_step: take the few-step mode, which knows no guidance.

    Raises:
        UserError: a size that does not divide, no few-step mode, guidance in it, or numbers that
            are not finite in the end.
    """
    config = teacher.config
    cell = autoencoder.config.downsampling * config.transformer.patch_size
    if height < cell or width < cell or height % cell or width % cell:
        raise UserError(f"a picture of {height}x{width} pixels does not divide by {cell}")
    if few_step and not teacher.has_few_step:
        raise UserError("this teacher has no few-step mode: convert it with --few-step-lora")
    schedule = config.few_step if few_step else config.schedule
    scale = schedule.guidance_scale if guidance_scale is None else guidance_scale
    if few_step and scale != 1:
        raise UserError(f"the few-step mode knows no guidance: leave out the scale {scale:g}")
    levels = noise_levels(
        schedule, height * width // cell**2, num_inference_steps=num_inference_steps
    )
    condition = teacher.encode([prompt])
    teacher.free_text_encoder()

    def velocity(x_t: mx.array, sigma: float) -> mx.array:
        t = mx.full((1,), sigma)
        if few_step:
            return teacher.velocity_and_features(x_t, t, condition, few_step=True)[0]
        return teacher.velocity(x_t, t, condition, guidance_scale=scale)

    h, w = (side // autoencoder.config.downsampling for side in (height, width))
    noise = get_noise(seed, h, w, autoencoder.config.latent_channels)
    steps = denoise(velocity, noise, levels)
    for step in tqdm(steps, total=len(levels) - 1, leave=False, disable=None):
        x0 = step.x0
    picture = autoencoder.decode(x0)[0]
    if not mx.isfinite(picture).all():
        raise UserError("the picture has numbers that are not finite: convert the teacher again")
    pixels = mx.round((mx.clip(picture, -1, 1) + 1) * 127.5).astype(mx.uint8)
    return Image.fromarray(np.array(pixels))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m convert.sample_teacher",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=Path, help="folder of the teacher")
    parser.add_argument("prompt")
    parser.add_argument("--output", type=Path, required=True, help="picture to write, a .png")
    parser.add_argument("--height", type=int, default=1024)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--steps", type=int, help="default: the teacher's own number")
    parser.add_argument("--guidance", type=float, help="default: the teacher's own; 1 is none")
    parser.add_argument("--few-step", action="store_true", help="take the few-step mode")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.output.suffix.lower() != ".png":
        raise UserError(f"--output {args.output}: give a name ending in .png")
    if args.steps is not None and args.steps < 1:
        raise UserError(f"--steps must be at least 1, not {args.steps}")
    started = time.perf_counter()
    teacher, autoencoder = load_flow_teacher(args.model, lazy=True)
    picture = sample(
        teacher,
        autoencoder,
        args.prompt,
        args.height,
        args.width,
        args.steps,
        args.guidance,
        args.few_step,
        args.seed,
    )
    path = save_picture(picture, args.output)
    print(f"{path} (seed {args.seed}, {time.perf_counter() - started:.1f} s)")


if __name__ == "__main__":
    run_command(main)
