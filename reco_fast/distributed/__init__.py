"""One process or many: the few collectives that the trainer needs, each a no-op for one process."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist

# DistributedDataParallel imports it too, and its default arguments would then hold the process group for good: threads
# of Gloo that outlive the interpreter abort now and then (PyTorch 2.14). Before there is a group, they hold nothing.
import torch.distributed.nn.functional
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from reco_fast.errors import ConfigError
from reco_fast.settings.config import Config

T = TypeVar("T")


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the group that `torchrun` describes in the environment, if there is more than one process."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    store, number, count = next(rendezvous("env://"))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # torchrun keeps one store for all its attempts, and addresses of ranks that were killed in it
        # (pytorch/pytorch#135712). On several hosts the count is not the same everywhere.
        store = PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    backend, own_device = ("nccl", device) if device.type == "cuda" else ("gloo", None)
    dist.init_process_group(backend, store=store, rank=number, world_size=count, device_id=own_device)
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def all_gather(rows: Tensor) -> Tensor:
    """`rows` [n, ...] of all ranks in rank order, [world·n, ...]. No gradient flows back."""
    if world_size() == 1:
        return rows
    gathered = rows.new_empty(world_size() * len(rows), *rows.shape[1:])
    dist.all_gather_into_tensor(gathered, rows.detach().contiguous())
    return gathered


def all_gather_uneven(rows: Tensor) -> Tensor:
    """`all_gather` where the number of rows may differ from rank to rank."""
    if world_size() == 1:
        return rows
    counts = all_gather(torch.tensor([len(rows)], device=rows.device)).tolist()
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    gathered = all_gather(padded).view(len(counts), max(counts), *rows.shape[1:])
    return torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)])


def gather_lines(lines: list[str], device: torch.device) -> list[str]:
    """The lines of all ranks, sorted, each once."""
    text = "".join(f"{line}\n" for line in lines).encode(errors="surrogateescape")  # file names need not be UTF-8
    joined = all_gather_uneven(torch.tensor(list(text), dtype=torch.uint8, device=device))
    return sorted(set(bytes(joined.tolist()).decode(errors="surrogateescape").split("\n")) - {""})


def sum_over_ranks(value: Tensor) -> Tensor:
    """`value` summed over ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(value)
    return value


def first_rank_first(work: Callable[[], T]) -> T:
    """Call `work` on rank 0, then on the others, which find what it left (a cache). Where it fails on rank 0, they meet
    the same, each with one line, and do not wait for a rank that has gone."""
    if rank() != 0:
        barrier()
    try:
        return work()
    finally:
        if rank() == 0:
            barrier()


def from_first_rank(data: bytes) -> bytes:
    """The `data` of rank 0, on all ranks."""
    if world_size() == 1:
        return data
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    size = torch.tensor([len(data)], device=device)
    dist.broadcast(size, 0)
    sent = torch.empty(int(size), dtype=torch.uint8, device=device)
    if rank() == 0:
        sent.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else sent)
    dist.broadcast(sent, 0)
    return sent.cpu().numpy().tobytes()


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def fit_ranks(config: Config) -> None:
    """Raises ConfigError where a setting does not fit the number of ranks."""
    parts = world_size() * config.train.accumulate
    if config.train.batch_size % parts:
        raise ConfigError(
            f"--train.batch-size: expected a multiple of ranks × --train.accumulate = {parts}, "
            f"got {config.train.batch_size}"
        )
    rows = config.train.batch_size // parts
    if config.loss.uses_local and config.loss.mix_within and rows < 2:
        raise ConfigError(f"--loss.mix-within: expected 2 or more images a rank, mixed and not, got {rows}")
    if config.model.key_norm == "shuffle" and world_size() == 1:
        raise ConfigError("--model.key-norm: expected split, batch or ema on one rank, got shuffle (needs two or more)")
    fewest = config.mixed_images(rows) if config.mixes_apart else rows
    for norm, images in ((config.model.key_norm, rows), (config.model.query_norm, fewest)):
        if norm == "split" and images < 2 * config.model.norm_groups:
            raise ConfigError(
                f"--model.norm-groups: expected at most half of the {images} images that a rank normalises together, "
                f"got {config.model.norm_groups}"
            )
