"""wsss_hf: image tags in, segmentation model out.

Importing the package registers its models with the Auto classes of transformers, and its pipelines: our models get
their own in `pipeline("image-segmentation")` and `pipeline("image-classification")`, those of others stay as they are;
`pipeline("weak-segmentation")` is new. Everything but the models is imported when it is first asked for.
"""

import importlib
from typing import TYPE_CHECKING

from .models import libraries as _libraries  # noqa: F401  (which imports them faster)
from .models import registration as _registration  # noqa: F401  (what its import does)
from .models.attention import AttentionConfig
from .models.configuration_cam import CamConfig
from .models.configuration_segmenter import SegmenterConfig
from .models.contrast import ContrastConfig
from .models.d2cam import D2camConfig
from .models.drs import DrsConfig
from .models.icd import IcdConfig
from .models.image_processing_wsss import WsssImageProcessor
from .models.methods import Method, TrainingStep, register_method
from .models.modeling_affinity import AffinityConfig, AffinityNetwork
from .models.modeling_cam import CamClassifier, CamOutput
from .models.modeling_map_refiner import MapRefiner, MapRefinerConfig
from .models.modeling_segmenter import Segmenter
from .models.options import Options, option
from .models.pipeline_image_segmentation import MaskPipeline, TagPipeline
from .models.pipeline_weak_segmentation import WeakSegmentationPipeline
from .models.plda import PldaConfig
from .models.seam import SeamConfig
from .models.toco import TocoConfig
from .version import __version__

if TYPE_CHECKING:
    from .data.sources import load_data
    from .data.streams import load_stream
    from .hub.trainer import WsssTrainer
    from .recipes import Recipe
    from .stages.add_saliency import add_saliency
    from .stages.compare import compare
    from .stages.evaluate import evaluate
    from .stages.make_masks import make_masks
    from .stages.predict import predict
    from .stages.relabel import relabel
    from .stages.run import run
    from .stages.train_affinity import train_affinity
    from .stages.train_cam import train_cam
    from .stages.train_refiner import train_refiner
    from .stages.train_segmenter import train_segmenter
    from .training.callbacks import ScheduleCallback, TagCollator

_LAZY = {
    "Recipe": "recipes",
    "ScheduleCallback": "training.callbacks",
    "TagCollator": "training.callbacks",
    "WsssTrainer": "hub.trainer",
    "add_saliency": "stages.add_saliency",
    "compare": "stages.compare",
    "evaluate": "stages.evaluate",
    "load_data": "data.sources",
    "load_stream": "data.streams",
    "make_masks": "stages.make_masks",
    "predict": "stages.predict",
    "relabel": "stages.relabel",
    "run": "stages.run",
    "train_affinity": "stages.train_affinity",
    "train_cam": "stages.train_cam",
    "train_refiner": "stages.train_refiner",
    "train_segmenter": "stages.train_segmenter",
}

__all__ = [
    "__version__",
    "AffinityConfig",
    "AffinityNetwork",
    "AttentionConfig",
    "CamClassifier",
    "CamConfig",
    "CamOutput",
    "ContrastConfig",
    "D2camConfig",
    "DrsConfig",
    "IcdConfig",
    "MapRefiner",
    "MapRefinerConfig",
    "MaskPipeline",
    "Method",
    "Options",
    "PldaConfig",
    "Recipe",
    "ScheduleCallback",
    "SeamConfig",
    "Segmenter",
    "SegmenterConfig",
    "TagCollator",
    "TagPipeline",
    "TocoConfig",
    "TrainingStep",
    "WeakSegmentationPipeline",
    "WsssImageProcessor",
    "WsssTrainer",
    "add_saliency",
    "compare",
    "evaluate",
    "load_data",
    "load_stream",
    "make_masks",
    "option",
    "predict",
    "register_method",
    "relabel",
    "run",
    "train_affinity",
    "train_cam",
    "train_refiner",
    "train_segmenter",
]


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
