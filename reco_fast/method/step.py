"""One training step, in the order in which it happens, and the random numbers that it uses.

Nothing is drawn from hidden state: every number follows from (seed, step, part, rank), so a resumed run repeats them.
"""

from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from reco_fast import distributed
from reco_fast.kernels.reference import mix_target, unit
from reco_fast.method.losses import reco_loss
from reco_fast.method.optim import learning_rate, ramp, set_learning_rate, teacher_momentum
from reco_fast.method.passes import teacher_forward
from reco_fast.method.phases import relations_from
from reco_fast.method.state import TrainState
from reco_fast.profiling.trace import region
from reco_fast.settings.config import Config, LossConfig

METRICS = (
    "loss",
    "loss_instance",
    "loss_global",
    "loss_local",
    "teacher_entropy",
    "positive_similarity",
    "negative_similarity",
    "feature_mean_norm",
    "feature_std",
    "skipped_steps",
)


class Draws(NamedTuple):
    """The random part of one step on one rank, on the device.

    permutation: [n] int64, image i is mixed with image `permutation[i]`.
    mix_weights: [H, W] float32, the share of image i itself in each pixel: a constant for mixup, 0 in the pasted
        box and 1 around it for cutmix. Its mean is λ.
    shuffle: [n] or [global n] int64 for a teacher that normalises over shuffled groups, else None.
    """

    permutation: Tensor
    mix_weights: Tensor
    shuffle: Tensor | None


class Schedule(NamedTuple):
    """What changes from step to step."""

    lr: float
    relation_weight: float
    teacher_momentum: float


def scheduled(step: int, total_steps: int, config: Config) -> Schedule:
    """The schedules of a run of `total_steps` at one step."""
    warmup = round(total_steps * config.optim.warmup_epochs / config.train.epochs)
    peak = config.optim.lr * config.train.batch_size / 256
    return Schedule(
        lr=learning_rate(step, total_steps, warmup, peak),
        relation_weight=ramp(step, total_steps, config.loss.ramp, relations_from(config.loss, total_steps)),
        teacher_momentum=teacher_momentum(step, total_steps, config.model),
    )


def draw(step: int, rows: int, config: Config, device: torch.device) -> list[Draws]:
    """The draws of this rank's `rows` images at `step`, one for each accumulated part."""
    parts = config.train.accumulate
    drawn = []
    for part in range(parts):
        own = np.random.default_rng((config.train.seed, step, part, distributed.rank()))
        common = np.random.default_rng((config.train.seed, step, part))
        count = rows // parts
        shuffle = None
        if config.model.key_norm == "split":
            shuffle = own.permutation(count)
        elif config.model.key_norm == "shuffle":
            shuffle = common.permutation(count * distributed.world_size())
        drawn.append(
            Draws(
                _to_device(own.permutation(count), device),
                _to_device(mix_weights(own, config.loss, config.data.image_size), device),
                None if shuffle is None else _to_device(shuffle, device),
            )
        )
    return drawn


def mix_weights(rng: np.random.Generator, config: LossConfig, size: int) -> np.ndarray:
    """Pixel weights [size, size] float32 of one cutmix (arXiv 1905.04899) or mixup (arXiv 1710.09412) draw."""
    ratio = rng.beta(config.mix_alpha, config.mix_alpha)
    use_cutmix = rng.random() < 0.5 if config.mix == "both" else config.mix == "cutmix"
    if not use_cutmix:
        return np.full((size, size), ratio, dtype=np.float32)
    half = int(size * np.sqrt(1 - ratio)) // 2
    y, x = rng.integers(size, size=2)
    weights = np.ones((size, size), dtype=np.float32)
    weights[max(0, y - half) : y + half, max(0, x - half) : x + half] = 0
    return weights


def mix_pixels(images: Tensor, others: Tensor, draws: Draws) -> Tensor:
    """`w·images + (1−w)·others[π]` for channels-last images [m, 3, H, W], the first m of the batch, others [n, 3, H, W]
    and pixel weights w [H, W]."""
    # Indexing the [n, H, W, 3] view keeps the memory format; indexing [n, 3, H, W] itself would not.
    shuffled = others.permute(0, 2, 3, 1)[draws.permutation[: len(images)]].permute(0, 3, 1, 2)
    return torch.lerp(shuffled, images, draws.mix_weights.to(images.dtype))


def mixed_view(config: Config, views: tuple[Tensor, ...], draws: Draws) -> Tensor:
    """What the student sees of the images that are mixed, [m, 3, S, S]: its own view and that of other images which the
    keys are of, or, where those are weak, its own again."""
    others = views[0] if config.loss.weak_keys else views[1]
    mixed = mix_pixels(views[0][: config.mixed_images(len(others))], others, draws)
    if mixed.shape[-1] == config.mixed_size:
        return mixed
    return F.interpolate(mixed, size=[config.mixed_size] * 2, mode="bilinear", antialias=True)


def train_step(
    state: TrainState, config: Config, views: tuple[Tensor, ...], draws: list[Draws], schedule: Schedule
) -> Tensor:
    """One optimizer step on this rank's views: the student's, a strong one, and then the teacher's, which are a second
    strong one and, if the global relation is on, a weak one, or with weak keys the weak one alone.

    Where a gradient is not finite, the step counts as skipped: student, teacher, momentum and banks stay bit for bit as
    they were, alike on all ranks.
    Returns `METRICS` [len(METRICS)] float32 on the device, zeros but for the last in a skipped step; nothing waits
    for the device.
    """
    set_learning_rate(state.optimizer, schedule.lr)
    state.relation_weight.fill_(schedule.relation_weight)
    if config.model.teacher_momentum_end is not None:
        state.teacher_rate.fill_(1 - schedule.teacher_momentum)
    torch.manual_seed(hash((config.train.seed, state.step, distributed.rank())) % 2**63)  # for dropout in a backbone
    compute = partial(_compute, state, config)
    metrics = compute(views, draws) if state.graphed is None else state.graphed(compute, views, draws)
    state.step += 1
    return metrics


def _compute(state: TrainState, config: Config, views: tuple[Tensor, ...], draws: list[Draws]) -> Tensor:
    """All of a step that happens on the device, as a function of tensors alone: a CUDA graph can repeat it."""
    parts = len(draws)
    metrics, keys = [], []
    norms_before = state.norm_buffers.copy()
    for part, drawn in enumerate(draws):
        part_views = tuple(view.chunk(parts)[part] for view in views)
        last = part == parts - 1
        loss, part_keys, measured = _forward(state, config, part_views, drawn)
        with region("backward"), state.gradient_sync(last):
            state.scaler.scale(loss / parts).backward()
        metrics.append(measured)
        keys.append(part_keys)
    with region("optimizer"):
        skipped = _apply_gradients(state, config.optim.clip)
        state.norm_buffers.restore(norms_before, where=skipped)
        state.norm_buffers.count(skipped, **_batches(config, parts, len(views[0]) // parts))
    with region("moving_average"):
        state.update_teacher(state.teacher_rate, skipped)
    with region("enqueue"):
        rows = torch.cat(keys) if parts > 1 else keys[0]
        rows = distributed.all_gather(_clean_rows(rows).to(state.bank.keys.dtype))  # 2 bytes a number, where it has 2
        state.bank.enqueue(*rows.unbind(dim=1), skipped=skipped)  # weak keys too, where they are others
    mean = torch.stack(metrics).mean(dim=0) if parts > 1 else metrics[0]
    return torch.cat([torch.where(skipped > 0, 0.0, mean), skipped[None]])


def _batches(config: Config, parts: int, rows: int) -> dict[str, int]:
    """How many batches each batch norm of the student and the teacher meets in `parts` of `rows` images."""

    def groups(norm: str, rows: int) -> int:
        return -(-rows // -(-rows // config.model.norm_groups)) if norm == "split" else 1

    student = [rows, config.mixed_images(rows)] if config.mixes_apart else [rows]
    return {
        "student": parts * sum(groups(config.model.query_norm, images) for images in student),
        "teacher": parts * len(config.teacher_sizes) * groups(config.model.key_norm, rows),
    }


def _apply_gradients(state: TrainState, clip: float | None) -> Tensor:
    """Step the optimizer, or not where a gradient is not finite (0-d float32: 1), decided on the device. Before it, a
    gradient whose norm is above `clip` is scaled down to that.

    Gradients are averages over ranks by now, so all ranks decide alike.
    """
    gradients = [p.grad for p in state.student.parameters() if p.grad is not None]
    skipped = gradients[0].new_zeros(())
    # The scaler's own check, with nothing to unscale: all gradients in one multi-tensor operator.
    torch._amp_foreach_non_finite_check_and_unscale_(gradients, skipped, torch.ones_like(skipped))
    if clip is not None:
        state.scaler.unscale_(state.optimizer)  # the scaler's own check, made here and not in its step: no pass more
        clip_grads_with_norm_(state.student.parameters(), clip, get_total_norm(gradients))
    if not state.scaler.is_enabled():  # the scaler does the same by itself
        state.optimizer.found_inf = skipped  # type: ignore[attr-defined]
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    return skipped


def _clean_rows(keys: Tensor) -> Tensor:
    """Unit rows [..., D] for the banks; a key that overflowed becomes zeros and so repels nothing."""
    rows = unit(keys)
    # One sum tells: `unit` makes a number that is not finite NaN, and no sum of D others is.
    return torch.where(rows.sum(dim=-1, keepdim=True).isnan(), 0.0, rows)


def _forward(
    state: TrainState, config: Config, views: tuple[Tensor, ...], draws: Draws
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss with its graph, the teacher's new keys (and weak keys) [n, 1 or 2, D], and the measurements, of one part."""
    loss, model = config.loss, config.model
    with region("teacher_forward"), torch.no_grad(), state.autocast():
        keys = teacher_forward(state.run_teacher, views[1:], model.key_norm, draws.shuffle)
    with region("student_forward"), state.autocast():
        query, query_mix = student_forward(state, config, views, draws)
    with region("loss"):
        rows = len(views[0])
        seen = slice(rows - len(query), rows)  # the images that `query` is of: all, or those that were not mixed
        local_weight = loss.local_weight * state.relation_weight if loss.uses_local else 0
        whole = query_mix is not None and len(query_mix) == rows
        out = reco_loss(
            query,
            query_mix if whole else None,
            keys[0][seen],
            keys[-1][seen] if loss.uses_global else None,
            state.bank.keys,
            state.bank.keys if loss.weak_keys else state.bank.weak_keys,
            draws.permutation,
            draws.mix_weights.mean(),
            temperature=loss.temperature,
            student_temperature=loss.student_temperature,
            teacher_temperature=loss.teacher_temperature,
            global_weight=loss.global_weight * state.relation_weight if loss.uses_global else 0,
            local_weight=local_weight if whole else 0,
            mix_anchor=loss.mix_anchor,
            impl=loss.impl,
        )
        if query_mix is not None and not whole:
            local = _local_relation(state, loss, query, query_mix, keys[0], draws)
            # Where an image is either mixed or not, the terms of each count as one image's.
            plain, mixed = config.shares(rows)
            total = plain * out.total + mixed * local_weight * local
            out = out._replace(total=total, local_relation=local.detach())
    health = _feature_health(query.detach(), keys[0][seen])
    return out.total, torch.stack(keys, dim=1), torch.stack([out.total.detach(), *out[1:], *health])


def student_forward(
    state: TrainState, config: Config, views: tuple[Tensor, ...], draws: Draws
) -> tuple[Tensor, Tensor | None]:
    """The student's projections of its view, [n, D], and of the mixed view of the first m images, [m, D], if there is
    one. With `--loss.mix-within` both come from one pass, and the first is of the last n−m images alone."""
    if not config.loss.uses_local:
        return state.run_student(views[0])[0], None
    mixed = mixed_view(config, views, draws)
    if config.loss.mix_within:
        (both,) = state.run_student(torch.cat([mixed, views[0][len(mixed) :]]))
        return both[len(mixed) :], both[: len(mixed)]
    query, query_mix = state.run_student(views[0], mixed)
    return query, query_mix


def _local_relation(
    state: TrainState, loss: LossConfig, query: Tensor, query_mix: Tensor, key: Tensor, draws: Draws
) -> Tensor:
    """The local relation of the first m images, `query_mix` [m, D]: an instance term whose key is the mix target."""
    target = mix_target(unit(query), unit(key), draws.permutation, draws.mix_weights.mean(), loss.mix_anchor)
    return reco_loss(
        query_mix,
        None,
        target[: len(query_mix)],
        None,
        state.bank.keys,
        None,
        None,
        1.0,
        temperature=loss.temperature,
        global_weight=0,
        local_weight=0,
        impl=loss.impl,
    ).total


def _feature_health(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean similarity of positives, and of queries with the other images' keys, the newest negatives; norm of the mean
    unit embedding (1: all alike, or drifting as one); and the standard deviation of its coordinates times √D (1:
    uniform on the sphere; 0: collapsed). All by means over rows: no N×N matrix, and no pass over the bank."""
    both, (rows, width) = unit(torch.stack([query, key])), query.shape
    var, mean = torch.var_mean(both, dim=1, correction=0)  # [2, D]
    positive = both.prod(dim=0).sum() / rows
    all_pairs = mean[0] @ mean[1]
    negative = torch.sub(rows / max(1, rows - 1) * all_pairs, positive, alpha=1 / max(1, rows - 1))
    return positive, negative, mean[0].norm(), var[0].sqrt().mean() * width**0.5


def _to_device(array: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
