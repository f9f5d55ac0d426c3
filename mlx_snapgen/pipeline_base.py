"""What drawing is for every kind of model: settings and pictures in, a step at a time out."""

import contextlib
import dataclasses
import itertools
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_snapgen._version import __version__
from mlx_snapgen.alpha import straight
from mlx_snapgen.draw import decode_together
from mlx_snapgen.errors import UserError
from mlx_snapgen.inputs import Inputs, read_inputs
from mlx_snapgen.metadata import record_choice, record_settings
from mlx_snapgen.networks.autoencoders.base import Autoencoder
from mlx_snapgen.networks.autoencoders.colors import fit_colors, has_fast_decoder, rough_picture
from mlx_snapgen.pictures import from_uint8, to_uint8
from mlx_snapgen.prompt_check import PromptWarning
from mlx_snapgen.sampling import Start, Step
from mlx_snapgen.settings import DrawSettings, ModelChoice


class PictureWarning(UserWarning):
    """A picture to start from had to be changed."""


@dataclass(frozen=True)
class Given:
    """The pictures that a drawing starts from, as latents."""

    start: Start | None = None
    references: tuple[mx.array, ...] = ()
    """Pictures to edit (1, h, w, C), of any size."""


@dataclass(frozen=True)
class GenerationStep:
    """One step of one picture, as `Pipeline.generate` yields it."""

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
    rough: Callable[[mx.array], Image.Image] | None = None
    """`decode` for previews, if the decoder is slow."""
    batch: range = range(1)
    """Indices of the pictures that are drawn together with this one, which take turns."""

    @property
    def final(self) -> bool:
        """Whether `x0` is the finished picture."""
        return self.index == self.num_steps - 1

    def preview(self) -> Image.Image:
        """The picture as this step estimates it; decoded at each call.

        With a slow decoder it is rough before the last step; `decode` is exact. A finished picture
        that is all transparent gets a warning.
        """
        image = (self.decode if self.final or self.rough is None else self.rough)(self.x0)
        if self.final and image.mode == "RGBA" and not image.getchannel("A").getbbox():
            text = "the picture is empty: try another seed, or other words"
            warnings.warn(PromptWarning(text, self.metadata["prompt"]), stacklevel=2)
        return image


@dataclass(frozen=True)
class _Drawing:
    """A picture to draw."""

    image: int
    seed: int
    settings: DrawSettings
    """Resolved."""
    inputs: Inputs


def _drawings(resolved: Iterable[tuple[DrawSettings, Inputs]]) -> Iterator[_Drawing]:
    """The pictures to draw with resolved settings, one after another."""
    numbers = itertools.count()
    for settings, inputs in resolved:
        assert settings.seed is not None
        for k in range(settings.num_images):
            seed = settings.seed + k
            yield _Drawing(next(numbers), seed, settings=settings, inputs=inputs)


@contextlib.contextmanager
def no_cache() -> Iterator[None]:
    """Return all memory that MLX frees in this context to the system."""
    before = mx.set_cache_limit(0)
    try:
        yield
    finally:
        mx.set_cache_limit(before)


def _picture(decoded: mx.array) -> Image.Image:
    """The RGB or RGBA picture of a decoder's output (1, H, W, C)."""
    return Image.fromarray(straight(to_uint8(decoded[0])))


class _Finished:
    """Latents -> picture, for the latents of a finished batch: some at once, from any thread.

    Args:
        latents: (1, h, w, C) of each picture, evaluated.
        otherwise: decodes other latents.
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        latents: list[mx.array],
        *,
        otherwise: Callable[[mx.array], Image.Image],
    ):
        self._autoencoder, self._latents, self._otherwise = autoencoder, latents, otherwise
        self._pictures: dict[int, Image.Image] = {}
        """Of those that were decoded last, by their place in the batch."""
        self._lock = threading.Lock()

    def __call__(self, latents: mx.array) -> Image.Image:
        place = next((k for k, one in enumerate(self._latents) if one is latents), None)
        if place is None:
            return self._otherwise(latents)
        with self._lock:
            if place not in self._pictures:
                rest = [one.astype(mx.float32) for one in self._latents[place:]]
                decoded = decode_together(self._autoencoder, rest)
                self._pictures = {place + k: _picture(x) for k, x in enumerate(decoded)}
            return self._pictures[place].copy()


class Pipeline(ABC):
    """A model of any kind, ready to draw. `SnapGenPipeline.from_pretrained` loads one.

    Args:
        config: a `Description`.
        choice: how the model was loaded, for the pictures' metadata.
        dtype: floating type of the network, for the metadata.
    """

    vocabulary: dict[str, Any] | None = None
    """The words that a model of a few words understands, by kind."""

    def __init__(
        self, config: Any, choice: ModelChoice, *, autoencoder: Autoencoder, dtype: mx.Dtype
    ):
        self.config, self.choice = config, choice
        self.autoencoder, self.dtype = autoencoder, dtype
        self._colors: mx.array | None = None

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
            RGB pictures; of a model with alpha, RGBA.

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

        Pictures are drawn in batches of `DrawSettings.batch_size`: the first step of all pictures
        of a batch, then the second one of all. On the CPU a picture does not depend on its batch;
        elsewhere, the difference is at most one level of 255.

        Arguments are those of `__call__` and are checked at once. Warns with `PromptWarning` about
        a prompt that is too long (for a public model only when it is encoded) or has words that the
        model does not understand (see `check_prompts`), and about a size that the model was not
        trained on, and with `PictureWarning` about changes of the pictures to start from, which
        are also read at once.
        """
        if not isinstance(prompt, DrawSettings):
            prompt = DrawSettings(prompt)
        resolved = self._resolve(dataclasses.replace(prompt, **settings), alone=True)
        return self._steps([resolved])

    def generate_prompts(
        self, prompts: Iterable[str], settings: DrawSettings
    ) -> Iterator[GenerationStep]:
        """Draw `num_images` pictures of each prompt; a batch may have several prompts.

        As `generate`, but a prompt is read and checked when its batch is drawn. If that fails, the
        pictures before it are drawn first.
        """
        wanted = (dataclasses.replace(settings, prompt=prompt) for prompt in prompts)
        return self._steps(map(self._resolve, wanted))

    def _resolve(self, wanted: DrawSettings, *, alone: bool = False) -> tuple[DrawSettings, Inputs]:
        """Checked settings, with their batch size, and the pictures to start from.

        Args:
            alone: no other prompt's pictures are in a batch with these.
        """
        # Without words, a picture to start from is varied.
        if not isinstance(wanted.prompt, str) or not (wanted.prompt.strip() or wanted.image):
            raise UserError("the prompt is empty: say what to draw")
        resolved = wanted.resolved(self.config)
        for what in ("height", "width"):
            asked, drawn = getattr(wanted, what), getattr(resolved, what)
            if asked not in (None, drawn):
                warnings.warn(
                    f"drawn at {resolved.width} x {resolved.height}, the nearest size that this "
                    "model was trained on; --force-size draws any size, badly",
                    stacklevel=3,
                )
                break
        count = self._batch_size(resolved)
        count = min(count, resolved.num_images) if alone else count
        resolved = dataclasses.replace(resolved, batch_size=count)
        self._check(resolved)
        inputs = read_inputs(resolved, unit=self.config.size_unit, keep_alpha=self._has_alpha)
        for text in inputs.notices:
            warnings.warn(text, PictureWarning, stacklevel=3)
        return resolved, inputs

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

    @property
    def _has_alpha(self) -> bool:
        return self.autoencoder.config.picture_channels == 4

    def decode(self, latents: mx.array) -> Image.Image:
        """Latents (1, h, w, C) -> RGB or RGBA picture; see `AutoencoderConfig.downsampling`."""
        return _picture(self.autoencoder.decode(latents.astype(mx.float32)))

    @abstractmethod
    def _check(self, settings: DrawSettings) -> None:
        """Check memory and warn about prompts, before anything is computed."""

    def _batch_size(self, settings: DrawSettings) -> int:
        """Pictures to draw at a time, if there are so many."""
        return 1

    @abstractmethod
    def _encode(self, settings: list[DrawSettings]) -> Any:
        """The text of a batch, one settings for each picture, that `_denoise` takes.

        The text encoders are freed if they can be loaded again.
        """

    def _encoding_notes(self, settings: DrawSettings) -> Iterator[str]:
        """Lines about the prompts of a picture that only their encoding shows."""
        yield from ()

    @abstractmethod
    def _denoise(
        self, text: Any, settings: DrawSettings, *, seeds: list[int], given: Given
    ) -> Iterator[Step]:
        """A picture for each seed, from `_encode`'s text and `_encode_pictures`."""

    def _translate(self, prompt: str) -> str:
        """`prompt` in the words that the model was trained on."""
        return prompt

    def _encoder(self) -> Autoencoder:
        """The autoencoder for pictures to start from."""
        return self.autoencoder

    def _steps(self, resolved: Iterable[tuple[DrawSettings, Inputs]]) -> Iterator[GenerationStep]:
        with no_cache() if self.choice.low_memory else contextlib.nullcontext():
            inputs, given = None, Given()
            for batch in self._batches(_drawings(resolved)):
                first = batch[0]
                if first.inputs is not inputs:
                    inputs = first.inputs
                    given = self._encode_pictures(first.settings, inputs)
                yield from self._draw(batch, given)

    def _batches(self, drawings: Iterable[_Drawing]) -> Iterator[list[_Drawing]]:
        batch: list[_Drawing] = []
        size = None
        try:
            for drawing in drawings:
                size = size or drawing.settings.batch_size
                batch.append(drawing)
                if len(batch) == size:
                    yield batch
                    batch = []
        except UserError:
            if batch:
                yield batch
            raise
        if batch:
            yield batch

    def _draw(self, batch: list[_Drawing], given: Given) -> Iterator[GenerationStep]:
        encoded = [
            dataclasses.replace(
                drawing.settings,
                prompt=self._translate(drawing.settings.prompt),
                negative_prompt=self._translate(drawing.settings.negative_prompt),
            )
            for drawing in batch
        ]
        text, settings = self._encode(encoded), batch[0].settings
        for drawing, one in zip(batch, encoded, strict=True):
            # Once for all pictures of a prompt.
            if drawing.seed == drawing.settings.seed:
                for line in self._encoding_notes(one):
                    warnings.warn(PromptWarning(line, one.prompt), stacklevel=3)
        metadata = self._metadata(batch, encoded)
        images = range(batch[0].image, batch[-1].image + 1)
        is_slow = not has_fast_decoder(self.autoencoder.config)
        seeds = [drawing.seed for drawing in batch]
        for step in self._denoise(text, settings, seeds=seeds, given=given):
            latents = (step.x_t if step.final else step.x0).split(len(batch))
            mx.eval(latents)  # Another thread may decode them.
            decode = self.decode
            if step.final and len(batch) > 1:
                decode = _Finished(self.autoencoder, latents, otherwise=decode)
            for k, drawing in enumerate(batch):
                x_t = step.x_t[k : k + 1]
                if not mx.isfinite(x_t).all().item():
                    lora = " or a LoRA's weight" if self.choice.loras else ""
                    others = f"; the {len(batch)} pictures of its batch are lost"
                    raise UserError(
                        f"latents are not finite at step {step.index + 1} of {step.num_steps} "
                        f"(seed {drawing.seed}): the weights are damaged, or "
                        f"{metadata[k]['dtype']} or a guidance scale of "
                        f"{settings.guidance_scale:g}{lora} is too much for them"
                        + (others if len(batch) > 1 else "")
                    )
                over = drawing.inputs.over
                yield GenerationStep(
                    image=drawing.image,
                    seed=drawing.seed,
                    index=step.index,
                    num_steps=step.num_steps,
                    sigma=step.sigma,
                    x0=latents[k],
                    decode=lambda latents, over=over, decode=decode: over(decode(latents)),
                    metadata=metadata[k],
                    rough=(lambda x, over=over: over(self._rough(x))) if is_slow else None,
                    batch=images,
                )

    def _metadata(self, batch: list[_Drawing], encoded: list[DrawSettings]) -> list[dict[str, Any]]:
        """Everything that is needed to reproduce each picture of a batch."""
        common, found = self.describe(), []
        for drawing, one in zip(batch, encoded, strict=True):
            found.append(common | record_settings(drawing.settings) | {"seed": drawing.seed})
            if one.prompt != drawing.settings.prompt:
                found[-1]["encoded_prompt"] = one.prompt
        return found

    def _encode_pictures(self, settings: DrawSettings, inputs: Inputs) -> Given:
        """The latents of the pictures that `_denoise` starts from."""
        pictures = [*([] if inputs.image is None else [inputs.image]), *inputs.references]
        if not pictures:
            return Given()
        encoder, latents = self._encoder(), []
        for picture in pictures:
            if self._has_alpha:
                # Colors times alpha, as in training.
                picture = picture.convert("RGBA").convert("RGBa")
            pixels = from_uint8(np.array(picture)[None])
            latents.append(encoder.encode(pixels, in_tiles=True))
            mx.eval(latents)
        mx.clear_cache()
        if inputs.image is None:
            return Given(references=tuple(latents))
        x0, *references = latents
        assert settings.strength is not None
        mask = inputs.latent_mask(encoder.config.downsampling)
        if mask is not None and self.config.abilities().edit:
            # As in diffusers' Flux2KleinInpaintPipeline.
            references = latents
        return Given(Start(x0, settings.strength, redrawn=mask), references=tuple(references))

    def _rough(self, latents: mx.array) -> Image.Image:
        """`decode` without the decoder."""
        if self._colors is None:
            self._colors = fit_colors(self._encoder())
        [small] = to_uint8(rough_picture(latents, self._colors, self.autoencoder))
        factor, (height, width, _) = self.autoencoder.config.downsampling, small.shape
        size = factor * width, factor * height
        return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)
