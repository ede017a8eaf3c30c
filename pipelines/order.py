"""Which images make up which batch, as a function of the step alone."""

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
        if epoch not in self._permutations:
            self._permutations = {e: p for e, p in self._permutations.items() if e == epoch - 1}
            self._permutations[epoch] = random_permutation(self.length, self.seed, epoch)
        return self._permutations[epoch]


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

    def batch(self, step: int) -> tuple[Int64Array, Int64Array]:
        start = self._first + step * self.batch_size
        positions = np.arange(start, min(start + self.batch_size, self._end), dtype=np.int64)
        return positions, positions * self.length // self._count
