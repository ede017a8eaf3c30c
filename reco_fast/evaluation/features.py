"""Features of frozen networks, and the two figures that say how good they are."""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from reco_fast import distributed
from reco_fast.data.images import LabelledData
from reco_fast.data.loaders import open_evaluation_loader
from reco_fast.evaluation import classifiers
from reco_fast.method.state import pick_precision
from reco_fast.pipelines.base import none_good
from reco_fast.pipelines.order import EvaluationOrder
from reco_fast.pipelines.sources.image_source import ImageSource
from reco_fast.settings.config import Config, DataConfig


class Extracted(NamedTuple):
    """Of the good images of a source, in their order: `features` [n, F] float32 on the device, and `places` in the
    source [n] int64 on the CPU. `bad`: name → reason of those left out."""

    source: ImageSource
    features: Tensor
    places: Tensor
    bad: dict[str, str]


@torch.no_grad()
def extract_features(
    model: nn.Module,
    source: ImageSource,
    data: DataConfig,
    *,
    batch_size: int,
    device: torch.device,
    precision: torch.dtype,
    count: int | None = None,
    advance: Callable[[int], None] = lambda images: None,
) -> Extracted:
    """`model`'s outputs for the un-augmented images of `source`.

    With `count`, of at most so many images, evenly chosen. Ranks share the work and each gets the whole. The mode of
    `model` is kept. `advance` is told of each batch.

    Raises:
        DataError: no image is good; or one is bad and the data's `on_bad_image` is "raise".
    """
    training = model.training
    model.eval()
    order = EvaluationOrder(
        len(source), batch_size, count=count, rank=distributed.rank(), world_size=distributed.world_size()
    )
    features, places = [], [torch.empty(0, dtype=torch.int64)]
    with open_evaluation_loader(data, source, order, device, precision) as loader:
        for step, batch in enumerate(loader):
            features.append(outputs(model, batch.views[0], precision))
            places.append(batch.indices)
            advance(len(order.batch(step)[0]))
        pairs = distributed.gather_lines([json.dumps(pair) for pair in loader.bad_images.items()], device)
    if not features:
        features = [outputs(model, torch.empty(0, 3, data.image_size, data.image_size, device=device), precision)]
    model.train(training)
    gathered = distributed.all_gather_uneven(torch.cat(places).to(device)).cpu()
    bad = dict(map(json.loads, pairs))
    if not len(gathered):
        raise none_good(bad)
    return Extracted(source, distributed.all_gather_uneven(torch.cat(features)), gathered, bad)


def outputs(model: nn.Module, images: Tensor, precision: torch.dtype) -> Tensor:
    """`model` of `images` [n, 3, H, W], which may be none, computed in `precision`: [n, F] float32."""
    shown = images if len(images) else images.new_zeros(1, *images.shape[1:])
    with torch.autocast(images.device.type, precision, enabled=precision != torch.float32):
        return model(shown).float()[: len(images)]


class Features(NamedTuple):
    """Neighbours [n, F] and queries [m, F] float32 on the device, and their class numbers [n], [m] on the CPU."""

    train: Tensor
    train_labels: Tensor
    val: Tensor
    val_labels: Tensor

    @classmethod
    def of(cls, data: LabelledData, train: Extracted, val: Extracted) -> "Features":
        return cls(train.features, data.train_labels[train.places], val.features, data.val_labels[val.places])


def features_of(
    model: nn.Module, source: ImageSource, config: Config, device: torch.device, **options: Any
) -> Extracted:
    """`extract_features` with `options`, in the batches and the precision of the training."""
    return extract_features(
        model,
        source,
        config.data,
        batch_size=max(1, config.train.batch_size // distributed.world_size()),
        device=device,
        precision=pick_precision(config.train.precision, device),
        **options,
    )


def labelled_features(
    model: nn.Module, data: LabelledData, config: Config, device: torch.device
) -> tuple[Extracted, Extracted]:
    """`model`'s features of all training and all held-out images of `data`, as `features_of`."""
    return features_of(model, data.train, config, device), features_of(model, data.val, config, device)


def knn_top1(features: Features, classes: int, *, k: int, temperature: float) -> float:
    """Top-1 accuracy in percent of the weighted kNN classifier."""
    labels, truth = (part.to(features.train.device) for part in (features.train_labels, features.val_labels))
    found = classifiers.nearest(features.val, features.train, k)
    scores = classifiers.knn_scores(found, labels, classes, k=k, temperature=temperature)
    return classifiers.accuracy(scores, truth, 1)


def linear_top1(features: Features) -> tuple[float, float]:
    """Top-1 in percent of `classifiers.linear_probe`, and the penalty C that it chose."""
    labels, truth = (part.to(features.train.device) for part in (features.train_labels, features.val_labels))
    classes = 1 + int(max(labels.max(), truth.max()))
    probe = classifiers.linear_probe(features.train, labels, classes, features.val)
    return classifiers.accuracy(probe.scores, truth, 1), probe.penalty
