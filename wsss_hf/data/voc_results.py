"""What the PASCAL VOC test server takes: one archive of palette PNGs under a fixed path."""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..files import whole_file
from .export import LabelMaps, check_free, file_stem
from .palette import mask_image
from .tagged import DataError
from .voc import VOC_CLASSES

RESULTS_FOLDER = "results/VOC2012/Segmentation/comp6_test_cls"
_MODES = {".tar": "w", ".tgz": "w:gz", ".tar.gz": "w:gz"}
_VOC_NAME = re.compile(r"\d{4}_\d{6}")


def export_voc_results(path: str | Path, label_maps: LabelMaps, class_names: Sequence[str]) -> int:
    """Write `results/VOC2012/Segmentation/comp6_test_cls/<image_id>.png` into an archive for VOC's test server.

    Labels become those of VOC: 0 background, 1 aeroplane to 20 tvmonitor. Images are taken one at a time.

    Args:
        path: a .tar, .tgz or .tar.gz; appears complete or not at all, and must not exist yet.
        label_maps: see [`LabelMaps`]; without ignored pixels, which the server does not take.
        class_names: names of the classes 0..C-1, background not among them.

    Returns:
        the number of label maps.

    Raises:
        DataError: another suffix, `path` exists, a class or an image_id is none of VOC's, or a label is no class.
    """
    path = check_results_archive(path, class_names)
    new_labels = np.array([0, *(VOC_CLASSES.index(name) + 1 for name in class_names)], dtype=np.uint8)
    mode = next(mode for suffix, mode in _MODES.items() if path.name.endswith(suffix))
    path.parent.mkdir(parents=True, exist_ok=True)
    names: set[str] = set()
    with whole_file(path) as unfinished, tarfile.open(unfinished, mode) as archive:
        for image_id, labels in label_maps:
            name = file_stem(image_id)
            if not _VOC_NAME.fullmatch(name) or name in names:
                raise DataError(f"image_id {image_id!r}: a name of VOC like 2008_000001, once, would be right")
            if labels.max() >= len(new_labels):
                raise DataError(f"row {image_id!r}: label {labels.max()}; right are 0..{len(new_labels) - 1}")
            names.add(name)
            stream = io.BytesIO()
            mask_image(new_labels[labels]).save(stream, format="PNG")
            member = tarfile.TarInfo(f"{RESULTS_FOLDER}/{name}.png")
            member.size = stream.tell()
            stream.seek(0)
            archive.addfile(member, stream)
    return len(names)


def check_results_archive(path: str | Path, class_names: Sequence[str]) -> Path:
    """What would stop `export_voc_results` before its first image.

    Raises:
        DataError: another suffix, `path` exists, or a class is none of VOC's.
    """
    path = check_free(path, "--voc-archive")
    if not path.name.endswith(tuple(_MODES)):
        raise DataError(f"--voc-archive {path}: a file {', '.join(_MODES)} would be right")
    foreign = [name for name in class_names if name not in VOC_CLASSES]
    if foreign:
        raise DataError(f"--voc-archive: VOC has no class {foreign[0]!r}; its classes are {', '.join(VOC_CLASSES)}")
    return path
