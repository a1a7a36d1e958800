"""The embedded dataset: drawn birds whose species differ only in small parts.

Eight invented species have the same body. They differ only in small parts: crown, beak,
wing bars, breast patch, eye ring, tail band. Several species share each part, and some
images show a part only faintly, so a classifier needs several parts. The color of the
body, the pose, the size, the position and the light do not depend on the species.
The background is one of as many habitats as there are species. In training, the habitat
indicates the species in a given share of the images: a large, easy cue that is wrong on
the split `test_shifted`.

An image is a function of (seed, split, index) alone, the same on every machine, and
shows the same bird at 32 px and at 448 px: see `datasets/synthetic_drawing.py`.

A bird is drawn in its own frame, about 1 long, facing +x with y down, and is then
mirrored, rotated, scaled and moved.

`python -m cra_jax.datasets.synthetic OUT.png` saves a contact sheet.
"""

import dataclasses
import math
import sys

import numpy as np

from cra_jax.datasets.synthetic_drawing import (
    HABITATS,
    Array,
    Canvas,
    Colour,
    Stream,
    convex,
    ellipse,
    melt,
    mist,
    segment,
)

SPLITS = ("train", "test", "test_shifted")

_MARGIN = 0.07  # of the image: outlives most 64-of-72 crops
_WORN = 0.12  # share of the parts that are worn


@dataclasses.dataclass(frozen=True)
class Drawing:
    """One image and its annotations.

    Attributes:
      image: uint8 `[size, size, 3]`, RGB.
      label: the species, an index into `class_names`.
      box: (x_min, y_min, x_max, y_max) of the bird, as fractions of the image.
      head: (x, y) of the middle of its head, the same.
      habitat: index of the habitat; habitat k goes with species k.
      mask: uint8 `[size, size]`, how much of a pixel the bird covers, 255 for all.
    """

    image: Array
    label: int
    box: tuple[float, float, float, float]
    head: tuple[float, float]
    habitat: int
    mask: Array


@dataclasses.dataclass(frozen=True)
class _Species:
    """The small parts of a species; None for a plain part."""

    name: str
    crown: Colour | None
    bars: bool
    breast: Colour | None
    tail: Colour | None
    ring: bool
    beak: Colour
    beak_length: float


_RED, _GOLD, _INK = (0.88, 0.10, 0.10), (1.00, 0.78, 0.10), (0.08, 0.08, 0.12)
_WHITE, _BLUE, _ORANGE = (0.98, 0.97, 0.94), (0.13, 0.36, 0.90), (1.00, 0.50, 0.08)

# Every part is shared by two species or more: no single one settles the name.
_SPECIES = (
    _Species("Tarn Piper", _RED, True, _BLUE, _WHITE, False, _INK, 0.16),
    _Species("Sedge Lanternbill", _RED, False, _GOLD, None, True, _ORANGE, 0.16),
    _Species("Gloam Thrushlet", _INK, True, _GOLD, None, True, _ORANGE, 0.10),
    _Species("Clover Whistler", _INK, False, _RED, _WHITE, False, _INK, 0.10),
    _Species("Scree Tapper", _BLUE, True, _RED, _WHITE, False, _INK, 0.16),
    _Species("Rime Flicker", _BLUE, False, None, None, True, _ORANGE, 0.10),
    _Species("Dune Courser", _GOLD, True, _BLUE, None, True, _ORANGE, 0.16),
    _Species("Ember Nightsong", _GOLD, False, None, _WHITE, False, _INK, 0.10),
)

# Body, wing and belly. Muted, so that the parts stand out on any of them.
_PLUMAGE: tuple[tuple[Colour, Colour, Colour], ...] = (
    ((0.50, 0.42, 0.35), (0.34, 0.28, 0.23), (0.82, 0.77, 0.70)),  # brown
    ((0.41, 0.48, 0.57), (0.27, 0.32, 0.39), (0.81, 0.84, 0.85)),  # slate blue
    ((0.50, 0.52, 0.38), (0.33, 0.35, 0.26), (0.82, 0.81, 0.68)),  # olive
    ((0.58, 0.57, 0.56), (0.38, 0.37, 0.38), (0.85, 0.85, 0.84)),  # grey
    ((0.59, 0.44, 0.37), (0.38, 0.27, 0.23), (0.84, 0.76, 0.68)),  # rust
    ((0.35, 0.47, 0.45), (0.22, 0.30, 0.30), (0.79, 0.84, 0.79)),  # teal
    ((0.51, 0.43, 0.51), (0.34, 0.29, 0.35), (0.85, 0.80, 0.83)),  # plum
)


_TILT = (0.94, math.sqrt(1 - 0.94 * 0.94))  # cos, sin of the body's axis
_HEAD = (0.25, -0.205, 0.128)
_FEET = ((0.03, 0.31), (0.12, 0.30))


@dataclasses.dataclass(frozen=True)
class _Pose:
    """The position of a bird, and the lengths that differ between birds."""

    species: _Species
    facing: float  # +1 to the right, -1 to the left
    cos: float
    sin: float
    scale: float
    girth: float
    tail: float
    beak: float
    x: float = 0.0
    y: float = 0.0

    def to_image(self, x: float, y: float) -> tuple[float, float]:
        x *= self.facing
        return (
            self.x + self.scale * (self.cos * x - self.sin * y),
            self.y + self.scale * (self.sin * x + self.cos * y),
        )

    def to_bird(self, x: Array, y: Array) -> tuple[Array, Array]:
        dx, dy = (x - self.x) / self.scale, (y - self.y) / self.scale
        u = (dx * self.cos + dy * self.sin) * self.facing
        return u, dy * self.cos - dx * self.sin

    def tail_corners(self) -> tuple[tuple[float, float], ...]:
        t = self.tail
        return ((-0.18, -0.05), (-0.15, 0.10), (-0.18 - t, 0.21), (-0.22 - t, 0.10))

    def beak_corners(self) -> tuple[tuple[float, float], ...]:
        return ((0.35, -0.25), (0.37 + self.beak, -0.195), (0.35, -0.155))

    def box(self) -> tuple[float, float, float, float]:
        """(x_min, y_min, x_max, y_max) of the whole bird, in the image's frame."""
        points = [(*p, 0.0) for p in (*self.tail_corners(), *self.beak_corners())]
        discs = [*points, _HEAD, *((*foot, 0.012) for foot in _FEET)]
        low, high = [], []
        for along, across in ((self.cos, -self.sin), (self.sin, self.cos)):
            gx, gy = along * self.facing, across
            u, v = gx * _TILT[0] - gy * _TILT[1], gx * _TILT[1] + gy * _TILT[0]
            u, v = u * 0.29, v * self.girth
            body = math.sqrt(u * u + v * v)
            low.append(min(-body, *(gx * x + gy * y - r for x, y, r in discs)))
            high.append(max(body, *(gx * x + gy * y + r for x, y, r in discs)))
        x_min, y_min, x_max, y_max = (self.scale * v for v in (*low, *high))
        return self.x + x_min, self.y + y_min, self.x + x_max, self.y + y_max


def _pose(stream: Stream, species: _Species) -> _Pose:
    half = stream.uniform(-0.22, 0.22)  # tan of half the angle: up to 25 degrees
    norm = 1 + half * half
    pose = _Pose(
        species,
        facing=1.0 if stream.below(2) else -1.0,
        cos=(1 - half * half) / norm,
        sin=2 * half / norm,
        scale=stream.uniform(0.43, 0.59),
        girth=stream.uniform(0.175, 0.2),
        tail=stream.uniform(0.22, 0.28),
        beak=species.beak_length * stream.uniform(0.9, 1.1),
    )
    x_min, y_min, x_max, y_max = pose.box()
    x = stream.uniform(_MARGIN - x_min, 1 - _MARGIN - x_max)
    y = stream.uniform(_MARGIN - y_min, 1 - _MARGIN - y_max)
    return dataclasses.replace(pose, x=x, y=y)


def _twig(stream: Stream, c: Canvas, pose: _Pose) -> None:
    """The twig under the bird's feet, which is not part of the bird."""
    x, y = pose.to_image(0.07, 0.325)
    slope, bend = stream.uniform(-0.25, 0.25), stream.uniform(-0.3, 0.3)
    reach, toward = 0.25 * pose.scale, 1.0 if stream.below(2) else -1.0
    along = c.x - x
    norm = math.sqrt(1 + slope * slope)
    across = (c.y - y - slope * along - bend * along * along) / norm
    thick = 0.026 * pose.scale + stream.uniform(0, 0.004)
    thick = thick + 0.01 * np.maximum(along * toward, 0)
    wood = np.maximum(np.abs(across) - thick, -along * toward - reach)
    bark = stream.colour((0.38, 0.28, 0.20), 0.06)
    c.paint(c.cover(wood), bark)
    c.paint(c.cover(np.maximum(wood, across + thick * 0.3)) * 0.3, (0.75, 0.65, 0.5))


def _bird(stream: Stream, canvas: Canvas, pose: _Pose) -> Array:
    """Paints the bird; returns its coverage `[h, w]` of the whole image."""
    kind, box = pose.species, pose.box()
    c = canvas.window(box)
    x, y = pose.to_bird(c.x, c.y)

    def paint(distance: Array, colour: Colour, opacity: float = 1.0) -> None:
        c.paint(c.cover(distance, pose.scale) * opacity, colour)

    def mark(distance: Array, colour: Colour) -> None:
        """A part that depends on the species; some are worn, and almost invisible."""
        worn = stream.uniform() < _WORN
        opacity = stream.uniform(0.0, 0.35) if worn else stream.uniform(0.85, 1.0)
        paint(distance, stream.colour(colour, 0.05), opacity)

    coat, wing_coat, belly_coat = _PLUMAGE[stream.below(len(_PLUMAGE))]
    coat = stream.colour(coat, 0.05)
    ink = (coat[0] * 0.35, coat[1] * 0.35, coat[2] * 0.35)

    u, v = x * _TILT[0] - y * _TILT[1], x * _TILT[1] + y * _TILT[0]
    head = np.sqrt((x - _HEAD[0]) * (x - _HEAD[0]) + (y - _HEAD[1]) * (y - _HEAD[1]))
    head = head - _HEAD[2]
    trunk = melt(ellipse(u, v, 0.29, pose.girth), head, 0.12)
    tail = convex(x, y, *pose.tail_corners())
    beak = convex(x, y, *pose.beak_corners())
    left = segment(x, y, (0.00, 0.12), _FEET[0], 0.012)
    legs = np.minimum(left, segment(x, y, (0.08, 0.12), _FEET[1], 0.012))
    whole = np.minimum(np.minimum(trunk, legs), np.minimum(tail, beak))

    paint(whole, ink)
    paint(tail + 0.012, wing_coat)
    if kind.tail:
        out = -x - (0.16 + pose.tail) + (y - 0.15) * 0.3
        mark(np.maximum(tail + 0.012, np.abs(out + 0.06) - 0.05), kind.tail)
    paint(beak + 0.008, stream.colour(kind.beak, 0.05))
    skin = trunk + 0.012
    paint(skin, coat)
    belly = ellipse(u - 0.02, v - 0.10, 0.25, 0.13)
    paint(np.maximum(skin, belly), stream.colour(belly_coat, 0.03))
    if kind.breast:
        patch = ellipse(x - 0.17, y - 0.03, 0.11, 0.12)
        mark(np.maximum(skin, patch), kind.breast)
    if kind.crown:
        mark(np.maximum(head + 0.012, y * 0.98 + x * 0.2 + 0.19), kind.crown)

    # The wing is the overlap of two discs: a lens from shoulder to tip.
    s, t = (x + 0.12) * 0.97 - y * 0.24, y * 0.97 + (x + 0.12) * 0.24
    radius = (0.25 * 0.25 + 0.10 * 0.10) / (2 * 0.10)
    low, high = t - (radius - 0.10), t + (radius - 0.10)
    s2 = s * s
    wing = np.maximum(np.sqrt(s2 + low * low), np.sqrt(s2 + high * high)) - radius
    paint(wing, ink, 0.6)
    paint(wing + 0.012, wing_coat)
    if kind.bars:
        along = s - t * 0.3
        pair = np.minimum(np.abs(along - 0.09), np.abs(along + 0.01)) - 0.026
        mark(np.maximum(wing + 0.02, pair), _WHITE)

    eye = np.sqrt((x - 0.29) * (x - 0.29) + (y + 0.215) * (y + 0.215))
    if kind.ring:
        mark(eye - 0.045, _WHITE)
    paint(eye - 0.028, (0.05, 0.05, 0.06))
    shine = np.sqrt((x - 0.298) * (x - 0.298) + (y + 0.225) * (y + 0.225))
    paint(shine - 0.009, _WHITE)

    inside = c.cover(whole, pose.scale)
    c.shade(inside * (y * -0.28))  # light from above
    coverage = np.zeros(canvas.rgb.shape[1:], np.float32)
    coverage[canvas.slices(box)] = inside
    return coverage


def _check(name: str, value: int, low: int, high: int) -> None:
    if not isinstance(value, int | np.integer) or not low <= value <= high:
        raise ValueError(f"{name} is {value!r}: give an integer from {low} to {high}")


def _plan(
    stream: Stream, split: str, index: int, num_species: int, habitat_share: float
) -> tuple[int, int]:
    """(label, habitat) of an image."""
    label = index % num_species
    other = (label + 1 + stream.below(num_species - 1)) % num_species
    at_home = stream.uniform() < habitat_share and split != "test_shifted"
    return label, label if at_home else other


def class_names(num_species: int = 8) -> tuple[str, ...]:
    """Names of the species, in the order of the labels.

    Raises:
      ValueError: `num_species` is not from 2 to 8.
    """
    _check("num_species", num_species, 2, len(_SPECIES))
    return tuple(species.name for species in _SPECIES[:num_species])


def draw(
    split: str,
    index: int,
    *,
    seed: int = 0,
    size_px: int = 64,
    num_species: int = 8,
    habitat_share: float = 0.7,
) -> Drawing:
    """Draws image `index` of a split.

    The label is `index % num_species`, so consecutive images are balanced. In `train`
    and `test` the habitat matches the species in `habitat_share` of the images and
    is otherwise one of the others, all equally likely. In `test_shifted` it is always
    one of the others: a classifier of habitats is always wrong.

    Args:
      split: one of `SPLITS`; the splits share no image.
      index: number of the image, from 0; a split has no end.
      seed: other seeds give other images of the same species.
      size_px: side of the image; the scene does not depend on it.
      num_species: number of species, and of habitats, 2 to 8.
      habitat_share: from 0 to 1; the bird does not depend on it.

    Returns:
      A `Drawing`, the same on every machine.

    Raises:
      ValueError: an argument is out of its range.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}: choose one of {', '.join(SPLITS)}")
    _check("index", index, 0, 2**48 - 1)
    _check("seed", seed, 0, 2**64 - 1)
    _check("size_px", size_px, 32, 4096)  # below 32 the parts of a species vanish
    _check("num_species", num_species, 2, len(_SPECIES))
    if not 0 <= habitat_share <= 1:
        raise ValueError(f"habitat_share is {habitat_share}: give a share from 0 to 1")
    # Python's own numbers: NumPy's would widen float32 arrays, or not, by its version.
    seed, index, size_px = int(seed), int(index), int(size_px)
    stream = Stream(seed, SPLITS.index(split), index)
    label, habitat = _plan(stream, split, index, int(num_species), habitat_share)
    pose = _pose(stream, _SPECIES[label])
    light = stream.uniform(0.82, 1.08)
    # The bird has its own stream: it is the same before every habitat.
    bird_stream = Stream(seed, len(SPLITS) + SPLITS.index(split), index)
    canvas = Canvas.blank(size_px)
    HABITATS[habitat](stream, canvas)
    mist(bird_stream, canvas)
    _twig(bird_stream, canvas, pose)
    coverage = _bird(bird_stream, canvas, pose)
    pixels = np.minimum(np.maximum(canvas.rgb * (light * 255) + 0.5, 0), 255)
    return Drawing(
        image=np.ascontiguousarray(pixels.astype(np.uint8).transpose(1, 2, 0)),
        label=label,
        box=pose.box(),
        head=pose.to_image(*_HEAD[:2]),
        habitat=habitat,
        mask=(coverage * 255 + 0.5).astype(np.uint8),
    )


def contact_sheet(
    *,
    seed: int = 0,
    size_px: int = 112,
    num_species: int = 8,
    columns: int = 4,
    gap_px: int = 4,
) -> Array:
    """A sheet of examples: one row a species, in the order of `class_names`.

    Returns:
      uint8 `[height, width, 3]`, white between the images. The first `columns`
      columns are of `train`, then, after a wider gap, as many of `test_shifted`.
    """
    step = size_px + gap_px
    height = num_species * step + gap_px
    sheet = np.full((height, 2 * columns * step + 4 * gap_px, 3), 255, np.uint8)
    for row in range(num_species):
        for column in range(2 * columns):
            shifted, k = divmod(column, columns)
            drawing = draw(
                SPLITS[2 * shifted],
                k * num_species + row,
                seed=seed,
                size_px=size_px,
                num_species=num_species,
            )
            top, left = gap_px + row * step, gap_px + column * step
            left += 2 * gap_px * shifted
            sheet[top : top + size_px, left : left + size_px] = drawing.image
    return sheet


def _main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -m cra_jax.datasets.synthetic OUT.png", file=sys.stderr)
        return 2
    from PIL import Image  # here alone: drawing itself needs no Pillow

    Image.fromarray(contact_sheet()).save(arguments[0])
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
