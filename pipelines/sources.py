"""Where encoded images come from, read by index: a folder at any depth or WebDataset `.tar` shards; from here also the
data sets known by name (`named`) and those of Hugging Face (`hugging_face`)."""

import hashlib
import os
import re
import tarfile
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from glob import glob, has_magic
from itertools import product
from pathlib import Path
from typing import NamedTuple, Protocol, overload

import numpy as np
from numpy.typing import NDArray

__all__ = ["DataError", "ImageSource", "open_source"]

_SUFFIXES = "jpg jpeg jpe jfif png webp bmp dib tif tiff gif ppm pgm pbm pnm jp2 j2k avif"
IMAGE_SUFFIXES = frozenset(f".{suffix}" for suffix in _SUFFIXES.split())


class DataError(ValueError):
    """A user's mistake about data, in one line: the path, what was expected, what came."""


class ImageSource(Protocol):
    """Encoded images by index; may be read from many threads and processes at once."""

    names: Sequence[str]
    """Of each image: its path below the opened one, `/` between parts. Unique, sorted."""
    labels: NDArray[np.int64] | None
    """[len] class numbers, or None where the images have no classes."""
    classes: list[str]
    """Class names by number; empty without labels."""
    unreadable: dict[str, str]
    """Folders and shards that could not be listed to their end: name → reason."""
    known_bad: dict[int, str]
    """Images that loaders leave out unread: index → reason."""
    journal: Path | None
    """Folder in which loaders note what they decode; None for nowhere."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> bytes:
        """The file's bytes. Raises OSError where they cannot be had."""
        ...

    def stamp(self, index: int) -> tuple[int, int]:
        """Size in bytes and time of change in ns, of the shard where the image is in one; (-1, 0) where neither can be
        had."""
        ...

    def fingerprint(self) -> str:
        """A hash of all names and sizes: equal only for the same data in the same order."""
        ...


def open_source(path: str | os.PathLike[str]) -> ImageSource:
    """Open a folder of images, a `.tar` file, a folder of `.tar` files, or a pattern of them such as
    `train-{0000..0127}.tar` or `train-*.tar`; `hf:NAME[:SPLIT]` of Hugging Face; or, where nothing has this path,
    `cifar10[:test]` or `stl10[:test|:unlabeled]`.

    Raises:
        DataError: there is nothing at `path`, or no image in it.
    """
    text = os.fspath(path)
    if text.startswith("hf:"):
        from reco_fast.pipelines.hugging_face import open_hugging_face

        return open_hugging_face(text.removeprefix("hf:"))
    place = Path(text).expanduser()
    if place.is_dir():
        return _open_folder(place)
    if place.is_file():
        if place.suffix.lower() != ".tar":
            raise DataError(f"{text}: expected a folder of images or uncompressed .tar shards, got a file")
        return TarSource([place])
    if has_magic(text) or re.search(r"\{.*\}", text):
        shards = sorted(_expand(os.path.expanduser(text)))
        if not shards:
            raise DataError(f"{text}: expected .tar files, no file matches this pattern")
        for shard in shards:
            if not shard.is_file():
                raise DataError(f"{shard}: expected a .tar file, there is none")
        return TarSource(shards)
    from reco_fast.pipelines.named import DATA_SETS, open_named

    name, _, split = text.partition(":")
    if name in DATA_SETS:
        return open_named(name, split)
    raise DataError(f"{text}: expected a folder of images or .tar shards, there is nothing at this path")


def cache_folder() -> Path:
    """Where things are kept that can be had again: `$XDG_CACHE_HOME/reco_fast` or `~/.cache/reco_fast`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "reco_fast"


def _expand(pattern: str) -> Iterator[Path]:
    """Braces (`{a,b}`, `{000..127}`) first, as a shell does, then `*`, `?` and `[…]`."""
    parts = re.split(r"\{([^{}]*)\}", pattern)
    choices = [[part] if place % 2 == 0 else _alternatives(part) for place, part in enumerate(parts)]
    for words in product(*choices):
        name = "".join(words)
        if has_magic(name):
            yield from map(Path, glob(name))
        else:
            yield Path(name)


def _alternatives(braces: str) -> list[str]:
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", braces)
    if not numbers:
        return braces.split(",")
    first, last = numbers.groups()
    return [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]


class PackedNames(Sequence[str]):
    """An immutable list of strings in one block of memory: a million names cost their letters and 8 bytes each, and
    reading them in a forked worker copies no page."""

    def __init__(self, names: Sequence[str]) -> None:
        encoded = [os.fsencode(name) for name in names]  # file names need not be valid UTF-8
        self._letters = b"".join(encoded)
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)

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
        return os.fsdecode(self._letters[self._ends[index] : self._ends[index + 1]])

    def digest(self) -> bytes:
        return hashlib.sha256(self._letters + self._ends.tobytes()).digest()


class FolderSource:
    """Image files below a folder. Hidden files and folders (a leading dot) are passed over and links are followed.
    Labels are the folders of the first level where every image is inside one and there are at least two."""

    def __init__(self, root: Path, names: list[str], unreadable: dict[str, str]) -> None:
        self.root = os.fspath(root)
        self.names: Sequence[str] = PackedNames(names)
        self.unreadable = unreadable
        self.known_bad: dict[int, str] = {}
        self.journal: Path | None = None
        self.labels: NDArray[np.int64] | None = None
        self.classes: list[str] = []
        folders = [name.partition("/")[0] if "/" in name else None for name in names]
        found = sorted({folder for folder in folders if folder is not None})
        if None not in folders and len(found) >= 2:
            numbers = {folder: number for number, folder in enumerate(found)}
            self.classes = found
            self.labels = np.array([numbers[folder] for folder in folders if folder is not None], np.int64)

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> bytes:
        with open(f"{self.root}/{self.names[index]}", "rb", buffering=0) as file:
            return file.read()

    def stamp(self, index: int) -> tuple[int, int]:
        return stamp_of(f"{self.root}/{self.names[index]}")

    def fingerprint(self) -> str:
        with ThreadPoolExecutor(16) as pool:  # a network file system answers many questions at once
            sizes = list(pool.map(self._sizes, np.array_split(np.arange(len(self)), 64)))
        return fingerprint_of(PackedNames(self.names), np.concatenate(sizes))

    def _sizes(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.array([self.stamp(index)[0] for index in indices.tolist()], np.int64)


def stamp_of(path: str) -> tuple[int, int]:
    """Size in bytes and time of change in ns of a file; (-1, 0) where they cannot be had."""
    try:
        status = os.stat(path)
    except OSError:
        return -1, 0
    return status.st_size, status.st_mtime_ns


def _open_folder(root: Path) -> ImageSource:
    names: list[str] = []
    shards: list[str] = []
    unreadable: dict[str, str] = {}
    other = _list_folder(os.fspath(root), "", names, shards, unreadable, ())
    if names:
        return FolderSource(root, sorted(names), unreadable)
    if shards:
        return TarSource([root / name for name in sorted(shards)], root)
    if unreadable:
        name, reason = next(iter(unreadable.items()))
        raise DataError(f"{root / name}: expected a folder that can be listed, {reason}")
    content = "it has none of them" if other else "it is empty"
    raise DataError(f"{root}: expected images (.jpg, .png, .webp, …) or .tar shards below this folder, {content}")


def _list_folder(
    root: str,
    below: str,
    names: list[str],
    shards: list[str],
    unreadable: dict[str, str],
    parents: tuple[tuple[int, int], ...],
) -> bool:
    """Append what lies below `root/below`; true where there is any file of another kind. `parents`: device and inode
    of the folders on the way here, so that a link to one of them does not go round for ever."""
    other = False
    folders: list[str] = []
    try:
        here = os.stat(f"{root}/{below}")
        identity = (here.st_dev, here.st_ino)
        if identity in parents:
            return False
        with os.scandir(f"{root}/{below}") as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                suffix = os.path.splitext(entry.name)[1].lower()
                if entry.is_dir():
                    folders.append(f"{below}{entry.name}/")
                elif not entry.is_file() and not entry.is_symlink():
                    other = True  # a pipe or socket: reading it could wait for ever
                elif suffix in IMAGE_SUFFIXES:  # a broken link too: it is met, and named, as a bad image
                    names.append(below + entry.name)
                elif suffix == ".tar":
                    shards.append(below + entry.name)
                else:
                    other = True
    except OSError as error:
        unreadable[below] = error.strerror or type(error).__name__
        return other
    for folder in folders:
        other |= _list_folder(root, folder, names, shards, unreadable, (*parents, identity))
    return other


class TarSource:
    """Images inside uncompressed `.tar` shards in WebDataset layout, found once by their headers and then read in
    any order. Labels are the `.cls` members (an integer each) where every image has one."""

    def __init__(self, shards: list[Path], root: Path | None = None) -> None:
        self.shards = [os.fspath(shard) for shard in shards]
        self.unreadable: dict[str, str] = {}
        self.known_bad: dict[int, str] = {}
        self.journal: Path | None = None
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
                self.unreadable[shard] = reason
            for entry in entries:
                names.append(f"{shard}/{entry.name}")
                labels.append(entry.label)
                places.append((entry.offset, entry.size))
            counts.append(len(names))
        if not names:
            raise DataError(f"{shards[0]}: expected images inside (.jpg, .png, .webp, …), it has none")
        self.names: Sequence[str] = PackedNames(names)
        self._places = np.array(places, np.int64)
        self._counts = counts
        self.labels: NDArray[np.int64] | None = None
        self.classes: list[str] = []
        known = [label for label in labels if label is not None]
        if len(known) == len(labels):
            values, numbers = np.unique(np.array(known, np.int64), return_inverse=True)
            self.labels, self.classes = numbers.astype(np.int64), [str(value) for value in values.tolist()]

    def __len__(self) -> int:
        return len(self._places)

    def read(self, index: int) -> bytes:
        offset, size = self._places[index].tolist()
        with open(self._shard(index), "rb", buffering=0) as file:
            return os.pread(file.fileno(), size, offset)

    def stamp(self, index: int) -> tuple[int, int]:
        return int(self._places[index, 1]), stamp_of(self._shard(index))[1]

    def _shard(self, index: int) -> str:
        return self.shards[bisect_right(self._counts, index) - 1]

    def fingerprint(self) -> str:
        return fingerprint_of(PackedNames(self.names), self._places[:, 1])


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


def fingerprint_of(names: PackedNames, sizes: NDArray[np.int64]) -> str:
    """Of `names` and `sizes` [len(names)] in bytes, 32 hexadecimal digits."""
    return hashlib.sha256(names.digest() + sizes.tobytes()).hexdigest()[:32]
