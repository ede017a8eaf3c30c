"""What every source of encoded images is to the loaders."""

import hashlib
import os
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray

from reco_fast.pipelines.order import Order
from reco_fast.pipelines.pixels import UNSAID, Decoding, Notices
from reco_fast.pipelines.sources.kinds import PassedOver


class PackedNames(Sequence[str]):
    """An immutable list of strings in one block of memory: a million names cost their letters and 8 bytes each, and
    reading them in a forked worker copies no page."""

    def __init__(self, names: Sequence[str]) -> None:
        encoded = [os.fsencode(name) for name in names]  # file names need not be valid UTF-8
        self._letters: bytes | bytearray = b"".join(encoded)
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)

    @classmethod
    def of(cls, letters: bytearray, ends: NDArray[np.int64]) -> "PackedNames":
        """All names one behind the other, and where each ends, after a 0."""
        packed = cls([])
        packed._letters, packed._ends = letters, ends
        return packed

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        return os.fsdecode(bytes(self._letters[self._ends[index] : self._ends[index + 1]]))

    def __iter__(self) -> Iterator[str]:
        for first in range(0, len(self), 4096):
            for start, end in pairwise(self._ends[first : first + 4097].tolist()):
                yield os.fsdecode(bytes(self._letters[start:end]))

    def find(self, wanted: Iterable[str]) -> dict[str, list[int]]:
        """All places, ascending, of each of the `wanted` names that is here: one pass, whatever the order."""
        asked = frozenset(wanted)
        places: defaultdict[str, list[int]] = defaultdict(list)
        for index, name in enumerate(self if asked else ()):
            if name in asked:
                places[name].append(index)
        return dict(places)

    def digest(self) -> bytes:
        digest = hashlib.sha256(self._letters)
        digest.update(self._ends.data)
        return digest.digest()


class Supply:
    """What a loader tells how far it has come. Here all images are at hand and nobody needs to know."""

    def advance(self) -> None:
        """One more batch has been handed out."""

    def close(self) -> None:
        """No more will be; more than once is fine."""


class ImageSource(ABC):
    """Encoded images by index; may be read from many threads and processes at once."""

    at_once = 1
    """How many reads one process should have under way: 1 where none waits for another machine."""
    ends: list[int] | None = None
    """How many images there are up to the end of each shard; None where they are in none."""

    names: PackedNames
    """Of each image: its path below the opened one, `/` between parts. In no order that one could search by, and not
    always unique: a shard keeps its members as they come, and may hold two of one name."""
    labels: NDArray[np.int64] | None
    """[len] class numbers, or None where the images have no classes."""
    classes: list[str]
    """Class names by number; empty without labels."""
    unlabelled: str
    """Why there are no labels, such as "all 20 lie in one folder"; empty where there are."""
    unreadable: dict[str, str]
    """Folders and shards that could not be listed to their end: name → reason."""
    passed_over: PassedOver
    """What lies among the images and is not taken."""
    known_bad: dict[int, str]
    """Images that loaders leave out unread: index → reason."""
    journal: Path | None
    """Folder in which loaders note what they decode; None for nowhere."""
    decoding: Decoding
    """How what is transparent or deep is to be read."""
    notices: Notices
    """What loaders have to say of images that they use all the same."""
    notes: list[str]
    """What somebody who opens it should know, a line each."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names if isinstance(names, PackedNames) else PackedNames(names)
        self.labels = None
        self.classes = []
        self.unlabelled = "nothing says of which class an image is"
        self.unreadable = {}
        self.passed_over = PassedOver()
        self.known_bad = {}
        self.journal = None
        self.decoding = UNSAID
        self.notices = Notices()
        self.notes = []
        self._fingerprint = ""

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The file's bytes. Raises OSError where they cannot be had."""

    @abstractmethod
    def stamp(self, index: int) -> tuple[int, int]:
        """Size in bytes and time of change in ns, of the shard where the image is in one; (-1, 0) where neither can be
        had."""

    @abstractmethod
    def sizes(self) -> NDArray[np.int64]:
        """[len] Bytes of each image; -1 where they cannot be had."""

    def supply(self, order: Order, step: int) -> Supply:
        """Whatever brings images here for the batches of `order` from `step` on; for a loader, which closes it."""
        return Supply()

    def named(self, bad: Mapping[int, str]) -> dict[str, str]:
        """Name → reason, of images that could not be used, index → reason."""
        return {self.names[index]: reason for index, reason in bad.items()}

    def fingerprint(self) -> str:
        """A hash of all names and sizes, 32 hexadecimal digits: equal only for the same data in the same order."""
        if not self._fingerprint:
            self._fingerprint = hashlib.sha256(self.names.digest() + self.sizes().tobytes()).hexdigest()[:32]
        return self._fingerprint


def stamp_of(path: str) -> tuple[int, int]:
    """Size in bytes and time of change in ns of a file; (-1, 0) where they cannot be had."""
    try:
        status = os.stat(path)
    except OSError:
        return -1, 0
    return status.st_size, status.st_mtime_ns
