"""Tagged images in, pseudo masks out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, BaseImageProcessor

from ..data.batches import batches_by_size
from ..models.configuration_cam import CamConfig
from ..models.maps import add_background
from ..models.modeling_cam import CamClassifier
from ..models.modeling_map_refiner import MapRefiner, MapRefinerConfig
from .localization import label_map, localize
from .refine import build_refiner


@dataclass
class Labelled:
    """What labelling made of one image.

    Attributes:
        index: its row in the data set.
        image: the RGB image.
        classes: (K,) indices of its tags.
        maps: (K, H, W) float32 localisation maps in [0, 1], before refinement.
        pseudo_mask: (H, W) uint8, 0 = background, c + 1 = class c.
        confidence: (H, W) float32 in [0, 1], margin of the winning label.
        logits: (C,) float32 tag logits.
    """

    index: int
    image: Image.Image
    classes: np.ndarray
    maps: np.ndarray
    pseudo_mask: np.ndarray
    confidence: np.ndarray
    logits: np.ndarray


def label_images(model: CamClassifier, processor, rows: Dataset, settings: dict) -> Iterator[Labelled]:
    """Label every row of `rows` from its tags; true masks are never read.

    Args:
        model: in eval mode, on the device to work on.
        processor: the model's image processor.
        settings: a recipe's `masks` section.
    """
    views = {key: settings[key] for key in ("scales", "flip", "fusion")}
    refine = build_refiner(settings["refine"])
    for batch in batches_by_size(rows, processor, settings["batch_size"]):
        maps, logits = localize(
            model, batch.pixel_values.to(model.device), batch.tags.to(model.device), batch.size, **views
        )
        per_image = maps.split([int(count) for count in batch.tags.sum(dim=1)])
        for i, (index, image) in enumerate(zip(batch.indices, batch.images, strict=True)):
            classes = batch.tags[i].nonzero()[:, 0].to(model.device)
            scores = add_background(per_image[i][None], settings["background_threshold"])[0]
            labels, confidence = label_map(refine(scores, np.asarray(image)), classes)
            yield Labelled(
                index=index,
                image=image,
                classes=classes.cpu().numpy(),
                maps=per_image[i].cpu().numpy(),
                pseudo_mask=labels.cpu().numpy(),
                confidence=confidence.cpu().numpy(),
                logits=logits[i].cpu().numpy(),
            )


def load_labeler(directory: str, device: torch.device | str, **hub_kwargs) -> tuple[CamClassifier, BaseImageProcessor]:
    """A trained CAM classifier or map refiner in eval mode and its image processor, from a directory or Hub id.

    Raises:
        ValueError: it is another kind of model.
    """
    config = AutoConfig.from_pretrained(directory, **hub_kwargs)
    model_class = MapRefiner if isinstance(config, MapRefinerConfig) else CamClassifier
    if not isinstance(config, CamConfig):
        raise ValueError(f"{directory} is a {config.model_type}; a CAM classifier or a map refiner would be right")
    model = model_class.from_pretrained(directory, **hub_kwargs).to(device, memory_format=torch.channels_last).eval()
    return model, AutoImageProcessor.from_pretrained(directory, **hub_kwargs)
