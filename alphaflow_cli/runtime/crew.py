"""A few processes that share independent work: they report counts, the first fault ends them all."""

import multiprocessing
import os
import queue
import signal
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from alphaflow_cli.errors import AlphaflowError, fault_of_the_user

Tell = Callable[[int], None]
LOOK_EVERY = 0.5  # seconds between looks at whether everybody is alive


def run_crew(task: Callable[[Any, Tell], None], shares: Sequence[Any], tell: Tell) -> None:
    """Run `task(share, tell)` once per share, each in a process of its own (spawned: task and shares are pickled)."""
    context = multiprocessing.get_context("spawn")
    messages: Any = context.Queue()
    crew = [context.Process(target=_member, args=(task, share, messages), daemon=True) for share in shares]
    for member in crew:
        member.start()
    try:
        _listen(crew, messages, tell)
    finally:
        for member in crew:
            member.terminate()
        for member in crew:
            member.join()


def _listen(crew: Sequence[Any], messages: Any, tell: Tell) -> None:
    """Until every member said it is done."""
    done = 0
    while done < len(crew):
        try:
            kind, value = messages.get(timeout=LOOK_EVERY)
        except queue.Empty:
            _check_alive(crew)
            continue
        if kind == "count":
            tell(value)
        elif kind == "done":
            done += 1
        elif kind == "fault":
            raise AlphaflowError(value)
        else:
            raise RuntimeError(f"a worker failed:\n{value}")


def _check_alive(crew: Sequence[Any]) -> None:
    for number, member in enumerate(crew):
        if member.exitcode is not None and member.exitcode < 0:
            why = signal.Signals(-member.exitcode).name
            raise AlphaflowError(f"process {number} was killed ({why}; the system does so when memory runs out)")
        if member.exitcode:
            raise AlphaflowError(f"process {number} ended with exit code {member.exitcode}")


def _member(task: Callable[[Any, Tell], None], share: Any, messages: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    threading.Thread(target=_leave_with, args=(os.getppid(),), daemon=True).start()
    try:
        task(share, lambda count: messages.put(("count", count)))
        messages.put(("done", 0))
    except BaseException as fault:  # a library that leaves, too: the parent must not wait for us
        line = fault_of_the_user(fault)  # none for our own bug: the parent shows it whole
        messages.put(("fault", line) if line else ("bug", traceback.format_exc()))


def _leave_with(parent: int) -> None:
    """End this process when the parent is gone, however it went: nobody writes behind the back of the next run."""
    while os.getppid() == parent:
        threading.Event().wait(LOOK_EVERY)
    os._exit(1)
