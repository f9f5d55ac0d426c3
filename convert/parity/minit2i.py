"""MiniT2I against `convert.pytorch.minit2i`, and its T5 against transformers, for `convert.parity`.

diffusers has no MiniT2I.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from convert.parity.originals import MINIT2I, fill, library, t5, write_spiece
from convert.parity.transformers import Pairs
from mlx_snapgen.networks.text_encoders.t5 import FLAN_T5
from mlx_snapgen.pipeline import SnapGenPipeline
from mlx_snapgen.pipeline_base import PictureWarning, Pipeline
from mlx_snapgen.public.convert import convert
from mlx_snapgen.public.keys.transformers import read_transformer
from mlx_snapgen.public.source import find_source
from mlx_snapgen.public.teachers import convert_teacher
from mlx_snapgen.sampling import get_noise
from mlx_snapgen.settings import DrawSettings

PROMPTS = ["a red apple on a table", "two cats, ü, over  snow: " + "a photo of " * 20]
"""The second is too long."""
SEED = 5


def make_minit2i(folder: Path, **changes: Any) -> None:
    """The published files of a transformer; the weights are random."""
    from convert.pytorch.minit2i import MiniT2I, published

    library("torch").manual_seed(0)
    sizes = MINIT2I | changes
    save = library("safetensors.torch").save_file
    folder.mkdir(parents=True, exist_ok=True)
    save(published(fill(MiniT2I(sizes))), folder / "diffusion_pytorch_model.safetensors")
    values = {"_class_name": "MiniT2IMMJiTModel", "_diffusers_version": "0.35.0"} | sizes
    (folder / "config.json").write_text(json.dumps(values))


def compare_minit2i(folder: Path) -> Pairs:
    """Early and late in the drawing, with a short text, a longer one and none."""
    torch = library("torch")
    theirs, ours = _reference(folder), read_transformer(folder)
    ours.set_dtype(mx.float32)
    size, rng = theirs.sizes, np.random.default_rng(0)
    side, length = size["image_size"], size["prompt_length"]
    x_t = rng.normal(size=(3, side, side, 3)).astype(np.float32)
    text = rng.normal(size=(3, length, size["txt_input_size"])).astype(np.float32)
    mask = np.arange(length)[None] < np.array([[length // 2], [3], [0]])
    for sigma in (0.9, 0.02):
        with torch.no_grad():
            pictures = 2 * torch.tensor(x_t).permute(0, 3, 1, 2)
            expected = theirs.velocity(pictures, 1 - sigma, torch.tensor(text), torch.tensor(mask))
        short = text[:, : length // 2] * mask[:, : length // 2, None]
        given = map(mx.array, (x_t, np.full(3, sigma), short, mask[:, : length // 2]))
        yield f"at {sigma:g}", ours(*given), expected.permute(0, 2, 3, 1) / -2


def _reference(folder: Path) -> Any:
    from convert.pytorch.minit2i import PREFIX, MiniT2I

    values = json.loads((folder / "config.json").read_text())
    network = MiniT2I(values)
    file = folder / "diffusion_pytorch_model.safetensors"
    weights = library("safetensors.torch").load_file(file)
    network.load_state_dict({k.removeprefix(PREFIX): v.float() for k, v in weights.items()})
    return network.eval()


def make_t5(folder: Path) -> None:
    fill(t5()).save_pretrained(folder)
    write_spiece(folder / "spiece.model")


def compare_t5(folder: Path) -> Pairs:
    from mlx_snapgen.checkpoint.t5 import load_t5

    torch, transformers = library("torch"), library("transformers")
    theirs = transformers.T5EncoderModel.from_pretrained(folder, dtype=torch.float32).eval()
    here = folder / "here"
    if not here.exists():
        convert(find_source(str(folder)), here, kind="t5")
    ours = load_t5(here, FLAN_T5, dims=theirs.config.d_model, dtype=mx.float32)
    states, mask = ours(PROMPTS)
    expected, theirs_mask = _encode(folder, theirs, FLAN_T5.max_length)
    kept = np.array(mask)
    assert np.array_equal(kept, theirs_mask[:, : kept.shape[1]].bool().numpy())
    found = mx.array(np.array(states)[kept])
    yield "states", found, expected[:, : kept.shape[1]][torch.tensor(kept)]


def _encode(folder: Path, network: Any, length: int) -> tuple[Any, Any]:
    """States and mask of `PROMPTS`, padded to `length` tokens."""
    tokenizer = library("transformers").T5Tokenizer.from_pretrained(folder, extra_ids=0)
    found = tokenizer(
        PROMPTS, return_tensors="pt", padding="max_length", truncation=True, max_length=length
    )
    given = {"input_ids": found.input_ids, "attention_mask": found.attention_mask}
    with library("torch").no_grad():
        return network(**given).last_hidden_state, found.attention_mask


def make_whole_minit2i(folder: Path) -> None:
    """The files of the published model and of its text encoder, and a picture with a mask."""
    model = folder / "minit2i-b-16"
    make_minit2i(model / "transformer", prompt_length=256)
    (model / "scheduler").mkdir()
    values = {"_class_name": "MiniT2IFlowMatchScheduler", "num_inference_steps": 25}
    (model / "scheduler" / "scheduler_config.json").write_text(json.dumps(values))
    make_t5(model / "text_encoder")
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(folder / "0.png")
    mask = np.zeros((64, 64), np.uint8)
    mask[20:, 31:50] = 255
    Image.fromarray(mask).save(folder / "mask.png")


def compare_minit2i_pictures(folder: Path) -> Pairs:
    """Prompts to pictures, with few steps and many; and pictures that start from another."""
    torch, model = library("torch"), folder / "minit2i-b-16"
    here = folder / "here"
    if not here.exists():
        convert_teacher(model, here)
    ours, theirs = SnapGenPipeline.from_pretrained(here), _reference(model / "transformer")
    text_encoder = library("transformers").T5EncoderModel.from_pretrained(model / "text_encoder")
    text, mask = _encode(model / "text_encoder", text_encoder.eval(), 256)
    noise = torch.tensor(np.array(get_noise(SEED, 64, 64, 3))).permute(0, 3, 1, 2)
    for k, steps, guidance in ((0, 4, 1.0), (0, 25, 2.5), (1, 3, 6.0)):
        settings = DrawSettings(
            PROMPTS[k], seed=SEED, num_inference_steps=steps, guidance_scale=guidance
        )
        given = noise, text[k : k + 1], mask[k : k + 1]
        expected = theirs.draw(*given, steps=steps, guidance=guidance)
        yield f"{steps} steps", _drawn(ours, settings), expected.permute(0, 2, 3, 1)
    start = np.array(Image.open(folder / "0.png"), np.float32) / 127.5 - 1
    for name, masked in (("from 0.png", False), ("inpainted", True)):
        settings = DrawSettings(
            PROMPTS[0],
            image=str(folder / "0.png"),
            mask=str(folder / "mask.png") if masked else None,
            strength=0.6,
            seed=SEED,
            num_inference_steps=5,
            guidance_scale=2.5,
        )
        redrawn = np.array(Image.open(folder / "mask.png"))[None] > 0 if masked else True
        # Three of the five steps; what stays has noise of the level of each step.
        z, picture = 2 * noise, torch.tensor(start).permute(2, 0, 1)[None]
        z = 0.4 * picture + 0.6 * z
        for i in (2, 3, 4):
            v = [
                theirs.velocity(z, i / 5, text[:1], some)
                for some in (torch.zeros_like(mask[:1]), mask[:1])
            ]
            z = z + (v[0] + 2.5 * (v[1] - v[0])) / 5
            kept = (i + 1) / 5 * picture + (1 - (i + 1) / 5) * 2 * noise
            z = torch.where(torch.tensor(redrawn), z, kept)
        yield name, _drawn(ours, settings), z.detach().permute(0, 2, 3, 1)


def _drawn(pipeline: Pipeline, settings: DrawSettings) -> mx.array:
    """The pixels (1, H, W, 3), not cut to [-1, 1]."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PictureWarning)
        *_, last = pipeline.generate(settings)
    return pipeline.autoencoder.decode(last.x0)
