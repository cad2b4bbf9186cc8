"""The segmenter: what is trained on the pseudo masks and leaves the house."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import SemanticSegmenterOutput
from transformers.utils.generic import can_return_tuple

from .backbone import Backbone
from .configuration_segmenter import SegmenterConfig
from .hub_mixins import PortableModelMixin
from .maps import IGNORE_INDEX


class Segmenter(PortableModelMixin, PreTrainedModel):
    """DeepLab v2: parallel dilated 3×3 convolutions on the deepest map of any backbone, summed.

    Chen et al., "DeepLab: Semantic Image Segmentation with Deep Convolutional Nets, Atrous Convolution, and Fully
    Connected CRFs", TPAMI 2018, section 3.2.
    """

    config_class = SegmenterConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    auto_classes = ("AutoModel", "AutoModelForSemanticSegmentation")

    def __init__(self, config: SegmenterConfig):
        super().__init__(config)
        self.backbone = Backbone(config.backbone_config, config.output_stride)
        channels = self.backbone.channels[-1]
        self.head = nn.ModuleList(
            nn.Conv2d(channels, config.num_labels, kernel_size=3, padding=rate, dilation=rate) for rate in config.rates
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> SemanticSegmenterOutput:
        """
        Args:
            pixel_values: (B, 3, H, W) normalised images.
            labels: (B, H, W) int64 label maps, 255 is ignored; gives a loss.

        Returns:
            `logits` (B, C+1, h, w) at the backbone's stride, background at channel 0, and `loss`.
        """
        features = self.backbone(pixel_values)
        logits = sum(convolution(features[-1]) for convolution in self.head)
        loss = None
        if labels is not None:
            upsampled = F.interpolate(logits.float(), size=labels.shape[-2:], mode="bilinear", align_corners=False)
            total = F.cross_entropy(upsampled, labels, ignore_index=IGNORE_INDEX, reduction="sum")
            # A batch that is ignored everywhere teaches nothing; the plain mean would be 0 / 0.
            loss = total / (labels != IGNORE_INDEX).sum().clamp_min(1)
        return SemanticSegmenterOutput(
            loss=loss,
            logits=logits,
            hidden_states=features if self._shows_hidden_states(output_hidden_states) else None,
        )

    @property
    def mask_id2label(self) -> dict[int, str]:
        """Names of the values of a mask."""
        return dict(self.config.id2label)

    def segmentation_scores(
        self,
        outputs: SemanticSegmenterOutput,
        size: tuple[int, int],
        tags: Tensor | None = None,
    ) -> Tensor:
        """Probabilities (B, C+1, H, W) whose argmax is the label map; channel 0 is background.

        Args:
            outputs: what `forward` gave.
            size: (H, W) of the label map.
            tags: (B, C) 0/1; classes that are known to be absent get no pixel. None allows all.
        """
        logits = F.interpolate(outputs.logits.float(), size=size, mode="bilinear", align_corners=False)
        if tags is not None:
            allowed = F.pad(tags.to(logits.device).bool(), (1, 0), value=True)
            logits = logits.masked_fill(~allowed[:, :, None, None], float("-inf"))
        return logits.softmax(dim=1)
