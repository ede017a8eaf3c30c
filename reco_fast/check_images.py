"""Decode every image once and keep what was found, so that a run knows its bad images before it begins.

`python -m reco_fast.check_images DIR --output FILE`, then train with `--data.manifest FILE`.

Images are decoded in other processes, which may die of them. The same command again looks only at images
that are new or have changed.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import tyro

from reco_fast.data.images import open_images
from reco_fast.data.loaders import available_cores
from reco_fast.errors import ConfigError
from reco_fast.pipelines.bad_images.probe import probe_all
from reco_fast.pipelines.loader import resolve
from reco_fast.run.files import write_text
from reco_fast.run.quarantine import known_reasons, manifest_line
from reco_fast.settings import command_line
from reco_fast.settings.config import DataConfig
from reco_fast.settings.terminal import say
from reco_fast.settings.typed import WithPaths, shell_word


@dataclass(frozen=True)
class CheckCommand(WithPaths):
    path: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="PATH")]]
    """A folder at any depth, or WebDataset .tar shards."""
    output: Path
    """The manifest: one JSON object a line, {path, stamp, reason}; reason is null for a good image."""
    loader: Literal["auto", "dali", "torch"] = "auto"
    """Whose decoder; auto takes DALI where it is installed."""
    workers: int = 0
    """Processes; 0 means one for each core."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.workers <= 256:
            raise ConfigError(f"--workers: expected a number from 0 to 256, got {self.workers}")


def main() -> NoReturn:
    command_line.serve("check_images", CheckCommand, check, __doc__)


def check(command: CheckCommand) -> int:
    """Write the manifest. Raises ConfigError or DataError."""
    if command.output.is_dir():
        raise ConfigError(f"--output: expected a file, got the folder {command.output}")
    source = open_images(command.path, DataConfig())
    for line in (*source.notes, source.passed_over.line()):
        say(line)
    stamps = [source.stamp(index) for index in range(len(source))]
    exists = command.output.exists()
    reasons = known_reasons(command.output, source, dict(enumerate(stamps))) if exists else {}
    todo = [index for index in range(len(source)) if index not in reasons]
    started = time.monotonic()
    for done, (index, reason) in enumerate(
        probe_all(source, todo, resolve(command.loader), command.workers or available_cores()), 1
    ):
        reasons[index] = reason
        if reason is not None:
            say(f"{source.names[index]}: {reason}")
        if done % 10_000 == 0 or done == len(todo):
            say(f"{done:,} of {len(todo):,} images, {done / (time.monotonic() - started):.0f} img/s")
    write_text(
        command.output, "".join(manifest_line(name, stamps[i], reasons[i]) for i, name in enumerate(source.names))
    )
    bad = sum(reason is not None for reason in reasons.values())
    manifest = shell_word(command.output)
    say(f"{command.output}: {len(source):,} images, {bad:,} of them bad; train with --data.manifest {manifest}")
    return 0


if __name__ == "__main__":
    main()
