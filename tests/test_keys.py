import pytest
import torch
from torch import nn

from weightsum_lib import WeightSum, keys, models, normalize, vgg8, vgg16
from weightsum_lib.keys import compact, deal, draw, hidden_sizes, overlap
from weightsum_lib.weights import widen


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


SMALL, WIDE = hidden_sizes(vgg8(width=1 / 16)), hidden_sizes(vgg8(width=1 / 4))


def test_every_axis_of_channels_is_known():
    axes = keys.channel_axes(vgg8(width=1 / 16))
    assert axes["features.conv1_1.weight"] == [(0, "features.conv1_1", 1)]
    assert axes["features.bn2_1.running_var"] == [(0, "features.conv2_1", 1)]
    assert axes["classifier.fc1.weight"] == [(0, "classifier.fc1", 1), (1, "features.conv4_1", 4)]
    assert axes["classifier.fc3.weight"] == [(1, "classifier.fc2", 1)] and axes["classifier.fc3.bias"] == []
    assert SMALL["features.conv4_1"] == 32 and list(SMALL)[-1] == "classifier.fc2"


@pytest.mark.parametrize("arch", [vgg8, vgg16])
@pytest.mark.parametrize("centered", [False, True])
def test_a_keyed_network_computes_the_same_as_the_dense_one_that_it_contains(images, arch, centered):
    small = network(arch, centered_scale=centered)
    wide = widen(small, draw(hidden_sizes(small), hidden_sizes(arch(width=1 / 4)), generator()))
    assert wide.features.conv1_1.weight.shape[0] == 16 and wide.features.bn1_1.num_features == 16
    x = normalize(images)
    assert not torch.equal(small(x), torch.zeros_like(small(x)))
    torch.testing.assert_close(wide(x), small(x))
    torch.testing.assert_close(wide.train()(x), small.train()(x))  # under the batch's statistics too


@pytest.mark.parametrize("arch", [vgg8, vgg16])
def test_a_permuted_network_computes_the_same(images, arch):
    plain = network(arch)
    sizes = hidden_sizes(plain)
    permuted = widen(plain, draw(sizes, sizes, generator()))
    assert not torch.equal(permuted.classifier.fc2.weight, plain.classifier.fc2.weight)
    x = normalize(images)
    torch.testing.assert_close(permuted(x), plain(x))


def test_under_disjoint_keys_the_state_dicts_added_add_the_logits(images):
    a, b = network(), network()
    x = normalize(images)
    total = WeightSum([a, b], keys=[deal(SMALL, WIDE, 0), deal(SMALL, WIDE, 1)]).add_statistics().eval()
    torch.testing.assert_close(total(x), a(x) + b(x))
    wide = [widen(n, deal(SMALL, WIDE, i)).state_dict() for i, n in enumerate((a, b))]
    added = {k: wide[0][k] + wide[1][k] for k in wide[0]}
    plain = vgg8(width=1 / 4, dropout=0.0)
    plain.load_state_dict(added)
    torch.testing.assert_close(plain.eval()(x), a(x) + b(x))


def test_a_sum_under_keys_is_the_sum_of_the_wide_networks_compact_or_not(images):
    a, b = network(), network()
    both = [draw(SMALL, WIDE, generator(0)), draw(SMALL, WIDE, generator(1))]
    by_hand = WeightSum([widen(a, both[0]), widen(b, both[1])])
    x = normalize(images)
    for chosen in (both, compact(both)):
        total = WeightSum([a, b], keys=chosen)
        torch.testing.assert_close(total(x), by_hand(x))  # in training mode: the batch's statistics
        torch.testing.assert_close(total.eval()(x), total.materialize()(x))
        total.train()
    assert compact(both)[0].sizes["classifier.fc2"] < WIDE["classifier.fc2"]


def test_the_compact_sum_has_one_shape_for_all_keys_of_a_size():
    shapes = [compact([draw(SMALL, WIDE, generator(i)), draw(SMALL, WIDE, generator(i + 9))])[0].sizes for i in (0, 1)]
    assert shapes[0] == shapes[1] == {layer: 2 * n for layer, n in SMALL.items()}
    three = compact([draw(SMALL, hidden_sizes(vgg8(width=1 / 8)), generator(i)) for i in range(3)])
    assert three[0].sizes == {layer: 2 * n for layer, n in SMALL.items()}  # no more than there are


def test_gradients_flow_through_keys_to_every_parent_that_is_not_held(images):
    a, b = network(), network()
    total = WeightSum([a, b], keys=[draw(SMALL, WIDE, generator(i)) for i in (0, 1)])
    total(normalize(images)).square().sum().backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for p in (a.classifier.fc2.weight, b.classifier.fc2.weight)
    )
    a.zero_grad(), b.zero_grad()
    total(normalize(images), held=[1]).square().sum().backward()
    assert a.classifier.fc2.weight.grad.abs().sum() > 0 and b.classifier.fc2.weight.grad is None


def test_new_keys_bring_new_statistics(images):
    total = WeightSum([network(), network()], keys=[deal(SMALL, WIDE, 0), deal(SMALL, WIDE, 1)])
    total(normalize(images))
    total.use_keys([draw(SMALL, WIDE, generator(i)) for i in (0, 1)])
    assert total.body.features.bn1_1.running_mean.tolist() == [0] * 16


def test_random_keys_overlap_as_chance_has_it_and_dealt_ones_not_at_all():
    sizes, few = {"layer": 10_000}, {"layer": 2_500}
    a, b = draw(few, sizes, generator(0)), draw(few, sizes, generator(1))
    assert len(a.positions["layer"].unique()) == 2_500
    assert overlap(a, b)["layer"] == pytest.approx(0.25, abs=0.03)
    assert overlap(deal(few, sizes, 0), deal(few, sizes, 3))["layer"] == 0


def test_too_many_disjoint_keys_are_refused():
    with pytest.raises(ValueError, match=r"no room for 5 disjoint keys: 4 of the 16 channels of 'features.conv1_1'"):
        deal(SMALL, WIDE, 4)


def test_keys_of_two_wide_networks_or_too_few_keys_are_refused():
    with pytest.raises(ValueError, match="keys of one sum are for one wide network"):
        WeightSum([network(), network()], keys=[deal(SMALL, WIDE, 0), deal(SMALL, SMALL, 0)])
    with pytest.raises(ValueError, match="2 networks need as many keys, got 1"):
        WeightSum([network(), network()], keys=[deal(SMALL, WIDE, 0)])


def test_centered_batch_norm_is_batch_norm_whose_scale_adds_up_to_one():
    plain, centered = nn.BatchNorm2d(3), models.CenteredBatchNorm2d(3)
    x = torch.randn(8, 3, 4, 4)
    with torch.no_grad():
        plain.weight.copy_(torch.tensor([0.5, 1.0, 2.0]))
        centered.weight.copy_(plain.weight - 1)
    for _ in range(2):
        torch.testing.assert_close(centered(x), plain(x))
        plain.eval(), centered.eval()
    assert torch.equal(models.CenteredBatchNorm2d(3).weight, torch.zeros(3))
