"""MoCo of Lightly's examples, its NTXentLoss replaced by ReCoLoss. Modules, transforms and banks are Lightly's.

pip install 'reco-fast[examples]'
python examples/lightly_moco.py FOLDER
"""

import copy
import sys

import torch
import torch.nn.functional as F
import torchvision
from lightly.data import LightlyDataset
from lightly.models.modules import MoCoProjectionHead
from lightly.models.modules.memory_bank import MemoryBankModule
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.transforms import MoCoV2Transform
from lightly.transforms.multi_view_transform import MultiViewTransform
from lightly.transforms.utils import IMAGENET_NORMALIZE
from lightly.utils.scheduler import cosine_schedule
from torch import Tensor, nn
from torchvision import transforms

from reco_fast import ReCoLoss

SIZE, DIM = 32, 128


class MoCo(nn.Module):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.student = nn.Sequential(backbone, nn.Flatten(), MoCoProjectionHead(512, 512, DIM))
        self.teacher = copy.deepcopy(self.student)
        deactivate_requires_grad(self.teacher)


def three_views() -> MultiViewTransform:
    """MoCo's two strong views, and a weak one for the global relation."""
    crop, flip = transforms.RandomResizedCrop(SIZE, (0.2, 1)), transforms.RandomHorizontalFlip()
    weak = transforms.Compose([crop, flip, transforms.ToTensor(), transforms.Normalize(**IMAGENET_NORMALIZE)])
    return MultiViewTransform([*MoCoV2Transform(input_size=SIZE, gaussian_blur=0.0).transforms, weak])


def train(folder: str, epochs: int = 10, batch_size: int = 256, bank_size: int = 4096) -> list[float]:
    """The mean loss of each epoch."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = MoCo(nn.Sequential(*list(torchvision.models.resnet18().children())[:-1])).to(device)
    banks = [MemoryBankModule((bank_size, DIM), feature_dim_first=False).to(device) for _ in range(2)]
    dataset = LightlyDataset(folder, transform=three_views())
    loader = torch.utils.data.DataLoader(dataset, batch_size, shuffle=True, drop_last=True)
    criterion = ReCoLoss(mix_anchor="key")
    optimizer = torch.optim.SGD(model.student.parameters(), lr=0.06, momentum=0.9)
    means = []
    for epoch in range(epochs):
        update = cosine_schedule(epoch, epochs, 0.99, 1)
        losses: list[Tensor] = []
        for views, _, _ in loader:
            first, second, weak = (view.to(device) for view in views)
            update_momentum(model.student, model.teacher, m=update)
            permutation, ratio = torch.randperm(len(first), device=device), torch.rand((), device=device)
            mixed = torch.lerp(second[permutation], first, ratio)
            keys = [F.normalize(model.teacher(view)) for view in (second, weak)]
            past = [bank(key, update=True)[1] for bank, key in zip(banks, keys, strict=True)]  # from before the update
            loss = criterion(model.student(first), model.student(mixed), *keys, *past, permutation, ratio).total
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        means.append(torch.stack(losses).mean().item())
        print(f"epoch {epoch:3d}  loss {means[-1]:.3f}")
    return means


if __name__ == "__main__":
    train(sys.argv[1])
