"""A signal to one process, and all of them stop in the same step."""

import signal
import time
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor

from reco_fast.distributed import world_size

GRACE = 1.0  # seconds in which a second SIGINT is the launcher passing on the first


class Agreement:
    """Whether a flag is set on any rank: the same answer on all ranks in the same step, about the step before.

    The sum travels between the hosts while a step computes, so nobody waits for it and no device is involved.
    """

    def __init__(self) -> None:
        self._group: dist.ProcessGroup | None = None
        if world_size() > 1:
            self._group = dist.new_group(backend="gloo")  # type: ignore[assignment]
        self._under_way: tuple[Tensor, dist.Work] | None = None

    def any(self, *flags: bool) -> list[bool]:
        """Send these flags, and return those that were sent before, each true where some rank's was. One process gets
        its own at once."""
        if self._group is None:
            return list(flags)
        before = self._received() or [False] * len(flags)
        sent = torch.tensor(flags, dtype=torch.int32)
        work = dist.all_reduce(sent, group=self._group, async_op=True)
        assert work is not None
        self._under_way = sent, work
        return before

    def forget(self) -> None:
        """Drop what is under way, on all ranks together: it was about something that has been dealt with."""
        self._received()

    def _received(self) -> list[bool] | None:
        if self._under_way is None:
            return None
        (flags, work), self._under_way = self._under_way, None
        work.wait()
        return (flags > 0).tolist()


class StopRequest:
    """While it is entered, SIGTERM, SIGINT, SIGUSR1 (Slurm's before a time limit) and SIGHUP (of a terminal that is
    closed) only set `signal_name`; a second SIGINT interrupts at once. Of the last two, what is ignored, as SIGHUP is
    under nohup, stays so."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._since = 0.0

    def __enter__(self) -> "StopRequest":
        warnings = [s for s in (signal.SIGUSR1, signal.SIGHUP) if signal.getsignal(s) is not signal.SIG_IGN]
        self._before = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT, *warnings)}
        return self

    def __exit__(self, *raised: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal_name is not None and number == signal.SIGINT and time.monotonic() - self._since > GRACE:
            raise KeyboardInterrupt
        if self.signal_name is None:
            self.signal_name = signal.Signals(number).name
            self._since = time.monotonic()
