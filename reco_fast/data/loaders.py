"""From the configuration to views and loaders."""

import dataclasses
import os

import torch

from reco_fast import distributed
from reco_fast.pipelines.augmentations import Recipe, evaluation_recipe, reco_recipe
from reco_fast.pipelines.base import Loader
from reco_fast.pipelines.loader import open_loader
from reco_fast.pipelines.order import BlockOrder, EvaluationOrder, TrainingOrder
from reco_fast.pipelines.sources.image_source import ImageSource
from reco_fast.settings.config import Config, DataConfig


def recipe(config: Config, grown: int | None = None) -> Recipe:
    """The views that the objective looks at: the student's, and then the teacher's. `grown`: the side up to which they
    grow, which decides on blur and normalisation from the start: a network must not see them change."""
    data = config.data
    full = reco_recipe(grown or data.image_size, data.weak_size, data.min_scale, data.mean, data.std)
    strong, second, weak = full.views
    teacher = (weak,) if config.loss.weak_keys else (second, weak)[: len(config.teacher_sizes)]
    return dataclasses.replace(full, views=(strong, *teacher), size=data.image_size)


def open_training_loader(
    config: Config,
    source: ImageSource,
    device: torch.device,
    precision: torch.dtype,
    first_step: int = 0,
    *,
    views: Recipe | None = None,
    after: Loader | None = None,
) -> Loader:
    """This rank's part of the global batches, from `first_step` on, without end. `views` other than `recipe(config)`;
    `after` as `open_loader` takes it."""
    batch, data = config.train.batch_size, config.data
    part = {"rank": distributed.rank(), "world_size": distributed.world_size(), "seed": config.train.seed}
    order = TrainingOrder(len(source), batch, **part)
    if data.order == "blocks":
        assert source.ends is not None
        order = BlockOrder(source.ends, batch, window=data.window, lanes=data.lanes, **part)
    return open_loader(
        config.data.loader,
        source,
        views or recipe(config),
        order,
        device=device,
        seed=config.train.seed,
        workers=loader_workers(config.data),
        on_bad_image=config.data.on_bad_image,
        first_step=first_step,
        precision=precision,
        after=after,
    )


def open_evaluation_loader(
    data: DataConfig,
    source: ImageSource,
    order: EvaluationOrder,
    device: torch.device,
    precision: torch.dtype,
    first_step: int = 0,
) -> Loader:
    """Un-augmented images in `order`, from `first_step` on."""
    return open_loader(
        data.loader,
        source,
        evaluation_recipe(data.image_size, data.mean, data.std),
        order,
        device=device,
        seed=0,
        workers=loader_workers(data),
        on_bad_image=data.on_bad_image,
        first_step=first_step,
        precision=precision,
    )


def loader_workers(data: DataConfig) -> int:
    """As configured, or this rank's share of the cores."""
    return data.workers or max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def available_cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
