from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from weightsum_lib import Method, RunConfig, WeightSum, compact, compare_layers, normalize, recalibrate
from weightsum_lib.study import train as train_module
from weightsum_lib.study.train import augment, build, train

TINY = {"width": 1 / 16, "epoch_images": 96, "epochs": 2, "batch_size": 32, "learning_rate": 0.05}
ALONE = RunConfig(Method(), "mnist", **TINY)
PAIR = RunConfig(Method("joint", "ce"), "mnist", "cifar10", third_ramp=0.2, **TINY)


def having(config, **switches):
    """The same run with some switches changed, of the method or of the configuration."""
    own = {k: v for k, v in switches.items() if k in vars(config.method) and (k != "start" or v == "shared")}
    rest = {k: v for k, v in switches.items() if k not in own}
    return replace(config, method=replace(config.method, **own), **rest)


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_the_same_seed_gives_the_same_numbers_twice(datasets):
    a, b = train(PAIR, datasets), train(PAIR, datasets)
    assert equal(a.networks["main"], b.networks["main"]) and equal(a.networks["support"], b.networks["support"])
    strip = lambda run: [{k: v for k, v in row.items() if k != "seconds"} for row in run.history]  # noqa: E731
    assert strip(a) == strip(b)
    assert not equal(a.networks["main"], train(having(PAIR, seed=1), datasets).networks["main"])


class _Reads(TorchDispatchMode):
    """Counts how often the host reads a number of a tensor, for which it would have to wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("change", [{}, {"symmetric": True, "quiet": 1.0, "equal_norms": True, "pruned": True}])
def test_the_host_waits_for_the_device_once_an_epoch_not_once_a_step(datasets, change):
    counts = []
    for steps in (1, 3):
        with _Reads() as reads:
            train(having(PAIR, epochs=1, epoch_images=steps * PAIR.batch_size, **change), datasets)
        counts.append(reads.count)
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_the_memory_layout_changes_the_speed_only(images, share):
    network = build(RunConfig(Method(network_width=share), "mnist", width=0.25)).eval()
    kernels = [p for p in network.parameters() if p.ndim == 4]
    assert all(k.is_contiguous(memory_format=torch.channels_last) for k in kernels)
    assert not any(k.is_contiguous() for k in kernels)
    x = normalize(images)
    out = network(x)
    for other in (torch.contiguous_format, torch.channels_last):
        torch.testing.assert_close(network.to(memory_format=other)(x), out, rtol=1e-4, atol=1e-5)


def test_training_learns(datasets):
    run = train(having(ALONE, epochs=12), datasets)
    assert run.history[-1]["loss_main"] < 0.7 * run.history[0]["loss_main"]
    assert [row["epoch"] for row in run.history] == list(range(1, 13))
    assert not run.networks["main"].training


def gradients(config, datasets, roles=("main", "support")):
    """The gradient of one step's whole loss at each network of a run."""
    networks = {role: build(config, role).train() for role in config.roles}
    keys = train_module._Keys(config) if config.method.keys != "none" else None
    total = WeightSum(list(networks.values()), keys=compact(keys.own) if keys else None)
    pairs = {r: next(train_module.batches(config, r, datasets[n], 0, 1)) for r, n in config.roles.items()}
    step = train_module._Step(config, networks, total, pairs, 1.0)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # dropout
        train_module.step_losses(step, train_module.hooks(config.method)["term"])["total"].backward()
    return {role: torch.cat([p.grad.flatten() for p in networks[role].parameters()]) for role in roles}


def test_the_third_term_adds_its_own_gradient_to_both_networks(datasets):
    """With dropout off, what it adds is the gradient of the sum's loss, the same for both parents."""
    config = having(PAIR, dropout=0.0)
    with_third, without = gradients(config, datasets), gradients(having(config, third="none"), datasets)
    networks = [build(config, role).train() for role in config.roles]
    x, y = next(train_module.batches(config, "main", datasets["mnist"], 0, 1))
    torch.nn.functional.cross_entropy(WeightSum(networks)(x), y).backward()
    wanted = torch.cat([p.grad.flatten() for p in networks[0].parameters()])
    assert wanted.norm() > 1e-3
    for role in config.roles:
        torch.testing.assert_close(with_third[role] - without[role], wanted, rtol=1e-3, atol=1e-5)


def test_a_row_of_the_history_has_every_loss_and_accuracy(datasets):
    (row,) = train(having(PAIR, epochs=1, symmetric=True), datasets).history
    losses, values = {"loss_main", "loss_support", "loss_third"}, {"val_main", "val_support", "val_sum"}
    assert set(row) == {"epoch", *losses, *values, "val_sum_support", "seconds"}


KEYED = having(PAIR, width=1 / 4, symmetric=True, quiet=1.0, centered_scale=True, network_width=0.25)
RANDOM, DISPAIR = having(KEYED, keys="random", permuted_support=0.8), having(KEYED, keys="disjoint")


@pytest.mark.parametrize(
    ("config", "change"),
    [
        (PAIR, {"label_smoothing": 0.1}),
        (PAIR, {"symmetric": True}),
        (PAIR, {"quiet": 1.0}),
        (PAIR, {"third_weight": 0.5}),
        (RANDOM, {"centered_scale": False}),
        (RANDOM, {"third": "none", "symmetric": False, "mixed_batch": True}),
        (DISPAIR, {"owner_statistics": True}),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_each_switch_of_the_loss_changes_the_gradient_of_both_networks(datasets, config, change):
    a, b = gradients(config, datasets), gradients(having(config, **change), datasets)
    for role in config.roles:
        assert (a[role] - b[role]).norm() > 1e-3 * a[role].norm(), role


@pytest.mark.parametrize(("main_too", "moved"), [(False, [False, True]), (True, [True, True])])
def test_keys_drawn_again_move_the_support_network_and_where_asked_the_main_one(monkeypatch, main_too, moved):
    keys, places = train_module._Keys(having(RANDOM, permuted_support=1.0, permuted_main=main_too)), []
    monkeypatch.setattr(train_module, "compact", lambda pair: places.append(pair) or pair)
    assert len(list(keys.epoch(0, 5))) == 5
    seen = [{tuple(pair[i].positions["classifier.fc2"].tolist()) for pair in places[1:]} for i in (0, 1)]
    assert [len(s) > 1 for s in seen] == moved  # the first place is the run's own


def test_equal_norms_are_equal(datasets):
    run = train(having(PAIR, equal_norms=True, epochs=1), datasets)
    for row in compare_layers(run.networks["main"], run.networks["support"]):
        assert row["norm_ratio"] == pytest.approx(1, abs=1e-4)


def test_pruned_networks_hold_the_largest_tenth_of_each_hidden_layer(datasets):
    run = train(having(PAIR, pruned=True, epochs=1), datasets)
    for network in run.networks.values():
        *hidden, last = [m.weight for m in network.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
        assert [int(w.count_nonzero()) for w in hidden] == [max(1, int(0.1 * w.numel())) for w in hidden]
        assert last.count_nonzero() == last.numel()


def test_a_superposition_is_one_set_of_weights_that_descends_on_the_mean_of_both_losses(datasets):
    run = train(having(PAIR, third="none", superposed=True, epochs=1), datasets)
    one, other = (dict(n.requires_grad_(False).named_parameters()) for n in run.networks.values())
    signs = {name: other[name] / p for name, p in one.items() if p.ndim > 1}
    for name, sign in signs.items():
        assert set(sign.unique().tolist()) == {1, -1} or sign.shape[1] < 4, name
        assert (sign == sign.narrow(0, 0, 1)).all(), name  # of a layer's inputs
    assert sum(len(sign.unique()) == 2 for sign in signs.values()) > 4
    held = {name: p.detach().clone().requires_grad_() for name, p in one.items()}  # as one network with two readings
    pair, x, y = [n.requires_grad_() for n in run.networks.values()], torch.randn(8, 3, 32, 32), torch.randint(10, (8,))
    optimizers = [torch.optim.SGD(n.parameters(), 0.1, momentum=0.9, weight_decay=0.01) for n in pair]
    optimizer = torch.optim.SGD([held[name] for name in signs], 0.1, momentum=0.9, weight_decay=0.01)
    own = [{name: p.detach().clone() for name, p in n.named_parameters() if p.ndim < 2} for n in pair]
    for _ in range(2):
        losses = []
        for network, mine, sign in zip(pair, own, (dict.fromkeys(signs, 1), signs), strict=True):
            weights = {name: held[name] * sign[name] for name in signs} | mine
            out = torch.func.functional_call(network.eval(), weights, (x,))
            losses.append(torch.nn.functional.cross_entropy(out, y))
        optimizer.zero_grad()
        (sum(losses) / 2).backward()
        optimizer.step()
        for network, each in zip(pair, optimizers, strict=True):
            each.zero_grad()
            torch.nn.functional.cross_entropy(network(x), y).backward()
            for p in network.parameters():
                p.grad = None if p.ndim < 2 else p.grad
            each.step()
        train_module.after_superposed(run.networks)
    for name in signs:
        torch.testing.assert_close(one[name], held[name], rtol=1e-4, atol=1e-6)
        assert torch.equal(other[name], one[name] * signs[name])


@pytest.mark.parametrize("kind", ["noise", "patches", "blends", "any"])
def test_images_of_no_task(kind):
    x, y = torch.randn(6, 3, 32, 32), torch.randn(6, 3, 32, 32)
    made = [train_module.of_no_task(kind, x, y) for _ in range(2)]
    assert made[0].shape == x.shape and not torch.equal(*made)
    if kind == "patches":  # the same pixels of each image, half of them from either task
        for got, whole in zip(made[0], [*x[:3], *y[3:]], strict=True):
            assert torch.equal(got.flatten().sort().values, whole.flatten().sort().values)
            assert not torch.equal(got, whole)
    if kind == "blends":
        share = (made[0] - x) / (y - x)
        assert share.min() > 0.29 and share.max() < 0.71 and share.flatten(1).std(1).max() < 1e-3


def test_quietness_is_learned(datasets):
    config = having(PAIR, third="none", epochs=6)
    ways = ({}, {"quiet": 3.0}, {"quiet": 3.0, "quiet_also": "noise"})
    networks = [train(having(config, **way), datasets).networks["main"] for way in ways]
    x = normalize(datasets["cifar10"].val_images)
    loudness = [train_module._uniformity(n(x)).item() for n in networks]
    assert loudness[1] < 0.5 * loudness[0] and train_module._uniformity(torch.zeros(2, 10)).abs() < 1e-6
    noise = train_module.of_no_task("noise", x, x)
    loudness = [train_module._uniformity(n(noise)).item() for n in networks]
    assert loudness[2] < 0.5 * min(loudness[:2])


def test_the_symmetric_term_for_main_only_teaches_the_support_network_nothing(datasets, monkeypatch):
    config = having(PAIR, symmetric=True, symmetric_to="main", third="ce")
    networks = {role: build(config, role).train() for role in config.roles}
    total = WeightSum(list(networks.values()))
    batches = {role: (torch.randn(8, 3, 32, 32), torch.arange(8)) for role in networks}
    seen = {}
    monkeypatch.setattr(train_module, "three_term_loss", lambda *a, **k: seen.update(k) or (_ for _ in ()).throw(Stop))
    with pytest.raises(Stop):
        train_module.step_losses(train_module._Step(config, networks, total, batches, 1.0))
    seen["logits_sum_support"].sum().backward()
    assert networks["main"].classifier.fc2.weight.grad is not None
    assert networks["support"].classifier.fc2.weight.grad is None


class Stop(Exception):
    pass


def test_in_a_mixed_batch_the_sum_solves_both_tasks_under_the_statistics_of_both(datasets):
    """It is the symmetric third term of a sum whose batch norm sees both tasks' images at once."""
    config = having(RANDOM, third="none", symmetric=False, mixed_batch=True, dropout=0.0)
    networks = {role: build(config, role).train() for role in config.roles}
    total = WeightSum(list(networks.values()), keys=compact(train_module._Keys(config).own))
    given = {r: next(train_module.batches(config, r, datasets[n], 0, 1)) for r, n in config.roles.items()}
    (x, y), (x_support, y_support) = given.values()
    norm = total.body.features.bn1_1
    norm.momentum = 1.0
    assert train_module.term_mixed_batch in train_module.hooks(config.method)["term"]
    loss = train_module.term_mixed_batch(train_module._Step(config, networks, total, given, 1.0))
    mean, variance = norm.running_mean.clone(), norm.running_var.clone()
    recalibrate(total, torch.cat([x, x_support]))
    torch.testing.assert_close(mean, norm.running_mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(variance, norm.running_var, rtol=1e-4, atol=1e-4)
    logits = total.train()(torch.cat([x, x_support]))
    each = [torch.nn.functional.cross_entropy(z, t) for z, t in zip(logits.split(len(x)), (y, y_support), strict=True)]
    torch.testing.assert_close(loss, sum(each))


def test_under_owner_statistics_the_sum_in_training_is_the_plain_sum_of_the_state_dicts(datasets):
    """With disjoint keys the logits that training adds are those of the added state dicts."""
    config = having(DISPAIR, owner_statistics=True, epochs=1, dropout=0.0)
    run = train(config, datasets)
    a, b = run.networks["main"], run.networks["support"]
    keys = train_module._Keys(config).own
    x = normalize(datasets["mnist"].val_images)
    total = WeightSum([a, b], keys=keys).add_statistics().eval()
    torch.testing.assert_close(total(x), a(x) + train_module._with_own_statistics(b.train(), x))
    assert b.features.bn1_1.training  # left as it was


def test_strangers_come_as_often_as_the_share_says_once_it_has_grown():
    keys = train_module._Keys(having(RANDOM, permuted_ramp=0.5))
    usual = compact(keys.own)
    met = [
        [place[1].positions["classifier.fc1"].tolist() != usual[1].positions["classifier.fc1"].tolist() for place in e]
        for e in (keys.epoch(0, 400), keys.epoch(1, 400))
    ]
    assert 0.3 < sum(met[0]) / 400 < 0.5  # grows from 0 to 0.8 in the first of two epochs
    assert 0.74 < sum(met[1]) / 400 < 0.86


def test_keys_of_networks_that_never_met_are_drawn_apart():
    a, b = (train_module._Keys(having(RANDOM, main=main)).own[0] for main in ("mnist", "svhn"))
    assert a.positions["classifier.fc1"].tolist() != b.positions["classifier.fc1"].tolist()
    again = train_module._Keys(RANDOM).own[0]
    assert all(torch.equal(p, again.positions[layer]) for layer, p in a.positions.items())
    dealt = [key.positions["classifier.fc1"] for key in train_module._Keys(DISPAIR).own]
    assert not torch.isin(*dealt).any()


@pytest.mark.parametrize("config", [PAIR, RANDOM], ids=["dense", "random keys"])
def test_a_killed_run_goes_on_from_its_checkpoint_with_the_same_numbers(datasets, tmp_path, config):
    class Killed(Exception):
        pass

    def kill(row):
        if row["epoch"] == 1:
            raise Killed

    whole, checkpoint = train(config, datasets), tmp_path / "checkpoint.safetensors"
    with pytest.raises(Killed):
        train(config, datasets, checkpoint=checkpoint, on_epoch=kill)
    seen = []
    resumed = train(config, datasets, checkpoint=checkpoint, on_epoch=lambda row: seen.append(row["epoch"]))
    assert seen == [2]
    assert equal(whole.networks["main"], resumed.networks["main"])
    assert equal(whole.networks["support"], resumed.networks["support"])
    assert whole.history[1]["val_sum"] == resumed.history[1]["val_sum"]


def test_networks_that_never_met_share_no_random_stream():
    configs = {
        "mnist alone": (ALONE, "main"),
        "svhn alone": (having(ALONE, main="svhn"), "main"),
        "cifar10 alone": (having(ALONE, main="cifar10"), "main"),
        "mnist in a pair": (PAIR, "main"),
        "its support": (PAIR, "support"),
        "svhn in a pair": (having(PAIR, main="svhn"), "main"),
        "the other support": (having(PAIR, main="svhn"), "support"),
        "another seed": (having(ALONE, seed=1), "main"),
    }
    for purpose in ("initialization", "order of epoch 0"):
        streams = {name: config.stream(role, purpose) for name, (config, role) in configs.items()}
        assert len(set(streams.values())) == len(streams), streams
    weights = [build(config, role).classifier.fc2.weight for config, role in configs.values()]
    for i, a in enumerate(weights):
        for b in weights[i + 1 :]:
            assert torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), 0).abs() < 0.05


def test_the_third_terms_readings_start_from_the_same_weights_and_order():
    other = having(PAIR, third="distill")
    assert other.stream("main", "initialization") == PAIR.stream("main", "initialization")
    assert other.stream("support", "order of epoch 1") == PAIR.stream("support", "order of epoch 1")


def test_a_loss_that_is_not_finite_stops_the_run_with_advice(datasets):
    with pytest.raises(
        FloatingPointError,
        match=r"mnist\+cifar10 joint, third ce, seed 0: .* in epoch 1, step [123] .*; lower learning_rate",
    ):
        train(having(PAIR, learning_rate=1e30), datasets)


def test_networks_of_a_shared_start_start_alike_and_no_others_do():
    shared = [build(having(ALONE, start="shared", main=main)) for main in ("mnist", "svhn")]
    assert equal(*shared) and not equal(shared[0], build(ALONE))
    assert not equal(shared[0], build(having(ALONE, start="shared", seed=1)))


def test_fine_tuning_starts_from_the_given_weights(datasets):
    start = build(ALONE)
    config = having(ALONE, protocol="sequential", support="cifar10", finetune_epochs=1, learning_rate=1e-12)
    config = replace(config, start="sum")
    tuned = train(config, datasets, start=[start]).networks["main"]
    torch.testing.assert_close(tuned.classifier.fc1.weight, start.classifier.fc1.weight)
    tuned = train(config, datasets, start=[start, start]).networks["main"]
    torch.testing.assert_close(tuned.classifier.fc1.weight, 2 * start.classifier.fc1.weight)
    assert len(train(config, datasets).history) == 1


def test_the_learning_rate_warms_up_and_ends_at_zero_and_the_third_term_ramps():
    rate = [train_module._learning_rate(PAIR, x) for x in (0, 0.1, 0.2, 0.6, 1)]
    assert rate == pytest.approx([0, 0.025, 0.05, 0.025, 0])
    assert [train_module._ramp(x, 0.2) for x in (0, 0.1, 0.2, 1)] == pytest.approx([0, 0.5, 1, 1])
    assert train_module._ramp(0, 0.0) == 1


def test_augmentation_shifts_by_two_pixels_at_most_and_flips_only_where_it_may(images):
    def variants(flip):
        generator = torch.Generator().manual_seed(0)
        one = images[:1].expand(400, -1, -1, -1)
        return {x.numpy().tobytes() for x in augment(one, generator, flip)}

    def shifted(image):
        padded = torch.nn.functional.pad(image, (2,) * 4)
        return {padded[:, i : i + 32, j : j + 32].contiguous().numpy().tobytes() for i in range(5) for j in range(5)}

    plain = shifted(images[0])
    assert variants(False) == plain
    mirrored = variants(True) - plain
    assert mirrored and mirrored <= {
        torch.frombuffer(bytearray(v), dtype=torch.uint8).view(3, 32, 32).flip(2).contiguous().numpy().tobytes()
        for v in shifted(images[0].flip(2))
    } | shifted(images[0].flip(2))


@pytest.mark.parametrize(("name", "mirrored"), [("mnist", False), ("svhn inverted", False), ("cifar10", True)])
def test_digits_are_never_mirrored(datasets, images, name, mirrored):
    left = torch.zeros(3, 32, 32, dtype=torch.uint8)
    left[:, :, :8] = 255  # bright on its left
    dataset = replace(datasets["mnist"], name=name, train_images=left.expand(96, -1, -1, -1))
    x, _ = next(train_module.batches(replace(ALONE, main=name, batch_size=64), "main", dataset, 0, 1))
    assert (x[..., 24:].mean((1, 2, 3)) > x[..., :8].mean((1, 2, 3))).any() == mirrored


@pytest.mark.parametrize("damage", ["empty", "another run's", "one bit"])
def test_a_checkpoint_that_is_damaged_or_another_runs_counts_as_absent(datasets, tmp_path, damage):
    own, other = (tmp_path / name / "checkpoint.safetensors" for name in ("own", "other"))
    config, seen = having(ALONE, epochs=1, epoch_images=32), []
    train(config, datasets, checkpoint=own)
    train(config, datasets, checkpoint=own, on_epoch=seen.append)
    assert seen == []  # it is whole: nothing is left to train
    train(having(config, seed=1), datasets, checkpoint=other)
    content = bytearray(own.read_bytes())
    content[-1] ^= 1
    own.write_bytes({"empty": b"", "another run's": other.read_bytes(), "one bit": content}[damage])
    train(config, datasets, checkpoint=own, on_epoch=seen.append)
    assert [row["epoch"] for row in seen] == [1]
