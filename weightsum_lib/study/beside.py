"""Beside others: two networks of five classes each, merged as the literature does and summed as this study does."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pandas as pd

from weightsum_lib.core.weights import WeightSum
from weightsum_lib.study import measure
from weightsum_lib.study.measure import NARROW, SHARE, Case
from weightsum_lib.study.params import ALONE, DISJOINT, RANDOM
from weightsum_lib.study.runs import Study
from weightsum_lib.study.sums import OWN, Member, Sum, keyed, made

HALVES = ("classes 0-4", "classes 5-9")
_UNSEEN = {"mnist": "cifar10", "svhn": "cifar10", "cifar10": "svhn"}  # the partner that is not the other half
_ZIPS = ((1e-4, 0.075), (0.3, 0.125), (1.0, 1.0))  # α and β: two pairs of the authors', and without bounds
ENSEMBLE, SIGNS, PART = "ensemble of logits", "random signs, told the half", "ZipIt!, first ⅔ of the layers"
_WAYS = {  # how a network is made, the batch-norm policy, and the coefficients of which validation images choose
    "sum": ("plain", "union", [()]),
    "sum, first ⅓ of the layers": ("stacked", "union", [(1 / 3,)]),
    "sum, first ⅔ of the layers": ("stacked", "union", [(2 / 3,)]),
    "average": ("average", "union", [()]),
    "Git Re-Basin": ("rebasin", "union", [()]),
    "matching by activations": ("matched", "union", [()]),
    "RegMean": ("regmean", "union", [()]),
    "ZipIt!": ("zipit", "union", [(1.0, *zips) for zips in _ZIPS]),
    PART: ("zipit", "union", [(2 / 3, *zips) for zips in _ZIPS]),
    SIGNS: ("signed", "per_task", [()]),
    ENSEMBLE: ("ensemble", OWN, [()]),
}
_FROM_A_START = {
    "task arithmetic": ("arithmetic", "union", [(0.2,), (0.3,), (0.5,)]),
    "TIES": ("ties", "union", [(0.3,), (0.5,), (1.0,)]),
    ENSEMBLE: _WAYS[ENSEMBLE],
}
# What others report of CIFAR-10 cut so (Stoica et al. 2024), percent of all ten classes; their targets are text.
PUBLISHED_NETWORK = "published: ResNet-20, width 4"
PUBLISHED = {"Git Re-Basin": 46.2, "matching by activations": 58.4, "ZipIt!": 79.1, PART: 83.8, ENSEMBLE: 87.4}


def _cases(study: Study, halved: str, row: str, seed: int) -> Iterator[list[Case]]:
    """What is tested of one row, each as the candidates of which one is chosen."""
    p, m, (dataset, _, arch) = study.params, study.params.method(row), halved.partition(" ")
    if arch and row not in (ALONE, RANDOM, DISJOINT):
        return  # there it is asked whether the finding needs a VGG
    halves, joint = tuple(f"{dataset} {half}" for half in HALVES), m.protocol == "joint"
    partners = {"": halves[::-1]} if not joint else {", seen": halves[::-1]}
    if m.third != "none":
        partners[", unseen"] = (_UNSEEN[dataset],) * 2
    ways = _FROM_A_START if m.start == "shared" and not joint else _WAYS
    for said, partner in partners.items():
        networks = [(half, beside, "main") for half, beside in zip(halves, partner, strict=True)]
        pair = tuple(_with_arch(member, arch) for member in measure.members(study, row, networks, seed))
        case = partial(Case, halved, row + said, seed)
        for way, (how, policy, grid) in ways.items():
            if m.third != "none" and way != ENSEMBLE:
                continue  # trained for keys
            if how == "signed":  # it knows which half a test image is from
                for each in (pair, pair[::-1]):
                    tasks = tuple(member.task for member in each)
                    yield [case(way, Sum(each, tasks, how), policy, tasks[:1])]
            else:
                sums = [Sum(pair, halves, how, coefficients=coefficients) for coefficients in grid]
                yield [case(way, what, policy, (dataset, *halves)) for what in sums]
        if m.keys != "none":
            total, policy = keyed(study, row, pair, SHARE, narrow=NARROW), measure.headline_policy(p, row)
            for number in range(p.draws if m.keys == "random" else 1):
                yield [case(f"sum under {m.keys} keys", replace(total, draw=number), policy, (dataset, *halves))]


def _with_arch(member: Member, arch: str) -> Member:
    """The network of another architecture, which is narrow: of width 1 where the profile's is ½ or more."""
    config = member.config
    return replace(member, config=replace(config, arch=arch, width=min(4.0, 8 * config.width))) if arch else member


def all_cases(study: Study) -> list[list[Case]]:
    """What is tested of every row, on everything that is halved; each as the candidates of which one is chosen."""
    p = study.params
    return [
        case
        for seed in range(p.seeds)
        for halved in p.halves
        for row, method in p.merged.items()
        if seed < method.seeds
        for case in _cases(study, halved, row, seed)
    ]


def frame(study: Study) -> pd.DataFrame:
    """Every row of the page on everything that the profile halves.

    The columns are those of :mod:`weightsum_lib.study.measure`: ``task`` is what is halved, ``method`` the networks
    that are merged and ``network`` the way. Tested are all ten classes, under the dataset's name, and each half.
    ``weights``: how many of the merged network's are not zero, as a multiple of one network's weights. Who is told
    the half of a test image has on all classes the mean of the halves.
    """
    cases = all_cases(study)
    study.train_all([member.config for candidates in cases for case in candidates for member in case.what.members])
    chosen = [_chosen(study, candidates) for candidates in cases]
    counted = [measure.measurement(partial(_weights, study, case.what), case.what, ()) for case in chosen]
    of_each = study.measured(counted)
    found = pd.concat([measure.frame(study, [case]).assign(weights=n) for case, n in zip(chosen, of_each, strict=True)])
    told = found[found["network"] == SIGNS]
    told = told.groupby(["task", "method", "seed", "network"], as_index=False)[["accuracy", "weights"]].mean()
    found = pd.concat([told.assign(tested=told["task"].str.partition(" ")[0]), found])
    return found.sort_values(["task", "tested"], kind="stable", ignore_index=True)


def _chosen(study: Study, candidates: list[Case]) -> Case:
    """The candidate that gets most validation images of all classes right."""
    if len(candidates) == 1:
        return candidates[0]
    found = measure.frame(study, [replace(c, split="val", tested=c.tested[:1]) for c in candidates])
    return candidates[int(found["accuracy"].argmax())]


def _weights(study: Study, what: Sum) -> float:
    network, one = made(study, what), study.run(what.members[0].config).networks[what.members[0].role]
    network = network.materialize() if isinstance(network, WeightSum) else network
    nonzero, of_one = (sum(int(p.count_nonzero()) for p in n.parameters()) for n in (network, one))
    return nonzero / of_one
