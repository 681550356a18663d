"""The limits of the objective on a real network in float64: α → 0 is MeanFlow, α = ½ is twice the Shortcut Model."""

from functools import cache
from itertools import pairwise

import pytest
import torch
from exact_fields import batch, gaussian
from golden_data import labels, network, tensor
from torch import Tensor

from alphaflow_cli.core import conflict, objective, path

C = 1e-3


@cache
def setting():
    """The golden network M, and the r < t rows of the golden batch: z_t, v, t, r, y."""
    x, noise, t, r = (tensor("loss_inputs.npz", name)[3:] for name in ("x", "noise", "t", "r"))
    y = labels(tensor("loss_inputs.npz", "label"), "M")[3:]
    return network("M"), path.interpolate(x, noise, t), path.velocity(x, noise), t, r, y


def flat_gradient(loss: Tensor) -> Tensor:
    parameters = list(setting()[0].parameters())
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, materialize_grads=True)])


def derivative() -> Tensor:
    net, z_t, v, t, r, y = setting()
    return objective.jvp_derivative(lambda z, t, r, y: net(z, t, r, y, "math"), z_t, v, t=t, r=r, y=y)


def gradient(alpha: float, weight: str) -> Tensor:
    """∇ of the mean weighted loss; `none` weighs by 1/α."""
    net, z_t, v, t, r, y = setting()
    if alpha == 0.0:
        target = objective.mean_target(v, derivative(), t, r)
    else:
        target = objective.between_target(net, z_t, v, v, t=t, r=r, y=y, alpha=alpha)
    error = objective.squared_error(net(z_t, t, r, y), target, "mean")
    return flat_gradient(
        (objective.loss_weight(error, 0, alpha=alpha, kind=weight, c=C, power=1.0, later=1.0) * error).mean()
    )


def relative_errors(weight: str, alphas: tuple[float, ...]) -> list[float]:
    limit = gradient(0.0, weight)
    return [((gradient(alpha, weight) - limit).norm() / limit.norm()).item() for alpha in alphas]


def test_the_gradient_over_alpha_tends_to_meanflows_with_an_error_of_order_alpha():
    alphas = (0.04, 0.02, 0.01, 0.005)
    errors = relative_errors("none", alphas)
    for coarse, fine in pairwise(errors):
        assert 1.95 < coarse / fine < 2.05  # halving α halves the error: slope 1
    assert errors[-1] / alphas[-1] == pytest.approx(1.3, abs=0.2)  # error ≈ 1.3 α on this network


def test_the_converging_weight_has_meanflows_weighted_gradient_as_its_limit():
    errors = relative_errors("converging", (0.04, 0.02, 0.01, 0.005))
    for coarse, fine in pairwise(errors):
        assert 1.9 < coarse / fine < 2.1
    assert errors[-1] < 0.005


def test_the_published_weight_fades_as_alpha_falls_and_jumps_back_at_zero():
    size = gradient(0.0, "adaptive").norm()
    ratios = [(gradient(alpha, "adaptive").norm() / size).item() for alpha in (0.1, 0.02, 0.01, 0.005, 0.001)]
    assert ratios[:4] == pytest.approx([1.00, 0.66, 0.34, 0.12], abs=0.04)  # this network: 1.01, .64, .31, .11
    assert ratios[4] < 0.01


@pytest.mark.parametrize("alpha", [0.1, 0.02, 0.01, 0.005, 0.0])
def test_the_converging_weight_keeps_the_gradients_size(alpha):
    sizes = [gradient(a, "converging").norm() for a in (alpha, 0.0)]
    assert (sizes[0] / sizes[1]).item() == pytest.approx(1.0, abs=0.05)


def test_both_weights_agree_at_alpha_one_and_alpha_zero():
    error = torch.tensor([0.1, 3.0])
    for alpha in (1.0, 0.0):
        pair = [
            objective.loss_weight(error, 0, alpha=alpha, kind=kind, c=C, power=1.0, later=1.0)
            for kind in ("adaptive", "converging")
        ]
        assert torch.equal(*pair)


def shortcut_model_loss(net, z_t, t, r, y) -> Tensor:
    """The Shortcut Model's own loss, written from its definition: one long step against two half steps, (B,)."""
    half = (t - r) / 2
    with torch.no_grad():
        first = net(z_t, t, t - half, y)
        z_middle = z_t - half[:, None, None, None] * first
        second = net(z_middle, t - half, r, y)
    return (net(z_t, t, r, y) - (first + second) / 2).square().mean(dim=(1, 2, 3))


def test_shortcut_at_one_half_is_twice_the_shortcut_models_loss():
    net, z_t, v, t, r, y = setting()
    target = objective.shortcut_target(net, z_t, v, t=t, r=r, y=y, alpha=0.5)
    error = objective.squared_error(net(z_t, t, r, y), target, "mean")
    ours = objective.loss_weight(error, 0, alpha=0.5, kind="none", c=C, power=1.0, later=1.0) * error
    theirs = shortcut_model_loss(net, z_t, t, r, y)
    torch.testing.assert_close(ours, 2 * theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(flat_gradient(ours.mean()), 2 * flat_gradient(theirs.mean()), rtol=1e-10, atol=1e-12)


def test_meanflow_decomposes_into_trajectory_plus_consistency_plus_a_constant():
    net, z_t, v, t, r, y = setting()
    du, interval = derivative(), path.expand(t - r, z_t)
    u = net(z_t, t, r, y)
    target = objective.mean_target(v, du, t, r)
    terms = objective.loss_terms(u, target, v)
    constant = (interval.square() * du.square() - 2 * interval * v * du).flatten(1).mean(1)
    torch.testing.assert_close(terms.error, terms.trajectory + terms.consistency + constant, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(conflict.trajectory_loss(u, v), terms.trajectory.mean(), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(conflict.consistency_loss(u, du, t, r), terms.consistency.mean(), rtol=1e-12, atol=0)


def test_the_gradients_of_the_two_halves_add_up_to_meanflows():
    net, z_t, v, t, r, y = setting()
    du = derivative()
    trajectory = flat_gradient(conflict.trajectory_loss(net(z_t, t, r, y), v))
    consistency = flat_gradient(conflict.consistency_loss(net(z_t, t, r, y), du, t, r))
    torch.testing.assert_close(trajectory + consistency, gradient(0.0, "none"), rtol=1e-10, atol=1e-12)


def test_the_consistency_loss_differentiates_the_prediction_and_not_its_derivative():
    z, t, r, y = batch()
    u = torch.ones_like(z, requires_grad=True)
    du = gaussian()(z, t, r, y).requires_grad_()
    conflict.consistency_loss(u, du, t, r).backward()
    torch.testing.assert_close(u.grad, 2 * path.expand(t - r, z) * du.detach() / z.numel(), rtol=1e-13, atol=0)
    assert du.grad is None
