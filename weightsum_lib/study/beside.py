"""Beside others: two networks merged as the literature does it, of a dataset each or of five classes each."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product

import pandas as pd

from weightsum_lib.core.weights import WeightSum
from weightsum_lib.study import measure
from weightsum_lib.study.measure import NARROW, SHARE, Case
from weightsum_lib.study.params import BASELINE, RANDOM, SHARED, Method
from weightsum_lib.study.runs import Study
from weightsum_lib.study.sums import OWN, Member, Sum, alone, keyed, made

HALVES = ("classes 0-4", "classes 5-9")
_UNSEEN = {"mnist": "cifar10", "svhn": "cifar10", "cifar10": "svhn"}  # the partner that is not the other half
_ZIPS = ((1e-4, 0.075), (0.3, 0.125), (1.0, 1.0))  # α and β: two pairs of the authors', and without bounds
PART, _STRANGER = "ZipIt!, first ⅔ of the layers", "sum with random weights of the partner's norms"
ENSEMBLE, SIGNS, ONE = "ensemble of logits", "random signs, told the task", "one of the two, alone"
_WAYS = {  # how a network is made, the batch-norm policy, and the coefficients of which validation images choose
    "sum": ("plain", "union", [()]),
    "sum, first ⅓ of the layers": ("stacked", "union", [(1 / 3,)]),
    "sum, first ⅔ of the layers": ("stacked", "union", [(2 / 3,)]),
    "average": ("average", "union", [()]),
    "Git Re-Basin": ("rebasin", "union", [()]),
    "matching by activations": ("matched", "union", [()]),
    "RegMean": ("regmean", "union", [()]),
    "Fisher average": ("fisher", "union", [(0.1,), (0.3,), (0.5,), (0.7,), (0.9,)]),
    "ZipIt!": ("zipit", "union", [(1.0, *zips) for zips in _ZIPS]),
    PART: ("zipit", "union", [(2 / 3, *zips) for zips in _ZIPS]),
    SIGNS: ("signed", "per_task", [()]),
    ENSEMBLE: ("ensemble", OWN, [()]),
}
_FROM_A_START = {
    "task arithmetic": ("arithmetic", "union", [(0.3,), (0.5,), (0.7,), (1.0,)]),
    "TIES": ("ties", "union", [(0.3,), (0.5,), (0.7,), (1.0,), (1.5,)]),
    **{way: _WAYS[way] for way in ("average", "RegMean", "Fisher average", ENSEMBLE)},
}
# What others report of CIFAR-10 cut so (Stoica et al. 2024), percent of all ten classes; their targets are text.
PUBLISHED_NETWORK = "published: ResNet-20, four times as wide"
PUBLISHED = {"Git Re-Basin": 46.2, "matching by activations": 58.4, "ZipIt!": 79.1, PART: 83.8, ENSEMBLE: 87.4}


def _cases(study: Study, halved: str, row: str, seed: int) -> Iterator[list[Case]]:
    """What is tested of one row, each as the candidates of which one is chosen."""
    p, m = study.params, study.params.method(row)
    halves, joint = tuple(f"{halved} {half}" for half in HALVES), m.protocol == "joint"
    partners = {"": halves[::-1]} if not joint else {", seen": halves[::-1]}
    if m.third != "none":
        partners[", unseen"] = (_UNSEEN[halved],) * 2
    for said, partner in partners.items():
        networks = [(half, beside, "main") for half, beside in zip(halves, partner, strict=True)]
        pair = tuple(measure.members(study, row, networks, seed))
        case, tested = partial(Case, halved, row + said, seed), (halved, *halves)
        yield [case(ONE, alone(member), OWN, tested) for member in pair]
        yield from (each for each in _merged(case, pair, tested, m) if m.third == "none" or each[0].network == ENSEMBLE)
        if m.keys != "none":
            total, policy = keyed(study, row, pair, SHARE, narrow=NARROW), measure.headline_policy(p, row)
            for number in range(p.draws if m.keys == "random" else 1):
                yield [case(f"sum under {m.keys} keys", replace(total, draw=number), policy, tested)]


def _merged(case: partial, pair: tuple[Member, ...], tested: tuple[str, ...], m: Method) -> Iterator[list[Case]]:
    tasks = tuple(member.task for member in pair)
    ways = _FROM_A_START if m.start == "shared" and m.protocol != "joint" else _WAYS
    for way, (how, policy, grid) in ways.items():
        if how == "signed":  # it knows which task a test image is from
            for each, ordered in ((pair, tasks), (pair[::-1], tasks[::-1])):
                yield [case(way, Sum(each, ordered, how), policy, ordered[:1])]
        else:
            yield [case(way, Sum(pair, tasks, how, coefficients=c), policy, tested) for c in grid]


def all_cases(study: Study) -> list[list[Case]]:
    """What is tested of every row, on everything that is halved; each as the candidates of which one is chosen."""
    p, found = study.params, []
    for seed, halved, (row, method) in product(range(p.seeds), p.halves, p.merged.items()):
        found += _cases(study, halved, row, seed) if seed < method.seeds else []
    return found


def frame(study: Study) -> pd.DataFrame:
    """Every row of the page on everything that the profile halves.

    The columns are those of :mod:`weightsum_lib.study.measure`: ``task`` is what is halved, ``method`` the networks
    that are merged and ``network`` the way. Tested are all ten classes, under the dataset's name, and each half.
    ``weights``: how many of the merged network's are not zero, as a multiple of one network's weights; ``chosen``: the
    coefficients that validation images chose (α and β of ZipIt!), where there was a choice. Who is told the half of a
    test image has on all classes the mean of the halves.
    """
    cases = all_cases(study)
    study.train_all([member.config for candidates in cases for case in candidates for member in case.what.members])
    chosen = _chosen(study, cases)
    of_each = study.measured([measure.measurement(study, _weights, case.what) for case in chosen])
    tuned = (c.what.coefficients[-2:] if len(each) > 1 else () for c, each in zip(chosen, cases, strict=True))
    about = pd.DataFrame({"weights": of_each, "chosen": [", ".join(map("{:g}".format, each)) for each in tuned]})
    about = about.loc[about.index.repeat([len(case.tested) for case in chosen])]
    found = measure.frame(study, chosen).assign(**about.to_dict("list"))
    told = found[found["network"] == SIGNS]
    told = told.groupby(["task", "method", "seed", "network"], as_index=False)[["accuracy", "weights"]].mean()
    found = pd.concat([found, told.assign(tested=told["task"], chosen="")])
    return found.sort_values(["task", "tested"], kind="stable", ignore_index=True)


def _chosen(study: Study, choices: Sequence[list[Case]]) -> list[Case]:
    """Of each choice the candidate that gets most validation images right, of all classes or of all tasks."""
    tried = {c: replace(c, split="val", tested=_chosen_on(c)) for each in choices if len(each) > 1 for c in each}
    accuracies = iter(measure.frame(study, tried.values())["accuracy"] if tried else ())
    right = {case: sum(next(accuracies) for _ in on_val.tested) for case, on_val in tried.items()}
    return [max(each, key=lambda case: right.get(case, 0)) for each in choices]


def _chosen_on(case: Case) -> tuple[str, ...]:
    return (case.task,) if case.task in case.tested else case.tested


def mergers(study: Study, first: str, second: str) -> pd.DataFrame:
    """Task 3 by the methods of others: networks trained apart, from one start (`shared start`), and by the recipe.

    ``task`` is the row of the networks, ``method`` the way. Of networks trained apart a partner with random weights of
    equal norms stands in for each in turn. Where ``ceiling_seeds`` is 0 there are only sums, averages and the ensemble
    of logits.
    """
    p, both, choices = study.params, (first, second), []
    for row in [row for row in (BASELINE, SHARED, RANDOM) if row in p.rows]:
        for seed in p.seeds_of(row):
            pair, case = tuple(measure.members(study, row, both, seed)), partial(Case, row, row, seed)
            tried = _merged(case, pair, both, p.method(row))
            choices += [c for c in tried if p.ceiling_seeds or c[0].what.how in ("plain", "average", "ensemble")]
            if row == BASELINE:
                swapped = ((each, each[0].task) for each in (pair, pair[::-1]))
                choices += [[case(_STRANGER, Sum(each, both, "stranger"), "union", (task,))] for each, task in swapped]
    return measure.frame(study, [replace(c, method=c.network, network="merged") for c in _chosen(study, choices)])


def _weights(study: Study, what: Sum) -> float:
    network, one = made(study, what), study.run(what.members[0].config).networks[what.members[0].role]
    network = network.materialize() if isinstance(network, WeightSum) else network
    nonzero, of_one = (sum(int(p.count_nonzero()) for p in n.parameters()) for n in (network, one))
    return nonzero / of_one
