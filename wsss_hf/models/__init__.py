"""Ground floor: what travels to the Hub with the weights."""

from .configuration_cam import CamConfig
from .configuration_segmenter import SegmenterConfig
from .drs import DrsConfig
from .image_processing_wsss import WsssImageProcessor
from .methods import Method, TrainingStep, register_method
from .modeling_cam import CamClassifier, CamOutput
from .modeling_segmenter import Segmenter
from .pipeline_wsss import WeakSegmentationPipeline

__all__ = [
    "CamClassifier",
    "CamConfig",
    "CamOutput",
    "DrsConfig",
    "Method",
    "Segmenter",
    "SegmenterConfig",
    "TrainingStep",
    "WeakSegmentationPipeline",
    "WsssImageProcessor",
    "register_method",
]
