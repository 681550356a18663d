"""What a run folder has to tell, gathered for its page: recipe, curves, conflict, samples, scores, environment."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from alphaflow_cli.charts import chart
from alphaflow_cli.data.files import sha256_of
from alphaflow_cli.documents import Anything, Maybe, Number, Table, Whole, check_shape
from alphaflow_cli.engine.checkpoint import read_origin
from alphaflow_cli.engine.curves import BANDS, recipe_chart
from alphaflow_cli.engine.facts import lines
from alphaflow_cli.engine.files import read_document, write_atomically
from alphaflow_cli.engine.journal import read_rows
from alphaflow_cli.engine.plan import phases
from alphaflow_cli.engine.run_report_commands import commands_of, shown
from alphaflow_cli.engine.run_report_conflict import analysis_of
from alphaflow_cli.engine.run_report_scores import scores_of
from alphaflow_cli.errors import AlphaflowError, blamed_on
from alphaflow_cli.recipe import diff_recipes, load_recipe, recipe_from_text, shipped
from alphaflow_cli.recipe.schema import Recipe
from alphaflow_cli.report.embedded import embed, spread_over
from alphaflow_cli.report.page import RunPage, run_page

JOURNAL_POINTS = 800  # of a curve; of more rows, evenly spread ones
CURVES: tuple[tuple[str, tuple[tuple[str, str, str], ...]], ...] = (  # panel → (field, label, colour)
    (
        "losses",
        (
            ("l", "l", chart.GREY),
            ("l_tfm", "TFM", chart.BLUE),
            ("l_tc", "TC", chart.RED),
            ("v_loss", "r = t", chart.GREEN),
        ),
    ),
    ("norm of the gradient", (("grad_norm", "norm", chart.PURPLE),)),
    ("seconds per step", (("seconds_per_step", "seconds", chart.ORANGE),)),
)
COSINE_LINES = (
    ("cos_tfm_tc", "TFM, TC", chart.RED),
    ("cos_tfm_fm", "TFM, FM'", chart.BLUE),
    ("cos_tc_fm", "TC, FM'", chart.ORANGE),
)
NORMS = (("norm_tfm", "TFM", chart.BLUE), ("norm_tc", "TC", chart.RED), ("norm_fm", "FM'", chart.GREEN))
NUMBER = Maybe(Number(-1e200, 1e200))  # more than any float32 squared; an axis can still be laid over it
DRAWN = [name for _, fields in CURVES for name, _, _ in fields]
ROW = Table(
    {"step": Whole(0, 10**12), "images_seen": Whole(0)},
    {
        **dict.fromkeys([*DRAWN, "seconds_per_step", "memory_gb"], NUMBER),
        "conflict": Maybe(
            Table(optional=dict.fromkeys((n for n, _, _ in COSINE_LINES + NORMS), NUMBER), others=Anything())
        ),
    },
    others=Anything(),
)


def write_report(run: Path, out: Path) -> Path:
    """The page of a run folder."""
    if not out.name or out.is_dir():
        raise AlphaflowError(f"{out}: is a folder. Name the page's file, such as {out / 'report.html'}")
    text = run_page(page_of(run))
    write_atomically(out, _writer(text))
    return out


def _writer(text: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_text(text, encoding="utf-8", errors="backslashreplace")  # a name may be no UTF-8

    return write


def page_of(run: Path) -> RunPage:
    """Everything there is; what is missing is said on the page."""
    path = run / "recipe.yaml"
    if not path.exists():
        raise AlphaflowError(
            f"{run}: not a run folder (no recipe.yaml in it). Make one: alphaflow train RECIPE --out {run}"
        )
    text = read_document(path)
    recipe, rows = recipe_from_text(text, str(path)), checked_rows(run / "metrics.jsonl")
    origin, digest = origin_of(run), weights_digest(run)
    compared, other = counterpart(recipe)
    changes = [(name, shown(there), shown(here)) for name, there, here in diff_recipes(other, recipe) if name != "name"]
    conflict, told = conflict_of(run, recipe, rows)
    return RunPage(
        name=recipe.name or run.name,
        status=status_of(recipe, rows, origin),
        made_by="α-Flow and its family, by alphaflow " + (origin.get("versions") or {}).get("alphaflow", ""),
        facts=lines(recipe),
        plan=recipe_chart(recipe),
        curves=curves_of(recipe, rows),
        conflict=conflict,
        conflict_rows=told,
        samples=embed(sorted(path for path in (run / "samples").glob("step-*.png") if path.is_file())),
        scores=scores_of(run / "results.json", digest),
        compared_with=compared,
        changes=changes,
        recipe=text,
        environment=environment_of(origin, digest, rows),
        commands=commands_of(recipe, run, diff_recipes(other, recipe), str(origin.get("init_from") or "")),
    )


def checked_rows(path: Path) -> list[dict[str, Any]]:
    """The journal, as far as it is drawn."""
    rows = read_rows(path)
    for row in rows:
        check_shape(row, f"{path}: the row of step {row['step']}", ROW)
    return rows


def status_of(recipe: Recipe, rows: Sequence[dict[str, Any]], origin: dict[str, Any]) -> str:
    """How far it is; a fetched model comes without a journal."""
    if not rows and isinstance(origin.get("step"), int):
        return f"checkpoint of step {origin['step']:,}; no journal here"
    if not rows:
        return f"not begun, {recipe.train.steps:,} steps planned"
    step, seen = rows[-1]["step"], rows[-1]["images_seen"]
    state = "finished" if step >= recipe.train.steps else "unfinished"
    return f"{state}: step {step:,} of {recipe.train.steps:,}, {seen:,} images seen"


def counterpart(recipe: Recipe) -> tuple[str, Recipe]:
    """The shipped recipe of this name, else the schema's defaults."""
    if recipe.name in shipped():
        return f"the shipped recipe {recipe.name}", load_recipe(recipe.name)
    return "the defaults", Recipe()


def curves_of(recipe: Recipe, rows: Sequence[dict[str, Any]]) -> chart.Chart | None:
    """Losses, gradient and speed over the steps."""
    if not rows:
        return None
    panels = [
        chart.Panel(title, [line(rows, *each) for each in each_of], height=190 if i == 0 else 120)
        for i, (title, each_of) in enumerate(CURVES)
    ]
    return over_steps(recipe, rows, "Losses, gradient and speed", panels)


def over_steps(
    recipe: Recipe, rows: Sequence[dict[str, Any]], title: str, panels: Sequence[chart.Panel]
) -> chart.Chart:
    """A chart over the run so far, its phases shaded."""
    last = max(rows[-1]["step"], 1)
    bands = [chart.Band(p.first, min(p.until, last), *BANDS[p.kind]) for p in phases(recipe) if p.first < last]
    return chart.Chart(title=title, panels=panels, x_label="step", bands=bands, x_range=(0, last))


def line(rows: Sequence[dict[str, Any]], name: str, label: str, colour: str) -> chart.Line:
    """A field of the journal; rows without it are left out."""
    points = [(float(row["step"]), float(row[name])) for row in rows if row.get(name) is not None]
    return chart.Line(label, spread_over(points, JOURNAL_POINTS), colour, markers=len(points) < 3)


def conflict_of(
    run: Path, recipe: Recipe, rows: Sequence[dict[str, Any]]
) -> tuple[list[chart.Chart], list[tuple[str, ...]]]:
    """What training recorded, and what `alphaflow analyze` found."""
    charts = []
    recorded = [{"step": row["step"], **row["conflict"]} for row in rows if row.get("conflict")]
    if recorded:
        cosines = chart.Panel("cosines", [line(recorded, *each) for each in COSINE_LINES], (-1, 1))
        norms = chart.Panel("norms", [line(recorded, *each) for each in NORMS], log_y=True)
        charts.append(over_steps(recipe, recorded, "Recorded while training", [cosines, norms]))
    analysed, told = analysis_of(run)
    return charts + analysed, told


def origin_of(run: Path) -> dict[str, Any]:
    """What the newest checkpoint says of itself."""
    from safetensors import SafetensorError, safe_open

    path = run / "model.safetensors"
    if not path.is_file():
        return {}
    with blamed_on(path, "a checkpoint", SafetensorError), safe_open(str(path), framework="np") as file:
        text = (file.metadata() or {}).get("origin", "{}")
    return read_origin(text, path)


def weights_digest(run: Path) -> str:
    """The newest checkpoint's checksum; empty where there is none."""
    path = run / "model.safetensors"
    return sha256_of(path) if path.is_file() else ""


def environment_of(origin: dict[str, Any], digest: str, rows: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Versions, weights, speed."""
    found = [(name, str(number)) for name, number in (origin.get("versions") or {}).items()]
    if origin:
        found.append(("checkpoint", f"step {origin.get('step')}, {origin.get('weights')} weights"))
        found.append(("its sha256", digest))
        found.append(("autoencoder", str((origin.get("autoencoder") or {}).get("id", ""))))
    speeds = [row["seconds_per_step"] for row in rows if row.get("seconds_per_step")]
    if speeds:
        found.append(("seconds per step", f"{sorted(speeds)[len(speeds) // 2]:.4g} (median)"))
    memory = [row["memory_gb"] for row in rows if row.get("memory_gb")]
    return found + ([("device memory", f"{max(memory):.4g} GB")] if memory else [])
