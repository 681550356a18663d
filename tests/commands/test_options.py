"""Every option of every verb, given what nobody means: one short line and an exit code, no traceback, no waiting."""

import os
import subprocess
import sys
import time

import click
import pytest

from alphaflow_cli.cli import group, run

NINES = "9" * 5000
NUMBERS = [
    "0x10",
    "nan",
    "inf",
    "-inf",
    "1e309",
    NINES,
    f"-{NINES}",
    "1_",
    "1__0",
    "",
    " ",
    "٣",
    "½",
    "1e5",
]
TOO_LARGE = ["1000000000", "99999999999999999999", "-1", "-99999999999999999999"]
TEXTS = [
    "",
    " ",
    NINES,
    "nan",
    "-",
    "x" * 5000,
    "a\nb",
    "\x1b[31mred",
    "\udcff",
    "../" * 2000,
    "=",
    ",,,",
    "{}",
    "9-1",
    "*a",
]
ANYTHING = {"--seed": "-1 1000000000", "--guidance": "-1", "--images": "", "--limit": "", "--keep": ""}  # good values
EXAMPLE = {"-o": {"plot": "a.png", "reference": "a.safetensors"}}


def commands():
    """Every command that does something, with its path on the command line."""

    def walk(command, path, parent):
        ctx = click.Context(command, info_name=path[-1], parent=parent)
        if isinstance(command, click.Group):
            for name in command.list_commands(ctx):
                yield from walk(command.get_command(ctx, name), (*path, name), ctx)
        else:
            yield path[1:], command

    return list(walk(group, ("alphaflow",), None))


def options(of_numbers):
    """(path, command, option) of every option that takes a value; those of numbers by their type."""
    for path, command in commands():
        for option in command.params:
            if isinstance(option, click.Option) and not option.is_flag:
                numeric = option.type.name.lower() in ("integer", "float", "n|auto")
                if numeric is of_numbers:
                    yield pytest.param(path, command, option, id=" ".join([*path, option.opts[0]]))


def line_with(path, command, option, value):
    """A command line in which everything is sound but `option`, though its files are not there."""
    line = list(path)
    for other in command.params:
        if isinstance(other, click.Option) and other.required and other is not option:
            choices = getattr(other.type, "choices", None)
            line += [other.opts[0], choices[0] if choices else EXAMPLE["-o"].get(path[-1], "a.out")]
    line += [f"{option.opts[-1]}={value}"]
    arguments = [p for p in command.params if isinstance(p, click.Argument) and p.required]
    return [*line, "--", *("b2" if argument.name == "recipe" else "nosuch" for argument in arguments)]


def refused(line, capsys):
    """Run it; it must end at once with a short message. Returns the exit code and the message."""
    code = run(line)
    out, err = capsys.readouterr()
    assert code in (1, 2), (line, out)
    assert "error: " in err
    assert len(err.splitlines()) <= 4, err
    assert len(err) <= 2000
    return code, err


@pytest.fixture
def quick():
    """A test's values are refused at once: 0.01 s each, but for the libraries that the first one imports."""
    before = time.monotonic()
    yield
    assert time.monotonic() - before < 15


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("path", "command", "option"), list(options(of_numbers=True)))
def test_a_number_out_of_its_bounds_is_refused_by_name(path, command, option, capsys, quick):
    good = [] if option.opts[0] not in ANYTHING else ANYTHING[option.opts[0]].split()
    for value in [*NUMBERS, *TOO_LARGE]:
        if value in good:
            continue
        if value == "1000000000" and option.opts[0] in ANYTHING:
            value = "10000000000000"
        if option.type.name == "float" and value in ("1e5", "٣"):
            continue
        code, err = refused(line_with(path, command, option, value), capsys)
        assert code == 2, (value, err)
        assert f"'{option.opts[0]}'" in err or f"'{option.opts[-1]}'" in err or " / " in err
        assert "9" * 500 not in err


@pytest.mark.parametrize(("path", "command", "option"), list(options(of_numbers=False)))
def test_any_text_is_taken_or_refused_in_a_line(path, command, option, capsys, quick):
    for value in TEXTS:
        refused(line_with(path, command, option, value), capsys)


@pytest.mark.parametrize(("path", "command"), [pytest.param(*each, id=" ".join(each[0])) for each in commands()])
def test_any_text_for_a_file_is_refused_in_a_line(path, command, capsys, quick):
    arguments = [p for p in command.params if isinstance(p, click.Argument)]
    for value in [v for v in TEXTS if v != "9-1"] if arguments else []:
        needed = [
            w
            for p in command.params
            if isinstance(p, click.Option) and p.required
            for w in (p.opts[0], "a.safetensors")
        ]
        needed = [w.replace(".safetensors", ".png") for w in needed] if path[-1] == "plot" else needed
        refused([*path, *needed, "--", *[value] * (2 if path[-1] == "cp" else 1)], capsys)


@pytest.mark.parametrize("value", [NINES, "1000000000", "nan"])
def test_the_limit_is_named(value, capsys):
    assert run(["eval", "nosuch", "--nfe", value]) == 2
    err = capsys.readouterr().err
    assert "is not a whole number from 1 to 10,000." in err
    assert len(err) < 700


def test_numbers_are_read_as_before(capsys):
    from alphaflow_cli.commands.values import GUIDANCE, IMAGES, SEED

    assert [IMAGES.convert(v, None, None) for v in ("7", 7, "+7", "1_000", " 7 ")] == [7, 7, 7, 1000, 7]
    assert [SEED.convert(v, None, None) for v in ("-1", "0", str(2**63 - 1))] == [-1, 0, 2**63 - 1]
    assert [GUIDANCE.convert(v, None, None) for v in ("1e-3", "2", "-0.5", 1.5)] == [1e-3, 2.0, -0.5, 1.5]


@pytest.mark.parametrize(
    "line", ["train b2 --data=~/none", "report ~/none", "ema ~/none", "push RUN --autoencoder=~/none"]
)
def test_a_tilde_that_the_shell_leaves_is_the_home_folder(line, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run(line.split()) in (1, 2)
    err = capsys.readouterr().err
    assert str(tmp_path / "none") in err, err
    assert "~" not in err


FAR = "x" * 300


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX files")
@pytest.mark.parametrize(
    "option",
    [
        "prep-latents --out",
        "sample --out",
        "sample --grid",
        "sample --latents",
        "recipe plot -o",
        "recipe cp",
        "reference -o",
        "reference --work",
        "report -o",
        "convert -o",
        "eval --out",
        "ema --out",
        "analyze --out",
        "train --out",
        "push --out",
        "pull -o",
    ],
)
def test_a_destination_that_cannot_be_written_is_refused_before_the_work(option, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "d.safetensors"
    (folder / "e").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe.yaml")
    endings = {"recipe plot -o": ".png", "recipe cp": ".yaml"}
    ending = endings.get(option, ".safetensors")
    is_folder = option.endswith(("--out", "--work")) or option == "pull -o"
    bad = {
        f"file/a{ending}": "a part of the path is a file, not a folder",
        f"file/b/a{ending}": "a part of the path is a file, not a folder",
        f"{FAR}{ending}": "longer than the file system allows",
        "y/" * 2500 + f"a{ending}": "longer than the file system allows",
        f"a\0b{ending}": "null byte",
    }
    if not is_folder:
        bad |= {f"none/a{ending}": "none: no such file or folder"}
    if is_folder:
        bad |= {"file": "is a file", "pipe.yaml": "file"}
    elif option != "recipe cp":
        bad |= {"d.safetensors": "is a directory", "pipe.yaml": "a device or a pipe"}
    before = sorted(tmp_path.rglob("*"))
    words, name = option.rpartition(" ")[0].split(), option.rpartition(" ")[2]
    for path, message in bad.items():
        given = [path] if name == "cp" else [name, path]
        line = [*words, *(["cp"] if name == "cp" else []), *(["b2"] if words == ["recipe"] else ["nosuch"]), *given]
        if option == "reference --work":
            line += ["-o", "a.safetensors"]
        assert run(line) in (1, 2), line
        err = capsys.readouterr().err
        assert message in err, (line, err)
        assert len(err.splitlines()) <= 2
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "pipe.yaml").unlink()
    for path in (tmp_path / "file", folder / "e", folder):
        path.rmdir() if path.is_dir() else path.unlink()


WITH_WEIGHTS = ["train b2 --out", "convert nosuch -o", "reference nosuch -o", "eval nosuch --out", "pull a/b -o"]


@pytest.mark.skipif(sys.platform != "linux", reason="other file systems take no such name")
@pytest.mark.parametrize("line", WITH_WEIGHTS)
def test_a_path_that_is_not_utf_8_is_refused_where_weights_would_not_be_read_again(line, tmp_path, capsys):
    assert run([*line.split(), "run\udcff.safetensors"]) == 1
    err = capsys.readouterr().err
    assert (
        r"error: run\xff.safetensors: cannot be written (not UTF-8, and weights cannot be read from such a path)" in err
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="other file systems take no such name")
def test_other_files_may_have_any_name(tmp_path):
    command = [sys.executable, "-m", "alphaflow_cli", "recipe"]
    done = subprocess.run([*command, "cp", "b2", b"mine\xff.yaml"], capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"mine\xff.yaml\n", b"")
    assert [os.fsencode(path.name) for path in tmp_path.iterdir()] == [b"mine\xff.yaml"]
    assert subprocess.run([*command, "check", done.stdout.strip()], capture_output=True, check=False).returncode == 0
