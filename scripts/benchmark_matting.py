"""Closed-form matting against pymatting's, in one run on photographs in the layout of a VOC devkit.

The trimaps are made from true masks, for measuring only: an object shrunk and grown by some pixels. Both sides get the
same ones and run one after the other, image by image.

    python scripts/benchmark_matting.py --root VOCdevkit/VOC2012
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image
from pymatting import estimate_alpha_cf
from scipy import ndimage

from wsss_hf.labeling.matting import closed_form_alphas
from wsss_hf.labeling.trimap import BACKGROUND, FOREGROUND, UNKNOWN


def measured_trimaps(mask: np.ndarray, band: int) -> np.ndarray:
    """(K, H, W) trimaps of the classes that keep a certain foreground; `band` pixels unknown on either side."""
    made = []
    for value in np.setdiff1d(mask, [0, 255]):
        inside = ndimage.distance_transform_edt(mask == value)
        outside = ndimage.distance_transform_edt((mask != value) & (mask != 255))
        trimap = np.full(mask.shape, UNKNOWN, dtype=np.uint8)
        trimap[inside > band] = FOREGROUND
        trimap[outside > band] = BACKGROUND
        if (inside > band).any() and (outside > band).any():
            made.append(trimap)
    return np.array(made, dtype=np.uint8).reshape(-1, *mask.shape)


def compare(image: np.ndarray, trimaps: np.ndarray) -> list[dict]:
    """One row per class: seconds of both and the mean absolute difference of their alphas."""
    start = time.perf_counter()
    ours = closed_form_alphas(image, trimaps)
    our_seconds = (time.perf_counter() - start) / len(trimaps)
    rows = []
    for alpha, trimap in zip(ours, trimaps, strict=True):
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):  # it prints performance warnings
            theirs = estimate_alpha_cf(image / 255, trimap / 255)
        seconds = time.perf_counter() - start
        unknown = trimap == UNKNOWN
        difference = np.full(trimap.shape, np.nan) if alpha is None else np.abs(alpha - theirs)
        rows.append(
            {
                "ours": our_seconds,
                "pymatting": seconds,
                "difference": difference.mean(),
                "unknown_difference": difference[unknown].mean(),
                "unknown": unknown.mean(),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder with JPEGImages and SegmentationClassAug")
    parser.add_argument("--bands", type=int, nargs="+", default=[8, 20], help="unknown pixels on either side")
    parser.add_argument("--every", type=int, default=1, help="take every n-th image only")
    arguments = parser.parse_args()
    masks = sorted((arguments.root / "SegmentationClassAug").glob("*.png"))[:: arguments.every]
    if not masks:
        sys.exit(f"{arguments.root}: no SegmentationClassAug/*.png there; the folder VOCdevkit/VOC2012 would be right")
    # What is loaded at the first call does not count.
    warm_up = np.repeat(np.array([0, 128, 255], dtype=np.uint8), 3).reshape(1, 3, 3).repeat(3, axis=1)
    compare(np.zeros((*warm_up.shape[1:], 3), dtype=np.uint8), warm_up)
    print("band classes unknown  pymatting s  ours s  ratio (least)  |diff| image (worst)  |diff| unknown (worst)")
    for band in arguments.bands:
        rows = []
        for path in masks:
            photograph = arguments.root / "JPEGImages" / f"{path.stem}.jpg"
            if not photograph.is_file():
                sys.exit(f"{photograph} is not there")
            trimaps = measured_trimaps(np.asarray(Image.open(path)), band)
            if len(trimaps):
                rows += compare(np.asarray(Image.open(photograph).convert("RGB")), trimaps)
        if not rows:
            sys.exit(f"no object is wider than {2 * band} pixels: a smaller band would be right")
        column = {name: np.array([row[name] for row in rows]) for name in rows[0]}
        ratio, least = column["pymatting"].sum() / column["ours"].sum(), (column["pymatting"] / column["ours"]).min()
        print(
            f"{band:4d} {len(rows):7d} {column['unknown'].mean():7.2f} {column['pymatting'].mean():12.2f} "
            f"{column['ours'].mean():7.2f} {ratio:6.1f} ({least:.1f})"
            f" {column['difference'].mean():14.4f} ({column['difference'].max():.4f})"
            f" {column['unknown_difference'].mean():14.4f} ({column['unknown_difference'].max():.4f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
