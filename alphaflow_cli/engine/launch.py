"""Starting N processes of ourselves, and telling whether we are one of them.

torch's elastic agent starts the workers, forwards signals and ends the others when one fails. What a worker has to
say about its failure it writes to RUN/errors/rank-N.json; the parent prints the root cause, once.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from alphaflow_cli.errors import AlphaflowError

SAVE_SECONDS = 300  # a worker may take so long to save after SIGTERM before the agent kills it
ECHOES = ("Connection closed by peer", "Connection reset", "Socket Timeout", "NCCL", "Broken pipe", "gloo")


def is_worker() -> bool:
    """Started by torchrun, accelerate launch, Slurm's torchrun, or --processes."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launch(argv: Sequence[str], processes: int, errors: Path) -> int:
    """Run `alphaflow ARGV` in N processes on this machine; the exit code of the run."""
    from torch.distributed.elastic.multiprocessing import api
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(SAVE_SECONDS)
    api.PContext.close.__defaults__ = (None, SAVE_SECONDS)  # older torch has no variable for it
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    os.environ["ALPHAFLOW_ERRORS"] = str(errors)
    for old in errors.glob("rank-*.json"):
        old.unlink()
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
    try:
        elastic_launch(config, sys.executable)("-m", "alphaflow_cli", *argv)
    except ChildFailedError as failed:
        codes = {rank: failure.exitcode for rank, failure in failed.failures.items()}
        return _report(errors, codes)
    except api.SignalException as signalled:
        return 128 + int(signalled.sigval)
    return 0


def _report(errors: Path, codes: dict[int, int]) -> int:
    """Raise the root cause: a crash, else the first failure that is not the echo of another's."""
    crashed = {rank: code for rank, code in codes.items() if code < 0 and code != -15}
    said = [json.loads(path.read_text()) for path in sorted(errors.glob("rank-*.json"))]
    causes = sorted((s for s in said if not s["echo"]), key=lambda s: float(s["time"]))
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
    if stopped:
        return stopped.pop()
    raise AlphaflowError(f"processes ended with exit codes {codes}. Their messages are above.")


def as_worker(work: Callable[[], int]) -> NoReturn:
    """Run a worker's job and leave by os._exit: a live process group makes sys.exit abort now and then."""
    code = 1
    try:
        code = work()
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else 1
    except BaseException as error:
        _record(error)
        if "ALPHAFLOW_ERRORS" not in os.environ:  # nobody else will tell
            raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _record(error: BaseException) -> None:
    folder = Path(os.environ.get("ALPHAFLOW_ERRORS", "."))
    rank, message = os.environ.get("RANK", "0"), str(error)
    record = {
        "rank": int(rank),
        "time": time.time(),
        "message": message or type(error).__name__,
        "user_fault": isinstance(error, AlphaflowError),
        "echo": not isinstance(error, AlphaflowError) and any(text in message for text in ECHOES),
        "traceback": "".join(traceback.format_exception(error)),
    }
    if "ALPHAFLOW_ERRORS" in os.environ:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"rank-{rank}.json").write_text(json.dumps(record))
