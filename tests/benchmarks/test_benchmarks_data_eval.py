"""The benchmarks of the data, of an evaluation and of the start run, at tiny size, and their figures fit together."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import bench_data
import bench_eval
import bench_sources
import bench_start
import pytest
import random_networks
import torch
from packed_forms import pictures, write_folder
from torch.utils.flop_counter import FlopCounterMode

from alphaflow_cli.files import sha256_of

HEAD = {"benchmark", "date", "command", "hardware", "versions", "commit", "dirty"}
TINY = ["parts", "--size", "tiny", "--autoencoder", "tiny", "--metrics", "fd-tiny", "--images", "8", "--device", "cpu"]
PARTS = [
    "labels",
    "network",
    "decoder",
    "features tiny",
    "files and waiting",
    "moments",
    "content",
    "distances",
]
STORE = ["--gigabytes", "0.003", "--batch", "64", "--steps", "2", "--device", "cpu"]


def run(capsys, main, words):
    main(words)
    (line,) = [json.loads(each) for each in capsys.readouterr().out.splitlines()]
    assert set(line) >= HEAD
    return line


def from_elsewhere(script, words, folder):
    """A new process, in another folder, without this one's import path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, script.__file__, *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def is_ordered(told):
    return 0 < told["min"] <= told["median"] <= told["max"]


def test_the_benchmark_of_the_forms_sees_the_same_pictures_in_all_of_them(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_sources, "find_spec", lambda name: None)  # the others' libraries are not ours to test
    rows = pictures(40)
    write_folder(tmp_path / "set", rows)
    taken = bench_sources.read_rows(tmp_path / "set", 20)
    assert len(taken) == 20
    for form, write in bench_sources.FORMS.items():
        write(tmp_path / form, taken)
    (line,) = bench_sources.measure(tmp_path, 1)
    assert set(line) == set(bench_sources.FORMS)
    assert all(speed.wall > 0 and speed.cpu > 0 for speed in line.values())


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return random_networks.random_inception(tmp_path_factory.mktemp("weights") / "inception.pth")


@pytest.fixture
def bench(tmp_path):
    """Two batches of 64 at a time, of a store that is not there."""
    options = bench_data.argparse.Namespace(batch=64, steps=2, device="cpu")
    return bench_data.Bench(tmp_path, 100, options)


# --- data ---


def test_the_data_benchmark_tells_every_variant_cold_and_warm(capsys, tmp_path):
    line = run(capsys, bench_data.main, [*STORE, "--folder", str(tmp_path), "--rounds", "2"])
    wall, cpu, cached = (line[name] for name in ("samples_per_second", "samples_per_cpu_second", "cached_before"))
    each = ("sequential read", "batches", "batches, one ahead")
    cold, warm = [f"{name}, cold" for name in each], [f"{name}, warm" for name in each]
    others = ["open with checksums, warm", "gather alone, warm", "resident"]
    assert list(wall) == list(cpu) == list(cached) == sorted(cold + warm + others)
    assert all(is_ordered(told) for told in (*wall.values(), *cpu.values()))
    assert all(cached[name]["min"] > 0.9 for name in [*warm, *others])
    assert wall["gather alone, warm"]["max"] > wall["batches, warm"]["min"]  # it is a part of a batch
    for name in ("sequential read, warm", "gather alone, warm"):  # one thread: no more CPU time than time
        assert cpu[name]["median"] > 0.95 * wall[name]["median"]
    assert line["store"]["samples"] == 182
    assert 1.0 < line["store"]["bytes"] / (182 * 16_400) < 1.05  # headers
    assert set(line["load"]) == {"before", "after"}
    if can_drop(tmp_path):  # in the second kept round, too: nothing may still have the shards mapped
        assert all(cached[name]["max"] < 0.2 for name in cold)


def can_drop(folder):
    """Whether this file system lets go of pages: one in memory cannot."""
    (folder / "train-probe.safetensors").write_bytes(bytes(1 << 16))
    bench_data.drop(folder)
    return bench_data.cached_share([folder / "train-probe.safetensors"]) == 0.0


def test_pages_that_were_read_are_in_the_cache(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(bytes(3 << 16))
    assert file.read_bytes() == bytes(3 << 16)
    assert bench_data.cached_share([file]) == 1.0
    with file.open("r+b") as handle:
        handle.truncate(4 << 20)  # pages that nobody has touched
    assert bench_data.cached_share([file]) < 0.5


def test_a_speed_is_samples_per_second_and_sleep_costs_no_cpu_time(bench, monkeypatch):
    monkeypatch.setattr(bench_data, "cached_share", lambda files: 0.5)
    steps = []
    found = bench.over_steps(lambda step: (steps.append(step), time.sleep(0.05)), 7)
    assert steps == [7, 8]
    assert 0.2 * 64 / 0.05 < found.wall <= 64 / 0.05
    assert found.cpu > 5 * found.wall
    assert found.cached == 0.5


def test_a_gpu_is_waited_for_before_each_look_at_the_clock(bench, monkeypatch):
    seen, bench.device = [], torch.device("cuda")
    monkeypatch.setattr(bench_data, "cached_share", lambda files: 1.0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: seen.append("wait"))
    for name in ("perf_counter", "process_time"):
        read = getattr(time, name)
        monkeypatch.setattr(bench_data.time, name, lambda name=name, read=read: (seen.append(name), read())[1])
    bench.speed(lambda: seen.append("work"), 1)
    assert seen == ["wait", "perf_counter", "process_time", "work", "wait", "perf_counter", "process_time"]


def test_the_groups_of_the_data_benchmark_rotate_and_round_zero_is_dropped(bench):
    seen = []
    bench.groups = [lambda name=name: seen.append(name) or {name: len(seen)} for name in "abc"]
    assert bench.rounds(2) == [{"b": 4, "c": 5, "a": 6}, {"c": 7, "a": 8, "b": 9}]
    assert "".join(seen) == "abcbcacab"


# --- evaluation ---


def check_parts(line, images):
    seconds = {part: spent for part, spent in line["seconds"].items() if part != "total"}
    total = line["seconds"]["total"]
    assert all(spent > 0 for spent in seconds.values()), seconds
    assert 0.9 * total < sum(seconds.values()) <= total
    assert line["shares"] == pytest.approx({part: spent / total for part, spent in seconds.items()})
    assert line["images_per_second"] * total == pytest.approx(images)
    assert all(math.isfinite(value) for value in line["distances"].values())
    return seconds


def test_the_parts_of_an_evaluation_add_up_to_its_time(capsys):
    line = run(capsys, bench_eval.main, [*TINY, "--chunk", "4", "--warm-up", "3", "--decoder", "bf16"])
    assert list(check_parts(line, 8)) == PARTS
    assert (line["images"], line["nfe"], line["image_size"], line["warm_up"]) == (8, 1, 64, 3)
    assert line["precision"] == "fp32 network, bf16 decoder"
    assert set(line["seconds_before"]) == {"load", "warm-up"}


def test_neither_chunk_nor_warm_up_changes_what_an_evaluation_measures(capsys):
    one = run(capsys, bench_eval.main, [*TINY, "--chunk", "8", "--warm-up", "8"])  # as many pictures: nothing is reused
    other = run(capsys, bench_eval.main, [*TINY, "--chunk", "3", "--warm-up", "0", "--batch", "2"])
    assert check_parts(one, 8)["network"] > 1e-3
    assert check_parts(other, 8)["network"] > 1e-3
    assert one["distances"] == pytest.approx(other["distances"], rel=1e-6)
    assert list(one["distances"]) == ["FD-tiny-8"]
    assert list(other["seconds_before"]) == ["load"]


def test_more_evaluations_per_picture_cost_more_of_the_network_alone(capsys):
    words = [*TINY, "--image-size", "32", "--images", "32", "--chunk", "32", "--warm-up", "32", "--nfe"]
    one, eight = (run(capsys, bench_eval.main, [*words, nfe]) for nfe in ("1", "8"))
    assert (one["image_size"], one["sampler"]) == (32, "trajectory on 1, 0")
    growth = {part: eight["seconds"][part] / one["seconds"][part] for part in ("network", "decoder")}
    assert growth["network"] > 2
    assert growth["network"] > 1.5 * growth["decoder"]


def test_the_random_autoencoder_has_the_published_size():
    with torch.device("meta"), FlopCounterMode(display=False) as flops:
        model = random_networks.build_sd_vae()
        model.decode(torch.empty(1, 4, 32, 32))
    assert sum(weight.numel() for weight in model.parameters()) == 83_653_863
    assert flops.get_total_flops() / 1e9 == pytest.approx(622, abs=1)  # docs/speed.md


def test_our_features_are_torch_fidelitys_and_both_are_timed(weights):
    words = ["features", weights.name, "--pictures", "4", "--blocks", "2", "--batch", "2", "--device", "cpu"]
    done = from_elsewhere(bench_eval, words, weights.parent)
    assert done.returncode == 0, done.stderr
    (line,) = [json.loads(each) for each in done.stdout.splitlines()]
    assert set(line) >= HEAD
    assert line["command"] == f"python benchmarks/bench_eval.py {' '.join(words)}"
    seconds, over = line["seconds_per_1000"], line["ours_over"]["torch-fidelity"]
    assert list(line["ours_over"]) == ["torch-fidelity"]
    assert all(is_ordered(told) for told in (over, *seconds.values()))
    ours, theirs = seconds["ours"], seconds["torch-fidelity"]
    assert ours["min"] / theirs["max"] <= over["min"] * (1 + 1e-9)  # equal where one block has both
    assert over["max"] <= ours["max"] / theirs["min"] * (1 + 1e-9)
    assert seconds["fd_haar192"]["median"] < 0.1 * ours["median"]
    assert 0 < line["largest_gap_over_mean_feature"] < 1e-3
    assert (line["pictures"], line["blocks"], line["clock"]) == (4, 2, "CPU")
    assert line["weights_sha256"] == sha256_of(weights)


def test_a_gap_is_told_in_units_of_the_mean_feature():
    theirs = torch.tensor([[1.0, 3.0]])
    assert bench_eval.gap(theirs, theirs) == 0.0
    assert bench_eval.gap(theirs + torch.tensor([[0.0, 0.5]]), theirs) == 0.25


@pytest.mark.parametrize(
    "words", [[], ["features"], ["features", "w.pth", "--pictures", "4", "--blocks", "5"], ["parts", "--size", "huge"]]
)
def test_a_wrong_call_of_the_evaluation_benchmark_ends_with_two(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench_eval.main(words)
    assert stopped.value.code == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.slow
def test_the_parts_of_an_evaluation_by_inception(capsys):
    words = [*TINY, "--metrics", "fid", "--images", "4", "--chunk", "4", "--warm-up", "0"]
    line = run(capsys, bench_eval.main, words)
    assert "features inception" in check_parts(line, 4)
    (name,) = line["distances"]
    assert name.startswith("FD(weights ")  # random: not to be called FID


# --- start ---


def test_the_start_benchmark_runs_each_command_and_demands_its_exit_code(capsys):
    line = run(capsys, bench_start.main, ["--rounds", "1"])
    found = line["seconds"]
    assert list(found) == list(bench_start.commands(Path("broken.yaml")))
    assert all(0 < told["best"] <= told["median"] for told in found.values())
    assert found["python"]["best"] < found["alphaflow --help"]["best"] < found["import torch"]["best"]
    with pytest.raises(AssertionError):
        bench_start.seconds([sys.executable, "-c", "raise SystemExit(3)"], 0)
