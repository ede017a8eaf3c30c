"""What `train` does, from top to bottom: what a run needs, the loop. `step.train_step` is one step of it."""

import dataclasses
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from reco_fast import distributed
from reco_fast.data.images import open_data, passed_over, rules_of
from reco_fast.distributed.stopping import Agreement, StopRequest
from reco_fast.evaluation.features import Features, features_of, knn_top1, labelled_features
from reco_fast.method.losses import loss_runs
from reco_fast.method.optim import optimizer_name
from reco_fast.method.state import TrainState, build_state, fastest_precision, pick_device
from reco_fast.method.step import draw, scheduled, train_step
from reco_fast.pipelines.augmentations import Recipe
from reco_fast.pipelines.base import Batch, Loader
from reco_fast.pipelines.sources.kinds import NOW
from reco_fast.profiling.flops import utilisation_per_image
from reco_fast.profiling.trace import region, trace
from reco_fast.run import checkpoint, quarantine, run_folder
from reco_fast.run.diagnostics import spread
from reco_fast.run.initial import initial_student
from reco_fast.run.meter import Meter
from reco_fast.run.progress import Progress, Run, reading
from reco_fast.run.report import RunLog, wandb_beside
from reco_fast.settings.config import Config
from reco_fast.settings.terminal import say
from reco_fast.settings.typed import one_line, shell_word
from reco_fast.training.stage import Stage

SAMPLE = 2048  # training images whose features are looked at where there are no labels


def whole_run(config: Config, name: str, on_metrics: Callable[[dict[str, Any]], None] | None = None) -> Path:
    """As `train.train` says."""
    device = pick_device(config.train.device)
    with distributed.process_group(device):
        distributed.fit_ranks(config)
        loss_runs(config.loss.impl, config.model.projection_dim, device)
        config, source, labelled = open_data(config)
        config, student = initial_student(config)
        state = build_state(config, device, student)
        folder, resume_from = run_folder.choose(config, name, source)
        writes = distributed.rank() == 0
        rules = rules_of(checkpoint.fingerprint(folder / "checkpoints"), config, source, device)
        if rules != NOW:  # the run began when other files counted as images, and goes on with those
            config, source, labelled = open_data(config, rules)
        images = run_folder.same_images(folder, config, source) if writes else None
        run = Run(config, source, labelled, folder, epoch_steps=len(source) / config.train.batch_size)
        done = run_folder.finished(folder)
        if done is not None and isinstance(done.get("steps"), int) and done["steps"] >= run.stop_at:
            if writes:
                say(f"{folder} is finished: {done}")
            return folder
        progress = Progress() if resume_from is None else Progress.restore(resume_from, state)
        run_folder.same_start(state.step, device)
        progress.fingerprint = images
        validation = progress.see_validation(labelled)
        with run_folder.claimed(folder, config, images) if writes else nullcontext():
            left_out = quarantine.prepare(folder, config.data, source, labelled)
            project = config.run.wandb if writes else None
            with (
                Stage(run, state) as stage,
                wandb_beside(folder, project, config.to_json()) if project else nullcontext(),
                RunLog(folder if writes else None, run.stop_at, state.step, on_metrics) as log,
                checkpoint.Writer(folder / "checkpoints") as writer,
                StopRequest() as stop,
            ):
                told = (*state.student.notes, *validation, *passed_over(config, source, labelled), *left_out)
                for line in (introduction(run, state), *told):
                    log.say(line)
                if labelled is None:
                    log.say("no --data.val-path with images by class: no kNN evaluation, only losses")
                loop(run, state, progress, stage, log, writer, stop)
    return folder


def introduction(run: Run, state: TrainState) -> str:
    """What is trained, on what, where, and in which precision."""
    config, device = run.config, state.device
    number = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[state.precision]
    if config.train.precision == "auto":
        number += f" ({fastest_precision(device)[1]})"
    images = f"{len(run.source)} images"
    if config.optim.name == "auto":
        number += f", by {optimizer_name(config.optim, state.student.backbone)}"
    return f"{run.folder}: {config.loss.objective} with {config.model.arch} on {images}, {device} in {number}"


def loop(
    run: Run,
    state: TrainState,
    progress: Progress,
    stage: Stage,
    log: RunLog,
    writer: checkpoint.Writer,
    stop: StopRequest,
) -> None:
    """Fetch, step, log, evaluate, checkpoint; from `state.step` to the end or to a request to stop.

    A profile is of the first steps of this process, whatever their phase.
    """
    config, profile = run.config, run.config.profile
    if state.step == 0:
        progress.knn_top1_initial = progress.knn_top1 = evaluate_student(run, state, progress, log)
        say_notices(run, log, state.device)
    meter, agreement = Meter(state.device), Agreement()
    sums = torch.tensor(progress.sums, device=state.device)
    utilisation = utilisation_per_image(state, stage.phase.config) if profile.enabled else None
    traces = run.folder / "tensorboard" if profile.enabled else None
    saved_at, stopping = time.monotonic(), False
    with trace(traces, wait=profile.wait, warmup=profile.warmup, active=profile.active) as profiler:
        while state.step < run.stop_at and not stopping:
            if line := stage.follow():
                log.say(line)
                utilisation = utilisation_per_image(state, stage.phase.config) if profile.enabled else None
            with meter.waiting(), region("data_wait"):
                batch = next(stage.loader)
            if state.step == 0:
                log.views(view_grid(batch, stage.recipe))
            schedule = scheduled(state.step, run.total_steps, config)
            draws = draw(state.step, len(batch.indices), stage.phase.config, state.device)
            sums += train_step(state, stage.phase.config, batch.views, draws, schedule)
            progress.summed_steps += 1
            meter.add(config.train.batch_size)
            log.advance(state.step)

            ended = state.step == run.stop_at
            changing = run.phase(state.step) is not stage.phase  # no average is of steps of two kinds
            if ended or changing or state.step % config.run.log_every == 0:
                log.train(*reading(run, state, progress, sums, meter, schedule.lr, utilisation))
            if ended or run.due(state.step, config.eval.every):
                profiler.finish()
                progress.add(meter)
                progress.knn_top1 = evaluate_student(run, state, progress, log)
                meter.restart()
            late = time.monotonic() - saved_at > 60 * config.run.checkpoint_minutes
            stopping, overdue = agreement.any(stop.signal_name is not None or log.unheard, late)
            if ended or stopping or overdue or run.saves_at(state.step):
                progress.add(meter)
                save(state, progress, sums, stage.loader, log, writer)
                say_notices(run, log, state.device)
                saved_at = time.monotonic()
                agreement.forget()
            profiler.step()
    writer.wait()
    if state.step >= run.stop_at:
        say_end(run, state, progress, log)
    else:
        why = stop.signal_name or "a signal to another rank"
        log.say(f"stopped at step {state.step} ({why}); go on with --run.dir {shell_word(run.folder)}")


def say_notices(run: Run, log: RunLog, device: torch.device) -> None:
    """What loaders had to say of images that they used, each kind of thing once. On all ranks together."""
    sources = run.sources
    found = [item for source in sources for item in source.notices.lines(source.names).items()]
    lines = distributed.gather_lines([f"{kind}\t{one_line(line)}" for kind, line in found], device)
    by_kind = dict(line.split("\t", 1) for line in lines)
    for line in by_kind.values():
        log.say(f"warning: {line}")
    for source in sources:
        source.notices.said.update(by_kind)


def save(
    state: TrainState, progress: Progress, sums: Tensor, loader: Loader, log: RunLog, writer: checkpoint.Writer
) -> None:
    """Begin to write a checkpoint, and list the bad images met so far. On all ranks together."""
    progress.sums = (distributed.sum_over_ranks(sums) / distributed.world_size()).tolist()
    sums.copy_(torch.tensor(progress.sums))
    if distributed.rank() == 0:
        writer.save(state, dataclasses.asdict(progress))
    log.bad_images(distributed.gather_lines(bad_lines(loader.bad_images), state.device))


def bad_lines(bad: dict[str, str], path: str | None = None) -> list[str]:
    """As bad_images.txt has them: name and reason of images below the training path, or below `path`."""
    prefix = "" if path is None else f"{path}/"
    return [f"{one_line(prefix + name)}\t{one_line(reason)}" for name, reason in bad.items()]


def say_end(run: Run, state: TrainState, progress: Progress, log: RunLog) -> None:
    """The last line of metrics.jsonl, and what to do next."""
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
    folder, path = shell_word(run.folder), shell_word(run.config.data.path)
    log.say(f"done; python -m reco_fast.embed {folder} --data.path {path} --output features.npz")


def evaluate_student(run: Run, state: TrainState, progress: Progress, log: RunLog) -> float | None:
    """Log how good the student's backbone is. Returns its kNN top-1 in percent; None without labelled images."""
    config, backbone = run.config, state.student.backbone
    top1, findings = None, []
    if run.labelled is None:
        train = features_of(backbone, run.source, config, state.device, count=SAMPLE)
    else:
        train, val = labelled_features(backbone, run.labelled, config, state.device)
        features = Features.of(run.labelled, train, val)
        options = config.eval
        top1 = knn_top1(features, len(run.labelled.classes), k=options.knn_k, temperature=options.knn_temperature)
        findings = progress.watch.evaluation(top1, len(val.features), config)
        log.bad_images(bad_lines(val.bad, config.data.val_path))
    log.bad_images(bad_lines(train.bad, None if train.source is run.source else config.eval.train_path))
    log.evaluation(state.step, run.epoch(state.step), progress.seconds, top1, spread(train.features), findings)
    return top1


def view_grid(batch: Batch, recipe: Recipe) -> Tensor:
    """[3, H, W] in 0..1: a row for each of the first 8 images, a column for each view, all as large as the first."""
    from torchvision.utils import make_grid

    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (recipe.mean, recipe.std))
    size = batch.views[0].shape[2:]
    views = [interpolate(view[:8].float().cpu(), size) * std + mean for view in batch.views]  # whole pixels, enlarged
    return make_grid(torch.stack(views, dim=1).flatten(0, 1).clamp(0, 1), nrow=len(views))
