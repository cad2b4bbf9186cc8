import numpy as np
import pytest
from PIL import Image

from wsss_hf.data.palette import colorize
from wsss_hf.reporting.pictures import blend, heatmap, overlay


def test_heatmap_gets_lighter_with_the_value_and_clips():
    ramp = heatmap(np.linspace(-0.2, 1.2, 141)[None])
    lightness = np.asarray(ramp.convert("L"), dtype=int)[0]
    assert (np.diff(lightness) >= 0).all() and lightness[-1] - lightness[0] > 150
    first, last = ramp.getpixel((0, 0)), ramp.getpixel((140, 0))
    assert first == ramp.getpixel((20, 0)) and first[2] == max(first)
    assert last == ramp.getpixel((120, 0)) and last[2] == min(last)


def test_overlay_colours_objects_outlines_and_leaves_background():
    image = Image.new("RGB", (8, 6), (100, 150, 200))
    labels = np.zeros((6, 8), np.uint8)
    labels[1:5, 2:7] = 3
    pixels = np.asarray(overlay(image, labels, alpha=0.5))
    color = colorize(labels)[2, 3]
    assert (pixels[0, 0] == (100, 150, 200)).all()
    assert (pixels[1, 2] == color).all()
    assert np.abs(pixels[2, 4] - (0.5 * color + [50, 75, 100])).max() <= 1


def test_overlay_of_another_size_names_both():
    with pytest.raises(ValueError, match="label map of 3x2 pixels does not fit an image of 8x6"):
        overlay(Image.new("RGB", (8, 6)), np.zeros((2, 3), np.uint8))


def test_blend_brings_a_coarse_map_to_the_image():
    image = Image.new("RGB", (40, 20), (255, 0, 0))
    mixed = blend(image, heatmap(np.array([[0.0, 1.0]])), alpha=1.0)
    assert mixed.size == (40, 20)
    assert mixed.getpixel((0, 10)) == heatmap(np.zeros((1, 1))).getpixel((0, 0))
    gray = blend(image, heatmap(np.zeros((1, 1))), alpha=0.0).getpixel((5, 5))
    assert len(set(gray)) == 1
