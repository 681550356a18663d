"""Nothing in the trainer's step makes the host wait for a GPU. It runs on a simulated one (helpers/fake_gpu.py).

One process, float32, a store in the GPU's memory. The backward pass is the library's own; test_cost.py counts its
operators on the CPU.
"""

import contextlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fake_gpu import GPU, TORCH, fake_gpu
from latent_stores import random_moments, write_store
from train_helpers import MEMBERS, make_recipe

from alphaflow_cli.data.batches import LatentStream, to_device
from alphaflow_cli.model.build import build_network
from alphaflow_cli.train.journal import Sums
from alphaflow_cli.train.loop import gradients
from alphaflow_cli.train.optimise import Optimiser
from alphaflow_cli.train.parallel import Split
from alphaflow_cli.train.step import Objective

pytestmark = pytest.mark.skipif(TORCH < (2, 11), reason="older torch asks the driver what a fake GPU can do")
STREAM = {"posterior": "sample", "normalise": "position", "scale": 1.0, "shift": 0.0, "stats_images": 0}


@pytest.fixture
def gpu(monkeypatch):
    with fake_gpu(monkeypatch) as waits:
        yield waits


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    tensors = {"moments": random_moments(48), "moments_flip": random_moments(48, seed=1)}
    return write_store(tmp_path_factory.mktemp("latents") / "s", tensors, np.arange(48) % 10, flips=True)


@pytest.fixture(scope="module")
def pixels(tmp_path_factory):
    tensors = {"pixels": np.zeros((48, 3, 8, 8), np.uint8)}
    tensors["pixels"][::2] = 255
    return write_store(tmp_path_factory.mktemp("pixels") / "s", tensors, np.arange(48) % 10, kind="pixels", flips=True)


def resident(path, **changes):
    return LatentStream(path, batch=16, seed=0, device=GPU, resident=True, **{**STREAM, "flips": True, **changes})


def run_of(recipe, store):
    """A run of one process in two micro-batches."""
    with torch.device(GPU):
        net = build_network(recipe)
    accelerator = SimpleNamespace(no_sync=lambda wrapped: contextlib.nullcontext())
    return SimpleNamespace(
        recipe=recipe, net=net, wrapped=net, objective=Objective.of(recipe), seed=0,
        stream=resident(store, flips=False),
        world=SimpleNamespace(device=GPU, rank=0, size=1, accelerator=accelerator), split=Split(16, 1, 2),
        sums=Sums(GPU), dtype=torch.float32, equal_share_at=lambda step: 0.25, compiled=False,
    )  # fmt: skip


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(("alpha", "velocity"), [(1.0, "data"), (0.4, "data"), (0.4, "network"), (0.0, "data")])
def test_a_step_waits_for_nothing(gpu, store, tmp_path, monkeypatch, alpha, guided, compiled, velocity):
    """As in a compiled run means that guidance asks about every row."""
    mix = () if guided else ("guidance.omega=1", "guidance.kappa=0")
    run = run_of(make_recipe(tmp_path, *mix), store)
    run.compiled = compiled
    run.objective = replace(run.objective, loss=replace(run.objective.loss, velocity=velocity))
    run.alpha_at, losses = lambda step: alpha, []
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: losses.append(loss))
    gpu.found.clear()  # what loading the store waited for
    before = gpu.on_device
    gradients(run, 3)
    assert gpu.found == []
    assert [loss.device for loss in losses] == [GPU, GPU]
    assert all(loss.requires_grad for loss in losses)
    assert gpu.on_device - before > 200


@pytest.mark.parametrize(("member", "alpha"), [
    ("soflow", 0.4), ("boundary", 0.4), ("boundary", 0.0), ("imf", 1.0), ("imf", 0.4), ("imf", 0.0), ("scale", 0.0),
])  # fmt: skip
def test_a_step_of_a_member_waits_for_nothing(gpu, store, tmp_path, monkeypatch, member, alpha):
    run = run_of(make_recipe(tmp_path, *MEMBERS[member]), store)
    run.sums = Sums(GPU, has_head=run.objective.has_head)
    run.alpha_at, losses = lambda step: alpha, []
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: losses.append(loss))
    gpu.found.clear()
    gradients(run, 3)
    assert gpu.found == []
    assert [loss.device for loss in losses] == [GPU, GPU]


@pytest.mark.parametrize("policy", ["skip", "replace"])
def test_the_optimiser_waits_for_nothing(gpu, store, tmp_path, policy):
    run = run_of(make_recipe(tmp_path, f"optim.nonfinite={policy}"), store)
    optimiser = Optimiser(run.net, run.recipe)
    gpu.found.clear()
    for step in range(2):
        for parameter in run.net.parameters():
            parameter.grad = torch.empty_like(parameter)
        optimiser.step(step)
    assert gpu.found == []


@pytest.mark.parametrize("kind", ["moments", "pixels"])
def test_a_resident_store_waits_for_nothing(gpu, store, pixels, kind):
    found = resident(store) if kind == "moments" else resident(pixels, normalise="scale")
    assert any("cpu to cuda" in wait for wait in gpu.found), "to load it, it did"
    gpu.found.clear()
    assert found.flips_at(0).any()
    for rows in (slice(None), slice(1, 16, 2), torch.tensor([3, 1])):
        batch = found.batch_at(0, rows)
        assert batch.latents.device == batch.y.device == GPU
    assert gpu.found == []


def test_the_watch_sees_what_waits(gpu):
    """Each of these was written once, or nearly."""
    here, there = torch.arange(6), torch.randn(6, device=GPU)
    to_device(here, GPU)
    assert gpu.found == []
    for wait in (
        lambda: here.to(GPU),
        lambda: here.to(GPU, non_blocking=True),  # not pinned
        lambda: torch.tensor([1.0, 2.0]).to(GPU),
        lambda: there[2:].copy_(torch.randn(4)),
        lambda: here[::2].pin_memory().to(GPU, non_blocking=True),  # with gaps
        lambda: there[here],
        lambda: there.index_put_((here,), there),
        lambda: there.cpu(),
    ):
        gpu.found.clear()
        wait()
        assert len(gpu.found) == 1
    for value in (lambda: there.sum().item(), lambda: there[there > 0], lambda: bool(there.any())):
        with pytest.raises(RuntimeError, match="aten"):
            value()
