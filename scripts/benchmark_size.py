"""How memory and waiting grow with the number of images: generated images, every stage in a process of its own.

    python scripts/benchmark_size.py --images 2000 20000
    python scripts/benchmark_size.py --images 100000 --stages make-masks --steps 2
    python scripts/benchmark_size.py --images 2000 10000 --stages evaluate-stream --steps 2

For every number of images and stage: peak resident memory of the process (on Linux also without the pages of mapped
files, which the system takes back when it needs them), its CPU and wall-clock seconds; of labelling
also those until it starts, with rows read, checked and compared with earlier results, and those of the finished
command given once more. Some seconds of each are the imports. Images and masks are a few pictures under many names;
networks are tiny. What the chosen stages need runs before them; evaluate-stream measures classifier and segmenter on
the same images in tar files, read as a stream.
"""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

BACKBONE = "{model_type: resnet, layer_type: basic, embedding_size: 8, hidden_sizes: [8, 16], depths: [1, 1]}"
CLASSES = ("circle", "cross", "square")  # in the order that a folder gives them
STAGES = ("train-cam", "make-masks", "train-segmenter", "evaluate", "evaluate-stream")
NEEDS = {"make-masks": 1, "train-segmenter": 2, "evaluate": 3, "evaluate-stream": 3}  # so many of the first stages
PICTURES = 60  # that differ
SHARD = 1000  # images of a tar file


def generate(folder: Path, count: int, side: int) -> None:
    """Write `count` images with tags and true masks, as `metadata.csv` names them."""
    if (folder / "metadata.csv").exists():
        return
    rng = np.random.default_rng(0)
    pictures = []
    for number in range(PICTURES):
        label = number % len(CLASSES) + 1
        mask = np.zeros((side, side), np.uint8)
        mask[side // 4 : side // 2 + label, side // 4 : -side // 4] = label
        image = rng.integers(0, 80, (side, side, 3), np.uint8)
        image[mask > 0] += np.uint8(50 * label)
        pictures.append((_png(image), _png(mask), CLASSES[label - 1]))
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    lines = ["file_name,tags,mask"]
    for number in range(count):
        image_png, mask_png, name = pictures[number % PICTURES]
        (folder / "images" / f"{number:07d}.png").write_bytes(image_png)
        (folder / "masks" / f"{number:07d}.png").write_bytes(mask_png)
        lines.append(f"images/{number:07d}.png,{name},masks/{number:07d}.png")
    (folder / "metadata.csv").write_text("\n".join(lines))


def generate_shards(folder: Path, data: Path) -> None:
    """Write the images, tags and masks that `generate` wrote to `data` as tar files for a stream."""
    if folder.exists():
        return
    folder.mkdir()
    rows = [line.split(",") for line in (data / "metadata.csv").read_text().splitlines()[1:]]
    for start in range(0, len(rows), SHARD):
        with tarfile.open(folder / f"train-{start // SHARD:05d}.tar", "w") as shard:
            for image, tag, mask in rows[start : start + SHARD]:
                contents = {"png": (data / image).read_bytes(), "mask.png": (data / mask).read_bytes()}
                for suffix, content in (contents | {"txt": tag.encode()}).items():
                    member = tarfile.TarInfo(f"{Path(image).stem}.{suffix}")
                    member.size = len(content)
                    shard.addfile(member, io.BytesIO(content))


def _png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()


def command(stage: str, data: Path, out: Path, side: int, steps: int) -> list[str]:
    """The command of a stage, on what the stages before it have written beside `out`."""
    source = {"train-segmenter": out / "make-masks", "evaluate-stream": out / "shards"}.get(stage, data)
    options = ["--data", str(source), "--recipe", "default", "--quiet", "--set", f"image.size={side}"]
    for part in ("cam", "segmenter"):
        options += ["--set", f"{part}.backbone_config={BACKBONE}", "--set", f"{part}.train.steps={steps}"]
    for change in ("masks.scales=[1.0]", "masks.flip=false", "masks.refine=[]", "masks.background_threshold=0.3"):
        options += ["--set", change]
    for change in ("evaluation.scales=[1.0]", "evaluation.flip=false", "segmenter.keep_area=false"):
        options += ["--set", change]
    if stage in ("make-masks", "evaluate-stream"):
        options += ["--cam", str(out / "train-cam")]
    if stage == "evaluate-stream":
        options += ["--streaming", "--classes", ",".join(CLASSES)]
        options += ["--columns", "image_id=__key__,image=png,mask=mask.png,tags=txt"]
    if stage.startswith("evaluate"):
        options += ["--model", str(out / "train-segmenter"), "--split", "train"]
    else:
        options += ["--out", str(out / stage)]
    return [sys.executable, "-m", "wsss_hf", stage.removesuffix("-stream"), *options]


def measure(arguments: list[str], appears: Path | None = None) -> dict[str, float]:
    """Run a command → MiB of peak resident memory, CPU and wall-clock seconds, and those until a file appears."""
    begun, own = time.monotonic(), 0
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL)
    found: dict[str, float] = {}
    while True:
        with suppress(psutil.Error, AttributeError):
            memory = psutil.Process(process.pid).memory_info()
            own = max(own, memory.rss - memory.shared)
        ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        if appears is not None and not ended and not found and appears.exists():
            times = psutil.Process(process.pid).cpu_times()
            found = {"starts after CPU s": times.user + times.system, "s until then": time.monotonic() - begun}
        if ended:
            break
        time.sleep(0.02)
    if status:
        raise SystemExit(f"{' '.join(arguments)}: ended with {os.waitstatus_to_exitcode(status)}")
    unit = 2**20 if sys.platform == "darwin" else 2**10
    cpu = usage.ru_utime + usage.ru_stime
    peak = {"peak MiB": usage.ru_maxrss / unit} | ({"own MiB": own / 2**20} if own else {})
    return peak | {"CPU s": cpu, "s": time.monotonic() - begun} | found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[2000, 20000])
    parser.add_argument("--side", type=int, default=32, help="of the images, pixels")
    parser.add_argument("--steps", type=int, default=50, help="of each training")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--folder", type=Path, help="keeps images and results; default: a temporary one")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        for count in arguments.images:
            folder = (arguments.folder or Path(temporary)) / str(count)
            generate(folder / "data", count, arguments.side)
            for stage in STAGES:
                needed = STAGES[: max(NEEDS.get(chosen, 0) for chosen in arguments.stages)]
                if stage not in (*arguments.stages, *needed):
                    continue
                if stage == "evaluate-stream":
                    generate_shards(folder / "shards", folder / "data")
                run = command(stage, folder / "data", folder, arguments.side, arguments.steps)
                partial = folder / f"{stage}.partial" / "recipe.yaml" if stage == "make-masks" else None
                report(count, stage, measure(run, partial))
                if stage == "make-masks":
                    report(count, "make-masks again", measure(run))


def report(count: int, stage: str, figures: dict[str, float]) -> None:
    print(f"{count:8d}  {stage:18s}" + "".join(f"  {name} {value:.1f}" for name, value in figures.items()), flush=True)


if __name__ == "__main__":
    main()
