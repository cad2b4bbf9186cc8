import dataclasses
from collections import Counter
from unittest.mock import Mock

import numpy as np
import pytest
from datasets import DatasetDict, concatenate_datasets, load_from_disk
from datasets import Image as ImageFeature
from PIL import Image

from wsss_hf.data.folder import load_folder
from wsss_hf.data.tagged import check_dataset, class_names, undecoded
from wsss_hf.inference.load import load_labeler
from wsss_hf.pseudo_labels.label_images import label_images
from wsss_hf.pseudo_labels.threshold import auto_threshold
from wsss_hf.stages import make_masks as module
from wsss_hf.stages.make_masks import make_masks
from wsss_hf.stages.train_segmenter import train_segmenter


def pseudo_masks(folder):
    return [np.array(mask) for mask in load_from_disk(str(folder))["train"]["pseudo_mask"]]


def test_every_row_gets_the_mask_that_labelling_makes_of_it(toy_data, cam_folder, tiny_recipe, tmp_path):
    out = make_masks(toy_data, cam_folder, tiny_recipe, tmp_path / "masks")
    data = load_from_disk(str(out))
    check_dataset(data)
    assert data["train"].column_names == [*toy_data["train"].column_names, "pseudo_mask"]
    assert data["train"]["image_id"][:] == toy_data["train"]["image_id"][:]
    assert class_names(data) == class_names(toy_data) == class_names(data["val"])
    wanted = [None] * 12
    # Batches as each shard has them, so that masks agree to the last pixel.
    for start in range(0, 12, tiny_recipe.masks.shard_size):
        rows = toy_data["train"].select(range(start, start + tiny_recipe.masks.shard_size))
        for item in label_images(*load_labeler(str(cam_folder), "cpu"), rows, tiny_recipe.masks):
            wanted[start + item.index] = item.pseudo_mask
    for row, before, mask in zip(data["train"], toy_data["train"], wanted, strict=True):
        assert row["pseudo_mask"].mode == "P" and np.array_equal(row["pseudo_mask"], mask)
        assert row["tags"] == before["tags"] and np.array_equal(row["image"], before["image"])
        assert np.array_equal(row["mask"], before["mask"])
    assert any(mask.any() for mask in wanted)
    for row, before in zip(data["val"], toy_data["val"], strict=True):
        assert row["image_id"] == before["image_id"] and np.array_equal(row["mask"], before["mask"])


def test_images_in_a_folder_are_copied_only_on_request(toy_data, cam_folder, tiny_recipe, tmp_path):
    for index, row in enumerate(toy_data["train"]):
        file = tmp_path / "photos" / class_names(toy_data)[row["tags"][0]] / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        row["image"].save(file)
    data = load_folder(tmp_path / "photos", class_names(toy_data))
    out = make_masks(data, cam_folder, tiny_recipe, tmp_path / "masks")
    rows = undecoded(out.data["train"])
    assert all(row["image"]["bytes"] is None and row["pseudo_mask"]["bytes"] for row in rows)
    train_segmenter(out.data, tiny_recipe, tmp_path / "segmenter")
    again = make_masks(data, cam_folder, tiny_recipe, tmp_path / "masks", embed_images=True)
    assert all(row["image"]["bytes"] for row in undecoded(again.data["train"]))
    assert undecoded(again.data["train"])["pseudo_mask"][:] == rows["pseudo_mask"][:]


def test_a_killed_run_goes_on_after_its_last_finished_shard(
    toy_data, cam_folder, tiny_recipe, tmp_path, labelled_rows
):
    seen, stop_at = labelled_rows
    make_masks(toy_data, cam_folder, tiny_recipe, tmp_path / "unbroken")
    ids = toy_data["train"]["image_id"][:]
    assert sorted(seen) == sorted(ids)
    seen.clear()
    stop_at[0] = 6  # in the middle of the second of three shards
    with pytest.raises(KeyboardInterrupt):
        make_masks(toy_data, cam_folder, tiny_recipe, tmp_path / "broken")
    assert not (tmp_path / "broken").exists()
    seen.clear()
    stop_at[0] = None
    out = make_masks(toy_data, cam_folder, tiny_recipe, tmp_path / "broken")
    assert sorted(seen) == sorted(ids[4:])
    pairs = zip(pseudo_masks(out), pseudo_masks(tmp_path / "unbroken"), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)
    assert not (tmp_path / "broken.partial").exists()


def test_a_kill_while_the_data_set_is_written_is_no_obstacle(
    toy_data, cam_folder, tiny_recipe, tmp_path, labelled_rows, monkeypatch
):
    seen, _ = labelled_rows

    def killed(_data, folder):
        folder.mkdir()
        (folder / "dataset_dict.json").write_text("{")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(DatasetDict, "save_to_disk", killed)
        make_masks(toy_data, cam_folder, tiny_recipe, tmp_path / "masks")
    seen.clear()
    out = make_masks(toy_data, cam_folder, tiny_recipe, tmp_path / "masks")
    assert not seen and len(pseudo_masks(out)) == 12


def test_a_finished_result_is_not_made_again(toy_data, cam_folder, tiny_recipe, tmp_path, labelled_rows):
    out = make_masks(toy_data, cam_folder, tiny_recipe, tmp_path / "masks")
    times = {path: path.stat().st_mtime_ns for path in out.folder.rglob("*")}
    labelled_rows[0].clear()
    assert make_masks(toy_data, cam_folder, tiny_recipe, tmp_path / "masks") == out
    assert not labelled_rows[0] and times == {path: path.stat().st_mtime_ns for path in out.folder.rglob("*")}


def test_other_settings_make_the_masks_again(toy_data, cam_folder, tiny_recipe, tmp_path, labelled_rows):
    out = make_masks(toy_data, cam_folder, tiny_recipe, tmp_path / "masks")
    before = pseudo_masks(out)
    tiny_recipe.masks.background_threshold = 0.7
    labelled_rows[0].clear()
    assert make_masks(toy_data, cam_folder, tiny_recipe, out.folder) == out
    assert len(labelled_rows[0]) == 12 and out.summary["background_threshold"] == 0.7
    assert any(not np.array_equal(a, b) for a, b in zip(pseudo_masks(out), before, strict=True))


@pytest.mark.parametrize("fixture", ["poisoned_data", "unmasked_data"])
def test_true_masks_are_never_read(toy_data, cam_folder, tiny_recipe, tmp_path, request, fixture):
    wanted = make_masks(toy_data, cam_folder, tiny_recipe, tmp_path / "wanted")
    out = make_masks(request.getfixturevalue(fixture), cam_folder, tiny_recipe, tmp_path / "masks")
    assert all(np.array_equal(a, b) for a, b in zip(pseudo_masks(out), pseudo_masks(wanted), strict=True))


def test_old_pseudo_masks_are_replaced(toy_data, cam_folder, tiny_recipe, tmp_path):
    wanted = make_masks(toy_data, cam_folder, tiny_recipe, tmp_path / "wanted")
    old = concatenate_datasets(
        [toy_data["train"], toy_data["train"].select_columns("mask").rename_column("mask", "pseudo_mask")], axis=1
    )
    out = make_masks(DatasetDict(train=old), cam_folder, tiny_recipe, tmp_path / "masks")
    assert all(np.array_equal(a, b) for a, b in zip(pseudo_masks(out), pseudo_masks(wanted), strict=True))


@pytest.mark.slow
def test_the_found_threshold_is_the_one_of_masks_and_summary(toy_data, cam_folder, tiny_recipe, tmp_path, capsys):
    settings = tiny_recipe.masks
    settings.background_threshold = "auto"
    out = make_masks(toy_data, cam_folder, tiny_recipe, tmp_path / "auto")
    found = out.summary["background_threshold"]
    assert f"background threshold {found}, 12 images, fallbacks: none" in capsys.readouterr().err
    assert found == auto_threshold(*load_labeler(str(cam_folder), "cpu"), toy_data["train"], settings)
    settings.background_threshold = found
    fixed = make_masks(toy_data, cam_folder, tiny_recipe, tmp_path / "fixed")
    assert all(np.array_equal(a, b) for a, b in zip(pseudo_masks(out), pseudo_masks(fixed), strict=True))


@pytest.mark.slow
def test_confidence_is_a_column_of_grey_pictures(toy_data, cam_folder, tiny_recipe, tmp_path):
    tiny_recipe.masks.confidence = True
    out = make_masks(toy_data, cam_folder, tiny_recipe, tmp_path / "masks")
    train = load_from_disk(str(out))["train"]
    assert train.column_names[-2:] == ["pseudo_mask", "confidence"] and train.features["confidence"] == ImageFeature()
    for start in range(0, 12, 4):
        rows = toy_data["train"].select(range(start, start + 4))
        for item in label_images(*load_labeler(str(cam_folder), "cpu"), rows, tiny_recipe.masks):
            picture = train[start + item.index]["confidence"]
            assert picture.mode == "L" and picture.size == train[start + item.index]["pseudo_mask"].size
            np.testing.assert_allclose(np.asarray(picture) / 255, item.confidence, atol=0.51 / 255)
    assert np.asarray(train["confidence"][0]).any()
    tiny_recipe.masks.confidence = False
    again = make_masks(load_from_disk(str(out)), cam_folder, tiny_recipe, tmp_path / "again")
    assert "confidence" not in load_from_disk(str(again))["train"].column_names  # it belonged to the old masks


def test_fallbacks_of_all_shards_are_counted_also_after_a_kill(
    toy_data, cam_folder, tiny_recipe, tmp_path, labelled_rows
):
    tiny_recipe.masks.refine = [{"matting": {"background_threshold": 0.0, "foreground_threshold": 1.0}}]
    wanted = sum((item.note.fallbacks for item in everything_labelled(toy_data, cam_folder, tiny_recipe)), Counter())
    labelled_rows[1][0] = 6
    with pytest.raises(KeyboardInterrupt):
        make_masks(toy_data, cam_folder, tiny_recipe, tmp_path / "masks")
    labelled_rows[1][0] = None
    out = make_masks(toy_data, cam_folder, tiny_recipe, tmp_path / "masks")
    assert out.summary["fallbacks"] == dict(wanted) and sum(wanted.values()) > 12


def everything_labelled(toy_data, cam_folder, recipe):
    return label_images(*load_labeler(str(cam_folder), "cpu"), toy_data["train"], recipe.masks)


def test_steps_are_kept_on_request(toy_data, cam_folder, tiny_recipe, tmp_path):
    vars(tiny_recipe.masks).update({"refine": ["matting"], "keep": 5})
    out = make_masks(toy_data, cam_folder, tiny_recipe, tmp_path / "masks")
    names = {
        f"{row:06d}_{label:03d}_{step}.png"
        for row, tags in enumerate(toy_data["train"]["tags"][:5])
        for label in tags
        for step in ("map", "trimap", "alpha")
    }
    assert {path.name for path in (out / "steps").iterdir()} == names
    label = toy_data["train"]["tags"][4][0]
    trimap = np.asarray(Image.open(out / "steps" / f"000004_{label:03d}_trimap.png"))
    assert trimap.shape == (48, 48) and set(np.unique(trimap)) <= {0, 128, 255}
    alpha = np.asarray(Image.open(out / "steps" / f"000004_{label:03d}_alpha.png"))
    assert (alpha[trimap == 255] == 255).all() and (alpha[trimap == 0] == 0).all()


def test_steps_of_other_thresholds_that_a_kill_has_left_are_not_kept(
    toy_data, cam_folder, tiny_recipe, tmp_path, monkeypatch
):
    vars(tiny_recipe.masks).update({"refine": [], "keep": 5})

    def at(value):
        def found(_model, _processor, _rows, settings):
            return dataclasses.replace(settings, background_threshold=value)

        monkeypatch.setattr(module, "with_threshold", found)

    at(0.3)
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(module, "write_atomically", Mock(side_effect=KeyboardInterrupt))
        make_masks(toy_data, cam_folder, tiny_recipe, tmp_path / "masks")
    kept = next((tmp_path / "masks.partial" / "steps").rglob("*.png")).parent
    (kept / "000000_000_alpha.png").write_bytes(b"of a refinement that these thresholds alone asked for")
    at(0.6)
    out = make_masks(toy_data, cam_folder, tiny_recipe, tmp_path / "masks")
    assert {path.stem.rpartition("_")[2] for path in (out / "steps").iterdir()} == {"map"}
