"""A set that a teacher draws: prompts to the samples of a prepared set, chunk by chunk."""

import hashlib
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_snapgen.checkpoint.model import Components, load_pretrained, warn_untrained
from mlx_snapgen.cli.notices import write_line
from mlx_snapgen.draw import draw_latents
from mlx_snapgen.errors import UserError
from mlx_snapgen.formats import CONFIG, is_teacher
from mlx_snapgen.networks.autoencoders.base import Autoencoder
from mlx_snapgen.picture_files import Size
from mlx_snapgen.pictures import from_uint8, to_uint8
from mlx_snapgen.prompt_check import PromptWarning, too_long
from mlx_snapgen.reading import read_bytes
from mlx_snapgen.settings import DrawSettings
from mlx_snapgen.teachers.checkpoint import CheckpointTeacher
from mlx_snapgen.teachers.config import TeacherConfig
from mlx_snapgen.teachers.draw import draw_public
from mlx_snapgen.teachers.folder import load_flow_teacher, load_teacher_config
from train.data.shards import Sample
from train.data.source import TEACHER
from train.preparation.encoders import CaptionEncoder, Chunk, Encoder, Measured, half, make_samples

SHORT = 30.0
"""Seconds of a first batch after which the estimate is made of a second one."""

Draw = Callable[[Sequence[str], Sequence[int]], mx.array]
"""Prompts and seeds -> latents (B, h, w, C)."""
Cut = Callable[[str], Iterable[tuple[str, int]]]
"""A prompt -> its end that a text encoder ignores, "" if none, and the tokens of that encoder."""
MOST_NOTED = 10
"""Prompts with a line about their end."""


@dataclass(frozen=True)
class Teacher:
    """What a prepared set takes from a teacher.

    Attributes:
        texts: its text states.
        settings: its folder's name and a hash of its config, as JSON values.
    """

    texts: CaptionEncoder
    autoencoder: Autoencoder
    settings: dict[str, str]


class DrawnSet:
    """Pictures that a teacher draws.

    Record i has prompt i // `per_prompt` and seed `seed` + i.

    Args:
        draw: the teacher.
        drawn: the teacher's autoencoder.
        encoder: of the samples; if it has another autoencoder than the teacher, pictures are
            decoded and encoded again, and the drawn latents kept beside.
        prompts: at least one.
        size: (height, width) in pixels.
        column: of the captions.
        chunk_size: pictures of a chunk.

    Attributes:
        records: number of pictures.
    """

    def __init__(
        self,
        draw: Draw,
        drawn: Autoencoder,
        *,
        encoder: Encoder,
        prompts: Sequence[str],
        per_prompt: int,
        seed: int,
        size: Size,
        column: str,
        chunk_size: int,
    ):
        self.draw, self.drawn, self.encoder, self.prompts = draw, drawn, encoder, prompts
        self.per_prompt, self.seed, self.size, self.column = per_prompt, seed, size, column
        self.chunk_size, self.autoencoder = chunk_size, encoder.autoencoder
        self.records: int | None = len(prompts) * per_prompt
        self._kept: dict[int, list[Sample]] = {}

    def count(self) -> int:
        """Number of pictures."""
        return len(self.prompts) * self.per_prompt

    def measure(self, chunk: int) -> Measured:
        """Of the first batch of a chunk, or of the second if the first is short; both are kept."""
        begin = chunk * self.chunk_size % self.count()
        seconds = self._keep(begin)
        following = self._stop(begin)
        if seconds < SHORT and following < self.count() and following % self.chunk_size:
            # Most of the first one may be what is compiled or loaded.
            begin, seconds = following, self._keep(following)
        return Measured(self._kept[begin], seconds / len(self._kept[begin]))

    def _keep(self, begin: int) -> float:
        """Draw the batch that begins with this picture; returns the seconds."""
        started = time.perf_counter()
        self._kept[begin] = self._samples(begin, self._stop(begin))
        return time.perf_counter() - started

    def pixels(self, keys: Collection[str]) -> dict[str, np.ndarray]:
        """There are no originals."""
        return {}

    def chunks(
        self, wanted: Callable[[int], bool], *, start: int, progress: Callable[[int], Any]
    ) -> Iterator[tuple[int, Chunk]]:
        """See `Work`."""
        for chunk in range(start, -(-self.count() // self.chunk_size)):
            if not wanted(chunk):
                continue
            samples: list[Sample] = []
            first = chunk * self.chunk_size
            last = min(first + self.chunk_size, self.count())
            while (begin := first + len(samples)) < last:
                kept = self._kept.pop(begin, None)
                samples += kept or self._samples(begin, self._stop(begin))
                progress(self._stop(begin) - begin)
            yield chunk, Chunk(samples)

    def _stop(self, begin: int) -> int:
        """End of the batch that begins with this picture: batches do not cross chunks."""
        chunk_end = (begin // self.chunk_size + 1) * self.chunk_size
        return min(begin + self.encoder.batch_size, chunk_end, self.count())

    def _samples(self, begin: int, end: int) -> list[Sample]:
        numbers = range(begin, end)
        prompts = [self.prompts[number // self.per_prompt] for number in numbers]
        latents = self.draw(prompts, [self.seed + number for number in numbers])
        others = {}
        if self.encoder.others:
            others = {TEACHER: half(latents, "drawn latents")}
            pictures = from_uint8(to_uint8(self.drawn.decode(latents)))
            latents = self.autoencoder.encode(pictures)
        samples = make_samples(
            [f"{number:09d}" for number in numbers],
            [{self.column: prompt} for prompt in prompts],
            latents=half(latents, "latents"),
            others=others,
            size=self.size,
            texts=self.encoder.texts,
        )
        # Pictures of one prompt are all for training or all for validation.
        groups = [f"{number // self.per_prompt:09d}" for number in numbers]
        return [replace(s, group=group) for s, group in zip(samples, groups, strict=True)]


def open_drawing(
    folder: Path, *, size: Size, num_inference_steps: int | None, guidance_scale: float | None
) -> tuple[Draw, Teacher]:
    """A model or teacher, and a function that draws with it.

    Args:
        size: (height, width) in pixels.
        num_inference_steps, guidance_scale: None for the teacher's own.

    Raises:
        UserError: no teacher, or one that cannot draw so.
    """
    if is_teacher(folder):
        config = load_teacher_config(folder)
        wanted = _public_settings(
            config,
            size=size,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
        )
        teacher, autoencoder = load_flow_teacher(folder)

        def draw_with_teacher(prompts: Sequence[str], seeds: Sequence[int]) -> mx.array:
            return draw_public(teacher, prompts, seeds=seeds, settings=wanted)

        states = teacher_states(teacher, config.transformer.text_dims)
        found: Any = teacher.prompts
        most = found.prompt_format.max_length
        draw = with_notes(draw_with_teacher, lambda prompt: [(found.cut(prompt), most)])
        return draw, Teacher(states, autoencoder, teacher_settings(folder))
    components = load_pretrained(folder)
    warn_untrained(components.transformer, folder)
    settings = DrawSettings(
        height=size[0],
        width=size[1],
        force_size=True,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
    ).resolved(components.config)
    states = model_states(components)

    def draw_with_model(prompts: Sequence[str], seeds: Sequence[int]) -> mx.array:
        return draw_latents(components, prompts, seeds=seeds, settings=settings)

    tokenizers = [encoder.tokenizer for encoder in components.text_encoders if encoder]
    draw = with_notes(draw_with_model, lambda p: [(t.cut(p), t.max_length) for t in tokenizers])
    return draw, Teacher(states, components.autoencoder, teacher_settings(folder))


def with_notes(draw: Draw, cut: Cut) -> Draw:
    """`draw`, and a line on stderr about each of the first prompts that are too long."""
    seen: set[str] = set()
    noted = 0

    def draw_and_note(prompts: Sequence[str], seeds: Sequence[int]) -> mx.array:
        nonlocal noted
        for prompt in prompts:
            lines = [] if prompt in seen else [(end, most) for end, most in cut(prompt) if end]
            seen.add(prompt)
            for end, most in lines if noted < MOST_NOTED else []:
                problem = too_long("prompt", end, max_length=most)
                write_line(f"note: {PromptWarning(problem, prompt)}")
            noted += bool(lines)
            if lines and noted == MOST_NOTED:
                write_line("note: no more lines about prompts that are too long")
        return draw(prompts, seeds)

    return draw_and_note


def _public_settings(
    config: TeacherConfig,
    *,
    size: Size,
    num_inference_steps: int | None,
    guidance_scale: float | None,
) -> DrawSettings:
    """Settings of a teacher's many-step mode; unlike `resolved`, with any guidance."""
    if size[0] % config.size_unit or size[1] % config.size_unit:
        raise UserError(
            f"{size[0]}x{size[1]} pixels: both sides must be multiples of {config.size_unit}"
        )
    if config.trained_sizes and size not in config.trained_sizes:
        known = " or ".join("{}x{}".format(*each) for each in config.trained_sizes)
        raise UserError(
            f"{config.name} was trained on {known} pixels, not on {size[0]}x{size[1]}: choose "
            f"--resolution {config.image_size[0]}"
        )
    count, scale = num_inference_steps or config.schedule.num_inference_steps, guidance_scale
    return DrawSettings(
        height=size[0],
        width=size[1],
        num_inference_steps=count,
        guidance_scale=config.schedule.guidance_scale if scale is None else scale,
        few_step=False,
        time_shift=config.time_shift(*size, num_inference_steps=count),
    )


def teacher_states(teacher: Any, dims: int) -> CaptionEncoder:
    """The text states of a `Teacher`."""

    def states(captions: Sequence[str]) -> tuple[mx.array, mx.array]:
        condition = teacher.encode(captions)
        return condition.text, condition.mask

    def empty() -> tuple[mx.array, mx.array]:
        condition = teacher.encode([""])
        return condition.empty_text, condition.empty_mask

    return CaptionEncoder(TEACHER, dims, states, empty)


def model_states(components: Components) -> CaptionEncoder:
    """The text states of a model of this project as a teacher."""
    teacher = CheckpointTeacher(
        components.transformer,
        components.text_encoders,
        unconditional=components.config.unconditional_prompt,
    )
    return teacher_states(teacher, components.config.transformer.text_width)


def open_teacher_texts(folder: Path) -> Teacher:
    """A teacher's text states and autoencoder; the network of a public one is not read."""
    if is_teacher(folder):
        teacher, autoencoder = load_flow_teacher(folder, lazy=True)
        dims, teacher.network = teacher.config.transformer.text_dims, None
        states = teacher_states(teacher, dims)
    else:
        components = load_pretrained(folder)
        autoencoder = components.autoencoder
        states = model_states(components)
    return Teacher(states, autoencoder, teacher_settings(folder))


def teacher_settings(folder: Path) -> dict[str, str]:
    """See `Teacher.settings`."""
    path = folder / (CONFIG if is_teacher(folder) else "config.json")
    digest = hashlib.blake2b(read_bytes(path), digest_size=16).hexdigest()
    return {"name": folder.resolve().name, "config": digest}
