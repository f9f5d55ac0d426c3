"""What drawing is for every kind of model: settings and pictures in, a step at a time out."""

import contextlib
import dataclasses
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_snapgen._version import __version__
from mlx_snapgen.alpha import straight
from mlx_snapgen.draw import Inputs, read_inputs
from mlx_snapgen.errors import UserError
from mlx_snapgen.metadata import record_choice, record_settings
from mlx_snapgen.networks.autoencoders.base import Autoencoder
from mlx_snapgen.networks.autoencoders.colors import fit_colors, has_fast_decoder, rough_picture
from mlx_snapgen.pictures import from_uint8, to_uint8
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

    @property
    def final(self) -> bool:
        """Whether `x0` is the finished picture."""
        return self.index == self.num_steps - 1

    def preview(self) -> Image.Image:
        """The picture as this step estimates it; decoded at each call.

        With a slow decoder it is rough before the last step; `decode` is exact.
        """
        return (self.decode if self.final or self.rough is None else self.rough)(self.x0)


@contextlib.contextmanager
def no_cache() -> Iterator[None]:
    """Return all memory that MLX frees in this context to the system."""
    before = mx.set_cache_limit(0)
    try:
        yield
    finally:
        mx.set_cache_limit(before)


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

        Arguments are those of `__call__` and are checked at once. Warns with `PromptWarning` about
        a prompt that is too long or has words that the model does not understand (see
        `check_prompts`), and about a size that the model was not trained on, and with
        `PictureWarning` about changes of the pictures to start from, which are also read at once.
        """
        if not isinstance(prompt, DrawSettings):
            prompt = DrawSettings(prompt)
        wanted = dataclasses.replace(prompt, **settings)
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
                    stacklevel=2,
                )
                break
        self._check(resolved)
        inputs = read_inputs(resolved, unit=self.config.size_unit, keep_alpha=self._has_alpha)
        for text in inputs.notices:
            warnings.warn(text, PictureWarning, stacklevel=2)
        return self._steps(resolved, inputs)

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
        x = self.autoencoder.decode(latents.astype(mx.float32))
        return Image.fromarray(straight(to_uint8(x[0])))

    @abstractmethod
    def _check(self, settings: DrawSettings) -> None:
        """Check memory and warn about prompts, before anything is computed."""

    @abstractmethod
    def _encode(self, settings: DrawSettings) -> Any:
        """The text that `_denoise` takes; the text encoders are freed if they can be loaded."""

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

    def _steps(self, settings: DrawSettings, inputs: Inputs) -> Iterator[GenerationStep]:
        with no_cache() if self.choice.low_memory else contextlib.nullcontext():
            encoded = dataclasses.replace(
                settings,
                prompt=self._translate(settings.prompt),
                negative_prompt=self._translate(settings.negative_prompt),
            )
            text = self._encode(encoded)
            given = self._encode_pictures(settings, inputs)
            metadata = self.describe() | record_settings(settings)
            if encoded.prompt != settings.prompt:
                metadata["encoded_prompt"] = encoded.prompt
            is_slow = not has_fast_decoder(self.autoencoder.config)
            assert settings.seed is not None
            for k in range(settings.num_images):
                seed = settings.seed + k
                for step in self._denoise(text, settings, seeds=[seed], given=given):
                    if not mx.isfinite(step.x_t).all().item():
                        raise UserError(
                            f"latents are not finite at step {step.index + 1} of {step.num_steps} "
                            f"(seed {seed}): the weights are damaged, or {metadata['dtype']} or a "
                            f"guidance scale of {settings.guidance_scale:g} is too much for them"
                        )
                    yield GenerationStep(
                        image=k,
                        seed=seed,
                        index=step.index,
                        num_steps=step.num_steps,
                        sigma=step.sigma,
                        x0=step.x_t if step.final else step.x0,
                        decode=lambda latents: inputs.over(self.decode(latents)),
                        metadata=metadata | {"seed": seed},
                        rough=(lambda x: inputs.over(self._rough(x))) if is_slow else None,
                    )

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
            latents.append(encoder.encode(pixels))
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
