"""Models and data sets → the Hub, in one commit each: a repository is whole, or it is what it was before."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import yaml
from datasets import DatasetDict, load_from_disk
from huggingface_hub import CommitInfo, HfApi
from transformers import AutoImageProcessor, PreTrainedModel
from transformers.models.segformer.image_processing_pil_segformer import SegformerImageProcessorPil
from transformers.utils import IMAGE_PROCESSOR_NAME

from ..data.saving import num_bytes, write_parquet
from ..data.tagged import class_names
from ..inference.weights import check_weights
from ..models.image_processing_wsss import WsssImageProcessor
from ..models.mask_classifiers import MASK_CLASSIFIERS, load_segmentation_model
from ..models.modeling_affinity import AffinityNetwork
from ..models.portable_model import PortableModel
from ..progress import Progress
from ..training.library_segmenter import of_one_shape
from .cards import RUNS, CardSubject, affinity_card, dataset_card, model_card, short_card
from .portable import portable_values
from .upload import HubError, Pushed, check_licence, checked_target, licence_there, push_folder

SEGMENTER_FOLDER, MASKS_FOLDER = "segmenter", "masks"  # inside a run's folder
RESULTS_FILE, GALLERY_FILE, SETTINGS_FILE = "results.json", "gallery.png", "recipe.yaml"
SHARD_BYTES = 500 * 2**20  # of a data set's Parquet files


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
    check_licence(licence)
    repo_id = checked_target(repo_id, revision, token)
    with tempfile.TemporaryDirectory() as staging:
        staged = Path(staging)
        model = _stage_model(folder, staged)
        made, settings = _stage_results(folder, staged, pictures)
        if isinstance(model, AffinityNetwork):
            affinity_card(repo_id, model.config, made, licence or licence_there(repo_id, "model", token)).save(
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
            licence=licence or licence_there(repo_id, "model", token),
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


def push_dataset(
    source: str | os.PathLike,
    repo_id: str,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
    licence: str | None = None,
) -> Pushed:
    """Publish images with pseudo masks as Parquet files, which the Hub's viewer shows, with a card.

    Image files that the data set names are read, and are in the Parquet files. These are made one by one, and each is
    removed when it has arrived; what has arrived is not sent again after a push that broke off.

    Args:
        source: a run's folder (its `masks/` are meant), or the folder that `make-masks` wrote.

    Raises:
        HubError: as `push_model`.
    """
    folder = _part_of(Path(source), MASKS_FOLDER, "dataset_dict.json")
    check_licence(licence)
    repo_id = checked_target(repo_id, revision, token)
    rows = load_from_disk(str(folder))
    with tempfile.TemporaryDirectory() as staging:
        staged = Path(staging)
        made, settings = _stage_results(folder, staged, pictures=False)
        counts = {split: max(1, -(-num_bytes(part) // SHARD_BYTES)) for split, part in rows.items()}
        licence = licence or licence_there(repo_id, "dataset", token)
        subject = CardSubject(
            repo_id=repo_id,
            folder=folder.name,
            classes=class_names(rows),
            on_tags=_rests_on_tags(settings, made),
            licence=licence,
        )
        dataset_card(subject, rows, made).save(staged / "README.md")
        shards = _write_shards(rows, counts, staged / "data")
        return push_folder(staged, repo_id, "dataset", "Push pseudo masks", private, revision, token, shards)


def _write_shards(rows: DatasetDict, counts: dict[str, int], folder: Path) -> Iterator[Path]:
    """Parquet files of the splits in `counts` shards, written when they are asked for."""
    folder.mkdir()
    with Progress("pushing", sum(map(len, rows.values())), unit="image") as progress:
        for split, count in counts.items():
            for index in range(count):
                shard = rows[split].shard(count, index, contiguous=True)
                file = folder / f"{split}-{index:05d}-of-{count:05d}.parquet"
                write_parquet(shard, file)
                yield file
                progress.advance(len(shard))


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
