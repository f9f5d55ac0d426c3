"""The PyTorch twins of our networks against MLX: random weights, every width, odd grids.

Needs torch and safetensors: `pip install -e ".[parity]"`.
"""

import dataclasses
import functools
import json
import sys
import weakref

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_snapgen.checkpoint.hub import default_model_path
from mlx_snapgen.checkpoint.model import load_pretrained
from mlx_snapgen.errors import UserError
from mlx_snapgen.networks.autoencoders.convolutional import ConvolutionalAutoencoder
from mlx_snapgen.networks.autoencoders.semantics import mended
from mlx_snapgen.networks.efficient_dit import EfficientDiT
from mlx_snapgen.networks.elastic import extract
from mlx_snapgen.networks.text_encoders.base import TextStates
from mlx_snapgen.networks.text_encoders.sentencepiece import ACTIVATIONS, TransformerTextEncoder
from mlx_snapgen.semantics import SemanticConfig
from mlx_snapgen.settings import parse_width
from tests.tiny import AUTOENCODER, TEXT, TRANSFORMER, randomize, semantic_map_of

WHY = "parity with PyTorch needs it: pip install -e '.[parity]'"
torch = pytest.importorskip("torch", reason=WHY)
safetensors_torch = pytest.importorskip("safetensors.torch", reason=WHY)

from convert import from_torch  # noqa: E402
from convert.coreml.export import of_width  # noqa: E402
from convert.pytorch import efficient_dit, parts  # noqa: E402
from convert.pytorch import weights as torch_twins  # noqa: E402
from convert.pytorch.attention import attend_fused, attend_split  # noqa: E402
from convert.pytorch.read_back import convert_student  # noqa: E402
from convert.pytorch.weights import to_torch, torch_networks, torch_weights  # noqa: E402

CONFIG = dataclasses.replace(
    TRANSFORMER, blocks=(1, 3, 2), num_bands=4, text_dims=(12, 20), text_width=16
)
GROUPED = dataclasses.replace(CONFIG, head_dim=4, num_kv_heads=8, num_cross_kv_heads=2)
DENSE = dataclasses.replace(CONFIG, sparse_attention=False, long_skips=False, widths=(1.0,))
MULTI_QUERY = dataclasses.replace(CONFIG, num_kv_heads=1, num_bands=3, band_radius=2)
OF_X0 = dataclasses.replace(CONFIG, prediction="x0")
ONE_STAGE = dataclasses.replace(CONFIG, blocks=(3, 0, 0), num_cross_kv_heads=16, patch_size=1)


def filled(twin, module):
    """`twin` with the weights of the MLX `module`."""
    shapes = {name: tuple(value.shape) for name, value in twin.state_dict().items()}
    weights = torch_weights(module, shapes)
    twin.load_state_dict({name: torch.tensor(make()) for name, make in weights.items()})
    return twin.eval()


def assert_close(actual, expected, tolerance=1e-4):
    """Largest difference below `tolerance` of the largest value."""
    actual, expected = actual.detach().numpy(), np.array(expected)
    assert actual.shape == expected.shape
    assert np.abs(expected).max() > 0.1
    assert np.abs(actual - expected).max() < tolerance * np.abs(expected).max()


def velocities(network, twin, height, width, seed=0):
    """What the MLX network and its twin say of the same noise and three texts: a full one, a padded
    one, and an absent one.
    """
    keys = mx.random.split(mx.random.key(seed), 3)
    config = network.config
    x_t = mx.random.normal((3, height, width, config.latent_channels), key=keys[0])
    t = mx.array([0.21, 0.97, 0.02])
    states = [
        TextStates(
            mx.random.normal((3, n, dims), key=key),
            mx.arange(n)[None] < mx.array([[n], [n - 3], [0]]),
        )
        for n, dims, key in zip((5, 4), config.text_dims, keys[1:], strict=False)
    ]
    expected = network(x_t, t, *network.encode_text(states))
    with torch.no_grad():
        text = twin.encode_text([tuple(torch.tensor(np.array(x)) for x in s) for s in states])
        x_t = torch.tensor(np.array(x_t)).permute(0, 3, 1, 2)
        actual = twin(x_t, torch.tensor(np.array(t)), *text)
    return actual.permute(0, 2, 3, 1), expected


@pytest.mark.parametrize("attend", [attend_fused, attend_split])
@pytest.mark.parametrize(
    ("config", "size"),
    [
        (CONFIG, (8, 12)),
        (CONFIG, (20, 4)),
        (GROUPED, (12, 20)),
        (DENSE, (12, 8)),
        (MULTI_QUERY, (20, 12)),
        (ONE_STAGE, (6, 10)),
        (OF_X0, (8, 12)),
    ],
)
def test_the_transformer_is_mlx_s_at_every_width(config, size, attend):
    network = randomize(EfficientDiT(config), 1)
    # The fused form is one path for all widths, the split one is written out by heads.
    for width in config.widths[:1] if attend is attend_fused else config.widths:
        alone = extract(network, width)
        twin = filled(efficient_dit.EfficientDiT(alone.config, size, attend), alone)
        assert_close(*velocities(alone, twin, *size))


def test_another_resolution_is_one_call_away():
    network = randomize(extract(EfficientDiT(CONFIG), 0.5), 2)
    twin = filled(efficient_dit.EfficientDiT(network.config, (8, 8)), network)
    twin.resize((12, 20))
    assert_close(*velocities(network, twin, 12, 20))
    with pytest.raises(UserError, match="10x20 do not divide by 4"):
        twin.resize((10, 20))


def test_a_text_encoder_that_is_absent_is_left_out():
    network = randomize(extract(EfficientDiT(CONFIG), 0.375), 3)
    twin = filled(efficient_dit.EfficientDiT(network.config, (8, 8)), network)
    states, mask = mx.random.normal((1, 4, 20), key=mx.random.key(0)), mx.ones((1, 4), mx.bool_)
    expected, _ = network.encode_text([None, TextStates(states, mask)])
    actual, _ = twin.encode_text([None, (torch.tensor(np.array(states)), torch.ones(1, 4))])
    assert_close(actual[:, :, 0].permute(0, 2, 1), expected)
    with pytest.raises(UserError, match="all text encoders are absent"):
        twin.encode_text([None, None])
    with pytest.raises(UserError, match="2 text encoders expected, got 1"):
        twin.encode_text([None])


def test_time_is_exact_in_half_precision():
    network = randomize(extract(EfficientDiT(CONFIG), 1.0), 4)
    twin = filled(efficient_dit.EfficientDiT(network.config, (8, 8)), network)
    expected, _ = twin.time(torch.tensor([0.731]))
    actual, _ = twin.half().time(torch.tensor([0.731]))
    assert_close(actual.float(), expected.detach().numpy(), 5e-3)


RGBA_16 = {
    "encoder_channels": (8, 8, 8),
    "encoder_blocks": (1, 1, 1),
    "decoder_channels": (16, 12, 8, 8),
    "decoder_blocks": (2, 1, 1, 0),
    "picture_channels": 4,
}


SEMANTICS = SemanticConfig(9, (2, 4), appearance_channels=8, paint_width=6)
SEMANTIC = {
    "latent_channels": 34,
    "picture_channels": 4,
    "semantics": SEMANTICS,
    "latents_mean": (0.1,) * 34,
    "latents_std": (1.5,) * 34,
}


@pytest.mark.parametrize(
    "changed",
    [
        {"decoder_channels": (16, 12, 8), "decoder_blocks": (2, 1, 1)},
        {"latents_mean": (), "latents_std": ()},
        RGBA_16,
        SEMANTIC,
    ],
    ids=["uneven", "not normalized", "factor 16 with alpha", "semantic latents"],
)
def test_the_decoder_is_mlx_s(changed):
    config = dataclasses.replace(AUTOENCODER, **changed)
    autoencoder = randomize(ConvolutionalAutoencoder(config), 5)
    twin = filled(parts.Decoder(config), autoencoder.decoder)
    latents = mx.random.normal((2, 3, 5, config.latent_channels), key=mx.random.key(0))
    actual = twin(torch.tensor(np.array(latents)).permute(0, 3, 1, 2))
    assert_close(actual.permute(0, 2, 3, 1), autoencoder.decode(latents))


@pytest.mark.parametrize("own", [(), (100, 77, 20)], ids=["known things", "things of a LoRA"])
def test_a_decoder_of_things_is_mlx_s(own):
    """Some places disagree: most of a thing's decide, and one without a majority is not drawn."""
    autoencoder = ConvolutionalAutoencoder(dataclasses.replace(AUTOENCODER, **SEMANTIC))
    autoencoder.set_own_things(own, mx.zeros((len(own) * SEMANTICS.places, 8)))
    config, semantics = autoencoder.config, dataclasses.replace(SEMANTICS, own=own)
    assert config.semantics == semantics
    autoencoder = randomize(autoencoder, 5)
    twin = filled(parts.Decoder(config), autoencoder.decoder)
    # Most of the first thing is hidden by the second.
    second, last = (77, 20) if own else (7, 1)
    things = (5, 3, 4, 0, 0), (second, 2, 4, 1, 1), (8, 11, 2, 6, 0), (2, 0, 2, 4, 6)
    things += ((last, 7, 2, 7, 5),)
    exact = semantic_map_of(things[1:], (8, 9), config=SEMANTICS)
    found = semantic_map_of(things, (8, 9), config=SEMANTICS, wrong=12)
    ours = np.array(mended(mx.array(found), semantics))
    theirs = parts.mended(torch.tensor(found).permute(0, 3, 1, 2), semantics)
    np.testing.assert_allclose(theirs.permute(0, 2, 3, 1).numpy(), ours, atol=1e-5)
    right = (np.abs(ours - exact) < 1e-5).all(-1)
    given = (np.abs(found - exact) < 1e-5).all(-1)
    assert given.sum() < 60 < right.sum() and right[0, :5, :5].all()
    appearance = np.random.default_rng(1).normal(size=(*found.shape[:3], 6))
    latents = mx.array(np.concatenate([appearance, found], -1).astype(np.float32))
    latents = autoencoder.normalize(latents)
    actual = twin(torch.tensor(np.array(latents)).permute(0, 3, 1, 2))
    assert_close(actual.permute(0, 2, 3, 1), autoencoder.decode(latents))


@pytest.mark.parametrize("attend", [attend_fused, attend_split])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_text_encoder_is_mlx_s(activation, attend):
    config = dataclasses.replace(TEXT, hidden_size=24, num_heads=3, activation=activation)
    encoder = randomize(TransformerTextEncoder(config), 6)
    twin = filled(parts.TextEncoder(config, attend), encoder)
    tokens, mask = mx.arange(14).reshape(2, 7), mx.arange(7)[None] < mx.array([[7], [3]])
    actual = twin(torch.tensor(np.array(tokens)), torch.tensor(np.array(mask)))
    assert_close(actual, encoder(tokens, mask))


def test_the_default_model_is_the_same_in_pytorch(tmp_path):
    components = load_pretrained(dtype=mx.float32, share=0.375)
    assert to_torch(components, tmp_path / "new" / "model", width="tiny") == []
    model = efficient_dit.load(tmp_path / "new" / "model")
    assert model.config.transformer == components.config.transformer
    network, encoder = components.transformer, components.text_encoders[0]
    tokens, mask = encoder.tokenize(["a red apple to the left of a blue car", ""])
    states = encoder(tokens, mask)
    tokens, mask_ = torch.tensor(np.array(tokens)), torch.tensor(np.array(mask))
    assert_close(model.text_encoders[0](tokens, mask_), states)
    text, mask = network.encode_text([TextStates(states, mask)])
    x_t = mx.random.normal((2, 16, 16, 36), key=mx.random.key(0))
    x_t_ = torch.tensor(np.array(x_t)).permute(0, 3, 1, 2)
    text_ = torch.tensor(np.array(text)).permute(0, 2, 1)[:, :, None]
    actual = model.transformer(x_t_, torch.tensor([0.3, 1.0]), text_, mask_)
    assert_close(actual.permute(0, 2, 3, 1), network(x_t, mx.array([0.3, 1.0]), text, mask))
    picture = model.decoder(x_t_[:1]).permute(0, 2, 3, 1)
    assert_close(picture, components.autoencoder.decode(x_t[:1]))
    tokenizer = tmp_path / "new" / "model" / "tokenizer_0.model"
    assert tokenizer.read_bytes() == encoder.tokenizer.model


def test_a_folder_is_written_whole_or_not_at_all(components, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    alone = of_width(components, "small")
    to_torch(alone, folder, width="small")
    written = {p.name for p in folder.iterdir()}
    assert json.loads((folder / "config.json").read_text())["width"] == "small"
    with pytest.raises(UserError, match="exists already"):
        to_torch(alone, folder, width="small")
    assert {p.name for p in folder.iterdir()} == written
    monkeypatch.setattr("convert.pytorch.weights.torch_weights", lambda *_: {}["disk full"])
    with pytest.raises(KeyError):
        to_torch(alone, tmp_path / "other", width="small")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_weights_are_copied_one_by_one(components, tmp_path, monkeypatch):
    """A model of 1.2 GB took more than 5 GiB: its weights were in memory three times over."""
    alone = of_width(components, "small")
    make_networks, made = efficient_dit.make_networks, []

    def shapes_alone(config):
        networks = make_networks(config)
        assert all(p.is_meta for network in networks.values() for p in network.parameters())
        return networks

    def watched(make):
        assert all(array() is None for array in made)
        array = make()
        made.append(weakref.ref(array))
        return array

    def all_watched(module, shapes):
        weights = torch_weights(module, shapes)
        return {name: functools.partial(watched, make) for name, make in weights.items()}

    monkeypatch.setattr(torch_twins, "torch_weights", all_watched)
    networks = torch_networks(alone)
    count = sum(len(network.state_dict()) for network in networks.values())
    assert len(made) == count
    monkeypatch.setattr(efficient_dit, "make_networks", shapes_alone)
    to_torch(alone, tmp_path / "model", width="small")
    assert len(made) == 2 * count
    for name, network in networks.items():
        state = safetensors_torch.load_file(tmp_path / "model" / f"{name}.safetensors")
        assert state.keys() == network.state_dict().keys()
        assert all(torch.equal(state[key], value) for key, value in network.state_dict().items())


def test_a_bad_folder_is_one_line(components, model_folder, tmp_path):
    with pytest.raises(UserError, match="is not a model for PyTorch"):
        efficient_dit.load(model_folder)
    with pytest.raises(UserError, match="is not a model for PyTorch"):
        efficient_dit.load(tmp_path / "nothing")
    alone = of_width(components, "small")
    to_torch(alone, tmp_path / "model", width="small")
    path = tmp_path / "model" / "decoder.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"decoder\.safetensors does not fit"):
        efficient_dit.load(tmp_path / "model")


# --- and back -----------------------------------------------------------------------------------


@pytest.mark.parametrize("width", ["full", "tiny"])
def test_a_model_comes_back_bit_for_bit(components, model_folder, tmp_path, width, monkeypatch):
    alone = load_pretrained(model_folder, dtype=mx.float32, share=parse_width(width).share)
    to_torch(alone, tmp_path / "torch", width=width)
    path = tmp_path / "torch" / "decoder.safetensors"
    state = safetensors_torch.load_file(path)
    assert state["up1.bias"].std() > 0
    moved = {name: value + 1 if name == "up1.bias" else value for name, value in state.items()}
    safetensors_torch.save_file(moved, path)
    command = ["from_torch", str(tmp_path / "torch"), str(tmp_path / "back")]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(UserError, match="name the model that it came from with --model"):
        from_torch.main()
    monkeypatch.setattr(sys, "argv", [*command, "--model", str(model_folder)])
    from_torch.main()
    back = load_pretrained(tmp_path / "back")
    assert back.config.transformer == alone.config.transformer
    for part, module in alone.modules().items():
        found = dict(tree_flatten(back.modules()[part].parameters()))
        expected = dict(tree_flatten(module.parameters()))
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            if f"{part}.{name}" == "autoencoder.decoder.up1.bias":
                value = value + 1
            assert mx.array_equal(found[name], value), f"{part}.{name}"
    report = json.loads((tmp_path / "back" / "report.json").read_text())
    assert "decoder.out.weight" in report["keys"]["used"]


def test_what_does_not_come_back_is_one_line(components, model_folder, tmp_path):
    alone = load_pretrained(model_folder, dtype=mx.float32, share=0.5)
    to_torch(alone, tmp_path / "torch", width="small")
    path = tmp_path / "torch" / "transformer.safetensors"
    state = safetensors_torch.load_file(path)
    for change, message in {
        "ghost": "has the unknown ghost",
        "head.linear.bias": r"misshapes head.linear.bias \(7,\)",
    }.items():
        safetensors_torch.save_file(state | {change: torch.zeros(7)}, path)
        with pytest.raises(UserError, match=message):
            convert_student(tmp_path / "torch", model_folder, tmp_path / "back")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"transformer\.safetensors is truncated"):
        convert_student(tmp_path / "torch", model_folder, tmp_path / "back")
    path.unlink()
    with pytest.raises(UserError, match=r"is incomplete: transformer\.safetensors is missing"):
        convert_student(tmp_path / "torch", model_folder, tmp_path / "back")
    with pytest.raises(UserError, match="does not come from"):
        convert_student(tmp_path / "torch", default_model_path(), tmp_path / "back")
    assert not (tmp_path / "back").exists()
