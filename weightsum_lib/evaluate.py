"""Accuracy before and after the sum, under one batch-norm policy for all, and the controls beside it."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from weightsum_lib.batchnorm import recalibrate
from weightsum_lib.data import Dataset
from weightsum_lib.models import normalize
from weightsum_lib.study import Study
from weightsum_lib.train import RunConfig, autocast, count_correct
from weightsum_lib.weights import WeightSum, compare_layers


def accuracy(
    network: nn.Module,
    calibration: Tensor,
    dataset: Dataset,
    precision: str = "float32",
    split: str = "test",
    limit: int | None = None,
) -> float:
    """Percent of a split that a network gets right, its batch-norm statistics re-estimated first.

    Args:
        network: any network or sum; left as it is, a copy is measured.
        calibration: uint8 training images (N, 3, 32, 32) that set the statistics, without labels.
        dataset: what is tested.
        precision: of the forward pass, see :func:`weightsum_lib.train.autocast`.
        split: "test", or "val" for everything that a choice may depend on.
        limit: only the first so many images of the split.
    """
    network = network.materialize() if isinstance(network, WeightSum) else copy.deepcopy(network)
    images, labels = getattr(dataset, f"{split}_images")[:limit], getattr(dataset, f"{split}_labels")[:limit]
    with autocast(precision, images.device):
        recalibrate(network, normalize(calibration))
    return 100 * count_correct(network.eval(), images, labels, precision) / len(labels)


def calibration_images(study: Study, names: Sequence[str]) -> Tensor:
    """Training images that set the batch-norm statistics: equally many of each named task, as many in all as
    ``calibration_images`` says."""
    each = study.params.calibration_images // len(names)
    return torch.cat([study.dataset(name).train_images[:each] for name in names])


def _measure(study: Study, what: str, configs, names, compute, **settings):
    for name in names:
        study.dataset(name)
    return study.measured(what, configs, {"data": sorted(names), **settings}, compute)


def _tested(study: Study, networks, names: Sequence[str], policy: Sequence[str] | None = None) -> list[list[float]]:
    """Accuracy of each network on each named task; ``policy`` names the calibration tasks, None: the tested one."""
    return [
        [accuracy(n, calibration_images(study, policy or [t]), study.dataset(t), study.precision) for t in names]
        for n in networks
    ]


def pair_configs(study: Study, method: str, main: str, support: str, seed: int) -> dict[str, RunConfig]:
    """The runs behind one row of task 1 or 2, by what they are for."""
    protocol = study.params.method(method).protocol
    if protocol == "joint":
        return {"pair": study.config(method, main, support, seed)}
    if protocol == "independent":
        return {"main": study.config(method, main, seed=seed), "support": study.config(method, support, seed=seed)}
    return {start: study.config(method, main, support, seed, start) for start in ("sum", "main", "random")}


def pair_networks(study: Study, method: str, main: str, support: str, seed: int) -> tuple[nn.Module, nn.Module]:
    """θ_main and θ_support of an ``independent`` or ``joint`` row."""
    configs = pair_configs(study, method, main, support, seed)
    runs = dict(zip(configs, study.train_all(list(configs.values())), strict=True))
    if "pair" in runs:
        return runs["pair"].networks["main"], runs["pair"].networks["support"]
    return runs["main"].networks["main"], runs["support"].networks["main"]


def _rows(study: Study):
    """(method, seed) of every row that the profile asks for."""
    return [(method, seed) for method in study.params.methods for seed in study.params.seeds_of(method)]


def train_pairs(study: Study, main: str, support: str) -> None:
    """Finish every run that the tables of task 1 or 2 need, in one queue."""
    configs = [c for m, s in _rows(study) for c in pair_configs(study, m, main, support, s).values()]
    study.train_all(configs)


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
            rows.append({"method": method, "seed": seed})
            rows[-1] |= _measure(
                study,
                "pair",
                list(configs.values()),
                (main, support),
                lambda m=method, s=seed: _pair_row(study, m, main, support, s),
            )
    return rows


_START = {"sum": "the sum", "main": "θ_main", "random": "random weights"}


def _pair_row(study, method, main, support, seed) -> dict:
    a, b = pair_networks(study, method, main, support, seed)
    (before, _), (on_main, support_before), (after, support_after) = _tested(
        study, (a, b, WeightSum([a, b])), (main, support)
    )
    return {
        "before": before,
        "after": after,
        "support_before": support_before,
        "support_after": support_after,
        "support_on_main": on_main,
    }


def _fine_tuned_row(study, config: RunConfig) -> dict:
    tuned = study.run(config).networks["main"]
    ((after, support_after),) = _tested(study, (tuned,), (config.main, config.support))
    return {"after": after, "support_after": support_after}


def _alone_row(study, config: RunConfig) -> dict:
    ((before,),) = _tested(study, (study.run(config).networks["main"],), (config.main,))
    return {"before": before}


def layer_rows(study: Study, main: str, support: str, seed: int = 0) -> list[dict]:
    """Norm ratio and cosine of θ_main and θ_support, layer by layer, for every pair that is summed as it is."""
    rows = []
    for method in study.params.methods:
        if study.params.method(method).protocol != "sequential":
            a, b = pair_networks(study, method, main, support, seed)
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
            a, b = (run.networks["main"] for run in study.train_all(configs))
        else:
            a, b = pair_networks(study, method, first, second, seed)
        grid = {first: [], second: []}
        for name, rows in grid.items():
            dataset, images = study.dataset(name), calibration_images(study, [name])[:_PLANE_IMAGES]
            for alpha in coefficients:
                sums = [WeightSum([a, b], [alpha, beta]) for beta in coefficients]
                rows.append([accuracy(s, images, dataset, study.precision, "val", _PLANE_IMAGES) for s in sums])
        return {"coefficients": coefficients, **grid}

    return _measure(study, "plane", configs, (first, second), compute, points=study.params.plane_points)


_PLANE_IMAGES = 300  # to calibrate and to test one point of the plane: many points, little precision needed


def main_config(study: Study, method: str, main: str, support: str, seed: int) -> RunConfig:
    """The run that makes θ_main of a row: alone, or with its support network."""
    joint = study.params.method(method).protocol == "joint"
    return study.config(method, main, support if joint else "", seed)


def unmet_sums(study: Study, first: str, second: str, support: str) -> list[dict]:
    """Task 3: θ_first + θ_second, never trained together, on both tasks; no training after the sum.

    Returns:
        one dict a method, seed and batch-norm policy. Policy ``union``: statistics from training images of
        both tasks together, so that no task label is needed at test time (the headline); ``per_task``:
        from the tested task, which presumes that label. ``before`` and ``after`` hold each task's own
        network and the sum on it; ``other`` the *other* task's network there, the control without which
        ``after`` means nothing. Keys end in the dataset's name.
    """
    # the pair of `sequential` is that of `independent`
    wanted = [(m, s) for m, s in _rows(study) if study.params.method(m).protocol != "sequential"]
    study.train_all([main_config(study, m, name, support, s) for m, s in wanted for name in (first, second)])
    rows = []
    for method, seed in wanted:
        configs = [main_config(study, method, name, support, seed) for name in (first, second)]
        rows += [
            {"method": method, "seed": seed, **row}
            for row in _measure(
                study, "unmet", configs, (first, second), lambda c=configs: _unmet_rows(study, c, first, second)
            )
        ]
    return rows


def _unmet_rows(study, configs, first, second) -> list[dict]:
    a, b = (run.networks["main"] for run in study.train_all(configs))
    rows = []
    for policy, calibration in (("union", [first, second]), ("per_task", None)):
        of_a, of_b, of_sum = _tested(study, (a, b, WeightSum([a, b])), (first, second), calibration)
        rows.append(
            {
                "policy": policy,
                **{f"before_{first}": of_a[0], f"before_{second}": of_b[1]},
                **{f"after_{first}": of_sum[0], f"after_{second}": of_sum[1]},
                **{f"other_{first}": of_b[0], f"other_{second}": of_a[1]},
            }
        )
    return rows
