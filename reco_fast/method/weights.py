"""Weights from elsewhere put into a backbone: which of their names is which of ours, and how many fit."""

import hashlib
import inspect
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from reco_fast.errors import ConfigError
from reco_fast.method.model import Encoder
from reco_fast.settings.config import ModelConfig

ENOUGH = 0.9
"""Share of the backbone's parameters that weights must hold, unless --model.init-partial takes less."""
_TEACHERS = re.compile(r"teacher|momentum|encoder_k|key|target|ema\b", re.IGNORECASE)
_FEW = 3  # names in a line


class Fit(NamedTuple):
    """Which tensors of a backbone some weights hold."""

    found: dict[str, Tensor]
    """By the backbone's names."""
    prefix: str
    """In front of the names there."""
    share: float
    """Of the backbone's parameters, counted in numbers."""
    unused: list[str]
    """What is there behind the same prefix, and has no place in the backbone."""


def fit(backbone: nn.Module, weights: Mapping[str, Tensor], which: str) -> Fit:
    """The part of `weights` that fits `backbone` best, by name and shape.

    Tools put words in front of a backbone's names (`module.encoder_q.`, `backbone.`, `student._orig_mod.`), or number
    its children (Lightly, by nn.Sequential): of the words under which most numbers fit, all is taken. Where student and
    teacher fit equally well, `which` decides by the words that tools have for a teacher.
    """
    best = _fit(backbone, weights, which)
    filtered = _by_timm(backbone, best, weights) if best.share < 1 else None
    if filtered is None:
        return best
    other = _fit(backbone, filtered, which)
    return other._replace(prefix=best.prefix) if other.share > best.share else best


def _fit(backbone: nn.Module, weights: Mapping[str, Tensor], which: str) -> Fit:
    ours = {name: value for name, value in backbone.state_dict().items() if isinstance(value, Tensor)}
    numbered = {child: str(number) for number, (child, _) in enumerate(backbone.named_children())}
    spellings = {name: name for name in ours} | {_renamed(name, numbered): name for name in ours}
    found: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, value in weights.items():
        for prefix, rest in _splits(name):
            place = spellings.get(rest)
            if place is not None and _fits(value, ours[place]):
                found[prefix][place] = value
    parameters = {name: value.numel() for name, value in backbone.named_parameters()}

    def quality(prefix: str) -> tuple[int, bool, int]:
        fitting = sum(parameters.get(name, 0) for name in found[prefix])
        # Optimizers keep tensors of the same names and shapes, but none of the buffers.
        return fitting, (_TEACHERS.search(prefix) is not None) == (which == "teacher"), len(found[prefix])

    prefix = max(found, key=quality, default="")
    unused = [name for name in _behind(prefix, weights) if name not in spellings]
    return Fit(found[prefix], prefix, quality(prefix)[0] / sum(parameters.values()), unused)


def _renamed(name: str, children: Mapping[str, str]) -> str:
    child, dot, rest = name.partition(".")
    return f"{children.get(child, child)}{dot}{rest}"


def _splits(name: str) -> Iterator[tuple[str, str]]:
    """`name` cut in two at each of its dots, and not at all."""
    yield "", name
    for dot in re.finditer(r"\.", name):
        yield name[: dot.end()], name[dot.end() :]


def _behind(prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What begins with `prefix`, by the rest of its name."""
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def _fits(value: Tensor, place: Tensor) -> bool:
    return value.shape == place.shape and value.is_floating_point() == place.is_floating_point()


def _by_timm(backbone: nn.Module, best: Fit, weights: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """What timm itself makes of weights of other names or another image size for one of its networks; None where it
    has nothing to say."""
    translate = getattr(sys.modules[type(backbone).__module__], "checkpoint_filter_fn", None)
    if not type(backbone).__module__.startswith("timm.") or translate is None:
        return None
    given: dict[str, Any] = {"model": backbone} if "model" in inspect.signature(translate).parameters else {}
    try:
        translated = translate(_behind(best.prefix, weights), **given)
        return {name: value for name, value in translated.items() if isinstance(value, Tensor)}
    except Exception:  # of a layout that it does not know either
        return None


def load_weights(encoder: Encoder, weights: Mapping[str, Tensor], config: ModelConfig) -> str:
    """Put `weights` into the backbone of `encoder`, and into its projector where they are from a run with the same.

    Returns one line that says what fitted. Raises ConfigError, with the encoder untouched, where less than `ENOUGH` of
    the backbone's parameters do and `config` does not allow it, or where a number is not finite.
    """
    backbone = encoder.backbone
    fitting = fit(backbone, weights, config.init_which)
    line = _line(backbone, fitting, _behind(fitting.prefix, weights))
    if not fitting.found or (fitting.share < ENOUGH and not config.init_partial):
        raise ConfigError(
            f"--model.init {config.init}: expected weights of {config.arch} ({ENOUGH:.0%} of its parameters, or any "
            f"part with --model.init-partial), got {line}"
        )
    projector = encoder.projector.state_dict()
    behind = {name: weights.get(f"{fitting.prefix.removesuffix('backbone.')}projector.{name}") for name in projector}
    taken = {name: value for name, value in behind.items() if value is not None and _fits(value, projector[name])}
    whole = len(taken) == len(projector)
    for name, value in fitting.found.items() if not whole else (*fitting.found.items(), *taken.items()):
        if not value.isfinite().all():
            raise ConfigError(f"--model.init {config.init}: expected finite numbers, got others in {name}")
    backbone.load_state_dict(fitting.found, strict=False)
    if whole:
        encoder.projector.load_state_dict(taken)
    return f"starts from {config.init}: {line}; {'the projector too' if whole else 'the projector is new'}"


def _line(backbone: nn.Module, fitting: Fit, there: Mapping[str, Tensor]) -> str:
    """How much fits, and what does not; `there`: what stands behind the same words."""
    ours = backbone.state_dict()
    line = f"{len(fitting.found)} of {len(ours)} tensors, {_percent(fitting.share)} of the parameters"
    if fitting.prefix:
        line += f", behind {fitting.prefix.removesuffix('.')}"
    missing = [n for n in ours if n not in fitting.found and not n.endswith("num_batches_tracked")]
    other = [f"{n} (there {_shape(there[n])}, here {_shape(ours[n])})" for n in missing if n in there]
    absent = [name for name in missing if name not in there]
    for what, names in (("of another shape", other), ("not there", absent), ("not used", fitting.unused)):
        if names:
            more = f" and {len(names) - _FEW} more" if len(names) > _FEW else ""
            line += f"; {what}: {', '.join(names[:_FEW])}{more}"
    return line


def _percent(share: float) -> str:
    return "100 %" if share == 1 else f"{min(99.9, 100 * share):.1f} %"


def _shape(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "one number"


def digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 in hexadecimal of names, types, shapes and bytes, in the order of the names."""
    total = hashlib.sha256()
    for name in sorted(weights):
        value = weights[name].detach().cpu().contiguous()
        total.update(f"{name}\0{value.dtype}\0{list(value.shape)}\0".encode("utf-8", "surrogateescape"))
        total.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
