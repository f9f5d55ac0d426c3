"""Text to picture: `SnapGenPipeline`."""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from PIL import Image

from mlx_snapgen._version import __version__
from mlx_snapgen.checkpoint.config import ModelFolder
from mlx_snapgen.checkpoint.model import (
    Components,
    load_pretrained,
    load_text_encoders,
    save_pretrained,
)
from mlx_snapgen.checkpoint.module import Quantization
from mlx_snapgen.checkpoint.text_encoders import PromptEncoder
from mlx_snapgen.draw import denoise_latents, encode_for, in_mode
from mlx_snapgen.errors import UserError
from mlx_snapgen.lora.adapters import fuse_lora, remove_lora
from mlx_snapgen.lora.files import load_lora, read_lora
from mlx_snapgen.metadata import record_choice, record_settings
from mlx_snapgen.networks.elastic import extract
from mlx_snapgen.pictures import to_uint8
from mlx_snapgen.prompt_check import check_prompts
from mlx_snapgen.quantize.runtime import quantize_transformer
from mlx_snapgen.sampling import get_schedule
from mlx_snapgen.settings import DrawSettings, ModelChoice, check_width


class PromptWarning(UserWarning):
    """The picture may not show everything that the prompt names."""


@dataclass(frozen=True)
class GenerationStep:
    """One step of one picture, as `SnapGenPipeline.generate` yields it."""

    image: int
    """Index of the picture, from 0."""
    seed: int
    index: int
    """Index of the step, from 0."""
    num_steps: int
    sigma: float
    """Noise level at the start of the step, 1 to 0."""
    x0: mx.array
    """Estimate of the clean latents (1, h, w, C); the result at the last step."""
    decode: Callable[[mx.array], Image.Image]
    metadata: dict[str, Any]
    """Everything that is needed to reproduce the picture."""

    @property
    def final(self) -> bool:
        """Whether `x0` is the finished picture."""
        return self.index == self.num_steps - 1

    def preview(self) -> Image.Image:
        """The picture as this step estimates it; decoded at each call."""
        return self.decode(self.x0)


class SnapGenPipeline:
    """A model ready to draw.

    Args:
        components: the model; its transformer has one width.
        choice: how it was loaded, for the pictures' metadata.
        reload_text_encoders: loads the text encoders again, so that they can be freed before
            denoising; None keeps them.
    """

    def __init__(
        self,
        components: Components,
        choice: ModelChoice | None = None,
        *,
        reload_text_encoders: Callable[[], list[Any]] | None = None,
    ):
        self.config, self.choice = components.config, choice or ModelChoice()
        self._prompts = PromptEncoder(components.text_encoders, reload_text_encoders)
        self._components = dataclasses.replace(components, text_encoders=[])
        self.transformer = components.transformer
        self.autoencoder = components.autoencoder
        self.vocabulary = components.vocabulary
        self.dtype = self.transformer.dtype

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | ModelChoice | None = None,
        *,
        folder: ModelFolder | None = None,
        dtype: mx.Dtype | None = None,
        **choice: Any,
    ) -> "SnapGenPipeline":
        """Load a model; only the sub-network of `model_width` stays in memory.

        Args:
            model: folder, Hugging Face repository "owner/name", None for the built-in model, or a
                whole `ModelChoice`.
            folder: the open folder of `model`; None opens it.
            dtype: see `checkpoint.model.load_pretrained`.
            choice: fields of `ModelChoice`, such as `model_width="tiny"`.

        Raises:
            UserError: no such model, width, LoRA or text encoder, or damaged files.
        """
        if not isinstance(model, ModelChoice):
            model = ModelChoice(None if model is None else str(model))
        chosen = dataclasses.replace(model, **choice)
        folder = folder or ModelFolder.open(chosen.model, revision=chosen.revision)
        # Record the commit that a branch or tag refers to now.
        chosen = dataclasses.replace(chosen, model=folder.source, revision=folder.revision)
        share = check_width(folder.config, chosen.model_width).share
        for path, _ in chosen.loras:
            read_lora(path)  # a missing file is found before the model is loaded
        components = load_pretrained(
            folder,
            dtype=dtype,
            share=None if chosen.loras else share,
            few_step=True,
            text_encoders=chosen.text_encoders,
            packed=not chosen.loras and chosen.quantize is None,
        )
        reload = None
        if not chosen.keep_text_encoders:
            reload = functools.partial(
                load_text_encoders, folder, dtype=dtype, names=chosen.text_encoders
            )
        if chosen.loras:
            components = _with_loras(components, chosen.loras, share=share)
        if chosen.quantize is not None:
            quantize_transformer(components.transformer, chosen.quantize)
        return cls(components, chosen, reload_text_encoders=reload)

    @property
    def text_encoders(self) -> list[Any]:
        """The text encoders, None for an absent one; loaded again if they were freed."""
        return self._prompts.encoders

    @property
    def components(self) -> Components:
        """The model, with its text encoders."""
        return dataclasses.replace(self._components, text_encoders=self.text_encoders)

    def save_pretrained(self, folder: str | Path, quantize: Quantization | None = None) -> None:
        """Write the model, at its one width (see `checkpoint.model.save_pretrained`)."""
        if self.choice.quantize is not None:
            raise UserError(
                "this pipeline is quantized in memory: load it without, then save it with "
                f'quantize={{"transformer": {{"bits": {self.choice.quantize}, "group_size": 32}}}}'
            )
        save_pretrained(folder, self.components, quantize=quantize)

    def __call__(
        self,
        prompt: str | DrawSettings,
        *,
        callback: Callable[[GenerationStep], None] | None = None,
        **settings: Any,
    ) -> list[Image.Image]:
        """Draw a prompt.

        Args:
            prompt: what to draw, or a whole `DrawSettings`.
            callback: called after each step.
            settings: fields of `DrawSettings`, such as `seed=7`.

        Returns:
            RGB pictures.

        Raises:
            UserError: an invalid setting, or latents that are not finite.
        """
        pictures = []
        for step in self.generate(prompt, **settings):
            if callback is not None:
                callback(step)
            if step.final:
                pictures.append(step.preview())
        return pictures

    def generate(self, prompt: str | DrawSettings, **settings: Any) -> Iterator[GenerationStep]:
        """Draw a prompt, yielding after every step; stop iterating to cancel.

        Arguments are those of `__call__` and are checked at once. Warns with `PromptWarning` about
        a prompt that is too long or has no word of the model's vocabulary.
        """
        if not isinstance(prompt, DrawSettings):
            prompt = DrawSettings(prompt)
        wanted = dataclasses.replace(prompt, **settings)
        if not isinstance(wanted.prompt, str) or not wanted.prompt.strip():
            raise UserError("the prompt is empty: say what to draw")
        resolved = wanted.resolved(self.config)
        for text in check_prompts(resolved, self._prompts.tokenizers, vocabulary=self.vocabulary):
            warnings.warn(text, PromptWarning, stacklevel=2)
        return self._steps(resolved)

    def describe(self) -> dict[str, Any]:
        """The part of a picture's metadata that all pictures of this pipeline share."""
        return {
            "mlx_snapgen": __version__,
            "mlx": mx.__version__,  # pyright: ignore[reportAttributeAccessIssue]
            "device": mx.default_device().type.name,
            "dtype": str(self.dtype).removeprefix("mlx.core."),
            "model_name": self.config.name,
            **record_choice(self.choice),
        }

    def _steps(self, settings: DrawSettings) -> Iterator[GenerationStep]:
        text, mask = encode_for(
            settings,
            [settings.prompt],
            config=self.config,
            encode=lambda prompts: self._prompts(prompts, self.transformer),
        )
        self._prompts.free()
        network = in_mode(self.transformer, settings, config=self.config)
        assert settings.seed is not None and settings.time_shift is not None
        sampler = settings.sampler(self.config)
        steps, scale = sampler.num_inference_steps, sampler.guidance_scale
        schedule = get_schedule(steps, settings.time_shift)
        metadata = self.describe() | record_settings(settings)
        for k in range(settings.num_images):
            seed = settings.seed + k
            for step in denoise_latents(
                network, text, mask, seeds=[seed], settings=settings, config=self.config
            ):
                if not mx.isfinite(step.x_t).all().item():
                    raise UserError(
                        f"latents are not finite at step {step.index + 1} of {steps} (seed "
                        f"{seed}): the weights are damaged, or {metadata['dtype']} or a "
                        f"guidance scale of {scale:g} is too much for them"
                    )
                yield GenerationStep(
                    image=k,
                    seed=seed,
                    index=step.index,
                    num_steps=steps,
                    sigma=schedule[step.index],
                    x0=step.x_t if step.index == steps - 1 else step.x0,
                    decode=self.decode,
                    metadata=metadata | {"seed": seed},
                )

    def decode(self, latents: mx.array) -> Image.Image:
        """Latents (1, h, w, C) -> RGB picture of 8h x 8w pixels."""
        x = self.autoencoder.decode(latents.astype(mx.float32))
        return Image.fromarray(to_uint8(x[0]))


def _with_loras(
    components: Components, loras: tuple[tuple[str, float], ...], *, share: float
) -> Components:
    """`components` with LoRAs merged into the transformer, which is reduced to one width."""
    transformer = components.transformer
    for i, (path, weight) in enumerate(loras):
        load_lora(
            path,
            transformer,
            weight=weight,
            name=f"lora_{i}",
            base_model=components.config.name,
        )
    fuse_lora(transformer)
    remove_lora(transformer, [f"lora_{i}" for i in range(len(loras))])
    if len(transformer.config.widths) > 1:
        transformer = extract(transformer, share)
        # A slice would keep the whole original tensor in memory.
        mx.eval(transformer.apply(mx.contiguous).parameters())
    config = dataclasses.replace(components.config, transformer=transformer.config)
    return dataclasses.replace(components, config=config, transformer=transformer)
