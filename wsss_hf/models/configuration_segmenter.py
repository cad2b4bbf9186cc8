"""Configuration of the segmenter."""

from __future__ import annotations

from transformers import PreTrainedConfig

from .hub_mixins import BackboneConfigMixin


class SegmenterConfig(BackboneConfigMixin, PreTrainedConfig):
    """Configuration of a [`Segmenter`].

    Args:
        backbone: directory or Hub id whose configuration is read; its weights come with `Segmenter.from_backbone`.
        backbone_config: the backbone's configuration itself (or a dict with `model_type`) instead.
        output_stride: largest allowed input size / deepest map size; None leaves the backbone as it is.
        rates: dilations of the parallel 3×3 convolutions (DeepLab v2 takes 6 12 18 24 at 321 pixels and stride 8).
        kwargs: `id2label`, background at 0, and whatever `PreTrainedConfig` takes.
    """

    model_type = "wsss_segmenter"

    def __init__(
        self,
        backbone: str | None = None,
        backbone_config: PreTrainedConfig | dict | None = None,
        output_stride: int | None = None,
        rates: list[int] | None = None,
        **kwargs,
    ):
        self._set_backbone(backbone, backbone_config)
        self.output_stride = output_stride
        self.rates = list(rates or (6, 12, 18, 24))
        super().__init__(**self._completed(kwargs))
