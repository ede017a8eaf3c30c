"""Parts of a backbone: stages, norms and patch embeddings that stay as they are, and blocks that are computed twice."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from reco_fast.errors import ConfigError
from reco_fast.method.norms import batch_norms, keep_statistics
from reco_fast.settings.config import ModelConfig

# In the language of timm's `group_matcher`: the stem, the numbered stages, and all else, of the stage before it.
_TORCHVISION = {
    "stem": r"^(?:conv1|bn1|stem|class_token|conv_proj|encoder\.pos_embedding|features\.(?:0|conv0|norm0))\b",
    "stages": [
        (r"^(?:layer|stage|blocks\.|trunk_output\.block|encoder\.layers\.encoder_layer_)(\d+)", None),
        (r"^features\.(?:denseblock|transition)?(\d+)", None),
        (r"^", (99999,)),
    ],
}
_PATCH_EMBEDDINGS = ("patch_embed.proj", "conv_proj")  # timm's, torchvision's
_LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def freeze_parts(backbone: nn.Module, config: ModelConfig) -> None:
    """Keep the parts that `freeze` and `freeze_patch_embed` name as they are: no gradient, and batch norms use and keep
    their stored statistics, in copies as well. Raises ConfigError for a backbone without such parts."""
    frozen: list[nn.Parameter] = []
    if config.freeze == "norms":
        from timm.layers.norm import RmsNorm

        kinds = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, RmsNorm)
        norms = [module for module in backbone.modules() if isinstance(module, kinds)]
        if not norms:
            raise ConfigError(f"--model.freeze: expected a number of stages for {config.arch}, which has no norms")
        frozen += [parameter for norm in norms for parameter in norm.parameters(recurse=False)]
        keep_statistics(backbone)
    elif config.freeze != "nothing":
        stages, wanted = _stages(backbone), int(config.freeze)
        if len(stages) < 2:
            raise ConfigError(f"--model.freeze: expected norms for {config.arch}, whose stages have no known names")
        if wanted > len(stages):
            raise ConfigError(
                f"--model.freeze: expected at most the {len(stages)} stages of {config.arch}, got {wanted}"
            )
        frozen += [parameter for stage in stages[:wanted] for parameter in stage]
    if config.freeze_patch_embed:
        found = [module for name, module in backbone.named_modules() if name in _PATCH_EMBEDDINGS]
        if not found:
            raise ConfigError(f"--model.freeze-patch-embed: expected a transformer of patches, got {config.arch}")
        frozen += [parameter for module in found for parameter in module.parameters()]
    for parameter in frozen:
        parameter.requires_grad_(False)
    kept = set(frozen)
    for module in backbone.modules():  # not the norms alone: one without weights goes with what it is in
        own = set(module.parameters())
        if own and own <= kept:
            keep_statistics(module)


def _stages(backbone: nn.Module) -> list[list[nn.Parameter]]:
    """The parameters of the stem and of each stage after it."""
    from timm.models import group_parameters

    known: Any = backbone
    matcher = known.group_matcher(coarse=True) if hasattr(backbone, "group_matcher") else _TORCHVISION
    return list(group_parameters(backbone, matcher, return_values=True).values())


def recompute_blocks(encoder: nn.Module, arch: str) -> bool:
    """Make each repeated block of `encoder` keep its input alone for the backward pass, which computes the rest again.
    Returns whether one draws random numbers, whose state is then kept too. Raises ConfigError where none is found."""
    blocks: list[Any] = list(_blocks(encoder))
    if not blocks:
        raise ConfigError(f"--train.checkpoint-activations: expected a backbone of repeated blocks, got {arch}")
    for block in blocks:
        block.__class__ = _recomputed(block.__class__)
        block.draws = _draws(block)
    return any(block.draws for block in blocks)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Elements of lists that have several layers of weights, but for stages: those hold a list of such elements."""
    for child in module.children():
        if isinstance(module, _LISTS) and _is_block(child) and not any(map(_lists_blocks, child.modules())):
            yield child
        else:
            yield from _blocks(child)


def _is_block(module: nn.Module) -> bool:
    layers = sum(any(p.dim() > 1 for p in layer.parameters(recurse=False)) for layer in module.modules())
    return layers > 1 and not isinstance(module, _LISTS)


def _lists_blocks(module: nn.Module) -> bool:
    members = [child for child in module.children() if any(True for _ in child.parameters())]
    return isinstance(module, _LISTS) and len(members) > 0 and all(map(_is_block, members))


def _draws(block: nn.Module) -> bool:
    """Whether it has dropout of any kind, by attributes such as `p` of Dropout and `drop_prob` of timm's DropPath."""
    given = ((name, value) for module in block.modules() for name, value in vars(module).items())
    return any((name == "p" or "drop" in name) and isinstance(value, float) and value > 0 for name, value in given)


class _Recomputed(nn.Module):
    """A block whose forward pass the backward pass runs again."""

    draws: bool
    """Whether it needs the same random state then."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": self.draws}
        if not torch.compiler.is_compiling():  # a compiler knows that averages are no activations
            options["context_fn"] = lambda: (contextlib.nullcontext(), _averages_aside(self))
        args, kwargs = pytree.tree_map(lambda each: each, (args, kwargs))  # DenseNet appends to a list that it gives
        return checkpoint(super().forward, *args, **options, **kwargs)


@functools.cache
def _recomputed(kind: type) -> type:
    return type(f"Recomputed{kind.__name__}", (_Recomputed, kind), {})


@contextlib.contextmanager
def _averages_aside(block: nn.Module) -> Iterator[None]:
    """The running averages have followed the batch once: what the second pass makes of them is thrown away."""
    norms: list[Any] = [norm for norm in batch_norms(block) if norm.running_mean is not None]
    kept = [(norm.running_mean, norm.running_var) for norm in norms]
    for norm in norms:
        norm.running_mean, norm.running_var = torch.empty_like(norm.running_mean), torch.empty_like(norm.running_var)
    try:
        yield
    finally:
        for norm, (mean, var) in zip(norms, kept, strict=True):
            norm.running_mean, norm.running_var = mean, var
