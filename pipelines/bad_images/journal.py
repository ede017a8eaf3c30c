"""Which images a process is decoding, in files that outlive it: a decoder may end its process without a word."""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from uuid import uuid4

import numpy as np


class Journal:
    """Kept by one loader for the batches that it has under way: one short write a batch. Each of its processes has a
    file of its own; `close` removes them all. Without a folder nothing is written."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = None if folder is None else folder / uuid4().hex
        self._process = 0
        self._file = -1
        self._under_way: list[list[int]] = []

    def begin(self, indices: Iterable[int]) -> None:
        """These images are about to be read and decoded."""
        if self._folder is None:
            return
        if self._process != os.getpid():  # the first batch, or the first in a forked worker
            self._process = os.getpid()
            self._folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self._folder / str(self._process), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            self._under_way.clear()
        self._under_way.append(list(indices))
        found = [index for batch in self._under_way.copy() for index in batch]  # `end` is another thread's
        os.pwrite(self._file, np.array([len(found), *found], "<i8").tobytes(), 0)

    def end(self) -> None:
        """The oldest batch has been decoded."""
        del self._under_way[:1]

    def close(self) -> None:
        if self._folder is not None:
            if self._process == os.getpid():
                os.close(self._file)
                self._process = 0
            shutil.rmtree(self._folder, ignore_errors=True)


def left_behind(folder: Path) -> list[int]:
    """The images that processes had under way which never closed their journals below `folder`, each once."""
    found: set[int] = set()
    for path in folder.glob("*/*"):
        data = path.read_bytes()
        values = np.frombuffer(data[: len(data) // 8 * 8], "<i8")
        if len(values) and 0 <= values[0] < len(values):
            found.update(values[1 : 1 + values[0]].tolist())
    return sorted(found)
