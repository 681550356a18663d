"""Grids of pictures with a word above a column, beside a row or below a picture: the only place that lays them out.

`grid_in_rows` shows pictures in reading order, `grid_by_walk` the same seeds by several walks below each other, and
`grid_side_by_side` by several walks beside each other, a class per row. The paper between the pictures is transparent,
and the words are of a grey that can be read on white and on black: a grid looks well on light and dark pages.
"""

import io
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from alphaflow_cli.charts.chart import with_letters
from alphaflow_cli.charts.draw import own_font
from alphaflow_cli.data.pictures import open_picture
from alphaflow_cli.errors import AlphaflowError, blamed_on

GAP, INK, PAPER = 2, (113, 128, 150, 255), (255, 255, 255, 0)
LETTERS, SMALLEST, APART = 16, 11, 8  # pixels: the size of words, the least of it, and between two words side by side
WORD, HEAD = 16, 20  # pixels for the name below a picture, and for those above the columns
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
FORMS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}  # suffix of a grid's file → its form
HIGHEST = {"PNG": 1 << 20, "JPEG": 65_500, "WEBP": 16_383}  # pixels of a picture; PNG has no bound that a grid reaches


def grid_form(path: Path) -> str:
    """The suffix of a grid's file, by which its form is known; any other than those of FORMS is refused."""
    form = path.suffix.lower()
    if form not in FORMS:
        raise AlphaflowError(f"{path}: a grid is a picture. Give it a name that ends in {', '.join(FORMS)}.")
    return form


def even_columns(count: int, most: int) -> int:
    """The number of columns, at most `most`, that fills every row; `most` where only narrow grids would be even."""
    fitting = [columns for columns in range(most, most // 2, -1) if count % columns == 0]
    return min(count, fitting[0] if fitting else most)


def most_in_rows(columns: int, side: int, form: str) -> int:
    """How many pictures of this side fit into a grid of this form, whichever columns `even_columns` chooses."""
    step = cell_of(side) + GAP + WORD
    return (HIGHEST[FORMS[form]] - HEAD - GAP) // step * (columns // 2 + 1)


def cell_of(side: int) -> int:
    """The side of a picture in a grid: small ones are shown larger."""
    return side * (max(1, round(64 / side)) if side < 64 else 1)


def grid_in_rows(pictures: Sequence[np.ndarray], columns: int, names: Sequence[str] = (), form: str = ".png") -> bytes:
    """Lay pictures out in reading order; a name stands above a column whose pictures share it, else below each."""
    rows = [pictures[i : i + columns] for i in range(0, len(pictures), columns)]
    if all(name == names[i % columns] for i, name in enumerate(names)):
        return grid_png(rows, column_names=names[:columns], form=form)
    return grid_png(rows, names=[names[i : i + columns] for i in range(0, len(names), columns)], form=form)


def grid_by_walk(
    drawn: Sequence[tuple[str, Sequence[np.ndarray]]], columns: int, names: Sequence[str], form: str = ".png"
) -> bytes:
    """Lay out one row for each walk, named by it; the columns have the names of their pictures."""
    rows = [pictures[:columns] for _, pictures in drawn]
    return grid_png(rows, row_names=[name for name, _ in drawn], column_names=names[:columns], form=form)


def grid_side_by_side(drawn: Sequence[tuple[str, Sequence[np.ndarray]]], rows: int, names: Sequence[str]) -> bytes:
    """Each walk's pictures as a block under its name, column by column, so that a row holds one class."""
    columns = [name for name, pictures in drawn for _ in pictures[::rows]]
    cells = [[picture for _, pictures in drawn for picture in pictures[i::rows]] for i in range(rows)]
    return grid_png(cells, row_names=names[:rows] if any(names) else (), column_names=columns)


def grid_png(
    rows: Sequence[Sequence[np.ndarray]],
    *,
    row_names: Sequence[str] = (),
    column_names: Sequence[str] = (),
    names: Sequence[Sequence[str]] = (),
    form: str = ".png",
) -> bytes:
    """One picture of rows of uint8 (H, W, 3) pictures; small ones are shown larger, without smoothing.

    `names` stand below each picture, `form` is the suffix of the file it is for.
    """
    cell = cell_of(rows[0][0].shape[0])
    largest = max(SMALLEST, min(LETTERS, cell // 4))
    face, (row_names, column_names, *names) = lettering([row_names, column_names, *names])
    font, small, heading = (face(size) for size in (largest, SMALLEST, fitting_size(column_names, cell, largest, face)))
    left = int(max(font.getlength(name) for name in row_names)) + 12 if row_names else 0
    top = HEAD if any(column_names) else 0
    step = cell + GAP + (WORD if names else 0)  # from one row to the next
    width = left + max(len(row) for row in rows) * (cell + GAP) + GAP
    canvas = Image.new("RGBA", (width, top + len(rows) * step + GAP), PAPER)
    draw = ImageDraw.Draw(canvas)
    for j, name in enumerate(column_names):
        place = (left + GAP + j * (cell + GAP) + cell // 2, 10)
        draw.text(place, _fit(name, cell - APART, heading), INK, heading, anchor="mm")
    for i, row in enumerate(rows):
        y = top + GAP + i * step
        if row_names:
            draw.text((left - 6, y + cell // 2), row_names[i], INK, font, anchor="rm")
        for j, picture in enumerate(row):
            x = left + GAP + j * (cell + GAP)
            canvas.paste(Image.fromarray(picture).resize((cell, cell), Image.Resampling.NEAREST), (x, y))
            if names:
                place = (x + cell // 2, y + cell + WORD // 2)
                draw.text(place, _fit(names[i][j], cell - APART // 2, small), INK, small, anchor="mm")
    return png_bytes(canvas, form)


def lettering(names: Sequence[Sequence[str]]) -> tuple[Callable[[int], Font], Sequence[Sequence[str]]]:
    """The font by its size, and the names as it can show them: Pillow's own font has English letters only."""
    if all(name.isascii() for part in names for name in part):
        return ImageFont.load_default, names
    file, letters = own_font()
    return partial(ImageFont.truetype, file), [with_letters(list(part), letters) for part in names]


def fitting_size(names: Sequence[str], cell: int, largest: int, face: Callable[[int], Font]) -> int:
    """The largest size of letters in which every name fits above its column, else the smallest one."""
    sizes = range(largest, SMALLEST, -1)
    fonts = ((size, face(size)) for size in sizes)
    fitting = (size for size, font in fonts if all(font.getlength(name) <= cell - APART for name in names))
    return next(fitting, SMALLEST)


def picture_png(picture: np.ndarray) -> bytes:
    """PNG of one uint8 (H, W, 3) picture."""
    return png_bytes(Image.fromarray(picture))


def plain_png(path: Path) -> bytes:
    """The pixels of a PNG file and nothing else that may stand in one."""
    with blamed_on(path, "a PNG picture", Image.DecompressionBombError), open_picture(path) as image:
        return png_bytes(in_colour(image))


def in_colour(image: Image.Image) -> Image.Image:
    """An image in RGB, or in RGBA where it is transparent in places."""
    return image.convert("RGBA" if "A" in image.getbands() else "RGB")


def png_bytes(image: Image.Image, form: str = ".png") -> bytes:
    """A picture in memory as the bytes of a file: PNG, or what the suffix `form` stands for."""
    out = io.BytesIO()
    more = {} if form == ".png" else {"quality": 95}
    (image.convert("RGB") if FORMS[form] == "JPEG" else image).save(out, FORMS[form], **more)
    return out.getvalue()


def _fit(name: str, width: int, font: Font) -> str:
    """Shorten a name to what fits."""
    while len(name) > 1 and font.getlength(name) > width:
        name = name[:-2] + "…"
    return name
