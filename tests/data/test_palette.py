import numpy as np
import pytest
from PIL import Image

from wsss_hf.data.palette import check_palette, save_mask_png
from wsss_hf.models.label_colors import mask_image, voc_palette


def test_palette_is_that_of_voc():
    palette = np.array(voc_palette()).reshape(256, 3)
    assert palette[[0, 1, 8, 15, 20, 255]].tolist() == [
        [0, 0, 0], [128, 0, 0], [64, 0, 0], [192, 128, 128], [0, 64, 128], [224, 224, 192],
    ]  # fmt: skip
    assert len(np.unique(palette, axis=0)) == 256


def test_saved_mask_keeps_its_labels_and_shows_its_colors(tmp_path):
    labels = np.arange(256, dtype=np.uint8).reshape(8, 32)
    save_mask_png(tmp_path / "mask.png", labels)
    saved = Image.open(tmp_path / "mask.png")
    assert saved.mode == "P" and np.array_equal(saved, labels)
    assert np.array_equal(np.asarray(saved.convert("RGB")).ravel(), voc_palette())


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "mask.png"
    save_mask_png(path, np.zeros((2, 2), dtype=np.uint8))
    before = path.read_bytes()

    def breaks_half_way(self, file, format):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", breaks_half_way)
    with pytest.raises(OSError, match="disk full"):
        save_mask_png(path, np.ones((2, 2), dtype=np.uint8))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("labels", [np.zeros((2, 2)), np.zeros((2, 2, 3), dtype=np.uint8)])
def test_what_is_no_label_map_is_refused(tmp_path, labels):
    with pytest.raises(ValueError, match="uint8 array"):
        save_mask_png(tmp_path / "mask.png", labels)
    assert not list(tmp_path.iterdir())


def palette_picture(values, colors):
    picture = Image.fromarray(np.array(values, np.uint8))
    picture.putpalette([channel for color in colors for channel in color])
    return picture


def test_a_palette_that_says_the_labels_were_renumbered_is_refused():
    voc = np.array(voc_palette()).reshape(256, 3).tolist()
    with pytest.raises(
        ValueError, match="x.png: expected pixel values that are the labels, got value 1 in the colour of label 5"
    ):
        check_palette(palette_picture([[0, 1]], [voc[0], voc[5]]), 6, "x.png")


def test_other_palettes_are_a_matter_of_taste():
    voc = np.array(voc_palette()).reshape(256, 3).tolist()
    check_palette(mask_image(np.array([[0, 5, 255]], np.uint8)), 6, "x.png")
    check_palette(palette_picture([[0, 1]], [[1, 2, 3], [4, 5, 6]]), 6, "x.png")
    check_palette(palette_picture([[0, 1]], [voc[1], [4, 5, 6]]), 6, "x.png")
    check_palette(Image.new("L", (2, 2), 3), 6, "x.png")
