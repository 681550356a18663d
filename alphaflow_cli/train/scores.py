"""Scores while training: every `eval.every` steps the checkpoint just saved is measured as `alphaflow eval` does.

The run saves first, and then measures the file, all its processes together. So nothing that is trained is touched. A
run that was killed inside a measurement finds the checkpoint and the finished chunks again when it resumes. It writes:

    metrics.jsonl            a row of its own: step, images_seen, scores {FD-tiny-2k: {nfe1: …, nfe2: …}}, evals
    evals/<id>/results.json  the same numbers with their protocols
    best-nfeN.safetensors    the checkpoint with the best score so far, for each N of eval.quick_nfe

A measurement that fails (a full disk or GPU, an autoencoder that cannot be had) costs its row and a line. The run
goes on.
"""

import gc
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from alphaflow_cli.core.frechet import Moments
from alphaflow_cli.documents import Maybe, Number, Table, Text, Whole, check_shape
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.evaluate.evaluate import Ruler, build_extractors, evaluate, find_reference
from alphaflow_cli.evaluate.measure import Clock, Pass, add_up, own_moments, run_pass
from alphaflow_cli.evaluate.pictures import GeneratedImages, ImageSource
from alphaflow_cli.evaluate.reference import Reference, check_crop
from alphaflow_cli.evaluate.results import NETWORK, Evaluation, read_results, save_results, value_text
from alphaflow_cli.evaluate.score import check_reference
from alphaflow_cli.files import is_there, user_path
from alphaflow_cli.model.checkpoint import Checkpoint
from alphaflow_cli.model.find import best_name, step_name
from alphaflow_cli.nn.weights import FILES, missing_weights
from alphaflow_cli.recipe.schema import Metric, Recipe
from alphaflow_cli.runtime.launch import StopFlag
from alphaflow_cli.runtime.lock import hold
from alphaflow_cli.runtime.precision import as_torch_begins
from alphaflow_cli.runtime.processes import World, all_or_none, smaller_batch_if_full
from alphaflow_cli.runtime.progress import say
from alphaflow_cli.sample.generator import Generator, decoder_pays, open_generator
from alphaflow_cli.sample.walk import plan_walk
from alphaflow_cli.text import counted
from alphaflow_cli.train import state
from alphaflow_cli.train.journal import Journal, Trackers, read_rows
from alphaflow_cli.train.run import Run

BATCH = 64  # pictures that a feature network sees at once, as in `eval`
RISING = {"is"}  # metrics of which more is better
SCORE = Maybe(Number(-1e12, 1e12))
SCORE_ROW = Table(
    {"step": Whole(0, 10**12), "images_seen": Whole(0), "scores": Table(others=Table(others=SCORE))},
    {"evals": Table(others=Text(100, form="[0-9a-f]+"))},
)
OwnShare = TypeVar("OwnShare")


def check_quick(recipe: Recipe) -> None:
    """Refuse scores that cannot be measured here, before anything is made for the run."""
    wanted = recipe.eval
    if not wanted.every:
        return
    for network in sorted({NETWORK[metric] for metric in wanted.quick_metrics} & FILES.keys()):
        lacking = missing_weights(FILES[network])
        if lacking:
            raise AlphaflowError(f"eval.quick_metrics: {lacking}")
    if wanted.reference and ":" not in wanted.reference and not is_there(user_path(wanted.reference)):
        raise AlphaflowError(
            f"eval.reference: {wanted.reference}: no such file or source of pictures. Make a file: alphaflow reference "
            "SOURCE -o FILE, or train without scores: --set eval.every=0"
        )


def together(world: World, work: Callable[[], OwnShare]) -> OwnShare:
    """Do every process's own work; where one failed, or had no memory, all raise an error that the run survives."""
    others = AlphaflowError("another process could not do its share; its line says why")

    def attempt() -> OwnShare:
        with smaller_batch_if_full(1):
            return work()

    return all_or_none(world, attempt, others=others)


class Interruptible(GeneratedImages):
    """Generated pictures that are drawn until a signal asks to stop."""

    stop: StopFlag

    def images(self, start: int, stop: int) -> Tensor:
        """The next pictures, or an error that says who interrupted."""
        if self.stop.is_set:
            raise AlphaflowError("interrupted by a signal")
        return super().images(start, stop)


@dataclass(frozen=True)
class SharedRuler(Ruler):
    """A ruler of several processes that give up together, so that the run can go on without the number."""

    def measure(self, source: ImageSource, clock: Clock, task: str) -> tuple[Pass, dict[str, Moments]]:
        """Pass over the pictures as any ruler does; if one process fails, all raise."""
        assert isinstance(self.processes, World)
        work = self.start(source)
        with ExitStack() as held:

            def fill() -> dict[str, Moments]:
                if self.processes.rank == 0:
                    held.enter_context(hold(work.folder, "the scores of a training run"))
                run_pass(work, self.processes, batch=self.batch, clock=clock, task=task)
                return own_moments(work, self.processes)

            moments = together(self.processes, fill)
            add_up(moments, self.processes, source.count)
            return work, moments


class Scores:
    """Measures a run's checkpoints where that is due, records the scores and keeps the best."""

    def __init__(self, run: Run) -> None:
        self.run, self.wanted = run, run.recipe.eval
        side = run.recipe.data.image_size
        self.size, self.crop = (side, side), run.stream.store.plan.crop  # of the pictures that it learns from

    def is_due(self, step: int) -> bool:
        """Whether scores belong to this step: at every so many steps, and at the last."""
        every = self.wanted.every
        return every > 0 and (step % every == 0 or step == self.run.recipe.train.steps)

    def prepare(self) -> None:
        """Measure the reference, and refuse what could not be measured later. All processes call it."""
        if self.wanted.every and not (self.run.step == self.run.recipe.train.steps and self.is_written()):
            for nfe in self.wanted.quick_nfe:
                plan_walk(self.run.recipe, nfe=nfe)
            ruler = together(self.run.world, self._ruler)
            reference = self._reference(ruler)
            check_reference(self.wanted.quick_metrics, reference, ruler.extractors, self.size)
            check_crop(reference, self.crop, self.size)

    def is_written(self) -> bool:
        """Whether the journal has the scores of the run's present step; the first process looks for all."""
        world = self.run.world
        there = world.is_main and any(row["step"] == self.run.step for row in self._rows())
        return world.agree(there)

    def catch_up(self, stop: StopFlag, journal: Journal, trackers: Trackers) -> bool:
        """Measure where a kill came between the save and its scores; False where a signal cut it short."""
        due = self.run.step > 0 and self.is_due(self.run.step)
        return not due or self.is_written() or self.measure(stop, journal, trackers)

    def measure(self, stop: StopFlag, journal: Journal, trackers: Trackers) -> bool:
        """Measure the checkpoint of the present step; False where a signal cut it short. All processes call it."""
        run, world, began = self.run, self.run.world, time.monotonic()
        fault: AlphaflowError | None = None
        try:
            if not world.agree(stop.is_set):
                with as_torch_begins():  # so that the numbers are those of `alphaflow eval`
                    evaluations = self._evaluate(stop)
                together(world, lambda: self._record(evaluations, journal, trackers))
        except AlphaflowError as error:
            fault = error
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the training needs the room
        journal.leave_out(time.monotonic() - began)
        if world.agree(stop.is_set):
            return self.is_written()
        if fault is not None:
            say(f"no scores at step {run.step:,}, and the training goes on: {fault}")
        return True

    def _evaluate(self, stop: StopFlag) -> list[Evaluation]:
        """The evaluations of the saved checkpoint, one for each NFE; empty on all processes but the first."""
        run, wanted = self.run, self.wanted
        path = run.folder / "checkpoints" / step_name(run.step) / "model.safetensors"
        generator, ruler = together(run.world, lambda: (self._generator(path), self._ruler()))
        reference, evaluations = together(run.world, lambda: self._reference(ruler)), []
        for nfe in wanted.quick_nfe:
            walk = plan_walk(run.recipe, nfe=nfe)
            source = Interruptible(generator, walk, count=wanted.quick_images, draw=wanted.draw)
            source.stop = stop
            measured = partial(evaluate, source, wanted.quick_metrics, ruler, reference=reference)
            evaluation = together(run.world, measured)
            evaluations += [evaluation] if evaluation else []
        return evaluations

    def _generator(self, path: Path) -> Generator:
        generator = open_generator(str(path), device=self.run.world.device)
        images = self.wanted.quick_images
        generator.expect(images, compiled=decoder_pays(generator.recipe, images), autoencoder="")
        return generator

    def _ruler(self) -> SharedRuler:
        extractors, lacking = build_extractors(self.wanted.quick_metrics, self.run.world.device, {})
        if lacking:
            raise next(iter(lacking.values()))
        return SharedRuler(extractors, self.run.world, self.run.folder / "evals", BATCH)

    def _reference(self, ruler: Ruler) -> Reference | None:
        text = self.wanted.reference
        return find_reference(text, self.size, ruler, self.crop) if text else None

    def _record(self, evaluations: list[Evaluation], journal: Journal, trackers: Trackers) -> None:
        """Write the numbers: their protocols, the best checkpoints, the row. A kill in between loses none of them."""
        run, folder = self.run, self.run.folder / "evals"
        if not run.world.is_main:
            return
        scores: dict[str, dict[str, float]] = {}
        for evaluation in evaluations:
            save_results(folder / evaluation.id / "results.json", folder / "history.jsonl", [evaluation])
            for row in evaluation.rows:
                scores.setdefault(row.name, {})[f"nfe{row.pictures['nfe']}"] = row.value
        better = self._keep_best(evaluations)
        values: dict[str, Any] = {"step": run.step, "images_seen": run.step * run.recipe.train.batch, "scores": scores}
        values["evals"] = {f"nfe{each.rows[0].pictures['nfe']}": each.id for each in evaluations}
        journal.note(values)
        trackers.log(values)
        say(f"step {run.step:,}: {_summary(evaluations)}{better}")
        for features in (file for each in evaluations for file in (folder / each.id).glob("features-*")):
            features.unlink()  # of every checkpoint they would fill the disk

    def _keep_best(self, evaluations: list[Evaluation]) -> str:
        """Put the checkpoint at the top of the run where its score is the best so far; says for which NFE.

        Scores against another reference, which the run had before, do not count.
        """
        run, metric = self.run, chosen_metric(self.run.recipe)
        earlier, best = [row for row in self._rows() if row["step"] < run.step], []
        for evaluation in evaluations:
            row = next(each for each in evaluation.rows if each.metric == metric)
            nfe = row.pictures["nfe"]
            values = [(each, each["scores"].get(row.name, {}).get(f"nfe{nfe}")) for each in earlier]
            rivals = [each for each, value in values if value is not None and not is_better(metric, row.value, value)]
            reference = str((row.reference or {}).get("sha256", ""))
            if all(reference_of(run.folder, each, nfe) not in ("", reference) for each in rivals):
                model = run.folder / "checkpoints" / step_name(run.step) / "model.safetensors"
                state.publish(run.folder, model, best_name(nfe))
                best.append(str(nfe))
        return f"; the best so far at {' and '.join(best)} NFE" if best else ""

    def _rows(self) -> list[dict[str, Any]]:
        return score_rows(self.run.folder)


def chosen_metric(recipe: Recipe) -> Metric:
    """The metric that chooses the best checkpoint."""
    return recipe.eval.best_by or recipe.eval.quick_metrics[0]


def is_better(metric: Metric, value: float, other: float) -> bool:
    """Whether a score is better than another: of distances less is, of the Inception Score more."""
    return value > other if metric in RISING else value < other


def why_best(run: Path, nfe: int, checkpoint: Checkpoint) -> str:
    """By which score a run's best checkpoint was chosen, of how many; empty where the run does not record it."""
    step, metric = checkpoint.origin.get("step"), chosen_metric(checkpoint.recipe)
    rows = score_rows(run)
    here = next((row for row in rows if row["step"] == step), None)
    path = run / "evals" / str((here or {}).get("evals", {}).get(f"nfe{nfe}")) / "results.json"
    if here is None or not path.is_file():
        return ""
    measured = [row for each in read_results(path)["evaluations"] for row in each["rows"]]
    name = next((row["name"] for row in measured if row["metric"] == metric), "")
    alike = [row for row in rows if reference_of(run, row, nfe) in ("", reference_of(run, here, nfe))]
    values = {row["step"]: row["scores"].get(name, {}).get(f"nfe{nfe}") for row in alike}
    values = {at: value for at, value in values.items() if value is not None}
    if step not in values:
        return ""
    last = max(values)
    after = f" (the last one, of step {last:,}, has {values[last]:.4g})" if last != step else ""
    of = counted(len(values), "checkpoint")
    return f"the best of {of} by {name} at {nfe} NFE: {values[step]:.4g} at step {step:,}{after}"


def reference_of(run: Path, row: dict[str, Any], nfe: int) -> str:
    """The checksum of what a row's pictures were compared with; empty where the run does not record it (any more).

    `alphaflow eval` of the same checkpoint against other pictures stands in the same file: the row's value tells them
    apart.
    """
    path = run / "evals" / str(row.get("evals", {}).get(f"nfe{nfe}")) / "results.json"
    try:
        measured = [each for one in read_results(path)["evaluations"] for each in one["rows"]]
    except AlphaflowError:  # gone or damaged: the scores in the journal count all the same
        return ""
    newest = [each for each in reversed(measured) if each["reference"]]
    values = {name: each.get(f"nfe{nfe}") for name, each in row["scores"].items()}
    of_this_row = [each for each in newest if each["value"] == values.get(each["name"])]
    return next((str(each["reference"]["sha256"]) for each in [*of_this_row, *newest]), "")


def new_references(run: Path, rows: Sequence[dict[str, Any]]) -> set[int]:
    """The steps at which a run's scores, `rows`, were first compared with something else than before."""
    steps, before = set[int](), ""
    for row in rows:
        here = next((digest for nfe in _measured_nfe(row) if (digest := reference_of(run, row, nfe))), "")
        if before and here and here != before:
            steps.add(row["step"])
        before = here or before
    return steps


def _measured_nfe(row: dict[str, Any]) -> list[int]:
    names = [key.removeprefix("nfe") for key in row.get("evals", {})]
    return sorted(int(name) for name in names if name.isdecimal())


def score_rows(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's journal that hold scores, checked."""
    journal = run / "metrics.jsonl"
    rows = [row for row in read_rows(journal) if "scores" in row]
    for row in rows:
        check_shape(row, f"{journal}: the scores of step {row['step']}", SCORE_ROW)
    return rows


def _summary(evaluations: list[Evaluation]) -> str:
    rows = [row for each in evaluations for row in each.rows]
    return ", ".join(f"{row.name} {value_text(row)} at {row.pictures['nfe']} NFE" for row in rows)
