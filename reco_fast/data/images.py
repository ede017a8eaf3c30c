"""From the configuration to images and their classes."""

import dataclasses
import os
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL import ImageColor
from torch import Tensor

from reco_fast import distributed
from reco_fast.errors import ConfigError, DataError
from reco_fast.pipelines.pixels import Decoding
from reco_fast.pipelines.sources import generated
from reco_fast.pipelines.sources.folders import FolderSource
from reco_fast.pipelines.sources.image_source import ImageSource
from reco_fast.pipelines.sources.kinds import NOW, OTHER_RULES, Rules
from reco_fast.pipelines.sources.labels import first_few
from reco_fast.pipelines.sources.open import open_source
from reco_fast.pipelines.stores.opening import packed_index, unpack_index
from reco_fast.pipelines.stores.where import Stores
from reco_fast.settings.config import Config, DataConfig
from reco_fast.settings.terminal import say

AS_USUAL = DataConfig()


class LabelledData(NamedTuple):
    """Training images as the neighbours, held-out ones as the queries, and a class number for each."""

    train: ImageSource
    val: ImageSource
    train_labels: Tensor
    val_labels: Tensor
    classes: list[str]


class Kept(Protocol):
    """What says how images that come from a URL are kept."""

    @property
    def cache(self) -> Path | None: ...
    @property
    def cache_gb(self) -> float: ...


def stores_of(said: Kept) -> Stores:
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return Stores(said.cache, int(said.cache_gb * 1e9), processes, say if distributed.rank() == 0 else len)


def open_images(path: str, data: DataConfig, rules: Rules = NOW) -> ImageSource:
    """What is at `path`, to be decoded as `data` says. On all ranks together: what rank 0 finds out by fetching shards
    is told to the others. Raises DataError."""
    stores = stores_of(data)
    if distributed.rank() == 0:
        found = b""
        try:
            source = open_source(path, rules, stores)
            found = packed_index(source) if distributed.world_size() > 1 else b""
        finally:  # where it fails, others meet the same
            distributed.from_first_rank(found)
    else:
        unpack_index(distributed.from_first_rank(b""), stores)
        source = open_source(path, rules, stores)
    red, green, blue = ImageColor.getrgb(data.background)[:3]
    source.decoding = Decoding((red, green, blue), data.range)
    return source


def open_labelled(
    train: ImageSource, val_path: str, flag: str = "--data.path", instead: str = "", data: DataConfig = AS_USUAL
) -> LabelledData:
    """Both sources with the classes matched by name; `flag`: that named the first; `instead`: what to do where it has
    no labels; `data`: how those of a store are kept. Raises ConfigError where there are none or they differ."""
    val = open_images(val_path, data)
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
    config = _with_order(config, source)
    if data.val_path is None:
        if config.eval.train_path is not None:
            raise ConfigError("--eval.train-path: expected held-out images beside it, --data.val-path, got nothing")
        return config, source, None
    neighbours, flag = open_neighbours(config, source)
    instead = "" if neighbours is not source else "; labelled ones can be given by --eval.train-path"
    return config, source, open_labelled(neighbours, data.val_path, flag, instead, data)


def _with_order(config: Config, source: ImageSource) -> Config:
    """With `auto` as what it means for these images. Raises ConfigError where the order does not fit them."""
    data = config.data
    order = data.order
    if order == "auto":
        order = "blocks" if source.ends is not None and source.at_once > 1 else "uniform"
    if order == "blocks" and source.ends is None:
        raise ConfigError("--data.order: expected uniform for images that are not in .tar shards, got blocks")
    if order == "blocks" and config.train.batch_size % data.lanes:
        raise ConfigError(
            f"--data.lanes: expected a divisor of --train.batch-size, {config.train.batch_size}, got {data.lanes}"
        )
    return dataclasses.replace(config, data=dataclasses.replace(data, order=order))


def rules_of(fingerprint: str | None, config: Config, source: ImageSource, device: torch.device) -> Rules:
    """By which rules the images were told from other files that a run with this fingerprint began with, on all ranks
    together: `NOW`, which gave `source`, unless others give the same images again."""
    number, path = 0, config.data.path
    if path and distributed.rank() == 0 and fingerprint not in (None, source.fingerprint()):
        for place, rules in enumerate(OTHER_RULES, 1):
            with suppress(DataError):
                found = open_source(path, rules, stores_of(config.data))
                number = place if found.fingerprint() == fingerprint else number
    numbers = distributed.all_gather(torch.tensor([number], device=device))
    return (NOW, *OTHER_RULES)[int(numbers[0])]


def passed_over(config: Config, source: ImageSource, labelled: LabelledData | None) -> list[str]:
    """What there is to know of a run's sources, such as what they hold and is not taken; a line each."""
    named = [("--data.path", source)]
    if labelled is not None:
        named += [] if labelled.train is source else [("--eval.train-path", labelled.train)]
        named += [("--data.val-path", labelled.val)]
    return [f"{flag}: {line}" for flag, each in named for line in (*each.notes, each.passed_over.line()) if line]


def _in_brackets(text: str) -> str:
    return f" ({text})" if text else ""
