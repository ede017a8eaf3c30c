"""Where shards are written to: a folder, or what is below a URL. What is there appears whole or not at all."""

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from reco_fast.errors import ConfigError, DataError
from reco_fast.pipelines.sources.kinds import NOW
from reco_fast.pipelines.sources.shards import index_shard
from reco_fast.pipelines.stores import store
from reco_fast.pipelines.stores.opening import indexed, open_cache
from reco_fast.pipelines.stores.shard_index import IndexedShard
from reco_fast.pipelines.stores.store import Stat
from reco_fast.pipelines.stores.where import HERE, is_url
from reco_fast.settings.typed import at_home


class Target:
    """A folder. `place`: as a person says it."""

    def __init__(self, folder: Path) -> None:
        self.place = os.fspath(folder)
        self._folder = folder

    def stats(self) -> dict[str, Stat]:
        """Of the files inside at any depth, where training would find them, by path below it."""
        found = (path for path in self._folder.rglob("*") if path.is_file())
        return {path.relative_to(self._folder).as_posix(): Stat(path.stat().st_size, "") for path in found}

    def contents(self, shards: list[IndexedShard]) -> Iterator[IndexedShard]:
        """With what is inside those of which it is not known."""
        for shard in shards:
            yield shard._replace(content=shard.content or index_shard(shard.place))

    def read(self, name: str) -> bytes:
        return (self._folder / name).read_bytes()

    def temporary(self, name: str) -> Path:
        """Where a file is written before it is sent."""
        return self._folder / f".{name}.tmp"

    def send(self, name: str) -> None:
        """From its `temporary` place, where nothing stays."""
        path = self.temporary(name)
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        path.rename(self._folder / name)

    def write(self, name: str, data: bytes) -> None:
        self.temporary(name).write_bytes(data)
        self.send(name)


class _StoreTarget(Target):
    """What is below a URL; `scratch`: a folder for what is about to be sent."""

    def __init__(self, url: str, scratch: Path) -> None:
        super().__init__(scratch)
        self.place = url.rstrip("/")

    def stats(self) -> dict[str, Stat]:
        return store.listing(self.place)

    def contents(self, shards: list[IndexedShard]) -> Iterator[IndexedShard]:
        return indexed(shards, NOW, open_cache(HERE), HERE)

    def read(self, name: str) -> bytes:
        return store.read_whole(store.join(self.place, name))

    def send(self, name: str) -> None:
        path = self.temporary(name)
        store.upload(os.fspath(path), store.join(self.place, name))
        path.unlink()


@contextlib.contextmanager
def open_target(text: str) -> Iterator[Target]:
    """The place that a person named; a folder is made where there is none. Raises DataError where it cannot be written,
    in the block too."""
    url = text.removeprefix("file://")
    try:
        if is_url(url):
            store.check_url(url)
            with tempfile.TemporaryDirectory(prefix="make_shards-") as scratch:
                yield _StoreTarget(url, Path(scratch))
        else:
            folder = at_home(url)
            folder.mkdir(parents=True, exist_ok=True)
            with _alone(folder):
                yield Target(folder)
    except OSError as error:  # a store's, Lost, is one
        where = f" ({error.filename})" if error.filename else ""
        raise DataError(f"{text}: expected a place for shards, {error.strerror or error}{where}") from None


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Raises ConfigError where another process of this host writes there."""
    number = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ConfigError(f"{folder}: expected a folder of one process, another is writing shards there") from None
    finally:
        os.close(number)
