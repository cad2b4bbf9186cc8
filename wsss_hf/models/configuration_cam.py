"""Configuration of the CAM classifier."""

from __future__ import annotations

import dataclasses

from transformers import PreTrainedConfig
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from .backbone import BackboneConfigMixin
from .registry import METHODS


class CamConfig(BackboneConfigMixin, PreTrainedConfig):
    """Configuration of a [`CamClassifier`]: a backbone, the classes, and the methods that are on.

    Args:
        backbone: directory or Hub id whose configuration is read; its weights come with `CamClassifier.from_backbone`.
        backbone_config: the backbone's configuration itself (or a dict with `model_type`) instead.
        output_stride: largest allowed input size / map size; None leaves the backbone as it is.
        backbone_layers: layers of a plain vision transformer that become stages, see [`Backbone`]; None takes four.
        classifier_bias: whether the 1×1 convolution to the maps has a bias, as in some released networks.
        dropout: probability of dropping a channel of the last features in training, before the 1×1 convolution.
        method_warmup: share of the training, in [0, 1), in which only the tags teach. The methods begin after it, and
            their progress counts from there: they work on maps, which a network from random weights does not have.
        maps: whose localisation maps are used: "cam", or the name of a method that is on and has maps.
        background_threshold: where every normalised map is below it, `segmentation_scores` says background.
        tag_threshold: probability above which a tag counts as predicted.
        image_mean, image_std: the normalisation of `pixel_values`, per channel, for images in [0, 1].
        attention, contrast, d2cam, drs, icd, plda, seam, toco: options of the methods, and under its name those of any
            other registered method, as its dataclass ([`DrsConfig`] …) or a dict; None is off.
        kwargs: `id2label` (object classes only; background is none of them), and whatever `PreTrainedConfig` takes.

    Raises:
        ValueError: an option is unknown or out of range.
    """

    model_type = "wsss_cam"
    # An evaluation by `transformers.Trainer` then collects the logits alone.
    keys_to_ignore_at_inference = ["cams", "maps", "losses", "hidden_states"]

    def __init__(
        self,
        backbone: str | None = None,
        backbone_config: PreTrainedConfig | dict | None = None,
        output_stride: int | None = None,
        backbone_layers: list[int] | None = None,
        classifier_bias: bool = False,
        dropout: float = 0.0,
        method_warmup: float = 0.0,
        maps: str = "cam",
        background_threshold: float = 0.4,
        tag_threshold: float = 0.5,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
        **kwargs,
    ):
        self._set_backbone(backbone, backbone_config)
        self.output_stride = output_stride
        self.backbone_layers = backbone_layers
        self.classifier_bias = classifier_bias
        for name in METHODS:
            setattr(self, name, _options(name, kwargs.pop(name, None)))
        for name, value in (("method_warmup", method_warmup), ("dropout", dropout)):
            if not 0 <= value < 1:
                raise ValueError(f"{name}: expected a number in [0, 1), got {value!r}")
        self.method_warmup, self.dropout = method_warmup, dropout
        sources = {"maps": maps} | {f"{name}.maps": getattr(o, "maps", "cam") for name, o in self.methods.items()}
        for option, source in sources.items():
            if source != "cam" and (source not in self.methods or not METHODS[source][1].has_maps()):
                able = [name for name in self.methods if METHODS[name][1].has_maps()]
                raise ValueError(
                    f"{option}: expected cam or a method that is on and has maps ({', '.join(able) or 'none is'}), "
                    f"got {source!r}"
                )
        self.maps = maps
        self.background_threshold = background_threshold
        self.tag_threshold = tag_threshold
        self.image_mean = list(image_mean or IMAGENET_DEFAULT_MEAN)
        self.image_std = list(image_std or IMAGENET_DEFAULT_STD)
        kwargs.setdefault("problem_type", "multi_label_classification")
        super().__init__(**self._completed(kwargs))

    @classmethod
    def from_dict(cls, config_dict, **kwargs):  # what was saved before there was a choice has one stage
        return super().from_dict({"backbone_layers": []} | config_dict, **kwargs)

    @property
    def methods(self) -> dict:
        """Name → options of every method that is on."""
        # `from_pretrained(..., drs={...})` sets the plain dict.
        options = {name: _options(name, getattr(self, name, None)) for name in METHODS}
        return {name: value for name, value in options.items() if value is not None}

    def to_dict(self) -> dict:
        values = super().to_dict()
        for name in METHODS:
            values.pop(name, None)
        return values | {name: dataclasses.asdict(options) for name, options in self.methods.items()}


def _options(name: str, given):
    """The options of the method `name` as its dataclass; None is off."""
    options_class = METHODS[name][0]
    return given if given is None or isinstance(given, options_class) else options_class.from_dict(given, name)
