"""A DiT whose last layer gives the data x̂, read as an average velocity.

    u = (z − x̂) / max(t, t_floor)

At r = t that is the velocity of the straight path, v = (z_t − x) / t, for x̂ = x. For r < t it is another way to write
the same u: x̂ is where a step of length t along u would lead. The data lie on far fewer directions than noise does, so
in pixels the last layer has less to say. Below t_floor the factor stays, so that an error of x̂ is never magnified more
than 1 / t_floor times.

The derivative rides along by the rule of a quotient, with f = 1 / max(t, t_floor):

    du/dt = (dz/dt − dx̂/dt) f − u f    where t > t_floor, and without its last term below

Rows, channels, the riding tangent and the rows beside are those of nn/dit.py.
"""

import torch
from torch import Tensor

from alphaflow_cli.core.path import expand
from alphaflow_cli.nn.dit import DiT
from alphaflow_cli.nn.tangent import Dual, last_rows


class CleanDiT(DiT):
    """A DiT whose own output is the data x̂, read as u(z, r, t | y)."""

    t_floor: float  # set by model/build.py, from the recipe

    def read(self, out: Tensor | Dual, z: Tensor, t: Tensor, tangent: Tensor | None) -> Tensor | Dual:
        """The data x̂ that the network sees in z becomes a velocity, in the precision of z."""
        x_hat = out if isinstance(out, Tensor) else out.value
        u = (z - x_hat) * self._factor(t, z)
        if isinstance(out, Tensor):
            return u
        assert tangent is not None
        with torch.no_grad():
            rows = len(tangent)
            t_last = last_rows(t, rows)
            f = self._factor(t_last, z)
            falls = torch.where(expand(t_last, z) > self.t_floor, last_rows(u, rows) * f, 0.0)  # −u d(log f)/dt
            return Dual(u, (tangent - out.tangent) * f - falls)

    def _factor(self, t: Tensor, like: Tensor) -> Tensor:
        """1 / max(t, t_floor), in the form that multiplies rows of `like`."""
        return expand(1.0 / t.clamp(min=self.t_floor), like)
