"""What shards hold, written down once, so that opening them reads none: `index.json`.

The file is an index of WebDataset's `wids` too, whose own are read: they lack what is inside the shards.
"""

import json
import os
import posixpath
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from reco_fast.errors import DataError
from reco_fast.pipelines.sources.shards import ShardContent
from reco_fast.pipelines.stores import store
from reco_fast.pipelines.stores.store import Stat
from reco_fast.pipelines.stores.where import is_url

_PIECE = 4 * 2**20  # bytes of an index in a store, at a time
_KIND = "wids-shard-index-v1"
_MOST = 2**62
_CONTENT = {"names": list, "offsets": list, "sizes": list, "aside": dict, "classes": dict, "passed_over": dict}
_CONTENT["reason"] = str


class IndexedShard(NamedTuple):
    """`place`: a URL, or a path; `name`: with which the names of its images begin; `stat`: as it was when it was
    indexed, None where the index does not say; `content`: the same."""

    place: str
    name: str
    stat: Stat | None
    content: ShardContent | None


def index_lines(shards: Iterable[IndexedShard], folder: str) -> Iterator[str]:
    """The index of `shards` as lines of JSON, one for each. Places below `folder`, in which it will lie, are written
    relative to it."""
    inside = f"{folder.rstrip('/')}/"
    yield f'{{"__kind__": "{_KIND}", "wids_version": 1, "shardlist": [\n'
    separator = ""
    for shard in shards:
        assert shard.stat is not None
        assert shard.content is not None
        content = shard.content._asdict() | {"aside": {str(n): kind for n, kind in shard.content.aside.items()}}
        values = {
            "url": shard.place.removeprefix(inside),
            "nsamples": shard.content.samples,
            "filesize": shard.stat.size,
            "tag": shard.stat.tag,
            "name": shard.name,
            "content": content,
        }
        yield separator + json.dumps(values, separators=(",", ":"))
        separator = ",\n"
    yield "\n]}\n"


def read_index(place: str) -> Iterator[IndexedShard]:
    """The shards of an index at a URL or a path, one by one. Raises DataError where it is none."""
    folder = posixpath.dirname(place)
    for values in _entries(place):
        try:
            yield _shard(values, folder)
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{place}: expected an index of shards, got one with {error} amiss") from None


def _shard(values: Any, folder: str) -> IndexedShard:
    url = values["url"]
    # A path that an index in a store names would be of whose machine?
    if not _is_text(url) or "\0" in url or (is_url(folder) and os.path.isabs(url)):
        raise ValueError("a url")
    place = url if is_url(url) or os.path.isabs(url) else f"{folder}/{url}" if folder else url
    if is_url(place):
        store.check_url(place)
    name = values.get("name", posixpath.basename(url))
    size, tag = values.get("filesize"), values.get("tag", "")
    if not _is_text(name) or not _is_text(tag) or not (size is None or _is_count(size)):
        raise ValueError("a name, a tag or a filesize")
    stat = None if size is None or "tag" not in values else Stat(size, tag)
    return IndexedShard(place, name, stat, content_of(values["content"]) if "content" in values else None)


def content_of(values: Any) -> ShardContent:
    """From JSON. Raises ValueError, TypeError or KeyError where it is something else."""
    for name, kind in _CONTENT.items():
        if not isinstance(values[name], kind):
            raise ValueError(name)
    names, offsets, sizes, reason = values["names"], values["offsets"], values["sizes"], values["reason"]
    if not (len(names) == len(offsets) == len(sizes) and all(map(_is_count, offsets)) and all(map(_is_count, sizes))):
        raise ValueError("offsets or sizes")
    aside = {int(n): kind for n, kind in values["aside"].items()}
    passed_over = {kind: (count, name) for kind, (count, name) in values["passed_over"].items()}
    texts = [*names, *aside.values(), *values["classes"].values(), *(name for _, name in passed_over.values())]
    if not all(map(_is_text, texts)) or not all(_is_count(n) for n, _ in passed_over.values()):
        raise ValueError("names or classes")
    if any(not 0 <= n < len(names) for n in aside):
        raise ValueError("aside")
    return ShardContent(names, offsets, sizes, aside, values["classes"], passed_over, reason)


def _is_text(value: object) -> bool:
    """Whether it is one that a file name could be."""
    try:
        return isinstance(value, str) and os.fsencode(value) is not None
    except UnicodeEncodeError:  # half of a pair of surrogates
        return False


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < _MOST


def _entries(place: str) -> Iterator[Any]:
    """The entries of `shardlist`: those of our own lines one by one, so that a million images fit."""
    lines = _lines(place)
    first = next(lines, "")
    try:
        if first.rstrip().endswith("[") and _KIND in first:
            for line in lines:
                if line.startswith("]"):
                    return
                yield json.loads(line.rstrip().removesuffix(","))
            raise ValueError("its end")
        whole = json.loads(first + "".join(lines))
        listed = whole.get("shardlist") if isinstance(whole, dict) else None
        if not isinstance(listed, list) or not listed or not all(isinstance(entry, dict) for entry in listed):
            raise ValueError("its shardlist")
        yield from listed
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: expected an index of shards in JSON, got a file with {error} amiss") from None


def _lines(place: str) -> Iterator[str]:
    rest = b""
    for piece in _pieces(place):
        *whole, rest = (rest + piece).split(b"\n")
        for line in whole:
            yield line.decode("utf-8", "surrogateescape") + "\n"
    yield rest.decode("utf-8", "surrogateescape")


def _pieces(place: str) -> Iterator[bytes]:
    if not is_url(place):
        try:
            with open(place, "rb") as file:
                while piece := file.read(_PIECE):
                    yield piece
        except OSError as error:
            raise DataError(f"{place}: expected an index of shards, it cannot be read: {error.strerror}") from None
        return
    try:
        size = store.stat(place).size
        for start in range(0, size, _PIECE):
            yield store.read(place, start, min(start + _PIECE, size))
    except store.Lost as error:
        raise DataError(f"{place}: expected an index of shards, it cannot be read: {error.strerror}") from None
