"""The one error a user may cause: a recipe, file, checkpoint or run at fault; and which errors of Python are theirs."""

import errno
import os
import re
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shlex import quote

from alphaflow_cli.text import brief

DAMAGE = (OSError, ValueError, LookupError, TypeError, AttributeError, SyntaxError)  # what readers raise on such data

AGAIN = "Make room, and run the same command again."
ELSEWHERE = "Choose another path."
THE_MACHINES = {  # errno → reason and advice: no program can help these, so they are the user's without a path, too
    errno.ENOSPC: ("the disk is full", AGAIN),
    errno.EDQUOT: ("the quota of this disk is used up", AGAIN),
    errno.EROFS: ("the file system is read-only", ELSEWHERE),
    errno.EIO: ("the disk reports an error", "Check the disk, or choose another one."),
    errno.EFBIG: ("the file system takes no file of this size", "Choose another disk."),
    errno.ENOMEM: ("the machine's memory is used up", "End other programs, or do less at once."),
    errno.EMFILE: ("too many files are open", "Raise the limit: ulimit -n 65536"),
    errno.ENFILE: ("the machine has too many files open", "End other programs."),
}
OF_A_PATH = {  # errno → reason and advice, where the error names the path
    **THE_MACHINES,
    errno.ENOENT: ("no such file or folder", "Check the path; a folder must exist before a file is put there."),
    errno.ENOTDIR: ("a part of the path is a file, not a folder", ELSEWHERE),
    errno.EISDIR: ("a folder, where a file is wanted", ELSEWHERE),
    errno.EEXIST: ("exists already", "Choose another name, or move it away."),
    errno.ENOTEMPTY: ("the folder is not empty", "Choose another name, or move it away."),
    errno.EACCES: ("no permission", "Change the permissions, or choose another path."),
    errno.EPERM: ("not permitted", "Change the permissions, or choose another path."),
    errno.ENAMETOOLONG: ("longer than the file system allows", "Choose a shorter name."),
    errno.ELOOP: ("a circle of symbolic links", "Remove the links, or choose another path."),
    errno.EBUSY: ("in use", "Wait for the other program, or choose another path."),
    errno.ETXTBSY: ("in use", "Wait for the other program, or choose another path."),
    errno.ESTALE: ("gone from the network's file system", "Mount it again, and run the same command again."),
    errno.EILSEQ: ("not UTF-8, and weights cannot be read from such a path", "Choose another name."),
    errno.ENODEV: ("no such device", ELSEWHERE),
    errno.ENXIO: ("a device or a pipe, where a file is wanted", ELSEWHERE),
}
PARSERS = re.compile(r"[/\\](json|yaml|ast\.py|plistlib\.py|zipfile|tarfile\.py|xml)\b")  # they call themselves


class AlphaflowError(Exception):
    """An error that says what is wrong, where, and what to do. The command line prints it as `error: …` and exits 1."""


def no_such_source(text: str, likely: str = "") -> AlphaflowError:
    """The error for a source of pictures that is a path and leads nowhere; `likely` is what may have been meant."""
    advice = f"Did you mean {brief(likely)}?" if likely else "Others: hf://datasets/USER/NAME, shapes:4000"
    return AlphaflowError(f"{brief(text)}: no such folder or archive. {advice}")


class LostOutput(AlphaflowError):
    """stdout did not take the result. It is no OSError: click ends at those of pipes, and another could be meant."""

    def __init__(self, cause: OSError) -> None:
        super().__init__(f"stdout cannot be written ({cause.strerror}), so the result is not shown. Files are kept.")


def pip_install(extra: str) -> str:
    """The command that installs an extra of this program from where the program came: a clone, an address, its name."""
    import json  # here, as are the others: the command line starts without them
    from importlib.metadata import PackageNotFoundError, distribution
    from urllib.parse import unquote, urlsplit

    try:
        origin = json.loads(distribution("alphaflow-cli").read_text("direct_url.json") or "{}")
    except PackageNotFoundError:  # a clone that is not installed
        origin = {"url": Path(__file__).parents[1].as_uri()}
    address, kind = str(origin.get("url", "")), ""
    path, wanted = Path(unquote(urlsplit(address).path)), f"alphaflow-cli[{extra}]"
    if vcs := origin.get("vcs_info"):
        wanted = f"{wanted} @ {vcs['vcs']}+{address}"
    elif address.startswith("file:") and path.exists():
        wanted = f"{'.' if path == Path.cwd() else path}[{extra}]"
        kind = "-e " if origin.get("dir_info", {}).get("editable") else ""
    return f"pip install {kind}{quote(wanted)}"


@contextmanager
def blamed_on(path: Path, what: str, *more: type[Exception]) -> Iterator[None]:
    """Turn whatever fails while a file is read and taken apart into one line that names the file. For reading only."""
    kinds: tuple[type[Exception], ...] = (*DAMAGE, *more)
    try:
        yield
    except kinds as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error).partition("\n")[0]
        raise AlphaflowError(f"{path}: not {what}, or damaged ({reason}). Move it away, or make it again.") from error


def fault_of_the_user(error: BaseException) -> str:
    """The line for an error that the user's files or machine caused; empty for a bug of ours, which keeps its
    traceback.

    The rule. An OSError is the user's when it names a path outside this program, or when its errno is one that no
    program can help (THE_MACHINES); without either it is ours: a closed descriptor, a socket. Half a character in
    text that is written is the user's when it comes from a file name (Python marks these bytes); bytes that are no
    text are, when pathlib was reading a file. A RecursionError is the user's inside a parser of documents, nowhere
    else. Memory that is not there has nobody's fault in it: it is said in a line, and --debug shows where.
    """
    if isinstance(error, AlphaflowError):
        return str(error)
    if isinstance(error, OSError):
        return _of_the_system(error)
    if isinstance(error, UnicodeError):
        return _of_text(error)
    if isinstance(error, RecursionError):
        last = traceback.extract_tb(error.__traceback__)[-1:]
        deep = "a document that is read here is nested too deeply, so alphaflow did not write it. --debug shows where."
        return deep if any(PARSERS.search(frame.filename) for frame in last) else ""
    torchs = type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator: can't allocate" in str(error)
    if isinstance(error, MemoryError) or torchs:
        reason = str(error).rpartition("DefaultCPUAllocator: ")[2].partition("\n")[0].rstrip(".") or "memory is used up"
        return f"{reason}. Do less at once (a smaller --batch, size or number of processes); --debug shows where."
    if isinstance(error, ValueError) and "embedded null " in str(error):  # Python says it in several ways
        return "a path has a null byte in it, which no file can have. Write the path without it."
    return ""


def _of_the_system(error: OSError) -> str:
    name = error.filename
    if isinstance(name, str | bytes | os.PathLike) and os.fspath(name) and not _is_ours(Path(os.fsdecode(name))):
        known = OF_A_PATH.get(error.errno or 0)
        reason, advice = known or (error.strerror or type(error).__name__, "Check the path.")
        return f"{os.fsdecode(name)}: {reason}. {advice}"
    if error.errno in THE_MACHINES:
        return "{}. {}".format(*THE_MACHINES[error.errno])
    return ""


def _is_ours(path: Path) -> bool:
    """Whether a path is part of the program: this package, Python's library, or what is installed in it."""
    places = [Path(__file__).parent, *(Path(sysconfig.get_path(kind)) for kind in ("stdlib", "purelib", "platlib"))]
    return any(path.is_relative_to(place) for place in places)


def _of_text(error: UnicodeError) -> str:
    if isinstance(error, UnicodeEncodeError):
        if not re.search("[\udc80-\udcff]", error.object[error.start : error.end]):
            return ""
        return f"{error.object[:500]}: a name that is not UTF-8 cannot be written down. Rename it."
    for frame, _ in traceback.walk_tb(error.__traceback__):
        read = frame.f_locals.get("self")
        if frame.f_code.co_name == "read_text" and isinstance(read, Path):
            return f"{read}: not UTF-8 text, so it is damaged, or alphaflow did not write it. Move it away."
    return ""
