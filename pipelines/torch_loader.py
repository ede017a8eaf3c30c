"""The recipe by Pillow and torchvision, in worker processes: slower than DALI, and runs wherever PyTorch does."""

import gc
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import functional

from reco_fast.errors import DataError
from reco_fast.pipelines.augmentations import Recipe, ViewParameters, sample_parameters
from reco_fast.pipelines.bad_images.journal import Journal
from reco_fast.pipelines.base import Batch, ImageReader, Loader, OnBadImage, Sample
from reco_fast.pipelines.images import BadImage, decode_image
from reco_fast.pipelines.order import Order
from reco_fast.pipelines.sources.image_source import ImageSource


class TorchLoader(Loader):
    """Whole batches made by `workers` processes (0: by the caller), sent as bytes and normalised on the device.
    The batches do not depend on the number of workers."""

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
        self._device = device
        self._dtype = dtype
        mean, std = torch.tensor(recipe.mean), torch.tensor(recipe.std)
        self._scale = (1 / (255 * std)).repeat(recipe.size).to(device)  # of a row of pixels, [3·S]
        self._shift = (-mean / std).repeat(recipe.size).to(device)
        steps = count(first_step) if order.steps is None else range(first_step, order.steps)
        batches = DataLoader(
            _Steps(source, recipe, order, seed, on_bad_image, self._journal),
            batch_size=None,  # an item of the data set is a batch
            sampler=steps,
            num_workers=workers,
            pin_memory=device.type == "cuda",
            prefetch_factor=2 if workers else None,
            worker_init_fn=_stand_apart,
        )
        with _own_sigchld():
            self._batches: Iterator[_Pixels] | None = iter(batches)

        self._ahead = OneAhead(self._make, torch.cuda.Stream(device)) if device.type == "cuda" else None

    def __next__(self) -> Batch:
        if self._batches is None:
            raise StopIteration
        return self._make() if self._ahead is None else next(self._ahead)

    def _make(self) -> Batch:
        assert self._batches is not None
        try:
            pixels = next(self._batches)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            self._journal = Journal(None)  # what the worker had under way stays noted
            raise DataError(
                "a process of the loader was ended, perhaps by an image that it was decoding; the same command goes on "
                f"and leaves out an image that does so ({str(error).splitlines()[0]})"
            ) from None
        if pixels.error:
            raise DataError(pixels.error)
        self._bad |= pixels.bad
        return Batch(tuple(self._normalize(view) for view in pixels.views), pixels.indices)

    def _normalize(self, view: Tensor) -> Tensor:
        """[n, S, S, 3] bytes to [n, 3, S, S] channels-last floats."""
        n, size = view.shape[:2]
        rows = view.to(self._device, non_blocking=True).view(n * size, size * 3)
        normal = torch.addcmul(self._shift, rows.float(), self._scale).to(self._dtype)
        return normal.view(n, size, size, 3).permute(0, 3, 1, 2)

    def close(self) -> None:
        self._batches = None  # the DataLoader's iterator ends its workers as it goes
        self._journal.close()


class OneAhead(Iterator[Batch]):
    """Makes each batch one call early and on a stream of its own: its copy to the GPU overlaps the step before."""

    def __init__(self, make: Callable[[], Batch], stream: torch.cuda.Stream) -> None:
        self._make = make
        self._stream = stream
        self._next: Batch | Exception | None = None

    def __next__(self) -> Batch:
        batch = self._next or self._start()
        if isinstance(batch, Exception):
            raise batch
        current = torch.cuda.current_stream()
        current.wait_stream(self._stream)  # before the next one is put on it
        for view in batch.views:
            view.record_stream(current)  # or the allocator would give the memory away while a step reads it
        self._next = self._start()
        return batch

    def _start(self) -> Batch | Exception:
        try:
            with torch.cuda.stream(self._stream):
                return self._make()
        except (StopIteration, DataError) as error:  # due when this batch is
            return error


@contextmanager
def _own_sigchld() -> Iterator[None]:
    """Keeps what a SIGCHLD does. PyTorch's handler raises wherever the main thread is when a worker dies: outside of
    `next`, or in a destructor, where it is printed and lost. Without it `next` sees a dead worker in five seconds."""
    before = signal.getsignal(signal.SIGCHLD)
    yield
    if before is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, before)


def _stand_apart(_: int) -> None:
    """A forked worker inherits the garbage of its parent; to collect a DALI pipeline there would hang. And what is sent
    to the parent's process group (Ctrl-C, torchrun's SIGTERM) is for the parent, which still needs batches until it
    has saved. Slurm's SIGUSR1 and a closed terminal's SIGHUP may reach each process of a job."""
    gc.freeze()
    os.setpgid(0, 0)
    for number in (signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


class _Pixels(NamedTuple):
    views: tuple[Tensor, ...]
    indices: Tensor
    bad: dict[int, str]
    error: str  # a DataError's text; raised here it would arrive wrapped in the worker's traceback


class _Steps(Dataset[_Pixels]):
    """Batch `step`: each view [n, S, S, 3] uint8."""

    def __init__(
        self,
        source: ImageSource,
        recipe: Recipe,
        order: Order,
        seed: int,
        on_bad_image: OnBadImage,
        journal: Journal,
    ) -> None:
        self._reader = ImageReader(source, on_bad_image)
        self._journal = journal
        self._recipe = recipe
        self._order = order
        self._seed = seed

    def __getitem__(self, step: int) -> _Pixels:
        positions, wanted = self._order.batch(step)
        self._journal.begin(wanted.tolist())
        places = np.empty_like(wanted)
        size = self._recipe.size
        views = [np.empty((len(wanted), size, size, 3), np.uint8) for _ in self._recipe.views]
        try:
            samples = [self._reader.read(index) for index in wanted.tolist()]
            parameters = self._parameters(positions, samples)
            for row, sample in enumerate(samples):
                drawn, at = parameters, row
                while (image := self._decode(sample)) is None:
                    sample = self._reader.read(sample.place)
                    drawn, at = self._parameters(positions[row : row + 1], [sample]), 0
                places[row] = sample.place
                for view, p in zip(views, drawn, strict=True):
                    view[row] = render(image, p, at, size)
        except DataError as error:
            return _Pixels((), torch.empty(0), {}, str(error))
        self._journal.end()
        return _Pixels(tuple(map(torch.from_numpy, views)), torch.from_numpy(places), self._reader.bad.copy(), "")

    def _parameters(self, positions: NDArray[np.int64], samples: list[Sample]) -> list[ViewParameters]:
        heights, widths = [sample.height for sample in samples], [sample.width for sample in samples]
        return [
            sample_parameters(view, number, self._seed, positions, heights, widths)
            for number, view in enumerate(self._recipe.views)
        ]

    def _decode(self, sample: Sample) -> Image.Image | None:
        try:
            return decode_image(sample.data)
        except BadImage as error:
            self._reader.reject(sample.place, str(error))
            return None


def render(image: Image.Image, parameters: ViewParameters, row: int, size: int) -> NDArray[np.uint8]:
    """One view, [size, size, 3] uint8, of an RGB image, by row `row` of the parameters."""
    p = parameters
    top, left, height, width = int(p.top[row]), int(p.left[row]), int(p.height[row]), int(p.width[row])
    view = image.crop((left, top, left + width, top + height)).resize((size, size), Image.Resampling.BILINEAR)
    if p.jitter[row]:
        view = ImageEnhance.Brightness(view).enhance(float(p.brightness[row]))
        view = ImageEnhance.Contrast(view).enhance(float(p.contrast[row]))
        view = ImageEnhance.Color(view).enhance(float(p.saturation[row]))
        if p.hue[row]:
            view = functional.adjust_hue(view, float(p.hue[row]))
    if p.grayscale[row]:
        view = view.convert("L").convert("RGB")
    if p.blur_sigma[row]:
        view = view.filter(ImageFilter.GaussianBlur(float(p.blur_sigma[row])))
    if p.flip[row]:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(view)
