"""Which runs a report is made of, in an order that makes a whole one early."""

from weightsum_lib.study import beside, measure
from weightsum_lib.study.config import RunConfig
from weightsum_lib.study.params import ALONE, DISJOINT, RANDOM
from weightsum_lib.study.runs import Study


def queue(study: Study) -> list[RunConfig]:
    """The runs behind all pages: all of one seed, those of the next, and so on; seeds for choices come last."""
    p, mains = study.params, ["mnist", "svhn"]
    pairs = [(main, "cifar10") for page, main in zip(("01", "02"), mains, strict=True) if p.has(page)]
    both = [network for a, b in pairs for network in ((a, b, "main"), (b, a, "support"))]
    wanted = [(m, s, both) for m in p.rows for s in p.seeds_of(m)]
    found, cases = [], []
    if p.has("03") or p.has("04"):
        wanted += [(m, s, mains) for m in p.rows for s in p.seeds_of(m) if p.method(m).protocol != "sequential"]
    if p.has("04"):
        wanted += [(DISJOINT, s, [*measure.thirds(p).values()]) for s in p.seeds_of(DISJOINT)]
        wanted += [(m, s, measure.joining(p)) for m in (RANDOM, DISJOINT) for s in measure.joined_seeds(p, m)]
        wanted += [(m, s, mains) for m in (RANDOM, ALONE, *p.parts_with("random")) for s in p.choice_seeds_of(m)]
        loud = (DISJOINT, *p.parts_with("disjoint"))
        wanted += [(m, s, [*mains, measure.NEITHER]) for m in loud for s in p.choice_seeds_of(m)]
    if p.has("03"):
        wanted += [(ALONE, 0, ["mnist stand-in", "svhn stand-in"])]
        cases += measure.ceilings(study, *mains)
    if p.has("05"):
        cases += (case for each in beside.all_cases(study) for case in each)
    for method, seed, networks in wanted:
        if p.method(method).protocol == "sequential":
            found += [study.config(method, *pair, seed, start) for pair in pairs for start in measure.STARTS]
        else:
            found += [member.config for member in measure.members(study, method, networks, seed)]
    found += [member.config for case in cases for member in case.what.members]
    return sorted(dict.fromkeys(found), key=lambda config: config.seed)
