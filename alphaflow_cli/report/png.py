"""A chart as PNG bytes by Pillow: drawn four times as large as its marks say, kept at twice."""

import io
import itertools
from collections.abc import Callable
from functools import cache

from PIL import Image, ImageDraw, ImageFont

from alphaflow_cli.report.chart import Chart, Mark, layout

DRAWN, KEPT = 4, 2
ANCHORS = {"start": "ls", "middle": "ms", "end": "rs"}
SPELT = str.maketrans({"α": "alpha", "ω": "omega", "κ": "kappa", "→": "to", "≤": "<=", "·": "-", "–": "-", "…": "..."})


def to_png(chart: Chart) -> bytes:
    picture = layout(chart)
    image = Image.new("RGB", (picture.width * DRAWN, picture.height * DRAWN), "white")
    draw = ImageDraw.Draw(image)
    for mark in picture.marks:
        DRAW[mark.kind](draw, mark)
    small = image.resize((picture.width * KEPT, picture.height * KEPT), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    small.save(out, "PNG", optimize=True)
    return out.getvalue()


@cache
def _font(size: float) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size * DRAWN)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow without FreeType has no scalable font"
    return font


def _scaled(mark: Mark) -> list[tuple[float, float]]:
    return [(x * DRAWN, y * DRAWN) for x, y in mark.points]


def _rect(draw: ImageDraw.ImageDraw, mark: Mark) -> None:
    draw.rectangle(_scaled(mark), fill=mark.colour)


def _path(draw: ImageDraw.ImageDraw, mark: Mark) -> None:
    width = round(mark.width * DRAWN)
    for piece in _dashes(_scaled(mark)) if mark.dashed else [_scaled(mark)]:
        draw.line(piece, fill=mark.colour, width=width, joint="curve")


def _dashes(points: list[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    """A path cut into dashes of 7 pixels with gaps of 5, as in SVG."""
    pieces: list[list[tuple[float, float]]] = [[points[0]]]
    drawing, left = True, 7.0 * DRAWN
    for (x, y), (x2, y2) in itertools.pairwise(points):
        length = ((x2 - x) ** 2 + (y2 - y) ** 2) ** 0.5
        done = 0.0
        while length - done > left:
            done += left
            cut = (x + (x2 - x) * done / length, y + (y2 - y) * done / length)
            pieces = [*pieces[:-1], [*pieces[-1], cut]] if drawing else [*pieces, [cut]]
            drawing, left = not drawing, (5.0 if drawing else 7.0) * DRAWN
        left -= length - done
        if drawing:
            pieces[-1].append((x2, y2))
    return [piece for piece in pieces if len(piece) > 1]


def _dots(draw: ImageDraw.ImageDraw, mark: Mark) -> None:
    radius = mark.width * DRAWN
    for x, y in _scaled(mark):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=mark.colour)


def _text(draw: ImageDraw.ImageDraw, mark: Mark) -> None:
    """Pillow's own font has no Greek and no bold: Greek is spelt out, bold gets a thin outline."""
    (place,) = _scaled(mark)
    stroke = round(0.018 * mark.width * DRAWN) if mark.bold else 0
    text = mark.text.translate(SPELT)
    draw.text(place, text, fill=mark.colour, font=_font(mark.width), anchor=ANCHORS[mark.anchor], stroke_width=stroke)


DRAW: dict[str, Callable[[ImageDraw.ImageDraw, Mark], None]] = {
    "rect": _rect,
    "path": _path,
    "dots": _dots,
    "text": _text,
}
