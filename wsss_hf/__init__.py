"""wsss_hf: image tags in, segmentation model out.

Importing the package registers its models with the Auto classes of transformers, and its pipelines: beside
`pipeline("image-segmentation")` and `pipeline("image-classification")`, `pipeline("weak-segmentation")`.
"""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
)
from transformers.pipelines import PIPELINE_REGISTRY

from .models import (
    CamClassifier,
    CamConfig,
    CamOutput,
    D2camConfig,
    DrsConfig,
    IcdConfig,
    MapRefiner,
    MapRefinerConfig,
    MaskPipeline,
    Method,
    PldaConfig,
    SeamConfig,
    Segmenter,
    SegmenterConfig,
    TagPipeline,
    TrainingStep,
    WeakSegmentationPipeline,
    WsssImageProcessor,
    register_method,
)

__version__ = "0.1.0"

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

for _config_class, _model_class in (
    (CamConfig, CamClassifier),
    (MapRefinerConfig, MapRefiner),
    (SegmenterConfig, Segmenter),
):
    AutoConfig.register(_config_class.model_type, _config_class)
    AutoModel.register(_config_class, _model_class)
    AutoModelForSemanticSegmentation.register(_config_class, _model_class)
    AutoImageProcessor.register(_config_class, image_processor_classes={"pil": WsssImageProcessor})
AutoModelForImageClassification.register(CamConfig, CamClassifier)
# Ours does for every other model what the library's own does, so it takes its place without a warning.
PIPELINE_REGISTRY.supported_tasks["image-segmentation"]["impl"] = MaskPipeline
PIPELINE_REGISTRY.supported_tasks["image-classification"]["impl"] = TagPipeline
PIPELINE_REGISTRY.register_pipeline(
    "weak-segmentation",
    pipeline_class=WeakSegmentationPipeline,
    pt_model=AutoModelForSemanticSegmentation,
    type="image",
)
