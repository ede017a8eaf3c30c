"""Opens a loader: by DALI where it is installed, else by PyTorch."""

import importlib.util
from typing import Literal

import torch

from reco_fast.errors import DataError
from reco_fast.pipelines.augmentations import Recipe
from reco_fast.pipelines.base import Loader, LoaderKind, OnBadImage
from reco_fast.pipelines.order import Order
from reco_fast.pipelines.sources.image_source import ImageSource


def open_loader(
    kind: LoaderKind,
    source: ImageSource,
    recipe: Recipe,
    order: Order,
    *,
    device: torch.device | str,
    seed: int,
    workers: int,
    on_bad_image: OnBadImage = "skip",
    first_step: int = 0,
    precision: torch.dtype = torch.float16,
    after: Loader | None = None,
) -> Loader:
    """Open a loader of `recipe`'s views of the images of `source` in `order`.

    Args:
        kind: "dali", "torch", or "auto" for DALI where it is installed.
        seed: of the augmentations; the order has its own. Equal seeds, positions and images give equal views.
        workers: threads (dali) or processes (torch) that decode; 0 means none beside the caller's where possible.
        on_bad_image: "skip" records it and in training puts another in its place, "raise" ends with DataError.
        first_step: of the order; resuming there gives the same batches as running up to it.
        precision: that the model computes in. For float32, views are float32 on a GPU too.
        after: a closed loader of the same images, whose bad ones, and what it keeps of good ones, this one takes over.

    Raises:
        DataError: `kind` is "dali" and it is not installed.
    """
    if order.length != len(source):
        raise ValueError(f"order: expected one of {len(source)} images as in source, got {order.length}")
    if on_bad_image == "raise":
        for name, reason in (source.unreadable | {source.names[i]: why for i, why in source.known_bad.items()}).items():
            raise DataError(f"{name}: {reason}")
    kind = resolve(kind)
    device = torch.device(device)
    dtype = torch.float16 if device.type == "cuda" and precision != torch.float32 else torch.float32
    arguments = (source, recipe, order, device, dtype, seed, workers, on_bad_image, first_step, after)
    if kind == "torch":
        from reco_fast.pipelines.torch_loader import TorchLoader

        return TorchLoader(*arguments)
    from reco_fast.pipelines.dali import DaliLoader

    return DaliLoader(*arguments)


def resolve(kind: LoaderKind) -> Literal["dali", "torch"]:
    """ "auto" as what it means here. Raises DataError for "dali" where it is not installed."""
    if kind == "dali" and not _has_dali():
        raise DataError("loader dali: expected NVIDIA DALI, it is not installed; pip install 'reco-fast[dali]'")
    if kind == "auto":
        return "dali" if _has_dali() else "torch"
    return kind


def _has_dali() -> bool:
    return importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
