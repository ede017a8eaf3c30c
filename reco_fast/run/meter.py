"""How fast a run goes: images a second, step times, and what the device waits for data."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

AHEAD = 2  # steps


class Meter:
    """Images a second, step times and the share of the time spent waiting for data, between two readings.

    `images` and `seconds` are the sums over all readings. A step's time is what passes on the host from the end of one
    step to the end of the next; a GPU works behind it, so single steps are exact on a CPU only. Waiting for data is by
    the clock of the device: what a GPU waits from the end of a step until the next batch is there.
    """

    def __init__(self, device: torch.device) -> None:
        self.images = 0
        self.seconds = 0.0
        self._on_gpu = device.type == "cuda"
        self._ends: list[torch.cuda.Event] = []  # of steps on the GPU, and when the next batch was there
        self._batches: list[torch.cuda.Event] = []
        self.restart()

    def restart(self) -> None:
        """Forget the time since the last reading: an evaluation or a checkpoint is not training."""
        self._start = time.perf_counter()
        self._new_images = 0
        self._waited = 0.0
        self._step_ends = [self._start]
        self._ends, self._batches = [], []

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """For data. A host that is more than `AHEAD` steps before a GPU waits for that first."""
        if len(self._ends) > AHEAD:
            self._ends[-1 - AHEAD].synchronize()
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start
        if self._ends:
            self._batches.append(_event())

    def add(self, images: int) -> None:
        self._new_images += images
        self._step_ends.append(time.perf_counter())
        if self._on_gpu:
            self._ends.append(_event())

    def step_times(self) -> dict[str, float]:
        """Median and 95th percentile of the steps since the last reading, in milliseconds. At least one is needed."""
        p50, p95 = np.percentile(np.diff(self._step_ends), (50, 95)) * 1e3
        return {"step_ms_p50": float(p50), "step_ms_p95": float(p95)}

    def read(self) -> tuple[float, float]:
        """Images/s and data-wait share since the last reading, and start anew."""
        if self._on_gpu:
            self._waited = self._gpu_waited()
        seconds = time.perf_counter() - self._start
        images, waited = self._new_images, self._waited
        self.images += images
        self.seconds += seconds
        self.restart()
        return images / seconds, waited / seconds

    def _gpu_waited(self) -> float:
        """Seconds until the end of the last step, for which the host waits."""
        if self._ends:
            self._ends[-1].synchronize()
        return sum(end.elapsed_time(batch) for end, batch in zip(self._ends, self._batches, strict=False)) / 1e3


def _event() -> torch.cuda.Event:
    """On the stream that trains, now."""
    event = torch.cuda.Event(enable_timing=True, blocking=True)
    event.record()
    return event
