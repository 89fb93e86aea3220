"""Synthetic stand-ins for MNIST, SVHN and CIFAR-10, for machines that can neither read nor download the real sets.

Pen-drawn digits, house numbers and textured shapes, made with numpy, scipy and Pillow.
What is measured on them is about them, not about the real sets.
"""

import zlib
from functools import partial
from io import BytesIO

import numpy as np
from PIL import Image, ImageFilter
from scipy import fft

from weightsum_lib.study.digits import DATA, handwritten, house_numbers


def _cloud(rng: np.random.Generator, n: int, size: int, slope: np.ndarray) -> np.ndarray:
    """Noise (n, size, size) of mean 0 and deviation 1 whose amplitude falls as frequency^-slope, slope (n,)."""
    f = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)).astype(np.float32)
    f[0, 0] = 1
    spectrum = fft.rfft2(rng.standard_normal((n, size, size), np.float32))
    noise = fft.irfft2(spectrum * f ** -slope[:, None, None].astype(np.float32))
    noise -= noise.mean((1, 2), keepdims=True)
    return noise / noise.std((1, 2), keepdims=True)


def _each(rng: np.random.Generator, n: int, low: float, high: float) -> np.ndarray:
    """A number for each of n images, uniform from low to high, float32 (n, 1, 1)."""
    return rng.uniform(low, high, (n, 1, 1)).astype(np.float32)


def _paint(rng: np.random.Generator, ink: np.ndarray) -> np.ndarray:
    """Coloured scenes (n, S, S, 3), 0..255 but not clipped, of digit masks (n, S, S) on lit, mottled walls."""
    n, size = ink.shape[:2]
    each = partial(_each, rng, n)
    y, x = np.mgrid[:size, :size].astype(np.float32) / size - 0.5

    def colours():
        paint = np.array(DATA["paints"])[rng.integers(len(DATA["paints"]), size=n)]
        grey = paint.mean(1, keepdims=True)
        paint = grey + rng.uniform(0.25, 1, (n, 1)) * (paint - grey) + rng.normal(0, 20, (n, 3))
        return paint.astype(np.float32)[:, None, None]

    wall, digit = colours(), colours()
    gap = (digit - wall).mean(-1, keepdims=True)
    wanted = np.sign(gap) * (each(15, 110) + each(0, 40))[..., None]  # digit and wall differ in brightness
    digit += np.where(abs(gap) < abs(wanted), wanted - gap, 0)
    scene = wall + (each(0, 35) * _cloud(rng, n, size, rng.uniform(0.4, 1.8, n)))[..., None]
    body = digit + (each(0, 12) * _cloud(rng, n, size, np.full(n, 1.2)) + each(-40, 40) * y)[..., None]
    scene += (ink * each(0.6, 1.2).clip(max=1))[..., None] * (body - scene)
    scene *= (1 + each(-0.5, 0.5) * x + each(-0.5, 0.5) * y)[..., None]  # the light falls from one side
    scene = 255 * (np.clip(scene, 0, 255) / 255) ** np.exp(rng.normal(0, 0.3, (n, 1, 1, 1)))
    centre = scene.mean((1, 2), keepdims=True)
    return 0.65 * centre + each(10, 75)[..., None] + (scene - centre) * each(0.45, 1.15)[..., None]


def _camera(rng: np.random.Generator, scene: np.ndarray) -> np.ndarray:
    """One scene (S, S, 3) as a crop (32, 32, 3) of a street photograph: blurred, coarse, noisy, compressed."""
    photo = Image.fromarray(np.uint8(np.clip(scene, 0, 255)))
    photo = photo.filter(ImageFilter.GaussianBlur(min(2.6, float(np.exp(rng.normal(-0.1, 0.6))))))
    side = round(np.exp(rng.uniform(np.log(11), np.log(48))))
    photo = photo.resize((side, side), Image.Resampling.BOX)
    photo = Image.fromarray(np.uint8(np.clip(photo + rng.normal(0, rng.exponential(3.5), (side, side, 3)), 0, 255)))
    photo.save(packed := BytesIO(), "JPEG", quality=int(rng.integers(35, 96)))
    return np.asarray(Image.open(packed).resize((32, 32)))


def _svhn(rng: np.random.Generator, labels: np.ndarray) -> np.ndarray:
    """Crops (n, 3, 32, 32) of house numbers, as in SVHN's format 2: the digit in the middle is the label."""
    return np.stack([_camera(rng, s) for s in _paint(rng, house_numbers(rng, labels))]).transpose(0, 3, 1, 2)


def _inside(labels: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance-like fields, positive inside shapes `labels` (n,) of about unit radius, at x and y (n, S, S)."""
    r, angle = np.hypot(x, y), np.arctan2(y, x)
    square = 0.85 - np.maximum(abs(x), abs(y))
    fields = (
        1 - r,  # disc
        0.3 - abs(r - 0.75),  # ring
        square,
        0.55 - np.maximum(y, abs(x) * 0.87 - y / 2),  # triangle
        0.72 + 0.33 * np.cos(5 * angle) - r,  # star
        np.minimum(1 - np.maximum(abs(x), abs(y)), 0.3 - np.minimum(abs(x), abs(y))),  # cross
        np.minimum(1 - r, np.hypot(x - 0.5, y) - 0.75),  # crescent
        np.minimum(0.28 - abs(abs(y) - 0.55), 1 - abs(x)),  # two bars
        np.minimum(square, np.maximum(-0.25 - x, -0.25 - y)),  # angle
        0.25 - abs(y - 0.55 * np.sin(4.5 * x)) + np.minimum(0, 1.1 - abs(x)),  # wave
    )
    return np.choose(labels[:, None, None], fields)


def _cifar10(rng: np.random.Generator, labels: np.ndarray) -> np.ndarray:
    """Photograph-like images (n, 3, 32, 32): one of ten shapes, any colour, on a cluttered ground, partly hidden."""
    n, size = len(labels), 32
    each = partial(_each, rng, n)

    def texture(strength):
        clouds = np.stack([_cloud(rng, n, size, rng.uniform(1.1, 2.0, n)) for _ in range(2)], 1)
        mix = rng.normal([[1], [0]], 0.25, (n, 2, 3))
        base = rng.normal(118, 45, (n, 1, 1, 1)) + rng.normal(0, 28, (n, 1, 1, 3))
        return (base + strength[..., None] * np.einsum("nkhw,nkc->nhwc", clouds, mix)).astype(np.float32)

    y, x = np.mgrid[:size, :size].astype(np.float32) / (size / 2) - 1
    ground, body = texture(each(12, 38)), texture(each(8, 25))
    tilt, scale, wide = each(-0.7, 0.7), each(0.45, 0.9), np.exp(each(-0.3, 0.3))
    dx, dy = x - each(-0.35, 0.35), y - each(-0.35, 0.35)
    u = (dx * np.cos(tilt) + dy * np.sin(tilt)) / scale * wide
    v = (dy * np.cos(tilt) - dx * np.sin(tilt)) / scale / wide
    u, v = u + 0.12 * np.sin(3 * v + each(0, 30)), v + 0.12 * np.sin(3 * u + each(0, 30))
    stripes = np.sin(u * each(-9, 9) + v * each(-9, 9))
    body += (each(-35, 35) * stripes + each(-40, 40) * u + each(-40, 40) * v)[..., None]
    clutter = _cloud(rng, n, size, np.full(n, 1.8)) - each(1.0, 2.4)  # shapeless patches like it, behind and in front
    scene = ground + np.clip(clutter * 8, 0, 1)[..., None] * (body - ground)
    scene += np.clip(_inside(labels, u, v) * scale * 16 + 0.5, 0, 1)[..., None] * (body - scene)
    hidden = x * np.cos(tilt * 9) + y * np.sin(tilt * 9) - each(0.4, 1.3)
    scene += np.clip(hidden * 16 + 0.5, 0, 1)[..., None] * (ground - scene)
    scene += 5 * rng.standard_normal(scene.shape, np.float32)
    return np.uint8(np.clip(scene, 0, 255)).transpose(0, 3, 1, 2)


_MAKERS = {"mnist": handwritten, "svhn": _svhn, "cifar10": _cifar10}
_CHUNK = 250  # images drawn at a time, which bounds the memory


def synthesize(name: str, count: int, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Draw `count` images of the stand-in for a dataset; equal arguments (and library versions) give equal images.

    Args:
        name: "mnist" (N, 1, 28, 28), "svhn" or "cifar10" (N, 3, 32, 32).
        count: N, the number of images; each of the ten labels has N / 10 of them, rounded up or down.
        split: "train" or "test", two different random streams.

    Returns:
        uint8 images (N, C, H, W) and int64 labels (N,) in 0..9, in random order.

    Raises:
        ValueError: name, count or split is none of these.
    """
    if name not in _MAKERS or split not in ("train", "test") or count < 1:
        got = f"got {name!r}, {split!r} and {count!r}"
        raise ValueError(f"expected one of {sorted(_MAKERS)}, 'train' or 'test', and at least 1 image; {got}")
    rng = np.random.default_rng(zlib.crc32(f"{name}/{split}".encode()))
    labels = rng.permutation(np.arange(count) % 10)
    chunks = [_MAKERS[name](rng, labels[start : start + _CHUNK]) for start in range(0, count, _CHUNK)]
    return np.ascontiguousarray(np.concatenate(chunks)), labels
