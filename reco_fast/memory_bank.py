"""The two memory banks: first-in-first-out rings of past teacher embeddings, on the device, without a sync."""

import torch
from torch import Tensor, nn


class MemoryBank(nn.Module):
    """`keys` [K, D] of strong views and `weak_keys` [K, D] of weak ones, filled together.

    Rows start as random unit vectors (MoCo). The write position lives on the device, so enqueueing never waits.
    Nothing here is a parameter and no rank ever broadcasts it: equal seeds and equal enqueues keep ranks equal.
    """

    keys: Tensor
    weak_keys: Tensor
    position: Tensor

    def __init__(self, size: int, dim: int, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name in ("keys", "weak_keys"):
            rows = nn.functional.normalize(torch.randn(size, dim, generator=generator))
            self.register_buffer(name, rows.to(dtype))
        self.register_buffer("position", torch.zeros((), dtype=torch.long))

    def newest(self, count: int) -> Tensor:
        """The last `count` keys that came, at most K, newest first: [count, D]."""
        return self.keys[(self.position - 1 - torch.arange(count, device=self.keys.device)) % len(self.keys)]

    @torch.no_grad()
    def enqueue(self, keys: Tensor, weak_keys: Tensor | None = None, *, skipped: Tensor | None = None) -> None:
        """Overwrite the oldest rows by unit rows [n, D], any n. Of more than K rows the last K stay.

        Without `weak_keys` that bank keeps its rows (nothing reads it then). Where `skipped`, 0-d, is not 0, nothing
        changes.
        """
        size, count = len(self.keys), len(keys)
        dropped = max(0, count - size)
        where = (self.position + torch.arange(dropped, count, device=keys.device)) % size
        for bank, rows in ((self.keys, keys), (self.weak_keys, weak_keys)):
            if rows is not None:
                rows = rows[dropped:].to(bank.dtype)
                bank.index_copy_(0, where, rows if skipped is None else torch.where(skipped != 0, bank[where], rows))
        moved = count if skipped is None else count * (skipped == 0)
        self.position.add_(moved).remainder_(size)
