"""A folder of images at any depth."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from reco_fast.errors import DataError
from reco_fast.pipelines.sources.image_source import IMAGE_SUFFIXES, ImageSource, stamp_of
from reco_fast.pipelines.sources.shards import TarSource


class FolderSource(ImageSource):
    """Image files below a folder. Hidden files and folders (a leading dot) are passed over and links are followed.
    Labels are the folders of the first level where every image is inside one and there are at least two."""

    def __init__(self, root: Path, names: list[str], unreadable: dict[str, str]) -> None:
        super().__init__(names)
        self.root = os.fspath(root)
        self.unreadable = unreadable
        folders = [name.partition("/")[0] if "/" in name else None for name in names]
        found = sorted({folder for folder in folders if folder is not None})
        if None not in folders and len(found) >= 2:
            numbers = {folder: number for number, folder in enumerate(found)}
            self.classes = found
            self.labels = np.array([numbers[folder] for folder in folders if folder is not None], np.int64)

    def read(self, index: int) -> bytes:
        with open(f"{self.root}/{self.names[index]}", "rb", buffering=0) as file:
            return file.read()

    def stamp(self, index: int) -> tuple[int, int]:
        return stamp_of(f"{self.root}/{self.names[index]}")

    def sizes(self) -> NDArray[np.int64]:
        with ThreadPoolExecutor(16) as pool:  # a network file system answers many questions at once
            sizes = list(pool.map(self._sizes, np.array_split(np.arange(len(self)), 64)))
        return np.concatenate(sizes)

    def _sizes(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.array([self.stamp(index)[0] for index in indices.tolist()], np.int64)


def open_folder(root: Path) -> ImageSource:
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
