"""Which image goes into which shard, known to the byte before any is read; and a shard as it is written."""

import hashlib
import io
import os
import re
import tarfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from reco_fast.errors import DataError
from reco_fast.pipelines.augmentations import random_permutation
from reco_fast.pipelines.base import none_good
from reco_fast.pipelines.heif import HEIF_SUFFIXES
from reco_fast.pipelines.sources.image_source import ImageSource
from reco_fast.pipelines.sources.kinds import IMAGE_SUFFIXES, suffix_of
from reco_fast.pipelines.sources.shards import LONGEST_CLASS

_SUFFIXES = IMAGE_SUFFIXES | HEIF_SUFFIXES
_OTHER_NAMES = {"jpeg": ".jpg", "jpeg2000": ".jp2"}  # of Pillow's
_VERSION = 1  # of what a plan makes of the same images; with another, no shard is taken over
_BLOCK = 512  # bytes
_END = 2 * _BLOCK
_AHEAD = 32  # images of a shard that are read ahead
_TOO_MANY = 10  # images of a shard, all bad: nobody wants one without any


@dataclass(frozen=True)
class PlannedShard:
    """`size` in bytes; `images`: [n] places in the source, in the order in which they stand."""

    name: str
    size: int
    images: NDArray[np.int64]


@dataclass(frozen=True)
class ShardPlan:
    """`sizes`: [len] bytes of each image of the source; `bad`: what is left out, place → reason; `texts`: of each class
    what stands in its `.cls`, none where the images have no classes; `fingerprint`: equal only for the same shards."""

    shards: list[PlannedShard]
    sizes: NDArray[np.int64]
    bad: dict[int, str]
    texts: list[bytes]
    fingerprint: str


def plan_shards(source: ImageSource, most: float, pool: ThreadPoolExecutor) -> ShardPlan:
    """The images in an order that has nothing to do with that of the source, in shards of nearly the same size, about
    `most` bytes or less. The same source and `most` give the same plan. Raises DataError."""
    sizes, bad = _sizes(source, pool)
    texts = [_text_of(name) for name in source.classes] if source.labels is not None else []
    costs = _BLOCK + _padded(sizes)
    if source.labels is not None:
        costs += _BLOCK + _padded(np.array([len(text) for text in texts], np.int64))[source.labels]
    order = random_permutation(len(source), 0, 0)
    order = order[~np.isin(order, list(bad))]
    if not len(order):
        raise none_good({source.names[place]: reason for place, reason in bad.items()})
    ends = np.cumsum(costs[order])
    count = max(1, -int(-ends[-1] // most))
    numbers = (ends - costs[order]) // -int(-ends[-1] // count)
    parts = np.split(order, np.flatnonzero(np.diff(numbers)) + 1)  # fewer where an image is larger than a shard
    shards = [
        PlannedShard(f"{number:06d}.tar", int(costs[images].sum()) + _END, images)
        for number, images in enumerate(parts)
    ]
    digest = hashlib.sha256(repr((_VERSION, source.fingerprint(), most, texts, sorted(bad))).encode())
    digest.update(sizes.tobytes() + (b"" if source.labels is None else source.labels.tobytes()))
    return ShardPlan(shards, sizes, bad, texts, digest.hexdigest()[:32])


def write_shard(
    path: Path,
    shard: PlannedShard,
    plan: ShardPlan,
    source: ImageSource,
    pool: ThreadPoolExecutor,
    go_on: Callable[[], bool],
) -> dict[int, str]:
    """Write a shard of its planned size to `path`, the same bytes each time: of each image `KEY.SUFFIX` and `KEY.cls`,
    with its place in the source as the key. What cannot be read is left out, with zeros at the end in its stead; and
    returned, place → reason.

    Raises DataError where none can be read, and InterruptedError where `go_on` says no.
    """
    bad = {}
    with open(path, "wb") as file:
        for place, data in _read_ahead(shard.images.tolist(), plan.sizes, source, pool):
            if not go_on():
                raise InterruptedError
            if isinstance(data, str):
                bad[place] = data
                continue
            key = f"{place:08d}"
            file.write(_member(f"{key}{_suffix(source.names[place], data)}", data))
            if source.labels is not None:
                file.write(_member(f"{key}.cls", plan.texts[source.labels[place]]))
        if len(bad) == len(shard.images) >= _TOO_MANY:
            raise none_good({source.names[place]: reason for place, reason in bad.items()})
        file.truncate(shard.size)
    return bad


def _sizes(source: ImageSource, pool: ThreadPoolExecutor) -> tuple[NDArray[np.int64], dict[int, str]]:
    """[len] bytes of each image, and what cannot be had, place → reason. Reads those whose size nobody knows."""
    sizes = source.sizes().copy()
    unknown = np.flatnonzero(sizes < 0).tolist()
    bad = {int(place): "an empty file" for place in np.flatnonzero(sizes == 0)}
    for place, data in zip(unknown, pool.map(_read, repeat(source), unknown), strict=True):
        if isinstance(data, str):
            bad[place] = data
        sizes[place] = 0 if isinstance(data, str) else len(data)
    return sizes, bad


def _read(source: ImageSource, place: int) -> bytes | str:
    """An image, or why there is none."""
    try:
        return source.read(place) or "an empty file"
    except OSError as error:
        return error.strerror or str(error) or type(error).__name__


def _read_ahead(
    places: Sequence[int], sizes: NDArray[np.int64], source: ImageSource, pool: ThreadPoolExecutor
) -> Iterator[tuple[int, bytes | str]]:
    """The images at these places, in their order, or why there is none."""
    reading: deque[Future[bytes | str]] = deque()
    try:
        for number, place in enumerate(places):
            while len(reading) < min(_AHEAD, len(places) - number):
                reading.append(pool.submit(_read, source, places[number + len(reading)]))
            data = reading.popleft().result()
            if not isinstance(data, str) and len(data) != sizes[place]:
                data = f"had {sizes[place]:,} bytes before and {len(data):,} when it was read"
            yield place, data
    finally:
        for each in reading:
            each.cancel()


def _member(name: str, data: bytes) -> bytes:
    """A file of a `.tar`, with nothing in its header that the next time could be another."""
    header = tarfile.TarInfo(name)
    header.size, header.mode = len(data), 0o644
    return b"".join((header.tobuf(tarfile.USTAR_FORMAT), data, bytes(-len(data) % _BLOCK)))


def _padded(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    return -(-sizes // _BLOCK) * _BLOCK


def _suffix(name: str, data: bytes) -> str:
    """That of the name where it is of an image; or of what it is."""
    suffix = suffix_of(name.rpartition("/")[2])
    if suffix in _SUFFIXES:
        return suffix
    try:
        with Image.open(io.BytesIO(data)) as image:
            kind = (image.format or "").lower()
    except Exception:  # Pillow raises many
        kind = ""
    suffix = _OTHER_NAMES.get(kind, f".{kind}")
    return suffix if suffix in _SUFFIXES else ".jpg"


def _text_of(name: str) -> bytes:
    """The content of a `.cls` member from which this class is read again. Raises DataError."""
    text = os.fsencode(name)
    odd = name.strip("\0 \t\r\n") != name or len(name.splitlines()) != 1 or re.fullmatch(r"-\d+", name)
    if odd or len(text) > LONGEST_CLASS:
        raise DataError(
            f"{name!r}: expected the name of a class in one line of at most {LONGEST_CLASS} bytes, without blanks at "
            "its ends, and no number below 0"
        )
    return text
