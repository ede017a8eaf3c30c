"""All that changes while a run trains, and the same modules as the step calls them."""

import contextlib
import copy
import os
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from reco_fast import distributed
from reco_fast.config import Config, ConfigError
from reco_fast.memory_bank import MemoryBank
from reco_fast.model import Encoder, Passes, TeacherUpdate, build_encoder, follow_mode
from reco_fast.optim import build_optimizer


@dataclass
class TrainState:
    """`student`, `teacher`, `bank`, `optimizer`, `scaler` and `step` are what a checkpoint holds.

    `run_student` (views to a tuple of embeddings) and `run_teacher` are the same encoders, compiled and under
    DistributedDataParallel where the run asks for it.
    """

    student: Encoder
    teacher: Encoder
    bank: MemoryBank
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    run_student: nn.Module
    run_teacher: nn.Module
    update_teacher: TeacherUpdate
    device: torch.device
    precision: torch.dtype
    step: int = 0

    def autocast(self) -> torch.autocast:
        """Mixed precision for the encoders; nothing in float32."""
        return torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32)

    def gradient_sync(self, now: bool) -> contextlib.AbstractContextManager[None]:
        """Around a backward pass: whether its gradients are averaged over ranks or only accumulated."""
        if isinstance(self.run_student, DistributedDataParallel) and not now:
            return self.run_student.no_sync()
        return contextlib.nullcontext()


def build_state(config: Config, device: torch.device) -> TrainState:
    """A fresh state: student and teacher start equal, on all ranks alike."""
    torch.manual_seed(config.train.seed)
    student = build_encoder(config.model, config.data.image_size)
    has_batch_norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in student.modules())
    if config.model.key_norm != "batch" and not has_batch_norm:
        raise ConfigError(
            f"--model.key-norm: expected batch for {config.model.arch}, which has no batch norm, "
            f"got {config.model.key_norm}"
        )
    student = student.to(device).to(memory_format=torch.channels_last)
    teacher = copy.deepcopy(student).requires_grad_(False)
    follow_mode(teacher, config.model.key_norm)
    precision = pick_precision(config.train.precision, device)
    bank = MemoryBank(
        config.model.bank_size,
        config.model.projection_dim,
        dtype=torch.float32 if precision == torch.float32 else torch.bfloat16,
        seed=config.train.seed,
    ).to(device)

    run_student: nn.Module = student
    run_teacher: nn.Module = teacher
    if config.train.compile if config.train.compile is not None else device.type == "cuda":
        # Wrappers: `student` and `teacher` stay what checkpoints and evaluation see.
        run_student = torch.compile(student)  # type: ignore[assignment]
        run_teacher = torch.compile(teacher)  # type: ignore[assignment]
    run_student = Passes(run_student)
    if distributed.world_size() > 1:
        # Batch-norm averages stay local (rank 0's are saved); banks and teacher are not inside and never broadcast.
        run_student = DistributedDataParallel(run_student, broadcast_buffers=False, gradient_as_bucket_view=True)
    return TrainState(
        student=student,
        teacher=teacher,
        bank=bank,
        optimizer=build_optimizer(student, config.optim),
        scaler=torch.amp.GradScaler(device.type, enabled=precision == torch.float16),
        run_student=run_student,
        run_teacher=run_teacher,
        update_teacher=TeacherUpdate(teacher, student, config.model.key_norm),
        device=device,
        precision=precision,
    )


def pick_device(name: str) -> torch.device:
    """The device of this rank. Raises ConfigError for `cuda` without CUDA."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(
            "--train.device: expected cpu or auto on this machine (PyTorch finds no CUDA device), got cuda"
        )
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """`auto`: bfloat16 where there are matrix units for it (AMX on a CPU), else float16 on CUDA, float32 on a CPU."""
    if name != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    return torch.bfloat16 if torch.cpu._is_amx_tile_supported() else torch.float32
