import pytest
import torch
from torch import nn

from weightsum_lib.core import models
from weightsum_lib.core.models import normalize, resnet20, vgg8, vgg16


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


def test_resnet20_is_the_network_of_he_et_al_layer_for_layer():
    network = resnet20(in_channels=1, dropout=0.1)
    main = [m for n, m in network.named_modules() if isinstance(m, nn.Conv2d) and "shortcut" not in n]
    assert [m.out_channels for m in main] == [16] * 7 + [32] * 6 + [64] * 6
    assert {m.kernel_size for m in main} == {(3, 3)}
    assert [i for i, m in enumerate(main) if m.stride == (2, 2)] == [7, 13]
    projections = [m for n, m in network.named_modules() if isinstance(m, nn.Conv2d) and "shortcut" in n]
    assert [(m.in_channels, m.out_channels, m.kernel_size, m.stride) for m in projections] == [
        (16, 32, (1, 1), (2, 2)),
        (32, 64, (1, 1), (2, 2)),
    ]
    assert len(main) + 1 == 20 and (network.fc.in_features, network.fc.out_features) == (64, 10)
    assert [m.p for m in network.modules() if isinstance(m, nn.Dropout)] == [0.1]


@torch.no_grad()
def test_a_residual_block_adds_its_input():
    block = resnet20(width=1 / 4).eval().stages.block1_2
    x = torch.rand(2, 4, 8, 8)
    nn.init.zeros_(block.bn2.weight)
    assert torch.equal(block(x), x)  # what is positive, the last ReLU leaves
    nn.init.constant_(block.bn2.bias, 1.0)
    torch.testing.assert_close(block(x), x + 1)


@torch.no_grad()
@pytest.mark.parametrize("arch", [vgg8, vgg16])
def test_weights_are_drawn_layer_after_layer_behind_the_default_ones(arch):
    """Another order of random draws would be other networks than those of the published results."""
    torch.manual_seed(7)
    network, rows = arch(width=1 / 16), []
    torch.manual_seed(7)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            rows.append((module, nn.Conv2d(module.in_channels, module.out_channels, 3), 2**0.5))
        elif isinstance(module, nn.Linear):
            rows.append((module, nn.Linear(module.in_features, module.out_features), 1.0))
    for module, drawn, gain in rows:
        drawn.weight.normal_(std=gain * drawn.weight[0].numel() ** -0.5)
        assert torch.equal(module.weight, drawn.weight * 0.1 if module is rows[-1][0] else drawn.weight)
        assert not module.bias.any()


@pytest.mark.parametrize("arch", [vgg8, resnet20])
def test_a_grey_network_sees_luminance_and_a_colour_network_repeats_the_channel(arch):
    grey, colour = arch(in_channels=1, width=1 / 8).eval(), arch(width=1 / 8).eval()
    x = torch.rand(2, 3, 32, 32)
    luminance = sum(w * x[:, i : i + 1] for i, w in enumerate(models._LUMINANCE))
    torch.testing.assert_close(grey(x), grey(luminance))
    torch.testing.assert_close(colour(luminance), colour(luminance.repeat(1, 3, 1, 1)))


@pytest.mark.parametrize("arch", [vgg8, resnet20])
@pytest.mark.parametrize("shape", [(2, 3, 28, 28), (2, 2, 32, 32), (3, 32, 32)])
def test_other_shapes_are_refused_with_the_shape(arch, shape):
    with pytest.raises(ValueError, match=str(shape)[1:-1]):
        arch(width=1 / 8)(torch.zeros(shape))


def test_impossible_networks_are_refused():
    with pytest.raises(ValueError, match=r"in_channels must be 1 \(grey\) or 3 \(colour\), got 2"):
        vgg8(in_channels=2)
    with pytest.raises(ValueError, match="at least 1/64"):
        vgg8(width=0.001)
    with pytest.raises(ValueError, match="at least 1/16"):
        resnet20(width=1 / 32)


def test_the_sum_of_two_hidden_layers_starts_with_the_variance_of_he_and_logits_start_small():
    a, b = vgg8(width=0.25), vgg8(width=0.25)
    weight = a.classifier.fc2.weight + b.classifier.fc2.weight
    assert weight.std().item() == pytest.approx((2 / weight.shape[1]) ** 0.5, rel=0.02)
    for last in (a.classifier.fc3, resnet20(num_classes=100).fc):
        assert last.weight.std().item() == pytest.approx(0.1 * last.in_features**-0.5, rel=0.05)


def test_normalize_is_one_constant_for_all_sets():
    x = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 32, 32)
    assert normalize(x)[:, 0, 0, 0].tolist() == [-2.0, 2.0]


def test_centered_batch_norm_is_batch_norm_whose_scale_adds_up_to_one():
    plain, centered = nn.BatchNorm2d(3), models.CenteredBatchNorm2d(3)
    x = torch.randn(8, 3, 4, 4)
    assert torch.equal(centered(x), plain(x))  # fresh
    with torch.no_grad():
        plain.weight.copy_(torch.tensor([0.5, 1.0, 2.0]))
        centered.weight.copy_(plain.weight - 1)
    for _ in range(2):
        torch.testing.assert_close(centered(x), plain(x))
        plain.eval(), centered.eval()
    for arch in (vgg8, resnet20):
        norms = [m for m in arch(width=1 / 16, centered_scale=True).modules() if isinstance(m, nn.BatchNorm2d)]
        assert norms and all(type(m) is models.CenteredBatchNorm2d and not m.weight.any() for m in norms)
