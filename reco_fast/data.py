"""From the configuration to sources, views and labels."""

import dataclasses
import os
from collections import defaultdict
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import torch
from PIL import ImageColor
from torch import Tensor

from reco_fast import distributed
from reco_fast.errors import ConfigError, DataError
from reco_fast.pipelines.augmentations import Recipe, evaluation_recipe, reco_recipe
from reco_fast.pipelines.base import Loader
from reco_fast.pipelines.loader import open_loader
from reco_fast.pipelines.order import EvaluationOrder, TrainingOrder
from reco_fast.pipelines.pixels import Decoding
from reco_fast.pipelines.sources import generated
from reco_fast.pipelines.sources.folders import FolderSource
from reco_fast.pipelines.sources.image_source import ImageSource
from reco_fast.pipelines.sources.kinds import NOW, OTHER_RULES, Rules
from reco_fast.pipelines.sources.labels import first_few
from reco_fast.pipelines.sources.open import open_source
from reco_fast.settings.config import Config, DataConfig


class LabelledData(NamedTuple):
    """Training images as the neighbours, held-out ones as the queries, and a class number for each."""

    train: ImageSource
    val: ImageSource
    train_labels: Tensor
    val_labels: Tensor
    classes: list[str]


def open_images(path: str, data: DataConfig, rules: Rules = NOW) -> ImageSource:
    """What is at `path`, to be decoded as `data` says. Raises DataError."""
    source = open_source(path, rules)
    red, green, blue = ImageColor.getrgb(data.background)[:3]
    source.decoding = Decoding((red, green, blue), data.range)
    return source


def open_labelled(train: ImageSource, val_path: str, flag: str = "--data.path", instead: str = "") -> LabelledData:
    """Both sources with the classes matched by name; `flag`: that named the first; `instead`: what to do where it has
    no labels. Raises ConfigError where there are none or they differ."""
    val = open_source(val_path)
    val.decoding = train.decoding
    for name, source in ((flag, train), ("--data.val-path", val)):
        if source.labels is None:
            raise ConfigError(
                f"{name}: expected images by class to evaluate with (in one folder a class, or with .cls members), got "
                f"images without classes: {source.unlabelled}{instead if source is train else ''}"
            )
    assert train.labels is not None
    assert val.labels is not None
    unknown = sorted(set(val.classes) - set(train.classes))
    if unknown:
        raise ConfigError(
            f"--data.val-path: expected the classes of {flag} ({first_few(train.classes)}), got another: "
            f"{unknown[0]}{_one_too_deep(train, val, flag)}"
        )
    renumbered = np.array([train.classes.index(name) for name in val.classes])
    return LabelledData(
        train, val, torch.from_numpy(train.labels), torch.from_numpy(renumbered[val.labels]), train.classes
    )


def _one_too_deep(train: ImageSource, val: ImageSource, flag: str) -> str:
    """What to give instead where one of the sources has the other's classes one folder deeper."""
    for name, upper, lower in ((flag, train, val), ("--data.val-path", val, train)):
        if not isinstance(upper, FolderSource):
            continue
        inside: defaultdict[str, set[str]] = defaultdict(set)
        for image in upper.names:
            folder, *deeper = image.split("/", 2)
            inside[folder].update(deeper[:-1])
        for folder, names in sorted(inside.items()):
            if len(names & set(lower.classes)) > 1:
                return f"; {folder} holds folders of these names, so give {name} {upper.root}/{folder}"
    return ""


def open_neighbours(config: Config, source: ImageSource) -> tuple[ImageSource, str]:
    """The images whose features are the neighbours of the kNN evaluation, and the flag that names them."""
    path = config.eval.train_path
    if path is None or path == config.data.path:
        return source, "--data.path"
    return open_images(path, config.data), "--eval.train-path"


def open_data(config: Config, rules: Rules = NOW) -> tuple[Config, ImageSource, LabelledData | None]:
    """The images, labelled ones if there are any, and the configuration with the paths filled in. `rules`: what of
    --data.path is an image.

    The quickstart preset without a path makes its own images.
    """
    data = config.data
    if data.path is None:
        if not config.data.generated:
            raise ConfigError("--data.path: expected a folder of images or .tar shards, got nothing")
        path, val_path = map(os.fspath, distributed.first_rank_first(generated.generate))
        data = dataclasses.replace(data, path=path, val_path=val_path)
        config = dataclasses.replace(config, data=data)
    assert data.path is not None
    source = open_images(data.path, data, rules)
    if len(source) < config.train.batch_size:
        raise ConfigError(
            f"--train.batch-size: expected at most the {len(source)} images of {data.path}, "
            f"got {config.train.batch_size}{_in_brackets(source.passed_over.line())}"
        )
    if data.val_path is None:
        if config.eval.train_path is not None:
            raise ConfigError("--eval.train-path: expected held-out images beside it, --data.val-path, got nothing")
        return config, source, None
    neighbours, flag = open_neighbours(config, source)
    instead = "" if neighbours is not source else "; labelled ones can be given by --eval.train-path"
    return config, source, open_labelled(neighbours, data.val_path, flag, instead)


def rules_of(fingerprint: str | None, config: Config, source: ImageSource, device: torch.device) -> Rules:
    """By which rules the images were told from other files that a run with this fingerprint began with, on all ranks
    together: `NOW`, which gave `source`, unless others give the same images again."""
    number, path = 0, config.data.path
    if path and distributed.rank() == 0 and fingerprint not in (None, source.fingerprint()):
        for place, rules in enumerate(OTHER_RULES, 1):
            with suppress(DataError):
                number = place if open_source(path, rules).fingerprint() == fingerprint else number
    found = distributed.all_gather(torch.tensor([number], device=device))
    return (NOW, *OTHER_RULES)[int(found[0])]


def passed_over(config: Config, source: ImageSource, labelled: LabelledData | None) -> list[str]:
    """A line for each of a run's sources that holds more than it takes."""
    named = [("--data.path", source)]
    if labelled is not None:
        named += [] if labelled.train is source else [("--eval.train-path", labelled.train)]
        named += [("--data.val-path", labelled.val)]
    return [f"{flag}: {line}" for flag, each in named if (line := each.passed_over.line())]


def _in_brackets(text: str) -> str:
    return f" ({text})" if text else ""


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
