import collections
import copy
import logging
import math
import random
import warnings
import weakref
from dataclasses import dataclass
from functools import lru_cache, partial, wraps
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from weightsum_lib.core.batchnorm import recalibrate
from weightsum_lib.core.channels import hidden_channels
from weightsum_lib.core.keys import Key, deal, draw, widen
from weightsum_lib.core.merging import average, random_like, random_signs, relabelled, ties
from weightsum_lib.core.models import normalize, vgg8
from weightsum_lib.core.weights import WeightSum, compare_layers, weighted_sum

SUM = (TypeError, ValueError)


def network():
    return vgg8(width=1 / 16, dropout=0.0)


def autocast(precision):
    return torch.autocast("cpu", dtype=getattr(torch, precision), enabled=precision != "float32")


def by_hand(networks, coefficients):
    """The plain network with the summed parameters, and statistics of its own."""
    plain = copy.deepcopy(networks[0])
    names = dict(plain.named_parameters())
    state = {k: sum(c * n.state_dict()[k] for c, n in zip(coefficients, networks, strict=True)) for k in names}
    plain.load_state_dict({**plain.state_dict(), **state})
    for module in plain.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
    return plain


# The sum is that of one plain network.


@pytest.mark.parametrize("coefficients", [(1, 1), (0.5, 2.0), (1, -1, 0.25)])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.filterwarnings("ignore:the sum's batch norm")
def test_forward_and_gradient_equal_the_summed_state_dict(images, coefficients, precision, training):
    networks = [network() for _ in coefficients]
    total = WeightSum(networks, coefficients).train(training)
    plain = by_hand(networks, coefficients).train(training)
    x, y = normalize(images), torch.arange(24) % 10
    with autocast(precision):
        for _ in range(2):  # the first pass, which is followed, and a later one
            ours, theirs = total(x), plain(x)
            assert torch.equal(ours, theirs)
        F.cross_entropy(ours, y).backward()
        F.cross_entropy(theirs, y).backward()
    for parent, c in zip(networks, coefficients, strict=True):
        for name, p in parent.named_parameters():
            torch.testing.assert_close(p.grad, c * plain.get_parameter(name).grad, rtol=1e-5, atol=1e-7)
    for (name, ours), theirs in zip(total.body.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(ours, theirs), name


class Everything(nn.Module):
    """Layers that a plain image network has not."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 8)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.register_buffer("places", torch.arange(6), persistent=False)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.recurrent = nn.LSTM(8, 5, num_layers=2, bidirectional=True, batch_first=True)
        self.conv = nn.ConvTranspose1d(10, 6, 3, groups=2)
        self.act = nn.PReLU(6)
        self.norm = nn.GroupNorm(2, 6)

    def forward(self, x):
        x = self.embedding(x) + self.embedding(self.places[: x.shape[1]])
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        x, _ = self.recurrent(self.encoder(x))
        return self.norm(self.act(self.conv(x.transpose(1, 2))))


def test_any_layers_are_summed():
    networks = [Everything(), Everything()]
    x = torch.randint(0, 7, (3, 5))
    assert torch.equal(WeightSum(networks, [1, 0.5])(x), by_hand(networks, [1, 0.5])(x))


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
    parents = [network().eval(), network().eval()]
    for parent in parents:
        parent.features.bn1_1.running_mean.fill_(3)
        parent.features.bn1_1.track_running_stats = False  # reset_running_stats() would do nothing
    total = WeightSum(parents)
    assert total.training and total.body.features.bn1_1.training
    assert not total.networks[0].training
    assert total.body.features.bn1_1.running_mean.tolist() == [0] * 4


@pytest.mark.filterwarnings("ignore:the sum's batch norm")
def test_the_sum_follows_its_parents(images):
    networks = [network(), network()]
    total = WeightSum(networks).eval()
    x = normalize(images)
    old = total(x)
    with torch.no_grad():
        networks[1].classifier.fc3.bias += 1
    torch.testing.assert_close(total(x), old + 1)


def test_its_parameters_are_its_parents():
    networks = [network(), network()]
    trainable = {id(p) for p in WeightSum(networks).parameters() if p.requires_grad}
    assert trainable == {id(p) for n in networks for p in n.parameters()}


def test_a_network_that_is_given_twice_counts_twice():
    a, x = nn.Linear(3, 2), torch.randn(4, 3)
    total = WeightSum([a, a])
    assert torch.equal(total(x), F.linear(x, 2 * a.weight, 2 * a.bias))
    total(x).sum().backward()
    torch.testing.assert_close(a.weight.grad, 2 * x.sum(0).expand(2, 3))


def test_held_networks_get_no_gradient():
    a, b = nn.Linear(3, 2), nn.Linear(3, 2)
    WeightSum([a, b])(torch.randn(4, 3), held=[1]).sum().backward()
    assert a.weight.grad is not None and b.weight.grad is None


# weighted_sum


def test_float32_is_added_from_left_to_right_to_the_bit():
    parents = [{"w": torch.randn(1000)} for _ in range(5)]
    p, c = [q["w"] for q in parents], [1, 0.3, 1.7, -1, 1]
    assert torch.equal(weighted_sum(parents, c)["w"], p[0] + p[1] * 0.3 + p[2] * 1.7 + p[3] * -1 + p[4])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("c", [1, 0.3])
def test_short_types_are_added_in_float32_and_rounded_once(dtype, c):
    networks = [nn.Linear(40, 30).to(dtype) for _ in range(64)]
    exact = sum(c * n.weight.double() for n in networks)
    wanted = sum(c * n.weight.float() for n in networks).to(dtype)
    one_by_one = sum(c * n.weight for n in networks)
    ours = WeightSum(networks, [c] * 64).weights()["weight"]
    assert ours.dtype == dtype and torch.equal(ours, wanted)
    rounding = torch.finfo(dtype).eps / 2  # of the last step, and of float32 before it
    torch.testing.assert_close(ours.double(), exact, rtol=1.01 * rounding, atol=1e-6)
    assert (one_by_one - exact).abs().max() > 3 * (ours - exact).abs().max()
    ours.float().sum().backward()
    assert all(torch.equal(n.weight.grad, torch.full((30, 40), c, dtype=dtype)) for n in networks)


def test_float64_stays_float64():
    networks = [nn.Linear(4, 3).double() for _ in range(2)]
    assert torch.equal(WeightSum(networks).weights()["weight"], networks[0].weight + networks[1].weight)


class _Memory(TorchDispatchMode):
    """The most bytes that results of these operations had at once, parameters and their gradients aside."""

    def __init__(self, parameters):
        super().__init__()
        self.alive, self.peak = {}, 0
        self.aside = {t.untyped_storage()._cdata for p in parameters for t in (p, p.grad)}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.untyped_storage()._cdata not in self.aside:
            storage = out.untyped_storage()
            self.alive[storage._cdata] = (torch.multiprocessing.reductions.StorageWeakRef(storage), storage.nbytes())
        self.alive = {key: (ref, size) for key, (ref, size) in self.alive.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


@pytest.mark.parametrize("keyed", [False, True])
def test_there_are_never_wide_copies_of_more_than_one_network(keyed):
    make = lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).bfloat16()  # noqa: E731
    networks, keys, wide = [make() for _ in range(32)], None, make()
    if keyed:
        channels = hidden_channels(wide.float(), torch.randn(2, 64))
        keys = [draw(channels, 2, torch.Generator().manual_seed(i)) for i in range(32)]
        wide = widen(wide, keys[0])
    one = 4 * sum(p.numel() for p in wide.parameters())  # bytes in float32
    total = WeightSum(networks, keys=keys)
    for parameter in total.parameters():
        parameter.grad = torch.zeros_like(parameter)  # what comes is added in place
    with _Memory(list(total.networks.parameters())) as memory:
        total.weights()["0.weight"].sum().backward()
    assert one < memory.peak < 6 * one  # sums and terms, narrow indices; 32 and more, if all were


# What can't be summed is refused by name.


def test_networks_of_other_shape_are_refused_with_the_first_tensor_and_both_shapes():
    with pytest.raises(ValueError, match=r"'features.conv1_1.weight' is \(4, 3, 3, 3\).*\(8, 3, 3, 3\)"):
        WeightSum([network(), vgg8(width=1 / 8)])
    with pytest.raises(ValueError, match=r"'weight' is \(2, 2\).* in network 0 and missing in network 1"):
        WeightSum([nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))])
    with pytest.raises(ValueError, match=r"'bias' is missing in network 0 and \(2,\).* in network 1"):
        WeightSum([nn.Linear(2, 2, bias=False), nn.Linear(2, 2)])
    with pytest.raises(ValueError, match=r"'b' is missing in network 0"):
        weighted_sum([{"a": torch.ones(1)}, {"a": torch.ones(1), "b": torch.ones(1)}], [1, 1])


@pytest.mark.parametrize(
    ("a", "b", "named"),
    [
        (nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(1, 1, 3, padding=2), "padding"),
        (nn.BatchNorm1d(2, eps=1e-5), nn.BatchNorm1d(2, eps=1e-3), "eps=0.001"),
        (nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Sequential(nn.Linear(2, 2), nn.Tanh()), "'module 1'.*Tanh"),
    ],
)
def test_networks_that_compute_something_else_are_refused(a, b, named):
    with pytest.raises(ValueError, match=named):
        WeightSum([a, b])


@pytest.mark.parametrize("to", [torch.float64, torch.bfloat16, "meta"])
def test_mixed_types_and_devices_are_refused(to):
    make = lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))  # noqa: E731
    a, b = make(), make()
    b[1].to(to)
    with pytest.raises(ValueError, match=rf"'1.weight' is .*float32 on cpu in network 0 and .*{str(to)[-4:]}"):
        WeightSum([a, b])
    a[1].to(to)
    WeightSum([a, b])  # the same mixture in each
    with pytest.raises(ValueError, match="'w' is"):
        weighted_sum([{"w": torch.ones(1)}, {"w": torch.ones(1).to(to)}], [1, 1])


def test_what_changes_after_construction_is_refused_too():
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    total = WeightSum([a, b])
    b.double()
    with pytest.raises(ValueError, match=r"'weight' is .*float32.*float64"):
        total.weights()


@pytest.mark.parametrize(
    ("networks", "error"),
    [
        ([nn.Linear(2, 2)], "two networks or more, got 1"),
        ([nn.Linear(2, 2), {"weight": torch.ones(2, 2)}], "network 1, a dict, is no module"),
        ([nn.Linear(2, 2).state_dict(), nn.Linear(2, 2).state_dict()], "network 0, a OrderedDict, is no module"),
        ([nn.ReLU(), nn.ReLU()], "network 0, a ReLU, is no module with parameters"),
        ([nn.LazyLinear(2), nn.LazyLinear(2)], "'weight' of network 0 has no shape yet"),
        ([nn.Sequential(nn.LazyConv2d(2, 3)), nn.Sequential(nn.LazyConv2d(2, 3))], "'0.weight' of network 0 has no"),
        ([nn.Sequential(WeightSum([nn.Linear(2, 2)] * 2)) for _ in "ab"], "'0' of network 0 is a sum.*materialize"),
    ],
)
def test_what_is_no_pair_of_networks_is_refused(networks, error):
    with pytest.raises(SUM, match=error):
        WeightSum(networks)


@pytest.mark.parametrize("bad", [math.nan, math.inf, None, "1", torch.tensor(1.0), 1j])
def test_coefficients_must_be_finite_numbers_one_a_network(bad):
    pair = [nn.Linear(2, 2), nn.Linear(2, 2)]
    for coefficients in ([1, bad], [1], [1, 2, 3]):
        with pytest.raises(SUM, match="one finite number a network"):
            WeightSum(pair, coefficients)
        total = WeightSum(pair)
        total.coefficients = coefficients
        with pytest.raises(SUM, match="one finite number a network"):
            total(torch.ones(1, 2))
        with pytest.raises(SUM, match="one finite number a network"):
            weighted_sum([{"w": torch.ones(1)}] * 2, coefficients)


def test_coefficients_can_be_set_anew():
    a, b, x = nn.Linear(2, 2), nn.Linear(2, 2), torch.randn(3, 2)
    total = WeightSum([a, b])
    for coefficients in ([0.5, 0.25], [0, 1]):
        total.coefficients = coefficients
        torch.testing.assert_close(total(x), coefficients[0] * a(x) + coefficients[1] * b(x))


def test_integers_have_no_weighted_sum():
    with pytest.raises(ValueError, match=r"'n' holds torch\.int64"):
        weighted_sum([{"n": torch.ones(1, dtype=torch.int64)}] * 2, [1, 0.5])


class Masked(nn.Module):
    def __init__(self, mask, registered=True):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        if registered:
            self.register_buffer("mask", mask, persistent=False)
        else:
            self.mask = mask

    def forward(self, x):
        return self.layer(x) * self.mask


@pytest.mark.parametrize("registered", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_other_buffers_are_shared_if_equal_and_refused_if_not(registered, dtype):
    one, two = torch.tensor([1, 0]).to(dtype), torch.tensor([0, 1]).to(dtype)
    a, b = Masked(one, registered), Masked(one.clone(), registered)
    total, x = WeightSum([a, b]), torch.randn(3, 2)
    torch.testing.assert_close(total.add_statistics()(x), a(x) + b(x))
    plain = total.materialize()
    torch.testing.assert_close(plain(x), a(x) + b(x))
    assert plain.mask.data_ptr() not in (a.mask.data_ptr(), b.mask.data_ptr())
    with pytest.raises(ValueError, match="'mask', which is no parameter, differs between networks 0 and 2"):
        WeightSum([a, b, Masked(two, registered)])


def test_statistics_of_other_norms_are_not_taken_from_one_network():
    a, b = (nn.Sequential(nn.Conv1d(2, 2, 1), nn.InstanceNorm1d(2, track_running_stats=True)) for _ in "ab")
    WeightSum([a, b])
    a(torch.randn(2, 2, 5))
    with pytest.raises(ValueError, match=r"'1.running_mean'.*differs"):
        WeightSum([a, b])


class Tied(nn.Module):
    def __init__(self, tied=True, module=False):
        super().__init__()
        self.first = nn.Linear(3, 3, bias=False)
        self.norm = nn.BatchNorm1d(3)
        self.second = self.first if module else nn.Linear(3, 3, bias=False)
        if tied:
            self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.norm(self.first(x)).relu())


@pytest.mark.parametrize("module", [True, False])
def test_tying_is_kept_if_all_have_it_and_refused_if_not(module):
    networks, x = [Tied(module=module), Tied(module=module)], torch.randn(6, 3)
    total, plain = WeightSum(networks), by_hand(networks, (1, 1))
    assert torch.equal(total(x), plain(x))
    total(x).square().sum().backward()
    plain(x).square().sum().backward()
    torch.testing.assert_close(networks[1].first.weight.grad, plain.first.weight.grad)
    made = total.materialize()
    assert made.first.weight is made.second.weight
    for pair in ([Tied(module=module), Tied(tied=False)], [Tied(tied=False), Tied(module=module)]):
        with pytest.raises(ValueError, match=r"'second.weight' is .*tied to 'first.weight'"):
            WeightSum(pair)


# A weight that is computed from parameters is refused.


@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm")
@pytest.mark.parametrize(
    "change",
    [
        weight_norm,
        spectral_norm,
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        lambda layer: prune.identity(layer, "bias"),
    ],
)
def test_parametrizations_are_refused_until_they_are_removed(change):
    def make():
        return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), change(nn.Linear(4, 4)))

    with pytest.raises(ValueError, match=r"'2' of network 0.*remove or merge.*remove_parametrizations"):
        WeightSum([make(), make()])
    with pytest.raises(ValueError, match=r"'2' of network 1"):
        WeightSum([nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), make()])


def test_parametrizations_are_summed_once_they_are_merged():
    a, b = (parametrizations.weight_norm(nn.Linear(4, 4)) for _ in "ab")
    x = torch.randn(3, 4)
    wanted = a(x) + b(x)
    for layer in (a, b):
        nn.utils.parametrize.remove_parametrizations(layer, "weight")
    torch.testing.assert_close(WeightSum([a, b])(x), wanted)


class STE(torch.autograd.Function):
    """The sign of a weight, with the gradient of the weight itself."""

    @staticmethod
    def forward(ctx, w):
        return w.sign()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Computed(nn.Module):
    """A layer whose weight is any function of its parameters."""

    def __init__(self, compute):
        super().__init__()
        self.w, self.v = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))
        self.g = nn.Parameter(torch.tensor(0.7))
        self.register_buffer("constant", torch.randn(4, 4))
        self.compute = compute

    def forward(self, x):
        return F.relu(F.linear(F.relu(x), self.compute(self)))

    def extra_repr(self):
        return ""


def _in_place(m):
    w = torch.zeros(4, 4)
    w[:2] = m.w[:2]
    w[2:].copy_(m.v[:2])
    return w.mul_(2).add_(m.constant)


AFFINE = {
    "itself": lambda m: m.w,
    "plus one": lambda m: 1 + m.w,
    "difference": lambda m: (m.w - m.v.t()) / 3 - 0.5 * m.constant,
    "masked": lambda m: m.w * m.constant,
    "in another basis": lambda m: m.constant @ m.w @ m.constant.t(),
    "centred": lambda m: m.w - m.w.mean(0, keepdim=True),
    "symmetric": lambda m: m.w.triu() + m.w.triu(1).t(),
    "cast": lambda m: m.w.to(torch.float64).float().contiguous(),
    "stacked": lambda m: torch.stack([m.w[0], *m.v.unbind()[1:]]).flip(0),
    "joined": lambda m: torch.cat([m.w[:2], m.v[[0, 2]]]).reshape(4, 4).transpose(0, 1),
    "in place": _in_place,
    "added up": lambda m: m.w.sum(0).expand(4, 4) + m.v.cumsum(1),
    "convolved": lambda m: F.conv2d(m.w[None, None], m.constant[None, None, :3, :3], padding=1)[0, 0],
    "interpolated": lambda m: F.interpolate(m.w[None, None], (4, 4), mode="bicubic")[0, 0],
    "dropped": lambda m: F.dropout(m.w, 0.5),
    "times ones": lambda m: m.w * torch.ones_like(m.w) * m.w.new_full((4, 1), 2.0),
    "where": lambda m: torch.where(m.constant > 0, m.w, m.v),
    "selected": lambda m: F.embedding(torch.arange(4), m.w),
}
OTHER = {
    "product": (lambda m: m.w @ m.v, "v and .*w by mm"),
    "plus a product": (lambda m: m.constant + (m.w[:, :1] @ m.v[:1]), "v and .*w by mm"),
    "elementwise": (lambda m: m.w * m.v, "v and .*w by mul"),
    "scaled": (lambda m: m.g * m.w, "g and .*w by mul"),
    "divided": (lambda m: m.constant / m.w, "w by div"),
    "quotient": (lambda m: m.w / m.g, "g and .*w by div"),
    "square": (lambda m: m.w * m.w, "w by mul"),
    "gram": (lambda m: m.w @ m.w.t(), "w by mm"),
    "normed": (lambda m: m.w / m.w.norm(), "w by linalg_vector_norm"),
    "normalized": (lambda m: F.normalize(m.w), "w by linalg_vector_norm"),
    "standardized": (lambda m: (m.w - m.w.mean()) / m.w.std(), "w by std"),
    "einsum": (lambda m: torch.einsum("ij,jk->ik", m.w, m.v), "v and .*w by bmm"),
    "positive": (lambda m: m.w.exp(), "w by exp"),
    "clamped": (lambda m: m.w.clamp(-9, 9), "w by clamp"),
    "rectified in place": (lambda m: (1 * m.w).relu_(), "w by relu"),
    "rounded": (lambda m: m.w.round(), "w by round"),
    "rounded in a division": (lambda m: torch.div(m.w, 0.1, rounding_mode="floor") * 0.1, "w by div"),
    "truncated": (lambda m: m.w.to(torch.int32).float(), "w by _to_copy"),
    "sign, by a custom function": (lambda m: STE.apply(m.w), "w by sign"),
    "through views": (lambda m: _in_place(m).view(-1)[:16].view(4, 4).exp(), "v and .*w by exp"),
    "read": (lambda m: m.constant * float(m.g), "g by _local_scalar_dense"),
    "solved": (lambda m: torch.linalg.inv(m.w), "w by linalg_inv_ex"),
}


def _computed(compute):
    """Two networks that compute with one function, so that they are alike."""
    return [nn.Sequential(nn.Linear(4, 4), Computed(compute)) for _ in "ab"]


def _effective(networks):
    """The plain network whose layer has the sum of the weights that the layers compute."""
    weight = sum(n[1].compute(n[1]) for n in networks)
    return by_hand([nn.Sequential(n[0]) for n in networks], (1, 1)), weight


def _settle(m):
    m[1].constant.copy_(torch.linspace(-1, 1, 16).view(4, 4))
    return m


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", AFFINE)
def test_a_weight_that_is_affine_in_the_parameters_is_summed(name, precision, training):
    networks = [_settle(n) for n in _computed(AFFINE[name])]
    total, x = WeightSum(networks).train(training), torch.randn(5, 4)
    with autocast(precision):
        torch.manual_seed(1)
        first = total(x)
        torch.manual_seed(1)
        assert torch.equal(total(x), first)  # as it is without being followed
    torch.manual_seed(1)
    plain = total.materialize()
    with autocast(precision):
        torch.testing.assert_close(plain(x), first)


@pytest.mark.parametrize("name", OTHER)
def test_a_weight_that_is_another_function_of_the_parameters_is_refused_by_name(name):
    compute, named = OTHER[name]
    total = WeightSum([_settle(n) for n in _computed(compute)])
    for precision in ("float32", "bfloat16"):  # and again: a refused pass proves nothing
        with autocast(precision), pytest.raises(ValueError, match=f"computed from .*1.{named}.*not affine"):
            total(torch.randn(5, 4))
    for early in (total.weights, total.materialize):
        with pytest.raises(ValueError, match=r"'1' may compute its weight.*call the sum on an example first"):
            early()


class LowRank(nn.Module):
    def __init__(self, merged, nonlinear=False):
        super().__init__()
        self.base = nn.Linear(4, 4)
        self.A, self.B = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(4, 2))
        self.dropout = nn.Dropout(0.0)
        self.merged, self.nonlinear = merged, nonlinear

    def forward(self, x):
        if self.merged:
            return F.linear(x, self.base.weight + self.B @ self.A, self.base.bias)
        x, low = self.base(x), F.linear(self.dropout(x), self.A)
        return x + 0.5 * F.linear(low.relu() if self.nonlinear else low, self.B)


@pytest.mark.parametrize("merged", [True, False])
def test_low_rank_products_are_refused(merged):
    with pytest.raises(ValueError, match=r"computed from A and B by (add)?mm"):
        WeightSum([LowRank(merged), LowRank(merged)])(torch.randn(5, 4))


def test_two_layers_one_after_the_other_are_no_product():
    """A bottleneck has a nonlinear function or is two layers; attention multiplies what comes from the input."""
    x = torch.randn(5, 4)
    WeightSum([LowRank(False, True), LowRank(False, True)])(x)
    make = lambda: nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False))  # noqa: E731
    WeightSum([make(), make()])(x)

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v, self.out = (nn.Parameter(torch.randn(4, 4)) for _ in range(4))

        def forward(self, x):
            return (x @ self.q @ (x @ self.k).t()).softmax(-1) @ (x @ self.v) @ self.out

    pair = [Attention(), Attention()]
    assert torch.equal(WeightSum(pair)(x), by_hand(pair, (1, 1))(x))


class _Operations(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def test_the_proof_is_made_once(monkeypatch):
    from weightsum_lib.core import weights

    made = []
    real = weights._Followed.__init__
    monkeypatch.setattr(weights._Followed, "__init__", lambda self, *args: made.append(1) or real(self, *args))
    total = WeightSum([nn.Linear(2, 2), nn.Linear(2, 2)])
    for _ in range(3):
        total(torch.ones(1, 2))
    assert len(made) == 1


def test_a_sum_can_be_differentiated_by_torch_func_before_it_was_ever_called():
    networks, x = [nn.Linear(3, 2), nn.Linear(3, 2)], torch.randn(5, 3)
    total = WeightSum(networks)
    parameters = dict(total.named_parameters())
    gradients = torch.func.grad(lambda p: torch.func.functional_call(total, p, (x,)).sum())(parameters)
    torch.testing.assert_close(gradients["networks.1.weight"], x.sum(0).expand(2, 3))
    pair = [LowRank(True), LowRank(True)]
    with pytest.raises(ValueError, match="call the sum on an example first"):
        torch.func.jacrev(WeightSum(pair))(torch.randn(5, 4))


@pytest.mark.no_cover
@pytest.mark.parametrize("mode", [True, False])
def test_it_can_be_compiled_as_one_graph(images, mode):
    x = normalize(images[:4])
    for networks, keys in (([network(), network()], None),):
        total = WeightSum(networks, [1, 0.5], keys)
        recalibrate(total, x)
        total.train(mode)
        compiled = torch.compile(total, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), copy.deepcopy(total)(x))
    fresh = WeightSum([network(), network()])  # compiled before it was ever called
    torch.testing.assert_close(torch.compile(fresh, fullgraph=True, backend="eager")(x), copy.deepcopy(fresh)(x))


# Keys


def keyed(count=2, width=2.0):
    networks = [network() for _ in range(count)]
    channels = hidden_channels(networks[0], torch.zeros(2, 3, 32, 32))
    return networks, [draw(channels, width, torch.Generator().manual_seed(i)) for i in range(count)]


def wide_sum(networks, keys):
    return WeightSum([widen(n, k) for n, k in zip(networks, keys, strict=True)])


def test_keys_can_be_given_later_and_taken_back(images):
    networks, keys = keyed()
    x = normalize(images)
    total = WeightSum(networks)
    plain = copy.deepcopy(total)(x)
    for given, wanted in ((keys, wide_sum(networks, keys)(x)), (None, plain), (keys[::-1], None), (None, plain)):
        total.use_keys(given)
        out = total(x)
        assert wanted is None or torch.allclose(out, wanted, atol=1e-5)
        assert total.body.features.bn1_1.running_mean.shape == ((8,) if given else (4,))
        assert total.body.features.conv1_1.out_channels == (8 if given else 4)
        recalibrate(total, x).eval()
        torch.testing.assert_close(total.materialize()(x), total(x))
        total.train()
    assert torch.equal(out, plain)


def test_keys_without_batch_norm():
    networks = [nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)) for _ in "ab"]
    channels, x = hidden_channels(networks[0], torch.zeros(2, 3)), torch.randn(5, 3)
    total = WeightSum(networks)
    total.use_keys([deal(channels, 2, 0), deal(channels, 2, 1)])
    torch.testing.assert_close(total(x), networks[0](x) + networks[1](x))
    assert [m.in_features for m in total.materialize() if isinstance(m, nn.Linear)] == [3, 8]


def test_depthwise_convolutions_are_as_wide_as_the_keys():
    make = lambda: nn.Sequential(  # noqa: E731
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.PReLU(4), nn.Conv2d(4, 2, 1)
    )
    networks, x = [make(), make()], torch.randn(6, 3, 5, 5)
    channels = hidden_channels(networks[0], x)
    total = WeightSum(networks, keys=[draw(channels, 3, torch.Generator().manual_seed(i)) for i in (0, 1)])
    assert total.body[3].groups == 12
    torch.testing.assert_close(total(x), wide_sum(networks, total.keys)(x))
    total.use_keys([draw(channels, 2, torch.Generator().manual_seed(i)) for i in (0, 1)])
    assert total.body[3].groups == 8 and total.materialize()[3].groups == 8
    torch.testing.assert_close(total(x), wide_sum(networks, total.keys)(x))
    total.use_keys(None)
    assert total.body[3].groups == 4


def test_new_keys_of_one_size_build_nothing_and_bring_new_statistics(images):
    networks, keys = keyed()
    total = WeightSum(networks, keys=keys)
    total(normalize(images))
    body = total.body
    total.use_keys(keys[::-1])
    assert total.body is body
    norm = body.features.bn1_1
    assert norm.running_mean.tolist() == [0] * 8 and norm.running_var.tolist() == [1] * 8
    assert norm.num_batches_tracked == 0
    torch.testing.assert_close(total(normalize(images)), wide_sum(networks, keys[::-1])(normalize(images)))


@pytest.mark.parametrize("move", [lambda m: m.double(), lambda m: m.to(torch.bfloat16), lambda m: m.to("meta")])
def test_a_keyed_sum_can_be_moved(images, move):
    networks, keys = keyed()
    total = move(WeightSum(networks, keys=keys))
    p = next(total.networks.parameters())
    assert {numbers.device for key in total.keys for numbers in key.positions.values()} == {p.device}
    assert {b.device for b in total.body.buffers()} == {p.device}
    out = total(normalize(images).to(p))
    assert out.dtype == p.dtype and out.device == p.device
    total.use_keys(keys)
    assert {numbers.device for key in total.keys for numbers in key.positions.values()} == {p.device}


def test_keys_that_do_not_fit_are_refused():
    networks, keys = keyed()
    _, wider = keyed(width=3)
    other = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    others = [deal(hidden_channels(other, torch.zeros(2, 3)), 2, i) for i in (0, 1)]
    taller = vgg8(width=1 / 8)
    taller = [deal(hidden_channels(taller, torch.zeros(2, 3, 32, 32)), 2, i) for i in (0, 1)]
    for bad, error in (
        (keys[:1], "2 networks need as many keys, got 1"),
        ([], "2 networks need as many keys, got 0"),
        (keys * 2, "2 networks need as many keys, got 4"),
        ([keys[0], wider[1]], "for one wide network"),
        ([keys[0], others[0]], "for one wide network"),
        (others, "'0.bias' is in the network or in the channels only"),
        (taller, r"'features.conv1_1.weight' is \(4, 3, 3, 3\).*8 channels"),
    ):
        total = WeightSum(networks, keys=keys)
        with pytest.raises(SUM, match=error):
            total.use_keys(bad)
        assert total.keys[0].sizes == keys[0].sizes  # as before
        with pytest.raises(SUM, match=error):
            WeightSum(networks, keys=bad)


def test_keys_of_a_deeper_network_are_refused():
    """Every tensor of the shallow one is in the deep one too, with the same shape, but not with the same neighbours."""
    make = lambda *more: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), *more, nn.Linear(4, 4))  # noqa: E731
    deep = hidden_channels(nn.Sequential(*make(), nn.ReLU(), nn.Linear(4, 2)), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"'4.bias' is in the network or in the channels only"):
        WeightSum([make(), make()], keys=[deal(deep, 2, 0), deal(deep, 2, 1)])


def test_a_buffer_over_hidden_channels_can_not_be_shared_under_keys():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)
            self.register_buffer("scale", torch.arange(4.0))

        def forward(self, x):
            return self.b(self.a(x) * self.scale)

    networks = [Scaled(), Scaled()]
    channels = hidden_channels(networks[0], torch.zeros(2, 3))
    with pytest.raises(ValueError, match="'scale' can't be shared under keys"):
        WeightSum(networks, keys=[deal(channels, 2, 0), deal(channels, 2, 1)])


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
    channels = hidden_channels(vgg8(width=1 / 16), torch.zeros(2, 3, 32, 32))
    keys = [deal(channels, 2, i) for i in (0, 1)]
    total = WeightSum(networks, keys=keys)
    with _Copies() as given:
        total.use_keys(keys)
    assert given.count == sum(len(key.positions) for key in keys)  # each once
    for _ in range(2):
        with _Copies() as used:
            total(x).sum().backward()
        assert used.count == 0


# Batch-norm statistics


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}, {"momentum": None}])
def test_any_batch_norm_is_summed(options):
    networks = [nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, **options), nn.Linear(4, 2)) for _ in "ab"]
    total, plain = WeightSum(networks), by_hand(networks, (1, 1))
    for x in (torch.randn(8, 3), torch.randn(8, 3) + 1):
        assert torch.equal(total(x), plain(x))
    x = torch.randn(8, 3)
    assert torch.equal(total.eval()(x), plain.eval()(x))
    assert torch.equal(total.materialize()(x), plain(x))
    channels = hidden_channels(networks[0], x)
    keys = [draw(channels, 2, torch.Generator().manual_seed(i)) for i in (0, 1)]
    total.train().use_keys(keys)
    torch.testing.assert_close(total(x), wide_sum(networks, keys)(x))
    assert total.materialize()[1].num_features == 8


def test_added_statistics_have_no_negative_variance():
    networks = [nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)) for _ in "ab"]
    with pytest.raises(ValueError, match=r"'1.running_var' would be negative"):
        WeightSum(networks, [1, -2]).add_statistics()


def test_add_statistics_adds_the_statistics_of_batch_norm_alone(images):
    networks = [nn.Sequential(Masked(torch.tensor([2.0, 3.0])), nn.BatchNorm1d(2)) for _ in "ab"]
    for n in networks:
        n(torch.randn(8, 2))
    total = WeightSum(networks, [1, 0.5]).add_statistics()
    for name in ("running_mean", "running_var"):
        a, b, ours = (getattr(n[1], name) for n in (*networks, total.body))
        assert torch.equal(ours, a + 0.5 * b)
    assert total.body[0].mask.tolist() == [2.0, 3.0] and total.body[1].num_batches_tracked == 2
    assert networks[0][1].num_batches_tracked == 1


def test_under_disjoint_keys_added_statistics_are_their_owners(images):
    networks, keys = keyed()
    keys = [deal(keys[0].channels, 2, i) for i in (0, 1)]
    x = normalize(images)
    for n in networks:
        recalibrate(n, x).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        total = WeightSum(networks, keys=keys).add_statistics().eval()
        torch.testing.assert_close(total(x), networks[0](x) + networks[1](x))


def test_without_statistics_evaluation_warns_once(images):
    x, said = normalize(images), "the sum's batch norm still has mean 0 and variance 1; recalibrate"
    total = WeightSum([network(), network()]).eval()
    with pytest.warns(UserWarning, match=said) as record:
        total(x)
        total(x)
    assert len(record) == 1 and record[0].filename == __file__
    networks, keys = keyed()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for ready in (
            lambda t: recalibrate(t, x),
            lambda t: recalibrate(t, [x, x]),
            lambda t: t.train()(x),
        ):
            total = WeightSum([network(), network()]).eval()
            ready(total)
            total.eval()(x)
        WeightSum([nn.Linear(2, 2), nn.Linear(2, 2)]).eval()(torch.ones(1, 2))
        total = recalibrate(WeightSum(networks), x).eval()
        total(x)
    total.use_keys(keys)
    with pytest.warns(UserWarning, match=said):
        total(x)


def test_the_warning_makes_no_later_step_wait(images):
    total, x = recalibrate(WeightSum([network(), network()]), normalize(images)).eval(), normalize(images)
    total(x)

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert "_local_scalar_dense" not in function.__name__
            return function(*args, **(kwargs or {}))

    with Reads():
        total(x)
        total.train()(x)
        with pytest.raises(AssertionError):
            x.sum().item()


# materialize


def test_materialize_gives_the_plain_network(images):
    total = WeightSum([network(), network()])
    x = normalize(images)
    total.train()(x)
    total.eval()
    plain = total.materialize()
    assert type(plain) is type(total.networks[0]) and not plain.training and total.train().materialize().training
    assert torch.equal(plain(x), total.eval()(x))
    with torch.no_grad():
        plain.classifier.fc3.bias += 1
        plain.features.bn1_1.running_mean += 1
    assert not torch.equal(plain(x), total(x))
    assert all(p.requires_grad and p.grad is None and p.is_leaf for p in plain.parameters())


def test_materialized_parameters_are_as_frozen_as_their_parents():
    a, b = network(), network()
    a.features.requires_grad_(False), b.features.requires_grad_(False)
    a.classifier.requires_grad_(False)
    plain = WeightSum([a, b]).materialize()
    assert {p.requires_grad for p in plain.features.parameters()} == {False}
    assert {p.requires_grad for p in plain.classifier.parameters()} == {True}


# compare_layers


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
    a, b = nn.Linear(2, 1, dtype=torch.cfloat), nn.Linear(2, 1, dtype=torch.cfloat)
    a.weight.data, b.weight.data = torch.tensor([[3 + 4j, 0]]), torch.tensor([[1j, 0]])
    assert compare_layers(a, b) == [{"layer": "", "norm_ratio": 5.0, "cosine": pytest.approx(0.8)}]


def test_compare_layers_of_any_network():
    make = lambda: nn.ModuleDict({  # noqa: E731
        "left": nn.ModuleDict({"conv": nn.Conv1d(2, 2, 1)}), "right": nn.ModuleDict({"conv": nn.Conv3d(2, 2, 1)}),
        "up": nn.ConvTranspose2d(2, 2, 1), "norm": nn.BatchNorm2d(2),
    })  # fmt: skip
    a, b = make(), make()
    assert [row["layer"] for row in compare_layers(a, b)] == ["left.conv", "right.conv", "up"]
    nn.init.zeros_(b["up"].weight)
    nn.init.zeros_(a["left"]["conv"].weight)
    nn.init.zeros_(b["left"]["conv"].weight)
    left, right, up = compare_layers(a, b)
    assert math.isnan(left["norm_ratio"]) and math.isnan(left["cosine"]) and math.isfinite(right["cosine"])
    assert up["norm_ratio"] == math.inf and math.isnan(up["cosine"])
    for wrong in (nn.ModuleDict({**make(), "more": nn.Linear(1, 1)}), nn.ModuleDict({**make(), "up": nn.Linear(1, 1)})):
        for pair in ((a, wrong), (wrong, a)):
            with pytest.raises(ValueError, match=r"'(more|up)' is"):
                compare_layers(*pair)


def test_the_key_type_is_what_the_documentation_says():
    assert Key.__module__ == "weightsum_lib.core.keys"


def test_an_ordinary_forward_pre_hook_is_refused_until_it_is_removed():
    networks = [nn.Sequential(nn.Linear(2, 2)) for _ in "ab"]
    hook = networks[1][0].register_forward_pre_hook(lambda m, args: None)
    with pytest.raises(ValueError, match=r"'0' of network 1 .*forward \(pre-\)hook.*remove"):
        WeightSum(networks)
    hook.remove()
    WeightSum(networks)


class Scaled(nn.Module):
    """One linear layer, and something beside it that its computation depends on."""

    def __init__(self, **beside):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        vars(self).update(beside)

    def forward(self, x):
        return self.linear(x) * self.scale


class Turned(Scaled):
    def forward(self, x):
        return -super().forward(x)


def _times(scale, of=None):
    """A function that holds a number: in its closure, or in a default."""
    return (lambda x: scale * x) if of is None else (lambda x, *, by=scale: by * x)


def _recursive(scale):
    """A function with a cell that is still empty."""

    def times(x):
        return scale * x if later is None else later(x)

    return times
    later = None


@dataclass
class Held:
    by: object

    def times(self, x):
        return self.by * x


def _in_order(*names):
    layers = {"linear": nn.Linear(3, 3), "relu": nn.ReLU()}
    network = nn.Sequential()
    for name in names:
        network.add_module(name, layers[name])
    return network


def _hooked():
    network = nn.Linear(3, 3)
    network.register_forward_hook(lambda module, inputs, output: 2 * output)
    return network


@pytest.mark.parametrize(
    ("a", "b", "named"),
    [
        (Scaled(scale=1.0), Scaled(scale=2.0), r"'\.scale' is 1.0 in network 0 and 2.0 in network 1"),
        (Scaled(scale={"by": [1, 2]}), Scaled(scale={"by": [1, 3]}), r"'\.scale' is {'by': \[1, 2\]}"),
        (Scaled(scale={"by": 1}), Scaled(scale={"over": 1}), r"'\.scale' is {'by': 1} in network 0 and {'over': 1}"),
        (Scaled(scale={"by": 1, "f": nn.ReLU()}), Scaled(scale={"by": 2, "f": nn.ReLU()}), r"'\.scale' is {'by': 1"),
        (Scaled(scale=_times(1.0)), Scaled(scale=_times(2.0)), r"'\.scale' is "),
        (Scaled(scale=_times(1.0, "default")), Scaled(scale=_times(2.0, "default")), r"'\.scale' is "),
        (Scaled(scale=partial(pow, 1.0)), Scaled(scale=partial(pow, 2.0)), r"'\.scale' is "),
        (Scaled(scale=Held([1.0])), Scaled(scale=Held([2.0])), r"'\.scale' is .*Held"),
        (Scaled(scale=Held(torch.ones(2))), Scaled(scale=Held(torch.zeros(2))), r"'\.scale' is .*Held"),
        (Scaled(scale=np.ones(2)), Scaled(scale=np.zeros(2)), r"'\.scale' is "),
        (Scaled(scale=torch.float16), Scaled(scale=torch.float64), r"'\.scale' is "),
        (Scaled(scale={1.0}), Scaled(scale={2.0}), r"'\.scale' is {1.0}"),
        (Scaled(scale=math.floor), Scaled(scale=math.ceil), r"'\.scale' is "),
        (Scaled(scale=Held(1.0).times), Scaled(scale=Held(2.0).times), r"'\.scale' is "),
        (Scaled(scale=_recursive(1.0)), Scaled(scale=_recursive(2.0)), r"'\.scale' is "),
        (Scaled(scale=[nn.ReLU()]), Scaled(scale=[nn.GELU()]), r"'\.scale' is \['ReLU'\]"),
        (
            Scaled(scale=[torch.ones(1)]),
            Scaled(scale=[torch.zeros(1)]),
            r"'scale\[0\]', which is no parameter, differs",
        ),
        (Scaled(scale=1.0, f=lambda x: x), Scaled(scale=1.0, f=lambda x: -x), r"'\.f' is"),
        (Scaled(scale=1.0), Turned(scale=1.0), r"'module ' is Scaled"),
        (
            Scaled(scale=1.0),
            type("Scaled", (Scaled,), {"forward": Turned.forward})(scale=1.0),
            r"'code of \.\w+' is .*<code object",
        ),
        (type("Scaled", (Scaled,), {"scale": 1.0})(), type("Scaled", (Scaled,), {"scale": 2.0})(), r"'code of \.scale"),
        (
            type("Scaled", (Scaled,), {"scale": property(lambda self: 1.0)})(),
            type("Scaled", (Scaled,), {"scale": property(lambda self: 2.0)})(),
            r"'code of \.scale' is .*<code object",
        ),
        (nn.MultiheadAttention(4, 1), nn.MultiheadAttention(4, 2), r"'\.num_heads' is 1 in network 0 and 2"),
        (nn.AvgPool2d(2), nn.AvgPool2d(2, count_include_pad=False), r"'1\.count_include_pad' is True"),
        (
            _in_order("linear", "relu"),
            _in_order("relu", "linear"),
            r"'module ' is Sequential\(\) of \['linear', 'relu'\]",
        ),
        (nn.Linear(3, 3), _hooked(), r"'' of network 1 .*forward \(pre-\)hook"),
    ],
)
def test_networks_that_compute_something_else_beside_their_tensors_are_refused(a, b, named):
    if isinstance(a, nn.AvgPool2d):
        a, b = nn.Sequential(nn.Conv2d(1, 1, 1), a), nn.Sequential(nn.Conv2d(1, 1, 1), b)
    with pytest.raises(ValueError, match=named):
        WeightSum([a, b])
    WeightSum([a if not a._forward_hooks else b, copy.deepcopy(a)])


@pytest.mark.parametrize(
    "held",
    [
        math.nan,
        [math.nan],
        {"a": object()},
        torch.full((2,), math.nan),
        torch.eye(2).to_sparse(),
        torch.ones(2, dtype=torch.cfloat).conj(),
        np.ones,
        nn.ReLU,
        {nn.ReLU()},
        collections.defaultdict(list, a=[1]),
    ],
)
def test_what_copies_hold_alike_is_no_difference(held):
    round = SimpleNamespace(held=held)
    round.itself = round
    network = Scaled(scale=1.0, held=held, round=round)
    WeightSum([network, copy.deepcopy(network)])


def test_a_class_that_was_defined_again_is_the_same_one():
    """As in a notebook's cell that is run twice."""
    source = "class Net(nn.Linear):\n    def forward(self, x):\n        return 2 * super(nn.Linear, self).forward(x)\n"
    made = []
    for _ in range(2):
        scope = {"nn": nn}
        exec(compile(source, "cell", "exec"), scope)
        made.append(scope["Net"](2, 2))
    assert type(made[0]) is not type(made[1])
    WeightSum(made)


GLOBAL = torch.tensor(2.0)


@pytest.mark.parametrize(
    "compute",
    [
        lambda w, x: (w / torch.tensor(0.5)).round() * 0.5,
        lambda w, x: (w * x.new_ones(1)).exp(),
        lambda w, x: (w * GLOBAL).exp(),
        lambda w, x: (w + torch.zeros_like(x)[:1, :1]).sigmoid(),
    ],
)
def test_a_constant_does_not_hide_a_weight_that_is_another_function(compute):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 3))

        def forward(self, x):
            return F.linear(x, compute(self.w, x))

    with pytest.raises(ValueError, match=r"a weight is computed from w by \w+, which is not affine"):
        WeightSum([Net(), Net()])(torch.randn(2, 3))


def _keeping(own):
    """A network that computes with what ``own`` makes of it and keeps, beside a layer."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)
            vars(self)["own"] = own(self)  # not registered

        def forward(self, x):
            return self.linear(x) + self.own(x)

    return Net


def _times(weight):
    return lambda x, w=weight: F.linear(x, w)


def _patched(network):
    forward = network.forward
    network.forward = lambda *args: forward(*args)
    return torch.relu


def _holding(weight):
    def own(x):
        return F.linear(x, own.weight)

    own.weight = weight
    return own


ASTRAY = [
    lambda network: _times(nn.Parameter(torch.randn(3, 3))),
    lambda network: nn.Linear(3, 3),
    lambda network: partial(F.linear, weight=nn.Parameter(torch.randn(3, 3))),
    lambda network: lambda x: network.linear(x).relu(),
    lambda network: _holding(network.linear.weight),
    lambda network: {"a": network.linear}.__getitem__,
    lambda network: lru_cache(network.linear),
    _patched,
]


@pytest.mark.parametrize("own", ASTRAY)
def test_a_parameter_that_no_copy_follows_wants_a_proof_and_is_refused_where_nothing_is_computed(own):
    pair = [_keeping(own)().eval() for _ in "ab"]
    ways = [lambda n: random_signs(n, torch.Generator()), lambda n: relabelled(n, torch.arange(3), torch.ones(2, 3))]
    for way in (*ways, lambda n: random_like(n, n), lambda n: ties(n, pair)):
        with pytest.raises(ValueError, match="'' holds weights that are not registered, or in a function"):
            way(pair[0])
    for way in (
        average,
        lambda n: WeightSum(n).materialize(),
        lambda n: torch.func.vmap(WeightSum(n))(torch.ones(2, 3)),
    ):
        with pytest.raises(ValueError, match="'Net' may compute its weight, or with one that is not registered"):
            way(pair)
    takes_part = "takes part that the network has not registered"
    if "getitem" not in str(pair[0].own):
        with pytest.raises(ValueError, match=takes_part):
            average(pair, torch.ones(2, 3))


def _followed(network):
    """What a copy follows, or what has no weights."""
    network.method, network.layers, network.log = network.linear.forward, [network.linear], logging.getLogger("net")
    network.act, network.optimizer = partial(torch.clamp, min=0), torch.optim.SGD(network.linear.parameters(), 0.1)
    network.log.handlers[:] = [SimpleNamespace(level=0, stream={"another": nn.Linear(2, 2)})]
    return partial(F.linear, weight=torch.eye(3))


def test_what_a_copy_follows_is_summed():
    pair, x = [_keeping(_followed)() for _ in "ab"], torch.randn(2, 3)
    assert torch.allclose(average(pair)(x), by_hand(pair, [0.5, 0.5])(x))


def _beside(network):
    """Weights that are none of the network's and take no part."""
    network.parent, network.best = [nn.Sequential(network)], [nn.Linear(3, 3)]
    network.part_of, network.scaled = weakref.ref(network.parent[0]), lambda y: y * network.factor
    return torch.relu


def test_weights_that_take_no_part_are_no_hindrance():
    pair, x = [_keeping(_beside)() for _ in "ab"], torch.randn(2, 3)
    total = WeightSum(pair)
    assert torch.allclose(total(x), by_hand(pair, [1, 1])(x))
    assert torch.allclose(average(pair, x)(x), by_hand(pair, [0.5, 0.5])(x))


def test_a_parameter_that_is_not_registered_is_refused_once_it_takes_part():
    w = nn.Parameter(torch.randn(3, 3))

    class Net(nn.Linear):
        def forward(self, x):
            return F.linear(super().forward(x), w)

    with pytest.raises(ValueError, match=r"a parameter \(3, 3\) takes part that the network has not registered"):
        WeightSum([Net(3, 3), Net(3, 3)])(torch.randn(2, 3))


class Recomputed(nn.Module):
    """Its activations are computed again in the backward pass; its scale has no axes."""

    def __init__(self, reentrant):
        super().__init__()
        self.linear, self.scale, self.reentrant = nn.Linear(3, 3), nn.Parameter(torch.ones(())), reentrant

    def forward(self, x):
        return checkpoint(lambda y: F.softplus(y * self.scale), self.linear(x), use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_inside_is_refused_and_one_around_the_sum_is_right(reentrant):
    pair, x = [Recomputed(reentrant) for _ in "ab"], torch.randn(2, 3)
    total = WeightSum(pair)
    with torch.no_grad():
        assert torch.allclose(total(x), by_hand(pair, [1, 1])(x))
    with pytest.raises(ValueError, match="checkpoint the sum itself"):
        total(x)
    assert torch.allclose(average(pair, x)(x), by_hand(pair, [0.5, 0.5])(x))
    plain = WeightSum([nn.Linear(3, 3), nn.Linear(3, 3)])
    checkpoint(plain, x, use_reentrant=False).sum().backward()
    assert torch.allclose(plain.networks[0].weight.grad, x.sum(0).expand(3, 3))


class Transposed(nn.Linear):
    """Holds its weight as (in, out), and goes by what it says of its sizes."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, bias=False)
        self.weight = nn.Parameter(torch.randn(inputs, outputs))

    def forward(self, x):
        return x @ self.weight / self.in_features


def test_sizes_that_a_layer_names_stay_where_no_tensor_changes_its_size():
    pair, x = [Transposed(3, 12) for _ in "ab"], torch.randn(2, 3)
    total = WeightSum(pair)
    assert torch.allclose(total(x), pair[0](x) + pair[1](x), atol=1e-6)
    assert torch.equal(total.materialize()(x), total(x))


NET = "class Net(nn.Linear):\n    def forward(self, x):\n        return {} * nn.Linear.forward(self, x)\n"


def _cells(*sources, name="Net"):
    """What a cell, or a file, defines under a name, once for each text."""
    for source in sources:
        scope = {"nn": nn, "torch": torch, "__name__": "cell"}
        exec(compile(source, "cell", "exec"), scope)
        yield scope[name]


def _nets(*sources):
    return [net(2, 2) for net in _cells(*sources)]


def _helped(*sources):
    return [Scaled(scale=1.0, act=act()) for act in _cells(*sources, name="Act")]


CALLED = "class Act:\n    def __call__(self, x):\n        return torch.{}(x)\n"


@pytest.mark.parametrize(
    "pair",
    [
        _nets(*(f"SCALE = {k}\n" + NET.format("SCALE") for k in (1.0, 2.0))),
        _nets(*(f"def scale():\n    return {k}\n" + NET.format("scale()") for k in (1.0, 2.0))),
        _nets(*(f"SCALE = {k}\n" + NET.format("(lambda: SCALE)()") for k in (1.0, 2.0))),
        _helped(CALLED.format("relu"), CALLED.format("tanh")),
        _helped(*(f"class Of:\n    k = {k}\n\n\nclass Act(Of):\n    pass\n" for k in (1.0, 2.0))),
        [Scaled(scale=1.0, held=SimpleNamespace(t=torch.arange(4.0).view(shape))) for shape in ((1, 4), (4, 1))],
        [Scaled(scale=1.0, held=SimpleNamespace(t=torch.zeros(1, dtype=t))) for t in (torch.float32, torch.int32)],
        [Scaled(scale=1.0, held={held}) for held in ((0, 1), (1, 3))],
        [Scaled(scale=1.0, held={np.int64(held)}) for held in (1, 5)],
    ],
)
def test_a_difference_further_inside_is_refused(pair):
    a, b = pair
    WeightSum([a, copy.deepcopy(a)])
    with pytest.raises(ValueError, match=r"is .* in network 0 and .* in network 1"):
        WeightSum([a, b])


KINDS = "class Q:\n    pass\n\n\ndef f(x):\n    return x\n\n\nclass Act:\n    def __init__(self):\n        self.kinds = {Q, f}\n"


@pytest.mark.parametrize(
    "pair",
    [
        _helped(KINDS, KINDS),
        _nets(*(f"bias = {k}\n" + NET.format("self.bias") for k in (1.0, 2.0))),  # an attribute, and no global
    ],
)
def test_what_reads_alike_and_is_defined_again_is_alike(pair):
    WeightSum(pair)


def test_of_two_classes_the_difference_is_named():
    pair = _nets(NET.format(1), NET.format(2))
    with pytest.raises(ValueError, match=r"'code of \.forward' is"):
        WeightSum(pair)


def test_backward_hooks_compiled_and_scripted_networks_are_refused():
    a, b, hooked = (nn.Linear(2, 2) for _ in "abc")
    hooked.register_full_backward_hook(lambda module, grad_input, grad_output: None)
    refused = {
        "or has a hook": hooked,
        "or compiled": torch.compile(b),
        "scripted or traced": torch.jit.script(nn.Linear(2, 2)),
    }
    for why, other in refused.items():
        with pytest.raises(ValueError, match=f"network 1 .*{why}"):
            WeightSum([a, other])
    b.compile()
    assert torch.equal(WeightSum([a, b])(torch.eye(2)), by_hand([a, b], [1, 1])(torch.eye(2)))


def _normalized(layer):
    return layer.weight / layer.weight.norm()


class Normalized(Scaled):
    def forward(self, x):
        return F.linear(x, _normalized(self.linear))


class Wrapped(Scaled):
    @wraps(Normalized.forward)
    def forward(self, x):
        return F.linear(x, self.linear.weight.exp())


class Elsewhere(Scaled):
    """Not a weight, but where the weights are."""

    def forward(self, x):
        return self.linear(x.to(next(self.parameters()).device))


def test_to_ask_where_the_weights_are_wants_no_example():
    pair = [Elsewhere(scale=1.0) for _ in "ab"]
    assert torch.allclose(average(pair).linear.weight, (pair[0].linear.weight + pair[1].linear.weight) / 2)


@pytest.mark.parametrize("kind", [Normalized, Wrapped])
def test_a_weight_that_another_function_computes_wants_an_example(kind):
    with pytest.raises(ValueError, match=r"may compute its weight, .*; call the sum on an example first"):
        average([kind(), kind()])
    with pytest.raises(ValueError, match=r"a weight is computed from linear\.weight"):
        average([kind(), kind()], torch.ones(2, 3))


def test_each_mode_is_proven_for_itself():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 3))

        def forward(self, x):
            return F.linear(x, self.w if self.training else self.w.sign())

    total, x = WeightSum([Net(), Net()]), torch.randn(2, 3)
    total(x)
    with pytest.raises(ValueError, match="computed from w by sign"):
        total.eval()(x)


def test_under_inference_mode_nothing_is_proven_and_what_needs_a_proof_is_refused():
    with torch.inference_mode():
        with pytest.raises(ValueError, match=r"'LowRank' may compute its weight.*nor under .*inference_mode"):
            WeightSum([LowRank(True), LowRank(True)])(torch.randn(5, 4))
        a, b = nn.Linear(3, 2), nn.Linear(3, 2)
        x = torch.randn(4, 3)
        torch.testing.assert_close(WeightSum([a, b])(x), a(x) + b(x))


def test_parameters_in_a_container_are_proven_like_those_of_a_layer():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.low = nn.ParameterDict({"A": torch.randn(2, 3), "B": torch.randn(3, 2)})

        def forward(self, x):
            return x @ self.low["A"].t() @ self.low["B"].t()

    pair = [Net(), Net()]
    with pytest.raises(ValueError, match=r"computed from low.A and low.B by mm"):
        WeightSum(pair)(torch.randn(2, 3))
    with pytest.raises(ValueError, match=r"'low' may compute its weight"):
        WeightSum(pair).materialize()


@pytest.mark.parametrize("make", [lambda: nn.GRU(3, 4), lambda: nn.LSTM(3, 4, batch_first=True), lambda: nn.RNN(3, 4)])
def test_recurrent_networks_are_summed_and_take_all_their_arguments(make):
    pair, x = [make(), make()], torch.randn(5, 2, 3)
    plain, total = by_hand(pair, [1, 1]), WeightSum(pair)
    torch.testing.assert_close(total(x)[0], plain(x)[0])
    batch = x.shape[0] if plain.batch_first else x.shape[1]
    state = torch.randn(1, batch, 4)
    state = (state, -state) if isinstance(plain, nn.LSTM) else state
    torch.testing.assert_close(total(x, state)[0], plain(x, state)[0])
    torch.testing.assert_close(total(x, hx=state)[0], plain(x, hx=state)[0])
    total(x, state, held=[1])[0].sum().backward()
    assert pair[0].weight_ih_l0.grad is not None and pair[1].weight_ih_l0.grad is None


class Normalizing(nn.Module):
    """Its forward takes the weight of a layer below, and is none of PyTorch's."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x):
        return F.linear(x, F.normalize(self.linear.weight))


class Wrapped(Normalizing):
    """The same in a nested function, and behind a property."""

    def forward(self, x):
        return sum(F.linear(each, self.normal) for each in (x, x))

    @property
    def normal(self):
        return (lambda of: F.normalize(of.weight))(self.linear)


class Initialized(nn.Module):
    """What sets its weights names them, which its forward does not."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def _init_weights(self):
        nn.init.ones_(self.linear.weight)

    def forward(self, x):
        return self.linear(x)


def test_what_sets_weights_needs_no_proof():
    a, b = Initialized(), Initialized()
    assert torch.equal(WeightSum([a, b]).materialize().linear.weight, a.linear.weight + b.linear.weight)


@pytest.mark.parametrize("kind", [Normalizing, Wrapped])
def test_a_weight_that_is_made_of_a_layers_below_needs_the_proof(kind):
    total = WeightSum([kind(), kind()])
    with pytest.raises(ValueError, match="call the sum on an example first"):
        total.materialize()
    with pytest.raises(ValueError, match="by linalg_vector_norm"):
        total(torch.ones(1, 3))


class Decaying(nn.Module):
    """Keeps its weight in a list too, and its last activation."""

    def __init__(self, listed=True):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.decayed = [self.linear.weight] if listed else []

    def forward(self, x):
        self.last = self.linear(x)
        self.kept = Held(self.last)
        return self.last, sum(p.square().sum() for p in self.decayed)


def test_a_list_of_registered_parameters_is_refused_once_it_takes_part():
    with pytest.raises(ValueError, match="takes part that the network has not registered"):
        WeightSum([Decaying(), Decaying()])(torch.ones(1, 3))


def test_generators_of_random_numbers_may_have_come_to_another_place():
    made = [Scaled(scale=1.0, g=random.Random(i), h=np.random.default_rng(i)) for i in range(2)]
    vars(made[1])["zero"], vars(made[0])["zero"] = torch.tensor([-0.0]), torch.tensor([0.0])
    WeightSum(made)


def test_a_traced_graph_is_compared_in_time():
    networks = [torch.fx.symbolic_trace(torch.nn.Sequential(*(nn.Linear(3, 3) for _ in range(20)))) for _ in range(2)]
    x = torch.ones(1, 3)
    assert torch.allclose(WeightSum(networks)(x), by_hand(networks, [1, 1])(x), atol=1e-6)


def test_what_forward_keeps_is_no_hindrance():
    a, b = Decaying(listed=False), Decaying(listed=False)
    x = torch.ones(1, 3)
    total = WeightSum([a, b])
    assert torch.allclose(total(x)[0], a(x)[0] + b(x)[0])
    assert torch.equal(total.materialize()(x)[0], total(x)[0])


class Rounded(nn.Module):
    """A weight that is no affine function, behind constants that reuse the memory of activations that are gone."""

    def __init__(self):
        super().__init__()
        self.linear, self.q = nn.Linear(3, 3), nn.Parameter(torch.randn(3, 3))

    def forward(self, x):
        x = (self.linear(x).relu() * 2 + 1).relu()
        step = torch.from_numpy(np.full(3, 0.5, "f4"))
        return F.linear(x, (self.q / step).tanh() * step)


def test_a_constant_in_the_place_of_an_activation_that_is_gone_is_a_constant():
    for _ in range(20):
        with pytest.raises(ValueError, match="by tanh"):
            WeightSum([Rounded(), Rounded()])(torch.randn(5, 3))


def test_inputs_may_lie_in_objects_of_other_libraries():
    class Reading(Decaying):
        def forward(self, batch):
            return self.linear(batch.x.relu())

    a, b, batch = Reading(), Reading(), SimpleNamespace(x=torch.randn(2, 3))
    assert torch.allclose(WeightSum([a, b])(batch), a(batch) + b(batch), atol=1e-6)


def test_a_plain_network_computes_as_its_sum_though_its_parents_were_changed():
    a, b = (nn.Sequential(nn.Linear(3, 3), nn.ReLU()) for _ in range(2))
    total, x = WeightSum([a, b]), torch.randn(4, 3)
    a[1] = b[1] = nn.GELU()
    assert torch.equal(total.materialize()(x), total(x))
