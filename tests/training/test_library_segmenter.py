import json

import numpy as np
import pytest
import torch
from datasets import Image as ImageFeature
from datasets import load_from_disk
from library import needs_segformers_processor
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
    EomtDinov3Config,
    EomtImageProcessorPil,
    Mask2FormerConfig,
    Mask2FormerImageProcessorPil,
    MaskFormerConfig,
    MobileViTConfig,
    MobileViTImageProcessor,
    OneFormerConfig,
    ResNetConfig,
    ResNetModel,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerModel,
    SwinConfig,
    UperNetConfig,
    pipeline,
)
from transformers.models.segformer.image_processing_pil_segformer import SegformerImageProcessorPil
from transformers.pipelines.image_segmentation import ImageSegmentationPipeline

from wsss_hf.data.tagged import class_names, undecoded
from wsss_hf.data.transforms import TrainTransform
from wsss_hf.inference.load import load_segmenter
from wsss_hf.inference.segmenter import predict_scores
from wsss_hf.models.mask_classifiers import auto_class
from wsss_hf.pseudo_labels.area_prior import multiply_background, output_bias
from wsss_hf.settings import RecipeError, TrainSettings
from wsss_hf.stages.evaluate import evaluate_segmenter, segmenter_gap
from wsss_hf.stages.relabel import relabel
from wsss_hf.stages.run import run
from wsss_hf.stages.train_segmenter import train_segmenter
from wsss_hf.training.build import freeze_batch_norm, parameter_groups
from wsss_hf.training.library_segmenter import build_library_segmenter, of_one_shape
from wsss_hf.training.losses import SegmentationObjective, build_loss
from wsss_hf.training.train import pixel_statistics

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
EOMT = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 64, "num_blocks": 1}
MASKS = {"mask_feature_size": 32, "num_labels": 150}
STAGES = [f"stage{i}" for i in (1, 2, 3, 4)]
SWIN = {"embed_dim": 8, "depths": [1] * 4, "num_heads": [1] * 4, "window_size": 4, "out_features": STAGES}
DETR = {
    "d_model": 16,
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 16,
    "num_queries": 6,
}
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
    "eomt": (
        EomtConfig(**EOMT, num_queries=6, num_labels=150),
        EomtImageProcessorPil(do_pad=True, image_mean=[0.4, 0.5, 0.6]),
    ),
    "eomt_dinov3": (EomtDinov3Config(**EOMT, intermediate_size=32, num_queries=6, num_labels=150), None),
    "mask2former": (
        Mask2FormerConfig(
            **MASKS,
            backbone_config=SwinConfig(**SWIN),
            feature_size=32,
            hidden_dim=32,
            encoder_feedforward_dim=16,
            dim_feedforward=16,
            encoder_layers=1,
            decoder_layers=2,
            num_attention_heads=2,
            num_queries=6,
        ),
        Mask2FormerImageProcessorPil(do_reduce_labels=True, ignore_index=0, image_mean=[0.4, 0.5, 0.6]),
    ),
    "maskformer": (
        MaskFormerConfig(
            **MASKS,
            backbone_config=SwinConfig(**SWIN),
            fpn_feature_size=32,
            decoder_config={"model_type": "detr", **DETR},
        ),
        None,
    ),
}
MASK_CLASSIFIERS = ["eomt", "eomt_dinov3", "mask2former", "maskformer"]
MODELS = [
    pytest.param(name, marks=needs_segformers_processor) if name in ("segformer", "upernet") else name
    for name in CONFIGS
]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Folders of untrained models with 150 classes, with their image processors where they have one of their own."""
    root = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)
    for name, (config, processor) in CONFIGS.items():
        auto_class(config).from_config(config).save_pretrained(root / name)
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


@pytest.mark.parametrize("name", MODELS)
def test_background_gets_likelier_by_a_factor(published, name):
    model, processor, _ = build_library_segmenter(str(published / name), NAMES, 64)
    bias = output_bias(model.eval(), processor)
    if name in MASK_CLASSIFIERS:
        assert bias is None
        return
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before = model(images).logits.softmax(dim=1)
        multiply_background(bias, 3.0)
        after = model(images).logits.softmax(dim=1)
    torch.testing.assert_close(after[:, 0] / after[:, 1], 3 * before[:, 0] / before[:, 1])
    torch.testing.assert_close(after[:, 2] / after[:, 1], before[:, 2] / before[:, 1])


@pytest.mark.parametrize("name", MODELS)
def test_every_model_gets_our_classes_and_keeps_its_weights_and_normalisation(published, name):
    model, processor, new = build_library_segmenter(str(published / name), NAMES, 64)
    assert list(model.config.id2label.values()) == NAMES and model.config.label2id["dog"] == 2
    before = auto_class(model.config).from_pretrained(published / name).state_dict()
    after = dict(model.named_parameters())
    rows = 4 if name in MASK_CLASSIFIERS else 3  # of masks, some show nothing
    assert 1 <= len(new) <= 2 and all(len(after[key]) == rows for key in new)
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
    assert wide.shape[-2:] == ((64, 64) if name == "dpt" or name.startswith("eomt") else (64, 96))


@pytest.mark.parametrize("name", [model for model in MODELS if model not in ("eomt", "eomt_dinov3")])
def test_the_librarys_pipeline_batches_photographs_of_any_size(published, name, tmp_path):
    model, processor, _ = build_library_segmenter(str(published / name), NAMES, 64)
    model.save_pretrained(tmp_path)
    of_one_shape(processor).save_pretrained(tmp_path)
    segment = pipeline("image-segmentation", str(tmp_path))
    options = {"subtask": "semantic"} if name in MASK_CLASSIFIERS else {}
    draw, sizes = np.random.default_rng(0), ((50, 70), (90, 40), (64, 64), (50, 70))
    images = [Image.fromarray(draw.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in sizes]
    for image, together in zip(images, segment(images, batch_size=8, **options), strict=True):
        alone = segment(image, **options)
        assert [entry["label"] for entry in together] == [entry["label"] for entry in alone]
        assert sum(np.asarray(entry["mask"]).astype(bool).sum() for entry in together) == image.width * image.height
        for one, other in zip(together, alone, strict=True):
            assert np.mean(np.asarray(one["mask"]) != np.asarray(other["mask"])) < 0.01


@pytest.mark.parametrize("name", ["eomt", "eomt_dinov3"])
def test_the_pipeline_batches_photographs_that_are_cut_into_squares(published, name, tmp_path, monkeypatch):
    model, processor, _ = build_library_segmenter(str(published / name), NAMES, 64)
    assert of_one_shape(processor) is processor and processor.do_split_image
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    segment = pipeline("image-segmentation", str(tmp_path))
    shown, scores, forward = [], [], type(segment.model).forward
    merge = type(segment.image_processor).merge_image_patches

    def counted(self, pixel_values, *args, **kwargs):
        shown.append(len(pixel_values))
        return forward(self, pixel_values, *args, **kwargs)

    def noted(self, *args):
        scores.append(merge(self, *args)[0])
        return scores[-1:]

    monkeypatch.setattr(type(segment.model), "forward", counted)
    monkeypatch.setattr(type(segment.image_processor), "merge_image_patches", noted)
    draw, sizes = np.random.default_rng(0), ((50, 70), (90, 40), (64, 64), (50, 170))
    images = [Image.fromarray(draw.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in sizes]
    together = segment(images, batch_size=8, subtask="semantic")
    assert shown == [2 + 3 + 1 + 4]
    library = ImageSegmentationPipeline(segment.model, image_processor=segment.image_processor)
    alone = [library(image, subtask="semantic") for image in images]
    for one, other in zip(scores[:4], scores[4:], strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)
    for found, wanted, image in zip(together, alone, images, strict=True):
        assert [entry["label"] for entry in found] == [entry["label"] for entry in wanted]
        assert all(entry["mask"].size == image.size for entry in found)
    assert segment(images[0], subtask="semantic")[0]["label"] == alone[0][0]["label"]
    assert [len(found) for found in segment(images[:3], batch_size=2, subtask="semantic")] == list(map(len, alone[:3]))


@needs_segformers_processor
def test_an_encoder_alone_gets_a_new_head_that_learns_faster(published, tmp_path):
    SegformerModel(SegformerConfig(**SEGFORMER)).save_pretrained(tmp_path)
    model, _, new = build_library_segmenter(str(tmp_path), NAMES, 64)
    head = {name for name, _ in model.named_parameters() if name.startswith("decode_head.")}
    assert head <= new and not any(name.startswith("segformer.") for name in new)
    objective = SegmentationObjective(model, build_loss("cross_entropy"), new)
    settings = TrainSettings(lr=0.1, head_lr_factor=10.0, bias_lr_factor=1.0, weight_decay=0.0)
    rates = {id(p): group["lr"] for group in parameter_groups(objective, settings) for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert rates[id(parameter)] == pytest.approx(1.0 if name in head else 0.1)
    # A batch norm that has seen nothing yet is not one to freeze.
    freeze_batch_norm(objective.train())
    assert model.decode_head.batch_norm.training and model.decode_head.batch_norm.weight.requires_grad


@needs_segformers_processor
def test_pretrained_batch_norms_can_be_frozen(segformer):
    model, _, new = build_library_segmenter(segformer, NAMES, 64)
    freeze_batch_norm(SegmentationObjective(model, build_loss("cross_entropy"), new).train())
    assert not model.decode_head.batch_norm.training


@needs_segformers_processor
def test_as_many_other_classes_are_learnt_anew_and_the_same_ones_kept(tmp_path):
    config = SegformerConfig(**SEGFORMER, id2label={0: "background", 1: "cat", 2: "cow"})
    SegformerForSemanticSegmentation(config).save_pretrained(tmp_path)
    before = AutoModelForSemanticSegmentation.from_pretrained(tmp_path).decode_head.classifier
    other, _, new = build_library_segmenter(str(tmp_path), NAMES, 64)
    assert new == {"decode_head.classifier.weight", "decode_head.classifier.bias"}
    assert not torch.equal(other.decode_head.classifier.weight, before.weight)
    same, _, new = build_library_segmenter(str(tmp_path), ["background", "cat", "cow"], 64)
    assert not new and torch.equal(same.decode_head.classifier.weight, before.weight)


@pytest.fixture(scope="module")
def labelled(toy_data):
    """`toy_data` with its true masks as pseudo masks."""
    train = undecoded(toy_data["train"])
    train = train.add_column("pseudo_mask", train["mask"][:]).remove_columns("mask")
    train = train.cast_column("pseudo_mask", ImageFeature()).cast_column("image", ImageFeature())
    return type(toy_data)(train=train, val=toy_data["val"])


@needs_segformers_processor
def test_it_is_trained_saved_evaluated_and_loaded_as_transformers_own(
    labelled, tiny_recipe, segformer, cam_folder, tmp_path
):
    vars(tiny_recipe.segmenter).update({"model": segformer, "size": 64})
    vars(tiny_recipe.segmenter.train).update({"epochs": 5, "lr": 1e-2})
    out = train_segmenter(labelled, tiny_recipe, tmp_path / "segmenter", cam=cam_folder)
    losses = [record["loss"] for record in json.loads((out / "training_log.json").read_text())]
    assert losses[-1] < 0.9 * losses[0]
    files = {path.name for path in out.folder.iterdir()}
    assert not any(name.endswith(".py") for name in files)  # nobody needs our code for it
    model, processor = load_segmenter(str(out), "cpu")
    assert isinstance(model, SegformerForSemanticSegmentation) and not model.training
    assert list(model.config.id2label.values()) == ["background", *class_names(labelled)]
    assert list(AutoImageProcessor.from_pretrained(out).image_mean) == [0.4, 0.5, 0.6]
    segments = pipeline("image-segmentation", model=str(out))(Image.new("RGB", (70, 50), "green"))
    assert {entry["label"] for entry in segments} <= {"background", *class_names(labelled)}
    assert sum(np.asarray(entry["mask"]).astype(bool).sum() for entry in segments) == 70 * 50


@needs_segformers_processor
@pytest.mark.slow
def test_a_whole_run_may_end_in_one(toy_data, tiny_recipe, segformer, tmp_path):
    vars(tiny_recipe.segmenter).update({"model": segformer, "size": 64})
    _, segmenter = run(toy_data, tiny_recipe, tmp_path / "run").results
    assert 0 <= segmenter["mean_iou"] <= 1 and segmenter["num_images"] == 4
    model, _ = load_segmenter(str(tmp_path / "run" / "segmenter"), "cpu")
    assert isinstance(model, SegformerForSemanticSegmentation)


@pytest.mark.parametrize("name", MASK_CLASSIFIERS)
def test_ignored_pixels_teach_a_mask_classifier_nothing_and_half_precision_is_enough(published, name):
    model, _, new = build_library_segmenter(str(published / name), NAMES, 64)
    seen = []
    model.register_forward_hook(lambda _model, _inputs, output: seen.append(output.logits))
    model.register_forward_hook(lambda _model, _inputs, output: output.logits.retain_grad())
    objective = SegmentationObjective(model, build_loss("symmetric"), new).train()
    labels = torch.randint(0, 3, (2, 64, 64))
    labels[:, :20] = 255
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective(torch.randn(2, 3, 64, 64), labels).loss
    loss.backward()
    (logits,) = seen
    assert logits.shape == (2, 3, 64, 64) and logits.dtype == torch.float32
    taught = logits.grad.abs().sum(dim=1) > 0
    assert torch.equal(taught, labels != 255)
    assert all(p.grad.isfinite().all() for p in objective.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["eomt", "mask2former", "maskformer"])
def test_its_processor_takes_our_label_maps_as_they_are(published, name):
    _, processor, _ = build_library_segmenter(str(published / name), NAMES, 64)
    labels = np.zeros((64, 64), dtype=np.uint8)
    labels[:20], labels[40:] = 2, 0 if name == "eomt" else 255  # EoMT's knows no label to ignore but background
    inputs = processor(images=[Image.new("RGB", (64, 64))], segmentation_maps=[labels], return_tensors="pt")
    assert inputs["class_labels"][0].tolist() == [0, 2]


@pytest.mark.parametrize("name", ["eomt", "mask2former"])
def test_a_mask_classifier_of_as_many_other_classes_is_learnt_anew(published, name, tmp_path):
    first, _, _ = build_library_segmenter(str(published / name), ["background", "cat", "cow"], 64)
    first.save_pretrained(tmp_path)
    other, _, new = build_library_segmenter(str(tmp_path), NAMES, 64)
    assert new == {"class_predictor.weight", "class_predictor.bias"}
    assert not torch.equal(first.class_predictor.weight, other.class_predictor.weight)
    same, _, new = build_library_segmenter(str(tmp_path), ["background", "cat", "cow"], 64)
    assert not new and torch.equal(first.class_predictor.weight, same.class_predictor.weight)


@pytest.fixture(scope="module", params=["eomt", "mask2former"])
def learnt(request, published, tmp_path_factory):
    """A mask classifier that has learnt the colours of a picture by heart, its processor, its folder, the picture."""
    torch.manual_seed(0)
    model, processor, new = build_library_segmenter(str(published / request.param), NAMES, 64)
    for module in model.modules():  # transformers before 5.23 begins with queries that are all but alike
        if isinstance(module, torch.nn.Embedding) and module.weight.std() < 0.1:
            torch.nn.init.normal_(module.weight)
    labels = torch.zeros(64, 128, dtype=torch.long)
    labels[8:40, 8:40], labels[20:60, 70:110] = 1, 2
    colours = torch.randint(0, 50, (64, 128, 3)) + 200 * torch.nn.functional.one_hot(labels, 3)
    picture = Image.fromarray(colours.to(torch.uint8).numpy())
    halves = [picture.crop((left, 0, left + 64, 64)) for left in (0, 64)]
    pixel_values = processor(images=halves, return_tensors="pt")["pixel_values"]
    labels = torch.stack(labels.chunk(2, dim=1))
    objective = SegmentationObjective(model, build_loss("cross_entropy"), new).train()
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-2)
    losses = []
    for _ in range(80):
        loss = objective(pixel_values, labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    folder = tmp_path_factory.mktemp("learnt")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model.eval(), processor, folder, picture


@torch.no_grad()
def test_a_mask_classifiers_logits_have_the_argmax_of_its_own_processor(learnt):
    model, processor, _, picture = learnt
    side = 64 if model.config.model_type == "eomt" else 384  # what the processors enlarge masks to
    pixel_values = processor(images=[picture.crop((0, 0, 64, 64))], return_tensors="pt")["pixel_values"]
    output = model(pixel_values=torch.nn.functional.interpolate(pixel_values, (side, side), mode="bilinear"))
    (theirs,) = processor.post_process_semantic_segmentation(output, target_sizes=[(side, side)])
    assert torch.equal(output.logits[0].argmax(dim=0), theirs) and len(theirs.unique()) > 1


@pytest.mark.parametrize(
    ("learnt", "box"),
    [
        ("eomt", (0, 0, 64, 64)),
        ("eomt", (0, 0, 128, 64)),  # two squares side by side,
        ("eomt", (0, 0, 100, 64)),  # and two that overlap
        ("mask2former", (0, 0, 64, 64)),
        ("mask2former", (60, 0, 110, 64)),
    ],
    indirect=["learnt"],
)
def test_a_saved_mask_classifier_is_the_librarys_and_labels_images_as_its_pipeline_does(learnt, box):
    trained, _, folder, picture = learnt
    plain, loading = auto_class(trained.config).from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert list(plain.config.id2label.values()) == NAMES
    model, processor = load_segmenter(str(folder), "cpu")
    assert isinstance(model, type(trained)) and not model.training

    image = picture.crop(box)
    library = pipeline("image-segmentation", model=str(folder), pipeline_class=ImageSegmentationPipeline)
    segments = library(image, subtask="semantic")
    assert {found["label"] for found in segments} <= set(NAMES) and len(segments) > 1
    assert pipeline("image-segmentation", model=str(folder))(image, subtask="semantic") == segments
    pixel_values = processor(images=[image], return_tensors="pt")["pixel_values"]
    ours = predict_scores(model, pixel_values, image.size[::-1], flip=False)[0].argmax(dim=0).numpy()
    theirs = sum(NAMES.index(found["label"]) * (np.array(found["mask"]) > 0) for found in segments)
    assert (ours == theirs).mean() > 0.98


@pytest.mark.parametrize("learnt", ["eomt"], indirect=True)
def test_an_image_smaller_than_the_squares_of_a_model_is_padded(learnt):
    model, processor, _, picture = learnt
    pixel_values = processor(images=[picture.crop((0, 0, 64, 64))], return_tensors="pt")["pixel_values"]
    scores = predict_scores(model, pixel_values[..., :40, :48], (40, 48), flip=False)
    with torch.no_grad():
        padded = torch.nn.functional.pad(pixel_values[..., :40, :48], (0, 16, 0, 24))
        expected = model(padded).logits[..., :40, :48].softmax(dim=1)
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["eomt", "mask2former"])
def test_a_mask_classifier_goes_the_whole_way(labelled, tiny_recipe, published, name, tmp_path):
    vars(tiny_recipe.segmenter).update({"model": str(published / name), "size": 64})
    vars(tiny_recipe.segmenter.train).update({"epochs": 6, "lr": 3e-3})
    out = train_segmenter(labelled, tiny_recipe, tmp_path / "segmenter")
    losses = [record["loss"] for record in json.loads((out / "training_log.json").read_text())]
    assert losses[-1] < 0.9 * losses[0]
    relabelled = load_from_disk(str(relabel(labelled, out, tiny_recipe, tmp_path / "masks")))
    tiny_recipe.segmenter.model = str(out)
    vars(tiny_recipe.segmenter.train).update({"epochs": 1})
    again = train_segmenter(relabelled, tiny_recipe, tmp_path / "again")
    settings = tiny_recipe.evaluation
    figures = evaluate_segmenter(*load_segmenter(str(again), "cpu"), labelled["val"], settings)
    assert 0 < figures["mean_iou"] <= 1
    assert segmenter_gap(again, out, labelled["val"], settings)["num_images"] == 4


def oneformer(folder):
    OneFormerConfig(backbone_config=SwinConfig(**SWIN)).save_pretrained(folder)
    return folder, r"expected .* EoMT, Mask2Former or MaskFormer, got .* \(oneformer, which needs a task"


def classifier_of_tags(folder):
    sizes = {"depths": [1], "hidden_sizes": [8], "embedding_size": 8}
    ResNetModel(ResNetConfig(**sizes)).save_pretrained(folder)
    return folder, r"expected a model of AutoModelForSemanticSegmentation .*, got .* \(resnet\)"


def of_fixed_size(folder):
    AutoModelForSemanticSegmentation.from_config(
        Data2VecVisionConfig(**VIT | {"image_size": 32}, out_indices=[1, 2, 3, 4])
    ).save_pretrained(folder)
    return folder, "expected image.size=32, got 64"


def of_other_squares(folder):
    auto_class(EomtConfig()).from_config(EomtConfig(**EOMT | {"image_size": 96})).save_pretrained(folder)
    return folder, "expected image.size=96, got 64"


def pickled(folder):
    model = SegformerForSemanticSegmentation(SegformerConfig(**SEGFORMER))
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder, "segmenter.model: .*: no weights in safetensors; pickled ones"


@pytest.mark.parametrize("kind", [oneformer, classifier_of_tags, of_fixed_size, of_other_squares, pickled])
def test_what_can_not_be_trained_is_refused_in_one_line(kind, tmp_path):
    folder, message = kind(tmp_path)
    with pytest.raises(RecipeError, match=message) as caught:
        build_library_segmenter(str(folder), NAMES, 64)
    assert "\n" not in str(caught.value)


def test_a_classifier_of_ours_is_no_segmenter(cam_folder):
    with pytest.raises(RecipeError, match=r"expected logits of shape \(1, 3, h, w\), .*, got \(1, 3\)"):
        build_library_segmenter(str(cam_folder), NAMES, 48)
