"""The estimate of training memory against what MLX measures."""

import dataclasses
import gc

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_snapgen.config import TransformerConfig
from mlx_snapgen.networks import attention
from mlx_snapgen.networks.efficient_dit import EfficientDiT, count_parameters
from mlx_snapgen.presets import TRANSFORMERS
from tests.tiny import randomize
from train.evaluation import memory
from train.evaluation.memory import STATE, training_memory
from train.loop.config import TrainingConfig
from train.loop.optimizer import Optimizers, Role

CONFIG = TransformerConfig(
    hidden_size=128,
    head_dim=32,
    num_kv_heads=2,
    num_cross_kv_heads=2,
    blocks=(2, 2, 2),
    num_bands=8,
    latent_channels=4,
    text_dims=(32,),
    text_width=32,
    widths=(1.0, 0.5),
    frequency_dim=32,
)
DENSE = dataclasses.replace(CONFIG, sparse_attention=False)


def measured(config, side, *, batch_size, save_memory, text_tokens):
    """Peak memory of the gradients of all weights, in bytes, with the weights."""
    network = randomize(EfficientDiT(config), 0)
    network.checkpoint_blocks(save_memory)
    x_t = mx.random.normal((batch_size, side, side, 4))
    text = mx.random.normal((batch_size, text_tokens, config.text_width))
    mask = mx.ones((batch_size, text_tokens), mx.bool_)
    params = network.trainable_parameters()

    def loss(params):
        network.update(params)
        v = network(x_t, mx.full((batch_size,), 0.3), text, mask)
        return v.square().mean()

    gradients = mx.compile(mx.grad(loss))  # as the trainer does
    mx.eval(x_t, text, mask)
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(gradients(params))
    return mx.get_peak_memory() - before


@pytest.mark.parametrize("save_memory", [False, True])
@pytest.mark.parametrize(
    ("config", "side", "batch_size"), [(CONFIG, 32, 4), (CONFIG, 64, 1), (DENSE, 48, 1)]
)
def test_the_estimate_is_near_what_is_measured(monkeypatch, config, side, batch_size, save_memory):
    for module in (attention, memory):
        monkeypatch.setattr(module, "MANY_SCORES", 2**20)
        monkeypatch.setattr(module, "PART_SCORES", 2**17)
    settings = {"batch_size": batch_size, "save_memory": save_memory, "text_tokens": 24}
    found = measured(config, side, **settings)
    estimate = training_memory(config, latents=(side, side), **settings)
    estimate -= STATE["muon"] * count_parameters(config)
    assert estimate == pytest.approx(found, rel=0.15)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_state_of_each_optimizer(optimizer):
    """Of `small`, from shapes: nothing is computed."""
    network = EfficientDiT(TRANSFORMERS["small"])
    parameters = network.trainable_parameters()
    optimizers = Optimizers(TrainingConfig(1, optimizer=optimizer), [Role("model")])
    optimizers.init(parameters)
    held = [parameters, parameters, optimizers.state]  # weights, averages
    found = sum(value.nbytes for _, value in tree_flatten(held))
    count = count_parameters(TRANSFORMERS["small"])
    assert STATE[optimizer] * count == pytest.approx(found, rel=0.02)
    settings = {"latents": (128, 128), "batch_size": 1, "optimizer": optimizer}
    more = training_memory(TRANSFORMERS["small"], **settings)
    settings["optimizer"] = "muon"
    less = training_memory(TRANSFORMERS["small"], **settings)
    assert more - less == (STATE[optimizer] - STATE["muon"]) * count


def test_what_the_papers_networks_take():
    """Aims: 1024 px, one picture: `small` in 16 GB, an elastic step of the supernetwork in 64."""
    settings = {"latents": (128, 128), "batch_size": 1, "save_memory": True}
    assert training_memory(TRANSFORMERS["small"], **settings) < 16e9
    assert training_memory(TRANSFORMERS["supernetwork"], **settings, sub_networks=1) < 64e9
    more = training_memory(TRANSFORMERS["small"], **settings, text_parameters=100_000_000)
    assert more >= training_memory(TRANSFORMERS["small"], **settings) + 2e9
