"""Recipes that are sound: the shipped ones, the dump, `--set`, and what `recipe show` says of them."""

import json
import os
from dataclasses import fields, is_dataclass

import pytest
import yaml
from places import ROOT

from alphaflow_cli.cli import run
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.recipe import Recipe, diff_recipes, dump_recipe, load_recipe, recipe_from_text, shipped, speed
from alphaflow_cli.recipe import schema as schema_module
from alphaflow_cli.recipe.loader import set_text

EXPECTED = {
    "flow-b2",
    "meanflow-b2",
    "meanflow-b2-cfg",
    "meanflow-xl2-cfg",
    "b2",
    "b4",
    "b2-cfg",
    "l2-cfg",
    "xl2-cfg",
    "xl2-plus-cfg",
    "shortcut-b2",
    "cifar10",
    "cifar10-meanflow",
    "cifar10-flow",
    "cifar10-shortcut",
    "quickstart",
}

# name: dim, depth, heads; label dropout; steps; batch; alpha; share; omega, kappa, t_min, t_max (published)
PUBLISHED = {
    "flow-b2": (768, 12, 12, 0, 400_000, 256, 1.0, 1.0, 1, 0, 0, 1),
    "meanflow-b2": (768, 12, 12, 0, 400_000, 256, 0.0, 0.75, 1, 0, 0, 1),
    "meanflow-b2-cfg": (768, 12, 12, 0.1, 1_200_000, 256, 0.0, 0.5, 1, 0.5, 0, 1),
    "meanflow-xl2-cfg": (1152, 28, 16, 0.1, 1_200_000, 256, 0.0, 0.5, 0.2, 0.92, 0, 0.75),
    "b2": (768, 12, 12, 0, 400_000, 256, (0, 400_000), 0.5, 1, 0, 0, 1),
    "b2-cfg": (768, 12, 12, 0.1, 1_200_000, 256, (0, 1_200_000), 0.25, 1, 0.5, 0, 1),
    "xl2-cfg": (1152, 28, 16, 0.1, 1_200_000, 256, (600_000, 1_000_000), 0.5, 0.2, 0.92, 0, 0.75),
    "l2-cfg": (1024, 24, 16, 0.1, 1_200_000, 256, (600_000, 1_000_000), 0.5, 0.2, 0.92, 0, 0.8),
    "xl2-plus-cfg": (1152, 28, 16, 0.1, 75_000, 1024, 0.0, 0.5, 0.2, 0.92, 0, 0.75),
}


# name: sampler and midpoint behind the published scores at two evaluations (docs/evaluation.md, "How do I reproduce")
TWO_STEPS = {
    "b2": ("trajectory", 0.5),
    "b2-cfg": ("trajectory", 0.5),
    "meanflow-b2": ("trajectory", 0.5),
    "meanflow-b2-cfg": ("trajectory", 0.5),
    "meanflow-xl2-cfg": ("trajectory", 0.5),
    "xl2-cfg": ("consistency", 0.55),
    "xl2-plus-cfg": ("consistency", 0.5),
}


@pytest.mark.parametrize("name", TWO_STEPS)
def test_two_evaluations_are_those_of_the_published_scores(name):
    sample = load_recipe(name).sample
    assert (sample.two_step_sampler, sample.two_step_times[1]) == TWO_STEPS[name]


def test_the_promised_recipes_are_shipped():
    assert set(shipped()) >= EXPECTED


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_recipe_loads_and_comes_back_from_its_dump(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe_from_text(dump_recipe(recipe), "dump") == recipe
    assert Recipe(**{f.name: getattr(recipe, f.name) for f in fields(recipe)}) == recipe


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_recipe_is_short_and_its_header_is_its_manual(name):
    lines = shipped()[name].read_text(encoding="utf-8").splitlines()
    header = [line for line in lines if line.startswith("#")]
    assert len(lines) <= 60
    assert lines[: len(header)] == header
    assert any(f"alphaflow train {name}" in line for line in header)
    for word in ("Hardware and hours:", "Expected"):
        assert any(word in line for line in header), word
    assert all(len(line) <= 120 for line in lines)


@pytest.mark.parametrize("name", [name for name in shipped() if name != "quickstart"])
def test_a_recipes_header_gives_the_hours_that_recipe_show_gives(name):
    pace = speed.pace(load_recipe(name))
    text = "not measured yet"
    if pace is not None:
        hours = f"{pace.hours:.1f} h" if pace.hours < 10 else f"{pace.hours:,.0f} h"
        text = f"one H100, {hours} ({'from measured steps' if pace.measured else 'arithmetic'})"
    assert f"# Hardware and hours: {text}\n" in shipped()[name].read_text(encoding="utf-8")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_recipe_has_the_published_numbers(name):
    dim, depth, heads, dropout, steps, batch, alpha, share, *guidance = PUBLISHED[name]
    recipe = load_recipe(name)
    m, g = recipe.model, recipe.guidance
    assert (m.dim, m.depth, m.heads, m.patch) == (dim, depth, heads, 2)
    assert (recipe.train.steps, recipe.train.batch, g.label_dropout) == (steps, batch, dropout)
    assert [g.omega, g.kappa, g.t_min, g.t_max] == guidance
    assert recipe.times.equal_share == schema_module.Schedule(initial=share, final=share, clamp=0.0)
    if isinstance(alpha, float):
        assert recipe.alpha == schema_module.Schedule(initial=alpha, final=alpha, clamp=0.0)
    else:
        ends = (recipe.alpha.start, recipe.alpha.end if recipe.alpha.end != "100%" else steps)
        assert (recipe.alpha.kind, recipe.alpha.gamma, recipe.alpha.clamp, ends) == ("sigmoid", 25.0, 0.005, alpha)


def test_the_family_differs_only_where_it_says():
    allowed = {"name", "loss.velocity", "sample.sampler", "sample.nfe", "eval.nfe"}
    for sibling in ("cifar10-meanflow", "cifar10-flow", "cifar10-shortcut"):
        more = {"loss.weight"} if sibling == "cifar10-shortcut" else set()
        for field, _, _ in diff_recipes(load_recipe("cifar10"), load_recipe(sibling)):
            assert field in allowed | more or field.startswith(("alpha.", "times.equal_share.")), field


def test_set_changes_one_value_and_the_difference_says_which():
    base, changed = load_recipe("b2"), load_recipe("b2", ["optim.lr=3e-4", "times.equal_share=0.25"])
    assert diff_recipes(base, changed) == [
        ("times.equal_share.initial", 0.5, 0.25),
        ("times.equal_share.final", 0.5, 0.25),
        ("optim.lr", 1e-4, 3e-4),
    ]


def test_set_reaches_into_a_schedule_that_the_file_wrote_as_a_number():
    share = load_recipe("b2-cfg", ["times.equal_share.kind=linear", "times.equal_share.final=0.75"]).times.equal_share
    assert (share.kind, share.initial, share.final, share.clamp) == ("linear", 0.25, 0.75, 0.0)


def test_the_later_set_wins():
    assert load_recipe("b2", ["train.seed=1", "train.seed=2"]).train.seed == 2


@pytest.mark.parametrize("value", ['"no"', "'3'", "a: b # c", "α/ω", "😀", 'say "x"', "latents/with space"])
def test_any_text_survives_the_dump(value):
    recipe = recipe_from_text(f"data: {{store: {json.dumps(value, ensure_ascii=False)}}}", "r")
    assert recipe.data.store == value
    assert recipe_from_text(dump_recipe(recipe), "r") == recipe


@pytest.mark.parametrize("name", ["my gulls", "Möwen", "写真", "b2 (1)", "-x", "10", "no", "v1.5+a"])
def test_a_recipe_is_named_as_its_file_and_what_a_run_writes_of_it_is_read_again(name, tmp_path):
    """A name that only the file has was written into the run and its checkpoints, and refused there."""
    (tmp_path / f"{name}.yaml").write_text("train: {steps: 400}\nalpha: 0\n")
    recipe = load_recipe(str(tmp_path / f"{name}.yaml"))
    assert recipe.name == name
    assert recipe_from_text(dump_recipe(recipe), "recipe.yaml") == recipe


@pytest.mark.parametrize(
    "file", ["a\\b.yaml", "a\nb.yaml", os.fsdecode(b"a\xff\xffb.yaml")], ids=["backslash", "line break", "no UTF-8"]
)
def test_signs_of_a_file_that_no_folder_should_have_are_left_out_of_the_name(file, tmp_path):
    (tmp_path / file).write_text("train: {steps: 400}\nalpha: 0\n")
    recipe = load_recipe(str(tmp_path / file))
    assert recipe.name.strip("_") == recipe.name
    assert recipe.name.replace("_", "") == "ab"
    assert recipe_from_text(dump_recipe(recipe), "recipe.yaml") == recipe


def test_a_file_whose_name_can_name_no_folder_is_refused_before_anything_is_written_under_it(tmp_path):
    (tmp_path / "...yaml").write_text("train: {steps: 400}\nalpha: 0\n")
    with pytest.raises(AlphaflowError, match="names a folder"):
        load_recipe(str(tmp_path / "...yaml"))
    assert load_recipe(str(tmp_path / "...yaml"), ["name=good"]).name == "good"


def test_expected_scores_survive_the_dump_and_a_set_and_other_yaml_readers_understand_them():
    text = "expected:\n  - {step: 400_000, value: 40.2, source: a table}\n  - {step: 5, metric: fd-tiny, nfe: 2}"
    recipe = recipe_from_text(text, "r")
    assert [(each.step, each.metric, each.nfe, each.value) for each in recipe.expected] == [
        (400_000, "fid", 1, 40.2),
        (5, "fd-tiny", 2, 0.0),
    ]
    assert recipe_from_text(dump_recipe(recipe), "r") == recipe
    assert recipe_from_text("train: {}", "r", [f"expected={set_text(recipe.expected)}"]) == recipe
    assert yaml.safe_load(dump_recipe(recipe))["expected"][0]["source"] == "a table"
    assert [row[0] for row in diff_recipes(Recipe(), recipe)] == ["expected"]


@pytest.mark.parametrize(
    "text",
    [
        *("2024", "1e4", "no", "null", "~", "", " x", "a: b", "a #b", "#x", "- x", "[x]", "{x", "x, y", "@x", "&x"),
        *("!x", "'x'", '"x"', "x:", "C:\\x", "shapes:4000", "hf://datasets/a/b", "runs/a b", "é"),
    ],
)
def test_a_text_is_written_so_that_set_reads_that_text(text):
    """A report's command and the advice about a store are such lines; a folder may be called 2024."""
    assert load_recipe("quickstart", [f"eval.reference={set_text(text)}"]).eval.reference == text
    plain = ("C:\\x", "shapes:4000", "hf://datasets/a/b", "runs/a b", "é")
    assert set_text(text) == text if text in plain else set_text(text).startswith('"')


@pytest.mark.parametrize("value", [1e-8, 0.1 + 0.2, 1e22, 5e-324, 123456.789])
def test_a_float_survives_the_dump_exactly(value):
    recipe = recipe_from_text(f"optim: {{lr: {value!r}}}", "r")
    assert recipe_from_text(dump_recipe(recipe), "r").optim.lr == value


def test_the_dump_says_every_field_and_other_yaml_readers_understand_it():
    plain = yaml.safe_load(dump_recipe(load_recipe("xl2-cfg")))

    def names(section, prefix=""):
        for field in fields(section):
            value = getattr(section, field.name)
            yield prefix + field.name
            if is_dataclass(value) and not isinstance(value, schema_module.Schedule):
                yield from names(value, f"{prefix}{field.name}.")

    for name in names(Recipe()):
        here = plain
        for part in name.split("."):
            assert part in here, name
            here = here[part]


def test_every_field_of_the_schema_is_explained_in_the_docs():
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    for section in fields(Recipe()):
        value = getattr(Recipe(), section.name)
        for field in fields(value) if is_dataclass(value) else ():
            assert f"`{field.name}`" in text, f"{section.name}.{field.name}"


def test_show_prints_a_recipe_and_what_follows_from_it(tmp_path, capsys):
    assert run(["recipe", "show", "b2"]) == 0
    out = capsys.readouterr().out
    for fact in ("α = 1 until step 115,308", "α = 0 from step 284,693", "131,287,312 param", "102.4 M images seen"):
        assert fact in out
    (tmp_path / "b2.yaml").write_text(out, encoding="utf-8")
    assert load_recipe(str(tmp_path / "b2.yaml")) == load_recipe("b2")


def test_show_as_json_says_the_same(capsys):
    assert run(["recipe", "show", "b2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["alpha_one_until"], found["jvp_from"]) == (115_308, 284_693)
    assert (found["parameters"], found["images_seen"]) == (131_287_312, 102_400_000)
    assert found["recipe"]["times"]["equal_share"] == 0.5


def test_cp_gives_a_recipe_of_its_own_name(tmp_path, capsys):
    assert run(["recipe", "cp", "b2", str(tmp_path / "mine.yaml")]) == 0
    assert run(["recipe", "cp", "b2", str(tmp_path / "short.yaml"), "--set", "train.steps=1000"]) == 0
    assert run(["recipe", "cp", "b4", str(tmp_path)]) == 0
    assert (tmp_path / "mine.yaml").read_bytes() == shipped()["b2"].read_bytes()
    short = load_recipe(str(tmp_path / "short.yaml"))
    assert (short.name, short.train.steps) == ("short", 1000)
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "b4.yaml")


def test_a_recipe_in_the_home_folder_is_found_where_no_shell_has_expanded_its_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("train: {steps: 7}")
    assert load_recipe("~/mine.yaml").train.steps == 7
    assert run(["recipe", "cp", "b2", "~/copy.yaml"]) == 0
    assert (tmp_path / "copy.yaml").is_file()
