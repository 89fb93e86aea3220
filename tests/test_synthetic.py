import ast
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

from weightsum_lib.study import digits, synthetic
from weightsum_lib.study.store import PACKAGE
from weightsum_lib.study.synthetic import synthesize

SHAPES = {"mnist": (1, 28, 28), "svhn": (3, 32, 32), "cifar10": (3, 32, 32)}


@pytest.fixture(scope="module")
def mnist():
    """Stand-in digits, flat in 0..1, and their labels: 3,000 to fit, 500 to test."""
    (fit, fit_labels), (test, test_labels) = synthesize("mnist", 3000, "train"), synthesize("mnist", 500, "test")
    return fit.reshape(3000, -1) / 255, fit_labels, test.reshape(500, -1) / 255, test_labels


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("count", [1, 253])
def test_shapes_types_and_range(name, count):
    images, labels = synthesize(name, count, "train")
    assert images.shape == (count, *SHAPES[name]) and images.dtype == np.uint8 and images.flags["C_CONTIGUOUS"]
    assert labels.shape == (count,) and labels.dtype == np.int64
    if count > 1:
        assert images.min() < 20 and images.max() > 235
        assert (images.std(axis=(1, 2, 3)) > 0).all(), "an image is blank"


@pytest.mark.parametrize("name", SHAPES)
def test_labels_are_balanced_and_shuffled(name):
    labels = synthesize(name, 105, "test")[1]
    counts = np.bincount(labels, minlength=10)
    assert len(counts) == 10 and counts.min() == 10 and counts.max() == 11
    assert not np.array_equal(labels, np.sort(labels)) and not np.array_equal(labels, np.arange(105) % 10)


@pytest.mark.parametrize("name", SHAPES)
def test_equal_arguments_give_equal_images_whatever_numpys_global_state(name):
    np.random.seed(1)
    first = synthesize(name, 30, "train")
    np.random.seed(2)
    again = synthesize(name, 30, "train")
    assert np.array_equal(first[0], again[0]) and np.array_equal(first[1], again[1])


@pytest.mark.parametrize("name", SHAPES)
def test_no_test_image_is_a_train_image(name):
    train, test = (synthesize(name, 100, split)[0] for split in ("train", "test"))
    assert not {image.tobytes() for image in train} & {image.tobytes() for image in test}
    assert len({image.tobytes() for image in train}) == 100


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("imagenet", 5, "train"), "mnist.*imagenet"),
        (("mnist", 5, "val"), "test.*val"),
        (("mnist", 0, "train"), "1 image.* 0"),
    ],
)
def test_errors_say_what_came_and_what_was_expected(arguments, told):
    with pytest.raises(ValueError, match=told):
        synthesize(*arguments)


def test_digits_are_told_apart_by_a_linear_readout(mnist):
    fit, fit_labels, test, test_labels = mnist
    weights = np.linalg.solve(fit.T @ fit + 10 * np.eye(fit.shape[1]), fit.T @ np.eye(10)[fit_labels])
    accuracy = ((test @ weights).argmax(1) == test_labels).mean()
    assert 0.6 < accuracy < 0.97, "digits should be legible, and not all alike"


def test_digits_are_placed_as_in_mnist(mnist):
    image = mnist[0].reshape(-1, 28, 28)
    where = np.arange(28)
    for axis in (1, 2):
        centre = (image.sum(3 - axis) * where).sum(1) / image.sum((1, 2))
        assert abs(centre.mean() - 13.5) < 0.5 and centre.std() < 1.5
        extent = (image.max(3 - axis) > 0.5).sum(1)
        assert extent.max() <= 21
    assert 0.08 < image.mean() < 0.18  # 0.13 in MNIST


def edge_strength(images: np.ndarray) -> float:
    """Mean absolute difference of vertical neighbours in the three columns at either side, (N, 3, 32, 32) → levels."""
    return float(abs(np.diff(images[..., [0, 1, 2, -3, -2, -1]].astype(float), axis=2)).mean())


def ink_at_the_sides(sides: tuple[float, ...]) -> np.ndarray:
    """Largest coverage in the two outer columns, left and right, (N, 2), of 100 house numbers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "_SIDES", sides)
        masks = digits.house_numbers(np.random.default_rng(3), np.arange(100) % 10)
    return np.stack([masks[:, :, :2].max((1, 2)), masks[:, :, -2:].max((1, 2))], 1)


def test_house_numbers_have_neighbours_on_the_sides_asked_for():
    alone, left, right, both = ((ink_at_the_sides(tuple(np.eye(4)[k])) > 0.5).mean(0) for k in range(4))
    assert alone.max() < 0.2
    assert left[0] > 0.5 > 0.2 > left[1] and right[1] > 0.5 > 0.2 > right[0]
    assert both.min() > 0.5


def test_house_number_crops_show_their_neighbours(monkeypatch):
    usual = edge_strength(synthesize("svhn", 400, "train")[0])
    monkeypatch.setattr(digits, "_SIDES", (1.0, 0.0, 0.0, 0.0))
    assert usual > 1.15 * edge_strength(synthesize("svhn", 400, "train")[0])


def test_house_numbers_are_light_on_dark_and_dark_on_light():
    rng = np.random.default_rng(5)
    ink = digits.house_numbers(rng, np.arange(200) % 10)[..., None]
    scene = synthetic._paint(rng, ink[..., 0]).mean(-1, keepdims=True)
    digit, wall = ((scene * m).sum((1, 2, 3)) / m.sum((1, 2, 3)) for m in (ink, 1 - ink))
    assert 0.3 < (digit > wall).mean() < 0.7


def test_the_stand_ins_need_no_more_than_three_packages():
    nodes = [n for module in (digits, synthetic) for n in ast.walk(ast.parse(Path(module.__file__).read_text()))]
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    packages = {name.split(".")[0] for name in imported} - {*sys.stdlib_module_names, "weightsum_lib"}
    assert packages == {"numpy", "PIL", "scipy"}


def test_strokes_and_paints_go_where_the_code_goes():
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())
    assert "strokes.json" in project["tool"]["setuptools"]["package-data"]["weightsum_lib.study"]
    assert len(digits.DATA["strokes"]) == 10 and np.shape(digits.DATA["paints"]) == (15, 3)
