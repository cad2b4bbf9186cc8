"""Models and data sets → the Hub, in one commit each: a repository is whole, or it is what it was before.

Large data sets are the exception: what has arrived is not sent again, and the card comes last.
"""

from __future__ import annotations

import html
import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from datasets import load_from_disk
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    ModelCardData,
    RepoCard,
    SpaceCard,
    SpaceCardData,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_token, httpx, validate_repo_id
from transformers import AutoImageProcessor, PreTrainedModel
from transformers.models.segformer.image_processing_pil_segformer import SegformerImageProcessorPil
from transformers.utils import IMAGE_PROCESSOR_NAME

from .. import models
from ..data.saving import num_bytes, with_embedded_images
from ..data.tagged import class_names
from ..data.text import brief
from ..inference.weights import check_weights
from ..metrics import boundary_f, mean_iou
from ..models.image_processing_wsss import WsssImageProcessor
from ..models.mask_classifiers import MASK_CLASSIFIERS, load_segmentation_model
from ..models.modeling_affinity import AffinityNetwork
from ..models.options import unknown_name
from ..models.portable_model import PortableModel
from ..reporting.tables import markdown_text
from ..training.library_segmenter import of_one_shape
from .cards import RUNS, CardSubject, affinity_card, dataset_card, model_card
from .portable import portable_values

SEGMENTER_FOLDER, MASKS_FOLDER = "segmenter", "masks"  # inside a run's folder
RESULTS_FILE, GALLERY_FILE, SETTINGS_FILE = "results.json", "gallery.png", "recipe.yaml"
METRICS = {"mean_iou": mean_iou, "boundary_f": boundary_f}
SHARD_BYTES = 500 * 2**20  # of a data set's Parquet files
LARGE_BYTES = 5 * 2**30  # data sets above it go in several commits
_KINDS = (".safetensors", ".json", ".yaml", ".md", ".py", ".png", ".parquet", ".html")
_OWN_CODE = {path.name for path in Path(models.__file__).parent.glob("*.py")} - {"__init__.py"}
_OWN_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
_OWN_DATA = re.compile(r"data/(train|val)-\d+-of-\d+\.parquet")
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]*")  # as apache-2.0, openrail++
_BRANCH = re.compile(r"(?!.*(\.\.|//|@\{|\.lock(/|$)))[A-Za-z0-9_][\w./-]*(?<![./])")


class HubError(ValueError):
    """What can't be pushed, or a Hub that doesn't take it; the message says what was expected."""


@dataclass
class Pushed:
    """What a push did.

    Attributes:
        url: of the repository.
        commit: its newest commit.
        changed: whether there was anything new to commit.
    """

    url: str
    commit: str
    changed: bool


def push_model(
    source: str | os.PathLike,
    repo_id: str,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
    licence: str | None = None,
    pictures: bool = True,
) -> Pushed:
    """Publish a trained model, loadable by everybody: weights, configuration, image processor, code, card.

    Args:
        source: a run's folder (its last segmenter is meant), or the folder of a model; inside a run's folder it gets
            the run's figures on its card.
        repo_id: "owner/name", or a name of your own.
        private: nobody else may see a repository that is made now.
        revision: branch to push to, made from main where it does not exist; None is main.
        token: a token with write access; None takes the one you are logged in with.
        licence: identifier of the weights' licence, as the Hub knows it ("apache-2.0"); None keeps the one that the
            repository's card names.
        pictures: show the run's examples on the card: photographs of the data go to the Hub with it.

    Raises:
        HubError: nothing to push, an impossible id, or what the Hub said.
    """
    folder = _part_of(Path(source), SEGMENTER_FOLDER, "config.json")
    _check_licence(licence)
    repo_id = _checked_target(repo_id, revision, token)
    with tempfile.TemporaryDirectory() as staging:
        staged = Path(staging)
        model = _stage_model(folder, staged)
        made, settings = _stage_results(folder, staged, pictures)
        if isinstance(model, AffinityNetwork):
            affinity_card(repo_id, model.config, made, licence or _licence_there(repo_id, "model", token)).save(
                staged / "README.md"
            )
            return push_folder(staged, repo_id, "model", f"Push {folder.name}", private, revision, token)
        names: dict = model.config.id2label or {}
        mask_names = getattr(model, "mask_id2label", names)  # a CAM classifier's tags lack background
        shown = json.loads((staged / IMAGE_PROCESSOR_NAME).read_text())
        subject = CardSubject(
            repo_id=repo_id,
            folder=folder.name,
            classes=[name for name in names.values() if name != "background"],
            is_classifier=len(mask_names) > len(names),
            classifies_masks=model.config.model_type in MASK_CLASSIFIERS,
            needs_code=isinstance(model, PortableModel),
            shows_squares="height" in shown["size"],
            cuts_squares=bool(shown.get("do_split_image")),
            on_true_masks=settings.get("mask_column") == "mask",
            on_tags=_rests_on_tags(settings, made),
            architecture=getattr(model.config, "backbone_config", model.config).model_type,
            licence=licence or _licence_there(repo_id, "model", token),
            picture=GALLERY_FILE if (staged / GALLERY_FILE).is_file() else None,
        )
        model_card(subject, made).save(staged / "README.md")
        return push_folder(staged, repo_id, "model", f"Push {folder.name}", private, revision, token)


def push_loaded_model(
    model: PreTrainedModel,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str = "50GB",
    tags: list[str] | None = None,
) -> CommitInfo:
    """Upload what `model.save_pretrained` writes, in one commit; files that the repository has already are not sent.

    The options are those of `PreTrainedModel.push_to_hub`. A repository without a card gets a short one, without
    figures; `push_model` writes one with the figures of the run.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        if not api.file_exists(repo_id, "README.md", revision=revision):
            short_card(model, repo_id, tags or []).save(f"{folder}/README.md")
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message or "Upload model",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )


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


def push_dataset(
    source: str | os.PathLike,
    repo_id: str,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
    licence: str | None = None,
) -> Pushed:
    """Publish images with pseudo masks as Parquet files, which the Hub's viewer shows, with a card.

    Image files that the data set names are read, and are in the Parquet files.

    Args:
        source: a run's folder (its `masks/` are meant), or the folder that `make-masks` wrote.

    Raises:
        HubError: as `push_model`.
    """
    folder = _part_of(Path(source), MASKS_FOLDER, "dataset_dict.json")
    _check_licence(licence)
    repo_id = _checked_target(repo_id, revision, token)
    rows = load_from_disk(str(folder))
    with tempfile.TemporaryDirectory() as staging:
        staged = Path(staging)
        made, settings = _stage_results(folder, staged, pictures=False)
        (staged / "data").mkdir()
        for split, part in rows.items():
            shards = max(1, -(-num_bytes(part) // SHARD_BYTES))
            for index in range(shards):
                name = f"{split}-{index:05d}-of-{shards:05d}.parquet"
                with_embedded_images(part.shard(shards, index, contiguous=True)).to_parquet(staged / "data" / name)
        licence = licence or _licence_there(repo_id, "dataset", token)
        subject = CardSubject(
            repo_id=repo_id,
            folder=folder.name,
            classes=class_names(rows),
            on_tags=_rests_on_tags(settings, made),
            licence=licence,
        )
        dataset_card(subject, rows, made).save(staged / "README.md")
        is_large = sum(file.stat().st_size for file in (staged / "data").iterdir()) > LARGE_BYTES
        first = "data/*" if is_large else None
        return push_folder(staged, repo_id, "dataset", "Push pseudo masks", private, revision, token, first)


def push_metric(
    name: str, repo_id: str, private: bool = False, revision: str | None = None, token: str | None = None
) -> Pushed:
    """Publish a metric as a Space, for `evaluate.load("owner/name", class_names=[…])` where wsss_hf is not installed.

    Args:
        name: one of `METRICS`.

    Raises:
        HubError: as `push_model`; or there is no such metric.
    """
    if name not in METRICS:
        raise HubError(unknown_name(f"metric {name!r}", name, METRICS))
    repo_id = _checked_target(repo_id, revision, token)
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


def _checked_target(repo_id: str, revision: str | None, token: str | None) -> str:
    """ "owner/name" of a repository that there could be; a bare name is one's own."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise HubError(
            f"expected the id of a repository, owner/name in letters, digits and -_., got {repo_id}"
        ) from error
    if revision is not None and not _BRANCH.fullmatch(revision):
        raise HubError(f"--branch: expected the name of a branch such as main or v1, got {revision}")
    if "/" in repo_id:
        return repo_id
    with _naming(repo_id):
        return f"{HfApi(token=token).whoami()['name']}/{repo_id}"


def _check_licence(licence: str | None) -> None:
    """Whether it looks like an identifier; the Hub, which knows them all, has the last word in `push_folder`."""
    if licence is not None and not _LICENCE.fullmatch(licence):
        raise HubError(f"--license: expected an identifier of the Hub, such as apache-2.0 or other, got {licence!r}")


def _licence_there(repo_id: str, repo_type: str, token: str | None) -> str | None:
    """The licence that the repository's card names, if there are both."""
    with _naming(repo_id):
        try:
            info: Any = HfApi(token=token).repo_info(repo_id, repo_type=repo_type)
        except RepositoryNotFoundError:
            return None
    return info.card_data.get("license") if info.card_data else None


def _part_of(source: Path, part: str, mark: str) -> Path:
    """`source` itself, or the `part` of its last round, whichever holds the file `mark`."""
    rounds = {1: source / part} | {
        int(path.name.rpartition("-")[2]): path for path in source.glob(f"{part}-*") if path.name[-1].isdecimal()
    }
    for folder in (source, rounds[max(rounds)]):
        if (folder / mark).is_file():
            return folder.resolve()
    raise HubError(f"{source}: expected a folder with {mark}, or a run with {part}/")


def _stage_results(folder: Path, staged: Path, pictures: bool) -> tuple[dict, dict]:
    """Put the run's figures, recipe and, if wanted, pictures beside the card; returns figures and stage settings."""
    held = folder / SETTINGS_FILE
    settings = portable_values(yaml.safe_load(held.read_text())) if held.is_file() else {}
    results = folder.parent / RESULTS_FILE
    if not results.is_file():
        made = {"data": settings.get("data"), "recipe": settings}
    else:
        made = portable_values(json.loads(results.read_text()))
        (staged / RESULTS_FILE).write_text(json.dumps(made, indent=1))
        if pictures and (folder.parent / GALLERY_FILE).is_file():
            (staged / GALLERY_FILE).write_bytes((folder.parent / GALLERY_FILE).read_bytes())
    if made["recipe"]:
        (staged / SETTINGS_FILE).write_text(yaml.safe_dump(made["recipe"], sort_keys=False))
    return made, settings


def _rests_on_tags(settings: dict, made: dict) -> bool:
    """Whether the record of a stage, or of the run that it is part of, shows that no mask was learnt from.

    Alone, the later stages do not say what the models and masks that they were given had learnt from.
    """
    stage = settings.get("stage")
    later = ("train-refiner", "make-masks", "train-segmenter", "relabel")
    in_run = made.get("command") in RUNS and stage in later and settings.get("mask_column") != "mask"
    return stage == "train-cam" or in_run


def _stage_model(folder: Path, staged: Path) -> PreTrainedModel:
    """Save the model of `folder` anew: with the code of this package, and without paths of this machine."""
    model, report = load_segmentation_model(folder, {"output_loading_info": True})
    odd = sorted(report["missing_keys"]) + sorted(report["unexpected_keys"])
    if odd:
        raise HubError(f"{folder}: the weights do not fit the configuration ({odd[0]} and {len(odd) - 1} more)")
    check_weights(model, folder)
    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    if not isinstance(model, PortableModel):
        if isinstance(processor, WsssImageProcessor):
            processor = _library_processor(processor)
        processor = of_one_shape(processor)
    _forget_paths(model)
    model.save_pretrained(staged)
    processor.save_pretrained(staged)
    return model


def _library_processor(processor: WsssImageProcessor) -> SegformerImageProcessorPil:
    """The library's own processor that does the same, so that an architecture of the library needs no code of ours."""
    values = processor.to_dict()
    for key in ("auto_map", "image_processor_type"):
        values.pop(key, None)
    return SegformerImageProcessorPil(**values)


def _forget_paths(model: PreTrainedModel) -> None:
    for config in (model.config, getattr(model.config, "backbone_config", None)):
        if config is not None:
            config._name_or_path = portable_values(config._name_or_path)


def push_folder(
    folder: Path,
    repo_id: str,
    repo_type: str,
    message: str,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
    first: str | None = None,
    **create_options,
) -> Pushed:
    """Make the repository hold the files of `folder`, in one commit; files that it holds already are not sent.

    Weights, code and data of ours that are no longer needed go in the same commit; foreign files stay.

    Args:
        first: a pattern of files that go before the others, in as many commits as they need.

    Raises:
        HubError: see `push_model`.
    """
    files = _files_to_push(folder, token)
    api = HfApi(token=token)
    with _naming(repo_id):
        _check_card(folder / "README.md", repo_type)
        repo_id = api.create_repo(
            repo_id, private=private or None, repo_type=repo_type, exist_ok=True, **create_options
        ).repo_id
        info: Any = api.repo_info(repo_id, repo_type=repo_type)
        if private and not info.private:
            raise HubError(f"{repo_id} is public already; --private makes new repositories private, no old ones")
        if revision is not None:
            api.create_branch(repo_id, branch=revision, repo_type=repo_type, exist_ok=True)
        before: Any = api.repo_info(repo_id, repo_type=repo_type, revision=revision)
        held = [sibling.rfilename for sibling in before.siblings]
        stale = [name for name in held if name not in files and _is_ours(name, repo_type)]
        operations: list = [CommitOperationAdd(name, path) for name, path in files.items()]
        operations += [CommitOperationDelete(name) for name in stale]
        if first is not None:
            api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=f"{message}: files",
                repo_type=repo_type,
                revision=revision,
                allow_patterns=first,
            )
        commit = api.create_commit(repo_id, operations, commit_message=message, repo_type=repo_type, revision=revision)
        url = f"{api.endpoint}/{'' if repo_type == 'model' else f'{repo_type}s/'}{repo_id}"
    return Pushed(url=url, commit=commit.oid, changed=commit.oid != before.sha)


def _check_card(file: Path, repo_type: str) -> None:
    """Whether the Hub takes the card's metadata, before there is anything of it there.

    Raises:
        HubError: it does not, for example as it knows no such licence.
    """
    try:
        RepoCard.load(file).validate(repo_type)
    except ValueError as error:  # with the Hub's answer
        reasons = _reasons(str(error))
        raise HubError(f"{file.name}: the Hub refuses its metadata: {brief(reasons)}") from error


def _reasons(answer: str) -> str:
    """The messages in the Hub's answer; all of it where it has another form, as that of a proxy."""
    try:
        found = " and ".join(entry["message"] for entry in json.loads(answer)["errors"])
    except (ValueError, LookupError, TypeError):
        found = ""
    return found or " ".join(answer.split()) or "it gives no reason"


def _files_to_push(folder: Path, token: str | None) -> dict[str, Path]:
    """Name in the repository → file.

    Raises:
        HubError: a link, a file of a kind that has no business there, or one with the token in it.
    """
    secret = token or get_token()
    files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_dir() or path.suffix in _KINDS):
            raise HubError(f"{name}: expected a file of a model ({', '.join(_KINDS)}), got a link or another file")
        if path.is_file():
            if secret and secret.encode() in path.read_bytes():
                raise HubError(f"{name}: holds your Hub token; take it out first")
            files[name] = path
    return files


def _is_ours(name: str, repo_type: str) -> bool:
    if repo_type == "dataset":
        return _OWN_DATA.fullmatch(name) is not None
    return name in _OWN_CODE or _OWN_WEIGHTS.fullmatch(name) is not None


@contextmanager
def _naming(repo_id: str) -> Iterator[None]:
    """What the Hub or the network say, in one line that names the repository."""
    try:
        yield
    except RevisionNotFoundError as error:
        raise HubError(f"{repo_id}: no such revision on the Hub") from error
    except RepositoryNotFoundError as error:
        raise HubError(
            f"{repo_id}: expected a repository that the token may write to; it is not there, or not yours"
        ) from error
    except (HfHubHTTPError, LocalTokenNotFoundError) as error:
        response = getattr(error, "response", None)
        if response is None or response.status_code in (401, 403):
            raise HubError(
                f"{repo_id}: the Hub wants a token that may write there; `hf auth login`, or HF_TOKEN"
            ) from error
        raise HubError(f"{repo_id}: the Hub says: {str(error).strip().splitlines()[-1]}") from error
    except httpx.HTTPError as error:
        raise HubError(
            f"{repo_id}: the connection to the Hub broke ({error}); nothing was published, push once more"
        ) from error
