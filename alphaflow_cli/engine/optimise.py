"""From gradients to weights: the non-finite policy, clipping, Adam, the averages. No host synchronisation.

A gradient with a NaN or an infinity never reaches the weights: fused Adam skips the step on the device (found_inf).
The counters stay on the device too; the trainer reads them when it reads the losses.
"""

import torch
from torch import Tensor, nn

from alphaflow_cli.core.ema import ema_beta, update_ema
from alphaflow_cli.core.gradients import replace_nonfinite
from alphaflow_cli.engine.plan import learning_rate_at
from alphaflow_cli.recipe.schema import Recipe

COUNTERS = ("steps", "grad_norm", "clipped", "nonfinite", "streak")


class Optimiser:
    """Adam and the running averages of one network."""

    def __init__(self, net: nn.Module, recipe: Recipe) -> None:
        optim = recipe.optim
        self.recipe = recipe
        self.rate_at = learning_rate_at(recipe)
        self.names = [name for name, _ in net.named_parameters()]
        self.weights = [parameter for _, parameter in net.named_parameters()]
        # AdamW without decay is Adam
        self.adam = torch.optim.AdamW(
            self.weights, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay, fused=True
        )
        self.emas = [[w.detach().clone() for w in self.weights] for _ in recipe.ema.half_lives]
        self.counters = torch.zeros(len(COUNTERS), dtype=torch.float64, device=self.weights[0].device)

    def step(self, step: int) -> None:
        """Clip, step, average; gradients are ready and synchronised."""
        grads = [w.grad for w in self.weights if w.grad is not None]
        norm, bad = self._norm(grads)
        for group in self.adam.param_groups:
            group["lr"] = self.rate_at(step)
        # what GradScaler sets, and what fused Adam reads on the device
        self.adam.grad_scale, self.adam.found_inf = None, bad.float()  # type: ignore[attr-defined]
        self.adam.step()
        self.adam.zero_grad(set_to_none=False)
        for ema, half_life in zip(self.emas, self.recipe.ema.half_lives, strict=True):
            update_ema(ema, self.weights, ema_beta(step, half_life=half_life, ramp=self.recipe.ema.ramp))
        self._count(norm, bad)

    def _norm(self, grads: list[Tensor]) -> tuple[Tensor, Tensor]:
        """(norm before clipping, whether it is not finite); clips in place."""
        norm = torch.nn.utils.get_total_norm(grads, foreach=True)
        bad = ~torch.isfinite(norm)
        if self.recipe.optim.nonfinite == "replace":
            replace_nonfinite(grads)
            norm = torch.nn.utils.get_total_norm(grads, foreach=True)
        if self.recipe.optim.clip_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(self.weights, self.recipe.optim.clip_norm, norm, foreach=True)
        return norm, bad if self.recipe.optim.nonfinite != "replace" else self._seen(bad)

    def _seen(self, bad: Tensor) -> Tensor:
        """Replaced gradients are counted, but the step is taken."""
        self.counters[COUNTERS.index("nonfinite")] += bad
        return torch.zeros_like(bad)

    def _count(self, norm: Tensor, bad: Tensor) -> None:
        clip = self.recipe.optim.clip_norm
        finite = torch.where(bad, 0.0, norm.double())
        clipped = (finite > clip).double() if clip > 0 else torch.zeros_like(finite)
        streak = (self.counters[-1] + 1) * bad
        self.counters[:-1] += torch.stack([(~bad).double(), finite, clipped, bad.double()])
        self.counters[-1] = streak

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs: raw weights, averages, Adam's moments."""
        found = {f"raw.{name}": w.detach() for name, w in zip(self.names, self.weights, strict=True)}
        for i, ema in enumerate(self.emas):
            found |= {f"ema{i}.{name}": value for name, value in zip(self.names, ema, strict=True)}
        for name, w in zip(self.names, self.weights, strict=True):
            state = self.adam.state[w]
            found |= {f"adam.{key}.{name}": state[key] for key in ("step", "exp_avg", "exp_avg_sq") if key in state}
        return found | {"counters": self.counters}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Put the tensors of a saved state back."""
        for name, w in zip(self.names, self.weights, strict=True):
            w.copy_(tensors[f"raw.{name}"])
            for i, ema in enumerate(self.emas):
                ema[self.names.index(name)].copy_(tensors[f"ema{i}.{name}"])
            keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"adam.{key}.{name}" in tensors]
            for key in keys:
                value = tensors[f"adam.{key}.{name}"]
                self.adam.state[w][key] = value.to(w.device).clone()
        self.counters.copy_(tensors["counters"])

    def average(self, which: int = 0) -> dict[str, Tensor]:
        """Name → weight of a running average."""
        return dict(zip(self.names, self.emas[which], strict=True))

    @torch.no_grad()
    def restart_averages(self) -> None:
        """The averages begin at the present weights (after --init-from)."""
        for ema in self.emas:
            torch._foreach_copy_(ema, [w.detach() for w in self.weights])
