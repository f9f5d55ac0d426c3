"""Core ML's own `predict()` computes what MLX does. Only macOS has it.

Needs coremltools and torch: `pip install -e ".[test,coreml]"`. Without $COREML_FOLDER the default
model is exported first; with it, that folder is tested: what `convert.coreml` wrote of the default
model. `-rP` shows the PSNR of every comparison.
"""

import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from convert.coreml import packages as exported_packages
from convert.mil.execution import Interpreter
from mlx_snapgen.checkpoint.config import load_config
from mlx_snapgen.checkpoint.model import Components, fuse_few_step, load_pretrained
from mlx_snapgen.networks.efficient_dit import encode_prompts
from mlx_snapgen.pipeline import SnapGenPipeline
from mlx_snapgen.sampling import get_noise
from mlx_snapgen.settings import parse_width

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "mlx_snapgen/models/fluent"
PROMPT = "a red apple to the left of a blue car"
SEED = 7
LEAST_PSNR = 40.0
"""dB of the networks' outputs, which Core ML computes in fp16."""

pytestmark = pytest.mark.skipif(sys.platform != "darwin", reason="Core ML runs on macOS alone")


class Predictor:
    """A package that Core ML runs, called like the `Interpreter` that it stands in for."""

    units = "CPU_ONLY"

    def __init__(self, package: Path, function: str | None = None):
        import coremltools

        self.inputs = Interpreter(package, function).inputs
        self.model = coremltools.models.MLModel(
            str(package),
            compute_units=coremltools.ComputeUnit[self.units],
            function_name=function,
        )

    def __call__(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        # predict() takes float32 where a package declares fp16.
        return self.model.predict(
            {
                name: np.asarray(value, np.int32 if name == "tokens" else np.float32)
                for name, value in inputs.items()
            }
        )


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    pytest.importorskip("coremltools", reason="needs coremltools: pip install -e '.[coreml]'")
    if folder := os.environ.get("COREML_FOLDER"):
        return Path(folder)
    folder = tmp_path_factory.mktemp("coreml") / "packages"
    command = [sys.executable, "-m", "convert.coreml", str(MODEL), str(folder)]
    subprocess.run(command, cwd=ROOT, check=True)
    return folder


@pytest.fixture(params=["CPU_ONLY", "CPU_AND_GPU", "CPU_AND_NE"])
def packages(request, exported, monkeypatch) -> exported_packages.Packages:
    monkeypatch.setattr(Predictor, "units", request.param)
    monkeypatch.setattr(exported_packages, "Interpreter", Predictor)
    return exported_packages.Packages(exported)


@pytest.fixture(scope="module")
def components(exported) -> Components:
    """The model in float32, of the width and in the mode of the packages."""
    width, _, palettes = exported_packages.read_report(exported)
    if palettes:
        pytest.skip("palettes are far from the model without them")
    few_step = load_config(exported).few_step is not None
    made = load_pretrained(
        MODEL, dtype=mx.float32, share=parse_width(width).share, few_step=few_step
    )
    fuse_few_step(made)
    return made


def check(name: str, found: mx.array, expected: mx.array) -> None:
    ratio, difference = exported_packages.step_difference(found, expected)
    print(f"{name}: {ratio:.1f} dB, {difference:.1e} of the largest number at most")
    assert ratio > LEAST_PSNR


def text_of(components) -> tuple[mx.array, mx.array]:
    return encode_prompts([PROMPT], components.text_encoders, transformer=components.transformer)


def test_the_text(packages, components):
    text, mask = packages.encode([PROMPT])
    expected, expected_mask = text_of(components)
    assert np.array_equal(np.array(mask), np.array(expected_mask))
    # What stands at masked places is never read.
    counts = mask[..., None] > 0
    check("text", mx.where(counts, text, 0), mx.where(counts, expected, 0))


@pytest.mark.parametrize("sigma", [0.98, 0.5, 0.1])
def test_the_velocity(packages, components, sigma):
    config = packages.config
    height, width = (side // config.autoencoder.downsampling for side in config.image_size)
    x_t = get_noise(SEED, height, width, config.transformer.latent_channels)
    inputs = x_t, mx.array([sigma]), *text_of(components)
    check("velocity", packages.velocity(*inputs), components.transformer(*inputs))


def test_the_picture(packages, components, tmp_path):
    width, _, _ = exported_packages.read_report(packages.folder)
    pipeline = SnapGenPipeline.from_pretrained(MODEL, model_width=width, dtype=mx.float32)
    few_step = packages.config.few_step is not None
    (expected,) = pipeline(PROMPT, few_step=few_step, seed=SEED)
    found = packages.draw(PROMPT, SEED)
    found.save(tmp_path / "coreml.png")
    expected.save(tmp_path / "mlx.png")
    check("picture", mx.array(np.asarray(found)), mx.array(np.asarray(expected)))
