"""Whether a run learns, drifts or collapses: what the embeddings look like, each loss beside chance, and warnings.

`spread` measures embeddings, `chance_levels` says what a loss would be if nothing had been learned, and `Watch` turns
both into warnings. How to read them: docs/use.md.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from reco_fast.settings.config import Config

SPREAD_ROWS = 4096  # more rows hardly change the figures, and the rank costs rows × width²


class Spread(NamedTuple):
    """How embeddings fill their space.

    mean_norm: norm of the mean of the unit rows. 1: all point the same way; 0 to 1/√n: evenly around.
    std: standard deviation of a coordinate of the unit rows times √F. 1: uniform on the sphere; 0: all alike.
    rank: effective number of dimensions (`rank_me`), from 1 to min(n, F).
    """

    mean_norm: float
    std: float
    rank: float


@torch.no_grad()
def spread(rows: Tensor) -> Spread:
    """`Spread` of `rows` [n, F], any float type; of at most `SPREAD_ROWS` of them, evenly chosen."""
    if len(rows) > SPREAD_ROWS:
        rows = rows[torch.arange(SPREAD_ROWS, device=rows.device) * len(rows) // SPREAD_ROWS]
    units = nn.functional.normalize(rows.float())
    std = units.std(dim=0, correction=0).mean() * rows.shape[1] ** 0.5
    return Spread(units.mean(dim=0).norm().item(), std.item(), rank_me(rows))


@torch.no_grad()
def rank_me(rows: Tensor) -> float:
    """RankMe of `rows` [n, F]: exp(entropy of the singular values over their sum). (Garrido et al., arXiv 2210.02885,
    equations 1 and 2.) The rows are neither centred nor normalised. 1 where all are parallel, zero, or not finite."""
    rows = rows.double()
    gram = (rows.T @ rows if len(rows) > rows.shape[1] else rows @ rows.T).cpu()
    if not gram.isfinite().all() or not gram.any():
        return 1.0
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more meet at each column, and wait there for those whose core a loader's thread has
    try:
        singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    finally:
        torch.set_num_threads(threads)
    share = singular / singular.sum() + 1e-7
    return (-(share * share.log()).sum()).exp().item()


def chance_levels(config: Config, relation_weight: float) -> dict[str, float]:
    """What each loss term in use is where nothing was learned, and `chance`, the total of them.

    Instance and local: all K+1 similarities equal, log(K+1). Global: the student is uniform over the bank, log K.
    """
    loss, size = config.loss, config.model.bank_size
    plain, mixed = config.shares(config.train.batch_size)
    levels = {"chance_instance": math.log(size + 1)}
    total = plain * levels["chance_instance"]
    if loss.uses_global:
        levels["chance_global"] = math.log(size)
        total += plain * relation_weight * loss.global_weight * levels["chance_global"]
    if loss.uses_local:
        levels["chance_local"] = math.log(size + 1)
        total += mixed * relation_weight * loss.local_weight * levels["chance_local"]
    return {"chance": total} | levels


class Finding(NamedTuple):
    """Something wrong with a run: a short name, one line that says what was seen and what to try, and whether this is
    the first time."""

    cause: str
    line: str
    new: bool


# Thresholds: docs/use.md has runs, healthy and not, on both sides of each.
COLLAPSED_MEAN_NORM = 0.9
COLLAPSED_RANK = 4.0
DRIFT_LOSS = 0.6  # local loss over instance loss: a mixed image is not that much easier to tell than a whole one
DRIFT_MEAN_NORM = 0.75
READINGS = 3  # in a row: a single one may be an accident
SETTLED_STEPS = 500  # or an epoch, and the warm-up: an untrained network maps all images to much the same place


@dataclass
class Watch:
    """Looks at what a run reports and finds what is wrong. Its fields are JSON, so that checkpoints can hold it."""

    collapsed: int = 0
    """Readings in a row that look collapsed."""
    drifting: int = 0
    """Readings in a row that look as if the student ran away from the memory bank."""
    loss: float | None = None
    """Newest loss, with the relations at full weight: a ramp makes the reported total rise."""
    evaluations: list[list[float]] = field(default_factory=list)
    """Loss at, and kNN top-1 in percent of, the last three evaluations that had both."""
    best: float = 0.0
    """Highest kNN top-1 so far in percent."""
    found: list[str] = field(default_factory=list)
    """Causes found so far."""

    def reading(self, values: Mapping[str, float], config: Config, *, settled: bool) -> list[Finding]:
        """What is wrong by the values of one log interval. `settled`: past the first epoch and the warm-up."""
        loss = config.loss
        self.loss = (
            values["loss_instance"]
            + loss.global_weight * values["loss_global"]
            + loss.local_weight * values["loss_local"]
        )
        mean_norm, rank = values["feature_mean_norm"], values["bank_rank"]
        collapsed = mean_norm > COLLAPSED_MEAN_NORM or rank < COLLAPSED_RANK
        drifting = (
            loss.uses_local
            and values["loss_local"] < DRIFT_LOSS * values["loss_instance"]
            and mean_norm > DRIFT_MEAN_NORM
        )
        self.collapsed = self.collapsed + 1 if settled and collapsed else 0
        self.drifting = self.drifting + 1 if settled and drifting else 0
        if self.drifting >= READINGS:
            return self._finding(
                "drift",
                f"the student runs away from the memory bank in one direction (local loss {values['loss_local']:.2f} "
                f"against {values['loss_instance']:.2f} of the instance term, norm of the mean feature "
                f"{mean_norm:.2f}); try {_against_drift(config)}",
            )
        if self.collapsed >= READINGS:
            return self._finding(
                "collapse",
                f"features collapse (norm of the mean feature {mean_norm:.2f}, where 1 is all alike; effective rank "
                f"{rank:.1f} of {config.model.projection_dim}); try a lower --optim.lr or a longer "
                "--optim.warmup-epochs",
            )
        return []

    def evaluation(self, knn_top1: float, images: int, config: Config) -> list[Finding]:
        """What is wrong by kNN top-1 in percent on `images` held-out images: the loss fell twice in a row while kNN
        did, to more than two standard errors below its best."""
        self.best = max(self.best, knn_top1)
        if self.loss is None:  # before the first step
            return []
        self.evaluations = [*self.evaluations, [self.loss, knn_top1]][-3:]
        pairs = list(zip(self.evaluations, self.evaluations[1:], strict=False))
        both_fell = len(pairs) == 2 and all(b[0] < a[0] and b[1] < a[1] for a, b in pairs)
        share = self.best / 100
        error = 100 * math.sqrt(2 * share * (1 - share) / images)  # of a difference of two accuracies
        if not both_fell or self.best - knn_top1 <= 2 * error:
            return []
        accuracies = " → ".join(f"{top1:.1f}" for _, top1 in self.evaluations)
        remedy = "--model.key-norm split, " if config.model.key_norm == "batch" else ""
        return self._finding(
            "loss_without_knn",
            f"the loss falls and so does kNN ({accuracies} %, best {self.best:.1f}): the loss is met by something else "
            f"than better features; try {remedy}{_against_drift(config)}",
        )

    def _finding(self, cause: str, line: str) -> list[Finding]:
        new = cause not in self.found
        if new:
            self.found.append(cause)
        return [Finding(cause, line, new)]


def _against_drift(config: Config) -> str:
    if config.loss.uses_local and config.loss.mix_anchor == "query":
        return "--loss.mix-anchor key"
    weight = ", a lower --loss.local-weight" if config.loss.uses_local else ""
    return f"a lower --optim.lr{weight} or a lower --model.teacher-momentum"
