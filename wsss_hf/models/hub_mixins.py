"""What makes our configurations and models loadable by a stranger who has not installed this package."""

from __future__ import annotations

from collections.abc import Callable

from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig
from transformers.dynamic_module_utils import custom_object_save
from transformers.pipelines import PIPELINE_REGISTRY

from .backbone import from_safetensors, pretrained_body, resolve_backbone_config
from .pipeline_weak_segmentation import WeakSegmentationPipeline
from .pipeline_wsss import MaskPipeline, TagPipeline

_TASK = "image-segmentation"  # what our models are for where nobody says more
_PIPELINES = (
    (_TASK, MaskPipeline, "AutoModelForSemanticSegmentation"),
    ("weak-segmentation", WeakSegmentationPipeline, "AutoModelForSemanticSegmentation"),
    ("image-classification", TagPipeline, "AutoModelForImageClassification"),
)


class BackboneConfigMixin:
    """A configuration that holds the configuration of a backbone."""

    sub_configs = {"backbone_config": AutoConfig}

    def _set_backbone(self, backbone: str | None, backbone_config) -> None:
        # transformers builds a configuration without arguments to learn its defaults.
        given = backbone is not None or backbone_config is not None
        self.backbone_config = resolve_backbone_config(backbone, backbone_config) if given else None

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        values, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        # `pipeline(model=…)` without a task, which then is None here, takes a model's only custom pipeline, never one
        # of several.
        if "_from_pipeline" in kwargs and kwargs["_from_pipeline"] is None and "custom_pipelines" in values:
            values["custom_pipelines"] = {_TASK: values["custom_pipelines"][_TASK]}
        return values, unused

    @staticmethod
    def _completed(kwargs: dict) -> dict:
        """The arguments that `PreTrainedConfig` gets."""
        kwargs.setdefault("initializer_range", 0.01)  # of heads and controllers, as all four papers have it
        if kwargs.get("id2label"):
            kwargs["label2id"] = {name: int(index) for index, name in kwargs["id2label"].items()}
        # Where the package is installed its pipeline is in the registry; only remote code finds it by its file.
        registered = PIPELINE_REGISTRY.supported_tasks[_TASK]["impl"]
        if getattr(registered, "__name__", None) == MaskPipeline.__name__:
            kwargs.pop("custom_pipelines", None)
        return kwargs


class PortableModelMixin:
    """A model on a backbone that strangers can load.

    `save_pretrained` writes, beside weights and config, the flat code files that `trust_remote_code=True` runs.
    """

    auto_classes: tuple[str, ...] = ()
    supports_gradient_checkpointing = True
    # Whatever attention is asked for goes on to the backbone, which refuses what it does not know.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    @classmethod
    def from_backbone(cls, backbone: str, hub_kwargs: dict | None = None, **config_kwargs):
        """A model with a new head on the published weights of a backbone.

        Args:
            backbone: directory or Hub id.
            hub_kwargs: `revision`, `token`, `cache_dir` … for the download.
            config_kwargs: arguments of the model's configuration.
        """
        hub_kwargs = hub_kwargs or {}
        backbone_config = resolve_backbone_config(backbone, config_kwargs.pop("backbone_config", None), **hub_kwargs)
        model = cls(cls.config_class(backbone_config=backbone_config, **config_kwargs))
        body = pretrained_body(backbone, model.config.backbone_config, **hub_kwargs)
        model.backbone.body.load_state_dict(body.state_dict())
        return model

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint, every_n_layers: int = 1
    ):
        """What `activation_checkpointing_enable` and `_disable` of transformers call."""
        self.backbone.set_checkpointing(enable, gradient_checkpointing_func, every_n_layers)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        return from_safetensors(super().from_pretrained, pretrained_model_name_or_path, *model_args, **kwargs)

    def _shows_hidden_states(self, asked: bool | None) -> bool:
        return self.config.output_hidden_states if asked is None else asked

    def save_pretrained(self, save_directory, is_main_process: bool = True, **kwargs):
        classes = {"AutoConfig": type(self.config)} | dict.fromkeys(self.auto_classes, type(self))
        self.config.auto_map = {auto_class: _code_reference(cls) for auto_class, cls in classes.items()}
        self.config.custom_pipelines = {
            task: {"impl": _code_reference(pipeline_class), "pt": [auto_class], "type": "image"}
            for task, pipeline_class, auto_class in _PIPELINES
            if auto_class in self.auto_classes
        }
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if is_main_process:
            custom_object_save(self, save_directory)


def _code_reference(cls: type) -> str:
    return f"{cls.__module__.split('.')[-1]}.{cls.__name__}"
