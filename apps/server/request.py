"""Requests to OpenAI's images API, checked, with the parameters of diffusion models.

Extensions: `seed`, `steps`, `guidance`, `negative_prompt`, `few_step`, `attention_modulation`,
`upscale`; with pictures also `strength` and `fit`.
"""

import contextlib
import ipaddress
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from apps.server.models import Served, find_served
from apps.worker.messages import FileFormat, Job
from mlx_snapgen.description import Description
from mlx_snapgen.errors import UserError, nearest, plural
from mlx_snapgen.files import parse_json
from mlx_snapgen.inputs import FITS, nearest_size, picture_size
from mlx_snapgen.metadata import read_metadata
from mlx_snapgen.settings import MAX_SEED, DrawSettings, check_size, trained_size, trained_sizes

IGNORED = {"input_fidelity", "moderation", "quality", "safety_identifier", "style", "user"}
"""Parameters of OpenAI's models without effect here."""
MAX_INPUT = 1 << 26
"""Pixels of a picture that a client sends."""
MAX_UPSCALED = 1 << 22
"""Pixels of a picture that is enlarged with `upscale`."""
FORMATS = ("png", "jpeg", "webp")


class RequestError(Exception):
    """A request that cannot be served.

    Args:
        message: one line for the client.
        status: HTTP status.
        param: name of the wrong parameter.
        code: OpenAI's name of the error.
        headers: of the response.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message if len(message) <= 300 else message[:299] + "…")
        self.status, self.param, self.code = status, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON that OpenAI's clients expect."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        if self.status == 429:
            kind = "rate_limit_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


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
    get = _Reader({name: value for name, value in values.items() if value is not None})
    model = models[get.model(models)]
    size = _size(get, model, limits)
    _check_size(size, model.config, limits)
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
    get = _Reader({name: value for name, value in form.values.items() if value}, is_form=True)
    model = models[get.model(models)]
    config, size = model.config, _size(get, model, limits)
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
        _check_size(size, config, limits)
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
    _check_pixels(resolved.height, resolved.width, config, limits=limits)
    return _request(get, model, limits, settings=settings, size=size, form=form)


def _pictures(get: "_Reader", form: Form, model: Served, *, is_variation: bool) -> dict[str, Any]:
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
    get: "_Reader",
    model: Served,
    limits: Limits,
    *,
    settings: DrawSettings,
    size: "_Size",
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


class _Reader:
    """Values by name and type; those of a form are texts."""

    def __init__(self, values: Mapping[str, Any], *, is_form: bool = False):
        self._values, self._is_form = values, is_form
        self._known = set(IGNORED)

    def check_all_read(self) -> None:
        """`RequestError` for a value that was not read, or is ignored and of a wrong type."""
        for name in sorted(IGNORED):
            self._get(name, str, what="a string")
        for name in self._values:
            if name not in self._known:
                name = name[:50]
                if name in ("strength", "fit") and not self._is_form:
                    message = f"{name} belongs to edits: send a picture to /v1/images/edits"
                    raise RequestError(message, param=name)
                hint = nearest(name, self._known)
                raise RequestError(f"unknown parameter '{name}'{hint}", param=name)

    def _get(self, name: str, kinds: type | tuple[type, ...], *, what: str) -> Any:
        self._known.add(name)
        value = self._values.get(name)
        if self._is_form and value is not None and kinds is not str:
            with contextlib.suppress(UserError):
                value = parse_json(value, name)
        wrong_bool = isinstance(value, bool) and kinds is not bool
        if value is not None and (wrong_bool or not isinstance(value, kinds)):
            raise RequestError(f"{name} must be {what}", param=name)
        return value

    def text(self, name: str, most: int) -> str | None:
        value = self._get(name, str, what="a string")
        if value is not None and len(value) > most:
            raise RequestError(f"{name} is longer than {most} characters", param=name)
        return value

    def model(self, models: Mapping[str, Served]) -> str:
        """See `find_served`; without a name, the first model."""
        name = self._get("model", str, what="a string")
        if name is not None and (found := find_served(models, name)) is not None:
            return found
        return self.choice("model", list(models))

    def choice(self, name: str, known: list[str]) -> str:
        """One of `known`, whose first is the default."""
        value = self._get(name, str, what="a string")
        if value is not None and value not in known:
            status, code = (404, "model_not_found") if name == "model" else (400, None)
            listed = ", ".join(known)
            message = f"no {name} '{value[:50]}', known: {listed}"
            raise RequestError(message, status, param=name, code=code)
        return known[0] if value is None else value

    def integer(self, name: str, *, least: int, most: int, hint: str = "") -> int | None:
        value = self._get(name, (int, float), what="a whole number")
        if isinstance(value, float):
            # Some clients write 1 as 1.0.
            if not value.is_integer():
                raise RequestError(f"{name} must be a whole number, such as 1", param=name)
            value = int(value)
        if value is not None and not least <= value <= most:
            raise RequestError(f"{name} must be from {least} to {most}{hint}", param=name)
        return value

    def number(self, name: str, *, least: float = -1e6) -> float | None:
        value = self._get(name, (int, float), what="a number")
        # An integer may be too long for a float, too.
        if value is not None and not (abs(value) <= 1e6 and math.isfinite(value)):
            raise RequestError(f"{name} must be a finite number, at most 1e6", param=name)
        if value is not None and value < least:
            raise RequestError(f"{name} must be at least {least:g}, got {value:g}", param=name)
        return value

    def boolean(self, name: str) -> bool | None:
        return self._get(name, bool, what="true or false")


def backgrounds(config: Description) -> list[str]:
    """Values of `background` for a model."""
    return ["auto", "opaque", *(["transparent"] if config.abilities().alpha else [])]


def _file_format(get: _Reader, model: Served) -> FileFormat:
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


@dataclass(frozen=True)
class _Size:
    """Sizes as (width, height) in pixels."""

    drawn: tuple[int, int]
    asked: tuple[int, int] | None = None
    """None: auto."""
    enlarged: tuple[int, int] | None = None
    """Of the answer, after drawing; None: as drawn."""

    def notices(self, model: Served) -> tuple[str, ...]:
        """What the client is to know about the size, if it is not the one that was asked for."""
        if self.asked in (None, self.enlarged or self.drawn):
            return ()
        drawn = "drawn at {}x{}".format(*self.drawn)
        if trained_sizes(model.config):
            drawn += f", the nearest size that {model.name} was trained on"
        elif self.asked is not None and any(side % model.config.size_unit for side in self.asked):
            drawn += f", the nearest size in multiples of {model.config.size_unit} pixels"
        if self.enlarged is not None:
            return (drawn + ", and enlarged to {}x{} in its own shape".format(*self.enlarged),)
        larger = _enlarged(self.drawn, self.asked) if _can_upscale(self.asked) else None
        if larger is not None:
            drawn += "; upscale enlarges it to {}x{}".format(*larger)
        return (drawn,)


def _size(get: "_Reader", model: Served, limits: Limits) -> _Size:
    """The size of a request: that of the model's sizes with the nearest shape."""
    text, upscale, config = get.text("size", 100), get.boolean("upscale"), model.config
    height, width = config.image_size
    if text in (None, "auto"):
        if upscale:
            message = "upscale needs the size to enlarge to, such as 1024x1024"
            raise RequestError(message, param="upscale")
        return _Size((width, height))
    found = re.fullmatch(r"([1-9][0-9]{0,5})x([1-9][0-9]{0,5})", text)
    if re.fullmatch(r"[1-9][0-9]*x[1-9][0-9]*", text) and not found:
        raise RequestError("the size has a side of more than 999999 pixels", param="size")
    if not found:
        raise RequestError(f"the size must be like {width}x{height}, or auto", param="size")
    asked = int(found[1]), int(found[2])
    # OpenAI's sizes are larger than those of a small model.
    unit = config.size_unit
    drawn = trained_size(config, asked[1], asked[0])
    drawn = max(unit, round(drawn[0] / unit) * unit), max(unit, round(drawn[1] / unit) * unit)
    if upscale:
        if not _can_upscale(asked):
            message = f"{text} is more than the {MAX_UPSCALED} pixels that upscale can have"
            raise RequestError(message, param="size")
        if math.prod(drawn) > limits.pixels(config):
            drawn = nearest_size(drawn, pixels=height * width, unit=unit)
    height, width = drawn
    enlarged = _enlarged((width, height), asked) if upscale else None
    return _Size((width, height), asked, enlarged)


def _can_upscale(asked: tuple[int, int]) -> bool:
    return math.prod(asked) <= MAX_UPSCALED


def _enlarged(drawn: tuple[int, int], asked: tuple[int, int]) -> tuple[int, int] | None:
    """The largest size of the shape of `drawn` within `asked`; None if it is not larger."""
    scale = min(most / side for most, side in zip(asked, drawn, strict=True))
    return (round(drawn[0] * scale), round(drawn[1] * scale)) if scale > 1 else None


def _check_size(size: _Size, config: Description, limits: Limits) -> None:
    width, height = size.drawn
    _check_pixels(height, width, config, limits=limits)
    try:
        check_size(config, height, width)
    except UserError as error:
        raise RequestError(str(error), param="size") from None


def _check_pixels(height: int, width: int, config: Description, *, limits: Limits) -> None:
    most = limits.pixels(config)
    if width * height > most:
        usual = "{1}x{0}".format(*config.image_size)
        raise RequestError(
            f"{width}x{height} is more than the {most} pixels allowed: use auto ({usual}), or "
            f"start the server with --max-pixels {width * height}",
            param="size",
        )
