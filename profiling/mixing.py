"""How well an order in blocks mixes images, beside a uniform order.

    python -m reco_fast.profiling.mixing [--shards 1000] [--images 1000] [--batch-size 256] [--window 4 1] [--lanes 8 2]

Of all batches of an epoch. The number to choose `--data.window` and `--data.lanes` by is `one_shard`, the share of a
batch's pairs of images that come from one shard: a contrastive loss compares pairs, so what the images of a shard have
in common that others have not weighs as much in it as this share. Uniformly it is what two images of the whole set
have, one in as many as there are shards. `again`, the share of pairs that are in one batch again in the epoch after, is
what blocks change even where a shard is as mixed as the whole.

Prints a table and one line of JSON for each order.
"""

import argparse
import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from reco_fast.pipelines.order import BlockOrder, TrainingOrder
from reco_fast.settings.command_line import run

Int64Array = NDArray[np.int64]


class Mixing(NamedTuple):
    """Means over the batches of an epoch.

    Attributes:
        shards: different ones that a batch draws from.
        one_shard: share of a batch's pairs that are of one shard.
        again: share of a batch's pairs that are in one batch again in the next epoch.
        apart: of two images of a batch, how far from each other they are in the next epoch, as a share of it;
            `apart_of_one_shard`: where they are of one shard.
        spread: standard deviation of where the images of a shard are in the epoch, as a share of it.
    """

    shards: float
    one_shard: float
    again: float
    apart: float
    apart_of_one_shard: float
    spread: float


def positions(order: TrainingOrder, epoch: int) -> Int64Array:
    """In the stream, of each image in an epoch, [length]."""
    found = np.empty(order.length, np.int64)
    size = order.batch_size_global
    for step in range(epoch * order.length // size, -(-(epoch + 1) * order.length // size)):
        places, images = order.batch(step)
        here = places // order.length == epoch
        found[images[here]] = places[here]
    return found


def mixing(order: TrainingOrder, shard_images: int) -> Mixing:
    """Of the first epoch of an order, on one rank, of shards of so many images each."""
    now, later = positions(order, 0), positions(order, 1)
    size = order.batch_size
    batches = np.argsort(now)[: order.length // size * size].reshape(-1, size)
    shards = batches // shard_images
    # Pairs for the distances: neighbours in a batch, and in a batch that has been sorted by shard.
    by_shard = np.take_along_axis(batches, np.argsort(shards, axis=1, kind="stable"), axis=1)
    same = by_shard[:, 1:] // shard_images == by_shard[:, :-1] // shard_images
    apart, apart_sorted = (np.abs(np.diff(later[rows], axis=1)) / order.length for rows in (batches, by_shard))
    return Mixing(
        float(np.mean([len(np.unique(row)) for row in shards])),
        equal_pairs(shards),
        equal_pairs(later[batches] // size),
        float(apart.mean()),
        float(apart_sorted[same].mean()),
        float((now.reshape(-1, shard_images).std(axis=1) / order.length).mean()),
    )


def equal_pairs(rows: Int64Array) -> float:
    """The share of pairs within a row that are equal."""
    counts = [np.unique(row, return_counts=True)[1] for row in rows]
    size = rows.shape[1]
    return float(np.mean([(count * (count - 1)).sum() / (size * (size - 1)) for count in counts]))


def orders(shards: int, images: int, batch_size: int, settings: Sequence[tuple[int, int]]) -> dict[str, TrainingOrder]:
    """The uniform one, and one for each window and number of lanes."""
    ends = [images * (number + 1) for number in range(shards)]
    found = {"uniform": TrainingOrder(ends[-1], batch_size)}
    for window, lanes in settings:
        found[f"window {window}, lanes {lanes}"] = BlockOrder(ends, batch_size, window=window, lanes=lanes)
    return found


def table(found: dict[str, Mixing]) -> str:
    """Markdown."""
    lines = [
        "| order | shards a batch | pairs of one shard | together again | apart in the next epoch | of one shard | "
        "spread of a shard |",
        "|---|" + 6 * "---|",
    ]
    for name, each in found.items():
        shares = [f"{each.one_shard:.3%}", f"{each.again:.4%}", f"{each.apart:.3f}", f"{each.apart_of_one_shard:.3f}"]
        lines.append(f"| {' | '.join([name, f'{each.shards:.1f}', *shares, f'{each.spread:.4f}'])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--images", type=int, default=1000, help="of each")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--window", type=int, nargs="+", default=(4, 1), help="of --data.window, with as many --lanes")
    parser.add_argument("--lanes", type=int, nargs="+", default=(8, 2), help="of --data.lanes")
    arguments = parser.parse_args()
    settings = list(zip(arguments.window, arguments.lanes, strict=True))
    named = orders(arguments.shards, arguments.images, arguments.batch_size, settings)
    found = {name: mixing(order, arguments.images) for name, order in named.items()}
    print(f"{arguments.shards:,} shards of {arguments.images:,} images, batches of {arguments.batch_size}\n")
    print(table(found), end="\n\n")
    for name, each in found.items():
        sizes = {"shards": arguments.shards, "images": arguments.images, "batch_size": arguments.batch_size}
        print(json.dumps({"of": sizes, "order": name} | each._asdict()))


if __name__ == "__main__":
    run(main)
