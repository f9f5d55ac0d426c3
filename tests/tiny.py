"""Tiny configs, models and random weights for all tests."""

import dataclasses
import functools
import io
import itertools
import json
import os
import re
from pathlib import Path

import mlx_snapgen  # noqa: F401  before mlx, which otherwise links its slow reference BLAS

# isort: split
import mlx.core as mx
import numpy as np
import pytest
import sentencepiece
from mlx.utils import tree_flatten, tree_unflatten

from mlx_snapgen.checkpoint.model import Components
from mlx_snapgen.checkpoint.text_encoders import new_text_encoder
from mlx_snapgen.config import (
    AutoencoderConfig,
    ModelConfig,
    SamplerConfig,
    TextEncoderConfig,
    TransformerConfig,
)
from mlx_snapgen.formats import CONFIG
from mlx_snapgen.json_values import to_dict
from mlx_snapgen.lora.adapters import add_lora, linear_layers
from mlx_snapgen.networks import parallel
from mlx_snapgen.networks.autoencoders.registry import make_autoencoder
from mlx_snapgen.networks.efficient_dit import EfficientDiT
from mlx_snapgen.networks.text_encoders.clip import ClipTextEncoder, ClipTokenizer
from mlx_snapgen.networks.text_encoders.qwen import QWEN_IMAGE
from mlx_snapgen.networks.text_encoders.sentencepiece import SentencePieceTokenizer
from mlx_snapgen.presets import TAEW2_1
from mlx_snapgen.public_config import (
    Flux2TransformerConfig,
    QwenTransformerConfig,
    ZImageTransformerConfig,
)
from mlx_snapgen.semantics import (
    CHANNELS,
    COLOR,
    COLUMN,
    GROUND,
    ROW,
    SIDE,
    THING,
    SemanticConfig,
    codes,
)
from mlx_snapgen.teachers.config import TeacherConfig
from mlx_snapgen.teachers.folder import FORMAT_VERSION, NETWORKS
from train.data.stickers.captions import Placed
from train.data.stickers.render import sprite
from train.objectives.distillation import Student

NOUNS = ["apple", "car", "cat", "ice cream cone"]
COLORS = ["red", "blue", "green"]
VOCAB_SIZE = 64


def require(*packages: str) -> None:
    """Skip the test, or the whole module, if one of the packages is not installed."""
    for name in packages:
        pytest.importorskip(name, reason=f"needs {name}: pip install -e '.[dev]'")


def randomize(module, seed: int):
    """The module with normal weights everywhere, so that layers that start at zero take part."""
    flat = tree_flatten(module.parameters())
    keys = mx.random.split(mx.random.key(seed), len(flat))
    values = []
    for key, (name, p) in zip(keys, flat, strict=True):
        if p.ndim == 1 and re.search(r"norm\d?(\.members\.\d)?\.weight", name):
            value = 1 + 0.1 * mx.random.normal(p.shape, key=key)
        else:
            scale = 0.1 if p.ndim < 2 else (p.size // p.shape[0]) ** -0.5
            value = scale * mx.random.normal(p.shape, key=key)
        values.append((name, value))
    module.update(tree_unflatten(values))
    mx.eval(module.parameters())
    return module


TEXT = TextEncoderConfig(
    vocab_size=VOCAB_SIZE, hidden_size=16, num_layers=1, num_heads=2, max_length=20
)
TRANSFORMER = TransformerConfig(
    hidden_size=64,
    head_dim=8,
    num_kv_heads=8,
    num_cross_kv_heads=4,
    blocks=(1, 2, 1),
    num_bands=2,
    latent_channels=4,
    text_dims=(32, 16),
    text_width=32,
    frequency_dim=32,
)
AUTOENCODER = AutoencoderConfig(
    latent_channels=4,
    encoder_channels=(8, 16),
    decoder_channels=(16, 8, 8),
    encoder_blocks=(1, 1),
    decoder_blocks=(1, 1, 1),
    latents_mean=(0.1, -0.2, 0.3, 0.0),
    latents_std=(1.0, 0.9, 1.1, 1.2),
)
QWEN_AUTOENCODER = AutoencoderConfig(
    kind="qwen-image",
    latent_channels=4,
    encoder_channels=(8, 16, 32, 32),
    decoder_channels=(32, 32, 16, 8),
    encoder_blocks=(1, 1, 1, 1),
    decoder_blocks=(2, 2, 2, 2),
    latents_mean=(0.1, -0.2, 0.3, 0.0),
    latents_std=(1.5, 0.9, 1.1, 2.0),
)
"""`originals.qwen_image_vae`'s."""
KL_AUTOENCODER = dataclasses.replace(
    QWEN_AUTOENCODER,
    kind="kl",
    encoder_channels=(32, 32, 64, 64),
    decoder_channels=(64, 64, 32, 32),
    latents_mean=(0.5,) * 4,
    latents_std=(4.0,) * 4,
)
FLUX2_AUTOENCODER = dataclasses.replace(
    KL_AUTOENCODER,
    kind="flux2",
    latents_mean=tuple(0.1 * i for i in range(16)),
    latents_std=tuple(1 + 0.1 * i for i in range(16)),
)
DC_AE = AutoencoderConfig(
    kind="dc-ae",
    latent_channels=8,
    encoder_channels=(8, 16, 16, 32, 64, 64),
    decoder_channels=(64, 64, 32, 32, 16, 8),
    encoder_blocks=(1, 2, 1, 1, 1, 2),
    decoder_blocks=(1, 1, 2, 1, 2, 1),
    latents_mean=(0.0,) * 8,
    latents_std=(1 / 0.41407,) * 8,
)
"""`originals.dc_ae`'s."""
TAEHV = dataclasses.replace(
    TAEW2_1,
    latent_channels=4,
    encoder_channels=(8, 8, 8, 8),
    decoder_channels=(16, 12, 8, 8),
)
MODEL = ModelConfig(
    name="random",
    image_size=(32, 64),
    transformer=TRANSFORMER,
    autoencoder=AUTOENCODER,
    text_encoders=(dataclasses.replace(TEXT, hidden_size=32, max_length=16), TEXT),
    sampler=SamplerConfig(num_inference_steps=2, guidance_scale=3.0, time_shift=2.0),
)
"""Two text encoders and all three widths."""
STUDENT = ModelConfig(
    transformer=TransformerConfig(
        hidden_size=32,
        head_dim=4,
        blocks=(1, 1, 1),
        num_bands=2,
        latent_channels=4,
        text_dims=(16,),
        text_width=16,
        frequency_dim=16,
    ),
    autoencoder=AUTOENCODER,
    text_encoders=(dataclasses.replace(TEXT, max_length=9),),
)
"""Half the hidden size of `MODEL`, other text encoders and blocks, the same latents."""
QWEN = QwenTransformerConfig(
    num_layers=2, num_heads=2, head_dim=16, latent_channels=4, text_dims=24, rope_axes=(4, 6, 6)
)
"""`originals.qwen_image`'s."""
Z_IMAGE = ZImageTransformerConfig(
    num_layers=2,
    num_refiner_layers=1,
    hidden_size=32,
    num_heads=2,
    latent_channels=4,
    text_dims=24,
    time_dims=32,
    rope_axes=(4, 6, 6),
)
"""`originals.z_image`'s."""
FLUX2 = Flux2TransformerConfig(
    num_layers=2,
    num_single_layers=2,
    num_heads=2,
    head_dim=16,
    latent_channels=4,
    text_dims=24,
    rope_axes=(4, 4, 4, 4),
)
"""`originals.flux2`'s."""
TEACHER = TeacherConfig(transformer=QWEN, autoencoder=AUTOENCODER)


@functools.cache
def tokenizer_bytes(first: int = 0) -> bytes:
    """A sentencepiece model of `VOCAB_SIZE` tokens; `first` chooses the captions."""
    pairs = itertools.product(COLORS, NOUNS, COLORS, NOUNS)
    captions = [f"a {a} {b} next to a {c} {d}" for a, b, c, d in pairs]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions[first : first + 60]),
        model_writer=model,
        vocab_size=VOCAB_SIZE,
        model_type="bpe",
        required_chars="abcdefghijklmnopqrstuvwxyz",
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def semantic_map_of(things, size, *, config: SemanticConfig, ground=3, wrong=0) -> np.ndarray:
    """Semantic latents (1, h, w, S) of things (number, color, side, left, top).

    Args:
        size: h and w.
        ground: number of the background's code.
        wrong: in so many places, the codes of things are random ones.
    """
    found = np.zeros((1, *size, CHANNELS), np.float32)
    found[..., GROUND] = codes(4)[ground]
    rng = np.random.default_rng(0)
    for number, color, side, left, top in things:
        inside = found[0, top : top + side, left : left + side]
        inside[..., THING], inside[..., COLOR] = codes(8)[number], codes(4)[color]
        for part, value in ((COLUMN, left), (ROW, top), (SIDE, config.sides.index(side))):
            inside[..., part] = codes(4)[value]
    for place in rng.permutation(list(np.ndindex(size)))[:wrong]:
        for part in (COLOR, COLUMN, ROW, SIDE):
            found[0, *place, part] = codes(4)[rng.integers(24)]
        found[0, *place, THING] = codes(8)[rng.integers(config.things)]
    return found


def make_student(feature_dims: int) -> Student:
    """A student of `STUDENT`'s sizes, as it is before training."""
    mx.random.seed(0)
    tokenizer = SentencePieceTokenizer(tokenizer_bytes(), STUDENT.text_encoders[0].max_length)
    return Student(STUDENT, [tokenizer], feature_dims=feature_dims)


def make_components(config: ModelConfig = MODEL) -> Components:
    """A model with random weights everywhere."""
    tokenizer = tokenizer_bytes()
    made = Components(
        config=config,
        transformer=EfficientDiT(config.transformer),
        autoencoder=make_autoencoder(config.autoencoder),
        text_encoders=[
            new_text_encoder(c, SentencePieceTokenizer(tokenizer, c.max_length))
            for c in config.text_encoders
        ],
        vocabulary={"nouns": NOUNS, "other_words": ["apples", "automobile"], "colours": COLORS},
    )
    for seed, module in enumerate(made.modules().values()):
        randomize(module, seed)
    return made


def velocity(network: EfficientDiT, share: float = 1.0) -> mx.array:
    """v of fixed latents, times and text."""
    keys = mx.random.split(mx.random.key(7), 2)
    x_t = mx.random.normal((2, 4, 8, 4), key=keys[0])
    text = mx.random.normal((2, 5, TRANSFORMER.text_width), key=keys[1])
    return network(x_t, mx.array([0.3, 0.8]), text, share=share)


def add_random_lora(module, name="style", *, targets=("*",), rank=4, alpha=6.0, seed=0):
    """Add an adapter that changes the output; the paths of its layers."""
    mx.random.seed(seed)
    paths = add_lora(module, rank, alpha=alpha, targets=targets, name=name)
    for path, layer in module.named_modules():
        if path in paths:
            adapter = layer.adapters[name]
            adapter.b = 0.1 * mx.random.normal(adapter.b.shape)
    mx.eval(module.parameters())
    return paths


def make_clip(merges: bytes, hidden_size: int, *, num_heads: int) -> ClipTextEncoder:
    """A CLIP of three layers over these merges, with random weights."""
    tokenizer = ClipTokenizer(merges, 17)
    config = TextEncoderConfig(
        kind="clip",
        vocab_size=tokenizer.vocab_size,
        hidden_size=hidden_size,
        num_layers=3,
        num_heads=num_heads,
        max_length=17,
        activation="gelu",
    )
    return randomize(ClipTextEncoder(config, tokenizer), 5)


def with_text_encoder(components: Components, encoder) -> Components:
    """`components` with `encoder` as the second, and a transformer that fits."""
    first = components.text_encoders[0]
    dims = (first.config.hidden_size, encoder.config.hidden_size)
    config = dataclasses.replace(components.config.transformer, text_dims=dims)
    return dataclasses.replace(
        components, transformer=EfficientDiT(config), text_encoders=[first, encoder]
    )


class Reader:
    """Stands for a language model: states out of the prompt's letters."""

    prompt_format = QWEN_IMAGE

    def cut(self, prompt):
        return prompt[self.prompt_format.max_length :]

    def __call__(self, prompts):
        prompts = [prompt or " " for prompt in prompts]
        count = max(map(len, prompts))
        states = np.zeros((len(prompts), count, QWEN.text_dims), np.float32)
        for state, prompt in zip(states, prompts, strict=True):
            for i, letter in enumerate(prompt):
                state[i] = np.random.default_rng(ord(letter)).normal(size=QWEN.text_dims)
        mask = [[i < len(prompt) for i in range(count)] for prompt in prompts]
        return mx.array(states), mx.array(mask)


def write_teacher(folder: Path, config: TeacherConfig = TEACHER) -> Path:
    """A teacher's folder of random weights, where an empty one stands for the language model."""
    (folder / "text_encoder").mkdir(parents=True)
    values = {"format_version": FORMAT_VERSION} | to_dict(config)
    (folder / CONFIG).write_text(json.dumps(values))
    parts = {
        "transformer-00001": NETWORKS[config.kind](config.transformer),
        "autoencoder": make_autoencoder(config.autoencoder),
    }
    for name, module in parts.items():
        weights = dict(tree_flatten(randomize(module, 0).parameters()))
        mx.save_safetensors(str(folder / f"{name}.safetensors"), weights)
    return folder


def write_lightning_lora(path: Path, network) -> dict[str, mx.array]:
    """A LoRA as lightx2v writes it, on the 12 layers of each block; its updates by layer."""
    tensors, updates, rank, alpha = {}, {}, 2, 8.0
    for layer, module in linear_layers(network).items():
        if layer.startswith("transformer_blocks") and "_mod." not in layer:
            out_dims, in_dims = module.weight.shape
            down = 0.2 * mx.random.normal((rank, in_dims), key=mx.random.key(len(updates)))
            up = mx.random.normal((out_dims, rank), key=mx.random.key(1000 + len(updates)))
            tensors[f"{layer}.lora_down.weight"], tensors[f"{layer}.lora_up.weight"] = down, up
            tensors[f"{layer}.alpha"] = mx.array(alpha)
            updates[layer] = alpha / rank * up @ down
    mx.save_safetensors(str(path), tensors)
    return updates


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write_hub_cache(cache: Path, model: Path) -> None:
    """A Hugging Face cache that holds the model as `someone/random`, at `COMMIT`."""
    repo = cache / "models--someone--random"
    (repo / "snapshots").mkdir(parents=True)
    (repo / "snapshots" / COMMIT).symlink_to(model)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)


def states_error(ours, theirs, *, tokens, mask) -> float:
    """Largest difference over largest value, of the states that count.

    Args:
        ours: a text encoder.
        theirs: the same of transformers.
        tokens, mask: numpy arrays (B, L).
    """
    import torch

    with torch.no_grad():
        expected = theirs(
            input_ids=torch.tensor(tokens), attention_mask=torch.tensor(mask).long()
        ).last_hidden_state.numpy()
    found = np.array(ours(mx.array(tokens), mx.array(mask)))
    return float(np.abs(found - expected)[mask].max() / np.abs(expected[mask]).max())


def memory(pid):
    """MiB of a process and its children; on Linux only."""
    pids = [pid]
    for task in Path(f"/proc/{pid}/task").iterdir():
        pids += map(int, (task / "children").read_text().split())
    pages = sum(int(Path(f"/proc/{p}/statm").read_text().split()[1]) for p in pids)
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def with_streams(count: int, monkeypatch) -> None:
    """Compute on so many streams of the CPU what `parallel.on_all_cores` computes, however small.

    It is not fast: BLAS has one thread.
    """
    monkeypatch.setattr(parallel, "blas_threads", lambda: count)
    monkeypatch.setattr(parallel, "MANY_TOKENS", 1)
    monkeypatch.setattr(parallel, "LEAST_WORK", 1)
    monkeypatch.setattr(parallel, "LEAST_TOKENS", 1)


def drawn_box(placed: Placed) -> tuple[int, int, int, int]:
    """The box (x, y, w, h) in pixels that a glyph of the font fills."""
    height, width = sprite(placed.noun, placed.color, placed.size_px).rgb.shape[:2]
    x, y = placed.center
    return int(x - width / 2), int(y - height / 2), width, height
