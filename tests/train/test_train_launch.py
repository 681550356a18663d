"""Through the command line, in real processes: --processes, signals, a killed rank, torchrun and accelerate launch."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from new_process import Command
from train_helpers import assert_same, make_recipe, make_store, saved_step, train

from alphaflow_cli.cli import run as cli
from alphaflow_cli.runtime.launch import is_worker
from alphaflow_cli.train.journal import read_rows

pytestmark = pytest.mark.distributed
STEPS = 5_000  # more than a test waits for
FEW = ("train.steps=8", "alpha.start=0", "alpha.end=8", "train.save_every=4")
OTHERS = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("latents") / "store")


def command(tmp_path, store, *more, head=(sys.executable, "-m", "alphaflow_cli")):
    make_recipe(tmp_path)
    return [
        *map(str, head),
        "train",
        str(tmp_path / "tiny.yaml"),
        "--data",
        str(store),
        "--out",
        str(tmp_path / "run"),
        *more,
    ]


def sets(*values):
    return [part for value in values for part in ("--set", value)]


LONG = sets(f"train.steps={STEPS}", "alpha.start=10", "alpha.end=20", "train.save_every=50", "train.log_every=10")


def popen(line, cwd, **environment):
    return subprocess.Popen(
        line, cwd=cwd, env={**os.environ, **OTHERS, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip


def wait_until(true, what, seconds=90):
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, what
        time.sleep(0.05)


def workers_of(parent):
    """pids of the processes that torch's agent started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent.pid:
            found.append(int(path.parent.name))
    return sorted(found)


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("number", "group"),
    [
        (signal.SIGTERM, False),
        pytest.param(signal.SIGINT, False, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, True, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, True, marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_the_parent_saves_on_every_rank_and_leaves_no_orphan(number, group, store, tmp_path):
    parent = popen(command(tmp_path, store, "--processes", "2", *LONG), tmp_path)
    wait_until(lambda: saved_step(tmp_path / "run") >= 50, "no save")
    workers = workers_of(parent)
    assert len(workers) == 2
    (os.killpg if group else os.kill)(parent.pid, number)
    out, err = parent.communicate(timeout=60)
    assert parent.returncode == 128 + number, err
    stopped = int(re.search(r"stopped and saved at step ([\d,]+)", err)[1].replace(",", ""))
    assert saved_step(tmp_path / "run") == stopped
    assert out == "", "nothing was finished"
    assert not any(is_alive(pid) for pid in workers)


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.parametrize("new", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_killed_rank_is_named_once_and_the_rest_ends(new, store, tmp_path):
    """Forks of this process, launched and watched like the new interpreters of the slow one."""
    line = command(tmp_path, store, "--processes", "2", *LONG)
    parent = popen(line, tmp_path) if new else Command(line[3:], cwd=tmp_path)
    wait_until(lambda: saved_step(tmp_path / "run") >= 50, "no save")
    workers = workers_of(parent)
    os.kill(workers[1], signal.SIGKILL)
    _, err = parent.communicate(timeout=60)
    assert parent.returncode == 1, err
    assert err.count("error:") == 1
    assert re.search(r"error: process [01] was killed by signal 9\. What was saved is kept", err)
    assert "Traceback" not in err
    assert not any(is_alive(pid) for pid in workers)
    assert saved_step(tmp_path / "run") >= 50


@pytest.mark.slow
def test_a_failing_rank_says_its_own_message_once(store, tmp_path):
    make_recipe(tmp_path)
    parent = popen(
        command(tmp_path, store, "--processes", "2", "--init-from", str(tmp_path / "none.safetensors")), tmp_path
    )
    _, err = parent.communicate(timeout=90)
    assert parent.returncode == 1
    assert err.count("no such checkpoint") == 1, err
    assert "Traceback" not in err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_one_process_saves_at_a_signal_too(number, store, tmp_path):
    alone = popen(command(tmp_path, store, *LONG), tmp_path)
    wait_until(lambda: saved_step(tmp_path / "run") >= 50, "no save")
    alone.send_signal(number)
    _, err = alone.communicate(timeout=60)
    assert alone.returncode == 128 + number
    assert f"stopped and saved at step {saved_step(tmp_path / 'run'):,}" in err


LAUNCHERS = {
    "--processes": ([sys.executable, "-m", "alphaflow_cli"], ["--processes", "2"], {}),
    "torchrun": ([BIN / "torchrun", "--nproc-per-node", "2", "-m", "alphaflow_cli"], [], {}),
    "accelerate launch": (
        [BIN / "accelerate", "launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
         "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "alphaflow_cli"],
        [],
        {"ACCELERATE_USE_CPU": "true"},
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_launcher_makes_the_same_run(launcher, store, tmp_path):
    head, more, environment = LAUNCHERS[launcher]
    done = popen(command(tmp_path, store, *more, *sets(*FEW), head=head), tmp_path, **environment)
    out, err = done.communicate(timeout=120)
    assert done.returncode == 0, err
    assert out.splitlines()[-1] == str(tmp_path / "run" / "model.safetensors"), "said once, by the first process"
    assert out.count("model.safetensors") == 1
    assert "2 processes × 1 micro-batch of 8 rows = batch 16" in err
    recipe = make_recipe(tmp_path, *FEW)
    assert_same(train(recipe, store, tmp_path / "forked", processes=2), tmp_path / "run")


@pytest.mark.slow
def test_srun_joins_by_its_own_variables(store, tmp_path):
    line = command(tmp_path, store, *sets(*FEW))
    task = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost"}
    tasks = [popen(line, tmp_path, **task, SLURM_PROCID=str(i), SLURM_LOCALID=str(i)) for i in range(2)]
    ends = [each.communicate(timeout=120) for each in tasks]
    assert [each.returncode for each in tasks] == [0, 0], ends
    assert sum(out.count("model.safetensors") for out, _ in ends) == 1
    assert_same(train(make_recipe(tmp_path, *FEW), store, tmp_path / "forked", processes=2), tmp_path / "run")


ALL = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
TASK = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "SLURM_JOB_ID": "7"}
WRONG = [
    ({"WORLD_SIZE": "abc"}, "WORLD_SIZE='abc' in the environment is no number"),
    ({"LOCAL_RANK": "x"}, "LOCAL_RANK='x' in the environment is no number"),
    ({"RANK": ""}, "RANK='' in the environment is no number"),
    ({"RANK": "0", "WORLD_SIZE": "9" * 5000}, "in the environment is no number"),
    ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK='-1' in the environment is no number"),
    ({"LOCAL_RANK": "0"}, "has LOCAL_RANK, but no RANK and no WORLD_SIZE and no MASTER_ADDR and no MASTER_PORT"),
    ({"WORLD_SIZE": "2"}, "has WORLD_SIZE, but no RANK"),
    ({"RANK": "0", "WORLD_SIZE": "2"}, "has RANK and WORLD_SIZE, but no MASTER_ADDR and no MASTER_PORT"),
    ({**ALL, "RANK": "2"}, "RANK=2 in the environment, but WORLD_SIZE=2: ranks count from 0"),
    ({**ALL, "MASTER_PORT": "x"}, "MASTER_PORT='x' in the environment is no number"),
    ({**ALL, "MASTER_PORT": "70000"}, "MASTER_PORT=70000 in the environment is no port"),
    ({"SLURM_STEP_NUM_TASKS": "two"}, "SLURM_STEP_NUM_TASKS='two' in the environment is no number"),
    *(({**TASK, name: "x1"}, f"{name}='x1'") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID")),
    ({**TASK, "SLURM_PROCID": "x1"}, "RANK='x1'"),
    ({**TASK, "SLURM_LOCALID": "x1"}, "RANK='x1'"),
]


def beside_what_begins(text):
    """The lines without a clock: those with one say what begins."""
    return [line for line in text.splitlines() if not re.match(r"\d{4}-\d\d-\d\d ", line)]


@pytest.mark.parametrize(("environment", "line"), WRONG, ids=[str(i) for i in range(len(WRONG))])
def test_a_launchers_variable_that_cannot_be_is_one_line(environment, line, store, tmp_path, monkeypatch, capsys):
    before = set(os.environ)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    try:
        for words in (
            command(tmp_path, store)[3:],
            ["eval", "glyphs:100"],
            ["reference", "glyphs:100", "-o", "a.safetensors"],
        ):
            assert cli(words) == 1
            told = capsys.readouterr().err
            assert line in told
            assert len(beside_what_begins(told)) == 1
    finally:
        for name in set(os.environ) - before - set(environment):  # what Slurm's became
            del os.environ[name]


def test_a_port_that_nobody_uses_is_nobodys_business(store, tmp_path, monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "x")
    assert cli([*command(tmp_path, store)[3:], "--dry-run"]) == 0
    assert not is_worker()


def test_processes_that_could_not_meet_are_refused_at_once(store, tmp_path):
    line = command(tmp_path, store, "--processes", "2", *sets(*FEW))
    if subprocess.run(["unshare", "-n", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no network of our own can be made here")
    alone = popen(["unshare", "-n", *line], tmp_path)
    _, err = alone.communicate(timeout=60)
    assert alone.returncode == 1, err
    assert "the processes would meet at 127.0.0.1, which cannot be reached here (Network is unreachable)" in err
    assert not (tmp_path / "run" / ".lock").exists()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_of_eight_commands_on_one_run_one_trains_and_seven_are_refused(processes, store, tmp_path):
    line = command(tmp_path, store, "--processes", str(processes), *LONG)
    started = [popen(line, tmp_path) for _ in range(8)]
    wait_until(lambda: sum(each.poll() is not None for each in started) == 7, "not seven refused", 200)
    wait_until(lambda: saved_step(tmp_path / "run") >= 50, "no save")
    (winner,) = (each for each in started if each.poll() is None)
    winner.terminate()
    ends = [each.communicate(timeout=100) for each in started]
    assert sorted(each.returncode for each in started) == [*[1] * 7, 143], ends
    for each, (_, err) in zip(started, ends, strict=True):
        if each is not winner:
            assert len(re.findall("^error: .* another command is writing here", err, re.M)) == 1, err
            assert len(beside_what_begins(err)) == 1
    steps = [row["step"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")]
    assert steps == list(range(10, saved_step(tmp_path / "run") + 1, 10)), "the journal is whole"
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == len(steps)
    assert not (tmp_path / "run" / ".lock").exists()


@pytest.mark.slow
def test_a_killed_parent_takes_its_workers_along_and_they_save(store, tmp_path):
    parent = popen(command(tmp_path, store, "--processes", "2", *LONG), tmp_path)
    wait_until(lambda: saved_step(tmp_path / "run") >= 50, "no save")
    workers = workers_of(parent)
    owner = json.loads((tmp_path / "run" / ".lock").read_text())
    assert owner["pid"] in workers, "the parent handed its lock on"
    parent.kill()
    parent.communicate(timeout=60)
    wait_until(lambda: not any(is_alive(pid) for pid in workers), "orphans", 30)
    assert not (tmp_path / "run" / ".lock").exists()
    assert saved_step(tmp_path / "run") % 50, "they stopped as after a signal"


SILENT = {  # a shell's way of not listening
    "stderr is full": "2>/dev/full",
    "both are full": ">/dev/full 2>&1",
    "stderr is closed": "2>&-",
    "both are closed": ">&- 2>&-",
    "nobody reads": "2>&1 | true",
}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("way", SILENT)
def test_a_run_is_finished_whoever_listens(way, processes, store, tmp_path):
    line = shlex.join(command(tmp_path, store, "--processes", str(processes), *sets(*FEW)))
    popen(["bash", "-c", f"{line} {SILENT[way]}"], tmp_path).communicate(timeout=120)
    wait_until(lambda: saved_step(tmp_path / "run") == 8 and not (tmp_path / "run" / ".lock").exists(), "not finished")
    assert_same(train(make_recipe(tmp_path, *FEW), store, tmp_path / "forked", processes=processes), tmp_path / "run")


@pytest.mark.slow
def test_torchrun_with_a_fault_says_it_once(store, tmp_path):
    head = LAUNCHERS["torchrun"][0]
    done = popen(command(tmp_path, store, *sets("data.classes=7"), head=head), tmp_path)
    _, err = done.communicate(timeout=120)
    assert done.returncode == 1
    assert err.count("data.classes: 10 in the store, 7 in the recipe") == 1, err
