"""Text to picture with a public model: `PublicPipeline`."""

import warnings
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
from PIL import Image

from mlx_snapgen.checkpoint.module import Quantization, on_device
from mlx_snapgen.errors import UserError
from mlx_snapgen.lora.files import load_lora
from mlx_snapgen.networks.autoencoders.base import Autoencoder
from mlx_snapgen.networks.layers import flat_parameters
from mlx_snapgen.networks.text_encoders.base import Prompt
from mlx_snapgen.pipeline_base import Given, Pipeline
from mlx_snapgen.prompt_check import PromptWarning, check_prompts, too_long
from mlx_snapgen.sampling import Step
from mlx_snapgen.settings import DrawSettings, ModelChoice
from mlx_snapgen.teachers.base import Condition
from mlx_snapgen.teachers.draw import denoise_public
from mlx_snapgen.teachers.folder import (
    PROMPT_FORMATS,
    TeacherFolder,
    load_flow_teacher,
    load_networks,
    load_prompts,
    load_teacher_autoencoder,
)
from mlx_snapgen.teachers.memory import check_memory

CACHED_PROMPTS = 32


class _Text(NamedTuple):
    """An encoded prompt."""

    states: mx.array
    mask: mx.array
    cut: str
    """Its end, if that is ignored."""


class PublicPipeline(Pipeline):
    """A public model ready to draw.

    The text encoder is freed after encoding and loaded again for the next prompt that is not in the
    cache. The transformer is read when the first picture starts.

    Args:
        folder: the model.
        choice: how it was loaded, for the pictures' metadata.
        dtype: see `load_flow_teacher`.
    """

    def __init__(
        self, folder: TeacherFolder, choice: ModelChoice, *, dtype: mx.Dtype | None = None
    ):
        self._folder, self._dtype = folder, on_device(dtype)
        self.teacher, autoencoder = load_flow_teacher(folder.path, lazy=True, dtype=dtype)
        values = flat_parameters(self.teacher.network).values()
        found = next(value.dtype for value in values if mx.issubdtype(value.dtype, mx.floating))
        super().__init__(folder.config, choice, autoencoder=autoencoder, dtype=found)
        self._add_loras()
        self._texts: OrderedDict[Prompt, _Text] = OrderedDict()

    def save_pretrained(self, folder: str | Path, quantize: Quantization | None = None) -> None:
        """Not for a public model, which `convert.teacher` writes."""
        raise UserError(f"{self.config.name} is a public model: convert it with convert.teacher")

    def decode(self, latents: mx.array) -> Image.Image:
        """See `Pipeline.decode`; first frees what the transformer left in MLX's cache."""
        mx.clear_cache()
        return super().decode(latents)

    def _check(self, settings: DrawSettings) -> None:
        check_memory(self._folder, self.choice, settings=settings)
        for text in check_prompts(settings, (), vocabulary=None):
            warnings.warn(PromptWarning(text, settings.prompt), stacklevel=4)

    def _encode(self, settings: list[DrawSettings]) -> Condition:
        [one] = settings
        text, *away = (self._text(prompt) for prompt in self._prompts(one).values())
        [away] = away or [text]
        while len(self._texts) > CACHED_PROMPTS:
            self._texts.popitem(last=False)
        if not self.choice.keep_text_encoders:
            self.teacher.free_text_encoder()
        return Condition(text.states, text.mask, away.states, away.mask)

    def _prompts(self, settings: DrawSettings) -> dict[str, Prompt]:
        """The prompts that are encoded."""
        prompts: dict[str, Prompt] = {"prompt": settings.prompt}
        if settings.guidance_scale != 1:
            prompt_format = PROMPT_FORMATS[self.config.kind]
            prompts["negative prompt"] = prompt_format.unconditional(settings.negative_prompt)
        return prompts

    def _encoding_notes(self, settings: DrawSettings) -> Iterator[str]:
        most = PROMPT_FORMATS[self.config.kind].max_length
        for what, prompt in self._prompts(settings).items():
            if cut := self._texts[prompt].cut:
                yield too_long(what, cut, max_length=most)

    def _text(self, prompt: Prompt) -> _Text:
        if prompt not in self._texts:
            if self.teacher.prompts is None:
                self.teacher.prompts = load_prompts(
                    self._folder.path, self.config, dtype=self._dtype
                )
            states, mask = self.teacher.prompts([prompt])
            self._texts[prompt] = _Text(states, mask, self.teacher.prompts.cut(prompt or ""))
        self._texts.move_to_end(prompt)
        return self._texts[prompt]

    def _encoder(self) -> Autoencoder:
        # A copy that is freed after use: `self.autoencoder` never reads its encoder's weights.
        return load_teacher_autoencoder(self._folder.path, self.config)

    def _add_loras(self) -> None:
        """Add the LoRAs to the networks; they are not merged, which would quantize again."""
        for network in filter(None, (self.teacher.network, self.teacher.few_step_network)):
            for i, (path, weight) in enumerate(self.choice.loras):
                load_lora(path, network, weight=weight, name=f"lora_{i}")

    def _denoise(
        self, text: Condition, settings: DrawSettings, *, seeds: list[int], given: Given
    ) -> Iterator[Step]:
        if self.teacher.network is None:
            self.teacher.network, self.teacher.few_step_network = load_networks(
                self._folder.path, self.config, dtype=self._dtype
            )
            self._add_loras()
        steps = denoise_public(
            self.teacher,
            text,
            seeds=seeds,
            settings=settings,
            references=given.references,
            start=given.start,
        )
        for step in steps:
            if step.final and self.choice.low_memory:
                self.teacher.free_networks()
            yield step
