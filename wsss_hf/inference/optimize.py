"""In-place optimisations for inference: conv-BN folding, fused activations, prepacked oneDNN weights.

The outputs stay the same but for rounding. The weights do not, so an optimised model refuses to be trained or saved.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from ..models.backbone import Backbone

_PROBE_SIZE = 64  # any backbone has a map of it
_ONEDNN_FUNCTIONS = ("_reorder_convolution_weight", "_get_mkldnn_serialized_md", "_convolution_pointwise")
_ONEDNN_ACTIVATIONS: dict[type, tuple[str, list[float]]] = {nn.ReLU: ("relu", []), nn.ReLU6: ("hardtanh", [0.0, 6.0])}


def for_inference(model: PreTrainedModel, device: torch.device | str) -> PreTrainedModel:
    """`model` itself, in eval mode on `device`, with outputs that differ by rounding only, about 1e-5.

    In CAM classifiers and segmenters of this package batch norms and activations become part of the convolutions
    before them, which also do TensorFlow's padding. On CPUs, convolutions read prepacked copies of their weights, made
    at the first call. So the weights are no longer the loaded ones, and changes of them count for nothing: from then
    on `train`, `state_dict`, `save_pretrained` and `push_to_hub` of the model, and of copies, raise a RuntimeError.
    """
    model = model.to(device).eval()  # type: ignore
    backbone, activations = getattr(model, "backbone", None), {}
    if isinstance(backbone, Backbone):
        activations = _fold(model)
        _pad_in_convolutions(backbone)
    if model.device.type == "cpu" and _has_onednn():
        for module in model.modules():
            if type(module) is nn.Conv2d and module.weight.dtype == torch.float32 and _pads_with_zeros(module):
                _use_onednn(module, activations.get(module))
    kind = type(model)
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}  # by which transformers finds a class
    model.__class__ = type(kind.__name__, (_InferenceOnly, kind), names)
    return model.to(memory_format=torch.channels_last)  # type: ignore


class _InferenceOnly:
    """A model whose weights are no longer those that it computes with."""

    def _refuse(self, *_args, **_kwargs):
        raise RuntimeError("this model is optimised for inference: load it with from_pretrained to train or save it")

    state_dict = save_pretrained = push_to_hub = _refuse

    def train(self, mode: bool = True):
        if mode:
            self._refuse()
        return super().train(False)  # type: ignore[misc]


def _pads_with_zeros(layer: nn.Conv2d) -> bool:
    return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in _ONEDNN_FUNCTIONS)


def _use_onednn(layer: nn.Conv2d, activation: nn.Module | None) -> None:
    """Convolve as torch.compile does: with the activation, and with weights in the layout that suits the images.

    Otherwise torch changes the layout in each call; and on one thread it computes a 1x1 convolution as a product of
    matrices, which on some CPUs takes twice as long.
    """
    name, limits = "none", list[float]()
    if activation is not None and type(activation) in _ONEDNN_ACTIVATIONS:
        name, limits = _ONEDNN_ACTIVATIONS[type(activation)]
        activation.forward = _identity
    geometry = (layer.padding, layer.stride, layer.dilation, layer.groups)
    layouts: dict = {}
    weights: dict[bytes, Tensor] = {}  # a few layouts serve all sizes

    def convolve(images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            images = images.to(torch.get_autocast_dtype("cpu"))
            bias = None if bias is None else bias.to(images.dtype)
        kind = (images.shape, images.dtype)
        if kind not in layouts:
            suitable = torch.ops.mkldnn._reorder_convolution_weight(weight.to(images.dtype), *geometry, images.shape)
            layouts[kind] = bytes(torch.ops.mkldnn._get_mkldnn_serialized_md(suitable).numpy())
            weights.setdefault(layouts[kind], suitable)
        return torch.ops.mkldnn._convolution_pointwise(
            images, weights[layouts[kind]], bias, *geometry, name, limits, ""
        )

    layer._conv_forward = convolve  # type: ignore


def _identity(maps: Tensor) -> Tensor:
    return maps


@torch.no_grad()
def _fold(model: PreTrainedModel) -> dict[nn.Conv2d, nn.Module]:
    """Fold batch norms and let activations work in place, wherever nothing else reads the tensor that this changes.

    Returns:
        convolution → activation of its output, where nothing is between them.
    """
    calls: dict[nn.Module, list[Tensor]] = {}
    makers: dict[Tensor, Any] = {}  # module by its output

    def record(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        calls.setdefault(module, []).append(inputs[0])
        makers[output] = module

    activations = [module for module in model.modules() if getattr(module, "inplace", None) is False]
    layers = [module for module in model.modules() if type(module) in (nn.Conv2d, nn.BatchNorm2d)]
    handles = [module.register_forward_hook(record, prepend=True) for module in (*layers, *activations)]
    try:
        with _Readers() as readers:
            image = torch.zeros(1, 3, _PROBE_SIZE, _PROBE_SIZE, dtype=model.dtype, device=model.device)
            readers.count.update(_tensors(model(image, output_hidden_states=True)))
    finally:
        for handle in handles:
            handle.remove()

    names = {module: name for name, module in model.named_modules()}
    folded_into: dict[nn.Module, nn.Conv2d] = {}
    fed: dict[nn.Conv2d, nn.Module] = {}
    for module, inputs in calls.items():
        before = {makers.get(tensor) for tensor in inputs}
        maker: Any = before.pop()
        if before or type(maker) not in (nn.Conv2d, nn.BatchNorm2d) or any(readers.count[t] > 1 for t in inputs):
            continue
        if module in activations:
            module.inplace = True  # type: ignore
            maker = folded_into.get(maker, maker)
            if type(maker) is nn.Conv2d and len(calls[maker]) == len(inputs):
                fed[maker] = module
        elif type(module) is nn.BatchNorm2d and _can_fold(module, maker) and len(calls[maker]) == len(inputs):
            folded = fuse_conv_bn_eval(maker, module)
            maker.weight, maker.bias = folded.weight, folded.bias
            model.set_submodule(names[module], nn.Identity())
            folded_into[module] = maker
    return fed


def _can_fold(norm: nn.BatchNorm2d, maker: nn.Module) -> bool:
    return type(maker) is nn.Conv2d and norm.running_mean is not None and not norm._forward_hooks


class _Readers(TorchFunctionMode):
    """Counts how often a tensor is given to a function of torch."""

    def __init__(self):
        super().__init__()
        self.count: Counter[Tensor] = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func.__name__ not in ("__get__", "dim", "size"):  # which read no values
            self.count.update(_tensors([args, kwargs or {}]))
        return func(*args, **(kwargs or {}))


def _tensors(value) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def _pad_in_convolutions(backbone: Backbone) -> None:
    """Let convolutions do TensorFlow's padding, for which transformers copies each map into a larger one.

    TensorFlow pads the end of an axis where only one end needs it; a convolution pads both and drops the rest at the
    end. Rotated by 180°, both give the same: kernels are rotated here, images and maps on their way in and out.
    """
    config = backbone.body.config
    if not getattr(config, "tf_padding", False):
        return
    config = copy.copy(config)
    config.tf_padding = False
    for module in backbone.body.modules():
        if hasattr(module, "config"):
            module.config = config
        if isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.flip(-2, -1)
            module.padding = tuple(d * (k // 2) for d, k in zip(module.dilation, module.kernel_size, strict=True))
    backbone.register_forward_pre_hook(_rotate_images)
    backbone.register_forward_hook(_rotate_maps)


def _rotate_images(_backbone: Backbone, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (inputs[0].flip(-2, -1),)


def _rotate_maps(_backbone: Backbone, _inputs: tuple[Tensor], maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(stage.flip(-2, -1) for stage in maps)
