"""Write down what shards hold, once, so that no run has to read them all before it begins.

`python -m reco_fast.index_shards URL --output index.json`, then train with `--data.path index.json`.

Interrupted, the same command goes on where it stopped. An index that lies beside its shards, in the store too
(`--output s3://bucket/train/index.json`), is found there by `--data.path s3://bucket/train`.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import tyro

from reco_fast.data.images import stores_of
from reco_fast.errors import ConfigError
from reco_fast.pipelines.stores.opening import shards_at
from reco_fast.pipelines.stores.shard_index import IndexedShard, index_lines
from reco_fast.pipelines.stores.where import is_url
from reco_fast.run.files import check_output, whole_file
from reco_fast.settings import command_line
from reco_fast.settings.config import check_cache
from reco_fast.settings.terminal import say
from reco_fast.settings.typed import WithPaths, at_home


@dataclass(frozen=True)
class IndexCommand(WithPaths):
    path: tyro.conf.Positional[str]
    """Shards: a .tar, a pattern such as train-{0000..0127}.tar, or what they lie below; a path or a URL."""
    output: str
    """The index, .json: a file, or a URL."""
    cache: Path | None = None
    """Folder for shards that are fetched; unless said, one in ~/.cache/reco_fast."""
    cache_gb: float = 50.0
    """Most that they take there, in 10⁹ bytes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_cache("cache-gb", self.cache_gb)
        check_output(self.output, (".json",))  # first, for it refuses to repeat a secret
        if is_url(self.output) and not is_url(self.path):
            raise ConfigError(f"--output: expected a file for local shards, got {self.output}")


def main() -> NoReturn:
    command_line.serve("index_shards", IndexCommand, index, __doc__)


def index(command: IndexCommand) -> int:
    """Write the index. Raises ConfigError or DataError."""
    total = Total()
    output = command.output if is_url(command.output) else os.fspath(at_home(command.output).absolute())
    with whole_file(output) as temporary, open(temporary, "w", encoding="utf-8", errors="surrogateescape") as file:
        file.writelines(index_lines(total.of(shards_at(command.path, stores_of(command))), os.path.dirname(output)))
    say(f"{command.output}: {total.images:,} images in {total.shards:,} shards, {total.bytes / 1e9:.1f} GB")
    return 0


class Total:
    """Of shards that pass by."""

    def __init__(self) -> None:
        self.shards = self.images = self.bytes = 0

    def of(self, shards: Iterable[IndexedShard]) -> Iterator[IndexedShard]:
        for shard in shards:
            assert shard.stat is not None
            assert shard.content is not None
            self.shards += 1
            self.images += len(shard.content.names)
            self.bytes += shard.stat.size
            yield shard


if __name__ == "__main__":
    main()
