"""The order in blocks: what makes up a batch where shards are fetched whole."""

import sys
import threading
from itertools import pairwise

import numpy as np
import pytest

from reco_fast.pipelines.order import BlockOrder, TrainingOrder

ENDS = [7, 8, 31, 40, 40, 77, 90, 101]  # of shards that differ in size; the fifth is empty


def order(rank: int = 0, world_size: int = 1, seed: int = 4, batch_size: int = 12, **options: int) -> BlockOrder:
    given = {"window": 2, "lanes": 4} | options
    return BlockOrder(ENDS, batch_size, rank=rank, world_size=world_size, seed=seed, **given)


@pytest.mark.parametrize(("lanes", "window"), [(1, 1), (1, 3), (4, 2), (6, 1), (12, 8), (12, 1)])
def test_an_epoch_has_each_image_once(lanes: int, window: int) -> None:
    """By the positions of the stream, which batches straddle."""
    epochs = 5
    steps = -(-epochs * ENDS[-1] // 12)
    batches = [order(lanes=lanes, window=window).batch(step) for step in range(steps)]
    positions, indices = (np.concatenate([batch[part] for batch in batches]) for part in (0, 1))
    for step, (here, _) in enumerate(batches):
        assert sorted(here.tolist()) == list(range(12 * step, 12 * step + 12))
    stream = np.empty_like(indices)
    stream[positions] = indices
    found = [stream[epoch * 101 : (epoch + 1) * 101].tolist() for epoch in range(epochs)]
    assert all(sorted(epoch) == list(range(101)) for epoch in found)
    assert len({tuple(epoch) for epoch in found}) == epochs


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 12])
def test_any_number_of_ranks_shares_the_same_batches(world_size: int) -> None:
    ranks = [order(rank, world_size) for rank in range(world_size)]
    for step in range(30):
        parts = [each.batch(step) for each in ranks]
        for whole, shared in zip(order().batch(step), zip(*parts, strict=True), strict=True):
            assert np.concatenate(shared).tolist() == whole.tolist()


def test_a_step_says_all() -> None:
    forward = [order().batch(step)[1].tolist() for step in range(40)]
    assert [order().batch(step)[1].tolist() for step in reversed(range(40))] == forward[::-1]
    assert order(seed=5).batch(0)[1].tolist() != forward[0]


def shards_of(indices: np.ndarray) -> set[int]:
    return set(np.searchsorted(ENDS, indices, side="right").tolist())


def test_a_host_needs_the_shards_of_its_lanes_alone() -> None:
    """Of 64 shards of 10 images, in an epoch."""
    ends = list(range(10, 650, 10))
    needed = []
    for host in range(4):
        mine = BlockOrder(ends, 16, window=2, lanes=8, rank=host, world_size=4, seed=1)
        indices = np.concatenate([mine.batch(step)[1] for step in range(40)])
        needed.append(set((indices // 10).tolist()))
    assert sum(map(len, needed)) <= 64 + 7, "but for those in which the piece of a lane ends"
    assert set.union(*needed) == set(range(64))


def test_a_window_is_permuted_as_one_and_the_next_begins_when_it_ends() -> None:
    ends = list(range(50, 850, 50))
    alone = BlockOrder(ends, 10, window=4, lanes=1, seed=3)
    indices = np.concatenate([alone.batch(step)[1] for step in range(80)])
    windows = [indices[first : first + 200] // 50 for first in range(0, 800, 200)]
    assert all(len(set(window.tolist())) == 4 for window in windows)
    for window in windows:  # its shards come mixed: neighbours of one shard are as many as chance has them
        same = sum(a == b for a, b in pairwise(window.tolist()))
        assert 25 < same < 75, "a quarter of 199, give or take four standard deviations"
    later = np.concatenate([alone.batch(step)[1] for step in range(80, 160)])
    assert [set((later[first : first + 200] // 50).tolist()) for first in range(0, 800, 200)] != [
        set(window.tolist()) for window in windows
    ]


def test_threads_may_ask_at_the_same_time() -> None:
    """One reads, one fetches ahead: neither takes an epoch away from the other."""
    asked, expected = (
        TrainingOrder(8, 8, seed=1),
        [TrainingOrder(8, 8, seed=1).batch(n)[1].tolist() for n in range(300)],
    )
    found: list[list[list[int]]] = [[] for _ in range(8)]

    def ask(mine: list[list[int]]) -> None:
        mine.extend(asked.batch(step)[1].tolist() for step in range(300))

    threads = [threading.Thread(target=ask, args=(mine,)) for mine in found]
    switched = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(switched)
    assert found == [expected] * 8


def test_uniform_where_one_window_holds_all() -> None:
    """Then each image is as likely at each place: chi-squared over 600 epochs of 8 images in 2 shards."""
    alone = BlockOrder([3, 8], 8, window=2, lanes=1, seed=0)
    counts = np.zeros((8, 8))
    for step in range(600):
        counts[np.arange(8), alone.batch(step)[1]] += 1
    assert ((counts - 75) ** 2 / 75).sum() < 85.4  # 49 degrees of freedom, 1 in 1,000


def test_the_uniform_order_is_as_it_was() -> None:
    """A run that began before there were blocks goes on."""
    assert TrainingOrder(10, 5, seed=7).batch(0)[1].tolist() == [3, 1, 8, 0, 7]


@pytest.mark.parametrize(
    ("options", "expected"),
    [({"lanes": 5}, "lanes: .*a divisor of the batch, 12, got 5"), ({"lanes": 0}, "lanes"), ({"window": 0}, "window")],
)
def test_what_does_not_fit_is_refused(options: dict[str, int], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        order(**options)
