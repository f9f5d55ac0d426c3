"""CLIP and Gemma against transformers, for `convert.parity`."""

import json
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from convert.parity.originals import clip, clip_towers, gemma, library, write_byte_tokenizer
from convert.parity.transformers import Pairs
from mlx_snapgen.checkpoint.clip import load_clip
from mlx_snapgen.checkpoint.clip_towers import load_clip_towers
from mlx_snapgen.checkpoint.language_models import load_gemma
from mlx_snapgen.config import TextEncoderConfig
from mlx_snapgen.public.convert import convert
from mlx_snapgen.public.source import find_source


def make_clip(folder: Path) -> None:
    _randomize(clip(), 0.2).save_pretrained(folder)
    (folder / "merges.txt").write_text("#version: 0.2\n")


def compare_clip(folder: Path) -> Pairs:
    torch, transformers = library("torch"), library("transformers")
    ours = load_clip(folder)
    theirs = transformers.CLIPTextModel.from_pretrained(folder, dtype=torch.float32).eval()
    given, tokens = _tokens(ours.config.vocab_size, ours.config.max_length)
    with torch.no_grad():
        states = theirs(input_ids=given).last_hidden_state
    ours.apply(lambda value: value.astype(mx.float32))
    yield "states", ours(tokens, mx.ones(tokens.shape)), states


def make_clip_towers(folder: Path) -> None:
    _randomize(clip_towers(), 0.2).save_pretrained(folder)
    (folder / "merges.txt").write_text("#version: 0.2\n")


def compare_clip_towers(folder: Path) -> Pairs:
    torch, transformers = library("torch"), library("transformers")
    ours = load_clip_towers(folder)
    theirs = transformers.CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    size = ours.config.picture.image_size
    shape = (3, size, size, 3)
    pictures = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    tokens, mask = ours.text_encoder.tokenize(["a red apple", "", "two cats"])
    given = np.array(ours.picture_encoder.preprocess(list(pictures))).transpose(0, 3, 1, 2)
    with torch.no_grad():
        out = theirs(
            input_ids=torch.tensor(np.array(tokens)),
            attention_mask=torch.tensor(np.array(mask)).long(),
            pixel_values=torch.tensor(given),
        )
    yield "pictures", ours.embed_pictures(list(pictures)), out.image_embeds
    yield "texts", ours.embed_texts(["a red apple", "", "two cats"]), out.text_embeds


def make_gemma(folder: Path) -> None:
    _randomize(gemma(), 0.1).save_pretrained(folder)
    write_byte_tokenizer(folder)


def compare_gemma(folder: Path) -> Pairs:
    torch, transformers = library("torch"), library("transformers")
    # Converted, because mlx-lm does not read all settings of transformers' own folders.
    with tempfile.TemporaryDirectory() as place:
        source = find_source(str(folder))
        convert(source, Path(place) / "gemma", kind="gemma", dtype=mx.float32)
        values = json.loads((Path(place) / "gemma" / "config.json").read_text())
        config = TextEncoderConfig(
            kind="gemma", vocab_size=values["vocab_size"], hidden_size=values["hidden_size"]
        )
        ours = load_gemma(Path(place) / "gemma", config)
        given, tokens = _tokens(config.vocab_size, 13)
        states = ours(tokens)
        mx.eval(states)
    theirs = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    theirs = getattr(theirs, "language_model", theirs)
    with torch.no_grad():
        expected = theirs(input_ids=given).last_hidden_state
    yield "states", states, expected


def _tokens(vocab_size: int, length: int) -> tuple[Any, mx.array]:
    tokens = np.random.default_rng(0).integers(0, vocab_size, (2, length))
    return library("torch").tensor(tokens), mx.array(tokens)


def _randomize(network: Any, std: float) -> Any:
    torch = library("torch")
    torch.manual_seed(0)
    for name, parameter in network.named_parameters():
        mean = 1.0 if "norm" in name and parameter.ndim == 1 and std < 0.3 else 0.0
        torch.nn.init.normal_(parameter, mean, std)
    return network.eval()
