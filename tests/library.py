"""What the lowest version of transformers lacks."""

import pytest
import transformers

needs_segformers_processor = pytest.mark.skipif(
    getattr(transformers.SegformerImageProcessorPil, "is_dummy", False),
    reason="before 5.23, transformers needs torchvision for SegFormer's image processor, and for label maps in ours",
)
