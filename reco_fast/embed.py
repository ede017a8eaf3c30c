"""Features of any folder of images or .tar shards, with their paths.

`python -m reco_fast.embed RUN_DIR --data.path DIR --output FILE`, where both may be URLs.

Interrupted, the same command goes on where it stopped; where FILE is a URL, on another machine too.
"""

import dataclasses
import hashlib
import importlib.util
import os
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, NoReturn

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from torch import nn

from reco_fast.data.images import open_images
from reco_fast.data.loaders import loader_workers, open_evaluation_loader
from reco_fast.errors import ConfigError
from reco_fast.evaluation.embedding_files import Part, Parts, name_bad_images, write_npz, write_parquet, write_projector
from reco_fast.evaluation.features import outputs
from reco_fast.method.model import channels_last
from reco_fast.method.state import pick_device, pick_precision
from reco_fast.pipelines.base import none_good
from reco_fast.pipelines.order import EvaluationOrder
from reco_fast.pipelines.sources.image_source import ImageSource
from reco_fast.pipelines.sources.labels import BESIDE
from reco_fast.run import quarantine
from reco_fast.run.files import check_output, whole_file
from reco_fast.run.meter import Meter
from reco_fast.run.report import progress, warn_of
from reco_fast.run.run_folder import load_run
from reco_fast.settings import command_line
from reco_fast.settings.config import DataConfig, Place
from reco_fast.settings.terminal import say
from reco_fast.settings.typed import WithPaths, at_home, place

PART_SECONDS = 30.0  # of work that an interruption loses at most


@dataclass(frozen=True)
class ImagesConfig(WithPaths):
    path: Place = None
    """A folder at any depth, WebDataset .tar shards or their index.json, also by URL; cifar10:test or hf:NAME."""
    loader: Literal["auto", "dali", "torch"] = "auto"
    """auto takes DALI where it is installed."""
    workers: int = 0
    """Loader threads (DALI) or processes (torch); 0 means one for each core."""
    on_bad_image: Literal["skip", "raise"] = "skip"
    """skip leaves out a file that cannot be decoded and names it in FILE.bad_images.txt."""
    cache: Path | None = None
    """Folder for shards that come from a URL; unless said, one in ~/.cache/reco_fast."""
    cache_gb: float = 50.0
    """Most that they take there, in 10⁹ bytes."""
    background: str | None = None
    """Colour behind transparent images; unless said, the run's."""
    range: Annotated[tuple[float, float] | None, tyro.conf.arg(metavar="LOW HIGH")] = None
    """Of images of more than 8 bits a channel, the values that become black and white; unless said, as in the run."""

    def beside(self, run: DataConfig) -> DataConfig:
        """These images, read as the run's. Raises ConfigError."""
        of_run = {name: getattr(run, name) for name in ("background", "range") if getattr(self, name) is None}
        return dataclasses.replace(run, **dataclasses.asdict(self) | of_run)


@dataclass(frozen=True)
class EmbedCommand(WithPaths):
    run_dir: tyro.conf.Positional[Path]
    """Folder of a run."""
    output: str
    """A file or a URL: .npz with `features` [n, F] float32, `paths` [n] and, of images in one folder a class, `labels`
    [n] and `classes`; or .parquet with the columns path, features, label and class."""
    data: ImagesConfig = field(default_factory=ImagesConfig)
    which: Literal["student", "teacher"] = "student"
    """Whose backbone."""
    batch_size: int = 256
    device: Literal["auto", "cuda", "cpu"] = "auto"
    projector: Path | None = None
    """New folder for TensorBoard's Projector: features and thumbnails of at most 5,000 images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "output", place(self.output).removeprefix("file://"))
        if self.batch_size < 1:
            raise ConfigError(f"--batch-size: expected 1 or more, got {self.batch_size}")


def main() -> NoReturn:
    command_line.serve("embed", EmbedCommand, embed, __doc__)


class Work(NamedTuple):
    """What `compute` takes: images, and how a backbone is run on them."""

    backbone: nn.Module
    source: ImageSource
    data: DataConfig
    batch_size: int
    device: torch.device
    precision: torch.dtype

    def fingerprint(self) -> str:
        """Equal only where the features would be the same: images by name and size, weights, and how they are run."""
        settings = (str(self.precision), self.device.type, self.data.loader, self.data.image_size, self.batch_size)
        digest = hashlib.sha256(repr((self.source.fingerprint(), self.source.decoding, settings)).encode())
        for name, value in sorted(self.backbone.state_dict().items()):
            digest.update(name.encode() + value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def opened(run_dir: Path, images: ImagesConfig, which: str, batch_size: int, device_name: str) -> Work:
    """The run's backbone on the device, and the images. Raises ConfigError or DataError."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("WORLD_SIZE: expected one process, without torchrun, got more")
    if images.path is None:
        raise ConfigError("--data.path: expected a folder of images or .tar shards, got nothing")
    config, encoder = load_run(run_dir, which)
    device = pick_device(device_name, "--device")
    backbone = channels_last(encoder.get_submodule("backbone").eval().to(device))
    data = images.beside(config.data)
    precision = pick_precision(config.train.precision, device)
    return Work(backbone, open_images(images.path, data), data, batch_size, device, precision)


class Embedded(NamedTuple):
    """`features` [n, F] float32 of the images at `paths` [n]; `bad`: those left out, path → reason."""

    features: NDArray[np.float32]
    paths: list[str]
    bad: dict[str, str]


def embed_images(
    run_dir: Path | str,
    images: Path | str,
    *,
    which: Literal["student", "teacher"] = "student",
    batch_size: int = 256,
    device: Literal["auto", "cuda", "cpu"] = "auto",
) -> Embedded:
    """What the command writes, as an array. Raises ConfigError or DataError."""
    work = opened(at_home(run_dir), ImagesConfig(path=place(images)), which, batch_size, device)
    with tempfile.TemporaryDirectory() as folder:
        parts = Parts(folder, work.fingerprint())
        compute(work, parts)
        found = parts.join(work.source.unreadable)
    if not len(found.features):
        raise none_good(found.bad)
    return Embedded(found.features, [work.source.names[index] for index in found.indices.tolist()], found.bad)


def embed(command: EmbedCommand) -> int:
    """Write the features. Raises ConfigError or DataError, with nothing written, for a user's mistake."""
    check_output(command.output, (".npz", ".parquet"))
    if command.output.endswith(".parquet") and importlib.util.find_spec("pyarrow") is None:
        raise ConfigError("--output: expected .npz, or pyarrow for .parquet; pip install 'reco-fast[parquet]'")
    if command.projector is not None and (command.projector.is_file() or list(command.projector.glob("*"))):
        raise ConfigError(f"--projector: expected a new or an empty folder, got {command.projector}")
    work = opened(command.run_dir, command.data, command.which, command.batch_size, command.device)
    source = work.source
    for line in (*source.notes, source.passed_over.line()):
        say(line)
    if BESIDE in source.unlabelled:
        say(f"no labels: {source.unlabelled}")
    parts = Parts(f"{command.output}.parts", work.fingerprint())
    for line in quarantine.leave_out(parts.folder, work.data.loader, {"images": source}):
        say(line)
    try:
        meter = compute(work, parts)
    except KeyboardInterrupt:
        print(f"\nstopped after {parts.images} images; the same command goes on from there", file=sys.stderr)
        return 130
    found = parts.join(source.unreadable)
    if not len(found.features):
        parts.remove()
        raise none_good(found.bad)
    with whole_file(command.output) as path:
        (write_npz if command.output.endswith(".npz") else write_parquet)(path, found, source)
    say(f"{command.output}: {len(found.features):,} × {found.features.shape[1]} features of the {command.which}")
    rate, waited = meter.read()
    if rate:  # else all was done before an interruption
        say(f"{rate:.0f} images/s, {100 * waited:.0f} % of the time waiting for images")
    name_bad_images(f"{command.output}.bad_images.txt", found.bad)
    parts.remove()
    if command.projector is not None:
        write_projector(command.projector, found, source, workers=loader_workers(work.data))
    return 0


@torch.inference_mode()
def compute(work: Work, parts: Parts) -> Meter:
    """Add to `parts` what they lack. Whatever ends it, what was computed is kept. Returns how long that took."""
    source, device, precision = work.source, work.device, work.precision
    meter = Meter(device)
    order = EvaluationOrder(len(source), work.batch_size)
    assert order.steps is not None
    if parts.steps == order.steps:
        return meter
    part = Part(parts.steps)
    started = time.monotonic()
    try:
        with (
            open_evaluation_loader(work.data, source, order, device, precision, parts.steps) as loader,
            progress(len(source), parts.images) as advance,
        ):
            try:
                for step in range(parts.steps, order.steps):
                    with meter.waiting():
                        batch = next(loader)
                    features = outputs(work.backbone, batch.views[0], precision).cpu().numpy()
                    _, wanted = order.batch(step)
                    places, bad = batch.indices.numpy(), {}
                    if len(places) < len(wanted):
                        names, reasons = [source.names[i] for i in np.setdiff1d(wanted, places)], loader.bad_images
                        bad = {name: reasons[name] for name in names}
                    part.add(features, places, bad)
                    advance(len(wanted))
                    meter.add(len(wanted))
                    if time.monotonic() - started > PART_SECONDS:
                        whole, part = part, Part(step + 1)  # first: a store that does not take it is not asked again
                        parts.add(whole)
                        started = time.monotonic()
            finally:
                parts.add(part)
    finally:
        if parts.steps == 0 and not parts.notes():
            parts.remove()
    warn_of(source)
    return meter


if __name__ == "__main__":
    main()
