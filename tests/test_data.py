import hashlib
import pickle
import socket
import subprocess
import sys
import tarfile
import zlib
from dataclasses import replace

import numpy as np
import pytest
import scipy.io
import torch
from safetensors.torch import load_file, save_file

from weightsum_lib.study import data, store, synthetic
from weightsum_lib.study.data import DataError, variant

MOST = 100_000


@pytest.fixture(autouse=True)
def _downloads_may_be_tried(monkeypatch):
    """In every test anew: that one failed is kept in the environment."""
    for name in ("MNIST", "CIFAR10", "SVHN"):
        monkeypatch.setenv(f"WEIGHTSUM_NO_DOWNLOAD_{name}", "")
        monkeypatch.delenv(f"WEIGHTSUM_NO_DOWNLOAD_{name}")


def prepared(folder, name="cifar10", train=60, test=20):
    shape = (1, 28, 28) if name == "mnist" else (3, 32, 32)
    tensors = {}
    for part, n in (("train", train), ("test", test)):
        tensors[f"{part}_images"] = torch.randint(0, 256, (n, *shape), dtype=torch.uint8)
        tensors[f"{part}_labels"] = torch.arange(n) % 10
    save_file(tensors, folder / f"{name}.safetensors")
    return tensors


def load(name, folder, allow=(), train=MOST, test=MOST):
    return data.load(name, str(folder), allow, train, test, str(folder / "standins"))


def test_a_prepared_file_becomes_32x32_colour_with_a_validation_tenth(tmp_path):
    raw = prepared(tmp_path, "mnist")
    d = load("mnist", tmp_path)
    assert d.source == "real"
    assert [len(x) for x in (d.train_labels, d.val_labels, d.test_labels)] == [54, 6, 20]
    assert d.train_images.shape == (54, 3, 32, 32) and d.train_images.dtype == torch.uint8
    assert torch.equal(d.test_images[:, 1, 2:30, 2:30], raw["test_images"][:, 0])
    assert d.test_images[:, :, :2].sum() == 0
    used = torch.cat([d.train_images, d.val_images])[:, 0, 2:30, 2:30].flatten(1)
    assert {tuple(x.tolist()) for x in used} == {tuple(x.tolist()) for x in raw["train_images"].flatten(1)}


def test_the_split_is_a_fixed_permutation_and_capped(tmp_path):
    raw = prepared(tmp_path)
    d = load("cifar10", tmp_path, train=30, test=7)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))[:30]
    assert torch.equal(d.val_images, raw["train_images"][order[:3]])
    assert torch.equal(d.train_images, raw["train_images"][order[3:]])
    assert torch.equal(d.train_labels, raw["train_labels"][order[3:]])
    test = torch.randperm(20, generator=torch.Generator().manual_seed(0))[:7].sort().values
    assert torch.equal(d.test_images, raw["test_images"][test])


@pytest.mark.parametrize(("most", "train", "val"), [(MOST, range(54), range(54, 60)), (30, range(27), range(27, 30))])
def test_real_house_numbers_are_validated_on_a_block(tmp_path, most, train, val):
    """Neighbours in the official order are digits of one house number."""
    raw = prepared(tmp_path, "svhn")
    d = load("svhn", tmp_path, train=most)
    assert torch.equal(d.train_images, raw["train_images"][list(train)])
    assert torch.equal(d.val_labels, raw["train_labels"][list(val)])


def test_drawn_house_numbers_have_no_order_and_are_validated_at_random(tmp_path):
    d = data.load("svhn", "", ["svhn"], 60, 20, str(tmp_path))
    raw = store.read_tensors(next(tmp_path.glob("*.safetensors")))[0]
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    assert torch.equal(d.val_images, raw["train_images"][order[:6]])


def test_the_digest_is_of_what_training_reads_and_not_of_what_tests_read(tmp_path):
    prepared(tmp_path)
    d = load("cifar10", tmp_path)
    read = (d.train_images, d.train_labels, d.val_images, d.val_labels)
    assert d.training_digest == hashlib.sha256(b"".join(x.numpy().tobytes() for x in read)).hexdigest()


def test_a_damaged_file_is_found_by_its_checksum_and_named(tmp_path):
    prepared(tmp_path)
    path = tmp_path / "cifar10.safetensors"
    load("cifar10", tmp_path)
    sidecar = path.with_name("cifar10.safetensors.sha256")
    assert sidecar.read_text() == f"{hashlib.sha256(path.read_bytes()).hexdigest()}  cifar10.safetensors\n"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"cifar10.safetensors is damaged: its SHA-256.*Delete"):
        load("cifar10", tmp_path, ["cifar10"])
    sidecar.write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"is damaged: its SHA-256"):
        load("cifar10", tmp_path)


def test_a_half_written_file_is_named_and_no_standin_takes_its_place(tmp_path):
    prepared(tmp_path)
    path = tmp_path / "cifar10.safetensors"
    for damaged in (path.read_bytes()[:-100], b"", b"<html>"):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"cifar10.safetensors is damaged, half written or can't be read"):
            load("cifar10", tmp_path, ["cifar10"])


def test_a_part_of_a_set_says_how_much_of_it_there_is(tmp_path):
    prepared(tmp_path, "svhn")
    described = load("svhn", tmp_path, train=30).describe()
    assert described["source"] == "real"
    assert (
        described["note"] == "60 of 73,257 training and 20 of 26,032 test images, not compared with official checksums"
    )
    assert described["images"] == {"train": 27, "val": 3, "test": 20}
    assert described["of"] == {"train": 73_257, "test": 26_032}


def test_what_is_known_of_a_file_goes_by_images_and_labels(tmp_path, monkeypatch):
    raw = prepared(tmp_path)
    monkeypatch.setitem(data._KNOWN, data._content(raw)[:32], ("cifar10", "known"))
    assert load("cifar10", tmp_path).note.endswith("test images, known")
    path = tmp_path / "cifar10.safetensors"
    for change, note in (
        ({"train_labels": raw["train_labels"].to(torch.uint8)}, "known"),  # the same labels
        ({"train_labels": torch.zeros(60, dtype=torch.int64)}, "not compared with official checksums"),
        ({"test_images": 255 - raw["test_images"]}, "not compared with official checksums"),
    ):
        path.with_name("cifar10.safetensors.sha256").unlink(missing_ok=True)
        save_file(raw | change, path)
        assert load("cifar10", tmp_path).note.endswith(f"test images, {note}")


def test_a_mnist_of_official_size_must_hold_the_official_images(tmp_path):
    prepared(tmp_path, "mnist", 60_000, 10_000)
    with pytest.raises(DataError, match="its images and labels are not MNIST's"):
        load("mnist", tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_images": torch.zeros(60, 3, 32, 32)}, r"must be uint8 \('N', 3, 32, 32\).*float32"),
        (
            {"train_labels": torch.arange(59) % 10},
            r"train_labels \(N,\); got torch.uint8 \(60, 3, 32, 32\) and \(59,\)",
        ),
        ({"test_labels": torch.arange(20)}, "integers from 0 to 9"),
        ({"test_labels": torch.arange(20) % 10.0}, "integers from 0 to 9"),
        ({"test_labels": None}, "no tensor 'test_labels'"),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path, change, message):
    tensors = {k: v for k, v in {**prepared(tmp_path), **change}.items() if v is not None}
    save_file(tensors, tmp_path / "cifar10.safetensors")
    with pytest.raises(DataError, match=message):
        load("cifar10", tmp_path)


@pytest.mark.parametrize(
    "error",
    [OSError("no network"), EOFError("cut short"), tarfile.ReadError("no archive"), zlib.error("incorrect data"),
     pickle.UnpicklingError("invalid load key"), AssertionError(), RuntimeError("File not found or corrupted.")],
)  # fmt: skip
def test_a_failed_download_ends_in_what_to_do_or_in_the_standin(tmp_path, monkeypatch, capsys, error):
    def broken(*args):
        raise error

    monkeypatch.setattr(data, "official", broken)
    kind = type(error).__name__
    with pytest.raises(DataError, match=rf"no SVHN: .*{kind}.*DATA_DIR \(.*\), or .* allow_standin: \[svhn\]"):
        load("svhn", tmp_path)
    assert f"SVHN could not be downloaded: {kind}: {error}" in capsys.readouterr().err
    d = load("svhn", tmp_path, ["svhn"], 40, 20)
    assert d.source == "stand-in" and len(d.train_labels) == 36
    assert d.note == f"synthetic, since there is no file and the download failed ({kind})"
    assert not (tmp_path / "svhn.safetensors").exists() and not list(tmp_path.glob(".*"))
    assert socket.getdefaulttimeout() is None


def test_what_failed_once_is_not_tried_by_every_notebook_but_by_the_next_run(tmp_path, monkeypatch):
    tries = []
    monkeypatch.setattr(data, "official", lambda *a: tries.append(a) or 1 / 0)
    for _ in range(3):
        with pytest.raises(DataError, match=r"the download failed \(ZeroDivisionError\)"):
            load("mnist", tmp_path)
    assert len(tries) == 1
    inherits = "import os; print(os.environ['WEIGHTSUM_NO_DOWNLOAD_MNIST'])"
    assert subprocess.check_output([sys.executable, "-c", inherits], text=True).strip() == "ZeroDivisionError"


def test_an_empty_data_dir_means_no_file_and_no_download(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "official", lambda *a: pytest.fail("a download was tried"))
    with pytest.raises(DataError, match="data_dir is empty"):
        data.load("mnist", "", [], MOST, MOST, "")


def test_a_page_in_place_of_a_file_and_a_cut_archive_are_no_traceback(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10, SVHN

    (tmp_path / "raw").mkdir()
    page, archive = tmp_path / "raw" / "train_32x32.mat", tmp_path / "raw" / CIFAR10.filename
    page.write_text("<html>Log in to this network</html>")
    with tarfile.open(archive, "w:gz") as file:
        file.add(page, "cifar-10-batches-py/data_batch_1")
    archive.write_bytes(archive.read_bytes()[:60])
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(SVHN, "split_list", {"train": ["", page.name, hashlib.md5(page.read_bytes()).hexdigest()]})
    for name in ("svhn", "cifar10"):
        with pytest.raises(DataError, match=r"the download failed \(\w+\)\. Put a prepared"):
            load(name, tmp_path)


def test_the_standin_is_kept_and_made_again_where_it_is_damaged(tmp_path, monkeypatch, capfd):
    def same(a, b):
        return all(torch.equal(getattr(a, name), getattr(b, name)) for name in data._TENSORS)

    monkeypatch.setattr(data, "_MANY", 59)
    first = data.load("mnist", "", ["mnist"], 40, 20, str(tmp_path))
    assert first.note == "synthetic, since no data folder is given (data_dir is empty)"
    (path,) = tmp_path.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    again = data.load("mnist", "", ["mnist"], 40, 20, str(tmp_path))
    assert same(again, first) and again.checksum == first.checksum
    monkeypatch.setattr(synthetic, "synthesize", lambda *a: pytest.fail("it was there"))
    assert same(data.load("mnist", "", ["mnist"], 40, 20, str(tmp_path)), first)
    assert capfd.readouterr().err == 2 * "drawing 60 images of the stand-in for MNIST, once\n"


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
    d = load("svhn", tmp_path)
    assert d.source == "real" and d.note.endswith("test images, official, exact")
    assert d.test_labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0] * 2
    assert torch.equal(d.test_images[3], torch.from_numpy(images["test"][..., 3]).permute(2, 0, 1))
    written = tmp_path / "svhn.safetensors"
    assert set(load_file(written)) == {"train_images", "train_labels", "test_images", "test_labels"}
    assert written.with_name("svhn.safetensors.sha256").read_text().startswith(store.file_sha256(written))


def test_cifar10_is_read_with_channels_first(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (6, 2, 3072), dtype=np.uint8)
    files = [name for name, _ in CIFAR10.train_list + CIFAR10.test_list]
    for name, rows in zip(files, pixels, strict=True):
        (folder / name).write_bytes(pickle.dumps({"data": rows, "labels": [3, 7]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *a: True)
    tensors = data.official("cifar10", tmp_path)
    assert torch.equal(tensors["test_images"], torch.from_numpy(pixels[5]).view(2, 3, 32, 32))
    assert tensors["train_images"].shape == (10, 3, 32, 32) and tensors["train_labels"].tolist() == [3, 7] * 5


def test_tasks_made_from_a_dataset(datasets):
    def made(name):
        task = variant(name, datasets.__getitem__)
        assert task.name == name
        return task

    d = datasets["mnist"]
    assert made("mnist") is d
    assert torch.equal(made("mnist inverted").val_images, 255 - d.val_images)
    assert torch.equal(made("mnist turned").test_images[0, 0], torch.rot90(d.test_images[0, 0]))
    assert torch.equal(made("mnist turned turned turned turned").train_images, d.train_images)
    names = torch.arange(10).roll(3)
    for split in ("train", "val", "test"):
        renamed, halves = made("mnist renamed 3"), [made("mnist classes 0-4"), made("mnist classes 5-9")]
        labels = getattr(d, f"{split}_labels")
        assert torch.equal(getattr(renamed, f"{split}_labels"), names[labels])
        assert torch.equal(getattr(renamed, f"{split}_images"), getattr(d, f"{split}_images"))
        for half, chosen in zip(halves, (labels < 5, labels > 4), strict=True):
            assert torch.equal(getattr(half, f"{split}_labels"), labels[chosen])
            assert torch.equal(getattr(half, f"{split}_images"), getattr(d, f"{split}_images")[chosen])
    assert torch.equal(made("mnist renamed 3 renamed 7").test_labels, d.test_labels)
    assert d.describe()["of"] and not made("mnist turned").describe()["of"]


def test_tasks_are_joined_with_their_own_labels(datasets):
    a, b = datasets["mnist"], datasets["cifar10"]
    both = variant("mnist inverted+cifar10", datasets.__getitem__)
    assert (both.name, both.source) == ("mnist inverted+cifar10", "stand-in+stand-in")
    assert torch.equal(both.train_images[::2], 255 - a.train_images) and torch.equal(
        both.train_images[1::2], b.train_images
    )
    few = {"mnist": a, "cifar10": replace(b, train_images=b.train_images[:40], train_labels=b.train_labels[:40])}
    joined = variant("mnist+cifar10", few.__getitem__)  # the smaller set's images again and again
    assert len(joined.train_labels) == len(joined.train_images) == 2 * len(a.train_labels)
    assert torch.equal(joined.train_images[1::2][:80], torch.cat([few["cifar10"].train_images] * 2))
    assert torch.equal(joined.train_labels[1::2][40:80], few["cifar10"].train_labels)
    assert torch.equal(both.test_labels, torch.cat([a.test_labels, b.test_labels]))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("minst", "unknown dataset 'minst'; did you mean 'mnist'"),
        ("minst inverted", "unknown dataset 'minst'; did you mean 'mnist'"),
        ("mnist invertd", "unknown dataset 'mnist invertd'; did you mean 'inverted'"),
        ("mnist rename 3", "did you mean 'renamed #'"),
        ("mnist classes 9", "did you mean 'classes #-#'"),
        ("mnist classes 7-3", "'mnist classes 7-3' leaves no image"),
        ("mnist+", "unknown dataset ''; known: mnist, cifar10, svhn"),
    ],
)
def test_an_unknown_task_is_refused_with_the_nearest(datasets, name, message):
    with pytest.raises(DataError, match=message):
        variant(name, datasets.__getitem__)


def test_an_unknown_dataset_is_refused_with_the_nearest(tmp_path):
    with pytest.raises(DataError, match="unknown dataset 'cifar100'; did you mean 'cifar10'"):
        load("cifar100", tmp_path)
