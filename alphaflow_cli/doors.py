"""Two more doors for programs: `alphaflow_cli.evaluate(…)` and `alphaflow_cli.train(…)`, beside `load` in api.py.

They do what `alphaflow eval` and `alphaflow train` do, in this process. The package finds them when they are called
(`__init__.py`), because rooms bear their names, too.
"""

from collections.abc import Collection, Sequence
from numbers import Integral
from pathlib import Path
from typing import get_args

from alphaflow_cli.api import Model, is_number, load
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.evaluate.evaluate import EvalRequest, evaluate_checkpoint, evaluate_pictures
from alphaflow_cli.evaluate.results import Row
from alphaflow_cli.files import user_path
from alphaflow_cli.model.find import is_checkpoint
from alphaflow_cli.recipe.loader import check_sets
from alphaflow_cli.recipe.schema import LabelDraw, Metric
from alphaflow_cli.runtime.lock import hold
from alphaflow_cli.runtime.processes import Processes, choose_device
from alphaflow_cli.train import start
from alphaflow_cli.train.store import resolve_run


def evaluate(
    subject: str | Path,
    *,
    metrics: Sequence[Metric] = (),
    reference: str | Path | None = None,
    images: int | None = None,
    nfe: Sequence[int] = (),
    draw: LabelDraw | None = None,
    guidance: float | None = None,
    device: str | None = None,
    batch: int | None = None,
    out: str | Path | None = None,
) -> list[Row]:
    """Measure a checkpoint, or pictures, as `alphaflow eval` does; results.json is written too.

    What is left out is as the recipe says. Of each row, `name` and `value` are the number, and `protocol()` says how it
    was made. The same call again resumes.
    """
    if not (_is_list(metrics) and _is_list(nfe) and all(map(_is_count, nfe))):
        raise AlphaflowError('evaluate: metrics and nfe are lists: metrics=["fid"], nfe=[1, 2].')
    if not all(number is None or _is_count(number) for number in (images, batch)):
        raise AlphaflowError("evaluate: images and batch are numbers from 1.")
    if draw is not None and draw not in get_args(LabelDraw):
        raise AlphaflowError(f"evaluate: draw {draw!r}: there are {', '.join(get_args(LabelDraw))}.")
    if guidance is not None and not is_number(guidance):
        raise AlphaflowError(f"evaluate: guidance {guidance!r}: it is a number, 1 for none.")
    request = EvalRequest(
        str(subject), nfe=tuple(nfe), guidance=guidance, metrics=tuple(metrics), images=images, draw=draw, batch=batch,
        reference=None if reference is None else str(reference), out=None if out is None else user_path(out),
    )  # fmt: skip
    if wrong := [name for name in metrics if name not in get_args(Metric)]:
        raise AlphaflowError(f"evaluate: metrics {wrong[0]!r}: there are {', '.join(get_args(Metric))}.")
    measured = evaluate_checkpoint if is_checkpoint(str(subject)) else evaluate_pictures
    if measured is evaluate_pictures and (nfe or draw or guidance is not None):
        raise AlphaflowError(
            f"evaluate: {subject} is a source of pictures; nfe, draw and guidance are for checkpoints."
        )
    report = measured(request, Processes(choose_device(device)))
    assert report is not None  # one process has the whole report
    return [row for each in report.evaluations for row in each.rows]


def _is_list(value: object) -> bool:
    return isinstance(value, Collection) and not isinstance(value, str)


def _is_count(value: object) -> bool:
    return isinstance(value, Integral) and int(value) >= 1


def train(
    recipe: str | Path,
    *,
    data: str | Path | None = None,
    out: str | Path | None = None,
    sets: Sequence[str] = (),
    init_from: str = "",
    micro_batch: int | None = None,
    device: str | None = None,
) -> Model:
    """Train a recipe in this process, as `alphaflow train` does; returns the trained model.

    recipe: a file, or the name of a shipped recipe. sets: changes of single values, such as ["train.steps=2000"].
    out: the run's folder; default: runs/ and the recipe's name. The same call again resumes, or returns at once.
    """
    if micro_batch is not None and not _is_count(micro_batch):
        raise AlphaflowError("train: micro_batch is a number from 1; without it, as many rows as the memory takes.")
    check_sets(sets)
    data, out = (None if path is None else user_path(path) for path in (data, out))
    resolved = resolve_run(str(recipe), sets, data=data, out=out)
    folder = resolved.folder
    options = start.TrainOptions(folder, data, micro_batch, init_from, device=device, notes=resolved.notes)
    with hold(folder, "train"):
        start.prepare_run(resolved.recipe, options)
    if code := start.train(resolved.recipe, options):
        raise KeyboardInterrupt(f"{folder}: stopped and saved (exit code {code}); the same call goes on from there")
    return load(folder, device=device)
