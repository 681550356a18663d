"""Ctrl-C and SIGTERM: finish the step, save, leave. A second one leaves at once."""

import signal
from types import FrameType, TracebackType


class StopFlag:
    """`with StopFlag() as stop:` … `stop.is_set`, `stop.signal`."""

    def __init__(self) -> None:
        self.signal = 0
        self._before: dict[int, object] = {}

    @property
    def is_set(self) -> bool:
        return self.signal != 0

    def __enter__(self) -> "StopFlag":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.is_set:
            raise SystemExit(128 + number)
        self.signal = number

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
