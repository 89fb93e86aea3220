"""The network of the question: a VGG with batch norm for 32×32 images (Simonyan & Zisserman 2015)."""

from collections import OrderedDict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

# Convolutions in each block (same channels within a block), a max-pool after each.
_BLOCK_CHANNELS = (64, 128, 256, 512)
_CONVOLUTIONS = {"vgg8": (1, 1, 1, 1), "vgg16": (2, 2, 3, 3)}
_HIDDEN = 4096
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


def memory_format(channels: Iterable[int]) -> torch.memory_format:
    """The layout of convolution weights, which the activations take over, for hidden layers of these sizes.

    Channels last is the faster one, but PyTorch's batch norm on a CPU takes 16 channels at a time there, and its
    backward pass is many times slower where they don't divide (``make bench`` measures it).
    """
    return torch.contiguous_format if any(n % 16 for n in channels) else torch.channels_last


class CenteredBatchNorm2d(nn.BatchNorm2d):
    """Batch norm whose ``weight`` is the scale's deviation from 1, so that a sum of two has a scale near 1, not 2.

    In a sum of ordinary ones, a channel that two networks share comes out twice as large as one that a single
    network uses.

    Args:
        num_features: channels of the input (N, C, H, W).
    """

    def reset_parameters(self):
        """Start at scale 1 and shift 0."""
        self.reset_running_stats()
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (N, C, H, W), like :class:`torch.nn.BatchNorm2d`."""
        of_batch = self.training or self.running_mean is None
        return nn.functional.batch_norm(
            x, self.running_mean, self.running_var, 1 + self.weight, self.bias, of_batch, self.momentum, self.eps
        )


class VGG(nn.Module):
    """VGG with batch norm: convolution blocks, then a classifier of two hidden layers with dropout.

    Args:
        convolutions: number of 3×3 convolutions in each of the four blocks.
        in_channels: 3, or 1 for a network that sees grey images.
        num_classes: length of the logits.
        width: factor on every hidden size (1.0: 64-128-256-512 channels, 4096 hidden units).
        dropout: probability with which each of the two dropout layers drops a unit.
        centered_scale: batch norm is :class:`~weightsum_lib.models.CenteredBatchNorm2d`.
    """

    def __init__(self, convolutions, in_channels=3, num_classes=10, width=1.0, dropout=0.25, centered_scale=False):
        super().__init__()
        if in_channels not in (1, 3):
            raise ValueError(f"in_channels must be 1 (grey) or 3 (colour), got {in_channels}")
        if width * _BLOCK_CHANNELS[0] < 1:
            raise ValueError(f"width {width} leaves the first block without a channel; it must be at least 1/64")
        self.in_channels = in_channels
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
        self.classifier = nn.Sequential(
            OrderedDict(
                fc1=nn.Linear(previous * 2 * 2, hidden),
                relu1=nn.ReLU(),
                dropout1=nn.Dropout(dropout),
                fc2=nn.Linear(hidden, hidden),
                relu2=nn.ReLU(),
                dropout2=nn.Dropout(dropout),
                fc3=nn.Linear(hidden, num_classes),
            )
        )
        self._initialize()

    def _initialize(self):
        """He et al. 2015 before a ReLU, but hidden linear layers a factor √2 smaller and small logits.

        No batch norm follows the linear layers, so it is the *sum of two* networks that has He's variance there;
        with each of them at He's, the sum's logits explode in the first steps of joint training.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                gain = 2**0.5 if isinstance(module, nn.Conv2d) else 1.0
                fan_in = module.weight[0].numel()
                nn.init.normal_(module.weight, std=gain * fan_in**-0.5)
                nn.init.zeros_(module.bias)
        with torch.no_grad():
            self.classifier.fc3.weight *= 0.1

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
        return self.classifier(torch.flatten(self.features(x), 1))


def vgg16(in_channels=3, num_classes=10, width=1.0, dropout=0.25, centered_scale=False) -> VGG:
    """Build the network of the question: 64,64 | 128,128 | 256×3 | 512×3, classifier 2048-4096-4096-10.

    >>> sum(p.numel() for p in vgg16(in_channels=1).parameters())
    32854474
    """
    return VGG(_CONVOLUTIONS["vgg16"], in_channels, num_classes, width, dropout, centered_scale)


def vgg8(in_channels=3, num_classes=10, width=1.0, dropout=0.25, centered_scale=False) -> VGG:
    """Build :func:`vgg16` with one convolution a block, for a laptop.

    >>> vgg8(width=0.25)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    return VGG(_CONVOLUTIONS["vgg8"], in_channels, num_classes, width, dropout, centered_scale)


ARCHITECTURES = {"vgg8": vgg8, "vgg16": vgg16}
