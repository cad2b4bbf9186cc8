"""Wide ResNet-38 as SEAM and PLDA use it: pre-activation blocks, output stride 8.

Wu, Shen and van den Hengel, "Wider or Deeper: Revisiting the ResNet Model for Visual Recognition", 2016 (model A1).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from transformers import AutoBackbone, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BackboneOutput
from transformers.utils.generic import can_return_tuple

NUM_WIDTHS = 7  # conv1a and the groups b2 … b7


class WideResNet38Config(BackboneConfigMixin, PreTrainedConfig):
    """Configuration of a [`WideResNet38Backbone`].

    Args:
        widths: channels of conv1a and of the groups b2 … b7.
        dropout: probabilities of dropping a channel inside b6 and b7.
        freeze: keep conv1a, b2 and everything of the batch norms as loaded, as SEAM and PLDA do.
        out_features, out_indices: stages whose maps are returned, of "conv2" … "conv6"; the last one by default.

    Raises:
        ValueError: not seven widths or not two dropout probabilities.
    """

    model_type = "wsss_wide_resnet38"

    def __init__(
        self,
        widths: Sequence[int] = (64, 128, 256, 512, 1024, 2048, 4096),
        dropout: Sequence[float] = (0.3, 0.5),
        freeze: bool = True,
        out_features: list[str] | None = None,
        out_indices: list[int] | None = None,
        **kwargs,
    ):
        if len(widths) != NUM_WIDTHS:
            raise ValueError(f"widths: expected {NUM_WIDTHS} numbers, of conv1a and b2 to b7, got {list(widths)}")
        if len(dropout) != 2:
            raise ValueError(f"dropout: expected 2 probabilities, of b6 and b7, got {list(dropout)}")
        self.widths = list(widths)
        self.dropout = list(dropout)
        self.freeze = freeze
        super().__init__(**kwargs)
        self.stage_names = ["conv2", "conv3", "conv4", "conv5", "conv6"]
        self.set_output_features_output_indices(out_features=out_features, out_indices=out_indices)

    @property
    def undilated_strides(self) -> list[int]:
        """Input size / map size of each stage, were no stride replaced by dilation."""
        return [2, 4, 8, 16, 32]


class BasicBlock(GradientCheckpointingLayer):
    """bn, relu, 3×3, bn, relu, 3×3 beside the input, or beside a projection of its activation to another shape."""

    def __init__(
        self, channels: int, inner: int, width: int, stride: int = 1, dilation: int = 1, first_dilation: int = 1
    ):
        super().__init__()
        self.bn_branch2a = nn.BatchNorm2d(channels)
        self.relu_branch2a = nn.ReLU()
        self.conv_branch2a = _convolution(channels, inner, 3, stride, first_dilation)
        self.bn_branch2b1 = nn.BatchNorm2d(inner)
        self.relu_branch2b1 = nn.ReLU()
        self.conv_branch2b1 = _convolution(inner, width, 3, dilation=dilation)
        same_shape = channels == width and stride == 1
        self.conv_branch1 = None if same_shape else _convolution(channels, width, 1, stride)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(B, D, H, W) → (output, activated input)."""
        activated = self.relu_branch2a(self.bn_branch2a(hidden))
        shortcut = hidden if self.conv_branch1 is None else self.conv_branch1(activated)
        branch = self.conv_branch2a(activated)
        branch = self.conv_branch2b1(self.relu_branch2b1(self.bn_branch2b1(branch)))
        return shortcut + branch, activated


class Bottleneck(GradientCheckpointingLayer):
    """bn, relu, 1×1, bn, relu, dropout, 3×3, bn, relu, dropout, 1×1 beside a projection of the activated input."""

    def __init__(self, channels: int, width: int, dilation: int, dropout: float):
        super().__init__()
        self.bn_branch2a = nn.BatchNorm2d(channels)
        self.relu_branch2a = nn.ReLU()
        self.conv_branch2a = _convolution(channels, width // 4, 1)
        self.bn_branch2b1 = nn.BatchNorm2d(width // 4)
        self.relu_branch2b1 = nn.ReLU()
        self.dropout_2b1 = nn.Dropout2d(dropout)
        self.conv_branch2b1 = _convolution(width // 4, width // 2, 3, dilation=dilation)
        self.bn_branch2b2 = nn.BatchNorm2d(width // 2)
        self.relu_branch2b2 = nn.ReLU()
        self.dropout_2b2 = nn.Dropout2d(dropout)
        self.conv_branch2b2 = _convolution(width // 2, width, 1)
        self.conv_branch1 = _convolution(channels, width, 1)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(B, D, H, W) → (output, activated input)."""
        activated = self.relu_branch2a(self.bn_branch2a(hidden))
        branch = self.conv_branch2a(activated)
        branch = self.conv_branch2b1(self.dropout_2b1(self.relu_branch2b1(self.bn_branch2b1(branch))))
        branch = self.conv_branch2b2(self.dropout_2b2(self.relu_branch2b2(self.bn_branch2b2(branch))))
        return self.conv_branch1(activated) + branch, activated


def _convolution(channels: int, width: int, kernel: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    padding = dilation * (kernel // 2)
    return nn.Conv2d(channels, width, kernel, stride, padding=padding, dilation=dilation, bias=False)


class WideResNet38Backbone(BackboneMixin, PreTrainedModel):
    """Wide ResNet-38 without its classifier; names of weights are those of the released files.

    A stage's map is the activated input of the group that follows: "conv4" and "conv5", which SEAM's pixel correlation
    module reads, are the stages -3 and -2, and "conv6" is relu(bn7) of the end.
    """

    config_class = WideResNet38Config
    base_model_prefix = "wide_resnet38"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    has_attentions = False
    supports_gradient_checkpointing = True

    def __init__(self, config: WideResNet38Config):
        super().__init__(config)
        stem, w2, w3, w4, w5, w6, w7 = config.widths
        groups: dict[str, list] = {
            "b2": [BasicBlock(stem, w2, w2, stride=2)] + [BasicBlock(w2, w2, w2) for _ in range(2)],
            "b3": [BasicBlock(w2, w3, w3, stride=2)] + [BasicBlock(w3, w3, w3) for _ in range(2)],
            "b4": [BasicBlock(w3, w4, w4, stride=2)] + [BasicBlock(w4, w4, w4) for _ in range(5)],
            "b5": [BasicBlock(w4, w5 // 2, w5, dilation=2)]
            + [BasicBlock(w5, w5 // 2, w5, dilation=2, first_dilation=2) for _ in range(2)],
            "b6": [Bottleneck(w5, w6, dilation=4, dropout=config.dropout[0])],
            "b7": [Bottleneck(w6, w7, dilation=4, dropout=config.dropout[1])],
        }
        self.conv1a = _convolution(3, stem, 3)
        self.block_names = []
        for group, blocks in groups.items():
            for index, block in enumerate(blocks):
                name = f"{group}_{index}" if index else group
                self.add_module(name, block)
                self.block_names.append(name)
        self.bn7 = nn.BatchNorm2d(w7)
        self.relu7 = nn.ReLU()
        self.num_features = [w2, w3, w4, w5, w7]
        self.post_init()
        self.train(self.training)

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def train(self, mode: bool = True):
        """As always, except that frozen parts stay so: loading weights, which ends here too, unfreezes them."""
        super().train(mode)
        if self.config.freeze:
            for module in (self.conv1a, self.b2, self.b2_1, self.b2_2):
                module.requires_grad_(False)
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
                    module.requires_grad_(False)
        return self

    @can_return_tuple
    def forward(self, pixel_values: Tensor, **kwargs) -> BackboneOutput:
        """Images (B, 3, H, W) → maps (B, D_i, H / s_i, W / s_i) of `out_features`; s is 2, 4, 8, 8, 8."""
        hidden, maps = self.conv1a(pixel_values), []
        for name in self.block_names:
            hidden, activated = self.get_submodule(name)(hidden)
            if name in ("b3", "b4", "b5", "b6"):
                maps.append(activated)
        maps.append(self.relu7(self.bn7(hidden)))
        return BackboneOutput(feature_maps=tuple(maps[index] for index in self.out_indices))


# exist_ok: code that came with a saved model may register once more in the same process.
AutoConfig.register(WideResNet38Config.model_type, WideResNet38Config, exist_ok=True)
AutoBackbone.register(WideResNet38Config, WideResNet38Backbone, exist_ok=True)
