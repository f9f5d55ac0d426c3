"""Drawings that start from pictures: fitted, in numbers, what stays, metadata, and mistakes."""

import dataclasses
import io
import itertools
import os
import sys
import warnings
import zlib
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image, ImageDraw

from mlx_snapgen.errors import UserError, run_command
from mlx_snapgen.fitting import fit, nearest_size
from mlx_snapgen.generate import main
from mlx_snapgen.inputs import Inputs
from mlx_snapgen.metadata import find_pictures, read_metadata, read_settings, save_picture
from mlx_snapgen.open_model import open_model
from mlx_snapgen.picture_files import picture_hash
from mlx_snapgen.pictures import from_uint8
from mlx_snapgen.pipeline import SnapGenPipeline
from mlx_snapgen.pipeline_base import PictureWarning
from mlx_snapgen.sampling import Start, cut_schedule, denoise, get_noise, get_schedule
from mlx_snapgen.settings import DrawSettings, ModelChoice
from mlx_snapgen.teachers.config import KLEIN
from mlx_snapgen.teachers.memory import measure_folder
from tests.tiny import FLUX2, FLUX2_AUTOENCODER, MODEL, TEACHER, write_teacher

SIZE = (32, 64)
"""Height and width of the tiny model's pictures."""
KLEIN_CONFIG = dataclasses.replace(
    TEACHER,
    kind="flux2",
    transformer=FLUX2,
    autoencoder=FLUX2_AUTOENCODER,
    schedule=KLEIN,
    few_step=KLEIN,
)


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    """Every test works in its own folder."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr("mlx_snapgen.cli.notices.PATIENCE", 60)


@pytest.fixture(scope="module")
def pipe(model_folder):
    return SnapGenPipeline.from_pretrained(model_folder)


@pytest.fixture(scope="module")
def klein(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("klein") / "klein", KLEIN_CONFIG)


def picture(height=SIZE[0], width=SIZE[1], mode="RGB", seed=0):
    """Smooth, so that scaling it changes little."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, len(mode))).astype(np.uint8)
    return Image.fromarray(small.squeeze()).convert(mode).resize((width, height))


def disk(height=SIZE[0], width=SIZE[1], box=(20, 5, 37, 22)):
    """A mask of odd edges."""
    mask = Image.new("L", (width, height), 0)
    ImageDraw.Draw(mask).ellipse(box, fill=255)
    return mask


def last(steps):
    *_, step = steps
    return step


# --- sizes and fits -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "pixels", "expected"),
    [
        ((3024, 4032), 1 << 20, (880, 1184)),
        ((4032, 3024), 1 << 20, (1184, 880)),
        ((1080, 1920), 1 << 20, (768, 1360)),
        ((100, 100), 128**2, (128, 128)),
        ((3, 4000), 128**2, (48, 384)),
    ],
)
def test_the_nearest_size(size, pixels, expected):
    found = nearest_size(size, pixels=pixels, unit=16)
    assert found == expected
    ratio = min(max(size[0] / size[1], 1 / 8), 8)
    assert abs(np.log(found[0] / found[1] / ratio)) < 0.1
    assert abs(np.log(found[0] * found[1] / pixels)) < 0.13


def test_sides_that_are_not_chosen_follow_the_picture():
    photo = picture(300, 200)

    def size(config=KLEIN_CONFIG, **given):
        found = DrawSettings("x", **{"image": photo} | given).resolved(config)
        return found.height, found.width

    assert size() == nearest_size((300, 200), pixels=1 << 20, unit=16) == (1248, 832)
    assert size(height=96) == (96, 64) and size(width=32) == (48, 32)
    assert size(height=32, width=32) == (32, 32)
    assert size(image=None, edit=(photo, picture(64, 64))) == (1248, 832)
    assert size(image=None, width=32) == (1024, 32)
    # The tiny model draws one size.
    assert size(MODEL) == (32, 64) and size(MODEL, width=32) == (32, 32)


def test_fits():
    image = Image.new("RGB", (80, 40), "red")
    ImageDraw.Draw(image).rectangle((20, 0, 59, 39), fill="blue")
    cut, padded, flat = (
        np.array(fit(image, (64, 64), how=how)) for how in ("crop", "pad", "stretch")
    )
    blue, red, white = (0, 0, 255), (255, 0, 0), (255, 255, 255)
    assert (cut[:, 6:-6] == blue).all()
    assert (padded[:15] == white).all() and (padded[-15:] == white).all()
    assert (padded[18:-18, :10] == red).all() and (padded[18:-18, 20:-20] == blue).all()
    assert (flat[:, :12] == red).all() and (flat[:, 20:-20] == blue).all()
    mask = fit(Image.new("L", (80, 40), 255), (64, 64), how="pad", is_mask=True)
    assert set(np.unique(np.array(mask))) == {0, 255}
    assert not np.array(mask)[:15].any() and np.array(mask)[17:-17].all()


# --- numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "strength", "steps"),
    [(4, 0.5, 2), (4, 0.6, 3), (4, 1.0, 4), (4, 0.01, 1), (50, 0.6, 30), (1, 0.3, 1), (10, 0.7, 7)],
)
def test_the_schedule_is_cut(count, strength, steps):
    levels = get_schedule(count, 3.0)
    assert cut_schedule(levels, strength) == levels[count - steps :]


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_the_picture_is_the_integral_from_the_noised_input(pipe, guidance):
    """Written out once more with the pipeline's own velocity: two of four steps."""
    given, settings = picture(), {"guidance_scale": guidance, "num_inference_steps": 4, "seed": 5}
    x0 = pipe.autoencoder.encode(from_uint8(np.array(given)[None]))
    levels = get_schedule(4, 2.0)[2:]
    start = (1 - levels[0]) * x0 + levels[0] * get_noise(5, *x0.shape[1:])
    seen = []

    def record(velocity, noise, schedule, fresh_noise=None, *, start=None):
        seen.append(velocity)
        return denoise(velocity, noise, schedule, fresh_noise, start=start)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlx_snapgen.draw.denoise", record)
        step = last(pipe.generate("a red apple", image=given, strength=0.5, **settings))
    x = start
    for sigma, following in itertools.pairwise(levels):
        x = x + (following - sigma) * seen[0](x, sigma)
    assert np.abs(np.array(x - step.x0)).max() < 1e-5
    assert (step.num_steps, step.sigma) == (2, levels[1])
    assert step.metadata["num_inference_steps"] == 4 and step.metadata["strength"] == 0.5


def test_strength_goes_from_the_input_to_no_input(pipe):
    given, settings = picture(), {"num_inference_steps": 20, "guidance_scale": 1, "seed": 2}
    plain = last(pipe.generate("a red apple", **settings)).x0
    x0 = pipe.autoencoder.encode(from_uint8(np.array(given)[None]))
    found = [
        last(pipe.generate("a red apple", image=given, strength=s, **settings)).x0
        for s in (0.05, 0.4, 1.0)
    ]
    away = [float(mx.abs(x - x0).mean()) for x in found]
    assert away[0] < away[1] < away[2]
    assert mx.array_equal(found[2], plain)


@pytest.mark.parametrize("fresh", [False, True])
def test_what_is_not_redrawn_stays_bit_for_bit(model_folder, components, fresh):
    sampler = dataclasses.replace(components.config.sampler, fresh_noise=fresh)
    config = dataclasses.replace(components.config, sampler=sampler)
    pipe = SnapGenPipeline(dataclasses.replace(components, config=config))
    given, mask = picture(), disk()
    steps = list(pipe.generate("a blue cat", image=given, mask=mask, num_inference_steps=3))
    assert [step.index for step in steps] == [0, 1, 2] and steps[0].metadata["strength"] == 1
    redrawn = np.array(mask) > 0
    for step in steps:
        found = np.array(step.preview())
        assert np.array_equal(found[~redrawn], np.array(given)[~redrawn])
        assert not np.array_equal(found[redrawn], np.array(given)[redrawn])
    x0 = pipe.autoencoder.encode(from_uint8(np.array(given)[None]))
    kept = np.array(Inputs(given, redrawn).latent_mask(8))[0, :, :, 0] == 0
    assert kept.any() and np.array_equal(np.array(steps[-1].x0)[0][kept], np.array(x0)[0][kept])


def test_kept_latents_have_the_noise_of_each_level():
    x0, noise = mx.full((1, 2, 2, 1), 5.0), mx.full((1, 2, 2, 1), 3.0)
    mask = mx.array([[1.0, 0], [0, 1]]).reshape(1, 2, 2, 1)
    steps = denoise(lambda x, t: 0 * x, noise, [1.0, 0.5, 0.0], start=Start(x0, 1.0, mask))
    first, second = ([round(v, 4) for v in np.array(step.x_t).ravel().tolist()] for step in steps)
    assert first == [3, 4, 4, 3] and second == [3, 5, 5, 3]


def test_a_cell_of_latents_is_redrawn_for_a_single_pixel():
    redrawn = np.zeros((16, 24), bool)
    redrawn[9, 23] = True
    mask = Inputs(picture(16, 24), redrawn).latent_mask(8)
    assert np.array(mask)[0, :, :, 0].tolist() == [[0, 0, 0], [0, 0, 1]]


# --- masks --------------------------------------------------------------------------------------


def masks():
    """Masks of the same pixels: transparent, half transparent, white, opaque and white."""
    chosen = np.array(disk())
    for alpha in (255 - chosen, np.where(chosen > 0, 100, 200)):
        mask = picture(mode="RGBA")
        mask.putalpha(Image.fromarray(alpha.astype(np.uint8)))
        yield mask
    yield Image.fromarray(chosen)
    yield Image.fromarray(chosen).convert("1")
    yield Image.fromarray(chosen).convert("RGBA")


@pytest.mark.parametrize("number", range(5))
def test_masks_of_all_kinds(pipe, number):
    mask = list(masks())[number]
    mask.save("mask.png")
    kept = {"image": picture(), "num_inference_steps": 1}
    [found] = pipe("a blue cat", mask="mask.png", **kept)
    [expected] = pipe("a blue cat", mask=disk(), **kept)
    assert np.array_equal(np.array(found), np.array(expected))


# --- reading ------------------------------------------------------------------------------------


def test_photos_are_upright_and_white_behind_and_that_is_noticed(pipe):
    photo = picture(mode="RGBA")
    photo.putalpha(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.transpose(Image.Transpose.ROTATE_90).save("photo.png", exif=exif)
    with pytest.warns(PictureWarning, match=r"photo\.png: transparent parts over white$"):
        [found] = pipe("a red apple", image="photo.png", strength=1e-6, num_inference_steps=50)
    [white] = pipe("a red apple", image=Image.new("RGB", SIZE[::-1], "white"), strength=1e-6,
                   num_inference_steps=50)  # fmt: skip
    assert np.array_equal(np.array(found), np.array(white))


def test_every_change_is_noticed_once(pipe):
    picture(100, 300).save("wide.png")
    for fits, words in (("crop", "cut"), ("pad", "padded with white"), ("stretch", "stretched")):
        with pytest.warns(PictureWarning) as found:
            pipe(
                "a red apple",
                image="wide.png",
                height=32,
                width=32,
                fit=fits,
                num_inference_steps=1,
            )
        [text] = [str(w.message) for w in found if w.category is PictureWarning]
        assert text == f"wide.png: {words} from 300x100 to 32x32 pixels"
    with warnings.catch_warnings():
        warnings.simplefilter("error", PictureWarning)
        pipe("a red apple", image=picture(), num_inference_steps=1)


def bomb():
    """A PNG whose header promises 30000 x 30000 pixels."""
    file = io.BytesIO()
    Image.new("L", (1, 1)).save(file, "png")
    data = bytearray(file.getvalue())
    data[16:24] = (30000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


def test_what_is_no_picture_is_one_line(capsys, tmp_path):
    picture().save("good.png")
    picture(16, 32).save("small.png")
    Path("bad.png").write_bytes(Path("good.png").read_bytes()[:60])
    Path("text.png").write_text("hello")
    Path("bomb.png").write_bytes(bomb())
    Path("folder.png").mkdir()
    os.mkfifo("pipe.png")
    Image.new("L", SIZE[::-1]).save("black.png")
    cases = {
        ("--image", "none.png"): "argument --image: no picture none.png",
        ("--image", "text.png"): "text.png: not a picture that can be read here",
        ("--image", "bomb.png"): "bomb.png: more than 178956970 pixels: make it smaller",
        ("--image", "folder.png"): "folder.png: Is a directory",
        ("--image", "pipe.png"): "pipe.png: it is a pipe, not a file",
        ("--image", "bad.png"): "bad.png: cannot be read",
        ("--image", "good.png", "0"): "strength must be above 0 and at most 1, not 0",
        ("--image", "good.png", "1.5"): "strength must be above 0 and at most 1, not 1.5",
        ("--image", "good.png", "a cat"): "a number expected, not 'a cat' (prompts go before it)",
        ("--image", "good.png", ".5", "a cat"): "'a cat' follows a file and its strength",
        ("--mask", "good.png"): "--mask is for --image: give the picture to start from",
        ("--fit", "pad"): "--fit is for --image: give the picture to start from",
        ("--force-size",): "--force-size is for --height and --width: give one of them",
        ("--trust-settings",): "--trust-settings is for --config-from-image: give a PNG, or leave",
        ("--image", "good.png", "--mask", "none.png"): "argument --mask: no picture none.png",
        ("--image", "good.png", "--mask", "small.png"): "the mask has 32x16 pixels and the picture "
        "64x32: both must have the same size",
        ("--image", "good.png", "--mask", "black.png"): "the mask selects nothing to redraw",
        ("--edit", "good.png"): "fluent cannot edit pictures: use a FLUX.2 klein model",
        ("--image", "good.png", "--fit", "cover"): "invalid choice: 'cover'",
    }
    for options, words in cases.items():
        with pytest.raises(SystemExit) as exit_:
            run_command(lambda options=options: main(["a cat", *options]))
        err = capsys.readouterr().err
        assert exit_.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1
        assert words in err, err
    with pytest.raises(UserError, match="a strength needs the picture"):
        DrawSettings("x", strength=0.5).resolved(MODEL)
    with pytest.raises(UserError, match="fit must be one of crop, pad, stretch, got 'cut'"):
        DrawSettings("x", fit="cut").resolved(MODEL)


# --- editing ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_language_model")
def test_editing(klein, tmp_path):
    """The numbers are compared with diffusers in tests/conversion/test_parity.py."""
    pipe = SnapGenPipeline.from_pretrained(klein)
    settings = {"height": 32, "width": 48, "seed": 1}
    plain, one, two = (
        np.array(pipe("a red car", edit=edit, **settings)[0])
        for edit in ((), (picture(64, 64),), (picture(64, 64), picture(80, 64, seed=1)))
    )
    assert not np.array_equal(plain, one) and not np.array_equal(one, two)
    assert DrawSettings("x", edit=(picture(90, 180),)).resolved(KLEIN_CONFIG).height == 720
    with pytest.raises(UserError, match="a picture of 64x63 pixels cannot be edited"):
        DrawSettings("x", edit=(picture(63, 64),)).resolved(KLEIN_CONFIG)
    picture(63, 64).save(tmp_path / "small.png")
    with pytest.raises(UserError, match=r"small\.png: a picture of 64x63 pixels cannot"):
        DrawSettings("x", edit=(picture(90, 180), tmp_path / "small.png")).resolved(KLEIN_CONFIG)
    with pytest.raises(UserError, match=r"no picture none\.png"):
        pipe.generate("x", edit=("none.png",))


@pytest.mark.usefixtures("no_language_model")
def test_the_encoder_does_not_stay_in_memory(klein):
    pipe = SnapGenPipeline.from_pretrained(klein)
    drawn = [pipe("a red car", height=32, width=48) for _ in range(2)]
    before = mx.get_active_memory()
    drawn.append(pipe("a red car", height=32, width=48, image=picture(32, 48)))
    stored = mx.load(str(klein / "autoencoder.safetensors"))
    encoder = sum(value.nbytes for key, value in stored.items() if key.startswith("encoder."))
    assert encoder > 10_000
    assert mx.get_active_memory() - before < encoder / 4
    assert not np.array_equal(*(np.array(pictures[0]) for pictures in drawn[1:]))


@pytest.mark.usefixtures("no_language_model")
def test_memory_counts_the_encoder_and_the_pictures_to_edit(klein, monkeypatch):
    folder = open_model(ModelChoice(str(klein)))
    sizes = measure_folder(folder)
    # It costs as much as decoding.
    assert sizes.peak(1024, 1024, encoded=1 << 20) == sizes.peak(1024, 1024)
    plain, encoded = sizes.peak(256, 256), sizes.peak(256, 256, encoded=1 << 20)
    assert 1 << 28 < encoded - plain < 1 << 30
    assert sizes.peak(256, 256, references=1 << 27) > plain
    memory = (plain + encoded) // 2
    monkeypatch.setattr("mlx_snapgen.teachers.memory.machine_memory", lambda: memory)
    pipe = SnapGenPipeline.from_pretrained(klein)
    small = {"height": 256, "width": 256}
    pipe.generate("a red car", image=picture(64, 64), **small)
    with pytest.raises(UserError, match="256 x 256 needs about"):
        pipe.generate("a red car", edit=(picture(1024, 1024),), **small)
    with pytest.raises(
        UserError, match=r"1024 x 1024 needs about .* choose [0-9]+ x [0-9]+ pixels"
    ):
        pipe.generate("a red car", image=picture(64, 64), height=1024, width=1024)


# --- metadata -----------------------------------------------------------------------------------


@pytest.fixture
def run(model_folder):
    def run(*arguments):
        return main([*arguments, "--model", str(model_folder), "--steps", "2"])

    return run


def test_a_picture_is_drawn_again_from_its_metadata(run, capsys):
    Path("in").mkdir()
    Path("out").mkdir()
    picture(40, 50).save("in/photo.png")
    disk(40, 50).save("in/mask.png")
    inputs = ["--image", "in/photo.png", "0.7", "--mask", "in/mask.png", "--fit", "stretch"]
    run("a red apple", *inputs, "--seed", "3", "-o", "out/a.png")
    assert "note: photo.png: stretched from 50x40 to" in capsys.readouterr().err
    values = read_metadata("out/a.png")
    assert values["image"] == {"name": "photo.png", "sha256": picture_hash("in/photo.png")}
    assert values["mask"] == {"name": "mask.png", "sha256": picture_hash("in/mask.png")}
    assert (values["strength"], values["fit"]) == (0.7, "stretch")
    settings = read_settings("out/a.png").settings
    assert (settings.image, settings.mask) == ("photo.png", "mask.png")
    again = ("--config-from-image", "out/a.png", "-o")
    with pytest.raises(UserError) as error:
        run(*again, "b.png")
    assert str(error.value) == (
        "out/a.png was drawn from photo.png, which is not here: give it with --image FILE STRENGTH"
    )
    expected = np.array(Image.open("out/a.png"))
    Path("in/photo.png").rename("out/photo.png")  # beside the picture
    Path("in/mask.png").rename("mask.png")  # in the current folder
    run(*again, "b.png")
    assert np.array_equal(np.array(Image.open("b.png")), expected)
    run(*again, "c.png", "--image", "out/photo.png")
    assert np.array_equal(np.array(Image.open("c.png")), expected)
    picture(40, 50, seed=1).save("out/photo.png")
    with pytest.raises(UserError, match=r"photo\.png, which has changed since: give it with"):
        run(*again, "d.png")
    run(*again, "d.png", "--image", "out/photo.png", "0.9")
    assert read_metadata("d.png")["strength"] == 0.9


def test_pictures_in_memory_have_the_hash_of_their_pixels(pipe):
    step = last(pipe.generate("a red apple", image=picture(), num_inference_steps=2))
    assert step.metadata["image"] == {"name": None, "sha256": picture_hash(picture())}
    assert picture_hash(picture()) != picture_hash(picture(seed=1))
    assert "mask" not in step.metadata and "edit" not in step.metadata
    plain = last(pipe.generate("a red apple", num_inference_steps=1)).metadata
    assert not {"image", "mask", "edit", "strength", "fit"} & plain.keys()


@pytest.mark.parametrize(
    "value",
    [
        {"name": "../x.png", "sha256": "0"},
        {"name": 3, "sha256": "0"},
        {"name": "x.png"},
        "x.png",
        {"name": "a\nb", "sha256": "0"},
        [{"name": "x.png", "sha256": "0"}],
    ],
)
def test_damaged_names_of_pictures_are_refused(pipe, value):
    metadata = last(pipe.generate("a red apple", num_inference_steps=1)).metadata
    path = save_picture(picture(), "x.png", metadata=metadata | {"image": value})
    with pytest.raises(UserError, match="has no usable 'image' in its settings"):
        read_settings(path)


def test_a_picture_without_a_name_is_asked_for(pipe):
    metadata = last(pipe.generate("a red apple", num_inference_steps=1)).metadata
    path = save_picture(picture(), "x.png", metadata=metadata | {"image": {"sha256": "0"}})
    with pytest.raises(UserError, match="from a picture that was never a file: give it with"):
        find_pictures(read_settings(path), path)
    assert find_pictures(read_settings(path), path, given=["image"]).image == ""


# --- interactive --------------------------------------------------------------------------------


def test_the_prompt_loop_takes_pictures(model_folder, monkeypatch, capsys):
    picture().save("my photo.png")
    disk().save("mask.png")
    lines = [
        ":image last .5",
        ":strength .5",
        "a red apple",
        ":image last .5",
        "a green apple",
        ":strength .75",
        ":image 'my photo.png'",
        ":mask mask.png",
        ":fit pad",
        "a blue apple",
        ":image",
        "an apple",
        ":image 'my photo.png",
    ]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    main(["-i", "--model", str(model_folder), "--steps", "2", "--seed", "1"])
    assert capsys.readouterr().err.splitlines() == [
        "error: no picture was drawn yet: give a file",
        "error: choose the picture first, such as :image photo.jpg 0.6",
        "error: cannot read 'my photo.png: No closing quotation",
    ]
    red, green, blue, plain = (
        read_metadata(f"{words}-apple.png") for words in ("a-red", "a-green", "a-blue", "an")
    )
    assert "image" not in red and "image" not in plain and "mask" not in plain
    assert green["image"]["name"] == "a-red-apple.png" and green["strength"] == 0.5
    assert blue["image"]["name"] == "my photo.png" and blue["mask"]["name"] == "mask.png"
    assert (blue["strength"], blue["fit"]) == (1.0, "pad")
