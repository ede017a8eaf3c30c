"""Phases: stretches of a training in which the step has another shape, so that its beginning is cheaper."""

import dataclasses
from typing import NamedTuple

from reco_fast.settings.config import Config, DataConfig, LossConfig

GROWN_AT = 0.75
"""Share of the training after which views grow no more: its last quarter, where the rate is low and the features
settle, is at the size that is evaluated."""
SMALL_SIDE = 64  # up to here, in pixels, a step of `COARSE` would be half of the image or more
FINE, COARSE = 8, 32  # pixels: sides are multiples, as strides of networks are


class Phase(NamedTuple):
    """From `first_step` on a step is what `config` says: the run's, but for the side of the views and the objective."""

    first_step: int
    config: Config
    fills_weak_bank: bool = False
    """Whether the relations begin with it: nothing has filled the bank of weak keys by then."""


def phases(config: Config, total_steps: int) -> list[Phase]:
    """Those of a run of `total_steps` steps in their order, from step 0 on; one, of `config` itself, where neither
    --data.grow-from nor --loss.start asks for more."""
    sizes = view_sizes(config.data)
    low, span = sizes[0], max(1, sizes[-1] - sizes[0])
    growth = {_step_at(GROWN_AT * (size - low) / span, total_steps): size for size in sizes}  # of two the larger
    begin = relations_from(config.loss, total_steps) if config.loss.uses_global or config.loss.uses_local else 0
    return [
        Phase(
            first,
            _shaped(config, max(size for at, size in growth.items() if at <= first), related=first >= begin),
            fills_weak_bank=first == begin > 0 and config.loss.uses_weak_bank,
        )
        for first in sorted({*growth, begin})
    ]


def view_sizes(data: DataConfig) -> list[int]:
    """Sides of the training views in pixels, ascending: --data.grow-from, the multiples behind it, and the last."""
    low, high = data.grow_from or data.image_size, data.image_size
    unit = FINE if high <= SMALL_SIDE else COARSE
    return sorted({low, *range(unit * (low // unit + 1), high, unit), high})


def relations_from(loss: LossConfig, total_steps: int) -> int:
    """The first step with the relations."""
    return _step_at(loss.start, total_steps)


def _step_at(share: float, total_steps: int) -> int:
    return min(total_steps - 1, round(share * total_steps))


def _shaped(config: Config, size: int, *, related: bool) -> Config:
    if size == config.data.image_size and related:
        return config
    data, loss = config.data, config.loss
    # A view that is smaller than the others is no larger than they are while they grow.
    data = dataclasses.replace(data, image_size=size, weak_size=data.weak_size and min(size, data.weak_size))
    loss = dataclasses.replace(loss, mix_size=loss.mix_size and min(size, loss.mix_size))
    if not related:  # by weights, for the keys stay of one kind
        loss = dataclasses.replace(loss, global_weight=0.0, local_weight=0.0)
    return dataclasses.replace(config, data=data, loss=loss)


def passes(config: Config) -> float:
    """Encoder passes an image, the mean over a training: a forward pass of a view of --data.image-size counts as 1,
    with the backward pass as 3, and a smaller view by its share of the pixels. ReCo makes 8, MoCo 4."""
    steps, full = 10_000, config.data.image_size
    those = phases(config, steps)
    ends = [*(phase.first_step for phase in those[1:]), steps]
    lengths = (end - phase.first_step for phase, end in zip(those, ends, strict=True))
    return sum(n * _passes(phase.config, full) for phase, n in zip(those, lengths, strict=True)) / steps


def _passes(config: Config, full: int) -> float:
    mixed = config.loss.mix_share * config.mixed_size**2 if config.mixes_apart else 0
    student = 3 * (config.data.image_size**2 + mixed)
    return (student + sum(size**2 for size in config.teacher_sizes)) / full**2
