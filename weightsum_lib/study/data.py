"""The datasets as uint8 32×32 colour images: prepared file, else torchvision's download, else a stand-in.

And the tasks that are made from them: :func:`variant`.
"""

import contextlib
import hashlib
import os
import re
import socket
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from multiprocessing.pool import ThreadPool
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from weightsum_lib.study import store
from weightsum_lib.study.params import DATASETS, nearest
from weightsum_lib.study.pool import report_progress

_SHAPES = {"mnist": (1, 28, 28), "cifar10": (3, 32, 32), "svhn": (3, 32, 32)}
_OFFICIAL = {"mnist": [60_000, 10_000], "cifar10": [50_000, 10_000], "svhn": [73_257, 26_032]}  # training, test images
_EXACT = "official, exact"
_KNOWN = {  # half the SHA-256 of images and labels (see _content): whose they are, and what a report says of them
    "1e35582d42a90940c55b956deb61875c": ("mnist", _EXACT),
    "1f7d9c3b043b39e02a02d806449c2455": ("cifar10", "official, 139 of 60,000 images lossy"),
    "47d9c765f128ca6821e69a248d0f71f4": ("svhn", "cut again from the full-number images"),
}
_LABELS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_TENSORS = [f"{split}_{kind}" for split in ("train", "val", "test") for kind in ("images", "labels")]
_MANY = 10_000  # images of a stand-in, whose drawing takes so long that it is worth a line
_PATIENCE = 900.0  # seconds for the download of a set
_FAILED = "WEIGHTSUM_NO_DOWNLOAD_"  # and a set's name: why its download failed, for the processes of the same run


class DataError(RuntimeError):
    """A dataset that is not there or can't be trusted; the message names it and says how to mend it."""


@dataclass(frozen=True)
class Dataset:
    """One dataset, split.

    Images are uint8 (N, 3, 32, 32): MNIST is padded by two pixels and its channel repeated. Labels are
    int64 (N,), 0–9. ``source`` is "real" or "stand-in", ``note`` says how much of the official set was found and how
    exact it is, ``checksum`` is the SHA-256 of the file that was read (of a stand-in: of its images and labels).
    """

    name: str
    source: str
    note: str
    checksum: str
    train_images: Tensor
    train_labels: Tensor
    val_images: Tensor
    val_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def describe(self) -> dict:
        """What a result must say of its data: source, note, checksum, the number of ``images`` in each split, and how
        many the official set has ``of`` them (nothing for a task made from others)."""
        images = {name.split("_")[0]: len(getattr(self, name)) for name in _TENSORS[1::2]}
        of = dict(zip(("train", "test"), _OFFICIAL.get(self.name, []), strict=False))
        return {"source": self.source, "note": self.note, "checksum": self.checksum, "images": images, "of": of}

    @cached_property
    def training_digest(self) -> str:
        """SHA-256 of what training reads: the training and validation images and labels, in their order."""
        return _sha256(getattr(self, name) for name in _TENSORS[:4])

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all images and labels, in their order."""
        return _sha256(getattr(self, name) for name in _TENSORS)

    def to(self, device) -> "Dataset":
        """The same dataset on a device."""
        return replace(self, **{name: getattr(self, name).to(device) for name in _TENSORS})


def load(
    name: str, data_dir: str, allow_standin: Sequence[str], train_images: int, test_images: int, standin_dir: str
) -> Dataset:
    """Load a dataset: ``<data_dir>/<name>.safetensors``, else a download, else (if allowed) the stand-in.

    A prepared file may hold a part of the official set. Which images are taken, and which tenth of the training images
    validates, is drawn at random, the same in every run. Of the real SVHN the first training images are taken, and the
    last tenth of these validates: neighbours in the official order are digits of one house number.

    Args:
        name: "mnist", "cifar10" or "svhn".
        data_dir: folder of the prepared files, where a download is prepared too. Empty: neither is tried.
        allow_standin: names of the datasets for which the synthetic stand-in may be used.
        train_images: at most so many training images, the validation tenth among them.
        test_images: at most so many test images.
        standin_dir: where generated stand-ins are kept.

    Raises:
        DataError: no dataset has that name, the prepared file is damaged, or the dataset can't be had and no stand-in
            is allowed.
    """
    _check(name)
    path, source = Path(data_dir) / f"{name}.safetensors", "real"
    missing = _missing(name, path) if data_dir else "no data folder is given (data_dir is empty)"
    if not missing:
        tensors, checksum, note = _read_prepared(name, path)
    elif name in allow_standin:
        tensors = _standin(name, *map(min, (train_images, test_images), _OFFICIAL[name]), Path(standin_dir))
        source, checksum, note = "stand-in", _content(tensors), f"synthetic, since {missing}"
    else:
        what = f"no {DATASETS[name]}: {missing}. Put a prepared {name}.safetensors (see the README, “Data”) into the"
        how = f"or allow the synthetic stand-in with allow_standin: [{name}] in the parameter file"
        raise DataError(f"{what} folder DATA_DIR ({data_dir or 'none'}), {how}")
    taken = _shuffled(tensors["train_labels"])[:train_images]
    val, train = taken.tensor_split([len(taken) // 10])
    if name == "svhn" and source == "real":
        train, val = torch.arange(len(taken)).tensor_split([len(train)])
    # a part of the test images is drawn at random: the first half of MNIST's is harder than the second
    test = _shuffled(tensors["test_labels"])[:test_images].sort().values

    def part(name: str, index: Tensor) -> tuple[Tensor, Tensor]:
        """Images and labels; images become colour (N, 3, 32, 32), black around where they were smaller."""
        images = tensors[f"{name}_images"][index]
        images = torch.nn.functional.pad(images, ((32 - images.shape[-1]) // 2,) * 4).expand(-1, 3, -1, -1).contiguous()
        return images, tensors[f"{name}_labels"][index].long()

    return Dataset(name, source, note, checksum, *part("train", train), *part("train", val), *part("test", test))


def _shuffled(labels: Tensor) -> Tensor:
    return torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))


def _sha256(tensors: Iterable[Tensor]) -> str:
    return hashlib.sha256(b"".join(tensor.cpu().contiguous().numpy() for tensor in tensors)).hexdigest()


def _content(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of the images and labels of a file, whichever integers its labels are."""
    return _sha256(tensors[n].long() if "labels" in n else tensors[n] for n in _TENSORS[:2] + _TENSORS[4:])


def _read_prepared(name: str, path: Path) -> tuple[dict[str, Tensor], str, str]:
    """Read a prepared file: tensors, checksum, note; or raise DataError if it is not what it should be.

    A file is held to the checksum beside it (``<file>.sha256``, in sha256sum's format), which is
    written when the file is first seen.
    """

    def refused(why: str) -> DataError:
        mend = f"Delete it (and {path.name}.sha256 beside it) and put a good copy there, or let it be made again"
        return DataError(f"{path} {why}. {mend}")

    sidecar = path.with_name(path.name + ".sha256")
    try:
        checksum = store.file_sha256(path)
        stated = sidecar.read_text(encoding="utf-8", errors="replace").split() if sidecar.exists() else [checksum]
        with safe_open(path, "pt") as file:
            tensors, written = {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise refused(f"is damaged, half written or can't be read: {error}") from error
    if checksum not in stated[:1]:
        raise refused(f"is damaged: its SHA-256 is {checksum}, {sidecar.name} says {(stated or ['nothing'])[0]}")
    for images, labels in (_TENSORS[:2], _TENSORS[4:]):
        x, y = tensors.get(images), tensors.get(labels)
        if x is None or y is None:
            raise refused(f"has no tensor '{images if x is None else labels}', only {sorted(tensors)}")
        if x.dtype != torch.uint8 or x.shape[1:] != _SHAPES[name] or y.shape != x.shape[:1]:
            got = f"{x.dtype} {tuple(x.shape)} and {tuple(y.shape)}"
            raise refused(f"has another form: {images} must be uint8 {('N', *_SHAPES[name])}, {labels} (N,); got {got}")
        if len(y) < 20 or y.dtype not in _LABELS or not set(y.tolist()) <= set(range(10)):
            raise refused(f"has another form: {labels} must be 20 or more integers from 0 to 9")
    counts, known = [len(tensors["train_labels"]), len(tensors["test_labels"])], _KNOWN.get(_content(tensors)[:32])
    note = _EXACT if written.get("note") == _EXACT else "not compared with official checksums"
    whose, note = known or (written.get("name", name), note)
    if whose != name or (name == "mnist" and counts == _OFFICIAL[name] and not known):
        raise refused(f"is damaged or another set's: its images and labels are not {DATASETS[name]}'s")
    if counts != _OFFICIAL[name]:
        parts = zip(counts, _OFFICIAL[name], ("training", "test images"), strict=True)
        note = " and ".join(f"{n:,} of {most:,} {part}" for n, most, part in parts) + f", {note}"
    if not sidecar.exists():
        with contextlib.suppress(OSError):  # not in a folder that is only read
            store.write_bytes(sidecar, f"{checksum}  {path.name}\n".encode())
    return tensors, checksum, note


def _missing(name: str, path: Path) -> str:
    """Why a prepared file is not there; empty if it is, downloaded (torchvision verifies checksums) if need be.

    A download that failed is not tried again in this process or in those that it starts.
    """
    variable, timeout = f"{_FAILED}{name.upper()}", socket.getdefaulttimeout()
    if path.exists():
        return ""
    if variable not in os.environ:
        print(f"downloading {DATASETS[name]}, once, into {path.parent}", file=sys.stderr)
        socket.setdefaulttimeout(20)  # seconds without an answer
        try:
            with store.lock(path.with_suffix(".lock")):
                if path.exists():
                    return ""
                with ThreadPool(1) as pool:  # whose thread is left behind if it takes too long
                    tensors = pool.apply_async(official, (name, path.parent / "raw")).get(_PATIENCE)
                store.write_bytes(path, save(tensors, {"note": _EXACT, "name": name}))
                return ""
        except Exception as error:  # of any kind: no network, a cut archive, a broken pickle, an HTML page in its place
            os.environ[variable] = type(error).__name__
            said = " ".join(str(error).split())[:300] or f"not all of it came in {_PATIENCE:g} s"
            print(f"{DATASETS[name]} could not be downloaded: {os.environ[variable]}: {said}", file=sys.stderr)
        finally:
            socket.setdefaulttimeout(timeout)
    return f"there is no file and the download failed ({os.environ[variable]})"


def official(name: str, root: Path) -> dict[str, Tensor]:
    """The official dataset as torchvision reads it, downloaded into ``root`` if it is not there.

    Returns:
        ``train_images``, ``test_images`` uint8 (N, C, H, W) and ``train_labels``, ``test_labels`` int64 (N,).
    """
    from torchvision import datasets  # slow to import, and seldom needed

    for extracted in Path(root).glob("MNIST/raw/*-ubyte"):
        extracted.unlink()  # of archives that have checksums, but is never compared with any itself
    reader, tensors = getattr(datasets, name.upper()), {}
    for part in ("train", "test"):
        raw = reader(root, part if name == "svhn" else part == "train", download=True)
        images = torch.as_tensor(raw.data.transpose(0, 3, 1, 2) if name == "cifar10" else raw.data)
        tensors[f"{part}_images"] = images.reshape(-1, *_SHAPES[name]).contiguous()
        # torchvision turns SVHN's label 10 into 0
        tensors[f"{part}_labels"] = torch.as_tensor(raw.labels if name == "svhn" else raw.targets, dtype=torch.int64)
    return tensors


def _standin(name: str, train: int, test: int, folder: Path) -> dict[str, Tensor]:
    """The synthetic stand-in: as it was generated by the same code, or generated now."""
    from weightsum_lib.study.synthetic import synthesize  # slow to import, and needed once

    path = folder / f"{name}-{train}-{test}-{store.code_digest('study.synthetic:synthesize')}.safetensors"
    with store.lock(path.with_suffix(".lock")):
        found, about = store.read_tensors(path) or ({}, "")
        if about != path.stem:
            if train + test > _MANY:
                report_progress(f"drawing {train + test:,} images of the stand-in for {DATASETS[name]}, once")
            for part, count in (("train", train), ("test", test)):
                found[f"{part}_images"], found[f"{part}_labels"] = map(torch.from_numpy, synthesize(name, count, part))
            store.write_tensors(path, found, path.stem)
    return found


_MODIFIERS = {  # what may follow a dataset's name, # being a digit: what becomes of a split's images and labels
    "inverted": lambda x, y: (255 - x, y),
    "turned": lambda x, y: (x.rot90(1, (2, 3)).contiguous(), y),
    "renamed #": lambda x, y, shift: (x, torch.arange(10, device=y.device).roll(shift)[y]),
    "classes #-#": lambda x, y, a, b: (x[(y >= a) & (y <= b)], y[(y >= a) & (y <= b)]),
}


def variant(name: str, load: Callable[[str], Dataset]) -> Dataset:
    """A dataset, or a task made from datasets, by its name.

    Args:
        name: a dataset's, with any number of these behind it: ``inverted`` (each colour replaced by its complement),
            ``turned`` (to the left by a quarter), ``renamed 3`` (label y becomes ``torch.arange(10).roll(3)[y]``),
            ``classes 0-4`` (the images of these alone, with their labels). With ``+`` between several such names, all
            their images as one task, each with its own label; for training in turns, those of a smaller set again and
            again, so that it has as many of each.
        load: loads a dataset by its name.

    Raises:
        DataError: there is no such dataset or modifier, with the nearest that there is; or no image is left.
    """
    if "+" in name:
        datasets = [variant(part, load) for part in name.split("+")]
        texts = {key: "+".join(getattr(d, key) for d in datasets) for key in ("name", "source", "note", "checksum")}
        parts = {key: [getattr(d, key) for d in datasets] for key in _TENSORS}
        turns = torch.arange(max(map(len, parts[_TENSORS[0]])))
        both = {k: torch.stack([x[turns % len(x)] for x in parts[k]], 1).flatten(0, 1) for k in _TENSORS[:2]}
        return Dataset(**texts, **{key: torch.cat(of) for key, of in parts.items()} | both)
    for modifier, change in _MODIFIERS.items():
        if found := re.fullmatch(f"(.+) {modifier.replace('#', '([0-9])')}", name):
            of, made = variant(found[1], load), {}
            for x, y in zip(_TENSORS[::2], _TENSORS[1::2], strict=True):
                made[x], made[y] = change(getattr(of, x), getattr(of, y), *map(int, found.groups()[1:]))
            if not all(map(len, made.values())):
                raise DataError(f"'{name}' leaves no image of one of the splits of '{of.name}'")
            return replace(of, name=name, **made)
    _check(name)
    return load(name)


def _check(name: str) -> None:
    """Refuse a name that is no dataset's, with the nearest dataset, or the nearest modifier if it has one behind it."""
    if name not in DATASETS:
        dataset, _, modifier = name.partition(" ")
        near = nearest(modifier, _MODIFIERS) if modifier else nearest(dataset, DATASETS)
        raise DataError(f"unknown dataset '{name}'; {near}")
