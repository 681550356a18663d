"""A recipe of an older format is read through migrations, and its faults stand at the lines of the old file."""

from dataclasses import replace

import pytest

from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.recipe import diff_recipes, dump_recipe, load_recipe, migrations, recipe_from_text
from alphaflow_cli.recipe.source import Mapping


def rate_became_lr(tree):
    """As if format 1 had called optim.lr `optim.rate`."""
    optim = tree.items.get("optim")
    if not isinstance(optim, Mapping) or "rate" not in optim.items:
        return tree
    rest = {key: value for key, value in optim.items.items() if key != "rate"}
    places = {**optim.key_where, "lr": optim.key_where["rate"]}
    optim = replace(optim, items={**rest, "lr": optim.items["rate"]}, key_where=places)
    return replace(tree, items={**tree.items, "optim": optim})


@pytest.fixture
def second_format(monkeypatch):
    """This version writes format 2, and reads format 1 through the migration above."""
    monkeypatch.setitem(migrations.MIGRATIONS, 1, rate_became_lr)


@pytest.mark.parametrize("first", ["", "format: 1\n"])
def test_a_renamed_key_of_an_older_format_is_read(first, second_format):
    old = recipe_from_text(f"{first}optim:\n  rate: 3e-4\n", "old.yaml")
    assert old == recipe_from_text("format: 2\noptim: {lr: 3e-4}", "new.yaml")
    assert dump_recipe(old).startswith('format: 2\nname: ""\n')
    assert recipe_from_text(dump_recipe(old), "copy.yaml") == old


def test_the_older_name_is_unknown_in_the_newer_format(second_format):
    with pytest.raises(AlphaflowError, match=r"new\.yaml:3: unknown key 'optim\.rate'"):
        recipe_from_text("format: 2\noptim:\n  rate: 3e-4\n", "new.yaml")


def test_a_fault_in_an_older_recipe_stands_at_its_own_line(second_format):
    with pytest.raises(AlphaflowError) as caught:
        recipe_from_text("train:\n  steps: 9\noptim:\n  eps: 0\n  rate: fast\n", "old.yaml")
    assert "old.yaml:5: optim.lr wants a number, got 'fast'" in str(caught.value)


@pytest.mark.parametrize("text", ["optim: 3", "optim: [rate]", "[]", "optim: {rate: {}}"])
def test_a_broken_recipe_of_an_older_format_is_still_only_a_fault(text, second_format):
    with pytest.raises(AlphaflowError, match=r"^old\.yaml"):
        recipe_from_text(text, "old.yaml")


def test_set_speaks_the_language_of_the_newest_format(tmp_path, second_format):
    path = tmp_path / "old.yaml"
    path.write_text("optim: {rate: 3e-4}")
    assert load_recipe(str(path), ["optim.lr=1e-3"]).optim.lr == 1e-3
    with pytest.raises(AlphaflowError, match=r"--set optim\.rate=1e-3: unknown key"):
        load_recipe(str(path), ["optim.rate=1e-3"])


def test_the_format_is_no_difference_between_recipes():
    plain, stated = recipe_from_text("name: x", "a"), recipe_from_text("format: 1\nname: x", "b")
    assert diff_recipes(plain, stated) == []
    assert dump_recipe(stated).splitlines()[0] == "format: 1"
    with pytest.raises(AlphaflowError, match="unknown key 'format'"):
        load_recipe("b2", ["format=1"])
