"""All that changes while a run trains, and the same modules as the step calls them."""

import contextlib
import copy
import gc
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from reco_fast import distributed
from reco_fast.errors import ConfigError
from reco_fast.method.cuda_graph import CudaBackend, Graphed
from reco_fast.method.model import Encoder, MemoryBank, build_encoder, channels_last, check_other_sizes
from reco_fast.method.norms import NormBuffers, batch_norms
from reco_fast.method.optim import build_optimizer
from reco_fast.method.parts import freeze_parts, recompute_blocks
from reco_fast.method.passes import Passes, TeacherUpdate, follow_mode, running_student, running_teacher
from reco_fast.method.phases import view_sizes
from reco_fast.settings.config import Config


@dataclass
class TrainState:
    """`student`, `teacher`, `bank`, `optimizer`, `scaler` and `step` are what a checkpoint holds.

    `run_student` and `run_teacher` (views to a tuple of embeddings) are what a step calls: modules of the same tensors,
    but for the teacher's weights in the run's precision, compiled and under DistributedDataParallel where the run asks
    for it.
    """

    student: Encoder
    teacher: Encoder
    bank: MemoryBank
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    norm_buffers: NormBuffers
    device: torch.device
    precision: torch.dtype
    relation_weight: Tensor
    """Of the step under way: a factor of both relations' weights, 0-d float32 on the device."""
    teacher_rate: Tensor
    """Of the step under way: 1 less the teacher's momentum, 0-d float32 on the device."""
    run_student: nn.Module = field(init=False)
    run_teacher: nn.Module = field(init=False)
    update_teacher: TeacherUpdate = field(init=False)
    graphed: Graphed | None = None
    """Runs the step from a CUDA graph, where the run does."""
    step: int = 0

    def enter(self, config: Config) -> None:
        """Make anew what a step calls, for a phase's `config`: compiled code and a CUDA graph are of steps of one
        shape. All that a checkpoint holds stays."""
        del self.run_student, self.run_teacher, self.update_teacher
        self.graphed = None
        gc.collect()  # DistributedDataParallel may be in a cycle, and hears of gradients as long as it lives
        if _compiles(config, self.device):
            torch.compiler.reset()  # code of the phase before counts against a limit, beyond which nothing is compiled
        self.prepare(config)

    def prepare(self, config: Config) -> None:
        """What `enter` does in a state that is new."""
        size, compiled = config.data.image_size, _compiles(config, self.device)
        # Both views in one pass only where a compiler fuses what keeps them apart: else it costs more than it saves.
        learning = running_student(self.student, config.model, size, 2 if compiled and config.mixes_alike else 1)
        dropout = config.train.checkpoint_activations and recompute_blocks(learning.module, config.model.arch)
        alike = len(set(config.teacher_sizes)) == 1  # views of two sizes are no batch
        views = len(config.teacher_sizes) if compiled and alike else 1
        teaching = running_teacher(self.teacher, config.model, self.precision, size, views)
        # Wrappers: `student` and `teacher` stay what checkpoints and evaluation see.
        wrap: Callable[[nn.Module], Any] = compile_encoder if compiled else lambda module: module
        self.run_student = Passes(wrap(learning.module), together=learning.together)
        self.run_teacher = Passes(wrap(teaching.module), together=teaching.together)
        if distributed.world_size() > 1:
            # Batch-norm averages stay local (rank 0's are saved); banks and teacher are not inside and never broadcast.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # of its new name, which PyTorch 2.11 does not know
                self.run_student = DistributedDataParallel(
                    self.run_student, broadcast_buffers=False, gradient_as_bucket_view=True
                )
        self.update_teacher = TeacherUpdate(self.teacher, self.student, config.model.key_norm, teaching)
        if dropout and config.train.cuda_graph:
            raise ConfigError(
                f"--train.cuda-graph: expected no --train.checkpoint-activations for {config.model.arch} with dropout, "
                "whose random state only the host can put back"
            )
        if runs_captured(config, self.device) and not dropout:
            self.graphed = Graphed(CudaBackend(), insist=bool(config.train.cuda_graph))

    def autocast(self) -> torch.autocast:
        """Mixed precision for the encoders; nothing in float32."""
        return torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32)

    def gradient_sync(self, now: bool) -> contextlib.AbstractContextManager[None]:
        """Around a backward pass: whether its gradients are averaged over ranks or only accumulated."""
        if isinstance(self.run_student, DistributedDataParallel) and not now:
            return self.run_student.no_sync()
        return contextlib.nullcontext()


def build_state(config: Config, device: torch.device, student: Encoder | None = None) -> TrainState:
    """A fresh state: student and teacher start equal, on all ranks alike; from `student` where one is given."""
    check_device(config, device)
    size = config.data.image_size
    if student is None:
        torch.manual_seed(config.train.seed)
        student = build_encoder(config.model, size)
    others = {
        "data.grow-from": view_sizes(config.data),
        "data.weak-size": config.teacher_sizes,
        "loss.mix-size": [config.mixed_size] if config.loss.uses_local else [],
    }
    check_other_sizes(student, config.model.arch, size, others)
    for flag, norm in (("key-norm", config.model.key_norm), ("query-norm", config.model.query_norm)):
        if norm != "batch" and not batch_norms(student):
            raise ConfigError(
                f"--model.{flag}: expected batch for {config.model.arch}, which has no batch norm, got {norm}"
            )
    freeze_parts(student.backbone, config.model)
    channels_last(student.to(device))
    precision = pick_precision(config.train.precision, device)
    teacher = copy.deepcopy(student).requires_grad_(False)
    follow_mode(teacher, config.model.key_norm)
    bank = MemoryBank(
        config.model.bank_size,
        config.model.projection_dim,
        weak=config.loss.uses_weak_bank,
        # On a CPU the loss would copy bfloat16 banks to float32 in every step.
        dtype=torch.bfloat16 if device.type == "cuda" and precision != torch.float32 else torch.float32,
        seed=config.train.seed,
    ).to(device)
    state = TrainState(
        student=student,
        teacher=teacher,
        bank=bank,
        optimizer=build_optimizer(student, config.optim),
        scaler=torch.amp.GradScaler(device.type, enabled=precision == torch.float16),
        norm_buffers=NormBuffers(student, teacher),
        device=device,
        precision=precision,
        relation_weight=torch.ones((), device=device),
        teacher_rate=torch.tensor(1 - config.model.teacher_momentum, device=device),
    )
    state.prepare(config)
    return state


def _compiles(config: Config, device: torch.device) -> bool:
    return config.train.compile if config.train.compile is not None else device.type == "cuda"


def compile_encoder(module: nn.Module) -> Any:
    """By torch.compile, without one of its fusions, on which PyTorch (seen with 2.11 and 2.14) fails for batch norms in
    groups on a GPU: "AssertionError: 512 v.s. 1024". Static: a run has few shapes (a view may be smaller) and each
    comes in every step, so each gets code of its own; left to itself, PyTorch would make slower code for any shape once
    it met the second."""
    return torch.compile(module, dynamic=False, options={"triton.mix_order_reduction": False})


def check_device(config: Config, device: torch.device) -> None:
    """Raises ConfigError for what needs a GPU, or one process, where it is not so."""
    if config.optim.name.startswith("apex") and device.type != "cuda":
        raise ConfigError(f"--optim.name: expected auto, sgd, adamw or lars on {device.type}, got {config.optim.name}")
    hindrance = _hindrance_to_capture(config, device)
    if config.train.cuda_graph and hindrance:
        raise ConfigError(f"--train.cuda-graph: expected {hindrance}")


def runs_captured(config: Config, device: torch.device) -> bool:
    """Whether the step is captured as a CUDA graph: where it can be, unless the run says."""
    if config.train.cuda_graph is not None:
        return config.train.cuda_graph
    return _hindrance_to_capture(config, device) is None


def _hindrance_to_capture(config: Config, device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"a CUDA device, got {device.type}"
    if distributed.world_size() > 1:
        return f"one rank, got {distributed.world_size()}"
    if config.optim.name == "apex-sgd":
        return "another --optim.name than apex-sgd, which takes its rate from the host"
    if config.profile.enabled:
        return "no --profile.enabled: a replayed graph has no named ranges"
    return None


def pick_device(name: str, flag: str = "--train.device") -> torch.device:
    """The device of this rank. Raises ConfigError, which names `flag`, for `cuda` without CUDA."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(f"{flag}: expected cpu or auto on this machine (PyTorch finds no CUDA device), got cuda")
    number = int(os.environ.get("LOCAL_RANK", "0"))
    ranks, count = max(number + 1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))), torch.cuda.device_count()
    if ranks > max(1, count):  # on all ranks, so that the first, which speaks, is among them
        raise ConfigError(
            f"--nproc-per-node: expected at most the {count} GPUs that can be seen here, got {ranks} ranks"
        )
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    torch.backends.cudnn.benchmark = True  # a run's convolutions have the same few shapes at every step
    return device


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """That a run computes in: `name` as configured, or for `auto` what `fastest_precision` says."""
    given = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    return given[name] if name in given else fastest_precision(device)[0]


def fastest_precision(device: torch.device) -> tuple[torch.dtype, str]:
    """bfloat16 where the device has instructions for it, else float16 on CUDA and float32 on a CPU; and why, in a few
    words. A CPU whose instructions oneDNN is told not to use (ONEDNN_MAX_CPU_ISA) counts as one without."""
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return torch.bfloat16, "the GPU has matrix units for it"
        return torch.float16, "the GPU has no matrix units for bf16"
    allowed = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    if allowed in ("", "ALL", "DEFAULT"):
        allowed = "AMX"
    if torch.cpu._is_amx_tile_supported() and "AMX" in allowed:
        return torch.bfloat16, "the CPU has AMX"
    # What oneDNN calls AVX512_CORE_FP16 and AVX10 holds these instructions too.
    if torch.cpu._is_avx512_bf16_supported() and re.search("BF16|FP16|AMX|AVX10", allowed):
        return torch.bfloat16, "the CPU has AVX512_BF16"
    return torch.float32, "the CPU has neither AMX nor AVX512_BF16"
