"""Profiler hooks: a context manager around the loop and named ranges inside the step."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule, tensorboard_trace_handler

region = record_function


class Hook(Protocol):
    def step(self) -> None:
        """One training step has ended."""


class _NoHook:
    def step(self) -> None:
        pass


@contextmanager
def trace(directory: Path | None, *, wait: int, warmup: int, active: int) -> Iterator[Hook]:
    """Record `active` steps after `wait` and `warmup` others, as a TensorBoard trace in `directory`.

    With `directory` None nothing is set up and nothing is recorded.
    """
    if directory is None:
        yield _NoHook()
        return
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(
        activities=activities,
        schedule=schedule(wait=wait, warmup=warmup, active=active, repeat=1),
        on_trace_ready=tensorboard_trace_handler(str(directory)),
        profile_memory=True,
        record_shapes=True,
    ) as profiler:
        yield profiler
