from types import SimpleNamespace

import numpy as np
import pytest
import torch
from library import needs_segformers_processor
from PIL import Image
from transformers import (
    AutoImageProcessor,
    DPTImageProcessorPil,
    MobileNetV2Config,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
)

from wsss_hf import CamClassifier, CamConfig, MapRefiner, Segmenter, SegmenterConfig, WsssImageProcessor
from wsss_hf.models.pretrained import backbone_normalization

IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def photograph(width=60, height=40):
    """Coloured and not symmetric."""
    pixels = np.random.default_rng(0).integers(0, 255, (height // 10, width // 10, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "CMYK", "1"])
def test_images_of_any_mode_are_read_as_rgb(mode):
    processor = WsssImageProcessor(size={"shortest_edge": 32, "longest_edge": 64})
    image = photograph().convert(mode)
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 32, 48) and pixels.dtype == torch.float32
    expected = processor(image.convert("RGB"), return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels, expected)
    if mode in ("L", "LA", "1"):
        grey = pixels[0] * torch.tensor(IMAGENET[1])[:, None, None] + torch.tensor(IMAGENET[0])[:, None, None]
        torch.testing.assert_close(grey[0], grey[1])


def test_transparent_pixels_are_white():
    processor, picture = WsssImageProcessor(), photograph()
    alpha = Image.new("L", picture.size, 255)
    alpha.paste(0, (0, 0, 30, 40))
    expected = picture.copy()
    expected.paste("white", (0, 0, 30, 40))
    picture.putalpha(alpha)
    seen, wanted = (processor(image, return_tensors="pt")["pixel_values"] for image in (picture, expected))
    assert torch.equal(seen, wanted)


def test_16_bits_and_floating_point_are_scaled_and_not_cut_off():
    processor, grey = WsssImageProcessor(), np.asarray(photograph().convert("L"))
    expected = processor(Image.fromarray(grey), return_tensors="pt")["pixel_values"]
    for values in (grey.astype(np.uint16) * 257, grey.astype(np.int32) * 257, grey.astype(np.float32) / 255):
        assert torch.equal(processor(Image.fromarray(values), return_tensors="pt")["pixel_values"], expected)
    with pytest.raises(ValueError, match="expected 16-bit values that use their range, 0..65535, got -1 to"):
        processor(Image.fromarray(grey.astype(np.int32) - 1 - int(grey.min())))


def test_values_are_normalized():
    image = Image.new("RGB", (50, 50), (255, 0, 51))
    processor = WsssImageProcessor(image_mean=[0.5, 0.4, 0.3], image_std=[0.5, 0.25, 0.1])
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels[0].amax(dim=(1, 2)), torch.tensor([1.0, -1.6, -1.0]))
    torch.testing.assert_close(pixels[0].amin(dim=(1, 2)), torch.tensor([1.0, -1.6, -1.0]))


@pytest.mark.parametrize(
    ("width", "height", "shape"),
    [(60, 40, (32, 48)), (40, 60, (48, 32)), (32, 32, (32, 32)), (400, 40, (10, 96)), (8, 8, (32, 32))],
)
def test_the_short_side_gets_its_size_unless_the_long_one_would_be_too_long(width, height, shape):
    processor = WsssImageProcessor(size={"shortest_edge": 32, "longest_edge": 96})
    pixels = processor(Image.new("RGB", (width, height)), return_tensors="pt")["pixel_values"]
    assert tuple(pixels.shape[-2:]) == shape


def test_a_list_of_images_is_a_batch():
    images = [photograph(), photograph().transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    pixels = WsssImageProcessor()(images, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (2, 3, 224, 336)
    assert torch.equal(pixels[1], WsssImageProcessor()(images[1], return_tensors="pt")["pixel_values"][0])


def test_settings_come_back(tmp_path):
    processor = WsssImageProcessor(size={"shortest_edge": 40, "longest_edge": 80}, image_mean=[0.1, 0.2, 0.3])
    processor.save_pretrained(tmp_path)
    SegmenterConfig(backbone_config=ResNetConfig()).save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(loaded) is WsssImageProcessor
    image = photograph()
    assert torch.equal(
        loaded(image, return_tensors="pt")["pixel_values"], processor(image, return_tensors="pt")["pixel_values"]
    )


def outputs():
    generator = torch.Generator().manual_seed(0)
    return SimpleNamespace(logits=torch.randn(2, 4, 5, 6, generator=generator))


def test_label_maps_get_the_size_of_each_image():
    maps = WsssImageProcessor().post_process_semantic_segmentation(outputs(), [(20, 30), (7, 9)])
    assert [tuple(m.shape) for m in maps] == [(20, 30), (7, 9)]
    assert all(m.dtype == torch.int64 for m in maps)
    expected = DPTImageProcessorPil().post_process_semantic_segmentation(outputs(), [(20, 30), (7, 9)])
    assert all(torch.equal(actual, own) for actual, own in zip(maps, expected, strict=True))


def test_label_maps_keep_the_size_of_the_logits_where_none_is_asked():
    maps = WsssImageProcessor().post_process_semantic_segmentation(outputs())
    assert torch.equal(torch.stack(maps), outputs().logits.argmax(1))


def test_another_number_of_sizes_is_refused():
    with pytest.raises(ValueError, match="target_sizes: expected 2, one per image, got 1"):
        WsssImageProcessor().post_process_semantic_segmentation(outputs(), [(20, 30)])


def test_outputs_of_a_classifier_are_refused():
    with pytest.raises(ValueError, match=r"outputs: expected logits .*, got .* model.segmentation_scores"):
        WsssImageProcessor().post_process_semantic_segmentation(SimpleNamespace(logits=torch.zeros(2, 3)))


def test_scores_come_with_the_label_maps_if_asked():
    found = WsssImageProcessor().post_process_semantic_segmentation(
        outputs(), [(20, 30), (7, 9)], return_segmentation_scores=True
    )
    plain = WsssImageProcessor().post_process_semantic_segmentation(outputs(), [(20, 30), (7, 9)])
    for one, labels, size in zip(found, plain, [(20, 30), (7, 9)], strict=True):
        assert torch.equal(one.segmentation, labels)
        assert one.segmentation_scores.shape == (4, *size)
        assert torch.equal(one.segmentation_scores.argmax(0), labels)


def test_half_precision_gives_the_labels_of_single_precision():
    half = SimpleNamespace(logits=outputs().logits.bfloat16())
    exact = SimpleNamespace(logits=half.logits.float())
    (labels, _), (wanted, _) = (
        WsssImageProcessor().post_process_semantic_segmentation(o, [(40, 50)] * 2) for o in (half, exact)
    )
    assert torch.equal(labels, wanted)


# label maps and batches of images of different sizes


@needs_segformers_processor
def test_label_maps_follow_their_images_and_keep_their_values():
    processor = WsssImageProcessor(size={"shortest_edge": 20, "longest_edge": 96})
    labels = np.zeros((40, 60), dtype=np.uint8)
    labels[:20, 30:] = 3
    labels[20:] = 255
    for given in (labels, Image.fromarray(labels), labels.astype(np.int64)):
        batch = processor(photograph(), segmentation_maps=given, return_tensors="pt")
        assert batch["pixel_values"].shape == (1, 3, 20, 30) and batch["labels"].shape == (1, 20, 30)
        assert batch["labels"].dtype == torch.int64
        wanted = torch.zeros(20, 30, dtype=torch.int64)
        wanted[:10, 15:] = 3
        wanted[10:] = 255
        assert torch.equal(batch["labels"][0], wanted)


@needs_segformers_processor
def test_images_of_different_sizes_are_padded_into_a_batch():
    processor = WsssImageProcessor(size={"shortest_edge": 20, "longest_edge": 96})
    images = [photograph(60, 40), photograph(40, 60)]
    labels = [np.full((40, 60), 1, dtype=np.uint8), np.full((60, 40), 2, dtype=np.uint8)]
    batch = processor(images, segmentation_maps=labels, do_pad=True, return_tensors="pt")
    assert batch["pixel_values"].shape == (2, 3, 30, 30) and batch["labels"].shape == (2, 30, 30)
    for i, (height, width) in enumerate([(20, 30), (30, 20)]):
        alone = processor(images[i], segmentation_maps=labels[i], return_tensors="pt")
        assert torch.equal(batch["pixel_values"][i, :, :height, :width], alone["pixel_values"][0])
        assert (batch["labels"][i, :height, :width] == i + 1).all()
        outside = torch.ones(30, 30, dtype=torch.bool)
        outside[:height, :width] = False
        assert (batch["labels"][i][outside] == 255).all() and (batch["pixel_values"][i][:, outside] == 0).all()
    fixed = processor(images, do_pad=True, pad_size={"height": 32, "width": 40}, return_tensors="pt")
    assert fixed["pixel_values"].shape == (2, 3, 32, 40) and "labels" not in fixed


def test_without_padding_a_mixed_batch_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match="padding"):
        WsssImageProcessor()([photograph(60, 40), photograph(40, 60)], return_tensors="pt")


def test_every_backend_that_is_asked_for_is_the_pil_one(tmp_path):
    """There is no other; the Auto class says so where another one is asked for."""
    WsssImageProcessor().save_pretrained(tmp_path)
    SegmenterConfig(backbone_config=ResNetConfig()).save_pretrained(tmp_path)
    for backend in ("pil", "torchvision", None):
        loaded = AutoImageProcessor.from_pretrained(tmp_path, backend=backend)
        assert type(loaded) is WsssImageProcessor and loaded.backend == "pil"


def test_settings_saved_before_label_maps_were_taken_load(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(
        '{"image_processor_type": "WsssImageProcessor", "do_resize": true, "do_rescale": true, "do_normalize": true, '
        '"size": {"shortest_edge": 20, "longest_edge": 96}, "image_mean": [0.5, 0.5, 0.5], '
        '"image_std": [0.5, 0.5, 0.5]}'
    )
    loaded = WsssImageProcessor.from_pretrained(tmp_path)
    pixels = loaded(Image.new("RGB", (60, 40), "white"), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 20, 30) and torch.equal(pixels, torch.ones_like(pixels))


# the normalisation of a backbone


def mobilenet(folder):
    MobileNetV2Config().save_pretrained(folder)
    return str(folder), MobileNetV2Config()


def test_a_backbone_with_a_processor_says_its_normalization_itself(tmp_path):
    backbone, config = mobilenet(tmp_path)
    DPTImageProcessorPil(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]).save_pretrained(tmp_path)
    assert backbone_normalization(backbone, config) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])


def test_a_backbone_without_a_processor_has_the_one_of_its_type(tmp_path):
    assert backbone_normalization(*mobilenet(tmp_path)) == ([0.5] * 3, [0.5] * 3)


@pytest.mark.parametrize("config", [MobileNetV2Config(), ViTConfig()])
def test_a_type_has_a_normalization_without_any_directory(config):
    assert backbone_normalization(None, config) == ([0.5] * 3, [0.5] * 3)


def test_imagenet_is_the_last_resort():
    assert backbone_normalization(None, object()) == IMAGENET


# the processor of a model

TINY = {"depths": [1, 1], "hidden_sizes": [8, 16], "embedding_size": 8, "layer_type": "basic"}
OWN = WsssImageProcessor(size={"shortest_edge": 40, "longest_edge": 80}, image_mean=[0.1, 0.2, 0.3])


def values_beside(folder):
    processor = AutoImageProcessor.from_pretrained(folder)
    return processor.size["shortest_edge"], list(processor.image_mean), list(processor.image_std)


@pytest.mark.parametrize("model_class", [CamClassifier, MapRefiner, Segmenter])
def test_a_model_takes_its_processor_along(model_class, tmp_path):
    model = model_class(model_class.config_class(backbone_config=ResNetConfig(**TINY)))
    model.image_processor = OWN
    model.save_pretrained(tmp_path / "first")
    again, _ = model_class.from_pretrained(tmp_path / "first", output_loading_info=True)
    again.save_pretrained(tmp_path / "second")
    assert values_beside(tmp_path / "second") == (40, [0.1, 0.2, 0.3], IMAGENET[1])


def test_a_model_that_has_no_processor_gets_the_one_of_its_configuration(tmp_path):
    statistics = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    model = CamClassifier(CamConfig(backbone_config=ResNetConfig(**TINY), **statistics))
    model.save_pretrained(tmp_path / "new")
    assert values_beside(tmp_path / "new") == (224, *statistics.values())
    OWN.save_pretrained(tmp_path / "held")
    model.save_pretrained(tmp_path / "held")
    assert values_beside(tmp_path / "held")[0] == 40


@pytest.mark.parametrize("model_class", [CamClassifier, Segmenter])
def test_a_model_on_a_published_backbone_keeps_its_normalization(model_class, tmp_path):
    ResNetModel(ResNetConfig(**TINY)).save_pretrained(tmp_path)
    DPTImageProcessorPil(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]).save_pretrained(tmp_path)
    model = model_class.from_backbone(str(tmp_path))
    model.save_pretrained(tmp_path / "model")
    assert values_beside(tmp_path / "model") == (224, [0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    if model_class is CamClassifier:
        assert model.config.image_mean == [0.1, 0.2, 0.3]
        told = model_class.from_backbone(str(tmp_path), image_mean=[0.5] * 3)
        assert list(told.image_processor.image_mean) == told.config.image_mean == [0.5] * 3
