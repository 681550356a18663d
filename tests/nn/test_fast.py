"""The kernels of a block compiled for a GPU: right on a GPU, right in the interpreter, and nowhere else."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import bench_kernels
import pytest
import torch
from tangent_nets import random_inputs, random_net
from workload import Size

from alphaflow_cli.model.compiling import compile_blocks
from alphaflow_cli.nn import fast

ROOT = Path(__file__).parent.parent.parent
HAS_TRITON = find_spec("triton") is not None  # it comes with torch for GPUs


def interpreted(*words):
    """The lines of the benchmark in a process of its own: Triton reads the variable when it is imported."""
    command = [sys.executable, "benchmarks/bench_kernels.py", "--device", "cpu", "--toy", "--rounds", "1", *words]
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.skipif(not HAS_TRITON, reason="Triton, which this torch came without")
def test_every_kernel_computes_what_its_plain_form_does():
    lines = interpreted("--only", "checks")
    assert {line["piece"] for line in lines} == set(bench_kernels.pieces(1))
    assert [line for line in lines if not line["right"]] == []
    assert max(max(line["errors"]) for line in lines if line["dtype"] == "torch.float32") < 1e-6


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TRITON, reason="Triton, which this torch came without")
def test_the_gradient_of_a_compiled_step_is_the_same_with_the_kernels_and_the_benchmark_runs():
    lines = interpreted()
    steps = [line for line in lines if "error_with" in line]
    assert len(steps) == 2
    assert all(step["error_with"] < 2 * step["error_without"] < 1e-6 for step in steps)
    assert {line["benchmark"] for line in lines} == {
        "kernels: checks",
        "kernels: gradients",
        "kernels: launches",
        "kernels: steps",
        "kernels: kernels",
    }


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_on_a_cpu_a_compiled_block_has_no_kernel_of_ours(monkeypatch):
    monkeypatch.setattr(fast, "compute", lambda *given: pytest.fail("the kernels' way"))
    net, (z, t, r, y, v) = random_net(torch.float32), random_inputs(2, torch.float32)
    compile_blocks(net, "eager")
    net(z, t, r, y, tangent=v, first=2)


@pytest.mark.gpu
def test_on_a_gpu_every_kernel_computes_what_its_plain_form_does():
    for size in (Size(128, 1, 2, latent=16), Size(144, 1, 2, latent=16), Size(96, 1, 4, latent=10)):
        for piece, dtype, errors in bench_kernels.check_pieces(size, 3, "cuda"):
            assert max(errors) < bench_kernels.BOUNDS[dtype], (piece, dtype, size, errors)


@pytest.mark.gpu
def test_on_a_gpu_the_gradient_of_a_compiled_step_is_the_same_with_the_kernels():
    for title, plain, own in bench_kernels.check_steps(Size(128, 2, 2, latent=16), 4, "cuda", "inductor"):
        assert own < 1.2 * plain + 1e-6, (title, plain, own)


@pytest.mark.gpu
def test_on_a_gpu_equal_steps_have_equal_bits():
    size = Size(128, 2, 2, latent=16)
    first, second = (bench_kernels.gradient(size, 4, 0.0, "cuda", "inductor", bf16=True) for _ in range(2))
    assert torch.equal(first, second)
