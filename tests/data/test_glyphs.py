"""The embedded set: picture i is picture i, balanced, varied, and its classes can be told apart."""

import hashlib

import numpy as np
import pytest

from alphaflow_cli.data.glyphs import GLYPHS, draw_glyph
from alphaflow_cli.data.sources import open_source
from alphaflow_cli.errors import AlphaflowError


def array(index):
    return np.asarray(draw_glyph(index), np.float64)


def test_a_picture_depends_on_its_index_alone():
    assert draw_glyph(7).tobytes() == draw_glyph(7).tobytes()
    few, many = open_source("glyphs:20"), open_source("glyphs:4000")
    with few.reading([19]) as one, many.reading([19]) as other:
        assert next(one)[1]().tobytes() == next(other)[1]().tobytes()


def test_labels_go_round_and_names_are_sorted():
    source = open_source("glyphs:25")
    assert [name.split("/")[0] for name in source.names] == [GLYPHS[index % 10] for index in range(25)]
    assert list(GLYPHS) == sorted(GLYPHS) == list(source.class_order())


def test_no_two_pictures_are_alike():
    assert len({hashlib.sha256(draw_glyph(index).tobytes()).digest() for index in range(2000)}) == 2000


def test_neighbours_have_nothing_in_common():
    assert len({draw_glyph(index).getpixel((0, 0)) for index in range(200)}) > 190


def test_the_glyph_is_brighter_than_its_ground():
    for index in range(200):
        brightest = array(index).max(axis=2)
        assert np.median(brightest[[0, 0, -1, -1], [0, -1, 0, -1]]) < 100
        assert brightest.max() > 180


def test_every_pixel_varies_so_that_positions_can_be_normalised():
    stack = np.stack([array(index) for index in range(500)])
    assert stack.std(axis=0).min() > 10


def test_the_classes_can_be_told_apart_by_shape_alone():
    """Nearest class mean on centred, coloured-out, size-normalised outlines beats chance by far."""

    def outline(index):
        picture = array(index)
        mask = np.abs(picture - np.median(picture[[0, 0, -1, -1], [0, -1, 0, -1]], axis=0)).sum(axis=2) > 60
        rows, columns = np.nonzero(mask)
        grid = np.zeros((12, 12))
        for y, x in zip(rows, columns, strict=True):
            height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
            grid[(y - rows.min()) * 12 // height, (x - columns.min()) * 12 // width] = 1
        return grid.ravel()

    means = np.stack([np.mean([outline(index) for index in range(label, 300, 10)], axis=0) for label in range(10)])
    found = [np.argmin(((means - outline(index)) ** 2).sum(axis=1)) for index in range(300, 400)]
    assert np.mean(np.array(found) == np.arange(300, 400) % 10) > 0.75


@pytest.mark.parametrize("text", ["glyphs:", "glyphs:0", "glyphs:-3", "glyphs:many", "glyphs:99999999"])
def test_a_wrong_count_is_named(text):
    with pytest.raises(AlphaflowError, match="from 1 to 10,000,000"):
        open_source(text)
