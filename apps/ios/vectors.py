"""Write apps/ios/Tests/vectors.json, the expected results for the tests of the Swift package.

    python -m apps.ios.vectors

mlx_snapgen computes the results. tests/applications/test_ios.py checks that the file is up to date.
"""

import functools
import json
from pathlib import Path
from typing import Any

import mlx_snapgen  # noqa: F401  before mlx: otherwise MLX links its slow reference BLAS

# isort: split
import mlx.core as mx
import numpy as np

from mlx_snapgen.alpha import straight
from mlx_snapgen.checkpoint.config import ModelFolder
from mlx_snapgen.cli.options import Parser
from mlx_snapgen.errors import run_command
from mlx_snapgen.networks.text_encoders.sentencepiece import SentencePieceTokenizer
from mlx_snapgen.pictures import to_uint8
from mlx_snapgen.sampling import denoise, get_noise, get_schedule, guide

PATH = Path(__file__).parent / "Tests/vectors.json"
BUILT_IN = ModelFolder.open(None)
TOKENIZER = BUILT_IN.path / "tokenizer_0.model"
MAX_LENGTH = BUILT_IN.config.text_encoders[0].max_length

PROMPTS = (
    "a red apple",
    "A blue cat next to a green ice cream cone.",
    "",
    "  two\tdogs \n and   a  pineapple  ",
    "a strawberry, an umbrella and 3 purple hot air balloons: what's this?!",
    "\ufb01re-engine \u2116\u00bd \uff21\uff22\uff23",
    "na\u00efve cafe\u0301 stra\u00dfe \u0130stanbul",
    "日本語 の 🦊🦊 fox",
    "a\u200bcat\ufeff\u0001dog\u001cbird\u00a0sun",
    "\u2581a\u2581star <s> </s> <unk>",
    "a yellow sun " * 20,
    "xqzjvwkk",
)


def vectors() -> dict:
    """All vectors, as plain JSON values; latents are flat, in the order (channel, row, column)."""
    tokenizer = SentencePieceTokenizer.from_file(TOKENIZER, MAX_LENGTH)
    tokens = []
    for prompt in PROMPTS:
        row, mask = tokenizer([prompt])
        tokens.append(
            {"prompt": prompt, "tokens": row[0].tolist(), "mask": mask[0].astype(mx.int32).tolist()}
        )
    values = [-1.5, -1.0, -0.75, 0.0, 0.25, 0.5, 0.999, 1.0, 1.25, -0.3, 0.1, 0.7]
    alpha = [-0.98, -0.9, 0.0, 0.945]
    cond, uncond = [0.5, -1.0, 2.0], [0.25, 1.0, 2.0]
    return {
        "max_length": MAX_LENGTH,
        "tokens": tokens,
        "schedules": [
            {"steps": steps, "shift": shift, "sigmas": get_schedule(steps, shift)}
            for steps, shift in ((4, 3.0), (1, 3.0), (28, 4.0), (5, 1.0))
        ],
        "noise": [
            _noise(*sizes) for sizes in ((0, 0, 4, 3, 5), (7, 1, 3, 3, 5), (2**40 + 3, 3, 2, 2, 2))
        ],
        "denoise": [_denoised(fresh) for fresh in (False, True)],
        "guide": {
            "conditional": cond,
            "unconditional": uncond,
            "scale": 4.0,
            "guided": guide(mx.array(cond), mx.array(uncond), 4.0).tolist(),
        },
        "pixels": [
            {"values": v, "bytes": _pixels(v)}
            for v in (values, [*map(min, values, 3 * alpha), *alpha])
        ],
    }


def _pixels(values: list[float]) -> list[int]:
    """Bytes of red, green, blue and alpha, colors times alpha, of (channel, 4 pixels) values."""
    picture = to_uint8(mx.array(values).reshape(-1, 4).T)
    if picture.shape[1] == 3:
        picture = np.pad(picture, [(0, 0), (0, 1)], constant_values=255)
    alpha = straight(picture[None])[0, :, 3:]
    return np.concatenate([np.minimum(picture[:, :3], alpha), alpha], axis=1).reshape(-1).tolist()


def _flat(latents: mx.array) -> Any:
    """(1, H, W, C) -> numbers in the order (C, H, W)."""
    return latents[0].transpose(2, 0, 1).reshape(-1).tolist()


def _noise(seed: int, draw: int, channels: int, height: int, width: int) -> dict:
    return {
        **{"seed": seed, "draw": draw, "channels": channels, "height": height, "width": width},
        "latents": _flat(get_noise(seed, height, width, channels, draw)),
    }


def _denoised(fresh: bool) -> dict:
    """Four steps of v = x_t / 2 + sigma from the noise of seed 3."""
    draw = functools.partial(get_noise, 3, 2, 2, 3)
    steps = list(
        denoise(
            lambda x, sigma: x / 2 + sigma, draw(0), get_schedule(4, 3.0), draw if fresh else None
        )
    )
    return {
        **{"fresh_noise": fresh, "seed": 3, "steps": 4, "shift": 3.0},
        "latents": [_flat(step.x_t) for step in steps],
        "x0": [_flat(step.x0) for step in steps],
    }


def main() -> None:
    Parser(prog="python -m apps.ios.vectors", description=__doc__).parse_args()
    lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in vectors().items())
    PATH.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    print(PATH)


if __name__ == "__main__":
    run_command(main)
