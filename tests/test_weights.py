import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from weightsum_lib import WeightSum, compare_layers, normalize, vgg8
from weightsum_lib.keys import deal, hidden_sizes
from weightsum_lib.train import autocast


def network():
    return vgg8(width=1 / 16, dropout=0.0)


def by_hand(networks, coefficients):
    """The plain network with the summed state dict, and statistics of its own."""
    plain = copy.deepcopy(networks[0])
    names = dict(plain.named_parameters())
    state = {k: sum(c * n.state_dict()[k] for c, n in zip(coefficients, networks, strict=True)) for k in names}
    plain.load_state_dict({**plain.state_dict(), **state})
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
    return plain


@pytest.mark.parametrize("coefficients", [(1, 1), (0.5, 2.0), (1, -1, 0.25)])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("training", [True, False])
def test_forward_and_gradient_equal_the_summed_state_dict(images, coefficients, precision, training):
    networks = [network() for _ in coefficients]
    total = WeightSum(networks, coefficients).train(training)
    plain = by_hand(networks, coefficients).train(training)
    x, y = normalize(images), torch.arange(24) % 10
    with autocast(precision, torch.device("cpu")):
        ours, theirs = total(x), plain(x)
        nn.functional.cross_entropy(ours, y).backward()
        nn.functional.cross_entropy(theirs, y).backward()
    assert torch.equal(ours, theirs)
    for parent, c in zip(networks, coefficients, strict=True):
        for name, p in parent.named_parameters():
            torch.testing.assert_close(p.grad, c * plain.get_parameter(name).grad, rtol=1e-5, atol=1e-7)
    for (name, ours), theirs in zip(total.body.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(ours, theirs), name


def test_a_sum_has_statistics_of_its_own_and_leaves_its_parents_alone(images):
    networks = [network().train(), network().eval()]
    before = copy.deepcopy([n.state_dict() for n in networks])
    total = WeightSum(networks)
    total.train()(normalize(images))
    total.eval()(normalize(images))
    assert [n.training for n in networks] == [True, False]
    for parent, old in zip(networks, before, strict=True):
        assert all(torch.equal(old[k], v) for k, v in parent.state_dict().items())
    assert total.body.features.bn1_1.running_mean.abs().sum() > 0


def test_a_sum_is_new_and_in_training_mode_whatever_its_parents_are():
    total = WeightSum([network().eval(), network().eval()])
    assert total.training and total.body.features.bn1_1.training
    assert not total.networks[0].training


def test_the_sum_follows_its_parents(images):
    networks = [network(), network()]
    total = WeightSum(networks).eval()
    x = normalize(images)
    old = total(x)
    with torch.no_grad():
        networks[1].classifier.fc3.bias += 1
    torch.testing.assert_close(total(x), old + 1)


def test_its_parameters_are_its_parents(images):
    networks = [network(), network()]
    trainable = {id(p) for p in WeightSum(networks).parameters() if p.requires_grad}
    assert trainable == {id(p) for n in networks for p in n.parameters()}


def test_materialize_gives_the_plain_network(images):
    total = WeightSum([network(), network()])
    x = normalize(images)
    total.train()(x)
    total.eval()
    plain = total.materialize()
    assert type(plain) is type(total.networks[0]) and not plain.training
    assert torch.equal(plain(x), total(x))
    with torch.no_grad():
        plain.classifier.fc3.bias += 1
    assert not torch.equal(plain(x), total(x))


def test_networks_of_other_shape_are_refused_with_the_first_tensor_and_both_shapes():
    with pytest.raises(ValueError, match=r"'features.conv1_1.weight' is \(4, 3, 3, 3\).*\(8, 3, 3, 3\)"):
        WeightSum([network(), vgg8(width=1 / 8)])
    with pytest.raises(ValueError, match=r"'weight' is \(2, 2\) in network 0 and missing in network 1"):
        WeightSum([nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))])


def test_too_few_networks_or_coefficients_are_refused():
    with pytest.raises(ValueError, match="two networks or more, got 1"):
        WeightSum([network()])
    with pytest.raises(ValueError, match="2 networks need as many coefficients, got 3"):
        WeightSum([network(), network()], [1, 2, 3])


def test_compare_layers_gives_norm_ratio_and_cosine():
    a = network()
    b = copy.deepcopy(a)
    with torch.no_grad():
        b.features.conv1_1.weight *= -2
    rows = {row["layer"]: row for row in compare_layers(a, b)}
    assert list(rows) == ["conv1_1", "conv2_1", "conv3_1", "conv4_1", "fc1", "fc2", "fc3"]
    assert rows["conv1_1"]["norm_ratio"] == pytest.approx(0.5)
    assert rows["conv1_1"]["cosine"] == pytest.approx(-1)
    assert rows["fc1"]["norm_ratio"] == pytest.approx(1) and rows["fc1"]["cosine"] == pytest.approx(1)


class _Copies(TorchDispatchMode):
    """Counts the tensors that go from the host to another device."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.device.type == "meta":
            self.count += any(isinstance(a, torch.Tensor) and a.device.type == "cpu" for a in args)
        return out


def test_a_keyed_sum_copies_its_keys_to_the_device_once_not_once_a_step():
    """On a GPU each such copy can make the host wait; the device here only knows shapes."""
    with torch.device("meta"):
        networks, x = [vgg8(width=1 / 16).train() for _ in range(2)], torch.empty(4, 3, 32, 32)
    small = hidden_sizes(networks[0])
    wide = {layer: 2 * size for layer, size in small.items()}
    with _Copies() as given:
        total = WeightSum(networks, keys=[deal(small, wide, i) for i in (0, 1)])
    assert given.count > 0
    with _Copies() as used:
        total(x).sum().backward()
    assert used.count == 0
