"""Previews without a decoder, and drawing with little memory."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

import mlx_snapgen  # noqa: F401

# isort: split
import mlx.core as mx

from mlx_snapgen.cli.generate_options import build_parser
from mlx_snapgen.cli.options import model_choice
from mlx_snapgen.config import AutoencoderConfig
from mlx_snapgen.errors import UserError
from mlx_snapgen.generate import main
from mlx_snapgen.lora.files import save_lora
from mlx_snapgen.metadata import read_metadata
from mlx_snapgen.networks.autoencoders.base import Autoencoder
from mlx_snapgen.networks.autoencoders.colors import fit_colors, has_fast_decoder, rough_picture
from mlx_snapgen.open_model import open_model
from mlx_snapgen.pipeline import SnapGenPipeline
from mlx_snapgen.settings import DrawSettings, ModelChoice
from mlx_snapgen.teachers import memory
from mlx_snapgen.teachers.config import LIGHTNING
from mlx_snapgen.teachers.folder import load_network
from tests.runtime.test_public_models import MODELS, SIZE, folders  # noqa: F401
from tests.tiny import TEACHER, add_random_lora, write_teacher

DRAWN = {"height": 32, "width": 48, "seed": 5}
pytestmark = pytest.mark.usefixtures("no_language_model")


def downsampled(picture, factor):
    h, w, c = picture.shape
    return picture.reshape(h // factor, factor, w // factor, factor, c).mean((1, 3))


def test_colors_of_a_linear_encoder_are_exact():
    mix = np.random.default_rng(1).normal(size=(3, 6)).astype(np.float32)

    def encoder(pictures):
        b, h, w, c = pictures.shape
        small = pictures.reshape(b, h // 8, 8, w // 8, 8, c).mean((2, 4))
        return small @ mx.array(mix) + 0.5, None

    config = AutoencoderConfig(
        latent_channels=6, latents_mean=(0.2,) * 6, latents_std=(3.0,) * 6, kind="kl"
    )
    made = Autoencoder(config, encoder=encoder, decoder=None)
    colors = fit_colors(made)
    assert colors.shape == (7, 3)
    picture = np.random.default_rng(2).uniform(-1, 1, (16, 24, 3)).astype(np.float32)
    latents = made.encode(mx.array(picture[None]))
    found = np.array(rough_picture(latents, colors, made)[0])
    assert np.abs(found - downsampled(picture, 8)).max() < 0.02
    assert not has_fast_decoder(config)


def test_the_built_in_model_shows_what_its_decoder_makes():
    *_, last = SnapGenPipeline.from_pretrained().generate("a red apple", seed=1)
    assert last.rough is None, "its own decoder is fast"
    picture = np.array(last.preview())
    assert picture.shape == (256, 256, 4)
    assert picture[0, 0, 3] == 0 and picture[128, 128, 3] > 200, "an apple on transparent ground"


def test_previews_of_public_models_do_not_decode(folders, monkeypatch):  # noqa: F811
    pipe = SnapGenPipeline.from_pretrained(folders["klein"])
    calls, decode = [], pipe.autoencoder.decode
    monkeypatch.setattr(pipe.autoencoder, "decode", lambda x: calls.append(x) or decode(x))
    steps = [*pipe.generate("a red car", num_inference_steps=3, **DRAWN)]
    previews = [step.preview() for step in steps]
    assert len(calls) == 1
    assert [preview.size for preview in previews] == [(48, 32)] * 3
    assert np.array_equal(np.array(previews[2]), np.array(steps[2].decode(steps[2].x0)))
    assert not np.array_equal(np.array(previews[0]), np.array(previews[1]))


def test_estimates_in_files_are_decoded(folders, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    pipe = SnapGenPipeline.from_pretrained(folders["klein"])
    first = next(pipe.generate("a red car", **DRAWN))
    main(["a red car", "--model", str(folders["klein"]), "--stepwise-dir", "steps", *SIZE])
    [path] = (tmp_path / "steps").glob("*-01.png")
    with Image.open(path) as picture:
        assert np.array_equal(np.array(picture), np.array(first.decode(first.x0)))


@pytest.mark.parametrize("name", ["klein", "lightning", "two"])
def test_low_memory_frees_the_transformer_before_decoding(folders, name, tmp_path):  # noqa: F811
    folder = folders.get(name) or write_teacher(tmp_path / "two", MODELS["klein-base"])
    pipe = SnapGenPipeline.from_pretrained(folder)
    settings = DRAWN | {"num_inference_steps": 2, "num_images": 2}
    expected = pipe("a red car", **settings)
    pipe = SnapGenPipeline.from_pretrained(folder, low_memory=True)
    limit = mx.set_cache_limit(12345)
    mx.set_cache_limit(limit)
    found = []
    for step in pipe.generate("a red car", **settings):
        assert (pipe.teacher.network is None) == step.final
        before = mx.set_cache_limit(0)
        assert before == 0, "nothing is kept"
        if step.final:
            found.append(step.preview())
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    after = mx.set_cache_limit(limit)
    assert after == limit
    again = pipe("a red car", **settings)
    assert np.array_equal(again[1], expected[1])


def test_low_memory_is_an_option_that_pictures_do_not_record(folders, tmp_path):  # noqa: F811
    args = build_parser().parse_args(["a cat", "--low-memory", "--cache-limit", "0.5"])
    assert model_choice(args).low_memory and args.cache_limit == 500_000_000
    path = tmp_path / "a.png"
    limit = mx.set_cache_limit(0)
    options = ["--model", str(folders["klein"]), "--low-memory", "--cache-limit", "0.5"]
    main(["a red car", *options, "--output", str(path), *SIZE])
    assert mx.set_cache_limit(limit) == 500_000_000
    assert "low_memory" not in read_metadata(path)
    with pytest.raises(UserError, match="-1 GB is not between"):
        build_parser().parse_args(["a cat", "--cache-limit=-1"])


def test_less_memory_is_estimated_and_offered(folders, monkeypatch):  # noqa: F811
    config = MODELS["lightning"]
    assert config.few_step == LIGHTNING and config.transformer == TEACHER.transformer
    sizes = memory.Sizes(network=8 << 30, text=0, unpacked=0, token=0, unit=16)
    most, least = (sizes.peak(1024, 1024, low_memory=low) for low in (False, True))
    assert most - least == memory.CODER_BYTES + 1024**2 * memory.CODER_BYTES_PER_PIXEL
    small = sizes.peak(256, 256), sizes.peak(256, 256, low_memory=True)
    assert small[0] - small[1] == memory.UNTILED_BYTES
    monkeypatch.setattr(memory, "measure_folder", lambda *_: sizes)
    monkeypatch.setattr(memory, "machine_memory", lambda: least)
    with pytest.raises(UserError, match="choose --low-memory or the"):
        SnapGenPipeline.from_pretrained(folders["klein"]).generate("a red car")
    SnapGenPipeline.from_pretrained(folders["klein"], low_memory=True).generate("a red car")


def test_kept_text_encoders_and_loras_are_counted(folders, tmp_path, monkeypatch):  # noqa: F811
    folder, choice = folders["klein"], ModelChoice(str(folders["klein"]))
    settings = DrawSettings("a red car").resolved(open_model(choice).config)
    network = load_network(folder, MODELS["klein"])
    add_random_lora(network, rank=4)
    lora = tmp_path / "a.safetensors"
    save_lora(lora, network, name="style", dtype=mx.float16)
    held = sum(2 * value.nbytes for value in mx.load(str(lora)).values() if value.ndim > 1)

    def peak(**changes):
        chosen = dataclasses.replace(choice, **changes)
        return memory.peak_bytes(open_model(choice), chosen, settings=settings)(1024, 1024)

    assert 0 < held <= peak(loras=((str(lora), 0.5),)) - peak() < 1.01 * held
    (folder / "text_encoder" / "model.safetensors").write_bytes(bytes(10_000))
    assert peak(keep_text_encoders=True) - peak() == 10_000
    monkeypatch.setattr(memory, "machine_memory", peak)
    SnapGenPipeline.from_pretrained(folder).generate("a red car")
    with pytest.raises(UserError, match="choose text encoders that are not kept"):
        SnapGenPipeline.from_pretrained(folder, keep_text_encoders=True).generate("a red car")
    with pytest.raises(UserError, match="1024 x 1024 needs about"):
        SnapGenPipeline.from_pretrained(folder, loras=((str(lora), 1.0),)).generate("a red car")
