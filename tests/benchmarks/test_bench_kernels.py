"""The kernels that wait for a GPU are right in Triton's interpreter, and are nowhere but in their benchmark."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import bench_kernels
import pytest
import torch
from kernels import block
from tangent_nets import random_inputs, random_net
from workload import Size

from alphaflow_cli.model.compiling import compile_blocks

ROOT = Path(__file__).parent.parent.parent
needs_triton = pytest.mark.skipif(not find_spec("triton"), reason="Triton, which torch for GPUs comes with")


def interpreted(*words):
    """The lines of the benchmark in a process of its own: Triton reads the variable when it is imported."""
    command = [sys.executable, "benchmarks/bench_kernels.py", "--device", "cpu", "--toy", "--rounds", "1", *words]
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@needs_triton
def test_every_kernel_computes_what_its_plain_form_does():
    lines = interpreted("--only", "checks")
    assert {line["piece"] for line in lines} == set(bench_kernels.pieces(1))
    assert [line for line in lines if not line["right"]] == []
    assert max(max(line["errors"]) for line in lines if line["dtype"] == "torch.float32") < 1e-6


@pytest.mark.slow
@needs_triton
def test_the_gradient_of_a_compiled_step_is_the_same_with_them_and_every_part_runs():
    lines = interpreted("--only", "gradients", "launches", "steps", "kernels")
    gradients = [line for line in lines if "error_with" in line]
    assert len(gradients) == 2
    assert all(line["error_with"] < 2 * line["error_without"] < 1e-6 for line in gradients)
    parts = {line["benchmark"].split(": ")[1] for line in lines}
    assert parts == {"gradients", "launches", "steps", "kernels"}


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_on_a_cpu_a_compiled_block_does_not_take_them(monkeypatch):
    monkeypatch.setattr(block.Block, "compute", block.Block.compute)  # put back afterwards
    monkeypatch.setattr(block, "compute", lambda *given: pytest.fail("the kernels' way"))
    block.install()
    net, (z, t, r, y, v) = random_net(torch.float32), random_inputs(2, torch.float32)
    compile_blocks(net, "eager")
    net(z, t, r, y, tangent=v, first=2)


@pytest.mark.gpu
def test_on_a_gpu_every_kernel_computes_what_its_plain_form_does():
    for size in (Size(128, 1, 2, latent=16), Size(144, 1, 2, latent=16), Size(96, 1, 4, latent=10)):
        for piece, dtype, errors in bench_kernels.check_pieces(size, 3, "cuda"):
            assert max(errors) < bench_kernels.BOUNDS[dtype], (piece, dtype, size, errors)


@pytest.mark.gpu
def test_on_a_gpu_the_gradient_of_a_compiled_step_is_the_same_with_them():
    for title, plain, own in bench_kernels.check_steps(Size(128, 2, 2, latent=16), 4, "cuda", "inductor"):
        assert own < 1.2 * plain + 1e-6, (title, plain, own)


@pytest.mark.gpu
def test_on_a_gpu_equal_steps_have_equal_bits():
    size = Size(128, 2, 2, latent=16)
    with bench_kernels.using(bench_kernels.EVERY):
        first, second = (bench_kernels.gradient(size, 4, 0.0, "cuda", "inductor", bf16=True) for _ in range(2))
    assert torch.equal(first, second)
