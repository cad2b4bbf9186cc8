"""Archives for the PASCAL VOC test server: palette PNGs under a fixed path."""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from ..files import whole_file
from ..models.label_colors import mask_image
from .export import LabelMaps, check_free, file_stem
from .tagged import DataError
from .voc import VOC_CLASSES

RESULTS_FOLDER = "results/VOC2012/Segmentation/comp6_test_cls"
_SUFFIXES = (".tar", ".tgz", ".tar.gz")
_VOC_NAME = re.compile(r"\d{4}_\d{6}")


def export_voc_results(path: str | os.PathLike, label_maps: LabelMaps, class_names: Sequence[str]) -> int:
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
    mode: Literal["w", "w:gz"] = "w" if path.suffix == ".tar" else "w:gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    names: set[str] = set()
    with whole_file(path) as unfinished, tarfile.open(unfinished, mode) as archive:
        for image_id, labels in label_maps:
            name = file_stem(image_id)
            if not _VOC_NAME.fullmatch(name) or name in names:
                raise DataError(f"image_id: expected names of VOC like 2008_000001, each once, got {image_id!r}")
            if labels.max() >= len(new_labels):
                raise DataError(f"row {image_id!r}: expected labels 0..{len(new_labels) - 1}, got {labels.max()}")
            names.add(name)
            stream = io.BytesIO()
            mask_image(new_labels[labels]).save(stream, format="PNG")
            member = tarfile.TarInfo(f"{RESULTS_FOLDER}/{name}.png")
            member.size = stream.tell()
            stream.seek(0)
            archive.addfile(member, stream)
    return len(names)


def check_results_archive(path: str | os.PathLike, class_names: Sequence[str]) -> Path:
    """`path`, after the checks of [`export_voc_results`] that need no image.

    Raises:
        DataError: another suffix, `path` exists, or a class is none of VOC's.
    """
    path = check_free(path, "--voc-archive")
    if not path.name.endswith(_SUFFIXES):
        raise DataError(f"--voc-archive: expected a file {', '.join(_SUFFIXES)}, got {path}")
    foreign = [name for name in class_names if name not in VOC_CLASSES]
    if foreign:
        known = ", ".join(VOC_CLASSES)
        raise DataError(f"--voc-archive: expected VOC classes, got {foreign[0]!r} (known are {known})")
    return path
