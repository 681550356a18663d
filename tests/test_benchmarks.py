"""The benchmarks of the step run, at tiny size, and say what a reader needs to believe them."""

import json

import bench_scaling
import bench_step
import pytest


def lines_of(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_the_step_benchmark_prints_one_line_with_hardware_versions_and_ratios(capsys):
    bench_step.main(["--size", "tiny", "--batch", "4", "--rounds", "2", "--device", "cpu", "--bf16", "--guided"])
    (line,) = lines_of(capsys)
    assert {"date", "hardware", "versions", "commit", "dirty", "command"} <= set(line)
    time = line["reference_over_ours"]["time"]
    assert 0 < time["min"] <= time["median"] <= time["max"]
    assert line["host_waits"]["ours"] == 0 < line["host_waits"]["reference"]
    assert line["speed"]["ours"]["images_per_second"] > 0


def test_the_order_rotates_and_round_zero_is_dropped():
    seen = []
    works = {name: lambda turn, name=name: lambda: seen.append((turn, name)) for name in "abc"}
    assert len(bench_step.paired(works, 2, "cpu")) == 2
    assert seen == [(0, "a"), (0, "b"), (0, "c"), (1, "b"), (1, "c"), (1, "a"), (2, "c"), (2, "a"), (2, "b")]


def test_a_ratio_is_the_median_of_the_rounds():
    table = [{"a": 1.0, "b": 1.0}, {"a": 6.0, "b": 2.0}, {"a": 8.0, "b": 4.0}]
    assert bench_step.ratio(table, "a", "b") == {"median": 2.0, "min": 1.0, "max": 3.0}


def test_the_table_has_every_cell():
    options = bench_step.arguments(["--all"])
    assert len(set(bench_step.cells(options))) == 18


def test_the_scaling_benchmark_draws_its_pictures(capsys, tmp_path):
    bench_scaling.main(["--axis", "depth", "--points", "1", "2", "--rounds", "1", "--plot", str(tmp_path)])
    (line,) = lines_of(capsys)
    flops = {depth: values["flops"]["alpha_zero"] for depth, values in line["points"].items()}
    assert 1.7 < flops["2"] / flops["1"] < 2.1
    assert (tmp_path / "speed-depth.svg").read_text(encoding="utf-8").startswith("<svg")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # of dynamo itself
def test_the_step_benchmark_has_compiled_columns(capsys):
    bench_step.main(["--size", "tiny", "--batch", "4", "--rounds", "1", "--device", "cpu", "--compile"])
    (line,) = lines_of(capsys)
    assert set(line["speed"]) == {"fm", "ours", "reference", "fm compiled", "ours compiled"}
