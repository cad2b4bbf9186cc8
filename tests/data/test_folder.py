import json
import re

import numpy as np
import pytest
from PIL import Image

from wsss_hf.data.folder import load_folder
from wsss_hf.data.tagged import DataError, check_dataset, class_names


def draw(path, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (6, 4), 1 if mode == "L" else "red").save(path)


@pytest.fixture
def photos(tmp_path):
    for name in ("a.jpg", "sub/b.png", "c.JPG"):
        draw(tmp_path / name)
    draw(tmp_path / "masks/a.png", "L")
    return tmp_path


@pytest.mark.parametrize(
    ("header", "lines"),
    [
        ("file_name,tags", ["a.jpg,cat;traffic light", "sub/b.png,traffic light", "c.JPG,"]),
        ("file_name, tags", ['a.jpg, "traffic light;;cat;"', "sub/b.png, traffic light", "c.JPG, "]),
        (
            "tags,file_name,note",
            ["traffic light ; cat,a.jpg,x", "traffic light;traffic light,sub/b.png,y", ";,c.JPG,z"],
        ),
    ],
)
def test_csv_has_names_with_spaces_between_semicolons(photos, header, lines):
    (photos / "metadata.csv").write_text("\n".join([header, *lines]), encoding="utf-8-sig")
    dataset = load_folder(photos)
    check_dataset(dataset)
    assert class_names(dataset) == ["cat", "traffic light"]
    assert dataset["train"]["image_id"][:] == ["a.jpg", "sub/b.png", "c.JPG"]
    assert dataset["train"]["tags"][:] == [[0, 1], [1], []]
    assert dataset["train"].column_names == ["image_id", "image", "tags"]


def test_jsonl_with_masks_and_given_order_of_classes(photos):
    lines = [
        {"file_name": "a.jpg", "tags": ["hot dog", "cat"], "mask": "masks/a.png"},
        {"file_name": "c.JPG", "tags": "cat"},
    ]
    (photos / "metadata.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    dataset = load_folder(photos, classes=["hot dog", "cat"])
    check_dataset(dataset)
    assert class_names(dataset) == ["hot dog", "cat"] and dataset["train"]["tags"][:] == [[0, 1], [1]]
    assert (np.asarray(dataset["train"][0]["mask"]) == 1).all() and dataset["train"][1]["mask"] is None


def test_subfolder_per_class(tmp_path):
    for name in ("dog/b.jpg", "dog/a.png", "cat/a.png"):
        draw(tmp_path / name)
    (tmp_path / "dog/notes.txt").write_text("not an image")
    (tmp_path / "empty").mkdir()
    dataset = load_folder(tmp_path)
    check_dataset(dataset)
    assert class_names(dataset) == ["cat", "dog"]
    assert dataset["train"]["image_id"][:] == ["cat/a.png", "dog/a.png", "dog/b.jpg"]
    assert dataset["train"]["tags"][:] == [[0], [1], [1]]


def test_train_and_val_are_splits_with_common_classes(tmp_path):
    for name in ("train/dog/a.jpg", "train/ant/a.jpg", "val/b.jpg"):
        draw(tmp_path / name)
    (tmp_path / "val/metadata.csv").write_text("file_name,tags\nb.jpg,dog")
    dataset = load_folder(tmp_path)
    check_dataset(dataset)
    assert dataset["train"]["tags"][:] == [[0], [1]] and dataset["val"]["tags"][:] == [[1]]


def test_a_class_may_be_called_train(tmp_path):
    for name in ("train/a.jpg", "ship/a.jpg"):
        draw(tmp_path / name)
    dataset = load_folder(tmp_path)
    assert list(dataset) == ["train"] and class_names(dataset) == ["ship", "train"]


def test_a_folder_without_tags_says_which_layouts_there_are(tmp_path):
    draw(tmp_path / "a.jpg")
    with pytest.raises(DataError, match="expected either metadata.csv .* or one subfolder .*, got none of these"):
        load_folder(tmp_path)


@pytest.mark.parametrize(("separator", "cell"), [(",", '"cat, dog"'), ("|", "cat|dog"), (" / ", "cat / dog")])
def test_csv_with_another_separator(photos, separator, cell):
    (photos / "metadata.csv").write_text(f"file_name,tags\na.jpg,{cell}\nc.JPG,hot dog")
    dataset = load_folder(photos, separator=separator)
    assert class_names(dataset) == ["cat", "dog", "hot dog"] and dataset["train"]["tags"][:] == [[0, 1], [2]]


@pytest.mark.parametrize(("other", "cell"), [(",", "cat, dog"), ("|", "cat|dog"), (",", "cow; cat,dog")])
def test_what_looks_like_a_list_is_no_class(photos, other, cell):
    (photos / "metadata.csv").write_text(f'file_name,tags\nc.JPG,cat\na.jpg,"{cell}"')
    wanted = f"metadata.csv, line 3: tags: expected names separated by ';', got {cell!r} (use --separator {other!r}, "
    with pytest.raises(DataError, match=re.escape(wanted)):
        load_folder(photos)


def test_a_name_with_a_comma_is_a_class_where_it_is_known_to_be_one(photos):
    name = "bass, the fish"
    (photos / "metadata.csv").write_text(f'file_name,tags\na.jpg,"{name};cat"')
    assert load_folder(photos, classes=["cat", name])["train"]["tags"][:] == [[0, 1]]
    (photos / "metadata.csv").unlink()
    (photos / "metadata.jsonl").write_text(json.dumps({"file_name": "a.jpg", "tags": [f" {name} ", "", "cat", "cat"]}))
    assert class_names(load_folder(photos)) == [name, "cat"]


def test_a_separator_is_needed(photos):
    with pytest.raises(DataError, match="separator: expected a character like ';', got ' '"):
        load_folder(photos, separator=" ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file_name,labels\na.jpg,cat", "metadata.csv, line 2: expected file_name and tags, got file_name, labels"),
        ("image,tags\na.jpg,cat", "line 2: expected file_name and tags, got image, tags"),
        ("file_name,tags\na.jpg,cat\nz.jpg,cat", "line 3: file_name: no such file .*z.jpg"),
        ("file_name,tags,mask\na.jpg,cat,masks/z.png", "line 2: mask: no such file .*z.png"),
        ("file_name,tags\na.jpg,", "expected images with tags, got none"),
        ("file_name,tags\n", "expected images with tags, got none"),
    ],
)
def test_bad_csv_is_named(photos, text, message):
    (photos / "metadata.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        load_folder(photos)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"file_name": "a.jpg", ', 'metadata.jsonl, line 2: expected JSON, got \'."file_name": "a.jpg",\''),
        ("[1, 2]", r"line 2: expected an object with file_name and tags, got \[1, 2\]"),
        ('{"file_name": "a.jpg", "tags": [1]}', r"line 2: tags: expected a list of class names, .* got \[1\]"),
    ],
)
def test_bad_jsonl_is_named(photos, line, message):
    (photos / "metadata.jsonl").write_text('{"file_name": "c.JPG", "tags": "cat"}\n' + line)
    with pytest.raises(DataError, match=message):
        load_folder(photos)


def test_unknown_class_is_named_with_its_row(photos):
    (photos / "metadata.csv").write_text("file_name,tags\na.jpg,cat\nc.JPG,cta")
    with pytest.raises(DataError, match="split 'train', row 'c.JPG': tags: expected names from cat, dog, got 'cta'"):
        load_folder(photos, classes=["cat", "dog"])


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match="nowhere: no such folder"):
        load_folder(tmp_path / "nowhere")
