"""Train: `torchrun --standalone -m reco_fast.train [PRESET] [--section.field VALUE ...]`.

The command line alone, so that help and mistakes in it come without the seconds in which PyTorch is imported;
`training/loop.py` has the run.
"""

import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from reco_fast.run.arguments import CONFIG_HELP, preset_and_rest
from reco_fast.settings import command_line, terminal
from reco_fast.settings.config import Config
from reco_fast.settings.presets import PRESETS


def main() -> NoReturn:
    command_line.run(train_as_told)


def train_as_told() -> None:
    config, name = parse(sys.argv[1:])
    terminal.leave_at_interrupt()  # again, while modules are imported
    from reco_fast.training.loop import whole_run

    terminal.interrupt_as_usual()
    whole_run(config, name)


def parse(argv: Sequence[str]) -> tuple[Config, str]:
    """The configuration, and the preset's name (quickstart unless the first word names one)."""
    name, default, rest = preset_and_rest(argv)
    prog, expectation = f"python -m reco_fast.train {name}", inspect.cleandoc(PRESETS[name][1])
    description = f"{expectation}\n\n{CONFIG_HELP}"
    return command_line.parse(Config, rest, prog=prog, description=description, default=default), name


def train(config: Config, name: str = "run", on_metrics: Callable[[dict[str, Any]], None] | None = None) -> Path:
    """A whole run, or the rest of one that was stopped. Returns its folder: `--run.dir`, or else one in runs/ called
    `name`. `on_metrics` is given each line of metrics.jsonl as it is written, on rank 0.

    Raises ConfigError or DataError for a user's mistake, which is found before the folder is touched.
    """
    from reco_fast.training.loop import whole_run

    return whole_run(config, name, on_metrics)


if __name__ == "__main__":
    main()
