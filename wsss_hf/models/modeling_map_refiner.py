"""The map refiner: learns the localisation maps of a CAM classifier, and so what they have in common over all images.

Refinement learning of Kim, Han and Kim, "Discriminative Region Suppression for Weakly-Supervised Semantic
Segmentation", AAAI 2021, section 3.3.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F
from transformers.utils.generic import can_return_tuple

from .configuration_cam import CamConfig
from .modeling_cam import CamClassifier, CamOutput


class MapRefinerConfig(CamConfig):
    """Configuration of a [`MapRefiner`]: that of a CAM classifier without methods.

    `tag_threshold` is the value that a map must reach somewhere for its tag to count as predicted.

    Raises:
        ValueError: a method is on.
    """

    model_type = "wsss_map_refiner"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.methods:
            raise ValueError(f"map refiner: expected no methods, got {', '.join(self.methods)}")


class MapRefiner(CamClassifier):
    """The network of a CAM classifier without methods, whose maps are trained to be another network's maps.

    It takes the CAM classifier's place in making masks. Its maps are used as they are: divided by its maximum, the map
    of a class that the network denies would come back at full strength.
    """

    normalizes_maps = False
    config_class = MapRefinerConfig
    auto_classes: tuple[str, ...] = ("AutoModel", "AutoModelForSemanticSegmentation")

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        targets: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> CamOutput:
        """
        Args:
            pixel_values: (B, 3, H, W) normalised images.
            targets: (B, C, H', W') localisation maps in [0, 1], 0 for untagged classes; gives a loss.
            output_hidden_states: also return the stage maps of the backbone.

        Returns:
            `maps` and `cams` (B, C, h, w), the predicted maps, meant to lie in [0, 1]; `logits` (B, C), whose sigmoid
            is the highest value of each map; and `loss`, the mean squared error at the size of the targets.

        Raises:
            ValueError: the targets are those of other images or classes.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        features, maps = self.classify(pixel_values)
        losses = None
        if targets is not None:
            if targets.ndim != 4 or targets.shape[:2] != maps.shape[:2]:
                expected = f"({len(maps)}, {maps.shape[1]}, H, W)"
                raise ValueError(f"targets: expected shape {expected}, got {tuple(targets.shape)}")
            predicted = F.interpolate(maps.float(), size=targets.shape[-2:], mode="bilinear", align_corners=False)
            losses = {"refinement": F.mse_loss(predicted, targets.float())}
        return CamOutput(
            loss=None if losses is None else losses["refinement"],
            logits=maps.float().amax(dim=(-2, -1)).logit(eps=1e-6),
            cams=maps,
            maps=maps,
            losses=losses,
            hidden_states=features if output_hidden_states else None,
        )
