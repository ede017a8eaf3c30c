"""The drawn parameters: reproducible by position alone, of the stated distributions, independent of one another."""

import dataclasses

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop

from reco_fast.pipelines.augmentations import (
    Recipe,
    ViewParameters,
    ViewRecipe,
    evaluation_recipe,
    random_permutation,
    reco_recipe,
    sample_parameters,
)

N = 20_000
STRONG, _, WEAK = reco_recipe(224).views


def draw(view: ViewRecipe = STRONG, number: int = 0, seed: int = 0, n: int = N, first: int = 0) -> ViewParameters:
    return sample_parameters(view, number, seed, np.arange(first, first + n), np.full(n, 375), np.full(n, 500))


def columns(p: ViewParameters) -> dict[str, np.ndarray]:
    return {field.name: np.asarray(getattr(p, field.name), float) for field in dataclasses.fields(p)}


def test_a_view_depends_on_its_position_and_not_on_its_batch() -> None:
    whole = columns(draw(n=100))
    for start, stop in ((0, 1), (7, 40), (99, 100)):
        part = columns(draw(n=stop - start, first=start))
        for name, values in whole.items():
            assert np.array_equal(part[name], values[start:stop]), name


def test_drawn_values_are_pinned() -> None:
    """A change here changes every run with the same seed."""
    p = sample_parameters(STRONG, 1, 42, [0, 1, 10**12], [375, 480, 32], [500, 640, 32])
    boxes = np.stack([p.top, p.left, p.height, p.width], 1).tolist()
    assert boxes == PINNED_BOXES
    assert np.allclose(p.hue, PINNED_HUES, atol=1e-12)
    assert random_permutation(8, seed=3, epoch=1).tolist() == PINNED_PERMUTATION


PINNED_BOXES = [[60, 39, 278, 290], [31, 15, 440, 468], [5, 2, 21, 25]]
PINNED_HUES = [-0.0732340504208101, -0.011889053067947047, 0.0]
PINNED_PERMUTATION = [0, 7, 2, 6, 4, 1, 3, 5]


@pytest.mark.parametrize("change", [{"seed": 1}, {"number": 1}, {"first": N}, {"seed": -1}, {"seed": 2**80 + 5}])
def test_another_seed_view_or_position_draws_independent_values(change: dict[str, int]) -> None:
    one, other = columns(draw()), columns(draw(**change))
    for name, values in one.items():
        correlation = np.corrcoef(values, other[name])[0, 1]
        assert abs(correlation) < 4.5 / np.sqrt(N), f"{name}: {correlation}"


def test_fields_and_neighbouring_positions_are_independent() -> None:
    p = draw()
    jittered = p.jitter
    fields = columns(p)
    for name in ("flip", "grayscale", "top", "left", "blur_sigma"):
        neighbours = np.corrcoef(fields[name][1:], fields[name][:-1])[0, 1]
        assert abs(neighbours) < 4.5 / np.sqrt(N), name
        for other in ("brightness", "contrast", "saturation", "hue"):
            correlation = np.corrcoef(fields[name][jittered], fields[other][jittered])[0, 1]
            assert abs(correlation) < 4.5 / np.sqrt(jittered.sum()), (name, other)
    four = np.stack([fields[name][jittered] for name in ("brightness", "contrast", "saturation", "hue")])
    assert np.abs(np.corrcoef(four) - np.eye(4)).max() < 4.5 / np.sqrt(jittered.sum())


def test_probabilities_and_ranges_are_those_of_moco_v2() -> None:
    p = draw()

    def close(share: np.ndarray, probability: float) -> bool:
        return bool(abs(share.mean() - probability) < 4.5 * np.sqrt(probability * (1 - probability) / N))

    assert close(p.flip, 0.5)
    assert close(p.jitter, 0.8)
    assert close(p.grayscale, 0.2)
    assert close(p.blur_sigma > 0, 0.5)
    for values, low, high in (
        (p.brightness[p.jitter], 0.6, 1.4),
        (p.contrast[p.jitter], 0.6, 1.4),
        (p.saturation[p.jitter], 0.6, 1.4),
        (p.hue[p.jitter], -0.1, 0.1),
        (p.blur_sigma[p.blur_sigma > 0], 0.1, 2.0),
    ):
        assert_uniform(values, low, high)
    off = ~p.jitter
    assert (p.brightness[off] == 1).all()
    assert (p.hue[off] == 0).all()


def assert_uniform(values: np.ndarray, low: float, high: float) -> None:
    counts, _ = np.histogram(values, bins=20, range=(low, high))
    assert counts.sum() == len(values)
    chi_squared = ((counts - len(values) / 20) ** 2 / (len(values) / 20)).sum()
    assert chi_squared < 50  # 19 degrees of freedom: passed by chance with probability 0.9999


def test_area_logarithm_of_aspect_and_place_of_crops_are_uniform() -> None:
    """Where every proposal fits, and on an image so large that rounding to pixels is no matter."""
    view = ViewRecipe(area=(0.2, 0.5))
    side = 1_000_000
    p = sample_parameters(view, 0, 0, np.arange(N), np.full(N, side), np.full(N, side))
    assert_uniform(p.height * p.width / side**2, 0.2 - 1e-6, 0.5 + 1e-6)
    assert_uniform(np.log(p.width / p.height), np.log(3 / 4) - 1e-6, np.log(4 / 3) + 1e-6)
    assert_uniform(p.top / (side - p.height), 0, 1)
    assert_uniform(p.left / (side - p.width), 0, 1)


def test_the_weak_view_is_crop_and_flip_alone_and_small_images_are_not_blurred() -> None:
    weak = draw(WEAK, number=2)
    assert not weak.jitter.any()
    assert not weak.grayscale.any()
    assert not weak.blur_sigma.any()
    assert 0.45 < weak.flip.mean() < 0.55
    assert all(view.blur_probability == 0 for view in reco_recipe(32).views)


def test_a_smaller_weak_view_is_the_same_crop_and_the_recipe_stays_that_of_its_size() -> None:
    full, smaller = reco_recipe(224), reco_recipe(224, 48)
    assert (full.sizes, smaller.sizes) == ((224, 224, 224), (224, 224, 48))
    assert smaller.views[:2] == full.views[:2]  # blurred, as at 224 px
    assert (smaller.mean, smaller.std) == (full.mean, full.std)
    for name, values in vars(draw(full.views[2], number=2)).items():
        assert np.array_equal(values, getattr(draw(smaller.views[2], number=2), name)), name


@pytest.mark.parametrize(("height", "width"), [(375, 500), (32, 32), (100, 900), (900, 100), (3, 2)])
def test_crops_are_distributed_as_torchvisions(height: int, width: int) -> None:
    n = 3000
    ours = sample_parameters(WEAK, 0, 5, np.arange(n), np.full(n, height), np.full(n, width))
    torch.manual_seed(0)
    image = torch.empty(1, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(n)])
    for column, values in enumerate((ours.top, ours.left, ours.height, ours.width)):
        distance = _kolmogorov_smirnov(values, theirs[:, column])
        assert distance < 1.95 * np.sqrt(2 / n), f"{('top', 'left', 'height', 'width')[column]}: {distance}"
    assert (ours.top >= 0).all()
    assert (ours.left >= 0).all()
    assert (ours.top + ours.height <= height).all()
    assert (ours.left + ours.width <= width).all()


def _kolmogorov_smirnov(a: np.ndarray, b: np.ndarray) -> float:
    grid = np.union1d(a, b)
    below_a = np.searchsorted(np.sort(a), grid, side="right") / len(a)
    below_b = np.searchsorted(np.sort(b), grid, side="right") / len(b)
    return float(np.abs(below_a - below_b).max())


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 5000), (5000, 1), (2, 3)])
def test_crops_of_extreme_images_are_inside_and_not_empty(height: int, width: int) -> None:
    n = 200
    p = sample_parameters(STRONG, 0, 0, np.arange(n), np.full(n, height), np.full(n, width))
    assert (p.height >= 1).all()
    assert (p.width >= 1).all()
    assert (p.top + p.height <= height).all()
    assert (p.left + p.width <= width).all()


def test_evaluation_sees_a_central_square() -> None:
    large = sample_parameters(evaluation_recipe(224).views[0], 0, 0, [9], [375], [500])
    assert [int(v[0]) for v in (large.top, large.left, large.height, large.width)] == [23, 86, 328, 328]
    small = sample_parameters(evaluation_recipe(32).views[0], 0, 0, [9], [32], [40])
    assert [int(v[0]) for v in (small.top, small.left, small.height, small.width)] == [0, 4, 32, 32]
    assert not large.flip.any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ViewRecipe(flip_probability=1.5), "flip_probability: expected within"),
        (lambda: ViewRecipe(area=(0.5, 0.2)), "area: expected"),
        (lambda: ViewRecipe(hue=0.7), "hue: expected"),
        (lambda: ViewRecipe(center_crop=0.0), "center_crop: expected"),
        (lambda: ViewRecipe(size=0), "size: expected None or at least 1 pixel"),
        (lambda: Recipe((), 32), "views: expected at least one"),
        (lambda: Recipe((WEAK,), 0), "size: expected"),
    ],
)
def test_a_wrong_recipe_is_refused(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        make()


def test_permutations_are_uniform_and_differ_by_epoch_and_seed() -> None:
    assert sorted(random_permutation(1000, 0, 0).tolist()) == list(range(1000))
    assert (random_permutation(1000, 0, 0) == random_permutation(1000, 0, 0)).all()
    orders = np.stack([random_permutation(1000, seed, epoch) for seed in range(3) for epoch in range(3)])
    assert np.abs(np.corrcoef(orders) - np.eye(9)).max() < 4.5 / np.sqrt(1000)
    first = np.array([random_permutation(5, 0, epoch)[0] for epoch in range(5000)])
    assert np.abs(np.bincount(first) / 5000 - 0.2).max() < 4.5 * np.sqrt(0.16 / 5000)
