from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from wsss_hf.data.tagged import encode_png
from wsss_hf.models.image_processing_wsss import WsssImageProcessor
from wsss_hf.pseudo_labels.area_prior import background_factor, labelled_objects
from wsss_hf.pseudo_labels.self_training import confident_labels, relabel_images
from wsss_hf.refinement.steps import build_refinement
from wsss_hf.settings import SelfTrainingSettings

SETTINGS = SelfTrainingSettings(scales=[1.0], batch_size=1)


def test_uncertain_pixels_are_ignored():
    # one row of four pixels: background and the tagged classes 0 and 2
    scores = torch.tensor([[0.6, 0.3, 0.1], [0.1, 0.2, 0.7], [0.3, 0.35, 0.35], [0.1, 0.5, 0.4]]).T[:, None]
    labels, confidence = confident_labels(scores, torch.tensor([0, 2]), threshold=0.6)
    assert labels.dtype == torch.uint8 and labels.tolist() == [[0, 3, 255, 255]]
    torch.testing.assert_close(confidence[0], torch.tensor([0.6, 0.7, 0.35, 0.5]))
    labels, confidence = confident_labels(scores[:2], torch.tensor([1]), threshold=0.6)
    assert labels.tolist() == [[0, 2, 255, 2]]
    torch.testing.assert_close(confidence[0], torch.tensor([0.6 / 0.9, 0.2 / 0.3, 0.35 / 0.65, 0.5 / 0.6]))


def test_an_image_without_tags_is_background():
    scores = torch.ones(1, 5, 6)
    scores[0, 0, 0] = 0  # not even possible, and yet no label is left but this
    labels, confidence = confident_labels(scores, torch.zeros(0, dtype=torch.int64), threshold=0.5)
    assert (labels.flatten()[1:] == 0).all() and (confidence.flatten()[1:] == 1).all()
    assert labels[0, 0] == 255 and confidence[0, 0] == 0


class Colours(nn.Module):
    """Says of each pixel how red, green and blue it is: background, first class, second class."""

    device = torch.device("cpu")

    def forward(self, pixel_values):
        others = pixel_values.new_zeros(len(pixel_values), 6, *pixel_values.shape[-2:])
        return SimpleNamespace(logits=torch.cat([pixel_values * 6, others], dim=1))


def test_logits_that_are_no_numbers_label_nothing(toy_data):
    class Broken(Colours):
        def forward(self, pixel_values):
            return SimpleNamespace(logits=super().forward(pixel_values).logits * float("nan"))

    rows, settings = toy_data["train"], SETTINGS
    with pytest.raises(ValueError, match=f"row '{rows['image_id'][0]}': expected finite logits"):
        list(relabel_images(Broken(), WsssImageProcessor(), rows, settings))


@pytest.mark.parametrize("batch_size", [1, 5])
def test_every_row_gets_its_labels_at_its_own_size(toy_data, batch_size):
    rows = toy_data["train"].select(range(5))
    processor = WsssImageProcessor(
        size={"shortest_edge": 48, "longest_edge": 192}, image_mean=[0.0] * 3, image_std=[1.0] * 3
    )
    settings = replace(SETTINGS, threshold=0.0, batch_size=batch_size)
    found = {relabelled.index: relabelled for relabelled in relabel_images(Colours(), processor, rows, settings)}
    assert sorted(found) == list(range(5))
    for index, row in enumerate(rows):
        image = np.asarray(row["image"].convert("RGB"))
        scores = np.concatenate([image[..., :3] / 255 * 6, np.zeros((*image.shape[:2], 6))], axis=-1)
        absent = [c + 1 for c in range(8) if c not in row["tags"]]
        scores[..., absent] = -np.inf
        sure = np.sort(scores, axis=-1)[..., -1] - np.sort(scores, axis=-1)[..., -2] > 1e-3
        relabelled = found[index]
        assert relabelled.pseudo_mask.shape == image.shape[:2]
        assert np.array_equal(relabelled.pseudo_mask[sure], scores.argmax(axis=-1)[sure])
        assert (relabelled.confidence > 1 / 9).all() and (relabelled.confidence <= 1).all()


def test_refinement_sees_background_and_tagged_classes_only(toy_data):
    rows = toy_data["train"].select(range(2))
    processor = WsssImageProcessor(
        size={"shortest_edge": 48, "longest_edge": 192}, image_mean=[0.0] * 3, image_std=[1.0] * 3
    )
    steps = [{"pamr": {"iterations": 3}}]
    settings = replace(SETTINGS, threshold=0.0, refine=steps, batch_size=2, flip=False)
    changed = []
    for relabelled in relabel_images(Colours(), processor, rows, settings):
        row = rows[relabelled.index]
        image = np.asarray(row["image"].convert("RGB"))
        logits = torch.from_numpy(np.concatenate([image / 255 * 6, np.zeros((*image.shape[:2], 6))], axis=-1)).float()
        labels = [0, *(tag + 1 for tag in row["tags"])]
        refined = build_refinement(steps)(logits[..., labels].softmax(dim=-1).permute(2, 0, 1), image)
        top = refined.topk(2, dim=0).values
        sure = (top[0] - top[1] > 1e-4).numpy()
        assert np.array_equal(relabelled.pseudo_mask[sure], np.array(labels)[refined.argmax(dim=0)][sure])
        changed.append((relabelled.pseudo_mask != np.array(labels)[logits[..., labels].argmax(dim=-1)]).any())
    assert any(changed)


@pytest.mark.parametrize("share", [0.15, 0.6])
def test_objects_stay_as_large_as_the_labels_that_were_learnt(toy_data, share):
    processor = WsssImageProcessor(
        size={"shortest_edge": 48, "longest_edge": 192}, image_mean=[0.0] * 3, image_std=[1.0] * 3
    )
    settings = replace(SETTINGS, threshold=0.0, batch_size=4, flip=False)
    earlier = np.zeros((48, 48), dtype=np.uint8)
    earlier[: round(48 * share * 0.9)] = 1
    earlier[round(48 * 0.9) :] = 255  # ignored pixels do not count
    encoded = encode_png(Image.fromarray(earlier))
    rows = toy_data["train"].add_column("pseudo_mask", [encoded] * len(toy_data["train"]))
    factor = background_factor(Colours(), processor, rows, settings)

    def area(factor):
        found = relabel_images(Colours(), processor, rows, settings, factor)
        return np.mean([(relabelled.pseudo_mask > 0).mean() for relabelled in found])

    wanted = (earlier[earlier != 255] > 0).mean()
    assert abs(area(factor) - wanted) < 0.02 < abs(area(1.0) - wanted)


def test_labels_that_say_nothing_of_objects_change_nothing(toy_data):
    processor = WsssImageProcessor(size={"shortest_edge": 48, "longest_edge": 192})
    rows = toy_data["train"].select(range(4))
    tagged = sum(bool(tags) for tags in rows["tags"])

    def factor(*values):
        masks = [encode_png(Image.new("L", (48, 48), value)) for value in values]
        labelled = rows.add_column("pseudo_mask", masks)
        return background_factor(Colours(), processor, labelled_objects(labelled, "pseudo_mask", 99), SETTINGS)

    assert tagged and factor(0, 0, 0, 0) == factor(255, 255, 255, 255) == 1
    # An image without labels counts as little as one that is not there.
    halves = np.zeros((48, 48), dtype=np.uint8)
    halves[:24] = 1
    halves, nothing = encode_png(Image.fromarray(halves)), encode_png(Image.new("L", (48, 48), 255))
    with_some = rows.add_column("pseudo_mask", [halves, nothing, halves, None])
    alone = rows.select([0, 2]).add_column("pseudo_mask", [halves, halves])
    some, few = (labelled_objects(labelled, "pseudo_mask", 99) for labelled in (with_some, alone))
    assert background_factor(Colours(), processor, some, SETTINGS) == background_factor(
        Colours(), processor, few, SETTINGS
    )
    assert labelled_objects(rows.add_column("pseudo_mask", [halves] * 4), "pseudo_mask", 2).num_rows == min(2, tagged)
