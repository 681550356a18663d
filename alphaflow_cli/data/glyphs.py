"""The two embedded picture sets, drawn by the program. Picture i depends on i alone and shows class i % 10.

Both show the same ten outlines, and need no download, so every command can be tried at once:

    shapes:N   a strongly coloured shape on a pale ground; it varies a little in place, angle and size, freely in hue
    glyphs:N   a bright shape on a dark ground; it varies much in place, angle and size, which is harder to learn

Each is drawn several times as large and averaged down.
"""

import colorsys
import math
import random
from collections.abc import Callable

from PIL import Image, ImageDraw

from alphaflow_cli.core.draws import mix_seed

SIZE, FINE, FINER = 32, 4, 8  # pixels; glyphs and shapes are drawn this much finer
GLYPHS = ("arrow", "crescent", "cross", "disc", "heart", "hourglass", "ring", "square", "star", "triangle")  # sorted
Point = tuple[float, float]
Outline = list[Point]
Colour = tuple[int, int, int]
Placement = Callable[[Outline], Outline]


def draw_glyph(index: int) -> Image.Image:
    """Draw picture number `index` of glyphs:N, 32 × 32 RGB."""
    rng = random.Random(mix_seed(index))
    hue = rng.random()
    ground = _rgb(hue, rng.uniform(0.3, 0.8), rng.uniform(0.08, 0.38))
    ink = _rgb(hue + rng.uniform(0.2, 0.8), rng.uniform(0.25, 0.9), rng.uniform(0.75, 1.0))
    image = Image.new("RGB", (SIZE * FINE, SIZE * FINE), ground)
    radius = rng.uniform(8.0, 12.5) * FINE
    room = SIZE * FINE / 2 - radius
    centre = (SIZE * FINE / 2 + rng.uniform(-room, room), SIZE * FINE / 2 + rng.uniform(-room, room))
    place = _placed(centre, radius, math.radians(rng.uniform(-30, 30)))
    return _draw(index, image, place, ink, ground)


def draw_shape(index: int) -> Image.Image:
    """Draw picture number `index` of shapes:N, 32 × 32 RGB."""
    rng = random.Random(mix_seed(index))
    hue = rng.random()
    ground = _rgb(hue, rng.uniform(0.06, 0.3), rng.uniform(0.9, 1.0))
    ink = _rgb(hue + rng.uniform(0.2, 0.8), rng.uniform(0.6, 0.95), rng.uniform(0.45, 0.85))
    image = Image.new("RGB", (SIZE * FINER, SIZE * FINER), ground)
    radius = rng.uniform(10.5, 13.0) * FINER
    centre = ((SIZE / 2 + rng.uniform(-1.5, 1.5)) * FINER, (SIZE / 2 + rng.uniform(-1.5, 1.5)) * FINER)
    return _draw(index, image, _placed(centre, radius, math.radians(rng.uniform(-10, 10))), ink, ground)


def _draw(index: int, image: Image.Image, place: Placement, ink: Colour, ground: Colour) -> Image.Image:
    pen = ImageDraw.Draw(image)
    for outline, filled in SHAPES[GLYPHS[index % len(GLYPHS)]]():
        pen.polygon(place(outline), fill=ink if filled else ground)
    return image.resize((SIZE, SIZE), Image.Resampling.BOX)


def _rgb(hue: float, saturation: float, value: float) -> Colour:
    red, green, blue = colorsys.hsv_to_rgb(hue % 1.0, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def _placed(centre: Point, radius: float, angle: float) -> Placement:
    """Turn, scale and move an outline out of the unit disc."""
    cos, sin = radius * math.cos(angle), radius * math.sin(angle)
    return lambda shape: [(centre[0] + cos * x - sin * y, centre[1] + sin * x + cos * y) for x, y in shape]


def _circle(radius: float, x: float = 0.0, y: float = 0.0) -> Outline:
    turns = [2 * math.pi * k / 72 for k in range(72)]
    return [(x + radius * math.cos(turn), y + radius * math.sin(turn)) for turn in turns]


def _regular(corners: int, radii: tuple[float, ...]) -> Outline:
    turns = [2 * math.pi * k / corners - math.pi / 2 for k in range(corners)]
    return [
        (radii[k % len(radii)] * math.cos(turn), radii[k % len(radii)] * math.sin(turn)) for k, turn in enumerate(turns)
    ]


def _heart() -> Outline:
    turns = [2 * math.pi * k / 72 for k in range(72)]
    return [
        (math.sin(a) ** 3, -(13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)) / 16)
        for a in turns
    ]


_ARROW = [(0.0, -1.0), (0.75, -0.15), (0.27, -0.15), (0.27, 0.95), (-0.27, 0.95), (-0.27, -0.15), (-0.75, -0.15)]
_CROSS = [(-0.3, -0.95), (0.3, -0.95), (0.3, -0.3), (0.95, -0.3), (0.95, 0.3), (0.3, 0.3)]
_HOURGLASS = [(-0.75, -0.9), (0.75, -0.9), (0.12, 0.0), (0.75, 0.9), (-0.75, 0.9), (-0.12, 0.0)]

SHAPES: dict[str, Callable[[], list[tuple[Outline, bool]]]] = {  # outlines in drawing order; False paints the ground
    "arrow": lambda: [(_ARROW, True)],
    "crescent": lambda: [(_circle(0.95), True), (_circle(0.8, 0.45, -0.1), False)],
    "cross": lambda: [(_CROSS + [(-x, -y) for x, y in _CROSS], True)],
    "disc": lambda: [(_circle(0.9), True)],
    "heart": lambda: [(_heart(), True)],
    "hourglass": lambda: [(_HOURGLASS, True)],
    "ring": lambda: [(_circle(0.95), True), (_circle(0.55), False)],
    "square": lambda: [([(-0.75, -0.75), (0.75, -0.75), (0.75, 0.75), (-0.75, 0.75)], True)],
    "star": lambda: [(_regular(10, (1.0, 0.42)), True)],
    "triangle": lambda: [(_regular(3, (1.0,)), True)],
}
