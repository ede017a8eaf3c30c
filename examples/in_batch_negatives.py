"""ReCoLoss without a memory bank: the negatives are the other images of the batch, gathered from all ranks.

A bank is any matrix of unit rows, so the keys of the moment will do (SimCLR, MoCo v3). One call has one bank for all
its rows, and an image's own key must not be in it: the positive would count twice, and the global relation would look
at nothing else. So each rank's batch is cut into parts, and the bank of a part is everything but that part.

python examples/in_batch_negatives.py
torchrun --standalone --nproc-per-node 2 examples/in_batch_negatives.py
"""

import copy

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from reco_fast import ReCoLoss
from reco_fast.distributed import all_gather, process_group, rank

DIM, BATCH = 64, 64


def in_batch_loss(loss: ReCoLoss, student: nn.Module, teacher: nn.Module, views: list[Tensor], parts: int) -> Tensor:
    """Mean loss of this rank's images: two strong `views` and a weak one, each [n, ...]; more `parts` keep more
    negatives, of which there are world·n − n/parts."""
    first, second, weak = views
    rows = len(first) // parts
    with torch.no_grad():
        key, key_weak = (F.normalize(teacher(view)) for view in (second, weak))
    keys, weak_keys = all_gather(key), all_gather(key_weak)
    # An image is mixed with one of its own part: no parent of a mixture is among its negatives.
    permutation = torch.cat([torch.randperm(rows) for _ in range(parts)]).to(first.device)
    ratio = torch.rand(len(first), device=first.device)
    share = ratio.view(-1, *[1] * (first.dim() - 1))
    partner = permutation + torch.arange(len(first), device=first.device) // rows * rows
    query, query_mix = student(torch.cat([first, torch.lerp(second[partner], first, share)])).chunk(2)
    totals = []
    for part in range(parts):
        own = slice(part * rows, (part + 1) * rows)
        others = torch.ones(len(keys), dtype=torch.bool, device=keys.device)
        others[rank() * len(first) + part * rows :][:rows] = False
        banks = keys[others], weak_keys[others]
        totals.append(
            loss(query[own], query_mix[own], key[own], key_weak[own], *banks, permutation[own], ratio[own]).total
        )
    return torch.stack(totals).mean()


def train(steps: int = 40, parts: int = 4) -> list[float]:
    """Learn features of random patterns under noise; returns the loss of each step."""
    torch.manual_seed(rank())
    patterns = torch.randn(512, 3, 16, 16)
    student: nn.Module = nn.Sequential(nn.Flatten(), nn.Linear(768, 256), nn.ReLU(), nn.Linear(256, DIM))
    if dist.is_initialized():
        student = nn.parallel.DistributedDataParallel(student)  # starts all ranks from rank 0's weights
    teacher = copy.deepcopy(student.module if dist.is_initialized() else student).requires_grad_(False)
    loss_function = ReCoLoss(mix_anchor="key")
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(steps):
        images = patterns[torch.randint(len(patterns), (BATCH,))]
        views = [images + noise * torch.randn_like(images) for noise in (1.0, 1.0, 0.1)]
        loss = in_batch_loss(loss_function, student, teacher, views, parts)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
            slow.lerp_(fast.detach(), 0.05)
        losses.append(loss.item())
    checksum = sum(weights.double().sum().item() for weights in teacher.parameters())  # the same on all ranks
    print(f"rank {rank()}: loss {losses[0]:.3f} → {losses[-1]:.3f}, sum of weights {checksum:.6f}", flush=True)
    return losses


if __name__ == "__main__":
    with process_group(torch.device("cpu")):
        train()
