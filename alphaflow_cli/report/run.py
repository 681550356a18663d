"""What a run folder holds, read and checked for its page: recipe, curves, conflict, samples, scores, environment.

The page also shows what a reader types to make the run again.
"""

import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from shlex import quote
from typing import Any

from alphaflow_cli.analyze.summary import PAIR_NAMES, SIZES, bins_chart, sizes_chart, steps_chart
from alphaflow_cli.charts import chart
from alphaflow_cli.charts.chart import Chart
from alphaflow_cli.documents import Anything, ListOf, Maybe, Number, Table, Text, Whole, check_shape, read_json
from alphaflow_cli.errors import AlphaflowError, blamed_on
from alphaflow_cli.evaluate.results import best_founded, read_results, row_of, value_text
from alphaflow_cli.files import read_document, sha256_of, write_whole
from alphaflow_cli.model.checkpoint import read_origin
from alphaflow_cli.model.find import check_run
from alphaflow_cli.recipe import diff_recipes, load_recipe, recipe_from_text, shipped
from alphaflow_cli.recipe.facts import lines
from alphaflow_cli.recipe.loader import set_text
from alphaflow_cli.recipe.plan import phases
from alphaflow_cli.recipe.schema import Recipe
from alphaflow_cli.report.nearest import nearest_of
from alphaflow_cli.report.page import RunPage, embed, run_page, spread_over
from alphaflow_cli.report.scores import best_notes, cut_notes, expected_notes, scores_chart
from alphaflow_cli.text import for_terminal
from alphaflow_cli.train.curves import BANDS, recipe_chart
from alphaflow_cli.train.journal import read_rows
from alphaflow_cli.train.scores import new_references, score_rows
from alphaflow_cli.train.store import recipe_for

JOURNAL_POINTS = 800  # of a curve; of more rows, evenly spread ones
CURVES = {  # panel → (field, label, colour)
    "losses with one target throughout": (
        ("l_tfm", "TFM", chart.BLUE),
        ("v_loss", "r = t", chart.GREEN),
        ("l_head", "velocity head", chart.ORANGE),
    ),
    "losses whose target changes with α": (("l", "l", chart.GREY), ("l_tc", "TC", chart.RED)),
    "norm of the gradient": (("grad_norm", "norm", chart.PURPLE),),
    "seconds per step": (("seconds_per_step", "seconds", chart.ORANGE),),
}
SOMETIMES = {"l_head"}  # fields that the journals of some networks have
CUT = {"l", "l_tc"}  # fields that may be compared within a phase only
COSINE_LINES = (
    ("cos_tfm_tc", "TFM, TC", chart.RED),
    ("cos_tfm_fm", "TFM, FM'", chart.BLUE),
    ("cos_tc_fm", "TC, FM'", chart.ORANGE),
)
NORMS = (("norm_tfm", "TFM", chart.BLUE), ("norm_tc", "TC", chart.RED), ("norm_fm", "FM'", chart.GREEN))
NUMBER = Maybe(Number(-1e200, 1e200))  # more than any float32 squared; an axis can still be laid over it
JOURNAL_ROW = Table(
    {"step": Whole(0, 10**12), "images_seen": Whole(0)},
    {
        **{name: NUMBER for fields in CURVES.values() for name, _, _ in fields},
        "memory_gb": NUMBER,
        "conflict": Maybe(
            Table(optional=dict.fromkeys((n for n, _, _ in COSINE_LINES + NORMS), NUMBER), others=Anything())
        ),
    },
    others=Anything(),
)
SPREAD = Table(dict.fromkeys(("p5", "p50", "p95"), Maybe(Number(-1e200, 1e200))), others=Anything())
COSINES = Table(dict.fromkeys(PAIR_NAMES, SPREAD), others=Anything())
ALPHA_SIZE = Table({"alpha": Number(0, 1), "size": SPREAD, "cosine": SPREAD}, others=Anything())
SUMMARY = Table(
    {
        "step": Maybe(Whole(0)),
        "recipe": Text(1000),
        "batches": Whole(0),
        "rows_per_batch": Whole(0),
        "cosines": COSINES,
        "bins": ListOf(
            Table({"from": Number(0, 1), "to": Number(0, 1), "cosines": COSINES}, others=Anything()), most=1000
        ),
        "sizes": Table(optional=dict.fromkeys(SIZES, ListOf(ALPHA_SIZE, most=1000)), others=Anything()),
    },
    others=Anything(),
)
CONFLICT = Table({"checkpoints": ListOf(SUMMARY, least=1, most=10_000)}, others=Anything())

Cells = list[tuple[str, ...]]  # lines of a table


def write_report(run: Path, out: Path) -> Path:
    """Write the page of a run folder; returns its path."""
    if not out.name or out.is_dir():
        raise AlphaflowError(f"{out}: is a folder. Name the page's file, such as {out / 'report.html'}")
    write_whole(out, run_page(page_of(run)))
    return out


def page_of(run: Path) -> RunPage:
    """Read everything that the run folder has; the page names what is missing."""
    path = run / "recipe.yaml"
    check_run(run)
    text = read_document(path)
    recipe, rows = recipe_from_text(text, str(path)), journal_of(run)
    model = run / "model.safetensors"
    origin, digest = (origin_of(model), sha256_of(model)) if model.is_file() else ({}, "")
    compared, other = counterpart(recipe)
    changes = [each for each in diff_recipes(other, recipe) if each[0] != "name"]
    conflict, percentiles = conflict_of(run, recipe, rows)
    scored = score_rows(run)
    cuts = new_references(run, scored)
    return RunPage(
        name=run.resolve().name,
        status=status_of(recipe, rows, origin),
        made_by=" ".join([f"recipe {recipe.name}, by alphaflow", (origin.get("versions") or {}).get("alphaflow", "")]),
        facts=lines(recipe),
        plan=recipe_chart(recipe),
        curves=curves_of(recipe, rows),
        conflict=conflict,
        conflict_rows=percentiles,
        samples=embed(sorted(path for path in (run / "samples").glob("step-*.png") if path.is_file())),
        scores=scores_of(run / "results.json", digest),
        score_curves=scores_chart(recipe, scored, cuts),
        score_notes=[*cut_notes(cuts), *expected_notes(recipe, scored), *best_notes(best_steps(run), scored)],
        nearest=nearest_of(run, recipe),
        compared_with=compared,
        changes=[(name, set_text(there), set_text(here)) for name, there, here in changes],
        recipe=text,
        environment=environment_of(origin, digest, rows),
        commands=commands_of(recipe, run, origin, images=measured_images(run / "results.json")),
    )


def journal_of(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's journal; what is drawn of them is checked."""
    path = run / "metrics.jsonl"
    rows = read_rows(path)
    for row in rows:
        check_shape(row, f"{path}: the row of step {row['step']}", JOURNAL_ROW)
    return rows


def best_steps(run: Path) -> dict[Path, int]:
    """The best checkpoints that the run kept, and the step of each."""
    kept = {path: origin_of(path).get("step") for path in run.glob("best-nfe*.safetensors") if path.is_file()}
    return {path: step for path, step in kept.items() if isinstance(step, int)}


def status_of(recipe: Recipe, rows: Sequence[dict[str, Any]], origin: dict[str, Any]) -> str:
    """How far the run is, in words; a fetched model comes without a journal."""
    if not rows and isinstance(origin.get("step"), int):
        return f"checkpoint of step {origin['step']:,}; no journal here"
    if not rows:
        return f"not begun, {recipe.train.steps:,} steps planned"
    step, seen = rows[-1]["step"], rows[-1]["images_seen"]
    state = "finished" if step >= recipe.train.steps else "unfinished"
    return f"{state}: step {step:,} of {recipe.train.steps:,}, {seen:,} images seen"


def counterpart(recipe: Recipe) -> tuple[str, Recipe]:
    """What a recipe is compared with: the shipped recipe of its name, else the schema's defaults."""
    if recipe.name in shipped():
        return f"the shipped recipe {recipe.name}", load_recipe(recipe.name)
    return "the defaults", Recipe()


def curves_of(recipe: Recipe, rows: Sequence[dict[str, Any]]) -> chart.Chart | None:
    """Draw losses, gradient and speed over the steps; None before the first row."""
    if not rows:
        return None
    cuts, there = [float(phase.until) for phase in phases(recipe)], {name for row in rows for name in row}
    panels = [
        chart.Panel(
            title,
            [
                line(rows, *each, cuts=cuts if each[0] in CUT else ())
                for each in each_of
                if each[0] not in SOMETIMES - there
            ],
            height=170 if "losses" in title else 120,
        )
        for title, each_of in CURVES.items()
    ]
    return over_steps(recipe, rows, "Losses, gradient and speed", panels)


def over_steps(
    recipe: Recipe, rows: Sequence[dict[str, Any]], title: str, panels: Sequence[chart.Panel]
) -> chart.Chart:
    """Draw panels over the run so far, the phases of alpha shaded."""
    last = max(rows[-1]["step"], 1)
    bands = [chart.Band(p.first, min(p.until, last), *BANDS[p.kind]) for p in phases(recipe) if p.first < last]
    return chart.Chart(title=title, panels=panels, x_label="step", bands=bands, x_range=(0, last))


def line(rows: Sequence[dict[str, Any]], name: str, label: str, colour: str, cuts: Sequence[float] = ()) -> chart.Line:
    """Draw a field of the journal as a line; rows without it are left out. Nothing joins the two sides of a cut."""
    points = [(float(row["step"]), float(row[name])) for row in rows if row.get(name) is not None]
    shown = spread_over(points, JOURNAL_POINTS)
    inner = [cut for cut in cuts if shown and shown[0][0] <= cut < shown[-1][0]]
    gaps = [(cut, math.nan) for cut in inner]
    return chart.Line(
        label, sorted([*shown, *gaps], key=lambda at: (at[0], at[1] != at[1])), colour, markers=len(points) < 3
    )


def conflict_of(run: Path, recipe: Recipe, rows: Sequence[dict[str, Any]]) -> tuple[list[chart.Chart], Cells]:
    """Charts of the conflict that training recorded and `alphaflow analyze` measured, and the latter's percentiles."""
    charts = []
    recorded = [{"step": row["step"], **row["conflict"]} for row in rows if row.get("conflict")]
    if recorded:
        cosines = chart.Panel("cosines", [line(recorded, *each) for each in COSINE_LINES], (-1, 1))
        norms = chart.Panel("norms", [line(recorded, *each) for each in NORMS], log_y=True)
        charts.append(over_steps(recipe, recorded, "Recorded while training", [cosines, norms]))
    analysed, percentiles = analysis_of(run)
    return charts + analysed, percentiles


def origin_of(path: Path) -> dict[str, Any]:
    """What a checkpoint records of itself."""
    from safetensors import SafetensorError, safe_open

    with blamed_on(path, "a checkpoint", SafetensorError), safe_open(str(path), framework="np") as file:
        text = (file.metadata() or {}).get("origin", "{}")
    return read_origin(text, path)


def environment_of(origin: dict[str, Any], digest: str, rows: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """The lines of the page's environment: versions, weights, speed, memory."""
    entries = [(name, str(number)) for name, number in (origin.get("versions") or {}).items()]
    if origin:
        entries.append(("checkpoint", f"step {origin.get('step')}, {origin.get('weights')} weights"))
        entries.append(("its sha256", digest))
        entries.append(("autoencoder", str((origin.get("autoencoder") or {}).get("id", ""))))
    speeds = [row["seconds_per_step"] for row in rows if row.get("seconds_per_step")]
    if speeds:
        entries.append(("seconds per step", f"{sorted(speeds)[len(speeds) // 2]:.4g} (median)"))
    memory = [row["memory_gb"] for row in rows if row.get("memory_gb")]
    return entries + ([("device memory", f"{max(memory):.4g} GB")] if memory else [])


def commands_of(recipe: Recipe, run: Path, origin: dict[str, Any], *, images: int = 0) -> list[str]:
    """The commands that make the run again, from the pictures to the scores and this page."""
    folder, data = quote(place_of(run)), recipe.data
    count = f" --images {images}" if images not in (0, recipe.eval.images) else ""
    made_by = (origin.get("versions") or {}).get("alphaflow")
    head = [f"# alphaflow {for_terminal(made_by)}: pip install alphaflow-cli"] if made_by else []
    train, before = _train_command(recipe, folder)
    train += f" --init-from {quote(str(origin['init_from']))}" if origin.get("init_from") else ""
    prepare = []
    if not data.source or data.store:
        options = f"--size {data.image_size} --autoencoder {quote(data.autoencoder)}{' --flips' * data.flips}"
        options += " --crop adm" if (data.crop or origin.get("crop")) == "adm" else ""
        source = data.source or "SOURCE"
        prepare = [f"alphaflow prep-latents {source} {options} --out {quote(data.store or 'DIR')}"]
    return [
        *head,
        *before,
        *prepare,
        train,
        f"alphaflow sample {folder} --grid grid.png",
        f"alphaflow eval {folder} --reference {quote(recipe.eval.reference or 'SOURCE')}{count}",
        f"alphaflow analyze {folder} --batches 100" + (" --data DIR" if prepare and not data.store else ""),
        f"alphaflow report {folder}",
    ]


def place_of(run: Path) -> str:
    """The run folder as it was typed; a path that means something on this machine only becomes runs/NAME."""
    here_only = run.is_absolute() or ".." in run.parts or not run.parts
    return f"runs/{run.resolve().name}" if here_only else run.as_posix()


def _train_command(recipe: Recipe, folder: str) -> tuple[str, list[str]]:
    """The command that trains the recipe, and what has to be done before it is typed."""
    name, store = recipe.name, recipe.data.store
    if name not in shipped():
        file = f"{name or 'recipe'}.yaml"
        data = "" if store or recipe.data.source else " --data DIR"
        return f"alphaflow train {quote(file)}{data} --out {folder}", [
            f"# save the recipe above as {for_terminal(file)}"
        ]
    base, data = load_recipe(name), "" if store or recipe.data.source else " --data DIR"
    if store and store != base.data.store:
        data = f" --data {quote(store)}"
        if (Path(store) / "manifest.json").is_file():  # the recipe takes over from it what need not be said
            with suppress(AlphaflowError):  # a damaged store makes the command longer, and costs no page
                base = recipe_for(name, (), Path(store))[0]
    changes = [(field, here) for field, _, here in diff_recipes(base, recipe) if field not in ("name", "data.store")]
    sets = "".join(f" --set {field}={quote(set_text(here))}" for field, here in changes)
    return f"alphaflow train {name}{sets}{data} --out {folder}", []


def analysis_of(run: Path) -> tuple[list[Chart], Cells]:
    """Charts of RUN/analysis, and percentiles per checkpoint and pair; nothing where there is no analysis."""
    path = run / "analysis" / "conflict.json"
    if not path.is_file():
        return [], []
    document = read_json(path, CONFLICT, advice="Move it away, or make it again: alphaflow analyze.")
    summaries = document["checkpoints"]
    charts = [steps_chart(summaries)] if len(summaries) > 1 else []
    charts.append(bins_chart(summaries[-1]))
    charts += [sizes_chart(summaries[-1])] if SIZES.keys() <= summaries[-1]["sizes"].keys() else []
    table: Cells = []
    for summary in summaries:
        for pair, values in summary["cosines"].items():
            percentiles = ["none" if values[p] is None else f"{values[p]:+.3f}" for p in ("p5", "p50", "p95")]
            table.append((f"step {summary['step']}, {PAIR_NAMES[pair]}", *percentiles))
    return charts, table


def measured_images(path: Path) -> int:
    """How many pictures the largest evaluation has measured; 0 where there is none."""
    if not path.is_file():
        return 0
    return max((row["count"] for each in read_results(path)["evaluations"] for row in each["rows"]), default=0)


def scores_of(path: Path, model: str) -> Cells:
    """Name, NFE, value and protocol of every number, the best-founded of each; none where nothing was measured.

    `model`: the sha256 of the run's model, or empty. A number of other weights than these says so.
    """
    if not path.is_file():
        return []
    measured = [row for evaluation in read_results(path)["evaluations"] for row in evaluation["rows"]]
    rows = [row_of(row) for row in best_founded(measured)]
    rows.sort(key=lambda row: (row.name, row.pictures.get("nfe") or 0))
    table: Cells = []
    for row in rows:
        digest = row.pictures.get("checkpoint_sha256") or ""
        other = [f"of other weights (sha {digest[:8]})"] if model and digest and digest != model else []
        protocol = "; ".join([*other, row.protocol(), *row.notes])
        table.append((row.name, str(row.pictures.get("nfe", "")), value_text(row), protocol))
    return table
