"""LoRAs of public models, in every layout, against diffusers with peft."""

import copy
import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

import train.lora
from convert.parity import originals
from convert.parity.originals import relative_difference
from mlx_snapgen.errors import UserError
from mlx_snapgen.generate import main
from mlx_snapgen.lora.adapters import linear_layers, remove_lora
from mlx_snapgen.lora.files import load_lora, save_lora
from mlx_snapgen.public import first_use
from mlx_snapgen.public.keys.transformers import read_transformer
from mlx_snapgen.sampling import get_noise
from tests.tiny import add_random_lora, require
from train.evaluation.public import PublicValidation

require("torch", "diffusers", "peft", "transformers", "mlx_lm")
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

MODELS = {
    "qwen-image": (originals.qwen_image, diffusers.QwenImagePipeline),
    "z-image": (originals.z_image, diffusers.ZImagePipeline),
    "flux2": (originals.flux2, diffusers.Flux2KleinPipeline),
}
ORIGINAL = {
    "z-image": {
        "layers.0.attention.qkv": ("layers.0.attention", ("to_q", "to_k", "to_v")),
        "noise_refiner.0.attention.qkv": ("noise_refiner.0.attention", ("to_q", "to_k", "to_v")),
        "layers.1.attention.out": ("layers.1.attention", ("to_out.0",)),
        "context_refiner.0.attention.out": ("context_refiner.0.attention", ("to_out.0",)),
        "layers.1.feed_forward.w2": ("layers.1.feed_forward", ("w2",)),
        "layers.1.adaLN_modulation.0": ("layers.1.adaLN_modulation", ("0",)),
    },
    "flux2": {
        "double_blocks.1.img_attn.qkv": ("transformer_blocks.1.attn", ("to_q", "to_k", "to_v")),
        "double_blocks.0.txt_attn.qkv": (
            "transformer_blocks.0.attn",
            ("add_q_proj", "add_k_proj", "add_v_proj"),
        ),
        "double_blocks.0.img_attn.proj": ("transformer_blocks.0.attn", ("to_out.0",)),
        "double_blocks.0.txt_attn.proj": ("transformer_blocks.0.attn", ("to_add_out",)),
        "double_blocks.0.img_mlp.0": ("transformer_blocks.0.ff", ("linear_in",)),
        "double_blocks.0.img_mlp.2": ("transformer_blocks.0.ff", ("linear_out",)),
        "double_blocks.1.txt_mlp.0": ("transformer_blocks.1.ff_context", ("linear_in",)),
        "double_blocks.1.txt_mlp.2": ("transformer_blocks.1.ff_context", ("linear_out",)),
        "single_blocks.0.linear1": ("single_transformer_blocks.0.attn", ("to_qkv_mlp_proj",)),
        "single_blocks.1.linear2": ("single_transformer_blocks.1.attn", ("to_out",)),
        "img_in": ("", ("x_embedder",)),
        "txt_in": ("", ("context_embedder",)),
        "final_layer.linear": ("", ("proj_out",)),
    },
}
"""Layers in the original layout: the path in diffusers, and the layers there."""


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory):
    """(kind, diffusers' transformer, ours, pipeline class)."""
    make, pipeline = MODELS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    original = originals.fill(make())
    original.save_pretrained(folder)
    return request.param, original, read_transformer(folder), pipeline


def theirs(kind, network):
    """Velocity of diffusers' network."""
    x, text = (torch.randn(*shape, generator=torch.manual_seed(i)) for i, shape in SHAPES)
    t = torch.tensor([0.3])
    with torch.no_grad():
        if kind == "z-image":
            [v] = network([x[0][:, None]], 1 - t, [text[0]], return_dict=False)[0]
            return -v[:, 0][None].permute(0, 2, 3, 1)
        packed = x.view(1, 4, 2, 2, 3, 2).permute(0, 2, 4, 1, 3, 5).reshape(1, 6, 16)
        settings = {"hidden_states": packed, "encoder_hidden_states": text, "timestep": t}
        if kind == "flux2":
            rows, columns = torch.meshgrid(torch.arange(2), torch.arange(3), indexing="ij")
            zeros = torch.zeros(6, dtype=torch.long)
            picture = torch.stack([zeros, rows.flatten(), columns.flatten(), zeros], -1)
            words = torch.zeros(9, 4, dtype=torch.long)
            words[:, 3] = torch.arange(9)
            settings |= {"img_ids": picture, "txt_ids": words, "guidance": None}
        else:
            mask = torch.ones(1, 9, dtype=torch.long)
            settings |= {"img_shapes": [[(1, 2, 3)]], "encoder_hidden_states_mask": mask}
        v = network(**settings, return_dict=False)[0]
    v = v.reshape(1, 2, 3, 4, 2, 2).permute(0, 1, 4, 2, 5, 3)
    return v.reshape(1, 4, 6, 4)


SHAPES = ((0, (1, 4, 4, 6)), (1, (1, 9, 24)))


def ours(network):
    x, text = (torch.randn(*shape, generator=torch.manual_seed(i)) for i, shape in SHAPES)
    x, text = mx.array(x.permute(0, 2, 3, 1).numpy()), mx.array(text.numpy())
    return network(x, mx.array([0.3]), text)


def update(rng, rows, columns, rank):
    """A and B."""
    a = rng.normal(size=(rank, columns), scale=0.2).astype(np.float32)
    return a, rng.normal(size=(rows, rank), scale=0.4).astype(np.float32)


def write(path, tensors, metadata=None):
    tensors = {name: mx.array(value) for name, value in tensors.items()}
    mx.save_safetensors(str(path), tensors, metadata or {"format": "pt"})
    return path


def named(names, layout, *, alpha):
    """Tensors in one layout, from name of the layer -> (A, B)."""
    tensors = {}
    for name, (a, b) in names.items():
        if layout == "kohya":
            name = "lora_unet_" + name.replace(".", "_")
        else:
            name = {"comfy": "diffusion_model.", "diffusers": "transformer."}[layout] + name
        down, up = ("lora_down", "lora_up") if layout == "kohya" else ("lora_A", "lora_B")
        tensors |= {f"{name}.{down}.weight": a, f"{name}.{up}.weight": b}
        if alpha is not None:
            tensors[f"{name}.alpha"] = np.float32(alpha)
    return tensors


def every_layer(network):
    rng, found = np.random.default_rng(0), {}
    for i, (path, layer) in enumerate(linear_layers(network).items()):
        found[path] = update(rng, *layer.weight.shape, 2 + i % 3)
    return found


def original_layers(kind, network):
    rng, layers, found = np.random.default_rng(0), linear_layers(network), {}
    for name, (parent, parts) in ORIGINAL[kind].items():
        shapes = [layers[f"{parent}.{part}".strip(".")].weight.shape for part in parts]
        found[name] = update(rng, sum(rows for rows, _ in shapes), shapes[0][1], 4)
    return found


def compare(model, path, *, folder=None, weight=0.7):
    """The relative difference, and how much the LoRA changes the output."""
    kind, original, network, pipeline = model
    before = theirs(kind, original)
    state = pipeline.lora_state_dict(folder or path, return_lora_metadata=True)
    tensors, metadata = state
    original.load_lora_adapter(tensors, adapter_name="x", prefix="transformer", metadata=metadata)
    original.set_adapters("x", weight)
    try:
        after = theirs(kind, original)
    finally:
        original.delete_adapters("x")
    load_lora(folder or path, network, weight=weight, name="x")
    try:
        found = ours(network)
    finally:
        remove_lora(network)
    assert relative_difference(before, after) > 0.05
    return relative_difference(found, after)


@pytest.mark.parametrize("alpha", [None, "header"])
def test_diffusers_layout(model, tmp_path, alpha):
    _, _, network, _ = model
    layers, metadata = every_layer(network), None
    if alpha == "header":
        one = next(iter(layers))
        config = {
            "r": 2,
            "lora_alpha": 5,
            "alpha_pattern": {one: 9},
            "rank_pattern": {name: len(a) for name, (a, _) in layers.items()},
            "target_modules": list(layers),
        }
        packed = {f"transformer.{key}": value for key, value in config.items()}
        metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(packed)}
    path = write(tmp_path / "a.safetensors", named(layers, "diffusers", alpha=None), metadata)
    assert compare(model, path) < 1e-4


def test_peft_folder(model, tmp_path):
    """As `PeftModel.save_pretrained` writes it, with rank-stabilized scale."""
    kind, original, network, _ = model
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["to_q", "to_k"], use_rslora=True)
    wrapped = peft.get_peft_model(copy.deepcopy(original), config)
    torch.manual_seed(0)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.4)
    wrapped.save_pretrained(tmp_path / "peft")
    wrapped.eval()
    expected = theirs(kind, wrapped)
    load_lora(tmp_path / "peft", network, name="x")
    found = ours(network)
    remove_lora(network)
    assert relative_difference(theirs(kind, original), expected) > 0.05
    assert relative_difference(found, expected) < 1e-4


@pytest.mark.parametrize("alpha", [None, 3.0])
@pytest.mark.parametrize("layout", ["comfy", "kohya"])
def test_original_layout(model, tmp_path, layout, alpha):
    kind, _, network, _ = model
    if layout == "comfy" and kind == "flux2" and alpha:
        alpha = None  # diffusers refuses it there
    names = every_layer(network) if kind == "qwen-image" else original_layers(kind, network)
    if kind == "z-image" and layout == "comfy":
        # diffusers reads the joined layers of kohya only.
        names = {name: pair for name, pair in names.items() if "attention" not in name}
    if layout == "kohya" and kind == "qwen-image":
        names = {name: pair for name, pair in names.items() if name.startswith("transformer_b")}
    path = write(tmp_path / "a.safetensors", named(names, layout, alpha=alpha))
    assert compare(model, path) < 1e-4


def test_a_wrong_alpha_is_noticed(model, tmp_path):
    network = model[2]
    tensors = named(every_layer(network), "diffusers", alpha=None)
    right = {"format": "pt", "lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 2})}
    outputs = []
    for i, metadata in enumerate((right, None)):
        load_lora(write(tmp_path / f"{i}.safetensors", tensors, metadata), network, name="x")
        outputs.append(ours(network))
        remove_lora(network)
    assert relative_difference(*outputs) > 1e-2


def test_weights_that_are_not_finite_are_refused(model, tmp_path):
    network = model[2]
    tensors = named(every_layer(network), "diffusers", alpha=None)
    key = next(iter(tensors))
    tensors[key] = np.full_like(tensors[key], np.nan)
    path = write(tmp_path / "nan.safetensors", tensors, {"format": "pt"})
    with pytest.raises(UserError, match=r"nan.safetensors is damaged: .* not finite"):
        load_lora(path, network)


def test_joined_layers_beside_their_parts_count_once(model, tmp_path):
    kind, _, network, _ = model
    if kind == "qwen-image":
        pytest.skip("it has no joined layers")
    joined = next(name for name in ORIGINAL[kind] if name.endswith("qkv"))
    a, b = original_layers(kind, network)[joined]
    parent, parts = ORIGINAL[kind][joined]
    whole, thirds = {joined: (a, b)}, zip(parts, np.split(b, 3), strict=True)
    split = {f"{parent}.{part}": (a, rows) for part, rows in thirds}
    outputs = []
    for i, layers in enumerate((whole, split, whole | split)):
        path = write(tmp_path / f"{i}.safetensors", named(layers, "comfy", alpha=None))
        load_lora(path, network, name="x")
        outputs.append(ours(network))
        remove_lora(network)
    assert mx.array_equal(outputs[0], outputs[1]) and mx.array_equal(outputs[0], outputs[2])
    path = write(tmp_path / "b.safetensors", named({joined: (a, b[:-1])}, "comfy", alpha=None))
    with pytest.raises(UserError, match=r"qkv.lora_B.weight is \(95, 4\), not of 96"):
        load_lora(path, network)


def test_flux2_stores_the_last_shift_before_its_scale(model, tmp_path):
    """diffusers does not swap them in LoRAs, only in whole checkpoints."""
    if model[0] != "flux2":
        pytest.skip("FLUX.2's layer")
    network = model[2]
    a, b = update(np.random.default_rng(0), 64, 32, 2)
    names = {"final_layer.adaLN_modulation.1": (a, b)}
    swapped = {"norm_out.linear": (a, np.concatenate([b[32:], b[:32]]))}
    outputs = []
    for i, layers in enumerate((names, swapped)):
        path = write(tmp_path / f"{i}.safetensors", named(layers, "comfy", alpha=None))
        load_lora(path, network, name="x")
        outputs.append(ours(network))
        remove_lora(network)
    assert mx.array_equal(*outputs)


def test_diffusers_reads_what_is_saved(model, tmp_path):
    _, _, network, _ = model
    add_random_lora(network, "default", rank=3, alpha=7.0)
    path = tmp_path / "a.safetensors"
    save_lora(path, network, base_model="tiny", words=["robot"], with_alpha=False)
    expected = ours(network)
    remove_lora(network)
    assert compare(model, path, weight=1.0) < 1e-4
    load_lora(path, network)
    assert relative_difference(ours(network), expected) < 1e-5
    remove_lora(network)


# --- from the command ---------------------------------------------------------------------------

SIZE = ("--height", "48", "--width", "80", "--steps", "2", "--seed", "7")


@pytest.fixture(scope="module")
def turbo(tmp_path_factory):
    """Tiny Z-Image-Turbo in diffusers' format, its pipeline, and a LoRA."""
    folder, pipeline = tmp_path_factory.mktemp("turbo"), originals.z_image_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    for part in (pipeline.transformer, pipeline.text_encoder, pipeline.vae):
        part.to(torch.bfloat16).to(torch.float32)  # the cache of public models has bfloat16
    pipeline.save_pretrained(folder / "model")
    layers = every_layer(read_transformer(folder / "model" / "transformer"))
    layers = {name: pair for name, pair in layers.items() if name.startswith("layers.")}
    path = write(folder / "style.safetensors", named(layers, "kohya", alpha=2.0))
    return folder / "model", pipeline, path


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_SNAPGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(first_use, "GROUP_SIZE", 32)
    monkeypatch.chdir(tmp_path)


def drawn(folder, name, *options):
    main(["a red car", "--model", str(folder), "-o", name, *SIZE, *options])
    return np.array(Image.open(name)).astype(float)


def pipeline_draws(pipeline, path, weight=1.0):
    """The picture of diffusers' pipeline with a LoRA: numbers from 0 to 255."""
    noise = torch.tensor(np.array(get_noise(7, 6, 10, 4))).permute(0, 3, 1, 2)
    settings = {"guidance_scale": 0.0, "num_inference_steps": 2, "height": 48, "width": 80}
    pipeline.load_lora_weights(str(path), adapter_name="style")
    pipeline.set_adapters("style", weight)
    try:
        return 255 * pipeline("a red car", latents=noise, output_type="np", **settings).images[0]
    finally:
        pipeline.unload_lora_weights()


def test_generate_draws_what_the_pipeline_draws_with_its_lora(turbo):
    folder, pipeline, path = turbo
    options = ("--quantize", "none")
    plain = drawn(folder, "plain.png", *options)
    found = drawn(folder, "styled.png", *options, "--lora", str(path), "0.8")
    assert np.abs(found - plain).max() > 10
    assert np.abs(found - pipeline_draws(pipeline, path, 0.8)).max() < 0.6
    off = drawn(folder, "off.png", *options, "--lora", str(path), "0")
    assert np.array_equal(off, plain)
    main(["--config-from-image", "styled.png", "-o", "again.png", "--trust-settings"])
    assert np.array_equal(np.array(Image.open("again.png")), found)


def test_a_transformer_that_is_read_again_has_its_lora(turbo):
    folder, _, path = turbo
    options = ("--quantize", "none", "--lora", str(path), "--num-images", "2")
    for name, low in (("all/", ()), ("low/", ("--low-memory",))):
        main(["a red car", "--model", str(folder), "-o", name, *SIZE, *options, *low])
    both = [sorted(Path(name).glob("*.png")) for name in ("all", "low")]
    pictures = [[np.array(Image.open(path)) for path in paths] for paths in both]
    assert np.array_equal(*pictures) and len(pictures[0]) == 2


def test_a_trained_lora_draws_the_same_in_diffusers(turbo, monkeypatch):
    """From a folder in diffusers' format to a LoRA file, and pictures of both."""
    folder, pipeline, _ = turbo
    monkeypatch.setattr(PublicValidation, "draw", lambda *_, **__: mx.zeros((1, 6, 6, 4)))
    Path("pictures").mkdir()
    Image.new("RGB", (64, 64), "red").save("pictures/0.png")
    Path("pictures/0.txt").write_text("a red car")
    short = "--steps 4 --rank 2 --alpha 5 --resolution 48 --learning-rate 0.03 --quantize none"
    argv = ["lora", "--data", "pictures", "--model", str(folder), *short.split()]
    monkeypatch.setattr(sys, "argv", argv)
    mx.disable_compile()  # which takes longer than the steps
    try:
        train.lora.main()
    finally:
        mx.enable_compile()
    plain = drawn(folder, "plain.png", "--quantize", "none")
    found = drawn(folder, "x.png", "--quantize", "none", "--lora", "pictures.safetensors")
    assert np.abs(found - plain).max() > 5
    assert np.abs(found - pipeline_draws(pipeline, "pictures.safetensors")).max() < 0.6


def test_quantized_layers_keep_their_weights_under_a_lora(turbo):
    folder, _, path = turbo
    whole = drawn(folder, "whole.png", "--quantize", "none", "--lora", str(path))
    found = drawn(folder, "packed.png", "--quantize", "8", "--lora", str(path))
    plain = drawn(folder, "plain.png", "--quantize", "8")
    assert np.abs(found - whole).mean() < 0.2 * np.abs(found - plain).mean()


def test_a_lora_that_does_not_fit_is_refused_before_the_model_is_converted(turbo, monkeypatch):
    folder, _, path = turbo
    monkeypatch.setattr(first_use, "convert", None)
    tensors = dict(mx.load(str(path)))
    a, b = (np.zeros(shape, np.float32) for shape in ((2, 32), (32, 2)))
    other = named({"double_blocks.0.img_attn.proj": (a, b)}, "comfy", alpha=None)
    write("other.safetensors", other)
    write("partly.safetensors", tensors | other)
    for name in ("other", "partly"):
        with pytest.raises(UserError, match=r"img_attn\.proj is no layer") as error:
            drawn(folder, "x.png", "--lora", f"{name}.safetensors")
        assert "\n" not in str(error.value)
        assert ("of another model" in str(error.value)) == (name == "other")
    with pytest.raises(UserError, match="no LoRA file missing"):
        drawn(folder, "x.png", "--lora", "missing.safetensors")
