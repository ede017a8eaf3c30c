"""What a trace says about a step: where its time goes, and what bounds it."""

import gzip
import itertools
import json
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reco_fast.config import ConfigError
from reco_fast.profiling.trace import REGIONS

__all__ = ["Breakdown", "newest_trace", "read_trace"]

Interval = tuple[float, float]
DEVICE_CATEGORIES = {"kernel", "gpu_memcpy", "gpu_memset"}
COMMUNICATION = re.compile(r"nccl|gloo|c10d::|all_?gather|all_?reduce", re.IGNORECASE)
# What runs in matrix units: convolutions, matrix products, attention, and the loss kernel.
MATRIX = re.compile(r"conv|gemm|::(?:b?add)?b?mm|cutlass|xmma|wgmma|attention|flash|relation", re.IGNORECASE)


@dataclass(frozen=True)
class Breakdown:
    """Medians over the recorded steps, in milliseconds; shares are of the step.

    `busy` is the share in which operators (on a GPU: kernels) ran; `matrix` the share of the time of operators that is
    convolutions and matrix products; `exposed_communication` that in which nothing but communication ran.
    """

    device: str
    steps: int
    step_ms: float
    phases_ms: dict[str, float]
    busy: float
    matrix: float
    exposed_communication: float
    operators_per_step: float

    @property
    def other_ms(self) -> float:
        """Outside all named ranges: logging, an evaluation or a checkpoint, the host between the ranges."""
        return max(0.0, self.step_ms - sum(self.phases_ms.values()))

    def share(self, phase: str) -> float:
        return self.phases_ms[phase] / self.step_ms


def newest_trace(run: Path) -> Path:
    """The last trace of a run. Raises ConfigError where there is none."""
    if not run.is_dir():
        raise ConfigError(f"{run}: expected the folder of a run, got nothing there")
    traces = [path for suffix in ("json", "json.gz") for path in (run / "tensorboard").glob(f"*.pt.trace.{suffix}")]
    if not traces:
        raise ConfigError(
            f"{run}: expected a run with a trace, got none; train with --profile.enabled for more than "
            "--profile.wait + --profile.warmup steps"
        )
    return max(traces, key=lambda path: path.stat().st_mtime_ns)


def read_trace(path: Path) -> Breakdown:
    """Raises ConfigError where the file holds no recorded training step."""
    try:
        content = path.read_bytes()
        return _breakdown(json.loads(gzip.decompress(content) if path.suffix == ".gz" else content)["traceEvents"])
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: expected a trace of torch.profiler, got {type(error).__name__}: {error}") from None


def _breakdown(events: Sequence[dict[str, Any]]) -> Breakdown:
    """Raises ValueError without a recorded step."""
    timed = [event for event in events if event.get("ph") == "X"]
    host_windows = _windows(timed, "user_annotation")
    if not host_windows:
        raise ValueError("no recorded training steps")
    # The host may run ahead of a GPU by several steps, so that its own clock says how long the steps take.
    windows = _windows(timed, "gpu_user_annotation") or host_windows
    kernels = [event for event in timed if event.get("cat") in DEVICE_CATEGORIES]
    operators = kernels or [event for event in timed if event.get("cat") == "cpu_op"]
    step_ms = statistics.median(end - start for start, end in windows) / 1e3
    total = sum(end - start for start, end in windows)
    compute = [event for event in operators if not COMMUNICATION.search(event["name"])]
    communication = [event for event in operators if COMMUNICATION.search(event["name"])]
    busy, busy_compute = (_covered(map(_interval, group), windows) for group in (operators, compute))
    work = [(event["name"], time) for event, time in _self_times(compute)]
    matrix_us = sum(time for name, time in work if MATRIX.search(name))
    work_us = sum(time for _, time in work)
    return Breakdown(
        device="GPU" if kernels else "CPU",
        steps=len(windows),
        step_ms=step_ms,
        phases_ms={name: _phase_ms(name, timed, host_windows) for name in REGIONS},
        busy=busy / total,
        matrix=matrix_us / work_us if work_us else 0.0,
        exposed_communication=(busy - busy_compute) / total if communication else 0.0,
        operators_per_step=len(operators) / len(windows),
    )


def _interval(event: dict[str, Any]) -> Interval:
    return float(event["ts"]), float(event["ts"]) + float(event["dur"])


def _windows(timed: Iterable[dict[str, Any]], category: str) -> list[Interval]:
    """The recorded steps by one clock, each up to the start of the next."""
    steps: dict[str, Interval] = {}
    for event in timed:
        if event.get("cat") == category and event["name"].startswith("ProfilerStep#"):
            start, end = _interval(event)
            low, high = steps.get(event["name"], (start, end))  # a GPU has one for each stream
            steps[event["name"]] = min(low, start), max(high, end)
    ordered = sorted(steps.values())
    return [(start, following[0]) for (start, _), following in itertools.pairwise(ordered)] + ordered[-1:]


def _phase_ms(name: str, timed: Iterable[dict[str, Any]], host_windows: Sequence[Interval]) -> float:
    """Time of a step in one named range: by the GPU's clock where it has the range, since the host only launches, and
    else the median over the steps of the host's."""
    ranges = [event for event in timed if event.get("name") == name]
    device = [event for event in ranges if event.get("cat") == "gpu_user_annotation"]
    host = [event for event in ranges if event.get("cat") == "user_annotation"]
    if device:
        return float(sum(event["dur"] for event in device)) / len(host_windows) / 1e3
    within = [sum(event["dur"] for event in host if start <= float(event["ts"]) < end) for start, end in host_windows]
    return float(statistics.median(within)) / 1e3


def _self_times(events: Iterable[dict[str, Any]]) -> list[tuple[dict[str, Any], float]]:
    """Each event with its time less that of the events which it encloses on its thread."""
    threads: dict[object, list[dict[str, Any]]] = {}
    for event in events:
        threads.setdefault((event.get("pid"), event.get("tid")), []).append(event)
    times = []
    for thread in threads.values():
        thread.sort(key=lambda event: (float(event["ts"]), -float(event["dur"])))
        own = [float(event["dur"]) for event in thread]
        enclosing: list[int] = []
        for index, event in enumerate(thread):
            while enclosing and _interval(thread[enclosing[-1]])[1] <= float(event["ts"]):
                enclosing.pop()
            if enclosing:
                own[enclosing[-1]] -= own[index]
            enclosing.append(index)
        times += list(zip(thread, own, strict=True))
    return times


def _covered(intervals: Iterable[Interval], windows: Sequence[Interval]) -> float:
    """Length of the union of `intervals` within `windows`, which do not overlap."""
    length = 0.0
    ordered = sorted(intervals)
    for start, end in windows:
        reached = start
        for low, high in ordered:
            low, high = max(low, reached), min(high, end)
            if high > low:
                length += high - low
                reached = high
    return length
