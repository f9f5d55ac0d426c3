"""Everything that reads a file of unknown origin: a good sample, and how it is read."""

import io
import json
import pickle
import tarfile
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
from convert.pickles import spooled
from convert.pytorch.folder import FORMAT, read_config
from mlx_snapgen.checkpoint.clip import load_clip
from mlx_snapgen.checkpoint.config import load_config, load_vocabulary
from mlx_snapgen.checkpoint.model import load_pretrained, save_pretrained
from mlx_snapgen.checkpoint.text_encoders import load_tokenizer
from mlx_snapgen.cli.prompts_file import read_prompts
from mlx_snapgen.config import to_dict
from mlx_snapgen.files import parse_json
from mlx_snapgen.lora.files import few_step_sampler, load_lora, save_lora
from mlx_snapgen.metadata import KEY, read_settings
from mlx_snapgen.networks.efficient_dit import EfficientDiT
from mlx_snapgen.prompt_check import check_prompts
from mlx_snapgen.public.source import find_source
from mlx_snapgen.quantize.palettes import Palettes, load_palettes, palettes_file
from mlx_snapgen.settings import DrawSettings, ModelChoice
from mlx_snapgen.teachers.folder import load_network, load_teacher_config
from tests import tiny
from tests.conversion.test_mil_program import X, write_package
from train.data.decode import decode
from train.data.imagefolder import read_folder
from train.data.open import open_records
from train.data.preparation import make_samples
from train.data.prepared import Prepared, write_index
from train.data.shards import write_shard
from train.data.source import Record, Skipped
from train.evaluation.prompt_lists import dpg_files, geneval_files
from train.loop.checkpoint import load_checkpoint, read_log, save_checkpoint
from train.loop.run import recorded


class Loader(NamedTuple):
    """A kind of input."""

    write: Callable[[Path], Any]
    """Write a good sample into an empty folder."""
    read: Callable[[Path], Any]
    """Read the folder as commands do; raises only `UserError`."""
    files: tuple[str, ...] = ("*",)
    """Patterns of the files to damage."""


LOADERS: dict[str, Loader] = {}


def loader(name: str, write: Callable[[Path], Any], *files: str) -> Callable:
    def add(read: Callable[[Path], Any]) -> Callable[[Path], Any]:
        LOADERS[name] = Loader(write, read, files or ("*",))
        return read

    return add


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


@loader("vocabulary", write_model, "model/vocabulary.json")
def _(folder: Path) -> None:
    vocabulary = load_vocabulary(folder / "model")
    settings = DrawSettings("a red aple on a table").resolved(tiny.MODEL)
    list(check_prompts(settings, [None], vocabulary=vocabulary))


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


@loader("teacher", lambda folder: tiny.write_teacher(folder / "teacher"), "teacher/*.*")
def _(folder: Path) -> None:
    config = load_teacher_config(folder / "teacher")
    mx.eval(load_network(folder / "teacher", config).parameters())


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
}


def write_png(folder: Path) -> None:
    (folder / "settings.png.json").write_text(json.dumps(SETTINGS))
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text(KEY, json.dumps(SETTINGS))
    Image.new("RGB", (8, 8)).save(folder / "20260101-000000000000_a.png", pnginfo=chunks)


@loader("settings in a PNG", write_png)
def _(folder: Path) -> None:
    chunks = PngImagePlugin.PngInfo()
    text = (folder / "settings.png.json").read_bytes().decode("utf-8", "replace")
    chunks.add_itxt(KEY, text, zip=len(text) % 2 == 0)
    Image.new("RGB", (8, 8)).save(folder / "itxt.png", pnginfo=chunks)
    for path in sorted(folder.glob("*.png")):
        read_settings(path)


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
    from apps.server.request import Limits, RequestError, parse_request
    from mlx_snapgen.errors import UserError

    values = parse_json((folder / "body.json").read_bytes(), "the body")
    try:
        parse_request(values, {"m": ModelChoice()}, config=tiny.MODEL, limits=Limits())
    except RequestError as error:
        json.dumps(error.body()).encode()
        raise UserError(error) from None


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
    write_shard(folder / "shards" / "000000.safetensors", samples, held_out=0, settings="s")
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
    from mlx_snapgen.errors import UserError

    for read in (
        lambda: list(read_prompts(folder / "prompts.txt")),
        lambda: geneval_files(folder / "geneval.jsonl", per_prompt=1, seed=0),
        lambda: dpg_files(folder / "dpg", seed=0),
    ):
        try:
            for text in json.dumps(str(read())).splitlines():
                text.encode()
        except UserError as error:
            assert len(str(error)) <= 300
