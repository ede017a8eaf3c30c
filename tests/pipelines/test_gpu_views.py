"""What DALI makes of the same parameters on a GPU, beside itself on the CPU and the torch loader.

`pytest -s tests/pipelines/test_gpu_views.py` prints the table of docs/loader.md for a GPU.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from image_sets import and_shared
from loading import levels, needs_dali, take, training
from test_views import PARITY

from reco_fast.pipelines.augmentations import Recipe, ViewRecipe, reco_recipe
from reco_fast.pipelines.base import Batch, ImageReader
from reco_fast.pipelines.sources.open import open_source

pytestmark = [needs_dali, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

# Largest mean absolute difference from the CPU, in 0..255, beside what the torch loader may differ: another JPEG
# decoder (1.0), another blur, arithmetic for contrast, a hue that turns the decoder's differences, and float16.
LIMITS = dict.fromkeys(PARITY, 1.0) | {"blur": 1.2, "contrast": 1.2, "saturation": 1.2, "hue": 1.5, "all but hue": 1.3}
PLAIN = Recipe((ViewRecipe(center_crop=1.0),), 32)  # of an image of 32 × 32 pixels: what was decoded


def far(a: Batch, b: Batch, recipe: Recipe) -> list[torch.Tensor]:
    """Mean absolute difference of each image, [n], for each view."""
    assert torch.equal(a.indices, b.indices)
    pairs = zip(a.views, b.views, strict=True)
    return [(levels(x.float().cpu(), recipe) - levels(y.float().cpu(), recipe)).abs().mean((1, 2, 3)) for x, y in pairs]


def compared(name: str, folder: Path, recipe: Recipe) -> list[torch.Tensor]:
    """From the CPU; printed, also from the torch loader."""
    source = open_source(folder)

    def first(kind: str, device: str) -> Batch:
        return take(training(kind, source, recipe, batch_size=64, device=device), 1)[0]

    on_gpu = first("dali", "cuda")
    for view in on_gpu.views:
        assert view.is_cuda
        assert view.dtype == torch.float16
        assert view.is_contiguous(memory_format=torch.channels_last)
    from_cpu, from_torch = (far(on_gpu, first(kind, "cpu"), recipe) for kind in ("dali", "torch"))
    for number, (cpu, reference) in enumerate(zip(from_cpu, from_torch, strict=True)):
        print(
            f"{name}, view {number}: on a GPU {cpu.mean():.3f} from DALI on the CPU (worst image {cpu.max():.3f}), "
            f"{reference.mean():.3f} from the torch loader (worst {reference.max():.3f})"
        )
    return from_cpu


@pytest.mark.parametrize("name", PARITY)
def test_each_operation_on_photographs(photographs: Path, name: str) -> None:
    recipe, _ = PARITY[name]
    (by_image,) = compared(name, photographs, recipe)
    assert by_image.mean() < LIMITS[name]
    assert by_image.max() < 5 * LIMITS[name]


@pytest.mark.parametrize("name", ["decode", *PARITY])
def test_each_operation_on_small_images(cifar: Path, name: str) -> None:
    recipe = PLAIN if name == "decode" else dataclasses.replace(PARITY[name][0], size=32)
    (by_image,) = compared(f"{name}, 32 px", cifar, recipe)
    assert by_image.mean() < LIMITS.get(name, 1.0)
    assert by_image.max() < 5 * LIMITS.get(name, 1.0)


@pytest.mark.parametrize(
    ("images", "size"),
    [(images, size) for name, size in (("photographs", 224), ("cifar", 32)) for images in and_shared(name)],
)
def test_whole_views(images_of: Callable[[str], Path], images: str, size: int) -> None:
    *strong, weak = compared(f"whole, {images}, {size} px", images_of(images), reco_recipe(size))
    assert max(view.mean() for view in strong) < 1.5
    assert weak.mean() < 1.0


def test_views_are_float32_where_the_model_computes_in_it(cifar: Path) -> None:
    recipe = reco_recipe(32)
    source = open_source(cifar)
    half, full = (
        take(training("dali", source, recipe, 32, device="cuda", precision=dtype), 1)[0]
        for dtype in (torch.float16, torch.float32)
    )
    assert full.views[0].dtype == torch.float32
    assert max(view.max().item() for view in far(half, full, recipe)) < 0.2


def test_kept_images_go_over_as_one_array_and_give_the_same_views(cifar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from reco_fast.pipelines.dali import DaliLoader

    source, recipe = open_source(cifar), reco_recipe(32)
    decoders: list[bool] = []
    build = DaliLoader._build

    def counted(self: DaliLoader) -> Any:
        pipeline = build(self)
        decoders.append(not self._takes_decoded)
        return pipeline

    monkeypatch.setattr(DaliLoader, "_build", counted)
    kept = take(training("dali", source, recipe, 60, device="cuda"), 20)  # four epochs
    assert decoders == [True, False]
    monkeypatch.setattr(ImageReader, "keeps_decoded", lambda *_: False)
    for ours, theirs in zip(kept, take(training("dali", source, recipe, 60, device="cuda"), 20), strict=True):
        # Not to the bit: which of a GPU's decoders takes an image may change from one epoch to the next.
        assert max(view.mean().item() for view in far(ours, theirs, recipe)) < 1.0


def test_a_later_first_step_continues_on_a_gpu(cifar: Path) -> None:
    source, recipe = open_source(cifar), reco_recipe(32)
    whole = take(training("dali", source, recipe, 64, device="cuda"), 8)
    for a, b in zip(whole[3:], take(training("dali", source, recipe, 64, device="cuda", first_step=3), 5), strict=True):
        assert max(view.mean().item() for view in far(a, b, recipe)) < 1.0


def test_what_was_handed_out_is_not_written_again(photographs: Path) -> None:
    """The copies are the caller's: DALI goes on with its own buffers while they are in use."""
    with training("dali", open_source(photographs), reco_recipe(224), 16, device="cuda") as loader:
        batches = [next(loader) for _ in range(6)]
        early = [view.clone() for batch in batches for view in batch.views]
        for _ in range(6):
            next(loader)
        torch.cuda.synchronize()
    assert all(map(torch.equal, early, (view for batch in batches for view in batch.views)))
    assert len({view.data_ptr() for batch in batches for view in batch.views}) == len(early)
