"""A plain reference step: what one writes after reading the paper. The benchmark measures the trainer against it.

Everything here is on purpose as reference code has it: float32 and NCHW, banks cloned for each of four N×K products,
Python loops over parameters, a top-k over K + 1 columns and `.item()` in each step. Its mathematics are the trainer's:
a test compares the two.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reco_fast.method.model import build_encoder
from reco_fast.settings.config import Config


class NaiveReCo:
    """Student, teacher, two banks [D, K] and SGD; `step` trains on one batch."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config = config
        size, dim = config.model.bank_size, config.model.projection_dim
        if size % config.train.batch_size:
            raise ValueError(f"bank_size: expected a multiple of the batch size {config.train.batch_size}, got {size}")
        self.student: nn.Module = build_encoder(config.model, config.data.image_size).to(device)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.queue = F.normalize(torch.randn(dim, size, device=device), dim=0)
        self.queue_weak = F.normalize(torch.randn(dim, size, device=device), dim=0)
        self.queue_pointer = torch.zeros(1, dtype=torch.long, device=device)
        self.optimizer = torch.optim.SGD(
            self.student.parameters(),
            lr=config.optim.lr,
            momentum=config.optim.momentum,
            weight_decay=config.optim.weight_decay,
            foreach=False,
        )

    def step(self, views: tuple[Tensor, ...], permutation: Tensor, mix_weights: Tensor) -> dict[str, float]:
        """One step on two strong views and a weak one [n, 3, H, W], with the draws of `reco_fast.method.step.Draws`."""
        loss_config = self.config.loss
        first, second, weak = views
        ratio = mix_weights.mean().item()
        mixed = mix_weights * first + (1 - mix_weights) * second[permutation]

        query = F.normalize(self.student(first), dim=1)
        query_mix = F.normalize(self.student(mixed), dim=1)
        with torch.no_grad():
            self._update_teacher()
            key = F.normalize(self.teacher(second), dim=1)
            key_weak = F.normalize(self.teacher(weak), dim=1)
            target = F.normalize(ratio * query.detach() + (1 - ratio) * key[permutation], dim=1)

        labels = torch.zeros(len(query), dtype=torch.long, device=query.device)
        positive = torch.einsum("nc,nc->n", [query, key]).unsqueeze(-1)
        negative = torch.einsum("nc,ck->nk", [query, self.queue.clone().detach()])
        logits = torch.cat([positive, negative], dim=1) / loss_config.temperature
        instance = F.cross_entropy(logits, labels)

        student_logits = torch.einsum("nc,ck->nk", [query, self.queue_weak.clone().detach()])
        teacher_logits = torch.einsum("nc,ck->nk", [key_weak, self.queue_weak.clone().detach()])
        student_log = F.log_softmax(student_logits / loss_config.student_temperature, dim=1)
        teacher = F.softmax(teacher_logits / loss_config.teacher_temperature, dim=1)
        global_relation = -(teacher * student_log).sum(dim=1).mean()

        positive_mix = torch.einsum("nc,nc->n", [query_mix, target]).unsqueeze(-1)
        negative_mix = torch.einsum("nc,ck->nk", [query_mix, self.queue.clone().detach()])
        logits_mix = torch.cat([positive_mix, negative_mix], dim=1) / loss_config.temperature
        local_relation = F.cross_entropy(logits_mix, labels)

        loss = instance + loss_config.global_weight * global_relation + loss_config.local_weight * local_relation
        top1, top5 = _accuracy(logits, labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self._enqueue(key, key_weak)
        return {"loss": loss.item(), "top1": top1, "top5": top5}

    @torch.no_grad()
    def _update_teacher(self) -> None:
        momentum = self.config.model.teacher_momentum
        for student, teacher in zip(self.student.parameters(), self.teacher.parameters(), strict=True):
            teacher.data = teacher.data * momentum + student.data * (1 - momentum)

    @torch.no_grad()
    def _enqueue(self, key: Tensor, key_weak: Tensor) -> None:
        pointer = int(self.queue_pointer)
        self.queue[:, pointer : pointer + len(key)] = key.T
        self.queue_weak[:, pointer : pointer + len(key)] = key_weak.T
        self.queue_pointer[0] = (pointer + len(key)) % self.queue.shape[1]


@torch.no_grad()
def _accuracy(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """Share of rows in percent whose positive is first, and among the first five."""
    _, predicted = logits.topk(5, dim=1)
    correct = predicted == labels.unsqueeze(1)
    return 100 * correct[:, 0].float().mean().item(), 100 * correct.any(dim=1).float().mean().item()
