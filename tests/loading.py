"""What tests of the loaders share: which there are, a training loader of either kind, and its batches."""

import importlib.util
from typing import Any

import pytest
import torch

from reco_fast.pipelines.augmentations import Recipe, ViewRecipe
from reco_fast.pipelines.base import Batch, Loader
from reco_fast.pipelines.loader import open_loader
from reco_fast.pipelines.order import TrainingOrder
from reco_fast.pipelines.sources.image_source import ImageSource

__all__ = ["HAS_DALI", "LOADERS", "both_loaders", "levels", "needs_dali", "take", "tiny", "training"]

HAS_DALI = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
needs_dali = pytest.mark.skipif(not HAS_DALI, reason="DALI is not installed")
LOADERS = [pytest.param("dali", marks=needs_dali), "torch"]
both_loaders = pytest.mark.parametrize("kind", LOADERS)


def training(kind: Any, source: ImageSource, recipe: Recipe, batch_size: int = 8, **options: Any) -> Loader:
    """Of `rank` of `world_size`, and with what `open_loader` takes."""
    order = TrainingOrder(
        len(source), batch_size, rank=options.pop("rank", 0), world_size=options.pop("world_size", 1), seed=3
    )
    return open_loader(kind, source, recipe, order, **{"device": "cpu", "seed": 7, "workers": 1} | options)


def take(loader: Loader, count: int) -> list[Batch]:
    """The first `count` batches; the loader is closed then."""
    with loader:
        return [next(loader) for _ in range(count)]


def levels(view: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """A normalised view as 0..255."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (recipe.mean, recipe.std))
    return 255 * (view * std + mean)


def tiny() -> Recipe:
    """One view of 8 × 8 pixels."""
    return Recipe((ViewRecipe(flip_probability=0.5),), 8)
