"""Z-Image's transformer: parity with diffusers, and padding."""

import json

import mlx.core as mx
import pytest

from convert.parity import originals
from convert.parity.originals import fill, relative_difference
from mlx_snapgen.errors import UserError
from mlx_snapgen.networks.z_image import ZImageTransformer
from mlx_snapgen.public.keys.transformers import read_transformer
from tests.runtime.test_qwen_transformer import to_mx
from tests.tiny import Z_IMAGE, randomize, require


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """(diffusers' network, ours from its files)."""
    require("torch", "diffusers")
    public = fill(originals.z_image())
    for token in (public.x_pad_token, public.cap_pad_token):
        token.normal_()
    folder = tmp_path_factory.mktemp("transformer")
    public.save_pretrained(folder)
    return public, read_transformer(folder)


def stages(network):
    """(name, module) of every block, in the order of computation."""
    for part in ("noise_refiner", "context_refiner", "layers"):
        for i, block in enumerate(getattr(network, part)):
            yield f"{part}.{i}", block


@pytest.mark.parametrize(
    ("height", "width", "lengths"),
    [(8, 16, (32,)), (6, 14, (7,)), (10, 4, (5, 40, 3)), (2, 6, (33, 13))],
)
def test_parity_with_diffusers(both, height, width, lengths):
    """Block by block, then the whole; odd lengths, filled up with learned tokens."""
    import torch

    public, ours = both
    assert ours.config == Z_IMAGE
    seen, found = {}, {}
    for name, block in stages(public):
        block.register_forward_hook(lambda _, args, out, name=name: seen.update({name: out}))
    batch = len(lengths)
    torch.manual_seed(height)
    x_t, t = torch.randn(batch, height, width, 4), torch.rand(batch)
    captions = [torch.randn(length, 24) for length in lengths]
    pictures = [x.permute(2, 0, 1)[:, None] for x in x_t]
    expected = public(pictures, 1 - t, captions, return_dict=False)[0]
    expected = -torch.stack(expected)[:, :, 0].permute(0, 2, 3, 1)

    text = torch.nn.utils.rnn.pad_sequence(captions, batch_first=True, padding_value=9.0)
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    for name, block in stages(ours):
        recorded(block, name, found)
    try:
        v, features = ours(to_mx(x_t), to_mx(t), to_mx(text), to_mx(mask), return_features=True)
    finally:
        for _, block in stages(ours):
            block.__class__ = block.__class__.__mro__[1]
    for name, theirs in seen.items():
        # Beyond a sample's own filled-up length nothing is defined.
        for b, length in enumerate(lengths):
            filled = -(-length // 32) * 32
            count = {"context": filled, "layers": theirs.shape[1] - max_filled(lengths) + filled}
            count = count.get(name.split("_")[0].split(".")[0], theirs.shape[1])
            error = relative_difference(found[name][b, :count], theirs[b, :count])
            assert error < 1e-4, f"{name} is the first that differs, by {error:.1e}"
    count = (height // 2) * (width // 2)
    errors = {
        "velocity": relative_difference(v, expected),
        "features": relative_difference(features, seen["layers.1"][:, :count]),
    }
    print(errors)
    assert max(errors.values()) < 1e-4, errors


def max_filled(lengths):
    return -(-max(lengths) // 32) * 32


def recorded(block, name, found):
    """Keep what a block gives in `found[name]`."""

    class Recorded(type(block)):
        def __call__(self, *args, **settings):
            found[name] = super().__call__(*args, **settings)
            return found[name]

    block.__class__ = Recorded


def test_padding_of_the_text_changes_nothing():
    model = randomize(ZImageTransformer(Z_IMAGE), 0)
    keys = mx.random.split(mx.random.key(1), 2)
    x_t, t = mx.random.normal((1, 4, 6, 4), key=keys[0]), mx.array([0.4])
    text = mx.random.normal((1, 5, 24), key=keys[1])
    plain = model(x_t, t, text)
    padded = mx.concatenate([text, 100 * mx.ones((1, 60, 24))], axis=1)
    mask = mx.arange(65)[None] < 5
    assert mx.allclose(model(x_t, t, padded, mask), plain, atol=1e-5)
    assert not mx.allclose(model(x_t, t, padded), plain, atol=1e-2)


@pytest.mark.parametrize(
    ("values", "hint"),
    [
        ({"n_kv_heads": 1}, "only n_kv_heads 2 is supported"),
        ({"siglip_feat_dim": 8}, "only siglip_feat_dim None"),
        ({"all_patch_size": [2, 4]}, "only one patch size"),
    ],
)
def test_other_networks_are_refused(tmp_path, values, hint):
    config = {"_class_name": "ZImageTransformer2DModel", "all_patch_size": [2]}
    (tmp_path / "config.json").write_text(json.dumps(config | originals.Z_IMAGE | values))
    with pytest.raises(UserError, match=hint):
        read_transformer(tmp_path)
