"""Encoders: any torchvision or timm backbone by name, the projector, and how the teacher follows the student.

Both libraries take seconds to import, so only the functions that ask them for something import them.
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from reco_fast.errors import ConfigError
from reco_fast.settings.config import ModelConfig
from reco_fast.settings.typed import first_line

SMALL_IMAGE = 64  # up to this side in pixels, a stem that divides the resolution by 4 leaves too little


class Encoder(nn.Module):
    """Backbone and projector: images [N, 3, H, W] to [N, D]."""

    notes: tuple[str, ...] = ()
    """Where its weights come from, and what was done otherwise than its configuration says: a line each."""

    def __init__(self, backbone: nn.Module, projector: nn.Module, feature_dim: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = projector
        self.feature_dim = feature_dim

    def forward(self, images: Tensor) -> Tensor:
        return self.projector(_main(self.backbone(images)))


def build_encoder(config: ModelConfig, image_size: int) -> Encoder:
    """A randomly initialised encoder. Raises ConfigError for a backbone that does not exist or does not fit.

    Where it does not fit behind the small stem, `--model.stem auto` keeps its own, and `notes` say so.
    """
    small = config.stem == "small" or (config.stem == "auto" and image_size <= SMALL_IMAGE)
    before, refused = torch.get_rng_state(), ""
    for shrink in (True, False) if small else (False,):
        torch.set_rng_state(before)  # or the second try would have other weights than --model.stem standard
        backbone = _create(config.arch, image_size)
        changed = shrink and _use_small_stem(backbone)
        if shrink and not changed and (fine := _small_patches(config.arch, image_size, backbone)) is not None:
            backbone, changed = fine, True
        try:
            width = _feature_dim(backbone, image_size)
            break
        except Exception as error:  # whatever a third-party backbone raises, the user's mistake is the pairing
            if not changed:
                raise _misfit(config.arch, image_size, error) from None
            refused = first_line(error)
    if refused and config.stem == "small":
        raise ConfigError(
            f"--model.stem: expected auto or standard for {config.arch} at {image_size} px, got small ({refused})"
        )
    encoder = Encoder(backbone, _projector(config, width), width).train()
    if refused:
        encoder.notes = (
            f"{config.arch} keeps its own stem: behind the small one it cannot take {image_size} px images: {refused}",
        )
    return encoder


def check_other_sizes(encoder: Encoder, arch: str, size: int, others: Mapping[str, Sequence[int]]) -> None:
    """Raises ConfigError where an encoder built for views of `size` pixels cannot take those of `others`, by the flag
    that asks for them, or gives other features of them: many transformers take one size alone."""
    for flag, sides in others.items():
        for side in sides:
            try:
                if side != size and _feature_dim(encoder.backbone, side) != encoder.feature_dim:
                    raise ValueError("its features have another width then")
            except Exception as error:  # as in `build_encoder`
                raise ConfigError(
                    f"--{flag}: expected a size that {arch} takes when it is built for {size} px, got {side} "
                    f"({first_line(error)})"
                ) from None


def _projector(config: ModelConfig, width: int) -> nn.Module:
    if config.projector == "linear":
        return nn.Linear(width, config.projection_dim)
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(inplace=True), nn.Linear(width, config.projection_dim))


def _feature_dim(backbone: nn.Module, size: int) -> int:
    """Width of the features of images of `size` px, tried in eval mode and, with a gradient, in training mode, where a
    backbone may do something else. Weights, buffers and random state stay. Raises whatever the backbone raises."""
    images = torch.zeros(2, 3, size, size)
    with torch.no_grad():
        features = backbone.eval()(images)
    if not isinstance(features, Tensor) or features.dim() != 2:
        raise ValueError("expected one feature vector an image")
    buffers = [(buffer, buffer.clone()) for buffer in backbone.buffers()]
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        trained = _main(backbone.train()(images))
        if not isinstance(trained, Tensor) or trained.shape != features.shape:
            raise ValueError("expected the same features in training as in evaluation")
        trained.sum().backward()
    backbone.zero_grad()
    with torch.no_grad():
        for buffer, value in buffers:
            buffer.copy_(value)
    return features.shape[1]


def _main(output: Any) -> Any:
    """The first of several outputs, which some backbones have in training mode."""
    return output[0] if isinstance(output, tuple | list) else output


def channels_last(module: nn.Module) -> nn.Module:
    """`module` itself, its weights [out, in, H, W] channels-last. `Module.to` fails where others have more axes."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.dim() == 4:
            tensor.data = tensor.data.to(memory_format=torch.channels_last)
    return module


def _misfit(arch: str, size: int, error: Exception) -> ConfigError:
    return ConfigError(f"--model.arch {arch} cannot take {size} px images: {first_line(error)}")


def torchvision_options(name: str) -> dict[str, Any]:
    """Without auxiliary classifiers: nothing trains them, and DistributedDataParallel waits for their gradients."""
    return {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}


def library_of(arch: str) -> tuple[Literal["torchvision", "timm"], str]:
    """The library that builds a backbone, and its name there. Raises ConfigError for one that neither has."""
    library, _, name = arch.rpartition("/")
    import torchvision

    if library in ("", "torchvision") and name in torchvision.models.list_models(module=torchvision.models):
        return "torchvision", name
    import timm

    if library in ("", "timm") and timm.is_model(name):
        return "timm", name
    names = torchvision.models.list_models(module=torchvision.models) + timm.list_models()
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]}?" if close else "such as resnet18, resnet50 or timm/convnext_tiny"
    raise ConfigError(f"--model.arch: expected a torchvision or timm backbone, got {arch}; {hint}")


def _create(arch: str, image_size: int) -> nn.Module:
    library, name = library_of(arch)
    if library == "torchvision":
        import torchvision

        return _without_classifier(torchvision.models.get_model(name, weights=None, **torchvision_options(name)))
    try:
        return timm_backbone(name, image_size)
    except Exception as error:  # whatever a third-party constructor raises
        raise _misfit(arch, image_size, error) from None


def timm_backbone(name: str, image_size: int, **options: Any) -> nn.Module:
    """timm's network without its classifier, for images of that size. Raises whatever timm raises."""
    import timm

    try:  # transformers are built for one image size; convolutional nets do not take the argument
        return timm.create_model(name, num_classes=0, img_size=image_size, **options)
    except TypeError:
        return timm.create_model(name, num_classes=0, **options)


def _without_classifier(backbone: nn.Module) -> nn.Module:
    """Replace the last linear layer, in every torchvision classifier the one that gives class scores."""
    names = [name for name, module in backbone.named_modules() if isinstance(module, nn.Linear)]
    if not names:
        kind = type(backbone).__name__
        raise ConfigError(f"--model.arch: expected a backbone with a linear classifier to take off, got a {kind}")
    parent, _, child = names[-1].rpartition(".")
    setattr(backbone.get_submodule(parent), child, nn.Identity())
    return backbone


def _use_small_stem(backbone: nn.Module) -> bool:
    """First convolution 3×3 with stride 1, and no max-pooling behind it, where it has stride 2. Returns whether
    anything is changed."""
    name, first = next(((n, m) for n, m in backbone.named_modules() if isinstance(m, nn.Conv2d)), ("", None))
    if first is None or first.stride != (2, 2):
        return False
    small = nn.Conv2d(first.in_channels, first.out_channels, 3, stride=1, padding=1, bias=first.bias is not None)
    parent, _, child = name.rpartition(".")
    setattr(backbone.get_submodule(parent), child, small)
    if isinstance(getattr(backbone, "maxpool", None), nn.Module):
        backbone.maxpool = nn.Identity()
    return True


def _small_patches(arch: str, image_size: int, backbone: nn.Module) -> nn.Module | None:
    """The same network for patches of a quarter of the side, so as many of them as of an image four times as large;
    None for one that does not begin with patches, or is always made for one size of them."""
    side = patch_size(backbone)
    if side is None or not type(backbone).__module__.startswith("timm."):
        return None
    try:
        return timm_backbone(arch.rpartition("/")[2], image_size, patch_size=max(1, side // 4))
    except Exception:  # it takes no such argument, or not with this size
        return None


def patch_size(backbone: nn.Module) -> int | None:
    """Side in pixels of the patches that a network begins with; None where it does not."""
    first = next((module for module in backbone.modules() if isinstance(module, nn.Conv2d)), None)
    return first.stride[0] if first is not None and first.kernel_size == first.stride else None


class MemoryBank(nn.Module):
    """`keys` [K, D] of strong views and `weak_keys` [K, D] of weak ones, filled together; `weak_keys` is None unless
    `weak`.

    Rows start as random unit vectors (MoCo). The write position lives on the device, so enqueueing never waits.
    Nothing here is a parameter and no rank ever broadcasts it: equal seeds and equal enqueues keep ranks equal.
    """

    keys: Tensor
    weak_keys: Tensor | None
    position: Tensor

    def __init__(
        self, size: int, dim: int, *, weak: bool = True, dtype: torch.dtype = torch.float32, seed: int = 0
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, wanted in (("keys", True), ("weak_keys", weak)):
            rows = nn.functional.normalize(torch.randn(size, dim, generator=generator)).to(dtype) if wanted else None
            self.register_buffer(name, rows)
        self.register_buffer("position", torch.zeros((), dtype=torch.long))

    def newest(self, count: int) -> Tensor:
        """The last `count` keys that came, at most K, newest first: [count, D]."""
        return self.keys[(self.position - 1 - torch.arange(count, device=self.keys.device)) % len(self.keys)]

    @torch.no_grad()
    def enqueue(self, keys: Tensor, weak_keys: Tensor | None = None, *, skipped: Tensor | None = None) -> None:
        """Overwrite the oldest rows by unit rows [n, D], any n. Of more than K rows the last K stay.

        Without `weak_keys` their bank, where there is one, keeps its rows (nothing reads it then). Where `skipped`,
        0-d, is not 0, nothing changes.
        """
        size, count = len(self.keys), len(keys)
        dropped = max(0, count - size)
        where = (self.position + torch.arange(dropped, count, device=keys.device)) % size
        for bank, rows in ((self.keys, keys), (self.weak_keys, weak_keys)):
            if bank is not None and rows is not None:
                rows = rows[dropped:].to(bank.dtype)
                bank.index_copy_(0, where, rows if skipped is None else torch.where(skipped != 0, bank[where], rows))
        moved = count if skipped is None else count * (skipped == 0)
        self.position.add_(moved).remainder_(size)
