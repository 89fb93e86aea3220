"""Where jobs are done: in this process, in processes that share its cores, or by the workers of a Dask cluster."""

import contextlib
import functools
import json
import logging
import math
import os
import queue
import sys
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

import psutil
from joblib.externals.loky import get_reusable_executor

from weightsum_lib.study.params import ParamsError

PROGRESS_VARIABLE = "WEIGHTSUM_PROGRESS"  # what lines of progress begin with: a notebook, under the runner
CLUSTER_VARIABLE = "WEIGHTSUM_CLUSTER"  # the address of a scheduler, or "local:4"; it changes no result


def report_progress(line: str) -> None:
    """Say one line to whoever runs the study: to the runner, by this process's own standard error, or in the cell."""
    prefix = os.environ.get(PROGRESS_VARIABLE)
    with contextlib.suppress(OSError):  # nobody listens any more: no reason to stop
        print(f"{prefix or ''}{line}\n", end="", file=sys.__stderr__ if prefix else sys.stderr, flush=True)


@contextlib.contextmanager
def progress_of(what: str) -> Iterator[None]:
    """Lines of progress say meanwhile what they are of, and go to the runner."""
    os.environ[PROGRESS_VARIABLE] = f"  {what}: "
    try:
        yield
    finally:
        del os.environ[PROGRESS_VARIABLE]


def _here(name: str, call: Callable, work: float) -> Future:
    future = Future()
    future.set_result(call())
    return future


def memory() -> int:
    """Bytes of memory that there are: this machine's, or what its container is given."""
    limits = [psutil.virtual_memory().total]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # of another kind; "max"
            limits.append(int(Path("/sys/fs/cgroup", name).read_text()))
    return min(limits)


@dataclass(frozen=True)
class Pool:
    """Where jobs are done.

    ``submit`` takes a job and returns its future: a name, the same for whoever asks for the same, a call that can be
    pickled, and its work. ``slots`` jobs are out at once, ``hear`` makes of a function one that a job calls wherever it
    is, to be heard here, and ``everywhere`` calls a function in each process of a cluster.
    """

    submit: Callable[[str, Callable, float], Future] = _here
    slots: float = 1
    hear: Callable[[Callable], Callable] = lambda say: say
    everywhere: Callable[[Callable], Iterable] = lambda function: ()

    def each(
        self, wanted: Collection, job: Callable[..., tuple], parents: Callable = lambda item: ()
    ) -> Iterator[tuple]:
        """Do the ``job`` of each item and yield (item, result) as it ends.

        A job starts as soon as those of its item's ``parents`` (other items) have ended and a slot is free, in the
        order of ``wanted``; it is made just before.
        """
        order, ended = {item: i for i, item in enumerate(wanted)}, queue.SimpleQueue()
        sorter = TopologicalSorter({item: [p for p in parents(item) if p in order] for item in wanted})
        sorter.prepare()
        ready, out = [], {}
        while sorter.is_active():
            ready = sorted([*ready, *sorter.get_ready()], key=order.get)
            while ready and len(out) < self.slots:
                item = ready.pop(0)
                out[item] = self.submit(*job(item))
                out[item].add_done_callback(functools.partial(lambda item, _: ended.put(item), item))
            item = ended.get()
            yield item, out.pop(item).result()
            sorter.done(item)


@contextlib.contextmanager
def opened(at_once: int, cluster: str = "", resources: dict | None = None, fresh: bool = False) -> Iterator[Pool]:
    """A pool: a cluster's workers, which take the jobs with most work first, else ``at_once`` processes here.

    Args:
        at_once: how many jobs share the cores of this machine.
        cluster: address of a Dask scheduler, or ``local:<workers>``.
        resources: what a job takes of its worker (Dask's resources), such as ``{"GPU": 1}``.
        fresh: by processes that have done nothing yet, and so are small.

    Raises:
        ParamsError: no cluster can be had so.
        RuntimeError: the cluster was lost meanwhile.
    """
    if cluster:
        workers, again = _of_cluster(cluster, resources), "what was finished is kept, and the same command goes on"
        from distributed import KilledWorker

        try:
            yield workers
        except CancelledError as error:
            _client(cluster).close()  # it would try for half a minute to find it again
            _client.cache_clear()
            raise RuntimeError(f"the scheduler of CLUSTER={cluster} was lost; {again}") from error
        except KilledWorker as error:
            raise RuntimeError(f"CLUSTER={cluster}: {error}; {again}") from error
    elif at_once > 1:
        warnings.filterwarnings("ignore", "A worker stopped")  # one that has grown is replaced, and loses nothing
        executor = get_reusable_executor(at_once, reuse=not fresh and "auto", initializer=_end_with_the_parent)
        try:
            yield Pool(lambda name, call, work: executor.submit(call), at_once)
        except BaseException:
            executor.shutdown(kill_workers=True)
            raise
    else:
        yield Pool()


def _end_with_the_parent() -> None:
    """Let this process end soon after the one that started it, however that ended."""

    def watch(parent: int = os.getppid()):
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _of_cluster(address: str, resources: dict | None) -> Pool:
    client = _client(address)
    topic = f"weightsum {client.id}"

    def submit(name, call, work):  # whoever else asks this scheduler for the same gets the same
        return client.submit(_in_worker, call, key=name, priority=work, resources=resources)

    def hear(say):
        client.subscribe_topic(topic, lambda event: say(*event[1]))
        return functools.partial(_tell, topic)

    return Pool(submit, math.inf, hear, lambda function: client.run(function, on_error="return").values())


@functools.cache
def _client(address: str):
    """Connect to a cluster, once in a process, and wait for its first worker."""
    try:
        from distributed import Client, Nanny, Scheduler, SpecCluster
    except ImportError as error:
        raise ParamsError(f"CLUSTER={address} wants Dask: pip install -e .[cluster]") from error
    kind, _, workers = address.partition(":")
    try:
        if kind == "local":
            options = {"nthreads": 1, "resources": {"GPU": 1}, "silence_logs": logging.ERROR}
            gpus = ({"env": {"CUDA_VISIBLE_DEVICES": str(i)}} for i in range(int(workers)))
            spec = {i: {"cls": Nanny, "options": options | gpu} for i, gpu in enumerate(gpus)}
            scheduler = {"cls": Scheduler, "options": {"host": "127.0.0.1", "dashboard_address": ":0"}}
            client = Client(SpecCluster(workers=spec, scheduler=scheduler, silence_logs=logging.ERROR))
        else:
            client = Client(address)
    except (OSError, ValueError) as error:
        raise ParamsError(f"CLUSTER={address}: no scheduler answers ({error}); say tcp://host:8786, local:4") from error
    report_progress(f"cluster {address}: its dashboard is {client.dashboard_link}; waiting for a worker")
    client.wait_for_workers(1)
    return client


def _tell(topic: str, *about: dict) -> None:
    from distributed import get_worker

    get_worker().log_event(topic, list(about))


def _in_worker(call: Callable):
    """Do a job, alone in its process: jobs in threads would share torch's random numbers."""
    from distributed import get_worker

    if (threads := get_worker().state.nthreads) > 1:
        how = f"start it with --nthreads 1 --nworkers {threads}"
        raise RuntimeError(f"worker {get_worker().address} does {threads} jobs at once in one process; {how}")
    return call()


def say_epoch(work: float, done: str, started: float, about: dict, row: dict) -> None:
    """A line for the terminal when an epoch has ended, in whichever process: how far, and how long the rest will take.

    Args:
        work: of the whole queue.
        done: a file with a line for each epoch that has ended since it was begun.
        started: when the queue was begun (``time.time``).
        about: ``run``, in words; its ``epochs``; the ``work`` of one.
        row: of the epoch (:func:`weightsum_lib.study.train.train`).
    """
    ended = [(about["run"], row["epoch"], about["work"])]
    # a full disk stops no training, nor does a line that another process has half written
    with contextlib.suppress(OSError, ValueError), open(done, "a+", encoding="utf-8") as file:
        print(json.dumps(ended[0]), file=file, flush=True)
        file.seek(0)
        ended = [json.loads(line) for line in file]
    behind = {run: epoch * each for run, epoch, each in ended}  # also what was done before it was resumed
    left = (time.time() - started) / sum(each for *_, each in ended) * max(work - sum(behind.values()), 0)
    losses = " ".join(f"{k.removeprefix('loss_')} {v:.3f}" for k, v in row.items() if k.startswith("loss_"))
    values = " ".join(f"{k.removeprefix('val_')} {v:.1f}" for k, v in row.items() if k.startswith("val_"))
    report_progress(
        f"{about['run']} | epoch {row['epoch']}/{about['epochs']} {row['seconds']:.0f} s | loss {losses} | "
        f"validation % {values} | about {left / 60:.1f} min left"
    )
