"""Trained networks and measurements on request: made once, then read from the cache under ``results/``."""

import contextlib
import functools
import json
import os
import platform
import secrets
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from timeit import timeit

import joblib
import torch
from torch.utils.flop_counter import FlopCounterMode

from weightsum_lib.core import models
from weightsum_lib.study import data, pool, store, train
from weightsum_lib.study.config import RunConfig, build, pick_device, pick_precision
from weightsum_lib.study.params import DATASETS, Params, check
from weightsum_lib.study.train import Run

_MOST_AT_ONCE, _WORKER = 4, 3 << 30  # bytes of a worker where networks have full width, else half; all else: two GiB
_LOADED = 1 << 28  # bytes of networks that a process keeps in memory


def run_content(config: RunConfig, digests: Mapping[str, str], device: str) -> dict:
    """What a run is cached under: all that it uses and no more.

    Of the configuration that is what the code which the run reaches reads; a new switch at its default, whose code
    isn't reached, changes no key. Further the images, the kind of device, torch's minor version, and that code.

    Args:
        config: the run.
        digests: of the training images, by dataset (:attr:`weightsum_lib.Dataset.training_digest`).
        device: "cpu" or "cuda".
    """
    # where its code begins: what it looks up by name, its architecture for example, is a root as well
    roots = ["study.train:train", "study.config:RunConfig"]
    roots += [f"core.models:{config.arch}", f"core.losses:{config.method.third}"]
    roots += [f"study.train:{hook.__name__}" for hooks in train.hooks(config.method).values() for hook in hooks]
    read, values = store.attributes(*roots), asdict(config)
    method = values.pop("method")
    return {
        "config": {name: value for name, value in values.items() if name in read},
        "method": {name: value for name, value in method.items() if name in read},
        "data": digests,
        "device": device,
        "versions": {name: version(name).split("+")[0].rpartition(".")[0] for name in ("torch", "torchvision")},
        "code": store.code_digest(*roots),
    }


@functools.cache
def _flop(arch: str, in_channels: int, width: float) -> float:
    """FLOP of a forward and a backward pass of one image through a network."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        getattr(models, arch)(in_channels, width=width)(torch.empty(2, in_channels, 32, 32)).sum().backward()
    return counter.get_total_flops() / 2


def work(config: RunConfig) -> float:
    """FLOP of a whole run, counted: its passes through the networks, and through their sum, which keys make wider."""
    m, flop = config.method, functools.partial(_flop, config.arch, config.in_channels)
    passes, of_sum = 1, 0.0
    if m.protocol == "joint":
        passes = 2 + 2 * bool(m.quiet or m.owner_statistics) + 2 * (m.quiet_also != "nothing")
        wide = min(2 * m.network_width, m.sum_width) if m.keys != "none" else m.network_width
        of_sum = (1 + m.symmetric + m.mixed_batch) * flop(config.width * wide) * (not m.owner_statistics)
    own = passes * flop(config.width * m.network_width)
    return config.trained_epochs * config.epoch_images * (own + of_sum)


@dataclass(frozen=True, eq=False)
class Measurement:
    """What is measured of finished runs; the value is JSON-able.

    Attributes:
        function: of a module, without arguments or a :func:`functools.partial` of one.
        configs: the runs that it measures.
        settings: what else the value depends on; ``settings["data"]`` names the datasets that it reads.
        roots: definitions that ``function`` looks up by name (:func:`weightsum_lib.study.store.reached`).
    """

    function: Callable
    configs: Sequence[RunConfig]
    settings: dict
    roots: Sequence[str] = ()


class Study:
    """The datasets and the trained networks of one profile.

    Args:
        params: the profile's knobs.

    >>> study = Study(params.read("smoke"))                       # doctest: +SKIP
    >>> run = study.run(study.config("joint ce", "mnist", "cifar10"))  # doctest: +SKIP
    """

    def __init__(self, params: Params):
        self.params = params
        self.device = pick_device(params.device)
        self.precision = pick_precision(self.device, params.precision)
        widest = max(method.network_width for method in params.methods.values())  # narrower than the profile in some
        self._worker = int(_WORKER * max(0.5, params.width * min(1, widest)))
        self.commit = store.commit()  # now: the code that runs was imported just before
        # relative folders are the repository's, wherever the notebook runs
        self.results = store.ROOT / params.results_dir
        self.data_dir = str(store.ROOT / params.data_dir) if params.data_dir else ""
        self.cluster = os.environ.get(pool.CLUSTER_VARIABLE, "")
        self._datasets: dict[str, data.Dataset] = {}
        self._names: dict[RunConfig, str] = {}
        self._loaded: OrderedDict[str, Run] = OrderedDict()
        self._used: set[RunConfig] = set()
        self._measuring_seconds: dict[str, float] = {}
        self._step_seconds: dict[RunConfig, float] = {}

    def __reduce__(self):  # what travels to a worker is the parameters; there a study is kept
        return _study_of_worker, (json.dumps(self.params.as_dict()),)

    def dataset(self, name: str) -> data.Dataset:
        """A dataset, or a task made from some (:func:`weightsum_lib.study.data.variant`), on the study's device.

        ``svhn stand-in`` is the synthetic stand-in for one, whether that is there or not.
        """
        if name not in self._datasets:
            p, known, folder = self.params, name.removesuffix(" stand-in"), str(self.results / "standins")
            if known in DATASETS:
                source, allowed = ("", [known]) if known != name else (self.data_dir, p.allow_standin)
                made = data.load(known, source, allowed, p.train_images, p.test_images, folder)
                made = replace(made, name=name)
            else:
                made = data.variant(name, self.dataset)
            self._datasets[name] = made.to(self.device)
        return self._datasets[name]

    def config(self, method: str, main: str, support: str = "", seed: int = 0, start: str = "random") -> RunConfig:
        """The run behind one row of the report.

        Args:
            method: a label of ``params.methods``.
            main: dataset of the main network.
            support: dataset of the support network (joint), or of the network added before fine-tuning (sequential).
            seed: number of the repetition.
            start: for ``sequential``, what is fine-tuned: "sum", "main" or "random".
        """
        p, m = self.params, self.params.method(method)
        shared = ("arch", "in_channels", "width", "dropout", "batch_size", "learning_rate", "weight_decay")
        config = RunConfig(m.trained(), main, seed=seed, precision=self.precision, **{k: getattr(p, k) for k in shared})
        # one network on two tasks sees as many images of each as two networks do
        config = replace(config, epochs=p.epochs * m.longer, epoch_images=p.epoch_images * (1 + main.count("+")))
        if m.protocol == "joint":
            permuted_ramp = p.permuted_ramp if m.permuted_support else 0.0
            return replace(config, support=support, third_ramp=p.third_ramp, permuted_ramp=permuted_ramp)
        if m.protocol == "sequential":
            return replace(config, support=support, start=start, finetune_epochs=p.finetune_epochs)
        return config

    def alone(self, config: RunConfig) -> RunConfig:
        """The independent run of a sequential run's main task."""
        method = replace(config.method, protocol="independent")
        return replace(config, method=method, support="", start="random", finetune_epochs=0)

    def parents(self, config: RunConfig) -> list[RunConfig]:
        """The independent runs that a sequential run starts from."""
        starts = {"random": [], "main": [config.main], "sum": [config.main, config.support]}
        return [replace(self.alone(config), main=name) for name in starts[config.start]]

    def content(self, config: RunConfig) -> dict:
        """The :func:`run_content` of a run here."""
        digests = {name: self.dataset(name).training_digest for name in (config.main, config.support) if name}
        return run_content(config, digests, self.device.type)

    def with_parents(self, configs: Sequence[RunConfig]) -> list[RunConfig]:
        """Some runs, and before each those that it starts from."""
        return list(dict.fromkeys(c for config in configs for c in (*self.parents(config), config)))

    def folder(self, config: RunConfig) -> Path:
        """Where a run is kept, under the digest of its content."""
        if config not in self._names:
            self._names[config] = store.content_key(self.content(config))
        return self.results / "runs" / self._names[config]

    def run(self, config: RunConfig) -> Run:
        """The finished run: from the cache, or trained now (see :meth:`train_all`)."""
        self.train_all([config])
        return self._load(config)

    def train_all(self, configs: Sequence[RunConfig]) -> None:
        """Finish several runs, with an estimate of the time left for all of them.

        One process trains at a time; a killed one goes on after the last finished epoch of each run.
        ``networks_at_once`` processes share the cores, one thread each, so that on a CPU how many they are changes no
        result, or a GPU; so do the workers of a cluster. A run starts as soon as its parents are finished.
        """
        queue = self.with_parents(configs)
        self._used.update(configs)
        missing = [c for c in queue if self.is_missing(c)]
        for config in set(queue).difference(missing):  # what a process left that was killed at the very end
            (self.folder(config) / "checkpoint.safetensors").unlink(missing_ok=True)
        if missing:
            then = "then what is still missing is trained here"
            with store.alone(self.results / "training.lock", lambda line: pool.report_progress(f"{line}; {then}")):
                self._train([c for c in missing if self.is_missing(c)])

    def is_missing(self, config: RunConfig) -> bool:
        """Whether a run is not finished yet."""
        return store.read_sealed(self.folder(config) / "run.json") is None

    def _train(self, missing: Sequence[RunConfig]) -> None:
        missing = sorted(missing, key=lambda config: (config.seed, -work(config)))  # of a seed the longest first
        numbers = {config: number for number, config in enumerate(missing, start=1)}
        with tempfile.NamedTemporaryFile() as done, self._workers(len(missing)) as (workers, mark, shared):
            say = workers.hear(functools.partial(pool.say_epoch, sum(map(work, missing)), done.name, time.time()))

            def job(config):
                epochs, about = config.trained_epochs, f"run {numbers[config]}/{len(missing)} {config.describe()}"
                said = functools.partial(say, {"run": about, "epochs": epochs, "work": work(config) / epochs})
                folders = map(self.folder, [] if shared else self.parents(config))
                parents = {folder.name: store.packed(folder) for folder in folders}
                same = self.same(self.content(config))
                call = functools.partial(_train_run, self, config, same, said, mark, parents)
                return self.folder(config).name, call, work(config)

            for config, files in workers.each(missing, job, self.parents):
                store.unpack(self.folder(config), files)

    @contextlib.contextmanager
    def _workers(self, jobs: int, networks: int = 2) -> Iterator[tuple[pool.Pool, str, bool]]:
        """Where so many jobs are done; a mark in the cache of runs, and whether all workers see it there.

        The most networks that a job sums decide how many jobs have room.
        """
        mark, resources = secrets.token_hex(8), {"GPU": 1} if self.device.type == "cuda" else None
        store.write_json(self.results / "marks" / mark, mark)
        try:
            with pool.opened(min(jobs, self.at_once(networks)), self.cluster, resources) as workers:
                seen = workers.everywhere(functools.partial(_sees, self, mark))
                yield workers, mark, all(each is True for each in seen)
        finally:
            (self.results / "marks" / mark).unlink(missing_ok=True)

    def same(self, content: dict) -> dict:
        """What has to be equal wherever something is trained or measured: its content, versions, and precision."""
        return content | {"versions": _versions(), "precision": self.precision}

    def hours(self, config: RunConfig) -> float:
        """How long a run takes here, from a step that is measured; in one thread, with nothing beside it."""
        joint = config.method.protocol == "joint"
        alike = replace(config if joint else self.alone(config), main="mnist", support="cifar10" * joint, seed=0)
        alike = replace(alike, epochs=1, epoch_images=0)
        if alike not in self._step_seconds:
            tasks = map(self.dataset, ("mnist", "cifar10"))  # validation is not what is measured
            few = {d.name: replace(d, val_images=d.val_images[:100], val_labels=d.val_labels[:100]) for d in tasks}
            runs = [replace(alike, epoch_images=steps * config.batch_size) for steps in (1, 1, 4)]  # the first is slow
            with _one_thread():
                _, one, four = [timeit(functools.partial(train.train, run, few), number=1) for run in runs]
            self._step_seconds[alike] = max(0.0, four - one) / 3
        steps = config.trained_epochs * (config.epoch_images // config.batch_size)
        return self._step_seconds[alike] * steps / 3600

    def at_once(self, networks: int = 2) -> int:
        """How many pairs are trained at once, or sums of so many networks measured: of each the images, through all."""
        worker = self._worker * max(1, networks**2 // 9)  # 8 networks of `evening` took 10 GiB
        fit = max(1, (pool.memory() - (2 << 30)) // worker) if self.device.type == "cpu" else 1
        return min(joblib.cpu_count(), self.params.networks_at_once or min(_MOST_AT_ONCE, fit))

    def notebooks_at_once(self) -> int:
        """How many notebooks run at once, each with processes of its own: on a CPU two, as memory and knobs allow."""
        most = 1 if self.cluster or self.device.type != "cpu" else self.params.networks_at_once or 2
        return max(1, min(2, most, joblib.cpu_count(), pool.memory() // ((2 << 30) + self.at_once() * self._worker)))

    def train_here(self, config: RunConfig, on_epoch: Callable[[dict], None] = lambda row: None) -> None:
        """Train a run whose parents are finished, in this process and one thread, and keep it in its folder."""
        folder = self.folder(config)
        for left in folder.glob(".*"):  # by a process that was killed while it wrote
            left.unlink()
        datasets = {name: self.dataset(name) for name in (config.main, config.support) if name}
        parents = [self._load(c).networks["main"] for c in self.parents(config)]
        checkpoint = folder / "checkpoint.safetensors"
        with _one_thread():
            run = train.train(config, datasets, start=parents, checkpoint=checkpoint, on_epoch=on_epoch)
        tensors = {f"{r}/{k}": v for r, n in run.networks.items() for k, v in n.state_dict().items()}
        store.write_tensors(folder / "networks.safetensors", tensors, folder.name)
        content = {"config": asdict(config), "history": run.history}
        content["data"] = {name: dataset.describe() for name, dataset in datasets.items()}
        content["made_with"] = _versions() | {"commit": self.commit, "device": self.device_name()}
        store.write_sealed(folder / "run.json", content)
        checkpoint.unlink(missing_ok=True)

    @torch.no_grad()
    def _load(self, config: RunConfig) -> Run:
        folder = self.folder(config)
        if folder.name not in self._loaded:
            content, name = store.read_sealed(folder / "run.json"), folder / "networks.safetensors"
            found, about = store.read_tensors(name) or ({}, None)
            networks = {role: build(config, role).to(self.device).eval() for role in config.roles}
            expected = {f"{r}/{k}": t for r, network in networks.items() for k, t in network.state_dict().items()}
            if about != folder.name or not train.alike(found, expected):
                raise RuntimeError(f"{name} is damaged, missing or another run's; delete {folder} to train it again")
            for key, tensor in expected.items():
                tensor.copy_(found[key])
            self._loaded[folder.name] = Run(config, networks, content["history"])
            while len(self._loaded) > 1 and sum(map(_bytes_of, self._loaded.values())) > _LOADED:
                self._loaded.popitem(last=False)
        self._loaded.move_to_end(folder.name)
        return self._loaded[folder.name]

    def content_of(self, m: Measurement) -> dict:
        """What a measurement is cached under: the runs, settings, data and code that it depends on."""
        inner = getattr(m.function, "func", m.function)
        return {
            "what": inner.__name__,
            "runs": [self.folder(config).name for config in m.configs],
            "settings": {**m.settings, "calibration_images": self.params.calibration_images},
            "data": {name: self.dataset(name).digest for name in sorted(m.settings["data"])},
            "code": store.code_digest(f"{inner.__module__.partition('.')[2]}:{inner.__name__}", *m.roots),
        }

    def measured(self, wanted: Sequence[Measurement]) -> list:
        """The values of measurements, each computed once for the same content; their runs are trained first.

        Several are computed by processes that share the cores, one thread each, or by workers of a cluster where they
        share the cache of runs; else this process does it.
        """
        self.train_all([config for m in wanted for config in m.configs])
        contents = [self.content_of(m) for m in wanted]
        paths = [self.results / "measurements" / f"{store.content_key(content)}.json" for content in contents]
        missing = {path: i for i, path in enumerate(paths) if store.read_sealed(path) is None}

        def job(path):
            content, one = contents[missing[path]], wanted[missing[path]]
            return f"measure-{path.stem}", functools.partial(_measure, self, one, self.same(content)), 0

        if missing:
            most = max(len(wanted[i].configs) for i in missing.values())
            with self._workers(len(missing), most) as (workers, _, shared):
                for number, (path, value) in enumerate((workers if shared else pool.Pool()).each(missing, job), 1):
                    store.write_sealed(path, {"key": contents[missing[path]], **value})
                    if number % 20 == 0:  # it may take minutes
                        pool.report_progress(f"measured {number} of {len(missing)}")
        found = [store.read_sealed(path) for path in paths]
        self._measuring_seconds |= {path.stem: content["seconds"] for path, content in zip(paths, found, strict=True)}
        return [content["value"] for content in found]

    def describe_data(self) -> dict[str, dict]:
        """What was read so far, by dataset (:meth:`weightsum_lib.Dataset.describe`)."""
        return {name: d.describe() for name, d in sorted(self._datasets.items()) if name in DATASETS}

    def device_name(self) -> str:
        """What it computes on."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU, a thread a network"

    def provenance(self) -> dict:
        """What made a result: parameters, data, device, versions, commit, and the seconds that it took."""
        histories = {f.name: store.read_sealed(f / "run.json")["history"] for f in map(self.folder, self._used)}
        knobs = self.params.as_dict()  # where this machine keeps its files is nobody's business
        folders = {k: os.path.basename(v) for k, v in knobs.items() if k.endswith("_dir") and os.path.isabs(v)}
        made = {"params": knobs | folders, "data": self.describe_data(), "device": self.device_name()}
        made |= {"precision": self.precision, "versions": _versions(), "commit": self.commit}
        made["training_seconds"] = {name: sum(row["seconds"] for row in rows) for name, rows in histories.items()}
        return made | {"measuring_seconds": self._measuring_seconds}


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{p: version(p) for p in ("torch", "torchvision", "numpy")}}


def _bytes_of(run: Run) -> int:
    return sum(t.nbytes for network in run.networks.values() for t in network.state_dict().values())


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Torch computes with one thread meanwhile: a network's bits never depend on how many cores there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@functools.lru_cache(maxsize=1)
def _study_of_worker(params: str) -> Study:
    """A worker's study, kept so that it reads the datasets once; they don't travel. It computes in one thread."""
    torch.set_num_threads(1)
    study = Study(check(json.loads(params), "the parameters of a worker"))
    study.cluster = ""
    return study


def _sees(study: Study, mark: str) -> bool:
    return store.read_json(study.results / "marks" / mark) == mark


def _refuse(wanted: dict, here: dict) -> None:
    """Raise RuntimeError where a worker would train or measure something else than it is asked for."""
    if other := [name for name in wanted if wanted[name] != here[name]]:
        told = "; ".join(f"{name}: {here[name]} instead of {wanted[name]}" for name in other)
        what = f"the worker {platform.node()}, process {os.getpid()}, has other {', '.join(other)} than who asks it"
        why = "weightsum_lib was edited while it ran, or is another there: start it again with the same"
        raise RuntimeError(f"{what} ({told}); {why}")


def _train_run(
    study: Study, config: RunConfig, same: dict, said: Callable, mark: str, parents: Mapping[str, Mapping[str, bytes]]
) -> dict[str, bytes]:
    """Train a run, whatever process this is; its files, where who asks for it has another cache, known by its mark."""
    _refuse(same, study.same(study.content(config)))
    folder = study.folder(config)
    for name, files in parents.items():
        store.unpack(folder.with_name(name), files)
    with store.lock(study.results / "locks" / folder.name):  # a worker that nobody waits for any more may still train
        if study.is_missing(config):
            study.train_here(config, said)
    return {} if _sees(study, mark) else store.packed(folder)


def _measure(study: Study, wanted: Measurement, same: dict) -> dict:
    """Compute a measurement of finished runs, whatever process this is: its ``value`` and ``seconds``."""
    _refuse(same, study.same(study.content_of(wanted)))
    if any(map(study.is_missing, wanted.configs)):
        raise RuntimeError(f"the worker {platform.node()} doesn't share {study.results}, which has the runs to measure")
    with _one_thread():
        started = time.process_time()  # of a core: others may use it meanwhile
        return {"value": wanted.function(), "seconds": time.process_time() - started}  # in this order
