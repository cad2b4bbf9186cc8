"""What `evaluate.load("wsss_hf/evaluation", class_names=[...])` finds in this folder: [`MeanIoU`].

The other metrics are loaded by their files: boundary_f.py, thresholds.py, classification.py.
"""

from .mean_iou import MeanIoU
from .streaming import StreamingMetric

__all__ = ["MeanIoU", "StreamingMetric"]
