import json
import os
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from wsss_hf.data.folder import load_folder
from wsss_hf.data.tagged import DataError, check_dataset, class_names, decode_image, undecoded
from wsss_hf.models.pictures import FORMATS


def draw(path, mode="RGB", kind=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (6, 4), 1 if mode == "L" else "red").save(path, kind)


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
        (
            "file_name,labels\na.jpg,cat",
            "metadata.csv, line 1: expected a header with file_name and tags, got 'file_name', 'labels'",
        ),
        ("image,tags\na.jpg,cat", "line 1: expected a header with file_name and tags, got 'image', 'tags'"),
        ("file_name,tags\na.jpg,cat\nz.jpg,cat", "line 3: file_name: no such file .*z.jpg"),
        ("file_name,tags,mask\na.jpg,cat,masks/z.png", "line 2: mask: no such file .*z.png"),
        ("file_name,tags\na.jpg,", "expected images with tags, got none"),
        ("file_name,tags\n", "expected images with tags, got none"),
        ("", "line 1: expected a header with file_name and tags, got an empty file"),
        ("file_name,tags,tags\na.jpg,cat,dog", "line 1: expected each column once, got tags 2 times"),
        ("file_name,tags\na.jpg,cat,dog", "line 2: expected 2 cells, .* got 3, the last 'dog' .quote a cell that"),
        ("file_name,tags\na.jpg", "line 2: expected file_name and tags, got file_name"),
        ("file_name,tags\n,cat", "line 2: file_name: expected the name of an image, got none"),
        ("file_name,tags\nsub,cat", "line 2: file_name: no such file .*sub"),
        ("file_name,tags\na.jpg,cat\n./a.jpg,dog", r"line 3: file_name: expected each image once, got '\./a.jpg' of"),
        ("file_name,tags\na.jpg,cat\nc.JPG,Cat", "line 3: tags: expected one spelling of each class, got 'Cat' and,"),
        ("file_name,tags\na.jpg,background", "line 2: tags: expected names of objects, or none for background alone"),
        ("file_name,tags\na.jpg,a" + ";a".join(map(str, range(255))), "expected 1 to 254 names, got 255"),
        ("file_name,tags\na.jpg," + "d" * 200_000, "line 2: expected a row .* .field larger than field limit"),
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
        ("[" * 100_000, r"line 2: expected JSON, got '\[\["),
        ('{"file_name": 5, "tags": []}', "line 2: file_name: expected the name of a file, got 5"),
        ('{"file_name": ["a.jpg"], "tags": []}', "line 2: file_name: expected the name of a file, got .'a.jpg'"),
        ('{"file_name": "a.jpg", "tags": [], "mask": 3}', "line 2: mask: expected the name of a file, got 3"),
        ('{"file_name": "a.jpg", "tags": null}', "line 2: expected file_name and tags, got file_name"),
        (r'{"file_name": "a.jpg", "tags": ["\ud800"]}', "line 2: expected names of text in UTF-8, got .*ud800"),
        ('{"file_name": "a.jpg", "tags": [1]}', r"line 2: tags: expected a list of class names, .* got \[1\]"),
    ],
)
def test_bad_jsonl_is_named(photos, line, message):
    (photos / "metadata.jsonl").write_text('{"file_name": "c.JPG", "tags": "cat"}\n' + line)
    with pytest.raises(DataError, match=message):
        load_folder(photos)


def test_a_file_whose_name_is_no_text_is_named(tmp_path):
    draw(tmp_path / "cat" / os.fsdecode(b"\xff.png"), kind="PNG")
    with pytest.raises(DataError, match=r"/cat: expected names of text in UTF-8, got .*ff.png"):
        load_folder(tmp_path)


def test_unknown_class_is_named_with_its_row(photos):
    (photos / "metadata.csv").write_text("file_name,tags\na.jpg,cat\nc.JPG,cta")
    with pytest.raises(DataError, match="metadata.csv, line 3: tags: expected names from cat, dog, got 'cta'"):
        load_folder(photos, classes=["cat", "dog"])


TABLE = "file_name,tags\na.jpg,Käfer;hot dog\nc.JPG,Käfer\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_table_as_programs_write_it(photos, encoding, line_end, delimiter):
    text = TABLE.replace(",", delimiter).replace("Käfer;hot dog", '"Käfer;hot dog"').replace("\n", line_end)
    mark = {"utf-16-le": b"\xff\xfe", "utf-16-be": b"\xfe\xff"}.get(encoding, b"")
    (photos / "metadata.csv").write_bytes(mark + text.encode(encoding))
    dataset = load_folder(photos)
    assert class_names(dataset) == ["Käfer", "hot dog"] and dataset["train"]["tags"][:] == [[0, 1], [0]]


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "cp1250", "cp437", "utf-16-le"])
@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_an_encoding_that_would_be_guessed_is_refused(photos, encoding, name):
    (photos / name).write_bytes(TABLE.encode(encoding))
    with pytest.raises(DataError, match=f"{name}, line 2: expected text in UTF-8, or in UTF-16 .* got byte"):
        load_folder(photos)


def test_blank_rows_of_spreadsheets_and_quoted_captions_are_no_rows(photos):
    (photos / "metadata.csv").write_text(
        '\n file_name , tags ,caption,\n,,,\na.jpg, cat ,"one,\ntwo lines",\n\n"c.JPG","dog",,\n,,,\n'
    )
    dataset = load_folder(photos)
    assert dataset["train"]["image_id"][:] == ["a.jpg", "c.JPG"] and dataset["train"]["tags"][:] == [[0], [1]]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['a.jpg,"cat', "c.JPG,dog", "sub/b.png,dog"], "line 2: expected a row whose quotes are closed"),
        (['a.jpg,"cat', 'c.JPG,"dog"'], "line 2: expected a row whose quotes are closed"),
        (['a.jpg,"cat', "c.JPG,dog", 'sub/b.png,"'], "line 2: tags: expected a cell of one row, got 'cat.nc.JPG,dog"),
        (["a.jpg,cat", '"c.JPG,dog', '"sub/b.png,dog'], "line 3: expected a row whose quotes are closed"),
        (['a.jpg,cat"', "c.JPG,dog"], "line 2: tags: expected names without quotes or brackets"),
    ],
)
def test_a_quote_that_is_not_closed_makes_no_classes(photos, lines, message):
    (photos / "metadata.csv").write_text("\n".join(["file_name,tags", *lines]))
    with pytest.raises(DataError, match=message):
        load_folder(photos)


def test_a_quote_that_is_not_closed_hides_no_rows_in_another_column(photos):
    (photos / "metadata.csv").write_text('file_name,tags,caption\na.jpg,cat,"5 inch\nc.JPG,dog,"\n')
    with pytest.raises(DataError, match="line 2: caption: expected a cell of one row, got '5 inch.nc.JPG,dog,'"):
        load_folder(photos)


@pytest.mark.parametrize(
    ("cell", "separator", "wanted"),
    [
        ("['cat', 'dog']", ";", "without quotes or brackets"),
        ("['cat']", ";", "without quotes or brackets"),
        ("{cat}", ";", "without quotes or brackets"),
        ("'cat'", ";", "without quotes or brackets"),
        ("nan", ";", "or an empty cell"),
        ("None", ";", "or an empty cell"),
        ("NULL", ";", "or an empty cell"),
        ("b.png", ";", "of classes"),
        ("cat;dog", ",", "separated by ','"),
        ("cat|dog", ",", "separated by ','"),
        ("cat;dog", "|", "separated by '|'"),
    ],
)
def test_what_programs_write_for_lists_and_for_nothing_is_no_class(photos, cell, separator, wanted):
    (photos / "metadata.csv").write_text(f'file_name,tags\nc.JPG,cat\na.jpg,"{cell}"')
    with pytest.raises(DataError, match=re.escape(f"line 3: tags: expected names {wanted}, got {cell!r} (use --")):
        load_folder(photos, separator=separator)
    assert class_names(load_folder(photos, ["cat", cell], "/")) == ["cat", cell]  # unless it is said to be one


def test_numbers_are_names(photos):
    (photos / "metadata.csv").write_text("file_name,tags\na.jpg,7;10\nc.JPG,7")
    assert class_names(load_folder(photos)) == ["10", "7"]


def test_accents_are_the_same_in_either_normal_form(photos):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    draw(photos / f"{decomposed}.png")
    (photos / "metadata.csv").write_text(
        f"file_name,tags\na.jpg,{composed}\nc.JPG,{decomposed};{composed}\n{composed}.png,\nsub\\b.png,\n", "utf-8"
    )
    dataset = load_folder(photos)
    assert class_names(dataset) == [composed] and dataset["train"]["tags"][:] == [[0], [0], [], []]
    assert dataset["train"]["image_id"][2:] == [f"{decomposed}.png", "sub/b.png"]  # as the file system has them
    assert class_names(load_folder(photos, [decomposed])) == [composed]


def test_a_class_without_training_images_is_a_mistake_unless_it_is_named(tmp_path):
    for name in ("train/cat/a.jpg", "val/cat/a.jpg", "val/catt/b.jpg"):
        draw(tmp_path / name)
    with pytest.raises(DataError, match="val/catt: tags: expected classes that training images have, got 'catt'"):
        load_folder(tmp_path)
    assert class_names(load_folder(tmp_path, ["cat", "catt"])) == ["cat", "catt"]


@pytest.mark.parametrize(("train", "val"), [("train", name) for name in ("val", "validation", "valid", "dev", "test")])
@pytest.mark.parametrize("change", [str, str.title, str.upper])
def test_the_second_split_has_many_names(tmp_path, train, val, change):
    for name in (f"{change(train)}/cat/a.jpg", f"{change(val)}/cat/b.jpg", f"{change(val)}/cat/c.jpg"):
        draw(tmp_path / name)
    assert {split: len(rows) for split, rows in load_folder(tmp_path).items()} == {"train": 1, "val": 2}


def test_what_is_not_read_is_said(tmp_path, capsys):
    for name in ("training/cat/a.jpg", "valid/cat/b.jpg", "test/cat/c.jpg", "more/cat/d.jpg", ".old/cat/e.jpg"):
        draw(tmp_path / name)
    assert load_folder(tmp_path)["val"]["image_id"][:] == ["cat/b.jpg"]
    assert capsys.readouterr().err == f"{tmp_path}: train is training/, val is valid/; not read: more/, test/\n"


@pytest.mark.parametrize("names", [("train/cat/a.jpg", "val/b.jpg"), ("train/a.jpg", "val/b.jpg"), ("test/a.jpg",)])
def test_a_split_without_tags_is_no_class(tmp_path, names):
    for name in names:
        draw(tmp_path / name)
    with pytest.raises(DataError, match="expected either metadata.csv .* or one subfolder of images per class, got"):
        load_folder(tmp_path)


def test_hidden_files_and_folders_are_no_data(tmp_path):
    for name in ("cat/a.jpg", "dog/b.jpg"):
        draw(tmp_path / name)
    for folder in (".ipynb_checkpoints", "__MACOSX", ".thumbnails", "@eaDir", "cat/.ipynb_checkpoints", "dog/@eaDir"):
        draw(tmp_path / folder / "a.jpg")
    for name in ("cat/._a.jpg", "dog/._b.jpg", "cat/.DS_Store", "Thumbs.db", "__MACOSX/cat/._a.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"\x00\x05\x16\x07")
    dataset = load_folder(tmp_path)
    check_dataset(dataset)
    assert class_names(dataset) == ["cat", "dog"] and dataset["train"]["image_id"][:] == ["cat/a.jpg", "dog/b.jpg"]


@pytest.mark.parametrize("names", [("cat/a.jpg", "cat/more/b.jpg"), ("cat/a.jpg", "dog/2020/may/b.jpg")])
def test_no_class_vanishes_in_nested_folders(tmp_path, names):
    for name in names:
        draw(tmp_path / name)
    below = "/".join(names[1].split("/")[:2])
    with pytest.raises(DataError, match=f"{below}: expected images of a class in its own folder, got images in one"):
        load_folder(tmp_path)


def test_a_table_below_the_folder_is_no_part_of_a_class(tmp_path):
    draw(tmp_path / "photos/a.jpg")
    (tmp_path / "photos/metadata.csv").write_text("file_name,tags\na.jpg,cat\n")
    with pytest.raises(DataError, match="photos/metadata.csv: expected images of a class in .*photos, got a data set"):
        load_folder(tmp_path)


def test_images_beside_the_class_folders_are_said(tmp_path, capsys):
    for name in ("cat/a.jpg", "b.jpg", "c.jpg"):
        draw(tmp_path / name)
    assert load_folder(tmp_path)["train"]["image_id"][:] == ["cat/a.jpg"]
    assert capsys.readouterr().err == f"{tmp_path}: not read: 2 images beside the class folders\n"


def test_what_may_be_missed_is_said_in_one_line(tmp_path, capsys):
    for name in ("cat/a.jpg", "cat/b.JFIF", "cat/c.jpe", "b.jpg"):
        draw(tmp_path / name, kind="JPEG")
    unnamed = ["cow/1.txt", "cow/Thumbs.db", "cow/README", "cow/.a.heic"]
    for name in ("dog/a.heic", "dog/b.HEIC", "cat/c.heic", "cat/d", *unnamed):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"something")
    (tmp_path / "empty").mkdir()
    dataset = load_folder(tmp_path)
    assert dataset["train"]["image_id"][:] == ["cat/a.jpg", "cat/b.JFIF", "cat/c.jpe"]
    check_dataset(dataset)
    unread = "3 files .heic (cat/, dog/), 1 file without suffix (cat/)"
    empty = "no images in cow/, dog/, empty/"
    assert capsys.readouterr().err == f"{tmp_path}: not read: 1 image beside the class folders, {unread}, {empty}\n"
    for number in range(20):
        (tmp_path / f"z{number:02d}").mkdir()
    load_folder(tmp_path)
    assert capsys.readouterr().err.endswith("no images in cow/, dog/, empty/, z00/, z01/, 18 more\n")
    shutil.rmtree(tmp_path / "cat")
    with pytest.raises(DataError, match=r"got none of these \(not read: 2 files .heic \(dog/\)\)$"):
        load_folder(tmp_path)


@pytest.mark.skipif("AVIF" not in FORMATS, reason="Pillow without AVIF")
def test_avif_is_read_where_it_can_be(tmp_path):
    draw(tmp_path / "cat/a.avif")
    dataset = load_folder(tmp_path)
    check_dataset(dataset)
    assert decode_image(undecoded(dataset["train"])[0]["image"], "row").size == (6, 4)


def test_a_folder_called_background_holds_images_without_tags(tmp_path):
    for name in ("Background/a.jpg", "cat/b.jpg"):
        draw(tmp_path / name)
    dataset = load_folder(tmp_path)
    check_dataset(dataset)
    assert class_names(dataset) == ["cat"] and dataset["train"]["tags"][:] == [[], [0]]


def test_masks_beside_the_classes_are_no_class(tmp_path):
    draw(tmp_path / "cat/a.jpg")
    draw(tmp_path / "masks/a.png", "L")
    with pytest.raises(DataError, match="masks: expected a class, got a folder of masks .they are named in metadata"):
        load_folder(tmp_path)
    draw(tmp_path / "masks/a.png")  # photographs of masks
    assert class_names(load_folder(tmp_path)) == ["cat", "masks"]


def test_two_metadata_files_are_one_too_many(photos):
    for name in ("metadata.csv", "metadata.jsonl"):
        (photos / name).write_text("file_name,tags\na.jpg,cat\n")
    with pytest.raises(DataError, match="expected one metadata file, got metadata.csv and metadata.jsonl"):
        load_folder(photos)


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match="nowhere: no such folder"):
        load_folder(tmp_path / "nowhere")
