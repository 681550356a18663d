"""A run in memory: everything the loop needs, made from a recipe, and put back from a saved state."""

import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from alphaflow_cli.core.draws import mix_seed
from alphaflow_cli.data.batches import LatentStream
from alphaflow_cli.data.store import class_names
from alphaflow_cli.engine import state
from alphaflow_cli.engine.build import build_network
from alphaflow_cli.engine.checkpoint import Checkpoint
from alphaflow_cli.engine.compile import compile_blocks
from alphaflow_cli.engine.journal import Sums
from alphaflow_cli.engine.optimise import Optimiser
from alphaflow_cli.engine.plan import alpha_at, equal_share_at
from alphaflow_cli.engine.progress import say
from alphaflow_cli.engine.split import Split
from alphaflow_cli.engine.step import Objective
from alphaflow_cli.engine.world import World
from alphaflow_cli.recipe.schema import Recipe

DTYPES = {"fp32": torch.float32, "bf16": torch.float32, "fp64": torch.float64}  # of weights, targets and losses


@dataclass
class Run:
    """What the steps change, and what they read."""

    recipe: Recipe
    folder: Path
    world: World
    stream: LatentStream
    split: Split
    net: nn.Module  # bare: targets see it
    wrapped: nn.Module  # the loss sees it
    optimiser: Optimiser
    sums: Sums
    how: Objective
    step: int = 0  # steps done
    retries: int = 0  # rolls back so far; each gives the steps after it other draws

    def __post_init__(self) -> None:
        self.alpha_at, self.equal_share_at = alpha_at(self.recipe), equal_share_at(self.recipe)
        self.dtype = DTYPES[self.recipe.train.precision]

    @property
    def seed(self) -> int:
        """Of the draws: the recipe's, until a roll back asks for others."""
        seed = self.recipe.train.seed
        return mix_seed(seed, self.retries) if self.retries else seed

    def facts(self) -> dict[str, Any]:
        """What a state says beside its tensors."""
        return {"retries": self.retries, "accumulation": self.split.accumulation, "processes": self.world.size}

    def models(self) -> dict[str, Checkpoint]:
        """The files of a checkpoint: the first average, the others, the raw weights."""
        lives = self.recipe.ema.half_lives
        names = ["model.safetensors", *(f"ema-{life:g}.safetensors" for life in lives[1:])]
        found = {
            name: self._checkpoint(self.optimiser.average(i), weights="ema", half_life=lives[i])
            for i, name in enumerate(names)
        }
        raw = dict(zip(self.optimiser.names, self.optimiser.weights, strict=True))
        return found | {"raw.safetensors": self._checkpoint(raw, weights="raw", half_life=0.0)}

    def _checkpoint(self, values: dict[str, torch.Tensor], *, weights: str, half_life: float) -> Checkpoint:
        store = self.stream.store
        origin = {
            "step": self.step,
            "images_seen": self.step * self.recipe.train.batch,
            "weights": weights,
            "half_life": half_life,
            "autoencoder": asdict(store.plan.autoencoder),
            "class_names": class_names(store.path),
            "versions": {name: version(name) for name in ("alphaflow", "torch")} | {"python": platform.python_version()},
        }
        ready = {name: value.detach().float() for name, value in values.items()}
        return Checkpoint(ready, self.recipe, self.stream.mean, self.stream.std, origin)

    def save(self) -> None:
        """Checkpoint first, then the state that counts on it, then older ones go. Rank 0 writes, all wait."""
        sums = self.world.gather(self.sums.values)
        if self.world.is_main:
            state.save_models(self.folder, self.step, self.models())
            tensors = self.optimiser.tensors() | {"sums": sums}
            state.save_state(self.folder, self.step, tensors, self.facts())
            train = self.recipe.train
            state.prune(self.folder, keep=train.keep, milestone_every=train.milestone_every)
        self.world.wait()

    def restore(self, path: Path) -> None:
        """Go on from a saved state."""
        facts, tensors = state.read_facts(path), state.read_tensors(path)
        self.optimiser.load(tensors)
        sums = tensors["sums"].to(self.world.device)  # (processes, n)
        mine = sums[self.world.rank] if len(sums) == self.world.size else sums.sum(0) * self.world.is_main
        self.sums.values.copy_(mine)
        self.step, self.retries = facts["step"], max(facts["retries"], self.retries)


def build_run(recipe: Recipe, folder: Path, *, world: World, stream: LatentStream, split: Split) -> Run:
    """A run at step 0."""
    net = build_network(recipe).to(world.device, DTYPES[recipe.train.precision])
    if recipe.train.compile:
        compile_blocks(net)
    wrapped = world.wrap(net)
    return Run(
        recipe=recipe,
        folder=folder,
        world=world,
        stream=stream,
        split=split,
        net=net,
        wrapped=wrapped,
        optimiser=Optimiser(net, recipe),
        sums=Sums(world.device),
        how=Objective.of(recipe),
    )
