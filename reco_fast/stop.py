"""Stop when asked, at the end of a step: for preemptible machines, Slurm's --signal and Ctrl-C."""

import signal
import time
from types import FrameType, TracebackType

GRACE = 1.0  # seconds in which a second SIGINT is the launcher passing on the first


class StopRequest:
    """While it is entered, SIGTERM and SIGINT only set `signal_name`; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._since = 0.0

    def __enter__(self) -> "StopRequest":
        self._before = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal_name is not None and number == signal.SIGINT and time.monotonic() - self._since > GRACE:
            raise KeyboardInterrupt
        if self.signal_name is None:
            self.signal_name = signal.Signals(number).name
            self._since = time.monotonic()
