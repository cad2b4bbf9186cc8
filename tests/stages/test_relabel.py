import numpy as np
import pytest
from datasets import DatasetDict, load_from_disk
from datasets import Image as ImageFeature
from PIL import Image

from wsss_hf.data.tagged import DataError, encode_png
from wsss_hf.models.image_processing_wsss import WsssImageProcessor
from wsss_hf.models.modeling_segmenter import Segmenter
from wsss_hf.stages import relabel as module
from wsss_hf.stages.relabel import relabel


@pytest.fixture
def recipe(tiny_recipe):
    vars(tiny_recipe.self_training).update({"batch_size": 4, "scales": [1.0]})
    tiny_recipe.masks.shard_size = 5
    return tiny_recipe


def same_columns(first, second):
    first, second = (load_from_disk(str(folder))["train"] for folder in (first, second))
    return all(
        np.array_equal(a, b)
        for name in ("pseudo_mask", "confidence")
        for a, b in zip(first[name], second[name], strict=True)
    )


def test_masks_hold_background_tags_and_doubt(poisoned_data, segmenter_folder, recipe, tmp_path):
    recipe.self_training.threshold = 0.6
    out = relabel(poisoned_data, segmenter_folder, recipe, tmp_path / "masks")
    rows = load_from_disk(str(out))["train"]
    assert rows["image_id"][:] == poisoned_data["train"]["image_id"][:]
    seen = set()
    for mask, confidence, tags in zip(rows["pseudo_mask"], rows["confidence"], rows["tags"], strict=True):
        labels, certain = np.asarray(mask), np.asarray(confidence)
        assert labels.shape == certain.shape == (48, 48) and confidence.mode == "L"
        assert set(np.unique(labels)) <= {0, 255, *(tag + 1 for tag in tags)}
        assert (certain[labels == 255] <= 153).all() and (certain[labels != 255] >= 153).all()
        seen |= set(np.unique(labels))
    assert {0, 255} < seen
    # Labels of an earlier round are replaced.
    recipe.self_training.threshold = 0.0
    again = relabel(load_from_disk(str(out)), segmenter_folder, recipe, tmp_path / "again")
    assert all((np.asarray(mask) != 255).all() for mask in load_from_disk(str(again))["train"]["pseudo_mask"])


def test_a_killed_relabelling_goes_on_where_it_was(toy_data, segmenter_folder, recipe, tmp_path, monkeypatch):
    whole = relabel(toy_data, segmenter_folder, recipe, tmp_path / "whole")
    original, read = module.relabel_images, []

    def mortal(model, processor, rows, *arguments):
        read.append(len(rows))
        for relabelled in original(model, processor, rows, *arguments):
            if len(read) == 2:
                raise KeyboardInterrupt
            yield relabelled

    monkeypatch.setattr(module, "relabel_images", mortal)
    with pytest.raises(KeyboardInterrupt):
        relabel(toy_data, segmenter_folder, recipe, tmp_path / "broken")
    assert not (tmp_path / "broken").exists()
    out = relabel(toy_data, segmenter_folder, recipe, tmp_path / "broken")
    assert read == [5, 5, 5, 2]  # the first shard was safe
    assert same_columns(whole, out) and not (tmp_path / "broken.partial").exists()
    monkeypatch.setattr(module, "relabel_images", None)  # a finished one is not done again
    recipe.self_training.rounds = 5
    relabel(toy_data, segmenter_folder, recipe, tmp_path / "broken")
    recipe.self_training.threshold = 0.9
    monkeypatch.setattr(module, "relabel_images", original)
    relabel(toy_data, segmenter_folder, recipe, tmp_path / "broken")
    assert not same_columns(whole, out)  # made again


def test_the_windows_of_the_test_protocol_are_used(toy_data, segmenter_folder, recipe, tmp_path, monkeypatch):
    forward, sizes = Segmenter.forward, set()

    def watched(self, pixel_values, **kwargs):
        sizes.add(tuple(pixel_values.shape[-2:]))
        return forward(self, pixel_values, **kwargs)

    monkeypatch.setattr(Segmenter, "forward", watched)
    whole = relabel(toy_data, segmenter_folder, recipe, tmp_path / "whole")
    assert sizes == {(48, 48)}
    sizes.clear()
    recipe.evaluation.window = 32
    slid = relabel(toy_data, segmenter_folder, recipe, tmp_path / "slid")
    assert sizes == {(32, 32)} and not same_columns(whole, slid)


def test_a_segmenter_of_other_classes_is_refused(toy_data, recipe, segmenter_folder, tmp_path):
    model = Segmenter.from_pretrained(segmenter_folder)
    model.config.id2label = {index: f"class {index}" for index in range(9)}
    model.save_pretrained(tmp_path / "other")
    WsssImageProcessor().save_pretrained(tmp_path / "other")
    with pytest.raises(DataError, match="expected the classes of the data, background, vixel, .*, got class 0"):
        relabel(toy_data, tmp_path / "other", recipe, tmp_path / "masks")
    assert not (tmp_path / "masks").exists() and not (tmp_path / "masks.partial").exists()


def test_new_masks_cover_what_the_earlier_ones_cover(toy_data, segmenter_folder, recipe, tmp_path):
    earlier = np.zeros((48, 48), dtype=np.uint8)
    earlier[:12] = 1
    encoded = encode_png(Image.fromarray(earlier))
    rows = toy_data["train"].add_column("pseudo_mask", [encoded] * len(toy_data["train"]))
    labelled = DatasetDict({**toy_data, "train": rows.cast_column("pseudo_mask", ImageFeature())})
    recipe.self_training.threshold = 0.0

    def area(keep: bool) -> float:
        recipe.self_training.keep_area = keep
        out = relabel(labelled, segmenter_folder, recipe, tmp_path / f"keep {keep}")
        made = load_from_disk(str(out))["train"]
        tagged = (mask for mask, tags in zip(made["pseudo_mask"], made["tags"], strict=True) if tags)
        return np.mean([(np.asarray(mask) > 0).mean() for mask in tagged])

    assert abs(area(True) - 0.25) < 0.02 < abs(area(False) - 0.25)
