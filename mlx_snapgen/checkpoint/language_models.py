"""Public language models as text encoders, through mlx-lm."""

import dataclasses
import glob
import types
import typing
from collections.abc import Mapping
from pathlib import Path, PosixPath
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from mlx_snapgen._interrupts import interrupts_deferred
from mlx_snapgen.checkpoint.module import dequantize_on_cpu
from mlx_snapgen.config import TextEncoderConfig
from mlx_snapgen.errors import UserError, one_line
from mlx_snapgen.json_values import MOST_LAYERS, check_only, check_sizes
from mlx_snapgen.networks.text_encoders.base import PromptFormat
from mlx_snapgen.networks.text_encoders.gemma import GemmaTextEncoder
from mlx_snapgen.networks.text_encoders.qwen import QwenPromptEncoder
from mlx_snapgen.reading import check_regular, read_object
from mlx_snapgen.tensor_files import read_header

GEMMA_FILES = ("*.json", "*.safetensors", "tokenizer.model", "*.jinja")
TEXT_FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja", "spiece.model")
"""Files of a repository that `load_gemma` needs, and the text encoder of a public model."""


def load_gemma(folder: Path, config: TextEncoderConfig) -> GemmaTextEncoder:
    """A Gemma 3 from a folder in Hugging Face's or mlx-lm's format, quantized or not.

    Raises:
        UserError: mlx-lm is not installed, or the folder holds no Gemma 3 that fits `config`.
    """
    try:
        with interrupts_deferred():
            from mlx_lm.utils import load_model, load_tokenizer
    except ImportError:
        raise UserError(
            'Gemma needs mlx-lm: pip install "mlx_snapgen[public]", or choose other text encoders'
        ) from None
    path = folder / "config.json"
    try:
        given, changed = read_object(path), {}
        check_sizes(given, path)
        if given.get("model_type") in GEMMA_TYPES:
            text = gemma_text(given, path)
            changed = {"text_config": text} if "text_config" in given else text
        check_files(folder)
        loaded = load_model(_Folder(folder), lazy=True, model_config=changed)
        model, values = cast(Any, loaded)
    except Exception as error:
        # mlx-lm raises exceptions of many kinds for an incomplete folder.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot load Gemma from {folder}: {reason}") from None
    if values["model_type"] not in GEMMA_TYPES:
        raise UserError(f"{folder} holds a {values['model_type']}, not a Gemma 3")
    tokenizer = TextTokenizer(load_tokenizer, folder)
    if tokenizer.bos_token_id is None:
        raise UserError(f"{folder}: its tokenizer has no begin mark, bos_token")
    text = getattr(model, "language_model", model).model
    check_arguments(text.args, folder)
    tokenizer.check(text.args.vocab_size, "a red apple", 0)
    pattern = text.args.sliding_window_pattern
    if not 1 <= pattern <= MOST_LAYERS:
        name = folder / "config.json"
        raise UserError(f"{name}: 'sliding_window_pattern' cannot be {pattern}")
    if text.args.hidden_size != config.hidden_size:
        raise UserError(
            f"{folder} gives states of {text.args.hidden_size}, the model takes those of "
            f"{config.hidden_size}"
        )
    return GemmaTextEncoder(config, text, tokenizer)


def load_qwen(
    folder: Path, prompt_format: PromptFormat, *, dims: int, dtype: mx.Dtype | None = None
) -> QwenPromptEncoder:
    """The language model of a teacher, from a folder of Hugging Face or mlx-lm.

    Args:
        dims: width of the states that the transformer takes.
        dtype: floating type of the weights; None keeps theirs.

    Raises:
        UserError: mlx-lm is not installed, or the folder holds another model.
    """
    try:
        with interrupts_deferred():
            from mlx_lm.utils import load_model, load_tokenizer
    except ImportError:
        raise UserError('a teacher needs mlx-lm: pip install "mlx_snapgen[public]"') from None
    values = check_kind(folder, prompt_format)
    check_sizes(values, folder / "config.json")
    check_qwen(values, folder / "config.json")
    try:
        check_files(folder)
        model, _ = load_model(
            _Folder(folder), lazy=True, get_model_classes=lambda config: (_Tower, _Arguments)
        )
    except Exception as error:
        # mlx-lm raises exceptions of many kinds for an incomplete folder.
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"cannot load the language model in {folder}: {reason}") from None
    tokenizer = TextTokenizer(load_tokenizer, folder)
    tower: Any = model.model
    check_arguments(tower.args, folder)
    tokenizer.check(tower.args.vocab_size, prompt_format.template, prompt_format.dropped)
    layers = prompt_format.joined_layers
    width = tower.args.hidden_size * max(1, len(layers))
    if width != dims:
        raise UserError(f"{folder} gives states of {width}, the teacher takes those of {dims}")
    if layers:
        # The last layer's output would be normalized.
        if len(tower.layers) <= layers[-1]:
            raise UserError(
                f"{folder} has {len(tower.layers)} layers, this teacher's text encoder has more "
                f"than {layers[-1]}"
            )
        tower.layers = tower.layers[: layers[-1]]
    if prompt_format.skipped_layers:
        tower.layers = tower.layers[: -prompt_format.skipped_layers]
        tower.norm = nn.Identity()
    dequantize_on_cpu(tower)
    if dtype is not None:
        tower.set_dtype(dtype)
    return QwenPromptEncoder(tower, tokenizer, prompt_format=prompt_format)


def check_kind(folder: Path, prompt_format: PromptFormat) -> dict[str, Any]:
    """Config of a teacher's text encoder; `UserError` for one of another kind."""
    values = read_object(folder / "config.json")
    kind = values.get("model_type")
    if kind not in prompt_format.model_types:
        known = " or ".join(prompt_format.model_types)
        raise UserError(f"{folder} holds a {kind}, this teacher's text encoder is a {known}")
    return values


# --- settings that mlx-lm does not read -----------------------------------------------------------

GEMMA_TYPES = ("gemma3", "gemma3_text")
LONGEST = 2048
"""Tokens that no prompt has: a sliding window of so many has no effect."""

PLAIN_ROPE = ("default", "mrope")
"""For text the three axes of M-RoPE have the same positions."""
SCALED_ROPE = ("linear", "llama3", "yarn")
_ROPE_ONLY = {
    **dict.fromkeys(("rope_type", "type"), (*PLAIN_ROPE, *SCALED_ROPE)),
    **dict.fromkeys(("attention_factor", "mscale", "mscale_all_dim"), ()),
    "partial_rotary_factor": (1,),
    "truncate": (True,),
}


def check_qwen(values: dict[str, Any], path: Path) -> None:
    """`UserError` for a setting of a Qwen that changes the states and that mlx-lm ignores.

    Args:
        values: of config.json.
        path: of it, for messages.
    """
    text = values.get("text_config") or values
    check_only(text, {"hidden_act": ("silu",), "partial_rotary_factor": (1,)}, path)
    if str(text.get("model_type", values.get("model_type"))).startswith("qwen3"):
        check_only(text, {"attention_bias": (False,)}, path)
    check_only(_rope_scaling(text), _ROPE_ONLY, path)
    layers, window = text.get("layer_types"), text.get("sliding_window", 4096)
    check_only({"layer_types": layers}, {"layer_types": (_full(layers),)}, path)
    if text.get("use_sliding_window") and isinstance(window, int) and window < LONGEST:
        check_only(text, {"use_sliding_window": (False,)}, path)


def _full(layers: Any) -> list[str]:
    return ["full_attention"] * (len(layers) if isinstance(layers, list) else 0)


def _rope_scaling(text: Mapping[str, Any]) -> dict[str, Any]:
    """The scaling of rotary positions; transformers 5 has it among its `rope_parameters`."""
    found = text.get("rope_scaling") or text.get("rope_parameters")
    return found if isinstance(found, dict) else {}


def gemma_text(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """The settings of a Gemma's text network, with the names that mlx-lm reads.

    Args:
        values: of config.json.
        path: of it, for messages.

    Raises:
        UserError: a setting that changes the states and that mlx-lm does not have.
    """
    text = dict(values)
    if "text_config" in values:
        # Google's files leave out the values of the 4B model; mlx-lm's defaults are the 1B model's.
        defaults = {
            "vocab_size": values.get("vocab_size", 262208),
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
        }
        text = defaults | values["text_config"]
    text["model_type"] = "gemma3_text"
    only = {
        "hidden_activation": ("gelu_pytorch_tanh",),
        "attention_bias": (False,),
        "attn_logit_softcapping": (),
        "use_bidirectional_attention": (False,),
    }
    check_only(text, only, path)
    # transformers 5 writes the rotary settings by kind of layer, and the pattern as a list.
    rope = text.get("rope_parameters")
    if isinstance(rope, dict) and ("full_attention" in rope or "sliding_attention" in rope):
        kinds = (rope.get(f"{kind}_attention") for kind in ("full", "sliding"))
        whole, local = (found if isinstance(found, dict) else {} for found in kinds)
        text["rope_theta"] = whole.get("rope_theta", text.get("rope_theta", 1_000_000.0))
        text["rope_local_base_freq"] = local.get(
            "rope_theta", text.get("rope_local_base_freq", 10_000.0)
        )
        check_only(local, _ROPE_ONLY | {"rope_type": ("default",)}, path)
        if whole.get("rope_type", "default") != "default" and not text.get("rope_scaling"):
            text["rope_scaling"] = {k: v for k, v in whole.items() if k != "rope_theta"}
    check_only(text.get("rope_scaling"), _ROPE_ONLY, path)
    if isinstance(layers := text.get("layer_types"), list) and layers:
        whole = [i for i, kind in enumerate(layers) if kind == "full_attention"]
        # Without a full layer, the pattern is longer than the network.
        pattern = whole[0] + 1 if whole else len(layers) + 1
        kinds = ("full_attention", "sliding_attention")
        regular = [kinds[bool((i + 1) % pattern)] for i in range(len(layers))]
        check_only(text, {"layer_types": (regular,)}, path)
        stored = text.get("sliding_window_pattern")
        if whole or not isinstance(stored, int) or stored <= len(layers):
            text["sliding_window_pattern"] = pattern
    return text


# --- tokenizers and files -------------------------------------------------------------------------


class TextTokenizer:
    """A tokenizer of transformers, whose files are of unknown origin.

    Args:
        load: `mlx_lm.utils.load_tokenizer`.
        folder: of its files.

    Raises:
        UserError: names the files. transformers raises exceptions of many kinds, also later.
    """

    def __init__(self, load: Any, folder: Path):
        self._vocab_size = 2**31
        names = ("tokenizer_config.json", "tokenizer.json", "special_tokens_map.json")
        names += ("added_tokens.json",)
        there = [name for name in names if (folder / name).is_file()]
        absent = "" if names[1] in there else f", which has no {names[1]}"
        self._where = f"cannot read {' and '.join(there) or 'a tokenizer'} in {folder}{absent}"
        try:
            with interrupts_deferred():  # transformers imports torch, if it is installed
                self._tokenizer = load(folder)
        except Exception as error:
            wrong = _is_of_config(error, folder)
            where = f"cannot read {folder / 'config.json'}" if wrong else self._where
            raise UserError(f"{where}: {one_line(error, 120)}") from None
        self.bos_token_id: int | None = self._id("bos_token_id")
        self.pad_token_id: int | None = self._id("pad_token_id")

    def _id(self, name: str) -> int | None:
        found = getattr(self._tokenizer, name)
        if found is not None and not isinstance(found, int):
            raise UserError(f"{self._where}: its {name} is {found!r}")
        return found

    def check(self, vocab_size: int, text: str, least: int) -> None:
        """`UserError` unless a text has over `least` tokens, all in a network of `vocab_size`."""
        self._vocab_size = vocab_size
        self._checked([n for n in (self.bos_token_id, self.pad_token_id) if n is not None])
        if len(self.encode(text)) <= least:
            raise UserError(f"{self._where}: it splits a text into too few tokens")

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """The token ids of a text; `UserError` if the tokenizer cannot encode it."""
        try:
            return self._checked(
                self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
            )
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{self._where}: {error!r}") from None

    def decode(self, tokens: list[int]) -> str:
        """The text of token ids."""
        return self._tokenizer.decode(tokens)

    def _checked(self, tokens: list[int]) -> list[int]:
        if odd := next((n for n in tokens if not 0 <= n < self._vocab_size), None):
            raise UserError(
                f"{self._where}: it has the token {odd}, its network has {self._vocab_size}"
            )
        return tokens


def _is_of_config(error: Exception, folder: Path) -> bool:
    """Whether transformers, which reads config.json for the tokenizer, refuses a value of that."""
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(folder)
    except Exception as found:
        return str(found) == str(error)
    return False


def check_arguments(args: Any, folder: Path) -> None:
    """`UserError` for a setting of another type than mlx-lm takes: it does not look either."""
    kinds = typing.get_type_hints(type(args))
    for field in dataclasses.fields(args):
        name, value = field.name, getattr(args, field.name)
        if value is not field.default and not _is_of(value, kinds[name]):
            shown = one_line(repr(value), 40)
            raise UserError(f"{folder / 'config.json'}: '{name}' cannot be {shown}")


def _is_of(value: Any, kind: Any) -> bool:
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return any(_is_of(value, one) for one in typing.get_args(kind))
    if isinstance(value, bool):
        return kind in (bool, Any)
    kind = typing.get_origin(kind) or kind
    if kind is int and isinstance(value, float):
        return value.is_integer()
    return kind is Any or isinstance(value, (int, float) if kind is float else kind)


def check_files(folder: Path) -> None:
    """An error if a safetensors file is damaged, or a file is none: mlx-lm does not look."""
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors":
            read_header(path)
        elif path.exists() and (path.suffix or not path.is_dir()):  # .git and the like are folders
            check_regular(path)


class _Folder(PosixPath):
    """A folder for mlx-lm's `load_model`, which takes `folder / "model*.safetensors"` as a pattern.

    Brackets in the folder's own name must be none.
    """

    def __truediv__(self, name: Any) -> Path:
        return Path(glob.escape(str(self)) if "*" in str(name) else str(self), name)


class _Arguments(dict):
    """The values of the text tower in config.json; those of other towers are dropped."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "_Arguments":
        text = values.get("text_config") or values
        # transformers 5 stores the base of RoPE in `rope_parameters`.
        rope, scaling = text.get("rope_parameters") or {}, _rope_scaling(text)
        theta = {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
        if scaling.get("rope_type", scaling.get("type", "default")) in PLAIN_ROPE:
            scaling = None
        elif "max_position_embeddings" in text:
            # mlx-lm's own default is a number.
            most = {"original_max_position_embeddings": text["max_position_embeddings"]}
            scaling = most | scaling
        theta["rope_scaling"] = scaling
        return cls(text | theta | {"tie_word_embeddings": True})


class _Tower(nn.Module):
    """A language model without its head. Its keys start with "model"."""

    def __init__(self, values: _Arguments):
        super().__init__()
        if values["model_type"].startswith("qwen3"):
            from mlx_lm.models.qwen3 import ModelArgs
            from mlx_lm.models.qwen3 import Qwen3Model as Tower
        else:
            from mlx_lm.models.qwen2 import ModelArgs
            from mlx_lm.models.qwen2 import Qwen2Model as Tower
        self.model = cast(Any, Tower)(ModelArgs.from_dict(values))

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """The text tower's weights from any known layout; vision tower and head are dropped."""
        named = {text_tower_name(key): value for key, value in weights.items()}
        return {name: value for name, value in named.items() if name is not None}


def text_tower_name(key: str) -> str | None:
    """mlx-lm's name of a weight of the text tower, in any known layout; None for other towers."""
    name = key.removeprefix("model.").removeprefix("language_model.").removeprefix("model.")
    is_other = name.startswith(("visual.", "vision_tower.", "lm_head."))
    return None if is_other else f"model.{name}"
