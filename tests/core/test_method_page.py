"""docs/method.md points to functions: every one of them must exist, and every kind of target must be pointed to."""

import importlib
import re
from functools import reduce

import pytest
from places import ROOT

PAGE = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
POINTERS = sorted(set(re.findall(r"(\w+/\w+\.py):([\w.]*\w)", PAGE)))
CORE = ("path", "times", "alpha", "guidance", "objective", "conflict", "sampler", "ema")
NOT_EQUATIONS = {"expand", "grid_evaluations"}  # shapes and counts


def resolve(file, name):
    module = importlib.import_module("alphaflow_cli." + file.removesuffix(".py").replace("/", "."))
    return reduce(getattr, name.split("."), module)


@pytest.mark.parametrize(("file", "name"), POINTERS)
def test_the_page_points_to_what_exists(file, name):
    assert callable(resolve(file, name))


@pytest.mark.parametrize("room", CORE)
def test_every_public_function_of_the_core_is_on_the_page(room):
    module = importlib.import_module(f"alphaflow_cli.core.{room}")
    own = {
        name
        for name, value in vars(module).items()
        if callable(value) and value.__module__ == module.__name__ and name[0].islower()
    }
    named = {name for file, name in POINTERS if file == f"core/{room}.py"}
    assert own - named - NOT_EQUATIONS == set()


def test_the_page_names_no_line_numbers():
    assert not re.search(r"\.py:\d", PAGE)
