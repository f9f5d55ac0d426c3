"""Configs: JSON round trip, and mistakes named with the nearest key."""

import json

import pytest

from mlx_snapgen.config import (
    TRANSFORMERS,
    AutoencoderConfig,
    ModelConfig,
    TransformerConfig,
    from_dict,
    to_dict,
    transformer_preset,
)
from mlx_snapgen.errors import UserError
from train.data.stickers.model import STICKERS


@pytest.mark.parametrize("config", [STICKERS, *TRANSFORMERS.values()])
def test_json_round_trip(config):
    read = from_dict(type(config), json.loads(json.dumps(to_dict(config))))
    assert read == config
    assert hash(read) == hash(config)


@pytest.mark.parametrize(
    ("values", "hint"),
    [
        ({"transfomer": {}}, "'transfomer' in ModelConfig .did you mean 'transformer'"),
        ({"transformer": {"num_band": 3}}, "did you mean 'num_bands'"),
        ({"text_encoders": [{"layers": 3}]}, "did you mean 'num_layers'"),
    ],
)
def test_unknown_key_names_the_nearest(values, hint):
    with pytest.raises(UserError, match=hint):
        from_dict(ModelConfig, values)


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"widths": (0.5, 1.0)}, "start with 1.0"),
        ({"widths": (1.0, 0.3)}, "cuts through a head"),
        ({"head_dim": 6, "hidden_size": 60}, "divide by 4"),
        ({"blocks": (3, 0, 2)}, "three positive numbers"),
        ({"num_kv_heads": 7}, "do not divide by 7 kv heads"),
    ],
)
def test_impossible_networks_are_refused(options, hint):
    with pytest.raises(UserError, match=hint):
        TransformerConfig(**options)


def test_parts_must_fit():
    with pytest.raises(UserError, match="16 latent channels, the autoencoder gives 4"):
        ModelConfig(autoencoder=AutoencoderConfig(latent_channels=4))
    with pytest.raises(UserError, match="needs 8 numbers"):
        AutoencoderConfig(latents_std=(1.0,))
    with pytest.raises(UserError, match=r"no preset 'smal' .did you mean 'small'"):
        transformer_preset("smal")
