"""What the runs say of the conflict: at their last checkpoint by `alphaflow analyze`, and along training."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Protocol

BIAS = (
    "The gradients of one batch share its rows and noise, and what they share adds to their products: the smaller the",
    "batch, the nearer a cosine comes to that of the noise. So a cosine, and a share below -0.4, belongs to its number",
    "of rows. Where training has come to rest, the weighted sum of the gradients is nearly zero, and large batches",
    "show the halves opposed whatever else is true.",
)
PAPER = "below -0.4 during more than 95% of training"  # arXiv:2510.20771, typically


class Job(Protocol):
    """A run of the comparison."""

    @property
    def member(self) -> str: ...

    @property
    def folder(self) -> Path: ...


def conflict_lines(conflicts: Sequence[dict[str, Any]], names: Mapping[str, str]) -> list[str]:
    """The last checkpoint of each run that was analyzed."""
    if not conflicts:
        return []
    lines = [
        "At the last step, averaged weights: cos(∇L_TFM, ∇L_TC) and cos(∇L_TFM, ∇L_FM'), the median over batches with",
        "the 5th and 95th percentile.",
        "",
        "| member | batches × rows | TFM, TC | below -0.4 | TFM, FM' |",
        "|---|---|---|---|---|",
    ]
    for found in conflicts:
        cosines, share = found["cosines"], found["share_below_-0.4"]
        size = f"{found['batches']} × {found['rows_per_batch']}"
        pair = [f"{c['p50']:+.2f} ({c['p5']:+.2f} to {c['p95']:+.2f})" for c in (cosines["tfm.tc"], cosines["tfm.fm"])]
        lines.append(f"| {names[found['member']]} | {size} | {pair[0]} | {share:.0%} | {pair[1]} |")
    return [*lines, "", *BIAS]


def recorded(run: Path) -> list[float]:
    """cos(∇L_TFM, ∇L_TC) at every point of the journal that has it."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    found = [row["conflict"]["cos_tfm_tc"] for row in rows if row.get("conflict")]
    return [cosine for cosine in found if cosine is not None]


def training_lines(done: Sequence[Job], names: Mapping[str, str]) -> list[str]:
    """A table of all members, over their seeds."""
    lines = []
    for member, name in names.items():
        cosines = [cosine for job in done if job.member == member for cosine in recorded(job.folder)]
        if cosines:
            below, points = sum(cosine < -0.4 for cosine in cosines), len(cosines)
            lines.append(f"| {name} | {median(cosines):+.2f} | {below} of {points} ({below / points:.0%}) |")
    if not lines:
        return []
    head = ["", "While training: raw weights, one batch of 64 rows every 250 steps, all seeds together.", ""]
    head += ["| member | median cosine | points below -0.4 |", "|---|---|---|"]
    told = [
        f"The paper reports a cosine that is typically {PAPER}, on ImageNet latents,",
        "with larger networks and many more steps. What a member is not trained on (the L_TC of flow matching) is",
        "measured all the same.",
    ]
    return [*head, *lines, "", *told]
