"""The conflict's arithmetic: inner products per tensor, and their cosine."""

import math

import pytest
import torch

from alphaflow_cli.core import conflict

A = {"weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "bias": torch.tensor([5.0])}
B = {"weight": torch.tensor([[0.5, -1.0], [0.0, 2.0]]), "bias": torch.tensor([-3.0])}


def cosine(a, b):
    return conflict.cosine(*(conflict.products(*pair).values() for pair in ((a, b), (a, a), (b, b))))


def test_products_are_taken_tensor_by_tensor():
    assert conflict.products(A, B) == {"weight": 6.5, "bias": -15.0}


def test_the_cosine_is_that_of_the_joined_vectors():
    flat = [torch.cat([g["weight"].flatten(), g["bias"]]) for g in (A, B)]
    assert cosine(A, B) == pytest.approx(torch.cosine_similarity(*flat, dim=0).item(), rel=1e-6)


def test_the_cosine_ignores_the_length_and_knows_the_sign():
    assert cosine(A, A) == pytest.approx(1.0, rel=1e-12)
    assert cosine(A, {name: -7 * g for name, g in A.items()}) == pytest.approx(-1.0, rel=1e-12)


def test_a_vanished_gradient_has_no_cosine():
    assert math.isnan(cosine(A, {name: 0 * g for name, g in A.items()}))


def test_products_are_summed_in_float64():
    many = {"weight": torch.full((10_000_001,), 0.1)}
    exact = 10_000_001 * float(torch.tensor(0.1)) ** 2
    assert conflict.products(many, many)["weight"] == pytest.approx(exact, rel=1e-12)


def test_on_a_linear_network_the_cosine_is_the_analytic_one():
    """u = w z + b (t − r), one pixel: ∇L_TFM and ∇L_TC are means of monomials in z, v and t − r."""
    z, v, interval = torch.randn(3, 64, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    interval = interval.abs().clamp(max=1)
    t, r = torch.ones(64, dtype=torch.float64), 1 - interval.flatten()
    w, b = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.7, -0.3))
    du = (w * v + b).detach()  # along (v, 0, 1)
    losses = (
        conflict.trajectory_loss(w * z + b * interval, v),
        conflict.consistency_loss(w * z + b * interval, du, t, r),
    )
    grads = [dict(zip("wb", torch.autograd.grad(loss, (w, b)), strict=True)) for loss in losses]
    error = (w * z + b * interval - v).detach()
    first = torch.stack([2 * (error * z).mean(), 2 * (error * interval).mean()])
    second = torch.stack([2 * (interval * du * z).mean(), 2 * (interval.square() * du).mean()])
    expected = torch.cosine_similarity(first, second, dim=0).item()
    assert cosine(*grads) == pytest.approx(expected, rel=1e-12)
