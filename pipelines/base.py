"""What every loader is, and how it gets past bad images. `dali` and `torch_loader` implement it."""

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from reco_fast.errors import DataError
from reco_fast.pipelines.bad_images.journal import Journal
from reco_fast.pipelines.images import BadImage, ppm_header, to_plain
from reco_fast.pipelines.sources.image_source import ImageSource

LoaderKind = Literal["auto", "dali", "torch"]
OnBadImage = Literal["skip", "raise"]


class Batch(NamedTuple):
    """`views`: one tensor [n, 3, S, S] for each view of the recipe, channels-last in memory, normalised, on the
    loader's device; float32, or float16 on a GPU that computes in less. `indices`: [n] int64 on the CPU, places in the
    source of the images that are in the batch (a bad image is replaced by the next good one)."""

    views: tuple[Tensor, ...]
    indices: Tensor


class Loader(ABC):
    """An iterator of `Batch`: without end in a training order, one pass in an evaluation order.

    Use it as a context manager, or call `close()`: either ends its threads and processes. It also raises DataError.
    """

    def __init__(self, source: ImageSource) -> None:
        self._source = source
        self._bad: dict[int, str] = source.known_bad.copy()
        self._journal = Journal(source.journal)

    @property
    def bad_images(self) -> dict[str, str]:
        """Name → reason, of every image and folder that could not be used so far."""
        bad = self._bad.copy()  # a thread may be adding to it
        return self._source.unreadable | {self._source.names[index]: reason for index, reason in bad.items()}

    def __iter__(self) -> Iterator[Batch]:
        return self

    @abstractmethod
    def __next__(self) -> Batch: ...

    @abstractmethod
    def close(self) -> None:
        """End all threads and processes; more than once is fine."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


class Sample(NamedTuple):
    """An image as read: `data` is an ordinary JPEG or a PPM, `height` and `width` are of the upright image."""

    place: int
    data: bytes
    height: int
    width: int

    @property
    def decoded(self) -> bool:
        return self.data.startswith(b"P6")


class Decoded(NamedTuple):
    """Images as kept: `places` in the source, [n] int64, and `pixels`, [n, H, W, 3] uint8."""

    places: NDArray[np.int64]
    pixels: NDArray[np.uint8]


class ImageReader:
    """Reads images and steps past bad ones: in place of a bad image comes the next good one of the source.

    `bad`: index → reason. With `cache_bytes`, a source that fits is read and checked only once, and small images can be
    kept as what was decoded from them: those of one size in one array, from which batches are taken, any others as
    PPMs. Much of the time that small images take goes to their headers and tables.
    """

    SMALL = 64 * 64  # pixels

    def __init__(self, source: ImageSource, on_bad_image: OnBadImage, *, cache_bytes: int = 0) -> None:
        self._source = source
        self._raise = on_bad_image == "raise"
        self.bad: dict[int, str] = source.known_bad.copy()
        self._cache: dict[int, Sample] = {}
        self._cache_bytes = self._cache_left = cache_bytes
        self._lock = threading.Lock()
        self._pixels: NDArray[np.uint8] | None = None  # [len(source), H, W, 3]
        self._kept = np.zeros(len(source), bool)  # which of its rows are filled

    def read(self, index: int) -> Sample:
        """The image at `index`, or the next good one after it.

        Raises:
            DataError: no image is good; or one is bad and `on_bad_image` is "raise".
        """
        count = len(self._source)
        for candidate in range(index, index + count):
            place = candidate % count
            cached = self._cache.get(place)  # first: `keep` removes it there after it has put it into the array
            if cached is not None:
                return cached
            if self._kept[place]:
                return self._as_sample(place)
            if place in self.bad:
                continue
            try:
                sample = Sample(place, *to_plain(self._source.read(place)))
            except BadImage as error:
                self.reject(place, str(error))
            except OSError as error:
                self.reject(place, error.strerror or type(error).__name__)
            else:
                self._remember(sample)
                return sample
        place, reason = next(iter(self.bad.items()))
        raise DataError(f"no image can be used, e.g. {self._source.names[place]}: {reason}")

    def reject(self, index: int, reason: str) -> None:
        """Record a bad image. Raises DataError where that is asked for."""
        if self._raise:
            raise DataError(f"{self._source.names[index]}: {reason}")
        self._cache.pop(index, None)
        self.bad[index] = reason

    def keeps_decoded(self, height: int, width: int) -> bool:
        """Whether images of this size are small, and as many as the source has would fit."""
        pixels = height * width
        return pixels <= self.SMALL and 3 * pixels * len(self._source) <= self._cache_bytes

    def keep(self, sample: Sample, pixels: NDArray[np.uint8]) -> None:
        """In place of a cached JPEG what was decoded from it, [height, width, 3], if it is small."""
        if sample.place not in self._cache or not self.keeps_decoded(sample.height, sample.width):
            return
        if self._pixels is None:
            self._pixels = np.empty((len(self._source), *pixels.shape), np.uint8)  # memory is taken row by row
        if self._pixels.shape[1:] != pixels.shape:
            self._remember(sample._replace(data=ppm_header(sample.height, sample.width) + pixels.tobytes()))
            return
        with self._lock:
            left = self._cache_left + len(sample.data) - pixels.nbytes
            if left >= 0:
                self._pixels[sample.place] = pixels
                self._kept[sample.place] = True  # from here on others read the row
                del self._cache[sample.place]
                self._cache_left = left

    def decoded(self, indices: NDArray[np.int64]) -> Decoded | None:
        """The images at `indices`, [n] int64, each bad one replaced as `read` does; None until all good ones of the
        source are kept in the array, so that no batch after the first is None again."""
        if self._pixels is None or np.count_nonzero(self._kept) + len(self.bad) < len(self._kept):
            return None
        places = indices.copy()
        for row in np.flatnonzero(~self._kept[indices]).tolist():
            places[row] = self.read(int(indices[row])).place
        return Decoded(places, self._pixels.take(places, axis=0))

    def _as_sample(self, place: int) -> Sample:
        assert self._pixels is not None
        height, width = self._pixels.shape[1:3]
        return Sample(place, ppm_header(height, width) + self._pixels[place].tobytes(), height, width)

    def _remember(self, sample: Sample) -> None:
        with self._lock:
            before = self._cache.get(sample.place)
            left = self._cache_left - len(sample.data) + (len(before.data) if before else 0)
            if left > 0:
                self._cache[sample.place], self._cache_left = sample, left
