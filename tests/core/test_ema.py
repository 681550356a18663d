"""The running average: closed forms of its rate and of its value."""

import pytest
import torch

from alphaflow_cli.core.ema import ema_beta, update_ema


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
