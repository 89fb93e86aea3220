import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: other processes may compute meanwhile

import pytest
import torch

from weightsum_lib.study import params
from weightsum_lib.study.data import Dataset


def pytest_collection_modifyitems(items):
    """The longest file first, beside which all others are tested."""
    items.sort(key=lambda item: item.path.name != "test_run.py")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def images():
    return torch.randint(0, 256, (24, 3, 32, 32), dtype=torch.uint8)


def tiny_params(folder, **changes):
    """The smoke profile, smaller still, with results in a folder of the test's own."""
    small = {"width": 1 / 16, "train_images": 120, "test_images": 40, "calibration_images": 32, "epoch_images": 96}
    small |= {"batch_size": 32, "results_dir": str(folder), "device": "cpu"}
    return params.read("smoke", small | changes)


@pytest.fixture
def tiny(tmp_path):
    return tiny_params(tmp_path / "results")


@pytest.fixture(scope="session")
def datasets():
    """Two learnable toy tasks by dataset name: the class is the brightness of a patch."""
    generator = torch.Generator().manual_seed(0)

    def make(name, channel):
        splits = {}
        for split, n in (("train", 96), ("val", 20), ("test", 40)):
            labels = torch.arange(n) % 10
            x = torch.randint(0, 60, (n, 3, 32, 32), dtype=torch.uint8, generator=generator)
            x[:, channel, 8:24, 8:24] = (labels * 25).to(torch.uint8).view(-1, 1, 1)
            splits |= {f"{split}_images": x, f"{split}_labels": labels}
        return Dataset(name=name, source="stand-in", note="toy", checksum=name, **splits)

    return {"mnist": make("mnist", 0), "cifar10": make("cifar10", 1)}
