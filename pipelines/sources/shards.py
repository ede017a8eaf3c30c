"""Images in WebDataset `.tar` shards."""

import os
import tarfile
from bisect import bisect_right
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from reco_fast.errors import DataError
from reco_fast.pipelines.sources.image_source import IMAGE_SUFFIXES, ImageSource, stamp_of


class TarSource(ImageSource):
    """Images inside uncompressed `.tar` shards in WebDataset layout, found once by their headers and then read in
    any order. Labels are the `.cls` members (an integer each) where every image has one."""

    def __init__(self, shards: list[Path], root: Path | None = None) -> None:
        self.shards = [os.fspath(shard) for shard in shards]
        unreadable: dict[str, str] = {}
        names: list[str] = []
        labels: list[int | None] = []
        places: list[tuple[int, int]] = []
        counts = [0]
        for path in shards:
            shard = os.fspath(path.relative_to(root)) if root else path.name
            try:
                entries, reason = _index_shard(path)
            except tarfile.ReadError as error:
                raise DataError(f"{path}: expected an uncompressed .tar file, got something else ({error})") from None
            except OSError as error:
                raise DataError(f"{path}: cannot be read, {error.strerror}") from None
            if reason:
                unreadable[shard] = reason
            for entry in entries:
                names.append(f"{shard}/{entry.name}")
                labels.append(entry.label)
                places.append((entry.offset, entry.size))
            counts.append(len(names))
        if not names:
            raise DataError(f"{shards[0]}: expected images inside (.jpg, .png, .webp, …), it has none")
        super().__init__(names)
        self.unreadable = unreadable
        self._places = np.array(places, np.int64)
        self._counts = counts
        known = [label for label in labels if label is not None]
        if len(known) == len(labels):
            values, numbers = np.unique(np.array(known, np.int64), return_inverse=True)
            self.labels, self.classes = numbers.astype(np.int64), [str(value) for value in values.tolist()]

    def read(self, index: int) -> bytes:
        offset, size = self._places[index].tolist()
        with open(self._shard(index), "rb", buffering=0) as file:
            return os.pread(file.fileno(), size, offset)

    def stamp(self, index: int) -> tuple[int, int]:
        return int(self._places[index, 1]), stamp_of(self._shard(index))[1]

    def _shard(self, index: int) -> str:
        return self.shards[bisect_right(self._counts, index) - 1]

    def sizes(self) -> NDArray[np.int64]:
        return self._places[:, 1]


class _Member(NamedTuple):
    name: str
    offset: int
    size: int
    label: int | None


def _index_shard(path: Path) -> tuple[list[_Member], str]:
    """The images of a shard, and why the listing stopped before its end ("" where it did not)."""
    found: list[tuple[str, str, bool, int, int]] = []  # name, key, is it named `key.jpg`, offset, size
    labels: dict[str, int] = {}
    reason = ""
    expected = 0  # where the next header should be
    with tarfile.open(path, "r:") as tar, open(path, "rb") as file:
        tar.ignore_zeros = True  # past a damaged header, and the end mark of the first of two joined archives
        try:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # or it keeps every header
                if member.offset > expected and os.pread(file.fileno(), 512, expected).strip(b"\0"):
                    reason = f"damaged at byte {expected:,}, some of its images may be missing"
                expected = tar.offset
                folder, _, base = member.name.rpartition("/")
                stem, _, extension = base.partition(".")
                key, extension = f"{folder}/{stem}", f".{extension.lower()}"
                if not member.isfile() or base.startswith("."):
                    continue
                if extension == ".cls":
                    text = os.pread(file.fileno(), min(member.size, 32), member.offset_data)
                    if text.strip().isdigit():
                        labels[key] = int(text)
                elif f".{extension.rpartition('.')[2]}" in IMAGE_SUFFIXES:
                    found.append((member.name, key, extension in IMAGE_SUFFIXES, member.offset_data, member.size))
            if os.pread(file.fileno(), 512, expected).strip(b"\0"):
                reason = reason or f"ends inside the header at byte {expected:,}"
        except tarfile.ReadError as error:
            if not found:
                raise
            reason = f"ends at {found[-1][0]}: {error}"
    plain = {key for _, key, is_plain, _, _ in found if is_plain}  # `key.mask.png` is no sample beside `key.jpg`
    members = [
        _Member(name, offset, size, labels.get(key))
        for name, key, is_plain, offset, size in found
        if is_plain or key not in plain
    ]
    return members, reason
