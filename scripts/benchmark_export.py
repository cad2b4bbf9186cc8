"""What exporting costs and saves: size, speed and mean IoU of a segmenter in PyTorch, as ONNX, and as 8-bit ONNX.

python scripts/benchmark_export.py runs/photos/segmenter --data voc --root VOCdevkit/VOC2012 --limit 60
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import torch
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation
from transformers.modeling_outputs import SemanticSegmenterOutput

import wsss_hf  # noqa: F401  (registers the models)
from wsss_hf.data.sources import load_data
from wsss_hf.hub.onnx import INT8_FILE, ONNX_FILE, export_onnx
from wsss_hf.progress import set_quiet
from wsss_hf.reporting.tables import print_table
from wsss_hf.settings import EvaluationSettings
from wsss_hf.stages.evaluate import evaluate_segmenter

SETTINGS = EvaluationSettings(flip=False, batch_size=1)


class Squares:
    """A segmenter that resizes all images to squares of `side` pixels."""

    device = torch.device("cpu")

    def __init__(self, logits: Callable[[torch.Tensor], torch.Tensor], config, side: int):
        self.logits, self.config, self.side = logits, config, side

    def __call__(self, pixel_values: torch.Tensor) -> SemanticSegmenterOutput:
        pixel_values = F.interpolate(pixel_values, size=(self.side, self.side), mode="bilinear", align_corners=False)
        return SemanticSegmenterOutput(logits=self.logits(pixel_values))


def onnx_logits(path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda pixel_values: torch.from_numpy(session.run(["logits"], {"pixel_values": pixel_values.numpy()})[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id of a segmenter")
    parser.add_argument(
        "--data", required=True, help="as for `wsss evaluate`; split val, or train where there is none"
    )
    parser.add_argument("--root", help="the VOC2012 folder, for --data voc")
    parser.add_argument("--limit", type=int, help="at most so many images")
    parser.add_argument("--repeats", type=int, default=20, help="forward passes that are timed")
    parser.add_argument("--out", type=Path, help="also write the figures here, as JSON")
    options = parser.parse_args()
    set_quiet(True)

    model = AutoModelForSemanticSegmentation.from_pretrained(options.model, trust_remote_code=False).eval()
    processor = AutoImageProcessor.from_pretrained(options.model, trust_remote_code=False)
    names = list(model.config.id2label.values())[1:]
    classes = names if options.data == "voc" else None
    data = load_data(options.data, root=options.root, classes=classes, limit=options.limit)
    rows = data["val"] if "val" in data else data["train"]
    side = processor.size["shortest_edge"]
    with tempfile.TemporaryDirectory() as folder:
        onnx = export_onnx(options.model, Path(folder) / "onnx", size=side, int8=True)
        weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        candidates = {
            "PyTorch": (lambda pixel_values: model(pixel_values).logits, weights),
            "ONNX": (onnx_logits(onnx / ONNX_FILE), (onnx / ONNX_FILE).stat().st_size),
            "ONNX, 8-bit weights": (onnx_logits(onnx / INT8_FILE), (onnx / INT8_FILE).stat().st_size),
        }
        table = []
        for name, (logits, size) in candidates.items():
            segmenter = Squares(logits, model.config, side)
            seconds = _seconds(segmenter, options.repeats)
            figures = evaluate_segmenter(segmenter, processor, rows, SETTINGS)
            row = {"model": name, "size": f"{size / 2**20:.1f} MiB", "per image": f"{1000 * seconds:.1f} ms"}
            table.append(row | {key: figures[key] for key in ("mean_iou", "mean_iou_interval", "num_images")})
    title = f"one image of {side}x{side}, {torch.get_num_threads()} threads"
    print_table(table, f"{options.model}: {title}")
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"title": title, "rows": table}, indent=1) + "\n")


def _seconds(segmenter: Squares, repeats: int) -> float:
    """Median time of a forward pass."""
    pixel_values, times = torch.zeros(1, 3, segmenter.side, segmenter.side), []
    with torch.inference_mode():
        for _ in range(repeats + 2):
            started = time.perf_counter()
            segmenter(pixel_values)
            times.append(time.perf_counter() - started)
    return sorted(times[2:])[repeats // 2]


if __name__ == "__main__":
    main()
