"""Configs: JSON round trip, and mistakes named with the nearest key."""

import json

import pytest

from mlx_snapgen.config import (
    AutoencoderConfig,
    ModelConfig,
    SamplerConfig,
    TransformerConfig,
    resolution_shift,
)
from mlx_snapgen.errors import UserError
from mlx_snapgen.json_values import from_dict, to_dict
from mlx_snapgen.presets import TRANSFORMERS, transformer_preset
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


def test_all_values_that_cannot_be_read_are_one_message():
    with pytest.raises(UserError) as error:
        from_dict(TransformerConfig, {"hiden_size": 4, "head_dim": "x", "frob": 1, "blocks": [1]})
    assert str(error.value).split("; ") == [
        "unknown key 'hiden_size' in TransformerConfig (did you mean 'hidden_size'?)",
        "'head_dim' must be a whole number, not \"x\"",
        "unknown key 'frob' in TransformerConfig (did you mean 'ffn_ratio'?)",
        "'blocks' takes 3 values, not 1",
    ]


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"widths": (0.5, 1.0)}, "start with 1.0"),
        ({"widths": (1.0, 0.3)}, "width 0.3: 9.6 heads and 2.4 of num_kv_heads must be whole"),
        ({"widths": ()}, "start with 1.0"),
        ({"hidden_size": 2080}, "2080, must divide by head_dim, 64"),
        ({"frequency_dim": 1}, "must be even, got 1"),
        ({"head_dim": 6, "hidden_size": 60}, "divide by 4"),
        ({"blocks": (3, 0, 2)}, "three positive numbers"),
        ({"num_kv_heads": 7}, "do not divide by num_kv_heads, 7"),
    ],
)
def test_impossible_networks_are_refused(options, hint):
    with pytest.raises(UserError, match=hint):
        TransformerConfig(**options)


def test_all_that_does_not_fit_is_one_message():
    sizes = {"hidden_size": 768, "frequency_dim": 3}
    with pytest.raises(UserError) as error:
        TransformerConfig(**sizes)
    assert str(error.value).split("; ") == [
        "frequency_dim must be even, got 3",
        "12 heads (hidden_size / head_dim) do not divide by num_kv_heads, 8",
        "width 0.5: 6 heads do not divide by num_cross_kv_heads, 4",
        "width 0.375: 4.5 heads and 3 of num_kv_heads must be whole, or omit it",
    ]
    with pytest.raises(UserError) as error:
        TransformerConfig(hidden_size=100, head_dim=6, num_kv_heads=5, widths=(1.0,))
    assert str(error.value).split("; ") == [
        "head_dim must divide by 4 for 2-D RoPE, got 6: 8 does",
        "hidden_size, 100, must divide by head_dim, 8: 96 does",
        "12 heads (hidden_size / head_dim) do not divide by num_kv_heads, 5",
    ]
    TransformerConfig(hidden_size=96, head_dim=8, num_kv_heads=3, widths=(1.0,))


@pytest.mark.parametrize(
    ("side", "shift"), [(128, 1), (256, 1), (512, 5 / 3), (640, 2), (1024, 3), (2048, 3)]
)
def test_the_shift_by_resolution(side, shift):
    assert resolution_shift((side // 16) ** 2) == pytest.approx(shift)
    by_size = SamplerConfig(time_shift=None)
    config = ModelConfig(
        image_size=(side, side),
        transformer=TRANSFORMERS["stickers"],
        sampler=by_size,
        few_step=SamplerConfig(4, time_shift=5.0),
    )
    assert config.time_shift(side, side) == pytest.approx(shift)
    assert config.time_shift(side, side, few_step=True) == 5.0
    stored = config.of_one_size()
    assert stored.sampler.time_shift == pytest.approx(shift)
    assert stored.few_step == config.few_step
    read = from_dict(ModelConfig, json.loads(json.dumps(to_dict(config))))
    assert read.sampler == by_size


def test_older_configs_keep_their_numbers():
    old = {"sampler": {"num_inference_steps": 8, "guidance_scale": 2.0}}
    config = from_dict(ModelConfig, old | {"transformer": {"latent_channels": 8}})
    assert config.time_shift(256, 256) == 3.0
    assert config.unconditional == "empty prompt"
    with pytest.raises(UserError, match=r"unknown unconditional 'absentt' .did you mean 'absent'"):
        from_dict(ModelConfig, {"transformer": {"latent_channels": 8}, "unconditional": "absentt"})


def test_parts_must_fit():
    with pytest.raises(UserError, match="16 latent channels, the autoencoder gives 4"):
        ModelConfig(autoencoder=AutoencoderConfig(latent_channels=4))
    with pytest.raises(UserError, match="needs 8 numbers"):
        AutoencoderConfig(latents_std=(1.0,))
    with pytest.raises(UserError, match="latents_std must be above 0, not -1"):
        AutoencoderConfig(latent_channels=2, latents_std=(1.0, -1.0))
    for shift in (0.0, -2.0, 1e-300, float("nan")):
        with pytest.raises(UserError, match=r"time_shift must be at least 0\.001, not"):
            SamplerConfig(time_shift=shift)
    with pytest.raises(UserError, match=r"no preset 'smal' .did you mean 'small'"):
        transformer_preset("smal")


def test_more_faults_than_a_message_has_room_for():
    values = {f"frobnicate_{k}": 1 for k in range(60)}
    with pytest.raises(UserError) as error:
        from_dict(TransformerConfig, values)
    text = str(error.value)
    assert text.startswith("unknown key 'frobnicate_0' in TransformerConfig; ")
    assert text.endswith("; and more") and "..." not in text
    with pytest.raises(UserError, match=r"^unknown key 'frobnicate_7' in TransformerConfig$"):
        from_dict(TransformerConfig, {"frobnicate_7": 1})
