"""Images of any kind as upright RGB pictures, read alike in training, labelling and pipelines."""

from __future__ import annotations

import base64
import io
import os
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
from PIL import Image, features

_AVIF = ["AVIF"] if "avif" in features.modules and features.check("avif") else []  # from Pillow 11.3, if built in
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", *_AVIF)
"""What Pillow may open. It goes by content: of other formats, some start programs (EPS starts Ghostscript)."""
LONGEST = 8
"""An image is at most so many times as long as it is wide; networks see longer ones far too small."""

_ORIENTATION = 0x0112  # the EXIF tag
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # EXIF orientation → what makes the image upright
_DARK = 4096  # 16-bit images that stay below have 12 bits or fewer, or other units


class PictureError(ValueError):
    """An image that decodes, but has values or a shape that no network here can be shown."""


def open_picture(source: Any) -> Image.Image:
    """A path or binary stream → PIL image whose pixels are not read yet; only of `FORMATS`."""
    return Image.open(source, formats=FORMATS)


def orientation(image: Image.Image) -> int | None:
    """The EXIF orientation, 1 to 8 (1 is upright); None where there is none, or nothing that is one."""
    found = image.getexif().get(_ORIENTATION)
    return found if isinstance(found, int) and 1 <= found <= 8 else None


def upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF orientation says."""
    turn = _TURNS.get(orientation(image) or 1)
    return image if turn is None else image.transpose(turn)


def check_shape(image: Image.Image) -> None:
    """Raises PictureError for an image that is more than `LONGEST` times as long as it is wide."""
    width, height = image.size
    if max(width, height) > LONGEST * min(width, height):
        raise PictureError(
            f"expected an image at most {LONGEST} times as long as wide, got {width}x{height} (cut it into tiles)"
        )


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode → an upright one of mode "RGB", 8 bits per channel.

    16-bit grey values are scaled from 0..65535, floating-point ones from [0, 1]; transparent pixels become white; of
    several pages or frames the first one counts.

    Raises:
        PictureError: it is far too long, or its values have another range.
    """
    check_shape(image)
    image = opaque(upright(image))
    image.info = {}  # else whoever reads its EXIF data turns it again
    return image


def opaque(image: Image.Image) -> Image.Image:
    """An image of any mode → one of mode "RGB" as in [`to_rgb`], but neither turned nor held against its shape."""
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(eight_bits(np.asarray(image)))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def eight_bits(values: np.ndarray) -> np.ndarray:
    """Grey values of 16 bits or floating point → uint8, scaled as in [`to_rgb`]."""
    lowest, highest, whole = values.min(), values.max(), values.dtype.kind != "f"
    if whole and lowest >= 0 and (_DARK <= highest <= 65535 or highest == 0):
        return (values // 257).astype(np.uint8)
    if not whole and lowest >= 0 and highest <= 1:  # nor NaN
        return (255 * values).round().astype(np.uint8)
    wanted = "16-bit values that use their range, 0..65535" if whole else "floating-point values in [0, 1]"
    raise PictureError(f"expected {wanted}, got {lowest:g} to {highest:g} (scale them, or save 8 bits)")


def load_picture(source: Any, timeout: float | None = None) -> Image.Image:
    """What pipelines take for an image → an upright PIL image of mode "RGB", see [`to_rgb`], else ValueError, OSError.

    Args:
        source: a path, an http(s) URL, base64 text (also as data:image/…), the bytes of a file, a PIL image, or an
            array (H, W) or (H, W, 3) of uint8.
        timeout: seconds to wait for a URL.
    """
    name = "image"
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim < 2 or source.shape[2:] not in ((), (3,)):
            raise ValueError(
                f"image: expected an array (H, W, 3) or (H, W) of uint8, got {source.shape} of {source.dtype}"
            )
        source = Image.fromarray(source)
    elif isinstance(source, str | os.PathLike):
        name = os.fspath(source)
        if name.startswith(("http://", "https://")):
            with urlopen(Request(name, headers={"User-Agent": "wsss_hf"}), timeout=timeout) as answer:
                source = answer.read()
        elif not os.path.isfile(name):
            name, text = "image", name
            try:
                source = base64.b64decode("".join(text.rpartition(",")[2].split()), validate=True)
            except ValueError as error:
                wanted = "a file, a URL, base64 text, bytes, an array or a PIL image"
                raise ValueError(f"image: expected {wanted}, got {text[:100]!r}") from error
    try:
        if not isinstance(source, Image.Image):
            source = open_picture(io.BytesIO(source) if isinstance(source, bytes) else source)
        return to_rgb(source)
    except PictureError as error:
        raise PictureError(f"{name}: {error}") from error
