"""Grids of samples while training: fixed seeds, 1 and 2 network evaluations (of heun 1 and 3) side by side."""

from pathlib import Path

import numpy as np

from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.files import make_folder, write_whole
from alphaflow_cli.model.find import step_name
from alphaflow_cli.runtime.processes import smaller_batch_if_full
from alphaflow_cli.runtime.progress import say
from alphaflow_cli.sample.generator import Generator, pictures
from alphaflow_cli.sample.grid import grid_side_by_side
from alphaflow_cli.sample.walk import plan_walk
from alphaflow_cli.train.run import Run

COLUMNS, ROWS = 10, 4  # of each half


class SampleGrids:
    """Draws samples/step-N.png from the run's first average, with a generator that is made once."""

    def __init__(self) -> None:
        self.generator: Generator | None = None
        self.broken = ""  # why no grid can be drawn, once that is known

    def is_due(self, run: Run) -> bool:
        """Whether a grid is drawn at the run's present step."""
        every, steps = run.recipe.train.sample_every, run.recipe.train.steps
        return bool(every) and (run.step % every == 0 or run.step == steps)

    def path(self, run: Run) -> Path:
        """The file of the grid of the run's present step."""
        return run.folder / "samples" / f"{step_name(run.step)}.png"

    def draw(self, run: Run) -> None:
        """Draw the grid of the present weights, where it can be drawn. All processes call it."""
        checkpoint = run.model()  # all processes: the weights may be cut over them
        if self.broken or not run.world.is_main:
            return
        try:
            with smaller_batch_if_full(1):  # a grid is drawn at once
                self.generator = self.generator or Generator(checkpoint, device=run.world.device)
                self.generator.net.load_state_dict(checkpoint.weights)
                picture = self._grid(self.generator)
        except AlphaflowError as error:  # training goes on without pictures, and says why
            self.generator, self.broken = None, str(error)
            say(f"no sample grids: {error}")
            return
        make_folder(self.path(run).parent)
        write_whole(self.path(run), picture)

    def _grid(self, generator: Generator) -> bytes:
        classes = generator.recipe.data.classes
        seeds = list(range(COLUMNS * ROWS))
        labels = [seed % COLUMNS * max(1, classes // COLUMNS) % classes if classes else 0 for seed in seeds]
        counts = (1, 3) if generator.recipe.sample.sampler == "heun" else (1, 2)  # heun has odd ones only
        halves = [(f"{nfe} NFE", self._half(generator, nfe, seeds, labels)) for nfe in counts]
        names = generator.class_names
        chosen = [names[label] if label < len(names) else "" for label in labels[:COLUMNS]]
        return grid_side_by_side(halves, COLUMNS, chosen)

    def _half(self, generator: Generator, nfe: int, seeds: list[int], labels: list[int]) -> list[np.ndarray]:
        walk = plan_walk(generator.recipe, nfe=nfe)
        return [picture for _, _, picture in pictures(generator, seeds, labels, walk, batch=len(seeds))]
