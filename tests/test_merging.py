import copy

import pytest
import torch
import torchvision

from weightsum_lib import Method, RunConfig, draw, hidden_channels, normalize, resnet20, vgg8, widen
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
    a, b = torch.nn.Sequential(torch.nn.Linear(6, 4)), torch.nn.Sequential(torch.nn.Linear(6, 4))
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
    start = merging.relabelled(build(config), renaming)
    monkeypatch.setattr("weightsum_lib.study.train.build", lambda *_: copy.deepcopy(start))
    other = train(config, {"mnist": Dataset(**{**vars(d), **labels})}).networks["main"]
    renamed = merging.relabelled(trained, renaming)
    for name, p in other.named_parameters():
        torch.testing.assert_close(p, renamed.get_parameter(name), rtol=1e-3, atol=1e-5)
    assert not torch.equal(trained.classifier.fc3.weight, renamed.classifier.fc3.weight)


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


@pytest.mark.parametrize(
    ("merge", "message"),
    [
        (lambda: merging.weight_matching(network(), vgg8(width=1 / 8), CHANNELS), "in a and .* in b, which must be of"),
        (lambda: merging.weight_matching(*[vgg8(width=1 / 8)] * 2, CHANNELS), "weight' is .*, but its key is for"),
        (lambda: merging.relabelled(network(), torch.arange(9)), "each of the 10 classes once"),
        (lambda: merging.relabelled(network(), torch.zeros(10, dtype=torch.int64)), "each of the 10 classes once"),
        (lambda: merging.average([network(), vgg8(width=1 / 8)]), "'features.conv1_1.weight' is"),
        (lambda: merging.regmean([torch.nn.Conv2d(2, 2, 1, groups=2)] * 2, [torch.ones(1, 2, 4, 4)] * 2), "groups=2"),
        (lambda: merging.regmean([torch.nn.Conv2d(2, 2, 3, padding="same")] * 2, [torch.ones(1, 2, 4, 4)] * 2), "same"),
    ],
)
def test_networks_that_do_not_fit_are_refused_by_name(merge, message):
    with pytest.raises(ValueError, match=message):
        merge()
