"""Any vision network of transformers as a stack of spatial feature maps, with the output stride one asks for."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoBackbone, AutoConfig, AutoModel, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING
from transformers.pipelines import PIPELINE_REGISTRY

from .components import COMPONENTS

TASK = "image-segmentation"  # of our models where none is named


def usable_config(backbone_config: PreTrainedConfig | dict) -> PreTrainedConfig:
    """The configuration of a backbone, from itself or a dict, without label names, which are those of another task."""
    if isinstance(backbone_config, dict):
        values = dict(backbone_config)
        if "model_type" not in values:
            raise ValueError("backbone_config: expected a model_type, such as 'resnet', got none")
        backbone_config = AutoConfig.for_model(values.pop("model_type"), **values)
    backbone_config.id2label = None
    backbone_config.num_labels = 2
    return backbone_config


class BackboneConfigMixin:
    """A configuration that holds the configuration of a backbone."""

    sub_configs = {"backbone_config": AutoConfig}

    def _set_backbone(self, backbone: str | None, backbone_config) -> None:
        if backbone is not None and backbone_config is None:
            pretrained = importlib.import_module("wsss_hf.models.pretrained")  # which no checkpoint brings
            backbone_config = pretrained.resolve_backbone_config(backbone, None)
        # transformers builds a configuration without arguments to learn its defaults.
        self.backbone_config: Any = None if backbone_config is None else usable_config(backbone_config)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        values, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)  # type: ignore[misc]
        # `pipeline(model=…)` without a task, which then is None here, takes a model's only custom pipeline, never one
        # of several.
        if kwargs.get("_from_pipeline", "") is None and TASK in values.get("custom_pipelines", {}):
            values["custom_pipelines"] = {TASK: values["custom_pipelines"][TASK]}
        return values, unused

    def to_dict(self) -> dict:
        values = super().to_dict()  # type: ignore[misc]
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
        registered = PIPELINE_REGISTRY.supported_tasks[TASK]["impl"]
        if getattr(registered, "__name__", None) == "MaskPipeline":
            kwargs.pop("custom_pipelines", None)
        return kwargs


def body_class(config: PreTrainedConfig) -> tuple[Any, dict]:
    """AutoBackbone with all its stages where transformers has one for this configuration, else the plain AutoModel."""
    if type(config) in MODEL_FOR_BACKBONE_MAPPING:
        config.out_indices = list(range(len(config.stage_names)))
        return AutoBackbone, {}
    model_class: Any = AutoModel._model_mapping[type(config)]
    # With Python 3.10, transformers has the head where the configuration does not speak of it.
    if getattr(config, "vision_use_head", config.model_type.startswith("siglip")):
        config.vision_use_head = False
    # A pooler would hold parameters that never get a gradient, which distributed training refuses.
    takes_pooler = "add_pooling_layer" in inspect.signature(model_class.__init__).parameters
    return AutoModel, {"add_pooling_layer": False} if takes_pooler else {}


class Backbone(nn.Module):
    """Feature maps of any vision network of transformers, shallow to deep: its resolutions, or layers of a plain ViT.

    A convolutional network can be dilated: from `output_stride` on, strides become dilations, so that pretrained
    weights keep their meaning while the maps stay large.

    Args:
        config: configuration of any transformers vision model.
        output_stride: largest allowed ratio of input size to deepest map size; None leaves the network as it is.
        layers: layers of a plain vision transformer that are its stages, see [`PlainVit`]; the last one alone.

    Attributes:
        channels: channels of each stage, shallow to deep.
        strides: input size / map size of each stage, after dilation.
        gradient_checkpointing: whether training computes activations anew instead of keeping them.

    Raises:
        ValueError: the network takes no images, gives no map, can't be dilated to that stride, or lacks such layers.
    """

    def __init__(self, config: PreTrainedConfig, output_stride: int | None = None, layers: Sequence[int] | None = ()):
        super().__init__()
        self.gradient_checkpointing = False
        auto_class, kwargs = body_class(config)
        self.body = auto_class.from_config(config, **kwargs)
        if self.body.main_input_name != "pixel_values":
            raise ValueError(
                f"backbone {config.model_type!r}: expected a network that takes pixel_values, "
                f"got one that takes {self.body.main_input_name}"
            )
        self.patch_size = getattr(config, "patch_size", None)
        self.plain_vit = next((c(config, layers) for c in COMPONENTS if hasattr(c, "fits") and c.fits(config)), None)
        if layers and self.plain_vit is None:
            raise ValueError(f"backbone_layers: expected none for the backbone {config.model_type!r}, got {layers}")
        parameters = inspect.signature(self.body.forward).parameters
        self._options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in parameters else {}
        with torch.enable_grad():
            maps, executed = self._measure()
        sizes = [m.shape[-1] for m in maps]
        # The last map of each resolution (as it is before dilation) is a stage.
        levels = getattr(config, "undilated_strides", sizes)  # a network may be published dilated
        self.stage_indices = [i for i, level in enumerate(levels) if i + 1 == len(levels) or levels[i + 1] != level]
        if self.plain_vit is not None:
            self.stage_indices = self.plain_vit.stage_indices(len(sizes))
        freeze_idle_parameters(self.body, maps[self.stage_indices[-1]])
        natural_stride = round(_PROBE_SIZE / sizes[-1])
        wanted_stride = natural_stride if output_stride is None else min(natural_stride, output_stride)
        if wanted_stride < natural_stride and getattr(config, "num_attention_heads", None) is None:
            _dilate(executed, wanted_stride)
        _pad_unstrided(self.body)
        if wanted_stride < natural_stride:
            sizes = [m.shape[-1] for m in self.probe({})]
        self.channels = [maps[i].shape[1] for i in self.stage_indices]
        self.strides = [round(_PROBE_SIZE / sizes[i]) for i in self.stage_indices]
        if self.strides[-1] != wanted_stride:
            raise ValueError(
                f"output_stride: expected {natural_stride} or none (backbone {config.model_type!r} can't be dilated), "
                f"got {output_stride}"
            )

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Images (B, 3, H, W) → stage maps (B, D_i, h_i, w_i), shallow to deep."""
        maps = self._all_maps(pixel_values)
        return tuple(maps[i] for i in self.stage_indices)

    def _all_maps(self, pixel_values: Tensor) -> list[Tensor]:
        pixel_values = pixel_values if self.plain_vit is None else self.plain_vit(pixel_values)
        outputs = self.body(pixel_values, output_hidden_states=True, **self._options)
        maps = getattr(outputs, "feature_maps", None)
        if maps is None:
            maps = (*(getattr(outputs, "hidden_states", None) or ()), outputs.last_hidden_state)
        return [self._as_map(m, pixel_values.shape[-2:]) for m in maps]

    def _as_map(self, hidden: Tensor, image_size: torch.Size) -> Tensor:
        """(B, N, D) tokens → (B, D, h, w); maps pass through."""
        if hidden.ndim == 3 and self.plain_vit is not None:
            hidden = self.plain_vit.as_map(hidden, image_size)
        if hidden.ndim == 4:
            return hidden
        raise ValueError(
            f"backbone {self.body.config.model_type!r}: expected hidden states of shape (B, D, h, w) or patch tokens, "
            f"got {tuple(hidden.shape)}"
        )

    def _measure(self) -> tuple[list[Tensor], list[tuple[nn.Module, int]]]:
        """All maps of an empty image, and (layer, input stride) of all convolutions and poolings, as executed."""
        layers = []

        def record(layer: nn.Module, _inputs: tuple[Tensor], output: Tensor):
            # Read off the output: some networks pad the input of a convolution by hand.
            layers.append((layer, max(1, round(_PROBE_SIZE / output.shape[-1] / _first(layer.stride)))))

        return self.probe({m: record for m in self.body.modules() if isinstance(m, nn.Conv2d | nn.MaxPool2d)}), layers

    def probe(self, hooks: dict[nn.Module, Callable]) -> list[Tensor]:
        """All maps of an empty image, with forward hooks in place meanwhile."""
        handles = [module.register_forward_hook(hook) for module, hook in hooks.items()]
        weight = next(self.body.parameters())
        training = self.body.training
        try:
            self.body.eval()
            return self._all_maps(weight.new_zeros(1, 3, _PROBE_SIZE, _PROBE_SIZE))
        finally:
            self.body.train(training)
            for handle in handles:
                handle.remove()


def freeze_idle_parameters(module: nn.Module, output: Tensor) -> None:
    """Norms of other stages, mask tokens …: distributed training refuses what `output` does not depend on."""
    found = waiting = {output.grad_fn}  # the graph says it without a backward pass
    while waiting := {before for node in waiting if node for before, _ in node.next_functions} - found:
        found |= waiting
    used = {id(getattr(node, "variable", None)) for node in found}
    for parameter in module.parameters():
        parameter.requires_grad_(parameter.requires_grad and id(parameter) in used)


_PROBE_SIZE = 224  # divisible by the strides 2 … 32 and by the patch sizes 14 and 16


def _dilate(layers: list[tuple[Any, int]], output_stride: int):
    """Replace strides beyond `output_stride` by dilation, so that each weight meets the pixels it was trained on."""
    for layer, input_stride in layers:
        kernel, stride = _first(layer.kernel_size), _first(layer.stride)
        if input_stride * stride <= output_stride:
            continue
        rate = max(1, input_stride // output_stride)
        layer.stride = (max(1, output_stride // input_stride),) * 2
        layer.dilation = (_first(layer.dilation) * rate,) * 2
        if isinstance(layer, nn.Conv2d) and kernel % 2 == 0 and layer.stride[0] == 1:
            layer.padding = "same"  # patch-merging kernels have no centre and no padding of their own
        elif not isinstance(layer.padding, str):
            layer.padding = (_first(layer.padding) * rate,) * 2


def _pad_unstrided(body: nn.Module):
    """Let convolutions pad that MobileNets pad for, by copying inputs: with a stride of 1 the size plays no part."""
    module: Any
    for module in body.modules():
        config, layer = getattr(module, "config", None), getattr(module, "convolution", None)
        if getattr(config, "tf_padding", False) and isinstance(layer, nn.Conv2d) and layer.stride == (1, 1):
            module.config = copy(config)
            module.config.tf_padding = False
            layer.padding = tuple(
                (size - 1) // 2 * rate for size, rate in zip(layer.kernel_size, layer.dilation, strict=True)
            )


def _first(value) -> int:
    return value[0] if isinstance(value, tuple) else value
