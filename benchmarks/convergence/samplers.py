"""Two steps by consistency instead of along the trajectory: does it change the order of the newer members?

    python benchmarks/convergence/samplers.py OUT --device cpu

OUT is the folder of `run.py` (its --out), with the runs. The table goes to `samplers.md` beside the pages, its figures
run by run to `samplers.jsonl`. It is a look beside the protocol: what is claimed elsewhere is claimed of the
trajectory.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from cnn_ruler import Ruler, open_ruler  # noqa: E402
from members import MEMBERS, NEWER, SEEDS, STEPS, Job, Line  # noqa: E402
from slots import read_lines, write  # noqa: E402
from table import RULERS, factor, runs_of, scores, spread  # noqa: E402

from alphaflow_cli.sample.generator import open_generator, spans_of  # noqa: E402
from alphaflow_cli.sample.walk import draw_labels, plan_walk  # noqa: E402

TIMES = (1.0, 0.5, 0.0)
COLUMNS = (
    "member", "seeds", "FD-tiny, trajectory", "consistency", "FD-cnn, trajectory", "consistency",
    "FD-tiny × its trajectory", "× MeanFlow .25's", "FD-cnn × its trajectory", "× MeanFlow .25's",
)  # fmt: skip
PART = 1_000  # pictures drawn at a time
HEAD = """# Two steps by consistency

Written by `samplers.py`; do not edit. The runs, the seeds and the rulers are those of RESULTS.md beside it:
{images:,} pictures at 2 NFE, times 1, .5, 0 (run by run: samplers.jsonl). The last columns have the factor of
consistency steps against the trajectory of the same runs, and against that of MeanFlow .25, over common seeds.

    python benchmarks/convergence/samplers.py OUT --device {device}

"""


def measured(out: Path, name: str, ruler: Ruler, device: torch.device, images: int) -> dict[str, float]:
    """Both rulers' figures of a run by two consistency steps; what was measured before is read."""
    kept = out / "consistency" / f"{name}-{images}.json"
    if not kept.is_file():
        generator = open_generator(str(out / "runs" / name), device=device)
        seeds = list(range(images))
        labels = draw_labels(seeds, generator.recipe.data.classes, "random")
        walk = plan_walk(generator.recipe, nfe=1, kind="consistency", times=TIMES)
        drawn = generator.stream(seeds, labels, walk, spans_of(images, PART))
        pictures = torch.cat([part.images for part in drawn if part.images is not None])
        kept.parent.mkdir(exist_ok=True)
        write(kept, json.dumps(ruler.scores(pictures, torch.tensor(labels, device=device))).encode())
    figures: dict[str, float] = json.loads(kept.read_text(encoding="utf-8"))
    return figures


def row(member: str, runs: dict[int, Line], found: dict[int, dict[str, float]], base: dict[int, Line]) -> str:
    """A line of the table."""
    cells, against = [MEMBERS[member].label, str(len(found))], []
    for ruler in RULERS:
        now = {seed: values[ruler] for seed, values in found.items()}
        before = scores(runs, ruler, 2)
        cells += [spread(before.values()), spread(now.values())]
        against += [str(factor(now, before) or ""), str(factor(now, scores(base, ruler, 2)) or "")]
    return f"| {' | '.join([*cells, *against])} |\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="of run.py, with the runs")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--images", type=int, default=5_000)
    options = parser.parse_args()
    device, out = torch.device(options.device), options.out.resolve()
    ruler, text = open_ruler(out, device), HEAD.format(images=options.images, device=options.device)
    text += f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}\n"
    lines = [line for path in sorted((out / "lines").glob("*.json")) for line in read_lines(path)]
    base, figures = runs_of(lines, "meanflow-25", STEPS, seeds=SEEDS), ""
    for member in NEWER:
        runs = runs_of(lines, member, STEPS, seeds=SEEDS)
        names = {seed: Job("", member, STEPS, seed).name for seed in runs}
        found = {seed: measured(out, name, ruler, device, options.images) for seed, name in names.items()}
        text += row(member, runs, found, base) if found else ""
        for seed, scored in found.items():
            figures += json.dumps({"run": names[seed], "images": options.images, "consistency": scored}) + "\n"
    pages = HERE if options.device == "cuda" else HERE / "cpu"
    write(pages / "newer" / "samplers.md", text.encode())
    write(pages / "newer" / "samplers.jsonl", figures.encode())


if __name__ == "__main__":
    main()
