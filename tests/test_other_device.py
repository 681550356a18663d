"""Every verb on a device that is not the CPU (tests/other_device.py): tensors of both meet only where a GPU lets them.

The numbers are the CPU's own there, so that what needs no draw of the device's can be compared with it.
"""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from other_device import GPU, Elsewhere, other_device
from PIL import Image
from ruler import Small, random_inception
from snapshots import published_snapshot
from tiny_autoencoders import tiny_kl
from train_helpers import largest_difference
from workers import wants_gpu

import alphaflow_cli
from alphaflow_cli.analyze import analyze
from alphaflow_cli.cli import run
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.evaluate import measure, score
from alphaflow_cli.evaluate.networks import BUILDERS
from alphaflow_cli.runtime import precision, processes
from alphaflow_cli.sample import generator, plan
from alphaflow_cli.train import conflict, journal, loop, optimise

TINY = (
    "model.dim=32", "model.depth=1", "model.heads=2", "data.source=glyphs:100",
    "train.steps=12", "train.batch=16", "train.save_every=6", "train.log_every=4", "train.sample_every=12",
    "train.keep=2", "train.conflict_every=4", "alpha.kind=linear", "alpha.start=3", "alpha.end=8",
    "optim.warmup_steps=2", "eval.images=100", "eval.reference=glyphs:200", "guidance.omega=0.7", "guidance.kappa=0.2",
    "guidance.label_dropout=0.1", "train.graphs=false",
)  # fmt: skip

FEW = ("train.steps=6", "alpha.start=1", "alpha.end=5", "train.conflict_every=0", "train.sample_every=6")


@pytest.fixture
def device(monkeypatch):
    with other_device(monkeypatch) as found:
        yield found
    assert found.ran > 0, "nothing ran on the device"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of all three phases with grids and the probe of the conflict."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch, other_device(patch):
        assert train_run(folder) == 0
    return folder


@pytest.fixture(autouse=True)
def short(monkeypatch, tmp_path):
    """`analyze` with fewer α; everything is written here."""
    monkeypatch.setattr(analyze, "SIZE_BATCHES", 1)
    monkeypatch.setattr(conflict, "ALPHAS", (1.0, 0.1, 0.0))
    monkeypatch.chdir(tmp_path)


def train_run(folder, *sets, options=()):
    line = ["train", "quickstart", "--out", str(folder), *options]
    for value in (*TINY, *sets):
        line += ["--set", value]
    return run(line)


@pytest.mark.parametrize(
    ("marks", "wants"),
    [("", False), ("not slow and not gpu", False), ("slow", False), ("gpu", True), ("gpu and not slow", True)],
)
def test_gpus_are_hidden_from_all_tests_but_those_that_need_one(marks, wants):
    assert wants_gpu(marks) == wants
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_the_device_refuses_what_a_gpu_refuses(device):
    """And lets numbers and indices pass, as a GPU does."""
    there, here = torch.arange(6.0, device=GPU), torch.arange(6.0)
    for mixed in (
        lambda: there + here,
        lambda: torch.equal(there, here),
        lambda: torch.cat([there, here]),
        lambda: here[torch.arange(2, device="cuda")],
        lambda: there.numpy(),
        lambda: torch.randn(2, device="cuda", generator=torch.Generator()),
        lambda: torch.where(here > 2, there, 0.0),
    ):
        with pytest.raises((RuntimeError, TypeError)):
            mixed()
    assert (there + torch.tensor(1.0)).device == there[torch.arange(2)].device == GPU
    assert torch.equal(there.cpu(), here)
    assert there.to("cpu").device.type == "cpu"


def test_train_runs_all_phases_and_draws_grids(trained):
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [row["phase"] for row in rows] == ["flow", "between", "derivative"]
    assert all("conflict" in row for row in rows)
    assert list((trained / "samples").glob("*.png"))
    assert run(["report", str(trained)]) == 0


@pytest.mark.parametrize(
    "sets",
    [
        ("train.graphs=true", "loss.short_first=true", "model.velocity_head=1"),
        ("model.prediction=noise", "train.gradient_checkpointing=true", "optim.nonfinite=replace"),
        (
            "loss.velocity=network",
            "alpha.kind=constant",
            "alpha.initial=0.5",
            "ema.half_lives=[5, 50]",
            "data.normalise=scale",
            "train.precision=fp64",
        ),
        ("loss.weight=converging", "model.second_time=r", "data.flips=true", "data.posterior=mean"),
    ],
)
def test_other_recipes_train_and_sample_too(device, tmp_path, sets):
    assert train_run("run", *FEW, *sets, options=["--micro-batch", "6"]) == 0
    assert run(["sample", "run", "--seeds", "0-2", "--nfe", "2", "--weights", "raw", "--latents", "l.npy"]) == 0


def test_a_device_without_float64_trains_samples_and_is_measured(device, monkeypatch):
    """As Apple's GPUs are: what needs the width is computed on the CPU, and sums that stay there are float32."""
    wide = []
    make = Elsewhere.__new__

    def narrow(cls, value):
        wide.extend([value.shape] * (value.dtype == torch.float64))
        return make(cls, value)

    monkeypatch.setattr(Elsewhere, "__new__", staticmethod(narrow))
    for module in (generator, measure, score):
        monkeypatch.setattr(module, "exact_device", lambda device: torch.device("cpu"))
    for module in (journal, optimise, processes):
        monkeypatch.setattr(module, "exact_dtype", lambda device: torch.float32)
    torch.ones(1, dtype=torch.float64, device=GPU)
    assert wide.pop() == (1,)
    assert train_run("run", "train.conflict_every=0", "train.steps=6", "alpha.start=1", "alpha.end=4") == 0
    assert run(["sample", "run", "--seeds", "0-2", "--nfe", "2", "--sampler", "consistency", "--grid", "g.png"]) == 0
    assert run(["eval", "run", "--nfe", "1", "--metrics", "fd-tiny", "--images", "100"]) == 0
    assert wide == []


def test_apples_gpus_are_taken_for_sampling_and_train_when_asked(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert processes.choose_device(None).type == "mps"
    assert processes.choose_device(None, apple=False).type == "cpu"
    assert processes.choose_device("mps").type == "mps"
    assert precision.exact_device(torch.device("mps")).type == "cpu"
    assert precision.exact_dtype(torch.device("mps")) == torch.float32
    with pytest.raises(AlphaflowError, match="this machine has 1 GPU, and every process needs one of its own"):
        processes.processes_here(2, "mps")


def test_the_cpu_is_taken_where_it_is_named_though_there_is_a_gpu(trained, monkeypatch):
    assert run(["sample", str(trained), "--seeds", "0-2", "--latents", "here.npy"]) == 0
    with other_device(monkeypatch) as device:
        line = ["--device", "cpu", "--processes", "1"]
        assert run(["sample", str(trained), "--seeds", "0-2", "--latents", "named.npy", *line]) == 0
        assert (
            train_run(
                "run",
                "train.conflict_every=0",
                "train.steps=6",
                "alpha.start=1",
                "alpha.end=4",
                options=["--device", "cpu"],
            )
            == 0
        )
        assert device.ran == 0
    assert Path("here.npy").read_bytes() == Path("named.npy").read_bytes()


def test_a_gradient_that_is_not_finite_rolls_a_run_back(device, tmp_path, monkeypatch, capsys):
    step = loop.one_step

    def broken(run, at):
        if at == 7 and not run.retries:
            run.net.final.linear.bias.data.fill_(float("nan"))
        step(run, at)

    monkeypatch.setattr(loop, "one_step", broken)
    assert train_run("run", "optim.nonfinite=rollback", "train.conflict_every=0", "train.sample_every=0") == 0
    assert "rolled back to step 6, with other draws" in capsys.readouterr().err


@pytest.mark.parametrize("memory", [pytest.param("resident", marks=pytest.mark.slow), "streamed"])
def test_a_stopped_run_goes_on_to_the_same_weights(device, trained, tmp_path, monkeypatch, memory):
    if memory == "streamed":
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *args: (0, 0))
    step = loop.one_step

    def stopped(run, at):
        step(run, at)
        if at == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop, "one_step", stopped)
    with pytest.raises(SystemExit, match="143"):
        train_run(tmp_path / "run")
    monkeypatch.setattr(loop, "one_step", step)
    assert train_run(tmp_path / "run") == 0
    assert largest_difference(trained, tmp_path / "run") == 0


def test_train_begins_with_other_weights_and_estimates(device, trained, tmp_path, capsys):
    assert train_run(tmp_path / "run", *FEW, options=["--init-from", str(trained)]) == 0
    assert train_run(tmp_path / "none", options=["--estimate"]) == 0
    assert "together:" in capsys.readouterr().out


def test_analyze_measures_every_checkpoint_and_another_store(device, trained):
    assert run(["analyze", str(trained), "--all-checkpoints", "--batches", "1", "--batch", "8"]) == 0
    assert run(["prep-latents", "glyphs:60", "--size", "24", "--out", "other"]) == 0
    assert run(["analyze", str(trained), "--data", "other", "--batches", "1", "--batch", "8", "--out", "o"]) == 0


def test_sample_draws_the_cpus_pictures(trained, tmp_path, monkeypatch):
    line = ["sample", str(trained), "--seeds", "0-18", "--nfe", "2", "--sampler", "consistency"]
    assert run([*line, "--latents", "cpu.npy"]) == 0
    with other_device(monkeypatch):
        assert run([*line, "--latents", "gpu.npy", "--grid", "g.png", "--out", "p"]) == 0
        pictures = alphaflow_cli.load(trained).sample(2, classes=3, nfe=2)
    np.testing.assert_allclose(np.load("gpu.npy"), np.load("cpu.npy"), rtol=1e-4, atol=1e-4)
    assert pictures.tensor.device.type == "cpu"


def measured(trained, capsys, *, weights=()):
    """Name → value of every metric, of the run against 100 glyphs."""
    metrics = "fid,kid,is,pr,fd-tiny"
    line = ["reference", "glyphs:100", "--size", "24", "--metrics", "fid,fd-tiny", "-o", "r.safetensors"]
    assert run([*line, *weights]) == 0
    capsys.readouterr()
    line = ["eval", str(trained), "--nfe", "1", "--reference", "r.safetensors", "--metrics", metrics, *weights]
    assert run([*line, "--out", "evals", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["evaluations"][0]["rows"]
    assert len(rows) == 8
    return {row["name"]: row["value"] for row in rows}


def test_where_several_processes_draw_their_parent_takes_no_gpu(trained, monkeypatch):
    opened, launched = [], []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(plan, "open_generator", lambda *rest, **more: opened.append(rest))
    monkeypatch.setattr(processes, "launch", lambda line, count: launched.append((line, count)) or 0)
    line = ("sample", str(trained), "--seeds", "0-3", "--grid", "g.png")
    assert run(line) == 0
    assert (opened, launched) == ([], [(line, 2)])


def test_eval_and_reference_measure_the_cpus_numbers(trained, monkeypatch, capsys):
    monkeypatch.setitem(BUILDERS, "inception", Small)
    numbers = measured(trained, capsys)
    shutil.rmtree("evals")
    Path("r.safetensors").unlink()
    with other_device(monkeypatch) as device:
        assert measured(trained, capsys) == pytest.approx(numbers, rel=0.05, abs=0.02)
    assert device.ran > 0


@pytest.mark.slow
def test_eval_and_reference_measure_with_inception(device, trained, tmp_path, capsys):
    measured(trained, capsys, weights=["--weights", f"inception={random_inception(tmp_path / 'i.pth')}"])


def test_eval_measures_pictures(device):
    assert run(["eval", "glyphs:120", "--metrics", "fd-tiny", "--reference", "glyphs:100"]) == 0


def test_a_latent_model_is_prepared_trained_decoded_and_measured(device, tmp_path, capsys):
    tiny_kl(tmp_path / "kl")
    rng = np.random.default_rng(0)
    for name in ("ant", "bee"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for index in range(10):
            Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(f"set/{name}/{index}.png")
    assert run(["prep-latents", "set", "--size", "32", "--autoencoder", "kl", "--flips", "--out", "store"]) == 0
    sets = ("data.autoencoder=kl", "data.image_size=32", "data.channels=4", "data.latent_size=4", "data.classes=2",
            "data.flips=true", "model.patch=1", "eval.reference=glyphs:100")  # fmt: skip
    assert train_run(tmp_path / "run", *FEW, *sets, options=["--data", "store"]) == 0
    assert run(["sample", "run", "--seeds", "0-4", "--grid", "g.png", "--autoencoder", "kl"]) == 0
    assert run(["eval", "run", "--decoder", "fp32", "--autoencoder", "kl"]) == 0


def test_a_converted_checkpoint_samples_and_is_converted_back(device):
    torch.save(published_snapshot(), "theirs.pt")
    assert run(["convert", "theirs.pt", "-o", "ours.safetensors"]) == 0
    assert run(["sample", "ours.safetensors", "--seeds", "0-2", "--latents", "l.npy"]) == 0
    assert run(["convert", "ours.safetensors", "-o", "back.pt", "--to", "alphaflow"]) == 0


@pytest.mark.parametrize(
    ("broken", "line"),
    [
        ("alphaflow_cli.sample.generator.Generator.latents", "sample {run} --grid g.png --batch 7"),
        (
            "alphaflow_cli.evaluate.tiny.Tiny.features",
            "eval glyphs:100 --metrics fd-tiny --reference glyphs:200 --batch 7",
        ),
        ("alphaflow_cli.latents.encode.encode_rows", "prep-latents glyphs:20 --out store --batch 7"),
        ("alphaflow_cli.train.conflict.measure_batch", "analyze {run} --batch 7 --batches 1"),
    ],
)
def test_a_gpu_that_is_full_is_one_line_that_says_what_to_do(trained, monkeypatch, capsys, broken, line):
    def full(*args, **more):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore about it.")

    monkeypatch.setattr(broken, full)
    assert run(line.format(run=trained).split()) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == (
        "error: out of memory (CUDA out of memory. Tried to allocate 2.00 GiB.). "
        "Give a smaller --batch than 7, or use a larger GPU."
    )
