"""`alphaflow analyze`: the conflict over many batches, of one checkpoint or of all that a run kept.

OUT/<key>/batches.jsonl has one line per finished batch; the key is a hash of the checkpoint's bytes, the store and the
settings, so that the same command goes on where it stopped, and another one never mixes with it. checkpoint.json beside
it says which checkpoint that was, so that --all-checkpoints still shows one that the run has removed. A line says which
batch it is and ends with its checksum, so a damaged one costs time but changes no number. Of two analyses of one folder
at once the second is refused. Process r of w measures every w-th of the missing batches, beginning with the r-th; a
line is appended in one write, and the first process reads all of them in the order of the batches.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from alphaflow_cli.analyze.summary import summarise, write_charts
from alphaflow_cli.data.batches import LatentStream
from alphaflow_cli.data.manifest import read_manifest
from alphaflow_cli.documents import Anything, ListOf, Table, Text, Whole, read_json
from alphaflow_cli.errors import AlphaflowError, blamed_on
from alphaflow_cli.evaluate.results import environment
from alphaflow_cli.files import append, check_regular, make_folder, write_whole
from alphaflow_cli.model.find import checkpoint_folders, find_checkpoint, run_folder
from alphaflow_cli.recipe.schema import Recipe
from alphaflow_cli.runtime.lock import hold
from alphaflow_cli.runtime.processes import Processes, check_same, smaller_batch_if_full
from alphaflow_cli.runtime.progress import Progress, say
from alphaflow_cli.sample.generator import Generator, open_generator
from alphaflow_cli.text import counted
from alphaflow_cli.train import conflict
from alphaflow_cli.train.conflict import conflict_rows, renormalised
from alphaflow_cli.train.start import recipe_stream
from alphaflow_cli.train.step import Objective
from alphaflow_cli.train.store import check_store, stated_store

SCHEMA = "alphaflow-conflict/1"
BATCHES, ABOUT = "batches.jsonl", "checkpoint.json"  # what was measured of a checkpoint, and which one it was
MEASURED = Table({"setting": Table(others=Anything()), "step": Whole(0), "address": Text(), "folder": Text()})
FORMER = Table({"checkpoints": ListOf(Table(others=Anything()), most=10_000)}, others=Anything())
TOLD_APART = ("checkpoint_sha256", "weights", "store", "rows_per_batch", "seed", "device")  # analyses in one folder
SIZE_BATCHES = 8  # batches on which the gradient's size over α is measured too: it costs 17 gradients each


@dataclass(frozen=True)
class AnalyzeRequest:
    """What the command line says about an analysis."""

    address: str
    data: Path | None
    out: Path | None
    batches: int
    batch: int
    seed: int
    weights: str
    all_checkpoints: bool


@dataclass(frozen=True)
class Work:
    """One checkpoint, its data and objective, and the file that finished batches go to."""

    generator: Generator
    stream: LatentStream
    request: AnalyzeRequest
    objective: Objective
    path: Path
    processes: Processes


def analyze(request: AnalyzeRequest, processes: Processes) -> tuple[dict[str, Any], Path] | None:
    """Measure what is missing; returns the document and the folder that holds it and the pictures.

    The first process holds the folder for all; the others return None.
    """
    addresses, out = checkpoints_of(request), request.out or home_of(request) / "analysis"
    with ExitStack() as held:
        if processes.rank == 0:
            held.enter_context(hold(out, "analyze"))
        summaries = [analyze_one(address, request, out, processes) for address in addresses]
        made = [summary for summary in summaries if summary is not None]
        if made and request.all_checkpoints:
            made += measured_before(request, out, made)
        return (write_analysis(made, out), out) if made else None


def write_analysis(made: Sequence[dict[str, Any]], out: Path) -> dict[str, Any]:
    """Write the document and the pictures of all checkpoints."""
    summaries = sorted(made, key=lambda each: int(each["step"] or 0))
    document: dict[str, Any] = {"schema": SCHEMA, "environment": environment(), "checkpoints": summaries}
    tell_replaced(out / "conflict.json", summaries)
    write_whole(out / "conflict.json", json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    document["pictures"] = [str(path) for path in write_charts(out, summaries)]
    return document


def measured_before(request: AnalyzeRequest, out: Path, made: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The analyses, with these settings, of checkpoints that the run has removed since: their batches are kept."""
    steps, kept = [int(each["step"] or 0) for each in made], {}
    for path in sorted(out.glob(f"*/{ABOUT}"), key=lambda each: each.stat().st_mtime_ns):
        try:
            about = read_json(path, MEASURED)
        except AlphaflowError:  # it is not ours
            continue
        step, setting = about["step"], about["setting"]
        of_first = {**setting, "checkpoint_sha256": made[0]["checkpoint_sha256"]}
        is_alike = setting_key(of_first) == made[0]["folder"] and setting_key(setting) == path.parent.name
        of_run = request.out is None or Path(about["address"]).parents[1:2] == [Path(request.address, "checkpoints")]
        lines = read_lines(path.with_name(BATCHES)) if is_alike and of_run else {}
        rows = [lines[index] for index in range(request.batches) if index in lines]
        if rows and step not in steps and step < max(steps):
            with blamed_on(path, "the batches of an analysis"):
                kept[step] = {**about.pop("setting"), **about, **summarise(rows)}
    if kept:
        which = ", ".join(f"{step:,}" for step in sorted(kept))
        say(f"measured before, and shown beside these: step {which}, which the run does not keep any more")
    return list(kept.values())


def setting_key(setting: Mapping[str, Any]) -> str:
    """The folder of the batches that were measured with such a setting: a hash of it."""
    return hashlib.sha256(json.dumps(setting, sort_keys=True).encode()).hexdigest()[:16]


def tell_replaced(path: Path, summaries: Sequence[dict[str, Any]]) -> None:
    """Say which analyses the document and the pictures show no longer: of other checkpoints, or with other settings."""
    try:
        former = read_json(path, FORMER)["checkpoints"] if path.is_file() else []
    except AlphaflowError:  # it is written anew in any case
        return
    here = [[each.get(name) for name in TOLD_APART] for each in summaries]
    gone = [each for each in former if [each.get(name) for name in TOLD_APART] not in here]
    if gone:
        one, more = gone[-1], f", nor {counted(len(gone) - 1, 'other')}" if len(gone) > 1 else ""
        what = f"step {one.get('step')}, {one.get('weights')} weights, {one.get('rows_per_batch')} rows per batch"
        say(
            f"{path} and the pictures beside it no longer show {what}, seed {one.get('seed')}{more}. Its batches are "
            "kept: while the checkpoint is there, the former command shows them again. --out DIR keeps both apart"
        )


def home_of(request: AnalyzeRequest) -> Path:
    """The run that the checkpoint belongs to, else the folder that was named, else the present one."""
    path = Path(request.address)
    return run_folder(request.address) or (path if path.is_dir() else Path())


def checkpoints_of(request: AnalyzeRequest) -> list[str]:
    """The requested checkpoint, or all that the run kept."""
    if not request.all_checkpoints:
        return [str(find_checkpoint(request.address, weights=request.weights))]
    name = "model.safetensors" if request.weights == "ema" else "raw.safetensors"
    kept = checkpoint_folders(Path(request.address))
    paths = [str(folder / name) for folder in kept if (folder / name).exists()]
    if not paths:
        raise AlphaflowError(
            f"{request.address}: no checkpoints/step-*/{name} in it. --all-checkpoints wants a run folder; "
            "train.keep and train.milestone_every say which checkpoints a run keeps."
        )
    return paths


def analyze_one(address: str, request: AnalyzeRequest, out: Path, processes: Processes) -> dict[str, Any] | None:
    """Measure one checkpoint batch by batch; the first process returns what all of them measured."""
    generator = open_generator(address, device=processes.device, weights=request.weights)
    check_same(processes, generator.digest, address)
    recipe, device = generator.recipe, processes.device
    store = store_to_analyze(recipe, request)
    check_store(recipe, store)
    protocol = describe_setting(generator, request, store)
    origin = {"step": generator.origin.get("step"), "address": address, "folder": setting_key(protocol)}
    path = out / setting_key(protocol) / BATCHES
    make_folder(path.parent)
    if processes.rank == 0:
        about = {"setting": protocol, **origin}
        write_whole(path.with_name(ABOUT), json.dumps(about, indent=1, ensure_ascii=False) + "\n")
    stream = recipe_stream(
        recipe, store, batch=request.batch, seed=request.seed, device=device, resident=False, verify="sizes"
    )
    objective = Objective.of(recipe)
    if device.type != "cuda":  # bf16 on a GPU only, where training in it is fast
        objective = replace(objective, bf16=False)
    work = Work(generator, stream, request, objective, path, processes)
    measure_missing(work)
    stream.close()
    if processes.rank:
        return None
    rows = lines_of_all(work)
    former = any("sha256" not in row for row in rows)  # then a damaged one may be among them
    with blamed_on(path, "the batches of an analysis") if former else nullcontext():
        summary = summarise(rows)
    return {**protocol, **origin, **summary}


def store_to_analyze(recipe: Recipe, request: AnalyzeRequest) -> Path:
    """The latent store: --data, else the recipe's, else the one in the run's folder."""
    here = home_of(request) / "latents"
    for path in (request.data, stated_store(recipe), here):
        if path is not None and (path == request.data or (path / "manifest.json").is_file()):
            return path
    raise AlphaflowError(
        f"{request.address}: where are the latents it was trained on? Give --data DIR, made by alphaflow prep-latents "
        f"(the recipe says {recipe.data.store or recipe.data.source or 'nothing'!r})."
    )


def describe_setting(generator: Generator, request: AnalyzeRequest, store: Path) -> dict[str, Any]:
    """All that decides a batch's numbers."""
    recipe = generator.recipe
    return {
        "recipe": recipe.name,
        "checkpoint_sha256": generator.digest,
        "weights": generator.origin.get("weights"),
        "store": read_manifest(store).digest,
        "rows_per_batch": request.batch,
        "seed": request.seed,
        "bins": conflict.CONFLICT_BINS,
        "alphas": list(conflict.ALPHAS),
        "size_batches": SIZE_BATCHES,
        "precision": recipe.train.precision,  # bf16 on a GPU only; `device` says which
        "guidance": asdict(recipe.guidance),
        "device": generator.device.type,
        "ties": "drawn again",
    }


def measure_missing(work: Work) -> None:
    """Measure this process's share of the batches that have no whole line in the file yet."""
    processes, wanted = work.processes, work.request.batches
    first = processes.rank == 0
    if first:
        mend_lines(work.path)
    processes.wait()
    rows = read_lines(work.path)
    processes.wait()  # before anybody appends: all must see the same lines
    missing = [index for index in range(wanted) if index not in rows]
    if rows and first:
        say(f"measured before: {counted(len(rows), 'batch', 'batches')}; going on")
    net, step = work.generator.net.requires_grad_(), work.generator.origin.get("step")
    try:
        with Progress(f"step {step}", wanted, unit="batch", done=wanted - len(missing), shown=first) as bar:
            for index in missing[processes.rank :: processes.size]:
                with smaller_batch_if_full(work.request.batch):
                    row = measure_one(net, work, index)
                check_finite(work, row)
                line = json.dumps({**row, "sha256": _checksum(row)}, allow_nan=False) + "\n"
                append(work.path, line, kept="Finished batches are kept; the same command goes on.")
                bar.advance(min(processes.size, wanted - bar.done))
            processes.wait()
            bar.advance(wanted - bar.done)
    except (KeyboardInterrupt, SystemExit):  # Ctrl-C, SIGTERM
        if first:
            say("interrupted; finished batches are kept: run the same command again to go on")
        raise


def lines_of_all(work: Work) -> list[dict[str, Any]]:
    """The lines of all batches, in order, whichever process measured them."""
    rows = read_lines(work.path)
    lost = [index for index in range(work.request.batches) if index not in rows]
    if lost:
        raise AlphaflowError(
            f"{work.path}: batch {lost[0]} is not there, though a process measured it. All processes must see one "
            "folder; run the same command again."
        )
    return [rows[index] for index in range(work.request.batches)]


def measure_one(net: torch.nn.Module, work: Work, index: int) -> dict[str, Any]:
    """Measure one batch: the conflict, and on the first batches the gradient's size over α."""
    generator, stream = work.generator, work.stream
    batch = stream.batch_at(index, slice(None))
    x = renormalised(batch.latents, (stream.mean, stream.std), (generator.mean, generator.std))
    rows = conflict_rows(generator.recipe, x, batch.y, seed=work.request.seed, index=index)
    row = {"batch": index, **conflict.measure_batch(net, rows, work.objective, bins=conflict.CONFLICT_BINS)}
    if index < SIZE_BATCHES:
        row["sizes"] = conflict.sizes_over_alpha(net, rows, work.objective, conflict.ALPHAS)
    return row


def check_finite(work: Work, row: dict[str, Any]) -> None:
    """Refuse a batch whose times never differ, and one with a loss or a gradient that is not finite."""
    where = f"{work.generator.recipe.name or 'checkpoint'}, batch {row['batch']}"
    if row["rows"] < work.request.batch:
        raise AlphaflowError(
            f"{where}: {work.request.batch - row['rows']} of {work.request.batch} rows never got r < t: the recipe's "
            "times are all but equal; raise times.std."
        )
    try:
        json.dumps(row, allow_nan=False)
    except ValueError as error:
        raise AlphaflowError(
            f"{where}: a loss or a gradient is not finite, so the checkpoint has no conflict to measure: its weights "
            "are damaged, or the training diverged. Analyze an earlier one."
        ) from error


def mend_lines(path: Path) -> None:
    """Cut off a half-written last line, so that the next line begins cleanly."""
    if path.exists():
        check_regular(path)
        text = path.read_text(encoding="utf-8", errors="replace")
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            write_whole(path, whole)


def read_lines(path: Path) -> dict[int, dict[str, Any]]:
    """Read the whole lines by batch; of several the first counts. A line that was damaged is left out.

    Former lines have no checksum.
    """
    if not path.exists():
        return {}
    check_regular(path)
    rows: dict[int, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            row = json.loads(line)
            if row.get("sha256") in (None, _checksum(row)):
                rows.setdefault(int(row["batch"]), row)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            continue
    return rows


def _checksum(row: dict[str, Any]) -> str:
    values = {name: value for name, value in row.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
