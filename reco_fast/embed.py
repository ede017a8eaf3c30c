"""Features of any folder of images or .tar shards, with their paths.

`python -m reco_fast.embed RUN_DIR --data.path DIR --output FILE`

Interrupted, the same command goes on where it stopped.
"""

import dataclasses
import hashlib
import importlib.util
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NoReturn

import torch
import tyro
from torch import nn

from reco_fast import cli
from reco_fast.config import ConfigError, DataConfig
from reco_fast.data import loader_workers, open_evaluation_loader
from reco_fast.embed_files import Part, Parts, name_bad_images, write_npz, write_parquet, write_projector
from reco_fast.evaluate import load_run
from reco_fast.export import check_output, whole_file
from reco_fast.metrics import Meter
from reco_fast.pipelines.image_source import ImageSource
from reco_fast.pipelines.order import EvaluationOrder
from reco_fast.pipelines.sources import open_source
from reco_fast.progress import progress
from reco_fast.state import pick_device, pick_precision

PART_SECONDS = 30.0  # of work that an interruption loses at most


@dataclass(frozen=True)
class ImagesConfig:
    path: Path | None = None
    """A folder at any depth, WebDataset .tar shards, cifar10:test or hf:NAME."""
    loader: Literal["auto", "dali", "torch"] = "auto"
    """auto takes DALI where it is installed."""
    workers: int = 0
    """Loader threads (DALI) or processes (torch); 0 means one for each core."""
    on_bad_image: Literal["skip", "raise"] = "skip"
    """skip leaves out a file that cannot be decoded and names it in FILE.bad_images.txt."""


@dataclass(frozen=True)
class EmbedCommand:
    run_dir: tyro.conf.Positional[Path]
    """Folder of a run."""
    output: Path
    """.npz with `features` [n, F] float32, `paths` [n] and, of images in one folder a class, `labels` [n] and
    `classes`; or .parquet with the columns path, features, label and class."""
    data: ImagesConfig = field(default_factory=ImagesConfig)
    which: Literal["student", "teacher"] = "student"
    """Whose backbone."""
    batch_size: int = 256
    device: Literal["auto", "cuda", "cpu"] = "auto"
    projector: Path | None = None
    """New folder for TensorBoard's Projector: features and thumbnails of at most 5,000 images."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"--batch-size: expected 1 or more, got {self.batch_size}")


def main() -> NoReturn:
    cli.run(lambda: embed(cli.parse(EmbedCommand, sys.argv[1:], prog="python -m reco_fast.embed", description=__doc__)))


def embed(command: EmbedCommand) -> int:
    """Write the features. Raises ConfigError or DataError, with nothing written, for a user's mistake."""
    check_output(command.output, (".npz", ".parquet"))
    if command.output.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ConfigError("--output: expected .npz, or pyarrow for .parquet; pip install 'reco-fast[parquet]'")
    if command.projector is not None and (command.projector.is_file() or list(command.projector.glob("*"))):
        raise ConfigError(f"--projector: expected a new or an empty folder, got {command.projector}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("WORLD_SIZE: expected one process, without torchrun, got more")
    if command.data.path is None:
        raise ConfigError("--data.path: expected a folder of images or .tar shards, got nothing")
    config, encoder = load_run(command.run_dir, command.which)
    data = dataclasses.replace(config.data, **dataclasses.asdict(command.data))
    device = pick_device(command.device, "--device")
    precision = pick_precision(config.train.precision, device)
    source = open_source(command.data.path)
    backbone = encoder.get_submodule("backbone").eval()
    settings = (str(precision), device.type, data.loader, data.image_size, command.batch_size)
    parts = Parts(Path(f"{command.output}.parts"), fingerprint(source, backbone, settings))
    backbone = backbone.to(device).to(memory_format=torch.channels_last)
    try:
        meter = compute(
            backbone, source, data, parts, batch_size=command.batch_size, device=device, precision=precision
        )
    except KeyboardInterrupt:
        print(f"\nstopped after {parts.images} images; the same command goes on from there", file=sys.stderr)
        return 130
    found = parts.join(source.unreadable)
    with whole_file(command.output) as path:
        (write_npz if command.output.suffix == ".npz" else write_parquet)(path, found, source)
    parts.remove()
    print(f"{command.output}: {len(found.features):,} × {found.features.shape[1]} features of the {command.which}")
    rate, waited = meter.read()
    if rate:  # else all was done before an interruption
        print(f"{rate:.0f} images/s, {100 * waited:.0f} % of the time waiting for images")
    name_bad_images(Path(f"{command.output}.bad_images.txt"), found.bad)
    if command.projector is not None:
        write_projector(command.projector, found, source, workers=loader_workers(data))
    return 0


def fingerprint(source: ImageSource, backbone: nn.Module, settings: tuple[object, ...]) -> str:
    """Equal only where the features would be the same: images by name and size, weights, and how they are run."""
    digest = hashlib.sha256(repr((source.fingerprint(), settings)).encode())
    for name, value in sorted(backbone.state_dict().items()):
        digest.update(name.encode() + value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@torch.inference_mode()
def compute(
    backbone: nn.Module,
    source: ImageSource,
    data: DataConfig,
    parts: Parts,
    *,
    batch_size: int,
    device: torch.device,
    precision: torch.dtype,
) -> Meter:
    """Add to `parts` what they lack. Whatever ends it, what was computed is kept. Returns how long that took."""
    meter = Meter(device)
    order = EvaluationOrder(len(source), batch_size)
    assert order.steps is not None
    if parts.steps == order.steps:
        return meter
    part = Part(parts.steps)
    started = time.monotonic()
    with (
        open_evaluation_loader(data, source, order, device, precision, parts.steps) as loader,
        progress(len(source), parts.images) as advance,
    ):
        try:
            for step in range(parts.steps, order.steps):
                with meter.waiting():
                    batch = next(loader)
                with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                    features = backbone(batch.views[0]).float().cpu().numpy()
                _, wanted = order.batch(step)
                good = batch.indices.numpy() == wanted  # in place of a bad image stands a good one, which has its own
                bad = {}
                if not good.all():
                    reasons = loader.bad_images
                    bad = {source.names[index]: reasons[source.names[index]] for index in wanted[~good].tolist()}
                part.add(features[good], wanted[good], bad)
                advance(len(wanted))
                meter.add(len(wanted))
                if time.monotonic() - started > PART_SECONDS:
                    parts.add(part)
                    part = Part(step + 1)
                    started = time.monotonic()
        finally:
            parts.add(part)
            if parts.steps == 0:
                parts.remove()
    return meter


if __name__ == "__main__":
    main()
