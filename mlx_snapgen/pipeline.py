"""Text to picture: `SnapGenPipeline`."""

import contextlib
import dataclasses
import functools
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_snapgen._version import __version__
from mlx_snapgen.checkpoint.config import ModelFolder
from mlx_snapgen.checkpoint.memory import check_memory as check_model_memory
from mlx_snapgen.checkpoint.model import (
    Components,
    load_pretrained,
    load_text_encoders,
    save_pretrained,
)
from mlx_snapgen.checkpoint.module import Quantization, on_device
from mlx_snapgen.checkpoint.text_encoders import PromptEncoder
from mlx_snapgen.draw import Inputs, denoise_latents, encode_for, in_mode, read_inputs
from mlx_snapgen.errors import UserError, one_line
from mlx_snapgen.lora.adapters import fuse_lora, remove_lora
from mlx_snapgen.lora.files import load_lora, lora_words, read_lora
from mlx_snapgen.metadata import record_choice, record_settings
from mlx_snapgen.networks.autoencoders.base import Autoencoder
from mlx_snapgen.networks.autoencoders.colors import fit_colors, has_fast_decoder, rough_picture
from mlx_snapgen.networks.elastic import extract
from mlx_snapgen.networks.layers import flat_parameters
from mlx_snapgen.open_model import open_model
from mlx_snapgen.pictures import from_uint8, to_uint8
from mlx_snapgen.prompt_check import check_prompts
from mlx_snapgen.quantize.runtime import quantize_transformer
from mlx_snapgen.sampling import Start, Step, cut_schedule, denoise, get_noise, get_schedule
from mlx_snapgen.settings import DrawSettings, ModelChoice, check_choice
from mlx_snapgen.teachers.base import Condition
from mlx_snapgen.teachers.flow import shifted_levels
from mlx_snapgen.teachers.folder import (
    PROMPT_FORMATS,
    TeacherFolder,
    load_flow_teacher,
    load_networks,
    load_prompts,
    load_teacher_autoencoder,
)
from mlx_snapgen.teachers.memory import check_memory
from mlx_snapgen.vocabulary import translate


class PromptWarning(UserWarning):
    """The picture may not show everything that the prompt names.

    Args:
        problem: what the picture may not show.
        prompt: named in the message, so that Python also prints it for the next prompt.
    """

    def __init__(self, problem: str, prompt: str):
        super().__init__(f'"{one_line(prompt, 60)}": {problem}')
        self.problem = problem


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
        self.config: Any = components.config
        self.choice = choice or ModelChoice()
        self._prompts = PromptEncoder(components.text_encoders, reload_text_encoders)
        self._components = dataclasses.replace(components, text_encoders=[])
        self.transformer: Any = components.transformer
        self.autoencoder = components.autoencoder
        self.vocabulary = components.vocabulary
        # Of the merged LoRAs; None: any.
        self._lora_words: list[str] | None = []
        self.dtype = self.transformer.dtype
        self._colors: mx.array | None = None
        self._folder: Any = None

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | ModelChoice | None = None,
        *,
        folder: ModelFolder | TeacherFolder | None = None,
        dtype: mx.Dtype | None = None,
        **choice: Any,
    ) -> "SnapGenPipeline":
        """Load a model; only the sub-network of `model_width` stays in memory.

        Args:
            model: folder, Hugging Face repository "owner/name", None for the built-in model, or a
                whole `ModelChoice`. Public models are loaded as a `PublicPipeline`.
            folder: the open folder of `model`; None opens it.
            dtype: see `checkpoint.model.load_pretrained`.
            choice: fields of `ModelChoice`, such as `model_width="tiny"`.

        Raises:
            UserError: no such model, width, LoRA or text encoder, or damaged files.
        """
        if not isinstance(model, ModelChoice):
            model = ModelChoice(None if model is None else str(model))
        chosen = dataclasses.replace(model, **choice)
        folder = folder or open_model(chosen)
        # Record the commit that a branch or tag refers to now.
        chosen = dataclasses.replace(chosen, model=folder.source, revision=folder.revision)
        share = check_choice(folder.config, chosen).share
        if isinstance(folder, TeacherFolder):
            chosen = dataclasses.replace(chosen, quantize=folder.quantize)
            return PublicPipeline(folder, chosen, dtype=dtype)
        chosen = dataclasses.replace(chosen, quantize=chosen.quantize or None)
        check_model_memory(folder, chosen)
        # A missing file is found before the model is loaded.
        words = [lora_words(read_lora(path)[1]) for path, _ in chosen.loras]
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
        made = cls(components, chosen, reload_text_encoders=reload)
        made._folder = folder
        made._lora_words = None if None in words else [w for some in words for w in some or ()]
        return made

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
        inputs = read_inputs(resolved, unit=self.config.size_unit)
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

    def _check(self, settings: DrawSettings) -> None:
        """Check memory and warn about prompts, before anything is computed."""
        if isinstance(self._folder, ModelFolder):
            assert settings.height is not None and settings.width is not None
            size = {"height": settings.height, "width": settings.width}
            check_model_memory(self._folder, self.choice, **size)
        for text in check_prompts(
            settings,
            self._prompts.tokenizers,
            vocabulary=self.vocabulary,
            lora_words=self._lora_words,
        ):
            warnings.warn(PromptWarning(text, settings.prompt), stacklevel=3)

    def _steps(self, settings: DrawSettings, inputs: Inputs) -> Iterator[GenerationStep]:
        with no_cache() if self.choice.low_memory else contextlib.nullcontext():
            yield from self._all_steps(settings, inputs)

    def _all_steps(self, settings: DrawSettings, inputs: Inputs) -> Iterator[GenerationStep]:
        encoded = dataclasses.replace(
            settings,
            prompt=self._translate(settings.prompt),
            negative_prompt=self._translate(settings.negative_prompt),
        )
        text = self._encode(encoded)
        given = self._encode_pictures(settings, inputs)
        assert settings.seed is not None
        schedule = self._schedule(settings)
        if given.start is not None:
            schedule = cut_schedule(schedule, given.start.strength)
        steps, scale = len(schedule) - 1, settings.guidance_scale
        metadata = self.describe() | record_settings(settings)
        if encoded.prompt != settings.prompt:
            metadata["encoded_prompt"] = encoded.prompt
        for k in range(settings.num_images):
            seed = settings.seed + k
            for step in self._denoise(text, settings, seed=seed, given=given):
                if not mx.isfinite(step.x_t).all().item():
                    raise UserError(
                        f"latents are not finite at step {step.index + 1} of {steps} (seed "
                        f"{seed}): the weights are damaged, or {metadata['dtype']} or a "
                        f"guidance scale of {scale:g} is too much for them"
                    )
                if step.index == steps - 1:
                    self._free_network()
                is_slow = not has_fast_decoder(self.autoencoder.config)
                yield GenerationStep(
                    image=k,
                    seed=seed,
                    index=step.index,
                    num_steps=steps,
                    sigma=schedule[step.index],
                    x0=step.x_t if step.index == steps - 1 else step.x0,
                    decode=lambda latents: inputs.over(self.decode(latents)),
                    metadata=metadata | {"seed": seed},
                    rough=(lambda latents: inputs.over(self._rough(latents))) if is_slow else None,
                )

    def _translate(self, prompt: str) -> str:
        """`prompt` in the words that the model was trained on."""
        return translate(prompt, self.vocabulary, lora_words=self._lora_words)

    def _encode(self, settings: DrawSettings) -> Any:
        """The text that `_denoise` takes; the text encoders are freed if they can be loaded."""
        text, mask = encode_for(
            settings,
            [settings.prompt],
            config=self.config,
            encode=lambda prompts: self._prompts(prompts, self.transformer),
        )
        self._prompts.free()
        return text, mask

    def _encode_pictures(self, settings: DrawSettings, inputs: Inputs) -> Given:
        """The latents of the pictures that `_denoise` starts from."""
        pictures = [*([] if inputs.image is None else [inputs.image]), *inputs.references]
        if not pictures:
            return Given()
        encoder, latents = self._encoder(), []
        mode = "RGBA" if encoder.config.picture_channels == 4 else "RGB"
        for picture in pictures:
            pixels = from_uint8(np.array(picture.convert(mode))[None])
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

    def _encoder(self) -> Autoencoder:
        """The autoencoder for pictures to start from."""
        return self.autoencoder

    def _schedule(self, settings: DrawSettings) -> list[float]:
        """The noise levels of a picture that starts from noise."""
        assert settings.num_inference_steps is not None and settings.time_shift is not None
        return get_schedule(settings.num_inference_steps, settings.time_shift)

    def _denoise(
        self, text: Any, settings: DrawSettings, *, seed: int, given: Given
    ) -> Iterator[Step]:
        """One picture, from `_encode`'s text, `_encode_pictures`, and the noise of a seed."""
        network = in_mode(self.transformer, settings, config=self.config)
        yield from denoise_latents(
            network,
            *text,
            seeds=[seed],
            settings=settings,
            config=self.config,
            start=given.start,
        )

    def decode(self, latents: mx.array) -> Image.Image:
        """Latents (1, h, w, C) -> RGB picture; see `AutoencoderConfig.downsampling`."""
        x = self.autoencoder.decode(latents.astype(mx.float32))
        return Image.fromarray(to_uint8(x[0]))

    def _rough(self, latents: mx.array) -> Image.Image:
        """`decode` without the decoder."""
        if self._colors is None:
            self._colors = fit_colors(self._encoder())
        [small] = to_uint8(rough_picture(latents, self._colors, self.autoencoder))
        factor, (height, width, _) = self.autoencoder.config.downsampling, small.shape
        size = factor * width, factor * height
        return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)

    def _free_network(self) -> None:
        """Free what drawing needs no more when the last step is done, if memory is short."""


class PublicPipeline(SnapGenPipeline):
    """A public model ready to draw.

    The text encoder is freed after encoding and loaded again for the next prompt that is not in the
    cache. The transformer is read when the first picture starts.

    Args:
        folder: the model.
        choice: how it was loaded, for the pictures' metadata.
        dtype: see `load_flow_teacher`.
    """

    CACHED_PROMPTS = 32

    def __init__(
        self, folder: TeacherFolder, choice: ModelChoice, *, dtype: mx.Dtype | None = None
    ):
        self.config, self.choice = folder.config, choice
        self._dtype, self._folder = on_device(dtype), folder
        self.teacher, self.autoencoder = load_flow_teacher(folder.path, lazy=True, dtype=dtype)
        self._add_loras()
        self.transformer, self.vocabulary = self.teacher.network, None
        parameters = flat_parameters(self.transformer).values()
        self.dtype = next(p.dtype for p in parameters if mx.issubdtype(p.dtype, mx.floating))
        self._colors = None
        self._texts: OrderedDict[str, tuple[mx.array, mx.array]] = OrderedDict()

    @property
    def text_encoders(self) -> list[Any]:
        """The text encoder; loaded again if it was freed."""
        if self.teacher.prompts is None:
            self.teacher.prompts = load_prompts(
                self._folder.path, self._folder.config, dtype=self._dtype
            )
        return [self.teacher.prompts]

    @property
    def components(self) -> Components:
        """Not for a public model."""
        raise UserError(f"{self.config.name} is a public model: it has no components of this kind")

    def save_pretrained(self, folder: str | Path, quantize: Quantization | None = None) -> None:
        """Not for a public model, which `convert.teacher` writes."""
        raise UserError(f"{self.config.name} is a public model: convert it with convert.teacher")

    def _check(self, settings: DrawSettings) -> None:
        """`UserError` for a picture that needs more memory than this machine has."""
        check_memory(self._folder, settings, low_memory=self.choice.low_memory)

    def _encode(self, settings: DrawSettings) -> Condition:
        empty = PROMPT_FORMATS[self._folder.config.kind].empty
        text = away = self._text(settings.prompt or empty)
        if settings.guidance_scale != 1:
            away = self._text(settings.negative_prompt or empty)
        while len(self._texts) > self.CACHED_PROMPTS:
            self._texts.popitem(last=False)
        if not self.choice.keep_text_encoders:
            self.teacher.free_text_encoder()
        return Condition(*text, *away)

    def decode(self, latents: mx.array) -> Image.Image:
        """See `SnapGenPipeline.decode`; first frees what the transformer left in MLX's cache."""
        mx.clear_cache()
        return super().decode(latents)

    def _translate(self, prompt: str) -> str:
        return prompt

    def _text(self, prompt: str) -> tuple[mx.array, mx.array]:
        if prompt not in self._texts:
            [encoder] = self.text_encoders
            self._texts[prompt] = encoder([prompt])
        self._texts.move_to_end(prompt)
        return self._texts[prompt]

    def _schedule(self, settings: DrawSettings) -> list[float]:
        count, shift = settings.num_inference_steps, settings.time_shift
        assert count is not None and shift is not None
        mode = self._folder.config.sampler_for(count, settings.few_step)
        return shifted_levels(mode, count, time_shift=shift)

    def _encoder(self) -> Autoencoder:
        # A copy that is freed after use: `self.autoencoder` never reads its encoder's weights.
        return load_teacher_autoencoder(self._folder.path, self._folder.config)

    def _add_loras(self) -> None:
        """Add the LoRAs to the networks; they are not merged, which would quantize again."""
        for network in filter(None, (self.teacher.network, self.teacher.few_step_network)):
            for i, (path, weight) in enumerate(self.choice.loras):
                load_lora(path, network, weight=weight, name=f"lora_{i}")

    def _free_network(self) -> None:
        if self.choice.low_memory:
            self.transformer = None
            self.teacher.free_networks()

    def _denoise(
        self, text: Condition, settings: DrawSettings, *, seed: int, given: Given
    ) -> Iterator[Step]:
        if self.teacher.network is None:
            self.teacher.network, self.teacher.few_step_network = load_networks(
                self._folder.path, self._folder.config, dtype=self._dtype
            )
            self._add_loras()
            self.transformer = self.teacher.network
        assert settings.height is not None and settings.width is not None
        assert settings.guidance_scale is not None
        scale, few_step = settings.guidance_scale, bool(settings.few_step)
        autoencoder = self.autoencoder.config

        def velocity(x_t: mx.array, sigma: float) -> mx.array:
            v, _ = self.teacher.velocity_and_features(
                x_t,
                mx.full((1,), sigma),
                text,
                guidance_scale=scale,
                few_step=few_step,
                references=given.references,
            )
            return v

        h, w = (side // autoencoder.downsampling for side in (settings.height, settings.width))
        noise = get_noise(seed, h, w, autoencoder.latent_channels)
        yield from denoise(velocity, noise, self._schedule(settings), start=given.start)


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
