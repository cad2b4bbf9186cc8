"""Put tables and pictures that a command measured into the README and into model_cards/.

python scripts/update_readme.py runs/demo                                     # what `wsss demo` wrote
python scripts/update_readme.py --methods runs/methods_toy runs/methods_small # what `wsss compare` wrote, a table each
"""

import argparse
import json
import re
from pathlib import Path

import yaml
from PIL import Image

from wsss_hf.evaluation.comparison import comparison_table
from wsss_hf.evaluation.tables import markdown_table
from wsss_hf.hub.cards import recipe_cards
from wsss_hf.hub.portable import portable_values
from wsss_hf.stages.run import COLUMNS

ROOT = Path(__file__).resolve().parent.parent
CARDS = ROOT / "model_cards"
README = ROOT / "README.md"
METHOD_COLUMNS = ["method", "seeds", "masks, mean IoU", "best threshold, by masks", "at", "boundary F", "mAP"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", help="the folder that `wsss demo` wrote")
    parser.add_argument("--methods", type=Path, nargs="+", default=[], help="folders that `wsss compare` wrote")
    arguments = parser.parse_args()
    if arguments.run:
        update_demo(arguments.run)
    for comparison in arguments.methods:
        update_methods(comparison)


def update_demo(run: Path) -> None:
    results = json.loads((run / "results.json").read_text())
    write_table("demo", markdown_table(results["results"], COLUMNS), "the demo's results.json")
    made = portable_values(results)
    (CARDS / "demo.json").write_text(json.dumps(made, indent=1) + "\n")
    (CARDS / "demo.yaml").write_text(yaml.safe_dump(made["recipe"], sort_keys=False))
    for folder, card in recipe_cards("demo", made, "apache-2.0").items():
        card.save(CARDS / f"demo-{folder}.md")
    picture = Image.open(run / "gallery.png").convert("RGB")
    picture.reduce(2).quantize(256).save(CARDS / "demo.png", optimize=True)


def update_methods(comparison: Path) -> None:
    """The table of a comparison; the folder has the name of its plan."""
    rows = json.loads((comparison / "results.json").read_text())["rows"]
    table = markdown_table(comparison_table(rows), METHOD_COLUMNS)
    write_table(comparison.name, table, f"`wsss compare scripts/plans/{comparison.name}.yaml`")


def write_table(name: str, table: str, source: str) -> None:
    """Between the marks that the README has for it."""
    mark = re.compile(rf"(?<=<!-- {name} table: )(.*?)(?=<!-- end of {name} table -->)", re.DOTALL)
    text, readme = f"written by `python scripts/update_readme.py` from {source} -->\n{table}", README.read_text()
    if not mark.search(readme):
        raise SystemExit(f"README.md has no place for a {name} table")
    README.write_text(mark.sub(lambda _: text, readme))


if __name__ == "__main__":
    main()
