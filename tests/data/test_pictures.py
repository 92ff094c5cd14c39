"""The same picture in every mode, depth and format gives nearly the same pixels; broken and hostile files a reason."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image

from distrec.data import pictures
from distrec.data.pictures import Undecodable, open_picture, shrunk

DICE = np.random.default_rng(4)
Y, X = np.mgrid[0:48, 0:64]
DISC = (X - 32) ** 2 + (Y - 24) ** 2 < 400
# 64 colours, so that palettes hold them, in blocks of 8 x 8 pixels, which JPEG keeps
COLOUR = np.kron(DICE.integers(0, 256, (64, 3))[DICE.integers(0, 64, (6, 8))], np.ones((8, 8, 1))).astype(np.uint8)
GREY = np.kron(DICE.choice([20, 60, 90, 140, 190, 250], (6, 8)), np.ones((8, 8))).astype(np.uint8)
ON_WHITE = np.where(DISC[..., None], COLOUR, 255).astype(np.uint8)
GREY_ON_WHITE = np.where(DISC, GREY, 255).astype(np.uint8)
HIDDEN = np.where(DISC[..., None], COLOUR, (0, 90, 0)).astype(np.uint8)  # a dark green that nobody should see
ALPHA = np.where(DISC, 255, 0).astype(np.uint8)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def png(width: int, height: int, depth: int, colour: int, rows: bytes = b"", *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG file by hand: `rows` are packed samples, `chunks` come before the pixels."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    step = len(rows) // height
    pixels = b"".join(b"\0" + rows[start : start + step] for start in range(0, len(rows), step or 1))
    out = b"\x89PNG\r\n\x1a\n"
    for name, data in [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(pixels)), (b"IEND", b"")]:
        out += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    return out


def palette(pixels: np.ndarray) -> Image.Image:
    """256 colours, of which 255 is kept for transparent pixels."""
    image = Image.fromarray(pixels).quantize(255, dither=Image.Dither.NONE)
    at = np.asarray(image).copy()
    at[~DISC] = 255
    out = Image.frombytes("P", image.size, at.tobytes())
    out.putpalette((image.getpalette() or [])[:765] + [0] * (765 - 3 * len(image.getcolors() or ())) + [0, 90, 0])
    return out


def grey_tiff(values: np.ndarray, **tags: int) -> bytes:
    """A TIFF file by hand: one strip of 16- or 32-bit grey values."""
    fields = {
        256: values.shape[1], 257: values.shape[0], 258: 8 * values.itemsize, 259: 1, 262: 1, 273: 0, 277: 1,
        278: values.shape[0], 279: values.nbytes, **{int(tag[1:]): value for tag, value in tags.items()},
    }  # fmt: skip
    fields[273] = 8 + 2 + 12 * len(fields) + 4
    body = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(fields.items()))
    return b"II*\0" + struct.pack("<IH", 8, len(fields)) + body + b"\0" * 4 + values.tobytes()


def exif(orientation: int) -> Image.Exif:
    block = Image.Exif()
    block[0x0112] = orientation
    return block


def rgba(pixels: np.ndarray, alpha: np.ndarray, mode: str = "RGBA") -> Image.Image:
    return Image.merge(mode, [*Image.fromarray(pixels).split(), Image.fromarray(alpha)])


WIDE = GREY.astype(np.uint16) * 257
SAME: dict[str, tuple[np.ndarray, Callable[[], bytes]]] = {
    "RGB jpeg": (COLOUR, lambda: saved(Image.fromarray(COLOUR), "JPEG", quality=97, subsampling=0)),
    "RGB webp": (COLOUR, lambda: saved(Image.fromarray(COLOUR), "WEBP", lossless=True)),
    "L": (GREY, lambda: saved(Image.fromarray(GREY), "PNG")),
    "1": (255 * (GREY > 99).astype(np.uint8), lambda: saved(Image.fromarray(GREY > 99), "PNG")),
    "I;16 png": (GREY, lambda: saved(Image.fromarray(WIDE), "PNG")),
    "I;16 jpeg 2000": (GREY, lambda: saved(Image.fromarray(WIDE), "JPEG2000")),
    "I;16 tiff": (GREY, lambda: saved(Image.fromarray(WIDE), "TIFF")),
    "I;16 tiff, white is zero": (GREY, lambda: grey_tiff(65_535 - WIDE, t262=0)),
    "I;16 tiff, lzw": (GREY, lambda: saved(Image.fromarray(WIDE), "TIFF", compression="tiff_lzw")),
    "I;16B": (GREY, lambda: saved(Image.frombytes("I;16B", (64, 48), WIDE.astype(">u2").tobytes()), "TIFF")),
    "I, 16 bits": (GREY, lambda: saved(Image.fromarray(WIDE.astype(np.int32)), "TIFF")),
    "I, 8 bits": (GREY, lambda: saved(Image.fromarray(GREY.astype(np.int32)), "TIFF")),
    "I, signed 16 bits": (GREY, lambda: grey_tiff((GREY * 128.5).astype(np.int16), t339=2)),
    "I, unsigned 32 bits": (
        (GREY.astype(float) - GREY.min()) / np.ptp(GREY) * 255,
        lambda: grey_tiff(GREY.astype(np.uint32) * 16_843_009),
    ),
    "I, pgm": (GREY, lambda: b"P5 64 48 65535\n" + WIDE.astype(">u2").tobytes()),
    "I, pgm of 10 bits": (GREY, lambda: b"P5 64 48 1023\n" + (GREY * 4.0118).astype(">u2").tobytes()),
    "F, 0 to 1": (GREY, lambda: saved(Image.fromarray(np.float32(GREY / 255)), "TIFF")),
    "F, 0 to 255": (GREY, lambda: saved(Image.fromarray(GREY.astype(np.float32)), "TIFF")),
    "F, 0 to 65535": (GREY, lambda: saved(Image.fromarray(WIDE.astype(np.float32)), "TIFF")),
    "LA": (GREY_ON_WHITE, lambda: saved(rgba(np.where(DISC, GREY, 7).astype(np.uint8), ALPHA, "LA"), "PNG")),
    "LA tiff": (GREY_ON_WHITE, lambda: saved(rgba(GREY, ALPHA, "LA"), "TIFF")),
    "La": (GREY_ON_WHITE, lambda: saved(rgba(GREY, ALPHA, "LA"), "TIFF").replace(
        struct.pack("<HHIHH", 338, 3, 1, 2, 0), struct.pack("<HHIHH", 338, 3, 1, 1, 0)
    ).replace(np.dstack([GREY, ALPHA]).tobytes(), np.dstack([GREY * DISC, ALPHA]).tobytes())),
    "RGBA png": (ON_WHITE, lambda: saved(rgba(HIDDEN, ALPHA), "PNG")),
    "RGBA webp": (ON_WHITE, lambda: saved(rgba(HIDDEN, ALPHA), "WEBP", lossless=True, exact=True)),
    "RGBA ico": (ON_WHITE, lambda: saved(rgba(HIDDEN, ALPHA), "ICO", sizes=[(64, 48)])),
    "RGBA 16 bits": (ON_WHITE, lambda: png(64, 48, 16, 6, (
        np.dstack([HIDDEN, ALPHA]).astype(">u2") * 257).astype(">u2").tobytes())),
    "LA 16 bits": (GREY_ON_WHITE, lambda: png(64, 48, 16, 4, (
        np.dstack([GREY, ALPHA]).astype(">u2") * 257).astype(">u2").tobytes())),
    "RGB 16 bits": (COLOUR, lambda: png(64, 48, 16, 2, (COLOUR.astype(">u2") * 257).astype(">u2").tobytes())),
    "RGB with a key": (ON_WHITE, lambda: saved(Image.fromarray(HIDDEN), "PNG", transparency=(0, 90, 0))),
    "RGB 16 bits with a key": (ON_WHITE, lambda: png(
        64, 48, 16, 2, (HIDDEN.astype(">u2") * 257).astype(">u2").tobytes(),
        (b"tRNS", struct.pack(">HHH", 0, 90 * 257, 0)))),
    "L with a key": (np.where(GREY == 60, 255, GREY), lambda: saved(Image.fromarray(GREY), "PNG", transparency=60)),
    "L 4 bits with a key": (
        np.where(GREY // 16 == 5, 255, GREY // 16 * 17),
        lambda: png(64, 48, 4, 0, (GREY[:, ::2] // 16 * 16 + GREY[:, 1::2] // 16).tobytes(), (b"tRNS", b"\0\5")),
    ),
    "I;16 with a key": (
        np.where(GREY == 60, 255, GREY),
        lambda: png(64, 48, 16, 0, WIDE.astype(">u2").tobytes(), (b"tRNS", struct.pack(">H", 60 * 257))),
    ),
    "1 with a key": (np.full_like(GREY, 255), lambda: saved(Image.fromarray(GREY > 99), "PNG", transparency=0)),
    "P": (ON_WHITE, lambda: saved(Image.fromarray(ON_WHITE).quantize(256), "PNG")),
    "P with a clear colour": (ON_WHITE, lambda: saved(palette(COLOUR), "PNG", transparency=255)),
    "P with alpha": (ON_WHITE, lambda: saved(palette(COLOUR), "PNG", transparency=b"\xff" * 255 + b"\0")),
    "P gif": (ON_WHITE, lambda: saved(palette(COLOUR), "GIF", transparency=255)),
    "animated gif": (ON_WHITE, lambda: saved(
        palette(COLOUR), "GIF", transparency=255, save_all=True, append_images=[Image.new("P", (64, 48), 3)])),
    "animated webp": (COLOUR, lambda: saved(
        Image.fromarray(COLOUR), "WEBP", lossless=True, save_all=True, append_images=[Image.new("RGB", (64, 48))])),
    "PA": (ON_WHITE, lambda: saved(
        Image.merge("PA", [Image.fromarray(HIDDEN).quantize(256), Image.fromarray(ALPHA)]), "TIFF")),
    "CMYK tiff": (COLOUR, lambda: saved(Image.fromarray(COLOUR).convert("CMYK"), "TIFF")),
    "CMYK jpeg, inverted by Adobe": (COLOUR, lambda: saved(
        Image.fromarray(COLOUR).convert("CMYK"), "JPEG", quality=97, subsampling=0)),
    "YCbCr": (COLOUR, lambda: saved(Image.fromarray(COLOUR).convert("YCbCr"), "TIFF")),
    "LAB": (COLOUR, lambda: saved(Image.fromarray(COLOUR).convert("LAB"), "TIFF")),
    "broken EXIF": (COLOUR, lambda: saved(
        Image.fromarray(COLOUR), "JPEG", quality=97, subsampling=0, exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")),
    "EXIF without an end": (COLOUR, lambda: saved(
        Image.fromarray(COLOUR), "PNG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x09\x01\x12")),
    "unknown orientation": (COLOUR, lambda: saved(Image.fromarray(COLOUR), "PNG", exif=exif(77))),
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_the_same_picture_gives_the_same_pixels(name: str) -> None:
    wanted, data = SAME[name]
    wanted = wanted if wanted.ndim == 3 else np.dstack([wanted] * 3)
    found = open_picture(data())
    assert (found.mode, found.size) == ("RGB", (64, 48))
    assert np.abs(np.asarray(found, float) - wanted).mean() < 2.5, name


@pytest.mark.parametrize("mode", ["HSV", "LAB", "YCbCr", "CMYK", "RGBa", "La", "LA", "PA", "RGBX", "P", "1", "L", "F"])
def test_every_mode_of_pillow_has_a_conversion(mode: str) -> None:
    source = {"La": "LA", "RGBa": "RGBA", "PA": "RGBA"}.get(mode, "RGB")
    found = pictures._as_rgb(Image.fromarray(COLOUR).convert(source).convert(mode), "")
    assert found.mode == "RGB"
    grey = mode in ("La", "LA", "1", "L", "F")
    wanted = np.dstack([Image.fromarray(COLOUR).convert("L")] * 3) if grey else COLOUR
    assert np.abs(np.asarray(found, float) - wanted).mean() < {"P": 25, "PA": 25, "1": 130}.get(mode, 2.5)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_upright(kind: str, orientation: int) -> None:
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # orientation -> the transposition that it asks to undo
    image = Image.fromarray(COLOUR)
    if orientation in back:
        image = image.transpose(Image.Transpose(back[orientation]))
    options = {"JPEG": {"quality": 97, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    found = open_picture(saved(image, kind, exif=exif(orientation), **options))
    assert found.size == (64, 48)
    assert np.abs(np.asarray(found, float) - COLOUR).mean() < 2.5


def test_half_transparent_pixels_are_mixed_with_white() -> None:
    found = open_picture(saved(rgba(np.full_like(COLOUR, 55), np.full_like(ALPHA, 51)), "PNG"))
    assert np.asarray(found).min() == np.asarray(found).max() == 215  # 0.2 x 55 + 0.8 x 255


def test_values_without_a_range() -> None:
    stretched = open_picture(saved(Image.fromarray(np.float32(GREY) * 1e5 - 3e6), "TIFF"))
    wanted = (GREY.astype(float) - GREY.min()) / np.ptp(GREY) * 255
    assert np.abs(np.asarray(stretched, float)[..., 0] - wanted).max() <= 1
    holes = np.float32(GREY)
    holes[DISC] = np.nan
    found = np.asarray(open_picture(saved(Image.fromarray(holes), "TIFF")))[..., 0]
    assert not found[DISC].any()
    assert np.array_equal(found[~DISC], GREY[~DISC])
    assert np.asarray(open_picture(saved(Image.fromarray(np.full((9, 9), 10**6, np.int32)), "TIFF"))).max() == 0
    with pytest.raises(Undecodable, match="no finite pixel"):
        open_picture(saved(Image.fromarray(np.full((9, 9), np.nan, np.float32)), "TIFF"))


WHOLE = saved(Image.fromarray(COLOUR), "JPEG")
BROKEN = {
    "empty": (b"", "an empty file"),
    "blank": (b"   ", "no known image format, begins with b'   '"),
    "html": (b"<!DOCTYPE html><html><body>404</body></html>", "no known image format, begins with b'<!DOCTYPE ht'"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "no known image format"),
    "half": (WHOLE[: len(WHOLE) // 2], "cannot be decoded: .*[Tt]runcated"),
    "header only": (png(9, 9, 8, 2), "cannot be decoded"),
    "bomb": (png(13_000, 13_000, 8, 0), "more than 50 megapixels"),
    "large bomb": (png(300_000, 300_000, 8, 0), "more than 50 megapixels"),
    "strip": (png(101, 1, 8, 0), "101 x 1 pixels, one side more than 100 times the other"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "EPS"),
    "no loader": (b"\x89HDF\r\n\x1a\n" + b"\0" * 64, "cannot be decoded"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_and_hostile_files_have_a_reason(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    data, reason = BROKEN[name]
    limit = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(Undecodable, match=reason) as caught:
            open_picture(data)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")
    assert limit == Image.MAX_IMAGE_PIXELS
    assert shrunk(data, 224) == data  # counted by encode


@pytest.mark.parametrize("seed", range(20))
def test_no_damage_raises_another_error_or_prints(seed: int, capfd: pytest.CaptureFixture[str]) -> None:
    dice = np.random.default_rng(seed)
    files = [data() for _, data in SAME.values()]
    for data in (files[at] for at in dice.integers(0, len(files), 12)):
        broken = np.frombuffer(data, np.uint8).copy()
        at = dice.integers(0, min(len(broken), 400), 6)
        broken[at] = dice.integers(0, 256, 6)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with suppress(Undecodable):
                assert open_picture(broken.tobytes()[: dice.integers(1, len(broken) + 1)]).mode == "RGB"
    assert capfd.readouterr() == ("", "")


def test_a_large_photograph_is_decoded_at_half_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.fromarray(COLOUR).resize((640, 480))
    monkeypatch.setattr(pictures, "MOST_PIXELS", 640 * 480 // 4)
    found = open_picture(saved(image, "JPEG", exif=exif(1)))
    assert found.size == (320, 240)
    assert np.abs(np.asarray(found, float) - np.asarray(image.resize((320, 240)), float)).mean() < 2.5
    for data in (saved(image, "JPEG", progressive=True), saved(image, "PNG")):
        with pytest.raises(Undecodable, match="more than 50 megapixels"):
            open_picture(data)
    monkeypatch.setattr(pictures, "MOST_PIXELS", 640 * 480 // 5)
    with pytest.raises(Undecodable, match="more than 50 megapixels"):
        open_picture(saved(image, "JPEG"))


def test_a_large_picture_inside_an_icon_is_refused() -> None:
    inner = png(13_000, 13_000, 8, 0)
    icon = struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(inner), 22) + inner
    with pytest.raises(Undecodable, match="more than 50 megapixels"):
        open_picture(icon)


@pytest.mark.parametrize(("size", "stored"), [((600, 400), (336, 224)), ((400, 1000), (224, 560)), ((300, 226), None)])
def test_pictures_are_stored_smaller(size: tuple[int, int], stored: tuple[int, int] | None) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    image = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)
    data = saved(image, "PNG", exif=exif(6))
    found = shrunk(data, 224)
    assert found == shrunk(data, 224)
    assert len(found) < len(data)
    back = Image.open(io.BytesIO(found))
    assert back.format == "JPEG"
    assert "exif" not in back.info
    if stored:
        assert back.size == stored[::-1]  # turned
    small = np.asarray(image.rotate(-90, expand=True).resize(back.size), float)
    assert np.abs(np.asarray(back, float) - small).mean() < 2


def test_small_pictures_and_those_that_would_grow_stay_unchanged() -> None:
    for image in (Image.fromarray(COLOUR), Image.new("RGB", (224, 900)), Image.new("RGB", (2000, 2000), "red")):
        data = saved(image, "PNG", optimize=True)
        assert shrunk(data, 224) == data or len(shrunk(data, 224)) < len(data)
    assert shrunk(WHOLE, 48) == WHOLE
    flat = saved(Image.new("1", (300, 300)), "PNG", optimize=True)
    assert shrunk(flat, 224) == flat
