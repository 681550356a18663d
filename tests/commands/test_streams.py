"""stdout and stderr that are closed, full or left by their reader: the work is done, the exit code is right."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX pipes and signals")
ALPHAFLOW = f"{sys.executable} -m alphaflow_cli"
VERBS = {"help": "--help", "version": "--version", "show": "recipe show b2", "check": "recipe check b2"}
TINY = (
    "train quickstart --set train.steps=2 --set model.dim=32 --set model.depth=1 --set model.heads=2 "
    "--set train.batch=8 --set data.source=glyphs:64 --set alpha.kind=constant --set train.sample_every=0"
)
needs_full = pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs /dev/full")


def shell(line, **kwargs):
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False, **kwargs)


@pytest.mark.parametrize("args", VERBS.values(), ids=VERBS)
def test_a_reader_that_left_before_the_first_line_is_met_quietly(args):
    read, write = os.pipe()
    os.close(read)
    command = [*ALPHAFLOW.split(), *args.split()]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_changes_no_exit_code(closed):
    for args, code in (("--help", 0), ("recipe check b2", 0), ("recipe show nosuch", 1), ("recipe chek", 2)):
        done = shell(f"{ALPHAFLOW} {args} {closed}")
        assert done.returncode == code, (args, done.stderr)
        assert "Traceback" not in done.stderr


@needs_full
@pytest.mark.parametrize("args", VERBS.values(), ids=VERBS)
def test_a_full_stdout_is_said_in_a_line(args):
    done = shell(f"{ALPHAFLOW} {args} >/dev/full")
    assert done.returncode == 1
    assert done.stderr.startswith("error: stdout cannot be written (No space left on device)")
    assert done.stderr.count("\n") == 1
    assert shell(f"{ALPHAFLOW} {args} >/dev/full 2>/dev/full").returncode == 1


@needs_full
@pytest.mark.parametrize("args", VERBS.values(), ids=VERBS)
def test_a_full_stderr_does_not_touch_the_result(args):
    done = shell(f"{ALPHAFLOW} {args} 2>/dev/full")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == shell(f"{ALPHAFLOW} {args}").stdout


@needs_full
@pytest.mark.parametrize(
    "streams",
    [
        ">/dev/full 2>/dev/full",
        ">&- 2>&-",
        pytest.param(">/dev/full", marks=pytest.mark.slow),
        pytest.param("| true; exit ${PIPESTATUS[0]}", marks=pytest.mark.slow),
        pytest.param("2>&1 | true; exit ${PIPESTATUS[0]}", marks=pytest.mark.slow),
    ],
)
def test_a_training_that_nobody_hears_is_finished_and_saved(streams, tmp_path):
    done = shell(f"{ALPHAFLOW} {TINY} --out run {streams}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "run" / "model.safetensors").exists()
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1


def test_a_closed_stderr_is_not_the_next_file_that_is_opened(tmp_path):
    """Descriptor 2 would be the first file that a command writes; whatever libraries say would go into it."""
    script = (
        "from alphaflow_cli.cli import set_streams\nimport os\nset_streams()\n"
        "file = open('mine', 'wb')\nassert file.fileno() > 2\nos.write(2, b'talk')\nprint('result', flush=True)\n"
    )
    done = shell(f'{sys.executable} -c "{script}" >&- 2>&-', cwd=tmp_path)
    assert done.returncode == 0
    assert (tmp_path / "mine").read_bytes() == b""


def interrupted_after(seconds, *args):
    child = subprocess.Popen([*ALPHAFLOW.split(), *args], stderr=subprocess.PIPE, text=True)
    time.sleep(seconds)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    return child.returncode, err


@pytest.mark.parametrize("seconds", [0.3, 0.6, 1.2])
def test_ctrl_c_while_the_libraries_are_imported_is_one_line(seconds, tmp_path):
    code, err = interrupted_after(seconds, "sample", str(tmp_path / "none.safetensors"), "--grid", "g.png")
    assert (code, err) in [(130, "error: interrupted\n"), (1, err)]  # 1: this machine was faster than the signal
    assert "Traceback" not in err


@pytest.mark.slow
def test_ctrl_c_at_any_moment_of_the_start_is_one_line(tmp_path):
    for i in range(60):
        code, err = interrupted_after(0.1 + 0.05 * i, "sample", str(tmp_path / "none.safetensors"), "--grid", "g.png")
        assert code in (130, 1)
        assert "Traceback" not in err, err
        assert err.count("\n") == 1, err
