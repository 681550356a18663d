"""The run page: one HTML file that needs nothing else. Plain values in, text out; everything shown is escaped."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape

from alphaflow_cli.charts.chart import Chart
from alphaflow_cli.charts.draw import DARK_STYLE, to_svg_element
from alphaflow_cli.report.style import CSS, SCRIPT

NARROW = 380  # pixels: a chart for a telephone
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"  # no network

Rows = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Score:
    """One number with its protocol."""

    name: str
    nfe: str
    value: str
    protocol: str


@dataclass(frozen=True)
class RunPage:
    """What the page tells. Empty parts are left out, or say how to fill them."""

    name: str
    status: str
    made_by: str
    facts: Rows  # (what, in words)
    plan: Chart
    curves: Chart | None
    conflict: Sequence[Chart] = ()
    conflict_rows: Rows = ()
    samples: Sequence[tuple[str, str]] = ()  # (step name, data address)
    scores: Sequence[Score] = ()
    compared_with: str = ""
    changes: Rows = ()  # (field, there, here)
    recipe: str = ""
    environment: Rows = ()
    commands: Sequence[str] = ()


def run_page(page: RunPage) -> str:
    """The whole document."""
    sections = [
        ("run", "The run", html_table(page.facts, style="facts")),
        ("alpha", "Alpha and its phases", drawn(page.plan)),
        ("curves", "Curves", _curves(page)),
        ("conflict", "The conflict", _conflict(page)),
        ("samples", "Samples over time", _samples(page)),
        ("scores", "Scores", _scores(page)),
        ("recipe", "Recipe", _recipe(page)),
        ("environment", "Environment", html_table(page.environment, style="facts")),
        ("reproduce", "How to reproduce", f"<pre>{escape(chr(10).join(page.commands))}</pre>"),
    ]
    links = "".join(f'<a href="#{key}">{escape(title)}</a>' for key, title, _ in sections)
    body = "".join(f'<section id="{key}"><h2>{escape(title)}</h2>{inner}</section>' for key, title, inner in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(page.name)}: run report</title><style>{CSS}{DARK_STYLE}</style></head>\n<body><main>"
        f"<header><h1>{escape(page.name)}</h1><p>{escape(page.status)}<br>{escape(page.made_by)}</p></header>"
        f"<nav>{links}</nav>{body}</main><script>{SCRIPT}</script></body></html>\n"
    )


def drawn(chart: Chart) -> str:
    """Twice: for a wide window and for a narrow one; the style sheet shows one of them."""
    narrow = replace(chart, width=NARROW)
    return f'<div class="wide">{to_svg_element(chart)}</div><div class="narrow">{to_svg_element(narrow)}</div>'


def html_table(rows: Rows, *, head: Sequence[str] = (), numbers: Sequence[int] = (), style: str = "") -> str:
    """`numbers`: columns that stand to the right."""
    kinds = [' class="number"' if i in numbers else "" for i in range(max(map(len, rows), default=0))]
    top = "".join(f"<th{kind}>{escape(cell)}</th>" for cell, kind in zip(head, kinds, strict=False))
    lines = ["".join(f"<td{kind}>{escape(cell)}</td>" for cell, kind in zip(row, kinds, strict=False)) for row in rows]
    inner = f"<thead><tr>{top}</tr></thead>" if head else ""
    name = f' class="{style}"' if style else ""
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table{name}>{inner}<tbody>{body}</tbody></table></div>'


def note(text: str) -> str:
    """A paragraph beside the figures."""
    return f'<p class="note">{escape(text)}</p>'


def _curves(page: RunPage) -> str:
    if page.curves is None:
        return note("metrics.jsonl has no row yet.")
    told = (
        "All losses are unweighted means over the rows since the last point: the weighted loss is near 1 by "
        "construction. TC is L_TC at α = 0; before, it is that of α's own target, so it jumps there. "
        "Shaded: the phases of α."
    )
    return drawn(page.curves) + note(told)


def _conflict(page: RunPage) -> str:
    if not page.conflict and not page.conflict_rows:
        return note("Not recorded. While training: train.conflict_every; afterwards: alphaflow analyze RUN.")
    told = (
        "Cosines between the gradients of the objective's two halves (TFM: trajectory flow matching, TC: trajectory "
        "consistency) and of the border case r = t (FM') on the same rows. Below zero, one half undoes the other. "
        "Gradient over α: the weighted gradient of the r < t rows against MeanFlow's, its size and its direction."
    )
    rows = (
        html_table(page.conflict_rows, head=("", "5%", "median", "95%"), numbers=(1, 2, 3))
        if page.conflict_rows
        else ""
    )
    return note(told) + "".join(drawn(chart) for chart in page.conflict) + rows


def _samples(page: RunPage) -> str:
    if not page.samples:
        return note("No sample grids in this run (train.sample_every).")
    last = len(page.samples) - 1
    pictures = "".join(
        f'<img src="{address}" alt="{escape(step_words(name))}"{"" if i == last else " hidden"}>'
        for i, (name, address) in enumerate(page.samples)
    )
    return (
        '<div class="slider"><label for="sample-slider">step</label>'
        f'<input id="sample-slider" type="range" min="0" max="{last}" value="{last}" step="1">'
        f'<output id="sample-step" for="sample-slider">{escape(step_words(page.samples[-1][0]))}</output></div>'
        f'<figure id="sample-pictures">{pictures}</figure>'
        + note("The same seeds and labels at every step; the averaged weights. Pictures are compressed for this page.")
    )


def step_words(name: str) -> str:
    """`step-00001000` → `step 1,000`."""
    number = name.removeprefix("step-")
    return f"step {int(number):,}" if number.isdecimal() else name


def _scores(page: RunPage) -> str:
    if not page.scores:
        return note("Not measured. Run: alphaflow eval RUN --reference REFERENCE")
    rows = [(score.name, score.nfe, score.value, score.protocol) for score in page.scores]
    told = "Two numbers may be compared only where their protocols are the same."
    return html_table(rows, head=("score", "NFE", "value", "protocol"), numbers=(1, 2)) + note(told)


def _recipe(page: RunPage) -> str:
    whole = f"<details><summary>The whole recipe, defaults included</summary><pre>{escape(page.recipe)}</pre></details>"
    if not page.changes:
        return note(f"No difference from {page.compared_with}.") + whole
    head = ("field", page.compared_with, "this run")
    return note(f"Where it differs from {page.compared_with}:") + html_table(page.changes, head=head) + whole
