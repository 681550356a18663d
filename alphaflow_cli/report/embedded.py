"""Pictures inside a page: as WebP in a data address, small enough together for a page that can be mailed."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from PIL import Image

from alphaflow_cli.data.pictures import open_picture
from alphaflow_cli.errors import blamed_on

BUDGET = 3_000_000  # bytes of all pictures together; base64 makes a third more of them
MOST = 40  # steps on the slider; of more, evenly spread ones and the last
ATTEMPTS = ((1200, 82), (1000, 70), (800, 55), (640, 40))  # (largest width in pixels, quality)


Item = TypeVar("Item")


def embed(paths: Sequence[Path], budget: int = BUDGET) -> list[tuple[str, str]]:
    """(step name, data address) of evenly spread sample grids, in the best quality that the budget allows."""
    chosen = spread_over(paths, MOST)
    for width, quality in ATTEMPTS:
        encoded = [to_webp(path, width, quality) for path in chosen]
        if sum(map(len, encoded)) <= budget:
            break
    else:
        room = budget // max(map(len, encoded), default=1)
        keep = spread_over(range(len(chosen)), max(1, room))
        chosen, encoded = [chosen[i] for i in keep], [encoded[i] for i in keep]
    return [(path.stem, data_address(data)) for path, data in zip(chosen, encoded, strict=True)]


def spread_over(items: Sequence[Item], most: int) -> list[Item]:
    """At most so many, evenly spread, the last one always."""
    if len(items) <= most:
        return list(items)
    first = len(items) - 1
    return [items[first - round(i * first / max(most - 1, 1))] for i in reversed(range(most))]


def to_webp(path: Path, width: int, quality: int) -> bytes:
    """At most so wide."""
    with blamed_on(path, "a PNG picture", Image.DecompressionBombError), open_picture(path) as image:
        picture = image.convert("RGB")
    if picture.width > width:
        picture = picture.resize((width, round(picture.height * width / picture.width)), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    picture.save(out, "WEBP", quality=quality, method=4)
    return out.getvalue()


def data_address(data: bytes) -> str:
    """For an <img src>."""
    return "data:image/webp;base64," + base64.b64encode(data).decode()
