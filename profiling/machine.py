"""Benchmarks of one session get ready side by side, and are timed one at a time.

What takes long is to import, to build and to compile; what must be alone on the machine takes seconds. So whoever gets
ready shares a lock on one file, and whoever is timed has it to itself: it waits until all others are ready or done.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    import torch

LOCK = "RECO_FAST_MACHINE"
"""The environment variable in which a session gives a benchmark its share: the number of an open file. Without it
nothing is shared and nobody waits."""

HOLDS = {"oneDNN": "ONEDNN_MAX_CPU_ISA", "MKL": "MKL_ENABLE_INSTRUCTIONS", "ATen": "ATEN_CPU_CAPABILITY"}
"""What holds a library to the instructions of an older CPU."""


class Machine:
    """As one process has it: shared from the start, while it gets ready."""

    def __init__(self, path: Path | None = None) -> None:
        """Of the session whose lock `path` is, or of that which started this process, if one did."""
        inherited = os.environ.get(LOCK)
        self.file = open(path, "a") if path else os.fdopen(int(inherited), "a") if inherited else None  # noqa: SIM115
        self._lock(fcntl.LOCK_SH)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()

    def handed_on(self) -> tuple[dict[str, str], tuple[int, ...]]:
        """Environment and open files with which a process that is started takes over this share, until it ends."""
        if self.file is None:
            return {}, ()
        number = self.file.fileno()
        return {LOCK: str(number)}, (number,)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While nobody else gets ready or is timed. After it, nobody waits for this process."""
        self._lock(fcntl.LOCK_EX)  # gives up the share while it waits
        try:
            yield
        finally:
            self._lock(fcntl.LOCK_UN)

    def _lock(self, how: int) -> None:
        if self.file is not None:
            fcntl.flock(self.file, how)


def device_name(device: "torch.device") -> str:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    held = [f", {library} held to {os.environ[name]}" for library, name in HOLDS.items() if os.environ.get(name)]
    return f"CPU, {torch.get_num_threads()} threads{''.join(held)}"
