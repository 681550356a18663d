"""The one error a user may cause: a recipe, file, checkpoint or run at fault."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DAMAGE = (OSError, ValueError, LookupError, TypeError, AttributeError, SyntaxError)  # what readers raise on such data


class AlphaflowError(Exception):
    """Says what is wrong, where, and what to do. The command line prints it as `error: …` and exits 1."""


@contextmanager
def blamed_on(path: Path, what: str, *more: type[Exception]) -> Iterator[None]:
    """Whatever fails while a file is read and taken apart is one line that names the file. For reading only."""
    kinds: tuple[type[Exception], ...] = (*DAMAGE, *more)
    try:
        yield
    except kinds as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error).partition("\n")[0]
        raise AlphaflowError(f"{path}: not {what}, or damaged ({reason}). Move it away, or make it again.") from error
