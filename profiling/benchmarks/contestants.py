"""Who takes part in the benchmark of the whole step: the trainer, and what one would run instead."""

from collections.abc import Callable, Generator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reco_fast import distributed
from reco_fast.data.loaders import open_training_loader
from reco_fast.errors import ConfigError
from reco_fast.method.cuda_graph import CudaBackend, Graphed
from reco_fast.method.model import build_encoder, channels_last
from reco_fast.method.optim import build_optimizer
from reco_fast.method.state import build_state, pick_precision, runs_captured
from reco_fast.method.step import draw, scheduled, train_step
from reco_fast.pipelines.sources.open import open_source
from reco_fast.profiling.benchmarks.naive import NaiveReCo
from reco_fast.settings.config import Config

CLASSES = 100

Views = tuple[Tensor, ...]


class Contestant(NamedTuple):
    train: Callable[[Views], object]
    """One optimizer step on a batch of views [n, 3, H, W]."""
    views: Views
    """A batch in memory, of the dtype and layout in which the contestant's own loader gives it."""
    batches: Callable[[], Generator[Views, None, None]] | None = None
    """Its own loader on the images of --data.path: endless, closed by its user."""


def trainer(config: Config, device: torch.device) -> Contestant:
    """What `reco_fast.train` does in a step."""
    state = build_state(config, device)

    def train(views: Views) -> None:
        draws = draw(state.step, len(views[0]), config, device)
        train_step(state, config, views, draws, scheduled(state.step, 1000, config))

    def batches() -> Generator[Views, None, None]:
        assert config.data.path is not None
        source = open_source(config.data.path)
        with open_training_loader(config, source, device, state.precision) as loader:
            for batch in loader:
                yield batch.views

    dtype = _view_dtype(config, device)
    views = _random_views(config, device, (config.data.image_size, *config.teacher_sizes))
    return Contestant(train, tuple(v.to(dtype=dtype, memory_format=torch.channels_last) for v in views), batches)


def moco(config: Config, device: torch.device) -> Contestant:
    """The trainer with `--loss.objective moco`: as many encoder passes as Lightly's MoCo, half of ReCo's."""
    return trainer(replace(config, loss=replace(config.loss, objective="moco")), device)


def naive(config: Config, device: torch.device) -> Contestant:
    model = NaiveReCo(config, device)
    size = config.data.image_size
    permutation = torch.randperm(config.train.batch_size, device=device)
    mix_weights = torch.full((size, size), 0.5, device=device)
    views = _random_views(config, device, (size, size, config.data.weak_side))
    return Contestant(lambda views: model.step(views, permutation, mix_weights), views)


def supervised(config: Config, device: torch.device) -> Contestant:
    """The same backbone, precision, memory format, optimizer and compiler; a linear layer and labels instead."""
    encoder = build_encoder(config.model, config.data.image_size)
    model = nn.Sequential(encoder.backbone, nn.Linear(encoder.feature_dim, CLASSES))
    channels_last(model.to(device))
    optimizer = build_optimizer(model, config.optim)
    precision = pick_precision(config.train.precision, device)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    compiled = config.train.compile if config.train.compile is not None else device.type == "cuda"
    run: Callable[..., Any] = torch.compile(model) if compiled else model
    labels = torch.randint(CLASSES, (config.train.batch_size,), device=device)
    graphed = Graphed(CudaBackend()) if runs_captured(config, device) else None

    def step(view: Tensor) -> Tensor:
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            loss = F.cross_entropy(run(view).float(), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def train(views: Views) -> Tensor:
        return step(views[0]) if graphed is None else graphed(step, views[0])

    dtype = _view_dtype(config, device)
    (view,) = _random_views(config, device, (config.data.image_size,))
    return Contestant(train, (view.to(dtype=dtype, memory_format=torch.channels_last),))


def launched(
    make: Callable[[Config, torch.device], Contestant], config: Config, device: torch.device, *, compiled: bool
) -> Contestant:
    """A contestant whose kernels the host launches one by one."""
    return make(replace(config, train=replace(config.train, compile=compiled, cuda_graph=False)), device)


def lightly(config: Config, device: torch.device, *, autocast: bool) -> Contestant:
    """Lightly's MoCo on the same backbone: see `lightly_moco.py`. `autocast`: in the trainer's precision."""
    try:
        from reco_fast.profiling.benchmarks import lightly_moco
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"--against lightly: needs {error.name}, which is not installed; pip install 'reco-fast[examples]'"
        ) from None
    model = lightly_moco.LightlyMoCo(config, device, autocast=autocast)
    batches = partial(lightly_moco.batches, config, device)
    return Contestant(model.step, _random_views(config, device, (config.data.image_size,) * 2), batches)


def _random_views(config: Config, device: torch.device, sizes: tuple[int, ...]) -> Views:
    """This rank's share of a batch, a view for each of `sizes` pixels."""
    rows = config.train.batch_size // distributed.world_size()
    return tuple(torch.randn(rows, 3, size, size, device=device) for size in sizes)


def _view_dtype(config: Config, device: torch.device) -> torch.dtype:
    """As the loaders give them."""
    half = device.type == "cuda" and pick_precision(config.train.precision, device) != torch.float32
    return torch.half if half else torch.float
