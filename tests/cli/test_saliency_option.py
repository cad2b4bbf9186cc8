"""`--saliency DIR` reaches the data of commands and of plans."""

import pytest
from PIL import Image

from wsss_hf.cli.main import main


@pytest.fixture
def photos(tmp_path):
    for name in ("photos/cat/1.png", "photos/cat/2.png", "photos/dog/3.png", "maps/cat/1.png", "others/7.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB" if "photos" in name else "L", (60, 48)).save(tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("command", ["train-cam", "run", "compare"])
@pytest.mark.parametrize(
    ("maps", "message"),
    [
        ("maps", "for masks.seeds: saliency, got none for 2 of 3 images: cat/2.png, dog/3.png"),
        ("others", "others: expected saliency maps by image_id, such as cat/1.png, got 1 other maps"),
        (None, "expected a column 'saliency' for masks.seeds: saliency, got image_id, image, tags"),
    ],
)
def test_maps_that_are_missing_end_a_command_before_it_trains(
    photos, tiny_settings, no_training, capsys, command, maps, message
):
    options = [] if maps is None else ["--saliency", str(photos / maps)]
    options += [part for setting in [*tiny_settings, "masks.seeds=saliency"] for part in ("--set", setting)]
    options += ["--recipes", "default"] if command == "compare" else []
    with pytest.raises(SystemExit) as stopped:
        main([command, "--data", str(photos / "photos"), "--out", str(photos / "out"), "--quiet", *options])
    error = capsys.readouterr().err
    assert stopped.value.code == 1 and error.startswith("error: ") and error.count("\n") == 1
    assert message in error and not (photos / "out" / "cam").exists()
