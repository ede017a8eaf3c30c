"""Whole shards of a store on the local disk: fetched in long pieces, shared by all processes of a host, bounded.

Any number of processes, of one run or of several, may use one folder, and each may be killed at any time: what is there
under its final name is whole, a lock ends with its process, and what nobody holds any more is removed when room is
needed.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from reco_fast.pipelines.stores import store
from reco_fast.pipelines.stores.store import Lost, Stat

PIECE = 16 * 2**20  # bytes of one request
_POLL = 0.05  # seconds, for another process that fetches the same
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


class StoredShard(NamedTuple):
    """A shard as it was when it was indexed."""

    url: str
    stat: Stat

    @property
    def key(self) -> str:
        """Equal only for the same content."""
        return hashlib.sha256(f"{self.url}\0{self.stat.size}\0{self.stat.tag}".encode()).hexdigest()[:40]

    def check(self) -> None:
        """Raises Lost where the store has something else than was indexed."""
        now = store.stat(self.url)
        if now != self.stat:
            raise Lost(f"it has changed since it was indexed ({now.size:,} bytes, {now.tag or 'no tag'})")


class NoRoom(Exception):
    """All that is in the cache is in use, or the disk is full."""


class ShardCache:
    """Args:
    folder: made where it is not there.
    limit: most bytes of shards in it.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit
        self._shards = folder / "shards"
        self._shards.mkdir(parents=True, exist_ok=True)

    def path(self, shard: StoredShard) -> Path:
        """Where it is if it has been fetched."""
        return self._shards / f"{shard.key}.tar"

    def held(self, shard: StoredShard) -> "Hold | None":
        """The shard, kept from being removed; None where it is not there."""
        try:
            file = os.open(self.path(shard), os.O_RDONLY)
        except FileNotFoundError:
            return None
        fcntl.flock(file, fcntl.LOCK_SH)  # who removes a shard holds it for an instant
        if not _is_at(file, self.path(shard)):
            _unlock(file)
            return None
        os.utime(file)  # the latest use
        return Hold(file)

    def fetch(self, shard: StoredShard, closing: threading.Event | None = None) -> "Hold | None":
        """The shard, fetched unless it is there, and kept from being removed. None where `closing` was set before it
        came.

        Raises:
            Lost: the store has no such shard, or another one in its place.
            NoRoom: it does not fit beside what is in use.
            DataError: the store does not answer, or does not let us in.
        """
        closing = closing or threading.Event()
        part = self._shards / f"{shard.key}.part"
        while not closing.is_set():
            if hold := self.held(shard):
                return hold
            with _locked(part) as file:
                if file is None:  # somebody else fetches it
                    closing.wait(_POLL)
                    continue
                if self.path(shard).exists():
                    part.unlink()
                    continue
                try:
                    self._make_room(file, shard.stat.size)
                    whole = self._download(shard, file, closing)
                    if whole:
                        os.fsync(file)
                        part.rename(self.path(shard))
                finally:
                    part.unlink(missing_ok=True)
        return None

    def _download(self, shard: StoredShard, file: int, closing: threading.Event) -> bool:
        """Returns False where it was told to stop."""
        for start in range(0, shard.stat.size, PIECE):
            if closing.is_set():
                return False
            piece = store.read(shard.url, start, min(start + PIECE, shard.stat.size))
            _on_disk(lambda piece=piece, start=start: os.pwrite(file, piece, start))  # type: ignore[misc]
        shard.check()  # not before: a request more for each shard, and it may change between two pieces
        return True

    def _make_room(self, part: int, size: int) -> None:
        """Take `size` bytes of the disk for a part, in place of shards that nobody uses, the longest unused first."""
        with _alone(self.folder / ".lock"):
            files = []
            for path in self._shards.iterdir():
                with contextlib.suppress(FileNotFoundError):
                    status = path.stat()
                    files.append((status.st_mtime, status.st_size, path))
            used = sum(each for _, each, _ in files)
            for _, each, path in sorted(files):
                if used + size <= self.limit:
                    break
                used -= each if _remove_unused(path) else 0
            if used + size > self.limit:
                raise NoRoom(f"{self.folder}: the shards in use leave less than {size / 1e9:.2f} GB of its limit")
            if size:
                _on_disk(lambda: os.posix_fallocate(part, 0, size))


class Hold:
    """A shard in the cache that stays there until `release`. A copy of its file in a forked process does not count."""

    def __init__(self, file: int) -> None:
        self._file = file

    def release(self) -> None:
        _unlock(self._file)


def _on_disk(write: Callable[[], object]) -> None:
    try:
        write()
    except OSError as error:
        if error.errno in _FULL:
            raise NoRoom(f"the disk of the cache is full ({error.strerror})") from None
        raise


def _unlock(file: int) -> None:
    fcntl.flock(file, fcntl.LOCK_UN)  # closing alone would leave the lock to copies in forked processes
    os.close(file)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One at a time."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        _unlock(file)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[int | None]:
    """A new or left file for us alone; None where another process or thread has it."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        if not _is_at(file, path):  # who had it has renamed or removed it in between
            yield None
            return
        os.ftruncate(file, 0)
        yield file
    finally:
        _unlock(file)


def _remove_unused(path: Path) -> bool:
    """Remove a file that nobody holds."""
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    finally:
        _unlock(file)
    return True


def _is_at(file: int, path: Path) -> bool:
    """Whether an open file is what the path leads to."""
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(file), there)
