"""What the runs say of the conflict: at their last checkpoint by `alphaflow analyze`, and along training."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Protocol

PAPER = "below -0.4 during more than 95% of training"  # arXiv:2510.20771, typically


class Job(Protocol):
    """A run of the comparison."""

    @property
    def member(self) -> str: ...

    @property
    def folder(self) -> Path: ...


def conflict_lines(conflicts: Mapping[str, dict[str, Any]], names: Mapping[str, str]) -> list[str]:
    """The last checkpoint of each run that was analyzed."""
    lines = []
    for member, found in conflicts.items():
        c, share = found["cosines"]["tfm.tc"], found["share_below_-0.4"]
        size = f"{found['batches']} batches of {found['rows_per_batch']} rows"
        lines += [
            f"- {names[member]}: cos(∇L_TFM, ∇L_TC) is {c['p50']:+.3f} in the median, between {c['p5']:+.3f} and",
            f"  {c['p95']:+.3f} (5th and 95th percentile), and below -0.4 in {share:.0%} of {size}",
            f"  ({found['weights']} weights of step {found['step']}).",
        ]
    return lines


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
