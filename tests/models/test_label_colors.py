import numpy as np
import pytest
from PIL import Image

from wsss_hf.models.label_colors import display_colors, overlay

# Machado, Oliveira and Fernandes 2009, severity 1, for linear RGB.
SIGHT = {
    "full": np.eye(3),
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
}


def lab(colors, sight):
    """sRGB (N, 3) in 0..255 as somebody sees them → CIELAB."""
    shares = np.asarray(colors) / 255
    linear = np.where(shares <= 0.04045, shares / 12.92, ((shares + 0.055) / 1.055) ** 2.4)
    seen = (linear @ np.transpose(SIGHT[sight])).clip(0, 1)
    xyz = seen @ np.array([[0.4124, 0.2126, 0.0193], [0.3576, 0.7152, 0.1192], [0.1805, 0.0722, 0.9505]])
    x, y, z = np.cbrt(xyz / [0.9505, 1, 1.089]).T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)


@pytest.mark.parametrize("sight", SIGHT)
def test_everybody_can_tell_twenty_classes_apart(sight):
    colors = lab(display_colors()[1:21], sight)
    distances = np.linalg.norm(colors[:, None] - colors[None], axis=2)
    assert distances[~np.eye(20, dtype=bool)].min() > 15


def test_every_label_has_a_colour_of_its_own():
    assert display_colors().shape == (256, 3)
    assert len(np.unique(display_colors(), axis=0)) == 256


def square(value=3, side=500):
    labels = np.zeros((side, side), np.uint8)
    labels[100:400, 100:400] = value
    return labels


def test_an_overlay_is_a_line_a_contour_and_a_fill_inside_the_object():
    image, labels = Image.new("RGB", (500, 500), (100, 150, 200)), square()
    pixels, color = np.asarray(overlay(image, labels, alpha=0.5)), display_colors()[3]
    assert (pixels[labels == 0] == (100, 150, 200)).all()  # the background is untouched
    row = pixels[250, 100:110].astype(int)
    assert (row[0] == 255).all() or (row[0] == 0).all()
    assert (row[1:3] == color).all()
    assert np.abs(row[3:] - (0.5 * color + [50, 75, 100])).max() <= 1


@pytest.mark.slow
def test_lines_grow_with_the_image():
    labels = square()
    labels = np.asarray(Image.fromarray(labels).resize((2000, 2000), Image.Resampling.NEAREST))
    pixels = np.asarray(overlay(Image.new("RGB", (2000, 2000)), labels))
    assert (pixels[1000, 404:412] == display_colors()[3]).all()


@pytest.mark.parametrize("tone", [0, 60, 128, 255])
def test_every_class_is_seen_on_dark_and_on_bright_photographs(tone):
    for label in range(1, 21):
        pixels = np.asarray(overlay(Image.new("RGB", (500, 500), (tone,) * 3), square(label)))
        outline = pixels[250, 100:103].astype(float) @ [0.299, 0.587, 0.114]
        assert np.abs(outline - tone).max() > 60, label


def test_objects_side_by_side_have_both_contours():
    labels = square()
    labels[:, 250:] *= 2
    pixels = np.asarray(overlay(Image.new("RGB", (500, 500)), labels))
    assert (pixels[250, 247:249] == display_colors()[3]).all() and (pixels[250, 251:253] == display_colors()[6]).all()


def test_ignored_pixels_are_hatched_in_grey():
    pixels = np.asarray(overlay(Image.new("RGB", (500, 500), (200, 30, 30)), square(255)))
    inside = pixels[110:390, 110:390].reshape(-1, 3)
    grey = (inside == inside[:, :1]).all(axis=1).mean()
    assert 0.2 < grey < 0.5 and len(np.unique(inside, axis=0)) == 2
    assert (pixels[0, 0] == (200, 30, 30)).all()


def test_the_picture_is_left_as_it_was():
    image = Image.new("RGB", (20, 20))
    overlay(image, np.ones((20, 20), np.uint8))
    assert image.getextrema() == ((0, 0),) * 3


def test_an_overlay_of_another_size_names_both():
    with pytest.raises(ValueError, match="label map of 3x2 pixels does not fit an image of 8x6"):
        overlay(Image.new("RGB", (8, 6)), np.zeros((2, 3), np.uint8))
