"""The proof for a GPU runs at toy size on the CPU: every part, its lines, its page, and what is missing next time."""

import json
import subprocess
import time
from pathlib import Path

import gpu
import gpu_parts
import latents_parts
import pytest
from bench_graph import arguments, compare
from gpu_page import page, text
from gpu_parts import items

VERSIONS = {"torch": "2", "alphaflow": "1"}
HEAD = {"date": "2026-01-01", "hardware": "a card", "versions": VERSIONS, "commit": "c" * 40, "dirty": False}


@pytest.mark.slow
def test_every_part_runs_at_toy_size_and_the_next_run_has_nothing_left(tmp_path, capsys):
    words = ["--out", str(tmp_path / "toy"), "--toy", "--minutes", "20"]
    code = gpu.main(words)
    lines = [json.loads(text) for text in (tmp_path / "toy" / "results.jsonl").read_text().splitlines()]
    assert [line.get("fault") for line in lines] == [None] * len(lines)
    assert code == 0
    assert {line["part"] for line in lines} == set(gpu.LIMITS)
    assert all(line["figures"].get("failed", 0) == 0 for line in lines)
    shown = (tmp_path / "toy" / "RESULTS.md").read_text()
    assert all(f"## {part}" in shown for part in gpu.LIMITS)
    capsys.readouterr()
    assert gpu.main(words) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_an_item_that_fails_is_a_line(tmp_path):
    words = ["--out", str(tmp_path), "--toy"]
    line = gpu.measure("step", "no such item", gpu.arguments(words), words, 300)
    assert line["fault"].startswith("exit code 1")


def test_what_took_too_long_is_a_line_and_is_tried_again(tmp_path):
    words = ["--out", str(tmp_path), "--toy"]
    late = gpu.measure("step", "tiny α=1", gpu.arguments(words), words, 0.1)
    assert late["fault"] == "not done within 0 s"
    todo = gpu.missing([late], [], True)
    assert ("step", "tiny α=1") in todo
    assert todo[0][0] == "truth"
    done = {**HEAD, "part": "step", "item": "tiny α=1", "figures": {}}
    assert ("step", "tiny α=1") not in gpu.missing([late, done], [], True)
    assert {part for part, _ in gpu.missing([], ["latents"], False)} == {"latents"}


def test_what_an_item_started_ends_with_it_and_does_not_compute_beside_the_next(tmp_path):
    number = tmp_path / "number"
    with pytest.raises(subprocess.TimeoutExpired):
        gpu.run_item(["sh", "-c", f"sleep 30 & echo $! > {number}; wait"], 1.5)
    state, until = Path(f"/proc/{number.read_text().strip()}/stat"), time.monotonic() + 5
    while state.exists() and state.read_text().split()[2] != "Z" and time.monotonic() < until:
        time.sleep(0.05)
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_the_pictures_of_an_attempt_that_broke_off_are_taken_again(tmp_path, monkeypatch):
    monkeypatch.setattr(latents_parts, "DIFFERENT", 2)
    for _ in range(2):
        latents_parts.save_pictures(tmp_path, 5, 16)
    assert len(list(tmp_path.iterdir())) == 5


def test_the_rest_of_a_run_that_broke_off_is_not_given_as_its_whole_time(tmp_path, monkeypatch):
    row = {"step": 100, "phase": "flow", "seconds_per_step": 0.01}

    def write(*words):
        (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")

    monkeypatch.setattr(gpu_parts, "alphaflow", write)
    first, rest = (gpu_parts.train("quickstart", tmp_path) for _ in range(2))
    assert first.keys() == {"seconds", "steps_per_second"}
    assert rest == {"steps_per_second": {"flow": 100.0}}


def test_the_page_holds_the_goals_beside_the_figures():
    names = ("fm", "ours", "reference", "fm compiled", "ours compiled")
    ms = dict(zip(names, (182.0, 308.0, 556.0, 104.0, 152.0), strict=True))
    peaks, speeds = dict.fromkeys(names, 31.3), {"flow": 500.0, "derivative": 390.0}
    figures = {"batch": 256, "share": 0.25, "ms": ms, "mfu": {"ours compiled": 0.3}, "peak_gb": peaks}
    lines = [
        {**HEAD, "part": "step", "item": "B/2 α=0", "figures": figures},
        {**HEAD, "part": "training", "item": "quickstart", "figures": {"steps_per_second": speeds}},
        {**HEAD, "part": "latents", "item": "pictures", "fault": "not done within 180 s"},
    ]
    shown = page(lines)
    assert "| step at α = 0 ÷ flow matching, B/2, share .25 | ≤ 1.35 | 1.46 | no |" in shown
    assert "| steps/s of the quickstart | ≥ 400 | 390 | no |" in shown
    assert "| 182.0 | 308.0 | 556.0 | 104.0 | 152.0 | 0.30 | 1.81 / 3.66 |" in shown
    assert "- latents, pictures: not done within 180 s" in shown


def test_nested_figures_stand_in_brackets():
    assert text({"seconds_before": {"load": 27.965, "warm-up": 0.5}, "batch": 256}) == (
        "seconds before (load: 27.96; warm-up: 0.5); batch: 256"
    )


def test_without_a_gpu_the_command_says_so(capsys):
    with pytest.raises(SystemExit, match="2"):
        gpu.main(["--out", "x"])
    assert "there is no GPU here; --toy" in capsys.readouterr().err


def test_every_part_has_items_and_a_limit():
    assert list(items(False)) == list(items(True)) == list(gpu.LIMITS)


def test_the_graph_benchmark_compares_the_trainers_three_forms_of_a_step():
    words = ["--device", "cpu", "--steps", "5", "--set", "train.batch=4", "--set", "model.depth=1"]
    found = compare("derivative", arguments(words))
    assert (found["same_bits"], found["largest_difference"], found["from_plain"]) == (True, 0.0, 0.0)
    assert min(found[f"ms_{form}"] for form in ("graph", "launched", "plain")) > 0
