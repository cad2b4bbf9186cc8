"""What the lowest version of transformers lacks."""

import pytest
import transformers

has_segformers_processor = not getattr(transformers.SegformerImageProcessorPil, "is_dummy", False)
needs_segformers_processor = pytest.mark.skipif(
    not has_segformers_processor,
    reason="before 5.23, transformers needs torchvision for SegFormer's image processor, and for label maps in ours",
)
