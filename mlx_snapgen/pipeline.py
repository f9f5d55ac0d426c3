"""Text to picture: `SnapGenPipeline`."""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlx_snapgen._kernel_cache import make_private_cache
from mlx_snapgen.checkpoint.config import ModelFolder
from mlx_snapgen.checkpoint.memory import batch_size, check_memory, transformer_bytes
from mlx_snapgen.checkpoint.model import (
    Components,
    check_few_step_width,
    load_pretrained,
    load_text_encoders,
    save_pretrained,
    untrained_note,
)
from mlx_snapgen.checkpoint.module import Quantization
from mlx_snapgen.checkpoint.text_encoders import PromptEncoder
from mlx_snapgen.draw import batch_texts, denoise_latents, encode_for, in_mode
from mlx_snapgen.errors import UserError
from mlx_snapgen.lora.adapters import fuse_lora, remove_lora
from mlx_snapgen.lora.files import check_lora_width, load_lora, lora_words, read_lora
from mlx_snapgen.lora.things import read_thing
from mlx_snapgen.networks.elastic import extract
from mlx_snapgen.open_model import open_model
from mlx_snapgen.pipeline_base import Given, Pipeline
from mlx_snapgen.prompt_check import PromptWarning, check_prompts, understood
from mlx_snapgen.sampling import Step
from mlx_snapgen.settings import DrawSettings, ModelChoice, check_choice
from mlx_snapgen.vocabulary import with_thing

if TYPE_CHECKING:
    from mlx_snapgen.teachers.folder import TeacherFolder


class SnapGenPipeline(Pipeline):
    """A model of this project, ready to draw.

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
        self.transformer: Any = components.transformer
        super().__init__(
            components.config,
            choice or ModelChoice(),
            autoencoder=components.autoencoder,
            dtype=self.transformer.dtype,
        )
        self._prompts = PromptEncoder(components.text_encoders, reload_text_encoders)
        self._components = dataclasses.replace(components, text_encoders=[])
        self.vocabulary = components.vocabulary
        # Of the merged LoRAs; None: any.
        self._lora_words: list[str] | None = []
        self._folder: ModelFolder | None = None
        self._lora_notes: list[str | None] = []
        """On the LoRAs."""
        source = self.choice.model
        self._name = components.config.name if source is None else Path(source).resolve().name
        self._few_step_note = check_few_step_width(
            components, self.choice.model_width, model=self._name
        )
        self._untrained_note = untrained_note(components.transformer, self._name)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | ModelChoice | None = None,
        *,
        folder: "ModelFolder | TeacherFolder | None" = None,
        dtype: mx.Dtype | None = None,
        **choice: Any,
    ) -> Pipeline:
        """Load a model; only the sub-network of `model_width` stays in memory.

        On Linux, `TMPDIR` is then a private folder, see `make_private_cache`.

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
        make_private_cache()
        chosen = dataclasses.replace(model, **choice)
        folder = folder or open_model(chosen)
        # Record the commit that a branch or tag refers to now.
        chosen = dataclasses.replace(chosen, model=folder.source, revision=folder.revision)
        share = check_choice(folder.config, chosen).share
        if not isinstance(folder, ModelFolder):
            from mlx_snapgen.public_pipeline import PublicPipeline

            chosen = dataclasses.replace(chosen, quantize=folder.quantize)
            return PublicPipeline(folder, chosen, dtype=dtype)
        chosen = dataclasses.replace(chosen, quantize=chosen.quantize or None)
        check_memory(folder, chosen)
        # A missing file is found before the model is loaded.
        headers = [read_lora(path)[1] for path, _ in chosen.loras]
        words = [lora_words(header) for header in headers]
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
            from mlx_snapgen.quantize.runtime import quantize_transformer

            quantize_transformer(components.transformer, chosen.quantize)
        made = cls(components, chosen, reload_text_encoders=reload)
        made._folder = folder
        made._lora_notes = [
            check_lora_width(path, header.get("model_widths", ""), chosen.model_width)
            for (path, _), header in zip(chosen.loras, headers, strict=True)
        ]
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

    def _check(self, settings: DrawSettings) -> None:
        if self._folder is not None:
            assert settings.height is not None and settings.width is not None
            check_memory(
                self._folder,
                self.choice,
                height=settings.height,
                width=settings.width,
                pictures=settings.batch_size or 1,
                guided=settings.guidance_scale != 1,
            )
        for text in self._general_notes(settings):
            warnings.warn(text, stacklevel=4)
        for text in check_prompts(
            settings,
            self._prompts.tokenizers,
            vocabulary=self.vocabulary,
            lora_words=self._lora_words,
        ):
            warnings.warn(PromptWarning(text, settings.prompt), stacklevel=4)

    def _general_notes(self, settings: DrawSettings) -> Iterator[str]:
        """Why the pictures of any prompt may be bad."""
        yield from filter(None, [self._untrained_note, *self._lora_notes])
        if settings.few_step and (text := self._few_step_note):
            yield text

    def _translate(self, prompt: str) -> str:
        return understood(prompt, self.vocabulary, lora_words=self._lora_words)

    def _batch_size(self, settings: DrawSettings) -> int:
        weights = 0 if self._folder is None else transformer_bytes(self._folder, self.choice)
        return batch_size(settings, self.choice, transformer=weights)

    def _encode(self, settings: list[DrawSettings]) -> tuple[mx.array, mx.array]:
        found: dict[str, tuple[mx.array, mx.array]] = {}
        for one in settings:
            if one.prompt not in found:
                found[one.prompt] = encode_for(
                    one,
                    [one.prompt],
                    config=self.config,
                    encode=lambda prompts: self._prompts(prompts, self.transformer),
                )
        self._prompts.free()
        return batch_texts([found[one.prompt] for one in settings])

    def _denoise(
        self,
        text: tuple[mx.array, mx.array],
        settings: DrawSettings,
        *,
        seeds: list[int],
        given: Given,
    ) -> Iterator[Step]:
        yield from denoise_latents(
            in_mode(self.transformer, settings, config=self.config),
            *text,
            seeds=seeds,
            settings=settings,
            config=self.config,
            start=given.start,
        )


def _with_loras(
    components: Components, loras: tuple[tuple[str, float], ...], *, share: float
) -> Components:
    """`components` with LoRAs merged into the transformer, which is reduced to one width.

    The autoencoder's decoder gets the things that they teach, and the vocabulary their names.
    """
    transformer, vocabulary = components.transformer, components.vocabulary
    for i, (path, weight) in enumerate(loras):
        load_lora(
            path,
            transformer,
            weight=weight,
            name=f"lora_{i}",
            base_model=components.config.name,
            autoencoder=components.autoencoder,
        )
        if (thing := read_thing(path, read_lora(path)[1])) and vocabulary:
            vocabulary = with_thing(vocabulary, thing.name, thing.plural)
    fuse_lora(transformer)
    remove_lora(transformer, [f"lora_{i}" for i in range(len(loras))])
    if len(transformer.config.widths) > 1:
        transformer = extract(transformer, share)
        # A slice would keep the whole original tensor in memory.
        mx.eval(transformer.apply(mx.contiguous).parameters())
    config = dataclasses.replace(
        components.config,
        transformer=transformer.config,
        autoencoder=components.autoencoder.config,
    )
    return dataclasses.replace(
        components, config=config, transformer=transformer, vocabulary=vocabulary
    )
