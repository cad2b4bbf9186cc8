"""What every method has in common: what it sees of a step, and what it returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .method_helpers import statistics_kept
from .registry import METHODS

if TYPE_CHECKING:
    from .backbone import Backbone
    from .modeling_cam import CamClassifier

__all__ = ["METHODS", "Method", "TrainingStep", "register_method"]


@dataclass
class TrainingStep:
    """What a method sees of one step.

    Attributes:
        pixel_values: (B, 3, H, W) normalised images.
        images: (B, 3, H, W) the same images in [0, 1], for colour affinities.
        tags: (B, C) float 0/1, the image-level labels.
        features: backbone stage maps, shallow to deep, (B, D_i, h_i, w_i); the last one feeds the classifier.
        cams: (B, C, h, w) CAM logits before the relu, with gradient.
        progress: training progress in [0, 1].
        classify: `classify(pixel_values) -> (features, cams)`, the same network once more, on another view of the
            images; it does not move the running statistics of batch norms.
        superpixels: (B, H, W) int64 superpixel indices, or None.
        saliency: (B, H, W) float in [0, 1], or None.
        localize: `localize(name, pixel_values, features, cams)`, the maps of the method `name` on these images,
            (B, C, h, w); "cam" gives `cams` back. The method sees a step with these images; where their size is not
            that of `pixel_values` above, one without superpixels and saliency.
        second_view: in training, the step on the view of the images that a method asks for, see
            [`Method.second_view`]; its features and CAMs have a gradient too. None where no method does.
    """

    pixel_values: Tensor
    images: Tensor
    tags: Tensor
    features: tuple[Tensor, ...]
    cams: Tensor
    progress: float
    classify: Callable[[Tensor], tuple[tuple[Tensor, ...], Tensor]]
    superpixels: Tensor | None = None
    saliency: Tensor | None = None
    localize: Callable[[str, Tensor, tuple[Tensor, ...], Tensor], Tensor] = lambda name, images, features, cams: cams
    second_view: TrainingStep | None = None

    def of_view(self, pixel_values: Tensor) -> TrainingStep:
        """The step on a view of its images of another size, (B, 3, h, w); it has neither superpixels nor saliency."""
        features, cams = self.classify(pixel_values)
        return dataclasses.replace(
            self,
            pixel_values=pixel_values,
            images=F.interpolate(self.images, pixel_values.shape[-2:], mode="bilinear", align_corners=True),
            features=features,
            cams=cams,
            superpixels=None,
            saliency=None,
        )


def register_method(name: str, config_class: type) -> Callable[[type], type]:
    """Class decorator: from now on `CamConfig(name=config_class(...))` trains with the decorated method.

    Args:
        config_class: a dataclass of [`Options`].

    Raises:
        TypeError: `config_class` is something else.
        ValueError: another class has the name.
    """
    if not hasattr(config_class, "from_dict"):
        raise TypeError(f"{name}: expected a dataclass that inherits from wsss_hf.Options, got {config_class!r}")

    def register(module_class: type) -> type:
        other = METHODS.get(name, (None, module_class))[1]
        # A notebook may run its cell again.
        if (other.__module__, other.__qualname__) != (module_class.__module__, module_class.__qualname__):
            raise ValueError(
                f"method {name!r}: expected a new name, got that of {other.__module__}.{other.__qualname__}"
            )
        METHODS[name] = (config_class, module_class)
        return module_class

    return register


class Method(nn.Module):
    """Base of all methods: turns features, maps and tags into named losses and, if it has any, better maps.

    Args:
        config: the method's options. A method that fills in what depends on the backbone puts a completed copy into
            `self.config`; the model saves that.
        backbone: the [`Backbone`] of the model; read its `channels` and `strides`, do not keep it.
        num_classes: number of object classes C.

    Attributes:
        active: False while the training is in the warmup that comes before the methods.
        leads: True if its losses are computed before those of others. Set it for a method with an extra forward pass
            without gradient: its memory is free again before the others keep their activations.
        scheduled: True if its losses depend on `step.progress`; a training that never sets the model's progress then
            gets a warning.
        stages_suffice: True if training needs no more of the backbone than the stage maps of the images, and of views
            of them that never change. What a frozen backbone makes of an image is then computed once.
        paper: where it was published, for the cards of models trained with it.
    """

    active: bool = True
    config: Any  # its options
    leads: ClassVar[bool] = False
    scheduled: ClassVar[bool] = False
    stages_suffice: bool = False
    paper: ClassVar[str | None] = None

    def __init__(self, config, backbone: Backbone, num_classes: int):
        super().__init__()
        self.config = config
        self.num_classes = num_classes

    @classmethod
    def has_maps(cls) -> bool:
        """Whether it gives localisation maps."""
        return cls.maps is not Method.maps

    def reset_parameters(self):
        """Initialise, with `torch.nn.init`, what needs other values than N(0, 0.01) or has no weight matrix."""

    def start_from(self, backbone: Backbone) -> set[str]:
        """Take, before a training, what starts from the weights of the backbone, which are loaded by now.

        Returns:
            the names of the method's parameters that learn at the rate of pretrained layers.
        """
        return set()

    @staticmethod
    def step(
        model: CamClassifier,
        pixel_values: Tensor,
        tags: Tensor | None,
        features: tuple[Tensor, ...],
        cams: Tensor,
        superpixels: Tensor | None,
        saliency: Tensor | None,
    ) -> TrainingStep:
        """What the methods of a model see of a batch; without tags every class may be there."""
        config = model.config
        mean, std = (pixel_values.new_tensor(v)[:, None, None] for v in (config.image_mean, config.image_std))

        def in_unit_range(pixel_values: Tensor) -> Tensor:
            return (pixel_values * std + mean).clamp(0, 1)

        def classify(view: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
            with statistics_kept(model.backbone):
                return model.classify(view)

        step = TrainingStep(
            pixel_values=pixel_values,
            images=in_unit_range(pixel_values),
            tags=torch.ones_like(cams[:, :, 0, 0]).float() if tags is None else tags.float(),
            features=features,
            cams=cams,
            progress=max(0.0, model.progress - config.method_warmup) / (1 - config.method_warmup),
            classify=classify,
            superpixels=superpixels,
            saliency=saliency,
        )

        def localize(name: str, pixel_values: Tensor, features: tuple[Tensor, ...], cams: Tensor) -> Tensor:
            if name == "cam":
                return cams
            view = dataclasses.replace(step, features=features, cams=cams, second_view=None)
            if pixel_values is not step.pixel_values:
                view.pixel_values, view.images = pixel_values, in_unit_range(pixel_values)
            if pixel_values.shape[-2:] != step.pixel_values.shape[-2:]:
                view.superpixels = view.saliency = None
            return model.methods[name].maps(view)

        step.localize = localize
        if model.training:
            asked = (method.second_view(pixel_values) for method in model.methods.values())
            view = next((values for values in asked if values is not None), None)
            step.second_view = None if view is None else step.of_view(view)
        return step

    def second_view(self, pixel_values: Tensor) -> Tensor | None:
        """(B, 3, h, w): the images at another size, if the method wants the network to be trained on these too.

        The network sees one such view in a step, which would cost as much again for each: that of the first method, in
        the order of their names, or for methods of your own of their registration, that asks. Every method finds it in
        `step.second_view`.
        """
        return None

    def losses(self, step: TrainingStep) -> dict[str, Tensor]:
        """Named, weighted, scalar float32 losses of this step; one named `classification` replaces the model's own."""
        return {}

    def maps(self, step: TrainingStep) -> Tensor | None:
        """(B, C, h, w) non-negative localisation maps that are better than the CAM, or None."""
        return None
