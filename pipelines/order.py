"""Which images make up which batch, as a function of the step alone."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from reco_fast.pipelines.augmentations import random_permutation

Int64Array = NDArray[np.int64]


class Order(Protocol):
    """Batches by step, for one rank."""

    length: int
    """Images in the source."""
    batch_size: int
    """Most images in a batch of this rank."""
    steps: int | None
    """How many batches there are; None without end."""
    in_runs: bool
    """Whether images that are near one another in the source are so in the order: whole shards are worth fetching."""

    def batch(self, step: int) -> tuple[Int64Array, Int64Array]:
        """`positions` in the stream and `indices` in the source of batch `step`, each [n] int64."""
        ...


class TrainingOrder:
    """One endless stream of uniform permutations, one an epoch: position p holds image `permutation[p % length]` of
    epoch `p // length`.

    Global batch s is positions [s·B, (s + 1)·B) and each rank takes its contiguous part, so the global batch is the
    same for any number of ranks. A batch may straddle two epochs: nothing is left out or repeated.
    """

    steps: int | None = None
    in_runs = False

    def __init__(self, length: int, batch_size_global: int, *, rank: int = 0, world_size: int = 1, seed: int = 0):
        if length < 1:
            raise ValueError(f"length: expected at least 1, got {length}")
        if batch_size_global < 1 or batch_size_global % world_size:
            raise ValueError(f"batch_size_global: expected a multiple of {world_size} ranks, got {batch_size_global}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: expected within [0, {world_size}), got {rank}")
        self.length = length
        self.batch_size_global = batch_size_global
        self.batch_size = batch_size_global // world_size
        self.rank = rank
        self.seed = seed
        self._permutations: dict[int, Int64Array] = {}

    def batch(self, step: int) -> tuple[Int64Array, Int64Array]:
        start = step * self.batch_size_global + self.rank * self.batch_size
        positions = np.arange(start, start + self.batch_size, dtype=np.int64)
        epochs = positions // self.length
        indices = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            indices[here] = self._permutation(epoch)[positions[here] - epoch * self.length]
        return positions, indices

    def _permutation(self, epoch: int) -> Int64Array:
        found = self._permutations.get(epoch)
        if found is None:
            found = random_permutation(self.length, self.seed, epoch)
            # Replaced, not changed: threads that read and that fetch ahead ask at the same time.
            self._permutations = {e: p for e, p in self._permutations.items() if e == epoch - 1} | {epoch: found}
        return found


class BlockOrder(TrainingOrder):
    """A stream for shards that are fetched whole: each epoch has its own permutation of them, cut into `lanes` pieces
    of as many images; of a piece, `window` shards at a time are permuted together.

    Position p is of lane `p % lanes`, and a global batch has its positions lane by lane. So ranks that share a batch
    share out the lanes, a host needs the shards of its lanes alone, and the global batch is the same for any number of
    ranks. Nothing is left out or repeated in an epoch; a shard in which a piece ends is in two lanes.

    Args:
        ends: images up to the end of each shard, ascending; the last is the length.
    """

    in_runs = True

    def __init__(
        self,
        ends: Sequence[int],
        batch_size_global: int,
        *,
        window: int,
        lanes: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
    ):
        super().__init__(ends[-1] if ends else 0, batch_size_global, rank=rank, world_size=world_size, seed=seed)
        if window < 1:
            raise ValueError(f"window: expected at least 1 shard, got {window}")
        if lanes < 1 or batch_size_global % lanes:
            raise ValueError(f"lanes: expected a divisor of the batch, {batch_size_global}, got {lanes}")
        self._ends = np.array(ends, np.int64)
        self._window = window
        self._lanes = lanes
        self._lane = lru_cache(2 * lanes)(self._permuted_lane)  # of two epochs, where a batch straddles them

    def batch(self, step: int) -> tuple[Int64Array, Int64Array]:
        rows = np.arange(self.rank * self.batch_size, (self.rank + 1) * self.batch_size, dtype=np.int64)
        lanes, places = np.divmod(rows, self.batch_size_global // self._lanes)
        positions = step * self.batch_size_global + places * self._lanes + lanes
        epochs = positions // self.length
        indices = np.empty_like(positions)
        for lane, epoch in sorted(set(zip(lanes.tolist(), epochs.tolist(), strict=True))):
            here = (lanes == lane) & (epochs == epoch)
            before = self._of_lane(lane, epoch)
            indices[here] = self._lane(lane, epoch)[positions[here] // self._lanes - before]
        return positions, indices

    def _of_lane(self, lane: int, epoch: int) -> int:
        """How many positions before an epoch are of a lane."""
        return (epoch * self.length - lane + self._lanes - 1) // self._lanes

    def _permuted_lane(self, lane: int, epoch: int) -> Int64Array:
        """The images of a lane in an epoch, in their order."""
        counts = [self._of_lane(each, epoch + 1) - self._of_lane(each, epoch) for each in range(lane + 1)]
        first, end = sum(counts[:-1]), sum(counts)  # among all images, one of the permuted shards behind the other
        shards = random_permutation(len(self._ends), self.seed, epoch)
        starts = np.concatenate([[0], self._ends[:-1]])
        behind = np.cumsum((self._ends - starts)[shards])
        pieces = []
        for shard in np.flatnonzero((behind > first) & (behind - (self._ends - starts)[shards] < end)).tolist():
            number, upto = int(shards[shard]), int(behind[shard])
            shift = int(self._ends[number]) - upto
            low = max(first + shift, int(starts[number]))
            pieces.append(np.arange(low, min(end, upto) + shift, dtype=np.int64))
        blocks = [np.concatenate(pieces[at : at + self._window]) for at in range(0, len(pieces), self._window)]
        permuted = [
            block[random_permutation(len(block), self.seed, epoch, lane, number)] for number, block in enumerate(blocks)
        ]
        return np.concatenate([np.empty(0, np.int64), *permuted])


class EvaluationOrder:
    """Every image once, in the order of the source, or `count` of them evenly chosen; each rank takes a contiguous
    part, the last batch is the rest."""

    def __init__(self, length: int, batch_size: int, *, count: int | None = None, rank: int = 0, world_size: int = 1):
        if length < 1:
            raise ValueError(f"length: expected at least 1, got {length}")
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: expected within [0, {world_size}), got {rank}")
        self.length = length
        self.batch_size = batch_size
        self._count = min(length, length if count is None else count)
        self._first = self._count * rank // world_size
        self._end = self._count * (rank + 1) // world_size
        self.steps: int | None = -(-(self._end - self._first) // batch_size)
        self.in_runs = self._count * 4 > length  # of few images, evenly chosen, each is read alone

    def batch(self, step: int) -> tuple[Int64Array, Int64Array]:
        start = self._first + step * self.batch_size
        positions = np.arange(start, min(start + self.batch_size, self._end), dtype=np.int64)
        return positions, positions * self.length // self._count


class ListedOrder:
    """These images alone, one after the other, as `indices` has them."""

    def __init__(self, length: int, batch_size: int, indices: Sequence[int]):
        self.length = length
        self.batch_size = batch_size
        self._indices = np.array(indices, np.int64)
        self.steps: int | None = -(-len(indices) // batch_size)
        self.in_runs = len(indices) * 4 > length  # else each is read alone

    def batch(self, step: int) -> tuple[Int64Array, Int64Array]:
        indices = self._indices[step * self.batch_size : (step + 1) * self.batch_size]
        return np.arange(len(indices)) + step * self.batch_size, indices
