"""What grows with the number of GPUs: bytes over the network, the age of the banks, and what the loader has to read.

    python -m reco_fast.profiling.benchmarks.scaling [PRESET] [--ranks 8 64 1024] [--rows 32] [--section.field VALUE]

Counted from the model that the preset builds and the collectives that a step makes, for `--rows` images on each GPU.
Times are arithmetic, not measured: bytes over `--network`, images over `--images-per-second`, both for each GPU.
"""

import inspect
import sys
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from reco_fast.errors import ConfigError
from reco_fast.method.model import build_encoder
from reco_fast.run.arguments import preset_and_rest
from reco_fast.settings import command_line
from reco_fast.settings.config import Config, DataConfig, LossConfig, ModelConfig, TrainConfig

FLOAT = 4  # bytes of a number of a gradient


@dataclass(frozen=True)
class Scaling:
    ranks: tuple[int, ...] = (8, 64, 256, 1024)
    """GPUs, one process each."""
    rows: int = 32
    """Images on each GPU: the global batch is as many times the ranks."""
    images_per_second: float = 926.0
    """Of one GPU, nothing else in the way: 3/8 of what NVIDIA publishes for supervised ResNet-50 on an A100."""
    network: float = 25.0
    """GB/s into and out of each GPU (200 Gb/s)."""
    image_bytes: float = 110e3
    """Of an encoded image: about the mean of ImageNet's JPEGs."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)

    def __post_init__(self) -> None:
        for name in ("rows", "images_per_second", "network", "image_bytes"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"--{name.replace('_', '-')}: expected a number above 0, got {getattr(self, name)}")
        if min(self.ranks, default=0) < 2:
            raise ConfigError(f"--ranks: expected numbers from 2 up, got {' '.join(map(str, self.ranks))}")


class Traffic(NamedTuple):
    """Bytes of one step, each over all ranks together as a collective's result counts them."""

    gradients: int
    """All-reduced (DistributedDataParallel): float32, each trainable parameter once."""
    keys: int
    """All-gathered for the banks: rows of the global batch, one set for each bank in use."""
    shuffle: int
    """All-gathered by --model.key-norm shuffle: the teacher's image batches, and its keys back; else 0."""

    def sent(self, ranks: int) -> float:
        """Bytes that one rank sends, and receives, in ring algorithms: what it gathers once, what it reduces twice."""
        return (ranks - 1) / ranks * (2 * self.gradients + self.keys + self.shuffle)


def traffic(config: Config, parameters: int, *, number_bytes: int = 2) -> Traffic:
    """Of a step of `config`, whose student has that many trainable parameters.

    `number_bytes`: of a view and of a bank, 2 on a GPU and 4 on a CPU.
    """
    batch = config.train.batch_size
    keys = batch * config.model.projection_dim * number_bytes * len(config.teacher_sizes)
    shuffle = 0
    if config.model.key_norm == "shuffle":
        shuffle = batch * 3 * sum(size**2 for size in config.teacher_sizes) * number_bytes + keys
    return Traffic(parameters * FLOAT, keys, shuffle)


def table(scaling: Scaling, parameters: int) -> str:
    """Markdown, a row for each number of ranks."""
    model = scaling.model
    lines = [
        f"{model.arch}, {scaling.data.image_size} px, {parameters / 1e6:.1f} M parameters, K = {model.bank_size:,}, "
        f"{scaling.rows} images a GPU; {scaling.images_per_second:,.0f} images/s and {scaling.network:g} GB/s a GPU, "
        f"{scaling.image_bytes / 1e3:.0f} KB an image",
        "",
        "| GPUs | batch | gradients all-reduced, MB | keys all-gathered, MB | network ms a step, of compute | "
        "oldest key, steps | teacher renewed since | images/s | read, GB/s |",
        "|---|" + 8 * "---|",
    ]
    compute = scaling.rows / scaling.images_per_second
    for ranks in scaling.ranks:
        batch = ranks * scaling.rows
        rate = ranks * scaling.images_per_second
        cells = [f"{ranks:,}", f"{batch:,}"]
        if batch > model.bank_size:
            cells += [f"more than K = {model.bank_size:,}: --model.bank-size must grow", *5 * [""]]
        else:
            config = Config(
                data=scaling.data, model=model, loss=scaling.loss, train=replace(TrainConfig(), batch_size=batch)
            )
            moved = traffic(config, parameters)
            seconds = moved.sent(ranks) / (1e9 * scaling.network)
            age = model.bank_size / batch
            cells += [
                f"{moved.gradients / 1e6:.1f}",
                f"{(moved.keys + moved.shuffle) / 1e6:.2f}",
                f"{1e3 * seconds:.1f} ({seconds / compute:.0%})",
                f"{age:,.0f}",
                f"{1 - model.teacher_momentum**age:.0%}",
            ]
        lines.append(f"| {' | '.join([*cells, f'{rate:,.0f}', f'{rate * scaling.image_bytes / 1e9:.2f}'])} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    preset, base, words = preset_and_rest(sys.argv[1:], "imagenet")
    default = Scaling(data=base.data, model=base.model, loss=base.loss)
    prog = f"python -m reco_fast.profiling.benchmarks.scaling {preset}"
    scaling = command_line.parse(
        Scaling, words, prog=prog, description=inspect.cleandoc(__doc__ or ""), default=default
    )
    encoder = build_encoder(scaling.model, scaling.data.image_size)
    print(table(scaling, sum(p.numel() for p in encoder.parameters() if p.requires_grad)), end="")
    return 0


if __name__ == "__main__":
    command_line.run(main)
