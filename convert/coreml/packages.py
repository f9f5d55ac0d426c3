"""Exported packages run in numpy, and how far their results are from MLX's."""

import functools
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
from PIL import Image
from tqdm import tqdm

from convert.mil.execution import Interpreter
from mlx_snapgen.alpha import straight
from mlx_snapgen.checkpoint.config import load_config
from mlx_snapgen.checkpoint.model import fuse_few_step, load_pretrained
from mlx_snapgen.cli.notices import announce
from mlx_snapgen.draw import denoise_latents, encode_for
from mlx_snapgen.errors import UserError
from mlx_snapgen.networks.efficient_dit import encode_prompts
from mlx_snapgen.networks.text_encoders.base import Prompt
from mlx_snapgen.networks.text_encoders.sentencepiece import SentencePieceTokenizer
from mlx_snapgen.pictures import decibels, psnr, to_uint8
from mlx_snapgen.pipeline import SnapGenPipeline
from mlx_snapgen.reading import read_object
from mlx_snapgen.sampling import get_noise
from mlx_snapgen.settings import DrawSettings, parse_width

LEAST_PSNR = 35.0
"""Smallest PSNR in dB of two pictures that count as equal."""

LEAST_STEP_PSNR = 60.0
"""Smallest PSNR in dB of two velocities that count as equal if one is computed in fp16."""
MOST_STEP_ERROR = 1e-4
"""Largest difference, relative to the largest value, if both are computed in float32."""


class Packages:
    """A folder written by `convert.coreml`, ready to generate pictures as on a phone.

    Args:
        folder: the packages, config.json and tokenizers.
        function: width of the transformer, for packages of several widths; None for the default.

    Raises:
        UserError: the transformer's package is missing or damaged, or has no such function. The
            other packages are read, and checked, when they are first used.
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

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the latents."""
        _, channels, height, width = self.chunks[0].inputs["x_t"].sizes
        return height, width, channels

    def encode(self, prompts: Sequence[Prompt]) -> tuple[mx.array, mx.array]:
        """Prompts -> text (B, L, D) and mask (B, L), like `encode_prompts`."""
        texts, masks = [], []
        for prompt in prompts:
            encoded = []
            for encoder, tokenizer in self.encoders:
                tokens, mask = (np.array(array) for array in tokenizer([prompt or ""]))
                (text,) = encoder({"tokens": tokens, "mask": mask}).values()
                encoded.append((text, mask & (prompt is not None)))
            texts.append(np.concatenate([text for text, _ in encoded], 3)[0, :, 0].T)
            masks.append(np.concatenate([mask for _, mask in encoded], 1)[0])
        return mx.array(np.stack(texts).astype(np.float32)), mx.array(np.stack(masks))

    def velocity(self, x_t: mx.array, t: mx.array, text: mx.array, mask: mx.array) -> mx.array:
        """The velocity (B, h, w, C), like `EfficientDiT`; pictures one by one."""
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
        """The picture that `SnapGenPipeline` generates with these settings."""
        config = self.config
        settings = DrawSettings(
            num_inference_steps=num_inference_steps, few_step=config.few_step is not None
        ).resolved(config)
        text, mask = encode_for(settings, [prompt], config=config, encode=self.encode)
        steps = denoise_latents(
            lambda x_t, t, text, mask, **_: self.velocity(x_t, t, text, mask),
            text,
            mask,
            seeds=[seed],
            settings=settings,
            config=config,
        )
        count, latents = settings.num_inference_steps, mx.array(0.0)
        for step in tqdm(steps, total=count, desc="steps in numpy", leave=False, disable=None):
            latents = step.x_t
        (picture,) = self.decoder({"latents": np.array(latents.transpose(0, 3, 1, 2))}).values()
        decoded = mx.array(picture.astype(np.float32).transpose(0, 2, 3, 1))
        return Image.fromarray(straight(to_uint8(decoded)[0]))


def check_picture(ratio: float) -> None:
    """`UserError` for a PSNR of packages that were exported from another model."""
    if ratio < LEAST_PSNR:
        raise UserError(
            f"the packages generate another picture than MLX: {ratio:.1f} dB, the limit is "
            f"{LEAST_PSNR:g}: compare with the model that they were exported from, or export again"
        )


def step_difference(found: mx.array, expected: mx.array) -> tuple[float, float]:
    """PSNR in dB, the peak being the range of `expected`, and the largest relative difference."""
    error = np.array(found, np.float64) - np.array(expected, np.float64)
    values = np.array(expected, np.float64)
    ratio = decibels(np.square(error).mean(), np.ptp(values))
    return ratio, float(np.abs(error).max() / np.abs(values).max())


def check_step(ratio: float, difference: float, *, precision: str) -> None:
    """`UserError` for a velocity of packages that were exported from another model."""
    if ratio < LEAST_STEP_PSNR or (precision == "float32" and difference > MOST_STEP_ERROR):
        raise UserError(
            f"the packages compute another velocity than MLX: {ratio:.1f} dB, {difference:.1e} of "
            "the largest value: compare with the model that they were exported from"
        )


def compare_step(
    packages: Packages, model: Path, *, width: str, prompt: str, seed: int = 0
) -> tuple[float, float]:
    """How far one velocity of the packages is from the model's in MLX (see `step_difference`)."""
    few_step = packages.config.few_step is not None
    share = parse_width(width).share
    with announce("loading the model ..."):
        components = load_pretrained(model, dtype=mx.float32, share=share, few_step=few_step)
    fuse_few_step(components)
    # With MLX's text: the states of padding may be too large to be close in fp16.
    text, mask = encode_prompts(
        [prompt], components.text_encoders, transformer=components.transformer
    )
    x_t, t = get_noise(seed, *packages.latent_shape), mx.array([0.5])
    expected = components.transformer(x_t, t, text, mask)
    assert isinstance(expected, mx.array)
    with announce("computing one step of the packages in numpy ..."):
        found = packages.velocity(x_t, t, text, mask)
    return step_difference(found, expected)


def compare_picture(
    packages: Packages,
    picture: Image.Image,
    model: Path,
    *,
    width: str,
    prompt: str,
    seed: int,
    num_inference_steps: int | None,
) -> float:
    """PSNR in dB of a picture of the packages against the same picture of the model in MLX."""
    pipeline = SnapGenPipeline.from_pretrained(model, model_width=width)
    rows, columns = packages.config.image_size
    with announce("generating the same picture with MLX ..."):
        (expected,) = pipeline(
            prompt,
            height=rows,
            width=columns,
            num_inference_steps=num_inference_steps,
            few_step=packages.config.few_step is not None,
            seed=seed,
        )
    return psnr(np.asarray(picture), np.asarray(expected))


def read_report(folder: Path) -> tuple[str, str, bool]:
    """Default width of the packages in a folder, their precision, and whether they have palettes.

    Raises:
        UserError: no report.json, or a damaged one.
    """
    try:
        report = read_object(folder / "report.json")
        width = report["widths"].split()[0]
        return width, report["precision"], report["quantization"] is not None
    except (KeyError, AttributeError, IndexError) as error:
        raise UserError(f"{folder}/report.json cannot be read ({error!r})") from None
