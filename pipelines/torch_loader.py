"""The recipe by Pillow and torchvision, in worker processes: slower than DALI, and runs wherever PyTorch does."""

import gc
import math
import mmap
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate, count, islice, pairwise
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
from reco_fast.pipelines.base import LONGEST_WAIT, POLL, Batch, ImageReader, Loader, OnBadImage, Sample, waited_too_long
from reco_fast.pipelines.images import BadImage, decode_image
from reco_fast.pipelines.order import Order
from reco_fast.pipelines.pixels import Notices
from reco_fast.pipelines.read_ahead import read_side_by_side
from reco_fast.pipelines.sources.image_source import ImageSource

_AHEAD = 2  # batches that each worker has under way


class TorchLoader(Loader):
    """Whole batches made by `workers` processes (0: by the caller), handed over as bytes in memory that they share, and
    normalised on the device. The batches do not depend on the number of workers."""

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
        after: Loader | None = None,
    ) -> None:
        super().__init__(source, order, first_step, after)
        self._device = device
        self._dtype = dtype
        mean, std = torch.tensor(recipe.mean), torch.tensor(recipe.std)
        longest = max(recipe.sizes)  # a shorter row is the beginning of it
        self._scale = (1 / (255 * std)).repeat(longest).to(device)  # of a row of pixels, [3·S]
        self._shift = (-mean / std).repeat(longest).to(device)
        steps = count(first_step) if order.steps is None else range(first_step, order.steps)
        trains = order.steps is None
        reader = ImageReader(source, on_bad_image, seed=seed if trains else None, journal=self._journal)
        if workers:
            _check_queues(workers)
        # One more than are under way: of the batch that the caller has got nothing is read any more after `_make`.
        self._slots = _Slots(_AHEAD * workers + 1, order.batch_size, recipe)
        batches = DataLoader(
            _Steps(reader, source.notices, recipe, order, seed, self._journal, self._slots),
            batch_size=None,  # an item of the data set is a batch
            sampler=steps,
            num_workers=workers,
            prefetch_factor=_AHEAD if workers else None,
            worker_init_fn=_stand_apart,
            timeout=POLL if workers else 0,
            multiprocessing_context="fork" if workers else None,  # which hands on the memory
        )
        others = multiprocessing.active_children()
        with _own_sigchld():
            self._batches: Iterator[_Made] | None = iter(batches)
        self._workers = [child for child in multiprocessing.active_children() if child not in others]
        self._keeps_notes = False
        self._ahead = OneAhead(self._make, torch.cuda.Stream(device)) if device.type == "cuda" else None

    def _next(self) -> Batch:
        if self._batches is None:
            raise StopIteration
        return self._make() if self._ahead is None else next(self._ahead)

    def _make(self) -> Batch:
        made = self._from_worker()
        if made.error:
            raise DataError(made.error)
        self._bad |= made.bad
        self._source.notices.join(made.notices)
        views = [view[made.slot, : made.images] for view in self._slots.views]
        places = torch.from_numpy(self._slots.places[made.slot, : made.images].copy())
        return Batch(tuple(self._normalize(torch.from_numpy(view)) for view in views), places)

    def _from_worker(self) -> "_Made":
        assert self._batches is not None
        for _ in range(round(LONGEST_WAIT / POLL)):
            try:
                return next(self._batches)
            except RuntimeError as error:
                if "DataLoader timed out" in str(error):
                    continue
                if "DataLoader worker" not in str(error):
                    raise
                raise DataError(
                    "a process of the loader was ended, perhaps by an image that it was decoding; the same command "
                    f"goes on and leaves out an image that does so ({str(error).splitlines()[0]})"
                ) from None
        self._keeps_notes = True
        raise waited_too_long()

    def _normalize(self, view: Tensor) -> Tensor:
        """[n, S, S, 3] bytes to [n, 3, S, S] channels-last floats. They are not read any more when it returns."""
        n, size = view.shape[:2]
        if self._device.type == "cuda":
            view = view.pin_memory()
        rows = view.to(self._device, non_blocking=True).view(n * size, size * 3)
        shift, scale = self._shift[: size * 3], self._scale[: size * 3]
        normal = torch.addcmul(shift, rows.float(), scale).to(self._dtype)
        return normal.view(n, size, size, 3).permute(0, 3, 1, 2)

    def close(self) -> None:
        super().close()
        self._batches = None  # the DataLoader's iterator ends its workers as it goes
        if not self._keeps_notes:
            self._journal.close([each.pid for each in self._workers if each.pid and each.exitcode in (0, None)])


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


def _check_queues(workers: int) -> None:
    """Raises DataError where so many workers would be refused their queues, in the middle of being started."""
    try:
        context = multiprocessing.get_context("fork")
        _ = [context.Queue() for _ in range(workers + 1)], [context.Pipe(duplex=False) for _ in range(workers)]
    except OSError as error:
        raise DataError(
            f"--data.loader torch: expected room for the queues of {workers} processes, got {error.strerror}; their "
            "semaphores need a /dev/shm (docker run --shm-size=64m) and their pipes files (ulimit -n); fewer "
            "--data.workers need less, --data.loader dali none of it"
        ) from None


def _stand_apart(_: int) -> None:
    """A forked worker inherits the garbage of its parent; to collect a DALI pipeline there would hang. What is sent to
    the parent's process group (Ctrl-C, torchrun's SIGTERM) or to each process of a job (Slurm's SIGUSR1, a closed
    terminal's SIGHUP) is for the parent, which still needs batches until it has saved. And of what ends a worker the
    parent speaks, not PyTorch's handlers."""
    gc.freeze()
    os.setpgid(0, 0)
    for number in (signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    for deadly in (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE):
        signal.signal(deadly, signal.SIG_DFL)


class _Slots:
    """Memory for whole batches that forked workers fill: `views`, for each of the recipe's [slots, n, S, S, 3] uint8,
    and `places` [slots, n] int64. It belongs to no file system, so no small /dev/shm (64 MB in a container) can be too
    small for it."""

    def __init__(self, slots: int, batch_size: int, recipe: Recipe) -> None:
        shapes = [(slots, batch_size, size, size, 3) for size in recipe.sizes]
        ends = list(accumulate(map(math.prod, shapes), initial=slots * batch_size * 8))  # of the places, of each view
        try:
            memory = mmap.mmap(-1, ends[-1])  # taken page by page, as it is written
        except OSError as error:
            raise MemoryError(str(error)) from None
        self.places = np.frombuffer(memory, np.int64, slots * batch_size).reshape(slots, batch_size)
        flat = np.frombuffer(memory, np.uint8)
        self.views = [flat[a:b].reshape(shape) for (a, b), shape in zip(pairwise(ends), shapes, strict=True)]


class _Made(NamedTuple):
    """That so many images of a batch are in a slot, and what was `bad` that was not said before. Small, or a worker
    that is killed while it sends could leave half a message."""

    slot: int
    images: int
    bad: dict[int, str]
    notices: Notices
    error: str = ""  # a DataError's text; raised here it would arrive wrapped in the worker's traceback


class _Steps(Dataset[_Made]):
    """Batch `step`, put into a slot."""

    def __init__(
        self,
        reader: ImageReader,
        notices: Notices,
        recipe: Recipe,
        order: Order,
        seed: int,
        journal: Journal,
        slots: _Slots,
    ) -> None:
        self._reader = reader
        self._said = len(reader.bad)
        self._notices = notices
        self._recipe = recipe
        self._order = order
        self._seed = seed
        self._journal = journal
        self._slots = slots

    def __getitem__(self, step: int) -> _Made:
        slot = step % len(self._slots.places)
        positions, wanted = self._order.batch(step)
        self._journal.begin(wanted.tolist())
        try:
            count = self._fill(slot, positions, wanted)
        except DataError as error:
            return _Made(slot, 0, {}, self._notices.take(), str(error))
        self._journal.end()
        new = dict(islice(self._reader.bad.items(), self._said, None))
        self._said += len(new)
        return _Made(slot, count, new, self._notices.take())

    def _fill(self, slot: int, positions: NDArray[np.int64], wanted: NDArray[np.int64]) -> int:
        """Put the images of these positions into a slot. Returns how many there are."""
        views, places = [view[slot] for view in self._slots.views], self._slots.places[slot]
        asked = list(zip(positions.tolist(), wanted.tolist(), strict=True))
        found = read_side_by_side(self._reader, asked, self._reader.at_once)
        positions = positions[[sample is not None for sample in found]]
        samples = [sample for sample in found if sample is not None]
        parameters = self._parameters(positions, samples)
        count = 0
        for row, each in enumerate(samples):
            sample, drawn, at = each, parameters, row
            while (image := self._decode(sample)) is None:
                stand_in = self._reader.read(int(positions[row]), sample.place)
                if stand_in is None:
                    break
                sample, drawn, at = stand_in, self._parameters(positions[row : row + 1], [stand_in]), 0
            if image is not None:
                places[count] = sample.place
                for view, p, size in zip(views, drawn, self._recipe.sizes, strict=True):
                    view[count] = render(image, p, at, size)
                count += 1
        return count

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
