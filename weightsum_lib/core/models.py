"""Networks for 32×32 images: the VGG of the question (Simonyan & Zisserman 2015), a residual one (He et al. 2016)."""

from collections import OrderedDict

import torch
from torch import Tensor, nn

_BLOCK_CHANNELS = (64, 128, 256, 512)  # of VGG, a max-pool after each block
_HIDDEN = 4096
_STAGE_CHANNELS = (16, 32, 64)  # of the residual network
_LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601

IMAGE_MEAN, IMAGE_STD = 0.5, 0.25


def normalize(images: Tensor) -> Tensor:
    """Turn uint8 images into network input, with one constant for all datasets.

    Statistics of a dataset would tell the network which task it is in.

    Args:
        images: uint8 tensor (N, C, H, W).

    Returns:
        float32 tensor (N, C, H, W), (x / 255 − 0.5) / 0.25.
    """
    return ((images.float() / 255 - IMAGE_MEAN) / IMAGE_STD).contiguous()


class CenteredBatchNorm2d(nn.BatchNorm2d):
    """Batch norm whose ``weight`` is the scale's deviation from 1, so that a sum of two has a scale near 1, not 2.

    In a sum of ordinary ones, a channel that two networks share comes out twice as large as one that a single
    network uses.

    Args:
        num_features: channels of the input (N, C, H, W).
    """

    def reset_parameters(self):
        """Start at scale 1 and shift 0."""
        super().reset_parameters()
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (N, C, H, W), like :class:`torch.nn.BatchNorm2d`."""
        of_batch = self.training or self.running_mean is None
        return nn.functional.batch_norm(
            x, self.running_mean, self.running_var, 1 + self.weight, self.bias, of_batch, self.momentum, self.eps
        )


class _Classifier(nn.Module):
    """Takes grey and colour images alike; a subclass has ``in_channels`` and computes logits in ``_logits``."""

    def __init__(self, in_channels: int, width: float, narrowest: int):
        super().__init__()
        if in_channels not in (1, 3):
            raise ValueError(f"in_channels must be 1 (grey) or 3 (colour), got {in_channels}")
        if width * narrowest < 1:
            raise ValueError(f"width {width} leaves the first block no channel; it must be at least 1/{narrowest}")
        self.in_channels = in_channels

    def _initialize(self, last: nn.Linear):
        """He et al. 2015 before a ReLU, but hidden linear layers a factor √2 smaller and small logits.

        No batch norm follows the linear layers, so it is the *sum of two* networks that has He's variance there;
        with each of them at He's, the sum's logits explode in the first steps of joint training.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                gain = 2**0.5 if isinstance(module, nn.Conv2d) else 1.0
                nn.init.normal_(module.weight, std=gain * module.weight[0].numel() ** -0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        last.weight.data *= 0.1

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits.

        Args:
            x: float tensor (N, C, 32, 32), C = 1 or 3; the channel is repeated or the colours are
                made grey where the network wants the other number.

        Returns:
            logits (N, num_classes).

        Raises:
            ValueError: x has another shape.
        """
        if x.ndim != 4 or x.shape[1] not in (1, 3) or x.shape[2:] != (32, 32):
            raise ValueError(f"expected images (N, 1 or 3, 32, 32), got {tuple(x.shape)}")
        if x.shape[1] == 1 and self.in_channels == 3:
            x = x.expand(-1, 3, -1, -1)
        elif x.shape[1] == 3 and self.in_channels == 1:
            x = (x * x.new_tensor(_LUMINANCE).view(1, 3, 1, 1)).sum(1, keepdim=True)
        return self._logits(x)


class VGG(_Classifier):
    """VGG with batch norm: convolution blocks, then a classifier of two hidden layers with dropout.

    Args:
        convolutions: number of 3×3 convolutions in each of the four blocks.
        in_channels: 3, or 1 for a network that sees grey images.
        num_classes: length of the logits.
        width: factor on every hidden size (1.0: 64-128-256-512 channels, 4096 hidden units).
        dropout: probability with which each of the two dropout layers drops a unit.
        centered_scale: batch norm is :class:`~weightsum_lib.core.models.CenteredBatchNorm2d`.
    """

    def __init__(self, convolutions, in_channels=3, num_classes=10, width=1.0, dropout=0.25, centered_scale=False):
        super().__init__(in_channels, width, _BLOCK_CHANNELS[0])
        norm = CenteredBatchNorm2d if centered_scale else nn.BatchNorm2d
        layers, previous = OrderedDict(), in_channels
        for block, (base, count) in enumerate(zip(_BLOCK_CHANNELS, convolutions, strict=True), start=1):
            channels = int(base * width)
            for i in range(1, count + 1):
                layers[f"conv{block}_{i}"] = nn.Conv2d(previous, channels, 3, padding=1)
                layers[f"bn{block}_{i}"] = norm(channels)
                layers[f"relu{block}_{i}"] = nn.ReLU()
                previous = channels
            layers[f"pool{block}"] = nn.MaxPool2d(2)
        hidden = int(_HIDDEN * width)
        self.features = nn.Sequential(layers)
        layers = OrderedDict()
        for i, inputs in enumerate((previous * 2 * 2, hidden), start=1):
            layers |= {f"fc{i}": nn.Linear(inputs, hidden), f"relu{i}": nn.ReLU(), f"dropout{i}": nn.Dropout(dropout)}
        self.classifier = nn.Sequential(layers | {"fc3": nn.Linear(hidden, num_classes)})
        self._initialize(self.classifier.fc3)

    def _logits(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


class _BasicBlock(nn.Module):
    """relu(x + two 3×3 convolutions of x).

    Where the number of channels changes, the image is halved and x projected by a 1×1 convolution (option B).
    """

    def __init__(self, previous: int, channels: int, norm: type[nn.BatchNorm2d]):
        super().__init__()
        stride = 1 if previous == channels else 2
        self.conv1 = nn.Conv2d(previous, channels, 3, stride, padding=1, bias=False)
        self.bn1 = norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = norm(channels)
        self.shortcut = nn.Sequential()
        if stride > 1:
            self.shortcut.add_module("conv", nn.Conv2d(previous, channels, 1, stride, bias=False))
            self.shortcut.add_module("bn", norm(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, previous, H, W) to (N, channels, H / stride, W / stride)."""
        inner = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(inner + self.shortcut(x))


class ResNet(_Classifier):
    """The residual network for CIFAR: a 3×3 stem, three stages of basic blocks, global average pooling, one linear.

    Args:
        blocks: number of basic blocks in each of the three stages; each stage but the first halves the image.
        in_channels: 3, or 1 for a network that sees grey images.
        num_classes: length of the logits.
        width: factor on every hidden size (1.0: 16-32-64 channels).
        dropout: probability with which a feature is dropped before the linear layer.
        centered_scale: batch norm is :class:`~weightsum_lib.core.models.CenteredBatchNorm2d`.
    """

    def __init__(self, blocks, in_channels=3, num_classes=10, width=1.0, dropout=0.25, centered_scale=False):
        super().__init__(in_channels, width, _STAGE_CHANNELS[0])
        norm = CenteredBatchNorm2d if centered_scale else nn.BatchNorm2d
        previous = int(_STAGE_CHANNELS[0] * width)
        self.conv = nn.Conv2d(in_channels, previous, 3, padding=1, bias=False)
        self.bn = norm(previous)
        self.stages = nn.Sequential()
        for stage, (base, count) in enumerate(zip(_STAGE_CHANNELS, blocks, strict=True), start=1):
            for i in range(1, count + 1):
                self.stages.add_module(f"block{stage}_{i}", _BasicBlock(previous, int(base * width), norm))
                previous = int(base * width)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(previous, num_classes)
        self._initialize(self.fc)

    def _logits(self, x: Tensor) -> Tensor:
        return self.fc(self.dropout(self.stages(torch.relu(self.bn(self.conv(x)))).mean((2, 3))))


def vgg16(in_channels=3, num_classes=10, width=1.0, dropout=0.25, centered_scale=False) -> VGG:
    """Build the network of the question: 64,64 | 128,128 | 256×3 | 512×3, classifier 2048-4096-4096-10.

    >>> sum(p.numel() for p in vgg16(in_channels=1).parameters())
    32854474
    """
    return VGG((2, 2, 3, 3), in_channels, num_classes, width, dropout, centered_scale)


def vgg8(in_channels=3, num_classes=10, width=1.0, dropout=0.25, centered_scale=False) -> VGG:
    """Build :func:`vgg16` with one convolution a block, for a laptop.

    >>> vgg8(width=0.25)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    return VGG((1, 1, 1, 1), in_channels, num_classes, width, dropout, centered_scale)


def resnet20(in_channels=3, num_classes=10, width=1.0, dropout=0.25, centered_scale=False) -> ResNet:
    """Build the residual network of 20 layers, with projections (option B): 16×7 | 32×6 | 64×6, linear 64-10.

    >>> sum(p.numel() for p in resnet20().parameters())
    272474
    """
    return ResNet((3, 3, 3), in_channels, num_classes, width, dropout, centered_scale)
