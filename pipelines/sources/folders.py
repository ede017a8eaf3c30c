"""A folder of images at any depth."""

import errno
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from reco_fast.errors import DataError
from reco_fast.pipelines.sources import kinds
from reco_fast.pipelines.sources.image_source import ImageSource, stamp_of
from reco_fast.pipelines.sources.kinds import NOW, PassedOver, Rules
from reco_fast.pipelines.sources.labels import by_folder
from reco_fast.pipelines.sources.shards import open_shards


def _without_waiting(path: str, flags: int) -> int:
    """An opener that does not wait for the other end of a pipe."""
    return os.open(path, flags | os.O_NONBLOCK)


class FolderSource(ImageSource):
    """Image files below a folder. Hidden files and folders (a leading dot) are passed over and links are followed.
    Labels are the folders of the first level where every image is inside one and there are at least two."""

    def __init__(self, root: Path, names: list[str], unreadable: dict[str, str]) -> None:
        super().__init__(names)
        self.root = os.fspath(root)
        self.unreadable = unreadable
        self.labels, self.classes, self.unlabelled = by_folder(names)

    def read(self, index: int) -> bytes:
        with open(f"{self.root}/{self.names[index]}", "rb", buffering=0, opener=_without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # a link may lead to anything
                raise OSError(errno.EINVAL, "no ordinary file")
            return file.read()

    def stamp(self, index: int) -> tuple[int, int]:
        return stamp_of(f"{self.root}/{self.names[index]}")

    def sizes(self) -> NDArray[np.int64]:
        with ThreadPoolExecutor(16) as pool:  # a network file system answers many questions at once
            sizes = list(pool.map(self._sizes, np.array_split(np.arange(len(self)), 64)))
        return np.concatenate(sizes)

    def _sizes(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.array([self.stamp(index)[0] for index in indices.tolist()], np.int64)


def open_folder(root: Path, rules: Rules = NOW) -> ImageSource:
    listing = _listing(root, rules)
    source: ImageSource
    if listing.names:
        _keep_classes(listing)
        for shard in listing.shards:
            listing.passed_over.add(".tar", shard)
        source = FolderSource(root, sorted(listing.names), listing.unreadable)
        source.passed_over = listing.passed_over
        return source
    if listing.shards:
        shards = sorted(listing.shards)
        source = open_shards([os.fspath(root / name) for name in shards], shards, rules)
        source.unreadable |= listing.unreadable
        source.passed_over.include(listing.passed_over)
        return source
    if listing.unreadable:
        name, reason = next(iter(listing.unreadable.items()))
        raise DataError(f"{root / name}: expected a folder that can be listed, {reason}")
    passed_over = listing.passed_over.line()
    content = f"it has none of them ({passed_over})" if passed_over else "it is empty"
    raise DataError(f"{root}: expected images (.jpg, .png, .webp, …) or .tar shards below this folder, {content}")


def shards_below(root: Path, rules: Rules = NOW) -> list[str]:
    """The `.tar` files that `open_folder` takes where there are no other images: paths below `root`, in its order."""
    return sorted(_listing(root, rules).shards)


def _listing(root: Path, rules: Rules) -> "_Listing":
    listing = _Listing(os.fspath(root), rules)
    if not (listing.names or listing.shards) and not rules.tools:
        inside = _Listing(os.fspath(root), rules._replace(tools=True))  # where there is nothing else
        listing = inside if inside.names or inside.shards else listing
    return listing


def _keep_classes(listing: "_Listing") -> None:
    """What only its first bytes, or pillow-heif, make an image does not cost the folders beside it their labels."""
    beside = [name for name in listing.names if "/" not in name]
    if not beside or any(kinds.suffix_of(name) in kinds.IMAGE_SUFFIXES for name in beside):
        return
    inside = [name for name in listing.names if "/" in name]
    if inside and by_folder(inside).numbers is not None:
        listing.names = inside
        for name in beside:
            listing.passed_over.add(kinds.suffix_of(name) or kinds.NO_SUFFIX, name)


class _Listing:
    """What lies below a folder: `names` of images, `shards`, what is `passed_over`, and folders that are `unreadable`,
    name → reason."""

    def __init__(self, root: str, rules: Rules) -> None:
        self.names: list[str] = []
        self.shards: list[str] = []
        self.unreadable: dict[str, str] = {}
        self.passed_over = PassedOver()
        self._root = root
        self._rules = rules
        self._without_suffix: list[str] = []
        self._linked: set[tuple[int, int]] = set()  # device and inode of what links with the suffix of an image lead to
        self._list("", ())
        self._look_inside()

    def _list(self, below: str, parents: tuple[tuple[int, int], ...]) -> None:
        """`parents`: device and inode of the folders on the way here, so that a link to one of them does not go round
        for ever."""
        folders: list[str] = []
        try:
            here = os.stat(f"{self._root}/{below}")
            identity = (here.st_dev, here.st_ino)
            if identity in parents:
                return
            with os.scandir(f"{self._root}/{below}") as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        if not kinds.is_rubbish(entry.name):
                            self.passed_over.add(kinds.HIDDEN, below + entry.name)
                    elif entry.is_dir():
                        if kinds.is_tool_folder(entry.name) and not self._rules.tools:
                            self.passed_over.add(f"{entry.name}/", f"{below}{entry.name}/")
                        else:
                            folders.append(f"{below}{entry.name}/")
                    else:
                        self._file(below, entry)
        except OSError as error:
            self.unreadable[below] = error.strerror or type(error).__name__
            return
        for folder in folders:
            self._list(folder, (*parents, identity))

    def _file(self, below: str, entry: os.DirEntry[str]) -> None:
        suffix = os.path.splitext(entry.name)[1].lower()
        is_file = entry.is_file()
        if not is_file and not entry.is_symlink():
            self.passed_over.add(kinds.NO_FILE, below + entry.name)  # reading it could wait for ever
        elif self._rules.takes(suffix):  # a broken link too: it is met, and named, as a bad image
            self.names.append(below + entry.name)
            if is_file and entry.is_symlink():
                status = entry.stat()
                self._linked.add((status.st_dev, status.st_ino))
        elif suffix == ".tar":
            self.shards.append(below + entry.name)
        elif not kinds.is_rubbish(entry.name):
            kind = kinds.suffix_of(entry.name)
            if not kind and is_file and self._rules.first_bytes:
                self._without_suffix.append(below + entry.name)
            else:
                self.passed_over.add(kind or kinds.NO_SUFFIX, below + entry.name)

    def _look_inside(self) -> None:
        """Which files without a suffix are images."""
        names = self._without_suffix
        if not names:
            return
        step = 1 + len(names) // 256
        with ThreadPoolExecutor(16) as pool:  # a network file system answers many questions at once
            parts = pool.map(self._kinds, (names[first : first + step] for first in range(0, len(names), step)))
            found = [kind for part in parts for kind in part]
        for name, kind in zip(names, found, strict=True):
            if kind:
                self.passed_over.add(kind, name)
            elif kind is not None:
                self.names.append(name)

    def _kinds(self, names: list[str]) -> list[str | None]:
        return [self._kind(name) for name in names]

    def _kind(self, name: str) -> str | None:
        """As what it is passed over: "" for an image; None for one to which a link has led already."""
        try:
            with open(f"{self._root}/{name}", "rb", buffering=0, opener=_without_waiting) as file:
                status = os.fstat(file.fileno())
                if (status.st_dev, status.st_ino) in self._linked:
                    return None
                return kinds.kind_by_start(file.read(kinds.START), self._rules)
        except OSError:
            return kinds.NO_SUFFIX
