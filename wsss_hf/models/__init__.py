"""Ground floor: what travels to the Hub with the weights."""

from .configuration_cam import CamConfig
from .configuration_segmenter import SegmenterConfig
from .d2cam import D2camConfig
from .drs import DrsConfig
from .icd import IcdConfig
from .image_processing_wsss import WsssImageProcessor
from .methods import Method, TrainingStep, register_method
from .modeling_cam import CamClassifier, CamOutput
from .modeling_map_refiner import MapRefiner, MapRefinerConfig
from .modeling_segmenter import Segmenter
from .pipeline_image_segmentation import MaskPipeline, TagPipeline
from .pipeline_weak_segmentation import WeakSegmentationPipeline
from .plda import PldaConfig
from .seam import SeamConfig

__all__ = [
    "CamClassifier",
    "CamConfig",
    "CamOutput",
    "D2camConfig",
    "DrsConfig",
    "IcdConfig",
    "MapRefiner",
    "MapRefinerConfig",
    "MaskPipeline",
    "Method",
    "PldaConfig",
    "SeamConfig",
    "Segmenter",
    "SegmenterConfig",
    "TagPipeline",
    "TrainingStep",
    "WeakSegmentationPipeline",
    "WsssImageProcessor",
    "register_method",
]
