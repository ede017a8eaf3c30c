"""Profiler hooks: a context manager around the loop and named ranges inside the step."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch.profiler import (
    ProfilerAction,
    ProfilerActivity,
    profile,
    record_function,
    schedule,
    tensorboard_trace_handler,
)

REGIONS = (
    "data_wait",
    "teacher_forward",
    "student_forward",
    "loss",
    "backward",
    "optimizer",
    "moving_average",
    "enqueue",
)
"""The named ranges of a step, in the order in which they happen."""

region = record_function

RECORDING = (ProfilerAction.RECORD, ProfilerAction.RECORD_AND_SAVE)


class Hook(Protocol):
    def step(self) -> None:
        """One training step has ended."""

    def finish(self) -> None:
        """What follows is no step: end the recording if it has begun. An evaluation would fill the memory."""


class _NoHook:
    def step(self) -> None:
        pass

    def finish(self) -> None:
        pass


class _Recorder:
    def __init__(self, profiler: profile, remember_allocations: Callable[[], None]) -> None:
        self._profiler: profile | None = profiler
        self._remember_allocations = remember_allocations
        self._recording = False
        profiler.start()
        self._begin()

    def step(self) -> None:
        if self._profiler is not None:
            self._profiler.step()
            self._begin()

    def _begin(self) -> None:
        """With the first recorded step, what takes time at each allocation: the steps before it are left alone."""
        if not self._recording and self._profiler is not None and self._profiler.current_action in RECORDING:
            self._recording = True
            self._remember_allocations()

    def finish(self) -> None:
        if self._profiler is not None and self._profiler.current_action in RECORDING:
            self.close()

    def close(self) -> None:
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None


@contextmanager
def trace(directory: Path | None, *, wait: int, warmup: int, active: int) -> Iterator[Hook]:
    """Record `active` steps after `wait` and `warmup` others, as a TensorBoard trace in `directory`.

    The trace holds allocations too (the Memory view). With CUDA there is also `memory_PID.pickle` of the recorded
    steps, a timeline of every allocation for https://docs.pytorch.org/memory_viz.
    With `directory` None nothing is set up and nothing is recorded.
    """
    if directory is None:
        yield _NoHook()
        return
    # Kineto reports its own start and stop, and on a machine without a GPU an "ERROR" that is none.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU] + cuda * [ProfilerActivity.CUDA]
    write_trace = tensorboard_trace_handler(str(directory), use_gzip=True)

    def write(profiler: profile) -> None:
        write_trace(profiler)
        if cuda:
            torch.cuda.memory._dump_snapshot(str(directory / f"memory_{os.getpid()}.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)

    def remember_allocations() -> None:
        if cuda:  # C++ stacks would take 10 to 40 µs at each
            torch.cuda.memory._record_memory_history(stacks="python", max_entries=100_000)

    recorder = _Recorder(
        profile(
            activities=activities,
            schedule=schedule(wait=wait, warmup=warmup, active=active, repeat=1),
            on_trace_ready=write,
            profile_memory=True,
            record_shapes=True,
        ),
        remember_allocations,
    )
    try:
        yield recorder
    finally:
        recorder.close()
