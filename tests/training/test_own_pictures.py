"""Twelve captioned pictures through every command, until four steps draw them.

The autoencoder, Qwen-Image's with few channels, has weights that keep the colors of 8x8 pixels. The
transformer is trained from random weights, as a user would do it, with options for few steps.
"""

import dataclasses
import io
import json
import sys
import tarfile

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from PIL import Image

import train.loop.trainer
from mlx_snapgen import generate
from mlx_snapgen.checkpoint.config import ModelFolder
from mlx_snapgen.checkpoint.module import FORMAT_VERSION
from mlx_snapgen.json_values import to_dict
from mlx_snapgen.metadata import slug
from mlx_snapgen.networks.autoencoders.registry import make_autoencoder
from mlx_snapgen.pictures import from_uint8
from tests import tiny
from tests.runtime.test_clip import MERGES, write_folder
from tests.runtime.test_gemma import write_gemma
from tests.training.test_new import SIZES
from train import autoencoder, export, flow, kd, kdmd, new, prepare
from train.data.shards import shard_path

tiny.require("mlx_lm", "tokenizers", "pyarrow")

CAPTIONS = ("ant", "bat", "cat", "cow", "dog", "eel", "elk", "fox", "hen", "owl", "pig", "rat")
SIZES_OF_PICTURES = ((64, 64), (32, 128))
WORDS = ["<pad>", "<eos>", "<bos>", "<unk>", *CAPTIONS]
PICTURES_SEED = 20
SEED = 0


def originals():
    """Caption -> picture (H, W, 3): four cells of 32x32 pixels, of eight colors at random."""
    rng = np.random.default_rng(PICTURES_SEED)
    found = {}
    for k, caption in enumerate(CAPTIONS):
        height, width = SIZES_OF_PICTURES[k % 2]
        cells = rng.choice([25, 230], (height // 32, width // 32, 3))
        found[caption] = np.kron(cells, np.ones((32, 32, 1))).astype(np.uint8)
    return found


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def write_sources(folder):
    """The pictures as a folder, a .tar and a .parquet file."""
    from pyarrow import parquet, table

    made = originals()
    (folder / "pictures").mkdir()
    with tarfile.open(folder / "pictures.tar", "w") as tar:
        for k, (caption, pixels) in enumerate(made.items()):
            for name, data in ((f"{k:02d}.png", png(pixels)), (f"{k:02d}.txt", caption.encode())):
                (folder / "pictures" / name).write_bytes(data)
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    rows = [{"bytes": png(pixels), "path": None} for pixels in made.values()]
    parquet.write_table(table({"image": rows, "text": list(made)}), folder / "pictures.parquet")


def write_autoencoder(folder):
    """Qwen-Image's layers with few channels, with weights that keep the color of 8x8 pixels.

    Each layer passes its channels on, and residual branches are off. The channels are the color,
    its negative and a large constant. So RMS norm does almost nothing, and the difference of
    silu(x) and silu(-x) is x.
    """
    config = dataclasses.replace(tiny.QWEN_AUTOENCODER, decoder_blocks=(1, 1, 1, 1))
    model = make_autoencoder(config)
    weights = {}
    for name, value in tree_flatten(model.parameters()):
        weight = np.zeros(value.shape, np.float32)
        if "norm" in name:
            weight += 1
        elif ".conv2." not in name and "attentions" not in name and value.ndim > 1:
            through = np.eye(len(weight), weight.shape[-1])
            if ".conv.weight" in name and "encoder" in name:
                weight[:, :2, :2] = through[:, None, None] / 4
            elif value.ndim == 4:
                weight[:, 1, 1] = through
            else:
                weight[:] = through
        weights[name] = weight
    sign = np.concatenate([np.eye(3), -np.eye(3)])
    constant = 10.0
    for part in ("encoder", "decoder"):
        w = weights[f"{part}.conv_in.weight"]
        w[:6, 1, 1, :3] = sign
        weights[f"{part}.conv_in.bias"][6] = constant
        out = weights[f"{part}.conv_out.weight"]
        scale = constant / np.sqrt(out.shape[-1])
        out[:] = 0
        out[:3, 1, 1, :6] = scale * sign.T
    weights["encoder.conv_out.weight"][3, 1, 1, :3] = 1
    model.update(tree_unflatten([(k, mx.array(v)) for k, v in weights.items()]))
    means = [np.array(model.encoder(from_uint8(p[None]))[0])[0] for p in originals().values()]
    flat = np.concatenate([m.reshape(-1, m.shape[-1]) for m in means])
    config = dataclasses.replace(
        config,
        latents_mean=tuple(map(float, flat.mean(0))),
        latents_std=tuple(map(float, flat.std(0))),
    )
    folder.mkdir()
    values = {"format_version": FORMAT_VERSION, "part": "autoencoder", "quantization": None}
    (folder / "config.json").write_text(json.dumps(values | {"autoencoder": to_dict(config)}))
    mx.save_safetensors(
        str(folder / "autoencoder.safetensors"), dict(tree_flatten(model.parameters()))
    )


@pytest.fixture(scope="module")
def run():
    """Runs a command in this process, as typed in the module's folder."""
    with pytest.MonkeyPatch.context() as patch:
        # Whatever reads the emoji font must not be needed.
        patch.setitem(sys.modules, "train.data.stickers.render", None)
        patch.setattr(train.loop.trainer, "plot_log", lambda run_dir: None)
        mx.disable_compile()

        def call(command, *options):
            patch.setattr(sys, "argv", ["command", *map(str, options)])
            command.main()

        yield call
        mx.enable_compile()


@pytest.fixture(scope="module")
def work(tmp_path_factory, run):
    """A folder with the sources, an untrained model, and the sources prepared for it."""
    folder = tmp_path_factory.mktemp("work")
    write_sources(folder)
    write_autoencoder(folder / "qwen")
    write_folder(folder / "clip", tiny.make_clip(MERGES, 48, num_heads=3), "hugging face")
    write_gemma(folder / "gemma", None, words=WORDS)
    (folder / "sizes.json").write_text(json.dumps(SIZES))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        common = ["--data", "pictures", "--resolution", 64, "--run-dir", "decoder"]
        common += ["--steps", 10, "--batch-size", 6, "--learning-rate", 1e-4]
        run(autoencoder, "--init-from", "qwen", "--decoder-only", *common)
        parts = ["--autoencoder", "decoder", "--text-encoder", "gemma", "clip"]
        run(new, "model", "--preset", "sizes.json", *parts, "--resolution", 64, "--seed", SEED)
        for source in ("pictures", "pictures.tar", "pictures.parquet"):
            options = ["--model", "model", "--resolution", 64, "--output", f"{source}-set"]
            run(prepare, source, *options)
        yield folder


def test_all_formats_give_the_same_bytes(work):
    """All but the keys, which are the names of files or the numbers of rows."""
    sets = [
        {
            name: bytes(np.array(value))
            for name, value in mx.load(str(shard_path(work / f"{source}-set", 0))).items()
            if "keys" not in name
        }
        for source in ("pictures", "pictures.tar", "pictures.parquet")
    ]
    assert {"train/64x64/latents", "train/32x128/latents"} <= sets[0].keys()
    assert sets[0] == sets[1] == sets[2]


def is_nearest(folder):
    """Whether each drawn picture is nearest to its own original, by the mean squared error."""
    made = originals()

    def error(drawn, pixels):
        pixels = np.asarray(Image.fromarray(pixels).resize(drawn.size))
        return np.square((np.asarray(drawn, float) - pixels) / 255).mean()

    found = []
    for caption in made:
        drawn = Image.open(folder / f"{slug(caption)}.png").convert("RGB")
        errors = {other: error(drawn, pixels) for other, pixels in made.items()}
        own = errors.pop(caption)
        print(f"{folder.name} {caption}: {own:.4f}, next {min(errors.values()):.4f}")
        found.append(own < min(errors.values()))
    return found


def draw_all(run, work, model):
    """All captions with a model, as `generate` draws by default."""
    folder = work / f"{model}-drawn"
    for k, (height, width) in enumerate(SIZES_OF_PICTURES):
        (work / "prompts.txt").write_text("\n".join(CAPTIONS[k::2]))
        size = ["--height", height, "--width", width, "--seed", 0]
        run(generate, "--prompts-file", "prompts.txt", "--model", model, "-o", f"{folder}/", *size)
    return is_nearest(folder)


def test_twelve_of_twelve_pictures_in_28_steps_and_in_four(work, run):
    data = ["--data", "pictures-set", "--validation-prompts", "ant", "--model-widths", "full"]
    data += ["--batch-size", 24, "--seed", SEED]
    rates = ["--learning-rate", 2e-3, "--final-learning-rate", 1e-4, "--time-shift", 6]
    run(flow, "--model", "model", "--run-dir", "flow", *data, *rates, "--steps", 450)
    run(export, "--run", "flow", "--output", "flow-model")
    assert draw_all(run, work, "flow-model") == [True] * 12

    more = ["--teacher", "flow-model", "--init-from", "flow", "--time-shift", 6]
    more += ["--learning-rate", 1e-4, "--steps", 15]
    run(kd, "--model", "model", "--run-dir", "kd", *data, *more)
    run(export, "--run", "kd", "--output", "kd-model")
    more = ["--steps", 40, "--rank", 8, "--alpha", 16]
    lora = "few.safetensors"
    run(kdmd, "--model", "kd-model", "--run-dir", "kdmd", "--output", lora, *data, *more)
    run(export, "--model", "kd-model", "--few-step-lora", lora, "--output", "four-steps")
    assert ModelFolder.open(work / "four-steps").config.few_step.num_inference_steps == 4
    assert draw_all(run, work, "four-steps") == [True] * 12
