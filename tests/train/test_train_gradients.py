"""Several processes compute what one would: gradients, shares, losses, whatever the cut of the batch."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from train_helpers import HAS_FSDP2, MEMBERS, case, fork, make_recipe, make_store, row_values, train

from alphaflow_cli.core.alpha import equal_rows
from alphaflow_cli.core.draws import step_draws
from alphaflow_cli.core.times import sample_times
from alphaflow_cli.recipe.plan import equal_share_at
from alphaflow_cli.runtime.processes import join_world
from alphaflow_cli.train import start
from alphaflow_cli.train.loop import gradients, rows_at, settle_buckets
from alphaflow_cli.train.parallel import Split, local, part, rows_above, split_batch, whole, wrap_network
from alphaflow_cli.train.step import time_laws, training_step

ALPHAS = {"flow": 1.0, "between": 0.4, "derivative": 0.0}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("latents") / "store")


def awake(net):
    """Published networks begin with zero modulations, through which no gradient flows: give every weight a value."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in net.parameters():
            local(parameter).copy_(part(parameter, 0.2 * torch.randn(parameter.shape, dtype=parameter.dtype)))


def place_of(grad):
    return 0 if grad is None else local(grad).data_ptr()


def write_gradients(recipe, store, folder, micro_batch):
    """Of one step of every phase, by name, in one file; and the rows of each kind that this process saw."""
    world = join_world()
    run = start.open_run(recipe, start.TrainOptions(folder, store, micro_batch), world)
    awake(run.net)
    found = {}
    for phase, alpha in ALPHAS.items():
        run.alpha_at = lambda step, alpha=alpha: alpha
        kept = {name: place_of(parameter.grad) for name, parameter in run.net.named_parameters()}
        run.optimiser.forget_gradients()
        for name, parameter in run.net.named_parameters():  # DDP's stay in its buckets, the others' memory is free
            assert place_of(parameter.grad) == (kept[name] if run.wrapped is not run.net else 0), name
        gradients(run, 7)
        for name, parameter in run.net.named_parameters():
            cut = recipe.train.strategy == "fsdp2" and world.size > 1
            if not parameter.requires_grad:
                assert cut == isinstance(parameter, DTensor)
                assert parameter.grad is None
                continue
            assert cut == isinstance(parameter, DTensor) == isinstance(parameter.grad, DTensor)
            found[f"{phase}.{name}"] = whole(parameter, local(parameter.grad)).clone()
    if world.is_main:
        torch.save(found, folder / "gradients.pt")
    n_equal = equal_rows(recipe.train.batch, equal_share_at(recipe)(7))
    share = sum(run.split.equal_rows(world.rank, turn, n_equal) for turn in range(run.split.accumulation))
    (folder / f"rows-{world.rank}.json").write_text(json.dumps({"equal": share, "wanted": n_equal}))


def gradients_of(recipe, store, folder, *, processes, micro_batch=None):
    folder.mkdir()
    options = start.TrainOptions(folder, store)
    start.prepare_run(recipe, options)
    started = fork(lambda: write_gradients(recipe, store, folder, micro_batch), folder / "errors", processes)
    assert started.wait() == [0] * processes, started.said()
    return torch.load(folder / "gradients.pt")


WAYS = {
    "two": (2, None, "ddp"),
    "two, accumulation": (2, 3, "ddp"),
    "three, uneven": (3, 2, "ddp"),
    "two, fsdp2": (2, None, "fsdp2"),
    "three, fsdp2, accumulation": (3, 4, "fsdp2"),
}


@pytest.fixture(scope="module")
def alone(store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return gradients_of(make_recipe(folder, "train.precision=fp64"), store, folder / "run", processes=1)


@pytest.mark.parametrize("way", [*map(case, WAYS)])
def test_gradients_on_several_processes_are_those_of_one(way, alone, store, tmp_path):
    processes, micro_batch, strategy = WAYS[way]
    recipe = make_recipe(tmp_path, "train.precision=fp64", f"train.strategy={strategy}")
    together = gradients_of(recipe, store, tmp_path / "together", processes=processes, micro_batch=micro_batch)
    assert alone.keys() == together.keys()
    largest = {phase: max(float(g.abs().max()) for n, g in alone.items() if n.startswith(phase)) for phase in ALPHAS}
    for name, grad in alone.items():
        assert float((grad - together[name]).abs().max()) < 1e-12 * largest[name.split(".")[0]], name
    assert min(largest.values()) > 1e-3, "the comparison is about something"
    rows = [json.loads(path.read_text()) for path in (tmp_path / "together").glob("rows-*.json")]
    assert sum(row["equal"] for row in rows) == rows[0]["wanted"] == 4


def same_at_every_start(recipe, store, folder):
    """A step's gradient right after the start, and again after other steps."""
    world = join_world()
    run = start.open_run(recipe, start.TrainOptions(folder, store, 3), world)
    awake(run.net)
    settle_buckets(run)
    assert not run.sums.values.any()
    found = []
    for step in (7, 6, 7):
        gradients(run, step)
        found.append([parameter.grad.clone() for parameter in run.net.parameters()])
        run.optimiser.forget_gradients()
    assert all(map(torch.equal, found[0], found[2]))


def test_on_three_processes_the_first_step_after_a_start_rounds_as_all_others_do(store, tmp_path):
    recipe = make_recipe(tmp_path, "train.strategy=ddp")
    start.prepare_run(recipe, start.TrainOptions(tmp_path / "run", store))
    started = fork(lambda: same_at_every_start(recipe, store, tmp_path / "run"), tmp_path / "errors", 3)
    assert started.wait() == [0] * 3, started.said()


MEMBER_WAYS = {
    "two, accumulation, checkpointing": (2, 3, "ddp", "train.gradient_checkpointing=true"),
    "two, fsdp2": (2, None, "fsdp2", "train.gradient_checkpointing=false"),
}


@pytest.fixture(
    scope="module", params=[pytest.param(m, marks=pytest.mark.slow) if m == "scale" else m for m in MEMBERS]
)
def member(request, store, tmp_path_factory):
    """A member of the family, and its gradients in one process."""
    folder, sets = tmp_path_factory.mktemp(request.param), ("train.precision=fp64", *MEMBERS[request.param])
    return sets, gradients_of(make_recipe(folder, *sets), store, folder / "run", processes=1)


@pytest.mark.parametrize("way", [*map(case, MEMBER_WAYS)])
def test_gradients_of_a_member_on_two_processes_are_those_of_one(way, member, store, tmp_path):
    processes, micro_batch, strategy, checkpointing = MEMBER_WAYS[way]
    sets, alone = member
    recipe = make_recipe(tmp_path, *sets, f"train.strategy={strategy}", checkpointing)
    together = gradients_of(recipe, store, tmp_path / "together", processes=processes, micro_batch=micro_batch)
    assert alone.keys() == together.keys()
    largest = {phase: max(float(g.abs().max()) for n, g in alone.items() if n.startswith(phase)) for phase in ALPHAS}
    for name, grad in alone.items():
        assert float((grad - together[name]).abs().max()) < 1e-12 * largest[name.split(".")[0]], name
    assert min(largest.values()) > 1e-3, "the comparison is about something"


@pytest.mark.parametrize("alpha", ALPHAS.values())
def test_asking_about_the_needed_rows_only_changes_no_gradient(alpha, store, tmp_path):
    interval = ("guidance.t_min=0.3", "guidance.t_max=0.6", "guidance.label_dropout=0.4")
    recipe = make_recipe(tmp_path, "train.precision=fp64", *interval)
    run = start.open_run(recipe, start.TrainOptions(tmp_path / "run", store), join_world())
    awake(run.net)
    n_equal = 4
    draws = step_draws(0, 5, batch=16, shape=run.stream.shape, device=run.world.device)
    t, r = sample_times(draws.normals, n_equal, time_laws(recipe.times))
    times = torch.stack([t, r, draws.uniforms]).double()
    rows = rows_at(run, 5, slice(None), noise=draws.noise, drawn=times, n_equal=n_equal)
    assert 0 < len(rows.question.places) < 16, "of 16 + 12"
    some, every = (
        torch.autograd.grad(
            training_step(run.net, run.net, each, alpha=alpha, objective=run.objective).loss, list(run.net.parameters())
        )
        for each in (rows, replace(rows, question=None))
    )
    for a, b in zip(some, every, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batch", [1, 5, 16, 37])
@pytest.mark.parametrize("parts", [(1, 1), (2, 3), (4, 1), (3, 5)])
def test_every_row_goes_to_one_part_and_equal_shares_add_up(batch, parts):
    processes, accumulation = parts
    cut = Split(batch, processes, min(accumulation, max(1, batch // processes)))
    accumulation = cut.accumulation
    places = [(rank, turn) for rank in range(processes) for turn in range(accumulation)]
    rows = [list(range(batch))[cut.rows(*place)] for place in places]
    assert sorted(row for mine in rows for row in mine) == list(range(batch))
    assert max(map(len, rows)) == cut.micro_batch
    for n_equal in range(batch + 1):
        counts = [cut.equal_rows(*place, n_equal) for place in places]
        assert sum(counts) == n_equal, "exact over the whole batch"
        assert max(counts) - min(counts) <= 1
        for mine, count in zip(rows, counts, strict=True):
            assert all((row < n_equal) == (i < count) for i, row in enumerate(mine)), "r = t rows come first"


def test_the_micro_batch_is_an_upper_bound_and_the_batch_stays_the_recipes():
    for micro_batch in (1, 3, 8, 100):
        cut = split_batch(37, processes=2, micro_batch=micro_batch)
        assert cut.micro_batch <= max(micro_batch, -(-37 // (2 * 18)))
        assert cut.batch == 37
        assert bool(rows_above(cut, micro_batch)) == (cut.micro_batch > micro_batch)
    assert rows_above(split_batch(37, processes=2, micro_batch=1), 1) == [
        "--micro-batch 1: the largest micro-batches have 2 rows, because all processes take equally many and 2 do not "
        "divide the batch of 37"
    ]
    assert rows_above(split_batch(36, processes=2, micro_batch=1), 1) == []


def test_two_processes_of_eight_rows_have_the_losses_of_one_of_sixteen(store, tmp_path):
    recipe = make_recipe(tmp_path, "train.log_every=1")
    one = train(recipe, store, tmp_path / "one")
    two = train(recipe, store, tmp_path / "two", processes=2, micro_batch=8)
    others = [two]
    if HAS_FSDP2:
        sharded = replace(recipe, train=replace(recipe.train, strategy="fsdp2"))
        others.append(train(sharded, store, tmp_path / "fsdp", processes=2))
    names = [path.relative_to(two) for path in sorted(two.rglob("*.safetensors"))]
    for other in others:
        for name in ("l", "l_tfm", "v_loss", "grad_norm"):
            assert row_values(other, name) == pytest.approx(row_values(one, name), rel=2e-5), (other, name)
        assert names == [path.relative_to(other) for path in sorted(other.rglob("*.safetensors"))], "single files"


def unsynchronised():
    world = join_world()
    net = nn.Linear(3, 3)
    net(torch.full((1, 3), float(world.rank + 1))).sum().backward()  # the bare net: nobody synchronises
    world.check_synchronised(net)


def synchronised():
    world = join_world()
    net = nn.Linear(3, 3)
    wrapped = wrap_network(net, world, "ddp")  # a wrapper that is gone synchronises nothing
    wrapped(torch.full((1, 3), float(world.rank + 1))).sum().backward()
    world.check_synchronised(net)


def test_gradients_that_were_not_synchronised_are_found(tmp_path):
    assert fork(synchronised, tmp_path / "good", 2).wait() == [0, 0]
    started = fork(unsynchronised, tmp_path / "bad", 2)
    assert started.wait() == [1, 1]
    assert "were not synchronised" in started.said()
