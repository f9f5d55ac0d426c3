"""The tables of public names: both directions, and parts of one weight."""

import mlx.core as mx
import pytest

from mlx_snapgen.checkpoint.module import shapes
from mlx_snapgen.errors import UserError
from mlx_snapgen.networks.autoencoders.registry import make_autoencoder
from mlx_snapgen.presets import DC_AE, QWEN_IMAGE_AUTOENCODER, TAEW2_1
from mlx_snapgen.public.keymap import KeyMap, Row, same
from mlx_snapgen.public.kinds import KINDS
from mlx_snapgen.teachers.config import TRANSFORMERS
from mlx_snapgen.teachers.folder import NETWORKS
from tests.tiny import KL_AUTOENCODER

MODULES = {
    "qwen-image-vae": lambda: make_autoencoder(QWEN_IMAGE_AUTOENCODER),
    "kl-vae": lambda: make_autoencoder(KL_AUTOENCODER),
    "dc-ae": lambda: make_autoencoder(DC_AE),
    "taehv": lambda: make_autoencoder(TAEW2_1),
    "qwen-image": lambda: NETWORKS["qwen-image"](TRANSFORMERS["qwen-image"](num_layers=2)),
    "z-image": lambda: NETWORKS["z-image"](TRANSFORMERS["z-image"](num_layers=2)),
}


@pytest.mark.parametrize("kind", MODULES)
def test_every_weight_has_a_public_name_that_leads_back(kind):
    keys = KINDS[kind].keys
    seen = set()
    for name in shapes(MODULES[kind]().parameters()):
        for part, key in enumerate(keys.public(name)):
            found = keys.find(key)
            assert (found.name, found.part) == (name, part)
            assert key not in seen
            seen.add(key)


def test_wildcards_go_both_ways():
    keys = KeyMap("toy", Row("time.**", None), Row("blocks.#.a|b.*", "layers.#.a|b.*"), same("h.#"))
    assert keys.find("blocks.7.b.bias").name == "layers.7.b.bias"
    assert keys.public("layers.7.b.bias") == ("blocks.7.b.bias",)
    assert keys.find("time.a.b").name is None
    assert keys.find("h.3").name == "h.3"
    with pytest.raises(UserError, match=r"'blocks.x.a.bias' belongs to no toy"):
        keys.find("blocks.x.a.bias")


def test_a_weight_without_all_its_parts_is_left_out():
    keys = KeyMap("toy", Row(("#.to_q", "#.to_k"), "#.qk", lambda q, k: mx.concatenate([q, k])))
    public = {"0.to_q": mx.zeros(2), "0.to_k": mx.ones(3), "1.to_k": mx.ones(3)}
    public["2.to_q"] = mx.zeros(2)
    found = keys.weights(public)
    assert list(found) == ["0.qk"] and found["0.qk"].tolist() == [0, 0, 1, 1, 1]
    assert keys.public("1.qk") == ("1.to_q", "1.to_k")
