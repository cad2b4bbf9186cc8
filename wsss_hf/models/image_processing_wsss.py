"""Image processor of the CAM classifier and the segmenter (PIL backend: torchvision is not needed)."""

from PIL import Image
from transformers import BatchFeature
from transformers.models.segformer.image_processing_pil_segformer import SegformerImageProcessorPil

from .maps import IGNORE_INDEX
from .pictures import opaque


class WsssImageProcessor(SegformerImageProcessorPil):
    """Images of any mode and size → `pixel_values`: RGB, short side at `size`, normalised.

    `size` is that of training: `shortest_edge`, with a `longest_edge` for very long images, or `height` and `width`.
    Label maps (H, W) given as `segmentation_maps` become `labels`, int64, of the same size. With `do_pad=True` images
    of different sizes make one batch: below and to the right follow zeros, and 255 (ignored) in `labels`.
    """

    do_convert_rgb = True
    size = {"shortest_edge": 224, "longest_edge": 1792}
    default_to_square = False

    def convert_to_rgb(self, image, *args, **kwargs):  # transformers 5.23 gives the input's format, 5.20 nothing
        image = opaque(image) if isinstance(image, Image.Image) else image
        return super().convert_to_rgb(image, *args, **kwargs)

    def _preprocess_image_like_inputs(self, *args, do_pad=None, pad_size=None, return_tensors=None, **kwargs):
        found = super()._preprocess_image_like_inputs(*args, **kwargs | {"return_tensors": None})
        if do_pad:
            found["pixel_values"] = self.pad(found["pixel_values"], pad_size)
            if "labels" in found:
                padded = self.pad([labels[None] for labels in found["labels"]], pad_size, fill_value=IGNORE_INDEX)
                found["labels"] = [labels[0] for labels in padded]
        return BatchFeature(dict(found), tensor_type=return_tensors)

    def post_process_semantic_segmentation(self, outputs, target_sizes=None, return_segmentation_scores: bool = False):
        """Label maps (H, W) int64, one per image, from `outputs.logits` (B, C+1, h, w).

        Args:
            target_sizes: (H, W) per image; None keeps (h, w).
            return_segmentation_scores: give `segmentation` and `segmentation_scores`, the logits at its size, instead.

        Raises:
            ValueError: not one target size per image, or the outputs are those of a classifier.
        """
        shape = tuple(outputs.logits.shape)
        if len(shape) != 4:
            raise ValueError(
                f"outputs: expected logits (B, C+1, h, w), got {shape}; label maps of a CAM classifier "
                "are model.segmentation_scores(outputs, size, tags).argmax(1)"
            )
        if target_sizes is not None and len(target_sizes) != shape[0]:
            raise ValueError(f"target_sizes: expected {shape[0]}, one per image, got {len(target_sizes)}")
        exact = BatchFeature({"logits": outputs.logits.float()})
        return super().post_process_semantic_segmentation(exact, target_sizes, return_segmentation_scores)


# Saving a processor then writes this file beside it, so that `trust_remote_code=True` finds the class.
WsssImageProcessor.register_for_auto_class()
