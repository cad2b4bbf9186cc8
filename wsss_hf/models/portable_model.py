"""What makes our configurations and models loadable by a stranger who has not installed this package."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi, ModelCard, ModelCardData
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig
from transformers.dynamic_module_utils import custom_object_save
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.utils import IMAGE_PROCESSOR_NAME

from .backbone import from_safetensors, pinned, pretrained_body, resolve_backbone_config
from .image_processing_wsss import WsssImageProcessor, backbone_normalization
from .pipeline_image_segmentation import MaskPipeline, TagPipeline
from .pipeline_weak_segmentation import WeakSegmentationPipeline

_TASK = "image-segmentation"  # what our models are for where nobody says more
_PIPELINES = (
    (_TASK, MaskPipeline, "AutoModelForSemanticSegmentation"),
    ("weak-segmentation", WeakSegmentationPipeline, "AutoModelForSemanticSegmentation"),
    ("image-classification", TagPipeline, "AutoModelForImageClassification"),
)
_DOWNLOAD_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
_PUSH_OPTIONS = ("repo_id", "commit_message", "commit_description", "private", "revision", "create_pr")


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

    def to_dict(self) -> dict:
        values = super().to_dict()
        # As at the top level: where the backbone came from may be a path of this machine.
        if isinstance(values.get("backbone_config"), dict):
            values["backbone_config"].pop("_name_or_path", None)
        return values

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

    `save_pretrained` writes, beside weights and config, the image processor and the flat code files that
    `trust_remote_code=True` runs; `push_to_hub` uploads all of it, with a card.

    Attributes:
        image_processor: how images are to be shown to the model. `from_pretrained` finds it beside the weights,
            `from_backbone` takes the normalisation of the backbone; of a model from a configuration it is None.
    """

    auto_classes: tuple[str, ...] = ()
    image_processor: WsssImageProcessor | None = None
    supports_gradient_checkpointing = True
    # Whatever attention is asked for goes on to the backbone, which refuses what it does not know.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    @classmethod
    def from_backbone(cls, backbone: str, hub_kwargs: dict | None = None, **config_kwargs):
        """A model with a new head on the published weights of a backbone.

        Args:
            backbone: directory, or Hub id (`owner/name@revision`).
            hub_kwargs: `revision`, `token`, `cache_dir` … for the download.
            config_kwargs: arguments of the model's configuration.
        """
        backbone, hub_kwargs = pinned(backbone, hub_kwargs or {})
        backbone_config = resolve_backbone_config(backbone, config_kwargs.pop("backbone_config", None), **hub_kwargs)
        config = cls.config_class(backbone_config=backbone_config, **config_kwargs)
        mean, std = backbone_normalization(backbone, backbone_config, **hub_kwargs)
        for key, value in (("image_mean", mean), ("image_std", std)):
            if hasattr(config, key) and key not in config_kwargs:
                setattr(config, key, value)
        model = cls(config)
        body = pretrained_body(backbone, config.backbone_config, **hub_kwargs)
        model.backbone.body.load_state_dict(body.state_dict())
        model.image_processor = _processor_for(config, mean, std)
        return model

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint, every_n_layers: int = 1
    ):
        """What `activation_checkpointing_enable` and `_disable` of transformers call."""
        self.backbone.set_checkpointing(enable, gradient_checkpointing_func, every_n_layers)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        options = {key: kwargs[key] for key in _DOWNLOAD_OPTIONS if key in kwargs}
        loaded = from_safetensors(super().from_pretrained, pretrained_model_name_or_path, *model_args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info
        if pretrained_model_name_or_path is not None and not os.path.isfile(pretrained_model_name_or_path):
            try:
                model.image_processor = WsssImageProcessor.from_pretrained(pretrained_model_name_or_path, **options)
            except OSError:  # saved without one
                pass
        return loaded

    def _shows_hidden_states(self, asked: bool | None) -> bool:
        return self.config.output_hidden_states if asked is None else asked

    def save_pretrained(self, save_directory, is_main_process: bool = True, push_to_hub: bool = False, **kwargs):
        """As `PreTrainedModel.save_pretrained`; a processor that is there stays if the model has none."""
        hub_options = {key: kwargs.pop(key) for key in _PUSH_OPTIONS if key in kwargs}
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
            if self.image_processor is not None:
                self.image_processor.save_pretrained(save_directory)
            elif not Path(save_directory, IMAGE_PROCESSOR_NAME).exists():
                _processor_for(self.config).save_pretrained(save_directory)
            if push_to_hub:
                repo_id = hub_options.pop("repo_id", Path(save_directory).resolve().name)
                self.push_to_hub(repo_id, token=kwargs.get("token"), **hub_options)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str = "50GB",
        tags: list[str] | None = None,
    ) -> CommitInfo:
        """Upload what `save_pretrained` writes, in one commit; files that the repository has already are not sent.

        The options are those of `PreTrainedModel.push_to_hub`. A repository without a card gets a short one, which
        claims nothing; `wsss push` writes one with the figures of the run.
        """
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            if not api.file_exists(repo_id, "README.md", revision=revision):
                _short_card(self, repo_id, [*(self.model_tags or []), *(tags or [])]).save(f"{folder}/README.md")
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message or "Upload model",
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
            )


def _code_reference(cls: type) -> str:
    return f"{cls.__module__.split('.')[-1]}.{cls.__name__}"


def _processor_for(config, mean: list[float] | None = None, std: list[float] | None = None) -> WsssImageProcessor:
    """For a model that has none yet: the normalisation is that of its configuration, if it names one, or the given."""
    given = {"image_mean": getattr(config, "image_mean", mean), "image_std": getattr(config, "image_std", std)}
    return WsssImageProcessor(**{key: value for key, value in given.items() if value is not None})


def _short_card(model: PortableModelMixin, repo_id: str, tags: list[str]) -> ModelCard:
    """A card for a model of which nothing is known but itself."""
    kind, backbone = type(model).__name__, model.config.backbone_config.model_type
    classes = [label for value, label in sorted(model.mask_id2label.items()) if value > 0]
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag=_TASK,
        tags=list(dict.fromkeys(["wsss_hf", "weakly-supervised-semantic-segmentation", *tags])),
    )
    return ModelCard(f"""---
{metadata.to_yaml()}
---

# {repo_id.rpartition("/")[2]}

A `{kind}` of wsss_hf (weakly supervised semantic segmentation) on a `{backbone}` backbone.
It knows {len(classes)} classes: {", ".join(classes)}; all else is background.

What it was trained on, and how well it does, is not recorded here: try it on images of your own before you rely on it.

## Use

```python
from transformers import pipeline

segmenter = pipeline("{_TASK}", model="{repo_id}", trust_remote_code=True)
for found in segmenter("photo.jpg"):
    print(found["label"], found["score"], found["mask"].size)
```

The repository brings the code that `trust_remote_code=True` runs; read it first. Where wsss_hf is installed,
`import wsss_hf` takes its place.
""")
