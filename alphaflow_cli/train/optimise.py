"""From gradients to weights: the non-finite policy, clipping, Adam, the averages. No host synchronisation with Adam.

A gradient with a NaN or an infinity never reaches the weights: fused Adam skips the step on the device (found_inf).
The counters stay on the device too; the trainer reads them when it reads the losses. Where the parameters are cut
over the processes (FSDP2), Adam and the averages work on this process's parts: both act value by value.

`step` takes the rate and the averages' β from the host. `step_by` reads them on the device, so that a CUDA graph of it
can be replayed at any step (train/graphs.py): it waits for nothing, and every tensor that it changes keeps its place.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from alphaflow_cli.core.ema import ema_beta, move_ema, update_ema
from alphaflow_cli.core.gradients import replace_nonfinite
from alphaflow_cli.recipe.plan import learning_rate_at
from alphaflow_cli.recipe.schema import Recipe
from alphaflow_cli.runtime.precision import exact_dtype
from alphaflow_cli.runtime.processes import is_cut
from alphaflow_cli.train.parallel import local, part, whole

COUNTERS = ("steps", "grad_norm", "clipped", "nonfinite", "streak")
MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS: dict[str, Callable[..., torch.optim.Optimizer]] = {  # without decay AdamW is Adam; both decouple it
    "adam": partial(torch.optim.AdamW, fused=True),
    "radam": partial(torch.optim.RAdam, foreach=True, decoupled_weight_decay=True),
}


class Optimiser:
    """Adam, or its like, and the running averages (EMA) of one network's weights.

    A weight that is not trained (a fixed positional table) is kept, averaged and saved like the others. `in_buckets`:
    DDP keeps the gradients, which are views of its buckets.
    """

    def __init__(self, net: nn.Module, recipe: Recipe, *, in_buckets: bool = False) -> None:
        optim = recipe.optim
        self.recipe, self.in_buckets = recipe, in_buckets
        self.rate_at = learning_rate_at(recipe)
        self.parameters = dict(net.named_parameters())
        self.weights = [local(parameter) for parameter in self.parameters.values()]
        self.trained = [w for p, w in zip(self.parameters.values(), self.weights, strict=True) if p.requires_grad]
        self.adam = KINDS[optim.kind](
            self.trained, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay
        )
        self.emas = [[w.detach().clone() for w in self.weights] for _ in recipe.ema.half_lives]
        device = self.weights[0].device
        self.counters = torch.zeros(len(COUNTERS), dtype=exact_dtype(device), device=device)

    def step(self, step: int) -> None:
        """Clip the gradients, step, and update the averages; the gradients must be ready and synchronised."""
        norm, bad = self._norm(self._gradients())
        for group in self.adam.param_groups:
            group["lr"], group["capturable"] = self.rate_at(step), False
        # what GradScaler sets, and what fused Adam reads on the device
        self.adam.grad_scale, self.adam.found_inf = None, bad.float()  # type: ignore[attr-defined]
        if self.recipe.optim.kind == "adam" or not bool(bad):  # RAdam is not fused: the host looks whether it may step
            self.adam.step()
        self.forget_gradients()
        settings = self.recipe.ema
        for ema, half_life in zip(self.emas, settings.half_lives, strict=True):
            beta = ema_beta(step, half_life=half_life, ramp=settings.ramp, every=settings.every)
            if beta < 1.0:
                update_ema(ema, self.weights, beta)
        self._count(norm, bad)

    def numbers_at(self, step: int) -> list[float]:
        """What `step_by` reads of a step: the learning rate, then 1 − β of each average."""
        ema = self.recipe.ema
        betas = [ema_beta(step, half_life=life, ramp=ema.ramp, every=ema.every) for life in ema.half_lives]
        return [self.rate_at(step), *(1.0 - beta for beta in betas)]

    def step_by(self, numbers: Tensor) -> None:
        """As `step`, by `numbers_at` on the device (1 + averages,), float64.

        On a GPU fused Adam reads a rate in float32; elsewhere it is what `step` takes.
        """
        norm, bad = self._norm(self._gradients())
        for group in self.adam.param_groups:
            group["lr"], group["capturable"] = numbers[0].float() if numbers.is_cuda else numbers[0], numbers.is_cuda
        self.adam.grad_scale, self.adam.found_inf = None, bad.float()  # type: ignore[attr-defined]
        self.adam.step()
        self.forget_gradients()
        moves = numbers[1:].to(self.weights[0].dtype).unbind()
        for ema, move in zip(self.emas, moves, strict=True):
            move_ema(ema, self.weights, move)
        self._count(norm, bad)

    def changed(self) -> list[Tensor]:
        """Every tensor that a step changes, as far as they are there: before the first one Adam has no moments."""
        moments = [value for w in self.trained for value in self.adam.state[w].values()]
        return [*self.weights, *(value for ema in self.emas for value in ema), *moments, self.counters]

    def forget_gradients(self) -> None:
        """Let go of every gradient: the next backward pass hands its own over, and has nothing to add them to.

        DDP's buckets stay where they are, and are set to zero.
        """
        if self.in_buckets:
            grads = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
            if grads:
                torch._foreach_zero_(grads)
            return
        for parameter, w in zip(self.parameters.values(), self.weights, strict=True):
            parameter.grad = w.grad = None

    def _gradients(self) -> list[Tensor]:
        """The gradient of every parameter, whole or cut; the parts that Adam steps on get theirs."""
        grads = []
        for (name, parameter), w in zip(self.parameters.items(), self.weights, strict=True):
            if not parameter.requires_grad:
                continue
            assert parameter.grad is not None, name
            if w is not parameter:
                assert local(parameter).data_ptr() == w.data_ptr(), f"{name}: FSDP moved its part"
                w.grad = local(parameter.grad)
            grads.append(parameter.grad)
        return grads

    def _norm(self, grads: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Clip the gradients in place; returns their norm before that, and whether the step must be skipped."""
        norm = _total_norm(grads)
        bad = ~torch.isfinite(norm)
        if self.recipe.optim.nonfinite == "replace":
            replace_nonfinite([local(grad) for grad in grads])
            norm = _total_norm(grads)
        if self.recipe.optim.clip_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(self.trained, self.recipe.optim.clip_norm, norm, foreach=True)
        return norm, bad if self.recipe.optim.nonfinite != "replace" else self._replaced(bad)

    def _replaced(self, bad: Tensor) -> Tensor:
        """Count a gradient whose values were replaced as non-finite, but take its step."""
        self.counters[COUNTERS.index("nonfinite")] += bad
        return torch.zeros_like(bad)

    def _count(self, norm: Tensor, bad: Tensor) -> None:
        clip = self.recipe.optim.clip_norm
        finite = torch.where(bad, 0.0, norm.to(self.counters.dtype))
        clipped = (finite > clip).to(finite.dtype) if clip > 0 else torch.zeros_like(finite)
        streak = (self.counters[-1] + 1) * bad
        self.counters[:-1] += torch.stack([(~bad).to(finite.dtype), finite, clipped, bad.to(finite.dtype)])
        self.counters[-1] = streak

    def tensors(self, *, keep: bool = True) -> dict[str, Tensor]:
        """Everything that a resumed run needs: raw weights, averages, Adam's moments. All processes must call it."""
        tensors: dict[str, Tensor] = {}
        for i, ((name, parameter), w) in enumerate(zip(self.parameters.items(), self.weights, strict=True)):
            tensors[f"raw.{name}"] = whole(parameter, w, keep=keep)
            for j, ema in enumerate(self.emas):
                tensors[f"ema{j}.{name}"] = whole(parameter, ema[i], keep=keep)
            moments = self.adam.state[w]
            if moments:
                tensors[f"adam.step.{name}"] = moments["step"]
            tensors |= {f"adam.{key}.{name}": whole(parameter, moments[key], keep=keep) for key in MOMENTS if moments}
        return tensors | {"counters": self.counters}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Put the tensors of a saved state back; those that are there keep their place, which graphs have noted."""
        for i, ((name, parameter), w) in enumerate(zip(self.parameters.items(), self.weights, strict=True)):
            w.copy_(part(parameter, tensors[f"raw.{name}"]))
            for j, ema in enumerate(self.emas):
                ema[i].copy_(part(parameter, tensors[f"ema{j}.{name}"]))
            saved = {"step": tensors[f"adam.step.{name}"]} if f"adam.step.{name}" in tensors else {}
            saved |= {key: part(parameter, tensors[f"adam.{key}.{name}"]) for key in MOMENTS if saved}
            moments: dict[str, Any] = self.adam.state[w]
            for key, value in moments.items():  # a roll back to before the first step has none: they begin at zero
                value.copy_(saved[key]) if saved else value.zero_()
            if not moments:  # a fused optimiser counts its steps on the device; another reads the count at every step
                counted = w.device if self.adam.defaults.get("fused") else torch.device("cpu")
                homes = {"step": counted, **dict.fromkeys(MOMENTS, w.device)}
                moments |= {key: value.to(homes[key]).clone() for key, value in saved.items()}
        self.counters.copy_(tensors["counters"])

    def average(self, which: int = 0, *, keep: bool = True) -> dict[str, Tensor]:
        """The weights of a running average by name, whole. All processes must call it."""
        parts = zip(self.parameters.items(), self.emas[which], strict=True)
        return {name: whole(parameter, value, keep=keep) for (name, parameter), value in parts}

    def raw(self, *, keep: bool = True) -> dict[str, Tensor]:
        """The raw weights by name, whole. All processes must call it."""
        parts = zip(self.parameters.items(), self.weights, strict=True)
        return {name: whole(parameter, value, keep=keep) for (name, parameter), value in parts}

    @torch.no_grad()
    def start_from(self, weights: dict[str, Tensor]) -> None:
        """Take these weights, and let the averages begin at the weights as they then are."""
        for (name, parameter), w in zip(self.parameters.items(), self.weights, strict=True):
            if name in weights:
                w.copy_(part(parameter, weights[name]))
        for ema in self.emas:
            torch._foreach_copy_(ema, [w.detach() for w in self.weights])


def _total_norm(grads: list[Tensor]) -> Tensor:
    """The norm of the whole gradient, over all processes where it is cut."""
    norm = torch.nn.utils.get_total_norm(grads, foreach=True)
    return norm.full_tensor() if is_cut(norm) else norm
