"""The second half of ``make bench``: what a queue costs, what workers gain, and what ``full`` takes on some of them."""

import functools
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace

import pandas as pd
import psutil

from weightsum_lib.report import tables
from weightsum_lib.study import params, plan, pool, runs

WAYS = {  # where jobs are done: how many at once, and the address of a cluster
    "this process": (1, ""),
    "two processes here (joblib)": (2, ""),
    "a cluster of one local worker": (1, "local:1"),
    "a cluster of two local workers": (2, "local:2"),
}
_JOBS, _QUEUED = 1000, 10_000  # jobs of a millisecond, by which their overhead is measured; runs that wait, the memory


def chains(study: runs.Study) -> tuple[float, float]:
    """The work of a profile's whole queue, and of its longest chain: a run, those that it starts from, and so on."""
    ends, queue = {}, study.with_parents(plan.queue(study))
    for config in queue:
        ends[config] = runs.work(config) + max(map(ends.get, study.parents(config)), default=0)
    return sum(map(runs.work, queue)), max(ends.values())


def on(workers: Sequence[int], hours: float, chain: float) -> pd.DataFrame:
    """Bounds of the hours on equal workers, of which none idles while a run is ready (Graham 1969)."""
    bounds = [(str(n), max(hours / n, chain), hours / n + (1 - 1 / n) * chain) for n in workers]
    rows = [(n, f"{least:,.1f}", f"{most:,.1f}", f"{hours / most:.1f}") for n, least, most in bounds]
    return pd.DataFrame(rows, columns=["Workers", "Hours, at least", "At most", "× one worker, at least"])


def gained(jobs: int, **smaller) -> pd.DataFrame:
    """What a job of a millisecond takes beyond it, and how long the first eight runs of ``smoke`` take, in each way."""
    rows, nothing = [], functools.partial(time.sleep, 1e-3)
    for way, (slots, address) in WAYS.items():
        with tempfile.TemporaryDirectory() as folder, pool.opened(slots, address) as workers:
            [*workers.each(range(20), lambda i: (f"first {i}", nothing, 0))]  # they start
            started = time.perf_counter()
            [*workers.each(range(jobs), lambda i: (f"nothing {i}", nothing, 0))]
            milliseconds = 1e3 * (time.perf_counter() - started) / jobs
            study = runs.Study(params.read("smoke", {"results_dir": folder, "networks_at_once": slots, **smaller}))
            study.cluster, started = address, time.perf_counter()
            study.train_all([c for c in plan.queue(study) if not study.parents(c)][:8])
            rows.append((way, f"{milliseconds - 1 / slots:.1f}", time.perf_counter() - started))
    columns = ["Jobs are done in", "Overhead of a job (ms)", "Eight runs of `smoke` (s)", "× this process"]
    return pd.DataFrame([(*row, f"{s:.0f}", f"{rows[0][-1] / s:.2f}") for *row, s in rows], columns=columns)


def memory(queued: int) -> float:
    """KiB that a queued run takes in the process that asks for it, with the scheduler of local workers in it."""
    study = runs.Study(params.read("smoke", {"device": "cpu"}))
    one, rss = plan.queue(study)[0], psutil.Process().memory_info
    same = study.same(study.content(one))
    with pool.opened(1, "local:2", {"a resource that no worker has": 1}) as workers:
        before, out = rss().rss, []
        for seed in range(queued):
            call = functools.partial(runs._train_run, study, replace(one, seed=seed), same, print, "", {})
            out.append(workers.submit(f"queued {seed}", call, 0))
        workers.everywhere(time.time)  # after them all
        taken = rss().rss - before
        for future in out:
            future.cancel()
    return taken / queued / 2**10


def cluster(device: str) -> dict:
    """Results as the book reads them; the rate of work is measured on a device, "cpu" or "cuda"."""
    known = {"allow_standin": [*params.DATASETS], "data_dir": "", "train_images": 2500, "device": device}
    full = runs.Study(params.read("full", known))
    one, (work, chain) = plan.queue(full)[0], chains(full)
    rate = runs.work(one) / full.hours(one)  # of an hour
    frames = {"ways": gained(_JOBS), "full": on([2**i for i in range(7)], work / rate, chain / rate)}
    values = {"device": full.device_name(), "precision": full.precision, "run": one.describe(), "jobs": _JOBS}
    values |= {"queued": _QUEUED, "memory": memory(_QUEUED), "runs": len(full.with_parents(plan.queue(full)))}
    values |= {"work": work / 1e18, "rate": rate / 3600e12}  # EFLOP, TFLOP/s
    values |= {"hours": work / rate, "chain": chain / rate, "most": work / chain}
    return {"notebook": "scale", "values": values, "tables": {k: tables.as_json(f) for k, f in frames.items()}}
