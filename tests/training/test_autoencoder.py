"""The autoencoder's layout and normalization."""

import dataclasses
import functools
import json
import sys
import tarfile
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image

import train.loop.autoencoder
from mlx_snapgen.checkpoint.module import FORMAT_VERSION
from mlx_snapgen.config import AutoencoderConfig
from mlx_snapgen.errors import UserError
from mlx_snapgen.json_values import from_dict, to_dict
from mlx_snapgen.networks.autoencoders.convolutional import ConvolutionalAutoencoder
from mlx_snapgen.networks.autoencoders.registry import make_autoencoder
from mlx_snapgen.networks.autoencoders.semantics import Paint, as_codes, is_known, nearest
from mlx_snapgen.networks.layers import depth_to_space, space_to_depth, split
from mlx_snapgen.pictures import from_uint8
from mlx_snapgen.presets import FLUENT_AUTOENCODER
from mlx_snapgen.semantics import (
    CHANNELS,
    COLOR,
    COLUMN,
    GROUND,
    PLACE,
    ROW,
    SEEN_CHANNELS,
    SIDE,
    THING,
    SemanticConfig,
    codes,
)
from tests.tiny import randomize, tokenizer_bytes
from tests.training.test_prepare import write_pictures
from train import autoencoder as command
from train import new
from train.data.encoded import CodedScenes, EncodedPictures, as_latents
from train.data.mixture import Mixture, Prefetched
from train.data.open import open_data
from train.data.stickers import render as rendering
from train.data.stickers.known_things import known_scenes, semantics_of, start_known_things
from train.data.stickers.semantics import semantic_map
from train.data.stickers.source import Stickers, draw_scenes
from train.loop.autoencoder import (
    EMPTY,
    keep_statistics,
    kept_statistics,
    load_autoencoder,
    measure_latents,
    with_other_latents,
)
from train.loop.checkpoint import checkpoints, latest_checkpoint, read_log
from train.loop.principal_components import start_from_components
from train.loop.run import claim
from train.objectives.autoencoder import Reconstruction, semantic_latents
from train.objectives.losses import channel_weights

CONFIG = AutoencoderConfig(latent_channels=4, encoder_channels=(8, 16), decoder_channels=(16, 8, 8))


def test_space_to_depth_is_a_strided_convolutions_patches():
    x = mx.random.normal((2, 4, 6, 3))
    kernel = mx.random.normal((5, 2, 2, 3))
    expected = mx.conv2d(x, kernel, stride=2)
    found = space_to_depth(x, 2) @ kernel.reshape(5, -1).T
    np.testing.assert_allclose(np.array(found), np.array(expected), atol=1e-5)
    np.testing.assert_array_equal(np.array(depth_to_space(space_to_depth(x, 2), 2)), np.array(x))


@pytest.mark.parametrize("size", [(16, 16), (24, 40)])
def test_shapes(size):
    model = ConvolutionalAutoencoder(CONFIG)
    latents = model.encode(mx.zeros((2, *size, 3)))
    assert latents.shape == (2, size[0] // 8, size[1] // 8, 4)
    assert model.decode(latents).shape == (2, *size, 3)
    with pytest.raises(UserError, match="20x16 pixels does not divide by 8"):
        model.encode(mx.zeros((1, 20, 16, 3)))


def test_latents_are_normalized_and_decoding_undoes_it():
    mx.random.seed(0)
    raw = ConvolutionalAutoencoder(CONFIG)
    pictures = mx.random.uniform(-1, 1, (2, 16, 16, 3))
    latents = raw.encode(pictures)
    model = ConvolutionalAutoencoder(
        dataclasses.replace(CONFIG, latents_mean=(1, 2, 3, 4), latents_std=(2, 2, 0.5, 1))
    )
    model.update(raw.parameters())
    expected = (np.array(latents) - [1, 2, 3, 4]) / [2, 2, 0.5, 1]
    found = model.encode(pictures)
    np.testing.assert_allclose(np.array(found), expected, atol=1e-5)
    np.testing.assert_allclose(
        np.array(model.decode(found)), np.array(raw.decode(latents)), atol=1e-5
    )


def test_levels_and_alpha():
    """A factor of 16 with an alpha channel; levels that do not belong together are refused."""
    config = AutoencoderConfig(
        latent_channels=4,
        encoder_channels=(8, 8, 8),
        encoder_blocks=(1, 0, 1),
        decoder_channels=(8, 8, 8, 8),
        decoder_blocks=(1, 1, 0, 1),
        picture_channels=4,
    )
    assert config.downsampling == 16 and AutoencoderConfig().downsampling == 8
    model = randomize(make_autoencoder(config), 2)
    latents = model.encode(mx.random.uniform(-1, 1, (2, 32, 48, 4)))
    assert latents.shape == (2, 2, 3, 4)
    assert model.decode(latents).shape == (2, 32, 48, 4)
    with pytest.raises(UserError, match="24x32 pixels does not divide by 16"):
        model.encode(mx.zeros((1, 24, 32, 4)))
    with pytest.raises(UserError, match="one more than the encoder"):
        dataclasses.replace(config, decoder_channels=(8, 8), decoder_blocks=(1, 1))
    with pytest.raises(UserError, match="one number each"):
        dataclasses.replace(config, encoder_blocks=(1,))


def test_statistics_are_kept_for_any_number_of_channels(tmp_path):
    config = dataclasses.replace(
        FLUENT_AUTOENCODER, latents_mean=(0.5,) * 32, latents_std=tuple(map(float, range(1, 33)))
    )
    claim(tmp_path, {"autoencoder": to_dict(FLUENT_AUTOENCODER)})
    (tmp_path / "step_1").mkdir()
    assert kept_statistics(tmp_path) is None
    keep_statistics(tmp_path, config)
    found = kept_statistics(tmp_path)
    assert dataclasses.replace(FLUENT_AUTOENCODER, **found) == config


def smooth_pictures(count, side):
    """Random colors that change slowly, (count, side, side, 3) in [-1, 1]."""
    rng = np.random.default_rng(0)
    coarse = np.cumsum(np.cumsum(rng.normal(size=(count, side, side, 3)), 1), 2)
    return mx.array((coarse / np.abs(coarse).max((1, 2, 3), keepdims=True)).astype(np.float32))


def test_training_starts_with_the_principal_components():
    """With room for all of a patch on the way, the latents are those of a singular value
    decomposition of the patches, and decoding loses no more than it does."""
    mx.random.seed(0)
    model = ConvolutionalAutoencoder(
        dataclasses.replace(CONFIG, encoder_channels=(48, 192), decoder_channels=(200, 50, 16))
    )
    pictures = smooth_pictures(20, 32)
    start_from_components(model, pictures)
    patches = np.array(space_to_depth(pictures, 8), np.float64).reshape(-1, 192)
    left, singular, _ = np.linalg.svd(patches - patches.mean(0), full_matrices=False)
    latents, log_var = model.encoder(pictures)
    found = np.array(latents).reshape(-1, 4)
    scores = left[:, :4] * np.sqrt(len(patches) - 1)
    np.testing.assert_allclose(np.abs(found.T @ scores / len(patches)), np.eye(4), atol=2e-2)
    np.testing.assert_allclose(np.array(log_var), -6)
    lost = np.sum(singular[4:] ** 2) / patches.size
    error = mx.square(model.decoder(latents) - pictures).mean().item()
    # 3x3 convolutions also have the neighbors.
    assert 0.1 * lost < error <= lost * 1.01


def test_narrow_layers_keep_the_first_components():
    """Layers with fewer channels than their targets, pictures with fewer positions than values."""
    mx.random.seed(0)
    model, pictures = ConvolutionalAutoencoder(CONFIG), smooth_pictures(2, 16)
    before = mx.square(model.decoder(model.encoder(pictures)[0]) - pictures).mean().item()
    start_from_components(model, pictures)
    error = mx.square(model.decoder(model.encoder(pictures)[0]) - pictures).mean().item()
    assert error < min(0.25 * before, 0.5 * mx.var(pictures).item())


def test_flat_pictures_are_a_start():
    model = ConvolutionalAutoencoder(CONFIG)
    start_from_components(model, mx.full((2, 16, 16, 3), 0.5))
    found = model.decoder(model.encoder(mx.full((1, 16, 16, 3), 0.5))[0])
    np.testing.assert_allclose(np.array(found), 0.5, atol=1e-3)


def test_the_start_of_pictures_of_several_shapes(uncompiled, tmp_path, monkeypatch):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for k in range(12):
        size = ((96, 96), (64, 128), (32, 160))[k % 3]
        Image.new("RGB", size, (20 * k, 100, 50)).save(folder / f"{k}.png")
    given = ["--data", folder, "--run-dir", tmp_path / "run", "--resolution", 96, "--crop", 64]
    given += ["--channels", 8, "--batch-size", 2, "--steps", 1]
    monkeypatch.setattr(sys, "argv", ["autoencoder", *map(str, given)])
    command.main()
    assert latest_checkpoint(tmp_path / "run").name == "step_1"


# --- training the decoder alone -----------------------------------------------------------------

FOUR = {"latent_channels": 4, "encoder_channels": (8, 8, 8, 8), "decoder_channels": (8, 8, 8, 8)}
SEMANTIC = SemanticConfig(3, (2, 4), head_blocks=2, appearance_channels=4, paint_width=8)
KINDS = {
    "convolutional": CONFIG,
    "qwen-image": AutoencoderConfig(
        "qwen-image",
        **FOUR,
        encoder_blocks=(1, 1, 1, 1),
        decoder_blocks=(1, 1, 1, 1),
        latents_mean=(1, 2, 3, 4),
        latents_std=(2, 2, 0.5, 1),
    ),
    "taehv": AutoencoderConfig("taehv", **FOUR, encoder_blocks=(3, 3, 3), decoder_blocks=(3, 3, 3)),
}


def made(kind):
    model = make_autoencoder(KINDS[kind])
    randomize(model, 3)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_a_decoder_of_any_kind_learns_alone(kind):
    model = made(kind)
    batch = {"pictures": mx.random.uniform(-1, 1, (2, 16, 16, 3), key=mx.random.key(0))}
    grads, metrics = Reconstruction(1e-3, True).gradients(model, batch, mx.random.key(1), None)
    sizes = {name: mx.abs(g).max().item() for name, g in tree_flatten(grads)}
    assert all(size == 0 for name, size in sizes.items() if name.startswith("encoder"))
    assert all(size > 0 for name, size in sizes.items() if name.startswith("decoder"))
    assert metrics["l1"].item() > 0


def test_a_decoder_can_learn_another_encoders_latents():
    """Those of its own encoder, given as normalized latents, are the same task."""
    model, objective = made("qwen-image"), Reconstruction(0.0, decoder_only=True)

    def gradients(batch):
        return dict(tree_flatten(objective.gradients(model, batch, mx.random.key(1), None)[0]))

    batch = {"pictures": mx.random.uniform(-1, 1, (2, 16, 16, 3), key=mx.random.key(0))}
    given = batch | {"latents": model.encode(batch["pictures"])}
    own, other = gradients(batch), gradients(given)
    for name, value in own.items():
        assert mx.allclose(other[name], value, rtol=1e-2, atol=1e-5), name
    moved = batch | {"latents": given["latents"] + 1}
    moved = gradients(moved)
    assert not mx.allclose(moved["decoder.conv_in.bias"], own["decoder.conv_in.bias"], rtol=1e-2)


@pytest.fixture
def uncompiled():
    """One step is not worth its compilation."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def write_part(folder, model):

    folder.mkdir()
    values = {"format_version": FORMAT_VERSION, "part": "autoencoder"}
    values |= {"autoencoder": to_dict(model.config), "quantization": None}
    (folder / "config.json").write_text(json.dumps(values))
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "autoencoder.safetensors"), weights)
    return folder


def test_a_run_of_a_converted_autoencoder_is_one_again(
    font, uncompiled, model_folder, tmp_path, monkeypatch
):
    tiny = write_part(tmp_path / "tiny", made("taehv"))
    qwen = write_part(tmp_path / "qwen", made("qwen-image"))
    monkeypatch.setattr(command, "VALIDATION_PICTURES", 2)

    def run(name, *options):
        argv = ["autoencoder", "--run-dir", str(tmp_path / name), *map(str, options)]
        argv += ["--data", "stickers"]
        monkeypatch.setattr(sys, "argv", [*argv, "--steps", "1", "--batch-size", "1"])
        command.main()

    run("run", "--crop", 32, "--decoder-only", "--init-from", tiny, "--encoder", qwen)
    before, after = load_autoencoder(tiny, None), load_autoencoder(tmp_path / "run", None)
    assert after.config == before.config == KINDS["taehv"]
    old, new = (dict(tree_flatten(m.parameters())) for m in (before, after))
    # Its average is itself, but for rounding.
    assert mx.allclose(new["encoder.conv_in.weight"], old["encoder.conv_in.weight"], atol=1e-6)
    assert mx.abs(new["decoder.conv_in.bias"] - old["decoder.conv_in.bias"]).max() > 1e-6
    with pytest.raises(UserError, match="a taehv autoencoder is trained with --decoder-only"):
        run("b", "--init-from", tiny)
    with pytest.raises(UserError, match="latents of its own"):
        run("b", "--decoder-only", "--init-from", model_folder, "--encoder", qwen)
    assert not (tmp_path / "b").exists()


def test_an_own_autoencoder_of_a_folder_becomes_part_of_a_model(uncompiled, tmp_path, monkeypatch):
    """Pictures of any shape; the latents of the new model have mean 0 and variance 1."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for k in range(6):
        pixels = rng.integers(0, 255, (96, 64 + 64 * (k % 2), 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{k}.png")
        if k % 2:  # an autoencoder needs no captions
            (folder / f"{k}.txt").write_text("noise")
    (tmp_path / "own.model").write_bytes(tokenizer_bytes())
    monkeypatch.setattr(command, "VALIDATION_PICTURES", 2)
    sizes = {"hidden_size": 64, "head_dim": 8, "blocks": [1, 2, 1], "text_width": 32}
    (tmp_path / "sizes.json").write_text(json.dumps(sizes))

    def run(module, *options):
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, options)])
        module.main()

    run_dir = tmp_path / "run"
    given = ["--data", folder, "--run-dir", run_dir, "--resolution", 64, "--crop", 32]
    given += ["--latent-channels", 3, "--channels", 8, "--batch-size", 2]
    run(command, *given, "--steps", 1)
    assert "psnr" in read_log(run_dir)[-1]
    run(command, *given, "--steps", 2)
    record = json.loads((run_dir / "settings.json").read_text())
    assert record["pictures_only"]
    more = [*given, "--run-dir", tmp_path / "many", "--accumulate", 2, "--checkpoint-every", 1]
    numbers = []
    with monkeypatch.context() as patch:
        cut = command.crops
        patch.setattr(command, "crops", lambda s, n, **o: numbers.append(n) or cut(s, n, **o))
        run(command, *more, "--steps", 2)
    assert numbers[-4:] == [0, 1, 2, 3]  # after those of the principal components
    assert [path.name for path in checkpoints(tmp_path / "many")] == ["step_1", "step_2"]
    # Runs of earlier versions used the pictures that have captions.
    old = [*given, "--run-dir", tmp_path / "old"]
    with monkeypatch.context() as patch:
        patch.setattr(command, "needs_no_captions", lambda run_dir: False)
        run(command, *old, "--steps", 1)
    run(command, *old, "--steps", 2)
    record_of_old = json.loads((tmp_path / "old" / "settings.json").read_text())
    assert record_of_old["samples"] != record["samples"]
    with pytest.raises(UserError, match="other sizes of the autoencoder"):
        run(command, *given, "--steps", 3, "--channels", 16)
    fewer = ["--data", folder, "--run-dir", tmp_path / "fewer", "--resolution", 64, "--crop", 32]
    fewer += ["--init-from", run_dir, "--decoder-only", "--batch-size", 2]
    fewer += ["--latent-channels", 2, "--decoder-blocks", 3]
    run(command, *fewer, "--steps", 1)
    run(command, *fewer, "--steps", 2)
    source = open_data([str(folder)], size=(64, 64), unit=32, seed=1)
    before, after = (load_autoencoder(tmp_path / name, source) for name in ("run", "fewer"))
    assert (after.config.latent_channels, after.config.decoder_blocks[0]) == (2, 3)
    picture = mx.random.uniform(-1, 1, (1, 32, 32, 3))
    kept = np.array(before.encoder(picture)[0])[..., :2]
    np.testing.assert_allclose(np.array(after.encoder(picture)[0]), kept, atol=1e-5)
    run(command, *given, "--steps", 3, "--crop", 256)  # as large as the pictures are
    assert latest_checkpoint(run_dir).name == "step_3"
    made = ["--preset", tmp_path / "sizes.json", "--tokenizer", tmp_path / "own.model"]
    run(new, tmp_path / "model", *made, "--autoencoder", run_dir)
    autoencoder = load_autoencoder(tmp_path / "model", None)
    assert autoencoder.config.encoder_channels == (8, 16)
    latents = [
        autoencoder.encode(from_uint8(np.asarray(Image.open(folder / f"{k}.png"))[None, :, :64]))
        for k in range(6)
    ]
    values = np.concatenate([np.array(x).reshape(-1, 3) for x in latents])
    np.testing.assert_allclose(values.mean(0), 0, atol=0.3)
    np.testing.assert_allclose(values.std(0), 1, atol=0.3)


def test_fewer_latents_are_the_first_ones_and_new_blocks_the_identity():
    """The decoder starts as that of the larger autoencoder with zeros for the other latents."""
    mx.random.seed(0)
    config = dataclasses.replace(
        CONFIG, latents_mean=(0.5, 0, 1, -1), latents_std=(2, 0.5, 1, 3), decoder_blocks=(2, 1, 1)
    )
    large = ConvolutionalAutoencoder(config)
    randomize(large, 0)
    small = with_other_latents(large, latent_channels=3, decoder_blocks=5)
    assert small.config.latents_std == (2, 0.5, 1)
    assert small.config.decoder_blocks == (5, 1, 1)
    pictures = mx.random.uniform(-1, 1, (2, 16, 24, 3))
    (mean, log_var), (kept, kept_log_var) = large.encoder(pictures), small.encoder(pictures)
    np.testing.assert_array_equal(np.array(kept), np.array(mean)[..., :3])
    np.testing.assert_array_equal(np.array(kept_log_var), np.array(log_var)[..., :3])
    first = mx.concatenate([kept, mx.zeros_like(kept[..., :1])], axis=-1)
    expected = np.array(large.decoder(first))
    np.testing.assert_allclose(np.array(small.decoder(kept)), expected, atol=1e-5)
    assert np.abs(np.array(large.decoder(mean)) - expected).max() > 0.01
    same = with_other_latents(large)
    assert same.config == config
    for options, message in (
        ({"latent_channels": 5}, "4 latent channels cannot become 5"),
        ({"decoder_blocks": 1}, "2 blocks at the latents' scale cannot become 1"),
    ):
        with pytest.raises(UserError, match=message):
            with_other_latents(large, **options)
    with pytest.raises(UserError, match="a taehv autoencoder keeps its latents"):
        with_other_latents(made("taehv"), latent_channels=3)


def semantic_start():
    """An autoencoder of 4 latents and one with 2 of them and semantic ones for 3 things."""
    config = dataclasses.replace(
        CONFIG,
        picture_channels=4,
        latents_mean=(0.5, 0, 1, -1),
        latents_std=(2, 0.5, 1, 3),
    )
    large = randomize(ConvolutionalAutoencoder(config), 0)
    return large, with_other_latents(large, latent_channels=2, semantics=SEMANTIC, decoder_blocks=4)


def maps_of(things, colors=None, grounds=None):
    """Semantic latents (B, h, w, 28) of numbers (B, h, w) of things, from 1, each at its place.

    Colors and grounds are numbers from 1 too; 0 is none.
    """
    things = np.array(things)
    edges = np.indices(things.shape)[1:] + 1
    found = np.zeros((*things.shape, CHANNELS), np.float32)
    numbers = ((THING, things), (COLOR, colors), (GROUND, grounds), (COLUMN, edges[1]))
    for part, given in (*numbers, (ROW, edges[0]), (SIDE, np.ones_like(things))):
        size = part.stop - part.start
        known = np.concatenate([np.zeros((1, size)), codes(size)])
        found[..., part] = known[np.zeros_like(things) if given is None else np.array(given)]
    return mx.array(found)


def test_semantic_latents_leave_the_others_as_they_were():
    """Nothing is known where there is no code: the other latents are those of before there, less
    the ones of an empty place, and the decoder draws from these what it drew before."""
    large, found = semantic_start()
    config = found.config
    assert (config.latent_channels, config.appearance_channels) == (30, 4)
    assert (config.encoder_blocks, config.decoder_blocks) == ((1, 2), (4, 2, 1))
    assert config.latents_mean == (0,) * 30 and config.latents_std == (2, 0.5, *[1] * 28)
    found.encoder.semantics.out.weight *= 0
    found.encoder.semantics.out.bias *= 0
    found.decoder.table.empty = mx.array([0.1, 0.2, 0.3, 0.4])
    pictures = mx.random.uniform(-1, 1, (2, 16, 24, 4))
    mean, log_var = found.encoder(pictures)
    assert log_var.shape == mean.shape == (2, 2, 3, 23)
    before = large.encoder(pictures)[0]
    np.testing.assert_allclose(np.array(mean)[..., :4], np.array(before), atol=1e-6)
    latents = found.latents(pictures)
    np.testing.assert_allclose(
        np.array(latents)[..., :2], np.array(before)[..., :2] - [0.1, 0.2], atol=1e-6
    )
    np.testing.assert_allclose(
        np.array(found.encode(pictures))[..., :2], np.array(latents)[..., :2] / [2, 0.5], atol=1e-6
    )
    seen = mx.concatenate(
        [before[..., :2], mx.broadcast_to(mx.array([0.3, 0.4]), (2, 2, 3, 2))], -1
    )
    np.testing.assert_allclose(
        np.array(found.decoder(latents)), np.array(large.decoder(seen)), atol=1e-5
    )
    with pytest.raises(UserError, match="there already: omit --latent-channels"):
        with_other_latents(found, latent_channels=1)


def test_latents_of_appearance_are_zero_where_a_code_tells_all():
    """The background's code tells whether all is known at a place."""
    found = semantic_start()[1]
    found.encoder.semantics.out.weight *= 0
    bias = np.zeros(SEEN_CHANNELS, np.float32)
    bias[GROUND] = 0.9 * codes(4)[7]
    pictures = mx.random.uniform(-1, 1, (1, 16, 16, 4))
    found.encoder.semantics.out.bias = mx.array(bias)
    assert not np.array(found.latents(pictures))[..., :2].any()
    found.encoder.semantics.out.bias = mx.array(0.5 * bias)
    assert np.array(found.latents(pictures))[..., :2].all()


def test_the_table_has_a_row_for_each_thing_size_and_place(fluent_pictures):
    """All are met once in the scenes it starts with; a row is what the encoder sees there, also if
    the codes and places are not exact."""
    source = Stickers(num_nouns=12, pictures=rendering.find_pictures(fluent_pictures))
    config = dataclasses.replace(
        FLUENT_AUTOENCODER, latent_channels=6, encoder_channels=(8, 8, 8), latents_std=(1,) * 6
    )
    model = with_other_latents(
        randomize(ConvolutionalAutoencoder(dataclasses.replace(config, latents_mean=(0,) * 6)), 0),
        semantics=semantics_of(source, 16),
    )
    start_known_things(model, source)
    table, rng = model.decoder.table, np.random.default_rng(0)
    rows = np.array(table.things.weight)
    assert len(rows) == 12 * sum(side**2 for side in (2, 4, 6, 8, 10, 12, 14, 16))
    met = np.zeros(len(rows), int)
    for scene in known_scenes(source):
        latents = np.array(model.encoder(from_uint8(draw_scenes([scene])[0]))[0])[..., :6]
        true = semantic_map(scene, 16)
        noisy = mx.array(true + rng.uniform(-0.04, 0.04, true.shape).astype(np.float32))[None]
        semantics = as_codes(noisy, model.config.semantics)
        np.testing.assert_array_equal(
            np.array(semantics), np.array(as_codes(mx.array(true)[None], model.config.semantics))
        )
        # What a transformer generates is not exact either.
        semantics += mx.array(rng.uniform(-0.3, 0.3, semantics.shape).astype(np.float32))
        found, is_there = map(np.array, table.rows(semantics))
        found = found[is_there]
        met[found] += 1
        np.testing.assert_allclose(rows[found], latents[is_there], atol=1e-4)
        empty = np.array(table(semantics) - table.empty)[~is_there]
        assert not empty.any()
    assert (met == 1).all()
    grounds = np.array(model.decoder.paint.grounds)
    named = list(source.collection.backgrounds)
    np.testing.assert_allclose(grounds[named.index("white")], 1)
    np.testing.assert_allclose(
        grounds[named.index("red")], np.array([222, 52, 46, 255]) / 127.5 - 1, atol=1e-6
    )
    np.testing.assert_allclose(grounds[named.index("transparent")], -1)


def test_things_far_from_the_corner_are_not_known():
    """There are codes for 24 columns: what begins beyond is left to the latents of appearance."""
    seen = np.zeros((1, 2, 30, SEEN_CHANNELS), np.float32)
    seen[..., GROUND] = codes(4)[3]
    for left in (20, 23, 28):
        seen[0, :, left : left + 2, THING] = codes(8)[1]
        for i in (0, 1):
            seen[0, :, left + i, PLACE.start] = 1.7 * (i - 0.5)
            seen[0, i, left : left + 2, PLACE.start + 1] = 1.7 * (i - 0.5)
        seen[0, :, left : left + 2, PLACE.stop - 1] = np.log2(2 / 6)
    found = as_codes(mx.array(seen), SEMANTIC)
    known = np.array(is_known(found))[0, :, :, 0]
    things = np.array(found)[0, ..., THING].any(-1)
    expected = np.arange(30) < 28
    assert (known == expected).all() and not things[:, 28:].any()
    assert things[:, [20, 21, 23, 24]].all()
    np.testing.assert_array_equal(np.array(found)[0, 0, 24, COLUMN], codes(4)[23])


def test_semantic_channels_have_equal_weights():
    model = semantic_start()[1]
    assert channel_weights(model, mx.zeros((1, 2, 2, 30)), power=0) is None
    with pytest.raises(UserError, match="semantic latents mean the same with noise"):
        channel_weights(model, mx.zeros((1, 2, 2, 30)), power=0.5)


def test_an_autoencoder_of_factor_8_has_too_many_columns(fluent_pictures):
    source = Stickers(num_nouns=12, pictures=rendering.find_pictures(fluent_pictures))
    with pytest.raises(UserError, match="have 24 columns: give an autoencoder of --factor 16"):
        semantics_of(source, 8)


def test_configs_of_unreleased_versions():
    """Without semantic latents they had zeros for them."""
    values = to_dict(CONFIG) | {"semantic_channels": 0, "semantic_rank": 0}
    assert from_dict(AutoencoderConfig, values) == CONFIG
    with pytest.raises(UserError, match="unknown key 'semantic_channels'"):
        from_dict(AutoencoderConfig, values | {"semantic_channels": 14})
    again = AutoencoderConfig(**SEMANTIC_16)
    assert from_dict(AutoencoderConfig, to_dict(again)) == again


def test_scenes_of_known_things_are_not_drawn(fluent_pictures):
    """Their latents are the codes of what is where, and those of appearance are 0."""
    given = {"pictures": rendering.find_pictures(fluent_pictures)}
    source, config = Stickers(num_nouns=12, **given), FLUENT_AUTOENCODER
    start = dataclasses.replace(config, latents_mean=(0.1,) * 32, latents_std=(2,) * 32)
    made = make_autoencoder(start)
    model = with_other_latents(made, latent_channels=3, semantics=semantics_of(source, 16))
    found = as_latents(source, model)
    samples = found.samples(3, 4)
    assert samples.captions == source.batch(3, 4)[1]
    latents = np.array(samples.latents)
    assert latents.shape[-1] == 31 and not latents[..., :3].any()
    seen = mx.array(source.semantics(3, 4, factor=16))
    np.testing.assert_array_equal(
        latents[..., 3:], np.array(as_codes(seen, model.config.semantics))
    )
    held_out = as_latents(source.validation(), model)
    counts = [len(samples.captions) for samples in held_out.batches(4, most=6)]
    assert counts == [4, 2] and held_out.num_samples is None
    both = Mixture([source, dataclasses.replace(source, categories=("colors",))], [1, 1], seed=0)
    assert isinstance(as_latents(both, model), CodedScenes)
    # Of several sources, only those with other things are drawn.
    mixed = Mixture([source, Stickers(num_nouns=13, **given)], [1, 1], seed=0)
    for found in (as_latents(mixed, model), as_latents(Prefetched(mixed), model)):
        kinds = set()
        for number in range(6):
            part, place = mixed.order(number)
            alone = as_latents(mixed.sources[part], model)
            kinds.add(type(alone))
            expected, samples = alone.samples(place, 2), found.samples(number, 2)
            assert samples.captions == expected.captions
            np.testing.assert_array_equal(np.array(samples.latents), np.array(expected.latents))
        assert kinds == {CodedScenes, EncodedPictures}
    for other, autoencoder in ((Stickers(num_nouns=13, **given), model), (source, made)):
        assert isinstance(as_latents(other, autoencoder), EncodedPictures)


def test_things_are_painted_where_they_have_a_color_and_lie_on_the_background():
    """Half-transparent pictures over a background of a code, which is all there is beside things;
    only painted things change more."""
    paint = randomize(Paint(SEMANTIC), 2)
    pictures = mx.random.uniform(-1, 1, (1, 8, 8, 4), key=mx.random.key(0))
    plain = maps_of([[[0, 2], [2, 0]]])
    np.testing.assert_allclose(np.array(paint(pictures, plain)), np.array(pictures), atol=1e-6)
    colored = maps_of([[[0, 2], [2, 0]]], colors=[[[3, 3], [0, 0]]])
    changed = np.abs(np.array(paint(pictures, colored) - pictures)).max(-1)[0] > 1e-6
    expected = np.zeros((8, 8), bool)
    expected[:4, 4:] = True
    np.testing.assert_array_equal(changed, expected)
    other = np.array(paint(pictures, maps_of([[[0, 3], [2, 0]]], colors=[[[3, 3], [0, 0]]])))
    assert np.abs(other - np.array(paint(pictures, colored)))[0, :4, 4:].max() > 1e-3
    on_ground = np.array(paint(pictures, maps_of([[[0, 2], [2, 0]]], grounds=[[[5] * 2] * 2])))
    alpha = (np.array(pictures)[..., 3:] + 1) / 2
    over = np.array(pictures) + 1 + (1 - alpha) * (np.array(paint.grounds)[4] + 1) - 1
    is_thing = np.repeat(np.repeat([[[0, 1], [1, 0]]], 4, axis=1), 4, axis=2)[..., None]
    beside = np.broadcast_to(np.array(paint.grounds)[4], over.shape)
    np.testing.assert_allclose(on_ground, np.where(is_thing, over, beside), atol=1e-5)
    # A decoder's numbers below -1, also of alpha, are as -1.
    on = maps_of([[[2, 2], [2, 2]]], grounds=[[[5] * 2] * 2])
    clear, less = (mx.where(pictures > 0, pictures, x) for x in (-1, pictures - 1))
    np.testing.assert_allclose(np.array(paint(less, on)), np.array(paint(clear, on)), atol=1e-6)


def test_semantic_latents_are_made_of_all_normalized_latents():
    """The first layer's output is a function of them; features that do not change them have no
    part in it."""
    mx.random.seed(0)
    large, found = semantic_start()
    layer, out = found.encoder.semantics.inp, large.encoder.out
    features = mx.random.normal((50, 16))
    latents = np.array(large.normalize(split(out(features), 2, axis=-1)[0]))
    known = np.concatenate([latents, np.ones((50, 1))], -1)
    values = np.array(layer(features))
    linear, *_ = np.linalg.lstsq(known, values, rcond=None)
    np.testing.assert_allclose(known @ linear, values, atol=1e-5)
    np.testing.assert_allclose(linear[-1], 0, atol=1e-5)
    assert 0.4 < np.abs(linear[:-1]).max() < 0.501  # uniform, up to 4 ** -0.5


def test_semantic_latents_learn_alone():
    """What is where reaches their part of the encoder, the pictures the decoder; nothing reaches
    what makes the other latents."""
    model = randomize(semantic_start()[1], 5)
    pictures = mx.random.uniform(-1, 1, (2, 16, 16, 4), key=mx.random.key(0))
    seen = mx.random.normal((2, 2, 2, SEEN_CHANNELS), key=mx.random.key(2))
    seen[..., GROUND] = mx.array(codes(4)[3])
    seen[1, 0] = 0
    # A thing fills the first picture.
    seen[0, ..., THING], seen[0, ..., COLOR] = mx.array(codes(8)[2]), mx.array(codes(4)[1])
    line = mx.array([-0.85, 0.85])
    seen[0, ..., PLACE.start], seen[0, ..., PLACE.start + 1] = line, line[:, None]
    seen[0, ..., PLACE.stop - 1] = float(np.log2(2 / 6))
    objective = Reconstruction(1e-3, decoder_only=True)

    def gradients():
        batch = {"pictures": pictures, "seen": seen}
        grads, metrics = objective.gradients(model, batch, mx.random.key(1), None)
        return dict(tree_flatten(grads)), metrics

    found, metrics = gradients()
    error = np.array(model.encoder(pictures)[0][..., -SEEN_CHANNELS:] - seen)
    np.testing.assert_allclose(metrics["semantic_mse"].item(), np.square(error).mean(), rtol=1e-4)
    for name, value in found.items():
        size = mx.abs(value).max().item()
        learns = name.startswith(("encoder.semantics", "decoder")) and name != EMPTY
        assert (size > 0) == learns, name
    # Some of the random places are near a code too.
    index, is_there = map(np.array, nearest(seen[..., THING], 3))
    assert (index[0] == 2).all() and 0 < is_there.sum() < is_there.size
    read = np.array(model.encoder(pictures)[0][..., -SEEN_CHANNELS:])
    mean = 2 * error.mean((0, 1, 2)) / SEEN_CHANNELS
    is_known = np.array(nearest(seen[..., GROUND])[1])
    for name, part, known, threshold, weight, at in (
        ("thing", THING, codes(8)[:3], 4, 0.1, is_there | ~is_known),
        ("color", COLOR, codes(4), 2, 0.2, is_there),
        ("ground", GROUND, codes(4), 2, 0.2, np.ones_like(is_there)),
    ):
        right, has_code = map(np.array, nearest(seen[..., part], len(known)))
        one = np.concatenate([0 * known[:1], known])
        logits = read[..., part] @ one.T
        logits[..., 0] = threshold  # of `nearest`
        share = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        right = np.where(has_code, 1 + right, 0)
        entropy = -np.log(np.take_along_axis(share, right[..., None], -1)[at]).mean()
        np.testing.assert_allclose(metrics[f"{name}_entropy"].item(), entropy, rtol=1e-4)
        mean[part] += weight * ((share - np.eye(len(one))[right]) @ one)[at].mean(0)
    bias = np.array(found["encoder.semantics.out.bias"])
    np.testing.assert_allclose(bias, mean, atol=1e-5)
    objective = Reconstruction(1e-3, decoder_only=True, semantics_frozen=True)
    for name, value in gradients()[0].items():
        learns = name.startswith("decoder") and name != EMPTY
        assert (mx.abs(value).max().item() > 0) == learns, name


def test_a_decoder_gets_codes_or_latents_of_appearance():
    """In .3 of the pictures nothing is known, and elsewhere nothing where the background has no
    code."""
    model = randomize(semantic_start()[1], 5)
    appearance = mx.random.normal((400, 2, 2, 4), key=mx.random.key(1))
    seen = np.zeros((400, 2, 2, SEEN_CHANNELS), np.float32)
    seen[:, 1, :, THING], seen[:, :, 1, GROUND] = codes(8)[2], codes(4)[3]
    seen[:, 1, :, PLACE] = [[-0.85, 0.85, np.log2(2 / 6)], [0.85, 0.85, np.log2(2 / 6)]]
    true = np.array(as_codes(mx.array(seen), SEMANTIC))
    found = np.array(semantic_latents(model, appearance, mx.array(seen), mx.random.key(2)))
    other = np.array(appearance - model.decoder.table.empty)[..., :2]
    unknown = ~found[..., 2:].any(-1)
    assert unknown[:, :, 0].all() and (unknown[:, 0, 1] == unknown[:, 1, 1]).all()
    assert 0.2 < unknown[:, 0, 1].mean() < 0.4
    np.testing.assert_allclose(found[unknown][:, :2], other[unknown], atol=1e-6)
    assert not found[~unknown][:, :2].any()
    np.testing.assert_array_equal(found[~unknown][:, 2:], true[~unknown])


SEMANTIC_16 = {"latent_channels": 30, "picture_channels": 4, "semantics": SEMANTIC}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (FOUR | {"kind": "taehv", "semantics": SEMANTIC}, "of the kind taehv are not semantic"),
        (SEMANTIC_16 | {"picture_channels": 3}, "semantic latents need pictures with alpha"),
        (SEMANTIC_16 | {"latent_channels": 28}, "there are 29 to 32 latent_channels, not 28"),
        (SEMANTIC_16 | {"latent_channels": 33}, "there are 29 to 32 latent_channels, not 33"),
    ],
)
def test_configs_of_semantic_latents(options, message):
    assert AutoencoderConfig(**SEMANTIC_16).appearance_channels == 4
    with pytest.raises(UserError, match=message):
        AutoencoderConfig(**options)


@pytest.mark.parametrize(
    ("things", "sides", "message"),
    [
        (0, (2,), "codes for 1 to 240 things"),
        (241, (2,), "codes for 1 to 240"),
        (3, (), "ascending"),
        (3, (2, 25), "1 to 24 latents"),
        (3, (0,), "1 to 24 latents"),
        (3, (2, 2), "ascending"),
    ],
)
def test_sizes_of_semantic_latents(things, sides, message):
    with pytest.raises(UserError, match=message):
        SemanticConfig(things, sides)


def test_semantic_latents_of_fluent_scenes(uncompiled, fluent_pictures, tmp_path, monkeypatch):
    """The run starts again, its latents are those of the start and 14 more, and train on."""
    data = f"stickers:pictures={fluent_pictures},nouns=12"
    monkeypatch.setattr(command, "VALIDATION_PICTURES", 2)
    few = functools.partial(measure_latents, count=16)
    monkeypatch.setattr(train.loop.autoencoder, "measure_latents", few)

    def run(name, *options, steps=1, data=data):
        argv = ["autoencoder", "--run-dir", tmp_path / name, "--data", data, *options]
        argv += ["--steps", steps, "--batch-size", 2]
        monkeypatch.setattr(sys, "argv", [*map(str, argv)])
        command.main()

    run("start", "--crop", 32, "--factor", 16, "--channels", 8, "--latent-channels", 6)
    given = ["--semantic-latents", "--init-from", tmp_path / "start"]
    more = [*given, "--latent-channels", 4, "--decoder-blocks", 3]
    run("semantic", *more)
    scored = []
    with monkeypatch.context() as patch:
        patch.setattr(command, "right_share", lambda *maps: scored.append(maps) or 0.25)
        run("semantic", *more, steps=2)
    entry = read_log(tmp_path / "semantic")[-1]
    assert entry["step"] == 2 and "validation_psnr" in entry
    assert entry["validation_right"] == 0.25
    source = open_data([data], size=(256, 256), unit=32, seed=1)
    before, after = (load_autoencoder(tmp_path / n, source) for n in ("start", "semantic"))
    config = after.config
    assert (config.latent_channels, config.semantics.things) == (32, 12)
    assert config.semantics.sides == (2, 4, 6, 8, 10, 12, 14, 16)
    assert config.latents_mean == (0,) * 32 and config.latents_std[4:] == (1,) * 28
    assert all(0.1 < std < 2 for std in config.latents_std[:4])
    pictures, _ = source.validation().batch(0, 2)
    read = np.array(after.encoder(from_uint8(pictures))[0])[..., -19:]
    np.testing.assert_allclose(scored[-1][0], read, atol=1e-5)  # of the averages, as loaded
    true = source.validation().semantics(0, 2, factor=16)
    np.testing.assert_array_equal(scored[-1][1], true)
    picture = mx.random.uniform(-1, 1, (1, 64, 64, 4))
    kept = np.array(before.encoder(picture)[0])
    np.testing.assert_allclose(np.array(after.encoder(picture)[0])[..., :6], kept, atol=1e-5)
    # The table started with what the encoder sees, and hardly moved.
    table = np.array(after.decoder.table.things.weight)
    start_known_things(after, source.sources[0])
    np.testing.assert_allclose(table, np.array(after.decoder.table.things.weight), atol=0.01)
    again = ["--semantic-latents", "--init-from", tmp_path / "semantic"]
    run("on", *again)
    assert load_autoencoder(tmp_path / "on", source).config == config
    with pytest.raises(UserError, match="a run with other --decoder-only"):
        run("on", "--decoder-only", *again, steps=2)
    run("codes", "--decoder-only", *again)
    codes = load_autoencoder(tmp_path / "codes", source)
    kept = np.array(load_autoencoder(tmp_path / "semantic", source).encode(picture))
    np.testing.assert_array_equal(np.array(codes.encode(picture)), kept)
    assert not mx.array_equal(codes.decoder.inp.weight, after.decoder.inp.weight)
    with pytest.raises(UserError, match="start has no semantic latents yet: omit --decoder-only"):
        run("none", *given, "--decoder-only")
    two = ["--data", data, f"{data},categories=colors", "--steps", 1]
    run("mixture", *given, *two)
    for options in ((), ("--decoder-only",)):
        with pytest.raises(UserError, match="has semantic latents, which are learned from"):
            run("none", "--init-from", tmp_path / "semantic", "--crop", 64, *options)
    with pytest.raises(UserError, match="knows 12 things in 8 sizes: give --data"):
        run("none", *again, data=data.replace("nouns=12", "nouns=13"))
    folder = tmp_path / "folder"
    write_pictures(folder, 3)
    with pytest.raises(UserError, match="--semantic-latents needs --data stickers alone"):
        run("none", *given, data=folder)
    with pytest.raises(UserError, match="needs Fluent Emoji: --data stickers:pictures=FOLDER"):
        run("none", *given, data="stickers")
    assert not (tmp_path / "none" / "settings.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--semantic-latents", "--semantic-latents needs --init-from"),
        ("--latent-channels 3 --init-from x", "needs --decoder-only or --semantic-latents"),
    ],
)
def test_options_of_semantic_latents(options, message, tmp_path, monkeypatch):
    argv = ["autoencoder", "--run-dir", str(tmp_path / "run"), "--data", "stickers"]
    monkeypatch.setattr(sys, "argv", [*argv, *options.split()])
    with pytest.raises(UserError, match=message):
        command.main()


def test_pictures_without_captions_are_read_from_every_kind_of_set(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    folder = tmp_path / "pictures" / "class"
    folder.mkdir(parents=True)
    for k in range(3):
        Image.new("RGB", (64, 64), (k, 0, 0)).save(folder / f"{k}.png")
    (folder / "0.txt").write_text("")
    (folder / "1.txt").write_text("a caption")
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, path.name)
    data = [(folder / f"{k}.png").read_bytes() for k in range(3)]
    pq.write_table(pa.table({"image": data}), tmp_path / "none.parquet")
    texts = ["", "a caption", None]
    pq.write_table(pa.table({"image": data, "text": texts}), tmp_path / "some.parquet")
    some = {"1": "a caption"}
    for name, captions in {
        "pictures": some,
        "set.tar": some,
        "some.parquet": some,
        "none.parquet": {},
    }.items():
        options = {"size": (64, 64), "unit": 32, "seed": 0}
        source = open_data([str(tmp_path / name)], **options, pictures_only=True)
        assert source.num_samples == 3, name
        pictures, found = source.batch(0, 3)
        numbers = [str(value) for value in pictures[:, 0, 0, 0].tolist()]
        assert sorted(numbers) == ["0", "1", "2"]
        assert dict(zip(numbers, found, strict=True)) == dict.fromkeys("012", "") | captions
        if captions:
            assert open_data([str(tmp_path / name)], **options).num_samples == 1
        else:
            with pytest.raises(UserError, match="no column of texts"):
                open_data([str(tmp_path / name)], **options)


def test_latents_of_few_pictures_are_measured_on_each_once(tmp_path):
    """Of several shapes and of two folders; of many pictures, 512 in the order of training."""
    model = randomize(ConvolutionalAutoencoder(CONFIG), 4)
    write_pictures(tmp_path / "a", 12)
    write_pictures(tmp_path / "b", 5, seed=1)
    options = {"size": (64, 64), "unit": 32, "seed": 0, "pictures_only": True}
    for names in (["a"], ["a", "b"]):
        source = open_data([str(tmp_path / name) for name in names], **options)
        parts = source.sources
        assert len({size for part in parts for size in part.sizes}) > 1
        pictures = [p for part in parts for batch, _ in part.batches(1) for p in batch]
        assert len(pictures) == (12 if names == ["a"] else 17)
        raw = [np.array(model.encoder(from_uint8(picture[None]))[0]) for picture in pictures]
        flat = np.concatenate([latents.reshape(-1, 4) for latents in raw])
        mean, std = measure_latents(model, source)
        np.testing.assert_allclose(mean, flat.mean(0), atol=1e-5)
        np.testing.assert_allclose(std, flat.std(0), atol=1e-5)

    for count in (512, None):
        numbers = []

        def batch(number, count, numbers=numbers):
            numbers.append(number)
            return np.full((count, 16, 16, 3), number, np.uint8), [""] * count

        measure_latents(model, SimpleNamespace(num_samples=count, batch=batch))
        assert numbers == list(range(32))
    for path in (tmp_path / "a").glob("*.png"):
        path.write_bytes(path.read_bytes()[:60])
    source = open_data([str(tmp_path / "a")], **options)
    with pytest.raises(UserError, match="none of the pictures can be read"):
        measure_latents(model, source)
