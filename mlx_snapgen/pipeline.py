"""Text to picture: `SnapGenPipeline`."""

import dataclasses
import functools
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_snapgen._version import __version__
from mlx_snapgen.checkpoint.config import load_config
from mlx_snapgen.checkpoint.hub import find_model
from mlx_snapgen.checkpoint.model import (
    FEW_STEP,
    Components,
    load_pretrained,
    load_text_encoders,
    save_pretrained,
)
from mlx_snapgen.checkpoint.module import Quantization
from mlx_snapgen.checkpoint.text_encoders import PromptEncoder
from mlx_snapgen.config import SamplerConfig
from mlx_snapgen.errors import UserError
from mlx_snapgen.lora.adapters import fuse_lora, remove_lora, switched
from mlx_snapgen.lora.files import load_lora, read_lora
from mlx_snapgen.networks.elastic import extract
from mlx_snapgen.networks.text_encoders.base import normalise
from mlx_snapgen.quantize.runtime import quantize_transformer
from mlx_snapgen.sampling import denoise, get_noise, get_schedule, guided_velocity
from mlx_snapgen.settings import (
    MAX_SEED,
    MAX_STEPS,
    check_size,
    check_width,
    parse_width,
    random_seed,
    whole_number,
)


class PromptWarning(UserWarning):
    """A prompt that is drawn, but not as its writer may think."""


class GenerationStep(NamedTuple):
    """One step of one picture, as `SnapGenPipeline.generate` yields it."""

    image: int
    """Which of the pictures, from 0."""
    seed: int
    index: int
    """The step, from 0."""
    num_steps: int
    sigma: float
    """Noise level that the step started from, 1 to 0."""
    x0: mx.array
    """Estimate of the clean latents (1, h, w, C); the result at the last step."""
    decode: Callable[[mx.array], Image.Image]
    metadata: dict[str, Any]
    """All it takes to make the picture again."""

    @property
    def final(self) -> bool:
        """Whether `x0` is the finished picture."""
        return self.index == self.num_steps - 1

    def preview(self) -> Image.Image:
        """The picture as this step estimates it; decoded at each call."""
        return self.decode(self.x0)


class SnapGenPipeline:
    """A model ready to draw. Pixel sizes are `height` and `width`, the network's is `model_width`.

    Args:
        components: the model; its transformer has one width.
        model_width: name of that width.
        quantize: bits that the transformer was quantized to in memory, or None.
        source, revision: where the model came from, for the pictures' metadata.
        loras: (file, weight) of each LoRA fused into the transformer, for the same.
        reload_text_encoders: loads the text encoders again, so that they can be freed before
            denoising; None keeps them.
        text_encoder_names: those that are loaded, if not all, for the metadata.
    """

    def __init__(
        self,
        components: Components,
        model_width: str = "full",
        quantize: int | None = None,
        source: str | None = None,
        revision: str | None = None,
        loras: Sequence[tuple[str | Path, float]] = (),
        reload_text_encoders: Callable[[], list[Any]] | None = None,
        text_encoder_names: Sequence[str] | None = None,
    ):
        self.config = components.config
        self._prompts = PromptEncoder(components.text_encoders, reload_text_encoders)
        self._components = dataclasses.replace(components, text_encoders=[])
        self.transformer = components.transformer
        self.autoencoder = components.autoencoder
        self.text_encoder_names = text_encoder_names
        self.vocabulary = components.vocabulary
        self.model_width, self.quantize = model_width, quantize
        self.source, self.revision = source, revision
        self.loras = [(str(path), float(weight)) for path, weight in loras]
        self.dtype = self.transformer.dtype
        names = known_names(self.vocabulary)
        self._names = re.compile(rf"\b({'|'.join(map(re.escape, names))})\b") if names else None

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | Path | None = None,
        revision: str | None = None,
        model_width: str = "full",
        quantize: int | None = None,
        dtype: mx.Dtype | None = None,
        loras: Sequence[tuple[str | Path, float]] = (),
        text_encoders: Sequence[str] | None = None,
        keep_text_encoders: bool = False,
    ) -> "SnapGenPipeline":
        """Load a model; only the sub-network of `model_width` stays in memory.

        Args:
            path_or_repo: folder, Hugging Face repository "owner/name", or None for the default
                model.
            revision: branch, tag or commit of a repository.
            model_width: "full", "small" or "tiny".
            quantize: bits, 2 to 8, to quantize the transformer to in memory (see
                `weights.quantize_transformer`); None leaves it.
            dtype: see `weights.load_pretrained`.
            loras: (file, weight) of LoRAs, fused into the weights before width and quantization
                (see `lora_files.load_lora`).
            text_encoders: names of those to use, such as ["clip"]; None takes all the model has.
            keep_text_encoders: leave them in memory while denoising. Otherwise they are freed
                first, and loaded again for the next prompt that is not remembered.
        """
        width = parse_width(model_width)
        folder = find_model(path_or_repo, revision)
        check_width(load_config(folder), model_width)
        if path_or_repo is not None and not Path(path_or_repo).expanduser().is_dir():
            revision = folder.name  # the commit that a branch or tag stands for now
        for path, _ in loras:
            read_lora(path)  # a missing file is found before the model is loaded
        kept = None if loras else width
        packed = not loras and quantize is None
        components = load_pretrained(folder, None, dtype, kept, True, text_encoders, packed)
        reload = None
        if not keep_text_encoders:
            reload = functools.partial(
                load_text_encoders, folder, components.config, dtype, text_encoders
            )
        if loras:
            components = _with_loras(components, loras, width)
        if quantize is not None:
            quantize_transformer(components.transformer, quantize)
        source = None if path_or_repo is None else str(path_or_repo)
        return cls(
            components, model_width, quantize, source, revision, loras, reload, text_encoders
        )

    @property
    def text_encoders(self) -> list[Any]:
        """The text encoders, None for one left out; loaded again if they were freed."""
        return self._prompts.encoders

    @property
    def components(self) -> Components:
        """The model, with its text encoders."""
        return dataclasses.replace(self._components, text_encoders=self.text_encoders)

    def save_pretrained(self, folder: str | Path, quantize: Quantization | None = None) -> None:
        """Write the model, at its one width, as a folder (see `weights.save_pretrained`)."""
        if self.quantize is not None:
            raise UserError(
                "this pipeline is quantized in memory: load it without, then save it with "
                f'quantize={{"transformer": {{"bits": {self.quantize}, "group_size": 32}}}}'
            )
        save_pretrained(folder, self.components, quantize)

    def __call__(
        self,
        prompt: str,
        *,
        negative_prompt: str = "",
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        few_step: bool | None = None,
        attention_modulation: bool = False,
        seed: int | None = 0,
        num_images: int = 1,
        callback: Callable[[GenerationStep], None] | None = None,
    ) -> list[Image.Image]:
        """Draw a prompt.

        Args:
            prompt: what to draw.
            negative_prompt: what guidance leads away from; needs a guidance scale other than 1.
            height, width: pixels; None takes the model's own size.
            num_inference_steps: None takes the model's own.
            guidance_scale: 1 is no guidance and half the work; None takes the model's own.
            few_step: whether to use the model's few-step mode; None leaves it to the number of
                steps (see `ModelConfig.sampler_for`).
            attention_modulation: EDT's: some blocks look harder at what is near them.
            seed: of the first picture; picture k is the one that seed + k draws alone. None takes
                a random seed.
            num_images: how many, drawn one after the other.
            callback: called after each step.

        Returns:
            RGB pictures.

        Raises:
            UserError: an impossible argument, or numbers that stop being finite.
        """
        settings = {
            "negative_prompt": negative_prompt,
            "height": height,
            "width": width,
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "few_step": few_step,
            "attention_modulation": attention_modulation,
            "seed": seed,
            "num_images": num_images,
        }
        pictures = []
        for step in self.generate(prompt, **settings):
            if callback is not None:
                callback(step)
            if step.final:
                pictures.append(step.preview())
        return pictures

    def generate(
        self,
        prompt: str,
        *,
        negative_prompt: str = "",
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        few_step: bool | None = None,
        attention_modulation: bool = False,
        seed: int | None = 0,
        num_images: int = 1,
    ) -> Iterator[GenerationStep]:
        """Draw a prompt, yielding after every step; stop iterating to cancel.

        Arguments are those of `__call__` and are checked at once. Warns with `PromptWarning` about
        a prompt that is too long or holds no word the model knows.
        """
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError("the prompt is empty: say what to draw")
        defaults = self.config.sampler_for(num_inference_steps, few_step)
        height = self.config.image_size[0] if height is None else height
        width = self.config.image_size[1] if width is None else width
        check_size(self.config, height, width)
        steps = defaults.num_inference_steps if num_inference_steps is None else num_inference_steps
        scale = defaults.guidance_scale if guidance_scale is None else guidance_scale
        steps = whole_number("num_inference_steps", steps, 1, MAX_STEPS)
        if not math.isfinite(scale):
            raise UserError(f"guidance_scale must be a finite number, got {scale}")
        num_images = whole_number("num_images", num_images, 1)
        seed = random_seed() if seed is None else seed
        seed = whole_number("seed", seed, 0, MAX_SEED - num_images + 1)
        self._warn_about(prompt, negative_prompt, scale)
        metadata = self.describe() | {
            "prompt": prompt,
            "negative_prompt": negative_prompt,
            "height": height,
            "width": width,
            "num_inference_steps": steps,
            "guidance_scale": scale,
            "few_step": self.config.few_step is not None and defaults is self.config.few_step,
            "time_shift": defaults.time_shift,
            "attention_modulation": attention_modulation,
        }
        return self._steps(metadata, defaults, seed, num_images)

    def describe(self) -> dict[str, Any]:
        """The part of a picture's metadata that all pictures of this pipeline share."""
        return {
            "mlx_snapgen": __version__,
            "mlx": mx.__version__,
            "device": mx.default_device().type.name,
            "model": self.source,
            "revision": self.revision,
            "model_name": self.config.name,
            "model_width": self.model_width,
            "quantize": self.quantize,
            "loras": [{"path": path, "weight": weight} for path, weight in self.loras],
            "text_encoders": self.text_encoder_names and list(self.text_encoder_names),
            "dtype": str(self.dtype).removeprefix("mlx.core."),
        }

    def _steps(
        self, metadata: dict[str, Any], sampler: SamplerConfig, seed: int, num_images: int
    ) -> Iterator[GenerationStep]:
        steps, scale = metadata["num_inference_steps"], metadata["guidance_scale"]
        schedule = get_schedule(steps, sampler.time_shift)
        prompts = [metadata["prompt"]]
        if scale != 1:
            prompts.insert(0, metadata["negative_prompt"])
        text, mask = self._prompts(prompts, self.transformer)
        mx.eval(text, mask)
        self._prompts.free()

        network = self.transformer
        if self.config.few_step is not None:
            network = switched(network, {FEW_STEP: float(metadata["few_step"])})
        local = metadata["attention_modulation"]
        velocity = guided_velocity(network, text, mask, scale, modulate_attention=local)
        factor = self.autoencoder.config.downsampling
        shape = metadata["height"] // factor, metadata["width"] // factor
        shape = *shape, self.autoencoder.config.latent_channels
        for k in range(num_images):
            draw = functools.partial(get_noise, seed + k, *shape)
            for step in denoise(velocity, draw(0), schedule, draw if sampler.fresh_noise else None):
                if not mx.isfinite(step.x_t).all().item():
                    raise UserError(
                        f"latents are not finite at step {step.index + 1} of {steps} (seed "
                        f"{seed + k}): the weights are damaged, or {metadata['dtype']} or a "
                        f"guidance scale of {scale:g} is too much for them"
                    )
                yield GenerationStep(
                    image=k,
                    seed=seed + k,
                    index=step.index,
                    num_steps=steps,
                    sigma=schedule[step.index],
                    x0=step.x_t if step.index == steps - 1 else step.x0,
                    decode=self.decode,
                    metadata=metadata | {"seed": seed + k},
                )

    def decode(self, latents: mx.array) -> Image.Image:
        """Latents (1, h, w, C) -> RGB picture of 8h x 8w pixels."""
        x = self.autoencoder.decode(latents.astype(mx.float32))[0]
        if not mx.isfinite(x).all().item():
            raise UserError("the decoded picture is not finite: the autoencoder is damaged")
        pixels = mx.round((mx.clip(x, -1, 1) + 1) * 127.5).astype(mx.uint8)
        return Image.fromarray(np.array(pixels))

    def _warn_about(self, prompt: str, negative_prompt: str, scale: float) -> None:
        """Say what of the prompts will not be seen in the picture."""

        def warn(message: str) -> None:
            warnings.warn(message, PromptWarning, stacklevel=4)

        if scale == 1 and negative_prompt.strip():
            warn("the negative prompt has no effect at a guidance scale of 1")
        for what, text in (("prompt", prompt), ("negative prompt", negative_prompt)):
            for tokenizer in self._prompts.tokenizers:
                if tokenizer is None:
                    continue
                if cut := tokenizer.cut(text):
                    warn(f"the {what} is longer than {tokenizer.max_length} tokens, cut: '{cut}'")
                if unknown := tokenizer.unknown(text):
                    warn(f"the {what} has parts that mean nothing here: {' '.join(unknown)}")
        if self._names and not self._names.search(normalise(prompt)):
            nouns = ", ".join(self.vocabulary["nouns"][:5])
            warn(f"the prompt names nothing that this model can draw (such as {nouns})")


def _with_loras(
    components: Components, loras: Sequence[tuple[str | Path, float]], width: float
) -> Components:
    """`components` with LoRAs fused into the transformer, of which one width is kept."""
    transformer = components.transformer
    for i, (path, weight) in enumerate(loras):
        load_lora(path, transformer, weight, f"lora_{i}", components.config.name)
    fuse_lora(transformer)
    remove_lora(transformer, [f"lora_{i}" for i in range(len(loras))])
    if len(transformer.config.widths) > 1:
        transformer = extract(transformer, width)
        # A slice would otherwise keep the whole tensor it was cut from.
        mx.eval(transformer.apply(mx.contiguous).parameters())
    config = dataclasses.replace(components.config, transformer=transformer.config)
    return dataclasses.replace(components, config=config, transformer=transformer)


def known_names(vocabulary: dict[str, list[str]] | None) -> list[str]:
    """All names of things that a model can draw: its nouns, their plurals and synonyms."""
    vocabulary = vocabulary or {}
    return [
        normalise(word)
        for category in ("nouns", "other_words")
        for word in vocabulary.get(category, [])
    ]
