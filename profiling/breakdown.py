"""What a trace says about a step: where its time goes, and what bounds it."""

import bisect
import gzip
import itertools
import json
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from reco_fast.errors import ConfigError
from reco_fast.profiling.trace import REGIONS

Event = dict[str, Any]
Interval = tuple[float, float]
Place = tuple[int, str] | None
DEVICE_CATEGORIES = {"kernel", "gpu_memcpy", "gpu_memset"}
LAUNCH_CATEGORIES = {"cuda_runtime", "cuda_driver"}  # Triton's kernels are launched by the driver's function
WAIT, OTHER, IDLE = "data_wait", "other", "no kernel running"
COMMUNICATION = re.compile(r"nccl|gloo|c10d::|all_?gather|all_?reduce", re.IGNORECASE)
# What runs in matrix units: convolutions, matrix products, attention, and the loss kernel. Of the kernels that inductor
# writes these are its templates alone: the others carry the names of all operators around which they were fused.
MATRIX = re.compile(
    r"^(?!triton_(?!tem_)).*(?:conv(?!ert)|[dw]grad|scudnn|gemm|xmma|nvjet|cutlass|::(?:b?add)?b?mm"
    r"|triton_tem_|sdpa|flash|fmha|attention|attend|relation)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Breakdown:
    """Medians over the recorded steps, in milliseconds; shares are of the step.

    A phase is, on a CPU, the time in its range; on a GPU that in which a kernel ran which the host launched in its
    range, but `data_wait` is the host's there, too. `other_ms` is outside all ranges: logging, an evaluation or a
    checkpoint, the host between the ranges; on a GPU the other kernels, among them the loader's.
    `busy` is the share in which operators (on a GPU: kernels) ran; `matrix` the share of the time of operators that is
    convolutions and matrix products; `exposed_communication` that in which nothing but communication ran.
    """

    device: str
    steps: int
    step_ms: float
    phases_ms: dict[str, float]
    other_ms: float
    busy: float
    matrix: float
    exposed_communication: float
    operators_per_step: float

    @property
    def rows_ms(self) -> dict[str, float]:
        """What the step is made of. On a GPU all but `data_wait` add up to it, and to more where streams overlap."""
        idle = {IDLE: (1 - self.busy) * self.step_ms} if self.device == "GPU" else {}
        return {**self.phases_ms, OTHER: self.other_ms, **idle}

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


class _Work(NamedTuple):
    """The steps by the device's clock, what ran, and where it belongs."""

    device: str
    windows: list[Interval]
    operators: list[Event]
    self_times: list[tuple[Event, float]]
    phases_ms: dict[str, float]
    other_ms: float
    launched: int


def _breakdown(events: Sequence[Event]) -> Breakdown:
    """Raises ValueError without a recorded step."""
    timed = [event for event in events if event.get("ph") == "X"]
    steps = _host_steps(timed)
    if not steps:
        raise ValueError("no recorded training steps")
    kernels = [event for event in timed if event.get("cat") in DEVICE_CATEGORIES]
    work = _on_gpu(timed, steps, kernels) if kernels else _on_cpu(timed, steps)
    total = sum(end - start for start, end in work.windows)
    compute = [event for event in work.operators if not COMMUNICATION.search(event["name"])]
    busy, busy_compute = (_covered(map(_interval, group), work.windows) for group in (work.operators, compute))
    times = [(event["name"], time) for event, time in work.self_times if not COMMUNICATION.search(event["name"])]
    compute_us = sum(time for _, time in times)
    return Breakdown(
        device=work.device,
        steps=len(steps),
        step_ms=statistics.median(end - start for start, end in work.windows) / 1e3,
        phases_ms=work.phases_ms,
        other_ms=work.other_ms,
        busy=busy / total,
        matrix=sum(time for name, time in times if MATRIX.search(name)) / compute_us if compute_us else 0.0,
        exposed_communication=(busy - busy_compute) / total,
        operators_per_step=work.launched / len(steps),
    )


def _on_cpu(timed: Sequence[Event], steps: list[Interval]) -> _Work:
    operators = [event for event in timed if event.get("cat") == "cpu_op"]
    phases = {name: _host_ms(name, timed, steps) for name in REGIONS}
    step_ms = statistics.median(end - start for start, end in steps) / 1e3
    other = max(0.0, step_ms - sum(phases.values()))
    return _Work("CPU", steps, operators, _self_times(operators), phases, other, len(operators))


def _on_gpu(timed: Sequence[Event], steps: list[Interval], kernels: list[Event]) -> _Work:
    """Each kernel belongs to the range in which the host launched it. Kineto's own ranges of a GPU leave out what
    autograd's thread launches, which is all of a backward pass."""
    places = _places(timed, steps, kernels)
    in_phases: dict[str, list[list[Interval]]] = {name: [[] for _ in steps] for name in REGIONS}
    rest = []
    for kernel, place in zip(kernels, places, strict=True):
        if place is not None and place[1] != OTHER:
            in_phases[place[1]][place[0]].append(_interval(kernel))
        else:
            rest.append(_interval(kernel))
    windows = _gpu_steps(steps, kernels, places)
    always = [(float("-inf"), float("inf"))]
    phases = {
        name: statistics.median(_covered(intervals, always) for intervals in by_step) / 1e3
        for name, by_step in in_phases.items()
    }
    phases[WAIT] = _host_ms(WAIT, timed, steps)
    other = statistics.median(_covered(rest, [window]) for window in windows) / 1e3
    # Kernels do not enclose one another, but one may begin before the last has ended.
    own_times = [(kernel, float(kernel["dur"])) for kernel in kernels]
    return _Work("GPU", windows, kernels, own_times, phases, other, sum(place is not None for place in places))


def _places(timed: Sequence[Event], steps: list[Interval], kernels: Sequence[Event]) -> list[Place]:
    """The step and the range during which the host launched each kernel; None if that was not in a recorded step, or
    by a thread without operators of PyTorch (DALI's), which has nothing to do with what the others are at."""
    threads = {event.get("tid") for event in timed if event.get("cat") == "cpu_op"}
    launches = {
        event["args"]["correlation"]: float(event["ts"])
        for event in timed
        if event.get("cat") in LAUNCH_CATEGORIES
        and event.get("tid") in threads
        and "correlation" in event.get("args", {})
    }
    ranges = sorted(
        (_interval(event), event["name"])
        for event in timed
        if event.get("cat") == "user_annotation" and event["name"] in REGIONS and event["name"] != WAIT
    )
    intervals = [interval for interval, _ in ranges]
    places: list[Place] = []
    for kernel in kernels:
        at = launches.get(kernel.get("args", {}).get("correlation"))
        step = None if at is None else _holding(steps, at)
        if at is None or step is None:
            places.append(None)
        else:
            within = _holding(intervals, at)
            places.append((step, OTHER if within is None else ranges[within][1]))
    return places


def _holding(intervals: list[Interval], time: float) -> int | None:
    """Which of the sorted `intervals`, none inside another, holds `time`."""
    index = bisect.bisect_right(intervals, (time, float("inf"))) - 1
    return index if index >= 0 and time < intervals[index][1] else None


def _gpu_steps(steps: list[Interval], kernels: Sequence[Event], places: Sequence[Place]) -> list[Interval]:
    """From a step's first kernel of a phase to the next step's: the host may be ahead of the GPU by several steps, so
    that its own clock does not say how long they take, and the loader's copies come even earlier.

    What would follow the last step was not recorded, so it has no end: it is left out unless it is the only one.
    Raises ValueError where no kernel was launched in a step.
    """
    placed = [(place, _interval(kernel)) for kernel, place in zip(kernels, places, strict=True) if place is not None]
    if not placed:
        raise ValueError("no kernel was launched in a recorded step")
    first: dict[int, float] = {}
    for (step, _), (start, _) in [item for item in placed if item[0][1] != OTHER] or placed:
        first[step] = min(start, first.get(step, start))
    starts = sorted(first.values())
    last = max(steps[-1][1], *(end for _, (_, end) in placed))
    return list(itertools.pairwise(starts)) or [(starts[0], last)]


def _interval(event: Event) -> Interval:
    return float(event["ts"]), float(event["ts"]) + float(event["dur"])


def _host_steps(timed: Iterable[Event]) -> list[Interval]:
    """The recorded steps by the host's clock, each up to the start of the next."""
    ordered = sorted(
        _interval(event)
        for event in timed
        if event.get("cat") == "user_annotation" and event["name"].startswith("ProfilerStep#")
    )
    return [(start, following[0]) for (start, _), following in itertools.pairwise(ordered)] + ordered[-1:]


def _host_ms(name: str, timed: Iterable[Event], steps: Sequence[Interval]) -> float:
    """The host's time of a step in one named range."""
    ranges = [event for event in timed if event.get("name") == name and event.get("cat") == "user_annotation"]
    within = [sum(event["dur"] for event in ranges if start <= float(event["ts"]) < end) for start, end in steps]
    return float(statistics.median(within)) / 1e3


def _self_times(events: Iterable[Event]) -> list[tuple[Event, float]]:
    """Each event with its time less that of the events which it encloses on its thread."""
    threads: dict[object, list[Event]] = {}
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
