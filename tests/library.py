"""What the lowest version of transformers lacks."""

import pytest
import transformers

needs_segformers_processor = pytest.mark.skipif(
    getattr(transformers.SegformerImageProcessorPil, "is_dummy", False),
    reason="before 5.23, transformers has the image processor of SegFormer and UperNet with torchvision alone",
)
