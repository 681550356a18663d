"""Mistakes on the command line, and how a command ends: one clear line, the right exit code, no traceback."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from terminals import read_all

from alphaflow_cli.cli import run, split_debug

USAGE = {
    "unknown verb": (["docter"], "No such command 'docter'. Did you mean 'doctor'?"),
    "unknown verb, unlike any": (["zzz"], "No such command 'zzz'."),
    "unknown subcommand": (["recipe", "chek"], "No such command 'chek'. Did you mean 'check'?"),
    "unknown option": (["recipe", "show", "b2", "--jsom"], "No such option '--jsom'. Did you mean '--json'?"),
    "unknown option of the group": (["--verbose"], "No such option '--verbose'. Did you mean '--version'?"),
    "missing argument": (
        ["recipe", "show"],
        "Missing argument 'RECIPE'. Give a file, or a shipped recipe: quickstart,",
    ),
    "a recipe's value as an option": (["train", "b2", "--steps", "100"], "'--steps'. Write: --set train.steps=100"),
    "the same with =": (["train", "b2", "--lr=1e-4", "--dry-run"], "'--lr'. Write: --set optim.lr=1e-4"),
    "the same without a value": (["recipe", "show", "b2", "--batch", "--json"], "Write: --set train.batch=VALUE"),
    "missing files": (["recipe", "check"], "Missing argument 'FILE...'. Examples: alphaflow recipe check --help"),
    "missing pictures": (["prep-latents"], "Missing argument 'SOURCE'. Examples: alphaflow prep-latents --help"),
    "missing option": (["convert", "x.pt"], "Missing option '-o'"),
    "missing value": (["recipe", "show", "b2", "--set"], "Option '--set' requires an argument"),
    "empty source": (["prep-latents", ""], "An empty name is no source of pictures. Give a folder, an archive"),
    "too many arguments": (["recipe", "show", "b2", "b4"], "unexpected extra argument"),
    "wrong ending": (["recipe", "plot", "b2", "-o", "b2.pdf"], "'b2.pdf' must end in .png or .svg"),
    "copy without ending": (["recipe", "cp", "b2", "mine"], "'mine' must end in .yaml"),
}
FAULTS = {
    "unknown recipe": (
        ["recipe", "show", "b2cfg"],
        "error: 'b2cfg' is neither a file nor a shipped recipe. Did you mean 'b2-cfg'?",
    ),
    "missing file": (["recipe", "show", "x.yaml"], "error: x.yaml: no such file"),
    "file name with a null byte": (["recipe", "show", "a\0.yaml"], "cannot be read"),
    "plot into nowhere": (
        ["recipe", "plot", "b2", "-o", "no/b2.png"],
        "no/b2.png: cannot be written (no: no such file or folder)",
    ),
    "copy into nowhere": (["recipe", "cp", "b2", "no/b2.yaml"], "no/b2.yaml: cannot be written"),
    "run of no user": (["sample", "~nobodyhere/run", "--grid", "a.png"], "~nobodyhere/run: no such checkpoint"),
    "file of no user": (["eval", "~nobodyhere/m.safetensors"], "~nobodyhere/m.safetensors: no such checkpoint"),
    "pictures of no user": (["reference", "~nobodyhere/x", "-o", "a.safetensors"], "~nobodyhere/x: no such folder"),
}


@pytest.mark.parametrize(("args", "message"), USAGE.values(), ids=USAGE)
def test_a_wrong_command_line_shows_its_usage_and_exits_2(args, message, capsys):
    assert run(args) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert err.startswith("Usage: alphaflow")
    assert out == ""
    assert "Traceback" not in err


def test_the_usage_is_that_of_the_command_where_a_value_is_missing(capsys):
    for args, usage in (
        (["train", "b2", "--data"], "train [OPTIONS] RECIPE"),
        (["recipe", "show", "b2", "--set"], "recipe show"),
    ):
        assert run(args) == 2
        assert capsys.readouterr().err.startswith(f"Usage: alphaflow {usage}")


def test_a_missing_run_is_answered_by_the_runs_that_are_here(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(["sample"]) == 2
    assert (
        "Missing argument 'CKPT'. Runs here: none yet; alphaflow train quickstart makes one" in capsys.readouterr().err
    )
    for name in ("mine", "b2", "notes"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    for name, when in (("mine", 2), ("b2", 1)):
        (tmp_path / "runs" / name / "recipe.yaml").touch()
        os.utime(tmp_path / "runs" / name, (when, when))
    for args in (["report"], ["ema"], ["eval"]):
        assert run(args) == 2
        assert capsys.readouterr().err.endswith("Runs here: runs/mine, runs/b2\n")


def test_a_mistyped_folder_of_pictures_is_looked_up_nearby(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    assert run(["prep-latents", "fotos/"]) == 1
    assert "fotos/: no such folder or archive. Did you mean photos?" in capsys.readouterr().err
    assert run(["prep-latents", "cats"]) == 1
    assert "cats: no such folder or archive. Others: hf://datasets/USER/NAME" in capsys.readouterr().err


@pytest.mark.parametrize("args", [[], ["recipe"]])
def test_a_command_without_a_verb_prints_its_help_once(args, capsys):
    assert run(args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("Usage: alphaflow")
    assert err.count("Usage:") == err.count("Examples:") == err.count("Show this message") == 1
    assert "error:" not in err


@pytest.mark.parametrize("args", [["-h"], ["recipe", "-h"], ["recipe", "show", "-h"], ["doctor", "-h"]])
def test_h_is_help(args, capsys):
    assert run(args) == 0
    short = capsys.readouterr().out
    assert run([*args[:-1], "--help"]) == 0
    assert short == capsys.readouterr().out


def test_a_plot_is_named_after_its_recipe_unless_it_is_given_a_name(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(["recipe", "plot", "quickstart"]) == 0
    assert capsys.readouterr().out == "quickstart.png\n"
    assert Path("quickstart.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("args", "message"), FAULTS.values(), ids=FAULTS)
def test_a_file_at_fault_exits_1(args, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(args) == 1
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_cp_never_overwrites(tmp_path, capsys):
    mine = tmp_path / "mine.yaml"
    assert run(["recipe", "cp", "b2", str(mine)]) == 0
    mine.write_text("# mine\n")
    assert run(["recipe", "cp", "b4", str(mine)]) == 1
    assert "exists already" in capsys.readouterr().err
    assert mine.read_text() == "# mine\n"


def test_check_goes_through_all_files_and_fails_if_any_does(tmp_path, capsys):
    bad = tmp_path / "bad.yaml"
    bad.write_text("x: 1")
    assert run(["recipe", "check", str(bad), "b2"]) == 1
    out, err = capsys.readouterr()
    assert out.startswith("b2: good\n")
    assert "unknown key 'x'" in err


@pytest.mark.parametrize("args", [["--debug", "recipe", "show", "b3"], ["recipe", "show", "b3", "--debug"]])
def test_debug_shows_the_traceback_wherever_it_stands(args, capsys):
    assert run(args) == 1
    err = capsys.readouterr().err
    assert "error: 'b3'" in err
    assert "Traceback (most recent call last)" in err


def test_debug_after_two_dashes_is_an_argument():
    assert split_debug(["a", "--", "--debug"]) == (False, ["a", "--", "--debug"])


def test_our_own_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("alphaflow_cli.recipe.loader.shipped", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(["recipe", "show", "b2"])


def alphaflow(*args, **kwargs):
    return subprocess.run(
        [sys.executable, "-m", "alphaflow_cli", *args], capture_output=True, text=True, check=False, **kwargs
    )


def test_the_process_exits_with_the_same_codes(tmp_path):
    (tmp_path / "r.yaml").write_text("x: 1")
    assert alphaflow("recipe", "check", "r.yaml", cwd=tmp_path).returncode == 1
    assert alphaflow("recipe", "chek", cwd=tmp_path).returncode == 2
    done = alphaflow("--version", cwd=tmp_path)
    assert (done.returncode, done.stdout.split()[0], done.stderr) == (0, "alphaflow", "")


def test_errors_are_plain_text_when_piped_and_a_terminal_without_greek_gets_an_answer(tmp_path):
    env = {**os.environ, "PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"}
    done = alphaflow("recipe", "show", "b2", env=env, encoding="latin-1")
    assert done.returncode == 0
    assert "115,308" in done.stdout
    assert "\x1b" not in alphaflow("recipe", "show", "b3").stderr


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX terminals and signals")
def test_no_color_is_honoured_on_a_terminal():
    import pty

    for plain in (False, True):
        env = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | ({"NO_COLOR": "1"} if plain else {})
        env["TERM"] = "xterm"
        parent, child = pty.openpty()
        command = [sys.executable, "-m", "alphaflow_cli", "recipe", "show", "b3"]
        subprocess.run(command, stdin=child, stdout=child, stderr=child, env=env, check=False)
        os.close(child)
        said = read_all(parent)
        assert b"error:" in said
        assert (b"\x1b[" in said) is not plain


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize(
    ("sent", "code", "said"), [(signal.SIGINT, 130, b"error: interrupted\n"), (signal.SIGTERM, 143, b"")]
)
def test_an_interrupted_command_says_so_by_its_code(sent, code, said, tmp_path):
    pipe = tmp_path / "slow.yaml"
    os.mkfifo(pipe)  # whoever opens it waits for the other side, and reading a recipe from it until somebody writes
    child = subprocess.Popen(
        [sys.executable, "-m", "alphaflow_cli", "recipe", "check", str(pipe)], stderr=subprocess.PIPE
    )
    with pipe.open("w"):
        child.send_signal(sent)
        _, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (code, said)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX pipes")
def test_a_reader_that_leaves_is_met_quietly():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "alphaflow_cli", "recipe", "show", "b2"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


def test_completion_offers_verbs_and_recipes():
    env = {
        **os.environ,
        "_ALPHAFLOW_COMPLETE": "bash_complete",
        "COMP_CWORD": "3",
        "COMP_WORDS": "alphaflow recipe show xl",
    }
    command = Path(sys.executable).with_name("alphaflow")
    done = subprocess.run([command], env=env, capture_output=True, text=True, check=False)
    assert {"plain,xl2-cfg", "plain,xl2-plus-cfg"} <= set(done.stdout.split())
