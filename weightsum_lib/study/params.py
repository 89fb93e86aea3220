"""The knobs of the study: what they are called, what they may be, and where they come from (``params/*.yaml``).

A profile's file gives every knob of :class:`Params`. Its rows are recipes by name, each spelt once in
``params/recipes.yaml``; a recipe sets switches of :class:`Method`.
"""

import ast
import contextlib
import difflib
import os
import re
import reprlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path

import yaml

DATASETS = {"mnist": "MNIST", "cifar10": "CIFAR-10", "svhn": "SVHN"}  # name: title
BASELINE, TRAINED = "independent", "joint ce"  # the rows that the findings compare
DISJOINT, RANDOM = "disjoint keys", "random keys"  # and the networks that are made to be summed with strangers
ALONE = "keys alone"  # and those of their size that are trained plainly
SHARED = "shared start"  # a row that the report tells of where a profile has it
CHOICE = 100  # the first seed of networks that choices are made with
_NAMED = ("protocol", "third", "keys", "start", "network_width", "sum_width")  # what a recipe's name stands for
_OF_ROWS = ("rows", "parts", "merged")  # knobs that hold a recipe for each label
PARAMS_DIR = Path(__file__).parents[2] / "params"
CLAIMS = PARAMS_DIR / "claims.yaml"
STANDING = ("literal", "day", "residual", "deep")  # profiles whose pages stand in every report
_OF_DENSE, _OF_KEYED = (BASELINE, TRAINED), (BASELINE, ALONE, DISJOINT, RANDOM)
_PAGES = {"01": _OF_DENSE, "02": _OF_DENSE, "03": (*_OF_KEYED, TRAINED), "04": _OF_KEYED, "05": ()}  # and their rows
_TAKEN = ("recipes", "claims", "published", "runs", "measurements", "standins")  # no names for a profile
_LABEL = re.compile(r"[^\W_](?:[\w ,.+/×=()-]{0,62}[\w.+)])?")


class ParamsError(ValueError):
    """A parameter that can't be used; the message names the key, the file, and what was expected."""


def _from(low, high):
    return lambda value: low <= value <= high, f"from {low} to {high}"


def _above(low, high):
    return lambda value: low < value <= high, f"more than {low}, at most {high}"


def _one_of(*names):
    return names.__contains__, " or ".join(map(repr, names))


def _is_folder(folder: str) -> bool:
    return folder.isprintable() and len(folder.encode()) < 256 and not folder.startswith("~")


def _is_inside(folder: str) -> bool:
    return _is_folder(folder) and os.path.normpath(folder).split(os.sep)[0] not in (".", "..")


_ALL, _ALONE_OR_JOINT, _JOINT = ("independent", "sequential", "joint"), ("independent", "joint"), ("joint",)
_THIRDS = ("none", "ce", "signed_gap", "loss_gap", "distill", "logit_difference")
_NO_TASK = ("nothing", "noise", "patches", "blends", "any")
_ANY, _SHARE = (lambda value: True, ""), _from(0, 1)


def _knob(help: str, rule=_ANY, default=MISSING, having=_JOINT, trained=None):
    """A field that is checked. Of a method: the protocols ``having`` this switch, and those of them in whose training
    it has a part (``trained``; by default all)."""
    about = {"help": help, "rule": rule, "having": having, "trained": having if trained is None else trained}
    return field(default=default, metadata=about)


@dataclass(frozen=True)
class Method:
    """One row of the report: a set of independent switches.

    Both widths are factors on the profile's ``width``, in every row: ``network_width`` is that of each network,
    ``sum_width`` that of the network in which they are summed, which is wider where networks have keys. Trained
    alone, a network doesn't know its key: it is the dense network of its size.
    """

    protocol: str = _knob("how the pair is trained", _one_of(*_ALL), "independent", _ALL)
    third: str = _knob("reading of the third term", _one_of(*_THIRDS), "none")
    third_weight: float = _knob("factor on the third term", _above(0, 1000), 1.0)
    symmetric: bool = _knob("the sum must keep the support task too", _ANY, False)
    mixed_batch: bool = _knob("the sum must solve both tasks on one batch of both", _ANY, False)
    symmetric_to: str = _knob("whom that term teaches", _one_of("both", "main"), "both")
    quiet: float = _knob("factor on how loudly each network answers the other's images", _from(0, 1000), 0.0)
    quiet_also: str = _knob("on what images of no task, too", _one_of(*_NO_TASK), "nothing")
    label_smoothing: float = _knob("share of a target spread over all classes", _SHARE, 0.0, _ALONE_OR_JOINT)
    equal_norms: bool = _knob("both networks' layers are held at equal norms", _ANY, False)
    pruned: bool = _knob("all but the largest tenth of each hidden layer's weights are zero", _ANY, False)
    superposed: bool = _knob("both networks are one set of weights, in one of them under random signs", _ANY, False)
    keys: str = _knob("a network's channels", _one_of("none", "random", "disjoint"), "none", _ALONE_OR_JOINT, _JOINT)
    network_width: float = _knob("factor on the width of each network", _from(1 / 64, 64), 1.0, _ALONE_OR_JOINT)
    sum_width: float = _knob("factor on the width of their sum", _above(0, 64), 1.0, _ALONE_OR_JOINT, _JOINT)
    permuted_support: float = _knob("share of the steps that meet the support network elsewhere", _SHARE, 0.0)
    permuted_main: bool = _knob("in those steps the main network lies elsewhere too", _ANY, False)
    owner_statistics: bool = _knob("in the sum each channel has its owner's batch-norm statistics", _ANY, False)
    centered_scale: bool = _knob("batch norm stores its scale's deviation from 1", _ANY, False, _ALONE_OR_JOINT)
    start: str = _knob("where networks start", _one_of("random", "shared"), "random", _ALONE_OR_JOINT)
    longer: int = _knob("factor on the epochs", _from(1, 1000), 1, _ALONE_OR_JOINT, ())
    seeds: int = _knob("at most so many seeds", _from(1, 1000), 1000, _ALL, ())

    def trained(self) -> "Method":
        """What of it a training run depends on: every other switch has its default."""
        return replace(self, **{f.name: f.default for f in fields(self) if self.protocol not in f.metadata["trained"]})

    def switches(self) -> dict:
        """The protocol, and the switches that are not at their default: what makes the method again."""
        return {f.name: v for f in fields(self) if (v := getattr(self, f.name)) != f.default or f.name == "protocol"}

    def in_words(self) -> list[str]:
        """The protocol, and each of the :meth:`switches` but the number of seeds, as a reader is told."""
        said = {k: f"{k} {v}" for k, v in self.switches().items() if k != "seeds"}
        return [self.protocol, *(k if getattr(self, k) is True else v for k, v in said.items() if k != "protocol")]


@dataclass(frozen=True)
class Params:
    """All knobs of one profile; ``rows`` and ``parts`` hold a :class:`Method` for each label."""

    profile: str = _knob("name of the profile", (re.compile(r"[\w-]{1,40}").fullmatch, "letters, digits, _ and -"))
    arch: str = _knob("architecture", _one_of("vgg8", "vgg16", "resnet20"))
    in_channels: int = _knob("channels of the input, 1 (grey) or 3 (colour)", _one_of(1, 3))
    width: float = _knob("factor on the channels and hidden units", _from(1 / 64, 8))
    dropout: float = _knob("probability to drop a hidden unit", (lambda v: 0 <= v < 1, "at least 0 and less than 1"))
    train_images: int = _knob("images of a set at most; a tenth validates", _from(100, 10_000_000))
    test_images: int = _knob("test images of a set at most", _from(20, 10_000_000))
    calibration_images: int = _knob("images that set batch-norm statistics", _from(20, 1_000_000))
    epoch_images: int = _knob("images that each network sees in an epoch", _from(1, 100_000_000))
    epochs: int = _knob("epochs of training", _from(1, 10_000))
    finetune_epochs: int = _knob("epochs of fine-tuning in `sequential`", _from(1, 10_000))
    batch_size: int = _knob("images in a step, per task", _from(2, 100_000))
    learning_rate: float = _knob("peak learning rate", _above(0, 100))
    weight_decay: float = _knob("L2 penalty of SGD", _from(0, 100))
    third_ramp: float = _knob("share of the steps in which the third term grows", _SHARE)
    permuted_ramp: float = _knob("share of the steps in which the permuted share grows", _SHARE)
    plane_points: int = _knob("points along a plane's axis", (lambda v: v in range(4, 99, 3), "4, 7, 10, … or 97"))
    seeds: int = _knob("seeds 0, 1, … of each method", _from(1, 1000))
    choice_seeds: int = _knob("seeds 100, 101, … that choices are made with; 0: those of the rows", _from(0, 1000))
    draws: int = _knob("draws of random keys", _from(1, 1000))
    ceiling_seeds: int = _knob("seeds of networks that meet both tasks of task 3; 0: few mergers", _from(0, 1000))
    pages: list = _knob("numbers of its pages, such as 01; none: the whole report")
    rows: dict = _knob("label: recipe of each row of the report")
    parts: dict = _knob("label: recipe of each row that only the page on what transfers has")
    merged: dict = _knob("label: recipe of each row whose networks the page beside others merges")
    halves: list = _knob("datasets whose classes 0-4 and 5-9 are two tasks on that page")
    allow_standin: list = _knob("datasets that may be replaced by the synthetic stand-in")
    data_dir: str = _knob("folder of the prepared datasets; empty: none", (_is_folder, "a path without ~, not long"))
    results_dir: str = _knob("folder of the results", (_is_inside, "a folder in the repository, or an absolute path"))
    device: str = _knob("where to compute", _one_of("auto", "cpu", "cuda"))
    precision: str = _knob("of the forward pass; auto: the processor's", _one_of("auto", "float32", "bfloat16"))
    networks_at_once: int = _knob("networks at once; 0: what cores and memory allow, on a GPU one", _from(0, 1024))

    @property
    def methods(self) -> dict[str, Method]:
        """The rows of the report, those of the page on what transfers, and those beside others, by label."""
        report = self.rows | self.parts
        return report | self.merged | report  # a label of both is the report's, with its seeds

    def method(self, label: str) -> Method:
        """The switches of a row."""
        return self.methods[label]

    def seeds_of(self, label: str) -> range:
        """The seeds of a row: 0, 1, …, as many as the profile and the method allow."""
        return range(min(self.seeds, self.method(label).seeds))

    def has(self, page: str) -> bool:
        """Whether the report has a page, or these of its pages."""
        return page in (self.pages or _PAGES)

    def parts_with(self, keys: str) -> list[str]:
        """The parts whose keys are of a kind."""
        return [label for label in self.parts if self.method(label).keys == keys]

    def choice_seeds_of(self, label: str) -> range:
        """The seeds with which parts are compared, on validation images: where there are any, none of the tables'."""
        return range(CHOICE, CHOICE + min(self.choice_seeds, self.method(label).seeds)) or self.seeds_of(label)

    def twin(self, label: str) -> str | None:
        """The row of dense networks of the same size as a row's, trained alone: what it has to hold its own against.

        Every row of checked parameters has one.
        """
        alone = Method(network_width=self.method(label).network_width)
        return next((twin for twin, method in self.methods.items() if method.trained() == alone), None)

    def as_dict(self) -> dict:
        """All knobs, JSON-able; read again they give equal parameters."""
        return vars(self) | {n: {k: m.switches() for k, m in getattr(self, n).items()} for n in _OF_ROWS}


def slug(label: str) -> str:
    """A row's label as a part of a file's name or a number's key; no two rows of a profile share one."""
    return re.sub(r"\W+", "_", label).casefold()


def nearest(key, known) -> str:
    """What a reader is told of a name that is not known: the one that it may mean, or all that there are."""
    near = difflib.get_close_matches(str(key)[:60], known := list(map(str, known)), n=1, cutoff=0.5)
    return f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}"


def _meant(kind: type, value):
    """What a text such as "3", "5e-4", "1/16" or "true" says, as the type of a knob; else the value as it is."""
    with contextlib.suppress(ValueError, ArithmeticError):
        if kind is float and type(value) in (int, str):
            top, _, bottom = str(value).partition("/")
            return float(top) / float(bottom or 1)
        if kind is int and type(value) is str and value.removeprefix("+") == str(int(value)):  # not 010, 1_000
            return int(value)
        if kind is bool and value in ("true", "false"):
            return value == "true"
    return value


def _make(cls, values: Mapping, where: str):
    """Build a dataclass of knobs from values, or raise ParamsError naming the key, ``where``, and what was expected."""
    known, made = {f.name: f for f in fields(cls)}, {}
    for key in values:
        if key not in known:
            raise ParamsError(f"{where}: unknown parameter '{str(key)[:60]}'; {nearest(key, known)}")
    for name, knob in known.items():
        check, expected = knob.metadata["rule"]
        made[name] = value = _meant(knob.type, values.get(name, knob.default))
        if type(value) is not knob.type or not check(value):
            got = "nothing" if value is MISSING else f"{reprlib.repr(value)} ({type(value).__name__})"
            needed = f"{knob.type.__name__} {expected}".rstrip()
            raise ParamsError(f"{where}: '{name}' ({knob.metadata['help']}) must be {needed}, got {got}")
    return cls(**made)


def _row(label, said, recipes: Mapping, where: str) -> Method:
    """The method of a row: the recipe of its name, with what a parameter file says of it.

    Args:
        label: of the row.
        said: nothing, or a number of seeds, or switches. Switches with a protocol stand alone, without a recipe.
        recipes: by label.
        where: what to call the source in an error.
    """
    if type(label) is not str or not _LABEL.fullmatch(label):
        raise ParamsError(f"{where}: a label is up to 64 letters, digits, spaces, ,.+/×=()- not {reprlib.repr(label)}")
    where, known = f"{where}: method '{label}'", isinstance(recipes.get(label), Mapping)
    switches = {"seeds": said} if type(said) in (int, str) else {} if said is None else said
    if not isinstance(switches, Mapping):
        raise ParamsError(f"{where} must be empty, a number of seeds, or switches, got {reprlib.repr(said)}")
    if not known and "protocol" not in switches:
        raise ParamsError(f"{where}: no 'protocol', and no recipe of that name; {nearest(label, recipes)}")
    own = _make(Method, switches if "protocol" in switches else {**recipes[label], **switches}, where)
    recipe = _make(Method, recipes[label], f"params/recipes.yaml: method '{label}'") if known else own
    for switch in _NAMED:
        if (meant := getattr(recipe, switch)) != (got := getattr(own, switch)):
            raise ParamsError(f"{where}: this name stands for '{switch}' {meant!r}, not {got!r}; choose another")
    return own


def _against_method(p: Params, label: str) -> Iterator[str]:
    """Why a row can't be trained in this profile, or not be judged."""
    m = p.method(label)
    network, total, disjoint = 64 * p.width * m.network_width, 64 * p.width * m.sum_width, m.keys == "disjoint"
    for knob in fields(m):
        if m.protocol not in (having := knob.metadata["having"]) and getattr(m, knob.name) != knob.default:
            yield f"only protocol {_one_of(*having)[1]} has '{knob.name}', not '{m.protocol}'"
    rules = {
        "with 'width' the widths are out of bounds: a network's ≥ 1/64, the sum's ≤ 16": network < 1 or total > 1024,
        "without 'keys' 'network_width' and 'sum_width' are equal": m.keys == "none" and network != total,
        "keys want fewer channels in a network than in the sum": m.keys != "none" and int(network) >= int(total),
        "disjoint keys want room for two networks in the 'sum_width'": disjoint and 2 * network > total,
        "disjoint keys have no 'permuted_support'": disjoint and m.permuted_support,
        "'owner_statistics' wants disjoint keys: one owner a channel": m.owner_statistics and not disjoint,
        "'mixed_batch' wants 'third: none', not 'symmetric'": m.mixed_batch and (m.third != "none" or m.symmetric),
        "'symmetric_to' wants 'symmetric: true'": m.symmetric_to != "both" and not m.symmetric,
        "'permuted_main' wants a 'permuted_support'": m.permuted_main and not m.permuted_support,
        "'superposed' wants no 'keys', no 'third' term and nothing 'pruned'": m.superposed
        and (m.keys != "none" or m.third != "none" or m.pruned),
        "'quiet_also' wants a 'quiet'": m.quiet_also != "nothing" and not m.quiet,
        f"no row with 'network_width' {m.network_width:g} is trained alone, to compare it with": p.twin(label)
        not in (p.rows if label in p.rows else p.methods),
    }
    yield from (why for why, broken in rules.items() if broken)


def _against(p: Params) -> Iterator[str]:
    """Why these parameters can't be used."""
    needed = dict.fromkeys(each for page, rows in _PAGES.items() if p.has(page) for each in rows)
    yield from (f"'rows' lacks '{each}', which the findings compare" for each in needed if each not in p.rows)
    slugs = {}
    for label in p.methods:
        if slugs.setdefault(slug(label), label) != label:
            yield f"the labels '{slugs[slug(label)]}' and '{label}' are one in the names of results; change one"
        yield from (f"method '{label}': {why}" for why in _against_method(p, label))
    for knob, known in (("allow_standin", DATASETS), ("halves", DATASETS), ("pages", _PAGES)):
        for name in (name for name in getattr(p, knob) if name not in list(known)):
            yield f"'{knob}' names {reprlib.repr(name)}; {nearest(name, known)}"
    training = p.train_images - p.train_images // 10
    rules = {
        f"{[*p.rows.keys() & p.parts]} are in 'rows' and in 'parts'; a row has one place": p.rows.keys() & p.parts,
        "the page beside others wants something to halve ('halves')": p.has("05") and not p.halves,
        f"the page beside others wants '{ALONE}' in 'merged'": p.has("05") and ALONE not in p.merged,
        f"'epoch_images' ({p.epoch_images}) is less than one batch ({p.batch_size})": p.epoch_images < p.batch_size,
        f"'arch' {p.arch} has the page beside others alone ('pages')": p.arch == "resnet20" and {*p.pages} != {"05"},
        f"the name '{p.profile}' is taken, 'profile' needs another": p.profile.casefold() in _TAKEN,
        "'calibration_images' is more than nine tenths of 'train_images'": p.calibration_images > training,
    }
    yield from (why for why, broken in rules.items() if broken)


def check(values: Mapping, where: str) -> Params:
    """Make checked parameters from a mapping.

    Args:
        values: knob name to value, every knob of :class:`Params`.
        where: what to call the source in an error, e.g. the file.

    Raises:
        ParamsError: unknown, missing, of the wrong type, or impossible.
    """
    p, recipes = _make(Params, values, where), _read("recipes")
    p = replace(p, **{n: {k: _row(k, v, recipes, where) for k, v in getattr(p, n).items()} for n in _OF_ROWS})
    if why := next(_against(p), None):
        raise ParamsError(f"{where}: {why}")
    return p


class _Yaml(yaml.SafeLoader):
    """YAML without tags and equal keys, in which a plain value is null or text, and the knob knows what a text says.

    So a number is what it looks like, as in YAML 1.2 and not in the 1.1 of PyYAML (010, 1:30, 5e-4, no), which needs
    no further package: Jupyter brings this one.
    """

    yaml_implicit_resolvers = {None: [r for c in "~<" for r in yaml.SafeLoader.yaml_implicit_resolvers[c]]}  # noqa: RUF012

    def compose_node(self, parent, index):
        start, node = self.peek_event(), super().compose_node(parent, index)
        said = [(key.value, value) for key, value in node.value] if isinstance(start, yaml.MappingStartEvent) else []
        if getattr(start, "tag", None):
            raise yaml.YAMLError(f"a tag has no meaning here: {start.tag}\n{start.start_mark}")
        if twice := [name for name, number in Counter(str(name) for name, _ in said).items() if number > 1]:
            raise yaml.YAMLError(f"'{twice[0]}' is given twice in what begins\n{start.start_mark}")
        if any(name == "<<" and not isinstance(value, yaml.MappingNode) for name, value in said):
            raise yaml.YAMLError(f"<< takes one mapping, not several\n{start.start_mark}")  # which double at each level
        return node


def _read(name: str) -> dict:
    """The mapping in ``params/<name>.yaml``: its values are text, None, lists and mappings."""
    try:
        text = (PARAMS_DIR / f"{name}.yaml").read_text(encoding="utf-8")
        if len(text) > 20_000:
            raise ValueError("it has more than 20,000 characters")
        values = yaml.load(text, _Yaml)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ParamsError(f"params/{name}.yaml is not YAML that can be read: {error}") from error
    if not isinstance(values, dict):
        raise ParamsError(f"params/{name}.yaml must hold 'name: value' lines, got {type(values).__name__}")
    return values


def claims() -> dict[str, dict]:
    """What the front page claims, by its words: a ``value`` of the results, and ``at_least`` or ``at_most`` what."""
    return {says: {k: _meant(float, v) for k, v in claim.items()} for says, claim in _read(CLAIMS.stem).items()}


def profiles() -> list[str]:
    """The profiles that have a file."""
    return sorted({path.stem for path in PARAMS_DIR.glob("*.yaml")} - set(_TAKEN))


def read(profile: str, overrides: Mapping | None = None) -> Params:
    """Read ``params/<profile>.yaml`` and check it, with some knobs replaced.

    Raises:
        ParamsError: no such profile, not YAML, or a knob that :func:`check` refuses.
    """
    if profile not in profiles():
        raise ParamsError(f"no parameter file params/{profile}.yaml; {nearest(profile, profiles())}")
    p = check({**_read(profile), **(overrides or {})}, f"params/{profile}.yaml")
    if p.profile != profile:
        raise ParamsError(f"params/{profile}.yaml: 'profile' must be the file's name, '{profile}', got '{p.profile}'")
    return p


def from_notebook(namespace: Mapping) -> Params:
    """The knobs that a notebook's cells have set, over those of the profile's file: call it with ``globals()``.

    Looked at is what was typed, in the order in which it was run: the last cell that assigns ``profile``; the cells
    after it, up to the first that holds more than assignments of plain values (there papermill injects its own); and
    any later cell of plain values with a knob among them, so that each can be changed and run again. Outside IPython
    every knob that the namespace has counts.

    Raises:
        ParamsError: as :func:`read`; a profile without a file needs every knob.
    """
    where, knobs, follows = "the parameters cell", {f.name for f in fields(Params)}, False
    given = {name: namespace[name] for name in knobs & set(namespace) if "In" not in namespace}
    for source in namespace.get("In", ()):
        names, values = _assignments(source)
        if "profile" in names:
            given = values
        elif values and given is not None and (follows or names & knobs):
            given |= values
        follows = values is not None and (follows or "profile" in names)
    if given is None:
        raise ParamsError(f"{where} must hold nothing but assignments of plain values such as epochs = 3")
    profile = given.get("profile")
    return check({**(_read(profile) if profile in profiles() else {}), **given}, where)


def _assignments(source: str) -> tuple[set[str], dict | None]:
    """The names that a cell assigns, and their values if it does nothing else and computes with constants only."""
    try:
        body, values = ast.parse(source).body, {}
        targets = [t for n in body if isinstance(n, ast.Assign | ast.AnnAssign) for t in getattr(n, "targets", [n])]
        names = [n for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)]
        others = {n.id for top in body for n in ast.walk(top) if isinstance(n, ast.Name)} - {n.id for n in names}
        if all(isinstance(n, ast.Assign) for n in body) and others <= {"float"}:  # papermill writes float('inf')
            exec(source, {"float": float}, values)
            return {n.id for n in names}, values
    except (SyntaxError, ArithmeticError, TypeError, ValueError, NameError):  # it failed when it was run, too
        return set(), None
    return {n.id for n in names}, None
