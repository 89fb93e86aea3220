"""Digits as coverage of ink, from 0 to 1: written with a pen, and as house numbers beside their neighbours.

Image axes are (row, column); points are (x, y), y points down.
"""

import json
from pathlib import Path

import numpy as np
from scipy.interpolate import CubicSpline, make_interp_spline
from scipy.spatial import KDTree

DATA = json.loads(Path(__file__).with_name("strokes.json").read_text(encoding="utf-8"))  # which says what it holds
_DENSE = 96  # pen positions a digit


def _written(rng: np.random.Generator, way: str, n: int, jitter: float) -> np.ndarray:
    """Pen positions (n, _DENSE, 2), x before y, of one way of writing a digit, its control points moved a little."""
    strokes = way.split("|")
    points = [np.array([(int(p[:2]), int(p[2:])) for p in s.replace("~", "").split()]) / 100 for s in strokes]
    lengths = [np.concatenate([[0], np.linalg.norm(np.diff(p, axis=0), axis=1).cumsum()]) for p in points]
    ends = np.cumsum([0] + [along[-1] for along in lengths])
    counts, nominal = np.diff(np.round(ends / ends[-1] * _DENSE).astype(int)), np.concatenate(points)
    moved = nominal + rng.normal(0, jitter, (n, *nominal.shape))
    moved, pen = np.split(moved, np.cumsum([len(p) for p in points[:-1]]), axis=1), []
    for stroke, p, along, count, at in zip(strokes, points, lengths, counts, moved, strict=True):
        line, closed = make_interp_spline(along, at, k=1, axis=1), np.array_equal(p[0], p[-1])
        if "~" in stroke:
            at[:, -1] = at[:, 0] if closed else at[:, -1]
            line = CubicSpline(along, at, axis=1, bc_type="periodic" if closed else "natural")
        pen.append(line(np.linspace(0, along[-1], count)))
    return np.concatenate(pen, 1)


def _pen(rng: np.random.Generator, digits: np.ndarray, wobble: float) -> np.ndarray:
    """Pen positions (n, _DENSE, 2) of handwritten digits, heights about 1; `wobble` (in heights) distorts smoothly."""
    pen, choice = np.empty((len(digits), _DENSE, 2)), rng.random(len(digits))
    for digit, ways in enumerate(DATA["strokes"]):
        for number, way in enumerate(ways):
            if len(rows := np.flatnonzero((digits == digit) & ((choice * len(ways)).astype(int) == number))):
                pen[rows] = _written(rng, way, len(rows), wobble / 4)
    waves = rng.normal(0, 4.0, (len(digits), 2, 3))
    phase = rng.uniform(0, 2 * np.pi, (len(digits), 1, 3))
    return pen + wobble * np.sin(pen @ waves + phase) @ rng.normal(0, 0.8, (len(digits), 3, 2))


def _ink(pen: np.ndarray, radius: np.ndarray, side: int) -> np.ndarray:
    """Coverage (n, side, side) in 0..1, float32, of a round pen of radius (n,) pixels at positions (n, P, 2)."""
    at = np.argwhere(np.ones((side, side)))[:, ::-1]  # each pixel, x before y
    away = [KDTree(p).query(at, distance_upper_bound=r + 0.5)[0] for p, r in zip(pen, radius, strict=True)]
    return np.float32(np.clip(radius[:, None] + 0.5 - np.array(away), 0, 1)).reshape(-1, side, side)


def handwritten(rng: np.random.Generator, labels: np.ndarray) -> np.ndarray:
    """Handwritten digits as MNIST's: in a box of 20 pixels, their centre of mass in the middle.

    Args:
        rng: the stream that is drawn from.
        labels: (n,) integers, 0..9.

    Returns:
        uint8 (n, 1, 28, 28), ink 255 on black.
    """
    n = len(labels)
    pen = _pen(rng, labels, 0.055)
    angle, slant, wide = rng.normal(0, 0.13, n), rng.normal(0.12, 0.26, n), np.exp(rng.normal(0.12, 0.24, n))
    shape = np.array([[np.cos(angle) * wide, np.sin(angle) * wide],
                      [-np.sin(angle) - slant * np.cos(angle), np.cos(angle) - slant * np.sin(angle)]])  # fmt: skip
    pen = pen @ shape.transpose(2, 0, 1)
    radius = np.clip(np.exp(rng.normal(0.15, 0.28, n)), 0.7, 2.3)
    low, high = pen.min(1, keepdims=True), pen.max(1, keepdims=True)
    pen = (pen - (low + high) / 2) / (high - low).max(2, keepdims=True) * (19.5 - 2 * radius)[:, None, None]
    pen += 13.5 - 0.7 * pen.mean(1, keepdims=True) + rng.normal(0, 0.25, (n, 1, 2))
    return np.uint8(255 * _ink(pen, radius, 28)[:, None] ** rng.uniform(0.6, 1.1, (n, 1, 1, 1)))


_SCENE = 48  # side of a house-number crop before the camera makes 32 of it
_SIDES = (0.12, 0.27, 0.27, 0.34)  # share of crops with no neighbour, a left one, a right one, both


def house_numbers(rng: np.random.Generator, labels: np.ndarray) -> np.ndarray:
    """Digits of house numbers: one in the middle, and the parts of its neighbours that are in view.

    Args:
        rng: the stream that is drawn from.
        labels: (n,) integers, 0..9, of the digits in the middle.

    Returns:
        float32 (n, 48, 48), coverage in 0..1.
    """
    n, three = len(labels), rng.integers(10, size=(len(labels), 3))
    three[:, 1] = labels
    pen = _pen(rng, three.ravel(), 0.012).reshape(n, 3, _DENSE, 2)
    low, high = pen.min(2, keepdims=True), pen.max(2, keepdims=True)
    pen = (pen - (low + high) / 2) / (high - low)[..., 1:]
    pen[..., 0] *= rng.uniform(0.7, 1.3, (n, 1, 1))
    thick = rng.uniform(0.03, 0.14, (n, 1))  # half of a stroke, in heights of what is inked
    wide, gap = np.ptp(pen[..., 0], axis=2), rng.uniform(0.05, 0.35, (n, 1)) + 2 * thick / (1 - 2 * thick)
    pen[:, 0, :, 0] -= (wide[:, :1] + wide[:, 1:2]) / 2 + gap
    pen[:, 2, :, 0] += (wide[:, 1:2] + wide[:, 2:]) / 2 + gap
    sides = rng.choice(4, n, p=_SIDES)  # 1 is left, 2 is right, 3 is both
    pen[sides % 2 == 0, 0] = pen[sides < 2, 2] = 99  # out of sight
    height, turn, shear = rng.uniform(0.62, 1.02, n), rng.normal(0, 0.09, n), rng.normal(0, 0.12, n)
    radius = height * thick[:, 0]
    look = (height - 2 * radius) * np.array([[np.cos(turn), np.sin(turn)], [shear - np.sin(turn), np.cos(turn)]])
    pen = pen.reshape(n, -1, 2) @ look.transpose(2, 0, 1) + rng.normal(0.5, 0.035, (n, 1, 2))
    return _ink(pen * _SCENE - 0.5, radius * _SCENE, _SCENE)
