"""Decode pictures to RGB as a viewer would show them, with bounded memory, and store them smaller.

Rules of `open_picture`, which reads the first frame only:

* 16-bit grey is divided by 257, and other depths that the file states accordingly. 32-bit integers and floats state no
  range: it is the smallest of 0 to 1 (floats only), 0 to 255 and 0 to 65,535 that holds all values, otherwise from the
  lowest to the highest value. Values that are not finite are black.
* Transparent pixels, by alpha, palette or colour key, are laid over white.
* The EXIF orientation is applied. If the EXIF block is damaged, the picture stays as stored.
* CMYK, YCbCr and LAB are converted without the file's ICC profile.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image, ImageChops, ImageOps, UnidentifiedImageError

MOST_PIXELS = 50_000_000
"""Most pixels of a decoded picture: 200 MB as Pillow holds it. Cameras of 48 and 50 megapixels are within it; larger
ones write sequential JPEG, which may have four times as many and is decoded at half its size."""
MOST_SIDE = 7_000
"""Largest shorter side at which pictures are stored: a square of `MOST_PIXELS` has 7,071, so none has more."""
MOST_RATIO = 100
"""Most that one side may be longer than the other: encoders that resize the shorter side would need too much memory."""
LEAST_SIDE = 224
"""Input size of the shipped image encoder, in pixels: pictures stored smaller would lose what it reads."""
DECODING = 2
"""Version of the rules above. It is part of the image encoders' keys, so raise it when decoded pixels change."""

_JPEG_FACTOR = 4
_TOO_MANY = f"more than {MOST_PIXELS // 10**6} megapixels"
_ROWS = 256  # of grey pixels scaled at once
_TINY = 1e-30
_QUALITY = 98  # of stored JPEG files: the shipped encoder's vectors keep a cosine of 0.99 to the originals'
_TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_SAMPLES = 258, 262, 339  # numbers of tags
_WHITE_IS_ZERO = 0

logging.getLogger("PIL").setLevel(logging.CRITICAL)  # Pillow logs errors of damaged files, which we report ourselves


class Undecodable(Exception):
    """A picture cannot be decoded; the message is a phrase that says why."""


def open_picture(data: bytes) -> Image.Image:
    """The picture in an image file, as RGB of its own size.

    Raises:
        Undecodable: the file is empty, damaged, too large, or of an unknown format.
    """
    if not data:
        raise Undecodable("an empty file")
    most = _JPEG_FACTOR * MOST_PIXELS if data.startswith(b"\xff\xd8") else MOST_PIXELS
    try:
        with _bounded(most):
            image = Image.open(io.BytesIO(data))
            _prepare(image)
            raw = _raw_mode(image)
            image.load()
            _turn_upright(image)
            return _as_rgb(image, raw)
    except Undecodable:
        raise
    except UnidentifiedImageError:
        raise Undecodable(f"no known image format, begins with {data[:12]!r}") from None
    except Image.DecompressionBombError:
        raise Undecodable(_TOO_MANY) from None
    except Exception as error:  # on damaged files Pillow's decoders raise many kinds of errors
        reason = str(error).strip().splitlines()
        raise Undecodable(f"cannot be decoded: {(reason[0] if reason else type(error).__name__)[:100]}") from None


def shrunk(data: bytes, side: int) -> bytes:
    """The picture in an image file as a JPEG file whose shorter side has `side` pixels.

    The file stays unchanged if it cannot be decoded, if its shorter side has no more than `side` pixels, or if the JPEG
    file would not be smaller. The same file always gives the same bytes.
    """
    try:
        image = open_picture(data)
    except Undecodable:
        return data
    shorter = min(image.size)
    if shorter <= side:
        return data
    width, height = (max(side, round(length * side / shorter)) for length in image.size)
    # At the shipped encoder's input size, its own filter: it then resizes at most one side again.
    filter_ = Image.Resampling.BICUBIC if side == LEAST_SIDE else Image.Resampling.LANCZOS
    small = image.resize((width, height), filter_)
    small.info = {}  # comments would be stored, too
    sink = io.BytesIO()
    small.save(sink, "JPEG", quality=_QUALITY, subsampling=0)  # full resolution of colours
    return min(data, sink.getvalue(), key=len)


@contextmanager
def _bounded(pixels: int) -> Iterator[None]:
    """Pillow refuses files with more `pixels`, also those inside of icons, and warns of nothing."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = pixels // 2  # Pillow warns of more and refuses twice as many
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _prepare(image: Any) -> None:
    """Check an opened picture before any pixel is decoded, and have a large JPEG file decoded at half its size."""
    if image.format == "EPS":  # Pillow would run Ghostscript
        raise Undecodable("EPS, which is a program, not a picture")
    if max(image.size) > MOST_RATIO * min(image.size):
        raise Undecodable(f"{image.width} x {image.height} pixels, one side more than {MOST_RATIO} times the other")
    if image.width * image.height > MOST_PIXELS:
        if "progressive" in image.info:  # libjpeg holds all coefficients of such a file
            raise Undecodable(_TOO_MANY)
        image.draft(None, (image.width // 2, image.height // 2))


def _raw_mode(image: Any) -> str:
    """How the file stores a pixel, such as `L;4` for 4-bit grey; Pillow forgets it when it loads the picture."""
    arguments = image.tile[0].args if image.tile else ""
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""


def _turn_upright(image: Any) -> None:
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except Exception:  # a damaged EXIF block raises many kinds of errors, and the picture is good
        return


def _as_rgb(image: Any, raw: str) -> Image.Image:
    """A loaded picture of any mode as RGB."""
    if image.mode == "F" or image.mode.startswith("I"):
        return _grey(image)
    key = image.info.get("transparency")
    if key is not None and image.mode in ("L", "RGB"):
        image.info["transparency"] = _colour_key(key, raw)
    if image.has_transparency_data:
        if image.mode == "La":
            image = image.convert("LA")
        alpha = image.convert("RGBA") if image.mode != "RGBA" else image
        clear = ImageChops.invert(alpha.getchannel("A"))
        image = alpha.convert("RGB")
        image.paste("white", mask=clear)
        return image
    return image if image.mode == "RGB" else image.convert("RGB")


def _colour_key(key: Any, raw: str) -> Any:
    """A PNG file's transparent colour, which has the file's bit depth, in the 8 bits to which Pillow brings pixels."""
    if ";16" in raw:
        return tuple(value >> 8 for value in key)
    bits = {"L;2": 2, "L;4": 4}.get(raw)
    return key if bits is None else key * 255 // (2**bits - 1)


def _grey(image: Any) -> Image.Image:
    """A picture of mode `I;16`, `I` or `F`, scaled to 8 bits."""
    values = np.asarray(image)
    if _tag(image, _TIFF_BITS) == 32 and _tag(image, _TIFF_SAMPLES) in (None, 1):
        values = values.view(np.uint32)  # Pillow has no unsigned mode of 32 bits
    low, high = _range(image, values)
    turned = _tag(image, _TIFF_PHOTOMETRIC) == _WHITE_IS_ZERO  # Pillow inverts only 8 bits and fewer
    key = image.info.get("transparency")
    grey = np.empty(values.shape, np.uint8)
    for start in range(0, len(values), _ROWS):
        rows = values[start : start + _ROWS]
        scaled = (rows.astype(np.float32) - low) * (255 / max(high - low, _TINY))
        scaled = np.rint(np.clip(np.nan_to_num(scaled, nan=0, posinf=0, neginf=0), 0, 255))
        scaled = 255 - scaled if turned else scaled
        grey[start : start + _ROWS] = scaled if key is None else np.where(rows == key, 255, scaled)
    return Image.fromarray(grey).convert("RGB")


def _range(image: Any, values: np.ndarray) -> tuple[float, float]:
    """The values of black and white."""
    known = values if values.dtype.kind != "f" else values[np.isfinite(values)]
    if not known.size:
        raise Undecodable("no finite pixel")
    low, high = float(known.min()), float(known.max())
    top = _top(image)
    usual = [top] if top else [1, 255, 65_535] if image.mode == "F" else [255, 65_535]
    return next(((0.0, float(top)) for top in usual if low >= 0 and high <= top), (low, high))


def _top(image: Any) -> int | None:
    """The highest value that the file's pixels can have; None if it does not follow from the file."""
    bits = _tag(image, _TIFF_BITS)
    if image.mode.startswith("I;16"):
        return 2**bits - 1 if bits else 65_535
    if image.mode == "I" and bits == 16:  # signed
        return 32_767
    return 65_535 if image.mode == "I" and image.format == "PPM" else None  # Pillow scales PGM files


def _tag(image: Any, number: int) -> int | None:
    """The first value of a tag of a TIFF file; None for other formats."""
    value = image.tag_v2.get(number) if image.format == "TIFF" else None
    value = value[0] if isinstance(value, tuple) and value else value
    return value if isinstance(value, int) else None
