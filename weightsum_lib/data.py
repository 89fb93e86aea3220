"""The three datasets as uint8 32×32 colour images: prepared file, else torchvision's download, else a stand-in."""

import contextlib
import hashlib
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from weightsum_lib import cache
from weightsum_lib.params import DATASETS
from weightsum_lib.synthetic import synthesize

_SIDE = {"mnist": (1, 28), "cifar10": (3, 32), "svhn": (3, 32)}
_OFFICIAL_COUNTS = {"mnist": (60_000, 10_000), "cifar10": (50_000, 10_000), "svhn": (73_257, 26_032)}
# SHA-256 of the pixels (N, C, H, W) of files of official size, train then test, and what a report says of them.
_KNOWN_PIXELS = {
    (
        "741c988805d008ac6e4c904b69001ba184c24b2c540a4ef403f4c71b676cf757",
        "6d87418db22cc8025d05968bec9bd5c3932904b23485740db143a061a2c9d161",
    ): "the official images, exact",
    (
        "3ce718bf7b9733297e05b4aa954511ffe3e575383db5bf9e0500feeb839d1b09",
        "0f4be6232c5306e72c4d2207043d917b854f1144d5e6b8dfb109a2dc951fb133",
    ): "the official images, 139 of 60,000 of them decoded from JPEG, the others exact",
}
_EXACT = {"mnist"}  # a file of official size must hold pixels known above
NO_DOWNLOAD = "WEIGHTSUM_NO_DOWNLOAD"  # set by the runner, which has tried
_SPLITS = ("train", "val", "test")
_DOWNLOAD_TIMEOUT = 20  # seconds without an answer


class DataError(RuntimeError):
    """A dataset that is not there or can't be trusted; the message names it and says how to mend it."""


@dataclass(frozen=True)
class Dataset:
    """One dataset, split.

    Images are uint8 (N, 3, 32, 32): MNIST is padded by two pixels and its channel repeated. Labels are
    int64 (N,), 0–9. ``source`` is "real" or "stand-in", ``note`` says how exact it is, ``checksum`` is
    the SHA-256 of the file that was read.
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
        """What a result must say of its data: source, checksum, and the number of images in each split."""
        return {
            "source": self.source,
            "note": self.note,
            "checksum": self.checksum,
            "images": {split: len(getattr(self, f"{split}_labels")) for split in _SPLITS},
        }

    @cached_property
    def training_digest(self) -> str:
        """SHA-256 of what training reads: the training and validation images and labels, in their order."""
        digest = hashlib.sha256()
        for tensor in (self.train_images, self.train_labels, self.val_images, self.val_labels):
            digest.update(tensor.cpu().numpy().tobytes())
        return digest.hexdigest()

    def to(self, device) -> "Dataset":
        """The same dataset on a device."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Dataset(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in values.items()})


INVERTED = " inverted"


def inverted(dataset: Dataset) -> Dataset:
    """A further task: the same images with each colour replaced by its complement, the same labels."""
    images = {f"{s}_images": 255 - getattr(dataset, f"{s}_images") for s in _SPLITS}
    return replace(dataset, name=dataset.name + INVERTED, **images)


def joined(datasets: Sequence[Dataset]) -> Dataset:
    """Several tasks as one: all images, with the class labels that they have in their own task."""
    kinds = [f"{split}_{kind}" for split in _SPLITS for kind in ("images", "labels")]
    tensors = {kind: torch.cat([getattr(d, kind) for d in datasets]) for kind in kinds}
    texts = {k: "+".join(getattr(d, k) for d in datasets) for k in ("name", "source", "note", "checksum")}
    return Dataset(**texts, **tensors)


def load(
    name: str,
    data_dir: str,
    allow_standin: Sequence[str] = (),
    train_images: int = 100_000,
    test_images: int = 100_000,
    standin_dir: str = "results/standins",
) -> Dataset:
    """Load a dataset: ``<data_dir>/<name>.safetensors``, else a download, else (if allowed) the stand-in.

    Args:
        name: "mnist", "cifar10" or "svhn".
        data_dir: folder of the prepared files, where a download is prepared too. Empty: neither is tried.
        allow_standin: names of the datasets for which the synthetic stand-in may be used.
        train_images: at most so many training images; a tenth of them is the validation split.
        test_images: at most so many test images.
        standin_dir: where generated stand-ins are kept.

    Raises:
        DataError: the prepared file is damaged, or the dataset can't be had and no stand-in is allowed.
    """
    if name not in DATASETS:
        raise DataError(f"unknown dataset '{name}'; one of {', '.join(DATASETS)}")
    tensors = None
    if data_dir:
        path = Path(data_dir) / f"{name}.safetensors"
        if not path.exists() and os.environ.get(NO_DOWNLOAD):
            reason = f"{path} does not exist and a download has failed before"
        elif not path.exists():
            try:
                _prepare(name, path)
            except (OSError, RuntimeError) as error:
                reason = f"{path} does not exist and the download failed ({error})"
        if path.exists():
            source, (tensors, checksum, note) = "real", _read_prepared(name, path)
    else:
        reason = "no data folder is given (data_dir is empty)"
    if tensors is None:
        if name not in allow_standin:
            raise DataError(
                f"no {DATASETS[name]}: {reason}. Put a prepared {name}.safetensors (see the README, “Data”) into the "
                f"folder DATA_DIR, or allow the synthetic stand-in with allow_standin: [{name}] in the parameter file"
            )
        counts = [min(n, most) for n, most in zip((train_images, test_images), _OFFICIAL_COUNTS[name], strict=True)]
        source, note = "stand-in", "synthetic, generated by weightsum_lib.synthetic"
        tensors, checksum, _ = _standin(name, *counts, Path(standin_dir))
    # The same images in every run: a fixed order, a fixed tenth for validation. A part of the test images is
    # drawn at random too: the first half of MNIST's is harder than the second.
    order = torch.randperm(len(tensors["train_labels"]), generator=torch.Generator().manual_seed(0))[:train_images]
    val, train = order[: len(order) // 10], order[len(order) // 10 :]
    test = torch.randperm(len(tensors["test_labels"]), generator=torch.Generator().manual_seed(0))[:test_images].sort()
    splits = {}
    for split, part, index in (("train", "train", train), ("val", "train", val), ("test", "test", test.values)):
        splits[f"{split}_images"] = _as_colour_32(tensors[f"{part}_images"][index])
        splits[f"{split}_labels"] = tensors[f"{part}_labels"][index].long()
    return Dataset(name=name, source=source, note=note, checksum=checksum, **splits)


def _as_colour_32(images: Tensor) -> Tensor:
    """(N, 1, 28, 28) or (N, 3, 32, 32) to (N, 3, 32, 32), black around."""
    pad = (32 - images.shape[-1]) // 2
    return torch.nn.functional.pad(images, (pad,) * 4).expand(-1, 3, -1, -1).contiguous()


def _mend(path: Path) -> str:
    return f"Delete {path} (and {path.name}.sha256 beside it) and put a good copy there, or let it be made again"


def _read_prepared(name: str, path: Path) -> tuple[dict[str, Tensor], str, str]:
    """Read a prepared file: tensors, checksum, note; or raise DataError if it is not what it should be.

    A file is held to the checksum beside it (``<file>.sha256``, in sha256sum's format), which is
    written when the file is first seen.
    """
    checksum, sidecar = cache.file_sha256(path), path.with_name(path.name + ".sha256")
    if sidecar.exists():
        expected = (sidecar.read_text(encoding="utf-8").split() or ["nothing"])[0]
        if expected != checksum:
            raise DataError(
                f"{path} is damaged: its SHA-256 is {checksum}, {sidecar.name} says {expected}. {_mend(path)}"
            )
    try:
        with safe_open(path, "pt") as file:
            found = set(file.keys())
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} is damaged or half written: {error}. {_mend(path)}") from error
    channels, side = _SIDE[name]
    for part in ("train", "test"):
        missing = {f"{part}_images", f"{part}_labels"} - found
        if missing:
            raise DataError(f"{path} has no tensor '{min(missing)}', only {sorted(found)}. {_mend(path)}")
        images, labels = tensors[f"{part}_images"], tensors[f"{part}_labels"]
        if (
            images.dtype != torch.uint8
            or images.shape[1:] != (channels, side, side)
            or labels.shape != images.shape[:1]
        ):
            raise DataError(
                f"{path}: {part}_images must be uint8 (N, {channels}, {side}, {side}) with {part}_labels (N,); got "
                f"{images.dtype} {tuple(images.shape)} and {tuple(labels.shape)}"
            )
        if len(labels) < 20 or labels.is_floating_point() or labels.min() < 0 or labels.max() > 9:
            raise DataError(f"{path}: {part}_labels must be 20 or more integers from 0 to 9. {_mend(path)}")
    note = "not compared with official checksums"
    if (len(tensors["train_labels"]), len(tensors["test_labels"])) == _OFFICIAL_COUNTS[name]:
        pixels = tuple(hashlib.sha256(tensors[f"{p}_images"].numpy().tobytes()).hexdigest() for p in ("train", "test"))
        note = _KNOWN_PIXELS.get(pixels, note)
        if name in _EXACT and pixels not in _KNOWN_PIXELS:
            raise DataError(
                f"{path} is damaged: of official size, but its pixels are not {DATASETS[name]}'s. {_mend(path)}"
            )
    if not sidecar.exists():
        with contextlib.suppress(OSError):  # a folder that is only read keeps no sidecar
            _write_sidecar(path, checksum)
    return tensors, checksum, note


def _write_sidecar(path: Path, checksum: str) -> None:
    with cache.replaced(path.with_name(path.name + ".sha256")) as temporary:
        temporary.write_text(f"{checksum}  {path.name}\n", encoding="utf-8")


def _prepare(name: str, path: Path) -> None:
    """Download the official set with torchvision (which verifies its checksums) and write the prepared file."""
    with cache.lock(path.with_suffix(".lock")):
        if path.exists():
            return
        timeout = socket.getdefaulttimeout()
        socket.setdefaulttimeout(_DOWNLOAD_TIMEOUT)
        try:
            tensors = official(name, path.parent / "raw")
        finally:
            socket.setdefaulttimeout(timeout)
        with cache.replaced(path) as temporary:
            save_file(tensors, temporary)
            _write_sidecar(path, cache.file_sha256(temporary))


def official(name: str, root: Path) -> dict[str, Tensor]:
    """The official dataset as torchvision reads it, downloaded into ``root`` if it is not there.

    Returns:
        ``train_images``, ``test_images`` uint8 (N, C, H, W) and ``train_labels``, ``test_labels`` int64 (N,).
    """
    from torchvision import datasets  # slow to import, and seldom needed

    tensors = {}
    for part in ("train", "test"):
        if name == "svhn":  # its labels are 0–9: torchvision turns the file's 10 into 0
            raw = datasets.SVHN(root, split=part, download=True)
            images, labels = raw.data, raw.labels
        elif name == "cifar10":
            raw = datasets.CIFAR10(root, train=part == "train", download=True)
            images, labels = raw.data.transpose(0, 3, 1, 2), raw.targets
        else:
            raw = datasets.MNIST(root, train=part == "train", download=True)
            images, labels = raw.data.numpy()[:, None], raw.targets
        tensors[f"{part}_images"] = torch.from_numpy(np.ascontiguousarray(images))
        tensors[f"{part}_labels"] = torch.as_tensor(np.asarray(labels), dtype=torch.int64)
    return tensors


def _standin(name: str, train: int, test: int, folder: Path) -> tuple[dict[str, Tensor], str, str]:
    """Generate the synthetic stand-in, or read it if it has been generated by the same code."""
    path = folder / f"{name}-{train}-{test}-{cache.source_digest('synthetic')}.safetensors"
    with cache.lock(path.with_suffix(".lock")):
        if not path.exists():
            tensors = {}
            for part, count in (("train", train), ("test", test)):
                images, labels = synthesize(name, count, part)
                tensors[f"{part}_images"], tensors[f"{part}_labels"] = (
                    torch.from_numpy(images),
                    torch.from_numpy(labels),
                )
            with cache.replaced(path) as temporary:
                save_file(tensors, temporary)
    return _read_prepared(name, path)
