"""A cluster's clock: Slurm's warning saves the run, and with --requeue asks for the job again."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from train_helpers import make_recipe, make_store, saved_step, wait_for_step

from alphaflow_cli.cli import run as cli

LONG = ("--set", "train.steps=5000", "--set", "alpha.start=10", "--set", "alpha.end=20")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("latents") / "store")


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A job's environment, with a stand-in for scontrol that notes what it is asked."""
    notes = tmp_path / "asked.txt"
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    refusal = f'if [ -e "{tmp_path}/refuses" ]; then echo Invalid >&2; exit 1; fi'
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> "{notes}"\n{refusal}\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    return notes


def line(tmp_path, store, *words):
    make_recipe(tmp_path)
    folders = ["--data", str(store), "--out", str(tmp_path / "run")]
    return ["train", str(tmp_path / "tiny.yaml"), *folders, *LONG, *words]


def warned(folder, words):
    """Run the command in this process; Slurm's warning comes after a save."""

    def warn():
        wait_for_step(folder, 5)
        time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.getsignal(signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # one that comes too late must not end the tests
    other = threading.Thread(target=warn)
    other.start()
    try:
        with pytest.raises(SystemExit) as left:
            cli(words)
        return left.value.code
    finally:
        other.join()
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("refuses", [False, True])
def test_the_warning_saves_and_asks_for_the_job_again(refuses, job, store, tmp_path, capsys):
    if refuses:
        (tmp_path / "refuses").touch()
    assert warned(tmp_path / "run", line(tmp_path, store, "--requeue")) == 138
    assert job.read_text() == "requeue 4711\n"
    err = capsys.readouterr().err
    assert f"stopped and saved at step {saved_step(tmp_path / 'run'):,}." in err
    last = "warning: job 4711 was not queued again: Invalid. Submit it once more: the run resumes."
    assert (last if refuses else "job 4711 is queued again: scontrol requeue 4711") in err
    assert "error" not in err


def test_without_the_option_the_warning_saves_and_ends(job, store, tmp_path, capsys):
    assert warned(tmp_path / "run", line(tmp_path, store)) == 138
    assert not job.exists()
    assert "To go on, run the same command again." in capsys.readouterr().err


@pytest.mark.distributed
@pytest.mark.slow
def test_the_warning_reaches_the_processes_of_a_command_and_one_of_them_asks(job, store, tmp_path):
    words = [sys.executable, "-m", "alphaflow_cli", *line(tmp_path, store, "--requeue", "--processes", "2")]
    paths = {"PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen(words, cwd=tmp_path, env={**os.environ, **paths}, stderr=subprocess.PIPE, text=True)
    wait_for_step(tmp_path / "run", 5)
    parent.send_signal(signal.SIGUSR1)
    _, err = parent.communicate(timeout=60)
    assert parent.returncode == 138, err
    assert job.read_text() == "requeue 4711\n", "once"
    assert f"stopped and saved at step {saved_step(tmp_path / 'run'):,}." in err


def test_a_requeue_that_cannot_be_is_refused_before_anything_begins(job, store, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli(line(tmp_path, store, "--requeue")) == 1
    assert "scontrol is not on PATH here" in capsys.readouterr().err
    monkeypatch.delenv("SLURM_JOB_ID")
    assert cli(line(tmp_path, store, "--requeue")) == 1
    assert "this is no Slurm job (SLURM_JOB_ID is not set)" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_array_job_asks_for_its_own_task(job, monkeypatch):
    from alphaflow_cli.runtime.launch import requeue

    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "4700")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert requeue() == "job 4700_3 is queued again: scontrol requeue 4700_3"
    assert job.read_text() == "requeue 4700_3\n"
