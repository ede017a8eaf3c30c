"""What every loader is, and how it gets past bad images. `dali` and `torch_loader` implement it."""

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from reco_fast.errors import DataError
from reco_fast.pipelines.augmentations import stand_ins
from reco_fast.pipelines.bad_images.journal import Journal
from reco_fast.pipelines.images import BadImage, ppm_header, to_plain
from reco_fast.pipelines.order import Order
from reco_fast.pipelines.sources.image_source import ImageSource

LoaderKind = Literal["auto", "dali", "torch"]
OnBadImage = Literal["skip", "raise"]
LONGEST_WAIT = 600.0  # seconds for a batch, where a file system hangs or a decoder does not end
POLL = 5.0  # seconds of it at a time: a process that was stopped for longer than all of it goes on


class Batch(NamedTuple):
    """`views`: one tensor [n, 3, S, S] for each view of the recipe, each with an S of its own (`Recipe.sizes`),
    channels-last in memory, normalised, on the loader's device; float32, or float16 on a GPU that computes in less.
    `indices`: [n] int64 on the CPU, places in the source of the images that are in the batch: in training another image
    stands in for a bad one, and an evaluation leaves it out, so that n may be less than it was asked for, even 0."""

    views: tuple[Tensor, ...]
    indices: Tensor


class Loader(ABC):
    """An iterator of `Batch`: without end in a training order, one pass in an evaluation order.

    Use it as a context manager, or call `close()`: either ends its threads and processes. It also raises DataError.
    """

    def __init__(self, source: ImageSource, order: Order, first_step: int, after: "Loader | None" = None) -> None:
        self._source = source
        self._supply = source.supply(order, first_step)
        self._bad: dict[int, str] = source.known_bad | ({} if after is None else after._bad)
        self._journal = Journal(source.journal)

    @property
    def bad_images(self) -> dict[str, str]:
        """Name → reason, of every image and folder that could not be used so far."""
        bad = self._bad.copy()  # a thread may be adding to it
        return self._source.unreadable | self._source.named(bad)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = self._next()
        self._supply.advance()
        return batch

    @abstractmethod
    def _next(self) -> Batch: ...

    def close(self) -> None:
        """End all threads and processes; more than once is fine."""
        self._supply.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


def waited_too_long() -> DataError:
    """The error that no batch came."""
    return DataError(
        f"no batch came within {LONGEST_WAIT / 60:g} minutes: the file system does not answer, or an image is never "
        "decoded to its end; the same command goes on and leaves out an image that does so"
    )


def none_good(bad: Mapping[str, str]) -> DataError:
    """The error that all images are bad, by name → reason."""
    name, reason = next(iter(bad.items()))
    return DataError(f"no image can be used, e.g. {name}: {reason}")


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
    """Reads images and finds a good one in place of each bad one, drawn by `seed`; without a seed it finds none.

    `bad`: index → reason. `journal` is told of images that stand in for others before they are read. With
    `cache_bytes`, a source that fits is read and checked only once, and small images can be kept as what was decoded
    from them: those of one size in one array, from which batches are taken, any others as PPMs. Much of the time that
    small images take goes to their headers and tables.
    """

    SMALL = 64 * 64  # pixels

    def __init__(
        self,
        source: ImageSource,
        on_bad_image: OnBadImage,
        *,
        seed: int | None = None,
        journal: Journal | None = None,
        cache_bytes: int = 0,
    ) -> None:
        self._source = source
        self.at_once = source.at_once
        self._raise = on_bad_image == "raise"
        self._seed = seed
        self._journal = journal or Journal(None)
        self.bad: dict[int, str] = source.known_bad.copy()
        self._cache: dict[int, Sample] = {}
        self._cache_bytes = self._cache_left = cache_bytes
        self._lock = threading.Lock()
        self._pixels: NDArray[np.uint8] | None = None  # [len(source), H, W, 3]
        self._kept = np.zeros(len(source), bool)  # which of its rows are filled

    def handed_on(self, journal: Journal) -> Self:
        """To another loader, with all that it has read."""
        self._journal = journal
        return self

    def read(self, position: int, index: int) -> Sample | None:
        """The image at `index`, or the one that stands in for it at this position of the stream; None where it is bad
        and none does.

        Raises:
            DataError: no image is good to stand in; or one is bad and `on_bad_image` is "raise".
        """
        sample = self._good(index)
        if sample is not None or self._seed is None:
            return sample
        for place in stand_ins(len(self._source), self._seed, position):
            if place not in self.bad:
                self._journal.add(place)
                sample = self._good(place)
                if sample is not None:
                    return sample
        raise none_good({self._source.names[place]: reason for place, reason in self.bad.items()})

    def _good(self, index: int) -> Sample | None:
        """The image at `index` unless it is bad."""
        cached = self._cache.get(index)  # first: `keep` removes it there after it has put it into the array
        if cached is not None:
            return cached
        if self._kept[index]:
            return self._as_sample(index)
        if index in self.bad:
            return None
        try:
            note = partial(self._source.notices.add, index)
            sample = Sample(index, *to_plain(self._source.read(index), self._source.decoding, note))
        except BadImage as error:
            self.reject(index, str(error))
        except OSError as error:
            self.reject(index, error.strerror or type(error).__name__)
        else:
            self._remember(sample)
            return sample
        return None

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

    def decoded(self, positions: NDArray[np.int64], indices: NDArray[np.int64]) -> Decoded | None:
        """The images at `indices`, [n] int64, of a stream in which each has a place, with what stands in for bad ones;
        None until all good ones of the source are kept in the array, so that no batch after the first is None again.
        """
        if self._pixels is None or np.count_nonzero(self._kept) + len(self.bad) < len(self._kept):
            return None
        places = indices.copy()
        for row in np.flatnonzero(~self._kept[indices]).tolist():
            sample = self.read(int(positions[row]), int(indices[row]))
            assert sample is not None  # only training keeps images
            places[row] = sample.place
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
