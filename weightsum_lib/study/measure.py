"""What networks and their sums can do: each is described by a value and measured once, in rows of one long frame.

The frame is long: ``task``, ``method``, ``seed``, ``policy`` (of the batch-norm statistics; "own": those of the
network's own task), ``network`` (what is tested; a network alone has its task's name), ``tested`` (on what), ``split``;
of a sum under random keys ``share`` (k, of its channels that each network has), ``narrow``
(:class:`~weightsum_lib.study.sums.Sum`) and ``draw``; and what is measured, in percent: ``accuracy``, its standard
error ``sampling`` for other images of the task, ``confidence``, the mean largest probability, and ``shared``, how many
of the channels of the tested task's network others use too.
"""

import base64
import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from weightsum_lib.core.keys import widen
from weightsum_lib.core.models import normalize
from weightsum_lib.core.weights import compare_layers
from weightsum_lib.study import store
from weightsum_lib.study.params import ALONE, BASELINE, RANDOM, TRAINED, Method, Params
from weightsum_lib.study.runs import Measurement, Study
from weightsum_lib.study.sums import OWN, POLICIES, Member, Sum, alone, keyed, made, plain, shift_of, under_policy
from weightsum_lib.study.train import logits_of, percent_right

SHARE, NARROW = 1 / 8, 64  # of random keys in the report's sums of strangers: k, and the room of narrow layers
NEITHER = ("cifar10", "mnist inverted", "main")  # a third network that met neither: its task, its partner's, its role
_THIRDS = {
    "MNIST's support": ("cifar10", "mnist", "support"),
    "SVHN's support": ("cifar10", "svhn", "support"),
    "met neither": NEITHER,
    "met the images of both": ("cifar10", "mnist+svhn", "main"),
}
_JOINING = ("mnist", "svhn", NEITHER, "svhn inverted", "mnist turned", "svhn turned", "mnist inverted")
_JOINING += (("cifar10 inverted", "mnist inverted", "main"),)
_BESIDE = {OWN: "ensemble", "summed": "as_trained"}  # beside sums whose statistics are summed stands the second
_BATCH = 500  # test images whose own statistics the policy "batch" uses
_BLOCK = 10  # neighbouring images that are drawn together: SVHN's share a house number
_PLANE_IMAGES = 300  # to calibrate and to test one point of the plane: many points, little precision needed


def accuracies(study: Study, what: Sum, policy: str, tested: Sequence[str], split: str) -> dict[str, dict]:
    """How many images of each task in ``tested`` a network gets right, percent, which (bits), and its confidence."""
    network, found, calibrated = made(study, what), {}, None
    for name in tested:
        if calibrated is None or policy == "per_task":
            calibrated = under_policy(study, network, policy, what.tasks, name.split(" renamed")[0])
        images, labels = (getattr(study.dataset(name), f"{split}_{kind}") for kind in ("images", "labels"))
        logits = logits_of(calibrated, images, study.precision, _BATCH if policy == "batch" else None)
        right, confidence = (logits.argmax(1) == labels).cpu().numpy(), logits.softmax(1).amax(1).mean().item()
        found[name] = {"accuracy": 100 * float(right.mean()), "confidence": 100 * confidence, "images": len(right)}
        found[name]["right"] = base64.b64encode(np.packbits(right)).decode()
    return found


def sampling_error(right: str, images: int) -> float:
    """The standard error of an accuracy, percent, from which images were right, by blocks of neighbours."""
    bits = np.unpackbits(np.frombuffer(base64.b64decode(right), np.uint8))[: images // _BLOCK * _BLOCK]
    return 100 * pd.Series(bits.reshape(-1, _BLOCK).mean(1)).sem()


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
    wanted = [measurement(study, accuracies, c.what, policy=c.policy, tested=c.tested, split=c.split) for c in cases]
    for case, found in zip(cases, study.measured(wanted), strict=True):
        about = {k: v for k, v in vars(case).items() if k not in ("what", "tested")}
        about |= {"share": case.what.share, "narrow": case.what.narrow, "draw": case.what.draw}
        shared = case.what.shared()
        for name in case.tested:
            percents = {k: found[name][k] for k in ("accuracy", "confidence")}
            sampling = sampling_error(found[name]["right"], found[name]["images"])
            row = {**about, "tested": name.split(" renamed")[0], **percents, "sampling": sampling}
            rows.append({**row, "shared": shared.get(name, math.nan)})
    return pd.DataFrame(rows)


def measurement(study: Study, function: Callable, what: Sum, **settings) -> Measurement:
    """A measurement of one description: ``function`` of the study, it and the settings."""
    about = {k: v for k, v in asdict(what).items() if k != "members"} | {"roles": [m.role for m in what.members]}
    about = {**settings, "what": about, "data": sorted({*settings.get("tested", ()), *what.tasks})}
    call, configs = partial(function, study, what, **settings), [m.config for m in what.members]
    return Measurement(call, configs, about, [f"study.sums:{what.how}", "study.sums:Sum"])


def policies_of(p: Params, method: str) -> list[str]:
    """The batch-norm policies that make sense for a row's sums."""
    return [policy for policy in POLICIES if policy != "by_owner" or p.method(method).keys != "none"]


def headline_policy(p: Params, method: str) -> str:
    """The batch-norm policy of a row's headline in sums of networks that never met."""
    return {"disjoint": "summed", "random": "by_owner"}.get(p.method(method).keys, "union")


def _rows(study: Study) -> Iterator[tuple[str, int]]:
    """(method, seed) of every row that the profile asks for."""
    yield from ((m, s) for m in study.params.rows for s in study.params.seeds_of(m))


def thirds(p: Params) -> dict[str, tuple[str, str, str]]:
    """CIFAR-10 networks that join θ_m + θ_s, by what they have met; the last is of profiles with ``choice_seeds``."""
    return dict([*_THIRDS.items()][: None if p.choice_seeds else 3])


def joining(p: Params) -> list:
    """Networks of tasks with images of their own that are added one after another, as :func:`members` takes them."""
    return list(_JOINING[: None if p.choice_seeds else 3])


def joined_seeds(p: Params, method: str) -> range:
    """The seeds of a row whose networks are added so."""
    return p.seeds_of(method)[: max(1, p.choice_seeds) if method == RANDOM else 1]


STARTS = {"sum": "the sum", "main": "θ_main", "random": "random weights"}


def pairs(study: Study, main: str, support: str) -> Iterator[Case]:
    """Tasks 1 and 2, every row of the profile: θ_main and θ_support on both tasks, and their sum, under every policy.

    ``sequential`` is three methods, one for each start; its network "sum" is the fine-tuned one, beside θ_main before
    the sum.
    """
    task, both = "1" if main == "mnist" else "2", (main, support)
    for method, seed in _rows(study):
        if study.params.method(method).protocol == "sequential":
            for start, words in STARTS.items():
                config, label = study.config(method, main, support, seed, start), f"{method}, from {words}"
                yield Case(task, label, seed, main, alone(Member(study.alone(config))), OWN, (main,))
                yield Case(task, label, seed, "sum", alone(Member(config)), "per_task", both)
            continue
        pair = pair_members(study, method, main, support, seed)
        for member in pair:
            yield Case(task, method, seed, member.task, alone(member), OWN, both)
        total = keyed(study, method, pair)
        for policy in policies_of(study.params, method):
            yield Case(task, method, seed, "sum", total, policy, both)


def members(study: Study, method: str, networks: Sequence[str | tuple[str, str, str]], seed: int) -> list[Member]:
    """Networks of a row that never met, unless two of them are a pair.

    Args:
        study: where the networks come from.
        method: row of the report.
        networks: for each its task, the task of the partner that it was trained beside, and its role ("main" or
            "support") in that pair; a text is the task of a main network beside CIFAR-10. A row trained alone has no
            partners.
        seed: repetition.
    """
    found, joint = [], study.params.method(method).protocol == "joint"
    for network in networks:
        task, partner, role = (network, "cifar10", "main") if isinstance(network, str) else network
        pair = (task, partner) if role == "main" else (partner, task)
        config = study.config(method, *pair, seed) if joint else study.config(method, task, seed=seed)
        found.append(Member(config, role if joint else "main"))
    return found


def pair_members(study: Study, method: str, main: str, support: str, seed: int) -> list[Member]:
    """θ_main and θ_support of an ``independent`` or ``joint`` row."""
    return members(study, method, [(main, support, "main"), (support, main, "support")], seed)


def _summed_rows(study: Study) -> Iterator[tuple[str, int]]:
    """The rows whose pair is summed as it is; that of ``sequential`` is `independent`'s."""
    return (row for row in _rows(study) if study.params.method(row[0]).protocol != "sequential")


def _alone(about: Sequence, each: Sequence[Member], split: str, policies: Iterable[str]) -> Iterator[Case]:
    """What sums are compared with: each network on all tasks, the others' as a control, and the ensemble of logits."""
    tasks = tuple(member.task for member in each)
    for policy in policies:
        for member in each:
            yield Case(*about, member.task, replace(alone(member), how=_BESIDE[policy]), policy, tasks, split)
        yield Case(*about, "ensemble", Sum(tuple(each), tasks, _BESIDE[policy]), policy, tasks, split)


def strangers(study: Study, first: str, second: str) -> Iterator[Case]:
    """Task 3, every row of the profile: two networks that never met, and their sum, no training after it.

    Each network is tested on both tasks (on the other's it is the control without which the sum means nothing), and
    there are the ``ensemble`` of the logits and the sum with ``renamed`` classes, in which two digit networks can't
    help each other. Where the row's headline is ``summed``, networks and ensemble are there as they were trained, too.
    Random keys are of the share ``SHARE``, with ``NARROW``; under the row's headline policy there are as many draws of
    them as the parameter ``draws`` says.
    """
    both, p = (first, second), study.params
    for method, seed in _summed_rows(study):
        pair, about = members(study, method, both, seed), ("3", method, seed)
        total, headline = keyed(study, method, pair, SHARE, narrow=NARROW), headline_policy(p, method)
        yield from _alone(about, pair, "test", [each for each in (OWN, headline) if each in _BESIDE])
        names = (first, f"{second} renamed {shift_of(total)}")
        for policy in policies_of(p, method):
            for number in range(p.draws if policy == headline and total.keys == "random" else 1):
                yield Case(*about, "sum", replace(total, draw=number), policy, both)
                if policy == headline:
                    yield Case(*about, "renamed", replace(total, how="renamed", draw=number), policy, names)


def curve(
    study: Study,
    methods: Sequence[str],
    networks: Sequence[str | tuple[str, str, str]],
    shares: Sequence[float] = (SHARE,),
    *,
    narrow: int = NARROW,
    policy: str = "",
    draws: int | None = None,
    seeds: Callable[[str], Sequence[int]] | None = None,
    split: str = "test",
    **about,
) -> pd.DataFrame:
    """Sums of the same networks under keys of several shares, and what they are compared with; nothing is trained anew.

    Args:
        study: where the networks come from.
        methods: rows with keys.
        networks: those that are summed (:func:`members`).
        shares: of a sum's channels that each network has, k, where keys are random. Disjoint keys are those of the
            row, or share out the sum's channels among the networks where those don't suffice.
        narrow: see :class:`~weightsum_lib.study.sums.Sum`.
        policy: of the batch-norm statistics; by default that of each row's headline.
        draws: of random keys, at most as many as the parameter ``draws``; by default so many.
        seeds: those of a row, by its name; by default all that it has.
        split: "test" or "val".
        about: further fields of the sums.
    """
    cases, numbers = [], range(study.params.draws)[:draws]
    for method in methods:
        how = policy or headline_policy(study.params, method)
        for seed in (seeds or study.params.seeds_of)(method):
            each, head = members(study, method, networks, seed), (str(len(networks)), method, seed)
            cases += _alone(head, each, split, ["summed" if how == "summed" else OWN])
            random = study.params.method(method).keys == "random"
            for share, number in product(shares, numbers) if random else [(None, 0)]:
                total = keyed(study, method, each, share, narrow=narrow, draw=number, **about)
                cases.append(Case(*head, "sum", total, how, total.tasks, split))
    return frame(study, cases)


def room(study: Study, method: str, names: Sequence[str], shares: Sequence[float]) -> pd.DataFrame:
    """How much room two networks of a row have under random keys: a row a share and layer.

    Columns: ``share``, ``layer``, ``channels`` of a network, ``room`` of the sum, ``shared``, the expected number of
    channels that both have, ``used``, bytes (float32) of the sum's weights in the channels that it uses.
    """
    frames, each = [], members(study, method, names, 0)
    for share in shares:
        what = keyed(study, method, each, share, narrow=NARROW)
        key, used = what.key_of(0), 4 * sum(p.numel() for p in made(study, what).weights().values())
        rows = pd.DataFrame({"channels": key.channels.sizes, "room": key.sizes}).rename_axis("layer").reset_index()
        frames.append(rows.assign(share=share, shared=rows["channels"] ** 2 / rows["room"], used=used))
    return pd.concat(frames, ignore_index=True)


def ceilings(study: Study, first: str, second: str) -> Iterator[Case]:
    """What could be reached if the two tasks did meet: one network trained on both, a pair trained together, and one
    set of weights that holds both under random signs, which is told the task.

    Policy: of the pair's sum ``union``, else "own". No rows where the parameter ``ceiling_seeds`` is 0.
    """
    both = (first, second)
    for seed in range(study.params.ceiling_seeds):
        one = Member(study.config(BASELINE, f"{first}+{second}", seed=seed))
        config = study.config(TRAINED, first, second, seed)
        held = replace(config, method=Method("joint", superposed=True))
        config = replace(config, method=replace(config.method, symmetric=True))
        pair = Sum((Member(config, "main"), Member(config, "support")), both)
        yield Case("3", "one network trained on both", seed, "ceiling", alone(one), OWN, both)
        yield Case("3", "trained together, symmetric", seed, "ceiling", pair, "union", both)
        told = partial(Case, "3", "random signs in training, told the task", seed, "ceiling", policy=OWN)
        yield from (told(alone(Member(held, role)), tested=(name,)) for role, name in held.roles.items())


def standin_worth(study: Study, names: Sequence[str]) -> Iterator[Case]:
    """What a network that was trained on a dataset's stand-in alone reads of the dataset's own test images; seed 0.

    A small one, of the row `keys alone`. Policy: statistics of the stand-in's training images, then (``per_task``) of
    the dataset's.
    """
    for name, policy in product(names, (OWN, "per_task")):
        of = Member(study.config(ALONE, f"{name} stand-in"))
        yield Case("3", ALONE, 0, "sum", alone(of), policy, (name, f"{name} stand-in"))


def _pair(study: Study, method: str, first: str, second: str, apart: bool) -> Sum:
    """The sum of a pair, or of two networks that were trained apart; seed 0."""
    if apart:
        return keyed(study, method, members(study, method, (first, second), 0), SHARE, narrow=NARROW)
    return keyed(study, method, pair_members(study, method, first, second, 0))


def plane(study: Study, method: str, first: str, second: str, strangers: bool = False) -> dict:
    """Validation accuracy of α·θ_first + β·θ_second on both tasks, statistics from training images of the tested task.

    Args:
        study: where the networks come from.
        method: row of the report.
        first: dataset of θ_first.
        second: dataset of θ_second.
        strangers: both are main networks that were trained apart (task 3); else ``second`` is the support network
            of the pair (tasks 1 and 2).

    Returns:
        ``coefficients`` (n,), and for each dataset name an n × n list, rows α, columns β, in percent.
    """
    points, what = study.params.plane_points, _pair(study, method, first, second, strangers)
    return study.measured([measurement(study, _plane, what, points=points)])[0]


def _plane(study: Study, what: Sum, points: int) -> dict:
    at, total = torch.linspace(0, 1.5, points).tolist(), made(study, what)

    def percent(name: str, *coefficients: float) -> float:
        total.coefficients, tested = coefficients, study.dataset(name)
        network = under_policy(study, total, "per_task", (), name, _PLANE_IMAGES)
        few = (tested.val_images[:_PLANE_IMAGES], tested.val_labels[:_PLANE_IMAGES])
        return percent_right(network, *few, study.precision)

    return {"coefficients": at} | {name: [[percent(name, a, b) for b in at] for a in at] for name in what.tasks}


def explained(study: Study, method: str, first: str, second: str, strangers: bool = True) -> pd.DataFrame:
    """How much of what happens inside θ_first + θ_second on ``first``'s images θ_first alone explains.

    Layer by layer on validation images: the squared correlation between a channel of the sum and the same
    channel of θ_first, averaged over the channels that θ_first uses, weighted by their variance in the sum. A
    convolution is looked at behind its batch norm, before the ReLU. Policy: of networks that never met (``strangers``)
    that of the row's headline, of a pair ``per_task``; θ_first alone has the statistics that it has in a sum without
    collisions.

    Returns:
        a row for each layer, with ``method``, ``layer`` and ``explained`` (0 to 1).
    """
    what = _pair(study, method, first, second, strangers)
    policy = headline_policy(study.params, method) if strangers else "per_task"
    rows = study.measured([measurement(study, _explained, what, policy=policy)])[0]
    return pd.DataFrame(rows).assign(method=method)


def _explained(study: Study, what: Sum, policy: str) -> list[dict]:
    total, first, rows = made(study, what), what.tasks[0], []
    images = normalize(study.dataset(first).val_images[:_PLANE_IMAGES])
    own = {"summed": OWN, "by_owner": "per_task"}.get(policy, policy)
    of_one = _activations(under_policy(study, total.networks[0], own, what.tasks, first), images)
    of_sum = _activations(under_policy(study, total, policy, what.tasks, first), images)
    positions = total.keys[0].positions if total.keys else {}
    for layer, a in of_one.items():
        at = positions.get(layer, slice(None))  # the logits are all networks'
        a, s = (x - x.mean(0) for x in (a, of_sum[layer][:, at]))
        # channels that are silent in θ_first explain nothing
        part = ((a * s).mean(0).square() / a.square().mean(0).clamp_min(1e-12)).sum() / s.square().mean(0).sum()
        rows.append({"layer": layer.rpartition(".")[2], "explained": part.item()})
    return rows


@torch.no_grad()
def _activations(network: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Each layer's output before its ReLU, (values, channels) float64, by the name of its convolution or linear layer.

    A batch norm's output counts as that of the convolution before it. The network is a copy, whose hooks may stay.
    """
    found, layer = {}, ""

    def record(layer, module, inputs, output):
        found[layer] = output.double().movedim(1, -1).flatten(0, -2)

    for name, module in network.named_modules():
        layer = name if isinstance(module, nn.Conv2d | nn.Linear) else layer
        if isinstance(module, nn.Conv2d | nn.Linear | _BatchNorm):
            module.register_forward_hook(partial(record, layer))
    network(images)
    return found


def layers(study: Study, main: str, support: str) -> pd.DataFrame:
    """Norm ratio and cosine of θ_main and θ_support, layer by layer, for every pair that is summed as it is.

    Under keys both networks are compared as they lie in their sum. Columns: ``method``, ``layer``, ``norm_ratio``,
    ``cosine``.
    """
    rows = []
    for method in dict.fromkeys(m for m, _ in _summed_rows(study)):
        total = made(study, _pair(study, method, main, support, False))
        networks = map(widen, total.networks, total.keys) if total.keys else total.networks
        rows += [{"method": method, **row} for row in compare_layers(*networks)]
    return pd.DataFrame(rows)


def histories(study: Study, main: str, support: str) -> dict[str, list[dict]]:
    """The epochs of every joint row of the profile, seed 0, by method (:func:`weightsum_lib.study.train.train`)."""
    joint = [m for m in study.params.rows if study.params.method(m).protocol == "joint"]
    return {m: study.run(study.config(m, main, support)).history for m in joint}


def take_home(study: Study, folder: Path) -> dict[str, Path]:
    """Two networks of the recipe, seed 0, with a card: for anyone to load, add and test in a minute; files by name."""
    both, room, files = ("mnist", "svhn"), 128, {}
    pair = members(study, RANDOM, both, 0)
    networks = copy.deepcopy([study.run(member.config).networks["main"] for member in pair])
    for network in networks:  # what is measured is what is kept
        for parameter in network.parameters():
            parameter.data = parameter.data.bfloat16().float()
    total = plain(study, keyed(study, RANDOM, pair, 1 / room, narrow=NARROW), networks).add_statistics().eval()
    for name, member, network in zip(both, pair, networks, strict=True):
        config, data, parameters = member.config, study.dataset(name), dict(network.named_parameters())
        tested = (data.test_images, data.test_labels, study.precision)
        card = {"made by": config.describe(), "arch": config.arch, "width": config.width * config.method.network_width}
        card |= {"batch norm": "CenteredBatchNorm2d", "data": data.describe()}
        card |= {"key": f"none of its own: each sum draws one a network, here of 1/{room} of the channels"}
        found = {"alone": percent_right(network, *tested), "state dicts added": percent_right(total, *tested)}
        short = {k: v.bfloat16() if k in parameters else v for k, v in network.state_dict().items()}
        files[f"networks/{name}.safetensors"] = path = folder / "networks" / f"{name}.safetensors"
        store.write_tensors(path, short, card | {"test accuracy (%)": found})
    return files
