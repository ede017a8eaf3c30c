"""Whole shards on the local disk: fetched once, bounded, and never wrong, whoever is killed."""

import errno
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import HttpServer

from reco_fast.errors import DataError
from reco_fast.pipelines.stores import shard_cache, store
from reco_fast.pipelines.stores.shard_cache import NoRoom, ShardCache, StoredShard
from reco_fast.pipelines.stores.store import Lost

SIZE = 100_000


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpServer]:
    folder = tmp_path_factory.mktemp("web")
    for number in range(6):
        (folder / f"{number}.tar").write_bytes(bytes([number]) * SIZE)
    with HttpServer(folder) as server:
        yield server


@pytest.fixture(autouse=True)
def quick(web: HttpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    web.heal()
    web.forget()
    monkeypatch.setattr(shard_cache, "PIECE", 30_000)
    monkeypatch.setattr(store, "PATIENCE", 1.0)


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache", 3 * SIZE)


def shard(web: HttpServer, number: int) -> StoredShard:
    url = f"{web.url}/{number}.tar"
    return StoredShard(url, store.stat(url))


def content(cache: ShardCache, each: StoredShard) -> bytes:
    return cache.path(each).read_bytes()


def taken(cache: ShardCache) -> int:
    return sum(path.stat().st_size for path in (cache.folder / "shards").iterdir())


def test_a_shard_is_fetched_once_in_pieces(web: HttpServer, cache: ShardCache) -> None:
    each = shard(web, 1)
    web.forget()
    for _ in range(3):
        hold = cache.fetch(each)
        assert hold is not None
        hold.release()
    assert content(cache, each) == b"\1" * SIZE
    assert [asked.range for asked in web.asked if asked.method == "GET"] == [
        "bytes=0-29999",
        "bytes=30000-59999",
        "bytes=60000-89999",
        "bytes=90000-99999",
    ]


def test_the_longest_unused_goes_first_and_what_is_held_stays(web: HttpServer, cache: ShardCache) -> None:
    shards = [shard(web, number) for number in range(5)]
    holds = [cache.fetch(each) for each in shards[:3]]
    for hold in (holds[0], holds[1]):
        assert hold is not None
        hold.release()
    os.utime(cache.path(shards[0]), (1, 1))
    os.utime(cache.path(shards[2]), (0, 0))  # the oldest, and held
    assert cache.fetch(shards[3]) is not None
    assert [cache.path(each).exists() for each in shards] == [False, True, True, True, False]
    assert cache.fetch(shards[4]) is not None
    assert [cache.path(each).exists() for each in shards] == [False, False, True, True, True]
    with pytest.raises(NoRoom, match="leave less than"):
        cache.fetch(shards[0])
    assert taken(cache) <= cache.limit
    assert holds[2] is not None
    holds[2].release()
    assert cache.fetch(shards[0]) is not None


def test_a_use_counts_as_one(web: HttpServer, cache: ShardCache) -> None:
    shards = [shard(web, number) for number in range(4)]
    for each in shards[:3]:
        hold = cache.fetch(each)
        assert hold is not None
        hold.release()
    for number, each in enumerate(shards[:3]):
        os.utime(cache.path(each), (number, number))
    hold = cache.held(shards[0])
    assert hold is not None
    hold.release()
    cache.fetch(shards[3])
    assert [cache.path(each).exists() for each in shards] == [True, False, True, True]


def test_many_threads_and_caches_fetch_it_once(web: HttpServer, cache: ShardCache) -> None:
    """Each with a view of the folder of its own, as processes have."""
    each = shard(web, 2)
    web.forget()
    web.delay = 0.05
    found: list[bytes] = []

    def use() -> None:
        mine = ShardCache(cache.folder, cache.limit)
        if hold := mine.fetch(each):
            found.append(content(mine, each))
            hold.release()

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [b"\2" * SIZE] * 8
    assert sum(asked.method == "GET" for asked in web.asked) == 4


def test_a_killed_process_leaves_nothing_in_the_way(web: HttpServer, cache: ShardCache) -> None:
    """Neither its lock, nor half of a shard, nor the room that this took."""
    first, second = shard(web, 3), shard(web, 4)
    web.rate = 50_000  # two seconds for a shard
    child = multiprocessing.get_context("fork").Process(target=cache.fetch, args=(first,))
    child.start()
    part = cache.path(first).with_suffix(".part")
    while not part.exists() or part.stat().st_size < SIZE:
        time.sleep(0.01)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    web.heal()
    assert part.exists()
    assert not cache.path(first).exists()
    small = ShardCache(cache.folder, SIZE)
    assert small.fetch(second) is not None, "the part of a dead process was in the way"
    assert not part.exists()
    hold = cache.fetch(first)
    assert hold is not None
    assert content(cache, first) == b"\3" * SIZE


def test_a_hold_ends_though_a_forked_process_has_a_copy(web: HttpServer, cache: ShardCache) -> None:
    each = shard(web, 1)
    hold = cache.fetch(each)
    assert hold is not None
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,))
    child.start()
    try:
        small = ShardCache(cache.folder, SIZE)
        with pytest.raises(NoRoom):
            small.fetch(shard(web, 2))
        hold.release()
        assert small.fetch(shard(web, 2)) is not None
    finally:
        child.kill()
        child.join()


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_shard_that_has_changed_is_lost(when: str, web: HttpServer, cache: ShardCache) -> None:
    each = shard(web, 5)
    web.fail("/5.tar", "changed", method="HEAD") if when == "before" else None
    if when == "meanwhile":
        web.fail("/5.tar", 503, times=1, method="GET")
        after = threading.Timer(0.05, lambda: web.fail("/5.tar", "changed", method="HEAD"))
        after.start()
        web.delay = 0.05
    with pytest.raises(Lost, match="has changed since it was indexed"):
        cache.fetch(each)
    assert taken(cache) == 0


def test_what_is_cut_off_is_fetched_again(web: HttpServer, cache: ShardCache) -> None:
    each = shard(web, 1)
    web.fail("/1.tar", "cut", times=2, method="GET")
    assert cache.fetch(each) is not None
    assert content(cache, each) == b"\1" * SIZE


@pytest.mark.parametrize("where", ["room", "writing"])
def test_a_full_disk_is_no_room(
    where: str, web: HttpServer, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate" if where == "room" else "pwrite", full)
    with pytest.raises(NoRoom, match="No space left on device"):
        cache.fetch(shard(web, 1))
    assert taken(cache) == 0


def test_closing_gives_up(web: HttpServer, cache: ShardCache) -> None:
    each, closing = shard(web, 1), threading.Event()
    web.rate = 30_000
    threading.Timer(0.3, closing.set).start()
    started = time.monotonic()
    assert cache.fetch(each, closing) is None
    assert time.monotonic() - started < 3
    assert taken(cache) == 0


def test_a_store_without_an_answer_is_an_error(web: HttpServer, cache: ShardCache) -> None:
    each = shard(web, 1)
    web.fail("/1.tar", "close")
    with pytest.raises(DataError, match="a store that answers"):
        cache.fetch(each)
    assert taken(cache) == 0
