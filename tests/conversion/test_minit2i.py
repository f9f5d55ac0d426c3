"""MiniT2I: the published files, its text encoder, its pictures, and what a mistake would change."""

import dataclasses
import json
import os
import re
import shutil
import sys

import mlx.core as mx
import numpy as np
import pytest
from huggingface_hub import constants
from PIL import Image

from convert import teacher
from convert.parity import __main__ as parity
from convert.parity.minit2i import make_minit2i, make_t5, make_whole_minit2i
from convert.parity.originals import SPIECE_TEXT, t5, write_spiece
from mlx_snapgen.checkpoint.module import shapes
from mlx_snapgen.errors import UserError
from mlx_snapgen.generate import main
from mlx_snapgen.lora.files import load_lora
from mlx_snapgen.metadata import read_metadata
from mlx_snapgen.networks import base, minit2i
from mlx_snapgen.networks.attention import Grid, rope_table
from mlx_snapgen.networks.minit2i import MiniT2ITransformer
from mlx_snapgen.networks.text_encoders import t5 as t5_module
from mlx_snapgen.networks.text_encoders.t5 import T5Encoder, T5Tokenizer, buckets
from mlx_snapgen.open_model import open_model
from mlx_snapgen.pipeline import SnapGenPipeline
from mlx_snapgen.pipeline_base import PictureWarning
from mlx_snapgen.public import description, estimate, first_use
from mlx_snapgen.public.keys.transformers import TRANSFORMER_KEYS, minit2i_transformer_config
from mlx_snapgen.public.kinds import KINDS
from mlx_snapgen.public_config import MiniT2ITransformerConfig, T5Config
from mlx_snapgen.settings import DrawSettings, ModelChoice
from mlx_snapgen.teachers import draw
from tests.hub import Hub
from tests.tiny import require

require("torch", "transformers")

B16 = {
    "image_size": 512,
    "patch_size": 16,
    "in_channels": 3,
    "txt_input_size": 1024,
    "hidden_size": 768,
    "txt_hidden_size": 768,
    "cond_vec_size": 768,
    "depth_double": 17,
    "txt_preamble_depth": 2,
    "num_heads": 12,
    "head_dim": 64,
    "mlp_ratio": 8 / 3,
    "pca_channels": 128,
    "prompt_length": 256,
    "prediction": "x",
    "sampler": "euler",
    "cfg_channels": 3,
    "cfg_interval": [0.0, 1.0],
}
L16 = B16 | {
    **dict.fromkeys(("hidden_size", "txt_hidden_size", "cond_vec_size"), 1248),
    "depth_double": 23,
    "num_heads": 24,
    "head_dim": 52,
    "mlp_ratio": 2.7,
}
"""The published settings."""
WIDE = dict.fromkeys(("hidden_size", "txt_hidden_size", "cond_vec_size"), 64)
WIDE |= {"head_dim": 16, "prompt_length": 256, "mlp_ratio": 2.0}
"""Some of a small network that can be quantized."""
REPOSITORY, TEXT = "MiniT2I/MiniT2I", "google/flan-t5-large"


@pytest.fixture(scope="module")
def public(tmp_path_factory):
    """The files of the published model, with those of its text encoder in it."""
    folder = tmp_path_factory.mktemp("public") / "MiniT2I"
    folder.mkdir()
    make_whole_minit2i(folder)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_SNAPGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(first_use, "GROUP_SIZE", 32)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


# --- the published files ------------------------------------------------------------------------


@pytest.mark.parametrize(("values", "count", "millions"), [(B16, 375, 258), (L16, 495, 912)])
def test_the_keys_of_the_published_file(values, count, millions):
    import torch

    from convert.pytorch.minit2i import MiniT2I, published

    with torch.device("meta"):
        tensors = published(MiniT2I(values | {"n_T": 100}))
    assert len(tensors) == count
    assert round(sum(value.numel() for value in tensors.values()) / 1e6) == millions
    config, keys = minit2i_transformer_config(values), TRANSFORMER_KEYS["minit2i"]
    found = {}
    for key, value in tensors.items():
        name = keys.find(key).name
        if name is None:
            assert key.split(".")[2] in ("t_embedder", "pooled_embedder")
            continue
        shape = tuple(value.shape)
        if len(shape) == 4:
            shape = (shape[0], shape[1] * shape[2] * shape[3])
        found[name] = shape
    assert found == shapes(MiniT2ITransformer(config).parameters())


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("model.net.img_embedder.proj1.weight", "img_embedder.proj1.weight"),
        ("model.net.mask_token", "mask_token"),
        ("model.net.txt_preamble_blocks.1.qkv.bias", "txt_preamble_blocks.1.qkv.bias"),
        ("model.net.double_blocks.16.img_mlp.w2.weight", "double_blocks.16.img_mlp.w2.weight"),
        ("model.net.double_blocks.0.q_norm.weight", "double_blocks.0.q_norm.weight"),
        ("model.net.final_layer.norm_final.weight", "final_layer.norm_final.weight"),
        ("model.net.t_embedder.mlp.2.bias", None),
    ],
)
def test_keys_by_name(key, name):
    assert KINDS["minit2i"].keys.find(key).name == name
    assert name is None or KINDS["minit2i"].keys.public(name) == (key,)


def test_b16_is_the_default():
    assert minit2i_transformer_config(B16) == MiniT2ITransformerConfig()
    assert minit2i_transformer_config(L16).mlp_size == 3376


@pytest.mark.parametrize(
    "change",
    [
        {"prediction": "v"},
        {"sampler": "heun"},
        {"cfg_interval": [0.1, 1.0]},
        {"txt_hidden_size": 512},
        {"in_channels": 4},
    ],
)
def test_another_network_is_refused(change):
    with pytest.raises(UserError, match="only a MiniT2I with"):
        minit2i_transformer_config(B16 | change)


# --- the text encoder ---------------------------------------------------------------------------


def test_tokens_are_those_of_transformers(tmp_path):
    import transformers

    write_spiece(tmp_path / "spiece.model")
    ours = T5Tokenizer.from_file(tmp_path / "spiece.model")
    theirs = transformers.T5Tokenizer.from_pretrained(tmp_path, extra_ids=0)
    for prompt in (
        SPIECE_TEXT,
        "",
        "  two  cats ",
        "A\tphoto\nof é 12★x ½ ﬁne",
        "é",
        "漢字 a",
        "many words, " * 200,
    ):
        expected = theirs(prompt, truncation=True, max_length=256).input_ids
        assert ours.encode(prompt, max_length=256) == expected
    assert (ours.end, ours.pad) == (1, 0)
    long = SPIECE_TEXT * 20
    cut = ours.cut(long, max_length=256)
    kept = ours._processor.decode(ours.encode(long, max_length=256)[:-1])
    assert f"{kept}{cut}".split() == long.split() and cut
    assert ours.cut("two cats", max_length=256) == ""


def test_distances_are_in_the_buckets_of_transformers():
    import torch
    from transformers.models.t5.modeling_t5 import T5Attention

    for length, count, most in ((300, 32, 128), (40, 8, 20)):
        distance = torch.arange(length)[None] - torch.arange(length)[:, None]
        expected = T5Attention._relative_position_bucket(
            distance, num_buckets=count, max_distance=most
        )
        assert np.array_equal(buckets(length, count=count, max_distance=most), expected.numpy())


def test_the_defaults_are_flan_t5_large():
    network = T5Encoder(T5Config())
    count = sum(np.prod(shape) for shape in shapes(network.parameters()).values())
    assert round(count / 1e6) == 341


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"feed_forward_proj": "relu"}, "only T5 1.1 and FLAN-T5 are supported"),
        ({"dense_act_fn": "relu"}, "'dense_act_fn' \"relu\" is not supported"),
        ({"is_gated_act": False}, "'is_gated_act' false is not supported"),
        ({"d_model": 32}, "its states have another width"),
        ({"model_type": "umt5"}, "describes a umt5, not a T5"),
    ],
)
def test_another_text_encoder_is_refused(public, tmp_path, changes, hint):
    shutil.copytree(public, tmp_path / "copy")
    path = tmp_path / "copy" / "minit2i-b-16" / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=hint):
        open_model(ModelChoice("copy"))


def test_a_damaged_tokenizer_is_found_before_anything_is_converted(public, tmp_path, monkeypatch):
    shutil.copytree(public, tmp_path / "copy")
    path = tmp_path / "copy" / "minit2i-b-16" / "text_encoder" / "spiece.model"
    path.write_bytes(path.read_bytes()[:50])
    monkeypatch.setattr(first_use, "convert", None)
    with pytest.raises(
        UserError, match=r"cannot read the tokenizer .*spiece\.model: it is not a sent"
    ):
        open_model(ModelChoice("copy"))


def test_a_whole_t5_is_converted_without_its_decoder(tmp_path):
    """The published file has one, and a second copy of the embedding."""
    make_t5(tmp_path / "t5")
    path = tmp_path / "t5" / "model.safetensors"
    weights = mx.load(str(path))
    more = {"decoder.block.0.layer.0.SelfAttention.q.weight": mx.ones((2, 2))}
    more |= {"lm_head.weight": mx.ones((2, 2)), "encoder.embed_tokens.weight": mx.ones((2, 2))}
    mx.save_safetensors(str(path), {**weights, **more})
    names = {key for key in {**weights, **more} if KINDS["t5"].keys.find(key).name is not None}
    assert names == set(shapes(T5Encoder(T5Config(num_layers=3)).parameters()))


# --- mistakes -----------------------------------------------------------------------------------


def columns_first(grid, head_dim, *, theta):
    turned = rope_table(Grid(grid.width, grid.height), head_dim, theta=theta)
    order = np.arange(grid.height * grid.width).reshape(grid.width, grid.height).T.ravel()
    return tuple(table[mx.array(order)] for table in turned)


def one_sided(length, *, count, max_distance):
    return np.minimum(buckets(length, count=count, max_distance=max_distance), count // 2 - 1)


@pytest.mark.parametrize(
    ("kind", "where", "mistake"),
    [
        ("minit2i", (minit2i, "rope_table"), columns_first),
        ("minit2i", (base, "LEAST_T"), 0.001),
        ("minit2i", (minit2i, "NOISE_SCALE"), 1.0),
        ("t5", (t5_module, "buckets"), one_sided),
    ],
)
def test_a_mistake_is_noticed(monkeypatch, kind, where, mistake):
    monkeypatch.setattr(minit2i, "joint_rope", minit2i.joint_rope.__wrapped__)
    monkeypatch.setattr(*where, mistake)
    assert max(difference for _, difference in parity.measure(kind)) > 1e-3


def test_a_mistake_in_the_schedule_is_noticed(monkeypatch):
    levels = draw.shifted_levels
    monkeypatch.setattr(draw, "shifted_levels", lambda *a, **k: [s**1.02 for s in levels(*a, **k)])
    assert max(difference for _, difference in parity.measure("minit2i-b")) > 1e-3


# --- drawing ------------------------------------------------------------------------------------


@pytest.fixture
def hub(public, tmp_path, monkeypatch):
    """The repositories of the model and of its text encoder, with files that nobody needs."""
    shutil.copytree(public, tmp_path / "remote")
    model = tmp_path / "remote" / "minit2i-b-16"
    shutil.move(model / "text_encoder", tmp_path / "text")
    shutil.copytree(model, tmp_path / "remote" / "minit2i-l-16")
    for name in ("pytorch_model.bin", "tf_model.h5", "tokenizer.json"):
        (tmp_path / "text" / name).write_bytes(b"not needed")
    (tmp_path / "remote" / "model_index.json").write_text('{"_class_name": "MiniT2IPipeline"}')
    (tmp_path / "remote" / "pipeline.py").write_text("raise SystemExit")
    made = Hub(tmp_path, **{REPOSITORY: tmp_path / "remote", TEXT: tmp_path / "text"})
    made.answer(monkeypatch, tmp_path / "hub")
    yield made
    made.close()


OPTIONS = ("--steps", "2", "--seed", "7", "--model")
NEEDED = {
    "minit2i-b-16/transformer/config.json",
    "minit2i-b-16/transformer/diffusion_pytorch_model.safetensors",
    "minit2i-b-16/scheduler/scheduler_config.json",
    "config.json",
    "model.safetensors",
    "spiece.model",
}


def test_the_repository_draws_without_mlx_lm(public, hub, cache, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mlx_lm", None)
    main(["a red apple", *OPTIONS, REPOSITORY, "--quantize", "none", "--output", "a.png"])
    told = capsys.readouterr().err
    words = r"MiniT2I \([\d.,]*[1-9][\d.,]*( million)? weights, license mit\) with google/flan-t5-l"
    assert re.search(words + r"arge \(license apac", told)
    assert re.search(r"fetching \d\.\d MB in 6 files and converting it once", told)
    assert "drawing 64 x 64 takes about" in told
    assert hub.names() == NEEDED | {"model_index.json"}
    metadata = read_metadata("a.png")
    assert (metadata["model"], metadata["model_name"]) == (REPOSITORY, "MiniT2I")
    assert metadata["guidance_scale"] == 2.5
    hub.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    main(["a red apple", *OPTIONS, REPOSITORY, "--output", "b.png"])
    main(["a red apple", *OPTIONS, str(public), "--quantize", "none", "--output", "c.png"])
    assert not hub.asked and len([*cache.iterdir()]) == 2
    pictures = [np.array(Image.open(f"{name}.png")) for name in "abc"]
    assert np.array_equal(pictures[0], pictures[1])
    assert np.array_equal(pictures[0], pictures[2])


def as_teacher(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["x", *options])
    teacher.main()


def drawn(model, name, *options):
    main(["a red apple", *OPTIONS, model, "--output", name, *options])
    return np.array(Image.open(name))


@pytest.mark.parametrize("of_hub", [False, True])
def test_the_whole_repository_is_a_teacher(public, hub, tmp_path, monkeypatch, of_hub):
    """Its folder or its name on the hub, where the text encoder is another repository."""
    monkeypatch.setattr(first_use, "DTYPE", None)
    as_teacher(monkeypatch, REPOSITORY if of_hub else str(public), "out")
    assert not of_hub or hub.names() == NEEDED | {"model_index.json"}
    expected = drawn(str(public), "b.png", "--quantize", "none")
    assert np.array_equal(drawn("out", "a.png"), expected)
    text = (tmp_path / "out" / "text_encoder").iterdir()
    assert {path.name for path in text} >= {"config.json", "model.safetensors", "spiece.model"}
    with pytest.raises(UserError, match="exists already"):
        teacher.main()


def test_the_whole_repository_is_quantized(tmp_path, monkeypatch):
    whole = tmp_path / "models" / "minit2i" / "minit2i-b-16"
    make_minit2i(whole / "transformer", **WIDE)
    make_t5(whole / "text_encoder")
    for name, options in {"dense": (), "packed": ("--quantize", "4", "--group-size", "32")}.items():
        as_teacher(monkeypatch, "models/minit2i", name, *options)
    assert open_model(ModelChoice("dense")).config.quantization is None
    assert open_model(ModelChoice("packed")).config.quantization == {"bits": 4, "group_size": 32}
    dense, packed = (drawn(name, f"{name}.png").astype(float) for name in ("dense", "packed"))
    assert 0 < np.abs(dense - packed).mean() < 20


def test_a_folders_own_text_encoder_is_not_replaced_by_that_of_the_hub(public, tmp_path):
    shutil.copytree(public, tmp_path / "model")
    path = tmp_path / "model" / "minit2i-b-16" / "text_encoder" / "config.json"
    path.unlink()
    with pytest.raises(UserError) as error:
        main(["a red apple", *OPTIONS, str(tmp_path / "model")])
    told = f"{tmp_path / 'model'} is incomplete: it has no minit2i-b-16/text_encoder/config.json"
    assert str(error.value) == told
    os.mkfifo(path)
    with pytest.raises(UserError, match="it is a pipe"):
        main(["a red apple", *OPTIONS, str(tmp_path / "model")])


def test_what_is_missing_or_foreign_is_one_line(hub, tmp_path):
    def refused():
        with pytest.raises(UserError) as error:
            main(["a red apple", *OPTIONS, REPOSITORY])
        assert "\n" not in str(error.value)
        return str(error.value)

    path = tmp_path / "text" / "spiece.model"
    path.rename(tmp_path / "away")
    assert refused() == "google/flan-t5-large is incomplete: it has no spiece.model"
    (tmp_path / "away").rename(path)
    path = tmp_path / "remote" / "minit2i-b-16" / "transformer" / "config.json"
    values = json.loads(path.read_text())
    shutil.rmtree(tmp_path / "hub")
    path.write_text(json.dumps(values | {"llm": "someone/else"}))
    assert "names 'someone/else' as text encoder, which is no FLAN-T5" in refused()
    shutil.rmtree(tmp_path / "hub")
    path.write_text(json.dumps(values | {"_class_name": "OtherModel"}))
    assert "is a MiniT2IPipeline, which cannot be drawn with" in refused()
    assert not [name for name in hub.names() if name.endswith(".safetensors")]


def test_it_draws_one_size_and_any_if_forced(public):
    pipe = SnapGenPipeline.from_pretrained(public, quantize=0)
    settings = DrawSettings("a red apple").resolved(pipe.config)
    assert (settings.height, settings.width) == (64, 64)
    assert (settings.num_inference_steps, settings.guidance_scale) == (25, 2.5)
    assert settings.time_shift == 1.0 and pipe.config.size_unit == 8
    steps = {"num_inference_steps": 2, "seed": 3}
    with pytest.warns(UserWarning, match="drawn at 64 x 64, the nearest size"):
        [expected] = pipe("a red apple", height=32, width=48, **steps)
    assert expected.size == (64, 64)
    [forced] = pipe("a red apple", height=32, width=48, force_size=True, **steps)
    assert forced.size == (48, 32)
    [negative] = pipe("a red apple", negative_prompt="a green car", **steps)
    assert not np.array_equal(np.array(negative), np.array(expected))
    with pytest.raises(UserError, match="MiniT2I cannot edit pictures"):
        pipe("a red apple", edit=(str(public / "0.png"),))
    with pytest.raises(UserError, match="has no few-step mode"):
        pipe("a red apple", few_step=True)


def test_masked_pixels_stay(public):
    pipe = SnapGenPipeline.from_pretrained(public, quantize=0)
    image, mask = public / "0.png", public / "mask.png"
    steps = {"num_inference_steps": 4, "seed": 3}
    [drawn] = pipe("a red apple", image=str(image), mask=str(mask), **steps)
    kept = np.array(Image.open(mask)) == 0
    before, after = np.array(Image.open(image)), np.array(drawn)
    assert np.array_equal(before[kept], after[kept])
    assert not np.array_equal(before[~kept], after[~kept])
    Image.open(image).resize((100, 70)).save("wide.png")
    with pytest.warns(PictureWarning, match="cut from 100x70 to 64x64 pixels"):
        [drawn] = pipe("", image="wide.png", strength=0.5, **steps)
    assert drawn.size == (64, 64)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_weights_draw_nearly_the_same(tmp_path, bits):
    """Both networks have rows that 32 divides."""
    from convert.parity import minit2i as makers

    makers.make_minit2i(tmp_path / "model" / "transformer", **WIDE | {"txt_input_size": 32})
    text = t5(d_model=32, d_ff=64)
    text.save_pretrained(tmp_path / "model" / "text_encoder")
    write_spiece(tmp_path / "model" / "text_encoder" / "spiece.model")
    dense, packed = (
        np.array(
            SnapGenPipeline.from_pretrained("model", quantize=n)(
                "a red apple", num_inference_steps=2
            )[0]
        ).astype(float)
        for n in (0, bits)
    )
    assert 0 < np.abs(dense - packed).mean() < {8: 2, 4: 20}[bits]


def test_memory_is_estimated_from_sizes(public, monkeypatch):
    """Without an autoencoder: B/16 in 16 bits needs little more than its network."""
    monkeypatch.setattr("mlx_snapgen.teachers.memory.float_bytes", lambda: 2)
    model = description.describe(str(public), public, None)
    large = dataclasses.replace(model, network=MiniT2ITransformer(MiniT2ITransformerConfig()))
    assert 0.7e9 < estimate.peak_memory(large, 0, 2 * 341_000_000) < 1.1e9


# --- LoRAs --------------------------------------------------------------------------------------


def test_loras_of_its_authors_tools_load(tmp_path):
    config = MiniT2ITransformerConfig(num_layers=1, num_text_layers=1, num_heads=2, head_dim=8)
    config = dataclasses.replace(config, mlp_size=16, text_dims=8, text_tokens=4)
    rng = np.random.default_rng(0)

    def pair(layer, rows, columns):
        a, b = rng.normal(size=(2, columns)), rng.normal(size=(rows, 2))
        return {
            f"{layer}.lora_A.weight": mx.array(a, mx.float32),
            f"{layer}.lora_B.weight": mx.array(b, mx.float32),
        }

    given = mx.random.normal((1, 32, 32, 3)), mx.array([0.5]), mx.random.normal((1, 4, 8))
    for prefix in ("model.net.", "base_model.model.model.net."):
        network = MiniT2ITransformer(config)
        network.final_layer.linear.weight = mx.random.normal(
            network.final_layer.linear.weight.shape
        )
        plain = network(*given)
        tensors = pair(f"{prefix}double_blocks.0.img_qkv", 48, 16)
        tensors |= pair(f"{prefix}pooled_embedder", 16, 8)
        path = tmp_path / f"{len(prefix)}.safetensors"
        mx.save_safetensors(str(path), tensors)
        assert load_lora(path, network) == ["double_blocks.0.img_qkv"]
        assert not mx.allclose(network(*given), plain, rtol=1e-2)
    mx.save_safetensors("bad.safetensors", pair("model.net.other", 8, 8))
    with pytest.raises(UserError, match="is of another model"):
        load_lora("bad.safetensors", MiniT2ITransformer(config))
