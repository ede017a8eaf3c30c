"""What must fit before a run begins, beyond what a configuration can check of itself. All raise ConfigError."""

from pathlib import Path

import torch

from reco_fast import distributed
from reco_fast.config import Config, ConfigError
from reco_fast.pipelines.image_source import ImageSource


def same_images(before: str | None, source: ImageSource, path: Path | None) -> str:
    """The fingerprint of `source`, which must be the one of `before` if the run has begun: places in the training
    stream mean something only for the same files in the same order."""
    fingerprint = source.fingerprint()
    if before not in (None, fingerprint):
        raise ConfigError(f"--data.path: expected the images that this run began with, {path} holds others now")
    return fingerprint


def same_start(step: int, device: torch.device) -> None:
    """All ranks must have found the same checkpoint, or none."""
    steps = sorted(set(distributed.all_gather(torch.tensor([step], device=device)).tolist()))
    if len(steps) > 1:
        found = " and ".join(map(str, steps))
        raise ConfigError(f"--run.dir: expected a folder that all machines share, ranks found runs at step {found}")


def fit_ranks(config: Config) -> None:
    """What must fit the number of ranks."""
    parts = distributed.world_size() * config.train.accumulate
    if config.train.batch_size % parts:
        raise ConfigError(
            f"--train.batch-size: expected a multiple of ranks × --train.accumulate = {parts}, "
            f"got {config.train.batch_size}"
        )
    rows = config.train.batch_size // parts
    if config.model.key_norm == "shuffle" and distributed.world_size() == 1:
        raise ConfigError("--model.key-norm: expected split, batch or ema on one rank, got shuffle (needs two or more)")
    if config.model.key_norm == "split" and rows < 2 * config.model.norm_groups:
        raise ConfigError(
            f"--model.norm-groups: expected at most half of the {rows} images that a rank normalises together, "
            f"got {config.model.norm_groups}"
        )


def loss_runs(config: Config, device: torch.device) -> None:
    """Whether the loss can run as asked for."""
    if config.loss.impl == "triton":
        try:
            from reco_fast.kernels.relation_loss import unsupported
        except ImportError:
            raise ConfigError("--loss.impl: expected auto, sdpa or torch where Triton is not installed") from None
        reason = unsupported(torch.empty(1, config.model.projection_dim, device=device))
        if reason is not None:
            raise ConfigError(f"--loss.impl triton: {reason}")
