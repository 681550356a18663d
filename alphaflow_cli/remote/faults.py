"""What the Hub may answer, and what can go wrong with it, each in one line: what, where, what to do.

The shape of every answer is declared here: the client checks it before anything reads it, and keeps only what is used.
Errors are those of huggingface_hub 1.33 and 2.x.
"""

import contextlib
import errno
import re
from collections.abc import Iterator
from typing import Any

from alphaflow_cli.documents import Anything, Flag, ListOf, Maybe, Shape, Table, Text, Whole, parse_json
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.remote.cache import cache_folder, is_offline
from alphaflow_cli.text import for_terminal

LOGIN = "Log in with: hf auth login (or set HF_TOKEN)"
RETRY = "Run the same command again"
SENDING = f"{RETRY}: what was sent is not sent twice"
COMMIT = r"[0-9a-f]{40}"
CHECKSUM = r"[0-9a-f]{40}|[0-9a-f]{64}"  # git's sha1 of a small file, sha256 of a large one
FILE = r"(?!/)(?!(?:.*/)?\.{1,2}(?:/|$))[^\x00-\x1f\x7f\ud800-\udfff]+"  # a path that stays inside its folder
HUB_NAME = r"[\w.-]{1,96}"
WEB_ADDRESS = r"https?://[^\s\x00-\x1f\x7f\ud800-\udfff]+"
REPOSITORY = rf"{WEB_ADDRESS}/{HUB_NAME}/{HUB_NAME}"

DISK_REFUSES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR)

OPEN = Anything()  # keys that nobody reads: allowed, and left out
FILE_SIZE = Whole(0)
INFO = Table(
    {"id": Text(200, form=rf"(?:{HUB_NAME}/)?{HUB_NAME}"), "sha": Text(form=COMMIT)},
    {"private": Maybe(Flag()), "siblings": Maybe(ListOf(Table({"rfilename": Text(1000, form=FILE)}, others=OPEN)))},
    OPEN,
)
LARGE_FILE = Table({"oid": Text(form=CHECKSUM), "size": FILE_SIZE, "pointerSize": FILE_SIZE}, others=OPEN)
ENTRY = Table(
    {
        "type": Text(20, one_of=("file", "directory")),
        "path": Text(1000, form=FILE),
        "oid": Text(form=CHECKSUM),
        "size": FILE_SIZE,
    },
    {"lfs": Maybe(LARGE_FILE), "xetHash": Maybe(Text(form=CHECKSUM))},
    OPEN,
)
ACTION = Table({"href": Text(form=WEB_ADDRESS)}, {"header": Maybe(Table(others=Text()))}, OPEN)
LFS_OBJECT = Table(
    {"oid": Text(form=CHECKSUM), "size": FILE_SIZE},
    {
        "actions": Maybe(Table(optional={"upload": Maybe(ACTION), "verify": Maybe(ACTION)}, others=OPEN)),
        "error": Maybe(Table({"code": Whole(), "message": Text()}, others=OPEN)),
    },
    OPEN,
)
UPLOAD = Table(
    {"path": Text(1000, form=FILE), "uploadMode": Text(one_of=("lfs", "regular"))},
    {"shouldIgnore": Flag(), "oid": Maybe(Text(form=CHECKSUM))},
    OPEN,
)
ISSUES = ListOf(Table({"message": Text()}, others=OPEN))
COMMITTED = Table(
    {"commitUrl": Text(1000, form=rf"{REPOSITORY}/commit/\w+"), "commitOid": Text(form=COMMIT)},
    {"pullRequestUrl": Maybe(Text(1000, form=rf"{REPOSITORY}/discussions/\d+"))},
    OPEN,
)
ANSWERS: tuple[tuple[str, str, Shape], ...] = (  # method, end of the path, what is answered; the first that matches
    ("GET", "/api/whoami-v2", Table({"name": Text(form=HUB_NAME)}, others=OPEN)),
    ("POST", "/api/repos/create", Table({"url": Text(1000, form=REPOSITORY)}, others=OPEN)),
    ("POST", "/api/validate-yaml", Table(optional={"errors": ISSUES, "warnings": ISSUES}, others=OPEN)),
    ("POST", "/api/(?:models|spaces)/.+/preupload/.+", Table({"files": ListOf(UPLOAD)}, others=OPEN)),
    ("POST", "/api/(?:models|spaces)/.+/commit/.+", COMMITTED),
    ("POST", "/info/lfs/objects/batch", Table({"objects": ListOf(LFS_OBJECT)}, {"transfer": Text(100)}, OPEN)),
    ("GET", "/api/(?:models|datasets|spaces)/.+/tree/.+", ListOf(ENTRY)),
    ("GET", "/api/(?:models|datasets|spaces)/[^/]+(?:/[^/]+)?(?:/revision/.+)?", INFO),
)


class HubFault(AlphaflowError):
    """What went wrong with what: `why` alone may follow other words."""

    def __init__(self, what: str, why: str) -> None:
        super().__init__(f"{what}: {why}")
        self.why = why


class Distrusted(AlphaflowError):
    """An answer that is not believed; `hub_faults` says whose it is."""


class TooSlow(Distrusted):
    """An answer that does not come to its end."""


class NotThere(HubFault):
    """The Hub knows no such repository, or shows it to others only."""


class NoConnection(HubFault):
    """Nobody answered, as opposed to: the Hub refused."""

    summary = "no connection to the Hub"


class InTrouble(NoConnection):
    """Somebody answered that the Hub does not work now."""

    summary = "the Hub is in trouble"


@contextlib.contextmanager
def hub_faults(what: str, *, sending: bool = False) -> Iterator[None]:
    """Turn the client's errors into ours; `what` is the repository or the deed."""
    from huggingface_hub import errors

    network: type[Exception] = errors.HfHubHTTPError.__mro__[1]  # HTTPError of httpx, or of httpx2: the client's own
    again = SENDING if sending else RETRY
    try:
        yield
    except TooSlow as fault:
        raise NoConnection(what, f"the connection to the Hub is too slow: {fault}. {again}.") from fault
    except Distrusted as fault:
        raise HubFault(
            what, f"this answer does not come from a Hub: {fault}. Check HF_ENDPOINT and the network."
        ) from fault
    except errors.LocalTokenNotFoundError as fault:
        raise HubFault(what, f"not logged in to the Hub. {LOGIN}.") from fault
    except errors.HfHubHTTPError as fault:
        raise _refusal(what, fault, again) from fault
    except errors.OfflineModeIsEnabled as fault:
        raise NoConnection(what, f"HF_HUB_OFFLINE forbids asking the Hub. Unset it. {again}.") from fault
    except errors.LocalEntryNotFoundError as fault:
        raise _not_cached(what, fault, again) from fault
    except errors.HFValidationError as fault:
        raise HubFault(what, f"the Hub does not accept this name ({str(fault).splitlines()[0]}).") from fault
    except ValueError as fault:  # a card that was refused: a heading, then a line for each fault of its metadata
        if not isinstance(fault.__cause__, errors.BadRequestError):
            raise
        why = for_terminal("; ".join(line.removeprefix("- ") for line in str(fault).splitlines()[1:]), limit=300)
        raise HubFault(what, f"the Hub does not accept the card ({why}). --license chooses the licence.") from fault
    except (network, ConnectionError, TimeoutError) as fault:
        raise NoConnection(what, f"the connection to the Hub broke ({_one_line(fault)}). {again}.") from fault
    except OSError as fault:
        raise HubFault(what, _of_disk(fault)) from fault
    except RuntimeError as fault:  # an upload's worker wraps what happened to it
        if (wrapped := fault.__cause__) is None:
            raise
        with hub_faults(what, sending=sending):
            raise wrapped from wrapped.__cause__


def _refusal(what: str, fault: Exception, again: str) -> HubFault:
    """The Hub's answer as a fault of its kind."""
    from huggingface_hub import errors

    kind, status = HubFault, _status(fault)
    if isinstance(fault, errors.RepositoryNotFoundError) and not isinstance(fault, errors.GatedRepoError):
        kind = NotThere
    elif status is not None and status >= 500:
        kind = InTrouble
    return kind(what, _answer(fault, again))


def _status(fault: Exception) -> int | None:
    status = getattr(getattr(fault, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _answer(fault: Exception, again: str) -> str:
    """Say why the Hub refused: by the kind of its error, then by the status."""
    from huggingface_hub import errors

    status = _status(fault)
    if isinstance(fault, errors.GatedRepoError):
        return f"the repository is gated: ask for access on its page. {LOGIN}."
    if isinstance(fault, errors.RevisionNotFoundError):
        return "the repository has no such revision. Look at its branches and tags on the Hub."
    if isinstance(fault, errors.EntryNotFoundError):
        return "the repository has no such file."
    if isinstance(fault, errors.RepositoryNotFoundError):
        return (
            f"no such repository on the Hub, or it is private and your token may not see it (HTTP {status}). {LOGIN}."
        )
    by_status = {
        401: f"the Hub does not accept the token (HTTP 401). {LOGIN}.",
        403: _forbidden(fault),
        409: f"somebody else changed it at the same moment (HTTP 409). {again}.",
        412: f"somebody else changed it at the same moment (HTTP 412). {again}.",  # a commit that lost a race
        413: "the Hub refuses files of this size (HTTP 413).",
        429: f"too many requests (HTTP 429){_patience(fault)}. {again}.",
    }
    if status in by_status:
        return by_status[status]
    if status is not None and status >= 500:
        return f"the Hub is in trouble (HTTP {status}). {again}."
    return f"the Hub answers {status or 'nothing'}: {_one_line(fault)}"


def _forbidden(fault: Exception) -> str:
    """What a token lacks: the right to read, to make a repository, or to write into one."""
    request = getattr(getattr(fault, "response", None), "request", None)  # the error itself loses its own
    if getattr(request, "method", "") in ("GET", "HEAD"):
        return "your token may not read this (HTTP 403). Look at its rights on the Hub, or make another one."
    path = request.url.path if request is not None else ""
    if path.endswith("/api/repos/create"):  # of one that exists nothing would be heard
        return (
            "there is no such repository, and your token has no right to make it (HTTP 403). Use a token with write "
            "access, or a name of your own: alphaflow push RUN user/name"
        )
    offer = "" if "/spaces/" in path else ", or offer it with --pr"
    return f"your token has no right to do this (HTTP 403). Use a token with write access{offer}."


def _patience(fault: Exception) -> str:
    seconds = getattr(getattr(fault, "response", None), "headers", {}).get("Retry-After")
    return f"; wait {seconds} s" if seconds else ""


def _not_cached(what: str, fault: BaseException, again: str) -> HubFault:
    """The Hub's own answer where it gave one."""
    from huggingface_hub import errors

    cause = fault.__cause__
    if isinstance(cause, errors.HfHubHTTPError):
        return _refusal(what, cause, again)
    why = f"the Hub cannot be reached{f' ({type(cause).__name__})' if cause is not None else ''}. Go online"
    if is_offline():
        why = "HF_HUB_OFFLINE forbids asking the Hub. Unset it"
    return NoConnection(what, f"not in the cache, and {why} once to fetch it, or give a path.")


def _of_disk(fault: OSError) -> str:
    """What the system refused; where it is the disk of the cache, what to do."""
    if fault.errno not in DISK_REFUSES:
        return _one_line(fault)
    why = for_terminal(fault.strerror, limit=200)
    return f"the cache, {cache_folder()}, cannot be written ({why}). Free some room, or name another place: HF_HOME."


def _one_line(fault: BaseException) -> str:
    lines = [line.strip() for line in str(fault).splitlines() if line.strip()]
    return (for_terminal(lines[0], limit=300) if lines else type(fault).__name__).rstrip(".")


def shape_of(method: str, path: str) -> Shape | None:
    """The shape of the answer to a request; None: nothing in it is read here."""
    return next((shape for verb, end, shape in ANSWERS if verb == method and re.fullmatch(f".*{end}", path)), None)


def read_answer(data: bytes, shape: Shape, *, limit: int) -> Any:
    """Read the known parts of an answer; a ValueError says what is wrong with it."""
    try:
        value = parse_json(data, "", shape, limit=limit, advice="")
    except AlphaflowError as fault:
        raise ValueError(str(fault).removeprefix(": ").strip().rstrip(".")) from fault
    return known_parts(value, shape)


def known_parts(value: Any, shape: Shape) -> Any:
    """Drop the keys that the shape does not name."""
    if isinstance(shape, Maybe):
        return None if value is None else known_parts(value, shape.shape)
    if isinstance(shape, ListOf):
        return [known_parts(item, shape.shape) for item in value]
    if not isinstance(shape, Table):
        return value
    named = {**shape.required, **shape.optional}
    kept = {key: known_parts(item, named[key]) for key, item in value.items() if key in named}
    return kept if isinstance(shape.others, (Anything, type(None))) else {**value, **kept}
