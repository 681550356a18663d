"""How far, how fast, how long still: a bar on a terminal, plain dated lines in a file. Always on stderr."""

import contextlib
import os
import sys
import time
from types import TracebackType
from typing import Any

from tqdm import tqdm

from alphaflow_cli.text import for_terminal

COLUMNS, ROWS = 80, 24  # where a terminal does not say how large it is
LINE_EVERY = 10.0  # seconds between lines where stderr is not a terminal
BAR = "{desc} {percentage:3.0f}%|{bar:10}| {n_fmt}/{total_fmt} {remaining} left{postfix}, {rate_fmt}"  # cut at its end


def say(text: str) -> None:
    """One line of talk: above the bar on a terminal, dated when piped. Work never ends because nobody listens."""
    with contextlib.suppress(OSError, ValueError):  # stderr is a full disk, a pipe without a reader, or closed
        text = for_terminal(text, limit=4000, lines=True)
        if talks_to_terminal():
            tqdm.write(text, file=sys.stderr)
        elif sys.stderr is not None:
            print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}", file=sys.stderr, flush=True)


def talks_to_terminal() -> bool:
    """Whether somebody looks at stderr; there is none at all where it was closed before the start."""
    return sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty()


def has_width() -> bool:
    """Whether the terminal says how wide it is: one without a window (`ssh -tt`, `script`) says 0 columns."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (OSError, ValueError):  # tqdm then has its own way
        return True


class Progress:
    """`with Progress("encode", total, unit="img") as bar: bar.advance(32)`."""

    def __init__(self, label: str, total: int, *, unit: str, done: int = 0, shown: bool = True) -> None:
        """`done` of `total` lie behind us already and do not count for the speed; only the main process shows."""
        self.label, self.total, self.unit, self.done, self.note = label, total, unit, done, ""
        self._start, self._started_at, self._last = done, time.monotonic(), time.monotonic()
        self._shown = -1  # what was done when the last line was written
        self._lines = shown and not talks_to_terminal()
        self._has_notes = False
        self._bar: tqdm[Any] | None = None
        if shown and not self._lines:
            given = {"dynamic_ncols": True} if has_width() else {"ncols": COLUMNS, "nrows": ROWS}
            self._bar = Bar(
                total=total, initial=done, desc=label, unit=f" {unit}", file=sys.stderr, bar_format=BAR, **given
            )  # fmt: skip

    def advance(self, count: int, note: str = "") -> None:
        """Add to what is done; the note stands at the end of the line, and says what is so at this moment.

        A line never shows the note of an earlier moment: where there are notes, it waits a little for the next one.
        """
        self.done += count
        self.note, self._has_notes = note, self._has_notes or bool(note)
        if self._bar is not None:
            if note:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(count)
        elif self._lines and time.monotonic() - self._last >= LINE_EVERY * (2 if self._has_notes and not note else 1):
            self._last = time.monotonic()
            self._say_line()

    def _say_line(self) -> None:
        """Write the line, unless it stands there already: on a slow machine the last picture has one of its own."""
        if self.done != self._shown:
            self._shown = self.done
            say(self.line())

    def line(self) -> str:
        """`encode 3200/50000 img, 412.0 img/s, 1:53 left, 9.8 MB`; where all was done before, there is no speed."""
        seconds = max(time.monotonic() - self._started_at, 1e-9)
        rate = (self.done - self._start) / seconds
        parts = [f"{self.label} {self.done}/{self.total} {self.unit}"]
        parts += [rate_text(rate, self.unit)] if rate > 0 else []
        if rate > 0 and self.done < self.total:
            parts.append(f"{duration((self.total - self.done) / rate)} left")
        return ", ".join([*parts, self.note] if self.note else parts)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._lines and kind is None:
            self._say_line()


class Bar(tqdm):  # type: ignore[type-arg]
    """tqdm's bar; of slow work it says `1.19 s/step`, not `1.19s/ step`."""

    @staticmethod
    def format_meter(*args: Any, **options: Any) -> str:
        return str(tqdm.format_meter(*args, **options)).replace("s/ ", " s/")


def rate_text(rate: float, unit: str) -> str:
    """How fast: `412.0 img/s`, or of slow work `1.19 s/step`."""
    return f"{rate:.1f} {unit}/s" if rate >= 1 else f"{1 / rate:.2f} s/{unit}"


def duration(seconds: float) -> str:
    """`0:09`, `12:40`, `3:07:00`, `2 d 5:00:00`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    clock = f"{hour}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
    return f"{days} d {clock}" if days else clock


def size(count: float) -> str:
    """Bytes for people: `512 B`, `9.8 MB`, `21.0 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
