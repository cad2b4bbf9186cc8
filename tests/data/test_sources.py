import json

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image

from wsss_hf.data import sources
from wsss_hf.data.sources import load_data
from wsss_hf.data.tagged import DataError, class_names, source_of, tagged_features
from wsss_hf.data.toy import TOY_CLASSES, make_toy

PICTURE = Image.new("RGB", (6, 4))


def foreign(tags, feature):
    features = Features({"img": ImageFeature(), "label": feature, "note": Value("string")})
    return Dataset.from_dict(
        {"img": [PICTURE] * len(tags), "label": tags, "note": ["x"] * len(tags)}, features=features
    )


@pytest.fixture
def hub(monkeypatch):
    """What load_dataset returns, or raises, and how it was called."""
    state = {}

    def fake(name, **options):
        state["call"] = (name, options)
        if isinstance(state["answer"], Exception):
            raise state["answer"]
        return state["answer"]

    monkeypatch.setattr(sources, "load_dataset", fake)
    return state


def test_toy_with_its_own_size():
    dataset = load_data("toy", toy={"num_train": 3, "num_val": 2, "image_size": 32})
    assert [len(rows) for rows in dataset.values()] == [3, 2]
    assert dataset["train"][0]["image"].size == (32, 32)


def test_saved_data_come_back_as_they_were(tmp_path):
    toy = make_toy(3, 2, image_size=32)
    toy["train"] = toy["train"].rename_column("mask", "pseudo_mask")
    toy.save_to_disk(tmp_path / "both")
    toy["val"].save_to_disk(tmp_path / "one")
    both, one = load_data(tmp_path / "both"), load_data(str(tmp_path / "one"))
    assert both["train"].column_names == ["image_id", "image", "tags", "pseudo_mask"]
    assert both["train"]["image_id"][:] == toy["train"]["image_id"][:] and class_names(both) == list(TOY_CLASSES)
    assert list(one) == ["train"] and np.array_equal(one["train"][1]["mask"], toy["val"][1]["mask"])


def test_a_folder_of_tagged_images(tmp_path):
    (tmp_path / "cat").mkdir()
    PICTURE.save(tmp_path / "cat/a.png")
    assert class_names(load_data(tmp_path)) == ["cat"]


@pytest.mark.parametrize(
    ("tags", "feature", "names", "wanted"),
    [
        (["cat", "ant", None], Value("string"), ["ant", "cat"], [[1], [0], []]),
        ([["cat", "ant"], [], ["ant"]], List(Value("string")), ["ant", "cat"], [[1, 0], [], [0]]),
        ([1, 0, 1], ClassLabel(names=["x", "y"]), ["x", "y"], [[1], [0], [1]]),
        ([[1, 0], [], [1]], List(ClassLabel(names=["x", "y"])), ["x", "y"], [[1, 0], [], [1]]),
    ],
)
def test_hub_tags_may_be_names_or_labels_one_or_many(hub, tags, feature, names, wanted):
    hub["answer"] = DatasetDict(train=foreign(tags, feature), validation=foreign(tags, feature))
    dataset = load_data("owner/pets", columns={"image": "img", "tags": "label"}, revision="v1")
    assert hub["call"] == ("owner/pets", {"revision": "v1"})
    assert list(dataset) == ["train", "val"] and class_names(dataset) == names
    assert dataset["train"]["tags"][:] == wanted
    assert sorted(dataset["train"].column_names) == ["image", "image_id", "tags"]
    assert dataset["val"]["image_id"][:] == ["val_000000", "val_000001", "val_000002"]


def test_a_revision_may_follow_the_id(hub):
    hub["answer"] = DatasetDict(train=foreign(["a"], Value("string")))
    dataset = load_data("owner/pets@v1", columns={"image": "img", "tags": "label"})
    assert hub["call"] == ("owner/pets", {"revision": "v1"})
    columns = {"image": "img", "tags": "label"}
    assert dataset.source == {"source": "owner/pets", "columns": columns, "revision": "v1"}


def test_the_source_loads_the_same_data_again(unbalanced, tmp_path):
    toy = {"num_train": 3, "num_val": 2, "image_size": 32}
    assert load_data("toy", toy=toy).source == {"source": "toy", "toy": toy}
    dataset = load_data(unbalanced, limit=8, seed=1)
    assert dataset.source == {"source": str(unbalanced), "limit": 8, "seed": 1}
    assert json.loads(json.dumps(dataset.source)) == source_of(dataset)
    assert load_data(**dataset.source)["train"]["image_id"][:] == dataset["train"]["image_id"][:]
    photos = tmp_path / "photos"
    photos.mkdir()
    PICTURE.save(photos / "a.png")
    (photos / "metadata.csv").write_text("file_name,tags\na.png,cat|hot dog\n")
    dataset = load_data(photos, separator="|", classes=("hot dog", "cat"))
    assert dataset.source == {"source": str(photos), "classes": ["hot dog", "cat"], "separator": "|"}


def test_given_classes_order_the_names_of_the_hub(hub):
    hub["answer"] = DatasetDict(train=foreign(["b", "a"], Value("string")))
    columns = {"image": "img", "tags": "label"}
    assert load_data("owner/pets", columns=columns, classes=["b", "a"])["train"]["tags"][:] == [[0], [1]]
    with pytest.raises(DataError, match="'owner/pets': tags: expected names from a, c, got 'b'"):
        load_data("owner/pets", columns=columns, classes=["a", "c"])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, "'owner/pets': expected a column 'image', got img, label, note .name yours in `columns`"),
        ({"image": "img"}, "'owner/pets': expected a column 'tags', got image, label, note"),
        ({"image": "photo"}, "columns: expected a column of 'owner/pets', img, label, note, got 'photo'"),
        ({"picture": "img"}, "columns: expected one of image_id, image, .*, got 'picture'"),
        (
            {"image": "img", "tags": "label"},
            "'owner/pets', column 'tags': expected class names or ClassLabels, .*, got Value",
        ),
    ],
)
def test_foreign_columns_that_do_not_fit_are_named(hub, columns, message):
    hub["answer"] = DatasetDict(train=foreign([1, 2], Value("int64")))
    with pytest.raises(DataError, match=message):
        load_data("owner/pets", columns=columns)


def test_an_empty_name_among_tags_is_named(hub):
    hub["answer"] = DatasetDict(train=foreign([["cat", None]], List(Value("string"))))
    with pytest.raises(DataError, match="'owner/pets', column 'tags': expected lists of class names, got one with an"):
        load_data("owner/pets", columns={"image": "img", "tags": "label"})


def test_a_hub_class_called_background_is_refused(hub):
    hub["answer"] = DatasetDict(train=foreign([0, 1], ClassLabel(names=["background", "cat"])))
    with pytest.raises(DataError, match="^classes: expected names of objects, got 'background'"):
        load_data("owner/pets", columns={"image": "img", "tags": "label"})


@pytest.mark.parametrize("file", ["dataset_info.json", "state.json", "data-00000-of-00001.arrow"])
@pytest.mark.parametrize("content", [b"", b"{", b"half"])
def test_a_damaged_saved_data_set_is_named(tmp_path, file, content):
    make_toy(3, 2, image_size=32).save_to_disk(tmp_path / "saved")
    whole = (tmp_path / "saved/train" / file).read_bytes()
    (tmp_path / "saved/train" / file).write_bytes(whole[: len(whole) // 2] if content == b"half" else content)
    with pytest.raises(DataError, match=f"^{tmp_path}/saved: expected a data set saved by save_to_disk, got a"):
        load_data(tmp_path / "saved")


def test_an_empty_source_is_not_the_folder_one_is_in(tmp_path, monkeypatch):
    (tmp_path / "cat").mkdir()
    PICTURE.save(tmp_path / "cat/a.png")
    monkeypatch.chdir(tmp_path)
    assert class_names(load_data(".")) == ["cat"]
    with pytest.raises(DataError, match="^source: expected 'toy', .* got ''"):
        load_data("")


def test_a_hub_data_set_needs_a_train_split(hub):
    hub["answer"] = DatasetDict(test=foreign(["a"], Value("string")))
    with pytest.raises(DataError, match="'owner/pets': expected a split 'train', got test"):
        load_data("owner/pets")


@pytest.mark.parametrize("source", ["owner/pets", "/no/such/folder", "./nowhere"])
def test_a_source_that_is_nothing_gets_the_five_forms_in_one_line(hub, source):
    hub["answer"] = FileNotFoundError("not on the Hub\nand more lines")
    with pytest.raises(
        DataError, match=f"^source: expected 'toy', 'voc' .*save_to_disk.*tagged.*Hub.*, got '{source}'"
    ) as caught:
        load_data(source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("voc", {}, "root: expected the VOC2012 folder of a devkit for 'voc', got none"),
        ("toy", {"limit": 0}, "limit: expected at least 1 row, got 0"),
        (
            "toy",
            {"columns": {"image": "img"}},
            "columns: expected a directory or a data set on the Hub, got 'toy'",
        ),
        ("toy", {"separator": ","}, "separator: expected a directory of tagged images, got 'toy'"),
        ("owner/pets@v1", {"revision": "v2"}, "revision: expected one, got 'v1' in 'owner/pets@v1' and 'v2'"),
        (
            "toy",
            {"classes": ["cat"], "toy": {"num_train": 1, "num_val": 1}},
            "classes: expected those of the data set, vixel, .*, got cat",
        ),
    ],
)
def test_options_that_do_not_fit_the_source(source, options, message):
    with pytest.raises(DataError, match=message):
        load_data(source, **options)


@pytest.fixture
def unbalanced(tmp_path):
    """40 rows of class 0, masks on the last 4; class 1 only on row 20, without a mask."""
    columns = {
        "image_id": [f"{index:02d}" for index in range(40)],
        "image": [PICTURE] * 40,
        "tags": [[1] if index == 20 else [0] for index in range(40)],
        "mask": [Image.new("L", (6, 4), 1) if index >= 36 else None for index in range(40)],
    }
    rows = Dataset.from_dict(columns, features=tagged_features(["common", "rare"], "mask"))
    DatasetDict(train=rows).save_to_disk(tmp_path / "unbalanced")
    return tmp_path / "unbalanced"


def test_limit_keeps_every_class_then_masks_and_depends_on_the_seed_alone(unbalanced):
    draws = [load_data(unbalanced, limit=8, seed=seed)["train"]["image_id"][:] for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    for draw in draws:
        assert len(draw) == 8 and draw == sorted(draw)
        assert {"20", "36", "37", "38", "39"} <= set(draw)
    assert len(load_data(unbalanced, limit=100)["train"]) == 40


def test_what_is_loaded_is_checked(tmp_path):
    rows = Dataset.from_dict(
        {"image_id": ["a"], "image": [PICTURE], "tags": [[0]], "mask": [Image.new("L", (5, 4))]},
        features=tagged_features(["cat"], "mask"),
    )
    rows.save_to_disk(tmp_path)
    with pytest.raises(DataError, match="row 'a': expected a mask of the image's size, 6x4, got one of 5x4"):
        load_data(tmp_path)


def test_numbers_as_image_ids_become_text(tmp_path):
    features = tagged_features(["cat"]) | {"image_id": Value("int64")}
    rows = Dataset.from_dict({"image_id": [7], "image": [PICTURE], "tags": [[0]]}, features=Features(features))
    rows.save_to_disk(tmp_path)
    assert load_data(tmp_path)["train"]["image_id"][:] == ["7"]
