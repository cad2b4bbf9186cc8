"""Put the demo's table and picture into the README, its cards into model_cards/.

python scripts/update_readme.py runs/demo
"""

import argparse
import json
import re
from pathlib import Path

import yaml
from PIL import Image

from wsss_hf.evaluation.tables import markdown_table
from wsss_hf.hub.cards import recipe_cards
from wsss_hf.hub.portable import portable_values
from wsss_hf.stages.run import COLUMNS

ROOT = Path(__file__).resolve().parent.parent
CARDS = ROOT / "model_cards"
TABLE = re.compile(r"(?<=<!-- demo table: )(.*?)(?=<!-- end of demo table -->)", re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="the folder that `wsss demo` wrote")
    run = parser.parse_args().run
    results = json.loads((run / "results.json").read_text())
    table = markdown_table(results["results"], COLUMNS)
    text = f"written by `python scripts/update_readme.py` from the demo's results.json -->\n{table}"
    readme = ROOT / "README.md"
    readme.write_text(TABLE.sub(lambda _: text, readme.read_text()))
    made = portable_values(results)
    (CARDS / "demo.json").write_text(json.dumps(made, indent=1) + "\n")
    (CARDS / "demo.yaml").write_text(yaml.safe_dump(made["recipe"], sort_keys=False))
    for folder, card in recipe_cards("demo", made, "apache-2.0").items():
        card.save(CARDS / f"demo-{folder}.md")
    picture = Image.open(run / "gallery.png").convert("RGB")
    picture.reduce(2).quantize(256).save(CARDS / "demo.png", optimize=True)


if __name__ == "__main__":
    main()
