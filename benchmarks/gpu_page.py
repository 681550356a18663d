"""OUT/RESULTS.md of benchmarks/gpu.py: tables from its lines, with the goals beside the figures."""

from collections.abc import Callable, Iterable
from typing import Any

Line = dict[str, Any]
Good = dict[tuple[str, str], Line]  # (part, item) → its newest good line


def _mfu(item: str) -> Callable[[Good], float | None]:
    return lambda good: _figure(good, "step", item, "mfu", "ours compiled")


def _over_fm(good: Good) -> float | None:
    ours, plain = (_figure(good, "step", "B/2 α=0", "ms", name) for name in ("ours compiled", "fm compiled"))
    return ours / plain if ours and plain else None


def _steps(item: str) -> Callable[[Good], float | None]:
    def slowest(good: Good) -> float | None:
        speeds = _figure(good, "training", item, "steps_per_second")
        return min(speeds.values()) if speeds else None

    return slowest


def _evaluation(good: Good) -> float | None:
    seconds: float | None = _figure(good, "evaluation", "50,000 pictures", "seconds", "total")
    return seconds


GOALS: list[tuple[str, str, float, Callable[[Good], float | None]]] = [
    *((f"share of the peak, {name}, compiled", "≥", goal, _mfu(f"{name} α=1"))
      for name, goal in (("B/2", 0.45), ("L/2", 0.50), ("XL/2", 0.50))),
    ("step at α = 0 ÷ flow matching, B/2, share .25", "≤", 1.35, _over_fm),
    ("steps/s of the quickstart", "≥", 400, _steps("quickstart")),
    ("steps/s of DiT-S/2 on 32 px, batch 256", "≥", 25, _steps("cifar10")),
    ("seconds for 50,000 pictures of B/2 at 1 NFE, after the start", "≤", 100, _evaluation),
    ("prep-latents, pictures/s at 256 px, after the start", "≥", 600,
     lambda good: _figure(good, "latents", "pictures", "pictures_per_second")),
]  # fmt: skip


HEAD = [
    "# Measured on a GPU", "",
    "Written by `benchmarks/gpu.py` from results.jsonl beside it; do not edit. What it means: docs/speed.md.", "",
]  # fmt: skip


def _figure(good: Good, part: str, item: str, *names: str) -> Any:
    value: Any = good.get((part, item), {}).get("figures")
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def page(lines: list[Line]) -> str:
    """The whole page."""
    good = {(line["part"], line["item"]): line for line in lines if "figures" in line}
    faults = {(line["part"], line["item"]): line["fault"] for line in lines if "fault" in line}
    parts = [*HEAD, *_heads(lines), "", *_goals(good), *_steps_table(good)]
    for part in dict.fromkeys(name for name, _ in good if name != "step"):
        parts += [f"## {part}", "", *_rows(good, part), ""]
    open_faults = [f"- {part}, {item}: {fault}" for (part, item), fault in faults.items() if (part, item) not in good]
    if open_faults:
        parts += ["## Not measured", "", *open_faults, ""]
    return "\n".join(parts).rstrip() + "\n"


def _heads(lines: list[Line]) -> list[str]:
    """Date, hardware, versions and commit: one line for each that differs."""
    seen = dict.fromkeys(
        f"{line['date']}, {line['hardware']}, torch {line['versions']['torch']}, alphaflow "
        f"{line['versions']['alphaflow']}, commit {(line['commit'] or 'unknown')[:10]}{', changed' * line['dirty']}"
        for line in lines
    )
    return [f"- {head}" for head in seen]


def _goals(good: Good) -> list[str]:
    rows = []
    for text, sign, goal, read in GOALS:
        value = read(good)
        met = "" if value is None else "yes" if (value >= goal if sign == "≥" else value <= goal) else "no"
        rows.append([text, f"{sign} {goal:g}", "not measured" if value is None else f"{value:.3g}", met])
    return ["## Goals", "", *table(["", "goal", "measured", "met"], rows), ""]


def _steps_table(good: Good) -> list[str]:
    """Milliseconds of forward and backward; the columns of docs/speed.md."""
    names = ("fm", "ours", "reference", "fm compiled", "ours compiled")
    rows = []
    for (part, item), line in good.items():
        if part != "step":
            continue
        figures = line["figures"]
        ms, mfu = figures["ms"], figures["mfu"].get("ours compiled")
        row = [f"{item}, batch {figures['batch']}, share {figures['share']:g}", *(f"{ms[name]:.1f}" for name in names)]
        row += [
            f"{mfu:.2f}" if mfu else "",
            f"{ms['reference'] / ms['ours']:.2f} / {ms['reference'] / ms['ours compiled']:.2f}",
        ]
        row += [f"{figures['peak_gb']['ours']:.3g} / {figures['peak_gb']['reference']:.3g}"]
        rows.append(row)
    head = ["ms per step", "eager: fm", "ours", "published way", "compiled: fm", "ours", "MFU ours compiled"]
    head += ["published way ÷ ours, eager / compiled", "peak GB, ours / published way"]
    return ["## step", "", *table(head, rows), ""] if rows else []


def _rows(good: Good, part: str) -> list[str]:
    rows = [[item, text(line["figures"])] for (name, item), line in good.items() if name == part]
    return table(["", "figures"], rows)


def text(value: Any) -> str:
    """Figures in a cell: names with their values, nested ones in brackets."""
    if isinstance(value, dict):
        named = {name.replace("_", " "): each for name, each in value.items() if each not in ([], {}, None)}
        return "; ".join(
            f"{name} ({text(each)})" if isinstance(each, dict) else f"{name}: {text(each)}"
            for name, each in named.items()
        )
    if isinstance(value, list):
        return ", ".join(map(text, value))
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).replace("|", "\\|")


def table(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    """A Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
