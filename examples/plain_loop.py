"""ReCoLoss in a training loop of your own: no trainer, no GPU, about five seconds.

python examples/plain_loop.py
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reco_fast import ReCoLoss

K, D, BATCH = 1024, 64, 64


def train(steps: int = 40) -> list[float]:
    """Learn features of random patterns under noise; returns the loss of each step."""
    torch.manual_seed(0)
    patterns = torch.randn(512, 3, 16, 16)
    student = nn.Sequential(nn.Flatten(), nn.Linear(768, 256), nn.ReLU(), nn.Linear(256, D))
    teacher = copy.deepcopy(student).requires_grad_(False)
    bank, bank_weak = (F.normalize(torch.randn(K, D)) for _ in range(2))
    loss_function = ReCoLoss(mix_anchor="key")
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9)

    def view(images: Tensor, noise: float) -> Tensor:
        return images + noise * torch.randn_like(images)

    losses = []
    for step in range(steps):
        images = patterns[torch.randint(len(patterns), (BATCH,))]
        first, second = view(images, 1.0), view(images, 1.0)
        permutation, ratio = torch.randperm(BATCH), torch.rand(BATCH)
        share = ratio[:, None, None, None]
        mixed = share * first + (1 - share) * second[permutation]
        with torch.no_grad():
            key, key_weak = teacher(second), teacher(view(images, 0.1))

        loss = loss_function(student(first), student(mixed), key, key_weak, bank, bank_weak, permutation, ratio).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        with torch.no_grad():  # the teacher follows, and the banks take this batch's rows after its loss
            for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
                slow.lerp_(fast, 0.05)
            place = (step * BATCH + torch.arange(BATCH)) % K
            bank[place], bank_weak[place] = F.normalize(key), F.normalize(key_weak)
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    for number, value in enumerate(train()):
        if number % 5 == 0:
            print(f"step {number:3d}  loss {value:.3f}")
