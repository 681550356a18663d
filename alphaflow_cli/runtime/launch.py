"""Starting N processes of ourselves, and telling whether we are one of them.

torch's elastic agent starts the workers, forwards signals and ends the others when one fails. What a worker has to
say about its failure it writes to a file; the parent prints the root cause, once. Started by torchrun,
accelerate launch or Slurm, a worker has no parent of ours and says it itself.

Ctrl-C and SIGTERM: finish the step, save, leave. A second one, a second later, leaves at once. Sooner it is an echo: a
terminal, a launcher and a job system each pass on the same Ctrl-C. SIGUSR1, by which Slurm warns of the end of a job's
time, also saves and leaves; with --requeue the job is then asked for again.

`srun alphaflow train …`: one process per task. Slurm says who is who in its own variables; torch reads others. Slurm
hands out no port: it follows from the job's number, so that all tasks find the same one. Set MASTER_PORT yourself where
it is taken.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn

from alphaflow_cli.errors import AlphaflowError, LostOutput, fault_of_the_user
from alphaflow_cli.runtime.threads import OURS, cores_here

ERRORS = "ALPHAFLOW_ERRORS"  # the folder in which workers leave word of their faults
RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")  # whole numbers
READER_LEFT = 141  # exit code where nobody reads stdout any more
STOPPED = (130, 138, READER_LEFT, 143)  # exit codes after Ctrl-C, Slurm's warning, that, and SIGTERM
LOOPBACK_SECONDS = 10  # for a connection to ourselves
PARENT = "ALPHAFLOW_PARENT"  # the process that started them
JOINED = threading.Event()  # whether this process and the others have found each other
LOOK_EVERY = 0.5  # seconds between a worker's looks at whether its parent is still there
SAVE_SECONDS = 300  # a worker may take so long to save after SIGTERM before the agent kills it
ECHO_SECONDS = 1.0  # after a signal, in which another one counts as its echo
WARNING = signal.SIGUSR1  # sbatch --signal=USR1@120
TAKEN = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, WARNING)  # that the agent answers
PORTS = range(20_000, 60_000)  # of a Slurm job
ECHOES = ("Connection closed by peer", "Connection reset", "Socket Timeout", "NCCL", "Broken pipe", "gloo")


def is_worker() -> bool:
    """Started by torchrun, accelerate launch, srun, or --processes. What these say of us is looked at first."""
    join_slurm()
    check_launcher(os.environ)
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def first_of_launched() -> int | None:
    """How many processes a launcher started, in the first of them, which is alone from here on; 0: there is none.

    The others get None, and have nothing to do.
    """
    if not is_worker():
        return 0
    count, rank = (int(os.environ[name]) for name in ("WORLD_SIZE", "RANK"))
    for name in (*RANKS, "SLURM_STEP_NUM_TASKS"):
        os.environ.pop(name, None)
    return None if rank else count


def check_launcher(there: Mapping[str, str]) -> None:
    """Refuse a half set environment: torch would wait for processes that never come, or fail in its own words."""
    numbers = {name: whole_number(there, name) for name in RANKS if name in there}
    if "RANK" not in numbers and "LOCAL_RANK" not in numbers and numbers.get("WORLD_SIZE", 1) < 2:
        return
    needed = (*RANKS[:2], "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if not there.get(name)]
    if missing:
        raise AlphaflowError(
            f"the environment has {' and '.join(sorted(numbers))}, but no {' and no '.join(missing)}. A launcher sets "
            "all of them (torchrun, srun, accelerate launch): start with one, or unset them."
        )
    if numbers["RANK"] >= numbers["WORLD_SIZE"]:
        raise AlphaflowError(
            f"RANK={numbers['RANK']} in the environment, but WORLD_SIZE={numbers['WORLD_SIZE']}: ranks count from 0."
        )
    if not 0 < whole_number(there, "MASTER_PORT") < 65536:
        raise AlphaflowError(f"MASTER_PORT={there['MASTER_PORT']} in the environment is no port: 1 to 65535.")


def has_parent() -> bool:
    """Whether --processes started us: then the parent has checked everything, and reports faults."""
    return ERRORS in os.environ


def check_processes(requested: int | None) -> None:
    """Refuse a --processes inside another launcher that differs from that launcher's number."""
    joined = whole_number(os.environ, "WORLD_SIZE")
    if requested is not None and requested != joined and not has_parent():
        raise AlphaflowError(
            f"--processes {requested}: a launcher has started {joined} processes already, and this is one of them. "
            "Leave --processes out, or start without the launcher."
        )


@contextlib.contextmanager
def as_before() -> Iterator[None]:
    """Give the environment and the answers to signals back as they were: any program may have called `cli.run`."""
    environment, answers = dict(os.environ), {}
    if threading.current_thread() is threading.main_thread():  # no other one sets an answer
        answers = {number: signal.getsignal(number) for number in TAKEN}
    try:
        yield
    finally:
        for number, answer in answers.items():
            signal.signal(number, answer)
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)


@as_before()
def launch(argv: Sequence[str], processes: int) -> int:
    """Run `alphaflow ARGV` in N processes on this machine; the exit code of the run."""
    from torch.distributed.elastic.multiprocessing import api
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    check_loopback(processes)
    signal.signal(WARNING, api._terminate_process_handler)  # the agent passes it on, as the signals that it knows
    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(SAVE_SECONDS)
    api.PContext.close.__defaults__ = (None, SAVE_SECONDS)  # older torch has no variable for it
    if not os.environ.get("OMP_NUM_THREADS"):
        os.environ |= {"OMP_NUM_THREADS": str(max(1, cores_here().count // processes)), OURS: "1"}
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        run_id=f"alphaflow-{os.getpid()}",
        max_restarts=0,
        monitor_interval=0.2,
    )
    with tempfile.TemporaryDirectory(prefix="alphaflow-") as errors:  # not in the run: its disk may be full
        os.environ |= {ERRORS: errors, PARENT: str(os.getpid())}
        try:
            elastic_launch(config, sys.executable)("-m", "alphaflow_cli", *argv)
        except ChildFailedError as failed:
            codes = {rank: failure.exitcode for rank, failure in failed.failures.items()}
            return _report(Path(errors), codes)
        except api.SignalException as signalled:
            return 128 + int(signalled.sigval)
    return 0


def check_loopback(processes: int) -> None:
    """Check that 127.0.0.1 can be reached: the processes meet there, and would wait for ever."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=LOOPBACK_SECONDS).close()
    except OSError as error:
        raise AlphaflowError(
            f"--processes {processes}: the processes would meet at 127.0.0.1, which cannot be reached here "
            f"({error.strerror or error}). Bring the loopback interface up, or give --processes 1."
        ) from error


def _report(errors: Path, codes: dict[int, int]) -> int:
    """Raise the root cause: the first failure that is not the echo of another's, else a crash, else the first echo."""
    crashed = {rank: code for rank, code in codes.items() if code < 0 and code != -15}
    reports = []
    for path in sorted(errors.glob("rank-*.json")):
        with contextlib.suppress(ValueError):  # cut short: the process was killed while it wrote
            reports.append(json.loads(path.read_text()))
    reports.sort(key=lambda each: float(each["time"]))
    # where all lost the others and nobody crashed, the exchange itself failed, and an echo is all there is
    causes = [each for each in reports if not each["echo"]] or ([] if crashed else reports)
    if causes:
        first = causes[0]
        if not first["user_fault"]:
            _write_error(first["traceback"])
        raise AlphaflowError(f"process {first['rank']}: {first['message']}")
    if crashed:
        rank, code = next(iter(crashed.items()))
        raise AlphaflowError(
            f"process {rank} was killed by signal {-code}. What was saved is kept; the same command resumes."
        )
    stopped = {code for code in codes.values() if code in STOPPED}
    if stopped and all(code in (0, -15, *STOPPED) for code in codes.values()):
        return min(stopped)
    raise AlphaflowError(
        f"processes ended with exit codes {codes}, and none of them said why; look at the lines above. "
        "The same command resumes; --processes 1 shows where a fault arises."
    )


def as_worker(work: Callable[[], int]) -> NoReturn:
    """Run a worker's job and leave by os._exit: a live process group makes sys.exit abort now and then."""
    code = 1
    if has_parent():
        parent = int(os.environ.get(PARENT, os.getppid()))  # it may be gone by now
        threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    try:
        code = work()
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else int(leave.code is not None)
        if isinstance(leave.code, str):
            _tell(AlphaflowError(leave.code))
    except KeyboardInterrupt:  # a launcher passes Ctrl-C on to every process
        code = 128 + signal.SIGINT
        if not has_parent() and os.environ.get("RANK", "0") == "0":
            _write_error("error: interrupted\n")
    except BaseException as error:  # whatever it is: it is told, and the process leaves with 1
        if isinstance(error, LostOutput) and isinstance(error.__cause__, BrokenPipeError):
            code = READER_LEFT
        else:
            _tell(error)
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):  # a full disk, closed, or none at all
                stream.flush()
    os._exit(code)


def _leave_with(parent: int) -> None:
    """When the parent is gone, stop as after a signal: a run that goes on behind one's back holds its folder.

    Before the processes have joined there is nothing to save, and a signal would wait for those that never come.
    """
    while os.getppid() == parent:
        time.sleep(LOOK_EVERY)
    if not JOINED.is_set():
        os._exit(128 + signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)


def _write_error(text: str) -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):  # nobody can be told, then
        sys.stderr.write(text)


def _tell(error: BaseException) -> None:
    """Report the failure to the parent by a file, or without a parent on stderr."""
    rank, line = os.environ.get("RANK", "0"), fault_of_the_user(error)
    message, user_fault = line or str(error), bool(line)
    record = {
        "rank": int(rank),
        "time": time.time(),
        "message": message or type(error).__name__,
        "user_fault": user_fault,
        "echo": not user_fault and any(text in message for text in ECHOES),
        "traceback": "".join(traceback.format_exception(error)),
    }
    if has_parent() and _leave(record):
        return
    if record["echo"]:
        _write_error(f"process {rank} lost the others: {message.splitlines()[0]}\n")
    else:
        _write_error(f"error: process {rank}: {message}\n" if user_fault else str(record["traceback"]))


def _leave(record: dict[str, Any]) -> bool:
    """Put the record where the parent looks; False where a full disk forbids it, which may be the fault itself."""
    path = Path(os.environ[ERRORS]) / f"rank-{record['rank']}.json"
    try:  # whole or not at all: the agent may kill us meanwhile
        path.with_suffix(".tmp").write_text(json.dumps(record))
        path.with_suffix(".tmp").replace(path)
    except OSError:
        return False
    return True


class StopFlag:
    """`with StopFlag() as stop:` … `stop.is_set`, `stop.signal`."""

    def __init__(self) -> None:
        self.signal = 0
        self._since = 0.0
        self._before: dict[int, object] = {}

    @property
    def is_set(self) -> bool:
        return self.signal != 0

    def __enter__(self) -> "StopFlag":
        for number in (signal.SIGINT, signal.SIGTERM, WARNING):
            self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.is_set and number != WARNING and time.monotonic() - self._since > ECHO_SECONDS:
            raise SystemExit(128 + number)
        if not self.is_set:
            self.signal, self._since = number, time.monotonic()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]


def slurm_environment(there: Mapping[str, str]) -> dict[str, str]:
    """The variables that torch needs in a Slurm task; empty outside one, and where a launcher has set them already."""
    # of the step: a batch script is none, whatever the job has
    tasks = whole_number(there, "SLURM_STEP_NUM_TASKS", "1")
    if "RANK" in there or tasks < 2 or "SLURM_PROCID" not in there:
        return {}
    job, step = (whole_number(there, name, "0") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    visible = [name for name in there.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]  # none: all, or hidden
    sees_one = len(visible) == 1  # --gpus-per-task 1: its GPU is number 0
    variables = {
        "RANK": there["SLURM_PROCID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": "0" if sees_one else there.get("SLURM_LOCALID", "0"),
        "LOCAL_WORLD_SIZE": there.get("SLURM_STEP_TASKS_PER_NODE", "1").split("(")[0].split(",")[0],
        "MASTER_ADDR": first_host(there.get("SLURM_STEP_NODELIST", "127.0.0.1")),
        "MASTER_PORT": str(PORTS[(job * 7 + step) % len(PORTS)]),
    }
    return {name: there.get(name, value) for name, value in variables.items()}


def whole_number(there: Mapping[str, str], name: str, default: str = "") -> int:
    """A launcher's variable as a number; another text in it is refused by its name."""
    text = there.get(name, default)
    if not re.fullmatch("[0-9]{1,12}", text):
        raise AlphaflowError(
            f"{name}={text[:40]!r} in the environment is no number. A launcher sets it (torchrun, srun, accelerate "
            "launch): start with one, or unset it."
        )
    return int(text)


def first_host(nodes: str) -> str:
    """The first machine of a Slurm list: `gpu[003-005,9],login1` → `gpu003`."""
    match = re.match(r"([^,\[]+)(?:\[([^,\]-]+)[^\]]*\])?([^,\[]*)", nodes)
    if not match:
        return nodes
    head, number, tail = match.groups()
    return f"{head}{number or ''}{tail or ''}"


def check_requeue(wanted: bool) -> None:
    """Refuse --requeue where no job could be asked for again: outside Slurm, or without its scontrol."""
    if not wanted:
        return
    if not os.environ.get("SLURM_JOB_ID"):
        raise AlphaflowError("--requeue: this is no Slurm job (SLURM_JOB_ID is not set). Leave --requeue out here.")
    if shutil.which("scontrol") is None:
        raise AlphaflowError("--requeue: scontrol is not on PATH here, so the job cannot be asked for again.")


def requeue() -> str:
    """Ask Slurm for this job again; returns a line that says whether it will come."""
    job = os.environ.get("SLURM_ARRAY_JOB_ID", "")
    task = os.environ.get("SLURM_ARRAY_TASK_ID", "")
    name = f"{job}_{task}" if job and task else os.environ["SLURM_JOB_ID"]
    done = subprocess.run(["scontrol", "requeue", name], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return f"job {name} is queued again: scontrol requeue {name}"
    why = " ".join((done.stderr or done.stdout).split()) or f"exit code {done.returncode}"
    return f"warning: job {name} was not queued again: {why}. Submit it once more: the run resumes."


def join_slurm() -> None:
    """Under srun, tell torch who this process is in the variables that it reads."""
    os.environ.update(slurm_environment(os.environ))
