"""Ways to make the three-term step, ours and others, that ``make bench`` measures and the tests hold equal."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state
from torch.utils.data import DataLoader
from torchvision import transforms

from weightsum_lib.data import Dataset
from weightsum_lib.train import _MAX_GRADIENT, RunConfig, _Batches, _step_losses, autocast, build
from weightsum_lib.weights import WeightSum


@dataclass(frozen=True)
class Setting:
    """What one table of steps is measured with: at most ``rounds`` times, in about ``budget`` seconds."""

    arch: str
    width: float
    batch_size: int
    device: torch.device
    precision: str
    rounds: int = 10
    budget: float = 60.0
    dropout: float = 0.25

    @property
    def config(self) -> RunConfig:
        """A joint run of that size."""
        shared = {k: getattr(self, k) for k in ("arch", "width", "batch_size", "precision", "dropout")}
        return RunConfig("joint", "mnist", "cifar10", third="ce", learning_rate=1e-3, weight_decay=5e-4, **shared)


class Bench:
    """Ways to make one step on a pair of networks, each on networks and an optimizer of its own.

    A way's method builds them and returns a function that makes one step, and the networks.
    """

    def __init__(self, setting: Setting):
        self.setting, self.config, self.device = setting, setting.config, setting.device
        self.data = {
            name: random_dataset(name, 20 * setting.batch_size).to(self.device) for name in self.config.roles.values()
        }

    def _networks(self, *roles: str, seed: int = 0) -> list[nn.Module]:
        config = replace(self.config, seed=seed)
        return [build(config, role).to(self.device).train() for role in roles]

    def _optimizer(self, networks: Sequence[nn.Module]) -> torch.optim.SGD:
        parameters = [p for network in networks for p in network.parameters()]
        c = self.config
        return torch.optim.SGD(
            parameters, lr=c.learning_rate, momentum=0.9, nesterov=True, weight_decay=c.weight_decay, fused=True
        )

    def batches(self) -> Iterator[dict]:
        """The batches of training, without end: (x, y) by role."""
        loaders = {r: _Batches(self.config, r, self.data[n], 20) for r, n in self.config.roles.items()}
        epoch = 0
        while True:
            for batches in zip(*(loader.epoch(epoch) for loader in loaders.values()), strict=True):
                yield dict(zip(loaders, batches, strict=True))
            epoch += 1

    def _loss(self, *terms: tuple[Callable, tuple[Tensor, Tensor]]) -> Tensor:
        """The sum of the cross-entropies of (network, batch) pairs."""
        with autocast(self.config.precision, self.device):
            return sum(F.cross_entropy(network(x).float(), y) for network, (x, y) in terms)

    def plain(self):
        """Forward, backward and optimizer of one network."""
        networks = self._networks("main")
        optimizer, batch = self._optimizer(networks), next(self.batches())["main"]

        def step():
            self._loss((networks[0], batch)).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step, networks

    def floor(self):
        """Three forward and backward passes and the optimizer steps of two networks, nothing else."""
        *networks, third = self._networks("main", "support", "main")
        optimizer, batch = self._optimizer(networks), next(self.batches())

        def step():
            terms = zip((*networks, third), (batch["main"], batch["support"], batch["main"]), strict=True)
            self._loss(*terms).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            third.zero_grad(set_to_none=True)

        return step, networks

    def ours(self, fed: bool = False, seed: int = 0, **compiler):
        """The step of :func:`weightsum_lib.train.train`.

        Args:
            fed: on a new batch each time.
            seed: of the networks.
            compiler: arguments of :func:`torch.compile`; none: not compiled.
        """
        networks = self._networks(*self.config.roles, seed=seed)
        total, optimizer = WeightSum(networks), self._optimizer(networks)
        by_role = dict(zip(self.config.roles, networks, strict=True))
        batches = self.batches()
        batch = next(batches)

        def loss(batch):
            with autocast(self.config.precision, self.device):
                return _step_losses(self.config, by_role, total, batch, 1.0)["total"]

        loss = torch.compile(loss, fullgraph=True, **compiler) if compiler else loss

        def step():
            loss(next(batches) if fed else batch).backward()
            _update(networks, optimizer)

        return step, networks

    def ours_fed(self):
        """The step of training and the making of its batches."""
        return self.ours(fed=True)

    def compiled(self):
        """Our step through ``torch.compile``, which fuses what lies between the matrix products."""
        return self.ours(mode="default")

    def graphed(self):
        """The same, replayed as CUDA graphs, so that no kernel waits for the host to launch it."""
        return self.ours(mode="reduce-overhead")

    def functional(self):
        """``torch.func.functional_call`` on the added weights, written out."""
        networks = self._networks("main", "support")
        body, optimizer, batch = self._networks("main")[0], self._optimizer(networks), next(self.batches())

        def step():
            pairs = zip(*(n.named_parameters() for n in networks), strict=True)
            weights = {name: p + q for (name, p), (_, q) in pairs}
            loss = self._loss(
                (networks[0], batch["main"]),
                (networks[1], batch["support"]),
                (lambda x: functional_call(body, weights, (x,)), batch["main"]),
            )
            loss.backward()
            _update(networks, optimizer)

        return step, networks

    def static(self):
        """A third module that is filled in place, and whose gradients are added to both networks'."""
        networks = self._networks("main", "support")
        total, optimizer, batch = self._networks("main")[0], self._optimizer(networks), next(self.batches())
        first, second, third = ([*n.parameters()] for n in (*networks, total))

        def step():
            with torch.no_grad():
                torch._foreach_copy_(third, first)
                torch._foreach_add_(third, second)
            loss = self._loss((networks[0], batch["main"]), (networks[1], batch["support"]), (total, batch["main"]))
            loss.backward()
            for parameters in (first, second):
                torch._foreach_add_([p.grad for p in parameters], [p.grad for p in third])
            _update(networks, optimizer)
            total.zero_grad(set_to_none=True)

        return step, networks

    def obvious(self, fed: bool = False):
        """Correct but plain: float32, ``load_state_dict`` each step, gradients added one by one.

        ``fed``: on a new batch of a DataLoader with torchvision's transforms each time.
        """
        networks = [n.to(memory_format=torch.contiguous_format) for n in self._networks("main", "support")]
        (total,) = self._networks("main")
        total.to(memory_format=torch.contiguous_format)
        c, parameters = self.config, [p for n in networks for p in n.parameters()]
        optimizer = torch.optim.SGD(
            parameters, lr=c.learning_rate, momentum=0.9, nesterov=True, weight_decay=c.weight_decay
        )
        fixed = next(self.batches())
        feeds = [_loader(self.data[name], c.batch_size) for name in self.data] if fed else []

        def step():
            batches = [[t.to(self.device) for t in next(f)] for f in feeds] or [fixed["main"], fixed["support"]]
            states = [dict(n.named_parameters()) for n in networks]
            total.load_state_dict({k: states[0][k] + states[1][k] for k in states[0]}, strict=False)
            terms = zip((*networks, total), (*batches, batches[0]), strict=True)
            sum(F.cross_entropy(network(x), y) for network, (x, y) in terms).backward()
            for p, q, r in zip(*(m.parameters() for m in (*networks, total)), strict=True):
                p.grad += r.grad
                q.grad += r.grad
            _update(networks, optimizer)
            total.zero_grad()

        return step, networks

    def obvious_fed(self):
        """The obvious way with its loader."""
        return self.obvious(fed=True)

    def in_turn(self, seeds: int):
        """Several seeds' pairs, one after another."""
        steps, networks = zip(*(self.ours(seed=seed) for seed in range(seeds)), strict=True)

        def step():
            for each in steps:
                each()

        return step, [n for pair in networks for n in pair]

    def streams(self, seeds: int):
        """Several seeds' pairs, each in a CUDA stream of its own."""
        steps, networks = zip(*(self.ours(seed=seed) for seed in range(seeds)), strict=True)
        streams = [torch.cuda.Stream(self.device) for _ in steps]
        for stream in streams:
            stream.wait_stream(torch.cuda.current_stream(self.device))

        def step():
            for each, stream in zip(steps, streams, strict=True):
                with torch.cuda.stream(stream):
                    each()

        return step, [n for pair in networks for n in pair]

    def stacked(self, seeds: int):
        """Several seeds' pairs as one network with a further axis: ``stack_module_state`` and ``vmap``."""
        pairs = [self._networks(*self.config.roles, seed=seed) for seed in range(seeds)]
        body, batch = pairs[0][0], next(self.batches())
        (main, main_buffers), (support, support_buffers) = map(stack_module_state, zip(*pairs, strict=True))
        _, sum_buffers = stack_module_state([self._networks("main")[0] for _ in pairs])
        parameters = [*main.values(), *support.values()]
        c = self.config
        optimizer = torch.optim.SGD(
            parameters, lr=c.learning_rate, momentum=0.9, nesterov=True, weight_decay=c.weight_decay, fused=True
        )

        def loss(weights, buffers, role):
            x, y = batch[role]
            run = torch.vmap(lambda w, b: functional_call(body, (w, b), (x,)), randomness="different")
            logits = run(weights, buffers).float()
            return seeds * F.cross_entropy(logits.flatten(0, 1), y.repeat(seeds))  # the sum of the seeds' means

        def step():
            with autocast(c.precision, self.device):
                total = loss(main, main_buffers, "main") + loss(support, support_buffers, "support")
                total = total + loss({k: main[k] + support[k] for k in main}, sum_buffers, "main")
            total.backward()
            gradients = [p.grad for p in parameters]
            norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).norm(dim=0)
            scales = (_MAX_GRADIENT / (norms + 1e-6)).clamp(max=1)
            for g in gradients:
                g.mul_(scales.view(-1, *[1] * (g.ndim - 1)))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step, [{k: v.detach()[seed] for k, v in w.items()} for seed in range(seeds) for w in (main, support)]


def _update(networks: Sequence[nn.Module], optimizer: torch.optim.Optimizer) -> None:
    """What follows the backward pass in training."""
    nn.utils.clip_grad_norm_([p for n in networks for p in n.parameters()], _MAX_GRADIENT)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def random_dataset(name: str, images: int) -> Dataset:
    """Images of noise, which cost what others cost."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for split, n in (("train", images), ("val", 1), ("test", 1)):
        tensors[f"{split}_images"] = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=generator)
        tensors[f"{split}_labels"] = torch.randint(0, 10, (n,), generator=generator)
    return Dataset(name=name, source="stand-in", note="noise", checksum="", **tensors)


class _Pictures(torch.utils.data.Dataset):
    """A dataset as torchvision's are: PIL images through transforms, one by one."""

    def __init__(self, dataset: Dataset):
        self.images = dataset.train_images.permute(0, 2, 3, 1).contiguous().cpu().numpy()
        self.labels = dataset.train_labels.tolist()
        flip = [transforms.RandomHorizontalFlip()] if dataset.name == "cifar10" else []
        steps = [transforms.RandomCrop(32, padding=2), *flip, transforms.ToTensor()]
        self.transform = transforms.Compose([*steps, transforms.Normalize([0.5] * 3, [0.25] * 3)])

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.images[i])), self.labels[i]


def _loader(dataset: Dataset, batch_size: int) -> Iterator:
    """Batches of a DataLoader without end; two workers, of which it has two batches each ahead."""
    loader = DataLoader(
        _Pictures(dataset), batch_size, shuffle=True, drop_last=True, num_workers=2, persistent_workers=True,
        pin_memory=torch.cuda.is_available(),
    )  # fmt: skip
    while True:
        yield from loader
