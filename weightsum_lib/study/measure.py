"""What networks and their sums can do: each is described by a value and measured once, in rows of one long frame.

The frame is long: ``task``, ``method``, ``seed``, ``draw`` (of the keys), ``policy`` (of the batch-norm statistics),
``network`` (what is tested), ``tested`` (on what), ``split``, ``accuracy`` and ``confidence`` (the mean largest
probability), both in percent.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from weightsum_lib.core.keys import compact, overlap, widen
from weightsum_lib.core.models import normalize
from weightsum_lib.core.weights import compare_layers
from weightsum_lib.study.config import RunConfig
from weightsum_lib.study.params import BASELINE, SHARED, TRAINED, Params
from weightsum_lib.study.runs import Study
from weightsum_lib.study.sums import POLICIES, Member, Sum, alone, keyed, made, shift_of, under_policy
from weightsum_lib.study.train import logits_of

DRAWS = 10  # of both networks' keys: the one of the report's other tables, and nine more
_BATCH = 500  # test images whose own statistics the policy "batch" uses
_PLANE_IMAGES = 300  # to calibrate and to test one point of the plane: many points, little precision needed


def accuracies(study: Study, what: Sum, policy: str, tested: Sequence[str], split: str) -> dict[str, dict[str, float]]:
    """Percent of the images of each task in ``tested`` that a network gets right, and its confidence there."""
    network, found, calibrated = made(study, what), {}, None
    for name in tested:
        if calibrated is None or policy == "per_task":
            calibrated = under_policy(study, network, policy, what.tasks, name.split(" renamed")[0])
        images, labels = (getattr(study.dataset(name), f"{split}_{kind}") for kind in ("images", "labels"))
        logits = logits_of(calibrated, images, study.precision, _BATCH if policy == "batch" else None)
        right, confidence = (logits.argmax(1) == labels).sum().item(), logits.softmax(1).amax(1).mean().item()
        found[name] = {"accuracy": 100 * right / len(labels), "confidence": 100 * confidence}
    return found


@dataclass(frozen=True)
class Case:
    """Rows of the frame: one network under one policy, tested on some tasks."""

    task: str
    method: str
    seed: int
    network: str
    what: Sum
    policy: str
    tested: tuple[str, ...]
    split: str = "test"


def frame(study: Study, cases: Iterable[Case]) -> pd.DataFrame:
    """The long frame of some cases; every run that they need is trained first, in one queue."""
    cases, rows = list(cases), []
    study.train_all([member.config for case in cases for member in case.what.members])
    for case in cases:
        compute = partial(accuracies, study, case.what, case.policy, case.tested, case.split)
        settings = {k: getattr(case, k) for k in ("policy", "tested", "split")}
        found = _measured(study, compute, case.what, case.tested, **settings)
        about = {k: v for k, v in vars(case).items() if k not in ("what", "tested")} | {"draw": case.what.draw}
        rows += [{**about, "tested": name.split(" renamed")[0], **found[name]} for name in case.tested]
    return pd.DataFrame(rows)


def _measured(study: Study, compute: partial, what: Sum, names: Sequence[str], **settings):
    """A measurement of one description, from the cache where the same has been measured."""
    about = {k: v for k, v in asdict(what).items() if k != "members"} | {"roles": [m.role for m in what.members]}
    names = sorted({*names, *what.tasks})
    settings = {**settings, "what": about, "data": names}
    return study.measured(compute, [m.config for m in what.members], settings, f"study.sums:{what.how}")


def policies_of(p: Params, method: str) -> list[str]:
    """The batch-norm policies that make sense for a row's sums."""
    return [policy for policy in POLICIES if policy != "owner" or p.method(method).keys == "disjoint"]


def headline_policy(p: Params, method: str) -> str:
    """The batch-norm policy of a row's headline in sums of networks that never met."""
    return "owner" if p.method(method).keys == "disjoint" else "union"


def _rows(study: Study, parts: bool = False) -> Iterator[tuple[str, int]]:
    """(method, seed) of every row that the profile asks for, with or without the ``parts``."""
    p = study.params
    yield from ((m, s) for m in (p.methods if parts else p.rows) for s in p.seeds_of(m))


_START = {"sum": "the sum", "main": "θ_main", "random": "random weights"}


def pair_members(study: Study, method: str, main: str, support: str, seed: int) -> list[Member]:
    """θ_main and θ_support of an ``independent`` or ``joint`` row."""
    if study.params.method(method).protocol == "joint":
        config = study.config(method, main, support, seed)
        return [Member(config, "main"), Member(config, "support")]
    return [Member(study.config(method, name, seed=seed)) for name in (main, support)]


def _pairs(study: Study, main: str, support: str) -> Iterator[Case]:
    task, both = "1" if main == "mnist" else "2", (main, support)
    for method, seed in _rows(study):
        if study.params.method(method).protocol == "sequential":
            for start, words in _START.items():
                config, label = study.config(method, main, support, seed, start), f"{method}, from {words}"
                for network, made_by, tested in (("main", study.alone(config), (main,)), ("sum", config, both)):
                    what = alone(Member(made_by), both)
                    yield Case(task, label, seed, network, what, "per_task", tested)
            continue
        members = pair_members(study, method, main, support, seed)
        networks = {name: alone(m, both) for name, m in zip(("main", "support"), members, strict=True)}
        networks["sum"] = keyed(study, method, members, both)
        for policy in policies_of(study.params, method):
            for network, what in networks.items():
                if policy == "per_task" or network != "support":
                    yield Case(task, method, seed, network, what, policy, both if policy == "per_task" else (main,))


def pairs(study: Study, main: str, support: str) -> pd.DataFrame:
    """Tasks 1 and 2, every row of the profile: θ_main, θ_support, and their sum, under every policy.

    Under ``per_task`` on both tasks, under the others on the main task. ``sequential`` is three methods, one for each
    start; its network "sum" is the fine-tuned one, its "main" is θ_main before the sum.
    """
    return frame(study, _pairs(study, main, support))


def main_config(study: Study, method: str, main: str, support: str, seed: int) -> RunConfig:
    """The run that makes θ_main of a row: alone, or with its support network."""
    joint = study.params.method(method).protocol == "joint"
    return study.config(method, main, support if joint else "", seed)


def stranger_members(study: Study, method: str, names: Sequence[str], seed: int, support: str = "cifar10"):
    """The main networks of several tasks, trained apart from each other."""
    return [Member(main_config(study, method, name, support, seed)) for name in names]


def _summed_rows(study: Study, parts: bool = False) -> Iterator[tuple[str, int]]:
    """The rows whose pair is summed as it is; that of ``sequential`` is `independent`'s."""
    return (row for row in _rows(study, parts) if study.params.method(row[0]).protocol != "sequential")


def _strangers(study: Study, first: str, second: str, parts: bool) -> Iterator[Case]:
    both = (first, second)
    for method, seed in _summed_rows(study, parts):
        members = stranger_members(study, method, both, seed)
        total = keyed(study, method, members, both)
        for policy in policies_of(study.params, method):
            about, compared = ("3", method, seed), policy in ("union", "owner")
            for name, member in zip(both, members, strict=True):
                yield Case(*about, name, alone(member, both), policy, both if compared else (name,))
            yield Case(*about, "sum", total, policy, both)
            if compared:
                names = (first, f"{second} renamed {shift_of(total)}")
                yield Case(*about, "ensemble", replace(total, how="ensemble"), policy, both)
                yield Case(*about, "renamed", replace(total, how="renamed"), policy, names)


def strangers(study: Study, first: str, second: str, parts: bool = False) -> pd.DataFrame:
    """Task 3, every row of the profile: two networks that never met, and their sum, no training after it.

    Under ``union`` and ``owner`` each network is tested on both tasks (on the other's it is the control without which
    the sum means nothing), and there are the ``ensemble`` of the logits and the sum with ``renamed`` classes, in which
    two digit networks can't help each other.
    """
    return frame(study, _strangers(study, first, second, parts))


def draws(study: Study, method: str, first: str, second: str) -> pd.DataFrame:
    """Task 3 under ``DRAWS`` draws of random keys, nothing trained anew; policy ``union``."""
    both, cases = (first, second), []
    for seed in study.params.seeds_of(method):
        members = stranger_members(study, method, both, seed)
        for name, member in zip(both, members, strict=True):
            cases.append(Case("3", method, seed, name, alone(member, both), "union", both))
        for number in range(DRAWS):
            total = keyed(study, method, members, both, draw=number)
            cases.append(Case("3", method, seed, "sum", total, "union", both))
    return frame(study, cases)


def several(study: Study, method: str, networks: Sequence[tuple[str, str, str]], seed: int) -> pd.DataFrame:
    """The sum of several networks on all their tasks, and each alone, under the row's headline policy.

    Args:
        study: where the networks come from.
        method: row of the report.
        networks: for each its task, the task of the partner that it was trained beside, and its role ("main" or
            "support") in that pair. A row trained alone has no partners.
        seed: repetition.
    """
    members = []
    for task, partner, role in networks:
        pair = (task, partner) if role == "main" else (partner, task)
        if study.params.method(method).protocol == "joint":
            members.append(Member(study.config(method, *pair, seed), role))
        else:
            members.append(Member(study.config(method, task, seed=seed)))
    tasks, policy = tuple(m.task for m in members), headline_policy(study.params, method)
    about = (str(len(tasks)), method, seed)
    cases = [Case(*about, m.task, alone(m, tasks), policy, (m.task,)) for m in members]
    return frame(study, [*cases, Case(*about, "sum", keyed(study, method, members, tasks), policy, tasks)])


_STRANGER = "sum with random weights of the partner's norms"
_MERGERS = {  # row of the profile: label, how, and coefficients
    BASELINE: [
        ("sum", "plain", ()),
        ("average", "average", ()),
        ("Git Re-Basin, then average", "rebasin", ()),
        ("RegMean", "regmean", ()),
        ("ensemble of logits", "ensemble", ()),
    ],
    SHARED: [(f"task arithmetic from a shared start, × {scale:g}", "arithmetic", (scale,)) for scale in (0.5, 1.0)],
}


def mergers(study: Study, first: str, second: str) -> pd.DataFrame:
    """Task 3 by the methods of others, on networks trained apart; policy ``union``.

    Task arithmetic takes the row `shared start`, where the profile has it. A partner with random weights of equal
    norms stands in for each network in turn.
    """
    both, cases = (first, second), []
    for row, seed in _rows(study):
        pair = tuple(stranger_members(study, row, both, seed)) if row in _MERGERS else ()
        found = [(label, pair, how, scales, both) for label, how, scales in _MERGERS.get(row, ())]
        if row == BASELINE:
            found += [(_STRANGER, p, "stranger", (), (p[0].task,)) for p in (pair, pair[::-1])]
        for label, members, how, scales, tested in found:
            what = Sum(members, both, how, coefficients=scales)
            cases.append(Case("3", label, seed, "merged", what, "union", tested))
    return frame(study, cases)


def ceilings(study: Study, first: str, second: str) -> pd.DataFrame:
    """What could be reached if the two tasks did meet: one network trained on both, and a pair trained together.

    Policy ``union``; no rows where the parameter ``ceiling_seeds`` is 0.
    """
    both, cases = (first, second), []
    for seed in range(study.params.ceiling_seeds):
        one = Member(study.config(BASELINE, f"{first}+{second}", seed=seed))
        config = study.config(TRAINED, first, second, seed)
        config = replace(config, method=replace(config.method, symmetric=True))
        pair = Sum((Member(config, "main"), Member(config, "support")), both)
        cases.append(Case("3", "one network trained on both", seed, "ceiling", alone(one, both), "union", both))
        cases.append(Case("3", "trained together, symmetric", seed, "ceiling", pair, "union", both))
    return frame(study, cases)


def _pair(study: Study, method: str, first: str, second: str, apart: bool, seed: int) -> Sum:
    both = (first, second)
    members = stranger_members(study, method, both, seed) if apart else pair_members(study, method, *both, seed)
    return keyed(study, method, members, both)


def plane(study: Study, method: str, first: str, second: str, strangers: bool = False, seed: int = 0) -> dict:
    """Validation accuracy of α·θ_first + β·θ_second on both tasks, statistics from training images of the tested task.

    Args:
        study: where the networks come from.
        method: row of the report.
        first: dataset of θ_first.
        second: dataset of θ_second.
        strangers: both are main networks that were trained apart (task 3); else ``second`` is the support network
            of the pair (tasks 1 and 2).
        seed: repetition.

    Returns:
        ``coefficients`` (n,), and for each dataset name an n × n list, rows α, columns β, in percent.
    """
    points, what = study.params.plane_points, _pair(study, method, first, second, strangers, seed)
    return _measured(study, partial(_plane, study, what, points), what, what.tasks, points=points)


def _plane(study: Study, what: Sum, points: int) -> dict:
    coefficients, total = torch.linspace(0, 1.5, points).tolist(), made(study, what)
    grid = {name: [] for name in what.tasks}
    for name, rows in grid.items():
        images, labels = (getattr(study.dataset(name), f"val_{kind}")[:_PLANE_IMAGES] for kind in ("images", "labels"))
        for alpha in coefficients:
            rows.append([])
            for beta in coefficients:
                total.coefficients = [alpha, beta]
                network = under_policy(study, total, "per_task", (), name, _PLANE_IMAGES)
                right = logits_of(network, images, study.precision).argmax(1) == labels
                rows[-1].append(100 * right.sum().item() / len(labels))
    return {"coefficients": coefficients, **grid}


def explained(study: Study, method: str, first: str, second: str, seed: int = 0) -> pd.DataFrame:
    """How much of what happens inside θ_first + θ_second on ``first``'s images θ_first alone explains.

    Layer by layer on validation images: the squared correlation between a channel of the sum and the same
    channel of θ_first, averaged over the channels that θ_first uses, weighted by their variance in the sum. A
    convolution is looked at behind its batch norm, before the ReLU. Policy: that of the row's headline.

    Returns:
        a row for each layer, with ``method``, ``layer``, ``explained`` (0 to 1), and ``overlap``, the share of
        θ_first's channels that θ_second uses too (the logits: 1).
    """
    what, policy = _pair(study, method, first, second, True, seed), headline_policy(study.params, method)
    rows = _measured(study, partial(_explained, study, what, policy), what, what.tasks, policy=policy)
    return pd.DataFrame(rows).assign(method=method)


def _explained(study: Study, what: Sum, policy: str) -> list[dict]:
    first = what.tasks[0]
    keys = compact([what.key_of(0), what.key_of(1)]) if what.keys != "none" else None
    images = normalize(study.dataset(first).val_images[:_PLANE_IMAGES])
    of_one, of_sum = (
        _activations(under_policy(study, made(study, w), policy, what.tasks, first), images)
        for w in (alone(what.members[0], what.tasks), what)
    )
    shared, rows = overlap(*keys) if keys else {}, []
    for layer, a in of_one.items():
        s = of_sum[layer]
        if layer in shared:
            s = s[:, keys[0].positions[layer].to(s.device)]
        a, s = (x - x.mean(0) for x in (a, s))
        # channels that are silent in θ_first explain nothing
        part = ((a * s).mean(0).square() / a.square().mean(0).clamp_min(1e-12)).sum() / s.square().mean(0).sum()
        row = {"layer": layer.rpartition(".")[2], "explained": part.item(), "overlap": shared.get(layer, 1.0)}
        rows.append(row)
    return rows


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


def layers(study: Study, main: str, support: str, seed: int = 0) -> pd.DataFrame:
    """Norm ratio and cosine of θ_main and θ_support, layer by layer, for every pair that is summed as it is.

    Under keys both networks are compared as they lie in their sum. Columns: ``method``, ``layer``, ``norm_ratio``,
    ``cosine``.
    """
    rows = []
    for method in dict.fromkeys(m for m, _ in _summed_rows(study)):
        what = _pair(study, method, main, support, False, seed)
        networks = [study.run(m.config).networks[m.role] for m in what.members]
        if what.keys != "none":
            networks = [widen(n, what.key_of(i)) for i, n in enumerate(networks)]
        rows += [{"method": method, **row} for row in compare_layers(*networks)]
    return pd.DataFrame(rows)


def histories(study: Study, main: str, support: str, seed: int = 0) -> dict[str, list[dict]]:
    """The epochs of every joint row of the profile, by method (:func:`weightsum_lib.study.train.train`)."""
    joint = [m for m in study.params.rows if study.params.method(m).protocol == "joint"]
    return {m: study.run(study.config(m, main, support, seed)).history for m in joint}
