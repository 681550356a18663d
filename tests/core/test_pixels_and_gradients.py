"""Floats to bytes and back, and gradients that are not finite."""

from typing import get_args

import pytest
import torch
from golden_data import arrays

from alphaflow_cli.core.gradients import replace_nonfinite
from alphaflow_cli.core.pixels import RULES, from_uint8, to_uint8
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.recipe.schema import PixelRule


def test_every_rule_of_the_recipe_has_a_function():
    assert set(RULES) == set(get_args(PixelRule))


def test_truncation_and_the_way_back_are_the_published_ones():
    misc = arrays("misc.npz")
    pixels = torch.tensor(misc["misc/px_in"])[:, None]
    assert torch.equal(to_uint8(pixels, "truncate")[:, 0], torch.tensor(misc["misc/px_uint8"]))
    back = from_uint8(torch.tensor(misc["misc/px_uint8"]))
    torch.testing.assert_close(back, torch.tensor(misc["misc/px_back"]), rtol=0, atol=1.2e-7)


def test_rounding_takes_the_nearest_byte():
    pixels = (torch.tensor([[0.4, 0.6, 127.4, 127.6, 254.4, 254.6, 300.0, -5.0]]) / 127.5) - 1
    assert to_uint8(pixels, "round").tolist() == [[0, 1, 127, 128, 254, 255, 255, 0]]
    assert to_uint8(pixels, "truncate").tolist() == [[0, 0, 127, 127, 254, 254, 255, 0]]


def test_every_byte_survives_the_round_trip_by_rounding():
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert torch.equal(to_uint8(from_uint8(every), "round"), every)
    assert from_uint8(every).min() == -1
    assert from_uint8(every).max() == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_picture_that_is_not_finite_is_refused_not_blackened(bad):
    pixels = torch.zeros(4, 3, 2, 2)
    pixels[2, 1, 0, 1] = bad
    with pytest.raises(AlphaflowError, match=r"1 of 4 pictures .* number 2"):
        to_uint8(pixels, "truncate")


def test_gradients_become_finite_as_published_and_are_counted():
    grads = [
        torch.tensor([float("nan"), float("inf"), -float("inf"), 3.0, -2e6]),
        torch.ones(2),
        torch.tensor(torch.inf),
    ]
    count = replace_nonfinite(grads)
    assert torch.equal(grads[0], torch.tensor(arrays("misc.npz")["misc/grad_nan_to_num"]))
    assert torch.equal(grads[1], torch.ones(2))
    assert grads[2] == 1e5
    assert int(count) == 4
    assert int(replace_nonfinite(grads)) == 0
