"""Which files of the package a reader walks through: those whose functions are called on two ways, in order.

    python tests/trace_files.py training    # `wsss train-cam`, from the command to the first step of the optimiser
    python tests/trace_files.py masks       # from the classifier's maps to the pixels of the mask of one image

What is run while modules are imported does not count, nor generated code (of dataclasses). One file a line.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "WSSS_QUIET": "1"}

PACKAGE = Path(__file__).parents[1] / "wsss_hf"
BACKBONE = {"model_type": "resnet", "layer_type": "basic", "embedding_size": 8, "hidden_sizes": [8, 16]}
BACKBONE |= {"depths": [1, 1]}
SETTINGS = [f"cam.backbone_config={json.dumps(BACKBONE)}", "image.size=32", "cam.train.epochs=1"]


class Done(BaseException):
    """The end of the way."""


class Tracer:
    """Notes the files of the package whose functions are entered, with those that enter them first."""

    def __init__(self) -> None:
        self.files: dict[str, str] = {}

    def __call__(self, frame, event, _argument) -> None:
        if event != "call" or not _is_ours(frame):
            return
        caller = frame
        while caller is not None:
            if _is_ours(caller) and caller.f_code.co_name == "<module>":
                return
            caller = caller.f_back
        self.files.setdefault(_name(frame), f"{frame.f_code.co_name}, called in {_name(frame.f_back)}")


def _is_ours(frame) -> bool:
    return frame.f_code.co_filename.startswith(f"{PACKAGE}{os.sep}")


def _name(frame) -> str:
    path = Path(frame.f_code.co_filename)
    return path.relative_to(PACKAGE).as_posix() if _is_ours(frame) else path.name


def photographs(folder: Path) -> Path:
    import numpy as np
    from PIL import Image

    folder.mkdir()
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    rows = [f"{number}.png,{('cat', 'dog')[number % 2]}" for number in range(4)]
    (folder / "metadata.csv").write_text("\n".join(["file_name,tags", *rows]))
    return folder


def trace_training(folder: Path) -> dict[str, str]:
    """From `wsss train-cam` to the first `optimizer.step`."""
    import torch

    from wsss_hf.cli.main import main

    def step(*_arguments, **_options):
        sys.setprofile(None)
        raise Done

    torch.optim.AdamW.step = step
    photos = photographs(folder / "photos")
    arguments = ["train-cam", "--data", str(photos), "--out", str(folder / "cam"), "--quiet", "--recipe", "default"]
    tracer = Tracer()
    sys.setprofile(tracer)
    try:
        main([*arguments, *(part for setting in SETTINGS for part in ("--set", setting))])
    except Done:
        pass
    finally:
        sys.setprofile(None)
    return tracer.files


def trace_masks(folder: Path) -> dict[str, str]:
    """From the return of the last `CamClassifier.forward` to the end of `mask_image`, with PAMR and argmax."""
    import wsss_hf.stages.make_masks as stage
    from wsss_hf import CamClassifier, CamConfig, Recipe, WsssImageProcessor, load_data, make_masks

    data = load_data(str(photographs(folder / "photos")))
    data["train"] = data["train"].select([0])
    CamClassifier(CamConfig(backbone_config=BACKBONE, id2label={0: "cat", 1: "dog"})).save_pretrained(folder / "cam")
    WsssImageProcessor(size={"shortest_edge": 32, "longest_edge": 128}).save_pretrained(folder / "cam")
    tracer = Tracer()
    forward, mask_image = CamClassifier.forward, stage.mask_image

    def traced_forward(self, *arguments, **options):
        sys.setprofile(None)
        output = forward(self, *arguments, **options)
        tracer.files.clear()
        sys.setprofile(tracer)
        return output

    def traced_mask_image(*arguments):
        mask_image(*arguments)
        sys.setprofile(None)
        raise Done

    CamClassifier.forward, stage.mask_image = traced_forward, traced_mask_image
    try:
        make_masks(data, folder / "cam", Recipe.load("default", ["masks.refine=[pamr]"]), folder / "masks")
    except Done:
        pass
    finally:
        sys.setprofile(None)
    return tracer.files


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        way = {"training": trace_training, "masks": trace_masks}[sys.argv[1]]
        for file, function in way(Path(temporary)).items():
            print(f"{file:40s} {function}")
