"""KID, Inception Score and precision/recall against torch-fidelity's own functions and against closed forms."""

import numpy as np
import pytest
import torch
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from alphaflow_cli.core.scores import inception_score, kernel_distance, kid, precision_recall


def features(count: int, seed: int, *, dim: int = 32, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)) + shift


def test_kid_equals_torch_fidelitys_on_the_same_subsets() -> None:
    fake, real = features(300, 0, shift=0.3), features(400, 1)
    theirs = kid_features_to_metric(fake, real, kid_subsets=10, kid_subset_size=100, verbose=False)
    rng = np.random.RandomState(2020)
    subsets = [
        (torch.from_numpy(rng.choice(300, 100, False)), torch.from_numpy(rng.choice(400, 100, False)))
        for _ in range(10)
    ]
    value, spread = kid(fake, real, subsets)
    assert value == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-5)  # theirs is in float32
    assert spread == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-5)


def test_the_kernel_distance_is_unbiased() -> None:
    values = [float(kernel_distance(features(40, 2 * i), features(40, 2 * i + 1))) for i in range(300)]
    mean, error = np.mean(values), np.std(values) / np.sqrt(len(values))
    assert abs(mean) < 3 * error  # both from one distribution: zero on average
    assert min(values) < 0 < max(values)


def test_the_inception_score_equals_torch_fidelitys() -> None:
    logits = features(1003, 3, dim=20) * 3
    theirs = isc_features_to_metric(logits, splits=10, shuffle=False)
    value, spread = inception_score(logits, 10)
    assert value == pytest.approx(theirs["inception_score_mean"], rel=1e-14)
    assert spread == pytest.approx(theirs["inception_score_std"], rel=1e-12)


def test_the_inception_score_of_sure_and_even_guesses_is_the_number_of_classes() -> None:
    logits = torch.eye(7).repeat(20, 1) * 200
    assert inception_score(logits, 2)[0] == pytest.approx(7.0)
    assert inception_score(torch.zeros(50, 7), 2)[0] == pytest.approx(1.0)


@pytest.mark.parametrize("block", [10_000, 17])
def test_precision_and_recall_equal_torch_fidelitys_in_any_blocks(block: int) -> None:
    fake, real = features(150, 4, dim=6, shift=0.5), features(120, 5, dim=6)
    theirs = prc_features_to_metric(fake, real, verbose=False)
    found = precision_recall(fake, real, 3, block=block)
    assert found.precision == pytest.approx(theirs["precision"], abs=1e-7)
    assert found.recall == pytest.approx(theirs["recall"], abs=1e-7)
    assert 0.05 < found.precision < 0.95
    assert 0.05 < found.recall < 0.95
    assert found.precision != found.recall


def test_density_counts_balls_and_coverage_counts_hits() -> None:
    real = torch.tensor([[0.0], [1.0], [2.0], [10.0], [11.0], [12.0]])
    fake = torch.tensor([[0.9], [1.1], [50.0], [0.5]])
    found = precision_recall(fake, real, 2, block=2)  # radii 2, 1, 2, 2, 1, 2
    # 0.9, 1.1 and 0.5 lie in the balls of 0, 1 and 2; 50 lies in none
    assert found.density == pytest.approx(9 / (2 * 4))
    assert found.coverage == pytest.approx(3 / 6)
    assert found.precision == pytest.approx(3 / 4)


def test_a_ball_ends_with_the_neighbour_that_it_reaches_to() -> None:
    real = torch.tensor([[0.0], [1.0], [4.0]])  # radii 1, 1, 3
    found = precision_recall(torch.tensor([[7.0], [-1.0], [7.5]]), real, 1, block=2)
    assert found.precision == pytest.approx(2 / 3), "7 and −1 lie on the edge of a ball, 7.5 beyond it"


def test_sets_far_apart_have_no_precision_and_no_recall() -> None:
    found = precision_recall(features(60, 6, shift=100), features(50, 7), 3, block=20)
    assert (found.precision, found.recall, found.density, found.coverage) == (0, 0, 0, 0)


def test_balls_are_closed_so_pictures_on_the_edge_of_one_count() -> None:
    """Of a set that is its own reference, each ball holds its middle and its k neighbours, the farthest on the edge."""
    real = features(600, 8, dim=2048).abs()
    found = precision_recall(real.clone(), real, 3, block=600)
    assert (found.precision, found.recall, found.coverage) == (1, 1, 1)
    assert found.density == pytest.approx(4 / 3, rel=1e-12)
