"""Images of a store: inside shards, which are fetched whole where that is worth it, or as files of their own."""

import os
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from reco_fast.pipelines.order import Order
from reco_fast.pipelines.pixels import Notice
from reco_fast.pipelines.sources.image_source import ImageSource, Supply
from reco_fast.pipelines.sources.labels import by_folder
from reco_fast.pipelines.sources.shards import ShardContent, TarSource
from reco_fast.pipelines.stores import store
from reco_fast.pipelines.stores.shard_cache import ShardCache, StoredShard
from reco_fast.pipelines.stores.shard_index import IndexedShard
from reco_fast.pipelines.stores.store import Lost, Stat
from reco_fast.pipelines.stores.supply import COMING, LOST, Board, ShardSupply

AT_ONCE = 64  # requests of a process
_POLL = 0.01  # seconds, for a shard that is being fetched
_TRUST = 60.0  # seconds after which it is asked again whether a shard of which parts are read has changed
_TRAINING, _EVALUATION = 0.7, 0.3  # shares of the cache: both may be under way


class StoredTarSource(TarSource):
    """Images inside the shards of a store. An image is read from the cache where its shard is there or on its way, and
    alone, by one request, where it is not.

    Args:
        shards: each with its stat and content; read one by one.
        processes: that share the cache.
    """

    at_once = AT_ONCE

    def __init__(self, shards: Iterable[IndexedShard], cache: ShardCache, processes: int) -> None:
        self.cache = cache
        self.stored: list[StoredShard] = []
        self.lost: dict[int, str] = {}
        self._processes = processes
        self._seen: dict[int, float] = {}  # shard → when this process found it unchanged
        self._shard_names: list[str] = []
        urls: list[str] = []

        def contents() -> Iterator[tuple[str, ShardContent]]:
            for shard in shards:
                assert shard.stat is not None
                assert shard.content is not None
                urls.append(shard.place)
                self.stored.append(StoredShard(shard.place, shard.stat))
                self._shard_names.append(shard.name)
                yield shard.name, shard.content

        super().__init__(urls, contents())
        self.board = Board(len(self.stored))
        self._paths = [os.fspath(cache.path(shard)) for shard in self.stored]

    def supply(self, order: Order, step: int) -> Supply:
        share = _TRAINING if order.steps is None else _EVALUATION
        limit = int(self.cache.limit * share / self._processes)
        all_fits = sum(shard.stat.size for shard in self.stored) <= limit
        if order.in_runs or all_fits:
            return ShardSupply(self, order, step, limit)
        return super().supply(order, step)

    def shards_of(self, indices: NDArray[np.int64]) -> list[int]:
        """The shards of images, in the order in which they are needed."""
        numbers = np.searchsorted(self.ends, indices, side="right")
        return list(dict.fromkeys(numbers.tolist()))

    def say_alone(self, shard: int, why: str) -> None:
        """Why images of a shard are read alone, which is slower: for whoever says what there is to say of images."""
        self.notices.add(self.ends[shard] - 1, Notice("alone", f"its shard is not in the cache, {why}: read alone"))

    def read(self, index: int) -> bytes:
        number = self.shard_of(index)
        offset = int(self._offsets[index])
        size = min(int(self._sizes[index]), self.stored[number].stat.size - offset)  # less where the shard is cut
        while True:
            state = self.board.state(number)  # first: a shard that comes in between is there
            try:
                with open(self._paths[number], "rb", buffering=0) as file:
                    data = os.pread(file.fileno(), size, offset)
                    if len(data) == size:
                        return data
            except FileNotFoundError:
                pass
            if state == LOST:
                raise Lost(f"its shard cannot be had: {self.board.why(number)}")
            if state != COMING:
                return self._alone(number, offset, size)
            time.sleep(_POLL)

    def _alone(self, number: int, offset: int, size: int) -> bytes:
        shard = self.stored[number]
        if time.monotonic() - self._seen.get(number, -_TRUST) >= _TRUST:
            shard.check()
            self._seen[number] = time.monotonic()
        return store.read(shard.url, offset, offset + size)

    def stamp(self, index: int) -> tuple[int, int]:
        return int(self._sizes[index]), _number(self.stored[self.shard_of(index)].stat)

    def named(self, bad: Mapping[int, str]) -> dict[str, str]:
        """Lost shards once, not image by image."""
        alone = {index: reason for index, reason in bad.items() if self.shard_of(index) not in self.lost}
        return {self._shard_names[number]: why for number, why in self.lost.items()} | super().named(alone)


class StoredFolderSource(ImageSource):
    """Image files below a URL, each read by one request. Labels are by folder, as of a local one."""

    at_once = AT_ONCE

    def __init__(self, root: str, files: dict[str, Stat]) -> None:
        names = list(files)
        super().__init__(names)
        self._root = root
        self._bytes = np.array([each.size for each in files.values()], np.int64)
        self._numbers = np.array([_number(each) for each in files.values()], np.int64)
        self.labels, self.classes, self.unlabelled = by_folder(names)
        self.notes = [
            f"{root}: {len(files):,} files, each a request of its own; shards read faster and cost less: "
            f"python -m reco_fast.make_shards {root} URL"
        ]

    def read(self, index: int) -> bytes:
        url, size = store.join(self._root, self.names[index]), int(self._bytes[index])
        return store.read_whole(url) if size < 0 else store.read(url, 0, size)

    def stamp(self, index: int) -> tuple[int, int]:
        return int(self._bytes[index]), int(self._numbers[index])

    def sizes(self) -> NDArray[np.int64]:
        return self._bytes


def _number(stat: Stat) -> int:
    """In place of a time of change."""
    return zlib.crc32(stat.tag.encode())
