"""Model and data set cards, written from the results of a run: no figure on them is typed by hand."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import DatasetDict
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCard, DatasetCardData, EvalResult, ModelCard, ModelCardData

from ..data.saliency import describe_saliency
from ..models.modeling_affinity import AffinityConfig, AffinityNetwork
from ..pseudo_labels.rules import RULES
from ..reporting.tables import markdown_table, markdown_text
from .papers import PAPERS, papers_of_masks, refinements

RUNS = ("run", "demo")
"""Commands whose results rest on image tags from end to end."""

_COLUMNS = ("result", "split", "mean_iou", "mean_iou_interval", "pixel_accuracy", "num_images")
_TAGS = ["wsss_hf", "weakly-supervised-semantic-segmentation", "semantic-segmentation"]
# Names and licences of the built-in sources, which are no data sets of the Hub.
_DATA_NAMES = {"toy": "generated images of invented creatures", "voc": "PASCAL VOC 2012", "coco": "COCO"}
_DATA_TERMS = {
    "toy": "The images are drawn by wsss_hf (Apache-2.0).",
    "voc": "The photographs are from Flickr and belong to their owners; Flickr's terms of use apply.",
    "coco": "The photographs are from Flickr and belong to their owners; Flickr's terms of use apply. The annotations "
    "are COCO's (CC BY 4.0).",
}


@dataclass
class CardSubject:
    """The model or data set that a card describes.

    Attributes:
        repo_id: its id on the Hub.
        folder: its name inside the run, "segmenter", "cam", "masks" …: rows of the results with that `of` are its own.
        classes: names of the object classes.
        is_classifier: a CAM classifier; otherwise a segmenter.
        classifies_masks: a mask classification model: its pipeline needs `subtask="semantic"` to label pixels.
        needs_code: it is loaded with `trust_remote_code=True`.
        shows_squares: its image processor changes the aspect of photographs.
        cuts_squares: its image processor cuts photographs into squares.
        on_true_masks: trained on true masks: the upper bound, not a weakly supervised model.
        on_tags: what is recorded shows that it rests on image tags and, where the recipe says so, saliency alone.
        architecture: model type, as transformers calls it.
        licence: the Hub's identifier of it.
        picture: file name of the examples in the repository.
        recipe_file: file name of the resolved recipe there.
    """

    repo_id: str
    folder: str
    classes: Sequence[str]
    is_classifier: bool = False
    classifies_masks: bool = False
    needs_code: bool = True
    shows_squares: bool = False
    cuts_squares: bool = False
    on_true_masks: bool = False
    on_tags: bool = False
    architecture: str = ""
    licence: str | None = None
    picture: str | None = None
    recipe_file: str = "recipe.yaml"


def model_card(subject: CardSubject, made: dict) -> ModelCard:
    """The card of a model.

    Args:
        made: a run's `results.json` without local paths: `data`, `recipe`, `results`, `minutes`, `environment`,
            `command`; what is missing is left out of the card.
    """
    rows, data = made.get("results", []), made.get("data") or {}
    own = _rows_of(rows, subject.folder)
    base = _backbone(subject, made.get("recipe", {}))
    card_data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-segmentation",
        license=subject.licence,
        tags=_TAGS,
        base_model=base.partition("@")[0] if base and "/" in base else None,
        datasets=_hub_data(data),
        model_name=_name(subject),
        eval_results=[result for row in own for result in _eval_results(row, data)] or None,
    )
    sections = [
        f"# {_name(subject)}",
        _what_it_is(subject, made),
        _usage(subject),
        _results(subject, rows, made),
        _recipe(subject, made, base),
        _limits(subject, own),
        _citations(subject, made.get("recipe", {})),
    ]
    return ModelCard(_whole(card_data.to_yaml(), sections))


def recipe_cards(name: str, made: dict, licence: str | None) -> dict[str, ModelCard]:
    """Cards of a run's CAM classifier and segmenter from its results alone, as `model_cards/` holds them.

    Args:
        name: the models are `name-cam` and `name-segmenter`, the recipe `name.yaml`, the examples `name.png`: shown
            for generated data only, since photographs belong to their owners.
        made: as for `model_card`.
    """
    names = next(list(row["iou"]) for row in made["results"] if "iou" in row)
    return {
        folder: model_card(
            CardSubject(
                repo_id=f"your-name/{name}-{folder}",
                folder=folder,
                classes=names[1:],
                is_classifier=folder == "cam",
                on_tags=made.get("command") in RUNS,
                licence=licence,
                picture=f"{name}.png" if made["data"]["source"] == "toy" else None,
                recipe_file=f"{name}.yaml",
            ),
            made,
        )
        for folder in ("cam", "segmenter")
    }


def affinity_card(
    repo_id: str, config: AffinityConfig, made: dict | None = None, licence: str | None = None
) -> ModelCard:
    """The card of an affinity network.

    Args:
        made: as of [`model_card`]; its training is known where `recipe` has a section `affinity`.
    """
    made = made or {}
    recipe, data = made.get("recipe") or {}, made.get("data") or {}
    card_data = ModelCardData(
        library_name="transformers", license=licence, tags=["wsss_hf", "weakly-supervised-semantic-segmentation"]
    )
    learnt = (
        f"It learnt from what the maps of a CAM classifier are certain of; no mask was read. Data: {_data_name(data)}."
        if "affinity" in recipe
        else "What it was trained on is not recorded here."
    )
    learns = "boundaries" if config.kind == "irn" else "features"
    sections = [
        f"# {repo_id.rpartition('/')[2]}",
        f"An affinity network: {learns} on a frozen `{config.backbone_config.model_type}` that say which neighbouring "
        f"pixels belong together, for random walks of class activation maps. {learnt} Made with wsss_hf.",
        "## Use\n\nFor the masks of a CAM classifier:\n\n```bash\nwsss make-masks --data photos/ --cam CLASSIFIER "
        f"--affinity {repo_id} --set masks.refine=[walk] --out masks\n```\n\nOr in Python, of any maps:\n\n"
        f'```python\nfrom wsss_hf import AffinityNetwork\n\nnetwork = AffinityNetwork.from_pretrained("{repo_id}")\n'
        "# (B, 3, H, W) images as network.image_processor gives them, (B, K, h, w) maps\n"
        "walked = network.walk(pixel_values, maps, radius=5, power=10, steps=64)\n```",
        f"## Citations\n\nPlease cite\n\n- {PAPERS[config.kind]}",
    ]
    return ModelCard(_whole(card_data.to_yaml(), sections))


def short_card(model: Any, repo_id: str, tags: list[str]) -> ModelCard:
    """A card for a model of this package of which nothing is known but itself."""
    if isinstance(model, AffinityNetwork):
        return affinity_card(repo_id, model.config)
    kind, backbone = type(model).__name__, model.config.backbone_config.model_type
    classes = [label for value, label in sorted(model.mask_id2label.items()) if value > 0]
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-segmentation",
        tags=list(
            dict.fromkeys(["wsss_hf", "weakly-supervised-semantic-segmentation", *(model.model_tags or []), *tags])
        ),
    )
    return ModelCard(f"""---
{metadata.to_yaml()}
---

# {repo_id.rpartition("/")[2]}

A `{kind}` of wsss_hf (weakly supervised semantic segmentation) on a `{backbone}` backbone.
It knows {len(classes)} classes: {", ".join(map(markdown_text, classes))}; all else is background.

What it was trained on, and how well it does, is not recorded here: try it on images of your own before you rely on it.

## Use

```python
from transformers import pipeline

segmenter = pipeline("image-segmentation", model="{repo_id}", trust_remote_code=True)
for found in segmenter("photo.jpg"):
    print(found["label"], found["score"], found["mask"].size)
```

The repository brings the code that `trust_remote_code=True` runs; read it first. Where wsss_hf is installed,
`import wsss_hf` takes its place.
""")


def dataset_card(subject: CardSubject, rows: DatasetDict, made: dict) -> DatasetCard:
    """The card of images with pseudo masks.

    Args:
        rows: the data set; its features and sizes go into the metadata, for the viewer.
        made: as for `model_card`.
    """
    results, data = made.get("results", []), made.get("data") or {}
    total, saliency = sum(map(len, rows.values())), _saliency(made)
    card_data = DatasetCardData(
        license=subject.licence,
        task_categories=["image-segmentation"],
        tags=_TAGS,
        size_categories=_size_category(total),
        source_datasets=_hub_data(data),
        dataset_info={
            "features": rows["train"].features._to_yaml_list(),
            "splits": [{"name": split, "num_examples": len(part)} for split, part in rows.items()],
        },
    )
    files = [{"split": split, "path": f"data/{split}-*"} for split in rows]
    MetadataConfigs({"default": {"data_files": files}}).to_dataset_card_data(card_data)
    columns = {
        "image_id": "name of the image, unique in its split",
        "image": "the image",
        "tags": "its classes, without background" + (": all the supervision there was" if subject.on_tags else ""),
        "pseudo_mask": "machine-made label map (split train): 0 = background, c + 1 = class c, 255 = no label",
        "confidence": "how sure the pseudo mask is of each pixel: 0 = worthless, 255 = certain",
        "mask": "true label map where there is one, for evaluation only; empty elsewhere",
        "saliency": "saliency map, 0 to 255",
    }
    present = {name: text for split in rows.values() for name, text in columns.items() if name in split.features}
    supervision = "made from image tags and saliency maps" if saliency else "made from image tags only"
    sections = [
        f"# {_name(subject)}",
        f"{len(rows['train'])} training images with **pseudo masks** for {len(subject.classes)} classes "
        f"({_listed(subject.classes)}), {supervision if subject.on_tags else 'made'} by wsss_hf, "
        f"from {_data_name(data)}. The masks were made by a machine: they are wrong in places, mostly at borders and "
        f"where classes always occur together; do not measure a model on them."
        + (f" They rest on {saliency}." if saliency else ""),
        f'```python\nfrom datasets import load_dataset\n\nrows = load_dataset("{subject.repo_id}")\n```\n\n'
        f"Train a segmenter on them: `wsss train-segmenter --data {subject.repo_id} --out runs/segmenter`.",
        "## Columns\n\n" + "".join(f"- `{name}`: {text}\n" for name, text in present.items()),
        _results(subject, results, made),
        _recipe(subject, made, _backbone(subject, made.get("recipe", {}))),
        _citations(subject, made.get("recipe", {})),
    ]
    return DatasetCard(_whole(card_data.to_yaml(), sections))


def _whole(metadata: str, sections: Sequence[str]) -> str:
    return f"---\n{metadata}\n---\n\n" + "\n\n".join(section.strip() for section in sections if section) + "\n"


def _name(subject: CardSubject) -> str:
    return subject.repo_id.rpartition("/")[2]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(markdown_text, names))


def _data_name(data: dict) -> str:
    source = data.get("source")
    if not source:
        return "private images"
    return _DATA_NAMES.get(source) or "`" + " ".join(source.split()).replace("`", "'") + "`"  # shown as it is


def _hub_data(data: dict) -> list[str] | None:
    return [data["source"]] if "/" in data.get("source", "") else None


def _rows_of(rows: Sequence[dict], folder: str) -> list[dict]:
    """The measured rows about `folder` of a run."""
    return [row for row in rows if row.get("of") == folder and row.get("mean_iou") is not None]


def _backbone(subject: CardSubject, recipe: dict) -> str | None:
    section = recipe.get("cam" if subject.is_classifier or "segmenter" not in recipe else "segmenter", {})
    if section.get("from_cam") and "cam" in recipe:
        section = recipe["cam"]
    config = section.get("backbone_config") or {}
    return (
        section.get("model")
        or section.get("backbone")
        or (f"{config['model_type']}, from random weights" if config else None)
    )


def _eval_results(row: dict, data: dict) -> list[EvalResult]:
    source = data.get("source") or "unknown"
    common = {
        "task_type": "image-segmentation",
        "task_name": "Semantic segmentation",
        "dataset_type": source,
        "dataset_name": _DATA_NAMES.get(source, source),
        "dataset_split": row["split"],
    }
    figures = {"mean_iou": "Mean IoU", "pixel_accuracy": "Pixel accuracy"}
    return [
        EvalResult(metric_type=key, metric_name=f"{name} ({row['result']})", metric_value=round(row[key], 4), **common)
        for key, name in figures.items()
        if row.get(key) is not None
    ]


def _saliency(made: dict) -> str | None:
    """Where the saliency maps are from that a result rests on, in words; None if it rests on none."""
    recipe, told = made.get("recipe") or {}, (made.get("data") or {}).get("saliency")
    rule = RULES.get(recipe.get("masks", {}).get("seeds"))
    if "masks" in recipe or "cam" in recipe:
        reads = bool(recipe.get("cam", {}).get("saliency")) or (rule is not None and rule.saliency == "needed")
        reads = reads or bool(told and rule is not None and rule.saliency == "optional")
    else:
        reads = bool(told)  # a segmenter whose masks were made elsewhere
    return markdown_text(describe_saliency(told)) if reads else None


def _what_it_is(subject: CardSubject, made: dict) -> str:
    if subject.is_classifier:
        kind = "A CAM classifier: it learns which classes are in an image and shows, as class activation maps, where"
    else:
        kind = "A semantic segmentation model"
    saliency = _saliency(made)
    if subject.on_true_masks:
        training = "It was trained on **true masks**, as the upper bound of weakly supervised models."
    elif not subject.on_tags:
        training = "Nothing is recorded of the labels that it was trained with."
    elif saliency:
        training = (
            "It was trained with **image tags and saliency maps**: no true mask of these images was used for "
            f"training, thresholds or model selection, but it rests on {saliency}."
        )
    else:
        training = (
            "It was trained with **image tags only**: no mask was used for training, thresholds or model selection."
        )
    return (
        f"{kind}. It knows {len(subject.classes)} classes: {_listed(subject.classes)}; all else is background. "
        f"{training} Data: {_data_name(made.get('data') or {})}. Made with wsss_hf."
    )


def _usage(subject: CardSubject) -> str:
    trust = ", trust_remote_code=True" if subject.needs_code else ""
    subtask = ', subtask="semantic"' if subject.classifies_masks else ""
    words = (
        "The repository brings the code that `trust_remote_code=True` runs; read it first. Where wsss_hf is "
        "installed, `import wsss_hf` takes its place."
        if subject.needs_code
        else "The architecture is the library's own: no code but transformers is run."
    )
    if subject.shows_squares and not subject.needs_code:
        words += (
            " Photographs are resized to squares, so that any of them make a batch (`batch_size=8`); the figures "
            "below were measured on images of their own aspect."
        )
    if subject.cuts_squares:
        words += (
            " Photographs are cut into squares: the library's own pipeline takes them one by one; after "
            "`import wsss_hf` it takes batches (`batch_size=8`), too."
        )
    lines = [
        "from transformers import pipeline",
        "",
        f'segmenter = pipeline("image-segmentation", model="{subject.repo_id}"{trust})',
        f'for found in segmenter("photo.jpg"{subtask}):',
        '    print(found["label"], found["score"], found["mask"].size)',
    ]
    if subject.is_classifier:
        known = json.dumps(list(subject.classes[:1]), ensure_ascii=False)
        lines.append(f'segmenter("photo.jpg", tags={known})  # where the tags are known')
    program = "\n".join(lines)
    return f"## Use\n\n```python\n{program}\n```\n\n{words}"


def _results(subject: CardSubject, rows: Sequence[dict], made: dict) -> str:
    measured = [row for row in rows if row.get("mean_iou") is not None]
    if not measured:
        return "## Results\n\nNothing was measured: there were no true masks to measure on."
    own = _rows_of(rows, subject.folder)
    parts = [
        "## Results\n\nIn percent, of one run. The intervals are bootstrapped over images.",
        markdown_table(measured, _COLUMNS),
    ]
    if own:
        kind = "These masks" if subject.folder.startswith("masks") else "This model"
        parts[0] += f" {kind}: {'; '.join(markdown_text(row['result']) for row in own)}."
    shown = own
    if subject.is_classifier:
        shown = own + _rows_of(rows, "masks")
        steps = refinements(made.get("recipe", {}))
        parts[0] += (
            " Pseudo masks are made from this classifier's maps of the classes that an image is tagged with"
            + (" and from saliency maps" if _saliency(made) else "")
            + (f", and refined with {' → '.join(steps)}" if steps else "")
            + ("." if own else "; the maps alone were not measured.")
        )
    names = list(shown[0].get("iou", {})) if shown else []
    per_class = [{"class": name} | {row["result"]: row["iou"].get(name) for row in shown} for name in names]
    if per_class:
        parts += ["IoU per class:", markdown_table(per_class)]
    if subject.picture:
        parts.append(f"![Examples: the image and what was made of it]({subject.picture})")
    return "\n\n".join(part.strip() for part in parts)


def _recipe(subject: CardSubject, made: dict, base: str | None) -> str:
    recipe, data = made.get("recipe", {}), made.get("data") or {}
    terms = _DATA_TERMS.get(data.get("source", ""), "Its own terms apply.")
    facts = [f"**Data**: {_data_name(data)}. {terms}"]
    if base:
        facts.append(
            f"**Backbone**: {markdown_text(base)}" + (f", as `{subject.architecture}`" if subject.architecture else "")
        )
    if "cam" in recipe and not subject.on_true_masks:
        methods = recipe["cam"].get("methods") or {}
        facts.append(f"**Localisation**: CAM{''.join(f' + {name.upper()}' for name in methods)}")
    if "masks" in recipe and not subject.on_true_masks:
        scales = ", ".join(map(str, recipe["masks"]["scales"]))
        steps = " → ".join(refinements(recipe)) or "none"
        facts.append(f"**Pseudo masks**: maps at scales {scales}; refinement: {steps}")
    rounds = recipe.get("self_training", {}).get("rounds", 1)
    if rounds > 1 and not subject.on_true_masks:
        facts.append(
            f"**Self-training**: {rounds} rounds in all, each segmenter labelling the images for the next one"
        )
    if made.get("minutes") is not None:
        where = (made.get("environment") or {}).get("device")
        facts.append(f"**Cost**: {made['minutes']:.0f} minutes for the whole run" + (f" on {where}" if where else ""))
    if made.get("environment"):
        machine = ("device", "processes", "threads")
        versions = {key: value for key, value in made["environment"].items() if key not in machine}
        facts.append("**Versions**: " + ", ".join(f"{key} {value}" for key, value in versions.items()))
    text = "## How it was made\n\n" + "".join(f"- {fact}\n" for fact in facts)
    if made.get("command") and recipe:
        text += f"\nEvery setting is in `{subject.recipe_file}`. To make it again:\n\n"
        text += f"```bash\n{_command(made, subject.recipe_file)}\n```"
    return text


def _command(made: dict, recipe_file: str) -> str:
    data = made.get("data") or {}
    parts = ["wsss", made["command"]]
    if made["command"] != "demo":
        values = {"data": data.get("source")} | {
            key: data.get(key) for key in ("root", "limit", "revision", "separator")
        }
        values["saliency"] = data["saliency"] if isinstance(data.get("saliency"), str) else None
        values["classes"] = ",".join(data.get("classes") or []) or None
        values["columns"] = (
            ",".join(f"{column}={given}" for column, given in (data.get("columns") or {}).items()) or None
        )
        parts += [part for key, value in values.items() if value is not None for part in (f"--{key}", str(value))]
    return shlex.join([*parts, "--recipe", recipe_file, "--out", "runs/again"])


def _limits(subject: CardSubject, own: Sequence[dict]) -> str:
    limits = [
        "It knows only the classes above; anything else becomes background or the most similar class.",
        "The figures hold for images like those it was measured on; it has not been tested on others.",
    ]
    if subject.on_tags and not subject.on_true_masks:
        limits.insert(
            0,
            "Tags do not say where a class is: masks may cover what always occurs together with a class (rails with "
            "trains, water with boats), or only its most discriminative part, and their borders are rough.",
        )
    scored = [(value, name) for row in own for name, value in row.get("iou", {}).items() if value is not None]
    if scored:
        value, name = min(scored)
        limits.append(f"Its weakest class is {markdown_text(name)}, with an IoU of {100 * value:.1f} %.")
    return (
        "## Intended use and limits\n\nFor research, for annotating images faster, and where a rough mask helps and "
        "errors do no harm. Not for decisions about people, nor where safety depends on it.\n\n"
        + "".join(f"- {limit}\n" for limit in limits)
    )


def _citations(subject: CardSubject, recipe: dict) -> str:
    papers = [] if subject.on_true_masks else papers_of_masks(recipe)
    if (
        not subject.is_classifier
        and subject.needs_code
        and "segmenter" in recipe
        and not subject.folder.startswith("masks")
    ):
        head = recipe["segmenter"].get("head", "deeplab_v2")
        papers += [PAPERS[head]] if head in PAPERS else []
    listed = "".join(f"- {paper}\n" for paper in dict.fromkeys(papers))
    return f"## Citations\n\nPlease cite\n\n{listed}" if papers else ""


def _size_category(rows: int) -> str:
    if rows < 1000:
        return "n<1K"
    for limit, name in ((10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M")):
        if rows < limit:
            return name
    return "1M<n<10M"
