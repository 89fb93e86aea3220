"""The knobs of the study: what they are called, what they may be, and where they come from (``params/*.yaml``)."""

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import get_origin

import yaml

DATASETS = {"mnist": "MNIST", "cifar10": "CIFAR-10", "svhn": "SVHN"}  # name: title
BASELINE, TRAINED = "independent", "joint ce"  # the methods that the findings compare
DISJOINT, RANDOM = "disjoint keys", "random keys"  # and the networks that are made to be summed with strangers
SHARED = "shared start"  # networks for task arithmetic, where a profile has them
PARAMS_DIR = Path(__file__).parent.parent / "params"


class ParamsError(ValueError):
    """A parameter that can't be used; the message names the key, the file, and what was expected."""


def _positive(value):
    return value > 0


def _not_negative(value):
    return value >= 0


def _share(value):
    return 0 <= value <= 1


def _knob(help: str, check=None, expected: str = ""):
    return field(metadata={"help": help, "check": check, "expected": expected})


def _one_of(*names):
    return lambda value: value in names, " or ".join(repr(n) for n in names)


@dataclass(frozen=True)
class Method:
    """One row of the report: a set of independent switches."""

    protocol: str = _knob("how the pair is trained", *_one_of("independent", "sequential", "joint"))
    third: str = _knob(
        "reading of the third term",
        *_one_of("none", "ce", "signed_gap", "loss_gap", "distill", "logit_difference"),
    )
    third_weight: float = _knob("factor on the third term", _positive, "> 0")
    symmetric: bool = _knob("the sum must keep the support task too")
    symmetric_to: str = _knob("whom that term teaches", *_one_of("both", "main"))
    quiet: float = _knob("factor on how loudly each network answers the other's images", _not_negative, "≥ 0")
    label_smoothing: float = _knob("share of every target spread over all classes", _share, "from 0 to 1")
    equal_norms: bool = _knob("both networks' layers are held at equal norms")
    keys: str = _knob("which channels a network may use", *_one_of("none", "random", "disjoint"))
    key_share: float = _knob("share of the channels under a key", lambda v: 0 < v <= 1, "more than 0, at most 1")
    wider: float = _knob("factor on the width of the network in which the sum is made", _positive, "> 0")
    permuted_support: float = _knob("share of the steps that meet the support network elsewhere", _share, "from 0 to 1")
    owner_statistics: bool = _knob("in the sum each channel has its owner's batch-norm statistics; disjoint keys")
    centered_scale: bool = _knob("batch norm stores its scale's deviation from 1")
    start: str = _knob("where independent networks start", *_one_of("random", "shared"))
    seeds: int = _knob("at most so many seeds", _positive, "≥ 1")


METHOD_DEFAULTS = {
    "third": "none",
    "third_weight": 1.0,
    "symmetric": False,
    "symmetric_to": "both",
    "quiet": 0.0,
    "label_smoothing": 0.0,
    "equal_norms": False,
    "keys": "none",
    "key_share": 1.0,
    "wider": 1.0,
    "permuted_support": 0.0,
    "owner_statistics": False,
    "centered_scale": False,
    "start": "random",
    "seeds": 1_000,
}


_JOINT_ONLY = (
    "third",
    "third_weight",
    "symmetric",
    "symmetric_to",
    "quiet",
    "equal_norms",
    "permuted_support",
    "owner_statistics",
)


@dataclass(frozen=True)
class Params:
    """All knobs of one profile. A parameter file gives every one of them; so does each notebook's parameters cell."""

    profile: str = _knob("name of the profile")
    arch: str = _knob("architecture", *_one_of("vgg8", "vgg16"))
    width: float = _knob("factor on the channels and hidden units", lambda v: 1 / 64 <= v <= 8, "from 1/64 to 8")
    dropout: float = _knob("probability to drop a hidden unit", lambda v: 0 <= v < 1, "at least 0 and less than 1")
    train_images: int = _knob("images of a set at most; a tenth validates", lambda v: v >= 100, "≥ 100")
    test_images: int = _knob("test images of a set at most", lambda v: v >= 20, "≥ 20")
    calibration_images: int = _knob("images that set batch-norm statistics", lambda v: v >= 2, "≥ 2")
    epoch_images: int = _knob("images that each network sees in an epoch", _positive, "≥ 1")
    epochs: int = _knob("epochs of training", _positive, "≥ 1")
    finetune_epochs: int = _knob("epochs of fine-tuning in `sequential`", _positive, "≥ 1")
    batch_size: int = _knob("images in a step, per task", lambda v: v >= 2, "≥ 2")
    learning_rate: float = _knob("peak learning rate", _positive, "> 0")
    weight_decay: float = _knob("L2 penalty of SGD", _not_negative, "≥ 0")
    third_ramp: float = _knob("share of the steps in which the third term grows", _share, "from 0 to 1")
    permuted_ramp: float = _knob("share of the steps in which the permuted share grows", _share, "from 0 to 1")
    plane_points: int = _knob(
        "points along an axis of the coefficient plane",
        lambda v: v >= 4 and v % 3 == 1,
        "4, 7, 10, …, so that (1, 1) is one",
    )
    seeds: int = _knob("seeds 0, 1, … of each method", _positive, "≥ 1")
    ceiling_seeds: int = _knob("seeds of the networks that do meet both tasks of task 3", _not_negative, "≥ 0")
    methods: dict = _knob("label: switches of each row")
    parts: dict = _knob("label: switches of the rows that only the page on what transfers has")
    allow_standin: list = _knob("datasets that may be replaced by the synthetic stand-in")
    data_dir: str = _knob("folder of the prepared datasets; empty: neither files nor downloads")
    results_dir: str = _knob("folder of trained networks and results")
    device: str = _knob("where to compute", *_one_of("auto", "cpu", "cuda"))
    networks_at_once: int = _knob(
        "networks that are trained at once on a CPU; 0: one a core, at most four", _not_negative, "≥ 0"
    )

    def method(self, label: str) -> Method:
        """The switches of a row of ``methods`` or ``parts``."""
        return _make(Method, {**METHOD_DEFAULTS, **(self.methods | self.parts)[label]}, f"method '{label}'")

    def seeds_of(self, label: str) -> range:
        """The seeds of a row: 0, 1, …, as many as the profile and the method allow."""
        return range(min(self.seeds, self.method(label).seeds))

    def as_dict(self) -> dict:
        """All knobs, JSON-able."""
        return asdict(self)


def _nearest(key: str, known) -> str:
    near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    return f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}"


def _make(cls, values: Mapping, where: str):
    """Build a dataclass of knobs from values, or raise ParamsError naming the key, ``where``, and what was expected."""
    known = {f.name: f for f in fields(cls)}
    for key in values:
        if key not in known:
            raise ParamsError(f"{where}: unknown parameter '{key}'; {_nearest(str(key), known)}")
    made = {}
    for name, knob in known.items():
        if name not in values:
            raise ParamsError(f"{where}: '{name}' is missing ({knob.metadata['help']})")
        value, wanted = values[name], get_origin(knob.type) or knob.type
        if wanted is float and type(value) is int:
            value = float(value)
        if type(value) is not wanted:
            raise ParamsError(
                f"{where}: '{name}' ({knob.metadata['help']}) must be {wanted.__name__}, "
                f"got {value!r} ({type(value).__name__})"
            )
        check = knob.metadata["check"]
        if check and not check(value):
            raise ParamsError(
                f"{where}: '{name}' ({knob.metadata['help']}) must be {knob.metadata['expected']}, got {value!r}"
            )
        made[name] = value
    return cls(**made)


def check(values: Mapping, where: str) -> Params:
    """Make checked parameters from a mapping.

    Args:
        values: knob name to value, every knob of :class:`Params`.
        where: what to call the source in an error, e.g. the file.

    Raises:
        ParamsError: unknown, missing, of the wrong type, or impossible.
    """
    params = _make(Params, values, where)
    for label in params.methods.keys() & params.parts.keys():
        raise ParamsError(f"{where}: '{label}' is in 'methods' and in 'parts'; a row has one name and one place")
    for label, switches in (params.methods | params.parts).items():
        if not isinstance(switches, Mapping):
            raise ParamsError(
                f"{where}: method '{label}' must be switches such as {{protocol: joint}}, got {switches!r}"
            )
        method = _make(Method, {**METHOD_DEFAULTS, **switches}, f"{where}: method '{label}'")
        where_used = f"{where}: method '{label}':"
        for switch in _JOINT_ONLY:
            if method.protocol != "joint" and getattr(method, switch) != METHOD_DEFAULTS[switch]:
                raise ParamsError(f"{where_used} only protocol 'joint' has '{switch}', not '{method.protocol}'")
        if method.protocol != "independent" and method.start != "random":
            raise ParamsError(f"{where_used} only protocol 'independent' has 'start', not '{method.protocol}'")
        if method.protocol == "sequential" and set(switches) - {"protocol", "seeds"}:
            raise ParamsError(f"{where_used} 'sequential' takes the networks of '{BASELINE}', no switches of its own")
        if (method.key_share < 1) != (method.keys != "none"):
            raise ParamsError(f"{where_used} 'keys' and a 'key_share' below 1 go together, got {dict(switches)}")
        if method.keys == "disjoint" and (method.key_share > 0.5 or method.permuted_support):
            raise ParamsError(f"{where_used} disjoint keys want key_share ≤ ½ and no permuted_support")
        if method.owner_statistics and method.keys != "disjoint":
            raise ParamsError(f"{where_used} 'owner_statistics' wants disjoint keys: else a channel has no one owner")
        if method.symmetric_to != "both" and not method.symmetric:
            raise ParamsError(f"{where_used} 'symmetric_to' wants 'symmetric: true'")
    for label in (BASELINE, TRAINED, DISJOINT, RANDOM):
        if label not in params.methods:
            raise ParamsError(f"{where}: 'methods' lacks '{label}', which the findings of the report compare")
    for name in params.allow_standin:
        if name not in DATASETS:
            raise ParamsError(f"{where}: 'allow_standin' names '{name}'; {_nearest(str(name), DATASETS)}")
    if params.epoch_images < params.batch_size:
        raise ParamsError(
            f"{where}: 'epoch_images' ({params.epoch_images}) is less than one batch ({params.batch_size})"
        )
    return params


def read(profile: str, overrides: Mapping | None = None) -> Params:
    """Read ``params/<profile>.yaml`` and check it, with some knobs replaced.

    Raises:
        ParamsError: no such profile, not YAML, or a knob that :func:`check` refuses.
    """
    path = PARAMS_DIR / f"{profile}.yaml"
    known = sorted(p.stem for p in PARAMS_DIR.glob("*.yaml"))
    if profile not in known:
        raise ParamsError(f"no parameter file params/{profile}.yaml; {_nearest(profile, known)}")
    where = f"params/{path.name}"
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ParamsError(f"{where} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ParamsError(f"{where} must hold 'name: value' lines, got {type(values).__name__}")
    params = check({**values, **(overrides or {})}, where)
    if params.profile != profile:
        raise ParamsError(f"{where}: 'profile' must be the file's name, '{profile}', got '{params.profile}'")
    return params


def from_notebook(namespace: Mapping) -> Params:
    """The knobs that a notebook's parameters cell has set: call it with ``globals()``."""
    return check({f.name: namespace[f.name] for f in fields(Params) if f.name in namespace}, "the parameters cell")
