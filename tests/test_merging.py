import copy
import itertools
import math

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils import parametrizations

from weightsum_lib import (
    Method,
    RunConfig,
    WeightSum,
    draw,
    hidden_channels,
    normalize,
    recalibrate,
    resnet20,
    vgg8,
    widen,
)
from weightsum_lib.core import merging
from weightsum_lib.study.data import Dataset
from weightsum_lib.study.train import build, train


def network():
    return vgg8(width=1 / 16, dropout=0.0).eval()


X = torch.zeros(2, 3, 32, 32)
CHANNELS = hidden_channels(network(), X)


def random_statistics(made):
    """In float64 and evaluation mode, with batch norm that does something."""
    for name, tensor in made.double().eval().state_dict().items():
        if "running_" in name or ("bn" in name and tensor.ndim):
            tensor.uniform_(0.5, 1.5)
    return made


def test_weight_matching_undoes_a_permutation(images):
    a = network()
    shuffled = widen(a, draw(CHANNELS, 1, torch.Generator().manual_seed(1)))
    assert not torch.equal(shuffled.classifier.fc2.weight, a.classifier.fc2.weight)
    matched = merging.weight_matching(a, shuffled, CHANNELS)
    for name, p in a.named_parameters():
        assert torch.equal(matched.get_parameter(name), p), name


@pytest.mark.parametrize("arch", [vgg8, resnet20, torchvision.models.resnet18])
def test_weight_matching_keeps_the_function_and_brings_the_weights_nearer(arch):
    options = {"num_classes": 10} if arch is torchvision.models.resnet18 else {"width": 1 / 4}
    a, b = (random_statistics(arch(**options)) for _ in range(2))
    channels = hidden_channels(b, X)
    matched, x = merging.weight_matching(a, b, channels, sweeps=2), torch.randn(4, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(matched(x), b(x))
    inner = lambda n: sum((p * q).sum() for p, q in zip(a.parameters(), n.parameters(), strict=True))  # noqa: E731
    assert inner(matched) > inner(b)


def test_averages_and_task_arithmetic_are_their_formulas():
    start, a, b = network(), network(), network()
    name = "classifier.fc1.weight"
    s, wa, wb = (n.get_parameter(name) for n in (start, a, b))
    torch.testing.assert_close(merging.average([a, b]).get_parameter(name), (wa + wb) / 2)
    merged = merging.task_arithmetic(start, [a, b], 0.7).get_parameter(name)
    torch.testing.assert_close(merged, s + 0.7 * (wa - s) + 0.7 * (wb - s))


def test_regmean_of_one_network_twice_is_that_network(images):
    a, x = network(), normalize(images)
    merged = merging.regmean([a, copy.deepcopy(a)], [x, x])
    torch.testing.assert_close(merged(x), a(x), rtol=1e-3, atol=1e-4)


def test_regmean_fits_each_networks_outputs_on_its_own_inputs_better_than_the_average():
    a, b = torch.nn.Sequential(torch.nn.Linear(6, 4)).eval(), torch.nn.Sequential(torch.nn.Linear(6, 4)).eval()
    xs = [
        torch.randn(200, 6) * scale
        for scale in (torch.tensor([3.0] * 3 + [0.1] * 3), torch.tensor([0.1] * 3 + [3] * 3))
    ]
    miss = lambda n: sum((n(x) - p(x)).square().mean().item() for p, x in zip((a, b), xs, strict=True))  # noqa: E731
    for n in (a, b):
        torch.nn.init.zeros_(n[0].bias)
    assert miss(merging.regmean([a, b], xs, shrink=1.0)) < 0.1 * miss(merging.average([a, b]))


def test_the_ensemble_adds_logits(images):
    a, b, x = network(), network(), normalize(images)
    torch.testing.assert_close(merging.Ensemble([a, b])(x), a(x) + b(x))


def test_a_random_partner_has_the_norms_and_nothing_else():
    a, fresh = network(), network()
    partner = merging.random_like(a, fresh)
    for name, p in a.named_parameters():
        if p.ndim > 1:
            q = partner.get_parameter(name)
            assert q.norm().item() == pytest.approx(p.norm().item(), rel=1e-4)
            assert torch.nn.functional.cosine_similarity(p.flatten(), q.flatten(), 0).abs() < 0.3


def test_a_network_with_renamed_classes_is_one_trained_on_renamed_labels(datasets, monkeypatch):
    config = RunConfig(Method(), "mnist", width=1 / 16, epoch_images=96, epochs=1, batch_size=32, dropout=0.0)
    renaming = torch.arange(10).roll(3)
    d = datasets["mnist"]
    labels = {f"{s}_labels": renaming[getattr(d, f"{s}_labels")] for s in ("train", "val", "test")}
    trained = train(config, datasets).networks["main"]
    start = merging.relabelled(build(config).eval(), renaming, X + 1)
    monkeypatch.setattr("weightsum_lib.study.train.build", lambda *_: copy.deepcopy(start))
    other = train(config, {"mnist": Dataset(**{**vars(d), **labels})}).networks["main"]
    renamed = merging.relabelled(trained, renaming, X + 1)
    for name, p in other.named_parameters():
        torch.testing.assert_close(p, renamed.get_parameter(name), rtol=1e-3, atol=1e-5)
    assert not torch.equal(trained.classifier.fc3.weight, renamed.classifier.fc3.weight)


TRANSPOSED = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.ReLU(), torch.nn.ConvTranspose2d(4, 2, 1)).eval()
OF_TRANSPOSED = hidden_channels(TRANSPOSED, torch.zeros(2, 3, 4, 4))


class Loop(torch.nn.Module):
    """x + tanh(W x): both axes of W run over the same channels."""

    def __init__(self):
        super().__init__()
        self.first, self.loop = torch.nn.Linear(3, 6), torch.nn.Linear(6, 6)
        self.last = torch.nn.Linear(6, 2, bias=False)

    def forward(self, x):
        x = self.first(x)
        return self.last(x + self.loop(x).tanh())


def test_a_weight_with_one_group_on_both_axes_is_matched_on_both():
    a, x = Loop(), torch.randn(5, 3)
    channels = hidden_channels(a, x)
    shuffled = widen(a, draw(channels, 1, torch.Generator().manual_seed(1)))
    assert not torch.equal(shuffled.loop.weight, a.loop.weight)
    matched = merging.weight_matching(a, shuffled, channels)
    torch.testing.assert_close(matched(x), a(x))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), matched.parameters(), strict=True))
    other = Loop()
    torch.testing.assert_close(merging.weight_matching(a, other, channels)(x), other(x))


@pytest.mark.parametrize(("arch", "width"), [(vgg8, 1 / 16), (resnet20, 1 / 8)])
def test_zipit_and_activations_find_a_permuted_copy(arch, width):
    a, x = random_statistics(arch(width=width)), torch.randn(200, 3, 32, 32, dtype=torch.float64)
    channels = hidden_channels(recalibrate(a, x), X)
    shuffled = widen(a, draw(channels, 1, torch.Generator().manual_seed(1)))
    function = a(x)

    def computes(merged, wanted):
        return torch.allclose(recalibrate(merged, x)(x), wanted, rtol=0, atol=1e-8)

    matched = merging.activation_matching(a, shuffled, channels, x)
    torch.testing.assert_close(matched(x), function)
    assert computes(merging.average([a, matched]), function) and not computes(merging.average([a, shuffled]), function)
    onto = {group: merging.zipped(c) for group, c in merging.correlations([a, shuffled], channels, x).items()}
    assert [tuple(m.shape) for m in onto.values()] == [(n, 2 * n) for n in channels.sizes.values()]
    first = dict(list(onto.items())[: len(onto) // 2])
    for groups in (onto, first):
        assert computes(merging.fold([a, shuffled], channels, groups, x), 2 * function)
    in_place = {group: torch.eye(n).repeat(1, 2) / 2 for group, n in channels.sizes.items()}
    assert not computes(merging.fold([a, shuffled], channels, in_place, x), 2 * function)


@pytest.mark.parametrize(("arch", "width"), [(vgg8, 1 / 16), (resnet20, 1 / 8)])
def test_folding_nothing_is_the_ensemble_and_folding_all_in_place_is_the_sum(arch, width):
    a, b = (random_statistics(arch(width=width)) for _ in range(2))
    x, channels = torch.randn(40, 3, 32, 32, dtype=torch.float64), hidden_channels(a, X)
    for network in (a, b):
        recalibrate(network, x)
    apart = recalibrate(merging.fold([a, b], channels, {}, x), x)
    torch.testing.assert_close(apart(x), merging.Ensemble([a, b])(x))
    summed = merging.fold([a, b], channels, {g: torch.eye(n).repeat(1, 2) for g, n in channels.sizes.items()}, x)
    for name, p in WeightSum([a, b]).materialize().named_parameters():
        torch.testing.assert_close(summed.get_parameter(name), p)


def small(hidden, out):
    """x → out · relu(hidden · x)."""
    layers = [torch.nn.Linear(2, 2, bias=False), torch.nn.ReLU(), torch.nn.Linear(2, 1, bias=False)]
    for layer, weight in ((layers[0], hidden), (layers[2], [out])):
        layer.weight.data = torch.tensor(weight, dtype=torch.float64)
    return torch.nn.Sequential(*layers).eval()


def test_mergers_of_two_different_networks_by_hand():
    """Channels of a: x₀, x₁; of b: 2·x₁, 3·x₀. So the first of a is like the second of b, and the other way round."""
    a, b = small([[1, 0], [0, 1]], [1, 10]), small([[0, 2], [3, 0]], [100, 1000])
    x = torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]], dtype=torch.float64)
    channels = hidden_channels(a, x)
    ((group, found),) = merging.correlations([a, b], channels, x).items()
    wanted = torch.tensor([[1.0, 0, 0, 1], [0, 1, 1, 0], [0, 1, 1, 0], [1, 0, 0, 1]])
    torch.testing.assert_close(found, wanted)
    matched = merging.activation_matching(a, b, channels, x)
    assert matched[0].weight.tolist() == [[3, 0], [0, 2]] and matched[2].weight.tolist() == [[1000, 100]]
    merged = merging.fold([a, b], channels, {group: merging.zipped(found)}, x)
    assert merged[0].weight.tolist() == [[2, 0], [0, 1.5]] and merged[2].weight.tolist() == [[1001, 110]]


def test_zipit_merges_within_a_network_where_it_may():
    """Channels of a: x₀, 3·x₀; of b: x₁, 5·x₁. Merged within each, the sum computes what both do."""
    a, b = small([[1, 0], [3, 0]], [1, 10]), small([[0, 1], [0, 5]], [100, 1000])
    x = torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]], dtype=torch.float64)
    channels = hidden_channels(a, x)
    ((group, found),) = merging.correlations([a, b], channels, x).items()
    merged = merging.fold([a, b], channels, {group: merging.zipped(found, beta=1.0)}, x)
    assert merged[0].weight.tolist() == [[2, 0], [0, 3]] and merged[2].weight.tolist() == [[11, 1100]]


def groups(like, **options):
    """Which channels are merged, those of the first network being 0, 1, …, where some pairs are alike."""
    n = 1 + max(max(pair) for pair in like)
    matrix = torch.zeros(n, n)
    for (i, j), value in like.items():
        matrix[i, j] = matrix[j, i] = value
    merged = merging.zipped(matrix, **options)
    torch.testing.assert_close(merged.sum(1), torch.ones(n // 2))
    return {tuple(row.nonzero().flatten().tolist()) for row in merged}


def test_what_zipit_has_merged_is_merged_again_as_alpha_says():
    like = {(0, 2): 0.9, (0, 3): 0.8, (2, 3): 0.7, (1, 3): 0.3}
    assert groups(like) == {(0, 2), (1, 3)}
    assert groups(like, alpha=1.0) == {(0, 2, 3), (1,)}  # 0.7, the least, is more than 0.3
    assert groups(like | {(2, 3): 0.2}, alpha=1.0) == {(0, 2), (1, 3)}


def test_zipit_merges_no_more_within_a_network_than_beta_says():
    like = {(0, 1): 0.99, (2, 3): 0.98, (2, 4): 0.5, (3, 5): 0.4, (4, 5): 0.35, (6, 7): 0.3}
    assert groups(like) == {(0, 1), (2, 4), (3, 5), (6, 7)}
    assert groups(like, beta=1.0) == {(0, 1), (2, 3), (4, 5), (6, 7)}


@pytest.mark.parametrize(("alpha", "beta"), [(1e-4, 0.075), (0.3, 0.5), (1.0, 1.0)])
def test_zipit_always_merges_the_two_that_are_most_alike(alpha, beta):
    """Held to all pairs compared anew before each merge, as the paper says it."""
    n = 20
    like = torch.corrcoef(torch.randn(2 * n, 15, dtype=torch.float64))  # half of them negative
    groups, budget = {i: {i} for i in range(2 * n)}, [int(beta * n / 2)] * 2
    table = {(i, j): like[i, j].item() for j in range(2 * n) for i in range(j)}
    for _ in range(n):
        i, j = max(table, key=table.get)
        groups[i] |= groups.pop(j)
        for k in groups.keys() - {i}:
            one, two = tuple(sorted((i, k))), tuple(sorted((j, k)))
            if one in table and two in table:
                table[one] = alpha * min(table[one], table[two])
            else:
                table.pop(one, None)
        within = (i < n) == (j < n)
        budget[i // n] -= within
        table = {
            (a, b): value
            for (a, b), value in table.items()
            if j not in (a, b) and not (within and budget[i // n] <= 0 and a // n == b // n == i // n)
        }
    merged = merging.zipped(like, alpha, beta)
    assert [set(row.nonzero().flatten().tolist()) for row in merged] == [groups[i] for i in sorted(groups)]


def test_channels_that_never_change_are_alike():
    a = small([[1, 0], [-1, 0]], [1, 1])
    x = torch.tensor([[1.0, 0], [2, 0], [4, 0]], dtype=torch.float64)
    (found,) = merging.correlations([a, a], hidden_channels(a, x), x).values()
    torch.testing.assert_close(found, torch.eye(2).repeat(2, 2))


def linear(*rows):
    layer = torch.nn.Linear(len(rows[0]), len(rows), bias=False)
    layer.weight.data = torch.tensor(rows, dtype=torch.float32)
    return layer.eval()


def test_a_fisher_average_of_equal_fishers_is_the_average_with_their_coefficients():
    a, b, x = linear([1, 2], [3, -1]), linear([2, 3], [4, 0]), torch.randn(5, 2)  # equal logits but for a constant
    for coefficients, wanted in ((None, 0.5), ((0.2, 0.8), 0.8)):
        merged = merging.fisher_average([a, b], [merging.fisher_information(n, x) for n in (a, b)], coefficients)
        torch.testing.assert_close(merged.weight, a.weight + wanted)


def test_a_fisher_average_by_hand():
    a, b = linear([0.5, 0], [0, 1]), linear([8, 7], [6, 5])
    xs = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([[0.3, 0.1], [-0.2, 0.4]])
    found = []
    for network, x in zip((a, b), xs, strict=True):
        p = network(x).softmax(1)  # Σ_c p_c ((1[c = k] − p_k) x_j)² = p_k (1 − p_k) x_j²
        fisher = torch.stack([(p * (1 - p))[i][:, None] * x[i] ** 2 for i in range(2)]).mean(0).detach()
        found.append(fisher / fisher.norm())
    fishers = [merging.fisher_information(network, x) for network, x in zip((a, b), xs, strict=True)]
    torch.testing.assert_close(torch.stack(fishers), torch.stack(found).flatten(1))
    merged = merging.fisher_average([a, b], fishers).weight
    torch.testing.assert_close(merged, (found[0] * a.weight + found[1] * b.weight) / (found[0] + found[1]))


def test_a_fisher_average_of_networks_without_doubts_or_gradients():
    sure = linear([1e4, 0], [0, 1e4])
    fisher = merging.fisher_information(sure, torch.eye(2))
    torch.testing.assert_close(merging.fisher_average([sure, sure], [fisher] * 2).weight, sure.weight)
    sure.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="'weight' requires no gradient"):
        merging.fisher_information(sure, torch.eye(2))


def test_ties_by_hand():
    start, a, b = (torch.nn.Linear(2, 2, bias=False) for _ in range(3))
    for network, weight in ((start, [[1, 1], [1, 1]]), (a, [[4, 3], [1, 0.5]]), (b, [[6, -4], [2, 1]])):
        network.weight.data = torch.tensor(weight, dtype=torch.float32)
    # differences 3, 2, 0, −½ and 5, −5, 1, 0; trimmed to the larger half of each; the signs elected are +, −
    merged = merging.ties(start, [a, b], scale=10, keep=0.5)
    assert merged.weight.tolist() == [[1 + 10 * 4, 1 - 10 * 5], [1, 1]]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_ties_without_trimming_and_conflict_is_task_arithmetic(layout):
    start, a, b = (network().to(memory_format=layout) for _ in range(3))
    with torch.no_grad():
        for s, p, q in zip(*(n.parameters() for n in (start, a, b)), strict=True):
            q.copy_(s + 2 * (p - s))
    ties, plain = merging.ties(start, [a, b], 0.6, keep=1.0), merging.task_arithmetic(start, [a, b], 0.3)
    for p, q in zip(ties.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_what_is_retrieved_from_a_superposition_is_the_network_and_the_other_under_random_signs():
    a, b = network(), network()
    of_a, of_b = (torch.Generator().manual_seed(seed) for seed in (1, 2))
    stored = WeightSum([merging.random_signs(n, g) for n, g in ((a, of_a), (b, of_b))]).materialize()
    found = merging.random_signs(stored, of_a.manual_seed(1))  # its own key once more
    for name, p in a.named_parameters():
        rest, other = found.get_parameter(name) - p, b.get_parameter(name)
        if p.ndim > 1:
            signs = (rest * other).flatten(2).sum((0, 2)).sign() if p.ndim == 4 else (rest * other).sum(0).sign()
            other = other * signs.view(-1, *[1] * (p.ndim - 2))
            assert len(signs) < 8 or set(signs.tolist()) == {-1.0, 1.0}
        torch.testing.assert_close(rest, other, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("merge", "message"),
    [
        (lambda: merging.weight_matching(network(), vgg8(width=1 / 8), CHANNELS), "in a and .* in b, which must be of"),
        (lambda: merging.weight_matching(*[vgg8(width=1 / 8)] * 2, CHANNELS), "weight' is .*, but its key is for"),
        (lambda: merging.relabelled(network(), torch.arange(9), X), "each of the 10 classes once"),
        (lambda: merging.relabelled(network(), torch.zeros(10).long(), X), "each of the 10 classes once"),
        (lambda: merging.average([network(), vgg8(width=1 / 8)]), "'features.conv1_1.weight' is"),
        (
            lambda: merging.fold([network()] * 2, CHANNELS, {"classifier.fc1": torch.ones(1, 3)}, X),
            "each of the 512 channels",
        ),
        (
            lambda: merging.fold([network()] * 2, CHANNELS, {"classifier.fc1": torch.ones(2, 512)}, X),
            "'classifier.fc1' in one",
        ),
        (
            lambda: merging.correlations([TRANSPOSED], OF_TRANSPOSED, torch.ones(2, 3, 4, 4)),
            "'2.weight' belongs to a Conv",
        ),
        (
            lambda: merging.fold([TRANSPOSED] * 2, OF_TRANSPOSED, {}, torch.ones(2, 3, 4, 4)),
            "expected convolutions and linear layers",
        ),
        (lambda: merging.regmean([nn.Conv2d(2, 2, 1, groups=2).eval()] * 2, [torch.ones(1, 2, 4, 4)] * 2), "groups=2"),
        (
            lambda: merging.regmean([nn.Conv2d(2, 2, 3, padding="same").eval()] * 2, [torch.ones(1, 2, 4, 4)] * 2),
            "same",
        ),
    ],
)
def test_networks_that_do_not_fit_are_refused_by_name(merge, message):
    with pytest.raises(ValueError, match=message):
        merge()


def _small(hidden=4):
    return torch.nn.Sequential(torch.nn.Linear(3, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, 2)).eval()


def test_ties_of_another_architecture_is_refused_by_name():
    with pytest.raises(ValueError, match=r"'0.weight' is \(4, 3\).* in network 0 and \(5, 3\).* in network 1"):
        merging.ties(_small(), [_small(5), _small(5)])


def test_a_layer_that_is_dead_in_one_network_is_merged_as_the_other_has_it():
    a, b = _small(), _small()
    torch.nn.init.constant_(a[0].bias, -100)
    merged = merging.regmean([a, b], [torch.randn(50, 3)] * 2, shrink=1.0)
    torch.testing.assert_close(merged[2].weight, b[2].weight, rtol=1e-3, atol=1e-3)


def test_channels_that_are_the_last_axis_are_matched_there():
    class Tokens(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Linear(3, 6), torch.nn.Linear(6, 2)

        def forward(self, x):
            return self.b(self.a(x).relu())

    a, x = Tokens().eval(), torch.randn(50, 5, 3)
    channels = hidden_channels(a, x)
    moved = widen(a, draw(channels, 1, torch.Generator().manual_seed(3)))
    assert not torch.equal(moved.a.weight, a.a.weight)
    torch.testing.assert_close(merging.activation_matching(a, moved, channels, x).a.weight, a.a.weight)


@pytest.mark.parametrize(("fishers", "coefficients"), [(1, None), (2, [0.3]), (3, None), (2, [0.1, 0.2, 0.3])])
def test_fishers_and_coefficients_are_one_a_network(fishers, coefficients):
    a, b = _small(), _small()
    size = sum(p.numel() for p in a.parameters())
    with pytest.raises(ValueError, match="zip"):
        merging.fisher_average([a, b], [torch.rand(size) for _ in range(fishers)], coefficients)


def test_signs_are_those_of_a_layers_inputs():
    layers = {
        "linear": (nn.Linear(4, 6), torch.randn(2, 4)),
        "depthwise": (nn.Conv2d(4, 8, 3, groups=4), torch.randn(2, 4, 5, 5)),
        "groups": (nn.Conv1d(4, 6, 3, groups=2), torch.randn(2, 4, 5)),
        "transposed": (nn.ConvTranspose2d(4, 6, 3, groups=2), torch.randn(2, 4, 5, 5)),
    }
    for name, (layer, x) in layers.items():
        layer.bias = None
        hidden = merging.random_signs(layer, torch.Generator().manual_seed(3))
        found = [
            signs
            for signs in itertools.product((-1.0, 1.0), repeat=4)
            if torch.allclose(hidden(x), layer(x * torch.tensor(signs).view(1, 4, *[1] * (x.ndim - 2))), atol=1e-5)
        ]
        assert len(found) == 1, name


def test_a_merged_network_keeps_the_type_of_each_parameter():
    def made():
        return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, dtype=torch.float64))

    a, b, start = made(), made(), made()
    sizes = torch.ones(sum(p.numel() for p in a.parameters()))
    for merged in (merging.ties(start, [a, b]), merging.fisher_average([a, b], [sizes, sizes])):
        assert [p.dtype for p in merged.parameters()] == [p.dtype for p in a.parameters()]


@pytest.mark.parametrize("wrong", [torch.zeros(12), torch.full((12,), math.nan), torch.ones(1)])
def test_fishers_that_give_no_mean_are_refused(wrong):
    a, b = nn.Linear(3, 3), nn.Linear(3, 3)
    with pytest.raises(ValueError, match="expected 12 numbers a network"):
        merging.fisher_average([a, b], [wrong, wrong])


@pytest.mark.parametrize("where", ["network", "part", "images", "none"])
def test_networks_in_training_and_images_that_are_not_finite_are_refused(where):
    n, x = nn.Sequential(nn.Linear(3, 3), nn.RReLU(), nn.Linear(3, 2)).train(where == "network"), torch.ones(2, 3)
    n[1].train(where in ("network", "part"))
    x = {"images": x / 0, "none": x[:0]}.get(where, x)
    channels = hidden_channels(n, torch.ones(2, 3))
    why = {"network": "'2' of network 0 is in training", "part": "'1' of network 0 is in training"}
    why = why.get(where, "expected one image or more, of finite numbers")
    for merge in (
        lambda: merging.regmean([n, n], [x, x]),
        lambda: merging.fisher_information(n, x),
        lambda: merging.correlations([n, n], channels, x),
        lambda: merging.fold([n, n], channels, {}, x),
        lambda: merging.relabelled(n, torch.arange(2), x),
    ):
        with pytest.raises(ValueError, match=why):
            merge()


def test_classes_of_a_last_layer_with_a_weight_of_its_own_are_renamed_alone():
    tied = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5))
    tied[1].weight = tied[0].weight
    normed, x = parametrizations.spectral_norm(nn.Linear(5, 5)), torch.ones(2, 5)
    ways = {"expected a last linear layer": (tied, nn.Sequential(nn.Conv2d(3, 3, 1))), "parametrized": (normed,)}
    for why, network in ((why, network) for why, each in ways.items() for network in each):
        with pytest.raises(ValueError, match=why):
            merging.relabelled(network.eval(), torch.arange(5), x)


class Backwards(nn.Module):
    """The layer that gives the outputs is not the one that is registered last."""

    def __init__(self, hidden):
        super().__init__()
        self.classifier, self.features = nn.Linear(hidden, 5), nn.Linear(3, hidden)

    def forward(self, x):
        return self.classifier(self.features(x).relu())


def test_another_last_layer_than_that_of_the_outputs_is_not_renamed():
    for hidden in (5, 6):
        with pytest.raises(ValueError, match="outputs are not those of the linear layer that it has registered last"):
            merging.relabelled(Backwards(hidden).eval(), torch.arange(hidden).roll(1), torch.randn(4, 3))
    network = Backwards(5).eval()
    for tensor in (network.features.bias, network.classifier.bias):
        torch.nn.init.zeros_(tensor)
    with pytest.raises(ValueError, match="expected one tensor that is not zero for the example, got a Tensor"):
        merging.relabelled(network, torch.arange(5).roll(1), torch.zeros(4, 3))


@pytest.mark.parametrize(
    "layers",
    [
        lambda: (nn.Linear(3, 4), nn.PReLU(), nn.Linear(4, 2)),
        lambda: (nn.BatchNorm1d(3), nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)),
        lambda: (nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2), nn.LogSoftmax(-1)),
    ],
)
def test_networks_that_are_no_ensemble_side_by_side_are_not_folded(layers):
    a, b = (nn.Sequential(*layers()).eval() for _ in "ab")
    x = torch.randn(4, 3)
    with pytest.raises(ValueError, match=r"don't compute the sum|channels that all networks share"):
        merging.fold([a, b], hidden_channels(a, x), {}, x)


class Two(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


def test_networks_of_more_than_one_output_are_refused_where_one_is_compared():
    network, x = Two(3, 3).eval(), torch.ones(2, 3)
    with pytest.raises(ValueError, match="expected one tensor that is not zero for the example, got a tuple"):
        merging.relabelled(network, torch.arange(3), x)
    with pytest.raises(ValueError, match="got a tuple"):
        merging.fold([network, network], hidden_channels(network, x), {}, x)


def test_a_weight_of_two_layers_has_no_one_input_to_be_fitted():
    network = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)).eval()
    network[2].weight = network[0].weight
    with pytest.raises(ValueError, match="'0' has the weight of another layer"):
        merging.regmean([network, copy.deepcopy(network)], [torch.ones(2, 3)] * 2)


def test_half_precision_is_merged_in_float32_and_rounded_once():
    start, a, b = (nn.Linear(20, 20).half().eval() for _ in range(3))
    x = torch.randn(3, 20) / 100
    torch.testing.assert_close(
        merging.fisher_information(copy.deepcopy(a), x.half()),
        merging.fisher_information(a.float(), x),
        rtol=0.1,
        atol=0,
    )
    fishers = [1e-6 * torch.rand(420) for _ in "ab"]  # which float16 does not hold
    for wanted, merged in (
        (
            merging.fisher_average([a.float(), b.float()], fishers),
            merging.fisher_average([a.half(), b.half()], fishers),
        ),
        (merging.ties(start.float(), [a.float(), b.float()]), merging.ties(start.half(), [a.half(), b.half()])),
    ):
        torch.testing.assert_close(merged.weight, wanted.weight.half(), rtol=0, atol=0)


@pytest.mark.parametrize("about", [{"keep": -0.5}, {"keep": 20}, {"scale": math.nan}])
def test_a_share_and_a_scale_of_ties_are_ones(about):
    with pytest.raises(ValueError, match="expected a share above 0, at most 1, and a finite scale"):
        merging.ties(_small(), [_small(), _small()], **about)


def test_correlations_that_are_not_those_of_two_networks_are_refused():
    for wrong in (torch.eye(5), torch.full((4, 4), math.nan), torch.ones(2, 4)):
        with pytest.raises(ValueError, match=r"expected finite correlations \(2n, 2n\)"):
            merging.zipped(wrong)


def test_an_average_takes_an_example_where_layers_of_other_libraries_may_compute_their_weight():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 3))

        def forward(self, x):
            return x @ self.w

    a, b = Other(), Other()
    with pytest.raises(ValueError, match="on an example first"):
        merging.average([a, b])
    x = torch.ones(1, 3)
    assert torch.allclose(merging.average([a, b], x).w, (a.w + b.w) / 2)
    assert torch.allclose(merging.task_arithmetic(a, [b, b], example=x).w, 2 * b.w - a.w, atol=1e-6)
    assert torch.allclose(merging.regmean([a.eval(), b.eval()], [x, x]).w, (a.w + b.w) / 2)
    assert torch.allclose(merging.fisher_average([a, b], [torch.ones(9)] * 2, example=x).w, (a.w + b.w) / 2)
