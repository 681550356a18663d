"""One writer per folder: a run, a store, an evaluation's working folder, an analysis. Readers take no lock.

FOLDER/.lock says who writes there: process, host, the process's start time, since when. While it works its age is
renewed every BEAT seconds. A lock is taken over

    on the same machine      as soon as its process is gone, or the number belongs to a later process
    from another machine     after PATIENCE seconds without a beat, measured by the clock of the folder's file system;
                             a system that does not tell machines apart (no /proc) counts as another one

Where one file is written for long its lock is .FILE.lock beside it.

Reading a lock and writing it happens under flock, held for milliseconds: of two that see a dead lock one wins. An owner
that stood still for long enough to be taken over (stopped, or a laptop asleep) finds out before it writes: `check`.
Of N processes of one run the first holds the lock; a parent hands it on through HANDED_ON.
"""

import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.runtime.progress import duration, say

NAME = ".lock"
HANDED_ON = "ALPHAFLOW_LOCK"  # the token that the first of our worker processes may take over from its parent
BEAT = 30.0  # seconds between signs of life
PATIENCE = 300.0  # seconds without one, after which another machine may take over
BUSY = 5.0  # seconds to wait for somebody who is just reading or writing the lock


@dataclass(frozen=True)
class Owner:
    """The process that holds a lock, as the lock names it."""

    token: str  # drawn for each owner
    command: str
    pid: int
    started: str  # start time of the process: a number is given again
    host: str
    machine: str  # the running system and its table of processes: containers and machines may share a name
    since: str

    def is_here(self) -> bool:
        """Whether it was a process of this machine, so that its end can be seen."""
        return bool(self.machine) and (self.host, self.machine) == (socket.gethostname(), this_machine())

    def is_alive(self) -> bool:
        """Whether the process still runs; only for one of this machine."""
        return started_at(self.pid) == self.started


_held: dict[Path, str] = {}  # what this process holds: folder → token
os.register_at_fork(after_in_child=_held.clear)


@contextlib.contextmanager
def hold(folder: Path, command: str, *, is_file: bool = False) -> Iterator[None]:
    """Be the only writer of a folder or a file; one line names another holder. Holding it twice is the same as once.

    A folder that was made for it, and in which nothing was written, is removed again.
    """
    place = folder.absolute()
    if place in _held:
        yield
        return
    path = _lock_of(place, is_file)
    made = [each for each in (path.parent, *path.parent.parents) if not each.exists()]
    try:
        token = _take(place, path, command)
    except AlphaflowError:
        _remove(made, path if made and path.exists() and not path.stat().st_size else None)
        raise
    _held[place] = token
    stop = threading.Event()
    beats = threading.Thread(target=_beat, args=(path, token, stop), daemon=True)
    beats.start()
    try:
        yield
    finally:
        stop.set()
        beats.join(BUSY)  # else its last beat might count for the next owner
        del _held[place]
        _release(path, token)
        _remove(made)


def _remove(folders: Sequence[Path], file: Path | None = None) -> None:
    """Remove folders that were made for a lock, the innermost first; those with something in them stay."""
    with contextlib.suppress(OSError):  # not empty, or gone
        if file:
            file.unlink()
        for each in folders:
            each.rmdir()


@contextlib.contextmanager
def in_turn(file: Path) -> Iterator[None]:
    """Be alone with a small file while it is read and written anew: others wait, for it takes milliseconds."""
    lock = _lock_of(file, True)
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(_opened(lock))
        except OSError as error:
            raise AlphaflowError(f"{file}: cannot be written ({error.strerror}). Name another folder.") from error
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                lock.unlink()


def _lock_of(place: Path, is_file: bool) -> Path:
    """Where the lock of a folder, or of a file that is written for long, stands."""
    return place.with_name(f".{place.name}{NAME}") if is_file else place / NAME


def check_lock(folder: Path, *, is_file: bool = False) -> None:
    """Check before a save that the lock is still ours: it is not, if this process stood still for too long."""
    token = _held.get(folder.absolute())
    owner = _read(_lock_of(folder, is_file)) if token else None
    if owner is not None and owner.token != token:
        raise AlphaflowError(
            f"{folder}: process {owner.pid} on {owner.host} took over at {owner.since}, while this one stood still for "
            "more than five minutes. Nothing more is written here by this process."
        )


def hand_on(folder: Path) -> dict[str, str]:
    """Make the variable by which the first of our workers may take this lock from us."""
    return {HANDED_ON: _held.get(folder.absolute(), "")}


def _take(folder: Path, path: Path, command: str) -> str:
    """Write our name into the lock, or raise an error with the name that stands there."""
    token = secrets.token_hex(8)
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    me = Owner(token, command, os.getpid(), started_at(os.getpid()), socket.gethostname(), this_machine(), since)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _opened(path) as file:
            there = _owner_in(os.pread(file, 10_000, 0))
            if there is not None and there.token != os.environ.get(HANDED_ON):
                _refuse_living(folder, path, there, file)
                say(f"{folder}: process {there.pid} on {there.host} ({there.command}) is gone; this command takes over")
            _write(file, me)
    except OSError as error:
        room = "Make room, or name" if error.errno == errno.ENOSPC else "Name"
        raise AlphaflowError(f"{folder}: cannot be written ({error.strerror}). {room} another folder.") from error
    return token


def _refuse_living(folder: Path, path: Path, there: Owner, file: int) -> None:
    """Refuse the second of two commands, unless the first is gone."""
    if there.is_here():
        alive, wait = there.is_alive(), f"Wait for it, end it (kill {there.pid})"
    else:
        quiet = _quiet_seconds(path.parent, file)
        alive = quiet < PATIENCE
        wait = (
            f"Its last sign of life was {duration(max(quiet, 0))} ago; after {duration(PATIENCE)} without one the same "
            "command goes on here. Wait for it, end it there"
        )
    if alive:
        who = f"{there.command}, process {there.pid} on {there.host}, since {there.since}"
        raise AlphaflowError(f"{folder}: another command is writing here ({who}). {wait}, or name another folder.")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    """Open the lock's file, so that nobody else reads or writes it meanwhile."""
    until = time.monotonic() + BUSY
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW, 0o644)
        try:
            if _got(file, path, until) and _is(path, file):  # else it was removed while we waited: look again
                yield file
                return
        finally:
            os.close(file)


def _got(file: int, path: Path, until: float) -> bool:
    """Whether flock gave it to us; a file system that cannot lock is said, and the lock's text has to do alone."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        if time.monotonic() > until:
            raise AlphaflowError(f"{path.parent}: another command is writing here. Wait for it to end.") from error
        time.sleep(0.05)
        return False
    except OSError as error:
        say(f"{path.parent}: this file system has no locks ({error.strerror}); start only one command at a time here")
    return True


def _is(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file))
    except FileNotFoundError:
        return False


def _quiet_seconds(folder: Path, file: int) -> float:
    """Seconds since the owner's last beat, by the file system's clock: the clocks of two machines differ."""
    probe = folder / f"{NAME}.{secrets.token_hex(4)}.tmp"
    try:
        probe.touch()
        return probe.stat().st_mtime - os.fstat(file).st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _write(file: int, owner: Owner) -> None:
    text = json.dumps(asdict(owner)).encode() + b"\n"
    os.pwrite(file, text, 0)
    os.ftruncate(file, len(text))


def _owner_in(text: bytes) -> Owner | None:
    """Whom a lock names; None where it is empty, was cut short by a kill, or holds what no terminal should be shown."""
    try:
        owner = Owner(**json.loads(text))
        texts = [value for name, value in asdict(owner).items() if name != "pid"]
        sound = all(isinstance(value, str) and value.isprintable() and len(value) < 300 for value in texts)
        return owner if sound and type(owner.pid) is int else None
    except (ValueError, TypeError, RecursionError):
        return None


def _read(path: Path) -> Owner | None:
    with contextlib.suppress(OSError):
        return _owner_in(path.read_bytes())
    return None


def _beat(path: Path, token: str, stop: threading.Event) -> None:
    """Give a sign of life every BEAT seconds, until the lock is released or belongs to somebody else."""
    while not stop.wait(BEAT):
        owner = _read(path)
        if owner is not None and owner.token != token:
            return
        with contextlib.suppress(OSError):  # a disk that is away for a while; `check` reports what is lost
            os.utime(path)


def _release(path: Path, token: str) -> None:
    """Remove the lock, unless it was handed on or taken over."""
    with contextlib.suppress(OSError, AlphaflowError), _opened(path) as file:  # it is dead with this process anyway
        there = _owner_in(os.pread(file, 10_000, 0))
        if there is None or there.token == token:
            path.unlink()


def started_at(pid: int) -> str:
    """When a process was started, in the system's own units; empty where there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return "" if fields[0] in (b"Z", b"X") else fields[19].decode()  # a zombie writes nothing any more
    except OSError:
        return ""


def this_machine() -> str:
    """Name the running system and its table of process numbers; empty where the system does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""
