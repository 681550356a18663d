"""The proof for a GPU runs at toy size on the CPU: every part, its lines, its page, and what is missing next time."""

import json

import gpu
import pytest
import torch
from bench_graph import DeviceOptimiser, arguments, compare
from fake_gpu import GPU, TORCH, fake_gpu
from gpu_page import page
from gpu_parts import items
from train_helpers import make_recipe

from alphaflow_cli.model.build import build_network

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
    text = (tmp_path / "toy" / "RESULTS.md").read_text()
    assert all(f"## {part}" in text for part in gpu.LIMITS)
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
    text = page(lines)
    assert "| step at α = 0 ÷ flow matching, B/2, share .25 | ≤ 1.35 | 1.46 | no |" in text
    assert "| steps/s of the quickstart | ≥ 400 | 390 | no |" in text
    assert "| 182.0 | 308.0 | 556.0 | 104.0 | 152.0 | 0.30 | 1.81 / 3.66 |" in text
    assert "- latents, pictures: not done within 180 s" in text


def test_without_a_gpu_the_command_says_so(capsys):
    with pytest.raises(SystemExit, match="2"):
        gpu.main(["--out", "x"])
    assert "there is no GPU here; --toy" in capsys.readouterr().err


def test_every_part_has_items_and_a_limit():
    assert list(items(False)) == list(items(True)) == list(gpu.LIMITS)


@pytest.mark.parametrize("alpha", [1.0, 0.0])
def test_a_step_with_its_numbers_on_the_device_leaves_the_bits_of_the_trainers(alpha):
    """Learning rate and β change from step to step; so does what a graph of it would replay."""
    found = compare(alpha, arguments(["--device", "cpu", "--batch", "4", "--steps", "8", "--guided"]))
    assert found["same_bits"], found["largest_difference"]


@pytest.mark.skipif(TORCH < (2, 11), reason="older torch asks the driver what a fake GPU can do")
def test_nothing_waits_in_what_a_graph_captures(monkeypatch, tmp_path):
    """Forward and loss: tests/train/test_host_waits.py. Here the optimiser around Adam, and the numbers before it."""
    with fake_gpu(monkeypatch) as waits:
        with torch.device(GPU):
            net = build_network(make_recipe(tmp_path))
        optimiser = DeviceOptimiser(net, make_recipe(tmp_path))
        monkeypatch.setattr(optimiser.adam, "step", lambda: None)  # one operator, which has no form without values
        waits.found.clear()
        for step in range(2):
            optimiser.set_numbers(step)
            for parameter in net.parameters():
                parameter.grad = torch.empty_like(parameter)
            optimiser.step(step)
        assert waits.found == []
        assert optimiser.rate.device == optimiser.moves.device == GPU
