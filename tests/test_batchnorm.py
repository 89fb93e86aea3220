import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from weightsum_lib import WeightSum, deal, draw, hidden_channels, normalize, recalibrate, vgg8
from weightsum_lib.core.batchnorm import _moments, _pooled


def chain(**options):
    """Two batch-norm layers: "1" and "4"."""
    return nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4, **options), nn.ReLU(), nn.Linear(4, 4), nn.BatchNorm1d(4, **options)
    )


def statistics(network):
    return {name: b.clone() for name, b in network.named_buffers() if "running" in name}


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


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("batches", ["list", "pairs", "loader"])
def test_batches_give_what_one_tensor_gives(affine, batches):
    x, network = torch.randn(50, 3, dtype=torch.float64), chain(affine=affine).double()
    whole = statistics(recalibrate(network, x))
    given = {
        "list": x.split([7, 1, 20, 22]),
        "pairs": [(piece, None) for piece in x.split(8)],
        "loader": DataLoader(TensorDataset(x), batch_size=9, shuffle=True),
    }[batches]
    for layer in (network[1], network[4]):
        layer.reset_running_stats()
    pieces = statistics(recalibrate(network, given))
    assert list(whole) == ["1.running_mean", "1.running_var", "4.running_mean", "4.running_var"]
    for name, wanted in whole.items():
        torch.testing.assert_close(pieces[name], wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(whole["1.running_var"], network[0](x).var(0))


def test_batches_of_images_give_the_statistics_of_a_sum(images):
    x, total = normalize(images), WeightSum([vgg8(width=1 / 16), vgg8(width=1 / 16)])
    whole = statistics(recalibrate(total, x).body)
    for name, wanted in statistics(recalibrate(total, x.split(5)).body).items():
        torch.testing.assert_close(wanted, whole[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("split", [None, 4])
def test_training_goes_on_from_the_statistics(momentum, split):
    x, later, network = torch.randn(12, 3), torch.randn(12, 3), chain(momentum=momentum)
    recalibrate(network, x.split(split) if split else x)
    count = 3 if split else 1
    assert network[1].num_batches_tracked == count
    before = network[1].running_mean.clone()
    network.train()(later)
    share = momentum or 1 / (count + 1)
    wanted = (1 - share) * before + share * network[0](later).mean(0)
    torch.testing.assert_close(network[1].running_mean, wanted)


@pytest.mark.parametrize("given", [iter([torch.ones(2, 3)]), (x for x in [torch.ones(2, 3)]), zip([torch.ones(2, 3)])])
def test_an_iterator_is_refused(given):
    with pytest.raises(TypeError, match="can't be gone through once a layer"):
        recalibrate(chain(), given)


@pytest.mark.parametrize("given", [None, 3, ["an image"], [None], [{"images": torch.ones(2, 3)}]])
def test_what_holds_no_tensors_is_refused(given):
    with pytest.raises(TypeError):
        recalibrate(chain(), given)


@pytest.mark.parametrize("given", [[], torch.zeros(0, 3), [torch.ones(1, 3)]])
def test_fewer_than_two_images_are_refused(given):
    with pytest.raises(ValueError, match=r"two images or more, got [01]|or one value alone"):
        recalibrate(chain(), given)


class Reused(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.norm, self.unused = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Identity()

    def forward(self, x, again=True):
        x = self.norm(self.fc(x))
        return self.norm(x) if again else x


class Unreached(Reused):
    def __init__(self):
        super().__init__()
        self.unused = nn.BatchNorm1d(3)

    def forward(self, x):
        return super().forward(x, again=False)


class Changing(list):
    """Batches that are others in each pass, as with augmentation."""

    def __iter__(self):
        return iter([torch.randn(4, 3), torch.randn(4, 3)])


def bad_images(value):
    x = torch.randn(6, 3)
    x[2, 1] = value
    return x


REFUSED = {
    "NaN": (chain, bad_images(math.nan), "'1' have no finite variance"),
    "infinite": (chain, bad_images(math.inf), "'1' have no finite variance"),
    "too large for half precision": (lambda: chain().half(), 900 * torch.randn(60, 3).half(), "'1' have no finite"),
    "twice": (Reused, torch.randn(6, 3), "'norm' is used twice"),
    "never": (Unreached, torch.randn(6, 3), "'unused' is never reached"),
    "no statistics": (lambda: chain(track_running_stats=False), torch.randn(6, 3), "'1' keeps no running statistics"),
    "changing": (chain, Changing(), "changed between passes"),
}


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_statistics_is_refused_by_name_and_leaves_modes_and_hooks(case, split):
    make, x, error = REFUSED[case]
    network = make().train()
    list(network.children())[1].eval()
    modes = [m.training for m in network.modules()]
    with pytest.raises(ValueError, match=error):
        recalibrate(network, x.split(2) if split and isinstance(x, torch.Tensor) else x)
    assert [m.training for m in network.modules()] == modes
    assert not any(m._forward_pre_hooks for m in network.modules())


def test_a_network_without_batch_norm_is_left_as_it_is():
    network = nn.Linear(3, 2)
    assert recalibrate(network, torch.ones(2, 3)) is network


@pytest.mark.parametrize("shape", [(7, 5), (7, 5, 4, 4), (2, 5)])
@pytest.mark.parametrize("piece", [1, 200, 2**19])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_in_pieces_are_those_of_the_whole(shape, piece, dtype):
    x = (100 + torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype)
    dims = [0, *range(2, x.ndim)]
    variance, mean = torch.var_mean(x.double(), dims)
    x = x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x
    found = _pooled(_moments(x, piece=piece))
    torch.testing.assert_close(found[0], variance, rtol=1e-4, atol=0)
    torch.testing.assert_close(found[1], mean, rtol=1e-6, atol=0)


# Statistics from the owners' images.


@pytest.fixture
def of_two():
    """Two networks, random images for each, whose they are, and their architecture's channels."""
    networks = [vgg8(width=1 / 16).eval(), vgg8(width=1 / 16).eval()]
    parts = [torch.randn(40, 3, 32, 32), 2 * torch.randn(30, 3, 32, 32) + 1]
    channels = hidden_channels(networks[0], torch.zeros(2, 3, 32, 32))
    return networks, parts, torch.tensor([0] * 40 + [1] * 30), channels


def test_under_disjoint_keys_owners_images_give_the_networks_own_statistics(of_two):
    networks, parts, owners, channels = of_two
    total = WeightSum(networks, keys=[deal(channels, 4.0, i) for i in (2, 0)])
    shuffled = torch.randperm(70)
    recalibrate(total, torch.cat(parts)[shuffled], owners[shuffled])
    for network, images, key in zip(networks, parts, total.keys, strict=True):
        for name, wanted in statistics(recalibrate(network, images)).items():
            places = key.positions[channels.axes[name][0][1]]
            torch.testing.assert_close(total.body.get_buffer(name)[places], wanted, rtol=1e-5, atol=1e-6)
    nobody = statistics(total.body)["features.bn1_1.running_var"][4:8]
    assert nobody.tolist() == [0] * 4


def test_a_shared_channel_has_the_images_of_all_that_share_it(of_two):
    networks, parts, owners, channels = of_two
    generator = torch.Generator().manual_seed(0)
    total = WeightSum(networks, keys=[draw(channels, 2.0, generator) for _ in networks])
    seen = {}
    first = total.body.features.bn1_1
    hook = first.register_forward_pre_hook(lambda layer, args: seen.update(x=args[0]))
    recalibrate(total, torch.cat(parts), owners)
    hook.remove()
    places = [set(key.positions["features.conv1_1"].tolist()) for key in total.keys]
    assert places[0] & places[1] and places[0] - places[1] and places[1] - places[0]
    for channel in range(8):
        has = [channel in its for its in places]
        rows = torch.tensor([has[i] or not any(has) for i in owners])
        wanted = seen["x"][rows, channel].double()
        torch.testing.assert_close(first.running_mean[channel].double(), wanted.mean(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(first.running_var[channel].double(), wanted.var(), rtol=1e-4, atol=1e-6)


def test_without_keys_all_images_count_whoever_owns_them(of_two):
    networks, parts, owners, _ = of_two
    sums = [recalibrate(WeightSum(networks), torch.cat(parts), whose) for whose in (owners, None)]
    for name, wanted in statistics(sums[1]).items():
        torch.testing.assert_close(sums[0].get_buffer(name), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("owners", [[0] * 70, [0] * 69 + [1], [0] * 40 + [1] * 29, [-1] + [0] * 39 + [1] * 30,
                                    [0] * 30 + [1] * 30 + [2] * 10, [0.0] * 40 + [1.0] * 30, [False] * 40 + [True] * 30,
                                    []])  # fmt: skip
def test_owners_that_dont_fit_are_refused(of_two, owners):
    networks, parts, _, _ = of_two
    for given in (owners, torch.tensor(owners)):
        with pytest.raises(ValueError, match="one network number an image"):
            recalibrate(WeightSum(networks), torch.cat(parts), given)


def test_owners_want_a_sum_and_a_tensor(of_two):
    networks, parts, owners, _ = of_two
    for module, images in ((networks[0], torch.cat(parts)), (WeightSum(networks), parts)):
        with pytest.raises(ValueError, match="of a sum and a tensor"):
            recalibrate(module, images, owners)


def test_a_scripted_module_hides_its_batch_norm_and_is_refused():
    x = 5 + torch.randn(50, 3)
    network = torch.jit.trace(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).eval(), x)
    for module in (network, torch.nn.Sequential(network)):
        with pytest.raises(ValueError, match=r"scripted or traced module hides its batch norm"):
            recalibrate(module, x)


def test_owners_of_images_that_a_network_regroups_are_refused():
    class Pieces(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x):
            return self.norm(x.flatten(0, 1))

    total, owners = WeightSum([Pieces(), Pieces()]), torch.tensor([0, 0, 1, 1])
    with pytest.raises(ValueError, match=r"'body\.norm' has 8 inputs, of 4 images"):
        recalibrate(total, torch.randn(4, 2, 3), owners)
