"""Synthetic stand-ins for MNIST, SVHN and CIFAR-10, for machines that can neither read nor download the real sets.

Pen-drawn digits, house numbers and textured shapes, made with numpy, scipy and the fonts that matplotlib carries.
What is measured on them is about them, not about the real sets. Image axes are (row, column), y points down.
"""

import zlib
from functools import lru_cache
from io import BytesIO
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont
from scipy import fft, ndimage
from scipy.interpolate import CubicSpline

# How people write a digit: variants of strokes, a stroke being points XXYY in hundredths of the digit's height.
# A stroke that ends in ~ is a smooth curve through its points, another one is straight lines.
_SKELETONS = (
    ("3200 0822 0255 1488 3299 5282 5845 5014 3200~", "4206 2602 0630 0470 2297 4484 5244 4612 2800~"),
    ("3000 3099", "1222 3000 3099", "1020 3000 3099 | 1099 5099", "0838 3000 3099", "1022 2216 3000~ | 3000 3099"),
    (
        "0424 1404 3400 5216 4444 2572 0399~ | 0399 5899",
        "0422 2200 4810 4640 2084 0697 0386 1482 3492 5896~",
        "0612 3000 5020 3858 0499~ | 0499 2794 5699~",
        "0430 1606 4202 5024 3862 1894 0494 0480 2076 4092 6490~",
        "0218 2002 4014 3654 1292 0294 0682 2678 4892 7090~",
        "0410 2802 4424 3866 0890 2896 6694~",
        "0426 1804 4006 5028 3855 0299 | 0299 5899",
    ),
    (
        "0512 2800 5020 4442 2248~ | 2248 5058 5480 3099 0486~",
        "0401 5201 2641 | 2641 5254 5480 3099 0486~",
        "0812 2800 4616 3840 1849~ | 1849 4656 5276 3897 1899 0290~",
    ),
    (
        "4200 0068 6068 | 4200 4299",
        "1000 0456 5856 | 4414 4299",
        "1202 0832 1452 3052 4844~ | 5000 4640 4499~",
        "4400 0066 5866 | 4430 4499",
        "4800 2030 0862 5258 | 4824 4499",
    ),
    (
        "5200 1200 0842 | 0842 2836 5256 4886 2099 0288~",
        "5202 1402 | 1402 1042 3439 5266 3496 0490~",
        "5400 0800 0645 | 0645 3036 5564 4692 2099 0284~",
    ),
    (
        "4400 2034 0670 1092 2899 4084 3468 1078~",
        "6004 3018 0858 0888 3299 5484 4264 1074~",
        "1400 0644 0882 2699 4888 4468 2264 0880~",
        "4800 2020 0460 1290 3099 5280 4458 2452 0670~",
        "3400 0844 0480 2699 4882 4457 2052 0566~",
        "5014 3200 0828 0460 1290 3099 5478 4654 2646 0664~",
    ),
    (
        "0200 5600 2099",
        "0200 5600 2299 | 1450 5248",
        "0216 0402 5602 | 5602 3440 2499~",
        "0406 3000 5804~ | 5804 3050 1699~",
        "0208 2006 5400~ | 5400 2699 | 1454 4846",
    ),
    (
        "5010 3000 1010 1434 4460 5284 3099 0684 1260 4434 5010~",
        "3000 0823 3046 5223 3000~ | 3046 0472 3099 5672 3046~",
        "5602 3200 1618 3440 4470 3096 1488 2264 4440 6018 5402~",
        "5208 2802 1018 3042 5070 4292 2298 1078 2856 5014~",
    ),
    (
        "5222 3000 0626 2852 5222~ | 5222 5060 4699~",
        "5225 3000 0526 2854 5225~ | 5225 5262 3096 0892~",
        "5618 3602 1020 1644 4034 5616~ | 5616 4060 2099",
        "5010 2804 1224 2646 5014~ | 5014 4860 4699~",
        "4810 2600 0626 2248 4818~ | 4810 4499",
        "5040 2854 0630 2600 5020 5462 3899 1090~",
    ),
)
_DENSE = 96  # pen positions a digit


@lru_cache
def _variant(digit: int, variant: int, smooth: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Control points (K, 2) of a skeleton, x before y, and the matrix (_DENSE, K) that takes them to pen positions."""
    strokes = [stroke.strip() for stroke in _SKELETONS[digit][variant].split("|")]
    points = [np.array([(int(p[:2]), int(p[2:])) for p in s.rstrip("~").split()]) / 100 for s in strokes]
    lengths = np.array([np.linalg.norm(np.diff(p, axis=0), axis=1).sum() for p in points])
    ends = np.round(np.concatenate([[0], lengths.cumsum()]) / lengths.sum() * _DENSE).astype(int)
    matrix, column = np.zeros((_DENSE, sum(map(len, points)))), 0
    for stroke, p, start, stop in zip(strokes, points, ends[:-1], ends[1:], strict=True):
        knots = np.concatenate([[0], np.linalg.norm(np.diff(p, axis=0), axis=1).cumsum()])
        at, unit = np.linspace(0, knots[-1], stop - start), np.eye(len(p))
        if stroke.endswith("~") and smooth:
            closed = np.array_equal(p[0], p[-1])
            unit[-1] = unit[0] if closed else unit[-1]
            rows = CubicSpline(knots, unit, bc_type="periodic" if closed else "natural")(at)
        else:
            rows = np.stack([np.interp(at, knots, basis) for basis in unit.T], 1)
        matrix[start:stop, column : column + len(p)] = rows
        column += len(p)
    return np.concatenate(points), matrix


def _pen(rng: np.random.Generator, digits: np.ndarray, wobble: float, smooth: bool = True) -> np.ndarray:
    """Pen positions (n, _DENSE, 2) of handwritten digits, heights about 1; `wobble` (in heights) distorts smoothly."""
    pen = np.empty((len(digits), _DENSE, 2))
    choice = rng.random(len(digits))
    for digit, variants in enumerate(_SKELETONS):
        for v in range(len(variants)):
            rows = np.flatnonzero((digits == digit) & ((choice * len(variants)).astype(int) == v))
            points, matrix = _variant(digit, v, smooth)
            pen[rows] = matrix @ (points + rng.normal(0, wobble / 4, (len(rows), *points.shape)))
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


def _mnist(rng: np.random.Generator, labels: np.ndarray) -> np.ndarray:
    """Handwritten digits (n, 1, 28, 28): ink on black in a box of 20 pixels, its centre of mass in the middle."""
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


@lru_cache
def _typefaces() -> tuple[list[list[Image.Image]], list[list[Image.Image]]]:
    """Faces of ten glyphs each, as grey images _GLYPH high: those from font files, and those drawn with a pen."""
    printed, drawn = [], []
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    names = [p for p in sorted(folder.glob("*.ttf")) if p.stem.startswith(("DejaVu", "STIXGeneral", "cm"))]
    for path in [p for p in names if p.stem not in ("DejaVuSansDisplay", "DejaVuSerifDisplay", "cmex10", "cmsy10")]:
        font = ImageFont.truetype(path, 80)
        plain_one = "Sans" in path.stem or path.stem in ("cmss10", "cmtt10")  # whose 1 also comes without its foot
        for weight in (-3, 0, 0, 3, 7):
            for footless in (False, True)[: 1 + plain_one]:
                glyphs = []
                for character in "O123456789" if "Mono" in path.stem else "0123456789":
                    image = Image.new("L", (120, 140))
                    ImageDraw.Draw(image).text((30, 20), character, 255, font, stroke_width=max(weight, 0))
                    if character == "1" and footless:
                        left, top, right, bottom = image.getbbox()
                        image = image.crop((left, top, right, bottom - 10 - 2 * max(weight, 0)))
                    thin = weight < 0 and ("Bold" in path.stem or "Sans" in path.stem)
                    glyphs.append(_trimmed(image.filter(ImageFilter.MinFilter(-weight)) if thin else image))
                printed.append(glyphs)
    rng = np.random.default_rng(20)
    for face in range(120):
        wide, heavy = rng.uniform(0.75, 1.25), rng.uniform(1.3, 6.5)
        pen = _pen(rng, np.arange(10), 0.02 * rng.random(), smooth=face % 6 > 0) * [40 * wide, 44] + [14, 12]
        ink = _ink(pen, np.full(10, heavy), 68, 64, square=face % 3 == 1)
        drawn.append([_trimmed(Image.fromarray(np.uint8(255 * glyph))) for glyph in ink])
    return printed, drawn


def _house_numbers(rng: np.random.Generator, labels: np.ndarray) -> np.ndarray:
    """Masks (n, _SCENE, _SCENE) in 0..1: the digit in the middle and the parts of its neighbours that are in view."""
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
            left = middle + (distance if side == 2 else -distance) - other.width / 2
            box = (round(left), top + drop)
            row.paste(ImageChops.lighter(other, row.crop((*box, box[0] + other.width, box[1] + _GLYPH))), box)
        height, stretch = rng.uniform(0.62, 1.02), np.exp(rng.normal(0.06, 0.16))
        turn, shear = rng.normal(0, 0.09), rng.normal(0, 0.12)
        zoom = _GLYPH / _SCENE / height
        look = np.eye(3)
        look[:2, :2] = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]) * zoom
        look[0] /= stretch
        look[0] += shear * look[1]
        look[2, :2] = rng.normal(0, 0.0015, 2)
        before, after = np.eye(3), np.eye(3)
        before[:2, 2] = -_SCENE / 2 + rng.normal(0, 0.035, 2) * _SCENE
        after[:2, 2] = middle, _GLYPH
        look = after @ look @ before
        view = row.transform((_SCENE, _SCENE), Image.Transform.PERSPECTIVE, (look / look[2, 2]).ravel()[:8],
                             Image.Resampling.BILINEAR)  # fmt: skip
        masks[i] = np.asarray(view, np.float32) / 255
    return masks


def _cloud(rng: np.random.Generator, n: int, size: int, slope: np.ndarray) -> np.ndarray:
    """Noise (n, size, size) of mean 0 and deviation 1 whose amplitude falls as frequency^-slope, slope (n,)."""
    f = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)).astype(np.float32)
    f[0, 0] = 1
    spectrum = fft.rfft2(rng.standard_normal((n, size, size), np.float32))
    noise = fft.irfft2(spectrum * f ** -slope[:, None, None].astype(np.float32))
    noise -= noise.mean((1, 2), keepdims=True)
    return noise / noise.std((1, 2), keepdims=True)


# Paint, brick, wood, metal and plastic as they are on house fronts (red, green, blue)
_PAINTS = np.array([
    (238, 236, 230), (215, 205, 182), (186, 186, 184), (132, 132, 132), (78, 77, 78), (28, 28, 30), (142, 78, 60),
    (84, 56, 40), (172, 142, 106), (62, 88, 138), (34, 44, 82), (62, 92, 70), (196, 156, 76), (150, 40, 40),
    (110, 135, 160),
])  # fmt: skip


def _paint(rng: np.random.Generator, ink: np.ndarray) -> np.ndarray:
    """Coloured scenes (n, S, S, 3), values 0..255 but not clipped, of digit masks (n, S, S) on lit, textured walls."""
    n, size = ink.shape[:2]

    def each(low, high):
        return rng.uniform(low, high, (n, 1, 1)).astype(np.float32)

    def some(share):
        return (rng.random((n, 1, 1)) < share).astype(np.float32)

    def colours():
        paint = _PAINTS[rng.integers(len(_PAINTS), size=n)]
        paint = np.where(rng.random((n, 1)) < 0.25, rng.uniform(0, 255, (n, 3)), paint)
        grey = paint.mean(1, keepdims=True)
        paint = grey + rng.uniform(0.25, 1, (n, 1)) * (paint - grey) + rng.normal(0, 12, (n, 3))
        return paint.astype(np.float32)[:, None, None]

    def shifted(mask, reach, blur=0.0):
        moves = rng.integers(-reach, reach + 1, (n, 2))
        moved = np.stack([np.roll(m, move, (0, 1)) for m, move in zip(mask, moves, strict=True)])
        return ndimage.gaussian_filter(moved, (0, blur, blur)) if blur else moved

    y, x = np.mgrid[:size, :size].astype(np.float32) / size - 0.5
    turn = each(-0.25, 0.25)
    u, v = x + turn * y, y - turn * x
    courses = v * each(1.5, 9) + each(0, 1)  # courses of brick, or boards
    bricks = u * each(1, 4) + 0.5 * (np.floor(courses) % 2)
    joints = np.maximum(courses % 1 < each(0.08, 0.25), bricks % 1 < 0.08)
    boards = (np.where(some(0.3), u, v) * each(1, 10) + each(0, 1)) % 1
    pattern = some(0.15) * each(-40, 40) * joints + some(0.2) * each(-45, 45) * (boards - 0.5)
    pattern += each(0, 22) * _cloud(rng, n, size, rng.uniform(0.4, 1.8, n))

    wall, digit, other = colours(), colours(), colours()
    gap = (digit - wall).mean(-1, keepdims=True)
    wanted = np.sign(gap) * (each(15, 110) + each(0, 40))[..., None]
    digit += np.where(abs(gap) < abs(wanted), wanted - gap, 0)
    plate = (abs(u - each(-0.2, 0.2)) < each(0.3, 0.8)) & (abs(v - each(-0.1, 0.1)) < each(0.38, 0.6))
    wall = wall + (some(0.3) * ~plate)[..., None] * (other - wall)
    clutter = np.clip(8 * _cloud(rng, n, size, np.full(n, 1.8)) - each(6, 14), 0, 1) * some(0.25)  # leaves, a door post
    wall = wall + clutter[..., None] * (colours() - wall)
    grain = 1 + rng.normal(0, 0.12, (n, 1, 1, 3)).astype(np.float32)
    scene = wall + pattern[..., None] * grain
    scene *= 1 - (some(0.35) * each(0.1, 0.7) * shifted(ink, 4, 1.2))[..., None]
    body = digit + (each(0, 12) * _cloud(rng, n, size, np.full(n, 1.2)) + each(-40, 40) * v)[..., None]
    rim = np.clip(ndimage.maximum_filter(ink, (0, 5, 5)) - ink, 0, 1) * some(0.15)
    scene += rim[..., None] * (other - scene)
    edges = ink - ndimage.minimum_filter(ink, (0, 3, 3))
    hollow = some(0.05)
    cover = hollow * np.minimum(1, edges * 1.3) + (1 - hollow) * ink * np.where(some(0.25), each(0.55, 1), 1)
    scene += cover[..., None] * (body - scene)
    scene += (some(0.35) * each(10, 90) * (shifted(ink, 2) - shifted(ink, 2)))[..., None]  # relief

    sun = 1 + each(-0.5, 0.5) * u + each(-0.5, 0.5) * v
    angle = each(0, 2 * np.pi)
    past = x * np.cos(angle) + y * np.sin(angle) - each(-0.4, 0.4)
    sun *= 1 - some(0.25) * each(0.1, 0.6) / (1 + np.exp(-past * each(10, 80)))
    scene *= sun[..., None]
    rod = np.exp(-((past / each(0.01, 0.05)) ** 2)) * some(0.07)  # a wire, a twig, a scratch
    scene += rod[..., None] * (colours() - scene)
    glare = ((x - each(-0.6, 0.6)) ** 2 + (y - each(-0.6, 0.6)) ** 2) / each(0.01, 0.15)
    scene += (some(0.15) * each(20, 110) * np.exp(-glare))[..., None]
    scene = 255 * (np.clip(scene, 0, 255) / 255) ** np.exp(rng.normal(0, 0.3, (n, 1, 1, 1)))
    centre = scene.mean((1, 2), keepdims=True)
    tint = 1 + rng.normal(0, 0.05, (n, 1, 1, 3)) + [0, 0, 0.05]
    exposed = 0.65 * centre + each(10, 75)[..., None]
    return (exposed + (scene - centre) * each(0.45, 1.15)[..., None]) * tint


def _camera(rng: np.random.Generator, scene: np.ndarray) -> np.ndarray:
    """One scene (S, S, 3) as a crop (32, 32, 3) of a street photograph: blurred, coarse, noisy, compressed."""
    photo = Image.fromarray(np.uint8(np.clip(scene, 0, 255)))
    if rng.random() < 0.15:
        reach, (cos, sin) = np.linspace(-2, 2, 9), rng.normal(size=2) * rng.uniform(0.3, 1)
        kernel = np.zeros((5, 5))
        np.add.at(kernel, (np.clip(np.rint(2 + reach * sin), 0, 4).astype(int),
                           np.clip(np.rint(2 + reach * cos), 0, 4).astype(int)), 1)  # fmt: skip
        photo = photo.filter(ImageFilter.Kernel((5, 5), kernel.ravel()))
    photo = photo.filter(ImageFilter.GaussianBlur(min(2.6, float(np.exp(rng.normal(-0.1, 0.6))))))
    side = round(np.exp(rng.uniform(np.log(11), np.log(48))))
    photo = photo.resize((side, side), Image.Resampling.BOX)
    noise = rng.standard_normal((side, side, 3)) * rng.exponential(3.5)
    photo = Image.fromarray(np.uint8(np.clip(np.asarray(photo) + noise, 0, 255)))
    if rng.random() < 0.7:
        packed = BytesIO()
        photo.save(packed, "JPEG", quality=int(rng.integers(35, 96)))
        photo = Image.open(packed)
    return np.asarray(photo.resize((32, 32), Image.Resampling(int(rng.integers(2, 4)))))


def _svhn(rng: np.random.Generator, labels: np.ndarray) -> np.ndarray:
    """Crops (n, 3, 32, 32) of house numbers, as in SVHN's format 2: the digit in the middle is the label."""
    scenes = _paint(rng, _house_numbers(rng, labels))
    return np.stack([_camera(rng, scene) for scene in scenes]).transpose(0, 3, 1, 2)


def _inside(label: int, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance-like field, positive inside shape `label` of about unit radius, at points x, y of any shape."""
    r, angle = np.hypot(x, y), np.arctan2(y, x)
    square = 0.85 - np.maximum(abs(x), abs(y))
    fields = (
        lambda: 1 - r,  # disc
        lambda: 0.3 - abs(r - 0.75),  # ring
        lambda: square,
        lambda: 0.55 - np.maximum(y, abs(x) * 0.87 - y / 2),  # triangle
        lambda: 0.72 + 0.33 * np.cos(5 * angle) - r,  # star
        lambda: np.minimum(1 - np.maximum(abs(x), abs(y)), 0.3 - np.minimum(abs(x), abs(y))),  # cross
        lambda: np.minimum(1 - r, np.hypot(x - 0.5, y) - 0.75),  # crescent
        lambda: np.minimum(0.28 - abs(abs(y) - 0.55), 1 - abs(x)),  # two bars
        lambda: np.minimum(square, np.maximum(-0.25 - x, -0.25 - y)),  # angle
        lambda: 0.25 - abs(y - 0.55 * np.sin(4.5 * x)) + np.minimum(0, 1.1 - abs(x)),  # wave
    )
    return fields[label]()


def _cifar10(rng: np.random.Generator, labels: np.ndarray) -> np.ndarray:
    """Photograph-like images (n, 3, 32, 32): one of ten shapes, any colour, on a cluttered ground, partly hidden."""
    n, size = len(labels), 32

    def each(low, high):
        return rng.uniform(low, high, (n, 1, 1)).astype(np.float32)

    def texture(strength):
        clouds = np.stack([_cloud(rng, n, size, rng.uniform(1.1, 2.0, n)) for _ in range(2)], 1)
        mix = rng.normal([[1], [0]], 0.25, (n, 2, 3))
        base = rng.normal(118, 45, (n, 1, 1, 1)) + rng.normal(0, 28, (n, 1, 1, 3))
        return (base + strength[..., None] * np.einsum("nkhw,nkc->nhwc", clouds, mix)).astype(np.float32)

    y, x = np.mgrid[:size, :size].astype(np.float32) / (size / 2) - 1
    ground, body, front = texture(each(12, 38)), texture(each(8, 25)), texture(each(10, 30))
    angle, scale, wide = each(0, 2 * np.pi), each(0.45, 0.9), np.exp(each(-0.3, 0.3))
    dx, dy = x - each(-0.35, 0.35), y - each(-0.35, 0.35)
    tilt = each(-0.7, 0.7)
    u = (dx * np.cos(tilt) + dy * np.sin(tilt)) / scale * wide
    v = (dy * np.cos(tilt) - dx * np.sin(tilt)) / scale / wide
    u, v = u + 0.12 * np.sin(3 * v + angle * 5), v + 0.12 * np.sin(3 * u + angle * 7)
    field = np.empty((n, size, size), np.float32)
    for label in range(10):
        rows = labels == label
        field[rows] = _inside(label, u[rows], v[rows])
    stripes = np.sin(u * each(2, 9) * np.cos(angle * 3) + v * each(2, 9) * np.sin(angle * 3))
    body += (each(-35, 35) * stripes + each(-40, 40) * u + each(-40, 40) * v)[..., None]
    clutter = _cloud(rng, n, size, np.full(n, 1.8)) - each(1.3, 2.6)  # shapeless patches of a third colour
    scene = ground + np.clip(clutter * 8, 0, 1)[..., None] * (front - ground)
    scene += np.clip(field * scale * 16 + 0.5, 0, 1)[..., None] * (body - scene)
    hidden = x * np.cos(angle * 2) + y * np.sin(angle * 2) - each(0.4, 1.3)
    scene += np.clip(hidden * 16 + 0.5, 0, 1)[..., None] * (front - scene)
    scene = scene * (1 + each(-0.35, 0.35) * x + each(-0.35, 0.35) * y)[..., None]
    scene += 5 * rng.standard_normal(scene.shape, np.float32)
    return np.uint8(np.clip(scene, 0, 255)).transpose(0, 3, 1, 2)


_MAKERS = {"mnist": _mnist, "svhn": _svhn, "cifar10": _cifar10}
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
    if name not in _MAKERS:
        raise ValueError(f"no synthetic stand-in for {name!r}, expected one of {sorted(_MAKERS)}")
    if split not in ("train", "test"):
        raise ValueError(f"split is {split!r}, expected 'train' or 'test'")
    if count < 1:
        raise ValueError(f"count is {count!r}, expected at least 1 image")
    rng = np.random.default_rng(zlib.crc32(f"{name}/{split}".encode()))
    labels = rng.permutation(np.arange(count) % 10)
    chunks = [_MAKERS[name](rng, labels[start : start + _CHUNK]) for start in range(0, count, _CHUNK)]
    return np.ascontiguousarray(np.concatenate(chunks)), labels
