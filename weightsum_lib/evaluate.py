"""Accuracy before and after the sum, under one batch-norm policy for all, and the controls beside it."""

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from weightsum_lib import merging
from weightsum_lib.batchnorm import recalibrate
from weightsum_lib.data import Dataset
from weightsum_lib.keys import Key, compact, overlap
from weightsum_lib.models import normalize
from weightsum_lib.params import BASELINE, SHARED, TRAINED
from weightsum_lib.study import Study
from weightsum_lib.train import RunConfig, autocast, build, count_correct, key_of
from weightsum_lib.weights import WeightSum, compare_layers, widen

# Where a network's batch-norm statistics come from when it is tested, and what that presumes.
POLICIES = {
    "owner": "each channel keeps the statistics of the network that owns it; nothing but addition, needs disjoint keys",
    "union": "training images of all summed tasks together, without labels; needs such images",
    "per_task": "training images of the tested task; presumes to know which task a test image is from",
    "summed": "the networks' statistics added, as state dicts are; wrong wherever two networks share a channel",
    "batch": "the test batch's own, all of one task; needs many test images at once and presumes their task",
}
_BATCH = 500  # test images whose own statistics the policy "batch" uses
Member = tuple[nn.Module, Key | None]  # a network of a sum, and where its channels lie


def accuracy(
    network: nn.Module,
    calibration: Tensor | None,
    dataset: Dataset,
    precision: str = "float32",
    split: str = "test",
    limit: int | None = None,
) -> float:
    """Percent of a split that a network gets right, its batch-norm statistics re-estimated first.

    Args:
        network: any network or sum; left as it is, a copy is measured.
        calibration: uint8 training images (N, 3, 32, 32) that set the statistics, without labels; None
            leaves the network's own.
        dataset: what is tested.
        precision: of the forward pass, see :func:`weightsum_lib.train.autocast`.
        split: "test", or "val" for everything that a choice may depend on.
        limit: only the first so many images of the split.
    """
    network = network.materialize() if isinstance(network, WeightSum) else copy.deepcopy(network)
    images, labels = getattr(dataset, f"{split}_images")[:limit], getattr(dataset, f"{split}_labels")[:limit]
    if calibration is not None:
        with autocast(precision, images.device):
            recalibrate(network, normalize(calibration))
    return 100 * count_correct(network.eval(), images, labels, precision) / len(labels)


def calibration_images(study: Study, names: Sequence[str]) -> Tensor:
    """Training images that set the batch-norm statistics: equally many of each named task, as many in all as
    ``calibration_images`` says."""
    each = study.params.calibration_images // len(names)
    return torch.cat([study.dataset(name).train_images[:each] for name in names])


def under_policy(study: Study, network: nn.Module, policy: str, tasks: Sequence[str], tested: str) -> nn.Module:
    """A plain copy of a network or sum with the batch-norm statistics of a policy, in evaluation mode.

    Args:
        study: whose images and precision are used.
        network: a network, a sum or an ensemble.
        policy: one of ``POLICIES``.
        tasks: the tasks whose networks are summed.
        tested: the task that it is going to be tested on.
    """
    if isinstance(network, WeightSum):
        network = (network.add_statistics() if policy in ("owner", "summed") else network).materialize()
    else:
        network = copy.deepcopy(network)
    if policy in ("union", "per_task"):
        images = calibration_images(study, tasks if policy == "union" else [tested])
        with autocast(study.precision, images.device):
            recalibrate(network, normalize(images))
    network.eval()
    for module in network.modules():
        if policy == "batch" and isinstance(module, _BatchNorm):
            module.running_mean = module.running_var = None  # then the batch's are used
    return network


def _tested(study: Study, network: nn.Module, policy: str, tasks: Sequence[str], tested: Sequence[str]) -> list[float]:
    """Percent of the test images of each task in ``tested`` under a policy."""
    out, calibrated = [], None
    for name in tested:
        if calibrated is None or policy == "per_task":
            calibrated = under_policy(study, network, policy, tasks, name)
        dataset = study.dataset(name)
        batch = _BATCH if policy == "batch" else None
        right = count_correct(calibrated, dataset.test_images, dataset.test_labels, study.precision, batch)
        out.append(100 * right / len(dataset.test_labels))
    return out


def total_of(members: Sequence[Member]) -> WeightSum:
    """θ + θ + …, each network's channels where its key says."""
    networks, keys = zip(*members, strict=True)
    return WeightSum(networks, keys=compact(keys) if keys[0] else None)


def _measure(study: Study, what: str, configs, names, compute, **settings):
    for name in names:
        study.dataset(name)
    return study.measured(what, configs, {"data": sorted(names), **settings}, compute)


def pair_configs(study: Study, method: str, main: str, support: str, seed: int) -> dict[str, RunConfig]:
    """The runs behind one row of task 1 or 2, by what they are for."""
    protocol = study.params.method(method).protocol
    if protocol == "joint":
        return {"pair": study.config(method, main, support, seed)}
    if protocol == "independent":
        return {"main": study.config(method, main, seed=seed), "support": study.config(method, support, seed=seed)}
    return {start: study.config(method, main, support, seed, start) for start in ("sum", "main", "random")}


def _member(study: Study, method: str, config: RunConfig, role: str, block: int) -> Member:
    """One network of a run, and its key under the row's switches."""
    m = study.params.method(method)
    wide = replace(config, width=study.params.width * m.wider, keys=m.keys, key_share=m.key_share)
    return study.run(config).networks[role], key_of(wide, role, block)


def pair_members(study: Study, method: str, main: str, support: str, seed: int) -> list[Member]:
    """θ_main and θ_support of an ``independent`` or ``joint`` row, and where they lie in their sum."""
    configs = pair_configs(study, method, main, support, seed)
    study.train_all(list(configs.values()))
    if "pair" in configs:
        return [_member(study, method, configs["pair"], role, i) for i, role in enumerate(("main", "support"))]
    return [_member(study, method, configs[role], "main", i) for i, role in enumerate(("main", "support"))]


def _rows(study: Study, parts: bool = False):
    """(method, seed) of every row that the profile asks for, with or without the ``parts``."""
    methods = [*study.params.methods, *(study.params.parts if parts else ())]
    return [(method, seed) for method in methods for seed in study.params.seeds_of(method)]


def train_pairs(study: Study, main: str, support: str) -> None:
    """Finish every run that the tables of task 1 or 2 need, in one queue."""
    configs = [c for m, s in _rows(study) for c in pair_configs(study, m, main, support, s).values()]
    study.train_all(configs)


def _policies(study: Study, method: str) -> list[str]:
    """The policies that make sense for a row's sums."""
    return [p for p in POLICIES if p != "owner" or study.params.method(method).keys == "disjoint"]


def before_after(study: Study, main: str, support: str) -> list[dict]:
    """Tasks 1 and 2: the main task before and after the sum, for every method and seed, in percent of test images.

    Both sides under the ``recalibrated`` policy: statistics from training images of the tested task.

    Returns:
        one dict a method and seed. ``before``: θ_main on the main task; ``after``: the sum there;
        ``support_before``, ``support_after``: θ_support and the sum on the support task;
        ``support_on_main``: θ_support on the main task (a control). ``sequential`` has three rows, one
        for each start; its ``after`` is the fine-tuned network, its ``before`` θ_main before the sum.
    """
    rows = []
    for method, seed in _rows(study):
        configs = pair_configs(study, method, main, support, seed)
        if study.params.method(method).protocol == "sequential":
            alone = study.alone(configs["main"])
            before = _measure(study, "alone", [alone], (main,), lambda c=alone: _alone_row(study, c))
            for start, config in configs.items():
                rows.append({"method": f"{method}, from {_START[start]}", "seed": seed, **before})
                rows[-1] |= _measure(
                    study, "fine-tuned", [config], (main, support), lambda c=config: _fine_tuned_row(study, c)
                )
        else:
            rows.append({"method": method, "seed": seed, **_pair_row(study, method, main, support, seed)})
    return rows


_START = {"sum": "the sum", "main": "θ_main", "random": "random weights"}


def _keys(study: Study, method: str) -> list:
    """What a measurement depends on besides its runs: networks that were trained alone don't know their key."""
    m = study.params.method(method)
    return [m.keys, m.key_share, m.wider]


def _pair_row(study, method, main, support, seed) -> dict:
    """A pair and its sum, each on statistics of the tested task."""

    def compute():
        members = pair_members(study, method, main, support, seed)
        networks = (members[0][0], members[1][0], total_of(members))
        (before, _), (on_main, support_before), (after, support_after) = (
            _tested(study, network, "per_task", (), (main, support)) for network in networks
        )
        return {
            "before": before,
            "after": after,
            "support_before": support_before,
            "support_after": support_after,
            "support_on_main": on_main,
        }

    configs = list(pair_configs(study, method, main, support, seed).values())
    return _measure(study, "pair", configs, (main, support), compute, keys=_keys(study, method))


def _fine_tuned_row(study, config: RunConfig) -> dict:
    tuned = study.run(config).networks["main"]
    after, support_after = _tested(study, tuned, "per_task", (), (config.main, config.support))
    return {"after": after, "support_after": support_after}


def _alone_row(study, config: RunConfig) -> dict:
    (before,) = _tested(study, study.run(config).networks["main"], "per_task", (), (config.main,))
    return {"before": before}


def pair_policies(study: Study, main: str, support: str) -> list[dict]:
    """The main task before and after the sum under every batch-norm policy, for every pair that is summed as it is.

    Returns:
        one dict a method, seed and policy, with ``before`` and ``after`` in percent of test images.
    """
    rows = []
    for method, seed in _summed_rows(study):
        others = [policy for policy in _policies(study, method) if policy != "per_task"]

        def compute(method=method, seed=seed, others=others):
            members, out = pair_members(study, method, main, support, seed), []
            for policy in others:
                of_main, of_sum = (
                    _tested(study, n, policy, (main, support), (main,)) for n in (members[0][0], total_of(members))
                )
                out.append({"policy": policy, "before": of_main[0], "after": of_sum[0]})
            return out

        configs = list(pair_configs(study, method, main, support, seed).values())
        found = _measure(study, "pair policies", configs, (main, support), compute, keys=_keys(study, method))
        pair = _pair_row(study, method, main, support, seed)  # measured before, under the policy that is left
        found.append({"policy": "per_task", "before": pair["before"], "after": pair["after"]})
        found.sort(key=lambda row: list(POLICIES).index(row["policy"]))
        rows += [{"method": method, "seed": seed, **row} for row in found]
    return rows


def layer_rows(study: Study, main: str, support: str, seed: int = 0) -> list[dict]:
    """Norm ratio and cosine of θ_main and θ_support, layer by layer, for every pair that is summed as it is.

    Under keys both networks are compared as they lie in their sum.
    """
    rows = []
    for method, _ in dict.fromkeys((m, 0) for m, _ in _summed_rows(study)):
        a, b = (widen(n, key) if key else n for n, key in pair_members(study, method, main, support, seed))
        rows += [{"method": method, **row} for row in compare_layers(a, b)]
    return rows


def coefficient_plane(study: Study, method: str, first: str, second: str, support: str = "", seed: int = 0) -> dict:
    """Validation accuracy of α·θ_first + β·θ_second on both tasks, statistics from training images of the tested task.

    Args:
        study: where the networks come from.
        method: row of the report.
        first: dataset of θ_first.
        second: dataset of θ_second.
        support: given, both are main networks that were trained with this support task apart from each
            other (task 3); empty, ``second`` is the support network of the pair (tasks 1 and 2).
        seed: repetition.

    Returns:
        ``coefficients`` (n,), and for each dataset name an n × n list, rows α, columns β, in percent.
    """
    if support:
        configs = [main_config(study, method, name, support, seed) for name in (first, second)]
    else:
        configs = list(pair_configs(study, method, first, second, seed).values())
    coefficients = torch.linspace(0, 1.5, study.params.plane_points).tolist()

    def compute():
        if support:
            members = unmet_members(study, method, (first, second), support, seed)
        else:
            members = pair_members(study, method, first, second, seed)
        total = total_of(members)
        grid = {first: [], second: []}
        for name, rows in grid.items():
            dataset, images = study.dataset(name), calibration_images(study, [name])[:_PLANE_IMAGES]
            for alpha in coefficients:
                rows.append([])
                for beta in coefficients:
                    total.coefficients = [alpha, beta]
                    rows[-1].append(accuracy(total, images, dataset, study.precision, "val", _PLANE_IMAGES))
        return {"coefficients": coefficients, **grid}

    settings = {"points": study.params.plane_points, "keys": _keys(study, method)}
    return _measure(study, "plane", configs, (first, second), compute, **settings)


_PLANE_IMAGES = 300  # to calibrate and to test one point of the plane: many points, little precision needed


def main_config(study: Study, method: str, main: str, support: str, seed: int) -> RunConfig:
    """The run that makes θ_main of a row: alone, or with its support network."""
    joint = study.params.method(method).protocol == "joint"
    return study.config(method, main, support if joint else "", seed)


def unmet_members(study: Study, method: str, names: Sequence[str], support: str, seed: int) -> list[Member]:
    """The main networks of several tasks, trained apart from each other, and where they lie in their sum."""
    configs = [main_config(study, method, name, support, seed) for name in names]
    study.train_all(configs)
    return [_member(study, method, config, "main", i) for i, config in enumerate(configs)]


def _summed_rows(study: Study, parts: bool = False):
    """(method, seed) of the rows whose pair is summed as it is; that of ``sequential`` is `independent`'s."""
    return [(m, s) for m, s in _rows(study, parts) if study.params.method(m).protocol != "sequential"]


def unmet_sums(study: Study, first: str, second: str, support: str, parts: bool = False) -> list[dict]:
    """Task 3: θ_first + θ_second, never trained together, on both tasks; no training after the sum.

    With ``parts`` the profile's rows of what each part adds come too.

    Returns:
        one dict a method, seed and batch-norm policy (``POLICIES``), in percent of test images. ``before`` and
        ``after`` hold each task's own network and the sum on it. Under ``union`` and ``owner`` also:
        ``ensemble``, the sum of both networks' logits; ``other``, the *other* task's network there, the control
        without which ``after`` means nothing; ``renamed``, the sum where ``second``'s classes have other names, so
        that two digit networks can't help each other; ``confidence``, the other network's mean largest
        probability there. Keys end in the dataset's name.
    """
    wanted = _summed_rows(study, parts)
    study.train_all([main_config(study, m, name, support, s) for m, s in wanted for name in (first, second)])
    rows = []
    for method, seed in wanted:
        configs = [main_config(study, method, name, support, seed) for name in (first, second)]
        found = _measure(
            study,
            "unmet",
            configs,
            (first, second),
            lambda m=method, s=seed: _unmet_rows(study, m, s, first, second, support),
            keys=_keys(study, method),
        )
        rows += [{"method": method, "seed": seed, **row} for row in found]
    return rows


def _unmet_rows(study, method, seed, first, second, support) -> list[dict]:
    both, rows = (first, second), []
    members = unmet_members(study, method, both, support, seed)
    (a, _), (b, key) = members
    renaming = torch.arange(10).roll(1 + seed % 9)
    renamed = total_of([members[0], (merging.relabelled(b, renaming), key)])
    for policy in _policies(study, method):
        compared = policy in ("union", "owner")
        of_a, of_b = (
            _tested(study, n, policy, both, both if compared else (t,)) for n, t in zip((a, b), both, strict=True)
        )
        of_sum = _tested(study, total_of(members), policy, both, both)
        row = {f"before_{first}": of_a[0], f"before_{second}": of_b[-1]}
        row |= {f"after_{name}": value for name, value in zip(both, of_sum, strict=True)}
        if compared:
            row |= {f"other_{first}": of_b[0], f"other_{second}": of_a[1]}
            of_ensemble = _tested(study, merging.Ensemble([a, b]), policy, both, both)
            row |= {f"ensemble_{name}": value for name, value in zip(both, of_ensemble, strict=True)}
            row |= {f"confidence_{first}": _confidence(study, b, policy, both, first)}
            row |= {f"confidence_{second}": _confidence(study, a, policy, both, second)}
            row |= {f"renamed_{name}": _renamed(study, renamed, policy, both, name, renaming) for name in both}
        rows.append({"policy": policy, **row})
    return rows


@torch.no_grad()
def _confidence(study, network, policy, tasks, name) -> float:
    """Mean largest probability (percent) of a network on a task's first test images."""
    images = study.dataset(name).test_images[:1000]
    network = under_policy(study, network, policy, tasks, name)
    with autocast(study.precision, images.device):
        logits = network(normalize(images)).float()
    return 100 * logits.softmax(1).amax(1).mean().item()


def _renamed(study, total, policy, tasks, name, renaming) -> float:
    """A sum's accuracy on a task, the classes of the last of ``tasks`` renamed."""
    dataset = study.dataset(name)
    labels = renaming.to(dataset.test_labels.device)[dataset.test_labels] if name == tasks[-1] else dataset.test_labels
    network = under_policy(study, total, policy, tasks, name)
    return 100 * count_correct(network, dataset.test_images, labels, study.precision) / len(labels)


def explained_variance(study: Study, method: str, first: str, second: str, support: str, seed: int = 0) -> list[dict]:
    """How much of what happens inside θ_first + θ_second on ``first``'s images θ_first alone explains.

    Layer by layer on validation images: the squared correlation between a channel of the sum and the same
    channel of θ_first, averaged over the channels that θ_first uses, weighted by their variance in the sum. A
    convolution is looked at behind its batch norm, before the ReLU. Policy ``owner`` for disjoint keys, else ``union``.

    Returns:
        a list with one dict for each layer; keys ``method``, ``layer``, ``explained`` (0 to 1), and ``overlap``, the
        share of θ_first's channels that θ_second uses too (the logits: 1).
    """
    both = (first, second)
    policy = headline_policy(study, method)

    def compute():
        members = unmet_members(study, method, both, support, seed)
        keys = compact([key for _, key in members]) if members[0][1] else None
        images = normalize(study.dataset(first).val_images[:_PLANE_IMAGES])
        alone, total = (
            _activations(under_policy(study, n, policy, both, first), images)
            for n in (members[0][0], total_of(members))
        )
        shared = overlap(*keys) if keys else {}
        rows = []
        for layer, a in alone.items():
            s = total[layer]
            if keys and layer in shared:
                s = s[:, keys[0].positions[layer].to(s.device)]
            a, s = (x - x.mean(0) for x in (a, s))
            # channels that are silent in θ_first explain nothing
            explained = ((a * s).mean(0).square() / a.square().mean(0).clamp_min(1e-12)).sum() / s.square().mean(
                0
            ).sum()
            rows.append(
                {
                    "layer": layer.rpartition(".")[2],
                    "explained": explained.item(),
                    "overlap": shared.get(layer, 1.0),
                }
            )
        return rows

    configs = [main_config(study, method, name, support, seed) for name in both]
    found = _measure(study, "explained", configs, both, compute, keys=_keys(study, method), policy=policy)
    return [{"method": method, **row} for row in found]


@torch.no_grad()
def _activations(network: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Each layer's output before its ReLU, (values, channels) float64, by the name of its convolution or linear layer.

    A batch norm's output counts as that of the convolution before it.
    """
    found, last = {}, [""]

    def record(name):
        def hook(module, _, output):
            if not isinstance(module, _BatchNorm):
                last[0] = name
            found[last[0]] = output.double().movedim(1, -1).flatten(0, -2)

        return hook

    kinds = nn.Conv2d | nn.Linear | _BatchNorm
    hooks = [m.register_forward_hook(record(n)) for n, m in network.named_modules() if isinstance(m, kinds)]
    network(images)
    for hook in hooks:
        hook.remove()
    return found


def headline_policy(study: Study, method: str) -> str:
    """The batch-norm policy of a row's headline in sums of networks that never met."""
    return "owner" if study.params.method(method).keys == "disjoint" else "union"


def same_size_alone(study: Study, method: str) -> str:
    """The row of networks of the same size as a row's, trained alone: what a row has to hold its own against."""
    m, p = study.params.method(method), study.params
    alone = [x for x in p.methods | p.parts if p.method(x).protocol == "independent" and p.method(x).start == "random"]
    size = m.wider * m.key_share
    return next((x for x in alone if p.method(x).wider * p.method(x).key_share == size), BASELINE)


def support_of(name: str) -> str:
    """The support task beside a main task: CIFAR-10, for CIFAR-10 itself MNIST inverted, which is in no table."""
    return "mnist inverted" if name.startswith("cifar10") else "cifar10"


def many_sum(study: Study, method: str, networks: Sequence[str], seed: int) -> dict:
    """The sum of several networks on all their tasks, under the row's headline policy.

    Args:
        study: where the networks come from.
        method: row of the report.
        networks: for each network its dataset, trained as main network beside CIFAR-10 (CIFAR-10 itself beside MNIST
            inverted); "<dataset> with <dataset>", beside that one instead; or "<dataset> beside <dataset>", the
            support network of that main task's pair.
        seed: repetition.

    Returns:
        ``before`` and ``after``: for each network its task's accuracy alone and in the sum, percent of test images.
    """
    policy, configs, tested = headline_policy(study, method), [], []
    for name in networks:
        own, _, main = name.partition(" beside ")
        own, _, support = own.partition(" with ")
        config = main_config(study, method, main or own, support or support_of(main or own), seed)
        role = "support" if main else "main"
        if config.protocol != "joint":
            config, role = replace(config, main=own), "main"
        configs.append((config, role))
        tested.append(own)

    def compute():
        members = [_member(study, method, c, role, i) for i, (c, role) in enumerate(configs)]
        before = [
            _tested(study, network, policy, tested, [name])[0]
            for (network, _), name in zip(members, tested, strict=True)
        ]
        return {"before": before, "after": _tested(study, total_of(members), policy, tested, tested)}

    settings = {"keys": _keys(study, method), "roles": [role for _, role in configs], "order": tested}
    return _measure(study, "many", [config for config, _ in configs], sorted(set(tested)), compute, **settings)


def merged(study: Study, first: str, second: str) -> list[dict]:
    """Task 3 by the methods of others, on networks trained apart; policy ``union``.

    Args:
        study: where the networks come from: its row `independent`, and where it has one `shared start`, for
            task arithmetic.
        first: dataset of the first network.
        second: dataset of the second.

    Returns:
        one dict a merger and seed, with ``after_`` + dataset in percent of test images. A partner with random
        weights of equal norms stands in for each network in turn.
    """
    rows = []
    for row, what, mergers in ((BASELINE, "merged", _mergers), (SHARED, "arithmetic", _arithmetic)):
        for seed in study.params.seeds_of(row) if row in study.params.methods else ():
            configs = [study.config(row, name, seed=seed) for name in (first, second)]
            rows += _merged_rows(study, what, configs, seed, mergers)
    return rows


def _merged_rows(study, what, configs, seed, mergers) -> list[dict]:
    both = [config.main for config in configs]

    def compute():
        networks = [run.networks["main"] for run in study.train_all(configs)]
        out = []
        for label, merged in mergers(study, configs, networks).items():
            after = [_tested(study, n, "union", both, [t])[0] for n, t in zip(merged, both, strict=True)]
            out.append({"method": label, **{f"after_{t}": v for t, v in zip(both, after, strict=True)}})
        return out

    return [{"seed": seed, **row} for row in _measure(study, what, configs, both, compute)]


def _mergers(study, configs, networks) -> dict[str, list[nn.Module]]:
    """Label to the network that is tested on each of the two tasks."""
    a, b = networks
    images = [calibration_images(study, [config.main]) for config in configs]
    calibrated = [under_policy(study, n, "per_task", (), c.main) for n, c in zip(networks, configs, strict=True)]
    strangers = [
        merging.random_like(n, build(replace(c, seed=c.seed + 1000)).to(study.device))
        for n, c in zip(networks, configs, strict=True)
    ]
    return {
        "sum": [WeightSum([a, b])] * 2,
        "average": [merging.average([a, b])] * 2,
        "Git Re-Basin, then average": [merging.average([a, merging.weight_matching(a, b)])] * 2,
        "RegMean": [merging.regmean(calibrated, [normalize(x) for x in images])] * 2,
        "ensemble of logits": [merging.Ensemble([a, b])] * 2,
        "sum with random weights of the partner's norms": [WeightSum([a, strangers[1]]), WeightSum([b, strangers[0]])],
    }


def _arithmetic(study, configs, networks) -> dict[str, list[nn.Module]]:
    start = build(configs[0]).to(study.device)
    return {
        f"task arithmetic from a shared start, × {scale:g}": [merging.task_arithmetic(start, networks, scale)] * 2
        for scale in (0.5, 1.0)
    }


def ceilings(study: Study, first: str, second: str) -> list[dict]:
    """What could be reached if the two tasks did meet: one network trained on both, and a pair trained together.

    Returns:
        one dict a ceiling and seed, with ``after_`` + dataset in percent of test images, policy ``union``; no rows
        where the parameter ``ceiling_seeds`` is 0.
    """
    rows, both = [], (first, second)
    for seed in range(study.params.ceiling_seeds):
        one = study.config(BASELINE, f"{first}+{second}", seed=seed)
        pair = replace(study.config(TRAINED, first, second, seed), symmetric=True)
        for label, config in (("one network trained on both", one), ("trained together, symmetric", pair)):

            def compute(config=config):
                networks = study.run(config).networks
                network = WeightSum(list(networks.values())) if len(networks) > 1 else networks["main"]
                after = _tested(study, network, "union", both, both)
                return {f"after_{name}": value for name, value in zip(both, after, strict=True)}

            rows.append({"method": label, "seed": seed, **_measure(study, "ceiling", [config], both, compute)})
    return rows
