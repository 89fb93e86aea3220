"""What is tested: a network or a sum of some, described by a value, made by name, under a batch-norm policy."""

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from weightsum_lib.core import merging
from weightsum_lib.core.batchnorm import recalibrate
from weightsum_lib.core.keys import Key, compact
from weightsum_lib.core.models import normalize
from weightsum_lib.core.weights import WeightSum
from weightsum_lib.study.config import RunConfig, build, channels_of, key_of
from weightsum_lib.study.runs import Study
from weightsum_lib.study.train import autocast

# Where a network's batch-norm statistics come from when it is tested, and what that presumes:
# by_owner: for each channel unlabelled training images of the task whose network has it, of all tasks where networks
#   share it; needs images sorted by task, and keys
# union: unlabelled training images of all summed tasks together; needs such images
# summed: the networks' statistics added, as state dicts are: no images; wrong where networks share a channel
# per_task: training images of the tested task; presumes to know which task a test image is from
# batch: the test batch's own, all of one task; needs many test images at once and presumes their task
POLICIES = ("by_owner", "union", "summed", "per_task", "batch")
_FEW = 8  # images on which a merger proves what it has made
_FISHER_IMAGES = 200  # at most; each takes ten gradients
_OF_KEYS = ("narrow", "only", "draw")  # fields that say something of random keys
OWN = "own"  # of a network that is not summed: training images of its own task, whatever it is tested on


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

    ``tasks`` are those of the members, whose images set the statistics. With ``keys`` the members lie in a network of
    ``width``, each where its own key of that ``draw`` says; a key is a property of the sum, not of the run. A layer
    in which a member has fewer than ``narrow`` channels gets the room of one that has ``narrow``: what a sum loses in
    a layer varies as the share of its channels that collide, whose variance is 1 / the room. With ``only`` the name
    of a group of channels, random keys are random there, and disjoint everywhere else.
    """

    members: tuple[Member, ...]
    tasks: tuple[str, ...]
    how: str = "plain"
    keys: str = "none"
    width: float = 1.0
    narrow: int = 0
    only: str = ""
    draw: int = 0
    coefficients: tuple[float, ...] = ()

    @property
    def share(self) -> float:
        """The share k of the sum's channels that each network has, where no layer is ``narrow``; dense: 1."""
        config = self.members[0].config
        return config.width * config.method.network_width / self.width if self.keys != "none" else 1.0

    def key_of(self, index: int) -> Key | None:
        """The key of a member: None, its own draw, or the block of its number in disjoint keys."""
        if self.keys == "none":
            return None
        config, role = self.members[index].config, self.members[index].role
        sizes = channels_of(config).sizes
        rooms = {group: max(1, self.narrow / size) / self.share for group, size in sizes.items()}
        key = key_of(config, role, self.keys, rooms, index, self.draw)
        if self.only:
            dealt = key_of(config, role, "disjoint", rooms, index).positions
            key = replace(key, positions=dealt | {self.only: key.positions[self.only]})
        return key

    def shared(self) -> dict[str, float]:
        """By task, the share of its network's channels that others of the sum use too: the mean over the layers."""
        if self.keys != "random":
            return {}
        keys, found = compact([self.key_of(i) for i in range(len(self.members))]), {name: [] for name in self.tasks}
        for group, size in keys[0].sizes.items():
            uses = sum(torch.bincount(key.positions[group], minlength=size) for key in keys)
            for name, key in zip(self.tasks, keys, strict=True):
                found[name].append((uses[key.positions[group]] > 1).double().mean().item())
        return {name: sum(each) / len(each) for name, each in found.items()}


def alone(member: Member) -> Sum:
    """One network, nothing added."""
    return Sum((member,), (member.task,), "ensemble")


def keyed(study: Study, method: str, members: Sequence[Member], share: float | None = None, **about) -> Sum:
    """The sum of some networks under the switches of a row.

    Args:
        study: whose rows they are.
        method: row of the report.
        members: the networks.
        share: of random keys, the share k of the sum's channels that each network has; by default that of training.
            Disjoint keys have that of training, or a smaller one where the networks are too many for it.
        about: further fields of :class:`Sum`.
    """
    m = study.params.method(method)
    width = m.network_width / share if share and m.keys == "random" else m.sum_width
    width = max(width, len(members) * m.network_width) if m.keys == "disjoint" else width
    about = about if m.keys == "random" else {name: v for name, v in about.items() if name not in _OF_KEYS}
    tasks = tuple(member.task for member in members)
    return Sum(tuple(members), tasks, keys=m.keys, width=members[0].config.width * width, **about)


# How one network is made of several: each takes the study, the description, and the members' networks.


def plain(study: Study, what: Sum, networks: list[nn.Module]) -> nn.Module:
    """Σ cᵢ·θᵢ, each network's channels where its key says."""
    keys = [what.key_of(i) for i in range(len(networks))]
    return WeightSum(networks, what.coefficients or None, keys=compact(keys) if keys[0] else None)


def ensemble(study: Study, what: Sum, networks: list[nn.Module]) -> nn.Module:
    """The sum of the logits, each network's statistics from its own task; of one network, its logits."""
    return merging.Ensemble(_calibrated(study, what, networks))


def as_trained(study: Study, what: Sum, networks: list[nn.Module]) -> nn.Module:
    """The same with the running statistics of training, which `summed` adds up."""
    return merging.Ensemble(networks)


def centered(study: Study, what: Sum, networks: list[nn.Module]) -> nn.Module:
    """The plain sum once each batch norm of a network stores its scale as the deviation from 1: the same network."""
    same = []
    for member, network in zip(what.members, networks, strict=True):
        config = replace(member.config, method=replace(member.config.method, centered_scale=True))
        same.append(build(config).to(study.device))
        same[-1].load_state_dict(network.state_dict())
        for module in same[-1].modules():
            if isinstance(module, _BatchNorm):
                module.weight.data -= 1 - member.config.method.centered_scale
    return plain(study, what, same)


def renamed(study: Study, what: Sum, networks: list[nn.Module]) -> nn.Module:
    """The plain sum, the classes of its last network renamed as in the task ``<dataset> renamed <shift>``."""
    renaming, few = torch.arange(10).roll(shift_of(what)), normalize(calibration_images(study, what.tasks)[:_FEW])
    return plain(study, what, [*networks[:-1], merging.relabelled(networks[-1], renaming, few)])


def average(study: Study, what: Sum, networks: list[nn.Module]) -> nn.Module:
    """The mean of the weights."""
    return merging.average(networks)


def rebasin(study: Study, what: Sum, networks: list[nn.Module]) -> nn.Module:
    """Git Re-Basin, then the mean of the weights."""
    a, b = networks
    return merging.average([a, merging.weight_matching(a, b, channels_of(what.members[0].config))])


def matched(study: Study, what: Sum, networks: list[nn.Module]) -> nn.Module:
    """Matched by activations on all tasks' training images, then the mean of the weights."""
    (a, b), images = _on_all_tasks(study, what, networks)
    return merging.average([a, merging.activation_matching(a, b, channels_of(what.members[0].config), images)])


def zipit(study: Study, what: Sum, networks: list[nn.Module]) -> nn.Module:
    """ZipIt! on all tasks' training images; coefficients: the share of the layers, from the first on, α and β."""
    (share, alpha, beta), channels = what.coefficients, channels_of(what.members[0].config)
    found = list(_correlations(study, replace(what, coefficients=())).items())[: round(share * len(channels.sizes))]
    networks, images = _on_all_tasks(study, what, networks)
    onto = {group: merging.zipped(like, alpha, beta) for group, like in found}
    return merging.fold(networks, channels, onto, images[:_FEW])


@functools.lru_cache(maxsize=1)  # several coefficients are tried; a few hundred megabytes
def _correlations(study: Study, what: Sum) -> dict[str, Tensor]:
    networks, images = _on_all_tasks(study, what, [study.run(m.config).networks[m.role] for m in what.members])
    return merging.correlations(networks, channels_of(what.members[0].config), images)


def stacked(study: Study, what: Sum, networks: list[nn.Module]) -> nn.Module:
    """The first layers summed, the others side by side, their logits added; coefficient: the share that is summed."""
    channels = channels_of(what.members[0].config)
    first = list(channels.sizes.items())[: round(what.coefficients[0] * len(channels.sizes))]
    onto = {group: torch.eye(n).repeat(1, len(networks)) for group, n in first}
    return merging.fold(networks, channels, onto, normalize(calibration_images(study, what.tasks)[:_FEW]))


def signed(study: Study, what: Sum, networks: list[nn.Module]) -> nn.Module:
    """What a superposition of the layers' weights gives for the first network's key: that network with the biases and
    the batch norm of its own, since who is told the task can keep these, and the others' weights under random signs."""
    generator = torch.Generator().manual_seed(what.members[0].config.stream("main", "signs"))
    others = [merging.random_signs(network, generator) for network in networks[1:]]
    for vector in (p for network in others for p in network.parameters() if p.ndim == 1):
        vector.data.zero_()
    return WeightSum([networks[0], *others])


def regmean(study: Study, what: Sum, networks: list[nn.Module]) -> nn.Module:
    """RegMean, on each network's own training images."""
    images = [normalize(calibration_images(study, [m.task])) for m in what.members]
    return merging.regmean(_calibrated(study, what, networks), images)


def fisher(study: Study, what: Sum, networks: list[nn.Module]) -> nn.Module:
    """Fisher-weighted averaging; the coefficient: the first network's λ, the second one's is the rest to 1."""
    share = what.coefficients[0]
    return merging.fisher_average(networks, [_fisher(study, m) for m in what.members], (share, 1 - share))


@functools.lru_cache(maxsize=8)  # several coefficients are tried
def _fisher(study: Study, member: Member) -> Tensor:
    images = normalize(calibration_images(study, [member.task]))
    network = study.run(member.config).networks[member.role]
    return merging.fisher_information(
        under_policy(study, network, "per_task", (), member.task), images[:: -(-len(images) // _FISHER_IMAGES)]
    )


def stranger(study: Study, what: Sum, networks: list[nn.Module]) -> nn.Module:
    """The first network plus random weights of the second one's norms."""
    config = what.members[1].config
    fresh = build(replace(config, seed=config.seed + 1000)).to(study.device)
    return WeightSum([networks[0], merging.random_like(networks[1], fresh)])


def arithmetic(study: Study, what: Sum, networks: list[nn.Module]) -> nn.Module:
    """Task arithmetic from the networks' shared start; the coefficient is its scale."""
    start = build(what.members[0].config).to(study.device)
    return merging.task_arithmetic(start, networks, what.coefficients[0])


def ties(study: Study, what: Sum, networks: list[nn.Module]) -> nn.Module:
    """TIES from the networks' shared start; the coefficient is its scale."""
    start = build(what.members[0].config).to(study.device)
    return merging.ties(start, networks, what.coefficients[0])


def _on_all_tasks(study: Study, what: Sum, networks: list[nn.Module]) -> tuple[list[nn.Module], Tensor]:
    """The networks under the statistics of all tasks' training images, and these."""
    networks = [under_policy(study, n, "union", what.tasks, "") for n in networks]
    return networks, normalize(calibration_images(study, what.tasks))


def _calibrated(study: Study, what: Sum, networks: list[nn.Module]) -> list[nn.Module]:
    tasks = [m.task for m in what.members]
    return [under_policy(study, n, "per_task", (), task) for n, task in zip(networks, tasks, strict=True)]


def made(study: Study, what: Sum) -> nn.Module:
    """The network that a :class:`Sum` describes, its statistics not set yet."""
    networks = [study.run(m.config).networks[m.role] for m in what.members]
    return globals()[what.how](study, what, networks)


def shift_of(what: Sum) -> int:
    """By how much the classes of a sum's last network are renamed where they are, a number for each seed."""
    return 1 + what.members[0].config.seed % 9


def calibration_images(study: Study, names: Sequence[str]) -> Tensor:
    """Training images that set batch-norm statistics, uint8 (N, 3, 32, 32): of each named task as many as
    ``calibration_images`` says, as far as it has so many; so a task has in a sum as many as its network has alone."""
    return torch.cat(_of_each(study, names))


def _of_each(study: Study, names: Sequence[str]) -> list[Tensor]:
    return [study.dataset(name).train_images[: study.params.calibration_images] for name in names]


def under_policy(
    study: Study, network: nn.Module, policy: str, tasks: Sequence[str], tested: str, limit: int | None = None
) -> nn.Module:
    """A plain copy of a network or sum with the batch-norm statistics of a policy, in evaluation mode.

    Args:
        study: whose images and precision are used.
        network: a network, a sum or an ensemble.
        policy: one of ``POLICIES``, or ``OWN`` for what has its statistics already.
        tasks: the tasks whose networks are summed, in their order.
        tested: the task that it is going to be tested on.
        limit: at most so many calibration images.
    """
    network = network if isinstance(network, WeightSum) else copy.deepcopy(network)
    if policy in ("by_owner", "union", "per_task"):
        each = _of_each(study, [tested] if policy == "per_task" else tasks)
        images, owners = torch.cat(each)[:limit], None
        if policy == "by_owner":
            owners = torch.arange(len(each)).repeat_interleave(torch.tensor([*map(len, each)]))
        with autocast(study.precision, images.device):
            recalibrate(network, normalize(images), owners)
    elif policy == "summed" and isinstance(network, WeightSum):  # else as it was trained
        network.add_statistics()
    network = (network.materialize() if isinstance(network, WeightSum) else network).eval()
    for module in network.modules():
        if policy == "batch" and isinstance(module, _BatchNorm):
            module.running_mean = module.running_var = None  # then the batch's are used
    return network
