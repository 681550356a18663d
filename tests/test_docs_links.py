"""The pages and what they name: every link leads to a file and a heading, every `file.py:name` is defined there.

And every option of every command is named on a page.
"""

import ast
import re

import click
import pytest
from places import ROOT

from alphaflow_cli.cli import group

PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/**/*.md")})
PACKAGE = ROOT / "alphaflow_cli"


def without_code(text):
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def anchors(page):
    """The headings of a page as GitHub writes them into addresses."""
    for heading in re.findall(r"^#+ (.*)", without_code(page.read_text(encoding="utf-8")), re.M):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        yield re.sub(r"[^\w\- ]", "", words).replace(" ", "-")


def broken_links(page, text):
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(text)):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        known = link.startswith("https://") or target.exists()
        if not known or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            yield link


def defined(tree):
    """The dotted name of each function, class and method of a module."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
            if isinstance(node, ast.ClassDef):
                yield from (f"{node.name}.{name}" for name in defined(node))


def lost_pointers(text):
    for file, name in re.findall(r"([a-z_]+/[a-z_]+\.py):([A-Za-z_][\w.]*\w)", text):
        path = PACKAGE / file
        if not path.exists() or name not in defined(ast.parse(path.read_text(encoding="utf-8"))):
            yield f"{file}:{name}"


def options_of(command, words=()):
    """(command, the spellings of one option), over the whole tree."""
    if isinstance(command, click.Group):
        ctx = click.Context(command)
        for name in command.list_commands(ctx):
            yield from options_of(command.get_command(ctx, name), (*words, name))
    else:
        for option in (param for param in command.params if isinstance(param, click.Option)):
            yield " ".join(words), [*option.opts, *option.secondary_opts]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_and_pointer_of_a_page_leads_somewhere(page):
    text = page.read_text(encoding="utf-8")
    assert [*broken_links(page, text), *lost_pointers(text)] == []


def test_a_link_that_leads_nowhere_is_found():
    text = "[a](missing.md) [b](docs/index.md#nothing) [c](docs/index.md#i-want-to-begin) core/path.py:interpolat"
    page = ROOT / "README.md"
    assert [*broken_links(page, text)] == ["missing.md", "docs/index.md#nothing"]
    assert [*lost_pointers(text)] == ["core/path.py:interpolat"]


def test_every_option_is_named_on_a_page():
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES if page.parent in (ROOT, ROOT / "docs"))
    named = set(re.findall(r"--[a-z][\w-]*\w", text))
    assert [(verb, words) for verb, words in options_of(group) if not named & set(words)] == []


def test_the_list_of_all_commands_has_each_of_them():
    text = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([a-z-]+)` \|", text, re.M)
    assert rows == group.list_commands(click.Context(group))
