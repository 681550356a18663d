"""What the Hub's answers look like: each is checked before the client reads it, and reduced to what is used of it."""

import re
from typing import Any

from alphaflow_cli.documents import Anything, Flag, ListOf, Maybe, Shape, Table, Text, Whole, parse_json
from alphaflow_cli.errors import AlphaflowError

COMMIT = r"[0-9a-f]{40}"
CHECKSUM = r"[0-9a-f]{40}|[0-9a-f]{64}"  # git's sha1 of a small file, sha256 of a large one
FILE = r"(?!/)(?!(?:.*/)?\.{1,2}(?:/|$))[^\x00-\x1f\x7f\ud800-\udfff]+"  # a path that stays inside its folder
NAME = r"[\w.-]{1,96}"
ADDRESS = r"https?://[^\s\x00-\x1f\x7f\ud800-\udfff]+"
REPOSITORY = rf"{ADDRESS}/{NAME}/{NAME}"

OPEN = Anything()  # keys that nobody reads: allowed, and left out
SIZE = Whole(0)
INFO = Table(
    {"id": Text(200, form=rf"(?:{NAME}/)?{NAME}"), "sha": Text(form=COMMIT)},
    {"private": Maybe(Flag()), "siblings": Maybe(ListOf(Table({"rfilename": Text(1000, form=FILE)}, others=OPEN)))},
    OPEN,
)
LARGE = Table({"oid": Text(form=CHECKSUM), "size": SIZE, "pointerSize": SIZE}, others=OPEN)
ENTRY = Table(
    {
        "type": Text(20, one_of=("file", "directory")),
        "path": Text(1000, form=FILE),
        "oid": Text(form=CHECKSUM),
        "size": SIZE,
    },
    {"lfs": Maybe(LARGE), "xetHash": Maybe(Text(form=CHECKSUM))},
    OPEN,
)
ACTION = Table({"href": Text(form=ADDRESS)}, {"header": Maybe(Table(others=Text()))}, OPEN)
LFS_OBJECT = Table(
    {"oid": Text(form=CHECKSUM), "size": SIZE},
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
SHAPES: tuple[tuple[str, str, Shape], ...] = (  # method, end of the path, what is answered; the first that matches
    ("GET", "/api/whoami-v2", Table({"name": Text(form=NAME)}, others=OPEN)),
    ("POST", "/api/repos/create", Table({"url": Text(1000, form=REPOSITORY)}, others=OPEN)),
    ("POST", "/api/validate-yaml", Table(optional={"errors": ISSUES, "warnings": ISSUES}, others=OPEN)),
    ("POST", "/api/models/.+/preupload/.+", Table({"files": ListOf(UPLOAD)}, others=OPEN)),
    ("POST", "/api/models/.+/commit/.+", COMMITTED),
    ("POST", "/info/lfs/objects/batch", Table({"objects": ListOf(LFS_OBJECT)}, {"transfer": Text(100)}, OPEN)),
    ("GET", "/api/(?:models|datasets)/.+/tree/.+", ListOf(ENTRY)),
    ("GET", "/api/(?:models|datasets)/[^/]+(?:/[^/]+)?(?:/revision/.+)?", INFO),
)


def shape_of(method: str, path: str) -> Shape | None:
    """What a request is answered with; None: nothing that is read here."""
    return next((shape for verb, end, shape in SHAPES if verb == method and re.fullmatch(f".*{end}", path)), None)


def read_answer(data: bytes, shape: Shape, *, limit: int) -> Any:
    """The answer's known parts; what is wrong with it is the reason of a ValueError."""
    try:
        value = parse_json(data, "", shape, limit=limit, advice="")
    except AlphaflowError as fault:
        raise ValueError(str(fault).removeprefix(": ").strip().rstrip(".")) from fault
    return known_parts(value, shape)


def known_parts(value: Any, shape: Shape) -> Any:
    """Without the keys that the shape does not name."""
    if isinstance(shape, Maybe):
        return None if value is None else known_parts(value, shape.shape)
    if isinstance(shape, ListOf):
        return [known_parts(item, shape.shape) for item in value]
    if not isinstance(shape, Table):
        return value
    named = {**shape.required, **shape.optional}
    kept = {key: known_parts(item, named[key]) for key, item in value.items() if key in named}
    return kept if isinstance(shape.others, (Anything, type(None))) else {**value, **kept}
