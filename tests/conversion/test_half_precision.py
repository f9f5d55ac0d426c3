"""The exported transformer where an engine squares or sums in fp16, whose largest number is 65504.

Without a scale before the norms, both give a wrong velocity that is finite: 50 and 22 dB.
"""

import copy
import dataclasses
import functools

import mlx.core as mx
import numpy as np
import pytest

from convert import libraries
from convert.coreml.package import Network, write_package
from convert.coreml.packages import step_difference
from convert.mil.execution import Interpreter
from convert.pytorch.weights import torch_networks
from mlx_snapgen.checkpoint.hub import default_model_path
from mlx_snapgen.checkpoint.model import load_fused
from mlx_snapgen.networks.efficient_dit import encode_prompts
from mlx_snapgen.sampling import get_noise
from tests.tiny import MODEL, require

require("torch", "coremltools")

import torch  # noqa: E402

from convert.pytorch import efficient_dit, layers  # noqa: E402
from convert.pytorch.attention import attend_split  # noqa: E402

RANGE = 65504
SPARE = 8
"""How far every square and every sum of squares stays below fp16's range."""


class Sums:
    """The largest square and sum of squares of the residual, for each picture, by norm."""

    def __init__(self, twin):
        self.twin, self.squares, self.scaled = twin, [], []
        for module in twin.modules():
            if isinstance(getattr(module, "norm", None), functools.partial):
                module.norm = functools.partial(self.watch, norm=module.norm)

    def watch(self, x, *, norm):
        scale = layers.norm_scale(norm.keywords["channels"])
        difference = x - x.mean(1, keepdim=True)
        self.squares.append(difference.square().flatten(1).amax(1))
        self.scaled.append((difference / scale).square().sum(1).flatten(1).amax(1))
        return norm(x)


@pytest.fixture(scope="module")
def pictures():
    """The default model at t = 1 with 64 prompts: its twin, the inputs, and their `Sums`."""
    components = load_fused(default_model_path())
    config = components.config
    twin = torch_networks(components, attend=attend_split)["transformer"]
    prompts = [f"a {word}" for word in components.vocabulary["nouns"][:64]]
    encoders, network = components.text_encoders, components.transformer
    text, mask = (np.array(a) for a in encode_prompts(prompts, encoders, transformer=network))
    side = config.image_size[0] // config.autoencoder.downsampling
    x_t = mx.concatenate(
        [get_noise(i, side, side, config.transformer.latent_channels) for i in range(64)]
    )
    inputs = {
        "x_t": torch.tensor(np.array(x_t)).permute(0, 3, 1, 2),
        "t": torch.ones(64),
        "text": torch.tensor(text).permute(0, 2, 1)[:, :, None],
        "mask": torch.tensor(mask).float(),
    }
    sums = Sums(copy.deepcopy(twin))
    return twin, inputs, sums.twin(*inputs.values()), sums


@pytest.fixture(scope="module")
def model(pictures):
    """The picture whose squares are largest: the twin, the inputs, and the velocity."""
    twin, inputs, velocity, sums = pictures
    worst = int(torch.stack(sums.squares).amax(0).argmax())
    return twin, {k: v[worst : worst + 1] for k, v in inputs.items()}, velocity[worst : worst + 1]


@pytest.fixture(scope="module")
def package(model, tmp_path_factory):
    twin, inputs, _ = model
    libraries.import_coremltools()
    path = tmp_path_factory.mktemp("half") / "Transformer.mlpackage"
    write_package(
        path,
        {"full": Network(twin, inputs, ("velocity",))},
        target="ios17",
        precision="float16",
        about={},
        description="",
    )
    return path


@pytest.mark.parametrize("norms", ["float32", "fp16 squares", "fp16 sums"])
def test_the_velocity_does_not_depend_on_how_an_engine_computes_norms(model, package, norms):
    _, inputs, expected = model
    values = {name: value.numpy() for name, value in inputs.items()}
    (found,) = Interpreter(package, norms=norms)(values).values()
    decibels, _ = step_difference(mx.array(found.astype(np.float32)), mx.array(expected.numpy()))
    assert decibels > 70


def test_sums_of_squares_have_room_to_spare(pictures):
    twin, _, _, sums = pictures
    assert len(sums.scaled) == 2 * sum(twin.config.blocks) + 1
    # The residual is large enough for this test to matter.
    assert max(map(torch.max, sums.squares)) > RANGE
    assert max(map(torch.max, sums.scaled)) * SPARE < RANGE


def test_a_wide_network_has_room_too():
    """Of 2048 channels, with a residual as large as the default model's."""
    config = dataclasses.replace(
        MODEL.transformer,
        hidden_size=2048,
        head_dim=64,
        num_kv_heads=1,
        num_cross_kv_heads=1,
        blocks=(1, 0, 0),
        widths=(1.0,),
    )
    twin = efficient_dit.EfficientDiT(config, (4, 8)).requires_grad_(False)
    x_t, text = torch.randn(1, 4, 4, 8), torch.randn(1, config.text_width, 1, 5)
    twin.patch_embed.weight.mul_(60 / twin.patch_embed(x_t).std())
    sums = Sums(twin)
    twin(x_t, torch.ones(1), text, torch.ones(1, 5))
    assert max(map(torch.max, sums.squares)) * 2048 > 100 * RANGE
    assert max(map(torch.max, sums.scaled)) * SPARE < RANGE
