"""The Hub's client, set by the environment at the moment of the call: HF_ENDPOINT, HF_HUB_CACHE, HF_TOKEN.

huggingface_hub believes what a server says. Every request of the process goes through the one client made here, which
does not: the token goes to the endpoint's own host only; commits and checksums must look like such before they name a
file; an answer has a length, a time and a shape; what is compressed though nobody asked is refused. Xet's client, which
huggingface_hub would take for large files, checks none of that and sends the token to wherever it is led: it is off.
"""

import contextvars
import errno
import importlib
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urljoin, urlsplit

from alphaflow_cli.documents import Anything, Table, Text, parse_json
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.files import free_bytes
from alphaflow_cli.remote.cache import cache_folder
from alphaflow_cli.remote.faults import CHECKSUM, COMMIT, Distrusted, TooSlow, read_answer, shape_of
from alphaflow_cli.text import for_terminal

if TYPE_CHECKING:
    from huggingface_hub import HfApi

LONGEST_ANSWER = 128 << 20  # bytes of an answer that is held in memory, or that does not say its length
PACKED = 64 << 10  # bytes of a compressed answer: nobody asked for compression, and a byte may become a thousand
PATIENCE = 60.0  # seconds for the head of an answer, or for a whole one that is no download
SLOWEST = 1000  # bytes per second of a download, over PATIENCE
SENDING_PATIENCE = 300.0  # seconds without a byte where we send: a file's end waits in the system's buffers
WAIT = 60  # seconds that a server may ask us to wait before the next try
PAGES = 2000  # of one listing, 1,000 files each

ERROR = Table({"error": Text(100_000)}, others=Anything())
HEAD_NUMBERS = (  # of an answer's head, and how they must look
    ("X-Linked-Size", r"[0-9]{1,18}"),
    ("Content-Range", r"bytes [0-9]{1,18}-[0-9]{1,18}/[0-9]{1,18}"),
    ("Retry-After", r"[0-9]{1,4}"),
    ("RateLimit", r'"\w{1,40}"; *r=[0-9]{1,9}; *t=[0-9]{1,4}'),
)
DEFAULT_PORTS = {"http": 80, "https": 443}

Value = TypeVar("Value")


def hub_api() -> "HfApi":
    """A client; imported here, since most commands never need it."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if any(not "!" <= letter <= "~" for letter in get_token() or ""):
        raise AlphaflowError(
            "the token holds a character that no token has. Copy it again into HF_TOKEN, or: hf auth login"
        )
    if not sys.stderr.isatty():
        disable_progress_bars()
    session()
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, library_name="alphaflow")


def session() -> Any:
    """Make the HTTP client of the whole process; an unusable environment is reported in one line."""
    from huggingface_hub import constants, get_session

    _origin(endpoint())
    _install()
    constants.HF_HUB_DISABLE_XET = True
    try:
        return get_session()
    except (ValueError, OSError, _library().InvalidURL) as fault:  # read from the environment: proxies, certificates
        names = [name for name in sorted(os.environ) if name.upper() in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")]
        where, why = ", ".join(names) or "SSL_CERT_FILE", for_terminal(fault, limit=200)
        raise AlphaflowError(f"{where}: no connection to the Hub can be made with it ({why}).") from fault


def endpoint() -> str:
    """The address of the Hub, or of a server that stands in for it."""
    from huggingface_hub import constants

    return os.environ.get("HF_ENDPOINT") or constants.ENDPOINT


def _origin(address: str) -> tuple[str, str, int]:
    """Scheme, host and port of an address: the token goes to these three together and nowhere else."""
    try:
        parts = urlsplit(address)
        scheme, host, port = parts.scheme, parts.hostname, parts.port
    except ValueError:
        host = None
    if not host or scheme not in DEFAULT_PORTS:
        raise AlphaflowError(f"HF_ENDPOINT: {for_terminal(address, limit=100)} is not an address like https://HOST")
    return scheme, host, port or DEFAULT_PORTS[scheme]


@cache
def _library() -> Any:
    """httpx, or httpx2: the client's own."""
    from huggingface_hub.errors import HfHubHTTPError

    return importlib.import_module(HfHubHTTPError.__mro__[1].__module__.partition(".")[0])


@cache
def _body() -> Any:
    """The class of an answer's bytes, counted and timed; made here, since its base is imported late."""
    base: Any = _library().SyncByteStream

    class Body(base):  # type: ignore[misc]
        def __init__(self, inner: Any, limits: "Limits") -> None:
            self.inner, self.limits = inner, limits

        def __iter__(self) -> Iterator[bytes]:
            return self.limits.watch(self.inner)

        def close(self) -> None:
            self.inner.close()

    return Body


@cache
def _install() -> None:
    """Make every request of this process go through the checks of this file; done once, however often it is called."""
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    library = _library()
    client_base: Any = library.Client

    class Client(client_base):  # type: ignore[misc]
        """Checks every request before it is sent, and every answer before it is used."""

        def send(self, request: Any, *, stream: bool = False, **options: Any) -> Any:
            fetch = partial(_fetch, partial(super().send, request, stream=True, **options), stream)
            asks = request.method in ("GET", "HEAD")
            answer = within(PATIENCE, fetch) if asks else _sent(library, request, fetch)
            if answer.status_code >= 400 and not _is_read(request, answer):
                return _refusal(library, answer)
            return answer if stream else _checked(library, request, answer)

    def receive(response: Any) -> None:
        _see_head(response)
        response.stream = _body()(response.stream, _limits(response))

    def make() -> Any:
        plain = default_client_factory()
        hooks = {"request": [*plain.event_hooks["request"], _see_request], "response": [receive]}
        headers = {"Accept-Encoding": "identity"}
        jar = CookieJar(DefaultCookiePolicy(allowed_domains=[]))  # the Hub needs no cookies
        return Client(event_hooks=hooks, follow_redirects=True, timeout=plain.timeout, headers=headers, cookies=jar)

    set_client_factory(make)


def within(seconds: float, work: Callable[[], Value]) -> Value:
    """What `work` returns, or TooSlow; then its thread is left to the limits of what it reads."""
    done: list[Value] = []
    faults: list[BaseException] = []

    def run() -> None:
        try:
            done.append(work())
        except BaseException as fault:  # raised again by whoever waits
            faults.append(fault)

    thread = threading.Thread(target=contextvars.copy_context().run, args=(run,), daemon=True)
    thread.start()
    thread.join(seconds)
    if faults:
        raise faults[0]
    if not done:
        raise TooSlow(f"no whole answer within {seconds:g} s")
    return done[0]


def _fetch(send: Callable[[], Any], stream: bool) -> Any:
    """The head of an answer, and all of it where it is no download."""
    answer = send()
    if not stream or answer.status_code >= 400:
        answer.stream.limits.most = min(answer.stream.limits.most, LONGEST_ANSWER)
        answer.stream.limits.until = time.monotonic() + PATIENCE
        try:
            answer.read()
        finally:
            answer.close()
    elif (length := int(answer.headers.get("Content-Length", "0"))) > (free := free_bytes(cache_folder())):
        answer.close()
        raise OSError(errno.ENOSPC, f"{length:,} bytes are to come, and {free:,} are free")
    return answer


def _sent(library: Any, request: Any, fetch: Callable[[], Value]) -> Value:
    """What `fetch` returns for a request that carries something, of any size; TooSlow where nothing moves any more."""
    request.extensions["timeout"] = library.Timeout(SENDING_PATIENCE, connect=PATIENCE).as_dict()
    try:
        return fetch()
    except library.TimeoutException as fault:  # not tried five times more, as the library would
        raise TooSlow(f"no answer from {_shown(request.url)} within {SENDING_PATIENCE:g} s") from fault


class Limits:
    """How long one answer may be and how slowly it may come, before it is given up."""

    def __init__(self, most: float, what: str, *, has_length: bool) -> None:
        self.most, self.what, self.has_length, self.until = most, what, has_length, float("inf")

    def watch(self, pieces: Any) -> Iterator[bytes]:
        """Yield the pieces, as long as they come fast enough and are not too many."""
        count, since, before = 0, time.monotonic(), 0
        inner = iter(pieces)
        step = partial(next, inner, None)
        while (piece := step() if self.has_length else within(PATIENCE, step)) is not None:
            count, now = count + len(piece), time.monotonic()
            if count > self.most:
                raise Distrusted(f"{self.what} is longer than {self.most:,.0f} bytes")
            if now > self.until or (now - since > PATIENCE and count - before < SLOWEST * (now - since)):
                raise TooSlow(f"{self.what} comes too slowly ({count:,} bytes in {now - since:.0f} s)")
            if now - since > PATIENCE:
                since, before = now, count
            yield piece


def _limits(response: Any) -> Limits:
    """The limits of an answer by its head: whether it is compressed, and whether it says its length."""
    what = f"the answer to {_shown(response.request.url)}"
    length = response.headers.get("Content-Length", "")
    if response.headers.get("Content-Encoding", "identity") != "identity":
        return Limits(PACKED, f"{what} is compressed, although we did not ask for that, and", has_length=False)
    if not re.fullmatch(r"[0-9]{1,18}", length):
        return Limits(LONGEST_ANSWER, what, has_length=False)
    return Limits(float("inf"), what, has_length=True)


def _see_request(request: Any) -> None:
    """Check a request before it is sent, redirects included: the token goes to the endpoint only."""
    url, ours = request.url, _origin(endpoint())
    if url.scheme not in DEFAULT_PORTS:
        raise Distrusted(f"it sends us to {_shown(url)}, which is no web address")
    if ours[0] == "https" and url.scheme == "http":
        raise Distrusted(f"it sends us to {_shown(url)}, which is not encrypted")
    if ours != (url.scheme, url.host, url.port or DEFAULT_PORTS[url.scheme]):
        request.headers.pop("Authorization", None)


def _see_head(response: Any) -> None:
    """Check every value of an answer's head that we use: names of files, addresses, sizes, waits, printed lines."""
    headers, where = response.headers, _shown(response.request.url)
    for name, form in (("X-Repo-Commit", COMMIT), ("ETag", CHECKSUM), ("X-Linked-Etag", CHECKSUM)):
        value = headers.get(name)
        checked = name == "X-Repo-Commit" or response.request.method == "HEAD"  # others name nothing by their ETag
        if checked and value is not None and not re.fullmatch(form, value.removeprefix("W/").strip('"')):
            raise Distrusted(f"it names a file {name} {for_terminal(value, limit=60)}, which is no checksum")
    if headers.get("Content-Encoding", "identity") not in ("identity", "gzip", "deflate"):
        raise Distrusted(f"it answers {where} compressed, although we did not ask for that")
    length = headers.get("Content-Length", "0")
    if not re.fullmatch(r"[0-9]{1,18}", length):
        raise Distrusted(f"it sends {for_terminal(length, limit=30)} bytes, which is no number of bytes")
    for name, form in HEAD_NUMBERS:
        match = re.fullmatch(form, headers.get(name, ""))
        if match is None or (name in ("Retry-After", "RateLimit") and int(match[0].rpartition("=")[2]) > WAIT):
            headers.pop(name, None)
    _see_location(response)
    for name, value in list(headers.items()):
        if not (value.isascii() and value.isprintable()):
            headers[name] = for_terminal(value).encode("ascii", "backslashreplace").decode()


def _see_location(response: Any) -> None:
    """Where a redirect leads, as a whole address; any other answer leads nowhere."""
    location = response.headers.pop("Location", None)
    if location is not None and response.status_code in (301, 302, 303, 307, 308):
        try:
            response.headers["Location"] = urlsplit(urljoin(str(response.request.url), location)).geturl()
        except ValueError as fault:
            raise Distrusted(f"it sends us to {for_terminal(location, limit=100)}, which is no address") from fault


_pages: dict[str, int] = {}  # address of a next page → how many came before it


def _see_next(request: Any, answer: Any) -> None:
    """Check that a listing ends, and stays on its host."""
    following = answer.links.get("next", {}).get("url")
    before = _pages.pop(str(request.url), 0)
    if following:
        target = request.url.join(following)
        if (target.scheme, target.host, target.port) != (request.url.scheme, request.url.host, request.url.port):
            raise Distrusted(f"its list continues at {_shown(target)}")
        if before >= PAGES:
            raise Distrusted(f"its listing has more than {PAGES:,} pages")
        _pages[str(target)] = before + 1


def _checked(library: Any, request: Any, answer: Any) -> Any:
    """Reduce the answer to what we read from it; an answer of another shape is refused by name."""
    shape = shape_of(request.method, request.url.path)
    if shape is None:
        return answer
    _see_next(request, answer)
    try:
        value = read_answer(answer.content, shape, limit=LONGEST_ANSWER)
    except ValueError as fault:
        page = " (a web page: does this network show a login page?)"
        is_page = answer.content.lstrip()[:1] == b"<"
        raise Distrusted(f"{_shown(request.url)}: {fault}{page if is_page else ''}") from fault
    for group, name in (("files", "path"), ("objects", "oid")):
        if group in value and {each[name] for each in value[group]} != _asked_about(request, group, name):
            raise Distrusted(f"{_shown(request.url)}: it answers about other {group} than the request named")
    kept = {name: value for name, value in answer.headers.items() if name.lower() in ("link", "x-repo-commit")}
    content = json.dumps(value).encode()  # half a letter in a text stays escaped
    return library.Response(answer.status_code, headers=kept, content=content, request=answer.request)


def _asked_about(request: Any, group: str, name: str) -> set[str]:
    return {each[name] for each in json.loads(request.content)[group]}


def _is_read(request: Any, answer: Any) -> bool:
    """Whether a refusal is read like an answer: the address of a repository that exists already, a card's faults."""
    refusals = ((409, "/api/repos/create"), (400, "/api/validate-yaml"))
    return any(answer.status_code == status and request.url.path.endswith(end) for status, end in refusals)


def _refusal(library: Any, answer: Any) -> Any:
    """Keep of an answer of 400 and above its head, and the one sentence that the Hub puts into the body."""
    try:
        sentence = parse_json(answer.content, "", ERROR, limit=PACKED, advice="")["error"]
    except AlphaflowError:
        sentence = ""
    of_body = ("content-length", "content-encoding", "transfer-encoding", "content-type")
    kept = {name: value for name, value in answer.headers.items() if name.lower() not in of_body}
    body = {"error": for_terminal(sentence, limit=1000)} if sentence else {}
    return library.Response(answer.status_code, headers=kept, json=body, request=answer.request)


def _shown(address: Any) -> str:
    """Show an address without its password and its query, which may hold a key."""
    parts = urlsplit(str(address))
    return for_terminal(f"{parts.scheme}://{parts.hostname or ''}{parts.path}", limit=160)
