"""Converting what public teachers are made of: transformers, Flux's autoencoder, their LoRAs."""

import dataclasses
import json

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from convert.parity import originals
from mlx_snapgen.checkpoint.model import load_autoencoder
from mlx_snapgen.config import TransformerConfig
from mlx_snapgen.errors import UserError
from mlx_snapgen.lora.adapters import linear_layers
from mlx_snapgen.networks.autoencoders.flux2 import Flux2Autoencoder
from mlx_snapgen.networks.autoencoders.kl import KLAutoencoder
from mlx_snapgen.networks.efficient_dit import EfficientDiT
from mlx_snapgen.public.convert import convert
from mlx_snapgen.public.keys.autoencoders import read_autoencoder
from mlx_snapgen.public.keys.lora import dotted, lora_name
from mlx_snapgen.public.keys.transformers import read_transformer
from mlx_snapgen.public.source import find_source
from mlx_snapgen.public.teachers import TeacherParts, convert_teacher
from mlx_snapgen.teachers.config import LIGHTNING
from mlx_snapgen.teachers.folder import NETWORKS, load_network, load_teacher_config, quantizable
from tests.tiny import FLUX2, FLUX2_AUTOENCODER, KL_AUTOENCODER, QWEN, Z_IMAGE, randomize

PUBLIC = {
    "qwen-image": (
        QWEN,
        {"_class_name": "QwenImageTransformer2DModel"} | originals.QWEN_IMAGE,
    ),
    "z-image": (
        Z_IMAGE,
        {"_class_name": "ZImageTransformer2DModel", "all_patch_size": [2], "norm_eps": 1e-5}
        | {"rope_theta": 256.0}
        | originals.Z_IMAGE,
    ),
    "flux2": (
        FLUX2,
        {"_class_name": "Flux2Transformer2DModel", "patch_size": 1, "mlp_ratio": 3.0}
        | {"timestep_guidance_channels": 256, "rope_theta": 2000, "out_channels": None}
        | originals.FLUX2,
    ),
}
"""Kind -> our config, and diffusers'."""
KL_CONFIG = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [32, 32, 64, 64],
    "layers_per_block": 1,
    "latent_channels": 4,
    "shift_factor": 0.5,
    "scaling_factor": 0.25,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


def flat(module):
    return dict(tree_flatten(module.parameters()))


def write_public(folder, config, weights, shards=1):
    """A part of a pipeline as diffusers has it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    stem, index = "diffusion_pytorch_model", {}
    for i in range(shards):
        part = dict(list(weights.items())[i::shards])
        name = f"{stem}-{i + 1:05}-of-{shards:05}" if shards > 1 else stem
        mx.save_safetensors(str(folder / f"{name}.safetensors"), part)
        index |= dict.fromkeys(part, f"{name}.safetensors")
    if shards > 1:
        text = json.dumps({"weight_map": index})
        (folder / f"{stem}.safetensors.index.json").write_text(text)
    return folder


def public_transformer(folder, kind, shards=2):
    """Our network of random weights, and its folder of diffusers."""
    config, values = PUBLIC[kind]
    network = randomize(NETWORKS[kind](config), 1)
    write_public(folder, values, flat(network), shards)
    return network


def public_kl(folder, autoencoder, config, more):
    """The same of Flux's or FLUX.2's autoencoder, its keys and layouts written out."""
    randomize(autoencoder, 2)
    weights = dict(more)
    for key, value in flat(autoencoder).items():
        key = key.replace("attentions.0.norm.", "attentions.0.group_norm.")
        key = key.replace("attentions.0.proj.", "attentions.0.to_out.0.")
        key = key.removeprefix("encoder.") if "quant_conv" in key else key
        key = key.removeprefix("decoder.") if "quant_conv" in key else key
        if value.ndim == 4:
            value = value.transpose(0, 3, 1, 2)
        elif "quant_conv.weight" in key or key.endswith("conv_shortcut.weight"):
            value = value[..., None, None]
        if "to_qkv" in key:
            for name, third in zip("qkv", mx.split(value, 3), strict=True):
                weights[key.replace("qkv", name)] = mx.contiguous(third)
        else:
            weights[key] = mx.contiguous(value)
    write_public(folder, config, weights)
    return autoencoder


@pytest.mark.parametrize("kind", PUBLIC)
def test_a_transformer_is_found_and_kept(tmp_path, kind):
    network = public_transformer(tmp_path / "in", kind)
    report = convert(find_source(str(tmp_path / "in")), tmp_path / "out")
    assert report["kind"] == kind
    assert set(report["keys"]["used"]) == set(flat(network))
    stored = mx.load(str(tmp_path / "out" / "transformer.safetensors"))
    assert all(mx.array_equal(stored[key], value) for key, value in flat(network).items())
    weights = flat(network)
    gone = weights.pop(next(key for key in weights if key.endswith("to_q.weight")))
    write_public(tmp_path / "less", PUBLIC[kind][1], weights)
    with pytest.raises(UserError, match=r"lacks .*to_q\.weight"):
        convert(find_source(str(tmp_path / "less")), tmp_path / "b")
    write_public(tmp_path / "more", PUBLIC[kind][1], flat(network) | {"time_proj.weight": gone})
    with pytest.raises(UserError, match=rf"'time_proj.weight' belongs to no {kind} transformer"):
        convert(find_source(str(tmp_path / "more")), tmp_path / "b")
    path = tmp_path / "less" / "diffusion_pytorch_model.safetensors"
    mx.save_safetensors(str(path), flat(network))
    with pytest.raises(UserError, match=r"needs the config\.json of its folder"):
        convert(find_source(str(path)), tmp_path / "b")


def check_autoencoder(found, expected):
    assert found.config == expected.config
    for name, value in flat(expected).items():
        assert mx.array_equal(flat(found)[name], value), name


def test_fluxs_autoencoder(tmp_path):
    expected = public_kl(tmp_path / "in", KLAutoencoder(KL_AUTOENCODER), KL_CONFIG, {})
    report = convert(find_source(str(tmp_path / "in")), tmp_path / "out")
    assert report["kind"] == "kl-vae"
    query = "encoder.mid_block.attentions.0.to_q.bias"
    assert report["keys"]["renamed"][query] == "encoder.mid_block.attentions.0.to_qkv.bias"
    for found in (load_autoencoder(tmp_path / "out"), read_autoencoder(tmp_path / "in")):
        check_autoencoder(found, expected)


FLUX2_CONFIG = KL_CONFIG | {
    "_class_name": "AutoencoderKLFlux2",
    "batch_norm_eps": 0.5,
    "patch_size": [2, 2],
    "use_quant_conv": True,
    "use_post_quant_conv": True,
}


def test_the_autoencoder_of_flux2_has_its_statistics_in_the_config(tmp_path):
    mean = mx.arange(16) * 0.5
    statistics = {
        "bn.running_mean": mean,
        "bn.running_var": mx.full(16, 1.75),
        "bn.num_batches_tracked": mx.array([9], mx.int64),
    }
    config = dataclasses.replace(
        FLUX2_AUTOENCODER, latents_mean=tuple(mean.tolist()), latents_std=(1.5,) * 16
    )
    autoencoder = Flux2Autoencoder(config)
    expected = public_kl(tmp_path / "in", autoencoder, FLUX2_CONFIG, statistics)
    report = convert(find_source(str(tmp_path / "in")), tmp_path / "out")
    assert report["kind"] == "flux2-vae"
    assert set(report["keys"]["ignored"]) == set(statistics)
    for found in (load_autoencoder(tmp_path / "out"), read_autoencoder(tmp_path / "in")):
        check_autoencoder(found, expected)
    public_kl(tmp_path / "less", autoencoder, FLUX2_CONFIG, {})
    with pytest.raises(UserError, match=r"lacks bn\.running_mean"):
        read_autoencoder(tmp_path / "less")
    other = FLUX2_CONFIG | {"norm_num_groups": 8}
    public_kl(tmp_path / "other", autoencoder, other, statistics)
    with pytest.raises(UserError, match="only an AutoencoderKLFlux2 with norm_num_groups 32"):
        read_autoencoder(tmp_path / "other")


@pytest.fixture
def pipeline(tmp_path):
    """A public model without a language model, and its network."""
    network = public_transformer(tmp_path / "public" / "transformer", "qwen-image")
    public_kl(tmp_path / "public" / "vae", KLAutoencoder(KL_AUTOENCODER), KL_CONFIG, {})
    (tmp_path / "public" / "scheduler").mkdir()
    path = tmp_path / "public" / "scheduler" / "scheduler_config.json"
    path.write_text('{"shift": 3.0}')
    return network, tmp_path / "public"


@pytest.mark.parametrize("bits", [None, 4])
def test_a_teacher_takes_its_transformer_from_the_source_or_converted(pipeline, tmp_path, bits):
    network, public = pipeline
    how = None if bits is None else {"bits": bits, "group_size": 32}
    source = find_source(str(public / "transformer"))
    convert(source, tmp_path / "made", quantization=how)
    convert_teacher(
        public, tmp_path / "a", TeacherParts(text_encoder="owner/reader"), quantization=how
    )
    convert_teacher(
        public,
        tmp_path / "b",
        TeacherParts(text_encoder="owner/reader", transformer=tmp_path / "made"),
    )
    names = {p.name for p in (tmp_path / "a").iterdir()}
    assert names == {p.name for p in (tmp_path / "b").iterdir()}
    for name in names - {"report.json"}:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    config = load_teacher_config(tmp_path / "a")
    assert config.quantization == how and config.transformer == QWEN
    loaded = flat(load_network(tmp_path / "a", config))
    packed = quantizable(network, 32) if bits else set()
    assert bool(packed) == bool(bits)
    for key, value in flat(network).items():
        expected = mx.quantize(value, 32, bits)[0] if key in packed else value
        assert mx.array_equal(loaded[key], expected), key
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert len(report["relative_errors"]) == len(packed)
    with pytest.raises(UserError, match=r"quantize it with convert\.from_torch --quantize"):
        again = {"bits": 4, "group_size": 32}
        convert_teacher(
            public, tmp_path / "c", TeacherParts(transformer=tmp_path / "made"), quantization=again
        )
    assert {p.name for p in tmp_path.iterdir()} == {"public", "made", "a", "b"}


def test_a_truncated_shard_leaves_no_teacher(pipeline, tmp_path):
    _, public = pipeline
    path = sorted((public / "transformer").glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match=r"00002-of-00002\.safetensors is truncated"):
        convert_teacher(public, tmp_path / "teacher", TeacherParts(text_encoder="owner/reader"))
    path.unlink()
    with pytest.raises(UserError, match=r"lacks .*00002-of-00002\.safetensors, which"):
        convert_teacher(public, tmp_path / "teacher", TeacherParts(text_encoder="owner/reader"))
    assert {p.name for p in tmp_path.iterdir()} == {"public"}


# --- LoRAs --------------------------------------------------------------------------------------


def test_flat_names_get_their_dots_back():
    networks = [NETWORKS[kind](config) for kind, (config, _) in PUBLIC.items()]
    networks.append(EfficientDiT(TransformerConfig(hidden_size=64, blocks=(2, 11, 2), head_dim=8)))
    for network in networks:
        for path in linear_layers(network):
            assert dotted(path.replace(".", "_")) == path
    key = "lora_unet_transformer_blocks_58_attn_to_out_0.lora_down.weight"
    assert lora_name(key) == "transformer.transformer_blocks.58.attn.to_out.0.lora_A.weight"
    with pytest.raises(UserError, match="no layer of a network that is known here"):
        lora_name("lora_unet_down_blocks_0_attentions_1_proj_in.lora_down.weight")


def test_a_converted_lightning_lora_is_what_the_public_one_is(pipeline, tmp_path):
    """As it is, or in kohya's names: the same few-step mode."""
    network, public = pipeline
    plain, kohya = {}, {}
    layers = linear_layers(network)
    for i, path in enumerate(p for p in layers if p.startswith("transformer_blocks.")):
        rows, columns = layers[path].weight.shape
        parts = {
            "lora_down.weight": mx.random.normal((2, columns), key=mx.random.key(i)),
            "lora_up.weight": mx.random.normal((rows, 2), key=mx.random.key(i + 100)),
            "alpha": mx.array(8.0),
        }
        plain |= {f"{path}.{part}": value for part, value in parts.items()}
        flat_name = "lora_unet_" + path.replace(".", "_")
        kohya |= {f"{flat_name}.{part}": value for part, value in parts.items()}
    files = [tmp_path / f"{name}.safetensors" for name in ("plain", "kohya", "made")]
    mx.save_safetensors(str(files[0]), plain)
    mx.save_safetensors(str(files[1]), kohya)
    assert convert(find_source(str(files[1])), files[2])["kind"] == "lora"
    loaded = []
    for i, file in enumerate(files):
        folder = tmp_path / f"teacher-{i}"
        convert_teacher(
            public, folder, TeacherParts(few_step_lora=file, text_encoder="owner/reader")
        )
        config = load_teacher_config(folder)
        assert config.few_step == LIGHTNING
        loaded.append(flat(load_network(folder, config)))
    adapters = [key for key in loaded[0] if ".adapters.few_step." in key]
    assert len(adapters) == len(plain) // 3 * 2
    for other in loaded[1:]:
        assert all(mx.array_equal(other[key], loaded[0][key]) for key in adapters)


def test_read_transformer_is_the_network_itself(tmp_path):
    network = public_transformer(tmp_path / "in", "z-image")
    x, t, text = mx.ones((1, 4, 6, 4)), mx.array([0.4]), mx.ones((1, 5, 24))
    assert mx.array_equal(read_transformer(tmp_path / "in")(x, t, text), network(x, t, text))
