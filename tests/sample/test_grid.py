"""Grids of pictures: every picture where its seed, its class and its walk say."""

import io

import numpy as np
import pytest
from PIL import Image

from alphaflow_cli.sample.grid import even_columns, grid_by_walk, grid_in_rows, grid_png, grid_side_by_side, in_colour

CELL = 64 + 2  # a picture of 16 px is shown four times as large


def pictures(count, first=0):
    """Picture i is all of colour (i, i, i)."""
    return [np.full((16, 16, 3), i, np.uint8) for i in range(first, first + count)]


def cells(png, rows, columns):
    """The colour in the middle of each cell, from the lower right corner, where no word stands."""
    image = np.asarray(Image.open(io.BytesIO(png)))
    height, width, _ = image.shape
    return [
        [int(image[height - (rows - i) * CELL + 32, width - (columns - j) * CELL + 32, 0]) for j in range(columns)]
        for i in range(rows)
    ]


def test_rows_show_pictures_in_reading_order():
    assert cells(grid_in_rows(pictures(6), 3), 2, 3) == [[0, 1, 2], [3, 4, 5]]
    assert cells(grid_in_rows(pictures(5), 3), 2, 3) == [[0, 1, 2], [3, 4, 255]]


def test_columns_are_named_where_all_their_pictures_bear_the_name():
    plain = grid_in_rows(pictures(4), 2)
    below = [["a", "b"], ["b", "a"]]
    assert grid_in_rows(pictures(4), 2, ["a", "b", "b", "a"]) == grid_png([pictures(2), pictures(2, 2)], names=below)
    assert grid_in_rows(pictures(4), 2, ["", "", "", ""]) == plain
    assert grid_in_rows(pictures(4), 2, ["a", "b", "a", "b"]) == grid_png(
        [pictures(2), pictures(2, 2)], column_names=["a", "b"]
    )


@pytest.mark.parametrize(
    ("count", "columns"), [(64, 8), (16, 8), (20, 10), (10, 10), (7, 7), (13, 10), (100, 10), (1, 1), (9, 9), (18, 9)]
)
def test_a_grid_is_even_where_it_can_be(count, columns):
    assert even_columns(count, 10) == columns


def test_names_that_differ_within_a_column_stand_below_their_pictures():
    image = np.asarray(Image.open(io.BytesIO(grid_in_rows(pictures(4), 2, ["a", "b", "b", "a"]))))
    assert image.shape[:2] == (2 * (CELL + 16) + 2, 2 * CELL + 2)
    assert [int(image[2 + 82 * row + 32, 34, 0]) for row in range(2)] == [0, 2]
    assert (image[66:82] < 128).any()
    assert (image[148:] < 128).any()


def test_the_paper_is_transparent_and_the_pictures_are_not():
    image = Image.open(io.BytesIO(grid_in_rows(pictures(3), 2, ["a", "b", "a"])))
    paper = np.asarray(image)[..., 3]
    assert image.mode == "RGBA"
    assert (paper[20 + 2 : 20 + CELL, 2:CELL] == 255).all()
    assert (paper[-40:, -40:] == 0).all()  # where a fourth picture would be
    assert in_colour(image).mode == "RGBA"
    assert Image.open(io.BytesIO(grid_in_rows(pictures(3), 2, form=".jpg"))).getpixel((100, 100)) == (255, 255, 255)


def test_long_words_side_by_side_do_not_touch():
    words = np.asarray(Image.open(io.BytesIO(grid_in_rows(pictures(2), 2, ["hourglass", "hourglass"]))))[:20, :, 3]
    between = slice(2 + 64 - 3, 2 + CELL + 3)
    assert words.any()
    assert not words[:, between].any()


def test_names_in_letters_of_other_languages_can_be_read():
    def grid(name):
        return grid_in_rows(pictures(4), 2, [name, "b", "b", name])

    assert len({grid(name) for name in ("Bär", "Bör", "Стол", "Стул", "αβ", "βα")}) == 6  # no two of them boxes
    assert grid("äひ") == grid("ä?")  # a letter that the fonts lack


def test_walks_stand_below_each_other_with_the_same_seeds_above_each_other():
    drawn = [("1 NFE", pictures(4)), ("1 NFE", pictures(4, 100)), ("4 NFE", pictures(4, 200))]
    assert cells(grid_by_walk(drawn, 3, ["a", "b", "c", "d"]), 3, 3) == [[0, 1, 2], [100, 101, 102], [200, 201, 202]]


@pytest.mark.parametrize("names", [["", "", ""], ["one", "two", "three"]])
def test_walks_stand_beside_each_other_with_a_class_in_each_row(names):
    drawn = [("1 NFE", pictures(6)), ("2 NFE", pictures(6, 100))]
    shown = cells(grid_side_by_side(drawn, 3, names), 3, 4)
    assert shown == [[0, 3, 100, 103], [1, 4, 101, 104], [2, 5, 102, 105]]
