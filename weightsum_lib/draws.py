"""How much of a sum under random keys is the luck of the draw: the same networks, their keys drawn again."""

from dataclasses import replace
from statistics import mean

import torch

from weightsum_lib import cache, evaluate
from weightsum_lib.keys import draw
from weightsum_lib.study import Study
from weightsum_lib.train import count_correct, key_sizes

DRAWS = 10  # of both networks' keys: the one of the report's other tables, and nine more
_CODE = cache.source_digest("draws")


def recipe_rows(study: Study, method: str) -> list[str]:
    """The profile's rows that have the switches of ``method`` and differ in key share, width or seeds only."""

    def switches(label):
        return replace(study.params.method(label), key_share=1.0, wider=1.0, seeds=1)

    return [m for m in study.params.methods | study.params.parts if switches(m) == switches(method)]


def size(study: Study, method: str) -> float:
    """The width of a row's networks, as a share of the profile's."""
    m = study.params.method(method)
    return m.wider * m.key_share


def redrawn(study: Study, method: str, first: str, second: str, support: str) -> list[dict]:
    """θ_first + θ_second, never trained together, under ``DRAWS`` draws of their random keys.

    A network under a key computes the same function wherever its channels lie, so every draw is as good a sum of
    these two networks as the first. Policy ``union``.

    Returns:
        one dict a seed, in percent of test images. ``before``; ``after`` and ``kept``, means over the draws;
        ``draws``, what each draw keeps. Keys end in the dataset's name.
    """
    both, rows = (first, second), []
    for seed in study.params.seeds_of(method):
        configs = [evaluate.main_config(study, method, name, support, seed) for name in both]

        def compute(configs=configs, seed=seed):
            members = evaluate.unmet_members(study, method, both, support, seed)
            networks, own = zip(*members, strict=True)
            generator = torch.Generator().manual_seed(configs[0].stream("main", f"keys beside {second}"))
            drawn = [own, *([draw(*key_sizes(c), generator) for c in configs] for _ in range(DRAWS - 1))]
            sums = [evaluate.total_of(list(zip(networks, keys, strict=True))) for keys in drawn]
            before = [_tested(study, n, both, [name])[0] for n, name in zip(networks, both, strict=True)]
            return {"before": before, "after": [_tested(study, total, both, both) for total in sums]}

        for name in both:
            study.dataset(name)
        settings = {"data": sorted(both), "draws": DRAWS, "code": _CODE}
        found = study.measured("redrawn", configs, settings, compute)
        row = {"method": method, "seed": seed}
        for i, name in enumerate(both):
            after = [each[i] for each in found["after"]]
            row |= {f"before_{name}": found["before"][i], f"after_{name}": mean(after)}
            row |= {f"draws_{name}": [100 * value / found["before"][i] for value in after]}
            row |= {f"kept_{name}": mean(row[f"draws_{name}"])}
        rows.append(row)
    return rows


def _tested(study: Study, network, tasks, tested) -> list[float]:
    """Percent of the test images of each task in ``tested``, statistics from training images of all ``tasks``."""
    network, out = evaluate.under_policy(study, network, "union", tasks, tested[0]), []
    for dataset in map(study.dataset, tested):
        right = count_correct(network, dataset.test_images, dataset.test_labels, study.precision)
        out.append(100 * right / len(dataset.test_labels))
    return out
