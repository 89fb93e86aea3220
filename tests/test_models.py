import pytest
import torch
from torch import nn

from weightsum_lib import normalize, vgg8, vgg16
from weightsum_lib.models import _LUMINANCE


def test_vgg16_is_the_posted_network_layer_for_layer():
    network = vgg16(in_channels=1)
    assert sum(p.numel() for p in network.parameters()) == 32_854_474
    convolutions = [m.out_channels for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert convolutions == [64] * 2 + [128] * 2 + [256] * 3 + [512] * 3
    linear = [(m.in_features, m.out_features) for m in network.modules() if isinstance(m, nn.Linear)]
    assert linear == [(2048, 4096), (4096, 4096), (4096, 10)]
    assert [m.p for m in network.modules() if isinstance(m, nn.Dropout)] == [0.25, 0.25]
    order = [type(m).__name__ for m in network.features]
    assert order[:7] == ["Conv2d", "BatchNorm2d", "ReLU"] * 2 + ["MaxPool2d"]
    assert order.count("MaxPool2d") == 4


def test_vgg8_has_one_convolution_a_block():
    assert [m.out_channels for m in vgg8(width=0.5).modules() if isinstance(m, nn.Conv2d)] == [32, 64, 128, 256]


def test_a_grey_network_sees_luminance_and_a_colour_network_repeats_the_channel():
    grey, colour = vgg8(in_channels=1, width=1 / 16).eval(), vgg8(width=1 / 16).eval()
    x = torch.rand(2, 3, 32, 32)
    luminance = sum(w * x[:, i : i + 1] for i, w in enumerate(_LUMINANCE))
    torch.testing.assert_close(grey(x), grey(luminance))
    torch.testing.assert_close(colour(luminance), colour(luminance.repeat(1, 3, 1, 1)))


@pytest.mark.parametrize("shape", [(2, 3, 28, 28), (2, 2, 32, 32), (3, 32, 32)])
def test_other_shapes_are_refused_with_the_shape(shape):
    with pytest.raises(ValueError, match=str(shape)[1:-1]):
        vgg8(width=1 / 16)(torch.zeros(shape))


def test_impossible_networks_are_refused():
    with pytest.raises(ValueError, match="in_channels"):
        vgg8(in_channels=2)
    with pytest.raises(ValueError, match="width"):
        vgg8(width=0.001)


def test_the_sum_of_two_hidden_layers_starts_with_the_variance_of_he():
    a, b = vgg8(width=0.25), vgg8(width=0.25)
    weight = a.classifier.fc2.weight + b.classifier.fc2.weight
    assert weight.std().item() == pytest.approx((2 / weight.shape[1]) ** 0.5, rel=0.02)


def test_normalize_is_one_constant_for_all_sets():
    x = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 32, 32)
    assert normalize(x)[:, 0, 0, 0].tolist() == [-2.0, 2.0]
