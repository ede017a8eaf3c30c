"""Encoders: any torchvision or timm backbone by name, the projector, and how the teacher follows the student."""

import difflib
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn

from reco_fast.errors import ConfigError
from reco_fast.settings.config import ModelConfig

SMALL_IMAGE = 64  # up to this side in pixels, a stem that divides the resolution by 4 leaves too little


class Encoder(nn.Module):
    """Backbone and the two-layer projector of MoCo v2 (arXiv 2003.04297): images [N, 3, H, W] to [N, D]."""

    def __init__(self, backbone: nn.Module, feature_dim: int, projection_dim: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = nn.Sequential(
            nn.Linear(feature_dim, feature_dim), nn.ReLU(inplace=True), nn.Linear(feature_dim, projection_dim)
        )
        self.feature_dim = feature_dim

    def forward(self, images: Tensor) -> Tensor:
        return self.projector(self.backbone(images))


def build_encoder(config: ModelConfig, image_size: int) -> Encoder:
    """A randomly initialised encoder. Raises ConfigError for a backbone that does not exist or does not fit."""
    backbone = _create(config.arch, image_size)
    if config.stem == "small" or (config.stem == "auto" and image_size <= SMALL_IMAGE):
        _use_small_stem(backbone)
    try:
        with torch.no_grad():
            features = backbone.eval()(torch.zeros(2, 3, image_size, image_size))
    except Exception as error:  # whatever a third-party backbone raises, the user's mistake is the pairing
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"--model.arch {config.arch} cannot take {image_size} px images: {reason}") from None
    if not isinstance(features, Tensor) or features.dim() != 2:
        raise ConfigError(
            f"--model.arch: expected a backbone that gives one feature vector an image, got {config.arch}"
        )
    return Encoder(backbone, features.shape[1], config.projection_dim).train()


def _create(arch: str, image_size: int) -> nn.Module:
    library, _, name = arch.rpartition("/")
    if library in ("", "torchvision") and name in torchvision.models.list_models(module=torchvision.models):
        return _without_classifier(torchvision.models.get_model(name, weights=None))
    if library in ("", "timm") and timm.is_model(name):
        # Transformers are built for one image size; convolutional nets do not take the argument.
        candidates: tuple[dict[str, Any], ...] = ({"img_size": image_size}, {})
        for options in candidates:
            try:
                return timm.create_model(name, pretrained=False, num_classes=0, **options)
            except TypeError:
                continue
    names = torchvision.models.list_models(module=torchvision.models) + timm.list_models()
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]}?" if close else "such as resnet18, resnet50 or timm/convnext_tiny"
    raise ConfigError(f"--model.arch: expected a torchvision or timm backbone, got {arch}; {hint}")


def _without_classifier(backbone: nn.Module) -> nn.Module:
    """Replace the last linear layer, in every torchvision classifier the one that gives class scores."""
    names = [name for name, module in backbone.named_modules() if isinstance(module, nn.Linear)]
    if not names:
        kind = type(backbone).__name__
        raise ConfigError(f"--model.arch: expected a backbone with a linear classifier to take off, got a {kind}")
    parent, _, child = names[-1].rpartition(".")
    setattr(backbone.get_submodule(parent), child, nn.Identity())
    return backbone


def _use_small_stem(backbone: nn.Module) -> None:
    """First convolution 3×3 with stride 1, and no max-pooling behind it. Patch-embedding stems stay as they are."""
    name, first = next(((n, m) for n, m in backbone.named_modules() if isinstance(m, nn.Conv2d)), ("", None))
    if first is not None and first.stride == (2, 2):
        small = nn.Conv2d(first.in_channels, first.out_channels, 3, stride=1, padding=1, bias=first.bias is not None)
        parent, _, child = name.rpartition(".")
        setattr(backbone.get_submodule(parent), child, small)
        if isinstance(getattr(backbone, "maxpool", None), nn.Module):
            backbone.maxpool = nn.Identity()


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
