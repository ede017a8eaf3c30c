"""Which images a process is decoding, in files that outlive it: a decoder may end its process without a word."""

import contextlib
import os
import threading
from collections.abc import Collection, Iterable
from pathlib import Path
from uuid import uuid4

import numpy as np


class Journal:
    """Kept by one loader for the batches that it has under way: one short write a batch. Each of its processes has a
    file of its own, named after the process; `close` removes those of processes that ended in peace. Without a folder
    nothing is written."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = None if folder is None else folder / uuid4().hex
        self._process = 0
        self._file = -1
        self._under_way: list[list[int]] = []
        self._lock = threading.Lock()

    def begin(self, indices: Iterable[int]) -> None:
        """These images are about to be read and decoded, as one batch."""
        if self._folder is None:
            return
        with self._lock:
            if self._process != os.getpid():  # the first batch, or the first in a forked worker
                self._process = os.getpid()
                self._folder.mkdir(parents=True, exist_ok=True)
                self._file = os.open(self._folder / str(self._process), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
                self._under_way.clear()
            self._under_way.append(list(indices))
            self._write()

    def add(self, index: int) -> None:
        """To the newest batch: this image takes the place of a bad one."""
        if self._folder is not None:
            with self._lock:
                self._under_way[-1].append(index)
                self._write()

    def _write(self) -> None:
        found = [index for batch in self._under_way for index in batch]
        os.pwrite(self._file, np.array([len(found), *found], "<i8").tobytes(), 0)

    def end(self) -> None:
        """The oldest batch has been decoded."""
        with self._lock:
            del self._under_way[:1]

    def close(self, ended: Collection[int] = ()) -> None:
        """This process, and those of `ended`, have nothing under way any more."""
        if self._folder is None:
            return
        if self._process == os.getpid():
            os.close(self._file)
            self._process = 0
        for process in (os.getpid(), *ended):
            (self._folder / str(process)).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not there, or a process that died has left its notes
            self._folder.rmdir()


def left_behind(folder: Path) -> list[int]:
    """The images that processes had under way which never closed their journals below `folder`, each once."""
    found: set[int] = set()
    for path in folder.glob("*/*"):
        data = path.read_bytes()
        values = np.frombuffer(data[: len(data) // 8 * 8], "<i8")
        if len(values) and 0 <= values[0] < len(values):
            found.update(values[1 : 1 + values[0]].tolist())
    return sorted(found)
