"""Reads the coming batches of an order in threads, while DALI decodes those before."""

import threading
from collections.abc import Callable
from operator import length_hint
from queue import Empty, Full, Queue
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from reco_fast.pipelines.bad_images.journal import Journal
from reco_fast.pipelines.base import LONGEST_WAIT, POLL, Decoded, ImageReader, Sample, waited_too_long
from reco_fast.pipelines.order import Order

_READERS = 8  # threads that wait for the file system
_NOTHING_CAME = 0.005  # seconds without an image, after which those begin that wait for other machines
_READ_AHEAD = 3  # batches of encoded images
_LAST_WAIT = 10.0  # seconds for the read-ahead to end


class Prepared(NamedTuple):
    """A batch as DALI is given it: `positions` in the stream and `places` in the source, each [n] int64."""

    positions: NDArray[np.int64]
    places: NDArray[np.int64]
    samples: list[Sample]  # none of a batch that comes decoded
    inputs: list[Any]  # of the graph, in its order
    by_pillow: bool = False

    @property
    def nothing(self) -> bool:
        return not len(self.places)

    @property
    def decoded(self) -> bool:
        return not self.samples


_Prepare = Callable[[NDArray[np.int64], list[Sample | None] | Decoded], Prepared]


class ReadAhead:
    """Reads and prepares the batches of an order, some ahead, in a thread."""

    def __init__(
        self,
        order: Order,
        reader: ImageReader,
        first_step: int,
        prepare: _Prepare,
        journal: Journal,
    ) -> None:
        self._queue: Queue[Prepared | BaseException] = Queue(_READ_AHEAD)
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

    def take(self) -> Prepared:
        """The next batch. Raises StopIteration after the last, or what reading it raised."""
        for _ in range(round(LONGEST_WAIT / POLL)):
            try:
                item = self._queue.get(timeout=POLL)
            except Empty:
                continue
            if isinstance(item, BaseException):
                self._put(item)  # for whoever asks again
                raise item
            return item
        raise waited_too_long()

    def close(self) -> None:
        self._closing.set()
        self._thread.join(_LAST_WAIT)  # it may hang in the file system

    def _read(
        self,
        order: Order,
        reader: ImageReader,
        step: int,
        prepare: _Prepare,
        journal: Journal,
    ) -> None:
        try:
            while not self.closed and (order.steps is None or step < order.steps):
                positions, indices = order.batch(step)
                journal.begin(indices.tolist())
                images: list[Sample | None] | Decoded | None = reader.decoded(positions, indices)
                if images is None:
                    asked = list(zip(positions.tolist(), indices.tolist(), strict=True))
                    images = read_side_by_side(reader, asked, max(_READERS, reader.at_once))
                self._put(prepare(positions, images))
                step += 1
            self._put(StopIteration())
        except BaseException as error:
            self._put(error)

    def _put(self, item: Prepared | BaseException) -> None:
        while not self.closed:
            try:
                return self._queue.put(item, timeout=0.1)
            except Full:
                continue


def read_side_by_side(reader: ImageReader, asked: list[tuple[int, int]], readers: int) -> list[Sample | None]:
    """What `reader.read` gives for each, in threads that wait for the file system, `readers` at most: images that are
    at hand are read sooner by few. Those of a pool would be waited for when the process ends, also where a file never
    comes."""
    if readers == 1:
        return [reader.read(*each) for each in asked]
    found: list[Sample | None] = [None] * len(asked)
    errors: list[BaseException] = []
    places = iter(range(len(asked)))  # each is taken by one of the threads
    threads: list[threading.Thread] = []

    def read() -> None:
        try:
            for place in places:
                found[place] = reader.read(*asked[place])
        except BaseException as error:
            errors.append(error)

    def start(count: int) -> None:
        new = [threading.Thread(target=read, name="reco_fast reader", daemon=True) for _ in range(count)]
        threads.extend(new)
        for thread in new:
            thread.start()

    start(min(_READERS, readers, len(asked)))
    while left := min(readers - len(threads), length_hint(places)):
        before = length_hint(places)
        threads[0].join(_NOTHING_CAME)
        if length_hint(places) == before:
            start(left)
            break
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return found
