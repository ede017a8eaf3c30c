"""Images of a store are those of the same files on disk, however they come, and whatever becomes of the store."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loading import both_loaders, take, tiny, training
from servers import HttpServer, S3Server
from small_runs import write_tar

from reco_fast.errors import DataError
from reco_fast.pipelines.loader import open_loader
from reco_fast.pipelines.order import BlockOrder, EvaluationOrder, TrainingOrder
from reco_fast.pipelines.sources.image_source import ImageSource, Supply
from reco_fast.pipelines.sources.open import open_source
from reco_fast.pipelines.stores import shard_cache, store, stored_images
from reco_fast.pipelines.stores.shard_cache import NoRoom, ShardCache, StoredShard
from reco_fast.pipelines.stores.store import Stat
from reco_fast.pipelines.stores.where import Stores

SHARDS, IMAGES = 6, 10
PATTERN = "{0..5}.tar"


@pytest.fixture(scope="module")
def web(cifar: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpServer]:
    folder = tmp_path_factory.mktemp("web")
    images = sorted(cifar.rglob("*.jpg"))
    for number in range(SHARDS):
        members = {}
        for path in images[number :: len(images) // IMAGES][:IMAGES]:
            members[f"{path.parent.name}-{path.stem}.jpg"] = path.read_bytes()
            members[f"{path.parent.name}-{path.stem}.cls"] = path.parent.name.encode()
        write_tar(folder / f"{number}.tar", members)
    (folder / "loose").mkdir()
    for path in images[::15]:
        (folder / "loose" / path.parent.name).mkdir(exist_ok=True)
        (folder / "loose" / path.parent.name / path.name).write_bytes(path.read_bytes())
    with HttpServer(folder) as server:
        yield server


@pytest.fixture(autouse=True)
def quick(web: HttpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    web.heal()
    web.forget()
    monkeypatch.setattr(store, "PATIENCE", 5.0)


@pytest.fixture
def opened(web: HttpServer, tmp_path: Path) -> Callable[..., Any]:
    def opened(what: str = PATTERN, shards: int = 100, cache: str = "cache") -> ImageSource:
        """With room for so many shards, none of which is there yet; what is in them is known."""
        open_source(f"{web.url}/{what}", stores=Stores(tmp_path / cache))
        for path in (tmp_path / cache / "shards").glob("*.tar"):
            path.unlink()
        web.forget()
        largest = max(path.stat().st_size for path in web.folder.glob("*.tar"))
        return open_source(f"{web.url}/{what}", stores=Stores(tmp_path / cache, shards * largest))

    return opened


def local(web: HttpServer, what: str = PATTERN) -> ImageSource:
    return open_source(web.folder / what)


def gets(server: HttpServer | S3Server) -> int:
    return sum(asked.method == "GET" for asked in server.asked)


def shards_only(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "shards").glob("*.tar"))


@pytest.mark.parametrize("what", [PATTERN, "3.tar", "loose"])
def test_the_same_images_as_on_disk(what: str, opened: Callable[..., ImageSource], web: HttpServer) -> None:
    here, there = local(web, what), opened(what)
    assert list(there.names) == list(here.names)
    assert there.fingerprint() == here.fingerprint()
    assert here.labels is not None
    assert there.labels is not None
    assert (there.labels.tolist(), there.classes) == (here.labels.tolist(), here.classes)
    assert [there.read(index) for index in range(len(here))] == [here.read(index) for index in range(len(here))]
    assert there.stamp(0)[0] == len(here.read(0))


def test_from_s3(s3: S3Server, web: HttpServer, tmp_path: Path) -> None:
    for number in range(SHARDS):
        s3.put(f"train/{number}.tar", (web.folder / f"{number}.tar").read_bytes())
    stores = Stores(tmp_path / "cache")
    for what in (PATTERN, "*.tar", "[0-5].tar"):
        there = open_source(f"{s3.bucket}/train/{what}", stores=stores)
        assert there.fingerprint() == local(web).fingerprint()
    below = open_source(f"{s3.bucket}/train", stores=stores)
    assert list(below.names) == list(local(web).names)
    assert [below.read(index) for index in range(len(below))] == [local(web).read(index) for index in range(len(below))]


def test_what_is_in_shards_is_looked_at_once(web: HttpServer, tmp_path: Path) -> None:
    for fetched in (SHARDS, 0):
        web.forget()
        open_source(f"{web.url}/{PATTERN}", stores=Stores(tmp_path / "cache"))
        assert gets(web) == fetched


def test_an_image_alone_is_one_request(opened: Callable[..., ImageSource], web: HttpServer) -> None:
    """Where the cache has no room for its shard; whether the shard has changed is asked once."""
    there = opened(shards=0)
    web.forget()
    assert [there.read(index) for index in range(5)] == [local(web).read(index) for index in range(5)]
    assert gets(web) == 5
    assert web.requests == 6


def test_a_changed_shard_is_not_read_by_its_old_index(opened: Callable[..., ImageSource], web: HttpServer) -> None:
    there = opened(shards=0)
    web.fail("/0.tar", "changed")
    with pytest.raises(OSError, match="changed since it was indexed"):
        there.read(0)


def blocks(source: ImageSource, batch_size: int = 6, **options: int) -> BlockOrder:
    assert source.ends is not None
    return BlockOrder(source.ends, batch_size, **({"window": 1, "lanes": 2, "seed": 1} | options))


def streamed(kind: Any, source: ImageSource, order: Any, steps: int, **options: Any) -> list[torch.Tensor]:
    loader = open_loader(kind, source, tiny(), order, **({"device": "cpu", "seed": 7, "workers": 1} | options))
    return [view for batch in take(loader, steps) for view in (*batch.views, batch.indices)]


@both_loaders
@pytest.mark.parametrize("shards", [100, 4, 2])
def test_views_are_those_of_local_shards(
    kind: Any, shards: int, opened: Callable[..., ImageSource], web: HttpServer
) -> None:
    """In blocks, with room for all shards, for some, and for less than a window; over an epoch's end."""
    here = local(web)
    there = opened(shards=shards)
    expected = streamed(kind, here, blocks(here), 25)
    for mine, theirs in zip(streamed(kind, there, blocks(there), 25), expected, strict=True):
        assert torch.equal(mine, theirs)


@both_loaders
def test_in_blocks_shards_are_fetched_whole_and_once_an_epoch(
    kind: Any, opened: Callable[..., ImageSource], web: HttpServer, tmp_path: Path
) -> None:
    there = opened(shards=8)
    web.forget()
    streamed(kind, there, blocks(there, lanes=1), SHARDS * IMAGES // 6)
    asked = [each for each in web.asked if each.method == "GET"]
    whole = {each.path: (web.folder / each.path.strip("/")).stat().st_size for each in asked}
    assert len(whole) == SHARDS
    parts = [each for each in asked if each.sent != whole[each.path]]
    assert len(parts) <= 3, "an image or two may be asked for before the supply has begun"
    assert SHARDS <= len(asked) - len(parts) <= SHARDS + 4, "and the next epoch's first may be on their way"


@both_loaders
def test_an_evaluation_fetches_whole_shards_too(
    kind: Any, opened: Callable[..., ImageSource], web: HttpServer, tmp_path: Path
) -> None:
    there = opened(shards=20)  # of which an evaluation may have six
    web.forget()
    order = EvaluationOrder(len(there), 8)
    assert order.steps is not None
    mine = streamed(kind, there, order, order.steps)
    for theirs, each in zip(streamed(kind, local(web), order, order.steps), mine, strict=True):
        assert torch.equal(theirs, each)
    assert gets(web) <= SHARDS + 2 * IMAGES, "of all that it begins with, four shards are waited for"


def test_few_images_of_many_are_read_alone(opened: Callable[..., ImageSource], web: HttpServer, tmp_path: Path) -> None:
    there = opened(shards=2)
    web.forget()
    order = EvaluationOrder(len(there), 6, count=6)
    assert len(streamed("torch", there, order, 1)[1]) == 6
    assert gets(web) == 6
    for each in (order, TrainingOrder(len(there), 6)):
        assert type(there.supply(each, 0)) is Supply, "which fetches nothing"


class Counted(TrainingOrder):
    """An order that says how often it was asked."""

    asked = 0

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        self.asked += 1
        return super().batch(step)


def test_uniform_order_with_room_for_all_reads_alone_until_they_are_there(
    opened: Callable[..., ImageSource], web: HttpServer, tmp_path: Path
) -> None:
    there = opened()
    order = Counted(len(there), 6, seed=3)
    with open_loader("torch", there, tiny(), order, device="cpu", seed=7, workers=0) as loader:
        first = next(loader)
        until = time.monotonic() + 10
        while len(shards_only(tmp_path / "cache")) < SHARDS and time.monotonic() < until:
            time.sleep(0.01)
        web.forget()
        batches = [next(loader) for _ in range(12)]
        other = ShardCache(tmp_path / "cache", there.cache.limit // 100 * SHARDS)
        with pytest.raises(NoRoom):  # all that is there is kept for the next epochs
            other.fetch(StoredShard(f"{web.url}/other.tar", Stat(other.limit, "")))
    assert order.asked < 13 + 30, "what fetches goes on looking ahead where nothing is left to be fetched"
    assert web.requests == 0
    expected = streamed("torch", local(web), order, 13, workers=0)
    mine = [part for batch in (first, *batches) for part in (*batch.views, batch.indices)]
    assert all(torch.equal(a, b) for a, b in zip(mine, expected, strict=True))


@both_loaders
def test_a_lost_shard_is_named_once_and_others_stand_in(
    kind: Any, opened: Callable[..., ImageSource], web: HttpServer, tmp_path: Path
) -> None:
    there = opened()
    web.fail("/2.tar", 404)
    with open_loader(kind, there, tiny(), blocks(there), device="cpu", seed=7, workers=1) as loader:
        seen = np.concatenate([next(loader).indices.numpy() for _ in range(10)])
        assert loader.bad_images == {"2.tar": "there is no such file in the store"}
    assert len(seen) == 60
    assert not ((seen >= 2 * IMAGES) & (seen < 3 * IMAGES)).any()


@both_loaders
def test_a_lost_shard_ends_a_run_that_wants_all(
    kind: Any, opened: Callable[..., ImageSource], web: HttpServer, tmp_path: Path
) -> None:
    there = opened()
    web.fail("/2.tar", 404)
    with (
        open_loader(
            kind, there, tiny(), blocks(there), device="cpu", seed=7, workers=1, on_bad_image="raise"
        ) as loader,
        pytest.raises(DataError, match=r"2\.tar/.*: .*there is no such file in the store"),
    ):
        _ = [next(loader) for _ in range(10)]


@both_loaders
@pytest.mark.parametrize("fault", [403, "close"])
def test_a_store_that_does_not_let_us_in_any_more_ends_the_run(
    kind: Any,
    fault: Any,
    opened: Callable[..., ImageSource],
    web: HttpServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing stands in for images that are there."""
    monkeypatch.setattr(store, "PATIENCE", 0.5)
    there = opened()
    web.fail("*", fault)
    expected = "expected to be let in" if fault == 403 else "expected a store that answers"
    with (
        open_loader(kind, there, tiny(), blocks(there), device="cpu", seed=7, workers=1) as loader,
        pytest.raises(DataError, match=expected),
    ):
        _ = [next(loader) for _ in range(10)]


@both_loaders
def test_a_store_that_comes_back_changes_nothing(
    kind: Any, opened: Callable[..., ImageSource], web: HttpServer, tmp_path: Path
) -> None:
    there = opened(shards=4)
    expected = streamed(kind, local(web), blocks(there), 20)
    found = []
    with open_loader(kind, there, tiny(), blocks(there), device="cpu", seed=7, workers=1) as loader:
        for step in range(20):
            if step == 2:
                web.stop()
                threading.Timer(1, web.start).start()
            batch = next(loader)
            found += [*batch.views, batch.indices]
        assert loader.bad_images == {}
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_full_disk_costs_time_alone(
    opened: Callable[..., ImageSource], web: HttpServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = opened()

    def full(write: Callable[[], object]) -> None:
        raise shard_cache.NoRoom("the disk of the cache is full")

    monkeypatch.setattr(shard_cache, "_on_disk", full)
    expected = streamed("torch", local(web), blocks(there), 12)
    assert all(torch.equal(a, b) for a, b in zip(streamed("torch", there, blocks(there), 12), expected, strict=True))
    (line,) = there.notices.lines(there.names).values()
    assert line.endswith("its shard is not in the cache, the disk of the cache is full: read alone")


def test_hosts_fetch_the_shards_of_their_lanes(opened: Callable[..., ImageSource], web: HttpServer) -> None:
    """Two hosts, each with a cache of its own."""
    needed = []
    for host in range(2):
        there = opened(cache=f"cache{host}")
        order = blocks(there, 10, rank=host, world_size=2)
        streamed("torch", there, order, SHARDS * IMAGES // 10)
        first = np.concatenate([order.batch(step)[1] for step in range(SHARDS * IMAGES // 10)])
        needed.append(set(np.searchsorted(there.ends, first, side="right").tolist()))
    assert max(map(len, needed)) == SHARDS // 2
    assert set.union(*needed) == set(range(SHARDS))


def test_loose_files_are_asked_for_many_at_a_time(opened: Callable[..., ImageSource], web: HttpServer) -> None:
    there = opened("loose")
    assert there.notes
    assert "make_shards" in there.notes[0]
    web.delay = 0.2
    started = time.monotonic()
    take(training("torch", there, tiny(), 20), 1)
    assert time.monotonic() - started < 2.5, "20 requests of 0.2 seconds, one behind the other, take 4"
    assert stored_images.AT_ONCE >= 20
