"""Transformers in one file, in FP8 or in the layouts of ComfyUI and of the models' authors."""

import io
import re
import shutil
from functools import partial

import mlx.core as mx
import numpy as np
import pytest

import convert.teacher
from convert.parity.originals import (
    flux2_klein_pipeline,
    qwen_image_pipeline,
    z_image_pipeline,
)
from mlx_snapgen.errors import UserError
from mlx_snapgen.generate import main
from mlx_snapgen.metadata import read_metadata
from mlx_snapgen.pipeline import SnapGenPipeline
from mlx_snapgen.public import first_use
from mlx_snapgen.public.layouts import in_diffusers_names, scaled
from mlx_snapgen.public.source import part_source
from tests.tiny import require

require("mlx_lm", "torch", "diffusers", "transformers")

SIZE = {"height": 48, "width": 80, "num_inference_steps": 2, "seed": 7}
PREFIX = "model.diffusion_model."
PIPELINES = {
    "z-image": z_image_pipeline,
    "klein": partial(flux2_klein_pipeline, is_distilled=True),
    "qwen-image": qwen_image_pipeline,
}
RENAMED = {
    "klein": {
        "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
        "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
        "single_transformer_blocks": "single_blocks",
        "transformer_blocks": "double_blocks",
        "attn.to_qkv_mlp_proj": "linear1",
        "modulation.linear": "modulation.lin",
        "modulation_img.linear": "modulation_img.lin",
        "modulation_txt.linear": "modulation_txt.lin",
        "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
        "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale",
        "attn.to_add_out": "txt_attn.proj",
        "attn.to_out.0": "img_attn.proj",
        "ff_context.linear_in": "txt_mlp.0",
        "ff_context.linear_out": "txt_mlp.2",
        "ff.linear_in": "img_mlp.0",
        "ff.linear_out": "img_mlp.2",
        "context_embedder": "txt_in",
        "x_embedder": "img_in",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
        "proj_out": "final_layer.linear",
    },
    "z-image": {
        "all_final_layer.2-1.": "final_layer.",
        "all_x_embedder.2-1.": "x_embedder.",
        "attention.to_out.0": "attention.out",
        "attention.norm_q": "attention.q_norm",
        "attention.norm_k": "attention.k_norm",
    },
}
"""Part of a name in diffusers -> of the authors' files."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for name, make in PIPELINES.items():
        make().save_pretrained(root / name)
    return {name: root / name for name in PIPELINES}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_SNAPGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(first_use, "GROUP_SIZE", 32)
    monkeypatch.setattr(first_use, "DTYPE", None)
    monkeypatch.chdir(tmp_path)


def stored(folder):
    """The transformer's weights, by safetensors' own reader."""
    from safetensors.torch import load_file

    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


def in_own_layout(name, weights):
    """As the authors publish them."""
    import torch

    found = {}
    for key, value in weights.items():
        new = key
        if name == "klein" and key.startswith("single"):
            new = new.replace("attn.to_out", "linear2")
            new = re.sub(r"attn.norm_([qk]).weight", r"norm.\1.scale", new)
        new = re.sub(r"attn.norm_([qk]).weight", r"img_attn.norm.\1.scale", new)
        new = new.replace("norm.q.", "norm.query_norm.").replace("norm.k.", "norm.key_norm.")
        for ours, theirs in RENAMED[name].items():
            new = new.replace(ours, theirs)
        if match := re.fullmatch(r"(.*)\.(to_q|add_q_proj)\.weight", key):
            parts = [match[2].replace("q", letter) for letter in "qkv"]
            value = torch.cat([weights[f"{match[1]}.{part}.weight"] for part in parts])
            new = new.removesuffix(f"attn.{match[2]}.weight").removesuffix(f"{match[2]}.weight")
            if name == "klein":
                new += f"{'txt' if 'add' in key else 'img'}_attn."
            new += "qkv.weight"
        elif re.search(r"\.(to_[kv]|add_[kv]_proj)\.weight", key):
            continue
        if key == "norm_out.linear.weight":
            value = torch.cat([*value.chunk(2)][::-1])
        found[new] = value
    if name == "z-image":
        found["norm_final.weight"] = torch.ones(3)
    return found


def write(path, weights, *, prefix="", scaled_by=None):
    """A file; `scaled_by` stores matrices in FP8, with scales under that name."""
    import torch
    from safetensors.torch import save_file

    found = {}
    for key, value in weights.items():
        if scaled_by is not None and key.endswith("weight") and value.ndim == 2:
            scale = value.abs().max() / 448
            if scaled_by:
                value = value / scale
                found[f"{prefix}{key.removesuffix('weight')}{scaled_by}"] = scale
                found[f"{prefix}{key.removesuffix('weight')}input_scale"] = torch.tensor(1.0)
            value = value.to(torch.float8_e4m3fn)
        found[prefix + key] = value.contiguous()
    if scaled_by == "scale_weight":
        found[f"{prefix}scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
    if prefix:
        found["vae.decoder.conv_in.bias"] = torch.zeros(3)
    save_file(found, path)
    return path


def read(folder, path=None):
    weights = part_source(folder / "transformer", path).weights(folder, dtype=mx.float32)
    return {key: np.array(value.astype(mx.float32)) for key, value in weights.items()}


def equal(found, expected):
    assert found.keys() == expected.keys()
    return all(np.array_equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("prefix", ["", PREFIX])
@pytest.mark.parametrize("name", ["z-image", "klein"])
def test_the_authors_layout_has_the_weights_of_diffusers(name, prefix, folders, tmp_path):
    from diffusers.loaders import single_file_utils

    own = in_own_layout(name, stored(folders[name]))
    path = write(tmp_path / "one.safetensors", own, prefix=prefix)
    found = read(folders[name], path)
    assert equal(found, read(folders[name]))
    kind = {"z-image": "z_image", "klein": "flux2"}[name]
    library = getattr(single_file_utils, f"convert_{kind}_transformer_checkpoint_to_diffusers")
    assert equal(found, {key: value.numpy() for key, value in library(own).items()})


@pytest.mark.parametrize("scaled_by", ["", "weight_scale", "scale_weight"])
@pytest.mark.parametrize("name", PIPELINES)
def test_fp8_is_read_with_its_scales(name, scaled_by, folders, tmp_path):
    weights = stored(folders[name])
    layout = in_own_layout(name, weights) if name in RENAMED else weights
    own = write(tmp_path / "own.safetensors", layout, prefix=PREFIX, scaled_by=scaled_by)
    plain = {key: value for key, value in read(folders[name]).items() if key.endswith("weight")}
    plain = {key: value for key, value in plain.items() if value.ndim == 2}
    found = read(folders[name], own)
    for key, value in plain.items():
        # E4M3 has four significant bits; without a scale its smallest number is 2^-9.
        most = np.abs(value) / 16 + 2**-10 * (np.abs(value).max() / 448 if scaled_by else 1)
        assert (np.abs(found[key] - value) <= most).all(), key
    assert found.keys() == read(folders[name]).keys()
    assert not equal({k: found[k] for k in plain}, plain)


def test_a_folder_in_fp8_draws_what_its_numbers_draw(folders, tmp_path):
    """Transformer and text encoder are stored in FP8, and equal a folder of the same numbers."""
    import torch
    from safetensors.torch import load_file, save_file

    for name in ("packed", "plain"):
        shutil.copytree(folders["z-image"], tmp_path / name)
        for path in (tmp_path / name).glob("t*/*model.safetensors"):
            weights = load_file(path)
            for key, value in weights.items():
                if value.ndim == 2:
                    value = value.to(torch.float8_e4m3fn)
                    weights[key] = value if name == "packed" else value.to(torch.bfloat16)
            save_file(weights, path, {"format": "pt"})
    packed, plain = (
        np.array(SnapGenPipeline.from_pretrained(name, quantize=0)("a red car", **SIZE)[0])
        for name in ("packed", "plain")
    )
    assert np.array_equal(packed, plain)


@pytest.mark.parametrize("name", PIPELINES)
def test_a_single_file_draws_what_the_folder_draws(name, folders, tmp_path, capsys):
    weights = stored(folders[name])
    layout = in_own_layout(name, weights) if name in RENAMED else weights
    path = write(tmp_path / "one.safetensors", layout, prefix=PREFIX)
    options = ["--height", "48", "--width", "80", "--steps", "2", "--seed", "7"]
    options += ["--quantize", "none", "--output", "one.png"]
    main(["a red car", "--model", str(path), "--base", str(folders[name]), *options])
    assert "converting it once" in capsys.readouterr().err
    metadata = read_metadata("one.png")
    assert (metadata["model"], metadata["base"]) == (str(path), str(folders[name]))
    expected = SnapGenPipeline.from_pretrained(folders[name], quantize=0)("a red car", **SIZE)[0]
    again = SnapGenPipeline.from_pretrained(path, base=str(folders[name]))("a red car", **SIZE)[0]
    assert np.array_equal(np.array(again), np.array(expected))
    main(["--config-from-image", "one.png", "--trust-settings", "--output", "two.png"])
    assert read_metadata("two.png") == metadata


def test_interactive_leaves_the_base_with_its_file(folders, tmp_path, monkeypatch):
    path = write(tmp_path / "one.safetensors", stored(folders["z-image"]))
    lines = [":steps 1", ":size 32x32", "a red car", f":model {folders['klein']}", "a cat"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    options = ["--model", str(path), "--base", str(folders["z-image"]), "--output", "loop/"]
    main(["--interactive", *options])
    assert read_metadata("loop/a-red-car.png")["base"] == str(folders["z-image"])
    metadata = read_metadata("loop/a-cat.png")
    assert metadata["model"] == str(folders["klein"]) and metadata["base"] is None


def test_interactive_takes_a_file_with_its_base(folders, tmp_path, monkeypatch):
    path = write(tmp_path / "one.safetensors", stored(folders["z-image"]))
    lines = [f":model {path} {folders['z-image']}", ":steps 1", ":size 32x32", "a red car"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    main(["--interactive", "--model", str(folders["klein"]), "--output", "loop/"])
    metadata = read_metadata("loop/a-red-car.png")
    assert (metadata["model"], metadata["base"]) == (str(path), str(folders["z-image"]))


def refused(*options):
    with pytest.raises(UserError) as error:
        main(["a red car", *map(str, options)])
    assert "\n" not in str(error.value)
    return str(error.value)


def test_files_that_do_not_fit_are_refused(folders, tmp_path):
    path = write(tmp_path / "one.safetensors", stored(folders["z-image"]))
    assert "choose the model with the other parts, --base Tongyi-MAI" in refused("--model", path)
    assert "no file two.safetensors" in refused("--model", "two.safetensors")
    folder = folders["klein"]
    assert "--base takes a model that is one" in refused("--model", folder, "--base", folder)
    assert refused("--base", folder).endswith("not fluent")
    assert "is not of FLUX.2 klein's kind" in refused("--model", path, "--base", folder)
    other = write(tmp_path / "other.safetensors", {"a.weight": stored(folder)["proj_out.weight"]})
    assert "is no transformer of a public model" in refused("--model", other, "--base", folder)
    (tmp_path / "ours").mkdir()
    assert "is not in diffusers' format" in refused("--model", path, "--base", "ours")
    short = {k: v for k, v in stored(folders["z-image"]).items() if k != "x_pad_token"}
    write(path, short)
    assert "it lacks x_pad_token" in refused("--model", path, "--base", folders["z-image"])


def test_scales_may_be_of_rows_or_blocks_and_must_fit():
    weight, rows = mx.ones((130, 256)), mx.arange(1, 131).astype(mx.float32)
    read_scaled = partial(scaled, dtype=mx.float32, where="a file")
    found = read_scaled({"a.weight": weight, "a.weight_scale": rows[:, None]})["a.weight"]
    assert mx.array_equal(found, mx.broadcast_to(rows[:, None], weight.shape))
    blocks = mx.array([[1.0, 2.0], [3.0, 4.0]])
    found = read_scaled({"a.weight": weight, "a.weight_scale_inv": blocks})["a.weight"]
    assert found[127, 127] == 1 and found[127, 128] == 2 and found[128, 127] == 3
    for scale, message in ((mx.ones((3, 2)), "does not fit"), (mx.zeros(1, mx.uint8), "scales no")):
        with pytest.raises(UserError, match=message):
            read_scaled({"a.weight": weight, "a.weight_scale": scale})
    with pytest.raises(UserError, match="scales no weight"):
        read_scaled({"b.weight_scale": mx.ones(1)})
    lora = {"double_blocks.0.img_attn.qkv.lora_A.weight": weight}
    assert in_diffusers_names(lora) is lora


def test_a_teacher_is_made_of_one_file_and_of_fp8(folders, tmp_path, monkeypatch):
    """The same weights as of the folder; mlx-lm's language model is not in FP8 any more."""
    import torch
    from safetensors.torch import load_file, save_file

    path = write(tmp_path / "one.safetensors", in_own_layout("z-image", stored(folders["z-image"])))
    shutil.copytree(folders["z-image"], tmp_path / "base")
    text = tmp_path / "base" / "text_encoder" / "model.safetensors"
    packed = {k: v.to(torch.float8_e4m3fn) for k, v in load_file(text).items()}
    save_file(packed, text, {"format": "pt"})
    for source, name, *options in (
        (path, "one", "--base", tmp_path / "base"),
        (folders["z-image"], "folder"),
    ):
        arguments = [str(word) for word in (source, name, *options)]
        monkeypatch.setattr("sys.argv", ["teacher", *arguments])
        convert.teacher.main()
    names = ("teacher.json", "transformer-00001.safetensors", "autoencoder.safetensors")
    for name in names[1:]:
        found, expected = (mx.load(str(tmp_path / made / name)) for made in ("one", "folder"))
        assert all(mx.array_equal(found[key], expected[key]) for key in expected)
    assert not (tmp_path / "one" / "converted").exists()
    assert (tmp_path / "one" / "text_encoder" / "tokenizer.json").is_file()
    pipe = SnapGenPipeline.from_pretrained("one")
    assert np.array(pipe("a red car", **SIZE)[0]).std() > 0
    with pytest.raises(UserError, match="is converted already"):
        monkeypatch.setattr("sys.argv", ["teacher", "one", "again"])
        convert.teacher.main()
