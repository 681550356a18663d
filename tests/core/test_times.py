"""How times are drawn, and how the r = t rows of a global batch are shared out."""

from itertools import chain
from typing import get_args

import pytest
import torch
from golden_data import arrays

from alphaflow_cli.core import times
from alphaflow_cli.core.alpha import equal_rows
from alphaflow_cli.recipe.schema import TimeLaw, TimeOrder

NORMALS = torch.randn(3, 4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def drawn(n_equal, *, law="logit_normal", order="minmax", mean=-0.4, std=1.0):
    draw = times.Draw(law, mean, std)
    return times.sample_times(NORMALS, n_equal, times.TimeLaws(draw, draw, draw, order, 0.0, "own"))


def test_every_law_and_order_of_the_recipe_has_a_function():
    assert set(times.LAWS) == set(get_args(TimeLaw))
    assert set(times.ORDERS) == set(get_args(TimeOrder))


@pytest.mark.parametrize("law", get_args(TimeLaw))
@pytest.mark.parametrize("order", get_args(TimeOrder))
def test_r_never_exceeds_t_and_equals_it_on_the_first_rows_only(law, order):
    t, r = drawn(1000, law=law, order=order)
    assert torch.equal(t[:1000], r[:1000])
    assert (r <= t).all()
    assert (r >= 0).all()
    assert (t <= 1).all()
    assert (r[1000:] < t[1000:]).float().mean() > (0.45 if order == "min" else 0.999)  # min: a tie every other time


@pytest.mark.parametrize("n_equal", [0, 1, 4000])
def test_the_number_of_equal_rows_is_exact(n_equal):
    t, r = drawn(n_equal)
    assert int((t == r).sum()) == n_equal


def test_the_r_equal_t_rows_use_their_own_single_draw():
    t, _ = drawn(1000, mean=0.3, std=2.0)
    torch.testing.assert_close(t[:1000], torch.sigmoid(0.3 + 2.0 * NORMALS[0, :1000]), rtol=1e-14, atol=0)


def test_the_three_orders_are_their_definitions():
    first, second = torch.tensor([0.2, 0.9]), torch.tensor([0.6, 0.5])
    expected = {
        "minmax": ([0.6, 0.9], [0.2, 0.5]),
        "min": ([0.2, 0.9], [0.2, 0.5]),
        "r_in_t_range": ([0.2, 0.9], [0.12, 0.45]),
    }
    for order, (t, r) in expected.items():
        ours = times.ORDERS[order](first, second)
        torch.testing.assert_close(torch.stack(ours), torch.tensor([t, r]))


def test_the_logit_normal_has_the_published_location_and_scale():
    misc = arrays("misc.npz")  # drawn with location 0.5, scale 2 and times that stop at 0.9
    ours = 0.9 * times.logit_normal(torch.tensor(misc["time/z_fm"]), mean=0.5, std=2.0)
    torch.testing.assert_close(ours, torch.tensor(misc["time/eps0.1_scale2_loc0.5"]), rtol=2e-7, atol=1e-7)


def test_the_uniform_law_is_uniform():
    t = times.uniform(NORMALS[0], mean=5.0, std=7.0).sort().values
    grid = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    assert (t - grid).abs().max() < 1.63 / 4000**0.5  # Kolmogorov–Smirnov, 1% level


@pytest.mark.parametrize("parts", range(1, 9))
def test_the_parts_of_a_global_batch_add_up(parts):
    for size in range(1, 21):
        for n_equal in range(size + 1):
            pieces = [times.rows_of(size, n_equal=n_equal, parts=parts, part=part) for part in range(parts)]
            rows = [list(range(size))[piece] for piece, _ in pieces]
            counts = [count for _, count in pieces]
            assert sorted(chain(*rows)) == list(range(size))
            assert sum(counts) == n_equal
            assert max(counts) - min(counts) <= 1
            for mine, count in zip(rows, counts, strict=True):
                assert [row < n_equal for row in mine] == [True] * count + [False] * (len(mine) - count)


def test_the_share_of_equal_rows_is_truncated_as_published():
    assert [equal_rows(256, share) for share in (0.0, 0.25, 0.5, 0.75, 0.999, 1.0)] == [0, 64, 128, 192, 255, 256]
