"""Trained networks on request: trained once, then read from the cache under ``results/``."""

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

import joblib
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from weightsum_lib import cache, data
from weightsum_lib.params import DATASETS, Params, ParamsError
from weightsum_lib.train import Run, RunConfig, build, train

# Read when they are imported: what is edited while they run is not what has run.
_TRAINING_CODE = cache.source_digest("train")
_MEASURING_CODE = cache.source_digest("evaluate")
_MOST_AT_ONCE = 4  # a worker takes about a gigabyte
PROGRESS_VARIABLE = "WEIGHTSUM_PROGRESS"  # a file to which progress lines go, so that a notebook stays clean


def report_progress(line: str) -> None:
    """Say one line to whoever runs the study: into the runner's file, else on standard error."""
    path = os.environ.get(PROGRESS_VARIABLE)
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


def pick_precision(device: torch.device) -> str:
    """ "bfloat16" where the hardware multiplies it natively, else "float32"."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    return "bfloat16" if "avx512_bf16" in _cpu_flags() else "float32"


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return set()
    return next((set(line.split()) for line in lines if line.startswith("flags")), set())


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
        self.precision = pick_precision(self.device)
        self.commit = cache.commit()  # now: the code that runs was imported just before
        # relative folders are the repository's, wherever the notebook runs
        self.results = cache.PACKAGE.parent / params.results_dir
        self.data_dir = str(cache.PACKAGE.parent / params.data_dir) if params.data_dir else ""
        self._datasets: dict[str, data.Dataset] = {}
        self._runs: dict[str, Run] = {}
        self._measuring_seconds: dict[str, float] = {}

    def dataset(self, name: str) -> data.Dataset:
        """One of the datasets, on the study's device.

        ``"<name> inverted"`` has each colour replaced by its complement, ``"<name>+<name>"`` is both as one.
        """
        if name not in self._datasets and "+" in name:
            self._datasets[name] = data.joined([self.dataset(part) for part in name.split("+")])
        elif name not in self._datasets and name.endswith(data.INVERTED):
            self._datasets[name] = data.inverted(self.dataset(name.removesuffix(data.INVERTED)))
        elif name not in self._datasets:
            p = self.params
            loaded = data.load(
                name, self.data_dir, p.allow_standin, p.train_images, p.test_images, str(self.results / "standins")
            )
            self._datasets[name] = loaded.to(self.device)
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
        shared = {k: getattr(p, k) for k in ("arch", "width", "dropout", "epoch_images", "epochs", "batch_size")}
        shared |= {"learning_rate": p.learning_rate, "weight_decay": p.weight_decay, "precision": self.precision}
        if "+" in main:  # one network on two tasks sees as many images of each as two networks do
            shared["epoch_images"] *= 1 + main.count("+")
        shared["width"] *= m.wider
        config = RunConfig(protocol=m.protocol, main=main, seed=seed, **shared)
        if m.protocol == "joint":
            switches = {
                f.name: getattr(m, f.name) for f in fields(m) if f.name not in ("protocol", "wider", "start", "seeds")
            }
            ramps = {"third_ramp": p.third_ramp, "permuted_ramp": p.permuted_ramp if m.permuted_support else 0.0}
            return replace(config, support=support, **switches, **ramps)
        if m.protocol == "sequential":
            return replace(config, support=support, start=start, finetune_epochs=p.finetune_epochs)
        # Trained alone, a network doesn't know its key: it is the dense network of that size.
        width = config.width * m.key_share
        own = {k: getattr(m, k) for k in ("label_smoothing", "centered_scale", "start")}
        return replace(config, width=width, **own)

    def alone(self, config: RunConfig) -> RunConfig:
        """The independent run of a sequential run's main task."""
        return replace(config, protocol="independent", support="", start="random", finetune_epochs=0)

    def _parents(self, config: RunConfig) -> list[RunConfig]:
        """The independent runs that a sequential run starts from."""
        if config.protocol != "sequential" or config.start == "random":
            return []
        alone = self.alone(config)
        return [alone] + ([replace(alone, main=config.support)] if config.start == "sum" else [])

    def _folder(self, config: RunConfig) -> Path:
        key = {
            "config": asdict(config),
            "data": {name: self.dataset(name).training_digest for name in (config.main, config.support) if name},
            "device": self.device.type,
            "code": _TRAINING_CODE,
        }
        return self.results / "runs" / cache.content_key(key)

    def run(self, config: RunConfig) -> Run:
        """The finished run: from the cache, or trained now (see :meth:`train_all`)."""
        return self.train_all([config])[0]

    def train_all(self, configs: Sequence[RunConfig]) -> list[Run]:
        """Finish several runs, with an estimate of the time left for all of them.

        One study trains at a time; a killed one goes on after the last finished epoch of each run. On a CPU
        ``networks_at_once`` processes share the cores.
        """
        queue = list(dict.fromkeys(c for config in configs for c in (*self._parents(config), config)))
        folders = {config: self._folder(config) for config in queue}
        if any(map(_is_missing, folders.values())):
            with cache.lock(self.results / "training.lock"):
                self._train([c for c in queue if _is_missing(folders[c])], folders)
        return [self._load(config, folders[config]) for config in configs]

    def _train(self, missing: Sequence[RunConfig], folders: Mapping[RunConfig, Path]) -> None:
        progress = _Progress(missing)
        while missing:
            ready = [c for c in missing if not any(map(_is_missing, map(self._folder, self._parents(c))))]
            workers = min(len(ready), self._at_once())
            if workers > 1:
                threads = torch.get_num_threads() // workers
                jobs = (joblib.delayed(_train_in_worker)(_TRAINING_CODE, workers, threads, self._job(c)) for c in ready)
                for config, history in joblib.Parallel(n_jobs=workers, return_as="generator_unordered")(jobs):
                    progress.next(config)
                    progress.run(history)
            else:
                for config in ready:
                    progress.next(config)
                    _train_into(*self._job(config), on_epoch=progress.epoch)
            missing = [c for c in missing if _is_missing(folders[c])]

    def _at_once(self) -> int:
        """How many networks are trained at once."""
        if self.device.type != "cpu":
            return 1
        return min(torch.get_num_threads(), self.params.networks_at_once or _MOST_AT_ONCE)

    def _job(self, config: RunConfig) -> tuple[Path, RunConfig, dict[str, data.Dataset], list[nn.Module]]:
        """What :func:`_train_into` needs for a run whose parents are finished."""
        parents = [self._load(c, self._folder(c)).networks["main"] for c in self._parents(config)]
        return self._folder(config), config, {n: self.dataset(n) for n in (config.main, config.support) if n}, parents

    def _load(self, config: RunConfig, folder: Path) -> Run:
        if folder.name not in self._runs:
            content, path = cache.read_json(folder / "run.json"), folder / "networks.safetensors"
            if not path.exists() or cache.file_sha256(path) != content["checksum"]:
                raise RuntimeError(f"{path} is damaged or missing; delete the folder {folder} to train it again")
            tensors, networks = load_file(path, device=str(self.device)), {}
            for role in config.roles:
                networks[role] = build(config, role).to(self.device).eval()
                state = {k.removeprefix(f"{role}/"): v for k, v in tensors.items() if k.startswith(f"{role}/")}
                networks[role].load_state_dict(state)
            self._runs[folder.name] = Run(config, networks, content["history"])
        return self._runs[folder.name]

    def describe_data(self) -> dict[str, dict]:
        """What was read so far, by dataset (:meth:`weightsum_lib.data.Dataset.describe`)."""
        return {name: d.describe() for name, d in sorted(self._datasets.items()) if name in DATASETS}

    def training_seconds(self) -> dict[str, float]:
        """Seconds that it took to train each run used so far, whenever that was, by the name of its folder."""
        return {name: sum(row["seconds"] for row in run.history) for name, run in self._runs.items()}

    def measuring_seconds(self) -> float:
        """Seconds that it took to compute all measurements used so far, whenever that was."""
        return sum(self._measuring_seconds.values())

    def measured(self, what: str, configs: Sequence[RunConfig], settings: dict, compute: Callable[[], object]):
        """A JSON-able measurement of finished runs, computed once for the same runs, settings, data and code."""
        self.train_all(configs)
        p = self.params
        key = {
            "what": what,
            "runs": [self._folder(config).name for config in configs],
            "settings": {**settings, "calibration_images": p.calibration_images, "test_images": p.test_images},
            "data": {name: d.describe() for name, d in sorted(self._datasets.items()) if name in settings["data"]},
            "code": _MEASURING_CODE,
        }
        path = self.results / "measurements" / f"{cache.content_key(key)}.json"
        if not path.exists():
            started = time.perf_counter()
            value = compute()
            cache.write_json(path, {"key": key, "value": value, "seconds": time.perf_counter() - started})
        content = cache.read_json(path)
        self._measuring_seconds[path.stem] = content["seconds"]
        return content["value"]


def _is_missing(folder: Path) -> bool:
    return not (folder / "run.json").exists()


def _train_into(
    folder: Path,
    config: RunConfig,
    datasets: Mapping[str, data.Dataset],
    parents: Sequence[nn.Module],
    on_epoch: Callable[[dict], None] = lambda row: None,
    at_once: int = 1,
) -> list[dict]:
    """Train a run and keep it in its folder; returns its history, in which a second is one of the whole machine."""
    folder.mkdir(parents=True, exist_ok=True)
    run = train(config, datasets, start=parents, checkpoint=folder / "checkpoint.safetensors", on_epoch=on_epoch)
    history = [{**row, "seconds": row["seconds"] / at_once} for row in run.history]
    tensors = {f"{r}/{k}": v.contiguous() for r, n in run.networks.items() for k, v in n.state_dict().items()}
    with cache.replaced(folder / "networks.safetensors") as temporary:
        save_file(tensors, temporary)
    content = {
        "config": asdict(config),
        "data": {name: dataset.describe() for name, dataset in datasets.items()},
        "history": history,
        "checksum": cache.file_sha256(folder / "networks.safetensors"),
    }
    cache.write_json(folder / "run.json", content)
    return history


def _train_in_worker(code: str, workers: int, threads: int, job: tuple) -> tuple[RunConfig, list[dict]]:
    """Train one of the runs that share the cores, in a process of its own."""
    if code != _TRAINING_CODE:
        raise RuntimeError("weightsum_lib was edited while it ran, so its workers have other code; start it again")
    torch.set_num_threads(threads)
    return job[1], _train_into(*job, at_once=workers)


class _Progress:
    """Lines for the terminal: where a queue of runs stands, and how long the rest will take."""

    def __init__(self, runs: Sequence[RunConfig]):
        self.total, self.runs = sum(c.passes * c.trained_epochs for c in runs), len(runs)
        self.started, self.done, self.number, self.config = time.perf_counter(), 0, 0, None

    def next(self, config: RunConfig) -> None:
        """A run begins, or one of several at once has ended."""
        self.number, self.config = self.number + 1, config

    def epoch(self, row: dict) -> None:
        """An epoch has ended."""
        self._say(row, 1, f"epoch {row['epoch']}/{self.config.trained_epochs}")

    def run(self, history: Sequence[dict]) -> None:
        """A whole run has ended."""
        row = history[-1] | {"seconds": sum(row["seconds"] for row in history)}
        self._say(row, len(history), f"all {len(history)} epochs")

    def _say(self, row: dict, epochs: int, what: str) -> None:
        self.done += self.config.passes * epochs
        left = (time.perf_counter() - self.started) / self.done * (self.total - self.done)
        losses = " ".join(f"{k.removeprefix('loss_')} {v:.3f}" for k, v in row.items() if k.startswith("loss_"))
        values = " ".join(f"{k.removeprefix('val_')} {v:.1f}" for k, v in row.items() if k.startswith("val_"))
        report_progress(
            f"run {self.number}/{self.runs} {self.config.describe()} | {what} {row['seconds']:.0f} s | "
            f"loss {losses} | validation % {values} | about {max(left, 0) / 60:.1f} min left"
        )
