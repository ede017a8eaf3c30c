"""What stays the same throughout a run, what it has measured so far, and what its log lines say of it."""

import dataclasses
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from torch import Tensor

from reco_fast import distributed
from reco_fast.data.images import LabelledData
from reco_fast.errors import ConfigError
from reco_fast.method.phases import Phase, phases
from reco_fast.method.state import TrainState
from reco_fast.method.step import METRICS, scheduled
from reco_fast.pipelines.sources.image_source import ImageSource
from reco_fast.run import checkpoint
from reco_fast.run.diagnostics import SETTLED_STEPS, SPREAD_ROWS, Finding, Watch, chance_levels, spread
from reco_fast.run.meter import Meter
from reco_fast.settings.config import Config
from reco_fast.settings.typed import as_dataclass

MANY_SKIPPED = 20  # steps in a row without a finite gradient, after which a run gives up


@dataclass(frozen=True)
class Run:
    """What stays the same throughout a run."""

    config: Config
    source: ImageSource
    labelled: LabelledData | None
    folder: Path
    epoch_steps: float

    @property
    def sources(self) -> list[ImageSource]:
        """Of training and evaluation, each once."""
        apart = [] if self.labelled is None else [self.labelled.train, self.labelled.val]
        return [self.source, *(source for source in apart if source is not self.source)]

    @property
    def total_steps(self) -> int:
        """Of the schedule."""
        return max(1, round(self.config.train.epochs * self.epoch_steps))

    @property
    def stop_at(self) -> int:
        return min(self.total_steps, self.config.train.max_steps or self.total_steps)

    @cached_property
    def phases(self) -> list[Phase]:
        return phases(self.config, self.total_steps)

    def phase(self, step: int) -> Phase:
        """That the step with this number, from 0, is in."""
        return [phase for phase in self.phases if phase.first_step <= step][-1]

    def settled(self, step: int) -> bool:
        """Whether embeddings should have come apart: past the first epoch (or many steps) and the warm-up."""
        warmup = self.config.optim.warmup_epochs * self.epoch_steps
        return step > max(warmup, min(self.epoch_steps, SETTLED_STEPS))

    def epoch(self, step: int) -> float:
        return step / self.epoch_steps

    def saves_at(self, step: int) -> bool:
        """Whether a checkpoint is due by the number of the step."""
        every = self.config.run.checkpoint_steps
        return every is not None and step % every == 0

    def due(self, step: int, every_epochs: float) -> bool:
        """Whether a multiple of `every_epochs` was passed with this step."""
        return int(self.epoch(step) / every_epochs) > int(self.epoch(step - 1) / every_epochs)


@dataclass
class Progress:
    """What a run has measured so far; kept in its checkpoints."""

    fingerprint: str | None = None
    """Of the training images."""
    validation: str | None = None
    """Fingerprint of the images that kNN figures are of."""
    knn_top1_initial: float | None = None
    knn_top1: float | None = None
    images: int = 0
    seconds: float = 0.0
    sums: list[float] = field(default_factory=lambda: [0.0] * len(METRICS))
    summed_steps: int = 0
    skipped_in_a_row: int = 0
    watch: Watch = field(default_factory=Watch)

    def __post_init__(self) -> None:
        if min(self.images, self.seconds, self.summed_steps, self.skipped_in_a_row) < 0:
            raise ValueError("expected counts from 0 up, got a negative one")
        if any(len(pair) != 2 for pair in self.watch.evaluations):
            raise ValueError("expected evaluations as pairs, got another list")

    @classmethod
    def restore(cls, path: Path, state: TrainState) -> "Progress":
        """Load a checkpoint into `state`. One of an earlier version may lack the watch and measure something else.

        Raises ConfigError.
        """
        values = checkpoint.load(path, state)
        try:
            progress = as_dataclass(cls, dataclasses.asdict(cls()) | values)
        except ValueError as error:
            raise ConfigError(f"{path}: {error} in its progress") from None
        if len(progress.sums) != len(METRICS):
            progress.sums, progress.summed_steps = [0.0] * len(METRICS), 0
        return progress

    def see_validation(self, labelled: LabelledData | None) -> list[str]:
        """Forget the kNN figures of other validation images than these: they say nothing about one another. Returns
        lines to show."""
        before, self.validation = self.validation, None
        if labelled is not None:
            self.validation = labelled.val.fingerprint()
        known = before is not None and self.knn_top1_initial is not None
        if not known or before == self.validation:
            return []
        self.knn_top1_initial = self.knn_top1 = None
        self.watch.evaluations, self.watch.best = [], 0.0
        return ["other validation images than before: kNN figures begin anew, and knn_top1_initial is null"]

    def add(self, meter: Meter) -> None:
        """Take over what the meter has counted up to now."""
        meter.read()
        self.images, self.seconds = self.images + meter.images, self.seconds + meter.seconds
        meter.images, meter.seconds = 0, 0.0


def reading(
    run: Run,
    state: TrainState,
    progress: Progress,
    sums: Tensor,
    meter: Meter,
    lr: float,
    utilisation: float | None,
) -> tuple[dict[str, float], list[Finding]]:
    """What the steps since the last reading were like, as `RunLog.train` takes it, and what is wrong by it.

    All of them were in one phase. `utilisation`: of the device's peak rate, for each image a second; None where nobody
    asked.
    """
    steps = progress.summed_steps
    values = averages(sums, progress)
    config = run.phase(state.step - 1).config
    values |= _context(run, config, state, values, steps)
    findings = progress.watch.reading(values, config, settled=run.settled(state.step))
    times = meter.step_times()
    rate, waited = meter.read()
    speed = {"lr": lr, "images_per_second": rate, "data_wait_fraction": waited} | times
    if utilisation is not None:
        speed["model_flops_utilisation"] = rate * utilisation
    return {"step": state.step, "epoch": run.epoch(state.step)} | values | speed, findings


def _context(run: Run, config: Config, state: TrainState, values: dict[str, float], steps: int) -> dict[str, float]:
    """What to read `values`, averages of the last `steps` steps, against: their mean relation weight, the levels of
    chance, and the spread of the newest keys in the memory bank."""
    weights = [scheduled(s, run.total_steps, config).relation_weight for s in range(state.step - steps, state.step)]
    weight = sum(weights) / max(1, steps)
    keys = state.bank.newest(min(config.model.bank_size, SPREAD_ROWS, state.step * config.train.batch_size))
    bank = {f"bank_{name}": value for name, value in spread(keys)._asdict().items()}
    levels = chance_levels(config, weight)
    share = {}
    if config.loss.uses_global:
        share["teacher_entropy_share"] = values["teacher_entropy"] / levels["chance_global"]
    return {"relation_weight": weight} | levels | share | bank


def averages(sums: Tensor, progress: Progress) -> dict[str, float]:
    """`METRICS` over all ranks and the steps since the last call that were not skipped; the sums start anew.

    Raises ConfigError after `MANY_SKIPPED` steps in a row without a finite gradient.
    """
    totals = (distributed.sum_over_ranks(sums) / distributed.world_size()).tolist()
    skipped = round(totals[-1])
    values = {n: t / max(1, progress.summed_steps - skipped) for n, t in zip(METRICS, totals, strict=True)}
    values["skipped_steps"] = skipped
    progress.skipped_in_a_row = progress.skipped_in_a_row + skipped if skipped == progress.summed_steps else 0
    if progress.skipped_in_a_row >= MANY_SKIPPED:
        raise ConfigError(
            f"--optim.lr: no finite gradient in the last {progress.skipped_in_a_row} steps; try a lower rate, "
            "--optim.warmup-epochs or --train.precision fp32 (the last checkpoint is intact)"
        )
    sums.zero_()
    progress.summed_steps = 0
    return values
