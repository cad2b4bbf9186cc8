"""A metric → the Hub, as a Space that `evaluate.load` finds."""

from __future__ import annotations

import html
import re
import tempfile
from pathlib import Path

from huggingface_hub import SpaceCard, SpaceCardData

from ..metrics import boundary_f, mean_iou
from ..models.options import unknown_name
from .upload import HubError, Pushed, checked_target, push_folder

METRICS = {"mean_iou": mean_iou, "boundary_f": boundary_f}


def push_metric(
    name: str, repo_id: str, private: bool = False, revision: str | None = None, token: str | None = None
) -> Pushed:
    """Publish a metric as a Space, for `evaluate.load("owner/name", class_names=[…])` where wsss_hf is not installed.

    Args:
        name: one of `METRICS`.

    Raises:
        HubError: there is no such metric, an impossible id, or what the Hub said.
    """
    if name not in METRICS:
        raise HubError(unknown_name(f"metric {name!r}", name, METRICS))
    repo_id = checked_target(repo_id, revision, token)
    metric = METRICS[name]
    file = Path(str(metric.__file__))
    folder, script = file.parent, file.read_text()
    title = repo_id.rpartition("/")[2]
    description, usage, inputs = metric.DESCRIPTION.strip(), _usage_of_metric(repo_id), metric.INPUTS.strip()
    with tempfile.TemporaryDirectory() as staging:
        staged = Path(staging)
        (staged / f"{title}.py").write_text(script)  # evaluate looks for a script of the repository's name
        for sibling in re.findall(r"^from \.(\w+) import", script, re.MULTILINE):
            (staged / f"{sibling}.py").write_text((folder / f"{sibling}.py").read_text())
        words = html.escape(f"{description}\n\n{usage}\n\n{inputs}")
        (staged / "index.html").write_text(f"<!DOCTYPE html>\n<pre>{words}</pre>\n")
        metadata = SpaceCardData(
            title=title, sdk="static", license="apache-2.0", tags=["evaluate", "metric", "wsss_hf"]
        )
        body = f"# {title}\n\n{description}\n\n```python\n{usage}\n```\n\n```text\n{inputs}\n```"
        SpaceCard(f"---\n{metadata.to_yaml()}\n---\n\n{body}\n").save(staged / "README.md")
        return push_folder(staged, repo_id, "space", f"Push {name}", private, revision, token, space_sdk="static")


def _usage_of_metric(repo_id: str) -> str:
    return (
        "import evaluate\n\n"
        f'metric = evaluate.load("{repo_id}", class_names=["background", "cat", "dog"])\n'
        "metric.add_batch(predictions=label_maps, references=true_label_maps)  # (H, W) integers\n"
        "print(metric.compute())"
    )
