"""What the two loaders make of the same parameters, beside torchvision's operations."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_sets import and_shared
from loading import both_loaders, levels, needs_dali, take, training

from reco_fast.pipelines.augmentations import Recipe, ViewRecipe, evaluation_recipe, reco_recipe
from reco_fast.pipelines.sources.open import open_source


def one(**options: Any) -> Recipe:
    """A recipe with one view and nothing but what `options` ask for; whole image unless they say otherwise."""
    return Recipe((ViewRecipe(**{"area": (0.5, 1.0)} | options),), 224)


always = {"jitter_probability": 1.0}
# Largest mean absolute difference over 64 photographs, in 0..255. docs/loader.md has what was measured.
PARITY = {
    "crop": (one(), 0.2),
    "small crops": (Recipe((ViewRecipe(area=(0.02, 0.1)),), 224), 0.2),
    "small output": (Recipe((ViewRecipe(),), 32), 0.4),
    "evaluation": (evaluation_recipe(224), 0.2),
    "flip": (one(flip_probability=1.0), 0.2),
    "brightness": (one(**always, brightness=0.4), 0.25),
    "contrast": (one(**always, contrast=0.4), 0.35),
    "saturation": (one(**always, saturation=0.4), 0.35),
    "grayscale": (one(grayscale_probability=1.0), 0.25),
    "blur": (one(blur_probability=1.0), 0.6),
    "hue": (one(**always, hue=0.1), 6.0),  # another rotation: see the documentation
    "all but hue": (one(**always, brightness=0.4, contrast=0.4, saturation=0.4, blur_probability=0.5), 0.7),
}


# Set of images and operation. On further photographs, what their variety may change: decoding, small details, colours.
ON_SETS = [("photographs", name) for name in PARITY]
ON_SETS += [(more, name) for more in and_shared("photographs")[1:] for name in ("small output", "hue", "all but hue")]


@needs_dali
@pytest.mark.parametrize(("images", "name"), ON_SETS)
def test_dali_and_torch_make_the_same_views(images_of: Callable[[str], Path], images: str, name: str) -> None:
    recipe, tolerance = PARITY[name]
    source = open_source(images_of(images))
    (dali,), (reference,) = (take(training(kind, source, recipe, batch_size=64), 1) for kind in ("dali", "torch"))
    assert torch.equal(dali.indices, reference.indices)
    difference = levels(dali.views[0], recipe) - levels(reference.views[0], recipe)
    by_image = difference.abs().mean(dim=(1, 2, 3))
    print(f"{name}: mean absolute difference {by_image.mean():.3f}, worst image {by_image.max():.3f}")
    assert by_image.mean() < tolerance
    assert by_image.max() < 5 * tolerance
    assert reference.views[0].std() > 0.5


@needs_dali
@pytest.mark.parametrize(
    ("images", "size", "weak_size", "tolerance"),
    [
        *((images, 224, None, 5.5) for images in and_shared("photographs")),
        ("photographs", 224, 160, 5.5),
        ("cifar", 32, None, 5.5),
        ("cifar", 32, 24, 5.5),
        *((more, 32, None, 4.5) for more in and_shared("cifar")[1:]),  # less colourful
    ],
)
def test_whole_views_agree(
    images_of: Callable[[str], Path], images: str, size: int, weak_size: int | None, tolerance: float
) -> None:
    """The complete recipe, hue included; the weak view has none and is as close as a crop."""
    recipe = reco_recipe(size, weak_size)
    source = open_source(images_of(images))
    (dali,), (reference,) = (take(training(kind, source, recipe, batch_size=64), 1) for kind in ("dali", "torch"))
    far = [
        (levels(a, recipe) - levels(b, recipe)).abs().mean().item()
        for a, b in zip(dali.views, reference.views, strict=True)
    ]
    print(f"{size} px: mean absolute difference of the three views {[round(value, 3) for value in far]}")
    assert max(far[:2]) < tolerance
    assert far[2] < 0.25


@needs_dali
def test_contrast_by_arithmetic_as_on_a_gpu_equals_the_operator() -> None:
    """The GPU's branch, run on the CPU."""
    from reco_fast.pipelines import dali_graph as dali

    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (16, 30, 40, 3), dtype=np.uint8)
    factors = generator.uniform(0.6, 1.4, 16).astype(np.float32)

    @dali.pipeline_def(batch_size=16, num_threads=1, device_id=None)
    def graph() -> Any:
        image, factor = dali.fn.external_source(
            source=lambda: (images, factors),
            num_outputs=2,
            dtype=[dali.types.UINT8, dali.types.FLOAT],
            ndim=[3, 0],
            layout=["HWC", ""],
        )
        return dali.contrast(image, factor), dali.contrast_on_gpu(image, factor)

    pipeline = graph()
    pipeline.build()
    operator, arithmetic = (np.asarray(output.as_tensor()).astype(int) for output in pipeline.run())
    assert np.abs(operator - arithmetic).max() <= 1
    assert (operator != arithmetic).mean() < 0.02
    assert np.abs(operator - images).mean() > 5


@needs_dali
def test_no_colour_left_as_on_a_gpu_equals_the_conversion_to_grey() -> None:
    from reco_fast.pipelines import dali_graph as dali

    images = np.random.default_rng(0).integers(0, 256, (16, 30, 40, 3), dtype=np.uint8)

    @dali.pipeline_def(batch_size=16, num_threads=1, device_id=None)
    def graph() -> Any:
        image, none = dali.fn.external_source(
            source=lambda: (images, np.zeros(16, np.float32)),
            num_outputs=2,
            dtype=[dali.types.UINT8, dali.types.FLOAT],
            ndim=[3, 0],
            layout=["HWC", ""],
        )
        return dali.grey(image), dali.colour_left(image, none)

    pipeline = graph()
    pipeline.build()
    conversion, ours = (np.asarray(output.as_tensor()).astype(int) for output in pipeline.run())
    assert np.abs(conversion - ours).max() <= 1
    assert (conversion != ours).mean() < 0.2
    assert abs((conversion - ours).mean()) < 0.1


@needs_dali
def test_factors_of_one_change_nothing() -> None:
    """So on a GPU the jitter may be done to all images, also to those that are drawn to have none."""
    from reco_fast.pipelines import dali_graph as dali

    images = np.random.default_rng(0).integers(0, 256, (16, 30, 40, 3), dtype=np.uint8)
    images[0, :, :, 0] = np.arange(30)[:, None]
    images[1] = 255
    ones, zeros = np.ones(16, np.float32), np.zeros(16, np.float32)

    @dali.pipeline_def(batch_size=16, num_threads=1, device_id=None)
    def graph() -> Any:
        image, one, zero = dali.fn.external_source(
            source=lambda: (images, ones, zeros),
            num_outputs=3,
            dtype=[dali.types.UINT8, dali.types.FLOAT, dali.types.FLOAT],
            ndim=[3, 0, 0],
            layout=["HWC", "", ""],
        )
        return (
            dali.brightness(image, one),
            dali.contrast_on_gpu(image, one),
            dali.saturation_and_hue(image, one, zero),
            dali.colour_left(image, one),
        )

    pipeline = graph()
    pipeline.build()
    for output in pipeline.run():
        assert np.array_equal(np.asarray(output.as_tensor()), images)


@both_loaders
@pytest.mark.parametrize("weak_size", [None, 20])
def test_views_are_normalized_channels_last_floats(kind: str, weak_size: int | None, cifar: Path) -> None:
    recipe = reco_recipe(32, weak_size)
    (batch,) = take(training(kind, open_source(cifar), recipe), 1)
    for view, size in zip(batch.views, (32, 32, weak_size or 32), strict=True):
        assert view.shape == (8, 3, size, size)
        assert view.dtype == torch.float32
        assert view.is_contiguous(memory_format=torch.channels_last)
        assert levels(view, recipe).min() > -0.01
        assert levels(view, recipe).max() < 255.01
    assert batch.indices.dtype == torch.int64
    assert not torch.equal(batch.views[0], batch.views[1])


@both_loaders
def test_a_smaller_weak_view_changes_no_other_and_shows_the_same_crop(kind: str, cifar: Path) -> None:
    source, recipe = open_source(cifar), reco_recipe(32)
    (full,), (smaller,) = (take(training(kind, source, r), 1) for r in (recipe, reco_recipe(32, 16)))
    assert all(map(torch.equal, full.views[:2], smaller.views[:2]))
    shrunk = torch.nn.functional.avg_pool2d(full.views[2], 2)
    difference = [(255 * (a - shrunk) * 0.25).abs().mean() for a in (smaller.views[2], smaller.views[2].roll(1, 0))]
    assert difference[0] < 0.3 * difference[1]  # the second: beside another image
