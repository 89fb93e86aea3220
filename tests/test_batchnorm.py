import copy

import pytest
import torch

from weightsum_lib import WeightSum, normalize, recalibrate, vgg8
from weightsum_lib.batchnorm import var_mean


def test_statistics_are_exactly_those_of_the_images(images):
    network = vgg8(width=1 / 16, dropout=0.5).eval()
    x = normalize(images)
    recalibrate(network, x)
    inside = {}
    for name in ("bn1_1", "bn3_1"):
        getattr(network.features, name).register_forward_hook(
            lambda m, i, o, name=name: inside.update({name: i[0].detach()})
        )
    network(x)  # in evaluation mode: every layer before uses the new statistics
    for name, activations in inside.items():
        layer = getattr(network.features, name)
        torch.testing.assert_close(layer.running_mean, activations.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.running_var, activations.var((0, 2, 3)), rtol=1e-4, atol=1e-5)


def test_modes_are_kept_and_old_statistics_forgotten(images):
    network = vgg8(width=1 / 16).train()
    network.features.bn1_1.eval()
    network.features.bn1_1.running_mean += 1000
    recalibrate(network, normalize(images))
    assert network.training and not network.features.bn1_1.training and network.features.bn2_1.training
    assert network.features.bn1_1.running_mean.abs().max() < 100


def test_on_a_sum_only_the_sum_changes(images):
    parents = [vgg8(width=1 / 16), vgg8(width=1 / 16)]
    before = copy.deepcopy([p.state_dict() for p in parents])
    total = WeightSum(parents)
    recalibrate(total, normalize(images))
    for parent, old in zip(parents, before, strict=True):
        assert all(torch.equal(old[k], v) for k, v in parent.state_dict().items())
    plain = recalibrate(WeightSum(parents).materialize(), normalize(images))
    assert torch.equal(plain.features.bn4_1.running_var, total.body.features.bn4_1.running_var)


def test_one_image_has_no_variance(images):
    with pytest.raises(ValueError, match="two images or more, got 1"):
        recalibrate(vgg8(width=1 / 16), normalize(images[:1]))


@pytest.mark.parametrize("shape", [(7, 5), (7, 5, 4, 4), (2, 5)])
@pytest.mark.parametrize("piece", [1, 200, 2**19])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_in_pieces_are_those_of_the_whole(shape, piece, dtype):
    x = (100 + torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype)
    dims = [0, *range(2, x.ndim)]
    variance, mean = torch.var_mean(x.double(), dims)
    found = var_mean(x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x, piece)
    torch.testing.assert_close(found[0], variance, rtol=1e-4, atol=0)
    torch.testing.assert_close(found[1], mean, rtol=1e-6, atol=0)
