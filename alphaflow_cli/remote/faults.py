"""What can go wrong with the Hub, each in one line: what, where, what to do. For huggingface_hub 1.33 and 2.x."""

import contextlib
from collections.abc import Iterator

from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.text import for_terminal

LOGIN = "Log in with: hf auth login (or set HF_TOKEN)"
AGAIN = "Run the same command again"
SENDING = f"{AGAIN}: what was sent is not sent twice"


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

    said = "no connection to the Hub"


class InTrouble(NoConnection):
    """Somebody answered that the Hub does not work now."""

    said = "the Hub is in trouble"


@contextlib.contextmanager
def hub_faults(what: str, *, sending: bool = False) -> Iterator[None]:
    """Turn the client's errors into ours; `what` is the repository or the deed."""
    from huggingface_hub import errors

    network: type[Exception] = errors.HfHubHTTPError.__mro__[1]  # HTTPError of httpx, or of httpx2: the client's own
    again = SENDING if sending else AGAIN
    try:
        yield
    except TooSlow as fault:
        raise NoConnection(what, f"the connection to the Hub is too slow: {fault}. {again}.") from fault
    except Distrusted as fault:
        raise HubFault(what, f"not how the Hub answers: {fault}. Look at HF_ENDPOINT and the network.") from fault
    except errors.LocalTokenNotFoundError as fault:
        raise HubFault(what, f"not logged in to the Hub. {LOGIN}.") from fault
    except errors.HfHubHTTPError as fault:
        raise _refusal(what, fault, again) from fault
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as fault:
        raise _not_cached(what, fault, again) from fault
    except errors.HFValidationError as fault:
        raise HubFault(what, f"not a name the Hub takes ({str(fault).splitlines()[0]}).") from fault
    except (network, ConnectionError, TimeoutError) as fault:
        raise NoConnection(what, f"the connection to the Hub broke ({_one_line(fault)}). {again}.") from fault
    except OSError as fault:
        raise HubFault(what, _one_line(fault)) from fault
    except RuntimeError as fault:  # an upload's worker wraps what happened to it
        if isinstance(fault.__cause__, errors.HfHubHTTPError):
            raise _refusal(what, fault.__cause__, again) from fault
        if isinstance(fault.__cause__, (network, OSError)):
            raise NoConnection(what, f"the connection to the Hub broke ({_one_line(fault)}). {again}.") from fault
        raise


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
    """By kind, then by status."""
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
    said = {
        401: f"the Hub does not accept the token (HTTP 401). {LOGIN}.",
        403: "your token has no right to do this (HTTP 403). Use a token with write access, or offer it with --pr.",
        409: f"somebody else changed it at the same moment (HTTP 409). {again}.",
        413: "the Hub refuses files of this size (HTTP 413).",
        429: f"too many requests (HTTP 429){_patience(fault)}. {again}.",
    }
    if status in said:
        return said[status]
    if status is not None and status >= 500:
        return f"the Hub is in trouble (HTTP {status}). {again}."
    return f"the Hub answers {status or 'nothing'}: {_one_line(fault)}"


def _patience(fault: Exception) -> str:
    seconds = getattr(getattr(fault, "response", None), "headers", {}).get("Retry-After")
    return f"; wait {seconds} s" if seconds else ""


def _not_cached(what: str, fault: BaseException, again: str) -> HubFault:
    """The Hub's own answer where it gave one."""
    from huggingface_hub import errors

    cause = fault.__cause__
    if isinstance(cause, errors.HfHubHTTPError):
        return _refusal(what, cause, again)
    why = f" ({type(cause).__name__})" if cause is not None else ""
    return NoConnection(
        what, f"not in the cache, and the Hub cannot be reached{why}. Go online once to fetch it, or give a path."
    )


def _one_line(fault: BaseException) -> str:
    lines = [line.strip() for line in str(fault).splitlines() if line.strip()]
    return (for_terminal(lines[0], limit=300) if lines else type(fault).__name__).rstrip(".")
