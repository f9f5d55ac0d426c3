"""The user's settings: which model to load, its width, and how to draw. Does not import mlx."""

import contextlib
import dataclasses
import math
import operator
import os
import secrets
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_snapgen.config import ModelConfig, SamplerConfig
from mlx_snapgen.description import Description
from mlx_snapgen.errors import UserError, naming, nearest
from mlx_snapgen.fitting import FITS, check_reference, nearest_size
from mlx_snapgen.picture_files import Source, picture_size

MAX_SEED = 2**63 - 1
MOST_PIXELS = 1 << 27
"""Of a picture. MLX counts an array's elements with 32 bits, and decoders have many per pixel."""
BYTES_PER_PIXEL = 600
"""Memory that drawing takes at least. Measured at 2048 x 2048: 715 with `stickers`, and 670
with Qwen-Image's decoder alone."""
MAX_STEPS = 1000
MAX_BATCH = 256
STRENGTH, MASKED_STRENGTH = 0.6, 1.0
"""Default `DrawSettings.strength`, without and with a mask."""


@dataclass(frozen=True)
class Width:
    """A width of an elastic network, as opposed to the `width` of a picture in pixels."""

    name: str
    share: float
    """Of every hidden dimension, in (0, 1]."""


FULL, SMALL, TINY = WIDTHS = (Width("full", 1.0), Width("small", 0.5), Width("tiny", 0.375))
"""The paper's widths, the widest first."""
WIDTH_NAMES = tuple(width.name for width in WIDTHS)


def parse_width(name: str) -> Width:
    """The width of this name; `UserError` for an unknown one."""
    for width in WIDTHS:
        if width.name == name:
            return width
    known = ", ".join(WIDTH_NAMES)
    raise UserError(f"no model width '{name}'{nearest(str(name), WIDTH_NAMES)}, known: {known}")


def held_widths(config: Description) -> tuple[Width, ...]:
    """The widths that the model of `config` has, the widest first."""
    return tuple(width for width in WIDTHS if width.share in config.widths)


def check_width(config: Description, name: str) -> Width:
    """The width of this name; `UserError` unless the model of `config` has it."""
    width, held = parse_width(name), held_widths(config)
    if width not in held:
        names = ", ".join(width.name for width in held)
        raise UserError(
            f"this model has no width '{name}', only {names}; choose one with --model-width or "
            "--model-widths"
        )
    return width


def check_choice(config: Description, choice: "ModelChoice") -> Width:
    """The width of `choice`; `UserError` unless the model of `config` can be loaded so."""
    width = check_width(config, choice.model_width)
    if choice.text_encoders is not None and not config.abilities().part_of_text_encoders:
        raise UserError(f"{config.name} has one text encoder: do not choose any")
    return width


def check_size(config: Description, height: int, width: int) -> None:
    """`UserError` unless the network supports pictures of this size, and they fit into memory."""
    unit = config.size_unit
    for name, side in (("height", height), ("width", width)):
        if not isinstance(side, int):
            raise UserError(f"{name} takes pixels, got {side!r} (the network's is model_width)")
        if side < 1 or side % unit:
            good = max(unit, round(side / unit) * unit)
            raise UserError(
                f"{name} must be a positive multiple of {unit} pixels: {side} is not, {good} is"
            )
    if height * width > MOST_PIXELS:
        raise UserError(
            f"{width} x {height} is more than the {MOST_PIXELS} pixels that a picture can have: "
            "choose a smaller size"
        )
    check_pixels(height, width)


def multiples_near(side: int, unit: int) -> str:
    """The multiples of `unit` below and above a side, to choose from: "96 or 128"."""
    below = side // unit * unit
    return f"{below} or {below + unit}" if below > 0 else f"{unit}"


def check_pixels(height: int, width: int, bytes_per_pixel: float = BYTES_PER_PIXEL) -> None:
    """`UserError` if pictures of this size do not fit into memory."""
    needed, memory = height * width * bytes_per_pixel, machine_memory()
    if needed > memory:
        raise UserError(
            f"{width} x {height} takes at least {needed / 2**30:.1f} GiB of memory, and "
            f"{has_memory()} {memory / 2**30:.1f}: choose a smaller size"
        )


def trained_sizes(config: Description) -> tuple[tuple[int, int], ...]:
    """The (height, width) that the model draws well, its default first; empty: not known."""
    return config.trained_sizes and tuple(dict.fromkeys((config.image_size, *config.trained_sizes)))


def trained_size(config: Description, height: int, width: int) -> tuple[int, int]:
    """The (height, width) of `trained_sizes` nearest in shape, then in area.

    Unchanged if these are not known, or if it is no size.
    """
    if not all(isinstance(side, int) and side > 0 for side in (height, width)):
        return height, width

    def distance(size: tuple[int, int]) -> tuple[float, float]:
        h, w = size
        return abs(math.log(h * width / (w * height))), abs(math.log(h * w / (height * width)))

    return min(trained_sizes(config), key=distance, default=(height, width))


def check_unicode(text: str, name: str) -> None:
    """`UserError` for text that UTF-8 cannot hold, such as bytes of another encoding."""
    try:
        text.encode()
    except UnicodeEncodeError:
        name = name.replace("_", " ")
        raise UserError(f"the {name} has characters that are not valid UTF-8") from None


def machine_memory() -> int:
    """Bytes of memory that a model may take.

    Those of this machine, of its control group on Linux, or of an NVIDIA GPU, whichever has least:
    weights are in the machine's memory before they are on the GPU.
    """
    return min(_memories().values())


def has_memory() -> str:
    """The start of "this machine has 8.0 GiB", for a message about `machine_memory`."""
    memories = _memories()
    return f"this {min(memories, key=lambda name: memories[name])} has"


def _memories() -> dict[str, int]:
    memories = {"machine": _system_memory()}
    # Without mlx, the process leaves drawing to another one, which checks again.
    mx = sys.modules.get("mlx.core")
    if mx is not None and mx.cuda.is_available() and mx.default_device().type == mx.gpu:
        memories["GPU"] = mx.device_info().get("total_memory", memories["machine"])
    return memories


def _system_memory() -> int:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("", *_control_group()):
        with contextlib.suppress(OSError, ValueError):
            memory = min(memory, int(Path(f"/sys/fs/cgroup{path}/memory.max").read_text()))
    return memory


def _control_group() -> list[str]:
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        return [line.removeprefix("0::") for line in lines if line.startswith("0::/")]
    return []


BUILT_IN = "fluent"
"""Name of the model that comes with the package."""
FORMER = ("stickers",)
"""Names of those that came with earlier versions."""


@dataclass(frozen=True)
class ModelChoice:
    """Which model to load and how. Equal choices load the same pipeline."""

    model: str | None = None
    """Folder, Hugging Face repository "owner/name", or None or `BUILT_IN`."""
    revision: str | None = None
    """Branch, tag or commit of a repository."""
    base: str | None = None
    """If `model` is one file with a transformer, the public model with the other parts: folder in
    diffusers' format, or repository, which then `revision` is of."""
    model_width: str = "full"
    """Name of the network's width; only this sub-network stays in memory."""
    quantize: int | None = None
    """Bits, 2 to 8, to quantize the transformer to in memory, or 0. Of a public model, 4 or 8: bits
    of its conversion in the cache. None: 0, or for a public model by the machine's memory."""
    loras: tuple[tuple[str, float], ...] = ()
    """(file, scale) of LoRAs to merge into the weights, before width and quantization; those of a
    public model are added to its layers."""
    text_encoders: tuple[str, ...] | None = None
    """Names of those to load, such as ("clip",); None loads all."""
    keep_text_encoders: bool = False
    """Keep them in memory while denoising. Otherwise they are freed first, and loaded again for
    the next prompt that is not in the cache."""
    low_memory: bool = False
    """Also free the transformer of a public model before decoding, and read it again for the next
    picture; and keep no freed memory while drawing."""


@dataclass(frozen=True)
class DrawSettings:
    """How to draw a prompt. None is the model's own value (`resolved`).

    A new setting is a field here, an option with the field's name as destination in
    cli/options.py (`add_sampling`), and its use in draw.py. With these, `generate`, metadata and
    worker have it; the prompt loop's `:name` is an entry in `SETTINGS` of cli/interactive.py, the
    window's field one in `CHOICES` of apps/desktop/model_page.py.
    """

    prompt: str = ""
    negative_prompt: str = ""
    """What to keep out of the picture; no effect at a guidance scale of 1."""
    height: int | None = None
    width: int | None = None
    """Of the picture in pixels. A model that was trained on certain sizes draws the nearest."""
    force_size: bool = False
    """Draw exactly this height and width, also if the model was not trained on it."""
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    """At least 0; 1 disables guidance and takes half the time."""
    few_step: bool | None = None
    """Whether to use the model's few-step mode; None decides by the number of steps (see
    `ModelConfig.sampler_for`)."""
    time_shift: float | None = None
    """Shift of the noise levels (see `sampling.get_schedule`)."""
    attention_modulation: bool = False
    """EDT's: every second block of the Up stage attends more to near tokens."""
    seed: int | None = 0
    """Of the first picture; picture k has the seed `seed` + k. None: a random seed."""
    num_images: int = 1
    batch_size: int | None = None
    """Pictures that are drawn at a time; they do not depend on it. None: by the memory."""
    image: Source | None = None
    """Picture to start from: a file, or a picture in memory. It is fitted to height x width; None
    for these is a size of its aspect ratio, if the model can draw all sizes."""
    strength: float | None = None
    """How much of `image` is redrawn: above 0, where nothing changes, to 1, where nothing is kept.
    About this share of the steps is run. None: 0.6, or 1 with a mask."""
    mask: Source | None = None
    """Which parts of `image` to redraw, in a picture of its size: the transparent ones or, if there
    are none, the white ones. No other pixel changes."""
    edit: tuple[Source, ...] = ()
    """Pictures that the prompt is about, for a model that can edit."""
    fit: str = "crop"
    """How `image` and `mask` get another aspect ratio: one of `inputs.FITS`."""

    def resolved(self, config: Description) -> "DrawSettings":
        """These settings with the model's own values instead of None.

        Raises:
            UserError: a value that the model of `config` does not support.
        """
        for name in ("prompt", "negative_prompt"):
            check_unicode(getattr(self, name), name)
        mode = config.sampler_for(self.num_inference_steps, self.few_step)
        strength = self._check_pictures(config)
        height, width = self._size(config)
        if not self.force_size:
            height, width = trained_size(config, height, width)
        check_size(config, height, width)
        steps = self.num_inference_steps
        steps = mode.num_inference_steps if steps is None else steps
        scale = mode.guidance_scale if self.guidance_scale is None else self.guidance_scale
        if not 0 <= scale < math.inf:
            raise UserError(f"guidance_scale must be a finite number from 0, got {scale}")
        if self.batch_size is not None:
            whole_number("batch_size", self.batch_size, least=1, most=MAX_BATCH)
        few_step = config.few_step is not None and mode is config.few_step
        self._check_abilities(config, few_step=few_step, guidance_scale=scale)
        steps = whole_number("num_inference_steps", steps, least=1, most=MAX_STEPS)
        shift = self.time_shift
        if shift is None:
            shift = config.time_shift(height, width, few_step=few_step, num_inference_steps=steps)
        if not 0 < shift < math.inf:
            raise UserError(f"time_shift must be a finite number above 0, got {shift}")
        num_images = whole_number("num_images", self.num_images, least=1)
        seed = random_seed() if self.seed is None else self.seed
        return dataclasses.replace(
            self,
            height=height,
            width=width,
            num_inference_steps=steps,
            guidance_scale=scale,
            few_step=few_step,
            time_shift=shift,
            seed=whole_number("seed", seed, least=0, most=MAX_SEED - num_images + 1),
            num_images=num_images,
            strength=strength,
        )

    def _check_pictures(self, config: Description) -> float | None:
        """The strength; `UserError` for pictures that cannot be used so."""
        if self.fit not in FITS:
            known = ", ".join(FITS)
            raise UserError(f"fit must be one of {known}, got {self.fit!r}")
        if self.edit and not config.abilities().edit:
            raise UserError(f"{config.name} cannot edit pictures: use a FLUX.2 klein model")
        for source in self.edit:
            size = picture_size(source)
            with naming(source if isinstance(source, str | Path) else "edit"):
                check_reference(*size)
        if self.image is None:
            for name in ("strength", "mask"):
                if getattr(self, name) is not None:
                    raise UserError(f"a {name} needs the picture that it is for: give an image too")
            return None
        size = picture_size(self.image)
        if self.mask is not None and (other := picture_size(self.mask)) != size:
            raise UserError(
                f"the mask has {other[1]}x{other[0]} pixels and the picture {size[1]}x{size[0]}: "
                "both must have the same size"
            )
        strength = self.strength
        if strength is None:
            strength = STRENGTH if self.mask is None else MASKED_STRENGTH
        if not isinstance(strength, int | float) or not 0 < strength <= 1:
            raise UserError(f"strength must be above 0 and at most 1, got {strength!r}")
        return float(strength)

    def _size(self, config: Description) -> tuple[int, int]:
        """Height and width in pixels: as chosen, else from the first input, or the model's own."""
        height, width, own = self.height, self.width, config.image_size
        first = self.image if self.image is not None else next(iter(self.edit), None)
        if first is not None and height is None and width is None and config.trained_sizes:
            return trained_size(config, *picture_size(first))
        if first is None or not config.abilities().any_size:
            return own[0] if height is None else height, own[1] if width is None else width
        (high, wide), unit = picture_size(first), config.size_unit
        if height is None and width is None:
            return nearest_size((high, wide), pixels=own[0] * own[1], unit=unit)
        if height is None and width is not None:
            height = max(1, round(width * high / wide / unit)) * unit
        elif width is None and height is not None:
            width = max(1, round(height * wide / high / unit)) * unit
        assert height is not None and width is not None
        return height, width

    def _check_abilities(
        self, config: Description, *, few_step: bool, guidance_scale: float
    ) -> None:
        can = config.abilities(few_step=few_step)
        who = f"{config.name} in its few-step mode" if few_step else config.name
        if few_step and config.abilities() == can:
            who = config.name
        if not can.guidance and guidance_scale != 1:
            raise UserError(
                f"{who} has no guidance: leave out the guidance scale {guidance_scale:g}"
            )
        if not can.guidance and self.negative_prompt.strip():
            raise UserError(f"{who} takes no negative prompt: leave it out")
        if not can.attention_modulation and self.attention_modulation:
            raise UserError(f"{who} has no attention modulation: leave it out")
        if not can.batches and (self.batch_size or 1) > 1:
            raise UserError(
                f"{config.name} is a public model, which draws pictures one by one: leave out "
                "--batch-size"
            )

    def sampler(self, config: ModelConfig) -> SamplerConfig:
        """The sampler of settings that are `resolved`."""
        mode = config.few_step if self.few_step and config.few_step else config.sampler
        assert self.num_inference_steps is not None
        assert self.guidance_scale is not None and self.time_shift is not None
        return dataclasses.replace(
            mode,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            time_shift=self.time_shift,
        )


def whole_number(name: str, value: Any, *, least: int, most: int = MAX_SEED) -> int:
    """`value` as an int; `UserError` unless it is a whole number from `least` to `most`."""
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if not least <= number <= most:
        raise UserError(f"{name} must be a whole number from {least} to {most}, got {value!r}")
    return number


def random_seed() -> int:
    """A seed short enough to type."""
    return secrets.randbelow(2**32)


def read_fields(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the JSON `values` that are fields of the dataclass `kind` and have its types."""
    hints, found = typing.get_type_hints(kind), {}
    for field in dataclasses.fields(kind):
        try:
            found[field.name] = _read(hints[field.name], values[field.name])
        except (LookupError, TypeError, ValueError, OverflowError):
            continue
    return found


def _read(kind: Any, value: Any) -> Any:
    """`value` as the annotated type `kind`; TypeError or ValueError when it has another type."""
    if isinstance(kind, types.UnionType):
        if value is None:
            return None
        return _read(next(k for k in kind.__args__ if k is not types.NoneType), value)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise TypeError
        parts = kind.__args__
        if parts[-1] is Ellipsis:
            return tuple(_read(parts[0], v) for v in value)
        return tuple(_read(part, v) for part, v in zip(parts, value, strict=True))
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise TypeError
    return value
