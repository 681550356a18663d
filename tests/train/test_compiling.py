"""Whether a run is compiled is decided once; all forms are compiled first; where that fails, it goes on eagerly."""

from types import SimpleNamespace

import pytest
import torch
from train_helpers import assert_same, make_recipe, make_store, train

from alphaflow_cli.model.compiling import compile_blocks, keep_compiled_code
from alphaflow_cli.model.find import step_of
from alphaflow_cli.recipe import load_recipe
from alphaflow_cli.recipe.plan import alpha_at, equal_share_at, phase_kind
from alphaflow_cli.recipe.speed import compiling_pays, will_compile
from alphaflow_cli.train import compiling, loop, run, start, state
from alphaflow_cli.train.parallel import split_batch

PLAIN = ("guidance.omega=1", "guidance.kappa=0")  # compiled blocks see all of guidance's rows: other sums, other bits


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("latents") / "store")


@pytest.fixture
def gpu(monkeypatch):
    """A process with a GPU that can compile, or cannot."""
    can = {"can": True, "bf16": True}
    monkeypatch.setattr(compiling, "can_compile", lambda device: device.type == "cuda" and can["can"])
    monkeypatch.setattr(compiling, "has_bf16", lambda device: can["bf16"])
    world = SimpleNamespace(device=torch.device("cuda"), agree=lambda flag: flag, is_main=True)
    return SimpleNamespace(world=world, can=can)


def test_auto_compiles_long_runs_on_gpus_and_nothing_on_a_cpu(gpu, capsys):
    cpu = SimpleNamespace(device=torch.device("cpu"), agree=lambda flag: flag, is_main=True)
    long, short = load_recipe("b2-cfg"), load_recipe("quickstart")
    assert (long.train.compile, short.train.compile) == ("auto", "auto")
    assert compiling.choose_compile(long, gpu.world, None, 1)
    assert not compiling.choose_compile(short, gpu.world, None, 1)
    assert not compiling.choose_compile(long, cpu, None, 1)
    assert capsys.readouterr().err == ""
    gpu.can["bf16"] = False  # Triton writes none for such a card
    assert not compiling.choose_compile(long, gpu.world, None, 1)
    assert compiling.choose_compile(load_recipe("b2-cfg", ["train.precision=fp32"]), gpu.world, None, 1)
    gpu.can |= {"can": False, "bf16": True}
    assert not compiling.choose_compile(long, gpu.world, None, 1)
    assert "beware: torch.compile lacks Triton, a C compiler such as gcc" in capsys.readouterr().err
    for word in (True, False):
        said = load_recipe("b2-cfg", [f"train.compile={str(word).lower()}"])
        assert compiling.choose_compile(said, cpu, None, 1) is will_compile(said) is word


def test_a_resume_keeps_the_decision_whatever_the_rule_says_now(gpu, capsys):
    long, short = load_recipe("b2-cfg"), load_recipe("quickstart")
    assert not compiling.choose_compile(long, gpu.world, False, 1)
    assert compiling.choose_compile(short, gpu.world, True, 1)
    assert capsys.readouterr().err == ""
    gpu.can["can"] = False
    assert not compiling.choose_compile(short, gpu.world, True, 1)
    assert "compiled so far, the run goes on eagerly" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sets", "pays"),
    [
        (("train.steps=2000",), False),
        (("train.steps=3000",), True),
        (("times.equal_share={kind: linear, initial: 0.25, final: 0.75, start: 0, end: 100%}",), False),
        (("train.precision=fp64",), False),
        (("model.dim=96", "model.heads=4", "model.depth=2", "train.steps=100000"), False),
        (("model.dim=96", "model.heads=4", "model.depth=2", "train.steps=100000", "train.graphs=false"), True),
    ],
)
def test_compiling_pays_from_a_length_on(sets, pays):
    recipe = load_recipe("b2", ["optim.warmup_steps=10", "alpha.unfinished=true", *sets])
    assert compiling_pays(recipe, 1) == pays


def test_the_forms_are_those_of_the_phases_ahead(tmp_path):
    """Flow matching until step 5, between until 15, then the derivative; micro-batches of 6, 5 and 5 rows."""
    recipe = make_recipe(tmp_path)
    world, split = SimpleNamespace(size=1, rank=0), split_batch(16, processes=1, micro_batch=6)
    at = {"alpha_at": alpha_at(recipe), "equal_share_at": equal_share_at(recipe)}
    begun = SimpleNamespace(recipe=recipe, world=world, split=split, step=0, **at)
    kinds = [(phase_kind(alpha), turn) for alpha, turn, _ in compiling._forms(begun)]
    assert kinds == [(kind, turn) for kind in ("flow", "between", "derivative") for turn in (0, 1)]
    begun.step = 15
    assert {phase_kind(alpha) for alpha, _, _ in compiling._forms(begun)} == {"derivative"}


def test_steps_in_fp32_of_a_run_in_bf16_are_a_form_of_their_own(tmp_path):
    """They were compiled in the middle of the run, where a compiler that fails ends it."""
    recipe = make_recipe(tmp_path, "train.precision=bf16", "train.precise_below=0.5")
    begun = SimpleNamespace(recipe=recipe, world=SimpleNamespace(size=1, rank=0), step=0)
    begun.split = split_batch(16, processes=1, micro_batch=None)
    begun.alpha_at, begun.equal_share_at = alpha_at(recipe), equal_share_at(recipe)
    between = [alpha for alpha, _, _ in compiling._forms(begun) if phase_kind(alpha) == "between"]
    assert [alpha < 0.5 for alpha in between] == [False, True]


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # of dynamo itself
def test_all_forms_are_compiled_before_the_first_step_and_change_nothing(store, tmp_path, monkeypatch):
    """In micro-batches of two sizes. The backend changes nothing, so the run must be the same, bit for bit."""
    recipe = make_recipe(tmp_path, *PLAIN, "train.compile=true")
    plain = train(make_recipe(tmp_path, *PLAIN), store, tmp_path / "plain", micro_batch=6)
    forms, first = [], loop.one_step

    def backend(graph, inputs):
        forms.append(graph)
        return graph.forward

    def watched(run, step):
        before = len(forms)
        first(run, step)
        assert len(forms) == before > 0, f"step {step} compiled something"

    monkeypatch.setattr(run, "compile_blocks", lambda net: compile_blocks(net, backend=backend))
    monkeypatch.setattr(loop, "one_step", watched)
    assert_same(plain, train(recipe, store, tmp_path / "compiled", micro_batch=6))
    text = "".join(path.read_text() for path in (tmp_path / "compiled-errors").glob("*.err"))
    assert "compile " in text
    assert "for the whole run; the code is kept in" in text


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=[pytest.mark.distributed, pytest.mark.slow])])
def test_where_compiling_fails_one_line_says_so_and_the_run_goes_on(store, tmp_path, monkeypatch, processes):
    def broken(graph, inputs):
        raise ValueError("no such machine")

    monkeypatch.setattr(run, "compile_blocks", lambda net: compile_blocks(net, backend=broken))
    ours = train(make_recipe(tmp_path, "train.compile=true"), store, tmp_path / "ours", processes=processes)
    monkeypatch.undo()
    assert_same(train(make_recipe(tmp_path), store, tmp_path / "plain", processes=processes), ours)
    text = "".join(path.read_text() for path in (tmp_path / "ours-errors").glob("*.err"))
    assert text.count("torch.compile failed, so the run goes on eagerly: ") == processes


def test_a_state_says_what_auto_decided_and_older_ones_say_nothing(store, tmp_path):
    out = train(make_recipe(tmp_path), store, tmp_path / "run")
    path = state.newest_state(out)
    assert state.read_facts(path).compiled is False
    assert step_of(path) == 20
    older = train(make_recipe(tmp_path, "train.compile=false"), store, tmp_path / "older")
    assert state.read_facts(state.newest_state(older)).compiled is None
    assert [row[0] for row in start.check_recipe(make_recipe(tmp_path), older)] == ["train.compile"]


def test_compiled_code_is_kept_among_the_users_caches(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert keep_compiled_code() == str(tmp_path / "alphaflow" / "compiled")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")
    assert keep_compiled_code() == "elsewhere"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert keep_compiled_code() == "torch's temporary folder"
