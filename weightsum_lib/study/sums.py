"""What is tested: a network or a sum of some, described by a value, made by name, under a batch-norm policy."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from weightsum_lib.core import merging
from weightsum_lib.core.batchnorm import recalibrate
from weightsum_lib.core.keys import Key, compact, deal, draw
from weightsum_lib.core.models import normalize
from weightsum_lib.core.weights import WeightSum
from weightsum_lib.study.config import RunConfig, build, channels_of
from weightsum_lib.study.runs import Study
from weightsum_lib.study.train import autocast

# Where a network's batch-norm statistics come from when it is tested, and what that presumes.
POLICIES = {
    "owner": "each channel keeps the statistics of the network that owns it; nothing but addition, needs disjoint keys",
    "union": "training images of all summed tasks together, without labels; needs such images",
    "per_task": "training images of the tested task; presumes to know which task a test image is from",
    "summed": "the networks' statistics added, as state dicts are; wrong wherever two networks share a channel",
    "batch": "the test batch's own, all of one task; needs many test images at once and presumes their task",
}


@dataclass(frozen=True)
class Member:
    """A trained network: the run that made it, and its role there."""

    config: RunConfig
    role: str = "main"

    @property
    def task(self) -> str:
        """The dataset that it was trained for."""
        return self.config.roles[self.role]


@dataclass(frozen=True)
class Sum:
    """A network that is tested, and how it is made: by the function ``how`` of this module, of these members.

    ``tasks`` are those whose images set the statistics under ``union``. With ``keys`` the members lie in a network of
    ``width``, each where its own key of that ``draw`` says; a key is a property of the sum, not of the run.
    """

    members: tuple[Member, ...]
    tasks: tuple[str, ...]
    how: str = "plain"
    keys: str = "none"
    width: float = 1.0
    draw: int = 0
    coefficients: tuple[float, ...] = ()

    def key_of(self, index: int) -> Key | None:
        """The key of a member: None, its own draw, or the block of its number in disjoint keys."""
        config, role = self.members[index].config, self.members[index].role
        room = self.width / (config.width * config.method.network_width)
        if self.keys == "none":
            return None
        if self.keys == "disjoint":
            return deal(channels_of(config), room, index)
        stream = config.stream(role, f"key {self.draw}" if self.draw else "key")
        return draw(channels_of(config), room, torch.Generator().manual_seed(stream))


def alone(member: Member, tasks: Sequence[str]) -> Sum:
    """One network, nothing added."""
    return Sum((member,), tuple(tasks))


def keyed(study: Study, method: str, members: Sequence[Member], tasks: Sequence[str], **about) -> Sum:
    """The sum of some networks under the switches of a row."""
    m = study.params.method(method)
    return Sum(tuple(members), tuple(tasks), keys=m.keys, width=study.params.width * m.sum_width, **about)


# How one network is made of several: each takes the study, the description, and the members' networks.


def plain(study: Study, what: Sum, networks: list[nn.Module]) -> nn.Module:
    """Σ cᵢ·θᵢ, each network's channels where its key says; a single network as it is."""
    if len(networks) == 1:
        return networks[0]
    keys = [what.key_of(i) for i in range(len(networks))]
    return WeightSum(networks, what.coefficients or None, keys=compact(keys) if keys[0] else None)


def ensemble(study: Study, what: Sum, networks: list[nn.Module]) -> nn.Module:
    """The sum of the logits."""
    return merging.Ensemble(networks)


def renamed(study: Study, what: Sum, networks: list[nn.Module]) -> nn.Module:
    """The plain sum, the classes of its last network renamed as in the task ``<dataset> renamed <shift>``."""
    return plain(study, what, [*networks[:-1], merging.relabelled(networks[-1], torch.arange(10).roll(shift_of(what)))])


def average(study: Study, what: Sum, networks: list[nn.Module]) -> nn.Module:
    """The mean of the weights."""
    return merging.average(networks)


def rebasin(study: Study, what: Sum, networks: list[nn.Module]) -> nn.Module:
    """Git Re-Basin, then the mean of the weights."""
    a, b = networks
    return merging.average([a, merging.weight_matching(a, b, channels_of(what.members[0].config))])


def regmean(study: Study, what: Sum, networks: list[nn.Module]) -> nn.Module:
    """RegMean, on each network's own training images."""
    calibrated = [
        under_policy(study, network, "per_task", (), m.task) for network, m in zip(networks, what.members, strict=True)
    ]
    return merging.regmean(calibrated, [normalize(calibration_images(study, [m.task])) for m in what.members])


def stranger(study: Study, what: Sum, networks: list[nn.Module]) -> nn.Module:
    """The first network plus random weights of the second one's norms."""
    config = what.members[1].config
    fresh = build(replace(config, seed=config.seed + 1000)).to(study.device)
    return WeightSum([networks[0], merging.random_like(networks[1], fresh)])


def arithmetic(study: Study, what: Sum, networks: list[nn.Module]) -> nn.Module:
    """Task arithmetic from the networks' shared start; the coefficient is its scale."""
    start = build(what.members[0].config).to(study.device)
    return merging.task_arithmetic(start, networks, what.coefficients[0])


def made(study: Study, what: Sum) -> nn.Module:
    """The network that a :class:`Sum` describes, its statistics not set yet."""
    networks = [study.run(m.config).networks[m.role] for m in what.members]
    return globals()[what.how](study, what, networks)


def shift_of(what: Sum) -> int:
    """By how much the classes of a sum's last network are renamed where they are, a number for each seed."""
    return 1 + what.members[0].config.seed % 9


def calibration_images(study: Study, names: Sequence[str]) -> Tensor:
    """Training images that set batch-norm statistics, uint8 (N, 3, 32, 32): equally many of each named task, as many
    in all as ``calibration_images`` says."""
    each = study.params.calibration_images // len(names)
    return torch.cat([study.dataset(name).train_images[:each] for name in names])


def under_policy(
    study: Study, network: nn.Module, policy: str, tasks: Sequence[str], tested: str, limit: int | None = None
) -> nn.Module:
    """A plain copy of a network or sum with the batch-norm statistics of a policy, in evaluation mode.

    Args:
        study: whose images and precision are used.
        network: a network, a sum or an ensemble.
        policy: one of ``POLICIES``.
        tasks: the tasks whose networks are summed.
        tested: the task that it is going to be tested on.
        limit: at most so many calibration images.
    """
    if isinstance(network, WeightSum):
        network = (network.add_statistics() if policy in ("owner", "summed") else network).materialize()
    else:
        network = copy.deepcopy(network)
    if policy in ("union", "per_task"):
        images = calibration_images(study, tasks if policy == "union" else [tested])[:limit]
        with autocast(study.precision, images.device):
            recalibrate(network, normalize(images))
    network.eval()
    for module in network.modules():
        if policy == "batch" and isinstance(module, _BatchNorm):
            module.running_mean = module.running_var = None  # then the batch's are used
    return network
