import numpy as np
from PIL import Image

from wsss_hf.reporting.pictures import blend, heatmap


def test_heatmap_gets_lighter_with_the_value_and_clips():
    ramp = heatmap(np.linspace(-0.2, 1.2, 141)[None])
    lightness = np.asarray(ramp.convert("L"), dtype=int)[0]
    assert (np.diff(lightness) >= 0).all() and lightness[-1] - lightness[0] > 150
    first, last = ramp.getpixel((0, 0)), ramp.getpixel((140, 0))
    assert first == ramp.getpixel((20, 0)) and first[2] == max(first)
    assert last == ramp.getpixel((120, 0)) and last[2] == min(last)


def test_blend_brings_a_coarse_map_to_the_image():
    image = Image.new("RGB", (40, 20), (255, 0, 0))
    mixed = blend(image, heatmap(np.array([[0.0, 1.0]])), alpha=1.0)
    assert mixed.size == (40, 20)
    assert mixed.getpixel((0, 10)) == heatmap(np.zeros((1, 1))).getpixel((0, 0))
    gray = blend(image, heatmap(np.zeros((1, 1))), alpha=0.0).getpixel((5, 5))
    assert len(set(gray)) == 1
