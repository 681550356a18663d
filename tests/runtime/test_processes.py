"""Several processes on one machine: as many as there are GPUs, and one that dies leaves word."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from new_process import alphaflow, torchrun
from torch import distributed as dist
from train_helpers import fork

from alphaflow_cli import cli
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.evaluate.reference import load_reference
from alphaflow_cli.latents import prepare
from alphaflow_cli.runtime import launch, processes

REFUSED = "error: --processes 2: this machine has 1 GPU, and every process needs one of its own. Give --processes 1"


@pytest.mark.parametrize(
    "line",
    [
        "train quickstart --out run",
        "eval glyphs:100 --metrics fd-tiny --reference glyphs:100",
        "eval model.safetensors",
        "reference pictures -o r.safetensors",
        "analyze model.safetensors",
        "sample model.safetensors --grid grid.png",
        "prep-latents pictures --size 32 --autoencoder some/autoencoder",
    ],
)
def test_more_processes_than_gpus_are_refused_before_anything_is_done(line, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    there = [tmp_path / "model.safetensors", tmp_path / "pictures"]
    there[0].touch()
    there[1].mkdir()
    assert cli.run([*line.split(), "--processes", "2"]) == 1
    assert REFUSED in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == there


def test_a_gpu_beyond_those_that_are_here_is_refused_by_its_number(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [processes.choose_device(name).index for name in ("cuda", "cuda:0", "cuda:1")] == [None, 0, 1]
    with pytest.raises(AlphaflowError, match="device cuda:2: this machine has 2 GPUs"):
        processes.choose_device("cuda:2")


def test_pixels_need_no_gpu_and_any_number_of_processes_may_share_them(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert prepare.count_encoders("none", 2) == 2
    assert prepare.count_encoders("none", None) == prepare.count_encoders("some/autoencoder", 1) == 1


def test_two_processes_of_one_gpu_are_refused_when_they_join(monkeypatch):
    """Under torchrun nobody counts before; the exchange says so, and now it is the first thing they do."""

    def exchange(values, *args):
        raise dist.DistBackendError("NCCL error: Duplicate GPU detected : rank 0 and rank 1 both on CUDA device 1000")

    monkeypatch.setattr(dist, "all_reduce", exchange)
    together = processes.World(device=torch.device("cpu"), size=2, accelerator=None)
    with pytest.raises(AlphaflowError, match="2 processes were started, but two of them have the same GPU"):
        processes._meet(together)


def late(rank):
    """One process comes half a second late."""
    joined = processes.join_world()
    time.sleep(0.5 * (joined.rank == rank))
    joined.wait()


@pytest.mark.distributed
@pytest.mark.parametrize(("patience", "codes"), [(0.1, [1]), (30, [0])])
def test_processes_wait_for_each_other_with_our_patience(monkeypatch, tmp_path, patience, codes):
    monkeypatch.setattr(processes, "PATIENCE", timedelta(seconds=patience))
    started = fork(lambda: late(0), tmp_path, 2)
    assert started.wait()[1:] == codes, started.said()


@pytest.mark.distributed
@pytest.mark.usefixtures("forked_workers")
def test_when_all_fail_to_exchange_their_message_is_shown(tmp_path):
    """The workers' faults all look like echoes of another's, so none was shown: and the exit code was a signal's."""
    line = ["eval", "glyphs:100", "--reference", "glyphs:100", "--metrics", "fd-tiny", "--processes", "2"]
    done = alphaflow(line, cwd=tmp_path, env={"GLOO_SOCKET_IFNAME": "nowhere"})
    assert done.returncode == 1
    assert re.search(r"error: process [01]: .*nowhere", done.stderr), done.stderr


def test_eval_inside_a_launcher_refuses_another_number_of_processes(monkeypatch, capsys):
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert cli.run(["eval", "glyphs:100", "--metrics", "fd-tiny", "--processes", "2"]) == 1
    assert "--processes 2: a launcher has started 4 processes already" in capsys.readouterr().err


@pytest.mark.distributed
@pytest.mark.usefixtures("forked_workers")
def test_two_processes_of_torchrun_measure_one_reference(tmp_path):
    line = ["reference", "glyphs:300", "--metrics", "fd-tiny", "-o"]
    started = torchrun([*line, "two.safetensors"], 2, cwd=tmp_path)
    out, err = started.communicate(timeout=200)
    assert started.returncode == 0, err
    assert out.splitlines()[-1] == "two.safetensors"
    assert cli.run([*line, str(tmp_path / "one.safetensors"), "--work", str(tmp_path / "work")]) == 0
    one, two = (load_reference(tmp_path / f"{name}.safetensors").stats["tiny"] for name in ("one", "two"))
    torch.testing.assert_close(two.cov, one.cov, rtol=1e-12, atol=1e-12)
    assert torch.equal(two.features, one.features)


@pytest.mark.parametrize(
    "line",
    [
        ["eval", "glyphs:100", "--metrics", "fd-tiny", "--processes", "2"],
        ["train", "quickstart", "--set", "data.source=glyphs:20", "--out", "run", "--processes", "2", "--debug"],
        ["prep-latents", "glyphs:20", "--processes", "2"],
        ["sample", "c.safetensors", "--grid", "g.png", "--processes", "2"],
        ["reference", "glyphs:100", "-o", "r.safetensors", "--processes", "2"],
        ["analyze", "c.safetensors", "--processes", "2"],
    ],
)
def test_processes_run_the_command_that_started_them_whatever_started_it(line, monkeypatch, tmp_path):
    started = []
    monkeypatch.chdir(tmp_path)
    Path("c.safetensors").touch()
    monkeypatch.setattr(processes, "launch", lambda argv, count: started.append((list(argv), count)) or 0)
    assert cli.run(line) == 0
    assert started == [(line, 2)]


def left(folder, **record):
    plain = {"time": 1.0, "user_fault": False, "echo": True, "traceback": "", "message": "Connection reset"}
    (folder / f"rank-{record['rank']}.json").write_text(json.dumps(plain | record))


def test_who_calls_a_verb_of_many_processes_keeps_its_environment_and_its_answers_to_signals(monkeypatch):
    """Afterwards Ctrl-C raised torch's SignalException in the caller, and the next verb had the first one's threads."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def state():
        return dict(os.environ), {number: signal.getsignal(number) for number in launch.TAKEN}

    before = state()
    assert launch.launch(["--version"], 2) == 0
    assert state() == before


def test_a_cause_comes_before_a_crash_and_a_crash_before_an_echo(tmp_path):
    left(tmp_path, rank=0, time=2.0)
    left(tmp_path, rank=1, time=1.0, message="Connection closed by peer")
    with pytest.raises(AlphaflowError, match="process 1: Connection closed by peer"):
        launch._report(tmp_path, {0: 1, 1: 1})
    with pytest.raises(AlphaflowError, match="process 1 was killed by signal 9"):
        launch._report(tmp_path, {0: 1, 1: -9})
    left(tmp_path, rank=2, time=3.0, message="the disk is full", echo=False, user_fault=True)
    with pytest.raises(AlphaflowError, match="process 2: the disk is full"):
        launch._report(tmp_path, {0: 1, 1: -9, 2: 1})


def test_processes_that_leave_no_word_are_no_success_and_no_signal(tmp_path):
    with pytest.raises(AlphaflowError, match=r"exit codes \{0: 1, 1: 143\}, and none of them said why"):
        launch._report(tmp_path, {0: 1, 1: 143})
    assert launch._report(tmp_path, {0: 143, 1: -15}) == 143


def test_a_worker_that_cannot_leave_word_says_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ALPHAFLOW_ERRORS", str(tmp_path / "gone"))
    launch._tell(AlphaflowError("the disk is full"))
    assert capsys.readouterr().err == "error: process 0: the disk is full\n"


def test_a_worker_whose_parent_died_before_they_met_does_not_wait_for_the_others(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    ranks = {"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 9}
    ours = {"ALPHAFLOW_ERRORS": tmp_path, "ALPHAFLOW_PARENT": gone.pid}
    line = [sys.executable, "-m", "alphaflow_cli", "prep-latents", "glyphs:4", "--size", "32", "--autoencoder", "none"]
    environment = os.environ | {name: str(value) for name, value in (ranks | ours).items()}
    worker = subprocess.run([*line, "--out", tmp_path / "store"], env=environment, timeout=60, check=False)
    assert worker.returncode == 143


LONG_VERBS = {
    "prep-latents": ("glyphs:4", "--size", "32", "--autoencoder", "a/b"),
    "train": ("quickstart",),
    "sample": ("x.safetensors", "--grid", "g.png"),
    "eval": ("x.safetensors",),
    "reference": ("glyphs:100", "-o", "r.safetensors"),
    "analyze": ("x.safetensors",),
}


@pytest.mark.parametrize("verb", LONG_VERBS)
def test_every_long_verb_refuses_another_number_than_the_launchers(verb, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(processes, "as_worker", lambda work: pytest.fail("it began to work"))
    Path("x.safetensors").touch()
    assert cli.run([verb, *LONG_VERBS[verb], "--processes", "3"]) == 1
    assert "error: --processes 3: a launcher has started 2 processes already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.distributed
def test_processes_that_read_different_bytes_of_one_checkpoint_say_so(tmp_path):
    def work():
        world = processes.join_processes()
        processes.check_same(world, "ab" * 32, "same")
        processes.check_same(world, f"{world.rank:064d}"[::-1], "run/model.safetensors")

    other = fork(work, tmp_path, 2)
    assert other.wait() == [1, 1]
    assert "run/model.safetensors: was replaced while the processes read it" in other.said()
