"""Features of frozen networks, and the two figures that say how good they are."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from reco_fast import distributed
from reco_fast.data import LabelledData, open_evaluation_loader
from reco_fast.evaluation import classifiers
from reco_fast.method.state import pick_precision
from reco_fast.pipelines.order import EvaluationOrder
from reco_fast.pipelines.sources.image_source import ImageSource
from reco_fast.settings.config import Config, DataConfig


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
) -> tuple[Tensor, Tensor]:
    """`model`'s outputs [n, F] float32 for the un-augmented images of `source`, and the images' indices [n].

    With `count`, of at most so many images, evenly chosen. Ranks share the work and each gets the whole; the order is
    that of the loader. The mode of `model` is kept. `advance` is told of each batch.
    """
    training = model.training
    model.eval()
    order = EvaluationOrder(
        len(source), batch_size, count=count, rank=distributed.rank(), world_size=distributed.world_size()
    )
    features, indices = [], []
    with open_evaluation_loader(data, source, order, device, precision) as loader:
        for batch in loader:
            with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                features.append(model(batch.views[0]).float())
            indices.append(batch.indices)
            advance(len(batch.indices))
    model.train(training)
    gathered = distributed.all_gather_uneven(torch.cat(indices).to(device))
    return distributed.all_gather_uneven(torch.cat(features)), gathered.cpu()


class Features(NamedTuple):
    """Neighbours [n, F] and queries [m, F] float32 on the device, and their class numbers [n], [m] on the CPU."""

    train: Tensor
    train_labels: Tensor
    val: Tensor
    val_labels: Tensor


def features_of(
    model: nn.Module, source: ImageSource, config: Config, device: torch.device, **options: Any
) -> tuple[Tensor, Tensor]:
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


def labelled_features(model: nn.Module, data: LabelledData, config: Config, device: torch.device) -> Features:
    """`model`'s features of all images of `data`, un-augmented, in the precision of the training."""
    train, train_indices = features_of(model, data.train, config, device)
    val, val_indices = features_of(model, data.val, config, device)
    return Features(train, data.train_labels[train_indices], val, data.val_labels[val_indices])


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
