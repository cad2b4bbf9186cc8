"""VGG-16 as DRS and ICD use it: output stride 8, and room for the convolutions that they have on top.

Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn
from transformers import AutoBackbone, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin
from transformers.modeling_outputs import BackboneOutput
from transformers.utils.generic import can_return_tuple

DEPTHS = (2, 2, 3, 3, 3)  # convolutions of each block


class Vgg16Config(BackboneConfigMixin, PreTrainedConfig):
    """Configuration of a [`Vgg16Backbone`].

    Args:
        widths: channels of each of the five blocks.
        extra_channels: channels of the 3×3 convolutions after the last block, each with a relu; none by default,
            DRS has [512, 512, 512].
        hidden_channels: channels of fc6, a 3×3 convolution, and of fc7, a 1×1 one, each with a relu and dropout of
            0.5, after a maximum and an average pooling that keep the resolution; none by default, ICD has
            [1024, 1024].
        pooling: kernel of the first three poolings: 2, or 3 (padded by 1) as in ICD's program.
        out_features, out_indices: stages whose maps are returned, of "conv1" … "conv5" and, where there are such
            convolutions, "extra" and "hidden"; the last one by default.

    Raises:
        ValueError: not five widths, not two hidden convolutions, or another pooling.
    """

    model_type = "wsss_vgg16"

    def __init__(
        self,
        widths: Sequence[int] = (64, 128, 256, 512, 512),
        extra_channels: Sequence[int] = (),
        hidden_channels: Sequence[int] = (),
        pooling: int = 2,
        out_features: list[str] | None = None,
        out_indices: list[int] | None = None,
        **kwargs,
    ):
        if len(widths) != len(DEPTHS):
            raise ValueError(f"widths: expected {len(DEPTHS)} numbers, one per block, got {list(widths)}")
        if len(hidden_channels) not in (0, 2):
            raise ValueError(f"hidden_channels: expected two numbers, of fc6 and fc7, or none, got {hidden_channels}")
        if pooling not in (2, 3):
            raise ValueError(f"pooling: expected 2 or 3, got {pooling!r}")
        self.widths, self.extra_channels, self.hidden_channels = list(widths), list(extra_channels), [*hidden_channels]
        self.pooling = pooling
        super().__init__(**kwargs)
        self.stage_names = [f"conv{block}" for block in range(1, len(DEPTHS) + 1)]
        self.stage_names += ["extra"] * bool(self.extra_channels) + ["hidden"] * bool(self.hidden_channels)
        self.set_output_features_output_indices(out_features=out_features, out_indices=out_indices)

    @property
    def undilated_strides(self) -> list[int]:
        """Input size / map size of each stage, were no stride replaced by dilation."""
        strides = {"conv1": 1, "conv2": 2, "conv3": 4, "conv4": 8, "conv5": 16, "extra": 16, "hidden": 32}
        return [strides[name] for name in self.stage_names]


class Vgg16Backbone(BackboneMixin, PreTrainedModel):
    """The convolutions of VGG-16 without its last pooling; one map per block, before the pooling that ends it.

    The fourth pooling keeps the resolution and the fifth block is dilated by 2. Names of weights are those of
    torchvision; `extra` and `hidden` hold the convolutions on top.
    """

    config_class = Vgg16Config
    base_model_prefix = "vgg16"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    has_attentions = False
    supports_gradient_checkpointing = True

    def __init__(self, config: Vgg16Config):
        super().__init__(config)
        layers, channels = [], 3
        for block, (depth, width) in enumerate(zip(DEPTHS, config.widths, strict=True)):
            dilation = 2 if block == 4 else 1
            for _ in range(depth):
                layers += _convolution(channels, width, dilation)
                channels = width
            if block < 3:
                layers.append(nn.MaxPool2d(config.pooling, stride=2, padding=config.pooling - 2))
            elif block == 3:
                layers.append(nn.MaxPool2d(kernel_size=3, stride=1, padding=1))
        self.features = nn.Sequential(*layers)
        self.extra = nn.Sequential()
        for width in config.extra_channels:
            self.extra.extend(_convolution(channels, width))
            channels = width
        self.hidden = nn.Sequential()
        if config.hidden_channels:
            self.hidden.add_module("pool5", nn.MaxPool2d(3, stride=1, padding=1))
            self.hidden.add_module("pool5a", nn.AvgPool2d(3, stride=1, padding=1))
            for layer, kernel, width in zip((6, 7), (3, 1), config.hidden_channels, strict=True):
                self.hidden.add_module(f"fc{layer}", nn.Conv2d(channels, width, kernel, padding=kernel // 2))
                self.hidden.add_module(f"relu{layer}", nn.ReLU())
                self.hidden.add_module(f"drop{layer}", nn.Dropout(0.5))
                channels = width
        self.num_features = config.widths + config.extra_channels[-1:] + config.hidden_channels[-1:]
        self.gradient_checkpointing = False
        self.post_init()

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @can_return_tuple
    def forward(self, pixel_values: Tensor, **kwargs) -> BackboneOutput:
        """Images (B, 3, H, W) → maps (B, D_i, H / s_i, W / s_i) of `out_features`; s is 1, 2, 4, and 8 from there."""
        hidden, maps = pixel_values, []
        poolings = [index for index, layer in enumerate(self.features) if isinstance(layer, nn.MaxPool2d)]
        for start, end in pairwise([0, *poolings, len(self.features)]):
            hidden = self._run(self.features[start:end], hidden)
            maps.append(hidden)
        for layers in (self.extra, self.hidden):
            if len(layers):
                hidden = self._run(layers, hidden)
                maps.append(hidden)
        return BackboneOutput(feature_maps=tuple(maps[index] for index in self.out_indices))

    def _run(self, layers: nn.Module, hidden: Tensor) -> Tensor:
        if self.gradient_checkpointing and self.training:
            return self._gradient_checkpointing_func(layers, hidden)
        return layers(hidden)


def _convolution(channels: int, width: int, dilation: int = 1) -> list[nn.Module]:
    # Methods hook each relu's output; one that works in place would change what the convolution gave.
    return [nn.Conv2d(channels, width, kernel_size=3, padding=dilation, dilation=dilation), nn.ReLU()]


# exist_ok: code that came with a saved model may register once more in the same process.
AutoConfig.register(Vgg16Config.model_type, Vgg16Config, exist_ok=True)
AutoBackbone.register(Vgg16Config, Vgg16Backbone, exist_ok=True)
