"""Fetches the shards of an order before they are needed, and lets go of those that are not needed any more."""

import mmap
import threading
from queue import SimpleQueue
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from reco_fast.errors import DataError
from reco_fast.pipelines.order import Order
from reco_fast.pipelines.sources.image_source import Supply
from reco_fast.pipelines.stores.shard_cache import Hold, NoRoom, ShardCache, StoredShard
from reco_fast.pipelines.stores.store import Lost

FETCHERS = 4  # shards at a time
_AT_FIRST = 8  # batches
_POLITE = 1.0  # seconds
_SLOT = 256  # bytes for each shard
NOTHING, COMING, LOST = b"\0", b"\1", b"\2"


class Board:
    """What is becoming of each shard, and why it is lost, in memory that forked processes see."""

    def __init__(self, shards: int) -> None:
        self._memory = mmap.mmap(-1, _SLOT * shards)

    def state(self, shard: int) -> bytes:
        return self._memory[_SLOT * shard : _SLOT * shard + 1]

    def why(self, shard: int) -> str:
        return self._memory[_SLOT * shard + 1 : _SLOT * (shard + 1)].rstrip(b"\0").decode(errors="ignore")

    def set(self, shard: int, state: bytes, why: str = "") -> None:
        self._memory[_SLOT * shard + 1 : _SLOT * (shard + 1)] = why.encode()[: _SLOT - 1].ljust(_SLOT - 1, b"\0")
        self._memory[_SLOT * shard : _SLOT * shard + 1] = state


class Shards(Protocol):
    """What is fetched for."""

    stored: list[StoredShard]
    cache: ShardCache
    board: Board
    lost: dict[int, str]

    def shards_of(self, indices: NDArray[np.int64]) -> list[int]: ...
    def say_alone(self, shard: int, why: str) -> None: ...


class ShardSupply(Supply):
    """For the batches of `order` from `step` on: at most `limit` bytes of shards at a time, in the order in which they
    are needed. `advance` says that another batch has been used.

    Images of a shard that is on its way are waited for. They are read alone where it does not fit, or where its turn
    has not come yet of the many with which an order begins; and so are those of an order that needs all shards at once:
    these come meanwhile.
    """

    def __init__(self, shards: Shards, order: Order, step: int, limit: int) -> None:
        self._shards = shards
        self._order = order
        self._limit = limit
        self._used = step  # batches before this one need nothing any more
        self._last: dict[int, int] = {}  # shard → the last batch, of those looked at, that needs it
        self._holds: dict[int, Hold] = {}
        self._bytes = 0
        self._all_fit = False  # and none is let go of
        self._begins = True  # until all that is wanted has come for the first time
        self._under_way = 0
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._wanted: SimpleQueue[int | None] = SimpleQueue()
        planned = threading.Event()
        for work in (lambda: self._plan(planned), *[self._fetch] * FETCHERS):
            threading.Thread(target=work, name="reco_fast supply", daemon=True).start()
        planned.wait(_POLITE)  # or the first images would be read alone

    def advance(self) -> None:
        with self._changed:
            self._used += 1
            if self._all_fit:
                return
            for shard in [shard for shard, last in self._last.items() if last < self._used]:
                self._drop(shard)
            self._changed.notify_all()

    def close(self) -> None:
        """What is being fetched is given up."""
        with self._changed:
            self._closing.set()
            for shard in list(self._last):
                self._drop(shard)
            self._changed.notify_all()
        for _ in range(FETCHERS):
            self._wanted.put(None)

    def _drop(self, shard: int) -> None:
        del self._last[shard]
        self._bytes -= self._shards.stored[shard].stat.size
        if shard in self._holds:
            self._holds.pop(shard).release()
        if self._shards.board.state(shard) == COMING:
            self._shards.board.set(shard, NOTHING)

    def _plan(self, planned: threading.Event) -> None:
        step, first = self._used, self._used
        while not self._closing.is_set() and (self._order.steps is None or step < self._order.steps):
            for shard in self._shards.shards_of(self._order.batch(step)[1]):
                if not self._want(shard, step, planned):
                    return
            step += 1
            if step == first + _AT_FIRST:
                planned.set()
            if len(self._last) == len(self._shards.stored):
                self._all_fit = True
                break
        planned.set()

    def _want(self, shard: int, step: int, planned: threading.Event) -> bool:
        """Have it fetched unless it is. False at the end."""
        size = self._shards.stored[shard].stat.size
        with self._changed:
            if shard in self._last:
                self._last[shard] = step
                return True
            # With nothing else under way it may be larger than the limit.
            while self._last and self._bytes + size > self._limit and not self._closing.is_set():
                planned.set()
                self._changed.wait()
            if self._closing.is_set():
                return False
            self._last[shard] = step
            self._bytes += size
            if self._shards.board.state(shard) == LOST:
                return True
            if not self._begins or self._under_way < FETCHERS:
                self._on_its_way(shard)
            self._under_way += 1
        self._wanted.put(shard)
        return True

    def _on_its_way(self, shard: int) -> None:
        if self._order.in_runs:
            self._shards.board.set(shard, COMING)

    def _fetch(self) -> None:
        while (shard := self._wanted.get()) is not None:
            with self._changed:
                wanted = shard in self._last and not self._closing.is_set()
                if wanted:
                    self._on_its_way(shard)
            hold, state, why = None, NOTHING, ""
            try:
                hold = self._shards.cache.fetch(self._shards.stored[shard], self._closing) if wanted else None
            except Lost as error:
                state, why = LOST, str(error.strerror)
                self._shards.lost[shard] = why
            except (NoRoom, OSError) as error:
                self._shards.say_alone(shard, str(error))
            except DataError:
                pass  # whoever reads its images alone meets it, and says so
            with self._changed:
                self._shards.board.set(shard, state, why)
                self._under_way -= 1
                self._begins = self._begins and self._under_way > 0
                if hold is not None and shard in self._last and not self._closing.is_set():
                    self._holds[shard] = hold
                elif hold is not None:
                    hold.release()
