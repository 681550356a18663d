"""Everything that a GPU has to prove, in one command: what is right, how fast each part is, what was learnt.

    python benchmarks/gpu.py --out gpu                          # 25 minutes of what is missing, most wanted first
    python benchmarks/gpu.py --out gpu --only step --only truth
    python benchmarks/gpu.py --out gpu --pictures cifar10/train # a real training on CIFAR-10 instead of glyphs
    python benchmarks/gpu.py --out toy --toy                    # the same at toy size, on a CPU in two minutes

The parts, in the order of their worth: truth (`pytest -m gpu`), step (ours beside flow matching and the published way),
graphs (the quickstart's step as one CUDA graph), training (the quickstart, then the family on the same pictures),
evaluation and latents by part, profiles. Every item is a process of its own with a limit, so one that fails ends no
other. Its line is in OUT/results.jsonl as soon as it is there, and OUT/RESULTS.md is written anew from all lines. The
next run goes on with what has no good line yet.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_page import page
from gpu_parts import items
from record import describe

LIMITS = {  # seconds of an item, by part
    "truth": 400,
    "step": 150,
    "graphs": 300,
    "training": 420,
    "evaluation": 240,
    "latents": 180,
    "profiles": 150,
}
Line = dict[str, Any]


def read_lines(path: Path) -> list[Line]:
    """The lines of earlier runs; the last one may have been cut off."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def missing(lines: list[Line], only: Sequence[str], toy: bool) -> list[tuple[str, str]]:
    """(part, item) of what has no good line yet, in order."""
    done = {(line["part"], line["item"]) for line in lines if "figures" in line}
    listed = items(toy)
    return [(part, item) for part in only or listed for item in listed[part] if (part, item) not in done]


def measure(part: str, item: str, options: argparse.Namespace, words: Sequence[str], limit: float) -> Line:
    """One item in a process of its own: its line, with the figures or with the fault."""
    began = time.monotonic()
    command = [sys.executable, __file__, *words, "--item", part, item]
    head = {"part": part, "item": item, **describe(options.device)}
    try:
        code, out = run_item(command, limit)
    except subprocess.TimeoutExpired:
        return {**head, "seconds": round(time.monotonic() - began, 1), "fault": f"not done within {limit:.0f} s"}
    seconds = round(time.monotonic() - began, 1)
    last = (out.strip().splitlines() or [""])[-1]
    if code or not last.startswith("{"):
        return {**head, "seconds": seconds, "fault": f"exit code {code}: {out[-500:]}"}
    return {**head, "seconds": seconds, "figures": json.loads(last)}


def run_item(command: Sequence[str], limit: float) -> tuple[int, str]:
    """Its exit code and stdout. What it started ends with it: a run left behind would slow the next items down."""
    item = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        out, _ = item.communicate(timeout=limit)
    except BaseException:
        os.killpg(item.pid, signal.SIGKILL)
        item.communicate()
        raise
    return item.returncode, out


def measure_all(options: argparse.Namespace, words: Sequence[str]) -> int:
    """Item by item until all are measured or the time is over; the number of faults."""
    options.out.mkdir(parents=True, exist_ok=True)
    path, until, faults = options.out / "results.jsonl", time.monotonic() + 60 * options.minutes, 0
    for part, item in missing(read_lines(path), options.only, options.toy):
        left = until - time.monotonic()
        if left < 10:
            print(f"{part}, {item}: no time left; run the same command again", file=sys.stderr, flush=True)
            break
        print(f"{part}, {item} …", file=sys.stderr, flush=True)
        line = measure(part, item, options, words, left if options.toy else min(left, LIMITS[part]))
        faults += "fault" in line
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        (options.out / "RESULTS.md").write_text(page(read_lines(path)), encoding="utf-8")
        print(f"  {line.get('fault') or 'done'} ({line['seconds']} s)", file=sys.stderr, flush=True)
    return faults


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results, and of all that is made")
    parser.add_argument("--minutes", type=float, default=25.0)
    parser.add_argument("--only", action="append", choices=sorted(LIMITS), default=[], metavar="PART")
    parser.add_argument("--pictures", default="", help="the training's pictures, as prep-latents takes them")
    parser.add_argument("--steps", type=int, default=3000, help="of each member of the family")
    parser.add_argument("--toy", action="store_true", help="toy sizes on the CPU; the figures mean nothing")
    parser.add_argument("--item", nargs=2, metavar=("PART", "ITEM"), help="this one here, and its figures on stdout")
    options = parser.parse_args(words)
    options.device = "cpu" if options.toy else "cuda"
    options.out = options.out.resolve()
    if not options.toy and not torch.cuda.is_available():
        parser.error("there is no GPU here; --toy runs everything at toy size on the CPU")
    return options


def main(words: Sequence[str] | None = None) -> int:
    """Measure what is missing; 1 if something failed."""
    words = sys.argv[1:] if words is None else list(words)
    options = arguments(words)
    if options.item:
        part, item = options.item
        print(json.dumps(items(options.toy)[part][item](options), ensure_ascii=False), flush=True)
        return 0
    return int(measure_all(options, words) > 0)


if __name__ == "__main__":
    sys.exit(main())
