"""Train: `torchrun --standalone -m reco_fast.train [PRESET] [--section.field VALUE ...]`.

Reads from top to bottom: the command line, what a run needs, the loop. `step.train_step` is one step of it.
"""

import dataclasses
import inspect
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor
from torchvision.utils import make_grid

from reco_fast import checkpoint, checks, cli, distributed, quarantine, run_folder
from reco_fast.config import Config, ConfigError
from reco_fast.data import LabelledData, open_data, open_training_loader, recipe
from reco_fast.diagnostics import SETTLED_STEPS, SPREAD_ROWS, Watch, chance_levels, spread
from reco_fast.features import features_of, knn_top1, labelled_features
from reco_fast.metrics import Meter, RunLog
from reco_fast.pipelines.augmentations import Recipe
from reco_fast.pipelines.image_source import ImageSource
from reco_fast.pipelines.loader import Batch, Loader
from reco_fast.presets import PRESETS
from reco_fast.profiling.flops import utilisation_per_image
from reco_fast.profiling.trace import region, trace
from reco_fast.state import TrainState, build_state, pick_device
from reco_fast.step import METRICS, draw, scheduled, train_step
from reco_fast.stop import StopRequest
from reco_fast.typed import as_dataclass, one_line
from reco_fast.wandb_log import wandb_beside

SAMPLE = 2048  # training images whose features are looked at where there are no labels
MANY_SKIPPED = 20  # steps in a row without a finite gradient, after which a run gives up


def main() -> NoReturn:
    cli.run(lambda: train(*parse(sys.argv[1:])))


def parse(argv: Sequence[str]) -> tuple[str, Config]:
    """The preset's name (quickstart unless the first word names one) and the configuration."""
    preset, default, rest = preset_and_rest(argv)
    prog, expectation = f"python -m reco_fast.train {preset}", inspect.cleandoc(PRESETS[preset][1])
    return preset, cli.parse(Config, rest, prog=prog, description=expectation, default=default)


def preset_and_rest(argv: Sequence[str]) -> tuple[str, Config, Sequence[str]]:
    """The preset's name, its configuration and the other arguments. Raises ConfigError for an unknown name."""
    preset, rest = ("quickstart", argv) if not argv or argv[0].startswith("-") else (argv[0], argv[1:])
    if preset not in PRESETS:
        raise ConfigError(f"{preset}: expected a preset, one of {', '.join(PRESETS)}")
    return preset, PRESETS[preset][0], rest


def train(preset: str, config: Config) -> int:
    """A whole run. Everything a user can get wrong is found before the run folder is touched."""
    device = pick_device(config.train.device)
    with distributed.process_group(device):
        checks.fit_ranks(config)
        checks.loss_runs(config, device)
        config, source, labelled = open_data(config)
        state = build_state(config, device)
        folder, resume_from = run_folder.choose(config, preset)
        run = Run(config, source, labelled, folder, epoch_steps=len(source) / config.train.batch_size)
        done = run_folder.finished(folder)
        if done is not None and isinstance(done.get("steps"), int) and done["steps"] >= run.stop_at:
            if distributed.rank() == 0:
                print(f"{folder} is finished: {done}")
            return 0
        writes = distributed.rank() == 0
        progress = Progress() if resume_from is None else Progress.restore(resume_from, state)
        checks.same_start(state.step, device)
        if writes:
            progress.fingerprint = checks.same_images(progress.fingerprint, source, config.data.path)
        with run_folder.claimed(folder, config) if writes else nullcontext():
            left_out = quarantine.prepare(folder, config.data, source, labelled)
            project = config.run.wandb if writes else None
            with (
                open_training_loader(config, source, device, state.precision, state.step) as loader,
                wandb_beside(folder, project, config.to_json()) if project else nullcontext(),
                RunLog(folder if writes else None, total_steps=run.stop_at, first_step=state.step) as log,
                checkpoint.Writer(folder / "checkpoints") as writer,
                StopRequest() as stop,
            ):
                log.say(f"{folder}: {config.loss.objective} with {config.model.arch} on {len(source)} images, {device}")
                for line in left_out:
                    log.say(line)
                if labelled is None:
                    log.say("no --data.val-path with images by class: no kNN evaluation, only losses")
                loop(run, state, progress, loader, log, writer, stop)
    return 0


@dataclass(frozen=True)
class Run:
    """What stays the same throughout a run."""

    config: Config
    source: ImageSource
    labelled: LabelledData | None
    folder: Path
    epoch_steps: float

    @property
    def total_steps(self) -> int:
        """Of the schedule."""
        return max(1, round(self.config.train.epochs * self.epoch_steps))

    @property
    def stop_at(self) -> int:
        return min(self.total_steps, self.config.train.max_steps or self.total_steps)

    def settled(self, step: int) -> bool:
        """Whether embeddings should have come apart: past the first epoch (or many steps) and the warm-up."""
        warmup = self.config.optim.warmup_epochs * self.epoch_steps
        return step > max(warmup, min(self.epoch_steps, SETTLED_STEPS))

    def epoch(self, step: int) -> float:
        return step / self.epoch_steps

    def due(self, step: int, every_epochs: float) -> bool:
        """Whether a multiple of `every_epochs` was passed with this step."""
        return int(self.epoch(step) / every_epochs) > int(self.epoch(step - 1) / every_epochs)


@dataclass
class Progress:
    """What a run has measured so far; kept in its checkpoints."""

    fingerprint: str | None = None
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

    def add(self, meter: Meter) -> None:
        """Take over what the meter has counted up to now."""
        meter.read()
        self.images, self.seconds = self.images + meter.images, self.seconds + meter.seconds
        meter.images, meter.seconds = 0, 0.0


def loop(
    run: Run,
    state: TrainState,
    progress: Progress,
    loader: Loader,
    log: RunLog,
    writer: checkpoint.Writer,
    stop: StopRequest,
) -> None:
    """Fetch, step, log, evaluate, checkpoint; from `state.step` to the end or to a request to stop."""
    config = run.config
    if state.step == 0:
        progress.knn_top1_initial = progress.knn_top1 = evaluate(run, state, progress, log)
    meter = Meter(state.device)
    saved_at = time.monotonic()
    agreement = distributed.Agreement()
    sums = torch.tensor(progress.sums, device=state.device)
    batches = iter(loader)
    profile = config.profile
    utilisation = utilisation_per_image(state, config) if profile.enabled else None
    traces = run.folder / "tensorboard" if profile.enabled else None
    with trace(traces, wait=profile.wait, warmup=profile.warmup, active=profile.active) as profiler:
        while state.step < run.stop_at:
            with meter.waiting(), region("data_wait"):
                batch = next(batches)
            if state.step == 0:
                log.views(view_grid(batch, recipe(config)))
            schedule = scheduled(state.step, run.total_steps, config)
            draws = draw(state.step, len(batch.indices), config, state.device)
            sums += train_step(state, config, batch.views, draws, schedule)
            progress.summed_steps += 1
            meter.add(config.train.batch_size)
            log.advance(state.step)

            ended = state.step == run.stop_at
            logs = ended or state.step % config.run.log_every == 0
            if logs:
                steps = progress.summed_steps
                values = averages(sums, progress)
                values |= context(run, state, values, steps)
                findings = progress.watch.reading(values, config, settled=run.settled(state.step))
                times = meter.step_times()
                rate, waited = meter.read()
                log.train(
                    {"step": state.step, "epoch": run.epoch(state.step)}
                    | values
                    | {"lr": schedule.lr, "images_per_second": rate, "data_wait_fraction": waited}
                    | times
                    | ({} if utilisation is None else {"model_flops_utilisation": rate * utilisation}),
                    findings,
                )
            if ended or run.due(state.step, config.eval.every):
                profiler.finish()
                progress.add(meter)
                progress.knn_top1 = evaluate(run, state, progress, log)
                meter.restart()
            late = time.monotonic() - saved_at > 60 * config.run.checkpoint_minutes
            stopping, overdue = agreement.any(stop.signal_name is not None, late)
            at_step = config.run.checkpoint_steps is not None and state.step % config.run.checkpoint_steps == 0
            if ended or stopping or overdue or at_step:
                progress.add(meter)
                progress.sums = (distributed.sum_over_ranks(sums) / distributed.world_size()).tolist()
                sums = torch.tensor(progress.sums, device=state.device)
                if distributed.rank() == 0:
                    writer.save(state, dataclasses.asdict(progress))
                bad = [f"{one_line(name)}\t{one_line(reason)}" for name, reason in loader.bad_images.items()]
                log.bad_images(distributed.gather_lines(bad, state.device))
                saved_at = time.monotonic()
                agreement.forget()
            profiler.step()
            if stopping and not ended:
                writer.wait()
                why = stop.signal_name or "a signal to another rank"
                log.say(f"stopped at step {state.step} ({why}); go on with --run.dir {run.folder}")
                return
    writer.wait()
    log.end(
        {
            "epochs": run.epoch(state.step),
            "steps": state.step,
            "seconds": progress.seconds,
            "images_per_second": progress.images / max(progress.seconds, 1e-9),
            "knn_top1_initial": progress.knn_top1_initial,
            "knn_top1": progress.knn_top1,
        }
    )
    log.say(f"done; python -m reco_fast.embed {run.folder} --data.path {config.data.path} --output features.npz")


def context(run: Run, state: TrainState, values: dict[str, float], steps: int) -> dict[str, float]:
    """What to read `values`, averages of the last `steps` steps, against: their mean relation weight, the levels of
    chance, and the spread of the newest keys in the memory bank."""
    config = run.config
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


def evaluate(run: Run, state: TrainState, progress: Progress, log: RunLog) -> float | None:
    """Log how good the student's backbone is. Returns its kNN top-1 in percent; None without labelled images."""
    config, backbone = run.config, state.student.backbone
    top1, findings = None, []
    if run.labelled is None:
        train, _ = features_of(backbone, run.source, config, state.device, count=SAMPLE)
    else:
        features = labelled_features(backbone, run.labelled, config, state.device)
        train = features.train
        options = config.eval
        top1 = knn_top1(features, len(run.labelled.classes), k=options.knn_k, temperature=options.knn_temperature)
        findings = progress.watch.evaluation(top1, len(features.val), config)
    log.evaluation(state.step, run.epoch(state.step), progress.seconds, top1, spread(train), findings)
    return top1


def view_grid(batch: Batch, recipe: Recipe) -> Tensor:
    """[3, H, W] in 0..1: a row for each of the first 8 images, a column for each view."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (recipe.mean, recipe.std))
    images = torch.stack([view[:8].float().cpu() * std + mean for view in batch.views], dim=1).flatten(0, 1)
    return make_grid(images.clamp(0, 1), nrow=len(batch.views))


if __name__ == "__main__":
    main()
