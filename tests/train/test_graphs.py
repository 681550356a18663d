"""Steps as CUDA graphs: replayed as launched, bit for bit. On a CPU a graph is a tape of operators (helpers/tape.py).

So whatever differs from step to step and is not on the device would stay what it was when the tape was made. On a real
GPU (pytest -m gpu) the graphs are CUDA's.
"""

import json
import signal
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from fake_gpu import GPU, TORCH, fake_gpu
from latent_stores import random_moments, write_store
from tape import Tape
from train_helpers import (
    MEMBERS,
    assert_same,
    begin,
    make_recipe,
    make_store,
    row_values,
    train,
    wait_for_step,
)

from alphaflow_cli.core.alpha import equal_rows
from alphaflow_cli.data.batches import LatentStream
from alphaflow_cli.model.build import build_network
from alphaflow_cli.recipe import load_recipe
from alphaflow_cli.recipe.plan import alpha_at, equal_share_at
from alphaflow_cli.train import compiling, graphs, loop, start, state
from alphaflow_cli.train.journal import Sums
from alphaflow_cli.train.optimise import Optimiser
from alphaflow_cli.train.parallel import Split, split_batch
from alphaflow_cli.train.step import random_rows, row_factor, training_step

ON = "train.graphs=true"
PLAIN = ("guidance.omega=1", "guidance.kappa=0")  # guidance asks about every row in a graph: other sums, other bits
CASES = {
    "tiny": (),
    "shortcut": ("loss.velocity=network", "alpha.initial=0.9", "alpha.final=0.1"),
    "soflow": (*MEMBERS["soflow"], "optim.kind=adam", "optim.final_lr=1e-5"),
    "imf": MEMBERS["imf"],
    "clean": ("model.prediction=data", "train.precision=fp64", "loss.weight=converging"),
    "shares": (
        "times.equal_share={kind: linear, initial: 0.25, final: 0.9, start: 0, end: 100%}", "loss.short_first=true",
        "optim.nonfinite=replace", "optim.weight_decay=0.1",
    ),
    "precise": ("train.precision=bf16", "train.precise_below=0.5"),
}  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("latents") / "store")


@pytest.fixture
def graphed(monkeypatch):
    """Graphs can be captured on this CPU: `graphed("tape")` or, the same step launched, `graphed("launched")`."""
    monkeypatch.setattr(compiling, "why_launched", lambda *rest: "")
    monkeypatch.setattr(graphs, "TIMED_STEPS", 1)

    def choose(what):
        made = {"tape": Tape.of, "launched": lambda work: work}[what]
        monkeypatch.setattr(graphs, "Capturing", lambda: made)

    choose("tape")
    return choose


def said(out):
    return "".join(path.read_text() for path in out.with_name(f"{out.name}-errors").glob("*.err"))


def made(recipe, device="cpu", capture=Tape.of):
    """The graphs of a fresh network, all of whose weights are random."""
    torch.manual_seed(0)
    with torch.device(device):
        net = build_network(recipe)
        with torch.no_grad():
            for weight in net.parameters():
                weight.add_(0.02 * torch.randn(weight.shape, device=device))
    net = net.double() if recipe.train.precision == "fp64" else net
    optimiser = Optimiser(net, recipe)
    sums = Sums(torch.device(device), has_head=recipe.model.velocity_head is not None)
    return graphs.StepGraphs(recipe, net=net, wrapped=net, optimiser=optimiser, sums=sums, capture=capture)


def changed(captured):
    return [*captured.optimiser.changed(), captured.sums.values]


def drawn_rows(recipe, step, n_equal):
    """Other rows at every step."""
    torch.manual_seed(step)
    rows = random_rows(recipe, recipe.train.batch, n_equal, torch.device("cpu"))
    t = torch.rand(len(rows.t)).to(rows.t) * 0.98 + 0.01
    r = torch.cat([t[:n_equal], t[n_equal:] * torch.rand(len(t) - n_equal).to(t)])
    guide = None if rows.guide is None else torch.stack([1 + 3 * t, 0.3 * t, 0.6 + 0.4 * t], 1)
    y = torch.randint(10, (len(t),))
    return replace(rows, t=t, r=r, y=y, uniforms=torch.rand(len(t)).to(t), guide=guide)


def plain_step(plain, step, rows, alpha):
    """As a launched run takes it, but that guidance asks about every row."""
    recipe, objective = plain.recipe, plain.objective
    factor = row_factor(rows.t, rows.r, rows.n_equal, objective, progress=step / recipe.train.steps)
    result = training_step(plain.net, plain.net, replace(rows, factor=factor), alpha=alpha, objective=objective)
    (result.loss * (1 / len(rows.t))).backward()
    plain.sums.add(result.terms, rows.t, rows.r, rows.n_equal)
    plain.optimiser.step(step)


@pytest.mark.parametrize("case", CASES)
def test_a_replayed_step_is_the_launched_one_bit_for_bit(tmp_path, case):
    """Over three phases, while rate, β, α and shares change; where a share changes, beyond the most graphs too.

    A plain step is the same up to the rounding of 1 − α while 0 < α < 1, which a graph takes from α in float32.
    """
    recipe = make_recipe(tmp_path, *CASES[case])
    taped, launched, plain = (made(recipe, capture=capture) for capture in (Tape.of, lambda work: work, Tape.of))
    alpha, share, exact = alpha_at(recipe), equal_share_at(recipe), recipe.times.gap > 0
    for step in (0, 19):
        taped.prepare(step, equal_rows(16, share(step)), alpha(step))
    for step in (0, 1, 3, 4, 5, 6, 9, 11, 13, 14, 15, 17, 18, 19):
        rows = drawn_rows(recipe, step, equal_rows(16, share(step)))
        for each in (taped, launched):
            each.take(step, rows, alpha(step))
        plain_step(plain, step, rows, alpha(step))
        assert all(map(torch.equal, changed(taped), changed(launched))), step
        if exact or alpha(step) == 1.0:  # until the first step between
            assert all(map(torch.equal, changed(taped), changed(plain))), step
    assert (len(taped.works) > graphs.MOST_GRAPHS) == (case == "shares")
    precisions = {form.bf16 for form in taped.works if form.kind == "between"}
    assert precisions == ({True, False} if case == "precise" else {False})
    rounding = 0.03 if case == "precise" else 1e-4
    torch.testing.assert_close(taped.sums.values, plain.sums.values, rtol=rounding, atol=rounding)


def test_a_run_of_graphs_is_the_launched_one_also_where_it_was_killed(graphed, store, tmp_path):
    sets = ("train.sample_every=10", *CASES["shares"])
    taped = train(make_recipe(tmp_path, ON, *sets), store, tmp_path / "taped")
    assert "each step is one CUDA graph" in said(taped)
    recipe = make_recipe(tmp_path, ON, *sets)
    started = begin(recipe, store, tmp_path / "killed")
    wait_for_step(tmp_path / "killed", 10)
    started.signal(signal.SIGKILL)
    started.wait()
    graphed("launched")
    assert_same(taped, train(recipe, store, tmp_path / "killed"))


def test_where_the_arithmetic_is_the_same_a_graph_leaves_the_bits_of_a_plain_run(graphed, store, tmp_path):
    """Without guidance and with α 0: between 0 and 1, 1 − α is rounded once more. The conflict uses that network."""
    sets = ("alpha.kind=constant", "alpha.initial=0", *PLAIN, "loss.short_first=true")
    taped = train(make_recipe(tmp_path, ON, *sets, "train.conflict_every=6"), store, tmp_path / "taped")
    assert len([row for row in row_values(taped, "l") if row]) == 7
    lines = (taped / "metrics.jsonl").read_text().splitlines()
    assert sum("conflict" in line for line in lines) == 4
    rows = [json.loads(line) for line in lines]
    (taped / "metrics.jsonl").write_text("".join(json.dumps(without(row, "conflict")) + "\n" for row in rows))
    assert_same(taped, train(make_recipe(tmp_path, "train.graphs=false", *sets), store, tmp_path / "plain"))
    assert "each step is one CUDA graph" in said(taped)


def without(row, name):
    return {key: value for key, value in row.items() if key != name}


def test_a_state_is_put_back_where_graphs_read_it(tmp_path):
    """Also one from before the first step, which has no moments."""
    recipe = make_recipe(tmp_path)
    captured = made(recipe)
    begun = {name: value.clone() for name, value in captured.optimiser.tensors().items()}
    captured.take(0, drawn_rows(recipe, 0, 4), 1.0)
    after = {name: value.clone() for name, value in captured.optimiser.tensors().items()}
    captured.take(1, drawn_rows(recipe, 1, 4), 1.0)
    places = [value.data_ptr() for value in captured.optimiser.changed()]
    for saved in (after, begun):
        captured.optimiser.load(saved)
        assert [value.data_ptr() for value in captured.optimiser.changed()] == places
        again = captured.optimiser.tensors()
        assert all(torch.equal(value, again[name]) for name, value in saved.items())
    captured.take(0, drawn_rows(recipe, 0, 4), 1.0)
    assert all(torch.equal(value, after[name]) for name, value in captured.optimiser.tensors().items())


def test_a_roll_back_puts_everything_where_the_graphs_read_it(graphed, store, tmp_path, monkeypatch):
    take = loop.replay

    def broken(run, captured, step):
        if step == 3 and not run.retries:
            run.net.final.linear.bias.data.fill_(float("nan"))
        take(run, captured, step)

    monkeypatch.setattr(loop, "replay", broken)
    recipe = make_recipe(tmp_path, ON, "optim.nonfinite=rollback", "train.save_every=2")
    taped = train(recipe, store, tmp_path / "taped")
    assert "rolled back to step 2, with other draws" in said(taped)
    graphed("launched")
    assert_same(taped, train(recipe, store, tmp_path / "launched"))


def test_a_gradient_that_is_not_finite_is_skipped_and_counted_in_a_graph(graphed, store, tmp_path, monkeypatch):
    take = loop.replay

    def broken(run, captured, step):
        weight, other = run.net.final.linear.bias.data, run.net.final.linear.weight
        kept = weight.clone()
        if step == 7:
            weight.fill_(float("inf"))
        before = other.detach().clone()
        take(run, captured, step)
        assert (step == 7) == torch.equal(before, other)
        if step == 7:
            weight.copy_(kept)
            for ema in run.optimiser.emas:
                [value.nan_to_num_(0, 0, 0) for value in ema]

    monkeypatch.setattr(loop, "replay", broken)
    out = train(make_recipe(tmp_path, ON), store, tmp_path / "run")
    assert sum(row_values(out, "nonfinite")) == 1
    assert "the step was skipped (1 in a row)" in said(out)


def no_memory(work):
    work()
    raise torch.OutOfMemoryError("CUDA out of memory.\nMore.")


def test_where_capturing_fails_one_line_says_so_and_nothing_else_changes(graphed, store, tmp_path, monkeypatch):
    """The steps that were taken to warm up leave no trace: the run is that of a recipe without graphs."""
    monkeypatch.setattr(graphs, "Capturing", lambda: no_memory)
    ours = train(make_recipe(tmp_path, ON), store, tmp_path / "ours")
    line = "CUDA graphs failed, so every operator of a step is launched: CUDA out of memory."
    assert said(ours).count(line) == 1
    assert_same(train(make_recipe(tmp_path, "train.graphs=false"), store, tmp_path / "plain"), ours)


def test_a_fault_of_ours_is_no_fault_of_a_capture(graphed, store, tmp_path, monkeypatch):
    def broken(work):
        raise RuntimeError("The size of tensor a (3) must match the size of tensor b (4)")

    monkeypatch.setattr(graphs, "Capturing", lambda: broken)
    started = begin(make_recipe(tmp_path, ON), store, tmp_path / "run")
    assert started.wait() != [0]
    assert "The size of tensor a" in started.said()


def test_a_form_that_cannot_be_captured_late_is_launched(tmp_path, capsys):
    recipe = make_recipe(tmp_path)
    taped, other = made(recipe), made(recipe)
    for each in (taped, other):
        each.prepare(0, 4, 1.0)
    other.capture = no_memory
    for step, n_equal in enumerate((4, 5, 5, 4)):
        for each in (taped, other):
            each.take(step, drawn_rows(recipe, step, n_equal), 1.0)
    assert all(map(torch.equal, changed(taped), changed(other)))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].endswith("a step of 5 r = t rows was not captured, and is launched: CUDA out of memory.")


def test_smaller_micro_batches_end_the_graphs(graphed, store, tmp_path, monkeypatch):
    take, full = loop.replay, []

    def out_of_memory(run, captured, step):
        if step == 6 and not full:
            full.append(step)
            raise torch.OutOfMemoryError("CUDA out of memory.")
        take(run, captured, step)

    monkeypatch.setattr(loop, "replay", out_of_memory)
    out = train(make_recipe(tmp_path, ON), store, tmp_path / "run")
    assert "out of memory at step 6: going on with 1 process × 2 micro-batches of 8 rows = batch 16" in said(out)
    assert state.read_facts(state.newest_state(out)).step == 20


@pytest.mark.parametrize(("gain", "kept"), [(0.0, True), (1e9, False)])
def test_auto_keeps_graphs_where_they_are_faster_and_a_resume_keeps_what_was_decided(
    graphed, store, tmp_path, monkeypatch, gain, kept
):
    monkeypatch.setattr(compiling, "GAIN", gain)
    recipe, out = make_recipe(tmp_path), tmp_path / "run"
    started = begin(recipe, store, out)
    wait_for_step(out, 5)
    started.signal(signal.SIGTERM)
    assert started.wait() in ([143], [0])
    line = "each step is one CUDA graph: " if kept else "every operator of a step is launched: "
    assert line in said(out)
    assert state.read_facts(state.newest_state(out)).graphs is kept
    monkeypatch.setattr(compiling, "GAIN", 1e9 - gain)  # another measurement now
    train(recipe, store, out)
    assert state.read_facts(state.newest_state(out)).graphs is kept


def test_who_has_graphs(capsys):
    """One GPU, one micro-batch, Adam, a small network; as the run began."""
    gpu = SimpleNamespace(device=torch.device("cuda"), size=1, is_main=True)
    small, large = load_recipe("quickstart"), load_recipe("b2-cfg")
    whole, cut = (split_batch(small.train.batch, processes=1, micro_batch=rows) for rows in (None, 16))
    choose = compiling.choose_graphs
    facts = state.StateFacts(step=5, retries=0, accumulation=1, processes=1, store="", init_from="")
    assert choose(small, gpu, whole, None) is None
    assert [choose(small, gpu, whole, replace(facts, graphs=on)) for on in (True, False, None)] == [True, False, False]
    assert choose(large, gpu, split_batch(256, processes=1, micro_batch=None), None) is False
    assert choose(small, gpu, cut, None) is False
    assert capsys.readouterr().err == ""
    says = {
        "the run computes on cpu": (small, SimpleNamespace(device=torch.device("cpu"), size=1, is_main=True), whole),
        "several processes": (small, SimpleNamespace(device=torch.device("cuda"), size=2, is_main=True), whole),
        "its batch is cut into micro-batches": (small, gpu, cut),
        "optim.kind radam asks the host": (load_recipe("quickstart", ["optim.kind=radam"]), gpu, whole),
    }
    for text, (recipe, world, split) in says.items():
        forced = replace(recipe, train=replace(recipe.train, graphs=True))
        assert choose(forced, world, split, None) is False
        assert choose(recipe, world, split, replace(facts, graphs=True)) is False
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 2
        assert all(text in line for line in lines)


def test_an_older_state_says_nothing_of_graphs_and_is_read(store, tmp_path):
    out = train(make_recipe(tmp_path), store, tmp_path / "run")
    path = state.newest_state(out)
    assert state.read_facts(path).graphs is False
    fixed = train(make_recipe(tmp_path, "train.graphs=false"), store, tmp_path / "fixed")
    assert state.read_facts(state.newest_state(fixed)).graphs is None
    assert [row[0] for row in start.check_recipe(make_recipe(tmp_path), fixed)] == ["train.graphs"]


def test_a_tape_keeps_what_python_knew_and_records_no_question_to_the_host():
    """Else the tests above would prove nothing."""
    value, factor = torch.zeros(2), [1.0]
    again = Tape.of(lambda: value.add_(factor[0]))
    factor[0] = 5.0
    again()
    assert value.tolist() == [2.0, 2.0]
    with pytest.raises(RuntimeError, match="_local_scalar_dense"):
        Tape.of(lambda: value.sum().item())


# --- on a simulated GPU: nothing waits ---


@pytest.mark.skipif(TORCH < (2, 11), reason="older torch asks the driver what a fake GPU can do")
@pytest.mark.parametrize(
    ("case", "alpha"), [("tiny", 1.0), ("shortcut", 0.4), ("soflow", 0.4), ("imf", 0.4), ("imf", 0.0)]
)
def test_neither_writing_a_step_nor_what_is_captured_waits(tmp_path, monkeypatch, case, alpha):
    """The draws, the batch, its numbers, and all that a graph holds but the backward pass."""
    path = write_store(tmp_path / "s", {"moments": random_moments(48)}, torch.arange(48).numpy() % 10)
    with fake_gpu(monkeypatch) as gpu:
        recipe = make_recipe(tmp_path, *CASES[case])
        stream = LatentStream(
            path, batch=16, seed=0, device=GPU, resident=True, posterior="sample", flips=False, normalise="position",
            scale=1.0, shift=0.0, stats_images=0,
        )  # fmt: skip
        captured, passes = made(recipe, GPU, lambda work: work), []
        # one operator, which has no form without values
        monkeypatch.setattr(captured.optimiser.adam, "step", lambda: None)

        def backward(loss):
            passes.append(loss.device)
            for parameter in captured.net.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.empty_like(parameter)

        monkeypatch.setattr(torch.Tensor, "backward", backward)
        run = SimpleNamespace(
            recipe=recipe, stream=stream, split=Split(16, 1, 1), world=SimpleNamespace(device=GPU), seed=0,
            dtype=captured.x.dtype, alpha_at=lambda step: alpha, equal_share_at=lambda step: 0.25,
        )  # fmt: skip
        loop.replay(run, captured, 2)  # the first step makes Adam's moments
        gpu.found.clear()
        before = gpu.on_device
        loop.replay(run, captured, 3)
        assert gpu.found == []
        assert passes == [GPU, GPU]
        assert gpu.on_device - before > 200


# --- on a GPU: pytest -m gpu ---

GUIDED = ("guidance.omega=0.7", "guidance.kappa=0.2", "guidance.label_dropout=0.1")
FAMILY = {
    "meanflow": ("alpha.kind=constant", "alpha.initial=0", *GUIDED),
    "alpha-flow": (*GUIDED, "times.equal_share={kind: step, initial: 0.25, final: 0.75, start: 30, end: 30}"),
    "shortcut": ("loss.velocity=network", "alpha.kind=constant", "alpha.initial=0.5"),
    "soflow": (
        "times.gap=1e-3", "loss.short_first=true", "loss.weight=converging", "ema.every=4", "loss.later=0.5",
        "alpha.kind=exponential", "alpha.initial=0.5", "alpha.final=0.02", "alpha.gamma=1", "alpha.clamp=0",
    ),
    "imf": (
        "model.velocity_head=1", "model.inputs=[scale, interval]", "guidance.scale=drawn", "guidance.interval=drawn",
        "guidance.label_dropout=0.1", "loss.tangent=network", "optim.nonfinite=replace", "train.precision=bf16",
    ),
    "pixels": ("model.prediction=data", "loss.short_first=true", "optim.weight_decay=0.01"),
}  # fmt: skip
SCRIPT = """
import sys
from alphaflow_cli.cli import run
from alphaflow_cli.train import graphs
if sys.argv[1] == "launched":
    graphs.Capturing = lambda: lambda work: work
sys.exit(run(sys.argv[2:]))
"""


def on_gpu(what, out, *sets):
    line = [sys.executable, "-c", SCRIPT, what, "train", "quickstart", "--out", str(out)]
    fixed = ("train.steps=60", "train.save_every=20", "train.sample_every=30", "train.log_every=10", ON)
    for value in (*fixed, "optim.warmup_steps=5", "ema.half_lives=[5, 50]", "data.source=glyphs:500", *sets):
        line += ["--set", value]
    return line


def runs_on_gpu(what, out, *sets):
    done = subprocess.run(on_gpu(what, out, *sets), check=True, timeout=300, capture_output=True, text=True)
    assert "each step is one CUDA graph" in done.stderr
    return out


@pytest.mark.gpu
@pytest.mark.parametrize("member", FAMILY)
def test_a_graph_leaves_the_bits_of_the_launched_step_on_a_gpu(tmp_path, member):
    """60 steps over all phases, replayed and launched operator by operator."""
    replayed = runs_on_gpu("replayed", tmp_path / "replayed", *FAMILY[member])
    assert_same(replayed, runs_on_gpu("launched", tmp_path / "launched", *FAMILY[member]))


@pytest.mark.gpu
@pytest.mark.parametrize("sets", [(), ("train.compile=true",)])
def test_a_killed_run_of_graphs_goes_on_to_the_same_bits_on_a_gpu(tmp_path, sets):
    sets = ("train.steps=600", "train.save_every=100", *sets)
    whole = runs_on_gpu("replayed", tmp_path / "whole", *sets)
    killed = subprocess.Popen(on_gpu("replayed", tmp_path / "killed", *sets))
    while not (tmp_path / "killed" / "model.safetensors").exists():
        assert killed.poll() is None
    killed.kill()
    killed.wait()
    assert_same(whole, runs_on_gpu("replayed", tmp_path / "killed", *sets))


@pytest.mark.gpu
def test_an_estimate_is_of_graphs_where_the_run_has_them_on_a_gpu(tmp_path):
    line = [*on_gpu("replayed", tmp_path / "run"), "--estimate"]
    done = subprocess.run(line, check=True, timeout=300, capture_output=True, text=True)
    assert "not compiled, each step one CUDA graph, as the run will be" in done.stdout
