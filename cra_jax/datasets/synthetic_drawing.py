"""The tools that draw the embedded dataset: numbers, a canvas, shapes, habitats.

The results are the same on every machine. Random numbers are the raw output
of a Philox bit generator, whose stream NumPy guarantees. Values that end in pixels are
made with + - * / and square roots only, which IEEE 754 rounds in one way: no libm, no
BLAS, no reductions. Shapes are signed distances, negative inside, and become analytic
coverage, so that a scene does not depend on the size at which it is drawn.

Frame: images span [0, 1] x [0, 1], x to the right, y down.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

Colour = tuple[float, float, float]
Array = np.ndarray


class Stream:
    """Uniform numbers from the raw output of Philox, keyed by the image."""

    def __init__(self, seed: int, split: int, index: int):
        key = np.array([seed, split << 48 | index], np.uint64)
        self._bits = np.random.Philox(key=key)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """A number in [low, high)."""
        return low + (high - low) * ((int(self._bits.random_raw()) >> 11) * 2.0**-53)

    def array(self, *shape: int) -> Array:
        """Float32 numbers in [-1, 1), of the given shape."""
        raw = self._bits.random_raw(math.prod(shape)) >> np.uint64(40)
        return (raw.astype(np.float32) * np.float32(2.0**-23) - 1).reshape(shape)

    def below(self, count: int) -> int:
        """An integer from 0 to count - 1."""
        return int(self.uniform() * count)

    def colour(self, base: Colour, jitter: float) -> Colour:
        """A colour near `base`: its brightness and, half as much, its hue differ."""
        shade = self.uniform(-jitter, jitter)
        r, g, b = (c + shade + self.uniform(-jitter, jitter) / 2 for c in base)
        return (r, g, b)


@dataclasses.dataclass(frozen=True)
class Canvas:
    """An image being painted, or a window of one: `rgb [3, h, w]` is a view."""

    rgb: Array
    x: Array  # [1, w], centres of the pixels
    y: Array  # [h, 1]
    px: float  # side of a pixel

    @classmethod
    def blank(cls, size_px: int) -> "Canvas":
        """A square canvas whose pixels are not set yet."""
        centres = (np.arange(size_px, dtype=np.float32) + 0.5) / size_px
        rgb = np.empty((3, size_px, size_px), np.float32)
        return cls(rgb, centres[None, :], centres[:, None], 1.0 / size_px)

    def slices(self, box: tuple[float, float, float, float]) -> tuple[slice, slice]:
        """Rows and columns of the pixels that `box`, two pixels wider, touches."""
        n = self.rgb.shape[1]
        low = [min(max(int(v * n) - 2, 0), n) for v in box[:2]]
        high = [min(max(int(v * n) + 3, 0), n) for v in box[2:]]
        return slice(low[1], high[1]), slice(low[0], high[0])

    def window(self, box: tuple[float, float, float, float]) -> "Canvas":
        """The part of the canvas that `slices` gives; painting it paints the whole."""
        rows, columns = self.slices(box)
        return Canvas(
            self.rgb[:, rows, columns], self.x[:, columns], self.y[rows], self.px
        )

    def cover(self, distance: Array, scale: float = 1.0) -> Array:
        """Coverage in [0, 1] from a signed distance, negative inside."""
        out = distance * (-scale / self.px)
        out += 0.5
        np.maximum(out, 0, out=out)
        return np.minimum(out, 1, out=out)

    def paint(self, coverage: Array | np.float32, colour: Colour) -> None:
        """Blends `colour` over the canvas, by coverage in [0, 1]."""
        for plane, value in zip(self.rgb, colour, strict=True):
            plane += coverage * (value - plane)

    def fade(self, top: Colour, bottom: Colour, low: float = 0.0, high: float = 1.0):
        """Fills with a vertical gradient that runs from y = low to y = high."""
        t = np.minimum(np.maximum((self.y - low) / (high - low), 0), 1)
        for plane, a, b in zip(self.rgb, top, bottom, strict=True):
            plane[:] = a + (b - a) * t

    def shade(self, amount: Array) -> None:
        """Adds `amount`, which may be negative, to all three channels."""
        self.rgb[:] += amount

    def ellipse(self, cx, cy, a, b, colour: Colour, opacity: float = 1.0) -> None:
        """An upright ellipse, painted inside its own window."""
        part = self.window((cx - a, cy - b, cx + a, cy + b))
        inside = part.cover(ellipse(part.x - cx, part.y - cy, a, b))
        part.paint(inside * opacity, colour)


def ellipse(x: Array, y: Array, a: float, b: float) -> Array:
    """Distance to an ellipse at the origin: exact sign, first order at the edge."""
    u, v = x / a, y / b
    p, q = u / a, v / b
    near = np.sqrt(u * u + v * v)
    return near * (near - 1) / (np.sqrt(p * p + q * q) + 1e-6)


def convex(x: Array, y: Array, *corners: tuple[float, float]) -> Array:
    """Distance to a convex polygon, corners clockwise as seen with y down."""
    inside = None
    for (ax, ay), (bx, by) in zip(corners, (*corners[1:], corners[0]), strict=True):
        length = math.sqrt((bx - ax) * (bx - ax) + (by - ay) * (by - ay))
        nx, ny = (by - ay) / length, (ax - bx) / length
        edge = x * nx + (y * ny - (ax * nx + ay * ny))
        inside = edge if inside is None else np.maximum(inside, edge)
    assert inside is not None
    return inside


def segment(x: Array, y: Array, a: tuple, b: tuple, radius: float) -> Array:
    """Distance to the points within `radius` of the segment from a to b."""
    dx, dy = b[0] - a[0], b[1] - a[1]
    t = ((x - a[0]) * dx + (y - a[1]) * dy) / (dx * dx + dy * dy)
    t = np.minimum(np.maximum(t, 0), 1)
    u, v = x - a[0] - dx * t, y - a[1] - dy * t
    return np.sqrt(u * u + v * v) - radius


def melt(a: Array, b: Array, width: float) -> Array:
    """Union of two shapes, rounded where they meet (polynomial smooth minimum)."""
    h = np.maximum(width - np.abs(a - b), 0)
    return np.minimum(a, b) - h * h / (4 * width)


def _noise(stream: Stream, canvas: Canvas, columns: int, rows: int) -> Array:
    """Smooth value noise in [-1, 1], `[h, w]`, on a lattice of the given cells."""
    lattice = stream.array(rows + 1, columns + 1)
    y, x = canvas.y * rows, canvas.x * columns
    i, j = np.floor(y), np.floor(x)
    fy, fx = y - i, x - j
    fy, fx = fy * fy * (3 - 2 * fy), fx * fx * (3 - 2 * fx)
    i, j = i[:, 0].astype(np.intp), j[0].astype(np.intp)
    lines = lattice[i] + (lattice[i + 1] - lattice[i]) * fy
    return lines[:, j] + (lines[:, j + 1] - lines[:, j]) * fx


def _ripples(stream: Stream, canvas: Canvas, count: float, bend: float) -> Array:
    """Triangle waves across y in [0, 1], bent by noise."""
    phase = canvas.y * count + _noise(stream, canvas, 4, 5) * bend
    phase = phase + stream.uniform()
    return np.abs(2 * (phase - np.floor(phase)) - 1)


def _hills(stream: Stream, canvas: Canvas, y: float, height: float) -> Array:
    """Distance above a rolling line near y, negative below it."""
    ridge = _noise(stream, dataclasses.replace(canvas, y=canvas.y[:1] * 0), 4, 1)
    return y + height * ridge - canvas.y


def _water(stream: Stream, c: Canvas) -> None:
    c.fade((0.62, 0.80, 0.86), (0.08, 0.33, 0.48))
    crest = _ripples(stream, c, stream.uniform(8, 12), 0.9) * (0.35 + 0.65 * c.y)
    c.paint(np.maximum(crest * 2 - 1, 0), (0.80, 0.93, 0.96))
    c.shade(_noise(stream, c, 3, 8) * 0.05)


def _reeds(stream: Stream, c: Canvas) -> None:
    c.fade((0.93, 0.90, 0.68), (0.55, 0.60, 0.28))
    for k in range(18):
        stem = stream.colour((0.42, 0.52, 0.18) if k % 2 else (0.70, 0.68, 0.32), 0.09)
        x, lean = stream.uniform(-0.05, 1.05), stream.uniform(-0.12, 0.12)
        top, width = stream.uniform(-0.2, 0.45), stream.uniform(0.006, 0.014)
        up = np.maximum(1 - c.y, 0)
        across = np.abs(c.x - x - lean * up * up) - width * (1.2 - up)
        c.paint(c.cover(np.maximum(across, top - c.y)), stem)
        if k % 4 == 0:
            head = x + lean * (1 - top) * (1 - top)
            c.ellipse(head, top + 0.03, 0.022, 0.075, (0.36, 0.21, 0.11))


def _forest(stream: Stream, c: Canvas) -> None:
    c.fade((0.36, 0.52, 0.30), (0.07, 0.16, 0.11))
    for k in range(6):
        x, width = stream.uniform(0, 1), stream.uniform(0.015, 0.028) * (1 + k / 3)
        bark = stream.colour((0.30 - 0.03 * k, 0.25 - 0.03 * k, 0.20 - 0.02 * k), 0.02)
        c.paint(c.cover(np.abs(c.x - x) - width * (0.8 + 0.4 * c.y)), bark)
    for k in range(26):
        x, y, r = stream.uniform(), stream.uniform(), stream.uniform(0.03, 0.09)
        leaf = stream.colour((0.24, 0.46, 0.20) if k % 3 else (0.66, 0.76, 0.36), 0.06)
        c.ellipse(x, y * y, r, r * 0.85, leaf, 0.55)


def _meadow(stream: Stream, c: Canvas) -> None:
    c.fade((0.66, 0.84, 0.94), (0.86, 0.93, 0.88), 0.0, 0.4)
    rise = _hills(stream, c, stream.uniform(0.2, 0.35), 0.06)
    c.paint(c.cover(rise), (0.46, 0.70, 0.30))
    c.shade((_noise(stream, c, 24, 7) * 0.07) * (rise < 0))
    c.paint(c.cover(rise + 0.3) * 0.5, (0.36, 0.62, 0.24))
    petals = ((0.95, 0.45, 0.62), (0.98, 0.96, 0.92), (0.98, 0.84, 0.25))
    for k in range(30):
        y = stream.uniform(0.42, 1.0)
        r = 0.006 + 0.014 * y
        c.ellipse(stream.uniform(), y, r, r, petals[k % 3])


def _rock(stream: Stream, c: Canvas) -> None:
    c.rgb[:] = 0
    nearest = second = np.float32(9)
    tone = np.float32(0)
    for _ in range(16):
        x, y, value = stream.uniform(), stream.uniform(), stream.uniform(0.40, 0.68)
        u, v = (c.x - x) * 0.8, c.y - y
        away = u * u + v * v
        tone = np.where(away < nearest, np.float32(value), tone)
        second = np.minimum(second, np.maximum(nearest, away))
        nearest = np.minimum(nearest, away)
    tone = tone + _noise(stream, c, 20, 20) * 0.05
    for plane, tint in zip(c.rgb, (1.0, 0.97, 0.92), strict=True):
        plane[:] = tone * tint
    gap = np.sqrt(second) - np.sqrt(nearest)
    c.paint(c.cover(gap - 0.022) * 0.8, (0.20, 0.20, 0.22))


def _snow(stream: Stream, c: Canvas) -> None:
    c.fade((0.56, 0.66, 0.78), (0.80, 0.86, 0.92), 0.0, 0.6)
    y = stream.uniform(0.3, 0.4)
    for k, ground in enumerate(
        ((0.78, 0.85, 0.93), (0.88, 0.92, 0.97), (0.98, 0.97, 0.94))
    ):
        c.paint(c.cover(_hills(stream, c, y + 0.2 * k, 0.08)), ground)
    for _ in range(40):
        r = stream.uniform(0.005, 0.014)
        c.ellipse(stream.uniform(), stream.uniform(), r, r, (1.0, 1.0, 1.0), 0.9)


def _sand(stream: Stream, c: Canvas) -> None:
    c.fade((0.52, 0.75, 0.90), (0.90, 0.90, 0.80), 0.0, 0.35)
    y = stream.uniform(0.18, 0.3)
    far, near = _hills(stream, c, y, 0.06), _hills(stream, c, y + 0.2, 0.10)
    c.paint(c.cover(far), (0.90, 0.76, 0.50))
    c.paint(c.cover(near), (0.85, 0.67, 0.40))
    crest = _ripples(stream, c, stream.uniform(10, 14), 1.2)
    c.paint(np.maximum(crest * 2 - 1, 0) * c.cover(near) * 0.6, (0.70, 0.50, 0.28))


def _dusk(stream: Stream, c: Canvas) -> None:
    c.fade((0.26, 0.20, 0.44), (0.98, 0.60, 0.34), 0.0, 0.85)
    x, y = stream.uniform(0.1, 0.9), stream.uniform(0.45, 0.75)
    r = stream.uniform(0.09, 0.13)
    c.ellipse(x, y, 1.7 * r, 1.7 * r, (1.0, 0.80, 0.45), 0.35)
    c.ellipse(x, y, r, r, (1.0, 0.88, 0.60))
    clouds = _noise(stream, c, 3, 9) + _noise(stream, c, 6, 18) * 0.5
    c.paint(np.minimum(np.maximum(clouds * 2, 0), 1) * 0.55, (0.66, 0.36, 0.48))
    c.paint(c.cover(_hills(stream, c, 0.9, 0.06)), (0.20, 0.13, 0.24))


def mist(stream: Stream, c: Canvas) -> None:
    """Haze over the habitat, which would otherwise be brighter than the bird."""
    amount = np.float32(stream.uniform(0.40, 0.60))
    c.paint(amount, stream.colour((0.80, 0.82, 0.82), 0.08))


HABITATS: tuple[Callable[[Stream, Canvas], None], ...] = (
    _water,
    _reeds,
    _forest,
    _meadow,
    _rock,
    _snow,
    _sand,
    _dusk,
)
