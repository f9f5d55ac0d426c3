"""Qwen-Image's transformer: parity with diffusers, and what its positions and masks mean."""

import dataclasses
import json

import mlx.core as mx
import numpy as np
import pytest

from convert.parity import originals
from convert.parity.originals import fill, relative_difference
from mlx_snapgen.errors import UserError
from mlx_snapgen.networks.layers import pack, unpack
from mlx_snapgen.networks.qwen_image import QwenTransformer, msrope_table
from mlx_snapgen.public.keys.transformers import read_transformer
from tests.tiny import QWEN, randomize, require


def to_mx(tensor):
    return mx.array(tensor.numpy())


def check_parity(public, ours, height, width, lengths):
    """Every block on the public block's own input, then the whole; latents (height, width)."""
    import torch

    seen = {}
    for i, block in enumerate(public.transformer_blocks):
        block.register_forward_hook(
            lambda _, args, kwargs, out, i=i: seen.update({i: (kwargs, out)}), with_kwargs=True
        )
    batch, length = len(lengths), max(lengths)
    torch.manual_seed(height)
    x_t, t = torch.randn(batch, height, width, 4), torch.rand(batch)
    text = torch.randn(batch, length, 24)
    mask = torch.arange(length)[None] < torch.tensor(lengths)[:, None]
    text[~mask] = 0
    packed = torch.tensor(np.array(pack(to_mx(x_t), 2)))
    expected = public(
        packed, text, mask, t, [[(1, height // 2, width // 2)]] * batch, return_dict=False
    )[0]

    rope = msrope_table(
        height // 2, width // 2, text_length=length, axes=ours.config.rope_axes, theta=10000.0
    )
    joint = mx.concatenate([to_mx(mask), mx.ones(packed.shape[:2], mx.bool_)], axis=1)
    for i, block in enumerate(ours.transformer_blocks):
        kwargs, (text_out, picture_out) = seen[i]
        found = block(
            to_mx(kwargs["hidden_states"]),
            to_mx(kwargs["encoder_hidden_states"]),
            embedding=to_mx(kwargs["temb"]),
            rope=rope,
            mask=joint[:, None, None],
        )
        for stream, a, b in zip(("picture", "text"), found, (picture_out, text_out), strict=True):
            error = relative_difference(a, b)
            assert error < 1e-4, f"block {i} is the first that differs, by {error:.1e} in {stream}"

    v, features = ours(to_mx(x_t), to_mx(t), to_mx(text), to_mx(mask), return_features=True)
    assert v.shape == x_t.shape
    errors = {
        "velocity": relative_difference(pack(v, 2), expected),
        "features": relative_difference(features, seen[len(seen) - 1][1][1]),
    }
    print(errors)
    assert max(errors.values()) < 1e-4, errors


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """(diffusers' network, ours from its files)."""
    require("torch", "diffusers")
    public = fill(originals.qwen_image())
    folder = tmp_path_factory.mktemp("transformer")
    public.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1, "shards are read too"
    return public, read_transformer(folder)


@pytest.mark.parametrize(
    ("height", "width", "lengths"),
    [(8, 8, (4,)), (6, 14, (7,)), (10, 4, (5, 1, 3)), (2, 6, (13, 13))],
)
def test_parity_with_diffusers(both, height, width, lengths):
    public, ours = both
    assert ours.config == QWEN
    check_parity(public, ours, height, width, lengths)


def network():
    return randomize(QwenTransformer(QWEN), 0)


def inputs(batch=2, height=4, width=6, length=5):
    keys = mx.random.split(mx.random.key(1), 3)
    return (
        mx.random.normal((batch, height, width, 4), key=keys[0]),
        mx.random.uniform(shape=(batch,), key=keys[1]),
        mx.random.normal((batch, length, 24), key=keys[2]),
    )


def test_padding_of_the_text_changes_nothing():
    model, (x_t, t, text) = network(), inputs()
    padded = mx.concatenate([text, 100 * mx.ones((2, 3, 24))], axis=1)
    mask = mx.broadcast_to(mx.arange(8) < 5, (2, 8))
    plain = model(x_t, t, text)
    assert mx.allclose(model(x_t, t, padded, mask), plain, atol=1e-5)
    assert not mx.allclose(model(x_t, t, padded), plain, atol=1e-2)


def test_unpack_undoes_pack():
    x = mx.random.normal((2, 4, 6, 3))
    assert mx.array_equal(unpack(pack(x, 2), (2, 3), patch=2), x)
    # channels outermost, then the rows and columns of a patch
    assert pack(x, 2)[0, 0].tolist() == x[0, :2, :2].transpose(2, 0, 1).reshape(-1).tolist()


def test_positions_count_from_the_centre_and_the_text_goes_on_beyond_the_edge():
    cos, sin = msrope_table(3, 4, text_length=2, axes=(2, 2, 2), theta=10000.0)
    angles = np.round(np.arctan2(np.array(sin), np.array(cos))).astype(int).tolist()
    assert angles[:2] == [[2, 2, 2], [3, 3, 3]]
    assert angles[2] == [0, -2, -2]
    assert angles[-1] == [0, 0, 1]


def test_latents_that_do_not_divide_are_refused():
    x_t, t, text = inputs(height=5)
    with pytest.raises(UserError, match="do not divide by 2: choose a picture size"):
        network()(x_t, t, text)


def test_axes_must_fill_a_head():
    with pytest.raises(UserError, match="three even numbers that sum to 16"):
        dataclasses.replace(QWEN, rope_axes=(4, 6, 8))


@pytest.mark.parametrize(
    ("values", "hint"),
    [
        (
            {"_class_name": "FluxTransformer2DModel"},
            "expected one of MiniT2IMMJiTModel, QwenImageTransformer2DModel",
        ),
        ({"use_layer3d_rope": True}, "variant of Qwen-Image with use_layer3d_rope"),
        ({"out_channels": 7}, "do not make latents of one kind"),
        ({"num_layers": None}, "'num_layers' must be a whole number, not null"),
    ],
)
def test_other_networks_are_refused(tmp_path, values, hint):
    config = {"_class_name": "QwenImageTransformer2DModel"} | originals.QWEN_IMAGE | values
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=hint):
        read_transformer(tmp_path)


def test_every_key_must_be_accounted_for(tmp_path):
    config = {"_class_name": "QwenImageTransformer2DModel"} | originals.QWEN_IMAGE
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="holds no weights"):
        read_transformer(tmp_path)
    path = str(tmp_path / "diffusion_pytorch_model.safetensors")
    mx.save_safetensors(path, {"img_in.weight": mx.zeros((32, 16)), "ghost": mx.zeros(1)})
    with pytest.raises(UserError, match=r"another network.*ghost"):
        read_transformer(tmp_path)
