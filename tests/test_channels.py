import copy
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from weightsum_lib.core.channels import hidden_channels, prove
from weightsum_lib.core.keys import Channels, draw, widen
from weightsum_lib.core.models import ResNet, resnet20, vgg8, vgg16

IMAGES = (2, 3, 32, 32)


class Functional(nn.Module):
    """Weights without layers, one used through permute."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(6, 3, 3, 3))
        self.mixing = nn.Parameter(torch.randn(6, 5))  # (in, out)
        self.scale = nn.Parameter(torch.randn(1, 6, 1, 1))
        self.head = nn.Parameter(torch.randn(7, 5))

    def forward(self, x):
        x = F.relu(F.conv2d(x, self.kernel, padding=1)) * self.scale
        x = F.conv2d(x, self.mixing.permute(1, 0)[:, :, None, None])
        return torch.einsum("nchw,kc->nk", x.tanh(), self.head)


class Squeeze(nn.Module):
    """Squeeze-and-excitation, and a spatial gate of one channel, around a residual."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(8, 2), nn.ReLU(), nn.Linear(2, 8), nn.Sigmoid())
        self.where = nn.Conv2d(8, 1, 1)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x).relu_()
        y = self.body(x)
        y = y * self.gate(y.mean((2, 3)))[:, :, None, None] * self.where(y).sigmoid().expand_as(y)
        return F.log_softmax(self.head((x + y).amax((2, 3))), dim=1)


class Backwards(nn.Module):
    """Registered in another order than computed; linear layers on the last dimension; weights tied."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(4, 3)
        self.second = nn.Linear(5, 4)
        self.norm = nn.BatchNorm1d(5)
        self.first = nn.Linear(6, 5)
        self.again = nn.Linear(4, 4)
        self.same = self.again

    def forward(self, x):  # (N, T, 6)
        x = self.norm(self.first(x).transpose(1, 2)).transpose(1, 2)
        x = self.second(x.relu())
        return self.out(x + self.same(self.again(x).relu())).mean(1)


class Head(nn.Module):
    """Attention whose scale is a number."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.out((self.q(x) @ self.k(x).transpose(1, 2) / 2).softmax(-1) @ self.v(x))


class Gate(nn.Module):
    """Channels times a number that comes from the input, spread over them."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x):
        y = self.a(x)
        return self.b(y * x.mean(1, keepdim=True).expand_as(y))


def layers(*modules):
    return nn.Sequential(*modules)


def depthwise():
    return layers(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU6(),
        nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.BatchNorm2d(8), nn.Hardswish(),
        nn.Conv2d(8, 16, 3, groups=8), nn.PReLU(16), nn.Conv2d(16, 6, 1), nn.PReLU(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(6 * 36, 3),
    )  # fmt: skip


RIGHT = {  # network, shape of its input, number of groups
    "vgg8": (lambda: vgg8(width=1 / 16), IMAGES, 6),
    "vgg8 of one channel": (lambda: vgg8(width=1 / 64, centered_scale=True), IMAGES, 6),
    "vgg16": (lambda: vgg16(in_channels=1, width=1 / 8), IMAGES, 12),
    "resnet20": (lambda: resnet20(width=1 / 4), IMAGES, 12),
    "resnet20, centered": (lambda: resnet20(width=1 / 8, centered_scale=True), IMAGES, 12),
    "depthwise": (depthwise, (2, 3, 16, 16), 2),
    "Conv1d": (
        lambda: layers(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), nn.GELU(), nn.MaxPool1d(2), nn.Conv1d(6, 5, 3, padding=1),
                       nn.Dropout(), nn.AdaptiveMaxPool1d(1), nn.Flatten(), nn.Linear(5, 2)),
        (3, 4, 12), 2,
    ),
    "transposed": (
        lambda: layers(nn.Conv2d(3, 6, 3, stride=2), nn.ReLU(), nn.ConvTranspose2d(6, 5, 2, stride=2),
                       nn.BatchNorm2d(5), nn.ConvTranspose2d(5, 5, 3, groups=5), nn.ConvTranspose2d(5, 10, 3, groups=5),
                       nn.ELU(), nn.Upsample(scale_factor=2), nn.ReflectionPad2d(1), nn.ConvTranspose2d(10, 4, 1),
                       nn.Conv2d(4, 8, 1), nn.PixelShuffle(2)),
        (2, 3, 9, 9), 3,
    ),
    "linear": (
        lambda: layers(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6, bias=False), nn.PReLU(6), nn.Linear(6, 2)), (4, 5), 2,
    ),
    "one linear": (lambda: nn.Linear(5, 2), (4, 5), 0),
    "one number": (lambda: layers(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 1), nn.Flatten(0)), (1, 1), 1),
    "functional": (Functional, (2, 3, 6, 6), 2),
    "squeeze and excitation": (Squeeze, (2, 3, 8, 8), 2),
    "registered in another order": (Backwards, (2, 5, 6), 2),
    "attention of one head": (Head, (2, 5, 3), 2),
    "spread": (Gate, (2, 3), 1),
    "batch norms": (
        lambda: layers(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 5, 1),
                       nn.BatchNorm2d(5, track_running_stats=False), nn.Conv2d(5, 6, 1),
                       nn.BatchNorm2d(6, affine=False, track_running_stats=False), nn.Flatten(), nn.Linear(6 * 36, 2)),
        (2, 3, 8, 8), 3,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", RIGHT)
def test_the_network_computes_the_same_under_a_random_key(case):
    make, shape, groups = RIGHT[case]
    network = make().double().eval()
    before = {name: t.clone() for name, t in network.state_dict().items()}
    channels = hidden_channels(network, torch.zeros(shape))
    assert len(channels.sizes) == groups
    assert all(torch.equal(t, before[name]) for name, t in network.state_dict().items())
    for t in [*network.parameters(), *network.buffers()]:
        if t.is_floating_point():
            t.data.uniform_(0.2, 1.0).mul_(torch.randint(0, 2, t.shape) * 2 - 1 if t.requires_grad else 1)
    x, rng = torch.randn(shape, dtype=torch.float64), torch.Generator().manual_seed(3)
    for width in (1.0, 2.5):
        moved = widen(network, draw(channels, width, rng)).eval()
        torch.testing.assert_close(moved(x), network(x), rtol=1e-8, atol=1e-8)
        wider = [p.shape != q.shape for p, q in zip(moved.parameters(), network.parameters(), strict=True)]
        assert any(wider) == (groups > 0 and width > 1)


@pytest.mark.no_cover
def test_torchvisions_networks_and_the_time_it_takes():
    r18 = hidden_channels(torchvision.models.resnet18(num_classes=10), torch.zeros(2, 3, 32, 32))
    assert len(r18.sizes) == 12 and r18.sizes["conv1"] == 64
    assert r18.axes["layer2.0.downsample.0.weight"] == ((0, "layer2.0.conv2", 1), (1, "conv1", 1))
    mobile = hidden_channels(torchvision.models.mobilenet_v2(num_classes=10), torch.zeros(2, 3, 32, 32))
    assert mobile.axes["features.2.conv.1.0.weight"] == ((0, "features.2.conv.0.0", 1),)


def test_the_axes_are_those_of_the_layers():
    channels = hidden_channels(vgg8(width=1 / 16), torch.zeros(IMAGES))
    assert channels.axes["features.conv1_1.weight"] == ((0, "features.conv1_1", 1),)
    assert channels.axes["features.bn2_1.running_var"] == ((0, "features.conv2_1", 1),)
    assert channels.axes["classifier.fc1.weight"] == ((0, "classifier.fc1", 1), (1, "features.conv4_1", 4))
    assert channels.axes["classifier.fc3.weight"] == ((1, "classifier.fc2", 1),)
    assert channels.axes["classifier.fc3.bias"] == channels.axes["features.bn1_1.num_batches_tracked"] == ()
    expected = {f"features.conv{i}_1": 2 ** (i + 1) for i in (1, 2, 3, 4)} | {
        "classifier.fc1": 256,
        "classifier.fc2": 256,
    }
    assert list(channels.sizes.items()) == list(expected.items())
    assert set(channels.axes) == set(vgg8(width=1 / 16).state_dict())
    axes = hidden_channels(depthwise(), torch.zeros(2, 3, 16, 16)).axes
    assert axes["6.weight"] == axes["6.bias"] == axes["7.weight"] == ((0, "0", 2),)  # two outputs of each channel
    assert axes["8.weight"] == ((0, "8", 1), (1, "0", 2)) and axes["9.weight"] == ()
    tied = hidden_channels(Backwards(), torch.zeros(2, 5, 6)).axes
    assert tied["same.weight"] == tied["again.weight"] == ((0, "second", 1), (1, "second", 1))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.attention, self.head = (
            nn.Linear(3, 8),
            nn.MultiheadAttention(8, 2, batch_first=True),
            nn.Linear(8, 2),
        )

    def forward(self, x):
        x = self.embed(x)
        return self.head(x + self.attention(x, x, x)[0])


class Heads(nn.Module):
    """Attention by hand."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(3, 24), nn.Linear(8, 2)

    def forward(self, x):
        q, k, v = self.qkv(x).view(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 5, 8))


class Formula(nn.Module):
    """Layer, formula, layer."""

    def __init__(self, formula, out=6):
        super().__init__()
        self.stem, self.formula, self.head = nn.Conv2d(3, 6, 1), formula, nn.Conv2d(out, 2, 1)

    def forward(self, x):
        return self.head(self.formula(self.stem(x)))


class HeadOnResidual(nn.Module):
    """What is refused is added to what has an order."""

    def __init__(self):
        super().__init__()
        self.qkv, self.head = nn.Linear(3, 9), nn.Linear(3, 2)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.head(x + (q @ k.transpose(1, 2)).softmax(-1) @ v)


class SharedByValue(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.b(self.a(x).relu()) + x @ self.b.weight.T[:3]


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.a(x)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


class Last(nn.Module):
    def forward(self, x):
        return x.permute(0, 2, 3, 1).flatten(1)


def among(*modules):
    return layers(nn.Conv2d(3, 6, 3), *modules, nn.Conv2d(6, 2, 1))


def _fill_third(x):
    x[:, 2] = 1.0
    return x


IMAGE = (2, 3, 8, 8)
WRONG = {
    "layer norm": (lambda: layers(nn.Linear(3, 6), nn.LayerNorm(6), nn.Linear(6, 2)), (2, 3),
                   r"'1' \(LayerNorm\): native_layer_norm runs over the hidden channels of '0': widened, it would run"),
    "group norm": (lambda: among(nn.GroupNorm(2, 6)), IMAGE, r"'1' \(GroupNorm\): native_group_norm .* of '0'"),
    "RMS norm": (lambda: layers(nn.Linear(3, 6), nn.RMSNorm(6), nn.Linear(6, 2)), (2, 3), r"'1' \(RMSNorm\): mean"),
    "instance norm": (lambda: among(nn.InstanceNorm2d(6)), IMAGE, r"'1' \(InstanceNorm2d\)"),
    "local response norm": (lambda: among(nn.LocalResponseNorm(3)), IMAGE, r"'1' \(LocalResponseNorm\)"),
    "grouped": (lambda: among(nn.Conv2d(6, 6, 1, groups=2)), IMAGE, r"'1' \(Conv2d\): convolution .*'0': of grouped"),
    "grouped input": (lambda: layers(nn.Conv2d(4, 6, 3, groups=2), nn.Conv2d(6, 2, 1)), (2, 4, 8, 8), "'0' .*grouped"),
    "grouped output": (lambda: layers(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 2, 1, groups=2)), (2, 4, 8, 8), "'1' .*grouped"),
    "shuffle": (lambda: among(nn.ChannelShuffle(2)), IMAGE, r"'1' \(ChannelShuffle\): channel_shuffle .* not split"),
    "pixel shuffle": (lambda: layers(nn.Conv2d(3, 8, 3), nn.PixelShuffle(2), nn.Conv2d(2, 2, 1)), IMAGE, "pixel_shuffle"),
    "softmax": (lambda: among(nn.Softmax(1)), IMAGE, r"'1' \(Softmax\): _softmax .* '0'"),
    "channels last": (lambda: layers(nn.Conv2d(3, 6, 3), Last(), nn.Linear(216, 2)), IMAGE, "'1' .Last.: _unsafe_view"),
    "attention": (Attention, (2, 5, 3), r"'attention' \(MultiheadAttention\)"),
    "heads": (Heads, (2, 5, 3), "Heads: .* 'qkv'"),
    "attention on a residual": (HeadOnResidual, (2, 5, 3), "HeadOnResidual: split .* 'qkv'"),
    "used as weights later": (SharedByValue, (2, 3), "SharedByValue: slice .* 'a'"),
    "LSTM": (Recurrent, (2, 4, 3), r"'lstm' \(LSTM\)"),
    "unused": (Unused, (2, 3), "parameter 'b.weight' takes no part"),
    "lazy": (lambda: layers(nn.LazyLinear(3), nn.Linear(3, 2)), (2, 4), "'0.weight' has no shape yet"),
    "dead": (lambda: layers(nn.Linear(3, 4), nn.Threshold(1e9, 0.0), nn.Linear(4, 2, bias=False)), (2, 3), "proves"),
}  # fmt: skip
FORMULAS = {  # of 6 channels: formula, channels afterwards, message
    "shuffled": (lambda x: x.view(2, 2, 3, 8, 8).transpose(1, 2).reshape(2, 6, 8, 8), 6, "Formula: view .* not split"),
    "maximum": (lambda x: x.max(1, keepdim=True)[0], 1, "Formula: max"),
    "sum": (lambda x: x.exp().sum(1, keepdim=True), 1, "Formula: sum"),
    "normalized": (lambda x: x / x.norm(dim=1, keepdim=True).expand_as(x), 6, "Formula: linalg_vector_norm"),
    "half of them": (lambda x: x[:, :3], 3, "Formula: slice"),
    "gated": (lambda x: F.glu(x, 1), 3, "Formula: glu"),
    "chunks": (lambda x: torch.mul(*x.chunk(2, 1)), 3, "Formula: split"),
    "backwards": (lambda x: x + x.flip(1), 6, "Formula: flip"),
    "concatenated": (lambda x: torch.cat([x, x], 1), 12, "Formula: cat"),
    "padded": (lambda x: F.pad(x, (0, 0, 0, 0, 1, 1)), 8, "Formula: constant_pad_nd"),
    "patches": (lambda x: F.unfold(x, 1).view(2, 6, 8, 8), 6, "Formula: im2col"),
    "constant": (lambda x: x * torch.linspace(0, 1, 6).view(6, 1, 1), 6, "Formula: mul .* make it a buffer"),
    "told apart": (lambda x: x.index_fill(1, torch.tensor([2]), 0.0), 6, "Formula: index_fill"),
    "counted by a convolution": (
        lambda x: x * F.conv1d(x.mean((2, 3))[:, None], torch.ones(1, 1, 3).type_as(x), padding=1)[0, 0, :, None, None],
        6,
        "Formula: convolution .* tells them apart",
    ),
    "made in forward": (lambda x: x + x.new_ones(6, 1, 1), 6, "Formula: add .* make it a buffer"),
    "told apart in place": (lambda x: _fill_third(x.clone()), 6, "Formula: select"),
    "hard-coded": (lambda x: x.view(-1, 6, 8, 8), 6, "'stem' in other places, among more: shape .* are sizes written"),
    "counted": (lambda x: x / x.shape[1], 6, "'stem' in other places, among more: the output is another"),
}
for _name, (_formula, _out, _message) in FORMULAS.items():
    WRONG[_name] = (lambda f=_formula, n=_out: Formula(f, n), IMAGE, _message)


@pytest.mark.parametrize("case", WRONG)
def test_what_can_not_be_right_is_refused_by_name(case):
    make, shape, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        hidden_channels(make(), torch.zeros(shape))


def test_what_happens_to_outputs_and_inputs_is_no_matter():
    """Logits may be normalized, split and mixed; channels added to the input are not hidden."""
    for tail in (nn.Softmax(1), nn.LayerNorm(4), nn.Unflatten(1, (2, 2)), nn.Identity()):
        network = layers(nn.LayerNorm(3), nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 4), tail)
        assert hidden_channels(network, torch.zeros(2, 3)).sizes == {"1": 6}

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = nn.Linear(3, 5), nn.Linear(5, 3), nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.d(self.c(x + self.b(self.a(x).relu())).relu())

    assert hidden_channels(Residual(), torch.zeros(2, 3)).sizes == {"a": 5, "c": 6}


@dataclass
class Boxes:
    at: torch.Tensor


class Detector(nn.Module):
    """Two outputs, the second not in a tuple or a dictionary."""

    def __init__(self, other):
        super().__init__()
        self.a, self.b, self.other = nn.Linear(3, 6), nn.Linear(6, 4), other

    def forward(self, x):
        hidden = self.a(x)
        return self.b(hidden.relu()), self.other(hidden)


def test_outputs_that_are_not_looked_into_and_casts_are_refused():
    with pytest.raises(ValueError, match="returns a Boxes, in which no tensor is looked for; return tensors"):
        hidden_channels(Detector(Boxes), torch.zeros(2, 3))
    for rest in (3, torch.float32, range(3), np.int64(3), None):
        assert hidden_channels(Detector(lambda y, rest=rest: {"hidden": y, "n": rest}), torch.zeros(2, 3)).sizes == {}
    with pytest.raises(ValueError, match="does not compute a random example in float64, on the CPU"):
        hidden_channels(layers(nn.Linear(3, 6), Half(), nn.Linear(6, 4)), torch.zeros(2, 3))


class Half(nn.Module):
    def forward(self, x):
        return x.half()


def test_what_forward_has_kept_is_no_hindrance():
    network = Detector(nn.Identity())
    network.kept = network(torch.ones(2, 3))
    assert hidden_channels(network, torch.zeros(2, 3)).sizes == {}


def test_integer_examples_are_refused():
    with pytest.raises(ValueError, match=r"floating-point input, got torch.uint8 \(2, 3, 32, 32\)"):
        hidden_channels(vgg8(width=1 / 16), torch.zeros(IMAGES, dtype=torch.uint8))


def mutations(channels):
    """Every entry of the map left out, given to another group, and with another number of entries."""
    for name, entries in channels.axes.items():
        for i, (axis, group, each) in enumerate(entries):
            same = [g for g, n in channels.sizes.items() if n == channels.sizes[group] and g != group]
            wrong = [None, *((axis, other, each) for other in same[:1]), (axis, group, 2 * each)]
            if each > 1:
                wrong.append((axis, group, each // 2))
            for entry in wrong:
                changed = [entry if j == i else e for j, e in enumerate(entries)]
                yield name, entry, Channels(channels.axes | {name: tuple(filter(None, changed))}, channels.sizes)


MUTATED = {
    "vgg8": (lambda: vgg8(width=1 / 16), IMAGES),
    "resnet20, fewer blocks": (lambda: ResNet((2, 1, 1), width=1 / 8), (1, 3, 32, 32)),
    "depthwise": (depthwise, (2, 3, 16, 16)),
}


@pytest.mark.no_cover  # hundreds of proofs, in which being watched takes three quarters of the time
@pytest.mark.parametrize("case", MUTATED)
def test_the_proof_fails_for_every_wrong_map(case):
    make, shape = MUTATED[case]
    network, example = make(), torch.zeros(shape)
    channels = hidden_channels(network, example)
    prove(network, channels, example)
    count = 0
    for name, entry, wrong in mutations(channels):
        with pytest.raises(ValueError):
            prove(network, wrong, example)
            pytest.fail(f"{name}: {entry} is not caught")
        count += 1
    assert count > 40


def test_the_proof_leaves_the_network_and_the_random_numbers_alone():
    network = vgg8(width=1 / 16)
    state, random = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    hidden_channels(network, torch.zeros(IMAGES))
    assert torch.equal(torch.get_rng_state(), random) and network.training
    assert all(torch.equal(t, state[name]) for name, t in network.state_dict().items())


def test_channels_are_found_under_inference_mode_too():
    with torch.inference_mode():
        assert hidden_channels(vgg8(width=1 / 16), torch.zeros(2, 3, 32, 32)).sizes


@pytest.mark.parametrize("change", [{"device": "meta"}, {"dtype": torch.complex64}])
def test_networks_without_real_numbers_are_refused_by_name(change):
    network = nn.Sequential(nn.Linear(3, 4, **change), nn.Linear(4, 2, **change))
    with pytest.raises(ValueError, match=r"'0\.weight' is complex or on the meta device"):
        hidden_channels(network, torch.zeros(2, 3))
