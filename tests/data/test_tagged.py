import io
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from PIL import Image

from wsss_hf.data.tagged import (
    DataError,
    TaggedData,
    check_classes,
    check_dataset,
    check_names,
    class_names,
    decode_image,
    decode_mask,
    has_value,
    source_of,
    tagged_features,
    tags_to_multi_hot,
)


def encoded(image, format="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, format=format, **options)
    return {"bytes": stream.getvalue(), "path": None}


def rows(**changes):
    """Two good rows of 6x4 images, one with a mask, with some columns replaced."""
    columns = {
        "image_id": ["one", "two"],
        "image": [encoded(Image.new("RGB", (6, 4), "red"))] * 2,
        "tags": [[0], [0, 1]],
        "mask": [encoded(Image.new("L", (6, 4), 1)), None],
    } | changes
    return Dataset.from_dict(columns, features=tagged_features(["cat", "dog"], "mask"))


def test_good_data_pass_and_tell_their_classes():
    dataset = DatasetDict(train=rows(), val=rows())
    check_dataset(dataset)
    assert class_names(dataset) == class_names(dataset["val"]) == ["cat", "dog"]
    assert has_value(dataset["train"], "mask").tolist() == [True, False]
    assert has_value(dataset["train"].select([1, 0, 1]), "mask").tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"image_id": ["one", "one"]},
            "split 'train', row 'one': expected an image_id that no other row has, got 'one'",
        ),
        ({"image": [encoded(Image.new("RGB", (6, 4))), None]}, "row 'two', column image: expected an image, got none"),
        (
            {"image": [encoded(Image.new("RGB", (6, 4))), {"bytes": b"no", "path": "b.jpg"}]},
            "row 'two', b.jpg: expected an image, got a file that can't be",
        ),
        (
            {"mask": [None, encoded(Image.new("L", (4, 6)))]},
            "row 'two': expected a mask of the image's size, 6x4, got one of 4x6",
        ),
        (
            {"mask": [None, encoded(Image.new("L", (6, 4), 3))]},
            "row 'two': mask: expected labels 0..2 and 255 .ignore., got 3",
        ),
        (
            {"mask": [None, encoded(Image.new("RGB", (6, 4)))]},
            "row 'two', column mask: expected one 8-bit channel of labels .*, got mode RGB",
        ),
        (
            {"mask": [None, {"bytes": b"no", "path": None}]},
            "row 'two', column mask: expected an image, got a file that can't be decoded",
        ),
        ({"tags": [[0], None]}, r"row 'two': tags: expected class indices 0\.\.1, got None"),
        ({"tags": [[], []]}, "split 'train': expected images with tags, got none"),
    ],
)
def test_bad_rows_are_named(changes, message):
    with pytest.raises(DataError, match=message) as caught:
        check_dataset(DatasetDict(train=rows(**changes)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"val": rows()}, "expected a split 'train', got val"),
        ({"train": rows(), "val": rows().select([])}, "split 'val': expected at least one row"),
        (
            {"train": rows().rename_column("tags", "labels")},
            "expected a column tags, got image_id, image, labels, mask",
        ),
        (
            {"train": rows().cast_column("image_id", Value("string")).remove_columns("image_id")},
            "expected a column image_id, got",
        ),
        (
            {"train": rows().remove_columns("mask").add_column("mask", ["a.png", "b.png"])},
            "split 'train', column 'mask': expected images",
        ),
        ({"train": rows().remove_columns("tags").add_column("tags", ["cat", "dog"])}, "column 'tags': expected List"),
        (
            {"train": rows(), "val": rows().cast(tagged_features(["cow", "pig"], "mask"))},
            "split 'val': expected the classes of 'train', .'cat', 'dog'., got .'cow', 'pig'.",
        ),
    ],
)
def test_bad_splits_are_named(splits, message):
    with pytest.raises(DataError, match=message):
        check_dataset(DatasetDict(splits))


def test_tag_out_of_range_is_named():
    loose = rows().remove_columns("tags").add_column("tags", [[0], [-1]])
    features = rows().features
    loose = loose.cast(type(features)({name: features[name] for name in loose.column_names}))
    with pytest.raises(DataError, match=r"row 'two': tags: .*got \[-1\]"):
        check_dataset(DatasetDict(train=loose))


def test_void_is_allowed_and_a_turned_photograph_has_its_upright_size():
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(Image.new("RGB", (4, 6)), format="JPEG", exif=exif)
    upright = encoded(Image.fromarray(np.array([[1] + [255] * 5] * 4, dtype=np.uint8)))
    check_dataset(DatasetDict(train=rows(image=[turned] * 2, mask=[upright, None])))
    assert decode_image(turned, "row").size == (6, 4)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "P", "1", "RGBA", "LA", "I;16", "I"])
def test_any_mode_becomes_the_same_gray_rgb(mode):
    if mode in ("I;16", "I"):
        dtype = np.uint16 if mode == "I;16" else np.int32
        image = Image.fromarray(np.full((3, 5), 255 * 257, dtype=dtype))
    else:
        image = Image.new("RGB", (5, 3), "white").convert(mode)
    decoded = decode_image(image if mode == "I" else encoded(image, "TIFF" if mode == "CMYK" else "PNG"), "row")
    assert decoded.mode == "RGB" and decoded.size == (5, 3)
    assert (np.asarray(decoded) == 255).all()


def test_transparent_pixels_are_white_and_16_bits_are_scaled():
    assert decode_image(encoded(Image.new("RGBA", (1, 1), (9, 9, 9, 0))), "row").getpixel((0, 0)) == (255, 255, 255)
    half = Image.fromarray(np.full((1, 1), 128 * 257, dtype=np.uint16))
    assert decode_image(encoded(half), "row").getpixel((0, 0)) == (128, 128, 128)


def turned(size, orientation, kind="JPEG", **options):
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    return encoded(Image.new(size=size, **({"mode": "RGB"} | options)), kind, exif=exif)


@pytest.mark.parametrize(
    ("size", "image_turn", "mask_size", "mask_turn", "message"),
    [
        ((4, 6), 6, (6, 4), None, None),  # drawn on the turned image
        ((4, 6), 6, (6, 4), 1, None),
        ((4, 6), 6, (4, 6), 6, None),  # drawn on the raw image and turned with it
        ((4, 6), 6, (4, 6), None, "expected a mask of the image's size, 6x4, got one of 4x6"),
        ((6, 4), 3, (6, 4), 1, None),
        ((6, 4), 3, (6, 4), 3, None),
        ((6, 4), 3, (6, 4), None, "expected an image without an EXIF orientation, got 3: whether its mask is turned"),
        ((6, 6), 8, (6, 6), None, "expected an image without an EXIF orientation, got 8: whether its mask is turned"),
        ((6, 6), 8, (6, 6), 8, None),
        ((6, 4), 1, (6, 4), None, None),
        ((6, 4), 9, (6, 4), None, None),
    ],
)
def test_masks_of_turned_images(size, image_turn, mask_size, mask_turn, message):
    mask = turned(mask_size, mask_turn, "PNG", mode="L", color=1)
    data = DatasetDict(train=rows(image=[turned(size, image_turn)] * 2, mask=[mask, None]))
    if message is None:
        check_dataset(data)
        return
    with pytest.raises(DataError, match=f"^split 'train', row 'one': {message}"):
        check_dataset(data)


def test_a_mask_turns_as_its_image_does():
    exif = Image.Exif()
    exif[0x0112] = 6  # the stored left column is the upper row
    mask = encoded(Image.fromarray(np.array([[1, 0], [1, 0], [2, 0]], dtype=np.uint8)), exif=exif)
    assert decode_mask(mask, "row").tolist() == [[2, 1, 1], [0, 0, 0]]


@pytest.mark.parametrize(
    "labels",
    [
        [[0, 255], [0, 255]],  # 255 for the object
        [[255, 255], [255, 255]],
        [[0, 0], [0, 0]],
        [[2, 0], [255, 0]],  # another class than any of its tags
    ],
)
@pytest.mark.parametrize("count", [1, 2])
def test_masks_that_never_show_a_tag_are_refused(labels, count):
    mask = encoded(Image.fromarray(np.array(labels, dtype=np.uint8)))
    image = [encoded(Image.new("RGB", (2, 2)))] * 2
    tags = [[0], [0]]
    data = {
        "train": rows(image=image, mask=[None, None]),
        "val": rows(image=image, tags=tags, mask=[mask] * count + [None] * (2 - count)),
    }
    with pytest.raises(
        DataError, match=f"^split 'val', column mask: expected label c . 1 where class c .* in any of {count} masks"
    ):
        check_dataset(DatasetDict(data))


def test_a_mask_of_void_among_others_and_masks_of_untagged_images_are_good():
    masks = [encoded(Image.new("L", (6, 4), value)) for value in (255, 2)]
    check_dataset(DatasetDict(train=rows(mask=masks)))
    check_dataset(DatasetDict(train=rows(), val=rows(tags=[[], []], mask=[encoded(Image.new("L", (6, 4)))] * 2)))


@pytest.mark.parametrize(
    ("palette", "labels", "message"),
    [
        ([(0, 0, 0), (0, 128, 0), (128, 0, 0)], [0, 1, 2], "got value 1 in the colour of label 2"),  # VOC's, swapped
        ([(128, 0, 0), (0, 0, 0)], [0, 1], "got value 0 in the colour of label 1"),
        ([(0, 0, 0), (2, 2, 2), (1, 1, 1)], [0, 1, 2], "got value 1 in the colour of label 2"),  # grey levels, swapped
        ([(0, 0, 0), (1, 1, 1), (255, 255, 255)], [0, 1, 2], "got value 2 in the colour of label 255"),
        ([(0, 0, 0), (128, 0, 0), (0, 128, 0)], [0, 1, 2], None),
        ([(0, 0, 0), (255, 255, 255)], [0, 1], None),  # black and white: to be seen
        ([(0, 0, 0), (9, 9, 9), (200, 0, 9)], [0, 1, 2], None),
    ],
)
def test_palettes_that_tell_of_renumbered_values_are_refused(palette, labels, message):
    mask = Image.fromarray(np.array([labels * 6] * 4, dtype=np.uint8)[:, :6])
    mask.putpalette([channel for color in palette for channel in color])
    data = DatasetDict(train=rows(mask=[None, encoded(mask)]))
    if message is None:
        check_dataset(data)
        return
    with pytest.raises(
        DataError, match=f"row 'two', column mask: expected pixel values that are the labels, {message}"
    ):
        check_dataset(data)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full((4, 6), 4095, dtype=np.uint16), "16-bit values that use their range, 0..65535, got 4095 to 4095"),
        (np.full((4, 6), 2, dtype=np.float32), r"floating-point values in \[0, 1\], got 2 to 2"),
        (np.zeros((1, 9), dtype=np.uint8), "an image at most 8 times as long as wide, got 9x1"),
        (np.zeros((9, 1), dtype=np.uint8), "an image at most 8 times as long as wide, got 1x9"),
    ],
)
def test_images_that_can_not_be_shown_are_named_before_training(values, message):
    image = [encoded(Image.new("RGB", (6, 4))), encoded(Image.fromarray(values), "TIFF")]
    with pytest.raises(DataError, match=f"^split 'train', row 'two', column image: expected {message}"):
        check_dataset(DatasetDict(train=rows(image=image, mask=[None, None])))


def test_all_images_that_can_not_be_used_are_named_at_once():
    good, bad = encoded(Image.new("RGB", (6, 4))), {"bytes": b"no", "path": None}
    long = encoded(Image.new("RGB", (9, 1)))
    first = "split 'train', row 'one', column image: expected an image, got a file that can't be decoded .*"
    for images, more in (([bad, good], ""), ([bad, long], "'two', "), ([bad, None], "'two', ")):
        data = DatasetDict(train=rows(image=images), val=rows(image=[good, bad], mask=[None, None]))
        count = 2 if more else 1
        with pytest.raises(DataError, match=f"^{first}; nor can {count} more be used: {more}'two'$"):
            check_dataset(data)
    columns = {name: [None] * 14 for name in ("image", "mask")}
    many = rows(**columns, image_id=list("abcdefghijklmn"), tags=[[0]] * 14)
    with pytest.raises(DataError, match="got none; nor can 13 more be used: 'b', 'c', .*, 'k', …$"):
        check_dataset(DatasetDict(train=many))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["background", "cat"], "expected names of objects, got 'background', which is label 0"),
        (["cat", "Background "], "expected names of objects, got 'Background ', which is label 0"),
        (["cat", "cat"], "expected names that differ, got 'cat' twice"),
        (["cat", "a\nb"], "expected names in one line of text, got 'a.*b'"),
        (["cat", "\ud800"], "expected names in one line of text, got '.*ud800'"),
        (["cat", " "], "expected names in one line of text, got ' '"),
    ],
)
def test_classes_that_could_not_be_told_apart_or_shown(names, message):
    with pytest.raises(DataError, match=f"^classes: {message}"):
        tagged_features(names)


def test_a_saved_class_called_background_is_found_before_training():
    features = rows().features | {"tags": List(ClassLabel(names=["background", "cat"]))}
    with pytest.raises(DataError, match="^classes: expected names of objects, got 'background'"):
        check_dataset(DatasetDict(train=rows().cast(Features(features))))


def test_names_may_join_letters_and_hold_emoji():
    assert tagged_features(["می\u200cخواهم", "👩\u200d🚀"])["tags"].feature.num_classes == 2


def test_an_image_cut_short_is_named():
    noise = np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)
    whole = encoded(Image.fromarray(noise), "JPEG")["bytes"]
    with pytest.raises(
        DataError, match=r"^row 'x': expected an image, got a file that can't be decoded \(.*truncated.*\)$"
    ):
        decode_image({"bytes": whole[: len(whole) // 2], "path": None}, "row 'x'")
    with pytest.raises(DataError, match=r"^row 'x': expected an image, got no such file as gone\.jpg$"):
        decode_image({"bytes": None, "path": "gone.jpg"}, "row 'x'")


def test_masks_keep_their_palette_indices():
    mask = Image.new("P", (2, 1), 7)
    mask.putpalette([200] * 768)
    labels = decode_mask(encoded(mask), "row")
    assert labels.dtype == np.uint8 and labels.tolist() == [[7, 7]]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "1", "LA"])
def test_color_masks_are_refused(mode):
    with pytest.raises(DataError, match=f"^row 'x': expected one 8-bit channel .*, got mode {mode}$"):
        decode_mask(encoded(Image.new(mode, (2, 2))), "row 'x'")


def test_multi_hot():
    assert tags_to_multi_hot([2, 0, 2], 4).tolist() == [1, 0, 1, 0]
    assert tags_to_multi_hot([], 2).tolist() == [0, 0]
    for outside in (2, -1):
        with pytest.raises(DataError, match=f"tags: expected class indices 0..1, got {outside}"):
            tags_to_multi_hot([outside], 2)


@pytest.mark.parametrize("count", [0, 255])
def test_number_of_classes_must_fit_a_mask(count):
    with pytest.raises(DataError, match=f"classes: expected 1 to 254 names, got {count}"):
        tagged_features([str(number) for number in range(count)])


def test_features_name_the_classes():
    assert tagged_features(["a", "b"])["tags"].feature == ClassLabel(names=["a", "b"])


def test_tagged_data_are_a_dataset_dict_that_knows_its_source():
    data = TaggedData({"train": rows()}, {"source": "photos", "limit": 2})
    check_dataset(data)
    assert isinstance(data, DatasetDict) and data["train"].num_rows == 2
    assert source_of(data) == data.source == {"source": "photos", "limit": 2}
    assert source_of(pickle.loads(pickle.dumps(data))) == data.source
    source_of(data)["limit"] = 1  # a copy
    assert data.source["limit"] == 2
    assert source_of(DatasetDict(train=rows())) == source_of(TaggedData({"train": rows()})) == {}


def test_a_model_must_have_the_classes_of_the_data():
    model = SimpleNamespace(config=SimpleNamespace(id2label={2: "dog", 0: "background", 1: "cat"}))
    assert check_classes(model, rows()) == check_classes(model, DatasetDict(train=rows()))
    assert check_classes(model, rows()) == ["background", "cat", "dog"]
    check_names(model, ("background", "cat", "dog"), "segmenter")
    with pytest.raises(DataError, match="^classifier: expected the classes .*, cat, dog, got background, cat, dog$"):
        check_names(model, ["cat", "dog"], "classifier")
    model.config.id2label[2] = "cow"
    with pytest.raises(DataError, match="^segmenter: .* background, cat, dog, got background, cat, cow$"):
        check_classes(model, rows())
