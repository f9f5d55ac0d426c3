"""A model of RGBA pictures: trained by the same commands, drawn, started from pictures, scored."""

import json
import sys

import mlx_snapgen  # noqa: F401

# isort: split
import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from apps.desktop.history import open_image
from mlx_snapgen.alpha import shown
from mlx_snapgen.checkpoint.config import load_config, load_vocabulary
from mlx_snapgen.checkpoint.model import load_pretrained
from mlx_snapgen.checkpoint.module import EIGHT_BITS
from mlx_snapgen.errors import UserError
from mlx_snapgen.metadata import read_metadata, save_picture
from mlx_snapgen.networks.layers import flat_parameters
from mlx_snapgen.pictures import contact_sheet
from mlx_snapgen.pipeline import SnapGenPipeline
from mlx_snapgen.presets import FLUENT_AUTOENCODER
from tests.tiny import tokenizer_bytes
from train import autoencoder, evaluate, export, flow, lora, new, stickers
from train.data.imagefolder import read_folder
from train.data.prepared import describe_autoencoder
from train.data.stickers.vocabulary import FLUENT
from train.evaluation.stickers.geneval import fixed_prompts
from train.loop.checkpoint import read_log
from train.options import new as new_options


def run(module, *options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module.__name__, *map(str, options)])
        patch.setattr(autoencoder, "VALIDATION_PICTURES", 2)
        assert not module.main()


@pytest.fixture(scope="module")
def data(fluent_pictures):
    return f"stickers:pictures={fluent_pictures},nouns=12"


@pytest.fixture(scope="module")
def made(data, tmp_path_factory):
    """The folder with a model of one step, and everything that it was made of."""
    root = tmp_path_factory.mktemp("made")
    (root / "own.model").write_bytes(tokenizer_bytes())
    sizes = {"hidden_size": 64, "head_dim": 8, "blocks": [1, 2, 1], "text_width": 32}
    (root / "sizes.json").write_text(json.dumps(sizes))
    given = ["--data", data, "--factor", 16, "--channels", 8, "--latent-channels", 4]
    given += ["--crop", 32, "--batch-size", 2, "--steps", 1]
    run(autoencoder, *given, "--run-dir", root / "autoencoder")
    parts = ["--autoencoder", root / "autoencoder", "--tokenizer", root / "own.model"]
    parts += ["--encoder-size", 32, "--encoder-layers", 1]
    run(new, root / "new", "--preset", root / "sizes.json", *parts)
    steps = ["--steps", 1, "--batch-size", 2, "--validation-prompts", "a cat"]
    steps += ["--validation-pictures", 2, "--model-widths", "full"]
    run(flow, "--model", root / "new", "--data", data, "--run-dir", root / "flow", *steps)
    run(export, "--run", root / "flow", "--output", root / "model")
    return root


def test_the_commands_train_and_export_a_model_with_alpha(made):
    assert "validation_psnr" in read_log(made / "autoencoder")[-1]
    config = load_config(made / "model")
    assert config.autoencoder.picture_channels == 4 and config.autoencoder.downsampling == 16
    assert set(config.trained_sizes) == set(FLUENT.shapes)
    assert load_vocabulary(made / "model")["numbers"][-1] == "six"
    assert "Fluent" in (made / "model" / "LICENSE").read_text()
    assert list((made / "flow" / "samples").iterdir())


def test_pictures_are_straight_and_started_from_with_alpha(made, tmp_path):
    pipe = SnapGenPipeline.from_pretrained(made / "model")
    with pytest.warns(UserWarning, match="drawn at 384 x 256"):
        [step] = pipe.generate("a cat", height=100, width=150, num_inference_steps=1)
    drawn = step.preview()
    assert drawn.mode == "RGBA" and drawn.size == (384, 256)
    path = save_picture(drawn, tmp_path / "cat.png", metadata=step.metadata)
    assert read_metadata(path)["prompt"] == "a cat"
    assert np.array_equal(np.asarray(open_image(path)), np.asarray(shown(drawn)))

    half = Image.new("RGBA", (256, 256), (200, 100, 0, 128))
    encoded = []
    encode = pipe.autoencoder.encode
    pipe.autoencoder.encode = lambda x, **_: encoded.append(np.array(x)) or encode(x)
    pipe("a cat", image=half, strength=0.5, num_inference_steps=2)
    [pixels] = encoded
    expected = np.array([200 * 128 / 255, 100 * 128 / 255, 0, 128])
    assert np.abs((pixels[0, 0, 0] + 1) * 127.5 - expected).max() < 1


def test_other_data_is_refused(made, data, font, model_folder, tmp_path):
    options = ["--model", made / "model", "--data", "stickers", "--run-dir", tmp_path / "run"]
    with pytest.raises(UserError, match="have no alpha channel, those of the autoencoder"):
        run(flow, *options)
    with pytest.raises(UserError, match="have an alpha channel, those of the autoencoder"):
        run(evaluate, "--model", model_folder, "--data", data)
    options = ["--init-from", made / "model", "--data", "stickers", "--run-dir", tmp_path / "b"]
    with pytest.raises(UserError, match="have no alpha channel"):
        run(autoencoder, *options)


def test_a_lora_of_pictures_with_alpha(made, fluent_pictures, tmp_path):
    folder = tmp_path / "cats"
    command = ["--pictures", str(fluent_pictures), "--noun", "cat", "--count", "2"]
    stickers.main([*command, "--output", str(folder)])
    assert Image.open(folder / "000.png").mode == "RGBA"
    Image.new("RGB", (256, 256), "blue").save(folder / "blue.png")
    (folder / "blue.txt").write_text("blue")
    examples, _ = read_folder(folder, [(256, 256)], has_alpha=True)
    assert all(example.pixels.shape == (256, 256, 4) for example in examples)
    opaque = {example.path.stem: example.pixels[..., 3].min() == 255 for example in examples}
    assert opaque["blue"] and not opaque["000"]
    options = ["--data", folder, "--model", made / "model", "--steps", 1, "--prior-weight", 0]
    options += ["--validation-prompts", "a cat", "--output", tmp_path / "cat.safetensors"]
    run(lora, *options, "--run-dir", tmp_path / "run", "--model-widths", "full")
    assert (tmp_path / "cat.safetensors").is_file()


def test_scores_have_groups_for_sizes_counts_and_shapes(made, data, tmp_path):
    options = ["--model", made / "model", "--data", data, "--output", tmp_path / "scores"]
    options += ["--per-category", 1, "--validation-scenes", 2, "--steps", 1]
    run(evaluate, *options, "--model-widths", "full")
    table = (tmp_path / "scores" / "table.md").read_text()
    for title in ("size", "five and six", "192x320", "256x384"):
        assert f"| {title} |" in table


def test_prompts_of_more_groups():
    prompts = fixed_prompts(24, 50, collection=FLUENT)
    groups = list(dict.fromkeys(prompt.group for prompt in prompts))
    assert len(groups) == 6 + 2 + 4 and groups[6:8] == ["size", "five_and_six"]
    for prompt in prompts:
        count = len(prompt.scene.placed)
        if prompt.group == "counting":
            assert count <= 4
        if prompt.group == "five_and_six":
            assert count in (5, 6)
        height, width = prompt.scene.size
        assert (height, width) == (256, 256) or prompt.group == f"{height}x{width}"
    assert any(prompt.held_out for prompt in prompts if "x" in prompt.group)


def test_another_decoder_and_the_same_latents(made, data, tmp_path):
    """Trained alone, it is exported with the transformer that was trained on the latents before."""
    alone = ["--data", data, "--decoder-only", "--crop", 32, "--batch-size", 2]
    run(autoencoder, *alone, "--steps", 3, "--init-from", made / "new", "--run-dir", tmp_path / "a")
    given = ["--run", made / "flow", "--output"]
    run(export, *given, tmp_path / "model", "--decoder", tmp_path / "a")
    before, after = (load_pretrained(folder) for folder in (made / "model", tmp_path / "model"))
    assert describe_autoencoder(before.autoencoder) == describe_autoencoder(after.autoencoder)
    old, new = (flat_parameters(c.autoencoder.decoder) for c in (before, after))
    assert all(mx.abs(old[name] - new[name]).max() > 0 for name in old if "conv" in name)
    both = [option for option in alone if option != "--decoder-only"]
    run(autoencoder, *both, "--steps", 1, "--init-from", made / "new", "--run-dir", tmp_path / "b")
    with pytest.raises(UserError, match="has other latents: give a run of train"):
        run(export, *given, tmp_path / "other", "--decoder", tmp_path / "b")


def test_the_preset_rounds_the_autoencoder_once(made, data, tmp_path, monkeypatch):
    small = new_options.Preset(load_config(made / "model").transformer, round_autoencoder=True)
    monkeypatch.setattr(new_options, "read_preset", lambda name: small)
    assert new_options.PRESETS["fluent"].round_autoencoder
    given = ["--autoencoder", made / "model", "--tokenizer", made / "own.model"]
    run(new, tmp_path / "a", "--preset", "fluent", *given, "--encoder-size", 32)
    run(new, tmp_path / "b", "--preset", "fluent", "--autoencoder", tmp_path / "a", *given[2:])
    files = [(tmp_path / name / "autoencoder.safetensors").read_bytes() for name in "ab"]
    full = (made / "model" / "autoencoder.safetensors").stat().st_size
    assert files[0] == files[1] and len(files[0]) < 0.6 * full
    assert load_config(tmp_path / "b").quantization == {"autoencoder": EIGHT_BITS}
    before, after = (
        flat_parameters(load_pretrained(folder).autoencoder)
        for folder in (made / "model", tmp_path / "a")
    )
    for name, value in before.items():
        step = np.abs(value).max() / 127
        error = np.abs(np.array(after[name]) - np.array(value))
        assert (error <= np.maximum(4e-3 * np.abs(value), 0.51 * step) + 1e-6).all(), name
    # A new decoder is rounded too, and the latents stay the same.
    alone = ["--data", data, "--decoder-only", "--crop", 32, "--batch-size", 2, "--steps", 1]
    run(autoencoder, *alone, "--init-from", tmp_path / "a", "--run-dir", tmp_path / "run")
    given = ["--model", tmp_path / "a", "--decoder", tmp_path / "run"]
    run(export, *given, "--output", tmp_path / "c")
    assert load_config(tmp_path / "c").quantization["autoencoder"] == EIGHT_BITS
    old, changed = (load_pretrained(tmp_path / name).autoencoder for name in "ac")
    assert describe_autoencoder(old) == describe_autoencoder(changed)
    assert not mx.array_equal(old.decoder.inp.weight, changed.decoder.inp.weight)


def test_the_preset_has_the_autoencoder_of_the_factor():
    assert autoencoder.sizes(None, None, factor=16, picture_channels=4) == FLUENT_AUTOENCODER


def test_sheets_show_alpha_over_a_checkerboard():
    clear = np.zeros((16, 16, 4), np.uint8)
    sheet = np.asarray(contact_sheet([clear], [""], 1))
    assert set(sheet[:16, :16].ravel()) == {204, 238}
