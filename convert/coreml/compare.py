"""Draw a picture with exported packages alone, on any machine: slow, in numpy.

    python -m convert.coreml.compare my-model-coreml "a red apple" --compare my-model

writes picture.png and, with --compare, says how far it is from what MLX draws. That must be at
least 35 dB, or the command fails: then the packages are not this model's, or wrong. Packages with
palettes that the model has not are measured alike, and may be as far as they are.

    python -m convert.coreml.compare my-model-coreml "a red apple" --compare my-model --one-step

runs the transformer's packages once, on noise at the noise level .5 and a prompt, and says how far
their velocity is from MLX's: at least 60 dB in fp16, within 1e-4 of the largest number in
float32. That is what a large model has time for, and one whose other networks are not exported.
"""

import argparse
import functools
import json
from collections.abc import Sequence
from pathlib import Path

import mlx_snapgen  # noqa: F401  before mlx, so that the fast BLAS gets in first

# isort: split
import mlx.core as mx
import numpy as np
from PIL import Image

from convert.mil.interpreter import Interpreter
from mlx_snapgen.checkpoint.config import load_config
from mlx_snapgen.checkpoint.hub import find_model
from mlx_snapgen.checkpoint.model import Components, fuse_few_step, load_pretrained
from mlx_snapgen.errors import UserError, run_command
from mlx_snapgen.metadata import save_picture
from mlx_snapgen.networks.efficient_dit import encode_prompts
from mlx_snapgen.networks.text_encoders.sentencepiece import SentencePieceTokenizer
from mlx_snapgen.pipeline import SnapGenPipeline
from mlx_snapgen.quantize.palettes import load_palettes
from mlx_snapgen.sampling import denoise, get_noise, get_schedule, guided_velocity
from mlx_snapgen.settings import parse_width

LEAST_PSNR = 35.0
"""dB between two pictures that count as the same."""

LEAST_STEP_PSNR = 60.0
"""dB between two velocities that count as the same, where one is computed in fp16."""
MOST_STEP_ERROR = 1e-4
"""Of the largest number of a velocity, where both are computed in float32."""


class Packages:
    """A folder that `convert.coreml` wrote, ready to draw as a phone would.

    Args:
        folder: the packages, config.json and tokenizers.
        function: of the transformer, for packages of several widths; None takes the default.

    Raises:
        UserError: a package is missing, damaged, or has no such function. Those beside the
            transformer are read when they are needed.
    """

    def __init__(self, folder: Path, function: str | None = None):
        self.config = load_config(folder)
        names = ["Transformer"]
        if not (folder / "Transformer.mlpackage").exists():
            found = folder.glob("Transformer_*.mlpackage")
            names = (
                sorted((path.stem for path in found), key=lambda stem: int(stem.rpartition("_")[2]))
                or names
            )
        self.chunks = [Interpreter(folder / f"{name}.mlpackage", function) for name in names]
        self.folder = folder

    @functools.cached_property
    def decoder(self) -> Interpreter:
        """Latents to picture."""
        return Interpreter(self.folder / "Decoder.mlpackage")

    @functools.cached_property
    def encoders(self) -> list[tuple[Interpreter, SentencePieceTokenizer]]:
        """Each text encoder with its tokenizer."""
        return [
            (
                Interpreter(self.folder / f"TextEncoder_{i}.mlpackage"),
                SentencePieceTokenizer.from_file(
                    self.folder / f"tokenizer_{i}.model", encoder.max_length
                ),
            )
            for i, encoder in enumerate(self.config.text_encoders)
        ]

    def encode(self, prompts: Sequence[str]) -> tuple[mx.array, mx.array]:
        """Prompts -> text (B, L, D) and mask (B, L), as `encode_prompts` gives them."""
        texts, masks = [], []
        for prompt in prompts:
            said = []
            for encoder, tokenizer in self.encoders:
                tokens, mask = (np.array(array) for array in tokenizer([prompt]))
                (text,) = encoder({"tokens": tokens, "mask": mask}).values()
                said.append((text, mask))
            texts.append(np.concatenate([text for text, _ in said], 3)[0, :, 0].T)
            masks.append(np.concatenate([mask for _, mask in said], 1)[0])
        return mx.array(np.stack(texts).astype(np.float32)), mx.array(np.stack(masks))

    def velocity(self, x_t: mx.array, t: mx.array, text: mx.array, mask: mx.array) -> mx.array:
        """What `EfficientDiT` computes, one picture after the other."""
        found = []
        for i in range(len(x_t)):
            values = {
                "x_t": np.array(x_t[i : i + 1].transpose(0, 3, 1, 2)),
                "t": np.array(t[i : i + 1]),
                "text": np.array(text[i].T)[None, :, None],
                "mask": np.array(mask[i : i + 1]),
            }
            for chunk in self.chunks:
                values |= chunk({name: values[name] for name in chunk.inputs})
            found.append(values["velocity"].astype(np.float32).transpose(0, 2, 3, 1))
        return mx.array(np.concatenate(found))

    def draw(
        self, prompt: str, seed: int = 0, num_inference_steps: int | None = None
    ) -> Image.Image:
        """The picture that `SnapGenPipeline` draws with these settings."""
        sampler = self.config.few_step or self.config.sampler
        steps = num_inference_steps or sampler.num_inference_steps
        guided = sampler.guidance_scale != 1
        text, mask = self.encode(["", prompt] if guided else [prompt])
        velocity = guided_velocity(self.velocity, text, mask, sampler.guidance_scale)
        _, channels, height, width = self.chunks[0].inputs["x_t"].shape

        def noise(draw: int) -> mx.array:
            return get_noise(seed, height, width, channels, draw)

        schedule = get_schedule(steps, sampler.time_shift)
        fresh = noise if sampler.fresh_noise else None
        *_, last = denoise(velocity, noise(0), schedule, fresh)
        latents = np.array(last.x_t.transpose(0, 3, 1, 2))
        (picture,) = self.decoder({"latents": latents}).values()
        colours = np.clip(picture[0].astype(np.float32).transpose(1, 2, 0), -1, 1)
        return Image.fromarray(np.round((colours + 1) * 127.5).astype(np.uint8))


def psnr(first: Image.Image, second: Image.Image) -> float:
    """Peak signal-to-noise ratio of two pictures in dB; infinite when they are equal."""
    error = np.square(np.asarray(first, np.float64) - np.asarray(second, np.float64)).mean()
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def check_picture(ratio: float) -> None:
    """`UserError` for packages that draw another picture than MLX."""
    if ratio < LEAST_PSNR:
        raise UserError(
            f"the packages draw another picture than MLX: {ratio:.1f} dB, not {LEAST_PSNR:g}: "
            "compare with the model that they were exported from, or export them again"
        )


def step_inputs(
    packages: Packages, components: Components, prompt: str, seed: int = 0
) -> tuple[mx.array, ...]:
    """x_t, t, text and mask for one step, as `EfficientDiT` takes them, text being MLX's own.

    (What no encoder says may be too large for fp16 to be near.)
    """
    _, channels, height, width = packages.chunks[0].inputs["x_t"].shape
    text, mask = encode_prompts(
        [prompt], components.text_encoders, transformer=components.transformer
    )
    return get_noise(seed, height, width, channels), mx.array([0.5]), text, mask


def step_difference(found: mx.array, expected: mx.array) -> tuple[float, float]:
    """PSNR in dB, the peak being the range of `expected`, and the largest relative difference."""
    error = np.array(found, np.float64) - np.array(expected, np.float64)
    values = np.array(expected, np.float64)
    mean = np.square(error).mean()
    ratio = float("inf") if mean == 0 else 10 * np.log10(np.ptp(values) ** 2 / mean)
    return float(ratio), float(np.abs(error).max() / np.abs(values).max())


def check_step(ratio: float, difference: float, precision: str) -> None:
    """`UserError` for packages whose transformer computes something else than MLX."""
    if ratio < LEAST_STEP_PSNR or (precision == "float32" and difference > MOST_STEP_ERROR):
        raise UserError(
            f"the packages compute another velocity than MLX: {ratio:.1f} dB, {difference:.1e} of "
            "the largest number: compare with the model that they were exported from"
        )


def compare_step(
    packages: Packages, model: str, width: str, prompt: str, seed: int = 0
) -> tuple[float, float]:
    """How far one velocity of the packages is from the model's in MLX (see `step_difference`)."""
    few_step = packages.config.few_step is not None
    share = parse_width(width).share
    components = load_pretrained(model, dtype=mx.float32, share=share, few_step=few_step)
    fuse_few_step(components)
    inputs = step_inputs(packages, components, prompt, seed)
    expected = components.transformer(*inputs)
    return step_difference(packages.velocity(*inputs), expected)


def read_report(folder: Path) -> tuple[str, str, bool]:
    """The default width of the packages in a folder, their precision, and if they have palettes."""
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        width = report["widths"].split()[0]
        return width, report["precision"], report["quantization"] is not None
    except (OSError, ValueError, KeyError, AttributeError, IndexError) as error:
        raise UserError(f"{folder}/report.json cannot be read ({error!r})") from None


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m convert.coreml.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="what convert.coreml wrote")
    parser.add_argument("prompt")
    parser.add_argument("--output", type=Path, default=Path("picture.png"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="default: the model's own")
    parser.add_argument("--function", metavar="WIDTH", help="of packages of several widths")
    parser.add_argument("--compare", metavar="MODEL", help="the model they were exported from")
    parser.add_argument(
        "--one-step", action="store_true", help="compare one velocity and draw nothing"
    )
    args = parser.parse_args()
    if args.one_step and args.compare is None:
        raise UserError("--one-step takes --compare MODEL")
    if not args.prompt.strip():
        raise UserError("the prompt is empty: say what to draw")
    if args.steps is not None and args.steps < 1:
        raise UserError(f"--steps must be a positive number, got {args.steps}")
    packages = Packages(args.folder, args.function)
    if args.compare is not None:
        width, precision, palettes = read_report(args.folder)
        width = args.function or width
        exact = not palettes or load_palettes(find_model(args.compare)) is not None
    if args.one_step:
        ratio, difference = compare_step(packages, args.compare, width, args.prompt, args.seed)
        print(f"velocity: {ratio:.1f} dB to MLX's, {difference:.1e} of the largest number at most")
        if exact:
            check_step(ratio, difference, precision)
        return
    picture = packages.draw(args.prompt, args.seed, args.steps)
    print(save_picture(picture, args.output))
    if args.compare is None:
        return
    pipeline = SnapGenPipeline.from_pretrained(args.compare, model_width=width)
    height, across = packages.config.image_size
    (expected,) = pipeline(
        args.prompt,
        height=height,
        width=across,
        num_inference_steps=args.steps,
        few_step=packages.config.few_step is not None,
        seed=args.seed,
    )
    ratio = psnr(picture, expected)
    print(f"{ratio:.1f} dB to what MLX draws")
    if exact:
        check_picture(ratio)


if __name__ == "__main__":
    run_command(main)
