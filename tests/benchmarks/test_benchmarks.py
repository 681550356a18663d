"""The benchmarks run, at tiny size, and say what a reader needs to believe them."""

import json

import bench_decoder
import bench_export
import bench_scaling
import bench_step
import pytest
import torch
from small_models import pixel_checkpoint
from tiny_autoencoders import tiny_kl

from alphaflow_cli.core.pixels import from_uint8, to_uint8
from alphaflow_cli.evaluate.pictures import open_pictures
from alphaflow_cli.nn.autoencoder import load_autoencoder


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


def test_the_decoder_benchmark_compares_both_precisions_of_one_decoder(capsys):
    words = ["glyphs:60", "--images", "24", "--steps", "2", "--rounds", "2", "--device", "cpu"]
    bench_decoder.main(words)
    (line,) = lines_of(capsys)
    assert (line["images"], line["others"], line["trained_steps"]) == (24, 36, 2)
    (found,) = line["distances"].values()
    assert 0 < found["to_fp32"]["bf16"] < 0.01 * found["to_other_pictures"]["fp32"]
    assert found["to_other_pictures"]["pictures"] < found["to_other_pictures"]["fp32"]
    assert (
        0
        < line["from_fp32"]["bf16"]["bytes_that_differ"]
        < 0.9
        < line["from_the_pictures"]["fp32"]["bytes_that_differ"]
    )
    assert 0 < line["fp32_over"]["bf16"]["min"] <= line["fp32_over"]["bf16"]["median"]
    bench_decoder.main(words)
    (again,) = lines_of(capsys)
    assert again["autoencoder"] == line["autoencoder"]
    assert (again["distances"], again["from_fp32"]) == (line["distances"], line["from_fp32"])


def test_the_decoder_benchmark_takes_an_autoencoder_and_does_without_weights(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("ALPHAFLOW_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    tiny_kl(tmp_path / "tiny-kl")
    words = ["glyphs:40", "--images", "20", "--rounds", "1", "--device", "cpu", "--fid"]
    bench_decoder.main([*words, "--autoencoder", str(tmp_path / "tiny-kl")])
    said = capsys.readouterr()
    (line,) = [json.loads(each) for each in said.out.splitlines()]
    assert line["autoencoder"]["id"] == "tiny-kl"
    assert list(line["distances"]) == ["FD-tiny-20"]
    assert "without FID" in said.err
    model = load_autoencoder(str(tmp_path / "tiny-kl"), device=torch.device("cpu"))
    pictures = open_pictures("glyphs:40", size=32, limit=None).images(0, 40)[::2]
    back = to_uint8(model.decode(model.encode(from_uint8(pictures))[0]), "round")
    told = line["from_the_pictures"]["fp32"]
    assert told["psnr"] == pytest.approx(bench_decoder.difference(back, pictures)["psnr"], rel=1e-4)


def test_a_difference_of_bytes_is_told_as_share_largest_and_psnr():
    one = torch.zeros((1, 3, 2, 2), dtype=torch.uint8)
    other = one.clone()
    other[0, 0, 0, 0] = 255
    told = bench_decoder.difference(one, other)
    assert told["bytes_that_differ"] == pytest.approx(1 / 12)
    assert told["largest_difference"] == 255
    assert told["psnr"] == pytest.approx(10.79, abs=0.01)  # 10 log10(12)
    assert bench_decoder.difference(one, one)["psnr"] is None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # of dynamo itself
def test_the_step_benchmark_has_compiled_columns(capsys):
    bench_step.main(["--size", "tiny", "--batch", "4", "--rounds", "1", "--device", "cpu", "--compile"])
    (line,) = lines_of(capsys)
    assert set(line["speed"]) == {"fm", "ours", "reference", "fm compiled", "ours compiled"}


@pytest.mark.slow
def test_the_export_benchmark_prints_bytes_and_times_of_every_form(tmp_path, capsys):
    bench_export.main([str(pixel_checkpoint(tmp_path / "m.safetensors")), "--rounds", "2"])
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(line["bytes"]) == {"checkpoint", "diffusers", "onnx", "onnx fp16", "torch"}
    assert line["bytes"]["onnx fp16"] < line["bytes"]["onnx"]
    for times in line["milliseconds_per_picture"].values():
        assert set(times) == {"sample", "onnx", "onnx fp16", "torch", "diffusers"}
        assert min(times.values()) > 0
