"""The real command in a process of its own: a fork of this one, which has torch imported already.

Arguments, streams, signals and exit code are those of `python -m alphaflow_cli …`; only the three seconds are missing
in which a new interpreter imports. What is about the start itself (the interpreter's streams, an interruption while it
imports, a missing package) starts a new one.

The fixture `forked_workers` (tests/conftest.py) starts the processes of --processes so, too. What is about the launcher
itself, its signals and orphans, is shown with new interpreters: tests/train/test_train_launch.py, tests/runtime.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path


class Command:
    """`alphaflow LINE`, as subprocess.Popen would have started it."""

    def __init__(self, line, *, cwd=".", env=None, first=None, streams=None):
        self.args, self.returncode = ["alphaflow", *map(str, line)], None
        self.out, self.err = streams or [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115 (closed with this)
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._become(Path(cwd), env, first)

    def _become(self, cwd, env, first):
        code = 1
        try:
            for number, handle in enumerate((os.open(os.devnull, os.O_RDONLY), self.out.fileno(), self.err.fileno())):
                os.dup2(handle, number)
            sys.stdin, sys.stdout, sys.stderr = (os.fdopen(os.dup(n), mode) for n, mode in enumerate("rww"))
            sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
            sys.argv = self.args
            self._run(cwd, env, first)
        except SystemExit as leave:
            code = leave.code if isinstance(leave.code, int) else int(leave.code is not None)
            if isinstance(leave.code, str):
                sys.stderr.write(f"{leave.code}\n")
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _run(self, cwd, env, first):
        from alphaflow_cli.__main__ import main

        warnings.resetwarnings()
        warnings.simplefilter("ignore")  # the tests make errors of them
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.chdir(cwd)
        os.environ.update(env or {})
        if first is not None:
            first()
        main()

    def poll(self):
        if self.returncode is None:
            self._look(os.WNOHANG)
        return self.returncode

    def wait(self, timeout=120):
        until = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > until:
                self.send_signal(signal.SIGKILL)
                self._look(0)
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.005)
        return self.returncode

    def _look(self, flags):
        pid, status = os.waitpid(self.pid, flags)
        if pid:
            self.returncode = os.waitstatus_to_exitcode(status)

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def communicate(self, timeout=120):
        """Wait for the end; stdout and stderr."""
        self.wait(timeout)
        texts = []
        for file in (self.out, self.err):
            file.seek(0)
            texts.append(file.read().decode())
        return tuple(texts)

    def __del__(self):
        self.out.close()
        self.err.close()


class Worker(Command):
    """One of --processes: what torch's agent wants of subprocess.Popen, whose arguments these are."""

    def __init__(self, args, env, **options):
        program, line = [word for word in args if word != "-u"][:3], args[args.index("alphaflow_cli") + 1 :]
        assert program == [sys.executable, "-m", "alphaflow_cli"]
        assert options == {"stdout": None, "stderr": None, "start_new_session": True}
        super().__init__(line, env=env, first=self._begin, streams=[os.fdopen(os.dup(n), "wb") for n in (1, 2)])
        with contextlib.suppress(OSError):  # whichever of the two is first; the agent kills by group
            os.setpgid(self.pid, self.pid)

    def _begin(self):
        os.setpgid(0, 0)
        forget_joined()


def forget_joined():
    """Forget what earlier tests joined in this process, from which a fork begins."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def alphaflow(line, *, timeout=200, **options):
    """The command to its end, as subprocess.run would tell of it."""
    command = Command(line, **options)
    out, err = command.communicate(timeout)
    return subprocess.CompletedProcess(command.args, command.returncode, out, err)


def torchrun(line, processes, **options):
    """`torchrun -m alphaflow_cli LINE`; with the fixture `forked_workers` its processes are forks, too."""
    from torch.distributed.run import main as agent

    words = ["--nproc-per-node", str(processes), "-m", "alphaflow_cli", *line]
    return Command(line, first=lambda: sys.exit(agent(words)), **options)
