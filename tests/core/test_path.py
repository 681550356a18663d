"""The path: its ends, its derivative, and the way back along a velocity."""

import torch
from exact_fields import batch

from alphaflow_cli.core import path


def points():
    z, t, r, _ = batch()
    return z, torch.randn(z.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3)), t, r


def test_time_zero_is_data_and_time_one_is_noise():
    x, noise, t, _ = points()
    assert torch.equal(path.interpolate(x, noise, torch.zeros_like(t)), x)
    assert torch.equal(path.interpolate(x, noise, torch.ones_like(t)), noise)


def test_the_velocity_is_the_time_derivative_of_the_path():
    x, noise, t, _ = points()
    _, derivative = torch.func.jvp(lambda s: path.interpolate(x, noise, s), (t,), (torch.ones_like(t),))
    torch.testing.assert_close(path.velocity(x, noise), derivative, rtol=1e-14, atol=1e-14)


def test_stepping_back_along_the_velocity_stays_on_the_path():
    x, noise, t, r = points()
    z_s = path.step_back(path.interpolate(x, noise, t), path.velocity(x, noise), t, r)
    torch.testing.assert_close(z_s, path.interpolate(x, noise, r), rtol=1e-13, atol=1e-13)


def test_each_row_has_its_own_time():
    x, noise, t, _ = points()
    z_t = path.interpolate(x, noise, t)
    for i in range(len(t)):
        assert torch.equal(z_t[i], (1 - t[i]) * x[i] + t[i] * noise[i])
