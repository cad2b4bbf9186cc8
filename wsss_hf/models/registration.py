"""What `import wsss_hf` registers in transformers. Not uploaded with checkpoints."""

from __future__ import annotations

from typing import Any

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
    Pipeline,
)
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration_cam import CamConfig
from .configuration_segmenter import SegmenterConfig
from .image_processing_wsss import WsssImageProcessor
from .mask_classifiers import square_side
from .modeling_affinity import AffinityConfig, AffinityNetwork
from .modeling_cam import CamClassifier
from .modeling_map_refiner import MapRefiner, MapRefinerConfig
from .modeling_segmenter import Segmenter
from .pipeline_image_segmentation import MaskPipeline, TagPipeline
from .pipeline_squares import SquaresPipeline
from .pipeline_weak_segmentation import WeakSegmentationPipeline


def register_for_our_models(task: str, pipeline_class: type[Pipeline]) -> None:
    """Let `pipeline(task)` be a `pipeline_class` with our models, and the library's own with those of others, but for
    EoMT, whose images the library's does not batch.

    transformers reads attributes of the class that is registered, then calls it with the model.
    """
    entry = PIPELINE_REGISTRY.supported_tasks[task]
    library_class: Any = pipeline_class.__bases__[-1]

    def choose(cls, model, *args, **kwargs):
        cut_into_squares = issubclass(SquaresPipeline, library_class) and square_side(model)
        others: Any = SquaresPipeline if cut_into_squares else library_class
        chosen = pipeline_class if hasattr(model, "segmentation_scores") else others
        return chosen(model, *args, **kwargs)

    entry["impl"] = type(pipeline_class.__name__, (pipeline_class,), {"__new__": choose})


for _config_class, _model_class in (
    (CamConfig, CamClassifier),
    (MapRefinerConfig, MapRefiner),
    (SegmenterConfig, Segmenter),
):
    AutoConfig.register(_config_class.model_type, _config_class)
    AutoModel.register(_config_class, _model_class)
    AutoModelForSemanticSegmentation.register(_config_class, _model_class)
    AutoImageProcessor.register(_config_class, image_processor_classes={"pil": WsssImageProcessor})
AutoConfig.register(AffinityConfig.model_type, AffinityConfig)
AutoModel.register(AffinityConfig, AffinityNetwork)
AutoImageProcessor.register(AffinityConfig, image_processor_classes={"pil": WsssImageProcessor})
AutoModelForImageClassification.register(CamConfig, CamClassifier)
register_for_our_models("image-segmentation", MaskPipeline)
register_for_our_models("image-classification", TagPipeline)
PIPELINE_REGISTRY.register_pipeline(
    "weak-segmentation",
    pipeline_class=WeakSegmentationPipeline,
    pt_model=AutoModelForSemanticSegmentation,
    type="image",
)
