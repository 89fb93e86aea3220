"""The Python of the README and of the library's page runs as it stands there, and does what the words beside it say."""

import copy
import doctest
import re
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import ResNet

import weightsum_lib

API = (Path(__file__).parent.parent / "book" / "api.md").read_text(encoding="utf-8")
README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def told():
    """What the README's Python blocks leave behind, run one after another beside a reader's images and loaders."""
    torch.manual_seed(0)
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
    loader = DataLoader(TensorDataset(images, labels), batch_size=4)
    names = {"loader_a": loader, "loader_b": loader, "images_a": images, "images_b": images.flip(3)}
    blocks = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 4
    for number, block in enumerate(blocks):
        exec(compile(block, f"README.md, block {number}", "exec"), names)
        if number == 2:  # the last block trains them on
            names["untouched"] = copy.deepcopy((names["network_a"], names["network_b"]))
    return names


@torch.no_grad()
def test_the_plain_network_has_the_summed_weights(told):
    (a, b), plain = told["untouched"], told["plain"]
    assert type(plain) is ResNet and not plain.training
    for name, weight in plain.named_parameters():
        torch.testing.assert_close(weight, a.get_parameter(name) + b.get_parameter(name), rtol=0, atol=0)


@torch.no_grad()
def test_under_dealt_keys_the_sum_adds_what_each_network_answers(told):
    a, b, images = *(network.eval() for network in told["untouched"]), told["images_a"]
    assert told["apart"].conv1.out_channels == 2 * a.conv1.out_channels
    torch.testing.assert_close(told["apart"](images), a(images) + b(images), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_under_drawn_keys_an_eighth_of_the_channels_is_shared(told):
    shares = list(told["shared"].values())
    assert sum(shares) / len(shares) == pytest.approx(1 / 8, abs=0.04) and max(shares) < 0.3
    assert told["mixed"].conv1.out_channels == 2 * told["network_a"].conv1.out_channels
    assert told["mixed"](told["images_a"]).isfinite().all()


def test_the_layout_names_every_module():
    package = Path(__file__).parent.parent / "weightsum_lib"
    layout = README.split("## The layout of the house")[1]
    words = set(re.findall(r"\w+", layout))
    assert {path.stem for path in package.rglob("*.py")} - {"__init__"} <= words
    assert {path.stem for path in (package.parent / "notebooks").glob("*.py")} <= words
    assert {path.name for path in (package.parent / "params").glob("*.yaml")} <= set(re.findall(r"\w+\.yaml", layout))


@torch.no_grad()
def test_the_published_networks_are_added_and_still_read_digits(told):
    """Without data or training: the sum reads as many digits, give or take one, as its MNIST network alone."""
    alone = (told["pair"][0](told["digits"]).argmax(1) == told["labels"]).sum()
    assert abs(int(told["read"]) - int(alone)) <= 1 and told["read"] >= 12


def test_the_library_page_is_one_session_in_which_every_public_name_is_used(monkeypatch, capsys):
    monkeypatch.chdir(Path(__file__).parent.parent)
    text = re.sub("^```", "\n```", API, flags=re.MULTILINE)  # what is printed ends where the block does
    session = doctest.DocTestParser().get_doctest(text, {}, "api.md", "book/api.md", 0)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    runner.run(session)
    assert runner.summarize().failed == 0, capsys.readouterr().out
    used = {name for e in session.examples if "import" not in e.source for name in re.findall(r"\w+", e.source)}
    assert {*weightsum_lib.__all__} - used == set()
