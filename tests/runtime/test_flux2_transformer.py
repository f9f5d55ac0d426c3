"""FLUX.2's transformer: parity with diffusers, references, and padding."""

import json

import mlx.core as mx
import pytest

from convert.parity import originals
from convert.parity.originals import fill, relative_difference
from mlx_snapgen.errors import UserError
from mlx_snapgen.networks import flux2
from mlx_snapgen.networks.flux2 import Flux2Transformer
from mlx_snapgen.networks.layers import pack
from mlx_snapgen.public.keys.transformers import read_transformer
from mlx_snapgen.public_config import Flux2TransformerConfig
from tests.runtime.test_qwen_transformer import to_mx
from tests.tiny import FLUX2, randomize, require


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """(diffusers' network, ours from its files)."""
    require("torch", "diffusers")
    public = fill(originals.flux2())
    folder = tmp_path_factory.mktemp("transformer")
    public.save_pretrained(folder)
    return public, read_transformer(folder)


def velocities(both, size, length, references=()):
    """(ours, features, diffusers', its features), of tokens; sizes are those of the latents."""
    import torch
    from diffusers import Flux2KleinPipeline

    public, ours = both
    torch.manual_seed(length)
    x_t, t, text = torch.randn(2, *size, 4), torch.rand(2), torch.randn(2, length, 24)
    given = [torch.randn(1, *of_one, 4) for of_one in references]
    tokens = [torch.tensor(pack(to_mx(x), 2).tolist()) for x in (x_t, *given)]
    grids = [torch.empty(1, 4, x.shape[1] // 2, x.shape[2] // 2) for x in (x_t, *given)]
    ids = [Flux2KleinPipeline._prepare_latent_ids(grids[0])]
    if given:
        ids.append(Flux2KleinPipeline._prepare_image_ids(grids[1:]))
    seen = []
    hook = public.single_transformer_blocks[-1].register_forward_hook(
        lambda _, args, out: seen.append(out)
    )
    expected = public(
        torch.cat([tokens[0], *(x.repeat(2, 1, 1) for x in tokens[1:])], dim=1),
        text,
        t,
        torch.cat(ids, dim=1),
        Flux2KleinPipeline._prepare_text_ids(text),
        return_dict=False,
    )[0]
    hook.remove()
    count = tokens[0].shape[1]
    v, features = ours(
        to_mx(x_t),
        to_mx(t),
        to_mx(text),
        references=[to_mx(x) for x in given],
        return_features=True,
    )
    return pack(v, 2), features, expected[:, :count], seen[0][:, length : length + count]


@pytest.mark.parametrize(
    ("size", "length", "references"),
    [
        ((8, 16), 32, ()),
        ((6, 14), 7, ()),
        ((2, 6), 1, ()),
        ((10, 4), 5, [(6, 2)]),
        ((4, 6), 3, [(4, 6), (2, 10), (8, 8)]),
    ],
)
def test_parity_with_diffusers(both, size, length, references):
    assert both[1].config == FLUX2
    v, features, expected, expected_features = velocities(both, size, length, references)
    errors = {
        "velocity": relative_difference(v, expected),
        "features": relative_difference(features, expected_features),
    }
    print(errors)
    assert max(errors.values()) < 1e-4, errors


def swapped_axes(i, j):
    def break_it(monkeypatch):
        table = flux2.rope_table.__wrapped__

        def swapped(text_length, grids, *, axes, theta):
            parts = [
                mx.split(y, 4, axis=1) for y in table(text_length, grids, axes=axes, theta=theta)
            ]
            for part in parts:
                part[i], part[j] = part[j], part[i]
            return tuple(mx.concatenate(part, axis=1) for part in parts)

        monkeypatch.setattr(flux2, "rope_table", swapped)

    return break_it


def reordered_modulation(monkeypatch):
    plain = flux2.Modulation.__call__

    def reordered(self, embedding):
        shift, scale, *others = plain(self, embedding)
        return [scale, shift, *others]

    monkeypatch.setattr(flux2.Modulation, "__call__", reordered)


def reference_in_the_place_of_the_picture(monkeypatch):
    monkeypatch.setattr(flux2, "rope_table", flux2.rope_table.__wrapped__)
    monkeypatch.setattr(flux2, "REFERENCE_STEP", 0)


@pytest.mark.parametrize(
    "break_it",
    [
        swapped_axes(1, 2),
        swapped_axes(0, 3),
        reordered_modulation,
        reference_in_the_place_of_the_picture,
    ],
)
def test_a_mistake_is_noticed(both, monkeypatch, break_it):
    break_it(monkeypatch)
    v, _, expected, _ = velocities(both, (10, 4), 5, [(6, 2)])
    assert relative_difference(v, expected) > 1e-3


def test_padding_of_the_text_changes_nothing():
    model = randomize(Flux2Transformer(FLUX2), 0)
    keys = mx.random.split(mx.random.key(1), 2)
    x_t, t = mx.random.normal((1, 4, 6, 4), key=keys[0]), mx.array([0.4])
    text = mx.random.normal((1, 5, 24), key=keys[1])
    plain = model(x_t, t, text)
    padded = mx.concatenate([text, 100 * mx.ones((1, 9, 24))], axis=1)
    mask = mx.arange(14)[None] < 5
    assert mx.allclose(model(x_t, t, padded, mask), plain, atol=1e-5)
    assert not mx.allclose(model(x_t, t, padded), plain, atol=1e-2)


def test_a_reference_of_an_odd_size_is_one_line():
    model = Flux2Transformer(FLUX2)
    with pytest.raises(UserError, match="choose a picture size that divides by 16"):
        model(
            mx.zeros((1, 4, 6, 4)),
            mx.array([0.4]),
            mx.zeros((1, 5, 24)),
            references=[mx.zeros((1, 3, 4, 4))],
        )


@pytest.mark.parametrize(
    ("values", "hint"),
    [
        ({"guidance_embeds": True}, "only a FLUX.2 with guidance_embeds False"),
        ({"patch_size": 2}, "only a FLUX.2 with patch_size 1"),
        ({"out_channels": 8}, "are not of one kind of latents"),
        ({"in_channels": 18}, "do not make patches"),
        ({"axes_dims_rope": [8, 8]}, "must be four even numbers"),
    ],
)
def test_other_networks_are_refused(tmp_path, values, hint):
    config = {"_class_name": "Flux2Transformer2DModel", "patch_size": 1, "mlp_ratio": 3.0}
    config |= {"timestep_guidance_channels": 256, "rope_theta": 2000} | originals.FLUX2
    (tmp_path / "config.json").write_text(json.dumps(config | values))
    with pytest.raises(UserError, match=hint):
        read_transformer(tmp_path)


def test_the_defaults_have_four_axes():
    with pytest.raises(UserError, match="four even numbers that sum to 128"):
        Flux2TransformerConfig(rope_axes=(32, 48, 48))
