"""A LoRA that teaches a new thing: its code, its rows of the decoder's table, and its scenes."""

import dataclasses
import json
import sys

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image

import train.loop.trainer
import train.lora
from mlx_snapgen.checkpoint.model import load_pretrained, save_pretrained
from mlx_snapgen.errors import UserError
from mlx_snapgen.lora.adapters import add_lora, remove_lora
from mlx_snapgen.lora.files import load_lora, lora_words, read_lora, save_lora
from mlx_snapgen.lora.things import HEADER, KEY, Thing, add_thing, remove_things
from mlx_snapgen.networks.autoencoders.semantics import nearest
from mlx_snapgen.open_model import open_model
from mlx_snapgen.pictures import from_uint8
from mlx_snapgen.pipeline import SnapGenPipeline
from mlx_snapgen.public.kinds import find_kind
from mlx_snapgen.public.source import Source
from mlx_snapgen.semantics import CHANNELS, GROUND, SEEN_CHANNELS, THING, SemanticConfig, codes
from mlx_snapgen.settings import ModelChoice
from mlx_snapgen.vocabulary import pluralize
from tests.tiny import AUTOENCODER, MODEL, TRANSFORMER, make_components, semantic_map_of
from train.data.encoded import CodedBatches
from train.data.stickers import own_thing
from train.data.stickers.captions import Placed, Scene
from train.data.stickers.own_thing import (
    MOST_LOOKS,
    OwnThing,
    check_names,
    fitted,
    in_square,
    is_cutout,
    known_scenes_of,
    read_cutouts,
    spare_codes,
    table_rows,
)
from train.data.stickers.render import find_pictures, render
from train.data.stickers.vocabulary import FLUENT, collection_in, vocabulary_file
from train.evaluation.drift import Validation
from train.evaluation.estimate import Estimate

SEMANTICS = SemanticConfig(
    12, (2, 4, 6, 8, 10, 12, 14, 16), head_blocks=1, appearance_channels=8, paint_width=6
)
CONFIG = dataclasses.replace(
    MODEL,
    name="things",
    image_size=(256, 256),
    transformer=dataclasses.replace(TRANSFORMER, latent_channels=30),
    autoencoder=dataclasses.replace(
        AUTOENCODER,
        latent_channels=30,
        encoder_channels=(8, 8, 8),
        encoder_blocks=(1, 1, 1),
        decoder_channels=(16, 12, 8, 8),
        decoder_blocks=(1, 1, 1, 0),
        picture_channels=4,
        semantics=SEMANTICS,
        latents_mean=(0.1,) * 30,
        latents_std=(1.5,) * 30,
    ),
)
LOOKS = SEMANTICS.places


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Few steps are done long before the compiler is, the curves drawn, or the time measured."""
    monkeypatch.setattr(train.loop.trainer, "plot_log", lambda run_dir: None)
    monkeypatch.setattr(train.lora, "estimate", lambda *_, **__: Estimate(0.5, 2.0, 3_100_000_000))
    monkeypatch.setattr(own_thing, "FIT_STEPS", 1)
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture
def model():
    """A random model of twelve things."""
    made = make_components(CONFIG)
    made.vocabulary = vocabulary_file(12, FLUENT)
    return made


@pytest.fixture
def folder(model, tmp_path):
    """The model on disk, and two cut-outs of a capybara beside it."""
    save_pretrained(tmp_path / "model", model)
    data = tmp_path / "capybara"
    data.mkdir()
    for k, size in enumerate(((90, 60), (40, 70))):
        picture = Image.new("RGBA", (100, 100))
        picture.paste((200, 100 + 50 * k, 40, 255), (5, 20, 5 + size[0], 20 + size[1]))
        picture.save(data / f"{k}.png")
    return tmp_path


def thing_of(codes: tuple[int, ...], **changed) -> Thing:
    given = {"name": "sloth", "plural": "sloths", "things": 12, "sides": SEMANTICS.sides}
    return Thing(codes=codes, **given | changed)


def random_rows(count: int, seed: int = 0) -> mx.array:
    return mx.random.normal((count * LOOKS, 8), key=mx.random.key(seed))


def write_lora(path, codes, *, seed=0, rows=None, **changed):
    """A LoRA file with a thing; returns it and its rows."""
    network = make_components(CONFIG).transformer
    add_lora(network, 2, alpha=2.0, targets=["*q_proj"])
    thing = thing_of(codes, **changed)
    rows = random_rows(len(codes), seed) if rows is None else rows
    save_lora(path, network, words=thing.words, thing=thing, rows=rows)
    return thing, rows


def parameters(module):
    return {name: np.array(value) for name, value in tree_flatten(module.parameters())}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


# --- the table ----------------------------------------------------------------------------------


def test_rows_are_the_latents_of_the_thing_alone_in_each_size(model, fluent_pictures):
    """As of scenes with one thing of the stickers, whose picture is the cut-out."""
    pictures = find_pictures(fluent_pictures)
    collection = collection_in(pictures)
    noun = collection.nouns[3]
    name = "-".join(f"{ord(c):04x}" for c in noun.emoji)
    with Image.open(pictures / f"{name}.webp") as opened:
        picture = opened.convert("RGBA")
    rows = table_rows(model.autoencoder, picture.crop(picture.getchannel("A").getbbox()))
    expected = []
    for side in SEMANTICS.sides:
        first = (16 - side) // 2
        placed = Placed(noun, None, 16 * side, 16 * first, 16 * first)
        scene = Scene("mixed", (placed,), "transparent", collection=collection, size=(256, 256))
        latents = model.autoencoder.encoder(from_uint8(render(scene)[None]))[0]
        inside = latents[0, first : first + side, first : first + side, :-SEEN_CHANNELS]
        expected.append(np.array(inside).reshape(-1, 8))
    np.testing.assert_allclose(np.array(rows), np.concatenate(expected), atol=1e-5)


def test_fitted_rows_draw_the_cutout_better(model, folder, monkeypatch):
    """In each size, with nothing around it."""
    monkeypatch.setattr(own_thing, "FIT_STEPS", 8)
    cutout = Image.open(folder / "capybara" / "0.png")
    cutout = cutout.crop(cutout.getbbox())
    autoencoder = model.autoencoder
    before = table_rows(autoencoder, cutout)
    after = fitted(autoencoder, cutout, before)
    errors = []
    for rows in (before, after):
        add_thing(autoencoder, thing_of((99,)), rows)
        for side in SEMANTICS.sides[:3]:
            map_ = semantic_map_of([(99, 0, side, 1, 1)], (side + 2,) * 2, config=SEMANTICS)
            known = autoencoder.decoder.table(mx.array(map_))
            edge = 16 * (side + 1)
            drawn = np.array(autoencoder.decoder.draw(known))[0, 16:edge, 16:edge]
            true = np.array(from_uint8(in_square(cutout, 16 * side)))
            errors.append(np.square(drawn - true).mean())
        remove_things(autoencoder, (99,))
    better = np.array(errors[3:]) / errors[:3]
    assert (better < 0.97).all(), better
    np.testing.assert_array_equal(np.array(after), np.array(fitted(autoencoder, cutout, before)))


def test_fitting_goes_down_the_error_of_what_is_drawn(model, folder):
    """The first step of Adam moves each number by the sign of its gradient."""
    cutout = Image.open(folder / "capybara" / "1.png")
    cutout = cutout.crop(cutout.getbbox())
    autoencoder, side, places = model.autoencoder, 4, slice(4, 20)
    rows = table_rows(autoencoder, cutout)
    true = from_uint8(in_square(cutout, 16 * side)[None])

    def error(part):
        around = mx.broadcast_to(autoencoder.decoder.table.empty, (1, 8, 8, 8))
        around[0, 2:6, 2:6] = part.reshape(4, 4, 8)
        return (autoencoder.decoder.draw(around)[:, 32:96, 32:96] - true).square().mean()

    gradient = np.array(mx.grad(error)(rows[places]))
    moved = np.array(fitted(autoencoder, cutout, rows) - rows)[places]
    clear = np.abs(gradient) > 1e-6
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(np.sign(moved)[clear], -np.sign(gradient)[clear])


def test_a_new_code_draws_its_rows(model):
    """Two looks with other codes between them, and a known thing, which is as before."""
    rows = random_rows(2)
    map_ = semantic_map_of(
        [(77, 0, 4, 1, 2), (200, 0, 2, 9, 9), (5, 0, 4, 9, 1)], (12, 14), config=SEMANTICS
    )
    map_[..., 8:12] = 0  # own colors
    latents = mx.concatenate([mx.zeros((1, 12, 14, 2)), mx.array(map_)], axis=-1)
    decoder = model.autoencoder.decoder
    before = np.array(decoder(latents))
    appearance = np.broadcast_to(np.array(decoder.table.empty), (1, 12, 14, 8)).copy()
    known = np.array(decoder.table.things.weight)
    starts = np.cumsum([0, *(side**2 for side in SEMANTICS.sides)])
    new = np.array(rows)
    appearance[0, 2:6, 1:5] = new[starts[1] : starts[2]].reshape(4, 4, 8)
    appearance[0, 9:11, 9:11] = new[LOOKS : LOOKS + 4].reshape(2, 2, 8)
    first = 5 * LOOKS + starts[1]
    appearance[0, 1:5, 9:13] = known[first : first + 16].reshape(4, 4, 8)
    add_thing(model.autoencoder, thing_of((77, 200)), rows)
    found = np.array(decoder(latents))
    expected = decoder.paint(decoder.draw(mx.array(appearance)), mx.array(map_))
    np.testing.assert_allclose(found, np.array(expected), atol=1e-5)
    assert np.abs(found - before)[0, 32:96, 16:80].max() > 0.1
    assert model.autoencoder.config.semantics.known == (*range(12), 77, 200)
    # A color of the new things is painted as the mean of the others.
    paint = np.array(decoder.paint.thing.weight)
    np.testing.assert_allclose(paint[12:], [paint[:12].mean(0)] * 2, atol=1e-6)


def test_codes_depend_on_the_name_and_are_free():
    config = dataclasses.replace(SEMANTICS, own=(13, 200))
    found = spare_codes(config, "sloth", 8, seed=0)
    assert found == spare_codes(config, "sloth", 8, seed=0) and len(set(found)) == 8
    assert not set(found) & {*range(12), 13, 200} and max(found) < 240
    others = {spare_codes(config, *of[:1], 1, seed=of[1]) for of in (("otter", 0), ("sloth", 1))}
    assert len(others | {found[:1]}) == 3
    full = dataclasses.replace(SEMANTICS, own=tuple(range(12, 238)))
    assert sorted(spare_codes(full, "sloth", 8, seed=0)) == [238, 239]


# --- files --------------------------------------------------------------------------------------


def test_a_saved_thing_is_the_same_loaded_and_removed(model, tmp_path):
    thing, rows = write_lora(tmp_path / "sloth.safetensors", (150, 13))
    autoencoder, network = model.autoencoder, model.transformer
    before = parameters(autoencoder), autoencoder.config, parameters(network)
    load_lora(tmp_path / "sloth.safetensors", network, name="sloth", autoencoder=autoencoder)
    assert autoencoder.config.semantics == dataclasses.replace(SEMANTICS, own=(150, 13))
    table = np.array(autoencoder.decoder.table.things.weight)
    np.testing.assert_array_equal(table[12 * LOOKS :], np.array(rows))
    np.testing.assert_array_equal(table[: 12 * LOOKS], before[0]["decoder.table.things.weight"])
    assert lora_words(read_lora(tmp_path / "sloth.safetensors")[1]) == thing.words
    assert thing.words == ["sloth", "sloths"]
    latents = mx.random.normal((1, 4, 4, 30), key=mx.random.key(0))
    drawn = np.array(autoencoder.decode(latents))
    remove_lora(network, ["sloth"], autoencoder=autoencoder)
    assert autoencoder.config == before[1]
    assert_same(parameters(autoencoder), before[0])
    assert_same(parameters(network), before[2])
    assert drawn.shape == autoencoder.decode(latents).shape


def test_two_things_go_together_and_one_can_be_removed(model, tmp_path):
    _, first = write_lora(tmp_path / "a.safetensors", (150, 13), seed=1)
    _, second = write_lora(tmp_path / "b.safetensors", (99,), seed=2, name="otter", plural="otters")
    write_lora(tmp_path / "c.safetensors", (13,), name="otter", plural="otters")
    autoencoder, network = model.autoencoder, model.transformer
    for name in "ab":
        load_lora(tmp_path / f"{name}.safetensors", network, autoencoder=autoencoder)
    own, rows = autoencoder.own_things()
    assert own == (150, 13, 99)
    np.testing.assert_array_equal(np.array(rows), np.concatenate([first, second]))
    before = parameters(autoencoder)
    with pytest.raises(UserError, match=r"'otter' has a code of another thing.*another --seed"):
        load_lora(tmp_path / "c.safetensors", network, autoencoder=autoencoder)
    assert_same(parameters(autoencoder), before)
    remove_lora(network, ["a"], autoencoder=autoencoder)
    own, rows = autoencoder.own_things()
    assert own == (99,)
    np.testing.assert_array_equal(np.array(rows), np.array(second))
    load_lora(tmp_path / "c.safetensors", network, autoencoder=autoencoder)
    assert autoencoder.config.semantics.own == (99, 13)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"things": 11}, "a model that knows 11 things in 8 sizes, this one knows 12 things in 8"),
        ({"sides": (2, 4)}, "knows 12 things in 2 sizes, this one"),
        ({"rows": mx.zeros((3, 8))}, r"things.weight is \(3, 8\) in .*, not \(816, 8\)"),
        ({"rows": mx.full((816, 8), mx.nan)}, "is damaged: .* not finite or larger than 10000"),
        ({"rows": mx.full((816, 8), -1e38)}, "is damaged: .* not finite or larger than 10000"),
    ],
)
def test_things_that_do_not_fit_change_nothing(model, tmp_path, changed, message):
    path = tmp_path / "sloth.safetensors"
    write_lora(path, (150,), **changed)
    before = parameters(model.autoencoder), parameters(model.transformer)
    with pytest.raises(UserError, match=message):
        load_lora(path, model.transformer, autoencoder=model.autoencoder)
    assert_same(parameters(model.autoencoder), before[0])
    assert_same(parameters(model.transformer), before[1])


def test_damaged_headers_and_files_without_rows_are_said(model, tmp_path):
    path = tmp_path / "sloth.safetensors"
    write_lora(path, (150,))
    tensors, header = read_lora(path)
    tensors, header = dict(tensors), dict(header)
    for text in ("{", "[]", '{"name": "a"}', header[HEADER].replace("150", "3")):
        mx.save_safetensors(str(path), tensors, header | {HEADER: text})
        with pytest.raises(UserError, match="has a damaged header"):
            load_lora(path, model.transformer, autoencoder=model.autoencoder)
    rows = tensors.pop(KEY)
    mx.save_safetensors(str(path), tensors, header)
    with pytest.raises(UserError, match=r"things\.weight is missing"):
        load_lora(path, model.transformer, autoencoder=model.autoencoder)
    del header[HEADER]
    mx.save_safetensors(str(path), tensors | {KEY: rows}, header)
    with pytest.raises(UserError, match="is no part of a LoRA"):
        load_lora(path, model.transformer, autoencoder=model.autoencoder)


def test_a_lora_with_a_thing_needs_no_conversion(tmp_path):
    path = tmp_path / "sloth.safetensors"
    write_lora(path, (150,))
    for kind in (None, "lora"):
        with pytest.raises(UserError, match="needs no conversion"):
            find_kind(Source(path, path, (path,), None), mx.load(str(path)), kind)


def test_a_model_without_semantic_latents_refuses_a_thing(components, model_folder, tmp_path):
    path = tmp_path / "sloth.safetensors"
    write_lora(path, (150,))
    message = "teaches the thing 'sloth', which takes a model with semantic latents"
    with pytest.raises(UserError, match=message):
        open_model(ModelChoice(str(model_folder), loras=((str(path), 1.0),)))
    network = make_components().transformer
    for autoencoder in (None, components.autoencoder):
        with pytest.raises(UserError, match=message):
            load_lora(path, network, autoencoder=autoencoder)


# --- training -----------------------------------------------------------------------------------


def test_batches_have_the_codes_where_the_scenes_have_the_thing(model):
    """One kind in each scene is new, in one of its looks; prior samples have none."""
    thing = thing_of((150, 13))
    add_thing(model.autoencoder, thing, random_rows(2))
    known = known_scenes_of(model, seed=3)
    source = OwnThing(known, thing)
    data = CodedBatches(model, source, prior=known, batch_size=8, drop_caption=0.0, seed=3)
    seen, sizes = set(), set()
    for number in range(6):
        batch, scenes = data(number), source.scenes(number, 8)
        again = data(number)
        assert all(mx.array_equal(batch[name], again[name]).item() for name in batch)
        assert len(batch["latents"]) == 8 and len(batch["prior_latents"]) == 4
        maps = np.array(model.autoencoder.denormalize(batch["latents"]))
        assert np.abs(maps[..., :-CHANNELS]).max() < 1e-5
        sizes.add(maps.shape[1:3])
        for scene, map_ in zip(scenes, maps, strict=True):
            words = scene.caption.lower()
            assert "sloth" in words
            counts = {(p.noun.name, p.noun.emoji) for p in scene.placed if p.noun.name == "sloth"}
            assert len(counts) == 1  # one look in a scene
            for placed in scene.placed:
                x, y, width, height = (length // 16 for length in placed.cell)
                there = map_[y : y + height, x : x + width, -CHANNELS:][..., THING]
                new = placed.noun.name == "sloth"
                number_ = int(placed.noun.emoji) if new else FLUENT.nouns.index(placed.noun)
                np.testing.assert_allclose(there, there * 0 + codes(8)[number_], atol=1e-5)
                assert not new or placed.color is None
                seen.add(number_)
        prior = model.autoencoder.denormalize(batch["prior_latents"])[..., -CHANNELS:]
        index, is_there = nearest(prior[..., THING], 240)
        assert int(mx.where(is_there, index, 0).max()) < 12
        assert bool(nearest(prior[..., GROUND])[1].all())
    assert {150, 13} < seen and seen & set(range(12)) and len(sizes) > 2


def run(monkeypatch, folder, *options):
    monkeypatch.chdir(folder)
    short = "--steps 4 --batch-size 2 --rank 2 --checkpoint-every 2 --validation-prompts x"
    argv = ["lora", "--data", "capybara", "--model", "model", *short.split(), *options]
    monkeypatch.setattr(sys, "argv", argv)
    train.lora.main()


def test_the_command_teaches_a_thing_that_the_pipeline_draws(folder, model, monkeypatch, capsys):
    run(monkeypatch, folder, "--thing", "Capybara", "--seed", "1")
    path = folder / "capybara.safetensors"
    tensors, header = read_lora(path)
    thing = json.loads(header[HEADER])
    assert (thing["name"], thing["plural"]) == ("capybara", "capybaras")
    assert len(thing["codes"]) == 2
    cutouts = [Image.open(folder / "capybara" / f"{k}.png") for k in range(2)]
    cutouts = [cutout.crop(cutout.getbbox()) for cutout in cutouts]
    rows = [fitted(model.autoencoder, c, table_rows(model.autoencoder, c)) for c in cutouts]
    np.testing.assert_allclose(np.array(tensors[KEY]), np.concatenate(rows), atol=1e-5)
    assert "capybara, capybaras: 2 looks, 0 skipped" in capsys.readouterr().out

    choice = {"model": str(folder / "model"), "loras": ((str(path), 0.5),)}
    made = SnapGenPipeline.from_pretrained(ModelChoice(**choice))
    decoder = made.autoencoder.decoder
    # The table does not scale.
    np.testing.assert_array_equal(
        np.array(decoder.table.things.weight)[12 * LOOKS :], np.array(tensors[KEY])
    )
    assert made.config.autoencoder == made.autoencoder.config
    assert "capybara" in made.vocabulary["nouns"] and "capybara" in made._lora_words
    latents = mx.random.normal((1, 16, 16, 30), key=mx.random.key(1))
    drawn = np.array(made.autoencoder.decode(latents))
    # What is saved is a whole model, with the thing.
    made.save_pretrained(folder / "merged")
    again = load_pretrained(folder / "merged")
    assert again.config.autoencoder.semantics.own == tuple(thing["codes"])
    np.testing.assert_array_equal(np.array(again.autoencoder.decode(latents)), drawn)
    assert known_scenes_of(again, seed=0).num_things == 12
    with pytest.raises(UserError, match="has a code of another thing of this model"):
        open_model(ModelChoice(str(folder / "merged"), loras=choice["loras"]))


def test_a_stopped_run_continues_to_the_same_lora(folder, monkeypatch):
    given = "--thing", "capybara"
    run(monkeypatch, folder, *given, "--output", "a.safetensors", "--run-dir", "a")
    validate = Validation.__call__

    def stop(self, trainer):
        trainer.stop()
        return validate(self, trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Validation, "__call__", stop)
        run(monkeypatch, folder, *given, "--output", "b.safetensors", "--run-dir", "b")
    assert not (folder / "b.safetensors").exists()
    run(monkeypatch, folder, *given, "--output", "b.safetensors", "--run-dir", "b")
    a, b = (mx.load(str(folder / f"{name}.safetensors")) for name in "ab")
    assert_same({k: np.array(v) for k, v in a.items()}, {k: np.array(v) for k, v in b.items()})
    with pytest.raises(UserError, match="other --plural"):
        more = "--plural", "capybara", "--output", "c.safetensors", "--run-dir", "a"
        run(monkeypatch, folder, *given, *more)


def test_more_pictures_than_looks_are_left_out(folder, monkeypatch, capsys):
    for k in range(2, MOST_LOOKS + 2):
        Image.open(folder / "capybara" / "0.png").save(folder / "capybara" / f"{k}.png")
    (folder / "capybara" / "a.png").write_bytes(b"no picture")
    run(monkeypatch, folder, "--thing", "capybara", "--dry-run")
    said = capsys.readouterr()
    assert f"capybara, capybaras: {MOST_LOOKS} looks, 1 skipped" in said.out
    assert "left out, a thing has at most 8 looks: 8.png, 9.png" in said.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--thing", "cat"], "--thing cat: the model knows this word"),
        (["--thing", "kitten"], "--thing kitten: the model knows this word"),
        (["--thing", "red"], "--thing red: the model knows this word"),
        (["--thing", "small sticker"], "--thing small sticker: the model knows this word"),
        (["--thing", "capybara", "--plural", "cats"], "--plural cats: the model knows this word"),
        (["--thing", "3"], "--thing takes a noun of at most 40 letters: '3'"),
        (["--thing", "x" * 41], "--thing takes a noun of at most 40 letters"),
        (["--thing", "gray"], "--thing gray: the model knows this word"),
        (["--thing", "colour"], "--thing colour: the model knows this word"),
        (["--thing", "two castles"], "--thing 'two castles' is no noun: leave out 'two'"),
        (["--thing", "A Castle"], "--thing 'a castle' is no noun: leave out 'a'"),
        (["--thing", "castle of"], "--thing 'castle of' is no noun: leave out 'of'"),
        (["--plural", "capybaras"], "--plural is of --thing"),
        (["--thing", "capybara", "--alpha", "0"], "--alpha 0 trains nothing"),
        (["--thing", "capybara", "--targets", "nothing"], "nothing"),
        (["--thing", "capybara", "--flip"], "--thing takes no --flip: leave it out"),
    ],
)
def test_mistakes_are_said(folder, monkeypatch, options, message):
    with pytest.raises(UserError, match=message):
        run(monkeypatch, folder, *options)


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (("BABY Capybara ", None), ("baby capybara", "baby capybaras")),
        (("fort ", None), ("fort", "forts")),
        (("top hat", None), ("top hat", "top hats")),
        (("traffic light", None), ("traffic light", "traffic lights")),
        (("paper clip", None), ("paper clip", "paper clips")),
        (("earl gray", None), ("earl gray", "earl grays")),
        (("red  panda", "Red Pandas"), ("red panda", "red pandas")),
    ],
)
def test_names_are_in_the_letters_of_captions(model, given, names):
    assert check_names(model, *given) == names


def test_captions_of_cutouts_are_not_read(folder):
    (path, _), *_ = read_cutouts(folder / "capybara")[0]
    path.with_suffix(".txt").write_bytes(b"\xff\xfe")
    assert path in dict(read_cutouts(folder / "capybara")[0])


def test_why_no_picture_is_usable_is_said(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"no usable picture in .* \(.*a\.png"):
        read_cutouts(tmp_path)


def test_other_pictures_and_models_are_said(folder, model_folder, monkeypatch, capsys):
    wrong = "--thing", "capybara", "--model", str(model_folder)
    with pytest.raises(UserError, match=r"--thing takes a model with semantic latents: .* none"):
        run(monkeypatch, folder, *wrong)
    for picture in (folder / "capybara").iterdir():
        picture.with_suffix(".txt").write_text("a capybara")
    run(monkeypatch, folder, "--dry-run")
    assert "if the pictures show one thing, add --thing NOUN" in capsys.readouterr().err
    Image.new("RGB", (20, 20)).save(folder / "capybara" / "photo.png")
    (folder / "capybara" / "photo.txt").write_text("a photo")
    run(monkeypatch, folder, "--dry-run")
    assert "cut it out (transparent around it) and add --thing NOUN" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"photo\.png has no transparent surroundings"):
        run(monkeypatch, folder, "--thing", "capybara")


def test_cutouts_are_cropped_to_what_is_seen_and_read_once(tmp_path):
    picture = Image.new("RGBA", (60, 50), (9, 9, 9, 8))
    picture.paste((10, 20, 30, 255), (20, 10, 35, 40))
    picture.save(tmp_path / "a.png")
    line = json.dumps({"file_name": "a.png", "text": "a thing"})
    (tmp_path / "metadata.jsonl").write_text(f"{line}\n{line}\n")
    [(path, found)], skipped = read_cutouts(tmp_path)
    assert path == tmp_path / "a.png" and found.size == (15, 30) and not skipped
    square = in_square(found, 64)
    rows, columns = np.nonzero(square[..., 3] > 128)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (0, 63, 16, 47)


def test_what_a_cutout_is():
    opaque = np.full((20, 20, 4), 255, np.uint8)
    assert not is_cutout(opaque) and not is_cutout(0 * opaque)
    corner = opaque.copy()
    corner[0, 0] = 0
    assert not is_cutout(corner)
    inside = opaque.copy()
    inside[5:9, 5:9] = 0
    assert not is_cutout(inside)
    opaque[:4, :10] = 0
    assert is_cutout(opaque)
    assert pluralize("capybara") == "capybaras"
