"""The embedded sets: picture i is picture i, balanced, varied, and the classes can be told apart."""

import hashlib
import math

import numpy as np
import pytest

from alphaflow_cli.data.glyphs import GLYPHS, draw_shape
from alphaflow_cli.data.sources import DRAWERS, open_source
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.recipe import load_recipe

DIGESTS = {"glyphs": "9db3241c0522f348", "shapes": "679bfbb09242842e"}  # of the first 40 pictures, 32 px
each_set = pytest.mark.parametrize("kind", DRAWERS)


def array(kind, index):
    return np.asarray(DRAWERS[kind](index), np.float64)


def corners(picture):
    return picture[[0, 0, -1, -1], [0, -1, 0, -1]]


def mask(kind, index):
    """True where the shape is."""
    picture = array(kind, index)
    return np.abs(picture - np.median(corners(picture), axis=0)).sum(axis=2) > 60


@each_set
def test_a_set_keeps_its_bytes(kind):
    digest = hashlib.sha256()
    for index in range(40):
        digest.update(DRAWERS[kind](index).tobytes())
    assert digest.hexdigest()[:16] == DIGESTS[kind]


@each_set
def test_a_picture_depends_on_its_index_alone(kind):
    assert DRAWERS[kind](7).tobytes() == DRAWERS[kind](7).tobytes()
    few, many = open_source(f"{kind}:20"), open_source(f"{kind}:4000")
    with few.reading([19]) as one, many.reading([19]) as other:
        assert next(one)[1]().tobytes() == next(other)[1]().tobytes() == DRAWERS[kind](19).tobytes()


@each_set
def test_labels_go_round_and_names_are_sorted(kind):
    source = open_source(f"{kind}:25")
    assert (source.kind, source.name) == (kind, f"{kind}:25")
    assert [name.split("/")[0] for name in source.names] == [GLYPHS[index % 10] for index in range(25)]
    assert list(GLYPHS) == sorted(GLYPHS) == list(source.class_order())


@each_set
def test_a_set_writes_its_names_only_once(kind):
    """An evaluation against 10,000 of them asks for the names at each picture."""
    source = open_source(f"{kind}:10000")
    assert source.names is source.names


@each_set
def test_every_embedded_set_may_be_a_recipes_source(kind):
    assert load_recipe("quickstart", [f"data.source={kind}:40"]).data.source == f"{kind}:40"


@each_set
def test_no_two_pictures_are_alike(kind):
    assert len({hashlib.sha256(DRAWERS[kind](index).tobytes()).digest() for index in range(2000)}) == 2000


@each_set
def test_neighbours_have_nothing_in_common(kind):
    assert len({DRAWERS[kind](index).getpixel((0, 0)) for index in range(200)}) > 190


def test_the_glyph_is_brighter_than_its_ground():
    for index in range(200):
        brightest = array("glyphs", index).max(axis=2)
        assert np.median(corners(brightest)) < 100
        assert brightest.max() > 180


def test_a_shape_is_darker_and_more_colourful_than_its_pale_ground():
    for index in range(200):
        picture = array("shapes", index)
        ground, ink = np.median(corners(picture), axis=0), np.median(picture[mask("shapes", index)], axis=0)
        assert ground.max() > 225 > ink.max()
        assert np.ptp(ink) / ink.max() > np.ptp(ground) / ground.max() + 0.2


def test_a_shape_varies_in_place_size_and_colour():
    """As widely as it is meant to: the middle of a disc by 1.5 pixels, its radius from 10.5 to 13 times 0.9."""
    discs = [mask("shapes", index) for index in range(GLYPHS.index("disc"), 3000, 10)]
    middles = np.array([np.argwhere(disc).mean(axis=0) - 15.5 for disc in discs])
    radii = np.array([math.sqrt(disc.sum() / math.pi) for disc in discs])
    assert 1.3 < np.abs(middles).max() < 1.7
    assert radii.min() < 10.0 < 11.2 < radii.max()
    inks = np.array([draw_shape(index).getpixel((16, 16)) for index in range(GLYPHS.index("disc"), 3000, 10)])
    assert np.ptp(inks, axis=0).min() > 150


@each_set
def test_every_pixel_varies_so_that_positions_can_be_normalised(kind):
    stack = np.stack([array(kind, index) for index in range(500)])
    assert stack.std(axis=0).min() > 10


@each_set
def test_the_classes_can_be_told_apart_by_shape_alone(kind):
    """Nearest class mean on centred, coloured-out, size-normalised outlines beats chance by far."""

    def outline(index):
        rows, columns = np.nonzero(mask(kind, index))
        grid = np.zeros((12, 12))
        for y, x in zip(rows, columns, strict=True):
            height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
            grid[(y - rows.min()) * 12 // height, (x - columns.min()) * 12 // width] = 1
        return grid.ravel()

    means = np.stack([np.mean([outline(index) for index in range(label, 300, 10)], axis=0) for label in range(10)])
    found = [np.argmin(((means - outline(index)) ** 2).sum(axis=1)) for index in range(300, 400)]
    assert np.mean(np.array(found) == np.arange(300, 400) % 10) > 0.75


@pytest.mark.parametrize("text", ["glyphs:", "glyphs:0", "glyphs:-3", "glyphs:many", "shapes:", "shapes:99999999"])
def test_a_wrong_count_is_named(text):
    with pytest.raises(AlphaflowError, match=rf"{text.split(':')[0]}:N with N from 1 to 10,000,000"):
        open_source(text)
