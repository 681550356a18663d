"""Grids of pictures with a word above each column or beside each row: the only place that lays them out.

`grid_in_rows` shows pictures in reading order, `grid_by_walk` the same seeds by several walks below each other, and
`grid_side_by_side` by several walks beside each other, a class per row.
"""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from alphaflow_cli.data.pictures import open_picture
from alphaflow_cli.errors import blamed_on

GAP, INK, PAPER = 2, (26, 32, 44), (255, 255, 255)


def grid_in_rows(pictures: Sequence[np.ndarray], columns: int, names: Sequence[str] = ()) -> bytes:
    """In reading order; the columns have names where all pictures below bear them."""
    rows = [pictures[i : i + columns] for i in range(0, len(pictures), columns)]
    by_column = all(name == names[i % columns] for i, name in enumerate(names))
    return grid_png(rows, column_names=names[:columns] if by_column else ())


def grid_by_walk(drawn: Sequence[tuple[str, Sequence[np.ndarray]]], columns: int, names: Sequence[str]) -> bytes:
    """A row for each walk, named by it, with the first pictures; the columns have their pictures' names."""
    rows = [pictures[:columns] for _, pictures in drawn]
    return grid_png(rows, row_names=[name for name, _ in drawn], column_names=names[:columns])


def grid_side_by_side(drawn: Sequence[tuple[str, Sequence[np.ndarray]]], rows: int, names: Sequence[str]) -> bytes:
    """Each walk's pictures as a block under its name, column by column, so that a row holds one class."""
    columns = [name for name, pictures in drawn for _ in pictures[::rows]]
    cells = [[picture for _, pictures in drawn for picture in pictures[i::rows]] for i in range(rows)]
    return grid_png(cells, row_names=names[:rows] if any(names) else (), column_names=columns)


def grid_png(
    rows: Sequence[Sequence[np.ndarray]], *, row_names: Sequence[str] = (), column_names: Sequence[str] = ()
) -> bytes:
    """PNG of rows of uint8 (H, W, 3) pictures; small ones are shown larger, without smoothing."""
    side = rows[0][0].shape[0]
    zoom = max(1, round(64 / side)) if side < 64 else 1
    cell = side * zoom
    font = ImageFont.load_default(max(11, min(16, cell // 4)))
    left = int(max(font.getlength(name) for name in row_names)) + 12 if row_names else 0
    top = 20 if any(column_names) else 0
    width = left + max(len(row) for row in rows) * (cell + GAP) + GAP
    canvas = Image.new("RGB", (width, top + len(rows) * (cell + GAP) + GAP), PAPER)
    draw = ImageDraw.Draw(canvas)
    for j, name in enumerate(column_names):
        draw.text((left + GAP + j * (cell + GAP) + cell // 2, 10), _fit(name, cell, font), INK, font, anchor="mm")
    for i, row in enumerate(rows):
        y = top + GAP + i * (cell + GAP)
        if row_names:
            draw.text((left - 6, y + cell // 2), row_names[i], INK, font, anchor="rm")
        for j, picture in enumerate(row):
            image = Image.fromarray(picture).resize((cell, cell), Image.Resampling.NEAREST)
            canvas.paste(image, (left + GAP + j * (cell + GAP), y))
    return png_bytes(canvas)


def picture_png(picture: np.ndarray) -> bytes:
    """PNG of one uint8 (H, W, 3) picture."""
    return png_bytes(Image.fromarray(picture))


def plain_png(path: Path) -> bytes:
    """The pixels of a PNG file and nothing else that may stand in one."""
    with blamed_on(path, "a PNG picture", Image.DecompressionBombError), open_picture(path) as image:
        return png_bytes(image.convert("RGB"))


def png_bytes(image: Image.Image) -> bytes:
    """A picture in memory as the bytes of a PNG file."""
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def _fit(name: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """As much of the name as fits."""
    while len(name) > 1 and font.getlength(name) > width:
        name = name[:-2] + "…"
    return name
