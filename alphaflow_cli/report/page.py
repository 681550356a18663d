"""The run page: one HTML file that needs nothing else. Plain values in, text out; everything shown is escaped.

Its style sheet and the slider's script stand inside the page, and the sample grids as WebP in data addresses, small
enough together for a page that can be mailed.
"""

import base64
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from alphaflow_cli.charts.chart import DARK_STYLE, Chart
from alphaflow_cli.charts.draw import LEFT, RIGHT, axis_of_x, to_svg
from alphaflow_cli.data.pictures import open_picture
from alphaflow_cli.errors import blamed_on
from alphaflow_cli.report.nearest import NearestPictures
from alphaflow_cli.sample.grid import in_colour

NARROW = 380  # pixels: a chart for a telephone
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"  # no network
BUDGET = 3_000_000  # bytes of all pictures together; base64 makes a third more of them
MOST_GRIDS = 40  # steps on the slider; of more, evenly spread ones and the last
ATTEMPTS = ((1200, 82), (1000, 70), (800, 55), (640, 40))  # (largest width in pixels, quality)

TableRows = Sequence[Sequence[str]]
Item = TypeVar("Item")


@dataclass(frozen=True)
class RunPage:
    """What the page shows. A part that is empty is left out, or names the command that fills it."""

    name: str
    status: str
    made_by: str
    facts: TableRows  # (what, in words)
    plan: Chart
    curves: Chart | None
    conflict: Sequence[Chart] = ()
    conflict_rows: TableRows = ()
    samples: Sequence[tuple[str, str]] = ()  # (step name, data address)
    scores: TableRows = ()  # (score, NFE, value, protocol)
    score_curves: Chart | None = None
    score_notes: Sequence[str] = ()  # about the curves, and the best checkpoints
    nearest: NearestPictures | None = None
    compared_with: str = ""
    changes: TableRows = ()  # (field, there, here)
    recipe: str = ""
    environment: TableRows = ()
    commands: Sequence[str] = ()


def run_page(page: RunPage) -> str:
    """Write the HTML document of one run; it needs no other file."""
    sections = [
        ("samples", "Samples", _samples(page)),
        ("scores", "Scores", _scores(page)),
        *([("nearest", "Nearest training pictures", _nearest(page.nearest))] if page.nearest else []),
        ("curves", "Curves", _curves(page)),
        ("alpha", "Alpha and its phases", drawn(page.plan)),
        ("conflict", "The conflict", _conflict(page)),
        ("run", "The run", html_table(page.facts, style="facts")),
        ("recipe", "Recipe", _recipe(page)),
        ("environment", "Environment", html_table(page.environment, style="facts")),
        ("reproduce", "How to reproduce", _commands(page)),
    ]
    return html_document(page.name, page.status, page.made_by, [Section(*each) for each in sections])


@dataclass(frozen=True)
class Section:
    """A part of a page: its name in addresses, its title, and its markup."""

    key: str
    title: str
    inner: str


def html_document(name: str, status: str, made_by: str, sections: Sequence[Section]) -> str:
    """Write a page of these sections, that needs nothing else."""
    links = "".join(f'<a href="#{each.key}">{escape(each.title)}</a>' for each in sections)
    body = "".join(f'<section id="{s.key}"><h2>{escape(s.title)}</h2>{s.inner}</section>' for s in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(name)}: run report</title><style>{CSS}{DARK_STYLE}</style></head>\n<body><main>"
        f"<header><h1>{escape(name)}</h1><p>{escape(status)}<br>{escape(made_by)}</p></header>"
        f"<nav>{links}</nav>{body}</main><script>{SCRIPT}</script></body></html>\n"
    )


def drawn(chart: Chart) -> str:
    """Draw a chart twice, for a wide and for a narrow window; the style sheet shows one of them.

    The values go along for the script, which shows those below the pointer.
    """
    narrow, values = replace(chart, width=NARROW), escape(json.dumps(values_of(chart), separators=(",", ":")))
    wide, small = (to_svg(each, in_page=True) for each in (chart, narrow))
    pictures = f'<div class="wide">{wide}</div><div class="narrow">{small}</div>'
    return f'<div class="chart" data-values="{values}">{pictures}</div>'


def values_of(chart: Chart) -> dict[str, Any]:
    """The lines of a chart with their values, and where on the picture they stand."""
    axis = axis_of_x(chart)
    lines = [
        [f"{line.label} ({panel.title})" if line.label != panel.title else line.label, _finite(line.points)]
        for panel in chart.panels
        for line in panel.lines
    ]
    place = {"low": axis.low, "high": axis.high, "log": axis.log, "left": LEFT, "right": RIGHT}
    return {"x": chart.x_label, **place, "lines": lines}


def _finite(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(x, float(f"{y:.4g}")) for x, y in points if math.isfinite(y)]


def html_table(rows: TableRows, *, head: Sequence[str] = (), numbers: Sequence[int] = (), style: str = "") -> str:
    """Write a table; the columns numbered in `numbers` stand to the right."""
    kinds = [' class="number"' if i in numbers else "" for i in range(max(map(len, rows), default=0))]
    top = "".join(f"<th{kind}>{escape(cell)}</th>" for cell, kind in zip(head, kinds, strict=False))
    lines = ["".join(f"<td{kind}>{escape(cell)}</td>" for cell, kind in zip(row, kinds, strict=False)) for row in rows]
    inner = f"<thead><tr>{top}</tr></thead>" if head else ""
    name = f' class="{style}"' if style else ""
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table{name}>{inner}<tbody>{body}</tbody></table></div>'


def note(text: str) -> str:
    """Write a paragraph beside the figures."""
    return f'<p class="note">{escape(text)}</p>'


def _curves(page: RunPage) -> str:
    if page.curves is None:
        return note("metrics.jsonl has no row yet.")
    caption = (
        "All losses are unweighted means over the rows since the last point: the weighted loss is near 1 by "
        "construction. TFM and r = t have the same target from the first step to the last. The targets of l and TC "
        "change with α, so their curves are cut where a phase ends: compare them within a phase only."
    )
    return drawn(page.curves) + note(caption)


def _conflict(page: RunPage) -> str:
    if not page.conflict and not page.conflict_rows:
        return note(f"Not recorded. While training: train.conflict_every; afterwards: {_command(page, 'analyze')}")
    caption = (
        "Cosines between the gradients of the objective's two halves (TFM: trajectory flow matching, TC: trajectory "
        "consistency) and of the border case r = t (FM') on the same rows. Below zero, one half undoes the other. "
        "Gradient over α: the weighted gradient of the r < t rows against MeanFlow's, its size and its direction."
    )
    shown = note(caption) + "".join(drawn(chart) for chart in page.conflict)
    if page.conflict_rows:
        shown += html_table(page.conflict_rows, head=("", "5%", "median", "95%"), numbers=(1, 2, 3))
    return shown


def _samples(page: RunPage) -> str:
    if not page.samples:
        return note("No sample grids in this run (train.sample_every).")
    last, shown = len(page.samples) - 1, step_words(page.samples[-1][0])  # no step has more letters than the last
    pictures = "".join(
        f'<img src="{address}" alt="{escape(step_words(name))}"{"" if i == last else " hidden"}>'
        for i, (name, address) in enumerate(page.samples)
    )
    return (
        '<div class="slider"><label for="sample-slider">step</label>'
        f'<input id="sample-slider" type="range" min="0" max="{last}" value="{last}" step="1">'
        f'<output id="sample-step" for="sample-slider" style="min-width: {len(shown)}ch">{escape(shown)}</output></div>'
        f'<figure id="sample-pictures">{pictures}</figure>'
        + note("The same seeds and labels at every step; the averaged weights. Pictures are compressed for this page.")
    )


def step_words(name: str) -> str:
    """The name of a grid for people: `step-00001000` → `step 1,000`."""
    number = name.removeprefix("step-")
    return f"step {int(number):,}" if number.isdecimal() else name


def _scores(page: RunPage) -> str:
    curves = drawn(page.score_curves) if page.score_curves else ""
    curves += "".join(note(text) for text in page.score_notes)
    if not page.scores and curves:
        return curves
    if not page.scores:
        return note(f"Not measured. Run: {_command(page, 'eval')}")
    caption = (
        "Of distances (FID, FDD, FCD, FD-tiny, KID) lower is better, of IS, precision, recall, density and coverage "
        "higher. Two numbers may be compared only where their protocols are the same."
    )
    head = ("score", "NFE", "value", "protocol")
    return curves + html_table(page.scores, head=head, numbers=(1, 2), style="scores") + note(caption)


def _nearest(nearest: NearestPictures) -> str:
    alt = "samples, and the training pictures nearest to them"
    picture = f'<figure><img src="{nearest.picture}" alt="{alt}"></figure>' if nearest.picture else ""
    return picture + "".join(note(text) for text in nearest.texts)


def _command(page: RunPage, verb: str) -> str:
    """The command of the page that begins with this verb."""
    return next((line for line in page.commands if line.startswith(f"alphaflow {verb} ")), f"alphaflow {verb} RUN")


def _commands(page: RunPage) -> str:
    """The commands below each other; the end of a long one is indented."""
    return "<pre>{}</pre>".format("\n".join(f"<span>{escape(line)}</span>" for line in page.commands))


def _recipe(page: RunPage) -> str:
    whole = f"<details><summary>The whole recipe, defaults included</summary><pre>{escape(page.recipe)}</pre></details>"
    if not page.changes:
        return note(f"No difference from {page.compared_with}.") + whole
    head = ("field", page.compared_with, "this run")
    return note(f"Where it differs from {page.compared_with}:") + html_table(page.changes, head=head) + whole


def embed(paths: Sequence[Path], budget: int = BUDGET) -> list[tuple[str, str]]:
    """Step name and data address of evenly spread sample grids, in the best quality that `budget` bytes allow."""
    chosen = spread_over(paths, MOST_GRIDS)
    for width, quality in ATTEMPTS:
        encoded = [to_webp(path, width, quality) for path in chosen]
        if sum(map(len, encoded)) <= budget:
            break
    else:
        room = budget // max(map(len, encoded), default=1)
        keep = spread_over(range(len(chosen)), max(1, room))
        chosen, encoded = [chosen[i] for i in keep], [encoded[i] for i in keep]
    addresses = ("data:image/webp;base64," + base64.b64encode(data).decode() for data in encoded)
    return [(path.stem, address) for path, address in zip(chosen, addresses, strict=True)]


def spread_over(items: Sequence[Item], most: int) -> list[Item]:
    """Choose at most `most` of the items, evenly spread, the last one always."""
    if len(items) <= most:
        return list(items)
    first = len(items) - 1
    return [items[first - round(i * first / max(most - 1, 1))] for i in reversed(range(most))]


def to_webp(path: Path, width: int, quality: int) -> bytes:
    """Encode a picture as WebP, at most `width` pixels wide."""
    with blamed_on(path, "a PNG picture", Image.DecompressionBombError), open_picture(path) as image:
        picture = in_colour(image)
    if picture.width > width:
        picture = picture.resize((width, round(picture.height * width / picture.width)), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    picture.save(out, "WEBP", quality=quality, method=4)
    return out.getvalue()


CSS = """
:root { color-scheme: light dark; --ink: #1a202c; --soft: #4a5568; --faint: #718096; --line: #e2e8f0;
  --paper: #ffffff; --back: #f7fafc; --accent: #2b6cb0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8edf4; --soft: #b6c2d2; --faint: #8b99ab; --line: #2e3a4a;
  --paper: #161c26; --back: #0e131b; --accent: #7ab8f5; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 24px 20px 64px; }
header h1 { margin: 0 0 4px; font-size: 30px; line-height: 1.2; overflow-wrap: anywhere; }
header p { margin: 0 0 18px; color: var(--soft); }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 0 0 20px; font-size: 15px; }
a { color: var(--accent); text-decoration: none; } a:hover { text-decoration: underline; }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 18px 20px;
  margin: 0 0 18px; }
h2 { margin: 0 0 10px; font-size: 20px; } h3 { margin: 18px 0 6px; font-size: 16px; }
p { margin: 0 0 10px; } .note { color: var(--soft); font-size: 14.5px; }
svg { display: block; width: 100%; height: auto; } .narrow { display: none; }
@media (max-width: 700px) { main { padding: 14px 10px 40px; } section { padding: 14px 12px; }
  .wide { display: none; } .narrow { display: block; } header h1 { font-size: 24px; }
  table.scores thead { display: none; } table.scores tr { display: grid; grid-template-columns: 1fr auto auto; }
  table.scores td:nth-child(2)::before { content: "NFE "; color: var(--soft); }
  table.scores td:last-child { grid-column: 1 / -1; padding-top: 0; color: var(--soft); }
  table.scores td:not(:last-child) { border-bottom: 0; } }
.chart { position: relative; touch-action: pan-y; }
.rule { position: absolute; top: 0; bottom: 0; width: 1px; background: var(--faint); pointer-events: none; }
.values { position: absolute; top: 8px; z-index: 1; padding: 6px 10px; pointer-events: none; white-space: pre;
  background: var(--paper); border: 1px solid var(--line); border-radius: 6px; font-size: 13px; max-width: 100%;
  overflow: hidden; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14.5px; }
th, td { text-align: left; vertical-align: top; padding: 5px 14px 5px 0; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; } td.number, th.number { text-align: right; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
table.scores td:first-child { white-space: nowrap; }
table.facts td { overflow-wrap: anywhere; }
table.facts td:first-child { white-space: nowrap; color: var(--soft); width: 1%; }
code, pre { font: 13.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { background: var(--back); border: 1px solid var(--line); border-radius: 8px; padding: 12px; margin: 0 0 10px;
  white-space: pre-wrap; overflow-wrap: anywhere; }
pre span { display: inline-block; width: 100%; padding-left: 20px; text-indent: -20px; }
summary { cursor: pointer; color: var(--accent); margin: 8px 0; }
.slider { display: flex; gap: 14px; align-items: center; margin: 0 0 12px; }
.slider input { flex: 1; min-width: 0; accent-color: var(--accent); height: 28px; }
.slider output { white-space: nowrap; text-align: right; font-variant-numeric: tabular-nums; }
figure { margin: 0; text-align: center; }
figure img { max-width: 100%; height: auto; display: block; margin: 0 auto; image-rendering: auto; }
figure img[hidden] { display: none; }
@media print { .wide { display: block; } .narrow { display: none; } section { break-inside: avoid; } }
"""

SCRIPT = """
const slider = document.getElementById("sample-slider");
if (slider) {
  const pictures = Array.from(document.querySelectorAll("#sample-pictures img"));
  const shown = document.getElementById("sample-step");
  const show = () => {
    pictures.forEach((picture, i) => { picture.hidden = i !== Number(slider.value); });
    shown.textContent = pictures[Number(slider.value)].alt;
  };
  slider.addEventListener("input", show);
  show();
}

for (const box of document.querySelectorAll(".chart")) {
  const chart = JSON.parse(box.dataset.values);
  const [rule, values] = ["rule", "values"].map((name) => {
    const part = box.appendChild(document.createElement("div"));
    part.className = name;
    part.hidden = true;
    return part;
  });
  const hide = () => { rule.hidden = values.hidden = true; };
  const nearest = (points, x) => points.reduce(
    (best, point) => (Math.abs(point[0] - x) < Math.abs(best[0] - x) ? point : best), points[0]);
  const show = (event) => {
    const picture = Array.from(box.querySelectorAll("svg")).find((svg) => svg.getClientRects().length);
    const frame = picture.getBoundingClientRect(), outer = box.getBoundingClientRect();
    const width = picture.viewBox.baseVal.width, scale = frame.width / width;
    const room = (width - chart.left - chart.right) * scale, from = frame.left + chart.left * scale;
    const share = (event.clientX - from) / room;
    const lines = chart.lines.filter(([, points]) => points.length);
    if (share < 0 || share > 1 || !lines.length) { hide(); return; }
    const { low, high, log } = chart;
    const pointed = log ? low * (high / low) ** share : low + share * (high - low);
    const x = nearest(lines.flatMap(([, points]) => points), pointed)[0];
    const rows = lines.map(([label, points]) => [label, nearest(points, x)]).filter(([, point]) => point[0] === x);
    const head = `${chart.x} ${x.toLocaleString("en")}`;
    values.textContent = [head, ...rows.map(([label, point]) => `${label}: ${point[1]}`)].join("\\n");
    rule.hidden = values.hidden = false;
    const at = (log ? Math.log(x / low) / Math.log(high / low) : (x - low) / (high - low)) * room + from - outer.left;
    rule.style.left = `${at}px`;
    values.style.left = `${Math.max(0, at < outer.width / 2 ? at + 12 : at - 12 - values.offsetWidth)}px`;
  };
  box.addEventListener("pointermove", show);
  box.addEventListener("pointerdown", show);
  box.addEventListener("pointerleave", hide);
}
"""
