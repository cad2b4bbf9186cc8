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
from ..inference.cam_maps import average_maps, label_map, localize
from ..inference.optimize import for_inference
from ..models.backbone import pinned
from ..models.configuration_cam import CamConfig
from ..models.maps import IGNORE_INDEX, add_background
from ..models.modeling_cam import CamClassifier
from ..models.modeling_map_refiner import MapRefiner, MapRefinerConfig
from .refinement import Chain, Matting, Note, build_refiner
from .rules import Evidence, SeedError, SeedRule, build_seeds


@dataclass
class Labelled:
    """What labelling made of one image.

    Attributes:
        index: its row in the data set.
        image: the RGB image.
        classes: (K,) indices of its tags.
        maps: (K, H, W) float32 localisation maps in [0, 1], before refinement.
        pseudo_mask: (H, W) uint8, 0 = background, c + 1 = class c, 255 = open.
        confidence: (H, W) float32 in [0, 1], see `localization.label_map`; 0 at open pixels.
        logits: (C,) float32 tag logits.
        note: fallbacks that were taken, and pictures of the steps.
    """

    index: int
    image: Image.Image
    classes: np.ndarray
    maps: np.ndarray
    pseudo_mask: np.ndarray
    confidence: np.ndarray
    logits: np.ndarray
    note: Note


def label_images(model: CamClassifier, processor, rows: Dataset, settings: dict) -> Iterator[Labelled]:
    """Label every row of `rows` from its tags; true masks are never read.

    Args:
        model: in eval mode, on the device to work on.
        processor: the model's image processor.
        settings: a recipe's `masks` section, its background threshold a number (see `auto_threshold`).

    Raises:
        DataError: an image does not decode, or the seed rule needs a saliency that is missing; names the row.
        ValueError: refinement or seeds can't be had with this model or installation.
    """
    views = {key: settings[key] for key in ("scales", "flip", "bf16")}
    refine, seeds = build_rules(settings)
    has_saliency = "saliency" in rows.column_names
    reads_saliency = seeds.saliency == "needed" or (seeds.saliency == "optional" and has_saliency)
    for batch in batches_by_size(rows, processor, settings["batch_size"], reads_saliency):
        pixel_values, tags = batch.pixel_values.to(model.device), batch.tags.to(model.device)
        counts = [int(count) for count in batch.tags.sum(dim=1)]
        maps, logits = localize(model, pixel_values, tags, batch.size, **views, fusion=settings["fusion"])
        per_image, averages = maps.split(counts), [None] * len(counts)
        if seeds.averages:
            both = average_maps(model, pixel_values, tags, batch.size, **views)
            averages = list(zip(*(part.split(counts) for part in both), strict=True))
        notes = [Note() for _ in counts]
        images = [np.asarray(image) for image in batch.images]
        scores = [add_background(one[None], settings["background_threshold"])[0] for one in per_image]
        refined = refine.batch(scores, images, notes)
        for i, index in enumerate(batch.indices):
            classes = tags[i].nonzero()[:, 0]
            if zeros := int((per_image[i].flatten(1).amax(dim=1) == 0).sum()):
                notes[i].fallbacks["map of zeros"] = zeros
            saliency = None if batch.saliency is None else batch.saliency[i].to(model.device)
            labels = seeds.label(Evidence(refined[i], classes, len(tags[i]), images[i], saliency, averages[i]))
            confidence = label_map(refined[i], classes)[1].masked_fill(labels == IGNORE_INDEX, 0)
            yield Labelled(
                index=index,
                image=batch.images[i],
                classes=classes.cpu().numpy(),
                maps=per_image[i].cpu().numpy(),
                pseudo_mask=labels.cpu().numpy(),
                confidence=confidence.cpu().numpy(),
                logits=logits[i].cpu().numpy(),
                note=notes[i],
            )


def build_rules(settings: dict) -> tuple[Chain, SeedRule]:
    """The refinement and the seed rule that a recipe's `masks` section names.

    Raises:
        RefinementError, SeedError: one of them can't be had, or they don't fit.
    """
    refine = build_refiner(settings["refine"], settings["workers"])
    seeds = build_seeds(settings["seeds"], settings["seed_options"])
    if seeds.alphas and not (refine.refiners and isinstance(refine.refiners[-1], Matting)):
        raise SeedError(
            f"masks.seeds: {settings['seeds']} reads alphas; matting as the last step of masks.refine would be right"
        )
    return refine, seeds


def load_labeler(directory: str, device: torch.device | str, **hub_kwargs) -> tuple[CamClassifier, BaseImageProcessor]:
    """A trained CAM classifier or map refiner, ready for inference only, and its image processor, from a directory or
    Hub id.

    Raises:
        ValueError: it is another kind of model.
    """
    directory, hub_kwargs = pinned(directory, hub_kwargs)
    config = AutoConfig.from_pretrained(directory, **hub_kwargs)
    model_class = MapRefiner if isinstance(config, MapRefinerConfig) else CamClassifier
    if not isinstance(config, CamConfig):
        raise ValueError(f"{directory} is a {config.model_type}; a CAM classifier or a map refiner would be right")
    model = for_inference(model_class.from_pretrained(directory, **hub_kwargs), device)
    return model, AutoImageProcessor.from_pretrained(directory, **hub_kwargs)
