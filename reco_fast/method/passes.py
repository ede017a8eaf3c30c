"""Student and teacher as a step calls them, and how the teacher follows the student."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from reco_fast import distributed
from reco_fast.method.norms import batch_norms, can_group, use_groups
from reco_fast.settings.config import ModelConfig


class Passes(nn.Module):
    """The encoder on several views in one call: DistributedDataParallel wants one forward for each backward.

    `together`: as one batch, whose batch norms know of its views (`use_groups`): half the kernels of two passes.
    """

    def __init__(self, encoder: nn.Module, *, together: bool) -> None:
        super().__init__()
        self.encoder, self.together = encoder, together

    def forward(self, *views: Tensor) -> tuple[Tensor, ...]:
        if self.together and len(views) > 1:
            return self.encoder(torch.cat(views)).chunk(len(views))
        return tuple(self.encoder(view) for view in views)


def follow_mode(teacher: nn.Module, key_norm: str) -> nn.Module:
    """Put the teacher in eval mode, but for its batch norms, which use batch statistics unless `key_norm="ema"`."""
    teacher.eval()
    if key_norm != "ema":
        for norm in batch_norms(teacher):
            norm.train()
    return teacher


def shared_copy(module: nn.Module, replaced: dict[nn.Parameter, nn.Parameter] | None = None) -> nn.Module:
    """A second module of the same tensors, but for `replaced`, whose batch norms do not count their batches:
    `NormBuffers.count` does once a step what would be a kernel a layer and pass."""
    same: dict[int, Any] = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    same |= {id(tensor): other for tensor, other in (replaced or {}).items()}
    copied = copy.deepcopy(module, same)
    for norm in batch_norms(copied):
        norm.num_batches_tracked = None
    return copied


class InGroups(nn.Module):
    """`encoder` on each of `groups` parts of a batch: for batch norms of a kind that cannot do it in one pass."""

    def __init__(self, encoder: nn.Module, groups: int) -> None:
        super().__init__()
        self.encoder, self.groups = encoder, groups

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([self.encoder(part) for part in images.chunk(self.groups)])


class RunningStudent(NamedTuple):
    """The student as a step calls it."""

    module: nn.Module
    together: bool
    """Whether it takes all views of a step as one batch."""


def running_student(student: nn.Module, config: ModelConfig, image_size: int, views: int = 1) -> RunningStudent:
    """The same tensors, for `views` views as one batch if its batch norms can keep them apart."""
    module, groups = shared_copy(student), config.norm_groups if config.query_norm == "split" else 1
    with torch.no_grad():
        can = groups * views > 1 and _norms_see_the_batch(module, _two_images(student, image_size))
    return RunningStudent(*_in_groups(module, groups, views, can))


class RunningTeacher(NamedTuple):
    """The teacher as a step calls it: the same tensors, but for weights in the run's precision."""

    module: nn.Module
    together: bool
    """Whether it takes all views of a step as one batch."""
    weights: list[Tensor]
    """Of the teacher, float32."""
    copies: list[Tensor]
    """Of `weights`, in the run's precision."""


def running_teacher(
    teacher: nn.Module, config: ModelConfig, precision: torch.dtype, image_size: int, views: int = 1
) -> RunningTeacher:
    """For a `teacher` that `follow_mode` has seen, and `views` views as one batch if its batch norms can keep them
    apart. Autocast would cast its weights in every call."""
    images = _two_images(teacher, image_size)
    layers = (m for m in teacher.modules() if type(m) in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))
    weights = [] if precision == torch.float32 else list({p: None for m in layers for p in m.parameters()})
    copies = {p: nn.Parameter(p.detach().to(precision), requires_grad=False) for p in weights}
    module = shared_copy(teacher, copies)
    with torch.no_grad(), torch.autocast(images.device.type, precision, enabled=precision != torch.float32):
        try:
            whole = _norms_see_the_batch(module, images)
        except RuntimeError:  # a network that leaves autocast somewhere wants its own weights there
            copies, module = {}, shared_copy(teacher)
            whole = _norms_see_the_batch(module, images)
    groups = config.norm_groups if config.key_norm == "split" else 1
    return RunningTeacher(*_in_groups(module, groups, views, whole), list(copies), list(copies.values()))


def _in_groups(module: nn.Module, groups: int, views: int, whole: bool) -> tuple[nn.Module, bool]:
    """`module` with batch norms of `groups` of each view, and whether it takes `views` views as one batch. `whole`:
    its norms see the batch."""
    if groups * views > 1 and whole and can_group(module):
        use_groups(module, groups, views)
        return module, views > 1
    return (InGroups(module, groups) if groups > 1 else module), False


def _two_images(module: nn.Module, size: int) -> Tensor:
    images = torch.zeros(2, 3, size, size, device=next(module.parameters()).device)
    return images.to(memory_format=torch.channels_last)


def _norms_see_the_batch(module: nn.Module, images: Tensor) -> bool:
    """Whether each batch norm's input has a row an image, which groups of rows then divide as groups of images."""
    seen: list[int] = []
    modes = {m: m.training for m in module.modules()}
    hooks = [n.register_forward_pre_hook(lambda _, given: seen.append(len(given[0]))) for n in batch_norms(module)]
    try:
        module.eval()(images)
    finally:
        for hook in hooks:
            hook.remove()
        for m, mode in modes.items():
            m.training = mode
    return set(seen) <= {len(images)}


class TeacherUpdate:
    """`teacher ← m·teacher + (1−m)·student` for all parameters in a few multi-tensor kernels (MoCo, eq. 2).

    `rate`, 1−m, and `skipped` are 0-d float32 on the device, where a captured step reads them anew; where `skipped` is
    1, the teacher stays as it is. With `key_norm="ema"` the batch norms' moving averages follow in the same way (Cai et
    al., arXiv 2101.07525). Weights of which `running` has copies are copied there.
    """

    def __init__(
        self, teacher: nn.Module, student: nn.Module, key_norm: str, running: RunningTeacher | None = None
    ) -> None:
        self._weights, self._copies = (running.weights, running.copies) if running else ([], [])
        self.teacher: list[Tensor] = list(teacher.parameters())
        self.student: list[Tensor] = list(student.parameters())
        if key_norm == "ema":
            self.teacher += [b for b in teacher.buffers() if b.is_floating_point()]
            self.student += [b for b in student.buffers() if b.is_floating_point()]

    @torch.no_grad()
    def __call__(self, rate: Tensor, skipped: Tensor | None = None) -> None:
        # A step of SGD along (student − teacher): of the multi-tensor kernels, the one that a flag on the device stops.
        torch._fused_sgd_(
            self.teacher,
            self.student,
            [],
            weight_decay=1.0,
            momentum=0.0,
            lr=rate,
            dampening=0.0,
            nesterov=False,
            maximize=True,
            is_first_step=False,
            found_inf=skipped,
        )
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """What else changes the teacher's weights calls this: the copies that run follow them."""
        if self._copies:
            torch._foreach_copy_(self._copies, self._weights)


def teacher_forward(
    teacher: Callable[..., tuple[Tensor, ...]], views: tuple[Tensor, ...], key_norm: str, shuffle: Tensor | None
) -> tuple[Tensor, ...]:
    """Embeddings [n, D] of a rank's views [n, 3, H, W] by `Passes` of a running teacher, normalised as
    `--model.key-norm` says.

    `shuffle`: for "split" a permutation of the rank's batch, for "shuffle" one of the global batch (the same on all
    ranks). Either keeps a key from sharing batch statistics with its own query, which the student could read off.
    """
    if key_norm == "split":
        assert shuffle is not None
        return tuple(_put_back(keys, shuffle) for keys in teacher(*(view[shuffle] for view in views)))
    if key_norm == "shuffle":
        assert shuffle is not None
        mine = shuffle.view(distributed.world_size(), -1)[distributed.rank()]
        # As [n, H, W, 3], since a collective wants its rows contiguous, and channels-last images are so only then.
        whole = (distributed.all_gather(view.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) for view in views)
        shuffled = (distributed.all_gather(keys) for keys in teacher(*(view[mine] for view in whole)))
        own = slice(distributed.rank() * len(mine), (distributed.rank() + 1) * len(mine))
        return tuple(_put_back(keys, shuffle)[own] for keys in shuffled)
    return teacher(*views)


def _put_back(rows: Tensor, shuffle: Tensor) -> Tensor:
    """`rows` as they were before something took them in the order of `shuffle`."""
    return torch.empty_like(rows).index_copy_(0, shuffle, rows)
