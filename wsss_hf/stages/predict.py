"""Images and a trained model → label maps and overlays as files; no data set and no recipe are needed."""

from __future__ import annotations

import dataclasses
import glob
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..data.export import export_coco, file_stem, require_pycocotools
from ..data.folder import IMAGE_SUFFIXES, unread_files
from ..data.tagged import DataError, decode_image, decode_mask, tagged_features
from ..data.text import brief
from ..files import remove_unfinished, whole_file
from ..inference.cam_scores import score_by_maps
from ..inference.load import load_labeler, load_segmenter
from ..inference.segmenter import score_images
from ..models.configuration_cam import CamConfig
from ..models.label_colors import mask_image, overlay
from ..models.mask_classifiers import check_segments
from ..models.options import OptionError
from ..models.pictures import open_picture
from ..models.pretrained import NO_CODE, load_config, pinned
from ..progress import Progress, is_quiet, say
from ..refinement.steps import RefinementChain, build_refinement
from ..settings import EvaluationSettings
from .cache import SETTINGS_FILE, Record, read_record, write_atomically
from .fingerprint import digest, model_fingerprint
from .lock import LOCK_FILE, OutputError, only_run
from .results import StageResult

VERSION = 4
LABELS_FILE = "labels.json"
COCO_FILE = "predictions.coco.json"
_FINGERPRINT = "wsss_hf"  # text of a mask's PNG file: what it was made from
_MAX_SCORES = 2**27  # of a batch, float32: half a gigabyte

_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)

Paths = str | os.PathLike | Iterable[str | os.PathLike]


@dataclass(frozen=True)
class Prediction:
    """The files of one image.

    Attributes:
        name: path of the image in the folder that all images share, with `/`.
        image: its file.
        mask: palette PNG of the labels.
        overlay: JPEG of the objects on the image; not there with `overlays=False`.
    """

    name: str
    image: Path
    mask: Path
    overlay: Path

    @property
    def labels(self) -> np.ndarray:
        """(H, W) uint8; `Predictions.names` has their names."""
        return decode_mask({"path": str(self.mask)}, str(self.mask))


@dataclass(frozen=True)
class Failure:
    """An image without a label map, and why."""

    image: Path
    reason: str

    def __str__(self) -> str:
        return f"{self.image}: {self.reason}"


@dataclass(frozen=True)
class Predictions(StageResult):
    """What [`predict`] has written; iterates over the images that have a label map.

    Attributes:
        names: names of the labels, by label.
        found: the images with a label map.
        failures: the others.
    """

    names: list[str]
    found: list[Prediction]
    failures: list[Failure]

    def __iter__(self) -> Iterator[Prediction]:
        return iter(self.found)

    def __len__(self) -> int:
        return len(self.found)


def predict(
    images: Paths,
    model: str | os.PathLike,
    out: str | os.PathLike,
    *,
    settings: EvaluationSettings | None = None,
    tags: Sequence[str] | None = None,
    overlays: bool = True,
    coco: bool = False,
    force: bool = False,
) -> Predictions:
    """Label images; write `masks/NAME.png`, `overlays/NAME.jpg` and `labels.json` (label → name) to `out`.

    NAME is the image's path in the folder that all of `images` share, without its suffix (with it, where files differ
    in nothing else). A file that can't be labelled stops nothing: it becomes one of `failures`. Files appear whole. A
    label map made from the very image, model and settings is not made again, so a killed run goes on; other files
    in `out` stay, for which the labels must be the same. The images are split over the processes of `accelerate
    launch`.

    Args:
        images: image files, folders (with all folders in them but hidden ones) and patterns such as `photos/*/*.jpg`,
            or one of these.
        model: directory or Hub id (`owner/name@revision`) of a segmenter, ours or of transformers, or of a CAM
            classifier or map refiner.
        out: new folder, or one of an earlier call.
        settings: test-time augmentation, window, refinement and batch size; without refinement, a CAM classifier
            gives the masks of `pipeline("weak-segmentation")` at the same scales and flip.
        tags: names of the classes that are in every image, if known. Without them a CAM classifier takes the tags
            that it predicts, and a segmenter allows every class.
        coco: also write `predictions.coco.json` with the images of this call: run-length encodings, and as category
            the label (label + 1 where the model has no background). An old one goes in any case.
        force: make all label maps again.

    Raises:
        DataError: there is no image where one is named, or two images have one NAME.
        OutputError: `out` holds something else, or label maps of other images with other labels, or another run works
            there.
        OptionError: an unknown tag, or a setting that does not fit the model.
        OSError, ValueError: the model can't be loaded.
    """
    state, out = PartialState(), Path(out)
    settings = settings or EvaluationSettings()
    targets = find_images(images, out)
    if coco:
        require_pycocotools()
    labeler = _Labeler(os.fspath(model), settings, tags)
    if force or not all(target.mask.exists() for target in targets):
        labeler.load()  # what is wrong with it is said once, and leaves no folder
    made_from = {"evaluation": settings, "tags": labeler.tags}
    record = Record("predict", VERSION, made_from, {"model": model_fingerprint(model)})

    def begin() -> None:
        _check_folder(out, targets, labeler, record, force)
        for folder in {out, *(file.parent for target in targets for file in (target.mask, target.overlay))}:
            remove_unfinished(folder)
        (out / COCO_FILE).unlink(missing_ok=True)
        _rename_label_maps(out, targets, record)
        write_atomically(out / SETTINGS_FILE, yaml.safe_dump(record.to_dict(), sort_keys=False))
        write_atomically(out / LABELS_FILE, json.dumps(dict(enumerate(labeler.names)), indent=1, ensure_ascii=False))

    with only_run(out, begin):
        failed = _label(targets, labeler, record, overlays, force)
        found = [target for target in targets if target.name not in failed]
        if coco and state.is_main_process:
            first = 1 if labeler.has_background else 0  # the label that is COCO's category 1
            label_maps = ((target.name, target.labels + np.uint8(1 - first)) for target in found)
            export_coco(out / COCO_FILE, label_maps, labeler.names[first:])
        state.wait_for_everyone()
    failures = [Failure(target.image, failed[target.name]) for target in targets if target.name in failed]
    return Predictions(out, labeler.names, found, failures)


def _label(
    targets: Sequence[Prediction], labeler: _Labeler, record: Record, overlays: bool, force: bool
) -> dict[str, str]:
    """Write what is not there yet; why images have no label map, by name, those of all processes."""
    state = PartialState()
    mine = targets[state.process_index :: state.num_processes]
    fingerprints = {target: _fingerprint(target, record) for target in mine}
    finished = {target for target in mine if not force and _held_fingerprint(target.mask) == fingerprints[target]}
    undrawn = {target for target in finished if overlays and not target.overlay.exists()}
    waiting = [target for target in mine if target not in finished]
    if waiting:
        labeler.load()
    failed: dict[str, str] = {}
    with Progress("label maps", len(mine), unit="image") as progress, labeler:
        progress.advance(len(finished) - len(undrawn))
        work: list[tuple[Callable, list[Prediction]]] = [
            (_labelled_before, [target for target in mine if target in undrawn])
        ]
        size = 8 * labeler.settings.batch_size  # images among which those of one size are looked for
        work += [(labeler.label, waiting[start : start + size]) for start in range(0, len(waiting), size)]
        for compute, part in work:
            for target, result in _with_failures(compute, part):
                target.mask.unlink(missing_ok=True)  # never beside the overlay of another one
                if isinstance(result, Exception):
                    target.overlay.unlink(missing_ok=True)
                    failed[target.name] = _reason(target, result)
                else:
                    image, labels = result
                    _write(target, image, labels, fingerprints[target], overlays, labeler.has_background)
                progress.advance(1)
    return dict(gather_object(list(failed.items())))


def print_summary(predictions: Predictions) -> None:
    """Every failure as a line on standard error, then how many images have a label map, and where."""
    if not PartialState().is_main_process:
        return
    for failure in predictions.failures:
        print(f"failed: {failure}", file=sys.stderr)
    if not is_quiet():
        of = f" of {len(predictions) + len(predictions.failures)}" if predictions.failures else ""
        print(f"{predictions.folder}: label maps of {len(predictions)}{of} images")


def find_images(images: Paths, out: str | os.PathLike) -> list[Prediction]:
    """The images that files, folders and patterns name, each once, and where their label maps go; see [`predict`].

    Of folders and patterns, what lies in `out` is left out.

    Raises:
        DataError: one of them names no image, or two images have one name.
    """
    files: dict[str, str] = {}  # absolute path → as it was named
    roots = set()
    inside = os.path.abspath(out) + os.sep
    for given in [images] if isinstance(images, str | os.PathLike) else images:
        item = os.fspath(given)
        is_file, is_root = os.path.isfile(item), os.path.isdir(item)
        found = [item] if is_file else _files_in(item) if is_root else _images_matching(item)
        found = [path for path in found if is_file or not os.path.abspath(path).startswith(inside)]
        unread = unread_files(map(Path, found), Path(item)) if is_root else []
        found = [path for path in found if is_file or path.lower().endswith(IMAGE_SUFFIXES)]
        if not found:
            none = f"none is (not read: {', '.join(unread)})" if unread else "none is"
            raise DataError(f"images: expected files, folders with images or patterns, got {item}, where {none}")
        if unread:
            say(f"{item}: not read: {', '.join(unread)}")
        files |= {os.path.abspath(path): path for path in found}
        roots |= {os.path.abspath(item)} if is_root else {os.path.dirname(os.path.abspath(path)) for path in found}
    if not files:
        raise DataError("images: expected at least one, got none")
    base = os.path.commonpath(roots)
    names = {path: Path(os.path.relpath(path, base)).as_posix() for path in files}
    shared = Counter(file_stem(name) for name in names.values())
    targets: dict[Path, Prediction] = {}
    for path, name in names.items():
        stem = name if shared[file_stem(name)] > 1 else file_stem(name)
        target = Prediction(name, Path(files[path]), *_files(Path(out), stem))
        if target.mask in targets:
            raise DataError(f"images: expected names of their own, got {targets[target.mask].image} and {files[path]}")
        targets[target.mask] = target
    return list(targets.values())


def _files(out: Path, stem: str) -> tuple[Path, Path]:
    return out / "masks" / f"{stem}.png", out / "overlays" / f"{stem}.jpg"


def _images_in(folder: str) -> list[str]:
    return [path for path in _files_in(folder) if path.lower().endswith(IMAGE_SUFFIXES)]


def _files_in(folder: str) -> list[str]:
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [os.path.join(parent, name) for name in sorted(files) if name[0] != "."]
    return found


def _images_matching(pattern: str) -> list[str]:
    found: list[str] = []
    for path in sorted(glob.glob(pattern, recursive=True)):
        if os.path.isdir(path):
            found += _images_in(path)
        elif path.lower().endswith(IMAGE_SUFFIXES):
            found.append(path)
    return found


def _check_folder(out: Path, targets: Sequence[Prediction], labeler: _Labeler, record: Record, force: bool) -> None:
    """That `out` can hold the label maps of `targets` beside those of other images; says which are made again.

    Where the labels are others, label maps of `targets` go at once: none may stand beside names that are not its own.
    """
    if not {path.name for path in out.iterdir()} - {LOCK_FILE}:
        return
    held = read_record(out)
    if held.get("stage") != record.stage:
        raise OutputError(f"--out {out}: expected a new folder or one of {record.stage}, got one with something else")
    again = [target for target in targets if target.mask.exists()]
    others = {*(out / "masks").rglob("*.png")}.difference(target.mask for target in targets)
    names = _held_names(out)
    if names not in (None, labeler.names):
        if others:
            kept = f"label maps of {len(others)} other images with the labels {brief(names)}"
            raise OutputError(f"--out {out}: expected a new folder, or the labels {brief(labeler.names)}, got {kept}")
        labeler.load()  # what is wrong with it is said before anything goes
        for target in again:
            target.mask.unlink()
    changed = record.difference(held)
    if again and (force or changed):
        say(f"{out.name}: label maps are made again, because {'--force asks for it' if force else changed}")
    if others and changed:
        say(f"{out.name}: label maps of {len(others)} other images stay as they are, though {changed}")


def _held_names(out: Path) -> list[str] | None:
    """The labels of what is in a folder; None where nothing can be read of them."""
    try:
        return list(json.loads((out / LABELS_FILE).read_text()).values())
    except (OSError, ValueError, AttributeError):
        return None


def _rename_label_maps(out: Path, targets: Sequence[Prediction], record: Record) -> None:
    """A name has its image's suffix as long as another image differs in nothing else: where one has come or gone, the
    label map of an image that was there before follows."""
    masks = {target.mask for target in targets}
    for target in targets:
        for stem in (target.name, file_stem(target.name)):
            mask, picture = _files(out, stem)
            if mask in masks or not mask.exists() or _fingerprint(target, record) != _held_fingerprint(mask):
                continue
            if picture.exists():
                os.replace(picture, target.overlay)
            os.replace(mask, target.mask)


class _Labeler:
    """A model with its refinement; a context manager, as that owns processes.

    Attributes:
        names: of its labels.
        has_background: label 0 is the background; otherwise every label is a class.
        tags: names of classes in the order of labels, or None.
    """

    def __init__(self, model: str, settings: EvaluationSettings, tags: Sequence[str] | None):
        found, revision = pinned(model, NO_CODE)
        config = load_config(found, **revision)
        check_segments(config, model)
        names = [config.id2label[label] for label in sorted(config.id2label)]
        self.is_cam = isinstance(config, CamConfig)
        self.names = ["background", *names] if self.is_cam else names
        self.has_background = "background" in self.names[0].lower()
        limit = 255 if self.has_background else 254  # 255 is no label
        if not 2 <= len(self.names) <= limit:
            raise OptionError(f"model: expected 2 to {limit} labels, got {len(self.names)} of {model}")
        if self.is_cam and settings.window:
            raise OptionError(f"window: expected 0 with a CAM classifier, got {settings.window}")
        self.tags = None if tags is None else self._checked(tags)
        self.refine: RefinementChain = build_refinement(settings.refine, "evaluation.refine", settings.workers)
        self.refine.prepare()
        self.name, self.settings = model, settings
        self.loaded: Any = None

    def _checked(self, tags: Sequence[str]) -> list[str]:
        known = self.names[1:]
        if not self.has_background:
            raise OptionError(f"tags: expected none, as {self.names[0]!r} is the model's label 0, not background")
        unknown = [tag for tag in tags if tag not in known]
        if unknown or isinstance(tags, str):
            raise OptionError(f"tags: expected names from {', '.join(known)}, got {unknown[0] if unknown else tags!r}")
        return [name for name in known if name in tags]

    def __enter__(self) -> _Labeler:
        self.refine.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self.refine.__exit__(*exception)

    def load(self) -> None:
        """Load the model, unless it is there already."""
        if self.loaded is None:
            load: Callable = load_labeler if self.is_cam else load_segmenter
            self.loaded = load(self.name, PartialState().device)

    def label(self, targets: Sequence[Prediction]) -> Iterator[tuple[Prediction, tuple[Image.Image, np.ndarray]]]:
        """Each image and its labels (H, W) uint8, in any order."""
        model, processor = self.loaded
        tags = [] if self.tags is None else [self.names.index(tag) - 1 for tag in self.tags]
        columns = {"image_id": [target.name for target in targets], "image": [str(target.image) for target in targets]}
        # Names of classes would have to differ, which those of models in general need not.
        features = tagged_features([str(label) for label in range(1, len(self.names))])
        rows = Dataset.from_dict(columns | {"tags": [tags] * len(targets)}, features=features)
        settings = dataclasses.replace(self.settings, batch_size=self._batch_size(targets))
        score: Callable = score_by_maps if self.is_cam else score_images
        for scored in score(model, processor, rows, settings, self.tags is not None, refine=self.refine):
            values = torch.cat([scored.classes.new_zeros(1), scored.classes + 1])
            labels = values[scored.scores.argmax(dim=0)].to(torch.uint8).cpu().numpy()
            yield targets[scored.index], (scored.image, labels)

    def _batch_size(self, targets: Iterable[Prediction]) -> int:
        """As the settings have it, but fewer images where the scores of the largest would take too much memory."""
        pixels = [1]
        for target in targets:
            try:
                with open_picture(target.image) as image:
                    pixels.append(image.width * image.height)
            except _UNREADABLE:  # whoever decodes it will say so
                continue
        return max(1, min(self.settings.batch_size, _MAX_SCORES // (len(self.names) * max(pixels))))


def _labelled_before(targets: Sequence[Prediction]) -> Iterator[tuple[Prediction, tuple[Image.Image, np.ndarray]]]:
    for target in targets:
        yield target, (decode_image({"path": str(target.image)}, target.name), target.labels)


def _with_failures(compute: Callable, targets: Sequence[Prediction]) -> Iterator[tuple[Prediction, Any]]:
    """What `compute` gives for each of `targets`, or the exception that one of them leads to.

    Where several fail together each half is tried by itself, so that one bad file costs its neighbours little.
    """
    left = dict.fromkeys(targets)
    try:
        for target, result in compute(targets):
            del left[target]
            yield target, result
    except Exception as error:
        failed = list(left)
        if len(failed) == 1:
            yield failed[0], error
            return
        half = len(failed) // 2
        for part in (failed[:half], failed[half:]):
            yield from _with_failures(compute, part)


def _reason(target: Prediction, error: Exception) -> str:
    text = " ".join(str(error).split()).removeprefix(f"row {target.name!r}: ")
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}"


def _fingerprint(target: Prediction, record: Record) -> str:
    """Of what a mask is made from: the image file, by size and time of change, and all that `record` compares."""
    settings = {
        option.name: getattr(record.settings["evaluation"], option.name)
        for option in dataclasses.fields(EvaluationSettings)
        if not option.metadata.get("speed") and option.name != "examples"
    }
    try:
        state = target.image.stat()
        image = [state.st_size, state.st_mtime_ns]
    except OSError:  # whoever opens it will say so
        image = []
    return digest([record.version, settings, record.settings["tags"], record.inputs["model"], image])


def _held_fingerprint(mask: Path) -> str | None:
    try:
        with open_picture(mask) as image:
            return image.info.get(_FINGERPRINT)
    except _UNREADABLE:
        return None


def _write(
    target: Prediction, image: Image.Image, labels: np.ndarray, fingerprint: str, overlays: bool, has_background: bool
) -> None:
    """The overlay, then the mask: where that is, with its fingerprint, the image is finished."""
    if overlays:
        target.overlay.parent.mkdir(parents=True, exist_ok=True)
        picture = overlay(image, labels if has_background else labels + np.uint8(1))
        with whole_file(target.overlay) as unfinished:
            picture.save(unfinished, format="JPEG", quality=90, subsampling=0)
    else:
        target.overlay.unlink(missing_ok=True)
    target.mask.parent.mkdir(parents=True, exist_ok=True)
    text = PngInfo()
    text.add_text(_FINGERPRINT, fingerprint)
    with whole_file(target.mask) as unfinished:
        mask_image(labels).save(unfinished, format="PNG", pnginfo=text)
