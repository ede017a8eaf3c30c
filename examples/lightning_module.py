"""ReCoLoss in a PyTorch Lightning module.

pip install 'reco-fast[examples]'
python examples/lightning_module.py FOLDER     # images in one sub-folder or more, as for torchvision's ImageFolder
"""

import copy
import sys

import lightning
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from reco_fast import ReCoLoss
from reco_fast.distributed import all_gather
from reco_fast.method.model import MemoryBank

SIZE = 32
WEAK = [v2.ToImage(), v2.RandomResizedCrop(SIZE, (0.2, 1)), v2.RandomHorizontalFlip()]
COLOUR = [v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8), v2.RandomGrayscale(0.2)]
TO_FLOAT = [v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.25] * 3)]
strong, weak = v2.Compose([*WEAK, *COLOUR, *TO_FLOAT]), v2.Compose([*WEAK, *TO_FLOAT])


class ReCo(lightning.LightningModule):
    def __init__(self, dim: int = 128, bank_size: int = 4096, teacher_momentum: float = 0.99, lr: float = 0.06) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.student = torchvision.models.resnet18()
        self.student.fc = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, dim))
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.bank = MemoryBank(bank_size, dim)  # a submodule, so Lightning moves and saves it
        self.loss = ReCoLoss(mix_anchor="key")

    def training_step(self, batch: tuple[list[Tensor], Tensor], _: int) -> Tensor:
        (first, second, weak_view), _labels = batch
        permutation = torch.randperm(len(first), device=self.device)
        ratio = torch.rand((), device=self.device)
        mixed = torch.lerp(second[permutation], first, ratio)
        with torch.no_grad():
            for slow, fast in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                slow.lerp_(fast, 1 - self.hparams.teacher_momentum)
            self.new_keys = self.teacher(second), self.teacher(weak_view)
        banks = self.bank.keys, self.bank.weak_keys
        out = self.loss(self.student(first), self.student(mixed), *self.new_keys, *banks, permutation, ratio)
        self.log_dict({f"loss/{name}": value.detach() for name, value in out._asdict().items()}, prog_bar=True)
        return out.total

    def on_after_backward(self) -> None:  # the banks take the keys of all ranks after the step's loss
        self.bank.enqueue(*(all_gather(F.normalize(key.float())) for key in self.new_keys))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.student.parameters(), lr=self.hparams.lr, momentum=0.9, weight_decay=5e-4)


def train(folder: str, steps: int = 1000, batch_size: int = 128, bank_size: int = 4096, **trainer: object) -> ReCo:
    views = v2.Lambda(lambda image: [strong(image), strong(image), weak(image)])
    images = torchvision.datasets.ImageFolder(folder, transform=views)
    loader = DataLoader(images, batch_size, shuffle=True, drop_last=True)
    module = ReCo(bank_size=bank_size)
    # On several GPUs: strategy=DDPStrategy(broadcast_buffers=False), since each rank keeps the same banks by itself.
    lightning.Trainer(max_steps=steps, **trainer).fit(module, loader)
    return module


if __name__ == "__main__":
    train(sys.argv[1])
