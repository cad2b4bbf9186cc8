"""`wsss predict` from outside: options, lines and exit status."""

import json

import pytest
from accelerate.state import AcceleratorState
from PIL import Image

from wsss_hf.cli.main import main
from wsss_hf.data.tagged import class_names


@pytest.fixture
def wsss(capsys, monkeypatch):
    """Runs a command in this process → exit code, standard output, standard error."""
    monkeypatch.delenv("WSSS_TRACEBACK", raising=False)

    def call(*arguments):
        capsys.readouterr()
        AcceleratorState._reset_state()
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        return (stopped.value.code or 0, *capsys.readouterr())

    return call


@pytest.fixture
def photos(toy_data, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(3):
        toy_data["train"][number]["image"].save(folder / f"{number}.png")
    return folder


def test_masks_overlays_and_coco(wsss, photos, cam_folder, toy_data, tmp_path):
    pytest.importorskip("pycocotools")
    out, tag = tmp_path / "out", class_names(toy_data)[4]
    options = ["--tags", tag, "--scales", "1,1.5", "--no-flip", "--coco", "--batch-size", 2]
    images = [photos / "0.png", f"{photos}/[12].png"]
    code, text, errors = wsss("predict", *images, "--model", cam_folder, "--out", out, *options)
    assert code == 0 and text == f"{out}: label maps of 3 images\n" and "failed" not in errors
    assert {label for n in range(3) for _, label in Image.open(out / f"masks/{n}.png").getcolors()} == {0, 5}
    assert len(list((out / "overlays").iterdir())) == 3
    written = json.loads((out / "predictions.coco.json").read_text())
    assert {annotation["category_id"] for annotation in written["annotations"]} == {5}


def test_bad_files_are_listed_at_the_end_and_make_the_exit_status_1(wsss, photos, cam_folder, tmp_path):
    (photos / "1.png").write_bytes(b"no image")
    (photos / "a.jpg").write_bytes(b"")
    arguments = ["predict", photos, "--model", cam_folder, "--out", tmp_path / "out", "--no-overlays", "--quiet"]
    code, text, errors = wsss(*arguments)
    assert code == 1 and text == ""
    lines = errors.splitlines()
    assert [line.partition(": expected an image, got ")[0] for line in lines] == [
        f"failed: {photos / name}" for name in ("1.png", "a.jpg")
    ]
    assert sorted(path.name for path in (tmp_path / "out").rglob("*.png")) == ["0.png", "2.png"]
    assert not (tmp_path / "out" / "overlays").exists()
    Image.new("RGB", (40, 40)).save(photos / "1.png")
    (photos / "a.jpg").unlink()
    assert wsss(*arguments)[0] == 0 and (tmp_path / "out/masks/1.png").exists()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--tags", "unicorn"], "tags: expected names from"),
        (["--scales", "0"], "--scales: expected positive numbers"),
        (["--batch-size", "0"], "batch_size: expected a whole number >= 1, got 0"),
        (["--model", "./nowhere"], "nowhere"),
        (["--crf", "--window", "-1"], "window: expected a whole number >= 0, got -1"),
    ],
)
def test_errors_are_one_line(wsss, photos, cam_folder, tmp_path, options, line):
    model = [] if "--model" in options else ["--model", cam_folder]
    code, _, errors = wsss("predict", photos, "--out", tmp_path / "out", *model, *options)
    assert code == 1 and line in errors and len(errors.splitlines()) == 1
    assert not (tmp_path / "out").exists()
