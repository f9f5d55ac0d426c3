"""A picture's file -> an upright picture in 8-bit sRGB, or one reason why not."""

import base64
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from mlx_snapgen import picture_files
from mlx_snapgen.alpha import straight
from mlx_snapgen.picture_files import CONVERTED, OVER_WHITE, SCALED, Unusable, decode, header_size
from tests.tiny import require

# An ICC profile with the primaries of Display P3 and the curve of sRGB.
WIDE = zlib.decompress(
    base64.b85decode(
        "c-muNV0@61oLkH!z`&53S5g$@?xYYA8KuDffPoPR!5}fYxWF+Wz=r`R_;wAV_OdPm>3}mOwKy3_e*of?<bt9S1_s"
        "6uAe*PWqyWTD0J24jfQ|yPOF-;&2)hHsPJ*!KfYpQqIRn`nfNX(u2>SqtodjWD0I{KVfdEH<v2IRgb}9q4K}l)_$"
        "ej!oKnw~?^e{q*HQ#4ou-*Uv|Nq?xF|Yj$3>(cE7`S#K#561z7zDW)7*6a=E-fm9TEoa>%)mg14*&~@KV<"
    )
)
ORIENTATION = 0x0112


def saved(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_a_wide_gamut_is_converted_to_srgb():
    image = Image.new("RGB", (8, 8), (60, 200, 60))
    assert decode(saved(image))[0].getpixel((1, 1)) == (60, 200, 60)
    found, notes = decode(saved(image, icc_profile=WIDE))
    assert notes == [CONVERTED]
    assert np.abs(np.subtract(found.getpixel((1, 1)), (0, 205, 0))).max() <= 1


def test_srgb_and_profiles_of_other_modes_change_nothing():
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8))
    for profile in (srgb, b"damaged"):
        found, notes = decode(saved(image, icc_profile=profile))
        assert (np.asarray(found) == np.asarray(image)).all() and notes == []
    gray = Image.new("L", (8, 8), 77)
    assert decode(saved(gray, icc_profile=WIDE))[0].getpixel((1, 1)) == (77, 77, 77)


@pytest.mark.parametrize("mode", ["RGBA", "P", "LA"])
def test_transparent_parts_keep_their_color_over_white(mode):
    image = Image.new("RGBA", (8, 8), (60, 200, 60, 255) if mode != "LA" else (77, 77, 77, 255))
    image.paste((0, 0, 0, 0), (0, 0, 4, 8))
    profile = {} if mode == "LA" else {"icc_profile": WIDE}
    found, notes = decode(saved(image.convert(mode), **profile))
    assert OVER_WHITE in notes and found.getpixel((1, 1)) == (255, 255, 255)
    right = (77, 77, 77) if mode == "LA" else (0, 205, 0)
    assert np.abs(np.subtract(found.getpixel((6, 1)), right)).max() <= 2


@pytest.mark.parametrize("mode", ["RGBA", "P", "LA"])
def test_an_opaque_picture_has_no_transparent_parts(mode):
    image = Image.new("RGBA", (8, 8), (77, 77, 77, 255))
    found, notes = decode(saved(image.convert(mode)))
    assert notes == [] and found.getpixel((1, 1)) == (77, 77, 77)
    image.putpixel((3, 3), (77, 77, 77, 254))
    assert decode(saved(image))[1] == [OVER_WHITE]


def test_depths_above_8_bits_are_scaled():
    deep = np.array([[0, 0x80FF, 0xFFFF]], np.uint16)
    found, notes = decode(saved(Image.fromarray(deep)))
    assert np.asarray(found)[0, :, 0].tolist() == [0, 128, 255] and notes == [SCALED]
    ramp = np.array([[0, 0.5, 1]], np.float32)
    found, notes = decode(saved(Image.fromarray(ramp), "TIFF"))
    assert np.asarray(found)[0, :, 1].tolist() == [0, 128, 255] and notes == [SCALED]
    with pytest.raises(Unusable) as error:
        decode(saved(Image.fromarray(ramp * 1000), "TIFF"))
    assert error.value.reason == "unknown range of values"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_header_size_is_that_of_the_upright_picture(kind, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = saved(Image.new("RGB", (60, 40)), kind, exif=exif)
    picture, _ = decode(data)
    assert header_size(data) == (picture.height, picture.width)
    assert header_size(data) == ((60, 40) if orientation > 4 else (40, 60))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_header_size_of_any_jpeg(mode, progressive):
    image = Image.new(mode, (61, 47))
    for options in ({}, {"icc_profile": WIDE}, {"comment": b"x" * 300}, {"dpi": (72, 72)}):
        data = saved(image, "JPEG", progressive=progressive, **options)
        assert header_size(data) == (47, 61)
        for cut in range(3, 60, 7):  # the size is behind
            with pytest.raises(Unusable):
                header_size(data[:cut])


def test_the_start_of_a_file_is_enough_for_its_size():
    noise = np.random.default_rng(0).integers(0, 255, (300, 200, 3), np.uint8)
    for kind in ("PNG", "JPEG"):
        assert header_size(saved(Image.fromarray(noise), kind)[:2000]) == (300, 200)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_each_kind_of_fault_has_its_reason(monkeypatch):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 90, 3), np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)
    faults = {
        "damaged picture": saved(noise.crop((0, 0, 60, 60)), "JPEG")[:1500],
        "not a picture that can be read": b"no picture",
        "too many pixels": saved(Image.new("RGB", (101, 100))),
    }
    for reason, data in faults.items():
        with pytest.raises(Unusable) as error:
            decode(data)
        assert error.value.reason == reason and "\n" not in error.value.detail
    assert decode(saved(Image.new("RGB", (90, 90))))[0].size == (90, 90)
    with pytest.raises(Unusable):
        header_size(faults["too many pixels"])


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_small_file_does_not_fill_the_memory():
    """A GIF needs no data for a picture of the size in its header."""
    gif = bytearray(saved(Image.new("P", (8, 8)), "GIF"))
    gif[6:10] = struct.pack("<HH", 12000, 12000)
    with pytest.raises(Unusable, match=f"12000x12000 pixels in {len(gif)} bytes") as error:
        decode(bytes(gif))
    assert error.value.reason == "damaged picture"
    plain = decode(saved(Image.new("1", (8000, 4100)), "PNG"))[0]
    assert plain.size == (8000, 4100)


def heic(image, **options):
    require("pillow_heif")
    import pillow_heif

    pillow_heif.register_heif_opener()
    return saved(image, "HEIF", quality=100, **options)


def test_photos_of_iphones_are_read():
    left = Image.new("RGB", (64, 48), (60, 200, 60))
    left.paste((200, 60, 60), (32, 0, 64, 48))
    data = heic(left, icc_profile=WIDE)
    found, notes = decode(data)
    assert found.size == (64, 48) and notes == [CONVERTED]
    assert header_size(data) == (48, 64)
    assert np.abs(np.subtract(found.getpixel((4, 4)), (0, 205, 0))).max() <= 8
    with pytest.raises(Unusable) as error:
        decode(data[:-40])
    assert "\n" not in error.value.detail


def test_a_photo_of_an_iphone_names_the_package_that_reads_it(monkeypatch):
    monkeypatch.setattr(picture_files, "has_heif_reader", lambda: False)
    for read in (decode, header_size):
        with pytest.raises(Unusable, match="run pip install pillow-heif"):
            read(b"\0\0\0\x1cftypheic\0\0\0\0mif1heicmiaf" + bytes(99))
    # Its sequel with another codec, which Pillow may read itself.
    with pytest.raises(Unusable, match="not a picture that can be read"):
        decode(b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf" + bytes(99))


def test_alpha_near_its_ends_is_put_there_and_colors_are_divided_by_it():
    alpha = np.array([0, 4, 5, 128, 246, 247, 255], np.uint8)
    picture = np.stack([alpha // 2, alpha, alpha * 0, alpha], axis=-1)[None]
    file = straight(picture)[0]
    assert file[:, 3].tolist() == [0, 0, 5, 128, 246, 255, 255]
    assert file[3].tolist() == [128, 255, 0, 128] and file[1].tolist() == [0, 0, 0, 0]
