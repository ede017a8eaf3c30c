"""What a run reports: metrics.jsonl, TensorBoard, Weights & Biases, and a progress bar or plain lines."""

import hashlib
import importlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from reco_fast.errors import ConfigError
from reco_fast.pipelines.sources.image_source import ImageSource
from reco_fast.run.diagnostics import Finding, Spread
from reco_fast.run.files import parse_json, read_text, write_text
from reco_fast.settings.terminal import drop_output, say
from reco_fast.settings.typed import one_line

LINE_SECONDS = 10.0  # between two lines of progress where there is no terminal
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


class RunLog:
    """Writes to a run folder, and calls `on_metrics` with each line of metrics.jsonl. Without a folder (on ranks other
    than 0) every call does nothing.

    Use as a context manager: the progress bar needs closing.
    """

    def __init__(
        self,
        directory: Path | None,
        total_steps: int,
        first_step: int,
        on_metrics: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.unheard = False  # nobody reads what is printed any more: the run saves itself and ends
        self._directory = directory
        self._on_metrics = on_metrics
        if directory is None:
            return
        from torch.utils.tensorboard import SummaryWriter  # half a second, which other ranks and commands do without

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

    def __exit__(self, *raised: object) -> None:
        if self._directory is not None:
            if self._progress is not None:
                with self._terminal():
                    self._progress.stop()
            self._tensorboard.close()
            self._file.close()

    def say(self, line: str) -> None:
        """A line for the person who watches; what file names bring along does not reach the terminal."""
        line = one_line(line).encode("utf-8", "backslashreplace").decode()
        if self._directory is not None:
            if self._progress is not None:
                with self._terminal():
                    self._progress.console.print(line, markup=False, highlight=False)
            elif not say(line):
                self.unheard = True

    @contextmanager
    def _terminal(self) -> Iterator[None]:
        """Around what the bar prints: a terminal that was closed stops it, and nothing else."""
        try:
            yield
        except OSError:
            self.unheard = True
            drop_output()

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
        """Add what could not be used, `name TAB reason` a line, to bad_images.txt; nothing where all was good."""
        if self._directory is None or not lines:
            return
        path = self._directory / "bad_images.txt"
        # Raw bytes: file names need not be UTF-8.
        before = path.read_text("utf-8", errors="surrogateescape").splitlines() if path.exists() else []
        listed = sorted(({line.partition("\t")[0]: line for line in (*before, *lines)}).values())
        if listed != before:
            write_text(path, "".join(f"{line}\n" for line in listed))
            name, _, reason = listed[0].partition("\t")
            self.say(
                f"{len(listed)} bad images, named in {path}, e.g. {name}: {reason}; in training other images take "
                "their places, evaluation goes without them"
            )

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
        if self._on_metrics is not None:
            self._on_metrics(values)


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


@contextmanager
def wandb_beside(directory: Path, project: str, settings: dict[str, Any]) -> Iterator[None]:
    """While it is entered, what goes to TensorBoard goes to a run of the Weights & Biases `project` too: to the same
    one when the run folder's run goes on. The mode (WANDB_MODE) and the account are wandb's own matter.

    Raises ConfigError where wandb is not installed or does not start.
    """
    if importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            "--run.wandb: expected the wandb package, it is not installed; pip install 'reco-fast[wandb]'"
        )
    wandb: Any = importlib.import_module("wandb")
    try:
        run = wandb.init(
            project=project,
            name=directory.name,
            id=hashlib.sha256(os.fsencode(directory.resolve())).hexdigest()[:16],
            resume="allow",
            dir=directory,
            config=settings,
            sync_tensorboard=True,
        )
    except wandb.Error as error:
        raise ConfigError(f"--run.wandb: expected a run of {project} to begin, got {error}") from None
    try:
        with run:
            yield
    finally:
        wandb.tensorboard.unpatch()


def warn_of(source: ImageSource) -> None:
    """Print what loaders had to say of images of `source` that they used, a line for each kind of thing."""
    for line in source.notices.lines(source.names).values():
        say(f"warning: {line}")


@contextmanager
def progress(total: int, done: int) -> Iterator[Callable[[int], None]]:
    """A function that is told of more images: a bar on a terminal, else a line now and then."""
    start = last = time.monotonic()
    first = done

    def rate() -> str:
        return f"{(done - first) / max(time.monotonic() - start, 1e-9):.0f} img/s"

    if sys.stdout.isatty():
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
        with Progress(TextColumn("[bold]images"), *columns) as bar:
            task = bar.add_task("embed", total=total, completed=done, rate="")

            def advance(images: int) -> None:
                nonlocal done
                done += images
                bar.update(task, completed=done, rate=rate())

            yield advance
        return

    def line(images: int) -> None:
        nonlocal done, last
        done += images
        if done == total or time.monotonic() - last > LINE_SECONDS:
            last = time.monotonic()
            say(f"{done:,} of {total:,} images  {rate()}")

    yield line
