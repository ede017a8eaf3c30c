"""From the configuration to sources, views and labels."""

import dataclasses
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import ImageColor
from torch import Tensor

from reco_fast import distributed
from reco_fast.errors import ConfigError
from reco_fast.pipelines.augmentations import Recipe, evaluation_recipe, reco_recipe
from reco_fast.pipelines.base import Loader
from reco_fast.pipelines.loader import open_loader
from reco_fast.pipelines.order import EvaluationOrder, TrainingOrder
from reco_fast.pipelines.pixels import Decoding
from reco_fast.pipelines.sources import generated
from reco_fast.pipelines.sources.image_source import ImageSource
from reco_fast.pipelines.sources.open import open_source
from reco_fast.settings.config import Config, DataConfig


class LabelledData(NamedTuple):
    """Training images as the neighbours, held-out ones as the queries, and a class number for each."""

    train: ImageSource
    val: ImageSource
    train_labels: Tensor
    val_labels: Tensor
    classes: list[str]


def open_images(path: Path, data: DataConfig) -> ImageSource:
    """What is at `path`, to be decoded as `data` says. Raises DataError."""
    source = open_source(path)
    red, green, blue = ImageColor.getrgb(data.background)[:3]
    source.decoding = Decoding((red, green, blue), data.range)
    return source


def open_labelled(train: ImageSource, val_path: Path) -> LabelledData:
    """Both sources with the classes matched by name. Raises ConfigError where there are none or they differ."""
    val = open_source(val_path)
    val.decoding = train.decoding
    for flag, source in (("--data.path", train), ("--data.val-path", val)):
        if source.labels is None:
            raise ConfigError(f"{flag}: expected one folder a class to evaluate with, got images without classes")
    assert train.labels is not None
    assert val.labels is not None
    unknown = sorted(set(val.classes) - set(train.classes))
    if unknown:
        raise ConfigError(f"--data.val-path: expected the classes of --data.path, got another: {unknown[0]}")
    renumbered = np.array([train.classes.index(name) for name in val.classes])
    return LabelledData(
        train, val, torch.from_numpy(train.labels), torch.from_numpy(renumbered[val.labels]), train.classes
    )


def open_data(config: Config) -> tuple[Config, ImageSource, LabelledData | None]:
    """The images, labelled ones if there are any, and the configuration with the paths filled in.

    The quickstart preset without a path makes its own images.
    """
    data = config.data
    if data.path is None:
        if not config.data.generated:
            raise ConfigError("--data.path: expected a folder of images or .tar shards, got nothing")
        path, val_path = distributed.first_rank_first(generated.generate)
        data = dataclasses.replace(data, path=path, val_path=val_path)
        config = dataclasses.replace(config, data=data)
    assert data.path is not None
    source = open_images(data.path, data)
    if len(source) < config.train.batch_size:
        raise ConfigError(
            f"--train.batch-size: expected at most the {len(source)} images of {data.path}, "
            f"got {config.train.batch_size}"
        )
    labelled = open_labelled(source, data.val_path) if data.val_path is not None else None
    return config, source, labelled


def recipe(config: Config) -> Recipe:
    """The views that the objective looks at: no weak one without the global relation."""
    full = reco_recipe(config.data.image_size)
    return full if config.loss.uses_global else dataclasses.replace(full, views=full.views[:2])


def open_training_loader(
    config: Config, source: ImageSource, device: torch.device, precision: torch.dtype, first_step: int = 0
) -> Loader:
    """This rank's part of the global batches, from `first_step` on, without end."""
    order = TrainingOrder(
        len(source),
        config.train.batch_size,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        seed=config.train.seed,
    )
    return open_loader(
        config.data.loader,
        source,
        recipe(config),
        order,
        device=device,
        seed=config.train.seed,
        workers=loader_workers(config.data),
        on_bad_image=config.data.on_bad_image,
        first_step=first_step,
        precision=precision,
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
        evaluation_recipe(data.image_size),
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
