import copy

import pytest
import torch
from torch import nn
from torchvision.models import mobilenet_v2, resnet

from weightsum_lib import (
    Channels,
    Key,
    WeightSum,
    compact,
    deal,
    draw,
    hidden_channels,
    normalize,
    overlap,
    vgg8,
    vgg16,
    widen,
)
from weightsum_lib.core.keys import embed
from weightsum_lib.core.merging import weight_matching


def network(arch=vgg8, width=1 / 16, **options):
    """A small network in evaluation mode whose batch norm does something."""
    made = arch(width=width, dropout=0.0, **options)
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean):
                tensor.normal_()
            module.running_var.uniform_(0.5, 2)
    return made.eval()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


CHANNELS = {arch: hidden_channels(arch(width=1 / 16), torch.zeros(2, 3, 32, 32)) for arch in (vgg8, vgg16)}
SMALL = CHANNELS[vgg8]
ROOM = 4  # the sums here are this much wider than the networks


def drawn(*seeds, width=ROOM):
    return [draw(SMALL, width, generator(seed)) for seed in seeds]


@pytest.mark.parametrize("arch", [vgg8, vgg16])
@pytest.mark.parametrize("centered", [False, True])
def test_a_keyed_network_computes_the_same_as_the_dense_one_that_it_contains(images, arch, centered):
    small = network(arch, centered_scale=centered)
    wide = widen(small, draw(CHANNELS[arch], ROOM, generator()))
    assert wide.features.conv1_1.weight.shape[0] == 16 and wide.features.bn1_1.num_features == 16
    x = normalize(images)
    assert not torch.equal(small(x), torch.zeros_like(small(x)))
    torch.testing.assert_close(wide(x), small(x))
    torch.testing.assert_close(wide.train()(x), small.train()(x))  # under the batch's statistics too


@pytest.mark.parametrize("arch", [vgg8, vgg16])
def test_a_permuted_network_computes_the_same(images, arch):
    plain = network(arch)
    permuted = widen(plain, draw(CHANNELS[arch], 1, generator()))
    assert not torch.equal(permuted.classifier.fc2.weight, plain.classifier.fc2.weight)
    x = normalize(images)
    torch.testing.assert_close(permuted(x), plain(x))


def test_under_disjoint_keys_the_state_dicts_added_add_the_logits(images):
    a, b = network(), network()
    x = normalize(images)
    total = WeightSum([a, b], keys=[deal(SMALL, ROOM, 0), deal(SMALL, ROOM, 1)]).add_statistics().eval()
    torch.testing.assert_close(total(x), a(x) + b(x))
    wide = [widen(n, deal(SMALL, ROOM, i)).state_dict() for i, n in enumerate((a, b))]
    added = {k: wide[0][k] + wide[1][k] for k in wide[0]}
    plain = vgg8(width=1 / 4, dropout=0.0)
    plain.load_state_dict(added)
    torch.testing.assert_close(plain.eval()(x), a(x) + b(x))


def test_a_sum_under_keys_is_the_sum_of_the_wide_networks_compact_or_not(images):
    a, b = network(), network()
    both = drawn(0, 1)
    by_hand = WeightSum([widen(a, both[0]), widen(b, both[1])])
    x = normalize(images)
    for chosen in (both, compact(both)):
        total = WeightSum([a, b], keys=chosen)
        torch.testing.assert_close(total(x), by_hand(x))  # in training mode: the batch's statistics
        torch.testing.assert_close(total.eval()(x), total.materialize()(x))
        total.train()
    assert compact(both)[0].sizes["classifier.fc2"] < both[0].sizes["classifier.fc2"]


def test_the_compact_sum_has_one_shape_for_all_keys_of_a_size():
    shapes = [compact(drawn(i, i + 9))[0].sizes for i in (0, 1)]
    assert shapes[0] == shapes[1] == {layer: 2 * n for layer, n in SMALL.sizes.items()}
    three = compact(drawn(0, 1, 2, width=2))
    assert three[0].sizes == {layer: 2 * n for layer, n in SMALL.sizes.items()}  # no more than there are


def test_gradients_flow_through_keys_to_every_parent_that_is_not_held(images):
    a, b = network(), network()
    total = WeightSum([a, b], keys=drawn(0, 1))
    total(normalize(images)).square().sum().backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for p in (a.classifier.fc2.weight, b.classifier.fc2.weight)
    )
    a.zero_grad(), b.zero_grad()
    total(normalize(images), held=[1]).square().sum().backward()
    assert a.classifier.fc2.weight.grad.abs().sum() > 0 and b.classifier.fc2.weight.grad is None


def test_new_keys_bring_new_statistics(images):
    total = WeightSum([network(), network()], keys=[deal(SMALL, ROOM, 0), deal(SMALL, ROOM, 1)])
    total(normalize(images))
    total.use_keys(drawn(0, 1))
    assert total.body.features.bn1_1.running_mean.tolist() == [0] * 16


def test_random_keys_overlap_as_chance_has_it_and_dealt_ones_not_at_all():
    channels = Channels({}, {"layer": 2_500})
    a, b = (draw(channels, 4, generator(seed)) for seed in (0, 1))
    assert a.sizes == {"layer": 10_000} and len(a.positions["layer"].unique()) == 2_500
    assert overlap(a, b)["layer"] == pytest.approx(0.25, abs=0.03)
    assert overlap(deal(channels, 4, 0), deal(channels, 4, 3))["layer"] == 0


def test_a_layer_may_have_more_room_than_another(images):
    room = dict.fromkeys(SMALL.sizes, 2) | {"features.conv1_1": 8}
    key = draw(SMALL, room, generator())
    assert key.sizes["features.conv1_1"] == 8 * SMALL.sizes["features.conv1_1"]
    assert key.sizes["classifier.fc2"] == 2 * SMALL.sizes["classifier.fc2"]
    small, x = network(), normalize(images)
    torch.testing.assert_close(widen(small, key)(x), small(x))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: deal(SMALL, ROOM, 4), r"no room for 5 disjoint keys: 4 of the 16 channels of 'features.conv1_1'"),
        (lambda: deal(SMALL, ROOM, -1), "no room"),
        (lambda: draw(SMALL, 0.5, generator()), r"width of 0.5 leaves 2 of the 4 channels of 'features.conv1_1'"),
        (lambda: draw(SMALL, {"features.conv1_1": 2}, generator()), r"a value for each of the groups .*, got \['features.conv1_1'\]"),
        (lambda: Key(Channels({}, {"a": 2}), {"a": torch.tensor([1, 1])}, {"a": 4}), "a channel twice: 'a'"),
        (lambda: Key(Channels({}, {"a": 2}), {"a": torch.tensor([1, 4])}, {"a": 4}), r"2 positions in 0 \.\.\. 3, int64, for 'a', got \[1, 4\]"),
        (lambda: Key(Channels({}, {"a": 2}), {"a": torch.tensor([1])}, {"a": 4}), "2 positions .* for 'a', got"),
        (lambda: Key(Channels({}, {"a": 2}), {"a": torch.tensor([0.0, 1.0])}, {"a": 4}), "int64"),
        (lambda: Key(Channels({}, {"a": 1}), {"b": torch.tensor([0])}, {"a": 4}), r"groups \['a'\], got \['b'\]"),
        (lambda: embed({"x": torch.ones(2)}, deal(SMALL, ROOM, 0)), "'x' is no tensor of the network"),
        (lambda: embed(vgg8(width=1 / 8).state_dict(), deal(SMALL, ROOM, 0)), r"'features.conv1_1.weight' is \(8, 3, 3, 3\)"),
        (lambda: WeightSum([network(), network()], keys=[*drawn(0), *drawn(0, width=2)]), "keys of one sum are for one wide"),
        (lambda: WeightSum([network(), network()], keys=drawn(0)), "2 networks need as many keys, got 1"),
    ],
)  # fmt: skip
def test_what_can_be_no_key_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.no_cover
@pytest.mark.parametrize(
    "make",
    [
        lambda: resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=7),
        lambda: mobilenet_v2(num_classes=7, width_mult=0.35),
    ],
)
def test_keys_work_where_channels_are_added_and_in_depthwise_convolutions(make):
    """Under disjoint keys the added state dicts, buffers and all, add the outputs; in training mode too."""
    networks, x = [make().double() for _ in range(2)], torch.randn(4, 3, 32, 32, dtype=torch.float64)
    for net in networks:
        for name, tensor in net.state_dict().items():
            if "running_" in name:
                tensor.uniform_(0.5, 1.5)
        for module in net.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    channels = hidden_channels(networks[0], torch.zeros(2, 3, 32, 32))
    keys = [deal(channels, 2, 0), deal(channels, 2, 1)]
    total = WeightSum(networks, keys=keys).add_statistics().eval()
    alone = [copy.deepcopy(n).eval() for n in networks]
    torch.testing.assert_close(total(x), alone[0](x) + alone[1](x))
    added, other = (widen(n, key).eval() for n, key in zip(networks, keys, strict=True))
    states = added.state_dict(), other.state_dict()
    added.load_state_dict({name: tensor + states[1][name] for name, tensor in states[0].items()})
    torch.testing.assert_close(added(x), alone[0](x) + alone[1](x))
    plain = total.materialize()
    torch.testing.assert_close(plain(x), total(x))
    torch.testing.assert_close(total.train()(x), sum(n.train()(x) for n in alone))
    for module in plain.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.shape[0] == module.out_channels
            assert module.weight.shape[1] * module.groups == module.in_channels


class Shared(nn.Module):
    """A batch norm over channels that are added to the input, and so have no key."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.hidden, self.out = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x):
        return self.out(self.hidden(x + self.norm(self.conv(x))).relu())


def test_statistics_of_channels_without_a_key_are_not_added():
    networks = [Shared(), Shared()]
    channels = hidden_channels(networks[0], torch.zeros(2, 3, 4, 4))
    assert list(channels.sizes) == ["hidden"]
    total = WeightSum(networks, keys=[deal(channels, 2, 0), deal(channels, 2, 1)])
    with pytest.raises(ValueError, match=r"'norm.running_mean' is of channels that all networks share; recalibrate"):
        total.add_statistics()
    assert WeightSum(networks).add_statistics().body.norm.running_var.tolist() == [2.0] * 3


def test_channels_of_another_network_are_refused_by_name():
    make = lambda *more: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), *more)  # noqa: E731
    x, generator = torch.randn(6, 3), torch.Generator().manual_seed(0)
    a, deeper = make(), make(nn.ReLU(), nn.Linear(4, 2))
    for network, of in ((a, deeper), (deeper, a)):
        channels = hidden_channels(of, x)
        with pytest.raises(ValueError, match=r"'4.bias' is in the network or in the channels only"):
            widen(network, draw(channels, 2, generator))
        with pytest.raises(ValueError, match=r"'4.bias' is in the network or in the channels only"):
            weight_matching(network, network, channels)


def test_keys_for_wide_networks_of_two_sizes_are_not_packed_into_one():
    generator = torch.Generator().manual_seed(0)
    channels = hidden_channels(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4)), torch.randn(6, 3))
    with pytest.raises(ValueError, match=r"keys of one sum are for one wide network, got .*8.* and .*32"):
        compact([draw(channels, 2, generator), draw(channels, 8, generator)])
