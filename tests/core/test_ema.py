"""The running average: closed forms of its rate and of its value."""

import pytest
import torch

from alphaflow_cli.core.ema import (
    Decay,
    ema_beta,
    factors,
    momentum_tail,
    power_of_width,
    power_profile,
    update_ema,
    with_momentum,
)


def test_the_first_average_is_the_weights_themselves():
    average, weights = torch.full((3,), 7.0), torch.tensor([1.0, 2.0, 3.0])
    beta = ema_beta(0, half_life=6931.0, ramp=0.05, every=1)
    assert beta == 0.0
    update_ema([average], [weights], beta)
    assert torch.equal(average, weights)


def test_after_a_half_life_half_of_the_distance_is_left():
    average, weights = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    for _ in range(50):
        update_ema([average], [weights], ema_beta(10**9, half_life=50.0, ramp=0.05, every=1))
    assert average.item() == pytest.approx(0.5, rel=1e-12)


def test_the_ramp_shortens_the_half_life_on_the_zero_based_step():
    assert ema_beta(20, half_life=6931.0, ramp=0.05, every=1) == 0.5  # half-life 0.05 · 20 = 1
    assert ema_beta(40, half_life=6931.0, ramp=0.05, every=1) == pytest.approx(0.5**0.5, rel=1e-15)
    assert ema_beta(10**6, half_life=6931.0, ramp=0.05, every=1) == pytest.approx(
        0.9999, rel=1e-8
    )  # the classic 0.9999


def test_the_average_is_the_weighted_sum_of_all_weights():
    history = torch.randn(40, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    average = torch.zeros(5, dtype=torch.float64)
    betas = [ema_beta(step, half_life=3.0, ramp=0.2, every=1) for step in range(40)]
    for weights, beta in zip(history, betas, strict=True):
        update_ema([average], [weights], beta)
    keep = [torch.tensor(betas[i + 1 :], dtype=torch.float64).prod() * (1 - betas[i]) for i in range(40)]
    torch.testing.assert_close(average, (torch.stack(keep)[:, None] * history).sum(0), rtol=1e-12, atol=1e-12)


def test_every_tensor_is_averaged_in_place_and_the_weights_stay():
    averages, weights = [torch.zeros(2), torch.zeros(3, 3)], [torch.ones(2, requires_grad=True), torch.ones(3, 3)]
    kept = averages[1]
    update_ema(averages, weights, 0.75)
    assert averages[1] is kept
    assert all((average == 0.25).all() for average in averages)
    assert all((weight == 1).all() for weight in weights)


STEPS, WAYS = 60, [(3.0, 0.2, 1), (20.0, 0.05, 1), (9.0, 0.0, 4), (1e9, 0.5, 3)]


def averaged(history, half_life, ramp, every, steps):
    """The running average as training makes it; history[0] are the initial weights."""
    average = history[0].clone()
    for step in range(steps):
        update_ema([average], [history[step + 1]], ema_beta(step, half_life=half_life, ramp=ramp, every=every))
    return average


@pytest.fixture
def history():
    return torch.randn(STEPS + 1, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).cumsum(0)


@pytest.mark.parametrize(("half_life", "ramp", "every"), WAYS)
@pytest.mark.parametrize("steps", [1, 7, STEPS])
def test_a_profile_is_what_the_running_average_makes_of_each_step(half_life, ramp, every, steps, history):
    decay = Decay.of(STEPS, half_life=half_life, ramp=ramp, every=every)
    profile = torch.cat([decay.profile(steps, places) for places in (range(-1, 5), range(5, 23), range(23, STEPS))])
    assert profile.shape == (STEPS + 1,)
    assert profile.sum().item() == pytest.approx(1.0, rel=1e-12)
    expected = averaged(history, half_life, ramp, every, steps)
    torch.testing.assert_close(profile @ history, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("half_life", "ramp", "every"), [(20.0, 0.5, 1), (60.0, 0.0, 3)])
def test_what_rounding_leaves_in_kept_averages_is_known_with_what_they_share(half_life, ramp, every):
    moves = torch.randn(301, 4000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    history = (1 + 0.03 * moves.cumsum(0)).float()
    exact, rounded, apart = history[0].double(), history[0].clone(), {}
    for step in range(300):
        beta = ema_beta(step, half_life=half_life, ramp=ramp, every=every)
        update_ema([rounded], [history[step + 1]], beta)
        update_ema([exact], [history[step + 1].double()], beta)
        apart[step + 1] = (rounded.double() - exact) / exact.square().mean().sqrt()
    decay = Decay.of(300, half_life=half_life, ramp=ramp, every=every)
    born = decay.roundings([280, 290, 300])
    for sum_of in ([0.0, 0.0, 1.0], [0.0, -10.0, 10.0], [5.0, -10.0, 5.0]):
        left = sum(factor * apart[at] for factor, at in zip(sum_of, (280, 290, 300), strict=True))
        expected = float((born @ torch.tensor(sum_of, dtype=torch.float64)).norm())
        assert float(left.square().mean().sqrt()) == pytest.approx(expected, rel=0.35), sum_of


def test_rows_with_momentum_have_the_length_of_a_walk_whose_directions_last():
    x, b = torch.randn(50, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), 0.9
    first = with_momentum(x[:17], torch.zeros(1, 1, dtype=torch.float64), b)
    rows = torch.cat([first, with_momentum(x[17:], first[-1:], b)])
    k = torch.arange(50)
    cosines = b ** (k - k[:, None]).abs().double()
    length = torch.cat([rows, momentum_tail(rows[-1:], b)]).square().sum().item()
    assert length == pytest.approx(float(x.T @ cosines @ x), rel=1e-12)
    torch.testing.assert_close(with_momentum(x, x[:1], 0.0), x, rtol=0, atol=0)


def test_a_power_profile_has_the_width_that_it_was_made_for():
    gamma = power_of_width(0.10)
    assert gamma == pytest.approx(6.94, abs=0.01)  # as published for σ = 0.10
    profile = power_profile(gamma, 4000, range(-1, 5000))
    assert profile.sum().item() == pytest.approx(1.0, rel=1e-12)
    assert profile[0] == 0.0
    assert profile[4001:].abs().max() == 0.0
    k = torch.arange(-1, 5000, dtype=torch.float64) / 4000
    mean = (profile * k).sum()
    assert ((profile * (k - mean) ** 2).sum().sqrt()).item() == pytest.approx(0.10, rel=1e-3)


def test_factors_find_a_profile_that_others_make_up_exactly_and_sum_to_one(history):
    kept = [
        Decay.of(STEPS, half_life=h, ramp=0.2, every=1).profile(n, range(-1, STEPS))
        for h in (3.0, 9.0)
        for n in (20, STEPS)
    ]
    wanted = 0.7 * kept[0] - 0.2 * kept[1] + 0.5 * kept[3]
    triangle = torch.linalg.qr(torch.stack([*kept, wanted], 1), mode="r").R
    chosen = factors(triangle, range(4), 4)
    torch.testing.assert_close(chosen, torch.tensor([0.7, -0.2, 0.0, 0.5], dtype=torch.float64), rtol=0, atol=1e-10)
    assert factors(triangle, [1, 2], 4).sum().item() == pytest.approx(1.0, rel=1e-12)
