"""The recipe by NVIDIA DALI: each image is decoded once and cropped once a view; on a GPU it never leaves it."""

import math
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from queue import Full, Queue
from typing import Any, NamedTuple

import numpy as np
import nvidia.dali
import torch
from numpy.typing import NDArray
from torch.utils.dlpack import from_dlpack

from reco_fast.pipelines.augmentations import Recipe, ViewParameters, ViewRecipe, sample_parameters
from reco_fast.pipelines.image_source import DataError, ImageSource
from reco_fast.pipelines.images import BadImage, to_ppm
from reco_fast.pipelines.journal import Journal
from reco_fast.pipelines.loader import Batch, ImageReader, Loader, OnBadImage, Sample
from reco_fast.pipelines.order import Order

__all__ = ["DaliLoader"]

_dali: Any = nvidia.dali  # its type stubs know neither the data types nor conditionals
fn, types, pipeline_def = _dali.fn, _dali.types, _dali.pipeline_def

_READERS = 8  # threads that wait for the file system
_READ_AHEAD = 3  # batches of encoded images
_DECODE_AHEAD = 2  # batches in DALI
_CACHE_BYTES = 512 * 2**20  # of encoded images: a small data set is read and checked once


class DaliLoader(Loader):
    """A thread of ours reads and checks the files of the coming batches and draws their parameters; DALI's threads
    (`workers`, at least one) decode and augment behind the caller's back."""

    def __init__(
        self,
        source: ImageSource,
        recipe: Recipe,
        order: Order,
        device: torch.device,
        dtype: torch.dtype,
        seed: int,
        workers: int,
        on_bad_image: OnBadImage,
        first_step: int,
    ) -> None:
        super().__init__(source)
        self._recipe = recipe
        self._seed = seed
        self._device = device
        self._dtype = dtype
        self._workers = max(1, workers)
        self._order = order
        self._reader = ImageReader(source, on_bad_image, cache_bytes=_CACHE_BYTES)
        self._bad = self._reader.bad
        self._ahead = _ReadAhead(order, self._reader, first_step, self._prepare, self._journal)
        self._again: deque[_Prepared] = deque()  # taken from DALI when a batch before it failed
        self._in_flight: deque[_Prepared] = deque()
        self._pipeline: Any = None

    def __next__(self) -> Batch:
        while not self._ahead.closed:
            if self._pipeline is None:
                self._pipeline = self._build()
            try:
                outputs = self._run()
            except DataError:  # from our own thread
                raise
            except (RuntimeError, ValueError, IndexError) as error:  # what DALI raises for an image it cannot use
                self._recover(error)
                continue
            prepared = self._in_flight.popleft()
            self._journal.end()
            views = tuple(from_dlpack(view.as_tensor()).permute(0, 3, 1, 2) for view in outputs)
            return Batch(views, torch.tensor([sample.place for sample in prepared.samples]))
        raise StopIteration

    def _run(self) -> Any:
        return self._pipeline.run(torch.cuda.current_stream(self._device)) if self._on_gpu else self._pipeline.run()

    @property
    def _on_gpu(self) -> bool:
        return self._device.type == "cuda"

    @property
    def _device_id(self) -> int | None:
        if not self._on_gpu:
            return None
        return torch.cuda.current_device() if self._device.index is None else self._device.index

    def _build(self) -> Any:
        if not self._again:
            self._again.append(self._ahead.take())
        samples = self._again[0].samples
        pipeline = _graph(
            self._feed,
            self._recipe,
            self._on_gpu,
            self._dtype,
            (max(sample.height for sample in samples), max(sample.width for sample in samples)),
            batch_size=self._order.batch_size,
            num_threads=self._workers,
            device_id=self._device_id,
            prefetch_queue_depth=_DECODE_AHEAD,
            exec_dynamic=True,
        )
        pipeline.build()
        return pipeline

    def _feed(self) -> list[Any]:
        """The next batch's inputs, as DALI asks for them."""
        prepared = self._again.popleft() if self._again else self._ahead.take()
        self._in_flight.append(prepared)
        return prepared.inputs

    def _prepare(self, positions: NDArray[np.int64], samples: list[Sample]) -> "_Prepared":
        inputs: list[Any] = [[np.frombuffer(sample.data, np.uint8) for sample in samples]]
        heights = np.array([sample.height for sample in samples], np.int64)
        widths = np.array([sample.width for sample in samples], np.int64)
        for number, view in enumerate(self._recipe.views):
            parameters = sample_parameters(view, number, self._seed, positions, heights, widths)
            inputs.extend(_view_inputs(view, parameters, self._on_gpu).values())
        return _Prepared(positions, samples, inputs)

    def _recover(self, error: Exception) -> None:
        """After a failed batch: give its images to Pillow, which decodes them or says which are bad, and do what was
        under way again in a new pipeline."""
        if not self._in_flight or self._in_flight[0].by_pillow:
            raise error
        self._drop_pipeline()
        failed, *rest = self._in_flight
        self._in_flight.clear()
        mended = self._prepare(failed.positions, [self._by_pillow(sample) for sample in failed.samples])
        self._again.extendleft(reversed([mended._replace(by_pillow=True), *rest]))

    def _by_pillow(self, sample: Sample) -> Sample:
        while True:
            try:
                return Sample(sample.place, *to_ppm(sample.data))
            except BadImage as error:
                self._reader.reject(sample.place, str(error))
                sample = self._reader.read(sample.place)

    def close(self) -> None:
        self._ahead.close()
        self._drop_pipeline()
        self._journal.close()

    def _drop_pipeline(self) -> None:
        if self._pipeline is not None:
            self._pipeline.__del__()  # there is no close(); its reference cycles would keep its threads until some gc
            self._pipeline = None


class _Prepared(NamedTuple):
    positions: NDArray[np.int64]
    samples: list[Sample]
    inputs: list[Any]  # of the graph, in its order
    by_pillow: bool = False


class _ReadAhead:
    """Reads and prepares the batches of an order, some ahead, in a thread."""

    def __init__(
        self,
        order: Order,
        reader: ImageReader,
        first_step: int,
        prepare: Callable[[NDArray[np.int64], list[Sample]], _Prepared],
        journal: Journal,
    ) -> None:
        self._queue: Queue[_Prepared | BaseException] = Queue(_READ_AHEAD)
        self._closing = threading.Event()
        self._thread = threading.Thread(
            target=self._read,
            args=(order, reader, first_step, prepare, journal),
            name="reco_fast read-ahead",
            daemon=True,
        )
        self._thread.start()

    @property
    def closed(self) -> bool:
        return self._closing.is_set()

    def take(self) -> _Prepared:
        """The next batch. Raises StopIteration after the last, or what reading it raised."""
        item = self._queue.get()
        if isinstance(item, BaseException):
            self._put(item)  # for whoever asks again
            raise item
        return item

    def close(self) -> None:
        self._closing.set()
        self._thread.join()

    def _read(
        self,
        order: Order,
        reader: ImageReader,
        step: int,
        prepare: Callable[[NDArray[np.int64], list[Sample]], _Prepared],
        journal: Journal,
    ) -> None:
        try:
            with ThreadPoolExecutor(_READERS, thread_name_prefix="reco_fast reader") as pool:
                while not self.closed and (order.steps is None or step < order.steps):
                    positions, indices = order.batch(step)
                    journal.begin(indices.tolist())
                    chunks = pool.map(lambda part: [reader.read(i) for i in part.tolist()], _split(indices))
                    self._put(prepare(positions, [sample for chunk in chunks for sample in chunk]))
                    step += 1
            self._put(StopIteration())
        except BaseException as error:
            self._put(error)

    def _put(self, item: _Prepared | BaseException) -> None:
        while not self.closed:
            try:
                return self._queue.put(item, timeout=0.1)
            except Full:
                continue


def _split(indices: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    return np.array_split(indices, min(_READERS, len(indices)))


def _view_inputs(view: ViewRecipe, p: ViewParameters, on_gpu: bool) -> dict[str, Any]:
    """What the graph needs of the parameters, by name: n rows each. Which names there are depends on the recipe and
    the device alone."""
    inputs: dict[str, Any] = {
        "start": np.stack([p.top, p.left], axis=1).astype(np.int32),
        "shape": np.stack([p.height, p.width], axis=1).astype(np.int32),
    }
    if view.jitter_probability:
        inputs |= {
            "jitter": p.jitter,
            "brightness": p.brightness.astype(np.float32),
            "contrast": p.contrast.astype(np.float32),
            "saturation": p.saturation.astype(np.float32),
            "hue": (360 * p.hue).astype(np.float32),
        }
    if view.grayscale_probability:
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


_TYPES = {"bool": types.BOOL, "int32": types.INT32, "float32": types.FLOAT}


@pipeline_def(enable_conditionals=True)
def _graph(
    feed: Callable[[], list[Any]], recipe: Recipe, on_gpu: bool, dtype: torch.dtype, largest: tuple[int, int]
) -> tuple[Any, ...]:
    """One decode, one crop a view. Inputs in the order of `DaliLoader._feed`. `largest`: height and width for which
    the GPU's decoders reserve memory; for a larger image they get more."""
    examples = [_view_inputs(view, sample_parameters(view, 0, 0, [0], [1], [1]), on_gpu) for view in recipe.views]
    rows = [np.asarray(value[0]) for example in examples for value in example.values()]
    encoded, *values = fn.external_source(
        source=feed,
        num_outputs=1 + len(rows),
        dtype=[types.UINT8, *(_TYPES[row.dtype.name] for row in rows)],
        ndim=[1, *(row.ndim for row in rows)],
    )
    images = fn.decoders.image(
        encoded,
        device="mixed" if on_gpu else "cpu",
        output_type=types.RGB,
        jpeg_fancy_upsampling=True,  # as the CPU's decoder does
        **(_decoder_buffers(*largest) if on_gpu else {}),
    )
    inputs = iter(values)
    output = types.FLOAT16 if dtype == torch.float16 else types.FLOAT
    return tuple(
        _view(images, {name: next(inputs) for name in example}, recipe, on_gpu, output) for example in examples
    )


def _decoder_buffers(height: int, width: int) -> dict[str, Any]:
    """For `decoders.image` with device "mixed": the share of its hardware engine, where the GPU has one, and buffers
    of the data's size; the defaults are 16 MiB on the GPU and two of 8 MiB pinned for each thread."""
    coefficients = 6 * height * width  # 16 bits each, of three planes that are not subsampled
    return {
        "hw_decoder_load": 0.65,
        "preallocate_height_hint": height,
        "preallocate_width_hint": width,
        "device_memory_padding": coefficients,
        "host_memory_padding": coefficients,
    }


def _view(images: Any, p: dict[str, Any], recipe: Recipe, on_gpu: bool, output: Any) -> Any:
    # A slice and then a resize, because the resize's own region of interest lets pixels from outside bleed in.
    view = fn.slice(images, start=p["start"], shape=p["shape"], axes=(0, 1))
    view = fn.resize(view, size=[recipe.size, recipe.size], antialias=True)
    if p.get("jitter"):
        view = brightness(view, p["brightness"])
        view = contrast_on_gpu(view, p["contrast"].gpu()) if on_gpu else contrast(view, p["contrast"])
        view = saturation_and_hue(view, p["saturation"], p["hue"])
    if p.get("grayscale"):
        view = fn.color_space_conversion(_grey(view), image_type=types.GRAY, output_type=types.RGB)
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
    center = fn.reductions.mean(_grey(view))
    return fn.brightness_contrast(view, contrast=factor, contrast_center=center, brightness_shift=-_HALF / 255)


def contrast_on_gpu(view: Any, factor: Any) -> Any:
    """The same by arithmetic: there the mean is on the GPU, and operators take their parameters from the CPU."""
    center = fn.reductions.mean(_grey(view))
    return fn.cast(center + factor * (view - center) - _HALF, dtype=types.UINT8)


def saturation_and_hue(view: Any, saturation: Any, degrees: Any) -> Any:
    """`color_twist` takes contrast about 128 and then brightness: b·(c·x + 128·(1 - c)) = x - 0.5 for these two."""
    shift = 1 - _HALF / 128
    return fn.color_twist(view, saturation=saturation, hue=degrees, contrast=1 / shift, brightness=shift)


def blur(view: Any, window: Any) -> Any:
    """Rows, then columns: on a CPU seven times faster than `gaussian_blur`, which the GPU uses."""
    return fn.filter(fn.filter(view, window), fn.reshape(window, src_dims=[1, 0]))


def _grey(view: Any) -> Any:
    return fn.color_space_conversion(view, image_type=types.RGB, output_type=types.GRAY)
