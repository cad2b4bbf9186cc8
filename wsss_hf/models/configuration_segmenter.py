"""Configuration of the segmenter."""

from __future__ import annotations

from transformers import PreTrainedConfig

from .backbone import BackboneConfigMixin
from .deeplab import HEADS


class SegmenterConfig(BackboneConfigMixin, PreTrainedConfig):
    """Configuration of a [`Segmenter`].

    Args:
        backbone: directory or Hub id whose configuration is read; its weights come with `Segmenter.from_backbone`.
        backbone_config: the backbone's configuration itself (or a dict with `model_type`) instead.
        output_stride: largest allowed input size / deepest map size; None leaves the backbone as it is.
        head: "deeplab_v1", "deeplab_v2" or "deeplab_v3_plus".
        rates: dilations of the head's parallel 3×3 convolutions; None takes the paper's (6 12 18 24 for v2 at output
            stride 8; 6 12 18 for v3+ at output stride 16; the one of v1 is 12).
        input_scales: the logits are the maximum over the image at each of these scales (DeepLab v2, section 4.3, takes
            0.5 0.75 1); None is the image alone.
        kwargs: `id2label`, background at 0, and whatever `PreTrainedConfig` takes.

    Raises:
        ValueError: the head is unknown, or a rate or scale is not positive.
    """

    model_type = "wsss_segmenter"

    def __init__(
        self,
        backbone: str | None = None,
        backbone_config: PreTrainedConfig | dict | None = None,
        output_stride: int | None = None,
        head: str = "deeplab_v2",
        rates: list[int] | None = None,
        input_scales: list[float] | None = None,
        **kwargs,
    ):
        if head not in HEADS:
            raise ValueError(f"head: expected {' or '.join(HEADS)}, got {head!r}")
        self._set_backbone(backbone, backbone_config)
        self.output_stride = output_stride
        self.head = head
        self.rates = list(rates or HEADS[head].default_rates)
        self.input_scales = list(input_scales or (1.0,))
        for name, values in (("rates", self.rates), ("input_scales", self.input_scales)):
            if min(values) <= 0:
                raise ValueError(f"{name}: expected numbers > 0, got {values}")
        super().__init__(**self._completed(kwargs))
