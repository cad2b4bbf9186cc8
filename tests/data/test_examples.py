import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from wsss_hf.data.examples import TaggedExamples
from wsss_hf.data.tagged import DataError, encode_png, tagged_features
from wsss_hf.data.toy import make_toy
from wsss_hf.data.transforms import TrainTransform


@pytest.fixture(scope="module")
def train():
    return make_toy(6, 1, image_size=32)["train"]


def test_an_example_is_pixels_and_tags(train):
    examples = TaggedExamples(train, TrainTransform(24))
    assert len(examples) == 6
    for example, tags in zip(examples, train["tags"], strict=True):
        assert set(example) == {"pixel_values", "tags"} and example["pixel_values"].shape == (3, 24, 24)
        assert example["tags"].dtype == torch.float32 and example["tags"].nonzero().flatten().tolist() == tags


def test_weak_examples_never_read_a_mask(train):
    broken = train.remove_columns("mask").add_column("mask", ["no mask"] * 6)
    assert TaggedExamples(broken, TrainTransform(24))[0]["tags"].sum() > 0


def test_with_a_mask_column_rows_without_a_mask_are_left_out(train):
    masks = [mask if index in (1, 4) else None for index, mask in enumerate(train["mask"])]
    columns = {name: train[name][:] for name in ("image_id", "image", "tags")} | {"pseudo_mask": masks}
    partial = Dataset.from_dict(columns, features=tagged_features(train.features["tags"].feature.names, "pseudo_mask"))
    examples = TaggedExamples(partial, TrainTransform(32, scale=(1, 1), flip=0), mask_column="pseudo_mask")
    assert len(examples) == 2
    assert np.array_equal(examples[1]["labels"], train[4]["mask"]) and examples[1]["labels"].dtype == torch.int64


def test_confidence_follows_its_image(train):
    columns = np.tile(np.arange(32, dtype=np.uint8), (32, 1))
    pictures = {"mask": Image.fromarray(columns // 4), "confidence": Image.fromarray(columns * 8)}
    given = {name: train[name][:] for name in ("image_id", "image", "tags")} | {
        n: [p] * 6 for n, p in pictures.items()
    }
    features = tagged_features(train.features["tags"].feature.names, "mask", "confidence")
    trusted = Dataset.from_dict(given, features=features)
    examples = TaggedExamples(trusted, TrainTransform(32, scale=(0.5, 2)), mask_column="mask", confidence=True)
    for example in (examples[index] for index in range(6)):
        labels, weights = example["labels"], example["confidence"]
        assert weights.dtype == torch.float32 and weights.shape == (32, 32)
        inside = labels != 255
        assert (weights[~inside] == 0).all()
        assert ((weights * 255 / 32 - 0.5 - labels)[inside].abs() < 1).all()


def test_augmentation_depends_on_seed_epoch_and_index_alone(train):
    examples, same, other = (TaggedExamples(train, TrainTransform(24), seed=seed) for seed in (0, 0, 1))
    torch.manual_seed(7), np.random.seed(7)
    first = [examples[index]["pixel_values"] for index in range(6)]
    assert all(torch.equal(same[index]["pixel_values"], first[index]) for index in reversed(range(6)))
    assert not torch.equal(other[0]["pixel_values"], first[0])
    examples.set_epoch(1)
    assert not torch.equal(examples[0]["pixel_values"], first[0])
    examples.set_epoch(0)
    assert torch.equal(examples[0]["pixel_values"], first[0])


def test_workers_that_live_on_see_the_new_epoch(train):
    examples = TaggedExamples(train, TrainTransform(24))
    loader = torch.utils.data.DataLoader(examples, batch_size=3, num_workers=2, persistent_workers=True)
    for epoch in (0, 1):
        examples.set_epoch(epoch)
        batches = torch.cat([batch["pixel_values"] for batch in loader])
        assert torch.equal(batches, torch.stack([examples[index]["pixel_values"] for index in range(6)]))


def rows(image, mask, **confidence):
    columns = {"image_id": ["x1"], "image": [image], "tags": [[0]], "mask": [mask]}
    columns |= {name: [value] for name, value in confidence.items()}
    return Dataset.from_dict(columns, features=tagged_features(["cat"], "mask", *confidence))


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (
            rows({"bytes": b"no", "path": "b.jpg"}, Image.new("L", (4, 4))),
            "row 'x1', b.jpg: expected an image, got a file that can't be decoded",
        ),
        (
            rows(Image.new("RGB", (4, 4)), Image.new("RGB", (4, 4))),
            "row 'x1', column mask: expected one 8-bit channel .*, got mode RGB",
        ),
        (
            rows(Image.new("RGB", (4, 4)), Image.new("L", (4, 5))),
            "row 'x1': mask: expected the image's size, 4x4, got 4x5",
        ),
        (
            rows(Image.new("RGB", (4, 4)), Image.new("L", (4, 4), 2)),
            r"row 'x1': mask: expected labels 0..1 and 255, got 2",
        ),
    ],
)
def test_bad_rows_are_named_when_they_are_read(dataset, message):
    with pytest.raises(DataError, match=message):
        TaggedExamples(dataset, TrainTransform(8), mask_column="mask")[0]


def test_a_mask_column_that_cannot_teach_is_refused(train):
    with pytest.raises(DataError, match="expected a column 'pseudo_mask', got image_id, image, tags, mask"):
        TaggedExamples(train, TrainTransform(8), mask_column="pseudo_mask")
    with pytest.raises(DataError, match="column 'mask': expected a mask in at least one row, got none"):
        TaggedExamples(rows(Image.new("RGB", (4, 4)), None), TrainTransform(8), mask_column="mask")


def test_superpixels_and_saliency_come_along(train):
    columns = [Image.fromarray(np.tile(np.arange(16, dtype=np.uint16) * 300, (16, 1)))] * 6  # half as large, 16 bits
    grey = [Image.fromarray(np.full((32, 32), 51, dtype=np.uint8))] * 6
    features = tagged_features(train.features["tags"].feature.names, "superpixels", "saliency")
    given = {name: train[name][:] for name in ("image_id", "image", "tags")}
    rows = Dataset.from_dict(given | {"superpixels": columns, "saliency": grey}, features=features)
    examples = TaggedExamples(rows, TrainTransform(32, scale=(0.5, 0.5), flip=0), superpixels=True, saliency=True)
    example = examples[0]
    assert set(example) == {"pixel_values", "tags", "superpixels", "saliency"}
    assert example["superpixels"].dtype == torch.int64 and example["saliency"].dtype == torch.float32
    outside = example["saliency"] == 0
    assert outside.sum() == 32 * 32 - 16 * 16 and torch.allclose(example["saliency"][~outside], torch.tensor(0.2))
    assert (example["superpixels"][outside] == 4501).all()  # a superpixel of its own
    assert example["superpixels"][~outside].view(16, 16).tolist() == [[300 * i for i in range(16)]] * 16
    small = rows.remove_columns("saliency").add_column(
        "saliency", [encode_png(grey[0].resize((16, 16)).convert("RGB"))] * 6, feature=rows.features["saliency"]
    )
    resized = TaggedExamples(small, examples.transform, superpixels=True, saliency=True)[0]
    assert torch.allclose(resized["saliency"], example["saliency"])
    plain = TaggedExamples(rows, TrainTransform(32, scale=(0.5, 0.5), flip=0))[0]
    assert set(plain) == {"pixel_values", "tags"} and torch.equal(plain["pixel_values"], example["pixel_values"])


@pytest.mark.parametrize("name", ["superpixels", "saliency"])
def test_maps_that_are_missing_or_do_not_fit_are_named(train, name):
    with pytest.raises(DataError, match=f"expected a column '{name}' for cam.{name}, got image_id, "):
        TaggedExamples(train, TrainTransform(24), **{name: True})
    given = {column: train[column][:] for column in ("image_id", "image", "tags")}
    features = tagged_features(train.features["tags"].feature.names, name)
    rows = Dataset.from_dict(given | {name: [None, *[Image.new("RGB", (32, 20))] * 5]}, features=features)
    examples = TaggedExamples(rows, TrainTransform(24), **{name: True})
    with pytest.raises(DataError, match=f"row 'train_00000', column {name}: expected an image, got none"):
        examples[0]
    expected = {
        "superpixels": "an image of one channel .*, got mode RGB",
        "saliency": "a saliency map with the aspect of its image, 32x32, got 32x20",
    }
    with pytest.raises(DataError, match=f"row 'train_00001', column {name}: expected {expected[name]}"):
        examples[1]


@pytest.mark.parametrize(
    ("confidence", "message"),
    [
        (Image.new("L", (5, 4)), "row 'x1': confidence: expected the image's size, 4x4, got 5x4"),
        (Image.new("RGB", (4, 4)), "row 'x1', column confidence: expected an image of one channel .*, got mode RGB"),
        (None, "row 'x1', column confidence: expected an image, got none"),
    ],
)
def test_confidence_that_does_not_fit_is_named(confidence, message):
    dataset = rows(Image.new("RGB", (4, 4)), Image.new("L", (4, 4)), confidence=confidence)
    with pytest.raises(DataError, match=message):
        TaggedExamples(dataset, TrainTransform(8), mask_column="mask", confidence=True)[0]


def test_confidence_that_is_not_there_is_refused(train):
    with pytest.raises(DataError, match="expected a column 'confidence' for segmenter.confidence, got image_id, "):
        TaggedExamples(train, TrainTransform(8), mask_column="mask", confidence=True)
