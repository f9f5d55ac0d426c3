"""Requests to OpenAI's `images/generations`, checked, with the parameters of diffusion models.

Extensions: `seed`, `steps`, `guidance`, `negative_prompt`, `few_step`, `attention_modulation`.
"""

import ipaddress
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from apps.worker.messages import Job
from mlx_snapgen.description import Description
from mlx_snapgen.errors import UserError, nearest
from mlx_snapgen.settings import MAX_SEED, DrawSettings, ModelChoice, check_size

IGNORED = {"background", "moderation", "output_compression", "quality", "style", "user"}
"""Parameters of OpenAI's models without effect here."""


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


@dataclass(frozen=True)
class ImageRequest:
    job: Job
    size: tuple[int, int]
    """(width, height)."""
    as_url: bool
    stream: bool


def parse_request(
    values: Any, models: Mapping[str, ModelChoice], *, config: Description, limits: Limits
) -> ImageRequest:
    """The request in decoded JSON; `RequestError` names the wrong parameter.

    Args:
        models: names that clients may use, the default first.
        config: the model's.
    """
    if not isinstance(values, dict):
        raise RequestError("the body must be a JSON object")
    get = _Reader({name: value for name, value in values.items() if value is not None})
    num_images = get.integer("n", least=1, most=limits.max_images) or 1
    width, height = _size(get.text("size", 20), config=config, limits=limits)
    settings = DrawSettings(
        prompt=get.text("prompt", limits.max_prompt) or "",
        negative_prompt=get.text("negative_prompt", limits.max_prompt) or "",
        height=height,
        width=width,
        num_inference_steps=get.integer("steps", least=1, most=limits.max_steps),
        guidance_scale=get.number("guidance"),
        few_step=get.boolean("few_step"),
        attention_modulation=get.boolean("attention_modulation") or False,
        seed=get.integer(
            "seed", least=0, most=MAX_SEED - num_images + 1, hint="; without it, it is random"
        ),
        num_images=num_images,
    )
    if not settings.prompt.strip():
        raise RequestError("the prompt is empty: say what to draw", param="prompt")
    try:
        config.sampler_for(settings.num_inference_steps, settings.few_step)
    except UserError as error:
        raise RequestError(str(error), param="few_step") from None
    model = get.choice("model", list(models))
    get.choice("output_format", ["png"])
    stream = get.boolean("stream") or False
    as_url = get.choice("response_format", ["b64_json", "url"]) == "url"
    if stream and as_url:
        raise RequestError("a stream carries b64_json, not url", param="response_format")
    partial = get.integer("partial_images", least=0, most=limits.max_steps)
    get.check_all_read()
    job = Job(models[model], settings, previews=partial if stream else 0, png_previews=True)
    return ImageRequest(job, (width, height), as_url=as_url, stream=stream)


class _Reader:
    """Values by name and type."""

    def __init__(self, values: dict[str, Any]):
        self._values = values
        self._known = set(IGNORED)

    def check_all_read(self) -> None:
        """`RequestError` for a value that was not read."""
        for name in self._values:
            if name not in self._known:
                name = name[:50]
                hint = nearest(name, self._known)
                raise RequestError(f"unknown parameter '{name}'{hint}", param=name)

    def _get(self, name: str, kinds: type | tuple[type, ...], *, what: str) -> Any:
        self._known.add(name)
        value = self._values.get(name)
        wrong_bool = isinstance(value, bool) and kinds is not bool
        if value is not None and (wrong_bool or not isinstance(value, kinds)):
            raise RequestError(f"{name} must be {what}", param=name)
        return value

    def text(self, name: str, most: int) -> str | None:
        value = self._get(name, str, what="a string")
        if value is not None and len(value) > most:
            raise RequestError(f"{name} is longer than {most} characters", param=name)
        return value

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

    def number(self, name: str) -> float | None:
        value = self._get(name, (int, float), what="a number")
        # An integer may be too long for a float, too.
        if value is not None and not (abs(value) <= 1e6 and math.isfinite(value)):
            raise RequestError(f"{name} must be a finite number, at most 1e6", param=name)
        return value

    def boolean(self, name: str) -> bool | None:
        return self._get(name, bool, what="true or false")


def is_loopback(host: str) -> bool:
    """Whether a host name or address means this machine."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _size(text: str | None, *, config: Description, limits: Limits) -> tuple[int, int]:
    height, width = config.image_size
    most = 4 * height * width if limits.max_pixels is None else limits.max_pixels
    if text is not None and text != "auto":
        found = re.fullmatch(r"([0-9]{1,6})x([0-9]{1,6})", text)
        if not found:
            raise RequestError(f"the size must be like {width}x{height}, or auto", param="size")
        width, height = int(found[1]), int(found[2])
    if width * height > most:
        usual = "{1}x{0}".format(*config.image_size)
        raise RequestError(
            f"{width}x{height} is more than the {most} pixels allowed: use auto ({usual}), or "
            f"start the server with --max-pixels {width * height}",
            param="size",
        )
    try:
        check_size(config, height, width)
    except UserError as error:
        raise RequestError(str(error), param="size") from None
    return width, height
