import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from wsss_hf.data.tagged import DataError
from wsss_hf.data.voc import VOC_CLASSES
from wsss_hf.data.voc_results import export_voc_results
from wsss_hf.models.label_colors import voc_palette

MAP = np.array([[0, 1], [2, 0]], np.uint8)


@pytest.mark.parametrize("name", ["results.tgz", "results.tar.gz", "results.tar"])
def test_archive_is_what_the_server_takes(tmp_path, name):
    maps = [("2008_000001", MAP), ("2011_003271.jpg", MAP.T)]
    assert export_voc_results(tmp_path / "new" / name, iter(maps), ["cat", "sheep"]) == 2
    with tarfile.open(tmp_path / "new" / name) as archive:
        folder = "results/VOC2012/Segmentation/comp6_test_cls"
        assert archive.getnames() == [f"{folder}/2008_000001.png", f"{folder}/2011_003271.png"]
        picture = Image.open(io.BytesIO(archive.extractfile(archive.getnames()[1]).read()))
    assert picture.mode == "P" and picture.getpalette()[: 3 * 21] == voc_palette()[: 3 * 21]
    cat, sheep = VOC_CLASSES.index("cat") + 1, VOC_CLASSES.index("sheep") + 1
    assert np.array(picture).tolist() == [[0, sheep], [cat, 0]]


@pytest.mark.parametrize(
    ("file", "maps", "classes", "message"),
    [
        ("results.zip", [], ["cat"], "expected a file .tar, .tgz, .tar.gz, got .*results.zip"),
        ("r.tgz", [], ["cat", "unicorn"], "expected VOC classes, got 'unicorn'"),
        ("r.tgz", [("photo_1", MAP)], ["cat", "dog"], "expected names of VOC like 2008_000001, .* got 'photo_1'"),
        ("r.tgz", [("2008_000001", MAP)] * 2, ["cat", "dog"], "expected names of VOC .* each once, got '2008_000001'"),
        ("r.tgz", [("2008_000001", MAP)], ["cat"], "row '2008_000001': expected labels 0..1, got 2"),
        ("r.tgz", [("2008_000001", np.full((2, 2), 255, np.uint8))], ["cat"], "expected labels 0..1, got 255"),
    ],
)
def test_what_the_server_would_refuse_leaves_nothing(tmp_path, file, maps, classes, message):
    with pytest.raises(DataError, match=message):
        export_voc_results(tmp_path / file, iter(maps), classes)
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "r.tgz").write_text("mine")
    with pytest.raises(DataError, match="r.tgz: expected a path that does not exist yet"):
        export_voc_results(tmp_path / "r.tgz", [], ["cat"])
