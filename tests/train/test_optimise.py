"""Gradients between two steps: let go of, so that the backward pass hands its own over, and nothing else changes."""

import pytest
import torch
from counting import peak_bytes
from train_helpers import MEMBERS, make_recipe, make_store

from alphaflow_cli.runtime.processes import join_world
from alphaflow_cli.train import conflict, start
from alphaflow_cli.train.loop import gradients, one_step


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("latents") / "store")


def open_run(recipe, store, folder, *, zeroed):
    """A run in two micro-batches; `zeroed` keeps its gradients' memory, as one of several processes does."""
    run = start.open_run(recipe, start.TrainOptions(folder, store, micro_batch=8), join_world())
    run.optimiser.in_buckets = zeroed
    return run


@pytest.mark.parametrize("sets", [
    ("train.gradient_checkpointing=true", "train.precision=bf16"), (*MEMBERS["soflow"], "optim.weight_decay=0.1"),
    (*MEMBERS["imf"], "optim.nonfinite=replace"),
])  # fmt: skip
def test_gradients_that_are_let_go_leave_the_bits_of_gradients_set_to_zero(store, tmp_path, sets):
    """Over all phases, with a gradient that is not finite, and with the conflict measured in between."""
    kept, let_go = (open_run(make_recipe(tmp_path, *sets), store, tmp_path, zeroed=zeroed) for zeroed in (True, False))
    for step in (0, 1, 5, 6, 7, 10, 15, 16):
        for run in (kept, let_go):
            run.step = step
            gradients(run, step)
            if step == 7:
                run.net.final.linear.weight.grad[0] = float("nan")
            run.optimiser.step(step)
        if step == 10:
            before, after = (conflict.measure(run) for run in (kept, let_go))
            assert before | {"seconds": 0} == after | {"seconds": 0}
    ours, theirs = (run.optimiser.tensors() | {"sums": run.sums.values} for run in (kept, let_go))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert float(ours["counters"][3]) == 1, "one was not finite"
    assert {weight.grad is None for weight in kept.optimiser.trained} == {False}
    assert {weight.grad is None for weight in let_go.optimiser.trained} == {True}


def test_gradients_that_are_let_go_never_take_more_memory(store, tmp_path):
    """At the peak of a step with Adam, gradients that were there before it included."""
    peaks = []
    for zeroed in (True, False):
        run = open_run(make_recipe(tmp_path), store, tmp_path, zeroed=zeroed)
        one_step(run, 0)
        there = sum(4 * w.grad.numel() for w in run.optimiser.trained if w.grad is not None)
        peaks.append(peak_bytes(lambda run=run: one_step(run, 1), "cpu") + there)
    assert peaks[1] <= peaks[0]
