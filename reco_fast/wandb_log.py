"""The Weights & Biases hook: a thin one, everything goes through TensorBoard."""

import hashlib
import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from reco_fast.config import ConfigError


@contextmanager
def wandb_beside(directory: Path, project: str, settings: dict[str, Any]) -> Iterator[None]:
    """While it is entered, what goes to TensorBoard goes to a run of the Weights & Biases `project` too: to the same
    one when the run folder's run goes on. The mode (WANDB_MODE) and the account are wandb's own matter.

    Raises ConfigError where wandb is not installed or does not start.
    """
    if importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            "--run.wandb: expected the wandb package, it is not installed; pip install 'reco-fast[wandb]'"
        )
    wandb: Any = importlib.import_module("wandb")
    try:
        run = wandb.init(
            project=project,
            name=directory.name,
            id=hashlib.sha256(os.fsencode(directory.resolve())).hexdigest()[:16],
            resume="allow",
            dir=directory,
            config=settings,
            sync_tensorboard=True,
        )
    except wandb.Error as error:
        raise ConfigError(f"--run.wandb: expected a run of {project} to begin, got {error}") from None
    try:
        with run:
            yield
    finally:
        wandb.tensorboard.unpatch()
