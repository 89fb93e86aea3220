"""Trained networks and measurements on request: made once, then read from the cache under ``results/``."""

import contextlib
import functools
import json
import os
import platform
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import joblib
import torch
from filelock import Timeout

from weightsum_lib.study import data, store, train
from weightsum_lib.study.config import RunConfig, build
from weightsum_lib.study.params import DATASETS, Params, ParamsError, check
from weightsum_lib.study.train import Run

_MOST_AT_ONCE = 4  # a worker takes about a gigabyte
_LOADED = 24  # runs whose networks are kept in memory
PROGRESS_VARIABLE = "WEIGHTSUM_PROGRESS"  # a file to which progress lines go, so that a notebook stays clean


def report_progress(line: str, path: str | None = None) -> None:
    """Say one line to whoever runs the study: into the runner's file, else on standard error."""
    path = path or os.environ.get(PROGRESS_VARIABLE)
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
    else:
        print(line, file=sys.stderr, flush=True)


def pick_device(name: str) -> torch.device:
    """The device of a profile: "auto" is CUDA where there is one.

    Raises:
        ParamsError: CUDA is asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ParamsError(
            "device 'cuda' is asked for, but torch sees no GPU here. Use PROFILE=quick, or DEVICE=cpu to insist"
        )
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def pick_precision(device: torch.device, wanted: str = "auto") -> str:
    """ "bfloat16" where the hardware multiplies it natively, else "float32".

    Raises:
        ParamsError: bfloat16 is ``wanted`` and the hardware does not multiply it.
    """
    if wanted == "float32":
        return wanted
    cpu = getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16")
    has = torch.cuda.is_bf16_supported() if device.type == "cuda" else cpu
    if wanted == "bfloat16" and not has:
        raise ParamsError("precision 'bfloat16' is asked for, which this processor does not multiply; say 'auto'")
    return "bfloat16" if has else "float32"


def code_roots(config: RunConfig) -> list[str]:
    """Where the code of a run begins: what it looks up by name, its architecture for example, is named here."""
    functions = [f for of_kind in train.hooks(config.method).values() for f in of_kind]
    named = [f"core.models:{config.arch}", f"core.losses:{config.method.third}"]
    return ["study.train:train", "study.config:RunConfig", *named, *(f"study.train:{f.__name__}" for f in functions)]


def run_key(config: RunConfig, digests: dict[str, str], device: str) -> str:
    """What a run is cached under: all that it uses and no more.

    Of the configuration that is what the code which the run reaches reads; a new switch at its default, whose code
    isn't reached, changes no key. Further the images, the kind of device, torch's minor version, and that code.

    Args:
        config: the run.
        digests: of the training images, by dataset (:attr:`weightsum_lib.Dataset.training_digest`).
        device: "cpu" or "cuda".
    """
    roots, values = code_roots(config), asdict(config)
    read, method = store.attributes(*roots), values.pop("method")
    content = {
        "config": {name: value for name, value in values.items() if name in read},
        "method": {name: value for name, value in method.items() if name in read},
        "data": digests,
        "device": device,
        "versions": {name: version(name).split("+")[0].rpartition(".")[0] for name in ("torch", "torchvision")},
        "code": store.code_digest(*roots),
    }
    return store.content_key(content)


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
        self.commit = store.commit()  # now: the code that runs was imported just before
        # relative folders are the repository's, wherever the notebook runs
        self.results = store.ROOT / params.results_dir
        self.data_dir = str(store.ROOT / params.data_dir) if params.data_dir else ""
        self._datasets: dict[str, data.Dataset] = {}
        self._loaded: OrderedDict[str, Run] = OrderedDict()
        self._used: set[RunConfig] = set()
        self._measuring_seconds: dict[str, float] = {}
        self._step_seconds: dict[RunConfig, float] = {}

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
        p, m = self.params, self.params.method(method).trained()
        shared = ("arch", "in_channels", "width", "dropout", "epochs", "batch_size", "learning_rate", "weight_decay")
        config = RunConfig(m, main, seed=seed, precision=self.precision, **{k: getattr(p, k) for k in shared})
        # one network on two tasks sees as many images of each as two networks do
        config = replace(config, epoch_images=p.epoch_images * (1 + main.count("+")))
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

    def _parents(self, config: RunConfig) -> list[RunConfig]:
        """The independent runs that a sequential run starts from."""
        if config.method.protocol != "sequential" or config.start == "random":
            return []
        alone = self.alone(config)
        return [alone] + ([replace(alone, main=config.support)] if config.start == "sum" else [])

    def folder(self, config: RunConfig) -> Path:
        """Where a run is kept, under its :func:`run_key`."""
        digests = {name: self.dataset(name).training_digest for name in (config.main, config.support) if name}
        return self.results / "runs" / run_key(config, digests, self.device.type)

    def run(self, config: RunConfig) -> Run:
        """The finished run: from the cache, or trained now (see :meth:`train_all`)."""
        self.train_all([config])
        return self._load(config)

    def train_all(self, configs: Sequence[RunConfig]) -> None:
        """Finish several runs, with an estimate of the time left for all of them.

        One study trains at a time; a killed one goes on after the last finished epoch of each run. On a CPU
        ``networks_at_once`` processes share the cores, one thread each, so that how many they are changes no result.
        """
        queue = list(dict.fromkeys(c for config in configs for c in (*self._parents(config), config)))
        self._used.update(configs)
        if any(map(self.is_missing, queue)):
            with _alone(self.results / "training.lock"):
                self._train([c for c in queue if self.is_missing(c)])

    def is_missing(self, config: RunConfig) -> bool:
        """Whether a run is not finished yet."""
        return store.read_sealed(self.folder(config) / "run.json") is None

    def _train(self, missing: Sequence[RunConfig]) -> None:
        done = self.results / "training.done"  # a line an epoch, of whichever process has trained it
        done.unlink(missing_ok=True)
        progress = _Progress(
            len(missing), sum(c.work for c in missing), time.time(), str(done), os.environ.get(PROGRESS_VARIABLE)
        )
        say = {c: functools.partial(progress.epoch, number, c) for number, c in enumerate(missing, start=1)}
        while missing:
            ready = [c for c in missing if not any(map(self.is_missing, self._parents(c)))]
            workers = min(len(ready), self.at_once())
            if workers > 1:
                params = json.dumps(self.params.as_dict())
                jobs = [(store.code_digest(*code_roots(c)), params, c, say[c]) for c in ready]
                joblib.Parallel(n_jobs=workers)(joblib.delayed(_in_worker)(*job) for job in jobs)
            else:
                for config in ready:
                    self.train_here(config, say[config])
            missing = [c for c in missing if self.is_missing(c)]
        done.unlink(missing_ok=True)

    def hours(self, config: RunConfig) -> float:
        """How long a run takes here, from a step that is measured; in one thread, with nothing beside it."""
        joint = config.method.protocol == "joint"
        method = config.method if joint else replace(config.method, protocol="independent")
        alike = replace(config, method=method, main="mnist", support="cifar10" * joint, start="random", seed=0)
        alike = replace(alike, epochs=1, finetune_epochs=0, epoch_images=0)
        if alike not in self._step_seconds:
            few, seconds = {}, []  # validation images, which are not what is measured
            for name in ("mnist", "cifar10"):
                d = self.dataset(name)
                few[name] = replace(d, val_images=d.val_images[:100], val_labels=d.val_labels[:100])
            for steps in (1, 1, 4):  # the first is slow
                started = time.perf_counter()
                with _one_thread():
                    train.train(replace(alike, epoch_images=steps * config.batch_size), few)
                seconds.append(time.perf_counter() - started)
            self._step_seconds[alike] = max(0.0, seconds[2] - seconds[1]) / 3
        steps = config.trained_epochs * (config.epoch_images // config.batch_size)
        return self._step_seconds[alike] * steps / 3600

    def at_once(self) -> int:
        """How many networks are trained at once."""
        if self.device.type != "cpu":
            return 1
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return min(cores, self.params.networks_at_once or _MOST_AT_ONCE)

    def train_here(self, config: RunConfig, on_epoch: Callable[[dict], None] = lambda row: None) -> None:
        """Train a run whose parents are finished, in this process and one thread, and keep it in its folder."""
        folder = self.folder(config)
        for left in folder.glob(".*"):  # by a process that was killed while it wrote
            left.unlink()
        datasets = {name: self.dataset(name) for name in (config.main, config.support) if name}
        parents = [self._load(c).networks["main"] for c in self._parents(config)]
        checkpoint = folder / "checkpoint.safetensors"
        with _one_thread():
            run = train.train(config, datasets, start=parents, checkpoint=checkpoint, on_epoch=on_epoch)
        tensors = {f"{r}/{k}": v for r, n in run.networks.items() for k, v in n.state_dict().items()}
        store.write_tensors(folder / "networks.safetensors", tensors, folder.name)
        content = {
            "config": asdict(config),
            "data": {name: dataset.describe() for name, dataset in datasets.items()},
            "history": run.history,
            "made_with": {**_versions(), "commit": self.commit, "device": self._device_name()},
        }
        store.write_sealed(folder / "run.json", content)
        checkpoint.unlink(missing_ok=True)

    @torch.no_grad()
    def _load(self, config: RunConfig) -> Run:
        folder = self.folder(config)
        if folder.name not in self._loaded:
            content = store.read_sealed(folder / "run.json")
            found, about = store.read_tensors(folder / "networks.safetensors") or ({}, None)
            networks = {role: build(config, role).to(self.device).eval() for role in config.roles}
            expected = {f"{r}/{k}": t for r, network in networks.items() for k, t in network.state_dict().items()}
            if about != folder.name or not train.alike(found, expected):
                name = folder / "networks.safetensors"
                raise RuntimeError(f"{name} is damaged, missing or another run's; delete {folder} to train it again")
            for name, tensor in expected.items():
                tensor.copy_(found[name])
            self._loaded[folder.name] = Run(config, networks, content["history"])
            while len(self._loaded) > _LOADED:
                self._loaded.popitem(last=False)
        self._loaded.move_to_end(folder.name)
        return self._loaded[folder.name]

    def measured(self, function: Callable, configs: Sequence[RunConfig], settings: dict, *roots: str):
        """A JSON-able measurement of finished runs, computed once for the same runs, settings, data and code.

        Args:
            function: a function of a module, called without arguments or a :func:`functools.partial` of one.
            configs: the runs that it measures.
            settings: what else the value depends on; ``settings["data"]`` names the datasets that it reads.
            roots: definitions that ``function`` looks up by name (:func:`weightsum_lib.study.store.reached`).
        """
        self.train_all(configs)
        p, inner = self.params, getattr(function, "func", function)
        key = {
            "what": inner.__name__,
            "runs": [self.folder(config).name for config in configs],
            "settings": {**settings, "calibration_images": p.calibration_images},
            "data": {name: self.dataset(name).describe() for name in sorted(settings["data"])},
            "code": store.code_digest(f"{inner.__module__.partition('.')[2]}:{inner.__name__}", *roots),
        }
        path = self.results / "measurements" / f"{store.content_key(key)}.json"
        content = store.read_sealed(path)
        if content is None:
            started = time.perf_counter()
            content = {"key": key, "value": function(), "seconds": time.perf_counter() - started}
            store.write_sealed(path, content)
        self._measuring_seconds[path.stem] = content["seconds"]
        return content["value"]

    def describe_data(self) -> dict[str, dict]:
        """What was read so far, by dataset (:meth:`weightsum_lib.Dataset.describe`)."""
        return {name: d.describe() for name, d in sorted(self._datasets.items()) if name in DATASETS}

    def _device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU, a thread a network"

    def provenance(self) -> dict:
        """What made a result: parameters, data, device, versions, commit, and the seconds that it took."""
        histories = {f.name: store.read_sealed(f / "run.json")["history"] for f in map(self.folder, self._used)}
        return {
            "params": self.params.as_dict(),
            "data": self.describe_data(),
            "device": self._device_name(),
            "precision": self.precision,
            "versions": _versions(),
            "commit": self.commit,
            "training_seconds": {name: sum(row["seconds"] for row in rows) for name, rows in histories.items()},
            "measuring_seconds": sum(self._measuring_seconds.values()),
        }


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{p: version(p) for p in ("torch", "torchvision", "numpy")}}


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Torch computes with one thread meanwhile: a network's bits never depend on how many cores there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold a lock between processes; say so if another one holds it."""
    lock = store.lock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        report_progress("another process trains networks of this study; waiting until it has ended")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@functools.lru_cache(maxsize=1)
def _study_of_worker(params: str) -> Study:
    """A worker's study, kept so that it reads the datasets once; they don't travel."""
    return Study(check(json.loads(params), "the parameters of a worker"))


@functools.cache
def _end_with_the_parent() -> None:
    """Let this process end soon after the one that started it, however that ended."""

    def watch(parent: int = os.getppid()):
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _in_worker(code: str, params: str, config: RunConfig, on_epoch: Callable[[dict], None]) -> None:
    """Train one of the runs that share the cores, in a process of its own."""
    _end_with_the_parent()
    if code != store.code_digest(*code_roots(config)):
        raise RuntimeError("weightsum_lib was edited while it ran, so its workers have other code; start it again")
    _study_of_worker(params).train_here(config, on_epoch)


@dataclass(frozen=True)
class _Progress:
    """A line an epoch for the terminal: where a queue of runs stands, and how long the rest will take."""

    runs: int
    work: float
    started: float
    done: str
    path: str | None

    def epoch(self, number: int, config: RunConfig, row: dict) -> None:
        """An epoch has ended, in this process."""
        with open(self.done, "a+", encoding="utf-8") as file:
            file.write(f"{config.work / config.trained_epochs}\n")
            file.flush()
            file.seek(0)
            done = sum(map(float, file))
        left = (time.time() - self.started) / done * max(self.work - done, 0)
        losses = " ".join(f"{k.removeprefix('loss_')} {v:.3f}" for k, v in row.items() if k.startswith("loss_"))
        values = " ".join(f"{k.removeprefix('val_')} {v:.1f}" for k, v in row.items() if k.startswith("val_"))
        report_progress(
            f"run {number}/{self.runs} {config.describe()} | epoch {row['epoch']}/{config.trained_epochs} "
            f"{row['seconds']:.0f} s | loss {losses} | validation % {values} | about {left / 60:.1f} min left",
            self.path,
        )
