"""Opens what is behind a URL: shards by their index, which is made where there is none, or files one by one."""

import json
import os
import posixpath
import tempfile
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from glob import has_magic
from pathlib import Path
from typing import NamedTuple

from reco_fast.errors import DataError
from reco_fast.pipelines.sources import kinds
from reco_fast.pipelines.sources.caches import cache_folder
from reco_fast.pipelines.sources.folders import shards_below
from reco_fast.pipelines.sources.image_source import ImageSource
from reco_fast.pipelines.sources.kinds import NOW, PassedOver, Rules
from reco_fast.pipelines.sources.patterns import matching, spread_braces
from reco_fast.pipelines.sources.shards import ShardContent, TarSource, index_shard
from reco_fast.pipelines.stores import store
from reco_fast.pipelines.stores.shard_cache import NoRoom, ShardCache, StoredShard
from reco_fast.pipelines.stores.shard_index import IndexedShard, content_of, read_index
from reco_fast.pipelines.stores.store import Lost, Stat
from reco_fast.pipelines.stores.stored_images import StoredFolderSource, StoredTarSource
from reco_fast.pipelines.stores.where import Stores, is_url

INDEX = "index.json"  # beside shards
_AT_ONCE = 4  # shards that are indexed
_TELL = 10.0  # seconds between two lines of progress


def open_store(url: str, rules: Rules, stores: Stores) -> ImageSource:
    """What is at a URL: a shard, a pattern of shards, an index of shards, or all below it. Raises DataError."""
    store.check_url(url)
    if url.endswith(".json"):
        return open_index(url, rules, stores)
    if _names_shards(url):
        return _opened(_by_name(url), rules, stores)
    return _open_below(url, rules, stores)


def _names_shards(url: str) -> bool:
    """Whether it is a shard or a pattern of shards."""
    return url.endswith(".tar") or has_magic(url) or "{" in url


def open_index(place: str, rules: Rules, stores: Stores) -> ImageSource:
    """The shards of an index, at a URL or a path. Raises DataError."""
    first = next(read_index(place), None)
    if first is None:
        raise DataError(f"{place}: expected an index of shards, it has none")
    if is_url(first.place):
        _check_first(first)
        return _opened(read_index(place), rules, stores)
    return _local(read_index(place), rules)


def _check_first(shard: IndexedShard) -> None:
    """That the shards of an index are where it says: of the first, for a thousand would take long."""
    if shard.stat is None:  # all are asked for
        return
    try:
        _stored(shard).check()
    except Lost as error:
        raise DataError(f"{shard.place}: expected the shard as it was indexed, {error.strerror}") from None


def _by_name(pattern: str) -> list[IndexedShard]:
    """The `.tar` files that a URL with `{}`, `*`, `?` and `[…]` stands for. Raises DataError."""
    names = [name for each in spread_braces(pattern) for name in (store.match(each) if has_magic(each) else [each])]
    if not names:
        raise DataError(f"{pattern}: expected .tar files, no file matches this pattern")
    return [IndexedShard(name, posixpath.basename(name), None, None) for name in names]


def shards_at(path: str, stores: Stores) -> Iterator[IndexedShard]:
    """Stat and content of the `.tar` files that a path or a URL stands for, or that lie below it. Raises DataError
    where there are none, or one cannot be had."""
    text = path.removeprefix("file://")
    if not is_url(text):
        yield from _local_shards(text)
        return
    store.check_url(text)
    shards = _by_name(text) if _names_shards(text) else _list_below(text, NOW).shards
    if not shards:
        raise DataError(f"{text}: expected .tar shards below this URL, there are none")
    yield from indexed(shards, NOW, open_cache(stores), stores)


def _local_shards(text: str) -> Iterator[IndexedShard]:
    place = Path(os.path.expanduser(text)).absolute()
    if place.is_dir():
        shards = {name: place / name for name in shards_below(place)}
    else:
        shards = {path.name: path for path in matching(os.fspath(place))}
    if not shards:
        raise DataError(f"{text}: expected .tar files, there are none")
    for name, shard in shards.items():
        content = index_shard(os.fspath(shard))
        yield IndexedShard(os.fspath(shard), name, Stat(shard.stat().st_size, ""), content)


class _Below(NamedTuple):
    """What lies below a URL, by name: images, shards, and what is neither."""

    files: dict[str, Stat]
    shards: list[IndexedShard]
    passed_over: PassedOver
    has_index: bool


def _list_below(url: str, rules: Rules) -> _Below:
    files: dict[str, Stat] = {}
    shards: list[IndexedShard] = []
    passed_over = PassedOver()
    listed = store.listing(url)
    for name, each in listed.items():
        *folders, base = name.split("/")
        suffix = os.path.splitext(base)[1].lower()
        tool = next((f"{part}/" for part in folders if kinds.is_tool_folder(part) and not rules.tools), "")
        if any(part.startswith(".") for part in (*folders, base)) or tool:
            if not kinds.is_rubbish(base):
                passed_over.add(tool or kinds.HIDDEN, name)
        elif rules.takes(suffix):
            files[name] = each
        elif suffix == ".tar":
            shards.append(IndexedShard(store.join(url, name), name, each, None))
        elif not kinds.is_rubbish(base):
            passed_over.add(kinds.suffix_of(base) or kinds.NO_SUFFIX, name)
    return _Below(files, shards, passed_over, INDEX in listed)


def _open_below(url: str, rules: Rules, stores: Stores) -> ImageSource:
    files, shards, passed_over, has_index = _list_below(url, rules)
    source: ImageSource
    if files:
        for shard in shards:
            passed_over.add(".tar", shard.name)
        source = StoredFolderSource(url, files)
    elif shards:
        source = _opened(_by_index_beside(url, shards) if has_index else shards, rules, stores)
    else:
        seen = passed_over.line()
        content = f"it has none of them ({seen})" if seen else "there is nothing"
        raise DataError(f"{url}: expected images (.jpg, .png, .webp, …) or .tar shards below this URL, {content}")
    source.passed_over.include(passed_over)
    return source


def _by_index_beside(url: str, shards: list[IndexedShard]) -> Iterator[IndexedShard]:
    """With what the index that lies beside the shards says of those that are still as they were."""
    known = {shard.place: shard for shard in read_index(store.join(url, INDEX))}
    for shard in shards:
        indexed = known.get(shard.place)
        same = indexed is not None and indexed.stat == shard.stat
        yield shard._replace(content=indexed.content) if same and indexed is not None else shard


def _local(shards: Iterator[IndexedShard], rules: Rules) -> TarSource:
    """Local shards, whose index is older than they may be."""
    places: list[str] = []

    def contents() -> Iterator[tuple[str, ShardContent]]:
        for shard in shards:
            if is_url(shard.place):
                raise DataError(f"{shard.place}: expected paths of local shards, as the first of the index, got a URL")
            size = os.path.getsize(shard.place) if os.path.isfile(shard.place) else -1
            if size < 0 or (shard.stat is not None and size != shard.stat.size):
                was = f"{shard.stat.size:,} bytes" if shard.stat else "a file"
                now = f"{size:,}" if size >= 0 else "none"
                raise DataError(f"{shard.place}: expected the shard as it was indexed, {was}, got {now}")
            places.append(shard.place)
            yield shard.name, shard.content or index_shard(shard.place, rules)

    return TarSource(places, contents(), rules)


def _opened(shards: Iterable[IndexedShard], rules: Rules, stores: Stores) -> StoredTarSource:
    cache = open_cache(stores)
    return StoredTarSource(_completed(shards, rules, cache, stores), cache, stores.processes)


def open_cache(stores: Stores) -> ShardCache:
    return ShardCache(stores.cache or cache_folder("stores") / "stores", stores.cache_bytes)


def _completed(
    shards: Iterable[IndexedShard], rules: Rules, cache: ShardCache, stores: Stores
) -> Iterator[IndexedShard]:
    """Those whose content is known as they come, those of which it is not a thousand at a time."""
    waiting: list[IndexedShard] = []
    for shard in shards:
        if shard.content is not None and not waiting:
            yield shard
            continue
        waiting.append(shard)
        if len(waiting) == 1000:
            yield from indexed(waiting, rules, cache, stores)
            waiting = []
    yield from indexed(waiting, rules, cache, stores)


def indexed(shards: Sequence[IndexedShard], rules: Rules, cache: ShardCache, stores: Stores) -> Iterator[IndexedShard]:
    """`shards` with stat and content: those that have none are fetched once, and what is found is kept in the cache.

    Raises DataError where one cannot be had.
    """
    asked = [shard.place for shard in shards if shard.stat is None or shard.stat.size < 0]
    answers = dict(zip(asked, store.stats(asked), strict=True))
    known = []
    for shard in shards:
        stat = answers.get(shard.place, shard.stat)
        if isinstance(stat, Lost) or stat is None:
            raise DataError(f"{shard.place}: expected a .tar file, {stat.strerror if stat else 'there is none'}")
        known.append(shard._replace(stat=stat))
    (cache.folder / "index").mkdir(exist_ok=True)
    missing = [shard for shard in known if shard.content is None and not _kept(cache, _stored(shard)).is_file()]
    done, told = 0, time.monotonic()
    largest = max((shard.stat.size for shard in missing if shard.stat), default=0)
    with ThreadPoolExecutor(max(1, min(_AT_ONCE, cache.limit // max(largest, 1)))) as pool:
        for _ in pool.map(lambda shard: _index(shard, rules, cache), missing):
            done += 1
            if time.monotonic() - told > _TELL:
                told = time.monotonic()
                stores.say(f"reading what is in the shards, which is done once: {done:,} of {len(missing):,}")
    for shard in known:
        if shard.content is not None:
            yield shard
            continue
        with open(_kept(cache, _stored(shard)), encoding="utf-8", errors="surrogateescape") as file:
            yield shard._replace(content=content_of(json.load(file)))


def _stored(shard: IndexedShard) -> StoredShard:
    assert shard.stat is not None
    return StoredShard(shard.place, shard.stat)


def _kept(cache: ShardCache, shard: StoredShard) -> Path:
    """Where what is inside a shard is kept."""
    return cache.folder / "index" / f"{shard.key}.json"


def _index(shard: IndexedShard, rules: Rules, cache: ShardCache) -> None:
    stored = _stored(shard)
    try:
        hold = cache.fetch(stored)
    except Lost as error:
        raise DataError(f"{shard.place}: expected a .tar file that can be read, {error.strerror}") from None
    except NoRoom as error:
        raise DataError(f"--data.cache-gb: expected room for the shard {shard.place}, {error}") from None
    assert hold is not None
    try:
        content = index_shard(os.fspath(cache.path(stored)), rules, shard.place)
    finally:
        hold.release()
    _write(_kept(cache, stored), json.dumps(content._asdict()))


def packed_index(source: ImageSource) -> bytes:
    """What was found inside its shards, for hosts with other caches; nothing where that is known otherwise."""
    if not isinstance(source, StoredTarSource):
        return b""
    places = [_kept(source.cache, shard) for shard in source.stored]
    found = {path.name: path.read_text("utf-8", "surrogateescape") for path in places if path.is_file()}
    return zlib.compress(json.dumps(found).encode()) if found else b""


def unpack_index(packed: bytes, stores: Stores) -> None:
    if not packed:
        return
    folder = open_cache(stores).folder / "index"
    folder.mkdir(exist_ok=True)
    for name, text in json.loads(zlib.decompress(packed)).items():
        if not (folder / name).is_file():
            _write(folder / name, text)


def _write(path: Path, text: str) -> None:
    """Appears whole, whoever else writes the same."""
    file, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    with open(file, "w", encoding="utf-8", errors="surrogateescape") as opened:
        opened.write(text)
        opened.flush()
        os.fsync(file)  # or it might be there, and empty, when the machine comes back
    os.rename(temporary, path)
