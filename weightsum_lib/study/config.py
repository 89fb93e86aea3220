"""What makes a run: its frozen configuration, its random streams, its untrained networks, and where they lie."""

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from weightsum_lib.core import models
from weightsum_lib.core.channels import hidden_channels
from weightsum_lib.core.keys import Channels, Key, deal, draw
from weightsum_lib.study.params import Method, ParamsError

_TRACED = 1 / 8  # width of the network in which an architecture's channels are looked for


@dataclass(frozen=True)
class RunConfig:
    """All that a run depends on besides its datasets and the code.

    ``method.protocol`` is "independent" (one network on ``main``), "joint" (a pair, with the third term on its
    sum) or "sequential" (fine-tuning on ``main`` from ``start``: "sum" of two independent networks, "main" alone,
    or "random" weights). ``width`` is that of the profile; a network has ``method.network_width`` times, and the
    network in which a pair is summed ``method.sum_width`` times that.
    """

    method: Method
    main: str
    support: str = ""
    seed: int = 0
    start: str = "random"
    arch: str = "vgg8"
    in_channels: int = 3
    width: float = 1.0
    dropout: float = 0.25
    epoch_images: int = 50_000
    epochs: int = 1
    finetune_epochs: int = 0
    batch_size: int = 128
    learning_rate: float = 0.02
    weight_decay: float = 5e-4
    third_ramp: float = 0.0
    permuted_ramp: float = 0.0
    precision: str = "float32"

    @property
    def roles(self) -> dict[str, str]:
        """The datasets of the networks that this run trains, by role."""
        return {"main": self.main, "support": self.support} if self.method.protocol == "joint" else {"main": self.main}

    @property
    def trained_epochs(self) -> int:
        """Epochs that this run itself trains."""
        return self.finetune_epochs if self.method.protocol == "sequential" else self.epochs

    def describe(self) -> str:
        """What it trains, for a line on the terminal."""
        protocol, *said = self.method.in_words()
        start = f" from {self.start}" if self.method.protocol == "sequential" else ""
        return ", ".join([f"{'+'.join(self.roles.values())} {protocol}{start}", *said, f"seed {self.seed}"])

    def stream(self, role: str, purpose: str) -> int:
        """The seed of one random stream: no two networks share one unless they are the same network.

        A support network has streams of its own for each main task, so that the main networks of two
        pairs never meet through it.
        """
        owner = {
            "independent": f"{self.main} alone",
            "joint": f"{self.main} with support" if role == "main" else f"{self.support} as support of {self.main}",
            "sequential": f"{self.main} fine-tuned from {self.start}",
        }[self.method.protocol]
        if self.method.start == "shared" and purpose == "initialization":
            owner = "shared start"
        text = f"{self.seed}/{owner}/{purpose}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def pick_device(name: str) -> torch.device:
    """The device of a profile: "auto" is CUDA where there is one.

    Raises:
        ParamsError: CUDA is asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ParamsError("'cuda' is asked for, but torch sees no GPU here. Use PROFILE=quick, or DEVICE=cpu to insist")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def pick_precision(device: torch.device, wanted: str = "auto") -> str:
    """What is ``wanted``; for "auto" "bfloat16" where it is the faster one, else "float32".

    It is on a GPU that has it, and on a CPU with AMX. With AVX-512 alone a training step in it takes about half as long
    on one by AMD, and 1.2 to 1.3 times as long on one by Intel.

    Raises:
        ParamsError: bfloat16 is ``wanted`` and the hardware does not multiply it.
    """
    cpu = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    gpu = device.type == "cuda" and torch.cuda.is_bf16_supported()
    if wanted == "bfloat16" and not (gpu or cpu.get("avx512_bf16")):
        raise ParamsError("precision 'bfloat16' is asked for, which this processor does not multiply; say 'auto'")
    fast = gpu or cpu.get("amx_bf16") or (cpu.get("avx512_bf16") and "AMD" in cpu.get("cpu_name", ""))
    return wanted if wanted != "auto" else "bfloat16" if fast else "float32"


def build(config: RunConfig, role: str = "main") -> nn.Module:
    """The untrained network of a run, its weights drawn from its own stream."""
    m = config.method
    options = {"width": config.width * m.network_width, "dropout": config.dropout, "centered_scale": m.centered_scale}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.stream(role, "initialization"))
        network = getattr(models, config.arch)(config.in_channels, **options)
    return network.to(memory_format=torch.channels_last)  # which the activations take over: faster, most of all to pool


def channels_of(config: RunConfig) -> Channels:
    """The hidden channels of a run's networks."""
    return _channels(config.arch, config.in_channels, config.width * config.method.network_width)


@functools.cache
def _channels(arch: str, in_channels: int, width: float) -> Channels:
    """Those of an architecture, found and proven on a small network of it, at some width."""
    if width != _TRACED:
        known, sizes = _channels(arch, in_channels, _TRACED), {}
        with torch.device("meta"):
            shapes = {name: t.shape for name, t in getattr(models, arch)(in_channels, width=width).state_dict().items()}
        for name, axes in known.axes.items():
            sizes |= {group: shapes[name][axis] // each for axis, group, each in axes}
        return Channels(known.axes, {group: sizes[group] for group in known.sizes})
    with torch.random.fork_rng(devices=[]):
        network = getattr(models, arch)(in_channels, width=width)
        return hidden_channels(network, torch.zeros(2, in_channels, 32, 32))


def key_of(config: RunConfig, role: str, keys: str, room: float | Mapping[str, float], block: int, number=0) -> Key:
    """The key of one network of a run: of random keys its own draw, else the dealt ``block``.

    Args:
        config: the run.
        role: of the network.
        keys: "random", or "disjoint" ("none" deals too).
        room: factor on the number of channels, of all groups or of each (:func:`weightsum_lib.draw`).
        block: for disjoint keys.
        number: of the draw.
    """
    if keys != "random":
        return deal(channels_of(config), room, block)
    stream = config.stream(role, f"key {number}" if number else "key")
    return draw(channels_of(config), room, torch.Generator().manual_seed(stream))
