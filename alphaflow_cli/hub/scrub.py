"""Nothing of this machine leaves: paths become their last part, wherever they stand."""

import re
from pathlib import Path
from typing import Any

# Not inside a word, an address (https://a/b) or a tag; C:\x, D:/x, \\server\share\x, file:///x, ~/x, //x and /x.
LOCAL_PATH = re.compile(
    r"(?<![\w/.<>\\])(?:file://+|~|[A-Za-z]:[\\/](?!/)|\\\\(?=\w)|(?<!:)//+(?=[\w.])|/(?=[\w.]))[^\s\"',;:()]*"
)
KEPT = "class_names"  # words of the data set, though one may begin with a slash: /m/01g317


def scrub(value: Any) -> Any:
    """Every path of this machine becomes its last part, wherever it stands in a tree of plain values."""
    if isinstance(value, dict):
        return {scrub(key): item if key == KEPT else scrub(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [scrub(item) for item in value]
    if not isinstance(value, str):
        return value
    if value.startswith(("/", "~")):
        return Path(value).name
    for known in sorted({str(Path.home()), str(Path.cwd())} - {"/"}, key=len, reverse=True):
        value = value.replace(f"file://{known}/", "").replace(f"{known}/", "")
    return LOCAL_PATH.sub(lambda found: re.split(r"[/\\]", found[0].rstrip("/\\"))[-1], value)
