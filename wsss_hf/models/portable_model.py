"""What makes our models loadable where this package is not installed."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import IMAGE_PROCESSOR_NAME

from .backbone import TASK, Backbone
from .image_processing_wsss import WsssImageProcessor
from .pipeline_image_segmentation import MaskPipeline, TagPipeline
from .pipeline_weak_segmentation import WeakSegmentationPipeline

_PIPELINES = (
    (TASK, MaskPipeline, "AutoModelForSemanticSegmentation"),
    ("weak-segmentation", WeakSegmentationPipeline, "AutoModelForSemanticSegmentation"),
    ("image-classification", TagPipeline, "AutoModelForImageClassification"),
)
_DOWNLOAD_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
_PUSH_OPTIONS = ("repo_id", "commit_message", "commit_description", "private", "revision", "create_pr")


class PortableModel(PreTrainedModel):
    """A model on a backbone that loads where this package is not installed.

    `save_pretrained` writes, beside weights and config, the image processor and the flat code files that
    `trust_remote_code=True` runs; `push_to_hub` uploads all of it, with a card.

    Attributes:
        image_processor: how images are to be shown to the model. `from_pretrained` finds it beside the weights,
            `from_backbone` takes the normalisation of the backbone; of a model from a configuration it is None.
    """

    auto_classes: tuple[str, ...] = ()
    config: Any
    backbone: Backbone
    image_processor: WsssImageProcessor | None = None
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # `transformers.Trainer` then averages the loss over accumulated batches itself
    # Whatever attention is asked for goes on to the backbone, which refuses what it does not know.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    @classmethod
    def from_backbone(cls, backbone: str, hub_kwargs: dict | None = None, **config_kwargs):
        """A model with a new head on the published weights of a backbone. Needs wsss_hf to be installed.

        Args:
            backbone: directory, or Hub id (`owner/name@revision`).
            hub_kwargs: `revision`, `token`, `cache_dir` … for the download.
            config_kwargs: arguments of the model's configuration.
        """
        pretrained = importlib.import_module("wsss_hf.models.pretrained")
        return pretrained.from_backbone(cls, backbone, hub_kwargs, **config_kwargs)

    def get_input_embeddings(self):
        """None: there are no embeddings of tokens, which FSDP asks for."""

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint, every_n_layers: int = 1
    ):
        checkpointing = importlib.import_module("wsss_hf.models.checkpointing")
        checkpointing.set_checkpointing(self.backbone, enable, gradient_checkpointing_func, every_n_layers)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        options = {key: kwargs[key] for key in _DOWNLOAD_OPTIONS if key in kwargs}
        load = super().from_pretrained
        try:
            load = partial(importlib.import_module("wsss_hf.models.weights").from_safetensors, load)
        except ImportError:
            kwargs["use_safetensors"] = True
        loaded = load(pretrained_model_name_or_path, *model_args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info
        if pretrained_model_name_or_path is not None and not os.path.isfile(pretrained_model_name_or_path):
            try:
                model.image_processor = WsssImageProcessor.from_pretrained(pretrained_model_name_or_path, **options)
            except OSError:  # saved without one
                pass
        return loaded

    def save_pretrained(  # type: ignore[override]
        self, save_directory, is_main_process: bool = True, push_to_hub: bool = False, **kwargs
    ):
        """As `PreTrainedModel.save_pretrained`; a processor that is there stays if the model has none."""
        hub_options = {key: kwargs.pop(key) for key in _PUSH_OPTIONS if key in kwargs}
        classes = {"AutoConfig": type(self.config)} | dict.fromkeys(self.auto_classes, type(self))
        pipelines = [entry for entry in _PIPELINES if entry[2] in self.auto_classes]
        self.config.auto_map = {auto_class: code_reference(cls) for auto_class, cls in classes.items()}
        self.config.custom_pipelines = {
            task: {"impl": code_reference(pipeline_class), "pt": [auto_class], "type": "image"}
            for task, pipeline_class, auto_class in pipelines
        }
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if is_main_process:
            try:
                save_code = importlib.import_module("wsss_hf.models.saved_code").save_code
            except ImportError:
                custom_object_save(self, save_directory)  # what came with the model
            else:
                save_code(self, [*classes.values(), *(entry[1] for entry in pipelines)], Path(save_directory))
            if self.image_processor is not None:
                self.image_processor.save_pretrained(save_directory)
            elif not Path(save_directory, IMAGE_PROCESSOR_NAME).exists():
                processor_for(self.config).save_pretrained(save_directory)
            if push_to_hub:
                repo_id = hub_options.pop("repo_id", Path(save_directory).resolve().name)
                self.push_to_hub(repo_id, token=kwargs.get("token"), **hub_options)

    def push_to_hub(self, repo_id: str, **options):  # type: ignore[override]
        """Upload what `save_pretrained` writes, in one commit; a repository without a card gets a short one.

        The options are those of `PreTrainedModel.push_to_hub`, which does it all where wsss_hf is not installed.
        """
        try:
            importlib.import_module("wsss_hf")
        except ImportError:
            return super().push_to_hub(repo_id, **options)  # type: ignore[misc, arg-type]
        return importlib.import_module("wsss_hf.hub.push").push_loaded_model(self, repo_id, **options)


def processor_for(config, mean: list[float] | None = None, std: list[float] | None = None) -> WsssImageProcessor:
    """For a model that has none yet: the normalisation is that of its configuration, if it names one, or the given."""
    mean, std = getattr(config, "image_mean", mean), getattr(config, "image_std", std)
    return WsssImageProcessor(**({} if mean is None else {"image_mean": mean, "image_std": std}))


def code_reference(cls: type) -> str:
    """The class as a checkpoint names it: file.Class."""
    return f"{cls.__module__.split('.')[-1]}.{cls.__name__}"
