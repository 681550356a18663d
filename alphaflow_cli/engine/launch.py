"""Starting N processes of ourselves, and telling whether we are one of them.

torch's elastic agent starts the workers, forwards signals and ends the others when one fails. What a worker has to
say about its failure it writes to a file; the parent prints the root cause, once. Started by torchrun,
accelerate launch or Slurm, a worker has no parent of ours and says it itself.
"""

import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from alphaflow_cli.engine.slurm import join_slurm
from alphaflow_cli.errors import AlphaflowError

SAVE_SECONDS = 300  # a worker may take so long to save after SIGTERM before the agent kills it
ECHOES = ("Connection closed by peer", "Connection reset", "Socket Timeout", "NCCL", "Broken pipe", "gloo")


def is_worker() -> bool:
    """Started by torchrun, accelerate launch, srun, or --processes."""
    join_slurm()
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def has_parent() -> bool:
    """Started by --processes: the parent has checked everything, and tells of faults."""
    return "ALPHAFLOW_ERRORS" in os.environ


def check_processes(asked: int | None) -> None:
    """--processes inside another launcher must be that launcher's number."""
    joined = int(os.environ["WORLD_SIZE"])
    if asked is not None and asked != joined and not has_parent():
        raise AlphaflowError(
            f"--processes {asked}: a launcher has started {joined} processes already, and this is one of them. "
            "Leave --processes out, or start without the launcher."
        )


def launch(argv: Sequence[str], processes: int) -> int:
    """Run `alphaflow ARGV` in N processes on this machine; the exit code of the run."""
    from torch.distributed.elastic.multiprocessing import api
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(SAVE_SECONDS)
    api.PContext.close.__defaults__ = (None, SAVE_SECONDS)  # older torch has no variable for it
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
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
        os.environ["ALPHAFLOW_ERRORS"] = errors
        try:
            elastic_launch(config, sys.executable)("-m", "alphaflow_cli", *argv)
        except ChildFailedError as failed:
            codes = {rank: failure.exitcode for rank, failure in failed.failures.items()}
            return _report(Path(errors), codes)
        except api.SignalException as signalled:
            return 128 + int(signalled.sigval)
    return 0


def _report(errors: Path, codes: dict[int, int]) -> int:
    """Raise the root cause: the first failure that is not the echo of another's, else a crash, else the first echo."""
    crashed = {rank: code for rank, code in codes.items() if code < 0 and code != -15}
    said = [json.loads(path.read_text()) for path in sorted(errors.glob("rank-*.json"))]
    said.sort(key=lambda each: float(each["time"]))
    # where all lost the others and nobody crashed, the exchange itself failed, and an echo is all there is
    causes = [each for each in said if not each["echo"]] or ([] if crashed else said)
    if causes:
        first = causes[0]
        if not first["user_fault"]:
            sys.stderr.write(first["traceback"])
        raise AlphaflowError(f"process {first['rank']}: {first['message']}")
    if crashed:
        rank, code = next(iter(crashed.items()))
        raise AlphaflowError(
            f"process {rank} was killed by signal {-code}. What was saved is kept; the same command resumes."
        )
    stopped = {code for code in codes.values() if code in (130, 143)}
    if stopped and all(code in (0, -15, 130, 143) for code in codes.values()):
        return stopped.pop()
    raise AlphaflowError(
        f"processes ended with exit codes {codes}, and none of them left word why, beyond what may stand above. "
        "The same command resumes; --processes 1 shows a fault where it arises."
    )


def as_worker(work: Callable[[], int]) -> NoReturn:
    """Run a worker's job and leave by os._exit: a live process group makes sys.exit abort now and then."""
    code = 1
    try:
        code = work()
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else int(leave.code is not None)
        if isinstance(leave.code, str):
            _tell(AlphaflowError(leave.code))
    except BaseException as error:  # whatever it is: it is told, and the process leaves with 1
        _tell(error)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _tell(error: BaseException) -> None:
    """To the parent by a file; without one, on stderr."""
    rank, message = os.environ.get("RANK", "0"), str(error)
    user_fault = isinstance(error, AlphaflowError)
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
        sys.stderr.write(f"process {rank} lost the others: {message.splitlines()[0]}\n")
    else:
        sys.stderr.write(f"error: process {rank}: {message}\n" if user_fault else str(record["traceback"]))


def _leave(record: dict[str, Any]) -> bool:
    """Put the record where the parent looks; False where a full disk forbids it, which may be the fault itself."""
    path = Path(os.environ["ALPHAFLOW_ERRORS"]) / f"rank-{record['rank']}.json"
    try:  # whole or not at all: the agent may kill us meanwhile
        path.with_suffix(".tmp").write_text(json.dumps(record))
        path.with_suffix(".tmp").replace(path)
    except OSError:
        return False
    return True
