"""Label dropout and the guided velocity: strictly inside the interval, never outside."""

import pytest
import torch
from exact_fields import batch

from alphaflow_cli.core import guidance
from alphaflow_cli.recipe.plan import effective_scale

Z, T, _, _ = batch(6)
V, U_Y, U_NULL = Z, 2 * Z + 1, Z.square()
EDGES = torch.tensor([0.0, 0.25, 0.25 + 1e-7, 0.5, 0.75, 1.0])
INSIDE = [False, False, True, True, False, False]


def guided(t, omega, kappa, t_min=0.0, t_max=1.0, u_y=U_Y, u_null=U_NULL):
    acts, null = guidance.inside(t, t_min, t_max), guidance.null_weight(omega, kappa)
    return guidance.guided_velocity(V, u_y, u_null, acts, omega=omega, kappa=kappa, null=null)


def test_the_interval_is_strict_at_both_ends():
    assert guidance.inside(EDGES, 0.25, 0.75).tolist() == INSIDE
    assert guidance.inside(torch.tensor([0.0, 1.0]), 0.0, 1.0).tolist() == [False, False]


def test_the_guided_velocity_is_the_mix_of_three():
    expected = 0.2 * V + 0.5 * U_Y + 0.3 * U_NULL
    torch.testing.assert_close(guided(T, 0.2, 0.5), expected, rtol=1e-14, atol=1e-14)


def test_outside_the_interval_the_velocity_is_the_datas_own():
    v_guided = guided(EDGES.double(), 0.2, 0.92, 0.25, 0.75)
    for row, inside in enumerate(INSIDE):
        assert torch.equal(v_guided[row], V[row]) != inside


def test_no_guidance_leaves_the_velocity_untouched():
    assert torch.equal(guided(T, 1.0, 0.0, u_y=None, u_null=None), V)


def test_what_has_no_weight_need_not_be_computed():
    assert torch.equal(guided(T, 1.0 - 0.92, 0.92), guided(T, 1.0 - 0.92, 0.92, u_null=None))  # rounding noise is zero
    assert torch.equal(guided(T, 2.0, 0.0), guided(T, 2.0, 0.0, u_y=None))


@pytest.mark.parametrize("missing", ["u_y", "u_null"])
def test_a_missing_velocity_that_has_a_weight_is_refused(missing):
    with pytest.raises(AssertionError):
        guided(T, 0.2, 0.5, **{missing: None})


def test_the_published_scales():
    assert effective_scale(1.0, 0.5) == 2.0
    assert effective_scale(0.2, 0.92) == pytest.approx(2.5)
    assert guidance.null_weight(0.2, 0.92) == pytest.approx(-0.12)


@pytest.mark.parametrize(("omega", "kappa"), [(1.0, 0.0), (0.9, 0.1), (0.8, 0.2), (0.08, 0.92)])
def test_a_mix_that_adds_up_to_one_has_no_null_part_in_spite_of_rounding(omega, kappa):
    assert guidance.null_weight(omega, kappa) == 0.0


def test_a_constant_network_velocity_is_moved_by_the_effective_scale():
    """Where u⁻ has converged to ṽ, ṽ = u_∅ + ω/(1 − κ) (v − u_∅): the fixed point of the mix."""
    omega, kappa = 0.2, 0.92
    v_guided = U_NULL + effective_scale(omega, kappa) * (V - U_NULL)
    torch.testing.assert_close(guided(T, omega, kappa, u_y=v_guided), v_guided, rtol=1e-13, atol=1e-13)


def dropped(t, uniforms, dropout=0.1, t_min=0.25, t_max=0.75):
    y = torch.arange(len(t))
    lost = guidance.dropped(t, uniforms, dropout=dropout, t_min=t_min, t_max=t_max)
    return torch.where(lost, 99, y).tolist()


def test_labels_are_dropped_inside_the_interval_only():
    assert dropped(EDGES, torch.zeros(6)) == [0, 1, 99, 99, 4, 5]


def test_a_label_is_dropped_where_the_uniform_is_below_the_rate():
    t = torch.full((4,), 0.5)
    assert dropped(t, torch.tensor([0.0, 0.0999, 0.1, 0.9])) == [99, 99, 2, 3]
    assert dropped(t, torch.zeros(4), dropout=0.0) == [0, 1, 2, 3]
    assert dropped(t, torch.rand(4), dropout=1.0) == [99] * 4


def test_a_rows_own_interval_includes_both_its_ends():
    t = torch.tensor([0.39, 0.4, 0.5, 0.65, 0.66])
    low, high = torch.full((5,), 0.4), torch.full((5,), 0.65)
    assert guidance.in_own_interval(t, low, high).tolist() == [False, True, True, True, False]
    assert guidance.in_own_interval(torch.tensor([0.0, 1.0]), torch.zeros(2), torch.ones(2)).all()


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 2.0])
def test_scales_follow_their_density_from_1_to_the_most(beta):
    w = guidance.scales(torch.linspace(0, 1, 100_001, dtype=torch.float64), most=8.0, beta=beta)
    assert (w[0], w[-1]) == (1.0, pytest.approx(8.0))
    assert (w.diff() > 0).all()
    density = 1 / w.diff()  # of equally likely uniforms
    scaled = density * w[:-1] ** beta
    torch.testing.assert_close(scaled, scaled[:1].expand_as(scaled), rtol=2e-4, atol=0.0)


def test_intervals_hold_the_middle_and_are_whole_on_equal_rows():
    low, high = guidance.intervals(torch.tensor([0.3, 0.3, 0.0]), torch.tensor([0.6, 0.6, 0.0]), 1)
    torch.testing.assert_close(low, torch.tensor([0.0, 0.15, 0.0]))
    torch.testing.assert_close(high, torch.tensor([1.0, 0.8, 0.5]))
