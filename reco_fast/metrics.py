"""What a run reports: metrics.jsonl, TensorBoard, and a progress bar or plain lines."""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from reco_fast.config import ConfigError
from reco_fast.diagnostics import Finding, Spread
from reco_fast.json_files import parse_json, read_text, write_text
from reco_fast.typed import one_line

# Charts of several lines, in TensorBoard's tab Custom Scalars.
CHARTS = {
    "losses beside chance": {
        "total": ["Multiline", ["train/loss$", "train/chance$"]],
        "instance": ["Multiline", ["train/loss_instance", "train/chance_instance"]],
        "global relation": ["Multiline", ["train/loss_global", "train/chance_global", "train/teacher_entropy$"]],
        "local relation": ["Multiline", ["train/loss_local", "train/chance_local"]],
    },
    "features": {
        "similarity": ["Multiline", ["train/positive_similarity", "train/negative_similarity"]],
        "norm of the mean": ["Multiline", ["train/feature_mean_norm", "train/bank_mean_norm"]],
        "standard deviation × √D": ["Multiline", ["train/feature_std", "train/bank_std"]],
    },
}


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


class RunLog:
    """Writes to a run folder; without one (ranks other than 0) every call does nothing.

    Use as a context manager: the progress bar needs closing.
    """

    def __init__(self, directory: Path | None, *, total_steps: int, first_step: int) -> None:
        self._directory = directory
        if directory is None:
            return
        _drop_lines_after(directory / "metrics.jsonl", first_step)
        self._file = open(directory / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115 - closed in __exit__
        self._tensorboard = SummaryWriter(str(directory / "tensorboard"), purge_step=first_step or None, flush_secs=2)
        self._tensorboard.add_custom_scalars(CHARTS)
        self._progress: Progress | None = None
        if sys.stdout.isatty():
            self._progress = Progress(
                TextColumn("[bold]step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.fields[status]}"),
                TimeRemainingColumn(),
            )
            self._task = self._progress.add_task("train", total=total_steps, completed=first_step, status="")

    def __enter__(self) -> "RunLog":
        if self._directory is not None and self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._directory is not None:
            if self._progress is not None:
                self._progress.stop()
            self._tensorboard.close()
            self._file.close()

    def say(self, line: str) -> None:
        """A line for the person who watches; what file names bring along does not reach the terminal."""
        line = one_line(line).encode("utf-8", "backslashreplace").decode()
        if self._directory is not None:
            if self._progress is not None:
                self._progress.console.print(line, markup=False, highlight=False)
            else:
                print(line, flush=True)

    def advance(self, step: int) -> None:
        if self._directory is not None and self._progress is not None:
            self._progress.update(self._task, completed=step)

    def train(self, values: dict[str, Any], findings: Sequence[Finding] = ()) -> None:
        """One line of `kind` train; `values` starts with step and epoch."""
        if self._directory is None:
            return
        self._write({"kind": "train", **values, **self._warn(findings)})
        for name, value in values.items():
            if name not in ("step", "epoch"):
                self._tensorboard.add_scalar(f"train/{name}", value, values["step"])
        status = (
            f"loss {values['loss']:.3f} (chance {values['chance']:.3f})  "
            f"mean norm {values['feature_mean_norm']:.2f}  rank {values['bank_rank']:.1f}  "
            f"{values['images_per_second']:.0f} img/s  data wait {100 * values['data_wait_fraction']:.0f} %"
        )
        if self._progress is not None:
            self._progress.update(self._task, completed=values["step"], status=status)
        else:
            self.say(f"step {values['step']}  epoch {values['epoch']:.2f}  {status}  lr {values['lr']:.4f}")

    def evaluation(
        self,
        step: int,
        epoch: float,
        seconds: float,
        knn_top1: float | None,
        backbone: Spread,
        findings: Sequence[Finding] = (),
    ) -> None:
        """One line of `kind` eval: after so many `seconds` of training, kNN where there are labels, and how the
        backbone's features fill their space."""
        if self._directory is None:
            return
        values = {f"backbone_{name}": value for name, value in backbone._asdict().items()}
        line = {"kind": "eval", "step": step, "epoch": epoch, "seconds": seconds, "knn_top1": knn_top1}
        self._write({**line, **values, **self._warn(findings)})
        for name, value in values.items():
            self._tensorboard.add_scalar(f"eval/{name}", value, step)
        knn = ""
        if knn_top1 is not None:
            self._tensorboard.add_scalar("eval/knn_top1", knn_top1, step)
            knn = f"kNN top-1 {knn_top1:.1f} %, "
        self.say(f"epoch {epoch:g}: {knn}effective rank of the features {backbone.rank:.1f}")

    def end(self, values: dict[str, Any]) -> None:
        if self._directory is not None:
            self._write({"kind": "end", **values})

    def bad_images(self, lines: list[str]) -> None:
        """Add what could not be decoded, `name TAB reason` a line, to bad_images.txt; nothing where all was good."""
        if self._directory is None or not lines:
            return
        path = self._directory / "bad_images.txt"
        # Raw bytes: file names need not be UTF-8.
        before = path.read_text("utf-8", errors="surrogateescape").splitlines() if path.exists() else []
        listed = sorted(({line.partition("\t")[0]: line for line in (*before, *lines)}).values())
        if listed != before:
            write_text(path, "".join(f"{line}\n" for line in listed))
            self.say(f"{len(listed)} images could not be decoded and were replaced: {path}")

    def views(self, grid: Tensor) -> None:
        """A picture [3, H, W] in 0..1 of augmented views."""
        if self._directory is not None:
            self._tensorboard.add_image("augmented views", grid, 0)

    def _warn(self, findings: Sequence[Finding]) -> dict[str, list[str]]:
        """Say what is new, and return the field of the line in metrics.jsonl: the causes that hold, if any."""
        for finding in findings:
            if finding.new:
                self.say(f"warning: {finding.line}")
        return {"warnings": [finding.cause for finding in findings]} if findings else {}

    def _write(self, values: dict[str, Any]) -> None:
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()


def _drop_lines_after(path: Path, step: int) -> None:
    """Forget what was logged after the checkpoint from which the run goes on; it will be logged again."""
    if not path.exists():
        return
    kept = []
    for line in read_text(path).splitlines():
        try:
            values = parse_json(line, path)
        except ConfigError:  # the line that a kill cut short
            continue
        logged = values.get("step") if isinstance(values, dict) else None
        if isinstance(logged, int) and logged <= step and step > 0:
            kept.append(line + "\n")
    write_text(path, "".join(kept))
