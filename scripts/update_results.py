"""Put the tables, cards and pictures that a command measured into model_cards/.

python scripts/update_results.py runs/demo runs/photographs                         # what `wsss demo` and `run` wrote
python scripts/update_results.py --comparisons runs/methods_toy runs/refined_toy    # what `wsss compare` wrote
python scripts/update_results.py --costs runs/costs.json                            # what benchmark_methods.py wrote
python scripts/update_results.py --throughput runs/training.json                    # what benchmark_training.py wrote
python scripts/update_results.py --exports runs/exports.json                        # what benchmark_export.py wrote
python scripts/update_results.py --examples runs/photographs/segmenter              # a model, on free photographs
"""

import argparse
import json
import re
import tempfile
from pathlib import Path

import skimage.data
import yaml
from PIL import Image

from wsss_hf import predict
from wsss_hf.hub.cards import recipe_cards
from wsss_hf.hub.portable import portable_values
from wsss_hf.reporting.comparison import comparison_table
from wsss_hf.reporting.costs import cost_rows
from wsss_hf.reporting.tables import RESULT_COLUMNS, markdown_table

ROOT = Path(__file__).resolve().parent.parent
CARDS = ROOT / "model_cards"
RESULTS = CARDS / "results.md"
COMPARED = ["method", "seeds", "masks, mean IoU", "threshold"]
EXAMPLES = ("chelsea", "astronaut")  # CC0, and in the public domain
SHOWN = {
    "methods": [*COMPARED, "best threshold, by masks", "at", "boundary F", "mAP"],
    "refined": [*COMPARED, "boundary F"],  # the oracle threshold of plain maps says nothing about refined ones
    "saliency": [*COMPARED, "boundary F"],
    "segmenters": [*COMPARED, "segmenter, mean IoU", "on true masks, mean IoU", "share of it"],
    "walk": [*COMPARED, "boundary F"],
}
"""First word of a plan's name → the columns of its table."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="*", help="folders that `wsss demo` or `wsss run` wrote")
    parser.add_argument("--comparisons", type=Path, nargs="+", default=[], help="folders that `wsss compare` wrote")
    parser.add_argument("--costs", type=Path, help="the file that `benchmark_methods.py --out` wrote")
    parser.add_argument("--throughput", type=Path, help="the file that `benchmark_training.py --out` wrote")
    parser.add_argument("--examples", help="a segmenter that draws model_cards/examples.png")
    parser.add_argument("--exports", type=Path, help="the file that `benchmark_export.py --out` wrote")
    arguments = parser.parse_args()
    for run in arguments.runs:
        update_run(run)
    for comparison in arguments.comparisons:
        update_comparison(comparison)
    if arguments.costs is not None:
        update_costs(arguments.costs)
    if arguments.throughput is not None:
        update_throughput(arguments.throughput)
    if arguments.exports is not None:
        update_exports(arguments.exports)
    if arguments.examples is not None:
        draw_examples(arguments.examples)


def update_run(run: Path) -> None:
    """The table and the cards of a run; a picture only where the images are generated."""
    results = json.loads((run / "results.json").read_text())
    made = portable_values(results)
    embedded = made["data"]["source"] == "toy"
    write_table(
        run.name, markdown_table(results["results"], RESULT_COLUMNS), f"the results.json of `wsss {made['command']}`"
    )
    (CARDS / f"{run.name}.json").write_text(json.dumps(made, indent=1) + "\n")
    (CARDS / f"{run.name}.yaml").write_text(yaml.safe_dump(made["recipe"], sort_keys=False))
    for folder, card in recipe_cards(run.name, made, "apache-2.0" if embedded else None).items():
        card.save(CARDS / f"{run.name}-{folder}.md")
    if embedded:
        picture = Image.open(run / "gallery.png").convert("RGB")
        picture.reduce(2).quantize(256).save(CARDS / f"{run.name}.png", optimize=True)


def update_comparison(comparison: Path) -> None:
    """The table of a comparison; the folder has the name of its plan."""
    rows = comparison_table(json.loads((comparison / "results.json").read_text())["rows"])
    shown = [name for name in SHOWN[comparison.name.partition("_")[0]] if any(name in row for row in rows)]
    write_table(comparison.name, markdown_table(rows, shown), f"`wsss compare scripts/plans/{comparison.name}.yaml`")


def update_costs(costs: Path) -> None:
    """The table of what the methods cost."""
    measured = json.loads(costs.read_text())
    rows = [
        {"method": row["methods"], "time": f"{row['time']:.2f}", "memory": f"{row['memory']:.2f}"}
        for row in measured["rows"]
    ]
    write_table("costs", markdown_table(rows), f"`python scripts/benchmark_methods.py`: {measured['title']}")


def update_throughput(throughput: Path) -> None:
    """The table of what whole recipes cost on one device and on several."""
    measured = json.loads(throughput.read_text())
    write_table(
        "throughput",
        markdown_table(cost_rows(measured)),
        f"`python scripts/benchmark_training.py`: {measured['title']}",
    )


def update_exports(exports: Path) -> None:
    """The table of a model as PyTorch and as ONNX."""
    measured = json.loads(exports.read_text())
    write_table(
        "exports", markdown_table(measured["rows"]), f"`python scripts/benchmark_export.py`: {measured['title']}"
    )


def draw_examples(model: str) -> None:
    """What a segmenter finds in the free photographs that scikit-image ships, each beside its overlay."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for photograph in EXAMPLES:
            Image.fromarray(getattr(skimage.data, photograph)()).save(folder / f"{photograph}.png")
        predict(folder, model, folder / "predicted")
        pictures = [
            Image.open(file).convert("RGB")
            for photograph in EXAMPLES
            for file in (folder / f"{photograph}.png", folder / "predicted" / "overlays" / f"{photograph}.jpg")
        ]
    height, gap = 240, 8
    pictures = [picture.resize((picture.width * height // picture.height, height)) for picture in pictures]
    sheet = Image.new("RGB", (sum(picture.width + gap for picture in pictures) - gap, height), "white")
    left = 0
    for picture in pictures:
        sheet.paste(picture, (left, 0))
        left += picture.width + gap
    sheet.quantize(256).save(CARDS / "examples.png", optimize=True)


def write_table(name: str, table: str, source: str) -> None:
    """Between the marks that results.md has for it."""
    mark = re.compile(rf"(?<=<!-- {name} table: )(.*?)(?=<!-- end of {name} table -->)", re.DOTALL)
    text, results = f"written by `python scripts/update_results.py` from {source} -->\n{table}", RESULTS.read_text()
    if not mark.search(results):
        raise SystemExit(f"{RESULTS}: expected the marks of a {name} table, got none")
    RESULTS.write_text(mark.sub(lambda _: text, results))


if __name__ == "__main__":
    main()
