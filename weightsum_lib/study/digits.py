"""Digits as coverage of ink, from 0 to 1: written with a pen, and as house numbers beside their neighbours.

Image axes are (row, column); points are (x, y), y points down.
"""

import json
from functools import lru_cache
from itertools import product
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont
from scipy.interpolate import CubicSpline, make_interp_spline

DATA = json.loads(Path(__file__).with_name("strokes.json").read_text(encoding="utf-8"))  # which says what it holds
_DENSE = 96  # pen positions a digit


def _written(rng: np.random.Generator, way: str, n: int, jitter: float, smooth: bool) -> np.ndarray:
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
        if smooth and "~" in stroke:
            at[:, -1] = at[:, 0] if closed else at[:, -1]
            line = CubicSpline(along, at, axis=1, bc_type="periodic" if closed else "natural")
        pen.append(line(np.linspace(0, along[-1], count)))
    return np.concatenate(pen, 1)


def _pen(rng: np.random.Generator, digits: np.ndarray, wobble: float, smooth: bool = True) -> np.ndarray:
    """Pen positions (n, _DENSE, 2) of handwritten digits, heights about 1; `wobble` (in heights) distorts smoothly."""
    pen, choice = np.empty((len(digits), _DENSE, 2)), rng.random(len(digits))
    for digit, ways in enumerate(DATA["strokes"]):
        for number, way in enumerate(ways):
            if len(rows := np.flatnonzero((digits == digit) & ((choice * len(ways)).astype(int) == number))):
                pen[rows] = _written(rng, way, len(rows), wobble / 4, smooth)
    waves = rng.normal(0, 4.0, (len(digits), 2, 3))
    phase = rng.uniform(0, 2 * np.pi, (len(digits), 1, 3))
    return pen + wobble * np.sin(pen @ waves + phase) @ rng.normal(0, 0.8, (len(digits), 3, 2))


def _ink(pen: np.ndarray, radius: np.ndarray, height: int, width: int, square: bool = False) -> np.ndarray:
    """Coverage (n, height, width) in 0..1 of a round or square pen of radius (n,) pixels at positions (n, P, 2)."""
    ink = np.empty((len(pen), height, width), np.float32)
    ys, xs = np.mgrid[:height, :width].astype(np.float32)
    for i, (path, r) in enumerate(zip(pen.astype(np.float32), radius, strict=True)):
        dx, dy = xs[..., None] - path[:, 0], ys[..., None] - path[:, 1]
        away = np.maximum(abs(dx), abs(dy)).min(-1) if square else np.sqrt((dx * dx + dy * dy).min(-1))
        ink[i] = np.clip(r + 0.5 - away, 0, 1)
    return ink


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
    return np.uint8(255 * _ink(pen, radius, 28, 28)[:, None] ** rng.uniform(0.6, 1.1, (n, 1, 1, 1)))


_GLYPH = 48  # height of a stored glyph in pixels
_SCENE = 48  # side of a house-number crop before the camera makes 32 of it
_SIDES = (0.12, 0.27, 0.27, 0.34)  # share of crops with no neighbour, a left one, a right one, both


def _trimmed(image: Image.Image) -> Image.Image:
    """The inked part of a grey image, scaled to the height of a glyph."""
    image = image.crop(image.getbbox())
    return image.resize((max(6, round(image.width * _GLYPH / image.height)), _GLYPH), Image.Resampling.BICUBIC)


def _print(font: ImageFont.FreeTypeFont, digit: str, stroke: int, footless: bool) -> Image.Image:
    """A glyph as a grey image (120 wide, 140 high at most), its strokes widened; a 1 without its foot if asked for."""
    image = Image.new("L", (120, 140))
    ImageDraw.Draw(image).text((30, 20), digit, 255, font, stroke_width=stroke)
    left, top, right, bottom = image.getbbox()
    return image.crop((left, top, right, bottom - 10 - 2 * stroke)) if digit == "1" and footless else image


@lru_cache
def _typefaces() -> tuple[list[list[Image.Image]], list[list[Image.Image]]]:
    """Faces of ten glyphs each, as grey images _GLYPH high: those from font files, and those drawn with a pen."""
    printed, drawn = [], []
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    names = [p for p in sorted(folder.glob("*.ttf")) if p.stem.startswith(("DejaVu", "STIXGeneral", "cm"))]
    for path in [p for p in names if p.stem not in ("DejaVuSansDisplay", "DejaVuSerifDisplay", "cmex10", "cmsy10")]:
        font = ImageFont.truetype(path, 80)
        plain_one = "Sans" in path.stem or path.stem in ("cmss10", "cmtt10")  # whose 1 also comes without its foot
        digits = "O123456789" if "Mono" in path.stem else "0123456789"  # a 0 with a dot inside is no house number
        for weight, footless in product((-3, 0, 0, 3, 7), (False, True)[: 1 + plain_one]):
            thin = weight < 0 and ("Bold" in path.stem or "Sans" in path.stem)
            glyphs = [_print(font, digit, max(weight, 0), footless) for digit in digits]
            printed.append([_trimmed(g.filter(ImageFilter.MinFilter(-weight)) if thin else g) for g in glyphs])
    rng = np.random.default_rng(20)
    for face in range(120):
        wide, heavy = rng.uniform(0.75, 1.25), rng.uniform(1.3, 6.5)
        pen = _pen(rng, np.arange(10), 0.02 * rng.random(), smooth=face % 6 > 0) * [40 * wide, 44] + [14, 12]
        ink = _ink(pen, np.full(10, heavy), 68, 64, square=face % 3 == 1)
        drawn.append([_trimmed(Image.fromarray(np.uint8(255 * glyph))) for glyph in ink])
    return printed, drawn


def _look(rng: np.random.Generator, middle: float) -> np.ndarray:
    """How a camera sees the digit at (middle, _GLYPH): eight numbers of a perspective, from a scene's points to it."""
    height, stretch = rng.uniform(0.62, 1.02), np.exp(rng.normal(0.06, 0.16))
    turn, shear = rng.normal(0, 0.09), rng.normal(0, 0.12)
    look = np.eye(3)
    look[:2, :2] = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]) * (_GLYPH / _SCENE / height)
    look[0] /= stretch
    look[0] += shear * look[1]
    look[2, :2] = rng.normal(0, 0.0015, 2)
    before, after = np.eye(3), np.eye(3)
    before[:2, 2] = -_SCENE / 2 + rng.normal(0, 0.035, 2) * _SCENE
    after[:2, 2] = middle, _GLYPH
    look = after @ look @ before
    return (look / look[2, 2]).ravel()[:8]


def house_numbers(rng: np.random.Generator, labels: np.ndarray) -> np.ndarray:
    """Digits of house numbers: one in the middle, and the parts of its neighbours that are in view.

    Args:
        rng: the stream that is drawn from.
        labels: (n,) integers, 0..9, of the digits in the middle.

    Returns:
        float32 (n, 48, 48), coverage in 0..1.
    """
    masks, middle = np.empty((len(labels), _SCENE, _SCENE), np.float32), 2.5 * _GLYPH
    for i, label in enumerate(labels):
        faces = _typefaces()[int(rng.random() < 0.4)]
        face = faces[rng.integers(len(faces))]
        row = Image.new("L", (5 * _GLYPH, 2 * _GLYPH))
        top, gap, glyph = _GLYPH // 2, _GLYPH * rng.uniform(0.02, 0.3), face[label]
        row.paste(glyph, (round(middle - glyph.width / 2), top))
        sides = rng.choice(4, p=_SIDES)
        for side in [s for s in (1, 2) if sides & s]:  # 1 is left, 2 is right, 3 is both
            other, drop = face[rng.integers(10)], round(rng.normal(0, 0.03) * _GLYPH)
            distance = (glyph.width + other.width) / 2 + gap
            box = (round(middle + (distance if side == 2 else -distance) - other.width / 2), top + drop)
            row.paste(ImageChops.lighter(other, row.crop((*box, box[0] + other.width, box[1] + _GLYPH))), box)
        look = _look(rng, middle)
        view = row.transform((_SCENE,) * 2, Image.Transform.PERSPECTIVE, look, Image.Resampling.BILINEAR)
        masks[i] = np.asarray(view, np.float32) / 255
    return masks
