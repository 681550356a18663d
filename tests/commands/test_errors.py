"""Which errors of Python are the user's: they are one line with the path and what to do. A bug keeps its traceback."""

import errno
import json
import os
import sys
from pathlib import Path

import click
import pytest
import yaml

import alphaflow_cli
from alphaflow_cli.cli import run
from alphaflow_cli.errors import AlphaflowError, LostOutput, fault_of_the_user, pip_install
from alphaflow_cli.text import for_message, shorten


def raised(work):
    try:
        work()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def system_error(number, path=None):
    return OSError(number, os.strerror(number), *([path] if path is not None else []))


def deep_call(depth=0):
    return deep_call(depth + 1)


THEIRS = {
    "no file": (lambda: system_error(errno.ENOENT, "a/b.png"), "a/b.png: no such file or folder. Check the path"),
    "no permission": (lambda: system_error(errno.EACCES, Path("a")), "a: no permission."),
    "a file for a folder": (lambda: system_error(errno.ENOTDIR, b"a/b"), "a/b: a part of the path is a file"),
    "a folder for a file": (lambda: system_error(errno.EISDIR, "a"), "a: a folder, where a file is wanted"),
    "a long name": (lambda: system_error(errno.ENAMETOOLONG, "a" * 300), "longer than the file system allows"),
    "a rare errno of a path": (lambda: system_error(errno.EXDEV, "a"), f"a: {os.strerror(errno.EXDEV)}"),
    "a name that is not UTF-8": (lambda: system_error(errno.ENOENT, b"a\xff"), r"a\xff: no such file"),
    "a full disk, no path": (lambda: system_error(errno.ENOSPC), "the disk is full. Make room"),
    "a quota": (lambda: system_error(errno.EDQUOT), "the quota of this disk is used up"),
    "a read-only disk": (lambda: system_error(errno.EROFS, "a"), "a: the file system is read-only"),
    "too many files": (lambda: system_error(errno.EMFILE), "Raise the limit: ulimit -n"),
    "memory": (lambda: MemoryError("Unable to allocate 7 TiB"), "Unable to allocate 7 TiB. Do less at once"),
    "memory, without a word": (lambda: MemoryError(), "memory is used up. Do less at once"),
    "memory by torch": (
        lambda: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        "can't allocate memory: you tried. Do less at once",
    ),
    "deep JSON": (lambda: raised(lambda: json.loads("[" * 100_000)), "nested too deeply"),
    "deep YAML": (lambda: raised(lambda: yaml.safe_load("[" * 10_000)), "nested too deeply"),
    "a null byte": (lambda: raised(lambda: Path("a\0b").read_text()), "a path has a null byte in it"),
    "a null byte, as Python 3.13 says it": (
        lambda: ValueError("stat: embedded null character in path"),
        "a path has a null byte in it",
    ),
    "a name that is written down": (lambda: raised(lambda: "run\udcff".encode()), r"run\xff: a name that is not UTF-8"),
}
OURS = {
    "a closed descriptor": lambda: raised(lambda: os.write(10_000, b"x")),
    "a broken pipe between processes": lambda: BrokenPipeError(errno.EPIPE, "Broken pipe"),
    "a lost connection": lambda: ConnectionResetError(errno.ECONNRESET, "reset"),
    "a file of the program": lambda: system_error(errno.ENOENT, str(Path(alphaflow_cli.__file__).with_name("no.txt"))),
    "a file of a library": lambda: system_error(errno.ENOENT, str(Path(click.__file__).with_name("no.txt"))),
    "a file of Python": lambda: system_error(errno.EACCES, os.__file__),
    "an error without a number": lambda: OSError("something"),
    "a descriptor for a name": lambda: OSError(errno.EBADF, "bad", 7),
    "endless calls": lambda: raised(deep_call),
    "bytes that are no text, from no file": lambda: raised(lambda: b"\xff".decode()),
    "text that cannot be written, from no name": lambda: raised(lambda: "α".encode("ascii")),
    "half a character": lambda: raised(lambda: "\ud83d".encode()),
    "a wrong value": lambda: ValueError("x"),
    "an assertion": lambda: AssertionError("x"),
    "a shape": lambda: RuntimeError("shapes do not match"),
}


@pytest.mark.parametrize(("error", "message"), THEIRS.values(), ids=THEIRS)
def test_an_error_of_the_users_files_or_machine_is_a_line(error, message):
    line = fault_of_the_user(error())
    assert message in for_message(line)
    assert "\n" not in line


@pytest.mark.parametrize("error", OURS.values(), ids=OURS)
def test_a_bug_of_ours_has_no_line(error):
    assert fault_of_the_user(error()) == ""


def test_a_file_that_is_no_text_is_named(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xff\xfe")
    assert fault_of_the_user(raised(lambda: path.read_text(encoding="utf-8"))).startswith(f"{path}: not UTF-8 text")


def test_a_lost_output_is_not_a_system_error_that_another_could_be():
    lost = LostOutput(OSError(errno.ENOSPC, "No space left on device"))
    assert isinstance(lost, AlphaflowError)
    assert not isinstance(lost, OSError)


@pytest.mark.parametrize("error", [system_error(errno.EACCES, "mine.yaml"), MemoryError(), system_error(errno.ENOSPC)])
def test_the_top_makes_a_line_of_them(error, monkeypatch, capsys):
    def fail(*_):
        raise error

    monkeypatch.setattr("alphaflow_cli.recipe.loader.shipped", fail)
    assert run(["recipe", "show", "b2"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert run(["recipe", "show", "b2", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error", [BrokenPipeError(errno.EPIPE, "x"), EOFError("x"), OSError("x"), RecursionError(), ValueError("x")]
)
def test_the_top_lets_a_bug_pass(error, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr("alphaflow_cli.recipe.loader.shipped", fail)
    with pytest.raises((OSError, RuntimeError, ValueError)) as caught:
        run(["recipe", "show", "b2"])
    assert error in (caught.value, caught.value.__cause__)  # of a broken pipe and an early end, click would not say it


def test_a_message_is_cut_where_nobody_reads_on():
    assert for_message("short") == "short"
    assert 350 < len(for_message("9" * 5000)) <= 400
    assert for_message("x" * 9999).startswith("x" * 150)
    assert len(for_message("\n".join("line" for _ in range(4001))).splitlines()) == 40
    assert for_message("\n".join("line" for _ in range(4001))).endswith("… and 3,962 more lines")
    assert len(for_message("word " * 5000)) <= 4000
    assert shorten("a" * 50 + "b" * 50, 60) == "a" * 17 + "…(66 more)…" + "b" * 17


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX file names")
def test_a_long_command_line_gets_a_short_answer(capsys):
    for args in (["recipe", "show", "9" * 5000], ["recipe", "show", "b2", f"--{'x' * 5000}"], ["9" * 5000]):
        assert run(args) in (1, 2)
        assert len(capsys.readouterr().err) < 1000


def test_a_worker_makes_a_line_of_them_too(monkeypatch, capsys):
    from alphaflow_cli.runtime.launch import as_worker

    def work():
        raise system_error(errno.EACCES, "latents/shard-0.bin")

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit) as ended:
        as_worker(work)
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith("error: process 0: latents/shard-0.bin: no permission.")


def lost_output(cause):
    lost = LostOutput(cause)
    lost.__cause__ = cause
    return lost


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (lost_output(BrokenPipeError(errno.EPIPE, "Broken pipe")), 141, ""),
        (lost_output(system_error(errno.ENOSPC)), 1, "error: process 0: stdout cannot be written"),
    ],
)
def test_a_worker_ends_as_a_single_process_would(error, code, message, monkeypatch, capsys):
    from alphaflow_cli.runtime import launch

    def work():
        raise error

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit) as ended:
        launch.as_worker(work)
    assert ended.value.code == code
    assert capsys.readouterr().err[: len(message) or None] == message


def test_a_command_whose_reader_left_ends_so_in_many_processes_too(tmp_path):
    from alphaflow_cli.runtime import launch

    assert launch._report(tmp_path, {0: 141, 1: -15}) == launch._report(tmp_path, {0: 141, 1: 143}) == 141


@pytest.mark.parametrize(
    ("origin", "command"),
    [
        ('{"url": "file://HERE/my%20clone", "dir_info": {"editable": true}}', "-e 'HERE/my clone[onnx]'"),
        ('{"url": "file://HERE", "dir_info": {}}', "'.[onnx]'"),
        ('{"url": "file://HERE/gone", "dir_info": {}}', "'alphaflow-cli[onnx]'"),
        (
            '{"url": "https://h/a.git", "vcs_info": {"vcs": "git", "commit_id": "1"}}',
            "'alphaflow-cli[onnx] @ git+https://h/a.git'",
        ),
        (None, "'alphaflow-cli[onnx]'"),
    ],
)
def test_an_extra_is_installed_from_where_the_program_came(tmp_path, monkeypatch, origin, command):
    (tmp_path / "my clone").mkdir()
    record = tmp_path / "alphaflow_cli-1.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: alphaflow-cli\nVersion: 1\n")
    if origin:
        (record / "direct_url.json").write_text(origin.replace("HERE", str(tmp_path)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert pip_install("onnx") == f"pip install {command}".replace("HERE", str(tmp_path))


def test_a_clone_that_is_not_installed_names_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.chdir(Path(alphaflow_cli.__file__).parents[1])
    assert pip_install("tensorboard,wandb") == "pip install '.[tensorboard,wandb]'"
