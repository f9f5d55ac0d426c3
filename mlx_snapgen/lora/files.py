"""LoRA files: safetensors, and how their keys map to layers.

`save_lora` writes the keys of diffusers and PEFT: `transformer.<layer>.lora_A.weight`,
`transformer.<layer>.lora_B.weight` and a scalar `transformer.<layer>.alpha`.
"""

import itertools
import json
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_snapgen.config import SamplerConfig
from mlx_snapgen.errors import UserError, nearest, one_line
from mlx_snapgen.files import expanded, save_tensors, whole_file
from mlx_snapgen.json_values import from_dict, to_dict
from mlx_snapgen.lora.adapters import (
    Adapter,
    adapted_layers,
    attach,
    get_lora_weights,
    layer_dims,
    layer_dtype,
    linear_layers,
)
from mlx_snapgen.lora.layouts import Place, original_names
from mlx_snapgen.lora.peft import MOST_ALPHA, PEFT_FILES, config_beside, peft_alphas, peft_config
from mlx_snapgen.lora.things import KEY, Thing, add_thing, check_rows, check_thing, read_thing
from mlx_snapgen.presets import FOUR_STEPS
from mlx_snapgen.reading import parse_json
from mlx_snapgen.tensor_files import load_tensors, read_header

PREFIXES = (
    "transformer.",
    "diffusion_model.",
    "base_model.model.model.net.",
    "base_model.model.",
    "model.net.",
)
"""Prefixes of a layer's path in files; `save_lora` writes the first. MiniT2I's have "net"."""
FLAT_PREFIXES = ("lora_unet_", "lora_transformer_", "lycoris_")
"""Prefixes of kohya's flat names, where underscores replace the dots of a path."""
PARTS = {
    **{"lora_A": "a", "lora_B": "b", "lora_down": "a", "lora_up": "b"},
    **{"lora.down": "a", "lora.up": "b"},
}


def save_lora(
    path: str | Path,
    module: nn.Module,
    *,
    name: str = "default",
    base_model: str | None = None,
    few_step: SamplerConfig | None = None,
    words: Sequence[str] = (),
    widths: Sequence[str] = (),
    dtype: mx.Dtype | None = None,
    with_alpha: bool = True,
    thing: Thing | None = None,
    rows: mx.array | None = None,
) -> None:
    """Write one adapter to a new .safetensors file, whole or not at all.

    The header has rank, alpha, name and format, `base_model`, the name of the model that the
    adapter was trained for, and `few_step`, the sampler of a few-step mode (see
    `few_step_sampler`), `words`, new words that it was trained on (see `lora_words`), and
    `model_widths`, the names of the widths that it was trained at, or else the adapter's. The
    adapter's weight is not written: it is the user's choice. `dtype` is
    the floating type to store; None keeps the adapter's. Without alpha, B is scaled instead:
    diffusers refuses alphas beside the keys of FLUX.2, and takes them wrongly for Z-Image.

    Args:
        thing: that it teaches, with its `rows`, see `lora.things`.

    Raises:
        UserError: no such adapter, a file that exists, or one that cannot be written.
    """
    path = expanded(path)
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: give a name ending in .safetensors")
    found = {p: m.adapters[name] for p, m in adapted_layers(module).items() if name in m.adapters}
    if not found:
        raise UserError(f"no LoRA '{name}' to save{nearest(name, get_lora_weights(module))}")
    tensors = {}
    for layer, adapter in found.items():
        key = PREFIXES[0] + layer.removeprefix(PREFIXES[0])
        b = adapter.b if with_alpha else adapter.b * (adapter.alpha / adapter.rank)
        for part, matrix in (("lora_A", adapter.a), ("lora_B", b)):
            tensors[f"{key}.{part}.weight"] = matrix if dtype is None else matrix.astype(dtype)
        if with_alpha:
            tensors[f"{key}.alpha"] = mx.array(adapter.alpha, mx.float32)
    header = {
        "format": "mlx",
        "name": name,
        "rank": ",".join(str(n) for n in sorted({a.rank for a in found.values()})),
        "alpha": ",".join(f"{n:g}" for n in sorted({a.alpha for a in found.values()})),
    }
    if base_model is not None:
        header["base_model"] = base_model
    if few_step is not None:
        header["few_step"] = json.dumps(to_dict(few_step))
    if thing is not None:
        assert rows is not None
        tensors[KEY] = rows
        header |= thing.header()
    if words:
        header["words"] = json.dumps(list(words))
    if trained := ",".join(widths) or next(iter(found.values())).widths:
        header["model_widths"] = trained
    try:
        with whole_file(path, replace=False) as partial:
            save_tensors(partial, tensors, header)
    except FileExistsError:
        raise UserError(f"{path} exists already: choose another name") from None
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


def lora_file(path: str | Path) -> Path:
    """The file of a LoRA that is given by its file or by its folder, such as PEFT's."""
    path = expanded(path)
    if not path.is_dir():
        return path
    found = next((path / name for name in PEFT_FILES if (path / name).is_file()), None)
    if found is None:
        raise UserError(f"no LoRA file {' or '.join(PEFT_FILES)} in {path}: name the file")
    return found


def read_lora(path: str | Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """Tensors (lazy) and header of a LoRA's file or folder; `UserError` if it is not one.

    The header includes PEFT's config in the file's folder. Only safetensors are read: the pickled
    .pt, .bin and .ckpt can run code when opened.
    """
    path = lora_file(path)
    if not path.is_file():
        raise UserError(f"no LoRA file {path}")
    if path.suffix != ".safetensors":
        raise UserError(f"{path} is not a .safetensors file, the only kind of LoRA that is read")
    _, header = read_header(path)
    return load_tensors(path), config_beside(path) | header


def lora_words(header: Mapping[str, str]) -> list[str] | None:
    """The words in the header of a LoRA of `train.lora`; None without them."""
    try:
        words = parse_json(header.get("words", "null"), "the header of the LoRA")
    except UserError:
        return None
    is_good = isinstance(words, list) and all(isinstance(word, str) for word in words)
    return words[:MOST_WORDS] if is_good else None


MOST_WORDS = 1000


def check_lora_width(what: str, trained: str, width: str) -> str | None:
    """A line on a LoRA that was not trained at the width that draws; None if it was.

    Args:
        what: the LoRA, or the mode that it is for.
        trained: `Adapter.widths`, or the header's `model_widths`.
        width: name of the width.
    """
    names = [name for name in trained.split(",") if name]
    if not names or width in names:
        return None
    at = one_line(", ".join(names), 60)
    return f"{what} was trained at model width {at}, not at {width}, where it may draw badly"


def few_step_sampler(path: str | Path) -> SamplerConfig:
    """The sampler of the few-step mode in a LoRA file of `train.kdmd`; files of other tools have
    four Euler steps.

    Raises:
        UserError: the file is no LoRA, one of `train.lora`, or its header is damaged.
    """
    header = read_lora(path)[1]
    text = header.get("few_step")
    if text is None and (header.get("format"), header.get("name")) == ("mlx", "default"):
        raise UserError(
            f"{path} is a LoRA of train.lora, not a few-step LoRA of train.kdmd: draw with it with "
            f"generate --lora {path}"
        )
    if text is None:
        return FOUR_STEPS
    try:
        return from_dict(SamplerConfig, parse_json(text, path))
    except UserError as error:
        raise UserError(f"{path} has a damaged header ({error}): get it again") from None


_KEY = re.compile(r"(.+?)\.(?:(lora_\w+|lora\.down|lora\.up)(?:\.[\w-]+)?\.weight|(alpha))")


def _split_key(key: str) -> tuple[str, str] | None:
    """A file's key -> (layer name in the file, "a", "b" or "alpha"); None for another key."""
    match = _KEY.fullmatch(key)
    if match is None:
        return None
    part = "alpha" if match[3] else PARTS.get(match[2])
    return (match[1], part) if part else None


VARIANTS = {
    "lora_magnitude_vector": "DoRA",
    "dora_scale": "DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "a1.weight": "GLoRA",
    "lora_mid": "LoCon with a middle matrix",
    "lora_embedding_": "LoRA of embeddings",
    "diff": "full difference of weights",
    "modules_to_save": "LoRA with other weights beside it",
}
"""What only other kinds of adapters have in their keys -> their name."""


def _unknown(key: str) -> str:
    """The fault of a key that is no part of a plain LoRA."""
    for part, name in VARIANTS.items():
        if f".{part}" in key:
            return f"is of a {name}, which is not supported"
    return "is no part of a LoRA that is known here"


def public_name(key: str, dotted: Callable[[str], str | None] = lambda _: None) -> str:
    """The name that `save_lora` would give a key of any layout.

    Args:
        dotted: kohya's flat name of a layer ("blocks_0_attn_to_q") -> its path, or None. It needs
            the network, because a flat name does not show where the dots were.

    Raises:
        UserError: the key is no part of a LoRA, or a flat name of an unknown network.
    """
    split = _split_key(key)
    if split is None:
        raise UserError(f"'{key}' {_unknown(key)}")
    layer, part = split
    if flat := next((p for p in FLAT_PREFIXES if layer.startswith(p)), None):
        path = dotted(layer.removeprefix(flat))
        if path is None:
            raise UserError(
                f"'{layer}' has no dots, and is no layer of a network that is known here: such a "
                "LoRA is loaded without conversion"
            )
        layer = path
    prefix = next((p for p in PREFIXES if layer.startswith(p)), "")
    layer = layer.removeprefix(prefix)
    tail = {"a": "lora_A.weight", "b": "lora_B.weight", "alpha": "alpha"}[part]
    return f"{PREFIXES[0]}{layer}.{tail}"


def load_lora(
    path: str | Path,
    module: nn.Module,
    *,
    weight: float = 1.0,
    name: str | None = None,
    base_model: str | None = None,
    autoencoder: Any = None,
) -> list[str]:
    """Add the adapter in a file to the layers of `module`, frozen and in their floating type.

    Reads the keys of diffusers and PEFT (`lora_A`, `lora_B`) and those of kohya and
    Qwen-Image-Lightning (`lora_down`, `lora_up`), with or without a prefix, and the layers' names
    in diffusers or in the original layout (`layouts`). alpha is the layer's `.alpha`, else that of
    PEFT's config in the header or beside the file, else the rank.

    Args:
        path: a .safetensors file, or the folder of one with PEFT's config.
        module: the network, at full width when it is elastic; changed in place.
        weight: the adapter's; 0 loads it switched off.
        name: the adapter's; None takes the file's.
        base_model: name of the network's model; a warning is issued for a file made for another.
        autoencoder: of the model; its decoder gets the rows of a thing (see `lora.things`). None:
            such a LoRA is refused.

    Returns:
        Paths of the layers that have it.

    Raises:
        UserError: the file is no LoRA, or its keys, shapes or thing do not fit the model; the model
            is unchanged.
    """
    path = expanded(path)
    tensors, header = read_lora(path)
    if not math.isfinite(weight):
        raise UserError(f"the weight of a LoRA must be a finite number, got {weight}")
    if name is None:
        name = re.sub(r"^[^a-zA-Z]+", "", re.sub(r"[^\w-]", "_", path.stem, flags=re.A)) or "lora"
    layers = linear_layers(module)
    thing, rows = read_thing(path, header), None
    if thing is not None:
        found = None if autoencoder is None else autoencoder.config
        check_thing(path, thing, found and found.semantics)
        assert found is not None
        channels = found.appearance_channels
        rows = check_rows(path, thing, tensors.pop(KEY, None), channels=channels)
    config = peft_config(path, header)
    unused = getattr(module, "UNUSED", ())
    by_layer = _by_layer(tensors, layers, path=path, unused=unused)
    alphas = peft_alphas(
        path, config, {layer: len(parts["a"]) for layer, parts in by_layer.items()}
    )
    alphas |= {
        layer: float(parts["alpha"]) for layer, parts in by_layer.items() if "alpha" in parts
    }
    if not any(alphas.values()):
        raise UserError(f"{path} has no effect: the alpha of its layers is 0")
    adapters, stored, kept = {}, [], []
    for layer, parts in by_layer.items():
        dtype = layer_dtype(layers[layer])
        a, b = parts["a"].astype(dtype), parts["b"].astype(dtype)
        trained = header.get("model_widths", "")
        adapters[layer] = Adapter(
            a,
            b,
            alpha=alphas[layer],
            weight=float(weight),
            widths=trained,
            codes=() if thing is None else thing.codes,
        )
        stored += [mx.isfinite(parts[part]).all() for part in "ab"]
        kept += [mx.isfinite(a).all(), mx.isfinite(b).all()]
    if not mx.all(mx.array(stored)).item():
        raise UserError(f"{path} is damaged: it has weights that are not finite; get it again")
    if not mx.all(mx.array(kept)).item():
        raise UserError(f"{path} has weights that are too large for the type of this model's")
    made_for = header.get("base_model")
    if base_model and made_for and base_model != made_for:
        text = f"{path} was made for the model '{one_line(made_for, 60)}', not '{base_model}'"
        warnings.warn(text, stacklevel=2)
    attach(module, adapters, name=name)
    if thing is not None and rows is not None:
        add_thing(autoencoder, thing, rows)
    for adapter in adapters.values():
        adapter.freeze()
    return list(adapters)


def _by_layer(
    tensors: Mapping[str, mx.array],
    layers: Mapping[str, nn.Module],
    *,
    path: Path,
    unused: Sequence[str] = (),
) -> dict[str, dict[str, mx.array]]:
    """Layer path -> its "a", "b" and optional "alpha", all checked against the layer.

    Args:
        unused: layers of the public network that have no effect and are ignored.
    """
    names = original_names(layers) | {layer: Place((layer,)) for layer in layers}
    aliases = {p + name.replace(".", "_"): names[name] for p in FLAT_PREFIXES for name in names}
    aliases |= {prefix + name: names[name] for prefix in ("", *PREFIXES) for name in names}
    ignored = {prefix + name for prefix in ("", *PREFIXES) for name in unused}
    tensors = {k: v for k, v in tensors.items() if (_split_key(k) or (k,))[0] not in ignored}
    found: dict[str, dict[str, mx.array]] = {}
    faults, joined = [], []
    for key, value in tensors.items():
        name, part = _split_key(key) or (key, None)
        if part is None:
            faults.append(f"{key} {_unknown(key)}")
        elif name not in aliases:
            # The search is slow, and at most three faults are listed.
            hint = nearest(name, aliases) if len(faults) < 3 else ""
            faults.append(f"{name} is no layer{hint}")
        elif len(aliases[name].layers) > 1:
            joined.append((key, aliases[name], part, value))
        elif part in found.setdefault(aliases[name].layers[0], {}):
            faults.append(f"{key} is there twice")
        else:
            found[aliases[name].layers[0]][part] = _swapped(value, aliases[name], part)
    strangers = [split[0] for key in tensors if (split := _split_key(key))]
    if strangers and aliases.keys().isdisjoint(strangers):
        raise UserError(f"{path} is of another model: {strangers[0]} is no layer of this one")
    # Some files have the joined layer beside its parts, which are the same.
    single = set(found)
    for key, place, part, value in joined:
        if single.issuperset(place.layers):
            continue
        rows = [layer_dims(layers[layer])[0] for layer in place.layers]
        if part == "b" and (value.ndim != 2 or len(value) != sum(rows)):
            faults.append(f"{key} is {value.shape}, not of {sum(rows)} rows")
            continue
        ends = list(itertools.accumulate(rows[:-1]))
        values = mx.split(value, ends) if part == "b" else [value] * len(rows)
        for layer, own in zip(place.layers, values, strict=True):
            if part in found.setdefault(layer, {}):
                faults.append(f"{key} is there twice")
            found[layer][part] = own
    for layer, parts in found.items():
        faults += _misfits(layer, parts, linear=layers[layer])
    if faults or not found:
        more = f"; and {len(faults) - 3} more faults" if len(faults) > 3 else ""
        listed = "; ".join(faults[:3]) or "it is empty"
        raise UserError(f"{path} does not fit this network: {listed}{more}")
    return found


def _swapped(value: mx.array, place: Place, part: str) -> mx.array:
    """The rows of B in our order."""
    if part != "b" or not place.is_swapped or value.ndim != 2 or len(value) % 2:
        return value
    return mx.concatenate([*mx.split(value, 2)][::-1])


def _misfits(layer: str, parts: Mapping[str, mx.array], *, linear: nn.Module) -> Iterator[str]:
    """What is wrong with one layer's tensors."""
    if not {"a", "b"} <= parts.keys():
        yield f"{layer} lacks " + ("lora_B" if "a" in parts else "lora_A")
        return
    out_dims, in_dims = layer_dims(linear)
    rank = max([1, *parts["a"].shape[:1]])
    if 0 in (parts["a"].size, parts["b"].size):
        yield f"{layer} has a LoRA of rank 0"
        return
    for what, part, shape in (("lora_A", "a", (rank, in_dims)), ("lora_B", "b", (out_dims, rank))):
        if parts[part].shape != shape:
            yield f"{layer} has {what} {parts[part].shape} instead of {shape}"
        elif not mx.issubdtype(parts[part].dtype, mx.floating):
            yield f"{layer} has {what} in whole numbers"
    alpha = parts.get("alpha", mx.array(1.0))
    number = alpha.item() if alpha.size == 1 else math.nan
    if isinstance(number, complex) or not abs(number) < MOST_ALPHA:
        yield f"{layer} has an alpha that is not one finite number"
