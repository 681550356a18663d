"""A chart as SVG text, for a page or a file: no script, no outside font, nothing loaded."""

from collections.abc import Callable
from html import escape

from alphaflow_cli.report.chart import Chart, Mark, layout

FONT = "Helvetica Neue, Helvetica, Arial, sans-serif"


def to_svg(chart: Chart) -> str:
    picture = layout(chart)
    size = f'width="{picture.width}" height="{picture.height}" viewBox="0 0 {picture.width} {picture.height}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="{FONT}" role="img">'
    title = f"<title>{escape(chart.title)}</title>"
    return "\n".join([head, title, *(DRAW[mark.kind](mark) for mark in picture.marks), "</svg>"]) + "\n"


def _rect(mark: Mark) -> str:
    (x, y), (x2, y2) = mark.points
    return f'<rect x="{x:.2f}" y="{y:.2f}" width="{x2 - x:.2f}" height="{y2 - y:.2f}" fill="{mark.colour}"/>'


def _path(mark: Mark) -> str:
    points = " ".join(f"{x:.2f},{y:.2f}" for x, y in mark.points)
    dash = ' stroke-dasharray="7 5"' if mark.dashed else ""
    stroke = f'stroke="{mark.colour}" stroke-width="{mark.width:g}" stroke-linejoin="round"{dash}'
    return f'<polyline points="{points}" fill="none" {stroke}/>'


def _dots(mark: Mark) -> str:
    dots = (f'<circle cx="{x:.2f}" cy="{y:.2f}" r="{mark.width:g}"/>' for x, y in mark.points)
    return f'<g fill="{mark.colour}">{"".join(dots)}</g>'


def _text(mark: Mark) -> str:
    ((x, y),) = mark.points
    weight = ' font-weight="bold"' if mark.bold else ""
    place = f'x="{x:.2f}" y="{y:.2f}" font-size="{mark.width:g}" text-anchor="{mark.anchor}"'
    return f'<text {place} fill="{mark.colour}"{weight}>{escape(mark.text)}</text>'


DRAW: dict[str, Callable[[Mark], str]] = {"rect": _rect, "path": _path, "dots": _dots, "text": _text}
