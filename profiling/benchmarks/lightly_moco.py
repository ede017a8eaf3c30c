"""Lightly's MoCo v2 as its example trains it, for the benchmark. Needs the package `lightly` (extra `examples`).

Projection head, loss with its memory bank, momentum update, transforms and data set are Lightly's; the optimizer and
the data loader are PyTorch's, as in the example (https://docs.lightly.ai/self-supervised-learning/examples/moco.html).
Ours are the backbone, so that it is the same, and the rate and decay.
"""

import copy
import os
from collections.abc import Generator

import torch
from lightly.data import LightlyDataset
from lightly.loss import NTXentLoss
from lightly.models.modules import MoCoProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.transforms.moco_transform import MoCoV2Transform
from torch import Tensor, nn
from torch.utils.data import DataLoader

from reco_fast.data.loaders import loader_workers
from reco_fast.errors import ConfigError
from reco_fast.method.model import build_encoder
from reco_fast.method.state import pick_precision
from reco_fast.pipelines.augmentations import reco_recipe
from reco_fast.settings.config import Config


class LightlyMoCo:
    """Query and key encoder, NT-Xent with a bank of K keys, and SGD; `step` trains on two views."""

    def __init__(self, config: Config, device: torch.device, *, autocast: bool) -> None:
        encoder = build_encoder(config.model, config.data.image_size)
        width, dim = encoder.feature_dim, config.model.projection_dim
        self.student = nn.Sequential(encoder.backbone, MoCoProjectionHead(width, width, dim)).to(device)
        self.teacher = copy.deepcopy(self.student)
        deactivate_requires_grad(self.teacher)
        self.momentum = config.model.teacher_momentum
        self.loss = NTXentLoss(config.loss.temperature, memory_bank_size=(config.model.bank_size, dim)).to(device)
        self.optimizer = torch.optim.SGD(
            self.student.parameters(),
            lr=config.optim.lr,
            momentum=config.optim.momentum,
            weight_decay=config.optim.weight_decay,
        )
        precision = pick_precision(config.train.precision, device)
        self.autocast = torch.autocast(device.type, precision, enabled=autocast and precision != torch.float32)
        self.scaler = torch.amp.GradScaler(device.type, enabled=autocast and precision == torch.float16)

    def step(self, views: tuple[Tensor, ...]) -> Tensor:
        """One step on two views [n, 3, H, W]; the loss, detached."""
        update_momentum(self.student, self.teacher, m=self.momentum)
        with self.autocast:
            query = self.student(views[0])
            with torch.no_grad():
                key = self.teacher(views[1])
            loss = self.loss(query, key)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return loss.detach()


def batches(config: Config, device: torch.device) -> Generator[tuple[Tensor, ...], None, None]:
    """Two views of the images of --data.path by Lightly's data set and transform, our crop size and blur."""
    folder = config.data.path
    if folder is None or not os.path.isdir(folder):
        raise ConfigError(f"--data.path: expected a folder of images for --against lightly, got {folder}")
    blur = reco_recipe(config.data.image_size).views[0].blur_probability
    transform = MoCoV2Transform(input_size=config.data.image_size, gaussian_blur=blur)
    workers = loader_workers(config.data)
    loader = DataLoader(
        LightlyDataset(folder, transform=transform),
        batch_size=config.train.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=True,
        pin_memory=device.type == "cuda",
    )
    while True:
        for views, _, _ in loader:
            yield tuple(view.to(device, non_blocking=True) for view in views)
