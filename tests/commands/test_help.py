"""Every `--help` equals its committed snapshot and has an example.

`PYTHONPATH=tests/helpers python tests/commands/test_help.py` writes the snapshots anew.
"""

import os
import shlex

import click
import pytest
from places import ROOT

from alphaflow_cli.cli import SETTINGS, group, run

SNAPSHOTS = ROOT / "tests" / "help"
WIDTH = 100
RUN_HERE = ("alphaflow", "recipe", "doctor")  # verbs whose examples run at once, with nothing but this package


def pages(columns=WIDTH):
    """Command path → help text, over the whole tree."""

    def walk(command, path, parent):
        width = {"max_content_width": columns, "terminal_width": columns}
        ctx = click.Context(command, info_name=path[-1], parent=parent, **{**SETTINGS, **width})
        yield path, command.get_help(ctx) + "\n"
        if isinstance(command, click.Group):
            for name in command.list_commands(ctx):
                yield from walk(command.get_command(ctx, name), (*path, name), ctx)

    return dict(walk(group, ("alphaflow",), None))


PAGES = pages()


def snapshot(path):
    return SNAPSHOTS / ("-".join(path[1:] or path) + ".txt")


def examples_of(text):
    """The command lines under `Examples:`."""
    return [
        line.strip() for line in text.partition("Examples:")[2].splitlines() if line.strip().startswith("alphaflow ")
    ]


@pytest.mark.parametrize("path", PAGES, ids=" ".join)
def test_help_equals_its_snapshot(path):
    file = snapshot(path)
    assert file.exists(), f"no {file.name}: run PYTHONPATH=tests/helpers python tests/commands/test_help.py"
    again = "PYTHONPATH=tests/helpers python tests/commands/test_help.py"
    assert PAGES[path] == file.read_text(encoding="utf-8"), f"if the change is meant: {again}"


def test_no_line_of_a_list_of_commands_is_cut_on_a_terminal_of_80_columns():
    assert [" ".join(path) for path, text in pages(columns=80).items() if "..." in text.partition("Commands:")[2]] == []


@pytest.mark.parametrize("path", PAGES, ids=" ".join)
def test_help_has_an_example_of_that_very_command(path):
    lines = examples_of(PAGES[path])
    assert lines
    assert all(line.startswith(" ".join(path)) for line in lines), lines


def test_no_snapshot_is_left_over():
    assert {file.name for file in SNAPSHOTS.glob("*.txt")} == {snapshot(path).name for path in PAGES}


EXAMPLES = sorted(
    {line for path, text in PAGES.items() if path[min(1, len(path) - 1)] in RUN_HERE for line in examples_of(text)}
)


NEEDS_A_STORE = "alphaflow recipe new"  # test_propose.py and the lines of the pages run it


@pytest.mark.parametrize("line", [x for x in EXAMPLES if x.split()[1] in RUN_HERE and not x.startswith(NEEDS_A_STORE)])
def test_the_example_runs(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(shlex.split(line)[1:]) == 0, capsys.readouterr().err
    assert capsys.readouterr().out


def write_snapshots():
    SNAPSHOTS.mkdir(exist_ok=True)
    for file in SNAPSHOTS.glob("*.txt"):
        file.unlink()
    for path, text in PAGES.items():
        snapshot(path).write_text(text, encoding="utf-8")
        print(os.path.relpath(snapshot(path)))


if __name__ == "__main__":
    write_snapshots()
