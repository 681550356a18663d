"""The Fréchet distance against closed forms and scipy, and the moments against numpy."""

import numpy as np
import pytest
import torch

from alphaflow_cli.core.frechet import Moments, frechet_distance
from alphaflow_cli.errors import AlphaflowError

DIM = 40


def gaussian(seed: int, *, samples: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(DIM, DIM, generator=draw, dtype=torch.float64)
    moments = Moments(DIM)
    moments.update(torch.randn(samples, DIM, generator=draw, dtype=torch.float64) @ mix + seed)
    return moments.finalise()


def test_a_shift_costs_its_squared_length() -> None:
    mean, cov = gaussian(0)
    shift = torch.full((DIM,), 0.5, dtype=torch.float64)
    assert frechet_distance(mean, cov, mean + shift, cov) == pytest.approx(DIM * 0.25, rel=1e-11)


def test_diagonal_gaussians_have_the_closed_form_over_eight_orders_of_magnitude() -> None:
    a, b = torch.logspace(-8, 0, DIM, dtype=torch.float64), torch.logspace(0, -8, DIM, dtype=torch.float64)
    zero = torch.zeros(DIM, dtype=torch.float64)
    expected = float((a.sqrt() - b.sqrt()).square().sum())
    assert frechet_distance(zero, a.diag(), zero, b.diag()) == pytest.approx(expected, rel=1e-12)


def test_commuting_covariances_have_the_closed_form_in_any_basis() -> None:
    basis = torch.linalg.qr(torch.randn(DIM, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    a, b = torch.linspace(0.1, 3, DIM, dtype=torch.float64), torch.linspace(2, 5, DIM, dtype=torch.float64)
    zero = torch.zeros(DIM, dtype=torch.float64)
    found = frechet_distance(zero, basis * a @ basis.T, zero, basis * b @ basis.T)
    assert found == pytest.approx(float((a.sqrt() - b.sqrt()).square().sum()), rel=1e-12)


def test_against_a_point_it_is_the_trace() -> None:
    mean, cov = gaussian(2)
    assert frechet_distance(mean, cov, mean, torch.zeros_like(cov)) == pytest.approx(float(cov.trace()), rel=1e-12)


def test_it_is_zero_to_itself_and_symmetric() -> None:
    a, b = gaussian(3), gaussian(4)
    assert frechet_distance(*a, *a) < 1e-11 * float(a[1].trace())
    assert frechet_distance(*a, *b) == pytest.approx(frechet_distance(*b, *a), rel=1e-12)


def test_it_equals_scipys_matrix_square_root_where_that_is_well_conditioned() -> None:
    from scipy.linalg import sqrtm

    (mean_a, cov_a), (mean_b, cov_b) = gaussian(5), gaussian(6)
    root = sqrtm(cov_a.numpy() @ cov_b.numpy()).real
    expected = float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace()) - 2 * np.trace(root)
    assert frechet_distance(mean_a, cov_a, mean_b, cov_b) == pytest.approx(expected, rel=1e-9)


def test_fewer_samples_than_dimensions_agree_with_the_singular_values_of_the_data() -> None:
    draw = torch.Generator().manual_seed(7)
    a, b = (torch.randn(12, DIM, generator=draw, dtype=torch.float64) for _ in range(2))
    moments_a, moments_b = Moments(DIM), Moments(DIM)
    moments_a.update(a)
    moments_b.update(b)
    centred_a, centred_b = (each - each.mean(0) for each in (a, b))
    overlap = torch.linalg.svdvals(centred_a @ centred_b.T).sum() / 11  # of the factors, no square root taken
    expected = (a.mean(0) - b.mean(0)).square().sum() + (centred_a.square().sum() + centred_b.square().sum()) / 11
    found = frechet_distance(*moments_a.finalise(), *moments_b.finalise())
    assert found == pytest.approx(float(expected - 2 * overlap), rel=1e-10)


def test_a_collapsed_set_is_measured_and_not_refused() -> None:
    moments = Moments(DIM)
    moments.update(torch.full((300, DIM), 0.7))
    mean, cov = gaussian(8)
    found = frechet_distance(*moments.finalise(), mean, cov)
    assert found == pytest.approx(float((mean - 0.7).square().sum() + cov.trace()), rel=1e-6)


def test_broken_moments_are_refused_by_what_is_wrong() -> None:
    mean, cov = gaussian(9)
    with pytest.raises(AlphaflowError, match="not finite"):
        frechet_distance(mean, cov, mean * torch.nan, cov)
    with pytest.raises(AlphaflowError, match="do not fit"):
        frechet_distance(mean[:-1], cov, mean, cov)
    with pytest.raises(AlphaflowError, match="not symmetric"):
        frechet_distance(mean, cov, mean, cov + torch.triu(torch.ones_like(cov), 1))
    with pytest.raises(AlphaflowError, match="not a covariance"):
        frechet_distance(mean, cov, mean, cov - 2 * cov.trace() * torch.eye(DIM, dtype=torch.float64))


def test_a_slightly_negative_eigenvalue_warns_and_counts_as_zero() -> None:
    zero, cov = torch.zeros(3, dtype=torch.float64), torch.diag(torch.tensor([1.0, 1.0, -1e-5], dtype=torch.float64))
    with pytest.warns(UserWarning, match="taken as 0"):
        found = frechet_distance(zero, cov, zero, torch.zeros_like(cov))
    assert found == pytest.approx(2.0)


def test_the_least_faults_that_are_refused_are_those_that_no_rounding_makes() -> None:
    zero, cov = torch.zeros(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    negative, lopsided = cov.clone(), cov.clone()
    negative[2, 2], lopsided[0, 1] = -2e-3, 2e-6
    with pytest.raises(AlphaflowError, match="not a covariance"):
        frechet_distance(zero, negative, zero, cov)
    with pytest.raises(AlphaflowError, match="not symmetric"):
        frechet_distance(zero, lopsided, zero, cov)
    lopsided[0, 1] = 5e-7
    assert frechet_distance(zero, lopsided, zero, cov) == pytest.approx(0.0, abs=1e-12)


def test_equal_sets_are_never_less_than_nothing_apart() -> None:
    moments = [gaussian(seed) for seed in range(20)]
    assert min(frechet_distance(*each, *each) for each in moments) == 0.0, "some would be −1e-13"


def test_moments_equal_numpys_mean_and_covariance() -> None:
    features = torch.randn(500, DIM, generator=torch.Generator().manual_seed(10)) + 3
    moments = Moments(DIM)
    moments.update(features)
    mean, cov = moments.finalise()
    np.testing.assert_allclose(mean, features.double().mean(0), rtol=1e-13)
    np.testing.assert_allclose(cov, np.cov(features.double().numpy(), rowvar=False), rtol=1e-11, atol=1e-13)


def test_moments_do_not_depend_on_how_the_features_were_cut() -> None:
    features = torch.randn(500, DIM, generator=torch.Generator().manual_seed(11)) * 5 + 2
    whole, merged = Moments(DIM), Moments(DIM)
    whole.update(features)
    for part in torch.split(features, 73):
        other = Moments(DIM)
        other.update(part)
        merged.sums += other.sums
    assert merged.count == whole.count == 500
    for one, many in zip(whole.finalise(), merged.finalise(), strict=True):
        torch.testing.assert_close(one, many, rtol=1e-12, atol=1e-12)


def test_moments_refuse_what_cannot_be_counted() -> None:
    moments = Moments(DIM)
    with pytest.raises(AlphaflowError, match="at least 2"):
        moments.finalise()
    with pytest.raises(AlphaflowError, match="not finite"):
        moments.update(torch.full((2, DIM), torch.inf))
    with pytest.raises(AlphaflowError, match="but should have"):
        moments.update(torch.zeros(2, DIM + 1))
