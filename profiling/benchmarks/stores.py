"""Images a second that the loaders make of shards in a store, beside the same shards on the local disk.

    python tests/pipelines/stores/servers.py SHARDS --delay 0.05 --rate 100e6
    python -m reco_fast.profiling.benchmarks.stores --url URL --local SHARDS --cache-gb 0.3 --window 1 --lanes 4

The first is a store on this machine, and prints its URL; any other will do. Each loader takes images in blocks and
uniformly, from the disk and from the store; uniformly from the store it asks for them one by one, for the cache has to
be too small for all shards. All of them take turns, `--rounds` times, each with an empty cache. They are timed after
the first windows, over at least two more. A ratio is the median over the rounds of the ratios within a round.

For each number of `--hosts`, as many processes then read their parts of an epoch in blocks, one after the other, each
with a cache of its own. What they fetch is counted by the store, if it answers URL/.counters.

Prints tables and one line of JSON.
"""

import argparse
import json
import math
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from reco_fast.pipelines.augmentations import reco_recipe
from reco_fast.pipelines.base import LoaderKind
from reco_fast.pipelines.loader import open_loader
from reco_fast.pipelines.order import BlockOrder, TrainingOrder
from reco_fast.pipelines.sources.image_source import ImageSource
from reco_fast.pipelines.sources.kinds import NOW
from reco_fast.pipelines.sources.open import open_source
from reco_fast.pipelines.stores.opening import packed_index, unpack_index
from reco_fast.pipelines.stores.where import Stores
from reco_fast.run.run_folder import environment
from reco_fast.settings.command_line import run
from reco_fast.settings.typed import place

KINDS: tuple[LoaderKind, ...] = ("dali", "torch")


class Entry(NamedTuple):
    """`images` are on the "disk" or in the "store"; `order` is "uniform" or "blocks"."""

    loader: LoaderKind
    images: str
    order: str


class Counters(NamedTuple):
    """What a store has answered; nan where it does not count."""

    requests: float = math.nan
    bytes: float = math.nan
    cpu_seconds: float = math.nan

    def since(self, before: "Counters") -> "Counters":
        return Counters(*(now - then for now, then in zip(self, before, strict=True)))


class Speed(NamedTuple):
    """`cpu`: ms of this process and its children an image, from the loader's start to its end; `store_cpu`: ms of the
    store an image, and `requests` and `bytes` an image: while it is timed."""

    images_per_second: float
    cpu: float
    store_cpu: float
    requests: float
    bytes: float


def counters(url: str) -> Counters:
    try:
        with urllib.request.urlopen(f"{url}/.counters", timeout=60) as answer:
            return Counters(**json.load(answer))
    except (urllib.error.URLError, ValueError):  # another kind of store
        return Counters()


@contextmanager
def with_empty_cache(arguments: argparse.Namespace, index: bytes, cache_bytes: int) -> Iterator[ImageSource]:
    """The shards of the store, with a cache that is empty but for what is known of their content."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # a shard may still be on its way
        stores = Stores(Path(folder), cache_bytes)
        unpack_index(index, stores)
        yield open_source(arguments.url, NOW, stores)


def index_of(arguments: argparse.Namespace) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return packed_index(open_source(arguments.url, NOW, Stores(Path(folder))))


def in_blocks(source: ImageSource, arguments: argparse.Namespace, rank: int = 0, world_size: int = 1) -> BlockOrder:
    assert source.ends is not None
    sizes = {"window": arguments.window, "lanes": arguments.lanes}
    return BlockOrder(source.ends, arguments.batch_size, rank=rank, world_size=world_size, **sizes)


def timed(entry: Entry, source: ImageSource, arguments: argparse.Namespace) -> Speed:
    order = TrainingOrder(len(source), arguments.batch_size)
    if entry.order == "blocks":
        order = in_blocks(source, arguments)
    recipe = reco_recipe(arguments.image_size)
    cpu = _cpu_seconds()
    with open_loader(entry.loader, source, recipe, order, device="cpu", seed=0, workers=arguments.workers) as loader:
        for _ in range(arguments.warmup):
            next(loader)
        before, start = counters(arguments.url), time.perf_counter()
        for _ in range(arguments.batches):
            next(loader)
        seconds, asked = time.perf_counter() - start, counters(arguments.url).since(before)
    images = arguments.batches * arguments.batch_size
    all_images = images + arguments.warmup * arguments.batch_size
    cpu = _cpu_seconds() - cpu
    return Speed(
        images / seconds,
        1e3 * cpu / all_images,
        1e3 * asked.cpu_seconds / images,
        asked.requests / images,
        asked.bytes / images,
    )


def _cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    uses = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(use.ru_utime + use.ru_stime for use in uses)


def compare(arguments: argparse.Namespace, index: bytes) -> list[dict[Entry, Speed]]:
    entries = [
        Entry(loader, images, order)
        for loader in arguments.loaders
        for images, order in (("disk", "blocks"), ("store", "blocks"), ("disk", "uniform"), ("store", "uniform"))
    ]
    local = open_source(arguments.local)
    rounds = []
    for number in range(arguments.rounds):
        turns: dict[Entry, Speed] = {}
        for entry in entries if number % 2 == 0 else reversed(entries):
            if entry.images == "disk":
                turns[entry] = timed(entry, local, arguments)
            else:
                with with_empty_cache(arguments, index, arguments.cache_bytes) as source:
                    turns[entry] = timed(entry, source, arguments)
            print(f"round {number + 1}: {' '.join(entry)}: {turns[entry].images_per_second:,.0f}/s", file=sys.stderr)
        rounds.append({entry: turns[entry] for entry in entries})
    return rounds


def table(rounds: list[dict[Entry, Speed]]) -> str:
    """Markdown, medians over the rounds."""
    lines = [
        "| loader | images | order | images/s | times the disk's | CPU ms an image | the store's | requests an image | "
        "KB an image |",
        "|---|---|---|" + 6 * "---|",
    ]
    for one in rounds[0]:
        median = Speed(*(statistics.median(values) for values in zip(*(turns[one] for turns in rounds), strict=True)))
        cells = [
            *one,
            f"{median.images_per_second:,.0f}",
            f"{against_disk(rounds, one):.3f}",
            f"{median.cpu:.2f}",
            f"{median.store_cpu:.2f}",
            f"{median.requests:.4f}",
            f"{median.bytes / 1e3:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def against_disk(rounds: list[dict[Entry, Speed]], one: Entry) -> float:
    disk = one._replace(images="disk")
    return statistics.median(turns[one].images_per_second / turns[disk].images_per_second for turns in rounds)


def of_each_host(hosts: int, arguments: argparse.Namespace, index: bytes) -> list[Counters]:
    """What each of so many hosts fetches in an epoch. One after the other, for the store does not tell them apart."""
    context = multiprocessing.get_context("spawn")
    found = []
    for rank in range(hosts):
        before = counters(arguments.url)
        host = context.Process(target=_read_epoch, args=(arguments, index, rank, hosts))
        host.start()
        host.join()
        if host.exitcode:
            raise SystemExit(f"host {rank} of {hosts} ended with {host.exitcode}")
        found.append(counters(arguments.url).since(before))
    return found


def _read_epoch(arguments: argparse.Namespace, index: bytes, rank: int, hosts: int) -> None:
    # An order that ends is given 0.3 of a cache in place of 0.7; without an end shards of the next epoch would come.
    with with_empty_cache(arguments, index, arguments.cache_bytes * 7 // 3) as source:
        order = in_blocks(source, arguments, rank, hosts)
        order.steps = len(source) // arguments.batch_size  # batches that are of no other epoch
        supply = source.supply(order, 0)
        for step in range(order.steps):
            for image in order.batch(step)[1].tolist():
                source.read(image)
            supply.advance()
        supply.close()


def hosts_table(by_hosts: dict[int, list[Counters]], shard_bytes: int) -> str:
    lines = ["| hosts | MB that each fetches in an epoch | share of all | requests of each |", "|---|---|---|---|"]
    for hosts, found in by_hosts.items():
        megabytes, shares, requests = (
            ", ".join(text(each) for each in found)
            for text in (
                lambda each: f"{each.bytes / 1e6:,.1f}",
                lambda each: f"{each.bytes / shard_bytes:.3f}",
                lambda each: f"{each.requests:,.0f}",
            )
        )
        lines.append(f"| {hosts} | {megabytes} | {shares} | {requests} |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True, help="of a folder of shards, as --data.path takes it")
    parser.add_argument("--local", type=place, required=True, help="the same shards on the disk")
    parser.add_argument("--cache-gb", type=float, required=True, help="less than the shards; 0.7 of it, two windows")
    parser.add_argument("--window", type=int, default=4, help="as --data.window")
    parser.add_argument("--lanes", type=int, default=8, help="as --data.lanes")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--batches", type=int, help="timed in each round; two windows")
    parser.add_argument("--warmup", type=int, help="batches before; a window, and two for each worker, made ahead")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--loaders", choices=KINDS, nargs="*", default=KINDS)
    parser.add_argument("--hosts", type=int, nargs="*", default=(1, 2, 4), help="divisors of the lanes")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    arguments.cache_bytes = int(arguments.cache_gb * 1e9)
    index = index_of(arguments)
    with with_empty_cache(arguments, index, arguments.cache_bytes) as source:
        images, shards = len(source), len(source.ends or ())
    size = sum(path.stat().st_size for path in Path(arguments.local).rglob("*.tar"))
    at_a_time = min(shards, arguments.window * arguments.lanes)
    window = math.ceil(images * at_a_time / shards / arguments.batch_size)
    arguments.batches = arguments.batches or 2 * window
    arguments.warmup = arguments.warmup or window + 2 * arguments.workers
    print(
        f"{images:,} images in {shards:,} shards, {size / 1e6:,.0f} MB; {arguments.lanes} lanes with a window of "
        f"{arguments.window}: {at_a_time} shards at a time, {window} batches of {arguments.batch_size}; a cache of "
        f"{arguments.cache_gb:g} GB; timed: {arguments.batches} batches after {arguments.warmup}\n"
    )

    rounds = compare(arguments, index)
    print(table(rounds), end="\n\n")
    by_hosts = {hosts: of_each_host(hosts, arguments, index) for hosts in arguments.hosts}
    print(hosts_table(by_hosts, size))
    results = [
        one._asdict()
        | {"times_the_disks": against_disk(rounds, one), "rounds": [turns[one]._asdict() for turns in rounds]}
        for one in rounds[0]
    ]
    report = {
        "data": {"images": images, "shards": shards, "bytes": size, "at_a_time": at_a_time},
        "results": results,
        "hosts": {hosts: [each._asdict() for each in found] for hosts, found in by_hosts.items()},
        "settings": {name: str(value) for name, value in vars(arguments).items()},
        "environment": environment(),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    run(main)
