"""The recipe as data, and every random number of it as a function of (seed, position, view).

A recipe says what may happen to an image; `sample_parameters` says what does happen to the one at a given position of
the training stream. Both loaders apply the same parameters, so a view does not depend on the loader, batch size, rank,
worker or thread that makes it, and resuming at a step needs nothing but its number.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

Int64Array = NDArray[np.int64]
Float64Array = NDArray[np.float64]
Colour = tuple[float, float, float]  # red, green, blue

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = (0.2470, 0.2435, 0.2616)
SMALL = 64  # up to this size (pixels) there is no blur, and evaluation sees the whole square


@dataclass(frozen=True, kw_only=True)
class ViewRecipe:
    """What may happen to an image to make one view of it, in this order: crop and resize, jitter (brightness,
    contrast, saturation, hue), grayscale, blur, flip. The defaults change nothing but the size.

    `size`: side in pixels; None for that of the recipe.
    `center_crop`: share of the shorter side that a deterministic central square keeps; None for a random crop with
    `area` (share of the image) and `aspect` (width / height) ranges. `hue` is in turns, at most 0.5; `blur_sigma` in
    pixels of the view.
    """

    size: int | None = None
    center_crop: float | None = None
    area: tuple[float, float] = (0.2, 1.0)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    flip_probability: float = 0.0
    jitter_probability: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    grayscale_probability: float = 0.0
    blur_probability: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)

    def __post_init__(self) -> None:
        for name in ("flip", "jitter", "grayscale", "blur"):
            _check(0 <= getattr(self, f"{name}_probability") <= 1, f"{name}_probability", "within [0, 1]", self)
        for name in ("brightness", "contrast", "saturation"):
            _check(getattr(self, name) >= 0, name, "0 or more", self)
        _check(0 <= self.hue <= 0.5, "hue", "within [0, 0.5]", self)
        _check(self.size is None or self.size >= 1, "size", "None or at least 1 pixel", self)
        _check(self.center_crop is None or 0 < self.center_crop <= 1, "center_crop", "None or within (0, 1]", self)
        _check(0 < self.area[0] <= self.area[1] <= 1, "area", "0 < low <= high <= 1", self)
        _check(0 < self.aspect[0] <= self.aspect[1], "aspect", "0 < low <= high", self)
        _check(0 < self.blur_sigma[0] <= self.blur_sigma[1], "blur_sigma", "0 < low <= high", self)


@dataclass(frozen=True)
class Recipe:
    """All views of an image: square, `size` pixels a side unless a view has its own, normalised as
    (x / 255 - mean) / std by channel."""

    views: tuple[ViewRecipe, ...]
    size: int
    mean: Colour = IMAGENET_MEAN
    std: Colour = IMAGENET_STD

    def __post_init__(self) -> None:
        _check(len(self.views) > 0, "views", "at least one", self)
        _check(self.size >= 1, "size", "at least 1 pixel", self)
        _check(min(self.std) > 0, "std", "above 0", self)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The side of each view in pixels."""
        return tuple(view.size or self.size for view in self.views)


def reco_recipe(
    size: int,
    weak_size: int | None = None,
    min_scale: float = 0.2,
    mean: Colour | None = None,
    std: Colour | None = None,
) -> Recipe:
    """Two strong views as MoCo v2 makes them and one weak view (crop and flip), as large unless `weak_size` says
    otherwise; crops keep at least `min_scale` of an image. No blur for small images. `mean` and `std` as for
    `evaluation_recipe`."""
    area = (min_scale, 1.0)
    strong = ViewRecipe(
        area=area,
        flip_probability=0.5,
        jitter_probability=0.8,
        brightness=0.4,
        contrast=0.4,
        saturation=0.4,
        hue=0.1,
        grayscale_probability=0.2,
        blur_probability=0.0 if size <= SMALL else 0.5,
    )
    weak = ViewRecipe(size=weak_size, area=area, flip_probability=0.5)
    return Recipe((strong, strong, weak), size, *_statistics(size, mean, std))


def evaluation_recipe(size: int, mean: Colour | None = None, std: Colour | None = None) -> Recipe:
    """One view, nothing random: the central square; of images above `SMALL` pixels its inner 7/8. Normalised by `mean`
    and `std`, or unless they are given by CIFAR-10's up to `SMALL` pixels and ImageNet's above."""
    view = ViewRecipe(center_crop=1.0 if size <= SMALL else 0.875)
    return Recipe((view,), size, *_statistics(size, mean, std))


def _statistics(size: int, mean: Colour | None, std: Colour | None) -> tuple[Colour, Colour]:
    usual = (CIFAR_MEAN, CIFAR_STD) if size <= SMALL else (IMAGENET_MEAN, IMAGENET_STD)
    return mean or usual[0], std or usual[1]


def _check(holds: bool, name: str, expected: str, recipe: object) -> None:
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {getattr(recipe, name)}")


@dataclass(frozen=True)
class ViewParameters:
    """What is done to each of n images to make one view: arrays of length n.

    `top, left, height, width` (int64): the crop, in pixels of the decoded image. `flip, grayscale` (bool).
    `brightness, contrast, saturation` (float64): factors, 1 for none. `hue` (float64): turns, 0 for none.
    `blur_sigma` (float64): pixels of the view, 0 for none.
    """

    top: Int64Array
    left: Int64Array
    height: Int64Array
    width: Int64Array
    flip: NDArray[np.bool_]
    brightness: Float64Array
    contrast: Float64Array
    saturation: Float64Array
    hue: Float64Array
    grayscale: NDArray[np.bool_]
    blur_sigma: Float64Array

    @property
    def jitter(self) -> NDArray[np.bool_]:
        """Which images have any colour changed, [n]."""
        factors = (self.brightness != 1) | (self.contrast != 1) | (self.saturation != 1)
        return np.asarray(factors | (self.hue != 0))


class _Field(IntEnum):
    """Which number of a view is drawn. Changing a value changes every run with the same seed."""

    FLIP = 0
    JITTER = 1
    BRIGHTNESS = 2
    CONTRAST = 3
    SATURATION = 4
    HUE = 5
    GRAYSCALE = 6
    BLUR = 7
    BLUR_SIGMA = 8
    CROP_TOP = 9
    CROP_LEFT = 10
    CROP_AREA = 16  # and the next nine, one an attempt
    CROP_ASPECT = 32  # likewise


_CROP_ATTEMPTS = 10  # as torchvision's RandomResizedCrop
_SINGLE = range(_Field.CROP_LEFT + 1)
_PROPOSALS = [field + attempt for field in (_Field.CROP_AREA, _Field.CROP_ASPECT) for attempt in range(_CROP_ATTEMPTS)]
_DRAWN = np.array([*_SINGLE, *_PROPOSALS])[:, None]  # a single field's row is its number, the proposals' are the last
_VIEWS, _ORDER, _STAND_INS, _PART = 0, 1, 2, 3  # what a draw is for


def sample_parameters(
    view: ViewRecipe,
    view_number: int,
    seed: int,
    positions: Sequence[int] | Int64Array,
    heights: Sequence[int] | Int64Array,
    widths: Sequence[int] | Int64Array,
) -> ViewParameters:
    """Draw what happens to the images at these positions of the training stream.

    Args:
        view_number: place of `view` in its recipe, so that two equal views of an image differ.
        seed: any integer.
        positions: [n] places in the stream, from 0; the same place always gives the same draw.
        heights, widths: [n] of the decoded images, in pixels.
    """
    heights, widths = np.asarray(heights, np.int64), np.asarray(widths, np.int64)
    stream = _hash(seed, _VIEWS, view_number, np.asarray(positions, np.int64))
    drawn = _unit(_stir(stream, _DRAWN))  # at once: 30 small calls would cost more than the numbers

    def between(low: float, high: float, field: int) -> Float64Array:
        return low + (high - low) * drawn[field]

    jittered = drawn[_Field.JITTER] < view.jitter_probability

    def factor(strength: float, field: int) -> Float64Array:
        return np.where(jittered, between(max(0.0, 1 - strength), 1 + strength, field), 1.0)

    blurred = drawn[_Field.BLUR] < view.blur_probability
    if view.center_crop is None:
        top, left, height, width = _random_crop(view, drawn, heights, widths)
    else:
        top, left, height, width = _central_square(view.center_crop, heights, widths)
    return ViewParameters(
        top=top,
        left=left,
        height=height,
        width=width,
        flip=drawn[_Field.FLIP] < view.flip_probability,
        brightness=factor(view.brightness, _Field.BRIGHTNESS),
        contrast=factor(view.contrast, _Field.CONTRAST),
        saturation=factor(view.saturation, _Field.SATURATION),
        hue=np.where(jittered, between(-view.hue, view.hue, _Field.HUE), 0.0),
        grayscale=drawn[_Field.GRAYSCALE] < view.grayscale_probability,
        blur_sigma=np.where(blurred, between(*view.blur_sigma, _Field.BLUR_SIGMA), 0.0),
    )


def _random_crop(
    view: ViewRecipe, drawn: Float64Array, heights: Int64Array, widths: Int64Array
) -> tuple[Int64Array, Int64Array, Int64Array, Int64Array]:
    """torchvision's RandomResizedCrop: the first of ten proposals that fits, else the largest central crop whose
    aspect is allowed. All ten are made at once, [10, n]."""
    areas, aspects = np.split(drawn[-2 * _CROP_ATTEMPTS :], 2)
    area = (view.area[0] + (view.area[1] - view.area[0]) * areas) * (heights * widths)
    low, high = np.log(view.aspect)
    aspect = np.exp(low + (high - low) * aspects)
    width = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    height = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    fits = (width > 0) & (width <= widths) & (height > 0) & (height <= heights)
    first = (fits.argmax(axis=0), np.arange(len(heights)))
    found = fits[first]

    whole = widths / heights
    fallback_width = np.where(whole > view.aspect[1], np.rint(heights * view.aspect[1]).astype(np.int64), widths)
    fallback_height = np.where(whole < view.aspect[0], np.rint(widths / view.aspect[0]).astype(np.int64), heights)
    width = np.where(found, width[first], np.clip(fallback_width, 1, widths))
    height = np.where(found, height[first], np.clip(fallback_height, 1, heights))

    # floor(u · m) is uniform over 0 … m - 1, up to 2⁻⁵³ m
    top = (drawn[_Field.CROP_TOP] * (heights - height + 1)).astype(np.int64)
    left = (drawn[_Field.CROP_LEFT] * (widths - width + 1)).astype(np.int64)
    top = np.where(found, top, (heights - height) // 2)
    left = np.where(found, left, (widths - width) // 2)
    return top, left, height, width


def _central_square(
    share: float, heights: Int64Array, widths: Int64Array
) -> tuple[Int64Array, Int64Array, Int64Array, Int64Array]:
    side = np.maximum(1, np.rint(share * np.minimum(heights, widths))).astype(np.int64)
    return (heights - side) // 2, (widths - side) // 2, side, side


def random_permutation(length: int, seed: int, epoch: int, *part: int) -> Int64Array:
    """A uniform permutation of `length`, [length] int64, for an epoch or a part of it: the places of sorted random
    numbers. It depends on the arguments alone, so a run may be resumed with another NumPy, whose own generators are
    free to change."""
    for number in part:
        seed = int(_hash(seed, _PART, number, np.zeros(1, np.int64))[0])
    return np.argsort(_hash(seed, _ORDER, epoch, np.arange(length, dtype=np.int64)), kind="stable").astype(np.int64)


def stand_ins(length: int, seed: int, position: int) -> Iterator[int]:
    """All places of a source of `length`, each once, in an order drawn for this position of the stream: the first good
    one takes the place of a bad image there. Bad images that are side by side so get stand-ins from all over."""
    start, stride = (_hash(seed, _STAND_INS, position, np.arange(2)) % np.uint64(length)).tolist()
    while math.gcd(stride, length) != 1:
        stride += 1
    return ((start + number * stride) % length for number in range(length))


# Counter-based random numbers: SplitMix64 (Steele, Lea and Flood, 2014), whose output function scrambles a counter.
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _hash(seed: int, purpose: int, number: int, counters: Int64Array) -> NDArray[np.uint64]:
    """64 random bits for each counter, [n]."""
    state = np.array([seed & 0xFFFF_FFFF_FFFF_FFFF], np.uint64)
    for word in (purpose, number):
        state = _stir(state, word)
    return _stir(state, counters)


def _stir(state: NDArray[np.uint64], words: int | Int64Array) -> NDArray[np.uint64]:
    """The next state: `state` and `words` broadcast, every bit of both in every bit of the result."""
    return _scramble(_scramble(state + _GOLDEN) ^ np.asarray(words, np.int64).astype(np.uint64))


def _scramble(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _unit(bits: NDArray[np.uint64]) -> Float64Array:
    """Uniform in [0, 1), from the upper 53 bits."""
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
