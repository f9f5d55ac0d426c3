"""What a client asks for: OpenAI's `images/generations`, checked, with the extensions of diffusion.

Extensions: `seed`, `steps`, `guidance`, `negative_prompt`, `few_step`, `attention_modulation`.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from apps.worker.messages import Job, ModelChoice
from mlx_snapgen.config import ModelConfig
from mlx_snapgen.errors import UserError, nearest
from mlx_snapgen.settings import MAX_SEED, check_size

IGNORED = {"background", "moderation", "output_compression", "quality", "style", "user"}
"""Parameters of OpenAI's models that have no meaning here."""


class RequestError(Exception):
    """A request that cannot be served.

    Args:
        message: one line for the client.
        status: HTTP status.
        param: name of the parameter at fault.
        code: OpenAI's word for the fault.
        headers: to answer with.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
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
    """What one request may ask for; `max_pixels` None is four times the model's own size."""

    max_pixels: int | None = None
    max_images: int = 10
    max_steps: int = 100
    max_prompt: int = 4000
    """Characters."""


@dataclass(frozen=True)
class ImageRequest:
    job: Job
    model: str
    size: tuple[int, int]
    """(width, height)."""
    as_url: bool
    stream: bool


def parse_request(
    values: Any, models: Mapping[str, ModelChoice], config: ModelConfig, limits: Limits
) -> ImageRequest:
    """The request in decoded JSON; `RequestError` names the parameter at fault.

    Args:
        models: names that clients may use, the default first.
        config: the model's.
    """
    if not isinstance(values, dict):
        raise RequestError("the body must be a JSON object")
    given = {name: value for name, value in values.items() if value is not None}
    known = {*PARAMETERS, *IGNORED}
    for name in given:
        if name not in known:
            raise RequestError(f"unknown parameter '{name}'{nearest(name, known)}", param=name)
    get = _Reader(given)
    prompt = get.text("prompt", limits.max_prompt)
    if prompt is None or not prompt.strip():
        raise RequestError("the prompt is empty: say what to draw", param="prompt")
    model = get.choice("model", list(models), next(iter(models)))
    get.choice("output_format", ["png"], "png")
    steps = get.integer("steps", 1, limits.max_steps)
    num_images = get.integer("n", 1, limits.max_images) or 1
    stream = get.boolean("stream") or False
    as_url = get.choice("response_format", ["b64_json", "url"], "b64_json") == "url"
    if stream and as_url:
        raise RequestError("a stream carries b64_json, not url", param="response_format")
    size = _size(get.text("size", 20), config, limits)
    partial = get.integer("partial_images", 0, limits.max_steps)
    try:
        config.sampler_for(steps, get.boolean("few_step"))
    except UserError as error:
        raise RequestError(str(error), param="few_step") from None
    job = Job(
        choice=models[model],
        prompt=prompt,
        negative_prompt=get.text("negative_prompt", limits.max_prompt) or "",
        height=size[1],
        width=size[0],
        num_inference_steps=steps,
        guidance_scale=get.number("guidance"),
        few_step=get.boolean("few_step"),
        attention_modulation=get.boolean("attention_modulation") or False,
        seed=get.integer("seed", 0, MAX_SEED - num_images + 1),
        num_images=num_images,
        previews=partial if stream else 0,
        png_previews=True,
    )
    return ImageRequest(job, model, size, as_url, stream)


PARAMETERS = (
    *("prompt", "model", "n", "size", "response_format", "output_format"),
    *("stream", "partial_images"),
    *("seed", "steps", "guidance", "negative_prompt", "few_step", "attention_modulation"),
)


class _Reader:
    """Values by name and type."""

    def __init__(self, values: dict[str, Any]):
        self._values = values

    def _get(self, name: str, kinds: type | tuple[type, ...], what: str) -> Any:
        value = self._values.get(name)
        wrong_bool = isinstance(value, bool) and kinds is not bool
        if value is not None and (wrong_bool or not isinstance(value, kinds)):
            raise RequestError(f"{name} must be {what}", param=name)
        return value

    def text(self, name: str, most: int) -> str | None:
        value = self._get(name, str, "a string")
        if value is not None and len(value) > most:
            raise RequestError(f"{name} is longer than {most} characters", param=name)
        return value

    def choice(self, name: str, known: list[str], default: str) -> str:
        value = self._get(name, str, "a string")
        if value is not None and value not in known:
            status, code = (404, "model_not_found") if name == "model" else (400, None)
            listed = ", ".join(known)
            raise RequestError(f"no {name} '{value}', known: {listed}", status, name, code)
        return default if value is None else value

    def integer(self, name: str, least: int, most: int) -> int | None:
        value = self._get(name, int, "a whole number")
        if value is not None and not least <= value <= most:
            raise RequestError(f"{name} must be from {least} to {most}", param=name)
        return value

    def number(self, name: str) -> float | None:
        value = self._get(name, (int, float), "a number")
        # An integer may be too long for a float, too.
        if value is not None and not (abs(value) <= 1e6 and math.isfinite(value)):
            raise RequestError(f"{name} must be a finite number, at most 1e6", param=name)
        return value

    def boolean(self, name: str) -> bool | None:
        return self._get(name, bool, "true or false")


def _size(text: str | None, config: ModelConfig, limits: Limits) -> tuple[int, int]:
    height, width = config.image_size
    most = 4 * height * width if limits.max_pixels is None else limits.max_pixels
    if text is not None and text != "auto":
        found = re.fullmatch(r"([0-9]{1,6})x([0-9]{1,6})", text)
        if not found:
            raise RequestError(f"the size must be like {width}x{height}, or auto", param="size")
        width, height = int(found[1]), int(found[2])
    if width * height > most:
        raise RequestError(f"{width}x{height} is more than the {most} pixels allowed", param="size")
    try:
        check_size(config, height, width)
    except UserError as error:
        raise RequestError(str(error), param="size") from None
    return width, height
