"""Draw a picture with a teacher, to check its conversion.

python -m convert.sample_teacher qwen-image "a red apple on a table" --output apple.png
python -m convert.sample_teacher qwen-image "a red apple" --output apple.png --few-step
python -m convert.sample_teacher klein "the apple is green" --output b.png --edit apple.png
"""

import time
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
from PIL import Image
from tqdm import tqdm

from mlx_snapgen.cli.notices import announce, peak_process_bytes, write_line
from mlx_snapgen.cli.options import Parser, add_steps_and_guidance, integer, new_png
from mlx_snapgen.errors import UserError, run_command
from mlx_snapgen.fitting import fit_reference
from mlx_snapgen.metadata import save_picture
from mlx_snapgen.networks.autoencoders.base import Autoencoder
from mlx_snapgen.picture_files import read_picture
from mlx_snapgen.pictures import from_uint8, to_uint8
from mlx_snapgen.prompt_check import too_long
from mlx_snapgen.settings import DrawSettings
from mlx_snapgen.teachers.draw import denoise_public
from mlx_snapgen.teachers.flow import FlowTeacher
from mlx_snapgen.teachers.folder import load_flow_teacher


def sample(
    teacher: FlowTeacher,
    autoencoder: Autoencoder,
    *,
    prompt: str,
    references: Sequence[Image.Image] = (),
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    few_step: bool = False,
    seed: int = 0,
) -> Image.Image:
    """One picture of `height` x `width` pixels, by Euler steps along the teacher's velocity.

    The text encoder is freed before denoising, and the transformer before decoding.

    Args:
        references: pictures to edit, in RGB; see `fit_reference`.
        height, width: None for those of the first reference, or the model's.
        num_inference_steps, guidance_scale: None for those of the teacher's schedule.
        few_step: use the few-step mode, which has no guidance.

    Raises:
        UserError: a size that is not a multiple of a patch, references that the teacher does not
            take, no few-step mode, guidance in it, or a picture that is not finite.
    """
    config = teacher.config
    cell = autoencoder.config.downsampling * config.transformer.patch_size
    if references and not teacher.can_edit:
        raise UserError("this teacher cannot edit pictures: leave out --edit")
    fitted = [fit_reference(picture, unit=cell) for picture in references]
    default = fitted[0].size if fitted else config.image_size[::-1]
    width = default[0] if width is None else width
    height = default[1] if height is None else height
    if height < cell or width < cell or height % cell or width % cell:
        raise UserError(f"{height}x{width} pixels: both sides must be multiples of {cell}")
    schedule = config.few_step if few_step else config.schedule
    if schedule is None or (few_step and not teacher.has_few_step):
        raise UserError("this teacher has no few-step mode: convert it with --few-step-lora")
    scale = schedule.guidance_scale if guidance_scale is None else guidance_scale
    if few_step and scale != 1:
        raise UserError(f"the few-step mode has no guidance: leave out the scale {scale:g}")
    if config.kind == "flux2" and schedule == config.few_step and scale != 1:
        raise UserError(f"FLUX.2 klein has no guidance, only klein base: leave out {scale:g}")
    count = num_inference_steps or schedule.num_inference_steps
    settings = DrawSettings(
        height=height,
        width=width,
        num_inference_steps=count,
        guidance_scale=scale,
        few_step=few_step,
        time_shift=schedule.time_shift(height * width // cell**2, count),
    )
    condition = teacher.encode([prompt])
    assert teacher.prompts is not None
    if cut := teacher.prompts.cut(prompt):
        most = teacher.prompts.prompt_format.max_length
        write_line(f"note: {too_long('prompt', cut, max_length=most)}")
    teacher.free_text_encoder()
    latents = []
    for picture in fitted:
        pixels = from_uint8(np.array(picture)[None])
        latents.append(autoencoder.encode(pixels, in_tiles=True))
        mx.eval(latents)

    x0 = mx.array(0.0)
    steps = denoise_public(teacher, condition, seeds=[seed], settings=settings, references=latents)
    for step in tqdm(steps, total=count, desc="steps", leave=False, disable=None):
        x0 = step.x0
    teacher.free_networks()
    return Image.fromarray(to_uint8(autoencoder.decode(x0))[0])


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="python -m convert.sample_teacher", description=__doc__)
    parser.add_argument("model", type=Path, metavar="MODEL", help="folder of convert.teacher")
    parser.add_argument("prompt", metavar="PROMPT", help="description of the picture, in quotes")
    add = parser.add_argument
    add(
        "-o",
        "--output",
        type=new_png,
        required=True,
        metavar="PATH",
        help="picture to write, a .png file",
    )
    size = "of the picture in pixels (default: that of the first picture to edit, or the model's)"
    add("--height", type=integer(1), metavar="PX", help=f"height {size}")
    add("--width", type=integer(1), metavar="PX", help=f"width {size}")
    add(
        "--edit",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="pictures to edit, or to take parts from; FLUX.2 klein only (default: none)",
    )
    add_steps_and_guidance(parser)
    add("--few-step", action="store_true", help="use the few-step mode (default: off)")
    add("--seed", type=integer(0), default=0, metavar="N", help="seed of the noise (default: 0)")
    args = parser.parse_args(argv)
    references = [read_picture(path)[0] for path in args.edit]
    started = time.perf_counter()
    with announce("loading the teacher ..."):
        teacher, autoencoder = load_flow_teacher(args.model, lazy=True)
    picture = sample(
        teacher,
        autoencoder,
        prompt=args.prompt,
        references=references,
        height=args.height,
        width=args.width,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        few_step=args.few_step,
        seed=args.seed,
    )
    path = save_picture(picture, args.output)
    seconds, peak = time.perf_counter() - started, peak_process_bytes() / 2**20
    print(f"{path} (seed {args.seed}, {seconds:.1f} s, peak memory {peak:.0f} MiB)")


if __name__ == "__main__":
    run_command(main)
