import json

import numpy as np
import pytest
import torch
from datasets import Image as ImageFeature
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    BeitConfig,
    BeitImageProcessor,
    Data2VecVisionConfig,
    DPTConfig,
    DPTImageProcessor,
    EomtConfig,
    EomtForUniversalSegmentation,
    MobileViTConfig,
    MobileViTImageProcessor,
    ResNetConfig,
    ResNetModel,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerImageProcessorPil,
    SegformerModel,
    UperNetConfig,
    pipeline,
)

from wsss_hf.data.tagged import class_names, undecoded
from wsss_hf.data.transforms import TrainTransform
from wsss_hf.labeling.prediction import load_segmenter
from wsss_hf.stages.library_segmenter import build_library_segmenter
from wsss_hf.stages.run import run
from wsss_hf.stages.train_model import pixel_statistics
from wsss_hf.stages.train_segmenter import train_segmenter
from wsss_hf.training.losses import SegmentationObjective, build_loss
from wsss_hf.training.optimization import freeze_batch_norm, parameter_groups
from wsss_hf.training.recipes import RecipeError

NAMES = ["background", "cat", "dog"]
VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 64,
    "patch_size": 16,
}
SEGFORMER = {
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [8, 8, 16, 16],
    "num_attention_heads": [1, 1, 2, 2],
    "decoder_hidden_size": 16,
}
STAGES = [f"stage{i}" for i in (1, 2, 3, 4)]
CONFIGS = {
    "segformer": (
        SegformerConfig(**SEGFORMER, num_labels=150),
        SegformerImageProcessorPil(image_mean=[0.4, 0.5, 0.6]),
    ),
    "upernet": (
        UperNetConfig(
            backbone_config=ResNetConfig(
                depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 16, 16], embedding_size=8, out_features=STAGES
            ),
            hidden_size=16,
            auxiliary_channels=8,
            auxiliary_in_channels=16,
            use_auxiliary_head=True,
            num_labels=150,
        ),
        None,
    ),
    "dpt": (
        DPTConfig(
            **VIT,
            backbone_out_indices=[0, 1, 2, 3],
            neck_hidden_sizes=[8, 8, 16, 16],
            fusion_hidden_size=16,
            num_labels=150,
        ),
        DPTImageProcessor(keep_aspect_ratio=True, image_std=[0.25, 0.25, 0.25]),
    ),
    "beit": (
        BeitConfig(**VIT, out_indices=[1, 2, 3, 4], use_absolute_position_embeddings=True, num_labels=150),
        BeitImageProcessor(do_center_crop=True, do_reduce_labels=True),
    ),
    "mobilevit": (
        MobileViTConfig(
            hidden_sizes=[16, 16, 16],
            neck_hidden_sizes=[8, 8, 8, 8, 8, 8, 16],
            num_attention_heads=2,
            output_stride=16,
            aspp_out_channels=16,
            num_labels=150,
        ),
        MobileViTImageProcessor(),
    ),
}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Folders of untrained models with 150 classes, with their image processors where they have one of their own."""
    root = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)
    for name, (config, processor) in CONFIGS.items():
        AutoModelForSemanticSegmentation.from_config(config).save_pretrained(root / name)
        if processor is not None:
            processor.save_pretrained(root / name)
    return root


@pytest.fixture
def segformer(published):
    return str(published / "segformer")


def learn_once(model, new):
    """A training step's gradients; → the objective."""
    objective = SegmentationObjective(model, build_loss("cross_entropy"), new).train()
    objective = objective.to(memory_format=torch.channels_last)
    labels = torch.randint(0, 3, (2, 64, 64))
    labels[:, :9] = 255
    objective(torch.randn(2, 3, 64, 64), labels).loss.backward()
    return objective


@pytest.mark.parametrize("name", CONFIGS)
def test_every_model_gets_our_classes_and_keeps_its_weights_and_normalisation(published, name):
    model, processor, new = build_library_segmenter(str(published / name), NAMES, 64, {})
    assert list(model.config.id2label.values()) == NAMES and model.config.label2id["dog"] == 2
    before = AutoModelForSemanticSegmentation.from_pretrained(published / name).state_dict()
    after = dict(model.named_parameters())
    assert 1 <= len(new) <= 2 and all(len(after[key]) == 3 for key in new)
    assert all(torch.equal(before[key], value) for key, value in after.items() if key not in new)
    objective = learn_once(model, new)
    assert not [n for n, p in objective.named_parameters() if p.requires_grad and p.grad is None]

    # What training shows the model and what its image processor shows it afterwards are one and the same.
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    shown = processor(images=Image.fromarray(pixels), return_tensors="pt")["pixel_values"][0]
    transform = TrainTransform(64, scale=(1, 1), flip=0, color_jitter=0, **pixel_statistics(processor))
    trained, _ = transform(Image.fromarray(pixels), None, np.random.default_rng(0))
    torch.testing.assert_close(trained, shown, atol=1e-5, rtol=1e-5)
    wide = processor(images=Image.new("RGB", (90, 60)), return_tensors="pt")["pixel_values"]
    assert wide.shape[-2:] == ((64, 64) if name == "dpt" else (64, 96))


def test_an_encoder_alone_gets_a_new_head_that_learns_faster(published, tmp_path):
    SegformerModel(SegformerConfig(**SEGFORMER)).save_pretrained(tmp_path)
    model, _, new = build_library_segmenter(str(tmp_path), NAMES, 64, {})
    head = {name for name, _ in model.named_parameters() if name.startswith("decode_head.")}
    assert head <= new and not any(name.startswith("segformer.") for name in new)
    objective = SegmentationObjective(model, build_loss("cross_entropy"), new)
    settings = {"lr": 0.1, "head_lr_factor": 10.0, "bias_lr_factor": 1.0, "weight_decay": 0.0}
    rates = {id(p): group["lr"] for group in parameter_groups(objective, settings) for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert rates[id(parameter)] == pytest.approx(1.0 if name in head else 0.1)
    # A batch norm that has seen nothing yet is not one to freeze.
    freeze_batch_norm(objective.train())
    assert model.decode_head.batch_norm.training and model.decode_head.batch_norm.weight.requires_grad


def test_pretrained_batch_norms_can_be_frozen(segformer):
    model, _, new = build_library_segmenter(segformer, NAMES, 64, {})
    freeze_batch_norm(SegmentationObjective(model, build_loss("cross_entropy"), new).train())
    assert not model.decode_head.batch_norm.training


def test_as_many_other_classes_are_learnt_anew_and_the_same_ones_kept(tmp_path):
    config = SegformerConfig(**SEGFORMER, id2label={0: "background", 1: "cat", 2: "cow"})
    SegformerForSemanticSegmentation(config).save_pretrained(tmp_path)
    before = AutoModelForSemanticSegmentation.from_pretrained(tmp_path).decode_head.classifier
    other, _, new = build_library_segmenter(str(tmp_path), NAMES, 64, {})
    assert new == {"decode_head.classifier.weight", "decode_head.classifier.bias"}
    assert not torch.equal(other.decode_head.classifier.weight, before.weight)
    same, _, new = build_library_segmenter(str(tmp_path), ["background", "cat", "cow"], 64, {})
    assert not new and torch.equal(same.decode_head.classifier.weight, before.weight)


@pytest.fixture(scope="module")
def labelled(toy_data):
    """`toy_data` with its true masks as pseudo masks."""
    train = undecoded(toy_data["train"])
    train = train.add_column("pseudo_mask", train["mask"][:]).remove_columns("mask")
    train = train.cast_column("pseudo_mask", ImageFeature()).cast_column("image", ImageFeature())
    return type(toy_data)(train=train, val=toy_data["val"])


def test_it_is_trained_saved_evaluated_and_loaded_as_transformers_own(
    labelled, tiny_recipe, segformer, cam_folder, tmp_path
):
    tiny_recipe["segmenter"] |= {"model": segformer, "size": 64}
    tiny_recipe["segmenter"]["train"] |= {"epochs": 5, "lr": 1e-2}
    out = train_segmenter(labelled, tiny_recipe, tmp_path / "segmenter", cam=cam_folder, quiet=True)
    losses = [record["loss"] for record in json.loads((out / "training_log.json").read_text())]
    assert losses[-1] < 0.9 * losses[0]
    files = {path.name for path in out.iterdir()}
    assert not any(name.endswith(".py") for name in files)  # nobody needs our code for it
    model, processor = load_segmenter(str(out), "cpu")
    assert type(model) is SegformerForSemanticSegmentation and not model.training
    assert list(model.config.id2label.values()) == ["background", *class_names(labelled)]
    assert list(AutoImageProcessor.from_pretrained(out).image_mean) == [0.4, 0.5, 0.6]
    segments = pipeline("image-segmentation", model=str(out))(Image.new("RGB", (70, 50), "green"))
    assert {entry["label"] for entry in segments} <= {"background", *class_names(labelled)}
    assert sum(np.asarray(entry["mask"]).astype(bool).sum() for entry in segments) == 70 * 50


def test_a_whole_run_may_end_in_one(toy_data, tiny_recipe, segformer, tmp_path):
    tiny_recipe["segmenter"] |= {"model": segformer, "size": 64}
    _, segmenter = run(toy_data, tiny_recipe, tmp_path / "run", quiet=True)
    assert 0 <= segmenter["mean_iou"] <= 1 and segmenter["num_images"] == 4
    assert type(load_segmenter(str(tmp_path / "run" / "segmenter"), "cpu")[0]) is SegformerForSemanticSegmentation


def eomt(folder):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "num_blocks": 1}
    EomtForUniversalSegmentation(EomtConfig(**sizes, num_queries=4)).save_pretrained(folder)
    return folder, r"\(eomt\) classifies masks, and its loss knows no ignored pixels; a model of AutoModelForSem"


def classifier_of_tags(folder):
    sizes = {"depths": [1], "hidden_sizes": [8], "embedding_size": 8}
    ResNetModel(ResNetConfig(**sizes)).save_pretrained(folder)
    return folder, r"\(resnet\) labels no pixels; a model of AutoModelForSemanticSegmentation"


def of_fixed_size(folder):
    AutoModelForSemanticSegmentation.from_config(
        Data2VecVisionConfig(**VIT | {"image_size": 32}, out_indices=[1, 2, 3, 4])
    ).save_pretrained(folder)
    return folder, "takes no images of 64 pixels .*image.size=32 would be right"


def pickled(folder):
    model = SegformerForSemanticSegmentation(SegformerConfig(**SEGFORMER))
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder, "segmenter.model: .*: no weights in safetensors; pickled ones"


@pytest.mark.parametrize("kind", [eomt, classifier_of_tags, of_fixed_size, pickled])
def test_what_can_not_be_trained_is_refused_in_one_line(kind, tmp_path):
    folder, message = kind(tmp_path)
    with pytest.raises(RecipeError, match=message) as caught:
        build_library_segmenter(str(folder), NAMES, 64, {})
    assert "\n" not in str(caught.value)


def test_a_classifier_of_ours_is_no_segmenter(cam_folder):
    with pytest.raises(RecipeError, match=r"gives logits of shape \(1, 3\); \(1, 3, h, w\) would be right"):
        build_library_segmenter(str(cam_folder), NAMES, 48, {})
