import json

import numpy as np
import pytest
import torch
from PIL import Image

from wsss_hf.data.tagged import DataError
from wsss_hf.models.options import OptionError
from wsss_hf.saliency.networks import InputFormat, NetworkSettings, NetworkSource, input_format
from wsss_hf.saliency.source import SaliencyError


def picture(width, height):
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([across, down, across], axis=-1).astype(np.uint8))


class Affine(NetworkSource):
    """The first channel of what a network sees, in another range."""

    name = "affine"

    def __init__(self, scale=1.0, shift=0.0, **settings):
        self.settings = NetworkSettings(**settings)
        self.format = InputFormat((32, 32), [0, 0, 0], [1, 1, 1], self.settings.letterbox)
        self._scale, self._shift = scale, shift

    def predict(self, inputs):
        return inputs[:, 0] * self._scale + self._shift


def maps_of(source, rows):
    source.prepare(rows, torch.device("cpu"))
    return [found for _, found in sorted(source.maps(rows), key=lambda one: one[0])]


@pytest.mark.parametrize("letterbox", [False, True])
@pytest.mark.parametrize("size", [(60, 40), (40, 61), (100, 30)])
def test_a_map_lies_over_its_image_again(letterbox, size):
    shape = InputFormat((64, 64), [0, 0, 0], [1, 1, 1], letterbox)
    image = picture(*size)
    back = shape.restore(shape.show(image)[1], image.size)
    assert back.shape == (size[1], size[0])
    np.testing.assert_allclose(back, np.asarray(image)[..., 1] / 255, atol=0.09)


def test_a_letterboxed_image_stands_in_the_middle_of_black():
    shape = InputFormat((32, 32), [0.5, 0.5, 0.5], [0.25, 0.5, 0.5], letterbox=True)
    shown = shape.show(Image.new("RGB", (64, 33), (255, 255, 255)))
    assert shown.shape == (3, 32, 32) and shown.dtype == np.float32
    assert (shown[0, 8:24] == 2).all() and (shown[1, 8:24] == 1).all()  # 16 of 32 rows
    assert (shown[0, :8] == -2).all() and (shown[1, 24:] == -1).all()


def test_a_stretched_image_fills_the_input():
    assert (InputFormat((32, 32), [0, 0, 0], [1, 1, 1]).show(Image.new("RGB", (64, 33), "white")) == 1).all()


def test_resampling_is_as_asked_for():
    stripes = np.zeros((8, 8, 3), np.uint8)
    stripes[:, ::2] = 255
    image = Image.fromarray(stripes)
    area = InputFormat((8, 4), [0, 0, 0], [1, 1, 1], resample="area").show(image)
    np.testing.assert_allclose(area, 0.5, atol=0.01)
    assert not np.allclose(area, InputFormat((8, 4), [0, 0, 0], [1, 1, 1], resample="bilinear").show(image))


def test_what_the_files_say_is_taken_and_options_win(tmp_path):
    file = tmp_path / "preprocessor_config.json"
    held = {"size": {"height": 48, "width": 64}, "image_mean": [0.5, 0.4, 0.3], "image_std": [1, 1, 1], "resample": 3}
    file.write_text(json.dumps(held))
    found = input_format("net", NetworkSettings(), file)
    assert (found.size, found.mean, found.std) == ((48, 64), [0.5, 0.4, 0.3], [1, 1, 1])
    assert found.resample == "bicubic" and not found.letterbox
    found = input_format("net", NetworkSettings(size=32, mean=[0, 0, 0], resample="lanczos", letterbox=True), file)
    assert (found.size, found.mean, found.std) == ((32, 32), [0, 0, 0], [1, 1, 1])
    assert found.resample == "lanczos" and found.letterbox
    assert input_format("net", NetworkSettings(), file, (20, 30)).size == (20, 30)


@pytest.mark.parametrize(
    ("held", "mean", "std"),
    [
        ({}, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ({"do_normalize": False, "image_mean": [9, 9, 9]}, [0, 0, 0], [1, 1, 1]),
        ({"do_rescale": False, "image_mean": [51, 51, 51], "image_std": [255, 255, 255]}, [0.2] * 3, [1] * 3),
        ({"image_mean": 0.5, "image_std": 0.25}, [0.5] * 3, [0.25] * 3),
    ],
)
def test_normalisation_is_for_images_in_0_to_1(tmp_path, held, mean, std):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(held | {"size": 16}))
    found = input_format("net", NetworkSettings(), tmp_path / "preprocessor_config.json")
    np.testing.assert_allclose([found.mean, found.std], [mean, std])
    assert found.size == (16, 16)


def test_a_size_that_nothing_names_is_asked_for(tmp_path):
    with pytest.raises(SaliencyError, match="size: expected the side of the input in pixels"):
        input_format("net", NetworkSettings(), None)
    assert input_format("net", NetworkSettings(), None, default=(9, 9)).size == (9, 9)


def test_a_size_that_the_network_does_not_take_is_refused():
    with pytest.raises(SaliencyError, match="size: expected 224, which net takes alone, got 320"):
        input_format("net", NetworkSettings(size=320), None, (224, 224))


def test_a_processor_that_is_no_json_is_named(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(SaliencyError, match="preprocessor_config.json: expected"):
        input_format("net", NetworkSettings(), tmp_path / "preprocessor_config.json")


@pytest.mark.parametrize("values", [{"mean": [0.5]}, {"std": [0, 1, 1]}, {"activation": "relu"}, {"batch_size": 0}])
def test_unfit_options_are_refused(values):
    with pytest.raises(OptionError, match=next(iter(values))):
        NetworkSettings(**values)


def test_probabilities_stay_as_they_are(toy_data):
    rows = toy_data["train"].select(range(5))
    for image, found in zip(rows["image"], maps_of(Affine(batch_size=2), rows), strict=True):
        wanted = np.asarray(image.convert("RGB"), np.float32)[..., 0] / 255
        assert found.shape == wanted.shape and abs(found - wanted).mean() < 0.1


def test_a_sigmoid_is_applied_where_values_leave_0_to_1(toy_data):
    rows = toy_data["train"].select(range(3))
    logits = maps_of(Affine(8, -4), rows)
    asked = maps_of(Affine(8, -4, activation="sigmoid"), rows)
    plain = maps_of(Affine(activation="sigmoid"), rows)
    assert all(np.array_equal(one, other) for one, other in zip(logits, asked, strict=True))
    assert min(found.min() for found in logits) < 0.1 and min(found.min() for found in plain) > 0.45


def test_all_images_are_read_in_one_way(toy_data):
    source = Affine(3)
    source.prepare(toy_data["train"].select(range(2)), torch.device("cpu"))
    assert source.state == "sigmoid"
    source._activation = "none"  # had the first images been dark
    with pytest.raises(SaliencyError, match=r"row '.*': expected values of affine in \[0, 1\], got .* sigmoid"):
        list(source.maps(toy_data["train"]))


def test_min_max_stretches_every_map(toy_data):
    for found in maps_of(Affine(0.1, 0.2, activation="min_max"), toy_data["train"].select(range(3))):
        assert found.min() < 0.1 and found.max() > 0.9


def test_a_map_that_is_not_finite_names_its_row(toy_data):
    rows = toy_data["train"].select(range(2))
    with pytest.raises(SaliencyError, match=f"row '{rows['image_id'][0]}': expected a finite map"):
        maps_of(Affine(np.nan, activation="sigmoid"), rows)


def test_an_image_that_does_not_decode_names_its_row(poisoned_data):
    rows = poisoned_data["train"].select(range(2)).remove_columns("image").rename_column("mask", "image")
    with pytest.raises(DataError, match=f"row '{rows['image_id'][0]}': expected an image"):
        maps_of(Affine(), rows)
