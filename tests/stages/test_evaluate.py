import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from torch.nn import functional as F

from wsss_hf.data.palette import save_mask_png
from wsss_hf.data.tagged import DataError, class_names, tagged_features, undecoded
from wsss_hf.inference.load import load_labeler
from wsss_hf.metrics.average_precision import mean_average_precision
from wsss_hf.metrics.mean_iou import MeanIoU
from wsss_hf.models.label_colors import mask_image
from wsss_hf.pseudo_labels.label_images import label_images
from wsss_hf.settings import EvaluationSettings, MasksSettings
from wsss_hf.stages.evaluate import evaluate_cam, evaluate_files, evaluate_masks, evaluate_segmenter, rows_with


@pytest.fixture(scope="module")
def labeler(cam_folder):
    return load_labeler(str(cam_folder), "cpu")


def with_columns(rows, **masks):
    """The rows with image columns of given values."""
    raw = undecoded(rows)
    columns = {name: raw[name][:] for name in ("image_id", "image", "tags")} | masks
    return Dataset.from_dict(columns, features=tagged_features(class_names(rows), *masks))


def some(values, *missing):
    return [None if index in missing else value for index, value in enumerate(values)]


def test_rows_without_a_value_are_left_out(toy_data):
    masks = undecoded(toy_data["train"])["mask"][:]
    rows = with_columns(toy_data["train"], mask=some(masks, 0, 3))
    assert rows_with(rows, "mask")["image_id"][:] == [i for n, i in enumerate(rows["image_id"]) if n not in (0, 3)]


def test_nothing_to_evaluate_on_is_said(toy_data, unmasked_data):
    empty = with_columns(toy_data["train"], mask=[None] * 12, pseudo_mask=[None] * 12)
    for rows in (unmasked_data["train"], empty):
        with pytest.raises(DataError, match="column 'mask': expected masks to evaluate on, and no row has one"):
            evaluate_masks(rows)
    with pytest.raises(DataError, match="column 'pseudo_mask': expected masks to evaluate on, and no row has one"):
        evaluate_masks(toy_data["train"])


def test_masks_are_judged_where_both_are_there(toy_data):
    masks = undecoded(toy_data["train"])["mask"][:]
    # Two rows have one mask only; one has the mask of another image.
    rows = with_columns(
        toy_data["train"], mask=some(masks, 0), pseudo_mask=some([*masks[:5], masks[6], *masks[6:]], 1)
    )
    figures = evaluate_masks(rows)
    metric = MeanIoU(["background", *class_names(rows)])
    for index in range(2, 12):
        prediction = toy_data["train"][6 if index == 5 else index]["mask"]
        metric.add(prediction=np.array(prediction), reference=np.array(toy_data["train"][index]["mask"]))
    wanted = metric.compute()
    assert figures["num_images"] == 10 and 0 < figures["mean_iou"] < 1
    assert figures["mean_iou"] == pytest.approx(wanted["mean_iou"]) and figures["iou"] == wanted["iou"]
    assert evaluate_masks(with_columns(rows, mask=masks, pseudo_mask=masks))["mean_iou"] == 1


def test_a_mask_of_another_size_is_named(toy_data):
    rows = toy_data["train"].select(range(2))
    small = [mask.resize((20, 20)) for mask in rows["mask"]]
    with pytest.raises(ValueError, match=rows[0]["image_id"]):
        evaluate_masks(with_columns(rows, mask=undecoded(rows)["mask"][:], pseudo_mask=small))


def test_a_classifier_is_judged_by_its_masks_maps_and_tags(labeler, toy_data):
    rows, settings = toy_data["train"], MasksSettings()
    figures = evaluate_cam(*labeler, rows, settings)
    metric = MeanIoU(["background", *class_names(rows)])
    logits, tags = np.zeros((12, 8)), np.zeros((12, 8))
    for item in label_images(*labeler, rows, settings):
        metric.add(prediction=item.pseudo_mask, reference=np.array(rows[item.index]["mask"]))
        logits[item.index] = item.logits
        tags[item.index, rows[item.index]["tags"]] = 1
    assert figures["mean_iou"] == pytest.approx(metric.compute()["mean_iou"])
    assert figures["mean_average_precision"] == pytest.approx(
        mean_average_precision(logits, tags)["mean_average_precision"]
    )
    curve = dict(map(tuple, figures["threshold_curve"]))
    at_ours = min(curve, key=lambda threshold: abs(threshold - settings.background_threshold))
    assert curve[at_ours] == pytest.approx(figures["mean_iou"], abs=0.02)
    assert max(curve.values()) >= figures["mean_iou"] - 0.02


class Oracle:
    """Answers with one-hot logits of the true mask, which it finds by the image's pixels."""

    device = torch.device("cpu")

    def __init__(self, rows):
        self.config = SimpleNamespace(id2label=dict(enumerate(["background", *class_names(rows)])))
        self.known = [(pixels(row["image"]), torch.from_numpy(np.array(row["mask"])).long()) for row in rows]

    def __call__(self, pixel_values):
        logits = []
        for image in pixel_values:
            mask, flipped = next(
                (mask, flipped)
                for known, mask in self.known
                for flipped in (False, True)
                if torch.equal(known.flip(-1) if flipped else known, image)
            )
            mask = mask.flip(-1) if flipped else mask
            logits.append(F.one_hot(mask.where(mask < 255, 0), 9).permute(2, 0, 1) * 20.0)
        return SimpleNamespace(logits=torch.stack(logits))


def pixels(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def processor(images, return_tensors):
    return {"pixel_values": torch.stack([pixels(image) for image in images])}


@pytest.mark.parametrize("flip", [True, False])
def test_a_perfect_segmenter_scores_one(toy_data, flip):
    settings = dataclasses.replace(EvaluationSettings(), batch_size=3, flip=flip)
    figures = evaluate_segmenter(Oracle(toy_data["val"]), processor, toy_data["val"], settings)
    assert figures["mean_iou"] == figures["pixel_accuracy"] == 1 and figures["num_images"] == 4


def test_a_segmenter_that_always_says_background_scores_its_share(toy_data):
    oracle = Oracle(toy_data["val"])
    oracle.known = [(image, torch.zeros_like(mask)) for image, mask in oracle.known]
    figures = evaluate_segmenter(oracle, processor, toy_data["val"], EvaluationSettings())
    truth = np.stack([np.array(mask) for mask in toy_data["val"]["mask"]])
    share = (truth == 0).sum() / (truth != 255).sum()
    assert figures["pixel_accuracy"] == pytest.approx(share)
    assert figures["iou"]["background"] == pytest.approx(share)
    assert figures["mean_iou"] == pytest.approx(share / len(np.unique(truth[truth != 255])))


def test_a_segmenter_of_other_classes_is_refused(toy_data):
    oracle = Oracle(toy_data["val"])
    oracle.config.id2label[3] = "unicorn"
    with pytest.raises(DataError, match="segmenter: expected the classes of the data, .*, got background, .*unicorn"):
        evaluate_segmenter(oracle, processor, toy_data["val"], EvaluationSettings())


@pytest.fixture
def predictions(toy_data, tmp_path):
    """A folder of label maps for split "val": each image has the mask of another one."""
    masks = [np.array(mask) for mask in toy_data["val"]["mask"]]
    for image_id, mask in zip(toy_data["val"]["image_id"], [*masks[1:], masks[0]], strict=True):
        save_mask_png(tmp_path / f"{image_id}.png", mask)
    return tmp_path


def test_files_are_judged_as_columns_are(toy_data, predictions):
    masks = undecoded(toy_data["val"])["mask"][:]
    rows = with_columns(toy_data["val"], mask=masks, pseudo_mask=[*masks[1:], masks[0]])
    assert evaluate_files(predictions, toy_data["val"]) == evaluate_masks(rows)


def remove(file):
    file.unlink()


def shrink(file):
    mask_image(np.zeros((24, 48), np.uint8)).save(file)


def color(file):
    Image.open(file).convert("RGB").save(file)


def renumber(file):
    picture = mask_image(np.ones((48, 48), np.uint8))
    picture.putpalette([0, 0, 0, *mask_image(np.zeros((1, 1), np.uint8)).getpalette()[9:]])
    picture.save(file)


def other_classes(file):
    mask_image(np.full((48, 48), 9, np.uint8)).save(file)


def no_picture(file):
    file.write_bytes(b"no picture")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (remove, "{name}: expected a label map of every image, 1 of 4 missing"),
        (shrink, "{name}: prediction: expected the size of the reference, 48x48, got 48x24"),
        (color, "{name}: expected one 8-bit channel of labels .*, got mode RGB"),
        (renumber, "{name}: expected pixel values that are the labels, got value 1 in the colour of label 3"),
        (other_classes, r"{name}: prediction: expected labels 0..8 and 255, got \[9\]"),
        (no_picture, "{name}: expected an image, got a file that can't be decoded"),
    ],
)
def test_bad_files_are_named(toy_data, predictions, spoil, message):
    name = f"{toy_data['val']['image_id'][2]}.png"
    spoil(predictions / name)
    with pytest.raises(ValueError, match=message.format(name=name)):
        evaluate_files(predictions, toy_data["val"])
