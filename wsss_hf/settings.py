"""Every setting of every stage: its type, its limits, its default, and one sentence about it.

A recipe is a [`Recipe`]; `wsss recipe` prints one with these sentences. The defaults suit photographs and a backbone
pretrained on ImageNet.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Final, Literal

from .models.options import Options, option

AUTO: Final = "auto"
SMALLEST_WINDOW = 16  # pixels: smaller ones show a network nothing, and there are thousands


class RecipeError(ValueError):
    """A recipe, plan or option that can't be used; the message names it and says what was expected."""


def speed(default: Any, text: str, **limits: Any) -> Any:
    """An [`option`] that changes how fast a result comes, not the result: no stage is made again because of it."""
    field = option(default, text, **limits)
    field.metadata = dict(field.metadata) | {"speed": True}
    return field


@dataclass
class ImageSettings(Options):
    """How images are shown to the networks."""

    size: int = option(
        224, "Short side of an image at scale 1, and side of a training crop, in pixels.", at_least=1, at_most=8192
    )
    mean: list[float] | None = option(None, "Per channel, for images in [0, 1]; null takes the backbone's.", length=3)
    std: list[float] | None = option(None, "As mean.", length=3, above=0)


@dataclass
class ToySettings(Options):
    """What `--data toy` draws."""

    num_train: int = option(600, "Training images.", at_least=1)
    num_val: int = option(120, "Held-out images.", at_least=1)
    image_size: int = option(96, "Side of an image in pixels.", at_least=32)


@dataclass
class TrainSettings(Options):
    """A training: its length, optimiser, schedule and augmentation."""

    epochs: int = option(4, "Passes over the images.", at_least=1)
    steps: int = option(0, "Optimiser steps; if not 0, they count instead of the epochs.", at_least=0)
    batch_size: int = option(16, "Images of a step, over all processes and micro-batches.", at_least=1)
    accumulate: int = option(
        1,
        "Micro-batches whose gradients make a step: the same batch in less memory. What compares images (icd, d2cam, "
        "contrast, plda), an affinity network's means over pairs, and batch norms that learn see one at a time.",
        at_least=1,
    )
    optimizer: Literal["adamw", "sgd"] = option("adamw", "adamw | sgd")
    lr: float = option(2e-4, "Learning rate of pretrained layers.", above=0)
    backbone_lr_factor: float = option(
        1.0, "Learning rate of the pretrained backbone, relative to lr; 0 freezes it.", at_least=0
    )
    head_lr_factor: float = option(10.0, "Learning rate of new layers, relative to lr.", above=0)
    bias_lr_factor: float = option(1.0, "Learning rate of biases, relative to that of their layer.", above=0)
    weight_decay: float = option(1e-4, "Of weights.", at_least=0)
    decay_biases: bool = option(False, "Biases and norms decay too.")
    momentum: float = option(0.9, "Of sgd.", at_least=0, below=1)
    nesterov: bool = option(True, "Of sgd.")
    schedule: Literal["poly", "step"] = option("poly", "poly | step")
    power: float = option(0.9, "Of poly.", above=0)
    milestones: list[float] = option(
        [0.33, 0.67],
        "Of step: fractions of the training after which the rate is divided by 10.",
        at_least=0,
        at_most=1,
        length=0,
    )
    warmup: float = option(0.0, "Fraction of the training in which the rate rises from 0.", at_least=0, at_most=1)
    clip_gradient: float = option(0.0, "Largest gradient norm; 0 does not clip.", at_least=0)
    freeze_batch_norm: bool = option(True, "Keep statistics and weights of pretrained batch norms.")
    sync_batch_norm: bool = option(False, "On several GPUs, the batch norms that learn see the images of all.")
    ema: float = option(
        0.0,
        "Decay per step of an average of the weights, which is saved in their place; 0: none.",
        at_least=0,
        below=1,
    )
    mixed_precision: Literal["no", "bf16", "fp16"] = option("no", "no | bf16 | fp16")
    gradient_checkpointing: bool = speed(False, "Less memory, about a third more time.")
    compile: bool = speed(False, "Let torch.compile build the network: minutes at the start, faster steps after.")
    fused: bool = speed(False, "The optimiser's fused kernels.")
    channels_last: bool = speed(True, "Memory order of convolutions that suits CPUs, and GPUs in half precision.")
    scale: list[float] = option(
        [0.7, 1.4], "Random scale: lowest, highest.", above=0, at_most=8, length=2, ascending=True
    )
    scaled_side: Literal["short", "long", "both", "native"] = option(
        "short",
        "short | long: side that is image.size at scale 1; both: images become squares, then and later; native: scale "
        "1 is the image as it is.",
    )
    flip: float = option(0.5, "Probability of the mirror image.", at_least=0, at_most=1)
    color_jitter: float = option(0.2, "Brightness, contrast and saturation by 1 ± this.", at_least=0, below=1)
    hue_jitter: float = option(0.0, "Hue by ± this, in turns of the colour circle.", at_least=0, at_most=0.5)
    views: int | None = option(
        None,
        "Different crops of each image, which epochs show in turn; 0: new ones in every epoch; null: 1 with "
        "backbone_lr_factor 0, else 0. What a frozen backbone makes of them is computed once and kept on disk until "
        "the training is done.",
        at_least=0,
    )
    workers: int = speed(0, "Processes that load images, for each training process.", at_least=0)
    save_steps: int = speed(0, "Steps between checkpoints, beside those after each epoch; 0: none.", at_least=0)
    save_minutes: float = speed(10.0, "Minutes between checkpoints, likewise.", at_least=0)
    keep: int = speed(2, "Newest checkpoints that stay on disk.", at_least=1)
    track: Literal["tensorboard", "trackio", "wandb"] | None = speed(None, "tensorboard | trackio | wandb, or null.")
    track_steps: int = speed(500, "Steps between pictures of maps; 0: none.", at_least=0)


@dataclass
class FelzenszwalbSettings(Options):
    """Felzenszwalb superpixels, and which of them are merged (ICD)."""

    size: int | None = option(
        None, "Short side, in pixels, that larger images are reduced to; null takes image.size.", at_least=1
    )
    scale: float = option(100.0, "Larger values give larger superpixels.", above=0)
    sigma: float = option(0.5, "Smoothing before, in pixels.", at_least=0)
    min_size: int = option(20, "Pixels of the smallest superpixel.", at_least=1)
    merge_to: int = option(
        0,
        "The two most alike, by the untrained backbone's features of an image padded to that size, are merged until "
        "so many are left; 0 merges none.",
        at_least=0,
    )
    merge_stage: int = option(-1, "Stage of the backbone whose features are compared, from either end.")


@dataclass
class CamSettings(Options):
    """The CAM classifier."""

    backbone: str | None = option(None, "Directory or Hub id of a pretrained backbone.")
    backbone_config: dict[str, Any] | None = option(
        None, "Or a configuration with model_type, to start from random weights."
    )
    output_stride: int | None = option(
        16, "Largest ratio of input size to map size; null leaves the backbone as it is.", at_least=2
    )
    dropout: float = option(
        0.0, "Probability of dropping a channel of the last features in training.", at_least=0, below=1
    )
    classifier_bias: bool = option(False, "The 1x1 convolution to the maps has a bias.")
    classifier_std: float | None = option(
        None, "It starts from N(0, this) without bias; null starts as torch's convolutions do.", above=0
    )
    new_layers: list[str] = option(
        [],
        "Layers of the backbone that no weights are published for, as shell patterns of names: they learn at the rate "
        "of new ones.",
        length=0,
    )
    backbone_layers: list[int] | None = option(
        None,
        "Layers of a plain vision transformer that are the stages which methods read, from 1, negative ones from the "
        "last; null takes four, evenly spaced.",
        length=0,
    )
    methods: dict[str, Any] = option({}, "Method: its options, for example {drs: {mode: fixed}}; null turns one off.")
    method_warmup: float = option(0.0, "Fraction of the training before the methods begin.", at_least=0, below=1)
    superpixels: bool = option(
        False, "Give methods superpixels (ICD uses them): the data's column, or felzenszwalb's."
    )
    felzenszwalb: FelzenszwalbSettings = dataclasses.field(default_factory=FelzenszwalbSettings)
    saliency: bool = option(False, "Give methods the data's column saliency.")
    maps: str = option("cam", "Whose maps make the masks: cam, or a method that has maps (icd, d2cam, seam).")
    background_threshold: float = option(
        0.4, 'Of pipeline("image-segmentation") on the CAM classifier.', at_least=0, at_most=1
    )
    tag_threshold: float = option(0.5, "Probability above which a tag counts as predicted.", at_least=0, at_most=1)
    train: TrainSettings = dataclasses.field(default_factory=TrainSettings)


@dataclass
class RefinerSettings(Options):
    """The map refiner: a second network, like the first without methods, that learns its maps (DRS)."""

    use: bool = option(False, "Train it in `wsss run`; then it makes the masks.")
    scales: list[float] = option([0.8, 1.0, 1.2], "Test-time scales of the maps to learn.", above=0, at_most=8)
    flip: bool = option(False, "Also average with the mirror image.")
    fusion: Literal["mean", "max"] = option("max", "mean | max over scales and mirror images.")
    batch_size: int = speed(16, "Images of an inference batch.", at_least=1)
    from_cam: bool = option(False, "Start from the backbone of the trained CAM classifier.")
    new_std: float | None = option(
        None,
        "The 1x1 convolution and cam.new_layers start from N(0, this) without bias; null: as the classifier's.",
        above=0,
    )
    train: TrainSettings = dataclasses.field(
        default_factory=lambda: TrainSettings(
            epochs=30, lr=1e-4, head_lr_factor=1.0, weight_decay=0.0, schedule="step"
        )
    )


@dataclass
class AffinitySettings(Options):
    """The affinity network, which `wsss run` trains where masks.refine has the step walk without a model."""

    kind: Literal["irn", "affinitynet"] = option("irn", "irn (boundaries) | affinitynet (features)")
    backbone: str | None = option(None, "As cam.backbone, and null takes that; it is frozen.")
    backbone_config: dict[str, Any] | None = option(None, "As cam.backbone_config, and null takes that.")
    from_cam: bool = option(False, "Instead, the backbone of the trained CAM classifier; its boundaries are blurrier.")
    output_stride: int | None = option(16, "As cam.output_stride; without from_cam.", at_least=2)
    radius: int = option(10, "Pairs nearer than this are learnt from, in positions of the grid.", at_least=2)
    foreground_threshold: float = option(
        0.6,
        "Of maps in [0, 1], made as for the masks: what is an object at this threshold is certain.",
        above=0,
        below=1,
    )
    background_threshold: float = option(0.3, "What is background at this threshold is certain.", above=0, below=1)
    alphas: list[float] | None = option(
        None,
        "AffinityNet's instead: certain objects and certain background by background scores (1 - largest map)^alpha.",
        above=0,
        length=2,
        ascending=True,
    )
    refine: list[Any] = option(["pamr"], "Of the scores that give the labels, as masks.refine.", length=0)
    label_confidence: float | None = option(
        None,
        "Or IRN's: the dense CRF of the labels, each of this probability, in place of refine; an image of one tag has "
        "two labels.",
        above=0.5,
        below=1,
    )
    train: TrainSettings = dataclasses.field(
        default_factory=lambda: TrainSettings(
            epochs=3, optimizer="sgd", lr=0.1, head_lr_factor=1.0, momentum=0.0, nesterov=False
        )
    )


@dataclass
class MasksSettings(Options):
    """From maps to pseudo masks."""

    scales: list[float] = option([0.75, 1.0, 1.25], "Test-time scales.", above=0, at_most=8)
    flip: bool = option(True, "Also average with the mirror image.")
    fusion: Literal["mean", "max", "sum"] = option(
        "mean",
        "mean | max over scales and mirror images, of maps divided by their maximum; sum: of maps as they are, then "
        "min-max.",
    )
    native: bool = option(False, "Scale 1 is the image as it is; false: image.size.")
    pad: int = option(
        0, "With native: the mean colour fills shorter sides up to so many pixels, as the network sees it.", at_least=0
    )
    background_threshold: float | Literal["auto"] = option(
        0.4, "Of maps in [0, 1]; auto finds it on the maps, without any mask.", at_least=0, at_most=1
    )
    refine: list[Any] = option(
        [],
        "Refinement steps in order: walk, pamr, crf, grid_crf, matting, with options as {crf: {iterations: 10}}.",
        length=0,
    )
    seeds: str = option(
        "argmax",
        "Label rule: argmax | saliency or drs (with a column saliency) | icd (with cam.maps: icd) | mat_label (with "
        "matting).",
    )
    seed_options: dict[str, Any] = option({}, "Options of the label rule, for example {tie: 0.1}.")
    confidence: bool = option(False, "Also write a column confidence.")
    keep: int = option(0, "Images whose maps, trimaps and alphas are kept as pictures.", at_least=0)
    bf16: bool | None = option(None, "Compute in bfloat16; null does so on GPUs only.")
    optimize: bool = option(
        False, "Fold batch norms and prepack weights: faster on CPUs; masks as the pipelines' but for rounding."
    )
    workers: int = speed(0, "Processes that refine by crf and matting, for each process.", at_least=0)
    batch_size: int = speed(16, "Images of an inference batch.", at_least=1)
    shard_size: int = speed(256, "Images after which finished masks are safe from a kill.", at_least=1)

    def check(self) -> None:
        if self.pad and not self.native:
            raise ValueError(f"pad: expected native: true with it, got {self.pad} and native: false")


@dataclass
class SegmenterSettings(Options):
    """The segmenter that learns from the pseudo masks."""

    backbone: str | None = option(None, "As cam.backbone.")
    backbone_config: dict[str, Any] | None = option(None, "As cam.backbone_config.")
    model: str | None = option(None, "Instead of backbone and head, a segmentation model of transformers.")
    from_cam: bool = option(False, "Start from the backbone of the trained CAM classifier.")
    size: int | None = option(None, "As image.size, where the segmenter's differs.", at_least=1)
    output_stride: int | None = option(16, "As cam.output_stride.", at_least=2)
    head: Literal["deeplab_v1", "deeplab_v2", "deeplab_v3_plus"] = option(
        "deeplab_v2", "deeplab_v1 | deeplab_v2 | deeplab_v3_plus"
    )
    rates: list[int] = option(
        [1, 3, 6, 9], "Dilations of the head's parallel 3x3 convolutions; v1 has one.", at_least=1
    )
    input_scales: list[float] = option(
        [1.0], "The largest logit over these scales counts, in training and afterwards.", above=0, at_most=8
    )
    loss: str = option("cross_entropy", "cross_entropy | symmetric | bootstrapped")
    loss_options: dict[str, Any] = option({}, "Options of the loss, for example {beta: 0.5}.")
    confidence: bool = option(False, "Weight each pixel by the column confidence.")
    min_confidence: float = option(0.0, "Pixels with less confidence are ignored.", at_least=0, at_most=1)
    keep_area: bool = option(
        True,
        "After training, a logit bias on the background keeps the predicted object area from falling below that of "
        "the pseudo masks.",
    )
    train: TrainSettings = dataclasses.field(default_factory=lambda: TrainSettings(epochs=6))


@dataclass
class SelfTrainingSettings(Options):
    """Rounds in which a segmenter labels the images for the next one."""

    rounds: int = option(1, "Segmenters trained one after the other.", at_least=1)
    threshold: float = option(0.5, "Pixels whose label is less probable become 255 (ignore).", at_least=0, at_most=1)
    keep_area: bool = option(True, "Keep the object area of the labels that the segmenter was trained on.")
    scales: list[float] = option([0.75, 1.0, 1.25], "Test-time scales.", above=0, at_most=8)
    flip: bool = option(True, "Also average with the mirror image.")
    window: int | None = option(None, "As evaluation.window; null takes its value.", at_least=0)
    window_stride: int = option(0, "As evaluation.window_stride.", at_least=0)
    refine: list[Any] = option([], "Of the probabilities of the tagged classes, as masks.refine.", length=0)
    workers: int = speed(0, "As masks.workers.", at_least=0)
    batch_size: int = speed(16, "Images of an inference batch.", at_least=1)

    def check(self) -> None:
        _check_window(self.window)


@dataclass
class EvaluationSettings(Options):
    """The test protocol of segmenters."""

    scales: list[float] = option([1.0], "Test-time scales.", above=0, at_most=8)
    flip: bool = option(True, "Also average with the mirror image.")
    window: int = option(
        0, "Side of a sliding window, at least 16 pixels at each scale; 0 takes whole images.", at_least=0
    )
    window_stride: int = option(0, "In pixels; 0 is two thirds of the window.", at_least=0)
    refine: list[Any] = option([], "Of the probabilities, as masks.refine; [crf] is DeepLab's protocol.", length=0)
    workers: int = speed(0, "As masks.workers.", at_least=0)
    batch_size: int = speed(16, "Images of an inference batch.", at_least=1)
    examples: int = option(12, "Images in the report.", at_least=1)

    def check(self) -> None:
        _check_window(self.window)


def _check_window(window: int | None) -> None:
    if window and window < SMALLEST_WINDOW:
        raise ValueError(f"window: expected 0 or at least {SMALLEST_WINDOW} pixels, got {window}")


@dataclass
class RecipeSettings(Options):
    """All sections."""

    seed: int = option(0, "Of weights, data order and augmentation.", at_least=0, at_most=2**32 - 1)
    image: ImageSettings = dataclasses.field(default_factory=ImageSettings)
    toy: ToySettings = dataclasses.field(default_factory=ToySettings)
    cam: CamSettings = dataclasses.field(default_factory=CamSettings)
    refiner: RefinerSettings = dataclasses.field(default_factory=RefinerSettings)
    affinity: AffinitySettings = dataclasses.field(default_factory=AffinitySettings)
    masks: MasksSettings = dataclasses.field(default_factory=MasksSettings)
    segmenter: SegmenterSettings = dataclasses.field(default_factory=SegmenterSettings)
    self_training: SelfTrainingSettings = dataclasses.field(default_factory=SelfTrainingSettings)
    evaluation: EvaluationSettings = dataclasses.field(default_factory=EvaluationSettings)
