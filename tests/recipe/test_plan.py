"""What follows from a recipe, against published figures and brute force."""

import itertools
import json
import sys

import pytest

from alphaflow_cli.cli import run
from alphaflow_cli.recipe import load_recipe, plan, recipe_from_text, shipped, speed
from alphaflow_cli.recipe.facts import facts, human, lines
from alphaflow_cli.recipe.plan import warnings_of
from alphaflow_cli.recipe.schema import resolve_step

PARAMETERS = {
    "b2": 131_287_312,
    "b2-cfg": 131_288_080,
    "b4": 131_213_632,
    "l2-cfg": 459_399_184,
    "xl2-cfg": 676_735_504,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_parameter_count_is_the_published_one(name):
    assert plan.parameter_count(load_recipe(name)) == PARAMETERS[name]


@pytest.mark.parametrize("extra", ["", ", qk_norm: true", ", second_time: r", ", mlp_ratio: 2.5"])
@pytest.mark.parametrize("labels", ["{classes: 0}", "{classes: 7}"])
def test_the_parameter_count_is_that_of_the_built_network(extra, labels):
    from alphaflow_cli.model.build import build_network

    recipe = recipe_from_text(f"model: {{dim: 32, depth: 2, heads: 4{extra}}}\ndata: {labels}", "r")
    assert plan.parameter_count(recipe) == sum(p.numel() for p in build_network(recipe).parameters())


@pytest.mark.parametrize(
    ("name", "cuts"),
    [("b2", [115_308, 284_693]), ("xl2-cfg", [715_308, 884_693]), ("meanflow-b2", []), ("flow-b2", [])],
)
def test_the_phases_change_at_the_published_steps(name, cuts):
    found = plan.phases(load_recipe(name))
    assert [phase.first for phase in found] == [0, *cuts]
    assert [phase.until for phase in found] == [*cuts, load_recipe(name).train.steps]


@pytest.mark.parametrize(
    "alpha",
    [
        "{kind: sigmoid}",
        "{kind: linear, start: 100, end: 900}",
        "{kind: linear, initial: 0, final: 1, clamp: 0.1}",
        "{kind: step, start: 50%}",
        "{kind: log, start: 30%, end: 31%}",
        "{kind: exponential, final: 0.001}",
        "{kind: linear, start: 0, end: 0}",
        "0.5",
        "{kind: sigmoid, end: 4000, unfinished: true}",
    ],
)
def test_the_phases_are_what_every_single_step_says(alpha):
    recipe = recipe_from_text(f"train: {{steps: 1000}}\nalpha: {alpha}", "r")
    at = plan.alpha_at(recipe)
    found = plan.phases(recipe)
    spelt = [phase.kind for phase in found for _ in range(phase.first, phase.until)]
    assert spelt == [plan.phase_kind(at(step)) for step in range(1000)]
    assert all(a.kind != b.kind for a, b in itertools.pairwise(found))


def test_percentages_are_of_the_run():
    assert [resolve_step(s, 1_200_000) for s in ("50%", "0%", "33.4%", 17)] == [600_000, 0, 400_800, 17]


def test_the_effective_guidance_is_the_published_one():
    scales = {name: facts(load_recipe(name))["effective_guidance"] for name in ("b2-cfg", "xl2-cfg", "b2")}
    assert scales == {"b2-cfg": pytest.approx(2.0), "xl2-cfg": pytest.approx(2.5), "b2": 1.0}


def test_disk_and_memory_grow_as_they_should():
    base, longer = load_recipe("b2"), load_recipe("b2", ["train.steps=800000", "ema.half_lives=[100, 6931]"])
    assert plan.latent_bytes(base) == 16_384
    assert plan.latent_bytes(load_recipe("b2", ["data.flips=true"])) == 2 * 16_384
    assert load_recipe("cifar10").data.flips
    assert plan.latent_bytes(load_recipe("cifar10")) == 3 * 32 * 32  # pixels are mirrored when they are read
    assert plan.kept_checkpoints(base) == 4 + 2
    assert plan.kept_checkpoints(longer) == 8 + 2
    assert plan.saved_state_bytes(base) - plan.checkpoint_bytes(base) == 2 * 4 * PARAMETERS["b2"]  # Adam's two moments
    assert plan.checkpoint_bytes(longer) - plan.checkpoint_bytes(base) == 4 * PARAMETERS["b2"]
    assert (
        plan.activation_bytes(load_recipe("b2", ["train.gradient_checkpointing=true"]))
        < plan.activation_bytes(base) / 5
    )


MODERN = "conditioning: tokens, block: modern, mlp_ratio: 2.6667"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("extra", ["depth: 3", f"depth: 3, {MODERN}", f"depth: 4, velocity_head: 2, {MODERN}"])
def test_the_memory_estimate_is_what_autograd_keeps(precision, extra):
    """Bytes of the saved tensors of the real network, per row: two batch sizes, so that the weights drop out."""
    from alphaflow_cli.model.build import build_network

    text = f"model: {{dim: 128, heads: 4, {extra}}}\ndata: {{classes: 0}}\n" + f"train: {{precision: {precision}}}"
    recipe = recipe_from_text(text, "r")
    net = build_network(recipe)
    per_row = (saved_bytes(net, 4, precision) - saved_bytes(net, 2, precision)) / 2
    assert plan.activation_bytes(recipe) == pytest.approx(per_row, rel=0.15)


def saved_bytes(net, rows, precision):
    """What autograd keeps of one forward of `rows` rows, by all heads."""
    import torch

    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    z, t, y = torch.randn(rows, 4, 32, 32), torch.rand(rows), torch.zeros(rows, dtype=torch.long)
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        net(z, t, t / 2, y, heads="u" if net.velocity_final is None else "both")
    return sum(size for size, _ in kept.values())


def drawn(extra):
    """What the network is given of guidance must be drawn."""
    names = [name for name in ("scale", "interval") if name in extra.partition("inputs: [")[2].partition("]")[0]]
    return f"\nguidance: {{label_dropout: 0.1, {', '.join(f'{name}: drawn' for name in names)}}}" if names else ""


LADDER = (
    f", {MODERN}, inputs: [scale, interval], velocity_head: 2", ", inputs: [scale], velocity_head: 0",
    ", conditioning: tokens, inputs: [interval, scale], tokens: {label: 3, scale: 2, interval: 1, time: 1}",
    ", block: modern", ", velocity_head: 3",
)  # fmt: skip


@pytest.mark.parametrize(
    ("extra", "labels"),
    [*((extra, "classes: 7") for extra in LADDER), *((e, "classes: 0") for e in LADDER[3:]),
     (f", {MODERN}", "classes: 0")],
)  # fmt: skip
def test_the_parameter_count_of_every_rung_is_that_of_the_built_network(extra, labels):
    from alphaflow_cli.model.build import build_network

    text = f"model: {{dim: 32, depth: 3, heads: 4{extra}}}\ndata: {{{labels}, latent_size: 8, image_size: 64}}"
    recipe = recipe_from_text(text + drawn(extra), "r")
    assert plan.parameter_count(recipe) == sum(p.numel() for p in build_network(recipe).parameters())


@pytest.mark.parametrize("extra", ["", *LADDER])
def test_the_counted_forward_of_every_rung_is_what_the_dispatcher_counts(extra):
    import torch
    from counting import count

    from alphaflow_cli.model.build import build_network
    from alphaflow_cli.recipe.speed import forward_flops, velocity_flops

    text = f"model: {{dim: 192, depth: 4, heads: 3{extra}}}\ndata: {{latent_size: 16, image_size: 128}}"
    recipe = recipe_from_text(text + drawn(extra), "r")
    net, z, t = build_network(recipe), torch.randn(4, 4, 16, 16), torch.rand(4)
    guide = torch.ones(4, 3) if net.inputs else None
    heads = {"u": forward_flops(recipe), "both": forward_flops(recipe) + velocity_flops(recipe)}
    for name, expected in heads.items() if net.velocity_final else (("u", heads["u"]),):
        with torch.no_grad():
            counted = count(lambda name=name: net(z, t, t / 2, torch.arange(4), guide=guide, heads=name)).flops
        assert expected == pytest.approx(counted / 4, rel=0.02), name


def test_the_plan_says_what_a_network_has_beyond_the_published_one():
    sets = ["model.block=modern", "model.conditioning=tokens", "model.inputs=[scale, interval]"]
    sets += ["guidance.scale=drawn", "guidance.interval=drawn", "guidance.kappa=0"]
    recipe = load_recipe("b2-cfg", [*sets, "model.velocity_head=8"])
    network = dict(lines(recipe))["network"]
    assert "modern blocks, inputs as 20 more tokens, given the guidance scale and the guidance interval" in network
    assert "a velocity head with 8 blocks of its own" in network
    speed = facts(recipe)["speed"]["1 x H100"]
    assert not speed["measured"]


def test_a_warm_up_longer_than_the_run_is_pointed_out():
    recipe = load_recipe("b2", ["train.steps=1000"])
    assert facts(recipe)["warnings"][0] == "the warm-up (10,000 steps) outlasts the run: lr reaches 1e-05"
    assert ("beware", facts(recipe)["warnings"][0]) in lines(recipe)


def test_an_unfinished_alpha_is_pointed_out():
    recipe = load_recipe("b2", ["alpha.end=800000", "alpha.unfinished=true"])
    assert any("alpha ends the run at 0.5, not at 0" in text for text in facts(recipe)["warnings"])


@pytest.mark.parametrize(
    ("sets", "doubt"),
    [
        (["train.steps=20"], "the warm-up (10,000 steps) outlasts the run: lr reaches 2e-07"),
        (["train.steps=5000"], "the average of half-life 6,931 steps outlasts the run of 5,000: ema.ramp shortens it"),
        (["train.steps=1"], "none of the 1 step has 0 < α < 1: alpha's schedule leaves that phase out"),
        (["train.steps=1"], "none of the 1 step has α = 0: alpha's schedule leaves that phase out"),
        (["train.steps=100", "alpha.kind=linear"], "none of the 100 steps has α = 0"),
        (["eval.reference=glyphs:300"], "eval compares 50,000 pictures with the 300 of glyphs:300"),
        ([], "bf16 is slower than fp32 on most CPUs: --set train.precision=fp32"),
    ],
)
def test_what_would_be_useless_is_a_doubt(sets, doubt):
    assert any(doubt in text for text in warnings_of(load_recipe("b2", sets), on_cpu=True))


@pytest.mark.parametrize("name", sorted(shipped()))
def test_no_shipped_recipe_is_in_doubt_but_for_the_published_precision(name):
    doubts = warnings_of(load_recipe(name))
    assert [text for text in doubts if not text.startswith("bf16 while alpha falls to 0.005")] == []
    assert warnings_of(load_recipe(name, ["train.precise_below=0.05"] if doubts else [])) == []


@pytest.mark.parametrize(
    ("sets", "lowest"),
    [
        ([], "0.005"),
        (["alpha.clamp=0.001"], "0.001"),
        (["train.precise_below=0.01"], "0.01"),
        (["train.precise_below=0.05"], None),
        (["train.precision=fp32"], None),
        (["alpha.clamp=0.05"], None),
        (["alpha=0.5"], None),
        (["alpha=0"], None),
    ],
)
def test_bf16_at_a_small_alpha_is_a_doubt(sets, lowest):
    doubts = [text for text in warnings_of(load_recipe("b2", sets)) if "rounding" in text]
    assert bool(doubts) == (lowest is not None)
    assert all(text.startswith(f"bf16 while alpha falls to {lowest}: ") for text in doubts)


def test_a_run_that_leaves_bf16_for_a_while_takes_the_memory_of_fp32():
    cut, fp32 = load_recipe("b2", ["train.precise_below=0.05"]), load_recipe("b2", ["train.precision=fp32"])
    assert [part.kind for part in plan.stretches(cut)] == ["flow", "between", "between", "derivative"]
    assert [part.kind for part in plan.phases(cut)] == ["flow", "between", "derivative"]
    assert plan.activation_bytes(cut) == plan.activation_bytes(fp32) > plan.activation_bytes(load_recipe("b2"))


def test_show_says_where_a_run_leaves_bf16():
    texts = [text for _, text in lines(load_recipe("b2", ["train.precise_below=0.05", "train.tf32=true"]))]
    assert any("in TF32 where alpha < 0.05" in text for text in texts)


def test_check_says_what_show_and_train_say(capsys):
    sets = ["--set", "train.steps=1000", "--set", "train.precision=fp32"]
    expected = warnings_of(load_recipe("b2", sets[1::2]))
    assert run(["recipe", "check", "b2", *sets]) == 0
    assert capsys.readouterr().out.splitlines() == ["b2: good", *(f"  beware: {text}" for text in expected)]
    assert run(["recipe", "check", "b2", *sets, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [{"file": "b2", "ok": True, "error": None, "warnings": expected}]
    assert len(expected) == 2


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_recipe_can_be_told_in_words(name):
    assert dict(lines(load_recipe(name)))["network"]


def test_sizes_are_readable():
    assert [human(n) for n in (0, 999, 1000, 16_384, 2.1e9, 3e12)] == [
        "0 B",
        "999 B",
        "1 kB",
        "16.4 kB",
        "2.1 GB",
        "3 TB",
    ]


def test_nothing_of_this_needs_torch():
    import subprocess

    script = (
        "import sys, alphaflow_cli.recipe.facts as f; from alphaflow_cli.recipe import load_recipe\n"
        "f.facts(load_recipe('b2')); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


LABELS = {  # classes and dropout → rows, null label, whether there is one
    (0, 0.0): (0, 0, False), (10, 0.0): (10, 9, False), (10, 0.1): (11, 10, True), (1, 1e-9): (2, 1, True),
}  # fmt: skip


@pytest.mark.parametrize(("classes", "dropout"), LABELS)
def test_the_null_label_is_the_last_row_where_labels_are_dropped(classes, dropout):
    recipe = recipe_from_text(f"data: {{classes: {classes}}}\nguidance: {{label_dropout: {dropout}}}", "r")
    assert (plan.label_rows(recipe), plan.null_label(recipe), plan.has_null_label(recipe)) == LABELS[classes, dropout]


def test_one_class_is_a_class_and_none_is_no_label():
    def shown(classes):
        recipe = recipe_from_text(
            "data: {autoencoder: none, channels: 3, latent_size: 256}", "x", (f"data.classes={classes}",)
        )
        return dict(lines(recipe))["latents"]

    assert shown(1).endswith(", 1 class")
    assert shown(1000).endswith(", 1,000 classes")
    assert shown(0).endswith(", no labels")


def test_the_pace_on_one_gpu_is_the_one_measured_in_the_trainer():
    """b2-cfg, compiled, by phase: .159, .181 and .204 s per step of 256, once on an H100."""
    recipe, measured = load_recipe("b2-cfg"), {"flow": 0.159, "between": 0.181, "derivative": 0.204}
    seconds = sum((phase.until - phase.first) * measured[phase.kind] for phase in plan.phases(recipe))
    found = speed.pace(recipe)
    assert found.hours == pytest.approx(seconds / 3600, rel=0.03)
    assert found.images_per_second == pytest.approx(recipe.train.steps * 256 / seconds, rel=0.03)
    assert (found.compiled, found.measured) == (True, True)


def test_the_pace_of_a_small_network_is_the_one_measured_too():
    """cifar10, not compiled: 13 steps of 256 per second, once on an H100."""
    assert speed.pace(load_recipe("cifar10")).images_per_second == pytest.approx(13 * 256, rel=0.01)


def test_steps_in_fp32_of_a_run_in_bf16_take_longer_and_are_not_measured():
    sets = {"bf16": (), "tf32": ("train.precise_below=0.05", "train.tf32=true"), "fp32": ("train.precise_below=0.05",)}
    paces = {name: speed.pace(load_recipe("b2", [*each])) for name, each in sets.items()}
    assert paces["bf16"].hours < paces["tf32"].hours < paces["fp32"].hours
    assert [pace.measured for pace in paces.values()] == [True, False, False]
    steps = sum(count for _, precise, count, _ in speed.phase_flops(load_recipe("b2", [*sets["tf32"]])) if precise)
    more = paces["tf32"].hours / paces["bf16"].hours - 1
    assert more == pytest.approx(steps / 400_000, rel=0.15)  # they take twice as long


def test_the_pace_says_what_it_rests_on():
    many, large = speed.pace(load_recipe("b2-cfg"), 8), speed.pace(load_recipe("l2-cfg"))
    assert (many.measured, large.measured) == (False, False)
    assert 6.5 < many.images_per_second / speed.pace(load_recipe("b2-cfg")).images_per_second < 8
    assert not speed.pace(load_recipe("cifar10")).compiled  # the measured figure is not
    assert speed.pace(load_recipe("quickstart")) is None
    assert facts(load_recipe("quickstart"))["speed"] == {}
    shown = dict(lines(load_recipe("b2-cfg")))["speed"]
    assert shown.startswith(
        "one H100, compiled: about 1,431 images/s, 60 h (steps measured once there); one H200: 1,611 images/s, "
        "53 h, and 8 H100s in one machine: 10,492 images/s, 8.1 h (arithmetic)"
    )
    newer = speed.pace(load_recipe("b2-cfg"), h200=True)
    assert not newer.measured
    assert 1 < newer.images_per_second / speed.pace(load_recipe("b2-cfg")).images_per_second < 4.8 / 3.35
    assert "by arithmetic from measured steps of another network" in dict(lines(load_recipe("l2-cfg")))["speed"]


def test_a_share_of_equal_rows_that_falls_is_not_called_plain_flow_matching():
    shares = "times.equal_share={kind: linear, initial: 1, final: 0.5, start: 0, end: 100%}"
    falling, plain = (dict(lines(load_recipe("b2", ["alpha=1", sets]))) for sets in (shares, "times.equal_share=1"))
    assert falling["alpha"] == "1 throughout"
    assert falling["r = t rows"] == "256 of 256 per batch at first, 128 at last"
    assert plain["alpha"] == "no r < t rows: plain flow matching"
