"""Public CLIP checkpoints with both towers: names, sizes and preprocessing.

The text tower alone, as the text encoder of a model, is in `clip`.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_unflatten

from mlx_snapgen.checkpoint import clip
from mlx_snapgen.checkpoint.hub import find_model
from mlx_snapgen.checkpoint.module import (
    cast,
    check_fit,
    load_stored,
    read_part,
    shapes,
)
from mlx_snapgen.config import ClipConfig, PictureEncoderConfig
from mlx_snapgen.errors import UserError, naming
from mlx_snapgen.json_values import check_only, from_dict
from mlx_snapgen.networks.clip import Clip
from mlx_snapgen.networks.text_encoders.clip import ClipTokenizer
from mlx_snapgen.reading import read_json

PART = "clip"
"""Name of the component in a folder that `convert.from_torch --kind clip-score` made."""

TOKENIZER = "tokenizer.model"

_PREFIX = re.compile(
    r"^(module\.|_text_encoder\.|text_encoder\.|text\.|_image_encoder\.|_logit_scale\.)+"
)
_PICTURE_NAMES = (
    *clip.LAYER_NAMES,
    (r"embeddings\.patch_embedding\.|conv1\.", "patch_embedding."),
    (r"(?:embeddings\.)?class_embedding", "class_embedding"),
    (r"pre_layrnorm\.|ln_pre\.", "pre_norm."),
    (r"post_layernorm\.|ln_post\.", "post_norm."),
)
_SHARED_NAMES = {
    "visual_projection.weight": "picture_projection.weight",
    "visual.proj": "picture_projection.weight",
    "text_projection.weight": "text_projection.weight",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
}


_OPEN_CLIP = {
    *("image_size", "layers", "width", "head_width", "mlp_ratio", "patch_size", "patch_dropout"),
    *("context_length", "vocab_size", "heads", "hf_tokenizer_name", "tokenizer_kwargs"),
}
"""Settings of OpenCLIP's towers that are read, or change nothing but training."""
_OPEN_CLIP_DEFAULTS = {"pool_type": ("tok", "argmax")}


def public_name(key: str) -> str | None:
    """Our name of a public checkpoint's key; None for what is no weight, such as position ids.

    Raises:
        UserError: a key of an unknown layout.
    """
    name = _PREFIX.sub("", key)
    if name in _SHARED_NAMES:
        return _SHARED_NAMES[name]
    tower, _, rest = name.partition(".")
    if tower not in ("visual", "vision_model"):
        found = clip.public_name(key)
        return None if found is None else f"text_encoder.{found}"
    if rest == "embeddings.position_ids":
        return None
    if (found := clip.renamed(rest, _PICTURE_NAMES)) is not None:
        return f"picture_encoder.{found}"
    raise UserError(
        f"'{key}' belongs to no CLIP picture encoder that is known here, which is a Vision "
        "Transformer with a class token"
    )


def sanitize(weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """A public checkpoint's weights under the names of `Clip`.

    Accepts the layouts of Hugging Face's `CLIPModel`, OpenCLIP, OpenAI and TinyCLIP, with or
    without the prefixes of wrappers.

    Raises:
        UserError: a key of another layout.
    """
    found: dict[str, mx.array] = {}
    for key, value in weights.items():
        name = public_name(key)
        if name is None:
            continue
        if key.endswith((".proj", "text_projection")):
            value = value.T  # OpenCLIP multiplies from the right
        elif name == "picture_encoder.patch_embedding.weight":
            value = value.transpose(0, 2, 3, 1)
        found[name] = value.squeeze() if name == "logit_scale" else value
    return clip.joined(found)


def describe(folder: Path, weights: Mapping[str, mx.array]) -> tuple[ClipConfig, ClipTokenizer]:
    """Sizes and tokenizer of the public CLIP in `folder`, whose `sanitize`d weights are given.

    Sizes are those of the weights; heads, activation and the colors' mean and deviation are read
    from config.json and preprocessor_config.json, or open_clip_config.json.

    Raises:
        UserError: files that are missing, damaged or of another network.
    """

    def tower(name: str) -> dict[str, mx.array]:
        start = f"{name}."
        return {k.removeprefix(start): v for k, v in weights.items() if k.startswith(start)}

    picture = tower("picture_encoder")
    if not picture:
        raise UserError(f"{folder} holds no CLIP picture encoder: get a whole CLIP")
    text, tokenizer = clip.describe(folder, tower("text_encoder"))
    try:
        hidden_size, patch_size = picture["patch_embedding.weight"].shape[:2]
        side = round((len(picture["position_embedding"]) - 1) ** 0.5)
        sizes = {
            "hidden_size": hidden_size,
            "num_layers": len({k.split(".")[1] for k in picture if k.startswith("layers.")}),
            "mlp_size": len(picture["layers.0.linear1.weight"]),
            "patch_size": patch_size,
            "image_size": side * patch_size,
        }
        with naming(folder):
            config = from_dict(PictureEncoderConfig, sizes | _settings(folder, hidden_size))
        projection_size = len(weights["picture_projection.weight"])
    except clip.WRONG_KIND as error:
        raise UserError(f"{folder} holds no CLIP picture encoder: {error!r}") from None
    return ClipConfig(text, config, projection_size), tokenizer


def _settings(folder: Path, hidden_size: int) -> dict[str, Any]:
    """The settings of the picture tower that the shapes of the weights do not determine."""
    path = folder / "open_clip_config.json"
    if path.is_file():
        values = read_json(path)
        model = values.get("model_cfg", values)
        vision = model.get("vision_cfg", {})
        for settings in (vision, model.get("text_cfg", {})):
            for name, value in settings.items():
                known = name in _OPEN_CLIP or value in _OPEN_CLIP_DEFAULTS.get(name, ())
                if value and not known:
                    raise UserError(f"{path}: {name} '{value}' is of another network than CLIP's")
        head_dim = vision.get("head_width", 64)
        activation = "quick_gelu" if model.get("quick_gelu") else "gelu"
        how = values.get("preprocess_cfg", {})
        resized = how.get("interpolation", "bicubic"), how.get("resize_mode", "shortest")
        if resized != ("bicubic", "shortest"):
            raise UserError(f"{path}: pictures are resized by {' and '.join(resized)}, not as CLIP")
        found = {"num_heads": hidden_size // head_dim, "activation": activation}
        return found | _colors(how, "mean", "std")
    vision = read_json(folder / "config.json").get("vision_config", {})
    check_only(vision, {"layer_norm_eps": (1e-5,)}, folder / "config.json")
    # Hugging Face omits values that equal its defaults, which are used here.
    found = {
        "num_heads": vision.get("num_attention_heads", 12),
        "activation": vision.get("hidden_act", "quick_gelu"),
    }
    path = folder / "preprocessor_config.json"
    return found | _colors(read_json(path) if path.is_file() else {}, "image_mean", "image_std")


def _colors(values: Mapping[str, Any], mean: str, std: str) -> dict[str, Any]:
    """Those of the two settings that are given; CLIP's own are the config's defaults."""
    named = {"mean": values.get(mean), "std": values.get(std)}
    return {name: value for name, value in named.items() if value is not None}


def load_clip_towers(source: str | Path) -> Clip:
    """A whole CLIP in float32 from a folder or Hugging Face repository.

    Args:
        source: of `convert.from_torch --kind clip-score`, or a public one in safetensors, in
            Hugging Face's format or OpenCLIP's.

    Raises:
        UserError: files that are missing, damaged or of another network.
    """
    what = f"a CLIP is wanted, and {source}"
    folder = find_model(
        source, files=clip.FILES, check=lambda found: clip.check_is_clip(found, what)
    )
    part = read_part(folder, PART)
    if part is None:
        command = "python -m convert.from_torch --kind clip-score"
        path, weights = clip.read_public(folder, sanitize, convert=command)
        model = Clip(*describe(folder, weights))
        check_fit(shapes(weights), shapes(model.parameters()), path)
        model.update(tree_unflatten(list(weights.items())))
    else:
        with naming(folder / "config.json"):
            config = from_dict(ClipConfig, part.config)
        tokenizer = ClipTokenizer.from_file(folder / TOKENIZER, config.text.max_length)
        model = Clip(config, tokenizer)
        load_stored(model, part)
    cast(model, mx.float32)
    mx.eval(model.parameters())
    return model
