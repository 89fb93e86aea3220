import hashlib
import socket

import numpy as np
import pytest
import scipy.io
import torch
from safetensors.torch import load_file, save_file

from weightsum_lib import cache, data
from weightsum_lib.data import DataError


def prepared(folder, name="cifar10", train=60, test=20):
    shape = (1, 28, 28) if name == "mnist" else (3, 32, 32)
    tensors = {}
    for part, n in (("train", train), ("test", test)):
        tensors[f"{part}_images"] = torch.randint(0, 256, (n, *shape), dtype=torch.uint8)
        tensors[f"{part}_labels"] = torch.arange(n) % 10
    save_file(tensors, folder / f"{name}.safetensors")
    return tensors


def test_a_prepared_file_becomes_32x32_colour_with_a_validation_tenth(tmp_path):
    raw = prepared(tmp_path, "mnist")
    d = data.load("mnist", str(tmp_path))
    assert d.source == "real"
    assert [len(x) for x in (d.train_labels, d.val_labels, d.test_labels)] == [54, 6, 20]
    assert d.train_images.shape == (54, 3, 32, 32) and d.train_images.dtype == torch.uint8
    assert torch.equal(d.test_images[:, 1, 2:30, 2:30], raw["test_images"][:, 0])
    assert d.test_images[:, :, :2].sum() == 0
    used = torch.cat([d.train_images, d.val_images])[:, 0, 2:30, 2:30].flatten(1)
    assert {tuple(x.tolist()) for x in used} == {tuple(x.tolist()) for x in raw["train_images"].flatten(1)}


def test_the_split_is_the_same_every_time_and_capped(tmp_path):
    prepared(tmp_path)
    a, b = (data.load("cifar10", str(tmp_path), train_images=30, test_images=7) for _ in range(2))
    assert torch.equal(a.val_images, b.val_images) and torch.equal(a.train_images, b.train_images)
    assert [len(x) for x in (a.train_labels, a.val_labels, a.test_labels)] == [27, 3, 7]


def test_a_damaged_file_is_found_by_its_checksum_and_named(tmp_path):
    prepared(tmp_path)
    path = tmp_path / "cifar10.safetensors"
    data.load("cifar10", str(tmp_path))
    sidecar = path.with_name("cifar10.safetensors.sha256").read_text()
    assert sidecar == f"{hashlib.sha256(path.read_bytes()).hexdigest()}  cifar10.safetensors\n"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"cifar10.safetensors is damaged: its SHA-256.*Delete"):
        data.load("cifar10", str(tmp_path), allow_standin=["cifar10"])


def test_a_half_written_file_is_named_and_no_standin_takes_its_place(tmp_path):
    prepared(tmp_path)
    path = tmp_path / "cifar10.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"cifar10.safetensors is damaged or half written"):
        data.load("cifar10", str(tmp_path), allow_standin=["cifar10"])


def test_a_mnist_of_official_size_must_hold_the_official_pixels(tmp_path):
    prepared(tmp_path, "mnist", 60_000, 10_000)
    with pytest.raises(DataError, match="its pixels are not MNIST's"):
        data.load("mnist", str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_images": torch.zeros(60, 3, 32, 32)}, r"must be uint8 \(N, 3, 32, 32\).*float32"),
        ({"test_labels": torch.arange(20)}, "integers from 0 to 9"),
        ({"test_labels": None}, "no tensor 'test_labels'"),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path, change, message):
    tensors = {k: v for k, v in {**prepared(tmp_path), **change}.items() if v is not None}
    save_file(tensors, tmp_path / "cifar10.safetensors")
    with pytest.raises(DataError, match=message):
        data.load("cifar10", str(tmp_path))


def test_without_file_and_net_it_says_what_to_do(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no network in this test")

    monkeypatch.setattr(data, "official", offline)
    with pytest.raises(DataError, match=r"no SVHN: .*no network in this test.*DATA_DIR.*allow_standin: \[svhn\]"):
        data.load("svhn", str(tmp_path))
    d = data.load("svhn", str(tmp_path), ["svhn"], 40, 20, standin_dir=str(tmp_path / "s"))
    assert d.source == "stand-in" and "synthetic" in d.note and len(d.train_labels) == 36
    assert not (tmp_path / "svhn.safetensors").exists()
    assert socket.getdefaulttimeout() is None


def test_an_empty_data_dir_means_no_file_and_no_download(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "official", lambda *a: pytest.fail("a download was tried"))
    with pytest.raises(DataError, match="data_dir is empty"):
        data.load("mnist", "")
    with pytest.raises(DataError, match="unknown dataset 'minst'"):
        data.load("minst", "")


def test_the_standin_is_kept_and_held_to_its_checksum(tmp_path):
    first = data.load("mnist", "", ["mnist"], 40, 20, standin_dir=str(tmp_path))
    (path,) = tmp_path.glob("*.safetensors")
    assert data.load("mnist", "", ["mnist"], 40, 20, standin_dir=str(tmp_path)).checksum == first.checksum
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(DataError, match="damaged"):
        data.load("mnist", "", ["mnist"], 40, 20, standin_dir=str(tmp_path))


def test_the_real_svhn_is_read_by_torchvision_with_labels_0_to_9(tmp_path, monkeypatch):
    from torchvision.datasets import SVHN

    raw = tmp_path / "raw"
    raw.mkdir()
    images, split_list = {}, dict(SVHN.split_list)
    for part, n in (("train", 40), ("test", 20)):
        images[part] = np.random.default_rng(0).integers(0, 256, (32, 32, 3, n), dtype=np.uint8)
        file = raw / f"{part}_32x32.mat"
        labels = (np.arange(n) % 10 + 1).astype(np.uint8)[:, None]  # as in the official files: 1–10, 10 is the digit 0
        scipy.io.savemat(file, {"X": images[part], "y": labels})
        split_list[part] = [split_list[part][0], file.name, hashlib.md5(file.read_bytes()).hexdigest()]
    monkeypatch.setattr(SVHN, "split_list", split_list)
    d = data.load("svhn", str(tmp_path))
    assert d.source == "real"
    assert d.test_labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0] * 2
    assert torch.equal(d.test_images[3], torch.from_numpy(images["test"][..., 3]).permute(2, 0, 1))
    written = tmp_path / "svhn.safetensors"
    assert set(load_file(written)) == {"train_images", "train_labels", "test_images", "test_labels"}
    assert written.with_name("svhn.safetensors.sha256").read_text().startswith(cache.file_sha256(written))
