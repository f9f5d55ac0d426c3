"""What public teachers read: the states of a Qwen language model, through mlx-lm.

Install it with `pip install "mlx_snapgen[teacher]"`. Padding stands on the right of a causal model:
no token that counts sees it.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlx_snapgen.errors import UserError
from mlx_snapgen.networks.text_encoders.base import padded

FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja")
"""What of a repository is needed."""

PAD_TO = 32
"""Rows are padded to a multiple, so that a compiled step meets few lengths."""


class Reading(NamedTuple):
    """How a teacher has its prompts read."""

    model_types: tuple[str, ...]
    """Of the language model, as in its config.json."""
    template: str
    """What is read, the prompt in place of {}."""
    dropped: int
    """Tokens at the beginning whose states are left out."""
    max_length: int
    """Tokens at most, those that are dropped not counted; what follows is cut."""
    empty: str
    """The prompt to lead away from."""
    skipped_layers: int = 0
    """Layers at the end that are left out, and with any the last norm too."""


QWEN_IMAGE = Reading(
    model_types=("qwen2_5_vl", "qwen2"),
    template="<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, "
    "quantity, text, spatial relationships of the objects and background:<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
    dropped=34,
    max_length=1024,
    empty=" ",
)
"""Qwen-Image's: Qwen2.5-VL's text tower, the template and its 34 tokens as in diffusers'
QwenImagePipeline."""

Z_IMAGE = Reading(
    model_types=("qwen3",),
    template="<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
    dropped=0,
    max_length=512,
    empty="",
    skipped_layers=1,
)
"""Z-Image's: Qwen3's chat template, and the states before the last layer, as in diffusers'
ZImagePipeline."""


class PromptEncoder:
    """Prompts -> states of a language model.

    Args:
        model: the network, tokens (B, L) -> states (B, L, D).
        tokenizer: as `mlx_lm.utils.load_tokenizer` gives it.
        reading: how it is asked.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, reading: Reading):
        self.model, self.reading, self._tokenizer = model, reading, tokenizer

    def tokenize(self, prompts: Sequence[str]) -> tuple[mx.array, mx.array]:
        """Prompts -> tokens (B, L) and mask (B, L), the template's first tokens still there."""
        most = self.reading.dropped + self.reading.max_length
        rows = [
            self._tokenizer.encode(
                self.reading.template.replace("{}", prompt), add_special_tokens=False
            )[:most]
            for prompt in prompts
        ]
        kept = max(len(row) - self.reading.dropped for row in rows)
        length = self.reading.dropped + -(-kept // PAD_TO) * PAD_TO
        return padded(rows, length, self._tokenizer.pad_token_id or 0)

    def __call__(self, prompts: Sequence[str]) -> tuple[mx.array, mx.array]:
        """Prompts -> states (B, L, D), zero where padded, and mask (B, L); evaluated.

        L is a multiple of 32.
        """
        tokens, mask = self.tokenize(prompts)
        states, mask = (
            self.model(tokens)[:, self.reading.dropped :],
            mask[:, self.reading.dropped :],
        )
        states = mx.where(mask[..., None], states, 0)
        mx.eval(states, mask)
        return states, mask


def load_text_encoder(
    folder: Path, reading: Reading, dims: int, dtype: mx.Dtype | None = None
) -> PromptEncoder:
    """The language model of a teacher, from a folder of Hugging Face or mlx-lm.

    Args:
        dims: width of the states that the transformer takes.
        dtype: floating type of the weights; None keeps theirs.

    Raises:
        UserError: mlx-lm is not installed, or the folder holds another model.
    """
    try:
        from mlx_lm.utils import load_model, load_tokenizer
    except ImportError:
        raise UserError('a teacher reads with mlx-lm: pip install "mlx_snapgen[teacher]"') from None
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {folder / 'config.json'}: {error}") from None
    kind = values.get("model_type")
    if kind not in reading.model_types:
        known = " or ".join(reading.model_types)
        raise UserError(f"{folder} holds a {kind}, this teacher reads with a {known}")
    try:
        model, _ = load_model(
            folder, lazy=True, get_model_classes=lambda config: (_Tower, _Arguments)
        )
        tokenizer = load_tokenizer(folder)
    except Exception as error:
        # Whatever a folder lacks, mlx-lm and transformers tell in exceptions of many kinds.
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"cannot load the language model in {folder}: {reason}") from None
    tower = model.model
    if tower.args.hidden_size != dims:
        raise UserError(
            f"{folder} gives states of {tower.args.hidden_size}, the teacher takes those of {dims}"
        )
    if reading.skipped_layers:
        tower.layers = tower.layers[: -reading.skipped_layers]
        tower.norm = nn.Identity()
    if dtype is not None:
        tower.set_dtype(dtype)
    return PromptEncoder(tower, tokenizer, reading)


class _Arguments(dict):
    """config.json's values for the text tower alone, whatever towers it stands beside."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "_Arguments":
        text = values.get("text_config") or values
        # transformers 5 keeps the base among the other parameters of the rotation.
        rope = text.get("rope_parameters") or {}
        theta = {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
        scaling = text.get("rope_scaling") or {}
        if scaling.get("type", scaling.get("rope_type")) == "mrope":
            # Its three axes count alike in text: the plain rotation.
            text = text | {"rope_scaling": None}
        return cls(text | theta | {"tie_word_embeddings": True})


class _Tower(nn.Module):
    """The transformer under a language model's head, with its keys under "model"."""

    def __init__(self, values: _Arguments):
        super().__init__()
        if values["model_type"].startswith("qwen3"):
            from mlx_lm.models.qwen3 import ModelArgs
            from mlx_lm.models.qwen3 import Qwen3Model as Tower
        else:
            from mlx_lm.models.qwen2 import ModelArgs
            from mlx_lm.models.qwen2 import Qwen2Model as Tower
        self.model = Tower(ModelArgs.from_dict(values))

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """The text tower's weights, from any of the layouts in use; vision and head dropped."""
        kept = {}
        for key, value in weights.items():
            name = key.removeprefix("model.").removeprefix("language_model.")
            name = name.removeprefix("model.")
            if not name.startswith(("visual.", "vision_tower.", "lm_head.")):
                kept[f"model.{name}"] = value
        return kept
