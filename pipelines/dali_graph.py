"""What DALI runs: decode once, then crop, jitter, blur and normalise each view, with parameters drawn outside."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import nvidia.dali
import nvidia.dali.tensors
import torch
from numpy.typing import NDArray

from reco_fast.pipelines.augmentations import Recipe, ViewParameters, ViewRecipe, sample_parameters

_dali: Any = nvidia.dali  # its type stubs know neither the data types nor conditionals
fn, types, pipeline_def = _dali.fn, _dali.types, _dali.pipeline_def


def view_inputs(view: ViewRecipe, p: ViewParameters, on_gpu: bool) -> dict[str, Any]:
    """What the graph needs of the parameters, by name: n rows each. Which names there are depends on the recipe and
    the device alone."""
    inputs: dict[str, Any] = {
        "start": np.stack([p.top, p.left], axis=1).astype(np.int32),
        "shape": np.stack([p.height, p.width], axis=1).astype(np.int32),
    }
    if view.jitter_probability:
        if not on_gpu:
            inputs["jitter"] = p.jitter
        inputs |= {
            "brightness": p.brightness.astype(np.float32),
            "contrast": p.contrast.astype(np.float32),
            "saturation": p.saturation.astype(np.float32),
            "hue": (360 * p.hue).astype(np.float32),
        }
    if view.grayscale_probability:
        if on_gpu:
            inputs["colour"] = 1 - p.grayscale.astype(np.float32)
        else:
            inputs["grayscale"] = p.grayscale
    if view.blur_probability:
        inputs["blur"] = p.blur_sigma > 0
        if on_gpu:
            inputs["sigma"] = np.maximum(p.blur_sigma, 0.01).astype(np.float32)  # 0 would mean another thing
        else:
            inputs["window"] = [gaussian_window(sigma) for sigma in p.blur_sigma.tolist()]
    if view.flip_probability:
        inputs["flip"] = p.flip.astype(np.int32)
    return inputs


def gaussian_window(sigma: float) -> NDArray[np.float32]:
    """[1, 2·⌈3σ⌉ + 1] weights that add up to 1."""
    reach = math.ceil(3 * sigma)
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / max(sigma, 1e-6)) ** 2)
    return (weights / weights.sum()).astype(np.float32)[None]


def to_dali(values: Any) -> Any:
    """An input of n rows, an array or a list of arrays, as what DALI would turn it into in the thread that trains.
    Images, [n, H, W, 3], get their layout."""
    tensors = _dali.tensors
    if isinstance(values, list):
        return [tensors.TensorCPU(value) for value in values]
    return tensors.TensorListCPU(values, layout="HWC" if values.ndim == 4 else "")


_TYPES = {"bool": types.BOOL, "int32": types.INT32, "float32": types.FLOAT}


@pipeline_def(enable_conditionals=True)
def graph(
    feed: Callable[[], list[Any]],
    recipe: Recipe,
    on_gpu: bool,
    dtype: torch.dtype,
    largest: tuple[int, int] | None,
    with_decoded: bool,
) -> tuple[Any, ...]:
    """One decode, one crop a view. Inputs in the order of `DaliLoader._feed`. `largest`: height and width for which
    the GPU's decoders reserve memory, more for a larger image; None where the images come decoded. Outputs: the views,
    and after them the decoded images on the CPU if they are asked for."""
    examples = [view_inputs(view, sample_parameters(view, 0, 0, [0], [1], [1]), on_gpu) for view in recipe.views]
    rows = [np.asarray(value[0]) for example in examples for value in example.values()]
    images, *values = fn.external_source(
        source=feed,
        num_outputs=1 + len(rows),
        dtype=[types.UINT8, *(_TYPES[row.dtype.name] for row in rows)],
        ndim=[1 if largest else 3, *(row.ndim for row in rows)],
    )
    decoded = images
    by_gpu = on_gpu and largest is not None and math.prod(largest) > _CPU_DECODES
    if largest:
        decoded = fn.decoders.image(
            images,
            device="mixed" if by_gpu else "cpu",
            output_type=types.RGB,
            jpeg_fancy_upsampling=True,  # as the CPU's decoder does
            **(_decoder_buffers(*largest) if by_gpu else {}),
        )
    images = decoded.gpu() if on_gpu and not by_gpu else decoded
    inputs, sizes = iter(values), iter(recipe.sizes)
    output = types.FLOAT16 if dtype == torch.float16 else types.FLOAT
    views = [
        _view(images, {name: next(inputs) for name in example}, next(sizes), recipe, on_gpu, output)
        for example in examples
    ]
    return (*views, decoded.cpu() if by_gpu else decoded) if with_decoded else tuple(views)


_CPU_DECODES = 128**2  # pixels of an image: a GPU's decoder does no more small ones a second than large ones
_MOST_RESERVED = 1_500_000  # pixels; of a camera's 12 million, a batch of 256 would reserve 6 GB


def _decoder_buffers(height: int, width: int) -> dict[str, Any]:
    """For `decoders.image` with device "mixed": the share of its hardware engine, where the GPU has one, and buffers
    of the data's size; the defaults are 16 MiB on the GPU and two of 8 MiB pinned for each thread."""
    shrink = min(1.0, math.sqrt(_MOST_RESERVED / (height * width)))
    height = max(1, int(shrink * height))
    width = max(1, min(int(shrink * width), _MOST_RESERVED // height))
    coefficients = 6 * height * width  # 16 bits each, of three planes that are not subsampled
    return {
        "hw_decoder_load": 0.65,
        "preallocate_height_hint": height,
        "preallocate_width_hint": width,
        "device_memory_padding": coefficients,
        "host_memory_padding": coefficients,
    }


def _view(images: Any, p: dict[str, Any], size: int, recipe: Recipe, on_gpu: bool, output: Any) -> Any:
    # A slice and then a resize, because the resize's own region of interest lets pixels from outside bleed in.
    view = fn.slice(images, start=p["start"], shape=p["shape"], axes=(0, 1))
    view = fn.resize(view, size=[size, size], antialias=True)
    if "contrast" in p:
        if on_gpu:  # of all images, also with factors of 1, which change nothing: to pick some would take longer
            view = saturation_and_hue(
                contrast_on_gpu(brightness(view, p["brightness"]), p["contrast"].gpu()), p["saturation"], p["hue"]
            )
        elif p["jitter"]:
            view = contrast(brightness(view, p["brightness"]), p["contrast"])
            view = saturation_and_hue(view, p["saturation"], p["hue"])
    if "colour" in p:
        view = colour_left(view, p["colour"])
    elif p.get("grayscale"):
        view = grey(view)
    if p.get("blur"):
        if on_gpu:
            view = fn.gaussian_blur(view, sigma=p["sigma"])
        else:
            view = blur(view, p["window"])
    return fn.crop_mirror_normalize(
        view,
        mirror=p.get("flip", 0),
        dtype=output,
        output_layout="HWC",
        mean=[255 * value for value in recipe.mean],
        std=[255 * value for value in recipe.std],
    )


# The colour operations on 8-bit images. Pillow and torchvision cut fractions off where DALI rounds to the nearest:
# taking off a half before rounding gives their result instead of one that is half a level brighter.
_HALF = 0.498  # not quite, or whole numbers would be ties


def brightness(view: Any, factor: Any) -> Any:
    return fn.brightness(view, brightness=factor, brightness_shift=-_HALF / 255)


def contrast(view: Any, factor: Any) -> Any:
    """About the mean of the grey image; DALI's own centre is half the range."""
    center = fn.reductions.mean(_luma(view))
    return fn.brightness_contrast(view, contrast=factor, contrast_center=center, brightness_shift=-_HALF / 255)


def contrast_on_gpu(view: Any, factor: Any) -> Any:
    """The same by arithmetic: there the mean is on the GPU, and operators take their parameters from the CPU."""
    center = fn.reductions.mean(colour_left(view, 0.0))
    return fn.cast(center + factor * (view - center) - _HALF, dtype=types.UINT8)


def saturation_and_hue(view: Any, saturation: Any, degrees: Any) -> Any:
    """`color_twist` takes contrast about 128 and then brightness: b·(c·x + 128·(1 - c)) = x - 0.5 for these two."""
    shift = 1 - _HALF / 128
    return fn.color_twist(view, saturation=saturation, hue=degrees, contrast=1 / shift, brightness=shift)


def blur(view: Any, window: Any) -> Any:
    """Rows, then columns: on a CPU seven times faster than `gaussian_blur`, which the GPU uses."""
    return fn.filter(fn.filter(view, window), fn.reshape(window, src_dims=[1, 0]))


def grey(view: Any) -> Any:
    return fn.color_space_conversion(_luma(view), image_type=types.GRAY, output_type=types.RGB)


def colour_left(view: Any, share: Any) -> Any:
    """0: as `grey`, to one level at most; 1: as it is. For the GPU, where `color_space_conversion` launches a kernel
    for each image."""
    return fn.saturation(view, saturation=share)


def _luma(view: Any) -> Any:
    return fn.color_space_conversion(view, image_type=types.RGB, output_type=types.GRAY)
