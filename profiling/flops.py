"""Counted floating-point operations of a step, and the share of the machine's matrix rate that a run reaches."""

import copy
import time

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from reco_fast import distributed
from reco_fast.method.state import TrainState
from reco_fast.settings.config import Config


def step_flops(state: TrainState, config: Config) -> float:
    """Floating-point operations of one step of the whole batch: encoders, and the loss's products with the banks.

    Counted on the meta device: nothing is computed and no statistics of the encoders change.
    """
    encoder = copy.deepcopy(state.student).to("meta")
    size = config.data.image_size
    mixed = config.mixed_images(config.train.batch_size) / config.train.batch_size if config.loss.uses_local else 0
    encoders = _encoder_flops(encoder, size, learns=True)
    if mixed and not config.loss.mix_within:
        encoders += mixed * _encoder_flops(encoder, config.mixed_size, learns=True)
    encoders += sum(_encoder_flops(encoder, view, learns=False) for view in config.teacher_sizes)
    # Logits and their weighted sum of rows, 2·K·D each, for q|A, q_mix|A, and q|B with k_w|B.
    plain = config.shares(config.train.batch_size)[0]
    row_sets = plain * (1 + 2 * config.loss.uses_global) + mixed
    bank = row_sets * 4 * config.model.bank_size * config.model.projection_dim
    return config.train.batch_size * (encoders + bank)


def _encoder_flops(encoder: nn.Module, size: int, *, learns: bool) -> float:
    """Of one image of `size` px: the forward pass, and where it `learns` the backward pass too."""
    images = torch.empty(2, 3, size, size, device="meta")
    with FlopCounterMode(display=False) as counted, torch.set_grad_enabled(learns):
        embeddings = encoder(images)
        if learns:
            embeddings.sum().backward()
    return counted.get_total_flops() / len(images)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large plain matrix product, the best of a few: what the machine gives here and now."""
    size, repeats = (8192, 10) if device.type == "cuda" else (1024, 5)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(repeats):
        _synchronize(device)
        start = time.perf_counter()
        torch.mm(a, b)
        _synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def utilisation_per_image(state: TrainState, config: Config) -> float:
    """Model FLOP utilisation for each image/s of the run: counted operations over the measured rate of all ranks."""
    rate = distributed.world_size() * matmul_rate(state.device, state.precision)
    return step_flops(state, config) / config.train.batch_size / rate


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
