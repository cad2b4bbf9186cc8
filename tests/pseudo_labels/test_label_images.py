from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from torch.nn import functional as F

from wsss_hf.data.tagged import DataError, tagged_features
from wsss_hf.inference.cam_maps import label_confidence, label_map, localize
from wsss_hf.inference.load import load_labeler
from wsss_hf.models.configuration_cam import CamConfig
from wsss_hf.models.maps import add_background
from wsss_hf.models.modeling_cam import CamClassifier
from wsss_hf.models.options import OptionError
from wsss_hf.pseudo_labels.label_images import label_images
from wsss_hf.pseudo_labels.rules import RuleError
from wsss_hf.settings import MasksSettings


@pytest.fixture(scope="module")
def labeler(cam_folder):
    return load_labeler(str(cam_folder), "cpu")


@pytest.fixture
def settings():
    return MasksSettings(batch_size=4)


def dataset(pictures, tags, **columns):
    """Rows of given pictures with tags of eight classes, and other columns of pictures."""
    columns = {"image_id": [f"x{i}" for i in range(len(pictures))], "image": pictures, "tags": tags} | columns
    return Dataset.from_dict(columns, features=tagged_features([f"class{c}" for c in range(8)], *list(columns)[3:]))


def noise(mode, width, height):
    channels = len(Image.new(mode, (1, 1)).getbands())
    values = np.random.default_rng(width).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(values.squeeze(-1) if channels == 1 else values, mode=mode)


def by_index(labelled):
    rows = {item.index: item for item in labelled}
    return [rows[index] for index in sorted(rows)]


def test_a_loaded_labeler_does_not_train(labeler):
    model, processor = labeler
    assert not model.training and processor.size["shortest_edge"] == 48


def test_masks_are_those_of_each_image_alone(labeler, toy_data, settings):
    model, processor = labeler
    rows = toy_data["train"]
    found = by_index(label_images(model, processor, rows, settings))
    assert [item.index for item in found] == list(range(12))
    used = set()
    for item, row in zip(found, rows, strict=True):
        pixel_values = processor(images=row["image"], return_tensors="pt")["pixel_values"]
        tags = torch.zeros(1, 8)
        tags[0, row["tags"]] = 1
        maps, logits = localize(model, pixel_values, tags, (48, 48), settings.scales, True, "mean")
        scores, classes = add_background(maps[None], settings.background_threshold)[0], tags[0].nonzero()[:, 0]
        labels = label_map(scores, classes)
        confidence = label_confidence(scores, labels, classes)
        assert item.classes.tolist() == sorted(row["tags"])
        np.testing.assert_allclose(item.maps, maps, atol=1e-4)
        np.testing.assert_allclose(item.logits, logits[0], atol=1e-4)
        np.testing.assert_allclose(item.confidence, confidence, atol=1e-4)
        certain = confidence.numpy() > 1e-3
        assert np.array_equal(item.pseudo_mask[certain], labels.numpy()[certain]) and certain.mean() > 0.95
        assert set(np.unique(item.pseudo_mask)) <= {0, *(c + 1 for c in row["tags"])}
        used |= set(np.unique(item.pseudo_mask))
        assert np.array_equal(np.asarray(item.image), np.asarray(row["image"]))
    assert len(used) > 4


def test_settings_reach_the_masks(labeler, toy_data, settings):
    rows = toy_data["train"].select(range(4))

    def area(**changes):
        return sum(
            (item.pseudo_mask > 0).mean() for item in label_images(*labeler, rows, replace(settings, **changes))
        )

    assert area(background_threshold=0.1) > area() > area(background_threshold=0.9)
    for change in ({"fusion": "max"}, {"scales": [1.0]}, {"flip": False}):
        assert area(**change) != area()


def test_native_scales_are_of_the_image_as_it_is(labeler, settings):
    model, processor = labeler
    pictures, tags = [noise("RGB", 72, 64), noise("RGB", 40, 36)], [[1, 5], [2]]
    settings = replace(settings, native=True, scales=[0.5, 1.0, 1.5, 2.0], fusion="sum", background_threshold=0.3)
    rows = by_index(label_images(model, processor, dataset(pictures, tags), settings))
    for item, picture, present in zip(rows, pictures, tags, strict=True):
        width, height = picture.size
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255
        pixels = (pixels - torch.tensor(processor.image_mean).view(3, 1, 1)) / torch.tensor(processor.image_std).view(
            3, 1, 1
        )
        total = torch.zeros(len(present), height, width)
        for scale in settings.scales:
            side = [round(height * scale), round(width * scale)]
            scaled = F.interpolate(pixels, side, mode="bilinear", antialias=True)
            for mirror in (False, True):
                with torch.no_grad():
                    maps = model(scaled.flip(-1) if mirror else scaled).maps[:, present]
                maps = F.interpolate(maps, side, mode="bilinear", align_corners=True)
                maps = F.interpolate(maps, (height, width), mode="bilinear")[0]
                total += maps.flip(-1) if mirror else maps
        total = total.clamp(min=0)
        low, high = (extreme(total, dim=(1, 2), keepdim=True) for extreme in (torch.amin, torch.amax))
        np.testing.assert_allclose(item.maps, ((total - low) / (high - low)).numpy(), atol=1e-4)
        strongest = item.maps.max(axis=0)
        certain = abs(strongest - 0.3) > 1e-3
        assert np.array_equal((item.pseudo_mask > 0)[certain], (strongest > 0.3)[certain])


def test_refinement_changes_masks_and_leaves_maps(labeler, toy_data, settings):
    rows = toy_data["train"].select(range(4))
    plain, refined = (by_index(label_images(*labeler, rows, replace(settings, refine=r))) for r in ([], ["pamr"]))
    assert any(not np.array_equal(a.pseudo_mask, b.pseudo_mask) for a, b in zip(plain, refined, strict=True))
    for a, b, tags in zip(plain, refined, rows["tags"], strict=True):
        assert np.array_equal(a.maps, b.maps) and set(np.unique(b.pseudo_mask)) <= {0, *(c + 1 for c in tags)}


def test_true_masks_are_never_read(labeler, toy_data, poisoned_data, settings):
    found, wanted = (by_index(label_images(*labeler, d["train"], settings)) for d in (poisoned_data, toy_data))
    assert all(np.array_equal(a.pseudo_mask, b.pseudo_mask) for a, b in zip(found, wanted, strict=True))


def test_an_image_without_tags_is_background(labeler, settings):
    rows = dataset([noise("RGB", 40, 30), noise("RGB", 40, 30)], [[], [2]])
    empty, tagged = by_index(label_images(*labeler, rows, settings))
    assert empty.maps.shape == (0, 30, 40) and empty.classes.size == 0 and not empty.pseudo_mask.any()
    assert tagged.maps.shape == (1, 30, 40) and tagged.pseudo_mask.max() == 3


@pytest.mark.parametrize(
    ("mode", "width", "height"),
    [("RGB", 1, 1), ("RGB", 1, 8), ("RGBA", 33, 20), ("CMYK", 20, 33), ("L", 25, 25), ("RGB", 160, 20)],
)
@pytest.mark.parametrize("steps", [[], ["pamr", "matting"]])
def test_images_of_any_mode_and_size_are_labelled_at_their_own_size(labeler, settings, mode, width, height, steps):
    rows = dataset([noise(mode, width, height)], [[0, 3]])
    (item,) = label_images(*labeler, rows, replace(settings, refine=steps))
    assert item.pseudo_mask.shape == (height, width) and item.pseudo_mask.dtype == np.uint8
    assert item.image.mode == "RGB" and item.maps.shape == (2, height, width) and np.isfinite(item.maps).all()
    assert set(np.unique(item.pseudo_mask)) <= {0, 1, 4}


def test_mixed_sizes_keep_their_rows(labeler, settings):
    sizes = [(30, 20), (20, 30), (30, 20), (24, 24), (20, 30)]
    rows = dataset([noise("RGB", *size) for size in sizes], [[c] for c in range(5)])
    for item, size, c in zip(by_index(label_images(*labeler, rows, settings)), sizes, range(5), strict=True):
        assert item.pseudo_mask.shape == size[::-1] and item.classes.tolist() == [c]


def test_a_photograph_lies_as_its_camera_was_held(labeler, settings, tmp_path):
    picture, turned = noise("RGB", 40, 24), Image.Exif()
    turned[0x0112] = 6  # the upper side is on the right
    picture.save(tmp_path / "turned.png", exif=turned)
    upright = picture.transpose(Image.Transpose.ROTATE_270)
    rows = dataset([str(tmp_path / "turned.png"), upright], [[2], [2]])
    for item in label_images(*labeler, rows, settings):
        assert item.pseudo_mask.shape == (40, 24) and np.array_equal(np.asarray(item.image), np.asarray(upright))


def test_one_colour_and_maps_of_zeros_still_give_a_mask(cam_folder, labeler, settings):
    _, processor = labeler
    grey = Image.new("RGB", (40, 30), (90, 90, 90))
    silent = CamClassifier.from_pretrained(cam_folder).eval()
    silent.classifier.weight.data[2] = -1.0  # features are not negative after the last relu
    for steps in ([], ["pamr"], ["matting"]):
        rows = dataset([grey, noise("RGB", 40, 30)], [[2, 3], [2]])
        both, one = by_index(label_images(silent, processor, rows, replace(settings, refine=steps)))
        assert both.note.fallbacks["tag without any map"] >= 1 and one.note.fallbacks["tag without any map"] == 1
        assert not one.pseudo_mask.any() and set(np.unique(both.pseudo_mask)) <= {0, 4}
        assert np.isfinite(both.confidence).all()
        assert one.note.fallbacks["class not found"] == (steps == ["matting"])


def test_drs_seeds_take_the_background_from_the_saliency(labeler, toy_data, settings):
    rows = toy_data["train"].select(range(3))
    saliency = [noise("L", 48, 48) for _ in range(3)]
    rows = dataset(rows["image"][:], rows["tags"][:], saliency=saliency)
    plain = by_index(label_images(*labeler, rows, settings))
    settings = replace(settings, seeds="drs", seed_options={"saliency_threshold": 0.1961})
    ruled = by_index(label_images(*labeler, rows, settings))
    assert any((item.pseudo_mask == 255).any() for item in ruled)
    for item, salient, unruled in zip(ruled, saliency, plain, strict=True):
        salient = np.asarray(salient) > 50
        assert set(np.unique(item.pseudo_mask[~salient & (item.maps.max(axis=0) < 1)])) <= {0, 255}
        assert not (item.pseudo_mask[salient] == 0).any()
        assert not item.confidence[item.pseudo_mask == 255].any() and unruled.confidence.any()


def test_background_by_saliency_is_not_trusted_where_the_object_is_strong(labeler, toy_data, settings):
    rows = toy_data["train"].select(range(3))
    rows = dataset(rows["image"][:], rows["tags"][:], saliency=[Image.new("L", (48, 48))] * 3)  # nothing is salient
    settings = replace(settings, seeds="saliency", seed_options={"saliency_threshold": 0.5})
    for item in label_images(*labeler, rows, settings):
        assert not item.pseudo_mask.any()
        np.testing.assert_allclose(item.confidence, 1 - item.maps.max(axis=0), atol=1e-6)


def test_saliency_that_is_missing_or_does_not_fit_is_named(labeler, toy_data, settings):
    rows = toy_data["train"].select(range(2))
    settings = replace(settings, seeds="drs", seed_options={"saliency_threshold": 0.5})
    images, tags = rows["image"][:], rows["tags"][:]
    for columns, message in (
        ({}, "expected a column 'saliency' for masks.seeds: drs, got image_id"),
        ({"saliency": [None, None]}, "expected a column 'saliency' for masks.seeds: drs, got an empty one"),
        (
            {"saliency": [noise("L", 48, 48), None]},
            "column 'saliency': .* masks.seeds: drs, got none for 1 of 2 .*: x1",
        ),
        ({"saliency": [noise("L", 48, 48), noise("L", 48, 40)]}, "row 'x1', column saliency: expected .* got 48x40"),
    ):
        with pytest.raises(DataError, match=message):
            list(label_images(*labeler, dataset(images, tags, **columns), settings))
    rows = dataset(images, tags, saliency=[noise("L", 48, 48)] * 2)
    with pytest.raises(RuleError, match="saliency_threshold: expected a number, got 'auto'"):
        list(label_images(*labeler, rows, replace(settings, seed_options={})))


def test_maps_that_say_nothing_are_counted(labeler, toy_data, settings):
    images, tags = (toy_data["train"].select(range(6))[name][:] for name in ("image", "tags"))
    half = Image.new("L", (48, 48))
    half.paste(255, (0, 0, 24, 48))
    bright = Image.fromarray(np.full((48, 48), 200, dtype=np.uint8))
    bright.putpixel((0, 0), 210)
    maps = [half, Image.new("L", (48, 48)), Image.new("L", (48, 48), 255), bright, Image.new("L", (48, 48), 9), half]
    rows = dataset(images, tags, saliency=maps)
    settings = replace(settings, seeds="saliency", seed_options={"saliency_threshold": 0.5})
    labelled = by_index(label_images(*labeler, rows, settings))
    found = [next((name for name in item.note.fallbacks if "saliency" in name), None) for item in labelled]
    kinds = [None, "empty", "constant", "all-salient", "empty", None]
    assert found == [kind and f"{kind} saliency map" for kind in kinds]
    assert not labelled[1].pseudo_mask.any() and (labelled[2].pseudo_mask > 0).all()


def test_icd_seeds_want_maps_that_are_probabilities(labeler, toy_data, settings):
    pytest.importorskip("pydensecrf")
    with pytest.raises(OptionError, match="maps that are probabilities"):
        list(label_images(*labeler, toy_data["train"].select(range(2)), replace(settings, seeds="icd")))


def test_icd_seeds_follow_the_sign_of_its_scores(toy_data, settings, cam_folder):
    pytest.importorskip("pydensecrf")
    torch.manual_seed(0)
    names = {c: str(c) for c in range(8)}
    config = CamClassifier.from_pretrained(cam_folder).config
    model = CamClassifier(
        CamConfig(backbone_config=config.backbone_config, id2label=names, icd={"hidden_channels": 8}, maps="icd")
    ).eval()
    rows = toy_data["train"].select(range(4))
    saliency = [Image.new("L", (48, 48), 255)] * 4  # nothing is background
    rows = dataset(rows["image"][:], rows["tags"][:], saliency=saliency)
    processor = load_labeler(str(cam_folder), "cpu")[1]
    options = {"seed_options": {"saliency_threshold": 0.5}, "scales": [1.0], "flip": False}
    settings = replace(settings, seeds="icd", **options)
    for item in label_images(model, processor, rows, settings):
        pixel_values = processor(images=item.image, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            maps = model(pixel_values).maps[:, item.classes]
        found = torch.nn.functional.interpolate(maps, size=(48, 48), mode="bilinear")[0] > 0.5
        claimed = found.any(dim=0).numpy()
        assert (item.pseudo_mask[~claimed] == 255).all() and (item.pseudo_mask != 0).all()
        (single,) = np.nonzero(found.sum(dim=0).numpy().ravel() == 1)
        winners = item.classes[found.int().argmax(dim=0).numpy().ravel()[single]] + 1
        assert np.array_equal(item.pseudo_mask.ravel()[single], winners)


def test_mat_label_wants_alphas_and_ignores_a_band(labeler, toy_data, settings):
    rows, settings = toy_data["train"].select(range(3)), replace(settings, seeds="mat_label")
    for refine in ([], ["matting", "pamr"]):
        with pytest.raises(RuleError, match="mat_label: expected matting as the last step of masks.refine"):
            list(label_images(*labeler, rows, replace(settings, refine=refine)))
    options = {"refine": ["matting"], "seed_options": {"uncertain": [0.3, 0.9]}}
    for item in label_images(*labeler, rows, replace(settings, **options)):
        alphas = item.note.pictures["alpha"].max(axis=0) / 255
        certain = (alphas < 0.29) | (alphas > 0.91)
        assert (item.pseudo_mask[~certain & (alphas > 0.31) & (alphas < 0.89)] == 255).all()
        assert (item.pseudo_mask[alphas < 0.29] == 0).all()
