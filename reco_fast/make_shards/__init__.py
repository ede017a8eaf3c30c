"""Write images as WebDataset shards, to a folder or a store, so that training reads few large files in place of many.

`python -m reco_fast.make_shards FOLDER URL`, then train with `--data.path URL`.

A shard holds the images as they are stored, not decoded, as KEY.SUFFIX, and KEY.cls with the name of its class where
images have classes. They are shuffled, the same way each time. The key is the number of the image in FOLDER, from 0 in
the order of names: 00000042.jpg is line 43 of make_shards.names.txt, which lies beside the shards, as does their
index.json.

Interrupted, the same command goes on where it stopped. The same images give the same shards, byte by byte.
"""

import json
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn

import tyro

from reco_fast.errors import ConfigError
from reco_fast.make_shards.plan import PlannedShard, ShardPlan, plan_shards, write_shard
from reco_fast.make_shards.target import Target, open_target
from reco_fast.pipelines.sources.image_source import ImageSource
from reco_fast.pipelines.sources.open import open_source
from reco_fast.pipelines.sources.shards import ShardContent, index_shard
from reco_fast.pipelines.stores.opening import INDEX
from reco_fast.pipelines.stores.shard_index import IndexedShard, index_lines
from reco_fast.pipelines.stores.store import Stat
from reco_fast.settings import command_line
from reco_fast.settings.terminal import say
from reco_fast.settings.typed import WithPaths, one_line, shell_word

PLAN, NAMES, BAD = (f"make_shards.{what}" for what in ("json", "names.txt", "bad_images.txt"))
_AT_ONCE = 4  # shards: one is read while another is sent
_READERS = 32  # images
_TELL = 10.0  # seconds between two lines of progress


@dataclass(frozen=True)
class ShardsCommand(WithPaths):
    path: tyro.conf.Positional[str]
    """Images: a folder at any depth, .tar shards, hf:NAME, cifar10, or a URL."""
    url: tyro.conf.Positional[str]
    """Where the shards go: s3://BUCKET/PREFIX, gs://…, or a folder."""
    shard_mb: float = 256.0
    """Most that a shard takes, in 10⁶ bytes, unless an image is larger."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.001 <= self.shard_mb <= 1e6:
            raise ConfigError(f"--shard-mb: expected a number from 0.001 to 1,000,000, got {self.shard_mb:g}")


def main() -> NoReturn:
    command_line.serve("make_shards", ShardsCommand, make_shards, __doc__)


def make_shards(command: ShardsCommand) -> int:
    """Write the shards that are not there. Raises ConfigError or DataError."""
    source = open_source(command.path)
    say(source.passed_over.line())
    for name, reason in source.unreadable.items():
        say(f"{name or command.path}: not all that is in it could be seen, {reason}")
    if source.labels is None:
        say(f"no classes: {source.unlabelled}")
    with open_target(command.url) as target, ThreadPoolExecutor(_READERS) as readers:
        plan = plan_shards(source, command.shard_mb * 1e6, readers)
        there = _begin(target, plan, source)
        todo = [shard for shard in plan.shards if shard.name not in there or there[shard.name].size != shard.size]
        if len(todo) < len(plan.shards):
            say(f"{target.place}: {len(plan.shards) - len(todo):,} of {len(plan.shards):,} shards are there")
        bad, contents = _BadImages(target, plan, source, BAD in there), dict[str, ShardContent]()
        for done, seconds in _written(todo, target, plan, source, readers, bad, contents):
            rate = sum(shard.size for shard in done) / 1e6 / seconds
            say(f"{len(done):,} of {len(todo):,} shards, {rate:.0f} MB/s")
        if todo or INDEX not in there:
            _write_index(target, plan, contents)
        _finish(target, plan, bad, len(source))
    return 0


def _begin(target: Target, plan: ShardPlan, source: ImageSource) -> dict[str, Stat]:
    """What is there of this plan, by name. Raises ConfigError where it is of another."""
    there = target.stats()
    if PLAN in there:
        try:
            known = json.loads(target.read(PLAN))["fingerprint"]
        except (ValueError, TypeError, KeyError, RecursionError):
            known = None
        if known != plan.fingerprint:
            raise ConfigError(
                f"{target.place}: expected shards of these images and this --shard-mb, those there are of others; "
                "take another place, or remove them"
            )
        return there
    if any(name.endswith(".tar") for name in there):
        raise ConfigError(f"{target.place}: expected a place without .tar files, it has some of somebody else's")
    names = "".join(f"{one_line(name)}\n" for name in source.names)
    target.write(NAMES, names.encode("utf-8", "surrogateescape"))
    shards = {shard.name: shard.size for shard in plan.shards}
    target.write(PLAN, json.dumps({"fingerprint": plan.fingerprint, "shards": shards}, indent=1).encode() + b"\n")
    return {}


class _BadImages:
    """What is left out of the shards, in a file beside them that is there before the shard that lacks it."""

    def __init__(self, target: Target, plan: ShardPlan, source: ImageSource, begun: bool) -> None:
        self._target, self._names = target, source.names
        self._lock = threading.Lock()
        text = target.read(BAD).decode("utf-8", "surrogateescape") if begun else ""
        self._lines = set(text.splitlines())
        self.add(plan.bad)

    def __len__(self) -> int:
        return len(self._lines)

    def add(self, bad: dict[int, str]) -> None:
        with self._lock:
            lines = self._lines | {f"{one_line(self._names[place])}\t{one_line(bad[place])}" for place in bad}
            if lines != self._lines:
                text = "".join(f"{line}\n" for line in sorted(lines))
                self._target.write(BAD, text.encode("utf-8", "surrogateescape"))
                self._lines = lines

    def line(self) -> str:
        """For a person; "" where all are good."""
        if not self._lines:
            return ""
        name, _, reason = min(self._lines).partition("\t")
        return f"left out as unreadable: {len(self):,}, named in {self._target.place}/{BAD}, such as {name}: {reason}"


def _written(
    todo: list[PlannedShard],
    target: Target,
    plan: ShardPlan,
    source: ImageSource,
    readers: ThreadPoolExecutor,
    bad: _BadImages,
    contents: dict[str, ShardContent],
) -> Iterator[tuple[list[PlannedShard], float]]:
    """Write shards and send them, and put into `contents` what is inside; now and then, and at the end, those that are
    there, and the seconds that it took."""
    stop = threading.Event()

    def one(shard: PlannedShard) -> PlannedShard:
        path = target.temporary(shard.name)
        bad.add(write_shard(path, shard, plan, source, readers, lambda: not stop.is_set()))
        contents[shard.name] = index_shard(os.fspath(path))
        target.send(shard.name)
        return shard

    done: list[PlannedShard] = []
    started = told = time.monotonic()
    with _abandoned(ThreadPoolExecutor(_AT_ONCE), stop) as pool:
        for future in as_completed([pool.submit(one, shard) for shard in todo]):
            done.append(future.result())
            if time.monotonic() - told > _TELL or len(done) == len(todo):
                told = time.monotonic()
                yield done, told - started


@contextmanager
def _abandoned(pool: ThreadPoolExecutor, stop: threading.Event) -> Iterator[ThreadPoolExecutor]:
    """`pool`, of which what has not begun never does where the block fails, and `stop` tells the rest."""
    try:
        yield pool
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def _write_index(target: Target, plan: ShardPlan, contents: dict[str, ShardContent]) -> None:
    """`contents`: what is inside the shards of this process; those of one before are looked into."""
    stats = target.stats()
    shards = [
        IndexedShard(f"{target.place}/{shard.name}", shard.name, stats[shard.name], contents.get(shard.name))
        for shard in plan.shards
    ]
    text = "".join(index_lines(target.contents(shards), target.place))
    target.write(INDEX, text.encode("utf-8", "surrogateescape"))


def _finish(target: Target, plan: ShardPlan, bad: _BadImages, count: int) -> None:
    """All shards are there."""
    say(bad.line())
    size = sum(shard.size for shard in plan.shards)
    say(
        f"{target.place}: {count - len(bad):,} images in {len(plan.shards):,} shards, {size / 1e9:.2f} GB; "
        f"train with --data.path {shell_word(target.place)}"
    )
