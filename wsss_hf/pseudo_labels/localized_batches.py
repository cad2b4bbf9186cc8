"""Tagged images in, their maps out, in batches: what thresholds, pseudo masks and affinity labels begin with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from datasets import Dataset
from torch import Tensor

from ..data.batches import ImageBatch, batches_by_size
from ..inference.cam_maps import localize
from ..models.modeling_cam import CamClassifier
from ..settings import MasksSettings


def localized_batches(
    model: CamClassifier, processor: Callable, rows: Dataset, settings: MasksSettings, saliency: bool = False
) -> Iterator[tuple[ImageBatch, list[Tensor], Tensor]]:
    """All rows, in batches of images of one size, with the maps of their tags.

    Args:
        model: in eval mode, on the device to work on.
        processor: the model's image processor.
        settings: how the maps are made.
        saliency: also read the column of that name.

    Yields:
        the images, their tensors on the model's device; of each image the maps of its tagged classes, (K, H, W)
        float32, as of [`localize`]; and the tag logits (B, C).

    Raises:
        DataError: as of [`batches_by_size`].
        OptionError, ValueError: as of [`localize`].
    """
    augmentation = settings.scales, settings.flip, settings.fusion, settings.bf16, settings.pad
    for batch in batches_by_size(rows, processor, settings.batch_size, saliency, settings.native):
        counts = [int(count) for count in batch.tags.sum(dim=1)]
        salient = None if batch.saliency is None else batch.saliency.to(model.device)
        pixel_values, tags = batch.pixel_values.to(model.device), batch.tags.to(model.device)
        batch = replace(batch, pixel_values=pixel_values, tags=tags, saliency=salient)
        maps, logits = localize(model, batch.pixel_values, batch.tags, batch.size, *augmentation)
        yield batch, list(maps.split(counts)), logits
