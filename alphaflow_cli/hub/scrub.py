"""Nothing of this machine leaves: paths become their last part, addresses lose their passwords, wherever they stand."""

import re
from pathlib import Path
from typing import Any

# Not inside a word, an address (https://a/b) or a tag; C:\x, D:/x, \\server\share\x, file:///x, ~/x, ../x, //x and /x.
# A folder's name may hold spaces and brackets: what stands between two separators belongs to the path.
LOCAL_PATH = re.compile(
    r"(?<![\w/.<>\\])(?:file://+|~[\w.-]{0,64}[/\\]|~|\.{1,2}[/\\]|[A-Za-z]:[\\/](?!/)|\\\\(?=\w)|(?<!:)//+(?=[\w.])|/(?=[\w.]))"
    r"(?:[^/\\\n\":|]{1,80}[/\\]+)*[^\s\"',;:()/\\]*"
)
DEEP_PATH = re.compile(
    r"(?<![\w/:.@-])[\w.-]+(?:/[\w. -]*[\w.-]){3,}(?![\w/])"
)  # more folders than a name on the Hub has
ADDRESS = re.compile(r"(?<![\w+])((?!hf:)[a-z][a-z0-9+.-]{1,20}://)([^\s\"'<>]*)", re.IGNORECASE)
SECRET = re.compile(r"\b(hf_|ghp_|sk-|AKIA)[A-Za-z0-9_-]{12,}")  # tokens of the Hub and its neighbours
KEPT = "class_names"  # words of the data set, though one may begin with a slash: /m/01g317


def scrub(value: Any) -> Any:
    """Every path and password of this machine goes, wherever it stands in a tree of plain values."""
    if isinstance(value, dict):
        return {scrub(key): item if key == KEPT else scrub(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [scrub(item) for item in value]
    if not isinstance(value, str):
        return value
    if value.startswith(("/", "~")) and "\n" not in value:
        return Path(value).name
    for known in sorted({str(Path.home()), str(Path.cwd())} - {"/"}, key=len, reverse=True):
        value = value.replace(f"file://{known}/", "").replace(f"{known}/", "")
    value = SECRET.sub(lambda found: f"{found[1]}…", ADDRESS.sub(_without_password, value))
    return DEEP_PATH.sub(_last, LOCAL_PATH.sub(_last, value))


def last_part(place: str) -> str:
    """What is known to be a path or an address: a path, absolute or not, becomes its last part."""
    return scrub(place) if "://" in place else Path(place.replace("\\", "/")).name or place.strip("./~")


def _last(found: re.Match[str]) -> str:
    return re.split(r"[/\\]", found[0].rstrip("/\\"))[-1].strip()


def _without_password(found: re.Match[str]) -> str:
    """scheme://user:password@host/path?key=… → scheme://host/path; what follows an @ in a path stays."""
    scheme, rest = found[1], re.split(r"[?#]", found[2], maxsplit=1)[0]
    user = re.match(r"[^/@]*@|[^/@:]*:(?!\d+(?:/|$))[^@]*@", rest)  # a password with a slash is no port
    if scheme.lower() == "file://":
        return found[0]
    return scheme + (rest[user.end() :] if user else rest)
