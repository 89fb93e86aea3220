"""Which runs a report is made of, in an order that makes a whole one early."""

from weightsum_lib.study import beside, measure
from weightsum_lib.study.config import RunConfig
from weightsum_lib.study.params import ALONE, BASELINE, DISJOINT, RANDOM
from weightsum_lib.study.runs import Study


def queue(study: Study) -> list[RunConfig]:
    """The runs behind all pages: a seed of the rows and of what they are summed with, the next, the parts; then those
    of the page beside others.
    """
    p, found, pairs = study.params, [], (("mnist", "cifar10"), ("svhn", "cifar10"))
    both = [network for a, b in pairs for network in ((a, b, "main"), (b, a, "support"))]
    loud = [m for m in p.parts if p.method(m).keys == "disjoint"]
    chosen = [RANDOM, ALONE, *[DISJOINT] * bool(loud), *p.parts]
    wanted = [(m, s, both) for m in p.rows for s in p.seeds_of(m)]
    wanted += [(m, s, both) for s in p.choice_seeds_of(RANDOM) for m in chosen if s in p.choice_seeds_of(m)]
    wanted += [(DISJOINT, s, list(measure.THIRDS.values())) for s in p.seeds_of(DISJOINT)]
    wanted += [(m, s, measure.joining(p)) for m in (RANDOM, DISJOINT) for s in measure.joined_seeds(p, m)]
    wanted += [(m, s, [measure.NEITHER]) for m in [DISJOINT, *loud] * bool(loud) for s in p.choice_seeds_of(m)]
    wanted += [(BASELINE, 0, ["mnist stand-in", "svhn stand-in"])]
    for method, seed, networks in sorted(wanted, key=lambda each: each[1]):
        if p.method(method).protocol == "sequential":
            found += [study.config(method, *pair, seed, start) for pair in pairs for start in measure.STARTS]
        else:
            found += [member.config for member in measure.members(study, method, networks, seed)]
    cases = [*measure.ceiling_cases(study, "mnist", "svhn")]
    cases += [case for candidates in beside.all_cases(study) for case in candidates]
    return list(dict.fromkeys([*found, *(member.config for case in cases for member in case.what.members)]))
