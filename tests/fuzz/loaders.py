"""Everything that reads a file of unknown origin: a good sample, and how it is read."""

import asyncio
import contextlib
import dataclasses
import functools
import gzip
import io
import json
import os
import pickle
import sys
import tarfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from PIL import Image, PngImagePlugin

from apps.desktop.history import History
from apps.desktop.settings import Settings as WindowSettings
from apps.desktop.settings import load_settings, save_settings
from convert.mil.execution import Interpreter
from convert.parity import originals as parity
from convert.pickles import spooled
from convert.pytorch.folder import FORMAT, read_config
from mlx_snapgen.checkpoint.clip import load_clip
from mlx_snapgen.checkpoint.clip_towers import load_clip_towers
from mlx_snapgen.checkpoint.config import load_config, load_vocabulary
from mlx_snapgen.checkpoint.language_models import load_gemma, load_qwen
from mlx_snapgen.checkpoint.model import load_pretrained, save_pretrained
from mlx_snapgen.checkpoint.t5 import load_t5, t5_config
from mlx_snapgen.checkpoint.text_encoders import load_tokenizer
from mlx_snapgen.cli.prompts_file import read_prompts
from mlx_snapgen.errors import MOST_CHARACTERS, UserError
from mlx_snapgen.formats import INDEX
from mlx_snapgen.generate import main as generate
from mlx_snapgen.inputs import read_inputs
from mlx_snapgen.json_values import to_dict
from mlx_snapgen.lora.files import few_step_sampler, load_lora, save_lora
from mlx_snapgen.metadata import KEY, find_pictures, read_settings
from mlx_snapgen.networks.autoencoders.registry import make_autoencoder
from mlx_snapgen.networks.efficient_dit import EfficientDiT
from mlx_snapgen.networks.flux2 import Flux2Transformer
from mlx_snapgen.networks.text_encoders.qwen import QWEN_IMAGE
from mlx_snapgen.networks.text_encoders.t5 import FLAN_T5, T5Encoder
from mlx_snapgen.picture_files import decode, read_picture
from mlx_snapgen.prompt_check import check_prompts
from mlx_snapgen.public.description import describe
from mlx_snapgen.public.keymap import KeyMap
from mlx_snapgen.public.keys.autoencoders import AUTOENCODERS, read_autoencoder
from mlx_snapgen.public.kinds import find_kind
from mlx_snapgen.public.source import find_source
from mlx_snapgen.quantize.palettes import Palettes, load_palettes, palettes_file
from mlx_snapgen.reading import parse_json
from mlx_snapgen.settings import DrawSettings, ModelChoice
from mlx_snapgen.teachers.config import TeacherConfig
from mlx_snapgen.teachers.folder import load_network, load_teacher_config
from mlx_snapgen.vocabulary import listed
from tests import tiny
from tests.applications.serving import KIND, encoded
from tests.conversion.test_mil_program import X, write_package
from tests.runtime import test_clip_towers as towers
from tests.runtime import test_gemma as gemma
from train.data.imagefolder import read_folder
from train.data.open import open_records
from train.data.prepared import Prepared, write_index
from train.data.shards import write_shard
from train.data.source import Record, Skipped
from train.evaluation.prompt_lists import dpg_files, geneval_files
from train.loop.assemble import new_model
from train.loop.checkpoint import load_checkpoint, read_log, save_checkpoint
from train.loop.run import recorded
from train.options.new import read_preset
from train.preparation.encoders import make_samples
from train.preparation.report import count_shards


class Loader(NamedTuple):
    """A kind of input."""

    write: Callable[[Path], Any]
    """Write a good sample into an empty folder."""
    read: Callable[[Path], Any]
    """Read the folder as commands do; raises only `UserError`."""
    files: tuple[str, ...] = ("*",)
    """Patterns of the files to damage."""


LOADERS: dict[str, Loader] = {}
PROGRESS: list[tuple[float, float]] = []
"""When the reader of an input reported progress: seconds of computing, and of the clock.

Long legal inputs take long; without progress for long, a user sees a hang.
"""
MOST_SECONDS = 60
"""Of computing for one input, also with progress: a loop that prints forever ends here."""


class TooLong(BaseException):
    """An input took more than `MOST_SECONDS`; no reader catches this."""


def report_progress() -> None:
    PROGRESS.append((time.process_time(), time.perf_counter()))
    if (seconds := PROGRESS[-1][0] - PROGRESS[0][0]) > MOST_SECONDS:
        raise TooLong(f"took {seconds:.0f} s of computing, with progress")


def loader(name: str, write: Callable[[Path], Any], *files: str) -> Callable:
    def add(read: Callable[[Path], Any]) -> Callable[[Path], Any]:
        LOADERS[name] = Loader(write, read, files or ("*",))
        return read

    return add


def read_each(*calls: Callable[[], Any]) -> None:
    """All of a folder's readers; a `UserError` of one is as good as its result."""
    for call in calls:
        try:
            call()
        except UserError as error:
            message = str(error)
            assert len(message) <= MOST_CHARACTERS and message.isprintable(), message


# --- models -----------------------------------------------------------------------------------


def write_model(folder: Path) -> None:
    components = tiny.make_components()
    palettes = Palettes(4.0, {"head.linear": 4}, {"head.linear": 0.1}, ["a red apple"], ["full"])
    save_pretrained(folder / "model", components, texts=palettes_file(palettes))


@loader("config", write_model, "model/config.json")
def _(folder: Path) -> None:
    config = load_config(folder / "model")
    config.of_one_size()
    model = load_pretrained(folder / "model")
    mx.eval(model.transformer.parameters())


@loader("weights", write_model, "model/*.safetensors")
def _(folder: Path) -> None:
    model = load_pretrained(folder / "model")
    for module in model.modules().values():
        mx.eval(module.parameters())


def write_vocabulary(folder: Path) -> None:
    words = {
        "nouns": ["apple", "ice cream"],
        "other_words": {"apples": "apple"},
        "colours": ["red"],
        "recolourable": ["apple"],
        "own_colours": {"ice cream": "white"},
        "backgrounds": ["light blue"],
        "numbers": ["one", "two"],
        "emoji": {"\N{RED APPLE}": "apple"},
        "replaced": {"fruit": "apple"},
        "misspelled": ["apples"],
        "ignored": ["please"],
        "drawn_badly": ["big"],
    }
    (folder / "model").mkdir()
    (folder / "model" / "vocabulary.json").write_text(json.dumps(words))


@loader("vocabulary", write_vocabulary, "model/vocabulary.json")
def _(folder: Path) -> None:
    vocabulary = load_vocabulary(folder / "model")
    prompt = "a red aple on a table, 5 big apples on a light blue background, \N{RED APPLE} fruit"
    settings = DrawSettings(prompt).resolved(tiny.MODEL)
    list(check_prompts(settings, [None], vocabulary=vocabulary))
    listed(vocabulary or {})


@loader("tokenizer", write_model, "model/tokenizer_0.model")
def _(folder: Path) -> None:
    config = tiny.MODEL.text_encoders[0]
    tokenizer = load_tokenizer(folder / "model" / "tokenizer_0.model", config)
    mx.eval(tokenizer(["a red apple", ""]))


@loader("palettes", write_model, "model/palettes.json")
def _(folder: Path) -> None:
    load_palettes(folder / "model")


@loader(
    "folder for PyTorch",
    lambda folder: (folder / "config.json").write_text(
        json.dumps({"format": FORMAT, "width": "full"} | to_dict(tiny.MODEL))
    ),
)
def _(folder: Path) -> None:
    read_config(folder)


TEACHERS = {
    "teacher": tiny.TEACHER,
    "Z-Image": TeacherConfig("z-image", tiny.Z_IMAGE, tiny.KL_AUTOENCODER),
    "klein": TeacherConfig("flux2", tiny.FLUX2, tiny.FLUX2_AUTOENCODER),
}


def read_teacher(folder: Path) -> None:
    config = load_teacher_config(folder / "teacher")
    mx.eval(load_network(folder / "teacher", config).parameters())


for name, config in TEACHERS.items():
    write = functools.partial(tiny.write_teacher, config=config)
    loader(name, lambda folder, write=write: write(folder / "teacher"), "teacher/*.*")(read_teacher)


@loader(
    "preset",
    lambda folder: (folder / "preset.json").write_text(json.dumps(to_dict(tiny.TRANSFORMER))),
)
def _(folder: Path) -> None:
    preset = read_preset(str(folder / "preset.json"))
    components = tiny.make_components()
    autoencoder, encoders = components.autoencoder, components.text_encoders
    new_model(
        preset.transformer, autoencoder, text_encoders=encoders, name="x", image_size=(32, 32)
    )


def write_public(folder: Path) -> None:
    """The configs of public models in diffusers' format, and the weights of their autoencoders."""
    tiny.require("mlx_lm")
    for name, (pipeline, transformer, text, scheduler, vae) in PUBLIC.items():
        values = {
            INDEX: {"_class_name": pipeline, "is_distilled": True},
            "transformer/config.json": transformer,
            "text_encoder/config.json": {"model_type": text},
            "scheduler/scheduler_config.json": scheduler,
            "vae/config.json": vae,
        }
        for path, content in values.items():
            (folder / name / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / name / path).write_text(json.dumps(content))
        kind = next(a for a in AUTOENCODERS.values() if a.class_name == vae["_class_name"])
        weights = public_names(kind.keys, VAES[name])
        mx.save_safetensors(str(folder / name / "vae" / "model.safetensors"), weights)


def public_names(keys: KeyMap, config: Any) -> dict[str, mx.array]:
    """The weights of an autoencoder with the names and layout of diffusers."""
    found = {"bn.running_mean": mx.zeros(16), "bn.running_var": mx.ones(16)}
    found = found if config.kind == "flux2" else {}
    for name, value in tree_flatten(make_autoencoder(config).parameters()):
        value = value.transpose(0, 3, 1, 2) if value.ndim == 4 else value
        names = keys.public(name)
        found |= dict(zip(names, mx.split(value, len(names)), strict=True))
    return found


KL = {
    "block_out_channels": [32, 32, 64, 64],
    "layers_per_block": 1,
    "latent_channels": 4,
    "shift_factor": 0.1,
    "scaling_factor": 0.4,
}
DYNAMIC = {"base_shift": 0.5, "max_shift": 1.2} | {
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "use_dynamic_shifting": True,
}
PUBLIC = {
    "z-image": (
        "ZImagePipeline",
        parity.Z_IMAGE
        | {"_class_name": "ZImageTransformer2DModel", "all_patch_size": [2], "norm_eps": 1e-5}
        | {"rope_theta": 256.0},
        "qwen3",
        {"shift": 3.0},
        KL
        | {"_class_name": "AutoencoderKL", "use_quant_conv": False}
        | {"use_post_quant_conv": False},
    ),
    "klein": (
        "Flux2KleinPipeline",
        parity.FLUX2
        | {"_class_name": "Flux2Transformer2DModel", "mlp_ratio": 3.0}
        | {"timestep_guidance_channels": 256, "rope_theta": 2000},
        "qwen3",
        DYNAMIC,
        KL | {"_class_name": "AutoencoderKLFlux2", "batch_norm_eps": 1e-4},
    ),
    "qwen-image": (
        "QwenImagePipeline",
        parity.QWEN_IMAGE | {"_class_name": "QwenImageTransformer2DModel"},
        "qwen2_5_vl",
        DYNAMIC | {"shift_terminal": 0.02},
        {"_class_name": "AutoencoderKLQwenImage", "base_dim": 8, "dim_mult": [1, 2, 4, 4]}
        | {"z_dim": 4, "num_res_blocks": 1, "latents_mean": [0.1] * 4, "latents_std": [1.1] * 4},
    ),
}
VAES = {
    "z-image": tiny.KL_AUTOENCODER,
    "klein": tiny.FLUX2_AUTOENCODER,
    "qwen-image": tiny.QWEN_AUTOENCODER,
}


@loader("model in diffusers' format", write_public, "*/*.json", "*/*/*.json", "*/vae/*")
def _(folder: Path) -> None:
    read_each(
        *(
            call
            for name in PUBLIC
            for call in (
                functools.partial(describe, name, folder / name, None),
                functools.partial(read_autoencoder, folder / name / "vae"),
            )
        )
    )


def write_minit2i(folder: Path) -> None:
    values = {"_class_name": "MiniT2IMMJiTModel"} | parity.MINIT2I
    text = {"model_type": "t5", "vocab_size": 128, "d_model": 24, "d_kv": 8, "num_heads": 4}
    text |= {"d_ff": 40, "num_layers": 1, "feed_forward_proj": "gated-gelu"}
    for path, content in {
        "transformer/config.json": values,
        "text_encoder/config.json": text,
        "scheduler/scheduler_config.json": {"num_inference_steps": 25},
    }.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(json.dumps(content))
    parity.write_spiece(folder / "text_encoder" / "spiece.model")
    network = T5Encoder(t5_config(text, folder))
    weights = dict(tree_flatten(network.parameters()))
    mx.save_safetensors(str(folder / "text_encoder" / "model.safetensors"), weights)


@loader("MiniT2I", write_minit2i, "*/*")
def _(folder: Path) -> None:
    read_each(
        functools.partial(describe, "minit2i", folder, None),
        functools.partial(load_t5, folder / "text_encoder", FLAN_T5, dims=24),
    )


def write_shards(folder: Path) -> None:
    for i in range(2):
        mx.save_safetensors(str(folder / f"{i}.safetensors"), {f"layer.{i}": mx.ones((2, 2))})
    index = {"weight_map": {f"layer.{i}": f"{i}.safetensors" for i in range(2)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))


@loader("shards", write_shards)
def _(folder: Path) -> None:
    source = find_source(str(folder))
    weights = source.weights(folder)
    find_kind(source, weights)
    mx.eval(weights)


def write_lora(folder: Path) -> None:
    network = EfficientDiT(tiny.TRANSFORMER)
    tiny.add_random_lora(network, targets=("*q_proj",))
    save_lora(folder / "adapter_model.safetensors", network, name="style")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 16, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


@loader("LoRA", write_lora)
def _(folder: Path) -> None:
    network = EfficientDiT(tiny.TRANSFORMER)
    load_lora(folder, network)
    few_step_sampler(folder)
    mx.eval(network.parameters())


def write_public_lora(folder: Path) -> None:
    """In FLUX.2's original layout, with PEFT's config in the header."""
    sizes = {
        "double_blocks.0.img_attn.qkv": (96, 32),
        "double_blocks.1.txt_mlp.2": (32, 96),
        "final_layer.adaLN_modulation.1": (64, 32),
    }
    tensors = {}
    for name, (rows, columns) in sizes.items():
        tensors[f"diffusion_model.{name}.lora_A.weight"] = mx.ones((2, columns))
        tensors[f"diffusion_model.{name}.lora_B.weight"] = mx.ones((rows, 2))
    config = {"lora_alpha": 4, "alpha_pattern": {"attn.to_q": 6}, "use_rslora": True}
    header = {"lora_adapter_metadata": json.dumps(config)}
    mx.save_safetensors(str(folder / "a.safetensors"), tensors, header)


@loader("public LoRA", write_public_lora)
def _(folder: Path) -> None:
    network = Flux2Transformer(tiny.FLUX2)
    load_lora(folder / "a.safetensors", network)
    mx.eval(network.parameters())


def write_pickle(folder: Path) -> None:
    tiny.require("torch")
    import torch

    state = {f"layers.{i}.weight": torch.randn(4, 4) for i in range(3)}
    torch.save(state, folder / "a.pt")
    torch.save(state, folder / "b.bin", _use_new_zipfile_serialization=False)
    (folder / "c.ckpt").write_bytes(pickle.dumps({"weight": [1.0]}))


@loader("pickle", write_pickle)
def _(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        if path.suffix in (".pt", ".bin", ".ckpt"):
            mx.eval(find_source(str(path), spool=spooled).weights(folder / "spool"))


def write_checkpoint(folder: Path) -> None:
    tree = {"layer": {"weight": mx.ones((2, 2))}}
    state = {"step": 3, "training": {"steps": 10}}
    trees = {name: tree for name in ("model", "ema", "optimizer")}
    save_checkpoint(folder, trees, state=state, keep=1)
    (folder / "log.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.4}\n')
    (folder / "settings.json").write_text('{"data": "stickers", "num_nouns": 3}')


@loader("checkpoint", write_checkpoint, "step_3/*", "*.json*")
def _(folder: Path) -> None:
    tree = {"layer": {"weight": mx.ones((2, 2))}}
    expected = {name: tree for name in ("model", "ema", "optimizer")}
    load_checkpoint(folder / "step_3", expected, split_optimizer=lambda flat: flat)
    recorded(folder)
    read_log(folder)


@loader("package", lambda folder: write_package(folder / "x.mlpackage"), "x.mlpackage/**/*.*")
def _(folder: Path) -> None:
    Interpreter(folder / "x.mlpackage")({"x": X})


def write_clip(folder: Path) -> None:
    pairs = [bytes([a, b]) for a in b"abcdefgh" for b in b"ijklmnop"]
    merges = b"\n".join(b"%c %c" % (p[0], p[1]) for p in pairs)
    encoder = tiny.make_clip(merges, 32, num_heads=4)
    names = {
        "token_embedding": "embeddings.token_embedding",
        "position_embedding": "embeddings.position_embedding.weight",
        "norm.": "final_layer_norm.",
    }
    found = {}
    for key, value in tree_flatten(encoder.parameters()):
        for ours, theirs in names.items():
            if key.startswith(ours):
                key = theirs + key.removeprefix(ours)
        key = key.replace("layers.", "encoder.layers.").replace(".norm", ".layer_norm")
        key = key.replace(".out_proj", ".self_attn.out_proj").replace(".linear", ".mlp.fc")
        if "qkv_proj" in key:
            parts = mx.split(value, 3)
            for part, x in zip(parts, "qkv", strict=True):
                found[f"text_model.{key.replace('.qkv_proj', f'.self_attn.{x}_proj')}"] = part
            continue
        found[f"text_model.{key}"] = value
    mx.save_safetensors(str(folder / "model.safetensors"), found)
    (folder / "merges.txt").write_bytes(b"#version: 0.2\n" + merges + b"\n")
    config = {"text_config": {"num_attention_heads": 4, "hidden_act": "gelu"}}
    (folder / "config.json").write_text(json.dumps(config))


@loader("CLIP", write_clip)
def _(folder: Path) -> None:
    encoder = load_clip(folder)
    mx.eval(encoder(*encoder.tokenize(["abi cdj"])))


def write_towers(folder: Path, layout: str) -> None:
    made = towers.write_folder(folder / "clip", towers.make_towers(), layout)
    merges = (made / "merges.txt").read_bytes()
    if layout == "open clip":
        (made / "merges.txt").unlink()
        data = gzip.compress(b"bpe_simple_vocab_16e6.txt#version: 0.2\n" + merges + b"\nq u\n")
        (made / "bpe_simple_vocab_16e6.txt.gz").write_bytes(data)
    else:
        (made / "merges.txt").unlink()
        pairs = [merge.split(" ") for merge in merges.decode().split("\n")]
        (made / "tokenizer.json").write_text(json.dumps({"model": {"merges": pairs}}))
        colors = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.3]}
        (made / "preprocessor_config.json").write_text(json.dumps(colors))


def read_towers(folder: Path) -> None:
    clip = load_clip_towers(folder / "clip")
    mx.eval(clip.embed_texts(["abi cdj"]))
    mx.eval(clip.embed_pictures([np.zeros((30, 24, 3), np.uint8)]))


for layout in ("hugging face", "open clip"):
    write = functools.partial(write_towers, layout=layout)
    loader(f"CLIP towers, {layout}", write, "clip/*")(read_towers)


def write_gemma(folder: Path) -> None:
    tiny.require("mlx_lm")
    import mlx_lm

    gemma.write_gemma(folder / "gemma", mlx_lm)


@loader("Gemma", write_gemma, "gemma/*")
def _(folder: Path) -> None:
    encoder = load_gemma(folder / "gemma", gemma.CONFIG)
    mx.eval(encoder(*encoder.tokenize(["a red apple", ""])))


def write_qwen(folder: Path) -> None:
    tiny.require("mlx_lm")
    from mlx_lm.models.qwen2 import Model, ModelArgs

    config = parity.QWEN_TEXT | {"model_type": "qwen2", "rms_norm_eps": 1e-6, "rope_theta": 1e6}
    config |= {"tie_word_embeddings": True}
    weights = dict(tree_flatten(tiny.randomize(Model(ModelArgs.from_dict(config)), 0).parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    parity.write_byte_tokenizer(folder)


@loader("Qwen", write_qwen)
def _(folder: Path) -> None:
    encoder = load_qwen(folder, QWEN_IMAGE, dims=parity.QWEN_TEXT["hidden_size"])
    mx.eval(encoder(["a red apple", ""]))


# --- pictures and settings --------------------------------------------------------------------

SETTINGS = {
    "mlx_snapgen": "0.1",
    "prompt": "a red apple",
    "negative_prompt": "",
    "height": 128,
    "width": 128,
    "seed": 1,
    "num_inference_steps": 4,
    "guidance_scale": 1.0,
    "few_step": True,
    "attention_modulation": False,
    "model": None,
    "revision": None,
    "model_width": "full",
    "quantize": None,
    "loras": [{"path": "a.safetensors", "weight": 0.5}],
    "text_encoders": None,
    "image": {"name": "photo.png", "sha256": "00ff"},
    "edit": [{"name": None, "sha256": "00ff"}],
    "strength": 0.5,
}


def write_png(folder: Path) -> None:
    (folder / "settings.png.json").write_text(json.dumps(SETTINGS))
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text(KEY, json.dumps(SETTINGS))
    Image.new("RGB", (8, 8)).save(folder / "20260101-000000000000_a.png", pnginfo=chunks)


def write_inputs(folder: Path) -> None:
    for name, kind in (("image", "JPEG"), ("mask", "PNG"), ("edit", "WEBP")):
        with Image.open(io.BytesIO(picture(0))) as small:
            small.resize((100, 80)).save(folder / name, kind)


@loader("pictures to start from", write_inputs)
def _(folder: Path) -> None:
    paths = {name: folder / name for name in ("image", "mask")}
    settings = DrawSettings("a cat", **paths).resolved(tiny.MODEL)
    read_inputs(dataclasses.replace(settings, edit=(folder / "edit",)), unit=16)


@loader("settings in a PNG", write_png)
def _(folder: Path) -> None:
    chunks = PngImagePlugin.PngInfo()
    text = (folder / "settings.png.json").read_bytes().decode("utf-8", "replace")
    chunks.add_itxt(KEY, text, zip=len(text) % 2 == 0)
    Image.new("RGB", (8, 8)).save(folder / "itxt.png", pnginfo=chunks)
    for path in sorted(folder.glob("*.png")):
        recorded = read_settings(path)
        with contextlib.suppress(UserError):
            find_pictures(recorded, path)


@loader("history", write_png, "2*.png")
def _(folder: Path) -> None:
    list(History(folder).load())


def write_window_settings(folder: Path) -> None:
    save_settings(folder / "settings.json", WindowSettings())


@loader("settings of the window", write_window_settings)
def _(folder: Path) -> None:
    load_settings(folder / "settings.json")


@loader(
    "server",
    lambda folder: (folder / "body.json").write_text(
        json.dumps(
            {
                "prompt": "a red apple",
                "n": 2,
                "size": "64x32",
                "seed": 3,
                "steps": 2,
                "guidance": 1.5,
                "stream": True,
                "partial_images": 1,
                "response_format": "b64_json",
                "user": "me",
            }
        )
    ),
)
def _(folder: Path) -> None:
    from apps.server.errors import RequestError
    from apps.server.models import Served
    from apps.server.request import Limits, parse_request

    values = parse_json((folder / "body.json").read_bytes(), "the body")
    try:
        parse_request(values, {"m": Served("m", ModelChoice(), tiny.MODEL)}, Limits())
    except RequestError as error:
        json.dumps(error.body()).encode()
        raise UserError(error) from None


def write_form(folder: Path) -> None:
    tiny.require("starlette", "python_multipart")
    fields = {
        "prompt": "a red apple",
        "seed": 3,
        "size": "64x32",
        "strength": 0.5,
        "stream": "true",
    }
    pictures = ("image[]", picture(0)), ("mask", picture(0))
    (folder / "form.bin").write_bytes(encoded(*fields.items(), *pictures))


@loader("form of the server", write_form)
def _(folder: Path) -> None:
    from starlette.requests import Request

    from apps.server.errors import RequestError
    from apps.server.models import Served
    from apps.server.request import Limits, parse_form
    from apps.server.uploads import Uploads

    message = {"type": "http.request", "body": (folder / "form.bin").read_bytes()}
    scope = {"type": "http", "headers": [(b"content-type", KIND.encode())]}

    async def receive() -> dict[str, Any]:
        return message

    try:
        with contextlib.ExitStack() as files:
            form = asyncio.run(Uploads().read(Request(scope, receive), files))
            request = parse_form(form, {"m": Served("m", ModelChoice(), tiny.MODEL)}, Limits())
            for source in filter(None, (request.job.settings.image, request.job.settings.mask)):
                read_picture(source)
    except RequestError as error:
        json.dumps(error.body()).encode()
        raise UserError(error) from None


def write_prompts(folder: Path) -> None:
    save_pretrained(folder / "model", tiny.make_components())
    lines = ("a red apple", ":size 32x32", ":seed 5", "a blue car", ":images 1", ":width tiny")
    lines += (":negative cat", ":guidance 2", ":quantize 8", ":lora no.safetensors 0.5", ":show")
    lines += (":output pictures/", "a green cat", ":help", ":steps 1", ":lora", "", ":quit")
    (folder / "lines.txt").write_text("\n".join(lines))


class Typed(io.TextIOWrapper):
    """A user who types, and sees a line taken when the next one is read."""

    def readline(self, size: int = -1, /) -> str:
        report_progress()
        return super().readline(size)


class Shown(io.StringIO):
    """A terminal, where each picture has a line."""

    def write(self, text: str, /) -> int:
        report_progress()
        return super().write(text)


@loader("prompt loop", write_prompts, "lines.txt")
def _(folder: Path) -> None:
    """A session of `generate --interactive`: each mistake is one line, and the loop goes on."""
    stdin, stderr = sys.stdin, io.StringIO()
    sys.stdin = Typed(io.BytesIO((folder / "lines.txt").read_bytes()), "utf-8")
    before = os.getcwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(Shown()), contextlib.redirect_stderr(stderr):
            assert generate(["--interactive", "--model", "model", "--steps", "1"]) == 0
    finally:
        os.chdir(before)
        sys.stdin = stdin
    for line in stderr.getvalue().splitlines():
        assert len(line) <= MOST_CHARACTERS + len("warning: ") and line.isprintable(), line


# --- data -------------------------------------------------------------------------------------


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (16, 20, 3), np.uint8)
    file = io.BytesIO()
    kind = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF")[seed % 6]
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def write_pictures(folder: Path) -> None:
    suffixes = ("png", "jpg", "webp", "tiff", "bmp", "gif")
    lines = []
    for i, suffix in enumerate(suffixes):
        (folder / f"{i}.{suffix}").write_bytes(picture(i))
        if i < 3:
            (folder / f"{i}.txt").write_text(f"picture {i}")
        else:
            lines.append(json.dumps({"file_name": f"{i}.{suffix}", "text": f"no {i}", "b": ["c"]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def read_records(records: Iterable[Record | Skipped]) -> None:
    for record in records:
        if isinstance(record, Skipped):
            json.dumps([record.key, record.detail])
            continue
        json.dumps([record.key, record.captions, record.place])
        try:
            decode(record.read())
        except Exception as error:
            if type(error).__name__ != "Unusable":
                raise


@loader("folder of pictures", write_pictures)
def _(folder: Path) -> None:
    source = open_records([str(folder)])
    source.count()
    read_records(source.records())
    read_folder(folder, [(16, 16)])


@loader("metadata.jsonl", write_pictures, "metadata.jsonl")
def _(folder: Path) -> None:
    source = open_records([str(folder)])
    read_records(source.records())


def write_table(folder: Path) -> None:
    for i in range(3):
        (folder / f"{i}.png").write_bytes(picture(i))
    rows = [f'{i}.png,"no ""{i}"",\nof 3",x' for i in range(3)]
    (folder / "metadata.csv").write_text("\n".join(["file_name,text,more", *rows]) + "\n")


@loader("metadata.csv", write_table, "metadata.csv")
def _(folder: Path) -> None:
    read_records(open_records([str(folder)]).records())


def write_tars(folder: Path) -> None:
    for name, mode in (("a.tar", "w"), ("b.tar.gz", "w:gz")):
        with tarfile.open(folder / name, mode) as tar:
            for i in range(3):
                parts = {"png": picture(0), "json": b'{"text": "a", "n": 3}', "txt": b"b"}
                for suffix, data in parts.items():
                    info = tarfile.TarInfo(f"{'long' * 30 * (i % 2)}/{i}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


@loader("tar", write_tars)
def _(folder: Path) -> None:
    for path in sorted(folder.glob("*.tar*")):
        source = open_records([str(path)])
        read_records(source.records())


def write_parquet(folder: Path) -> None:
    tiny.require("pyarrow")
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.table(
        {
            "image": [{"bytes": picture(0), "path": f"{i}.png"} for i in range(4)],
            "text": [f"picture {i}" for i in range(4)],
            "more": [["a", "b"], [], None, ["c"]],
        }
    )
    parquet.write_table(table, folder / "a.parquet", row_group_size=2)


@loader("parquet", write_parquet)
def _(folder: Path) -> None:
    source = open_records([str(folder / "a.parquet")])
    source.count()
    read_records(source.records())
    for place in ((0, 0, 0), (0, 1, 1)):
        read_records([source.at(place)])


def write_prepared(folder: Path) -> None:
    samples = make_samples(
        ["a", "b", "c"],
        [{"text": "x", "short": "y"}] * 3,
        latents=np.ones((3, 4, 4, 4), np.float16),
        others={},
        size=(32, 32),
        texts={},
    )
    write_shard(
        folder / "shards" / "000000.safetensors",
        samples,
        held_out=0,
        skipped=[{"key": "d", "reason": "damaged picture", "detail": "cannot be read"}],
        changed={"transparent parts over white": 1},
        sizes=[(32, 40)] * 3,
        settings="s",
    )
    values = {
        "resolution": 32,
        "autoencoders": {"model": {"config": to_dict(tiny.AUTOENCODER), "digest": "0" * 32}},
        "captions": ["text", "short"],
        "text_states": {},
        "buckets": [[32, 32]],
    }
    write_index(folder, chunks=1, settings="s", values=values)


@loader("prepared set", write_prepared, "index.json", "shards/*")
def _(folder: Path) -> None:
    data = Prepared(folder, captions={"text": 1.0})
    data.check_files()
    data.read(0, 2)
    data.prompts(0, 2)
    data.validation()
    count_shards(folder, chunks=1, buckets=[(32, 32)])


@loader(
    "lists of prompts",
    lambda folder: (
        (folder / "prompts.txt").write_text("a red apple\n# no\n\na blue bird\n"),
        (folder / "geneval.jsonl").write_text(
            '{"tag": "a", "include": [], "prompt": "a dog"}\n' * 2
        ),
        (folder / "dpg").mkdir(),
        (folder / "dpg" / "1.txt").write_text("a cat"),
    ),
    "*.txt",
    "*.jsonl",
    "dpg/*",
)
def _(folder: Path) -> None:
    def read(call: Callable[[], Any]) -> None:
        for text in json.dumps(str(call())).splitlines():
            text.encode()

    read_each(
        lambda: read(lambda: list(read_prompts(folder / "prompts.txt"))),
        lambda: read(lambda: geneval_files(folder / "geneval.jsonl", per_prompt=1, seed=0)),
        lambda: read(lambda: dpg_files(folder / "dpg", seed=0)),
    )
