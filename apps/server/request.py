"""Requests to OpenAI's images API, checked, with the parameters of diffusion models.

Extensions: `seed`, `steps`, `guidance`, `negative_prompt`, `few_step`, `attention_modulation`,
`upscale`; with pictures also `strength` and `fit`.
"""

import contextlib
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from apps.server.errors import RequestError
from apps.server.models import Served
from apps.server.reader import Reader
from apps.server.sizes import Size, check_drawn, check_pixels, read_size
from apps.worker.messages import FileFormat, Job
from mlx_snapgen.description import Description
from mlx_snapgen.errors import UserError, plural
from mlx_snapgen.fitting import FITS
from mlx_snapgen.metadata import read_metadata
from mlx_snapgen.picture_files import picture_size
from mlx_snapgen.settings import MAX_SEED, DrawSettings

MAX_INPUT = 1 << 26
"""Pixels of a picture that a client sends."""
FORMATS = ("png", "jpeg", "webp")


@dataclass(frozen=True)
class Limits:
    """Limits of one request; `max_pixels` None: four times the pixels of the model's size."""

    max_pixels: int | None = None
    max_images: int = 10
    max_steps: int = 100
    max_prompt: int = 4000
    """Characters."""

    def pixels(self, config: Description) -> int:
        """Most height x width of a picture of a model."""
        height, width = config.image_size
        return 4 * height * width if self.max_pixels is None else self.max_pixels


@dataclass(frozen=True)
class Form:
    """A form with pictures, whose files are there until the request has ended."""

    values: Mapping[str, str]
    images: tuple[Path, ...]
    mask: Path | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        """All pictures."""
        return self.images if self.mask is None else (*self.images, self.mask)

    def without_paths(self, text: str) -> str:
        """A text for the client, with the names of its pictures instead of their paths."""
        for path in self.files:
            text = text.replace(str(path), path.name)
        return text

    def param(self, text: str) -> str | None:
        """The parameter that an error is about: its text starts with that, or with a path."""
        starts = {"the mask ": "mask", "strength ": "strength"}
        starts |= {str(path): "mask" if path == self.mask else "image" for path in self.files}
        return next((name for start, name in starts.items() if text.startswith(start)), None)


NO_FORM = Form({}, ())


@dataclass(frozen=True)
class ImageRequest:
    job: Job
    as_url: bool
    stream: bool
    form: Form
    notices: tuple[str, ...] = ()


def parse_request(values: Any, models: Mapping[str, Served], limits: Limits) -> ImageRequest:
    """The request in decoded JSON; `RequestError` names the wrong parameter.

    Args:
        models: by the names that clients may use, the default first.
    """
    if not isinstance(values, dict):
        raise RequestError("the body must be a JSON object")
    get = Reader({name: value for name, value in values.items() if value is not None})
    model = models[get.model(models)]
    most = limits.pixels(model.config)
    size = read_size(get, model, most=most)
    check_drawn(size, model.config, most=most)
    prompt = get.text("prompt", limits.max_prompt) or ""
    _check_prompt(prompt)
    settings = DrawSettings(prompt, height=size.drawn[1], width=size.drawn[0])
    return _request(get, model, limits, settings=settings, size=size)


def parse_form(
    form: Form, models: Mapping[str, Served], limits: Limits, *, is_variation: bool = False
) -> ImageRequest:
    """The request in a form with pictures, whose headers are read; errors are those of
    `parse_request`.

    Args:
        is_variation: whether the prompt may be missing. Then it is the one in the metadata of the
            picture, or empty.
    """
    get = Reader({name: value for name, value in form.values.items() if value}, is_form=True)
    model = models[get.model(models)]
    config, most = model.config, limits.pixels(model.config)
    size = read_size(get, model, most=most)
    if not form.images:
        raise RequestError("there is no picture: send it as image", param="image")
    if len(form.images) > limits.max_images:
        message = f"there are more than {plural(limits.max_images, 'picture')}"
        raise RequestError(message, param="image")
    prompt = get.text("prompt", limits.max_prompt) or ""
    if not is_variation:
        _check_prompt(prompt)
    elif not prompt:
        prompt = _recorded_prompt(form.images[0], limits)
    pictures = _pictures(get, form, model, is_variation=is_variation)
    settings = DrawSettings(prompt, **pictures)
    if size.asked is not None:
        check_drawn(size, config, most=most)
        settings = replace(settings, height=size.drawn[1], width=size.drawn[0])
    try:
        for path in form.files:
            height, width = picture_size(path)
            if height * width > MAX_INPUT:
                raise UserError(f"{path}: {width}x{height} is more than {MAX_INPUT} pixels")
        resolved = settings.resolved(config)
    except UserError as error:
        param = form.param(str(error)) or "image"
        raise RequestError(form.without_paths(str(error)), param=param) from None
    assert resolved.height is not None and resolved.width is not None
    check_pixels(resolved.height, resolved.width, config, most=most)
    return _request(get, model, limits, settings=settings, size=size, form=form)


def _pictures(get: Reader, form: Form, model: Served, *, is_variation: bool) -> dict[str, Any]:
    """The fields of `DrawSettings` about pictures.

    A model that can edit takes them as references, unless it is to redraw a part of the first one.
    """
    strength, fit = get.number("strength"), get.choice("fit", list(FITS))
    first, more, can_edit = form.images[0], form.images[1:], model.config.abilities().edit
    if is_variation and (more or form.mask):
        raise RequestError("a variation takes one picture and no mask", param="image")
    if more and not can_edit:
        raise RequestError(f"{model.name} takes one picture at a time", param="image")
    if can_edit and not is_variation and form.mask is None and strength is None:
        if form.values.get("fit"):
            message = "pictures to edit are not fitted: send strength or a mask too, or no fit"
            raise RequestError(message, param="fit")
        return {"edit": form.images}
    return {"image": first, "mask": form.mask, "strength": strength, "edit": more, "fit": fit}


def _request(
    get: Reader,
    model: Served,
    limits: Limits,
    *,
    settings: DrawSettings,
    size: Size,
    form: Form = NO_FORM,
) -> ImageRequest:
    """The request, with what all endpoints have in common."""
    num_images = get.integer("n", least=1, most=limits.max_images) or 1
    settings = replace(
        settings,
        negative_prompt=get.text("negative_prompt", limits.max_prompt) or "",
        num_inference_steps=get.integer("steps", least=1, most=limits.max_steps),
        guidance_scale=get.number("guidance", least=0),
        few_step=get.boolean("few_step"),
        attention_modulation=get.boolean("attention_modulation") or False,
        seed=get.integer(
            "seed", least=0, most=MAX_SEED - num_images + 1, hint="; without it, it is random"
        ),
        num_images=num_images,
    )
    try:
        model.config.sampler_for(settings.num_inference_steps, settings.few_step)
    except UserError as error:
        raise RequestError(str(error), param="few_step") from None
    file_format = _file_format(get, model)
    stream = get.boolean("stream") or False
    as_url = get.choice("response_format", ["b64_json", "url"]) == "url"
    if stream and as_url:
        raise RequestError("a stream carries b64_json, not url", param="response_format")
    partial = get.integer("partial_images", least=0, most=limits.max_steps)
    get.check_all_read()
    # OpenAI's documents give it a meaning for streams only.
    previews = partial if stream else 0
    job = Job(
        model.choice,
        settings,
        previews=previews,
        file_format=file_format,
        enlarged=size.enlarged,
    )
    notices = size.notices(model)
    if partial and not stream:
        notices = (*notices, "partial_images has no effect without stream")
    return ImageRequest(job, as_url=as_url, stream=stream, form=form, notices=notices)


def _check_prompt(prompt: str) -> None:
    if not prompt.strip():
        raise RequestError("the prompt is empty: say what to draw", param="prompt")


def _recorded_prompt(path: Path, limits: Limits) -> str:
    """The prompt in a picture's metadata, "" if it has none."""
    with contextlib.suppress(UserError):
        prompt = read_metadata(path).get("prompt")
        if isinstance(prompt, str) and len(prompt) <= limits.max_prompt:
            return prompt
    return ""


def backgrounds(config: Description) -> list[str]:
    """Values of `background` for a model."""
    return ["auto", "opaque", *(["transparent"] if config.abilities().alpha else [])]


def _file_format(get: Reader, model: Served) -> FileFormat:
    kind = get.choice("output_format", list(FORMATS))
    known = backgrounds(model.config)
    background = get.choice("background", ["auto", "opaque", "transparent"])
    if background not in known:
        message = f"{model.name} draws opaque pictures only: use background auto or opaque"
        raise RequestError(message, param="background")
    if background == "transparent" and kind == "jpeg":
        message = "a JPEG cannot be transparent: use output_format png or webp"
        raise RequestError(message, param="background")
    quality = get.integer("output_compression", least=0, most=100)
    if kind == "png" and quality not in (None, 100):
        raise RequestError(
            "output_compression is for jpeg and webp: a PNG loses nothing",
            param="output_compression",
        )
    opaque = kind == "jpeg" or background == "opaque" or "transparent" not in known
    return FileFormat(kind, 100 if quality is None else quality, opaque)


def is_loopback(host: str) -> bool:
    """Whether a host name or address means this machine."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
