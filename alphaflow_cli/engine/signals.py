"""Ctrl-C and SIGTERM: finish the step, save, leave. A second one, a second later, leaves at once.

Sooner it is an echo: a terminal, a launcher and a job system each pass on the same Ctrl-C.
"""

import signal
import time
from types import FrameType, TracebackType

ECHO_SECONDS = 1.0


class StopFlag:
    """`with StopFlag() as stop:` … `stop.is_set`, `stop.signal`."""

    def __init__(self) -> None:
        self.signal = 0
        self._since = 0.0
        self._before: dict[int, object] = {}

    @property
    def is_set(self) -> bool:
        return self.signal != 0

    def __enter__(self) -> "StopFlag":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.is_set and time.monotonic() - self._since > ECHO_SECONDS:
            raise SystemExit(128 + number)
        if not self.is_set:
            self.signal, self._since = number, time.monotonic()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
