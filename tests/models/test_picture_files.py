"""Images of every kind as the networks see them."""

import base64
import io

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from wsss_hf.data.tagged import upright_size
from wsss_hf.models.pictures import (
    PictureError,
    load_picture,
    open_picture,
    orientation,
    to_rgb,
    upright,
)
from wsss_hf.training.build import build_processor

PIXELS = np.arange(24, dtype=np.uint8).reshape(4, 6) * 10  # 6 wide, 4 high
# Where a viewer shows the pixel that is stored first: EXIF 2.32, tag Orientation ("the 0th row is at the …").
FIRST_PIXEL = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}


def saved(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    stream.seek(0)
    return stream


def with_orientation(value):
    exif = Image.Exif()
    exif[0x0112] = value
    return saved(Image.fromarray(PIXELS), exif=exif)


def red_of(image):
    return np.asarray(to_rgb(image))[..., 0]


@pytest.mark.parametrize(("turn", "first"), FIRST_PIXEL.items())
def test_orientation_turns_images_once(turn, first):
    image = open_picture(with_orientation(turn))
    assert orientation(image) == turn
    picture = to_rgb(image)
    assert picture.size == upright(image).size == upright_size(image) == ((4, 6) if turn >= 5 else (6, 4))
    assert np.asarray(picture)[first][0] == PIXELS[0, 0]
    rows_go_down = turn in (1, 2, 3, 4)
    assert np.array_equal(np.asarray(picture)[..., 0], PIXELS) == (turn == 1)
    step = np.diff(np.asarray(picture)[..., 0].astype(int), axis=0 if rows_go_down else 1)
    assert (abs(step) == 60).all()  # the next stored row
    assert orientation(picture) is None and to_rgb(picture).size == picture.size


@pytest.mark.parametrize("value", [0, 9, 255])
def test_what_is_no_orientation_turns_nothing(value):
    image = open_picture(with_orientation(value))
    assert orientation(image) is None and upright_size(image) == (6, 4)
    assert (red_of(image) == PIXELS).all()


def test_an_orientation_of_another_type_turns_nothing():
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags.tagtype[0x0112] = 2  # ASCII
    tags[0x0112] = "6"
    tags.tagtype[0x0100] = 2
    tags[0x0100] = "six"  # ImageWidth: Pillow could not write it again
    data = saved(Image.fromarray(PIXELS), "JPEG", quality=100, exif=b"Exif\0\0II*\0\x08\0\0\0" + tags.tobytes(8))
    image = open_picture(data)
    assert orientation(image) is None and upright_size(image) == (6, 4)
    assert abs(red_of(image).astype(int) - PIXELS).max() <= 2


@pytest.mark.parametrize(("kind", "dtype"), [("PNG", "<u2"), ("TIFF", "<u2"), ("TIFF", ">u2")])
def test_16_bits_are_scaled(kind, dtype):
    image = Image.fromarray(PIXELS.astype(np.uint16).astype(dtype) * 257)
    assert (red_of(open_picture(saved(image, kind))) == PIXELS).all()


def test_floating_point_values_are_scaled():
    assert (red_of(open_picture(saved(Image.fromarray(PIXELS.astype(np.float32) / 255), "TIFF"))) == PIXELS).all()


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        (PIXELS.astype(np.uint16), "16-bit values that use their range, 0..65535, got 0 to 230"),
        (PIXELS.astype(np.uint16) * 17, "16-bit values that use their range, 0..65535, got 0 to 3910"),
        (PIXELS.astype(np.int32) * 8 - 1000, "16-bit values that use their range, 0..65535, got -1000 to 840"),
        (PIXELS.astype(np.int32) * 1000, "16-bit values that use their range, 0..65535, got 0 to 230000"),
        (PIXELS.astype(np.float32), r"floating-point values in \[0, 1\], got 0 to 230"),
        (np.where(PIXELS == 0, np.nan, 0.5).astype(np.float32), r"floating-point values in \[0, 1\], got nan to nan"),
    ],
)
def test_values_of_another_range_are_refused(values, wanted):
    with pytest.raises(PictureError, match=f"^expected {wanted} .scale them, or save 8 bits.$"):
        to_rgb(open_picture(saved(Image.fromarray(values), "TIFF")))


def test_black_is_black_in_any_depth():
    for dtype in (np.uint16, np.int32, np.float32):
        assert not red_of(Image.fromarray(np.zeros((4, 6), dtype=dtype))).any()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA"])
def test_transparent_pixels_are_white(mode):
    alpha = np.where(PIXELS < 100, 0, 255).astype(np.uint8)
    image = Image.merge("LA", [Image.fromarray(PIXELS), Image.fromarray(alpha)])
    if mode == "P":
        image = image.getchannel(0).convert("P")
        image.info["transparency"] = bytes(range(256)).translate(bytes(0 if v < 100 else 255 for v in range(256)))
    elif mode == "PA":  # which no file format holds
        image.putpalette([value for value in range(256) for _ in "RGB"])
    else:
        image = image.convert(mode)
    assert image.mode == mode
    if mode != "PA":
        image = open_picture(saved(image))
    assert (red_of(image) == np.where(alpha == 0, 255, PIXELS)).all()


@pytest.mark.parametrize("kind", ["TIFF", "GIF", "WEBP"])
def test_the_first_of_several_pages_counts(kind):
    pages = [Image.new("RGB", (6, 4), color) for color in ("red", "blue", "lime")]
    data = saved(pages[0], kind, save_all=True, append_images=pages[1:])
    assert abs(np.asarray(to_rgb(open_picture(data))).astype(int) - [255, 0, 0]).max() <= 4


@pytest.mark.parametrize(("size", "fits"), [((8, 1), True), ((9, 1), False), ((1, 40), False), ((8000, 300), False)])
def test_strips_are_refused(size, fits):
    if fits:
        assert to_rgb(Image.new("L", size)).size == size
        return
    with pytest.raises(PictureError, match=f"at most 8 times as long as wide, got {size[0]}x{size[1]} .cut it into"):
        to_rgb(Image.new("L", size))


def test_a_panorama_is_shown_at_the_scale_of_training():
    processor = build_processor(32, [0.5] * 3, [0.5] * 3)
    for size, shape in (((256, 64), (32, 128)), ((512, 64), (32, 256)), ((64, 512), (256, 32))):
        pixels = processor(to_rgb(Image.new("L", size)), return_tensors="pt")["pixel_values"]
        assert tuple(pixels.shape[-2:]) == shape


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 4\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.mark.parametrize(
    "content", [EPS, b"%PDF-1.4\n%%EOF", b"<svg/>", b"P6 1 1 255\n\0\0\0", b"\0\0\0\x0cjP  \r\n\x87\n"]
)
def test_only_the_named_formats_are_opened(content, tmp_path, monkeypatch):
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", None)  # whoever calls it fails otherwise
    file = tmp_path / "photo.jpg"
    file.write_bytes(content)
    with pytest.raises(OSError, match="cannot identify image file"):
        load_picture(str(file))


def test_every_way_to_name_an_image(tmp_path):
    data = with_orientation(6).getvalue()
    (tmp_path / "a.png").write_bytes(data)
    text = base64.encodebytes(data).decode()
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), data, text, f"data:image/png;base64,{text}"):
        assert (np.asarray(load_picture(source)) == np.asarray(to_rgb(open_picture(io.BytesIO(data))))).all()
    wanted = "a file, a URL, base64 text, bytes, an array or a PIL image"
    for source in ("no such file.png", "http:/nowhere"):
        with pytest.raises(ValueError, match=f"^image: expected {wanted}, got '{source}'$"):
            load_picture(source)


def test_whose_values_are_wrong_is_said(tmp_path):
    file = tmp_path / "12 bits.png"
    file.write_bytes(saved(Image.fromarray(PIXELS.astype(np.uint16) * 17)).getvalue())
    for source, name in ((file, file), (file.read_bytes(), "image"), (Image.open(file), "image")):
        with pytest.raises(PictureError, match=f"^{name}: expected 16-bit values .*, got 0 to 3910 .scale them.*.$"):
            load_picture(source)
