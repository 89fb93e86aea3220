import copy

import pytest
import torch

from weightsum_lib import RunConfig, merging, normalize, vgg8
from weightsum_lib.data import Dataset
from weightsum_lib.keys import draw, hidden_sizes
from weightsum_lib.train import build, train
from weightsum_lib.weights import widen


def network():
    return vgg8(width=1 / 16, dropout=0.0).eval()


def test_weight_matching_undoes_a_permutation(images):
    a = network()
    sizes = hidden_sizes(a)
    shuffled = widen(a, draw(sizes, sizes, torch.Generator().manual_seed(1)))
    matched = merging.weight_matching(a, shuffled)
    for name, p in a.named_parameters():
        assert torch.equal(matched.get_parameter(name), p), name


def test_weight_matching_keeps_the_function_and_brings_the_weights_nearer(images):
    a, b = network(), network()
    matched, x = merging.weight_matching(a, b), normalize(images)
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
    config = RunConfig("independent", "mnist", width=1 / 16, epoch_images=96, epochs=1, batch_size=32, dropout=0.0)
    renaming = torch.arange(10).roll(3)
    d = datasets["mnist"]
    labels = {f"{s}_labels": renaming[getattr(d, f"{s}_labels")] for s in ("train", "val", "test")}
    trained = train(config, datasets).networks["main"]
    start = merging.relabelled(build(config), renaming)
    monkeypatch.setattr("weightsum_lib.train.build", lambda *_: copy.deepcopy(start))
    other = train(config, {"mnist": Dataset(**{**vars(d), **labels})}).networks["main"]
    renamed = merging.relabelled(trained, renaming)
    for name, p in other.named_parameters():
        torch.testing.assert_close(p, renamed.get_parameter(name), rtol=1e-3, atol=1e-5)
    assert not torch.equal(trained.classifier.fc3.weight, renamed.classifier.fc3.weight)
