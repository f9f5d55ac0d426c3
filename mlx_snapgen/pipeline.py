"""Text to picture: `SnapGenPipeline`."""

import dataclasses
import functools
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
from PIL import Image

from mlx_snapgen._version import __version__
from mlx_snapgen.checkpoint.config import load_config
from mlx_snapgen.checkpoint.hub import find_model
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
from mlx_snapgen.networks.elastic import extract
from mlx_snapgen.networks.text_encoders.base import normalize
from mlx_snapgen.pictures import to_uint8
from mlx_snapgen.quantize.runtime import quantize_transformer
from mlx_snapgen.sampling import get_schedule
from mlx_snapgen.settings import DrawSettings, check_width, parse_width


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
        share = parse_width(model_width).share
        folder = find_model(path_or_repo, revision=revision)
        check_width(load_config(folder), model_width)
        if path_or_repo is not None and not Path(path_or_repo).expanduser().is_dir():
            revision = folder.name  # the commit that a branch or tag stands for now
        for path, _ in loras:
            read_lora(path)  # a missing file is found before the model is loaded
        kept = None if loras else share
        packed = not loras and quantize is None
        components = load_pretrained(
            folder,
            dtype=dtype,
            share=kept,
            few_step=True,
            text_encoders=text_encoders,
            packed=packed,
        )
        reload = None
        if not keep_text_encoders:
            reload = functools.partial(load_text_encoders, folder, dtype=dtype, names=text_encoders)
        if loras:
            components = _with_loras(components, loras, share)
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
            prompt: what to draw, or settings as a whole.
            callback: called after each step.
            settings: fields of `DrawSettings`, such as `seed=7`.

        Returns:
            RGB pictures.

        Raises:
            UserError: an impossible setting, or numbers that stop being finite.
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
        a prompt that is too long or holds no word the model knows.
        """
        if not isinstance(prompt, DrawSettings):
            prompt = DrawSettings(prompt)
        asked = dataclasses.replace(prompt, **settings)
        if not isinstance(asked.prompt, str) or not asked.prompt.strip():
            raise UserError("the prompt is empty: say what to draw")
        resolved = asked.resolved(self.config)
        self._warn_about(resolved)
        return self._steps(resolved)

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

    def _steps(self, settings: DrawSettings) -> Iterator[GenerationStep]:
        text, mask = encode_for(
            settings, [settings.prompt], lambda prompts: self._prompts(prompts, self.transformer)
        )
        self._prompts.free()
        network = in_mode(self.transformer, settings, config=self.config)
        sampler = settings.sampler(self.config)
        steps, scale = sampler.num_inference_steps, sampler.guidance_scale
        schedule = get_schedule(steps, sampler.time_shift)
        recorded = dataclasses.asdict(settings)
        first, count = recorded.pop("seed"), recorded.pop("num_images")
        metadata = self.describe() | recorded
        for k, seed in enumerate(range(first, first + count)):
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

    def _warn_about(self, settings: DrawSettings) -> None:
        """Say what of the prompts will not be seen in the picture."""
        prompt, negative_prompt = settings.prompt, settings.negative_prompt

        def warn(message: str) -> None:
            warnings.warn(message, PromptWarning, stacklevel=4)

        if settings.guidance_scale == 1 and negative_prompt.strip():
            warn("the negative prompt has no effect at a guidance scale of 1")
        for what, text in (("prompt", prompt), ("negative prompt", negative_prompt)):
            for tokenizer in self._prompts.tokenizers:
                if tokenizer is None:
                    continue
                if cut := tokenizer.cut(text):
                    warn(f"the {what} is longer than {tokenizer.max_length} tokens, cut: '{cut}'")
                if unknown := tokenizer.unknown(text):
                    warn(f"the {what} has parts that mean nothing here: {' '.join(unknown)}")
        if self._names and not self._names.search(normalize(prompt)):
            nouns = ", ".join(self.vocabulary["nouns"][:5])
            warn(f"the prompt names nothing that this model can draw (such as {nouns})")


def _with_loras(
    components: Components, loras: Sequence[tuple[str | Path, float]], share: float
) -> Components:
    """`components` with LoRAs fused into the transformer, of which one width is kept."""
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
        # A slice would otherwise keep the whole tensor it was cut from.
        mx.eval(transformer.apply(mx.contiguous).parameters())
    config = dataclasses.replace(components.config, transformer=transformer.config)
    return dataclasses.replace(components, config=config, transformer=transformer)


def known_names(vocabulary: dict[str, list[str]] | None) -> list[str]:
    """All names of things that a model can draw: its nouns, their plurals and synonyms."""
    vocabulary = vocabulary or {}
    return [
        normalize(word)
        for category in ("nouns", "other_words")
        for word in vocabulary.get(category, [])
    ]
