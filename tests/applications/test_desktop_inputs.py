"""Pictures to start from in the window: chosen, painted on, stored, and found again."""

import io
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from apps.desktop import system
from apps.desktop.inputs import Inputs
from apps.desktop.settings import MAX_INPUTS, Settings, load_settings, save_settings
from mlx_snapgen.errors import UserError
from mlx_snapgen.fitting import fitted_mask
from mlx_snapgen.metadata import encode_png, read_metadata, read_settings, save_picture
from mlx_snapgen.picture_files import picture_hash, read_picture
from mlx_snapgen.settings import DrawSettings
from mlx_snapgen.teachers.config import TeacherConfig
from tests.applications.windows import assert_fits, click, drawn, set_form, two_pictures
from tests.tiny import FLUX2, FLUX2_AUTOENCODER, TEACHER

KLEIN = TeacherConfig(kind="flux2", transformer=FLUX2, autoencoder=FLUX2_AUTOENCODER)


@pytest.fixture
def photo(tmp_path):
    """A smooth picture of the tiny model's size, 64 x 32."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (32, 64, 3), dtype=np.uint8))
    path = tmp_path / "photo.png"
    noise.filter(ImageFilter.GaussianBlur(3)).save(path)
    return str(path)


@pytest.fixture
def start(window, components):
    """The page, empty, of the tiny model."""
    window.form.adopt(components.config, forget=True)
    set_form(window)
    window.banner.hide()
    return window.form.start


# --- files --------------------------------------------------------------------------------------


def test_pictures_survive_in_the_settings(tmp_path):
    draw = DrawSettings("a", image="/a/b.png", mask="/m.png", strength=0.4, fit="pad", edit=("/c",))
    settings = Settings(draw=draw).with_inputs(["/a/b.png", "/m.png"])
    save_settings(tmp_path / "settings.json", settings)
    assert load_settings(tmp_path / "settings.json") == (settings, None)
    many = settings.with_inputs([f"/{i}" for i in range(60)]).with_inputs(["/3"])
    assert many.recent_inputs[:2] == ("/3", "/0") and len(many.recent_inputs) == MAX_INPUTS


@pytest.mark.parametrize("size", [(64, 32), (2000, 1501)])
def test_a_stored_mask_selects_what_was_painted(tmp_path, size):
    painted = Image.new("L", (64, 32))
    painted.paste(255, (8, 4, 40, 20))
    path = Inputs(tmp_path).keep_mask(painted, size)
    found = fitted_mask(path, size[::-1], how="crop")
    assert np.array_equal(found, np.array(painted.resize(size, Image.Resampling.NEAREST)) > 0)
    with Image.open(path) as image:
        assert image.convert("LA").getextrema()[1] == (0, 255)


def test_the_folder_keeps_the_newest(tmp_path):
    inputs = Inputs(tmp_path / "inputs", limit=2)
    paths = []
    for shade in range(3):
        image = Image.new("RGB", (8, 8), (shade, 0, 0))
        paths.append(inputs.keep_picture(image, "pasted"))
        os.utime(paths[-1], (shade, shade))
        if shade == 1:
            assert inputs.keep_picture(Image.new("RGB", (8, 8)), "pasted") == paths[0]
    assert [os.path.exists(path) for path in paths] == [True, False, True]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        Inputs(tmp_path / "file").keep_picture(image, "pasted")


def test_recorded_pictures_are_found_by_name_and_hash(tmp_path, photo):
    def recorded(name, sha):
        recorded = read_settings(png)
        return recorded._replace(values=recorded.values | {"image": {"name": name, "sha256": sha}})

    png = tmp_path / "drawn.png"
    values = dict.fromkeys(("negative_prompt", "prompt"), "") | {"mlx_snapgen": "1", "seed": 0}
    values |= {"num_inference_steps": 1, "guidance_scale": 1.0, "height": 32, "width": 64}
    values |= {"model": None, "revision": None, "model_width": "full", "quantize": None}
    values |= {"strength": 0.5}
    png.write_bytes(encode_png(Image.new("RGB", (8, 8)), values))
    elsewhere = tmp_path / "elsewhere" / "photo.png"
    elsewhere.parent.mkdir()
    os.rename(photo, elsewhere)
    inputs, sha = Inputs(tmp_path / "inputs"), picture_hash(elsewhere)
    draw, notice = inputs.found(recorded("photo.png", sha), png, known=[str(elsewhere)])
    assert (draw.image, draw.strength, notice) == (str(elsewhere), 0.5, "")
    for name, hashed in (("photo.png", "0" * 64), ("other.png", sha), (None, sha)):
        draw, notice = inputs.found(recorded(name, hashed), png, known=[str(elsewhere)])
        assert (draw.image, draw.strength) == (None, None)
        assert (name or "never a file") in notice and "not found" in notice


@pytest.mark.skipif(sys.platform == "darwin", reason="a Mac has its own clipboard")
def test_the_clipboard_gives_pictures_and_files(tmp_path, monkeypatch, photo):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    with pytest.raises(UserError, match="needs xclip"):
        system.pasted_picture()
    script = tmp_path / "xclip"
    for answer, found in (
        (f'image/png) /bin/cat "{photo}";;', read_picture(photo)[0]),
        ("text/uri-list) echo 'file:///a%20b/c.png';;", Path("/a b/c.png")),
        ("text/uri-list) echo 'https://example.com/a.png';;", None),
        ("none) ;;", None),
    ):
        script.write_text(f'#!/bin/sh\ncase "$5" in {answer} *) exit 1;; esac\n')
        script.chmod(0o755)
        assert system.pasted_picture() == found
    script.write_text("#!/bin/sh\necho no picture\n")
    with pytest.raises(UserError, match="clipboard cannot be read"):
        system.pasted_picture()


# --- the page -----------------------------------------------------------------------------------


def stroke(window, *points, button=1):
    """Drag over the picture that is painted on; points are shares of its sides."""
    painter = window.painter
    left, top = painter._corner()
    width, height = painter._base.size
    canvas = painter._canvas
    places = [{"x": int(left + x * width), "y": int(top + y * height)} for x, y in points]
    canvas.event_generate(f"<Button-{button}>", **places[0])
    for place in places[1:]:
        canvas.event_generate(f"<B{button}-Motion>", **place)
    canvas.event_generate(f"<ButtonRelease-{button}>", **places[-1])
    window.update()


def paint(window, *strokes):
    window.form.start.paint_button.invoke()
    window.update()
    for points in strokes:
        stroke(window, *points)


def draw_of(window):
    return window.form.read(window.settings).draw


def test_nothing_is_offered_without_a_picture(start):
    assert start.slider.entry.instate(["disabled"])
    buttons = (start.paint_button, start.open_mask_button, start.remove_button)
    assert all(button.instate(["disabled"]) for button in buttons)
    assert start.read() == {
        "image": None,
        "mask": None,
        "strength": None,
        "fit": "crop",
        "edit": (),
    }


def test_a_picture_is_drawn_over_and_restored(window, start, photo):
    window.form.start_from(photo)
    assert window.form.index("current") == 1
    assert window.form.tab(1, "text") == "Start from ●"
    assert start.slider.entry.instate(["!disabled"])
    start.strength.set("0,5")
    start.fit.set("pad")
    window.form.steps.set("4")
    before = draw_of(window)
    assert (before.image, before.strength, before.fit) == (photo, 0.5, "pad")
    # The picture is enough without a prompt.
    window.form.prompt.delete("1.0", "end")
    window.generate()
    entry = drawn(window)
    assert window.banner.message == ""
    values = read_metadata(entry.path)
    assert values["image"] == {"name": "photo.png", "sha256": picture_hash(photo)}
    assert (values["strength"], values["fit"], values["prompt"]) == (0.5, "pad", "")
    set_form(window)
    assert draw_of(window).image is None and window.form.tab(1, "text") == "Start from"
    window.pictures.use_settings()
    restored = draw_of(window)
    assert (restored.image, restored.strength, restored.fit) == (photo, 0.5, "pad")
    os.unlink(photo)
    set_form(window)
    window.pictures.use_settings()
    assert draw_of(window).image is None
    assert "photo.png, not found" in window.banner.message
    # Another's picture may be larger than the window draws unasked.
    set_form(window, height=32, width=64, num_inference_steps=2)
    large = entry.path.with_name("large.png")
    save_picture(Image.new("RGB", (8, 8)), large, metadata=values | {"height": 4096, "width": 2048})
    window.pictures.open_picture(large)
    restored = draw_of(window)
    assert (restored.height, restored.width, restored.num_inference_steps) == (32, 64, 4)
    assert "2048 x 4096 is more than 4 megapixels: the form keeps its size" in window.banner.message


def test_only_painted_parts_are_redrawn(window, start, photo):
    window.form.start_from(photo)
    window.form.steps.set("2")
    paint(window, [(0.1, 0.2), (0.3, 0.2)])
    assert window.painter.winfo_ismapped()
    # Generating takes the mask over, without Done.
    window.generate()
    assert not window.painter.is_open
    draw = draw_of(window)
    assert draw.strength == 1 and Path(draw.mask).parent == window.inputs.folder
    entry = drawn(window)
    redrawn = fitted_mask(draw.mask, (32, 64), how="crop")
    assert redrawn[6, 12] and not redrawn[28, 60] and 0.02 < redrawn.mean() < 0.6
    with Image.open(entry.path) as image:
        after = np.array(image)
    assert np.array_equal(after[~redrawn], np.array(read_picture(photo)[0])[~redrawn])
    assert not np.array_equal(after, np.array(read_picture(photo)[0]))
    set_form(window)
    window.pictures.use_settings()
    assert (draw_of(window).image, draw_of(window).mask) == (photo, draw.mask)


def test_brush_eraser_undo_clear_and_invert(window, start, photo):
    window.form.start_from(photo)
    painter = window.painter
    paint(window, [(0.5, 0.5)])
    dot = np.array(painter.mask)
    assert dot[16, 32] == 255 and dot[0, 0] == 0
    stroke(window, (0.1, 0.1), (0.9, 0.1))
    painter._canvas.event_generate("<<Undo>>")
    assert np.array_equal(np.array(painter.mask), dot)
    painter.invert()
    assert np.array_equal(np.array(painter.mask), 255 - dot)
    painter.tool.set("eraser")
    stroke(window, (0.1, 0.1))
    assert painter.mask.getpixel((6, 3)) == 0
    painter.tool.set("brush")
    stroke(window, (0.9, 0.9), button=3)
    assert painter.mask.getpixel((57, 28)) == 0
    size = painter.brush.get()
    painter._canvas.focus_force()
    painter._canvas.event_generate("<bracketright>")
    assert painter.brush.get() > size
    painter.clear()
    painter._canvas.event_generate("<Escape>")
    window.update()
    assert not painter.is_open
    assert start.mask is None and start.strength.get() == "0.6"
    # A stroke out of the picture paints nothing.
    paint(window, [(-5, -5)])
    window.pictures.stop_painting()
    assert start.mask is None


def test_a_mask_belongs_to_its_picture(window, start, photo, tmp_path):
    window.form.start_from(photo)
    paint(window, [(0.5, 0.5)])
    window.pictures.stop_painting()
    assert start.mask is not None and start.strength.get() == "1"
    assert "%" in start._share.cget("text")
    other = tmp_path / "other.png"
    Image.new("RGB", (80, 80), "red").save(other)
    window.form.start.paint_button.invoke()
    stroke(window, (0.2, 0.2))
    window.form.start_from(str(other))
    assert start.mask is None and start.strength.get() == "0.6" and not window.painter.is_open
    # A strength that was chosen stays.
    start.strength.set("0.8")
    start.set_mask(photo)
    assert window.banner.message.startswith("The mask has 64x32 pixels and the picture 80x80")
    start.set_mask(str(other))
    assert window.banner.message.startswith("The mask selects nothing")
    assert (start.mask, start.strength.get()) == (None, "0.8")
    white = tmp_path / "white.png"
    Image.new("L", (80, 80), 255).save(white)
    start.set_mask(str(white))
    assert (start.mask, start.strength.get()) == (str(white), "0.8")
    start.remove_button.invoke()
    assert (start.image, start.mask) == (None, None)


def test_the_pictures_of_the_history_are_used(window, start):
    older, newer = two_pictures(window)
    click(window, 1)
    window.picture_menu.invoke("Use This Picture")
    assert picture_hash(start.image) == picture_hash(older.path)
    # A copy: the history deletes its oldest pictures.
    assert Path(start.image).parent == window.inputs.folder
    click(window, 0)
    window.focus_force()
    window.update()
    window.event_generate("<Control-i>")
    window.update()
    assert picture_hash(start.image) == picture_hash(newer.path)
    window.form.select(0)
    window.update()
    before = window.form.prompt.get("1.0", "end")
    window.form.prompt.focus_force()
    window.form.prompt.event_generate("<Control-i>")
    assert window.form.prompt.get("1.0", "end") == before


def test_pictures_are_pasted(window, start, photo, monkeypatch):
    window.selection_clear(selection="CLIPBOARD")  # an earlier test may have copied text
    for pasted in (read_picture(photo)[0], Path(photo)):
        start.remove()
        monkeypatch.setattr(system, "pasted_picture", lambda pasted=pasted: pasted)
        window.focus_force()
        window.update()
        window.event_generate("<Control-V>")
        window.update()
        assert np.array_equal(np.array(start.picture), np.array(read_picture(photo)[0]))
    monkeypatch.setattr(system, "pasted_picture", lambda: None)
    window.pictures.paste()
    assert window.banner.message == "The clipboard has no picture: copy one first"
    # Text that the window itself copied.
    monkeypatch.setattr(system, "pasted_picture", lambda: 1 / 0)
    window.clipboard_clear()
    window.clipboard_append("text")
    window.pictures.paste()
    assert window.banner.message == "The clipboard has no picture: copy one first"


def test_files_are_dropped(window, start, photo, monkeypatch):
    """With a stand-in for the package, which has the same two entries."""
    tcl = "namespace eval tkdnd {}; proc tkdnd::drop_target {how path types} {set ::at $path}"
    stub = SimpleNamespace(_require=lambda root: root.tk.eval(tcl))
    monkeypatch.setitem(sys.modules, "tkinterdnd2", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "tkinterdnd2.TkinterDnD", stub)
    dropped = []
    assert system.accept_drops(window, dropped.append)
    assert window.tk.eval("set ::at") == "."
    script = window.tk.call("bind", ".", "<<Drop:DND_Files>>")
    for data, files in (("{/a b.png} /c.png", [Path("/a b.png")]), ("", [])):
        dropped.clear()
        assert window.tk.eval(script.replace("%D", f"{{{data}}}")) == "copy"
        window.update()
        assert dropped == files
    window.tk.call("bind", ".", "<<Drop:DND_Files>>", "")
    monkeypatch.setattr(stub, "_require", lambda _: (_ for _ in ()).throw(RuntimeError("none")))
    assert not system.accept_drops(window, dropped.append)


def test_a_missing_file_is_told(window, start, photo, tmp_path):
    set_form(window, image=str(tmp_path / "gone.png"), mask=str(tmp_path / "mask.png"))
    texts = [start.well.itemcget(item, "text") for item in start.well.find_all()[1:]]
    assert texts == ["Not found:\ngone.png"]
    assert start.paint_button.instate(["disabled"])
    assert draw_of(window).image == str(tmp_path / "gone.png")
    window.generate()
    drawn(window)
    assert window.banner.message == f"No picture {tmp_path / 'gone.png'}"
    (tmp_path / "broken.png").write_text("no picture")
    assert not start.set_picture(str(tmp_path / "broken.png"))
    assert "broken.png" in window.banner.message
    start.strength.set("much")
    window.generate()
    assert window.banner.message == "The strength must be a number, not 'much'"
    start.strength.set("2")
    start.set_picture(photo)
    window.generate()
    drawn(window)
    assert window.banner.message.startswith("Strength must be above 0")


def test_a_photo_is_shown_upright(start, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 40), "red").save(tmp_path / "turned.jpg", exif=exif)
    start.set_picture(str(tmp_path / "turned.jpg"))
    assert start.size == (40, 60) and start.picture.size == (40, 60)
    assert start._name.cget("text") == "turned.jpg · 40 × 60"  # noqa: RUF001


def test_pictures_are_edited_only_by_models_that_can(window, start, photo, tmp_path, components):
    large = tmp_path / "large.png"
    Image.new("RGB", (300, 200), "red").save(large)
    window.form.select(1)
    window.update()
    assert not start._edit_frame.winfo_ismapped()
    window.strip.select(None)
    window.pictures.edit_picture()
    assert start.edit == []
    window.form.adopt(KLEIN, forget=True)
    window.update()
    assert start._edit_frame.winfo_ismapped()
    window.form.edit_picture(str(large))
    # klein draws all sizes: it is the picture's.
    assert window.form.size.get() == "1248 × 832"  # noqa: RUF001
    assert draw_of(window).edit == (str(large),)
    assert window.form.effective(draw_of(window)).edit == (str(large),)
    assert not start.add_edit(photo)
    assert "cannot be edited" in window.banner.message
    window.form.adopt(components.config, forget=True)
    assert not start._edit_frame.winfo_manager()
    assert window.form.effective(draw_of(window)).edit == ()
    assert window.form.tab(1, "text") == "Start from"


def test_sizes_like_the_picture_are_offered(window, start, tmp_path, components):
    path = tmp_path / "wide.png"
    Image.new("RGB", (400, 100)).save(path)
    own = window.form.size.get()
    window.form.start_from(str(path))
    assert window.form.size.get() == own
    first = window.form._size_field.cget("values")[0]
    assert str(first).startswith("Like the picture: ")
    start.remove()
    window.form.adopt(replace(TEACHER), forget=True)
    window.form.start_from(str(path))
    width, height = map(int, window.form.size.get().split(" × "))  # noqa: RUF001
    assert width / height == pytest.approx(4, rel=0.05)
    assert width * height == pytest.approx(1024**2, rel=0.1)
    # As many pixels as before.
    window.form.size.set("512 × 512")  # noqa: RUF001
    start.remove()
    window.form.start_from(str(path))
    width, height = map(int, window.form.size.get().split(" × "))  # noqa: RUF001
    assert width * height == pytest.approx(512**2, rel=0.1)
    # Another model takes its own number of them.
    window.form.adopt(KLEIN, forget=True)
    assert window.form.size.get() == "2048 × 512"  # noqa: RUF001
    trained = replace(components.config, trained_sizes=((32, 64), (64, 64), (32, 96)))
    window.form.adopt(trained, forget=True)
    assert window.form.size.get() == "96 × 32"  # noqa: RUF001
    # Opening settings keeps their size.
    set_form(window, height=64, width=64, image=str(path))
    assert window.form.size.get() == "64 × 64"  # noqa: RUF001


def test_a_small_screen_shows_the_page_with_a_picture(window, start, photo):
    window.geometry("800x570+0+0")
    window.form.start_from(photo)
    paint(window, [(0.5, 0.5)])
    for _ in range(2):
        for _ in range(20):
            window.update()
            time.sleep(0.005)
        assert_fits(window, window.form.tabs()[1])
        window.pictures.stop_painting()
    assert start.mask is not None


def test_a_large_picture_is_stored_small(start, tmp_path):
    path = tmp_path / "large.png"
    Image.new("RGB", (4000, 3000), "red").save(path)
    start.set_picture(str(path))
    assert start.size == (4000, 3000) and max(start.picture.size) == 2048
    start.keep_mask(Image.new("L", (1024, 768), 255))
    with Image.open(io.BytesIO(Path(start.mask).read_bytes())) as mask:
        assert mask.size == (4000, 3000)
    assert os.path.getsize(start.mask) < 20_000
