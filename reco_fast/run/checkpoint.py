"""Checkpoints: one safetensors file each, tensors by name and the rest as JSON in its header. Nothing is unpickled."""

import json
import os
import re
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from reco_fast.errors import ConfigError
from reco_fast.method.state import TrainState
from reco_fast.run.files import parse_json
from reco_fast.settings.typed import as_dataclass

FORMAT = 1
_MOST_STEPS = 2**40  # places in the stream of images stay far below 2⁶³
_BANK_TYPES = {torch.float32, torch.bfloat16}  # by device: a run may go on upon another
_NAME = re.compile(r"step-\d{9,15}\.safetensors")
KEEP = 2  # the newest, and the one before it should the newest turn out unreadable


class Writer:
    """Saves checkpoints while training goes on: `save` copies the state, a thread writes the copy.

    Use as a context manager; leaving it waits for the last one.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._thread = ThreadPoolExecutor(1)
        self._pending: Future[Path] | None = None

    def save(self, state: TrainState, progress: dict[str, Any]) -> None:
        """Start to write `step-<n>.safetensors`; waits for the one before. `progress` is JSON that `load` returns.

        Raises ConfigError where that one could not be written; older checkpoints are intact then.
        """
        self.wait()
        copies = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in _tensors(state).items()}
        header = {"format": FORMAT, "step": state.step, "scaler": state.scaler.state_dict(), "progress": progress}
        self._pending = self._thread.submit(_write, self._directory, copies, header)

    def wait(self) -> None:
        """Until the last checkpoint is on disk."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except (OSError, SafetensorError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"--run.dir: could not write a checkpoint to {self._directory}: {reason}") from None

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *raised: object) -> None:
        try:
            if raised[0] is None:
                self.wait()
        finally:
            self._thread.shutdown()


def _write(directory: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> Path:
    """Under a temporary name, flushed, then renamed; only then are old ones dropped."""
    path = directory / f"step-{header['step']:09d}.safetensors"
    temporary = path.with_suffix(".tmp")
    try:
        save_file(tensors, temporary, metadata={"reco_fast": json.dumps(header | {"crc32": _crc32(tensors)})})
        _flush(temporary)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    temporary.rename(path)
    _flush(directory)
    for old in _all(directory)[:-KEEP]:
        old.unlink()
    return path


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def latest(directory: Path) -> Path | None:
    """The newest checkpoint of a run, by step."""
    found = _all(directory)
    return found[-1] if found else None


def _all(directory: Path) -> list[Path]:
    """Sorted by step. Only ordinary files with a name of ours: a pipe would be waited for."""
    return sorted(
        (path for path in directory.glob("step-*.safetensors") if _NAME.fullmatch(path.name) and path.is_file()),
        key=lambda path: int(path.stem.removeprefix("step-")),
    )


def fingerprint(directory: Path) -> str | None:
    """Of the images that the newest checkpoint was trained on; None where there is none, or it says nothing."""
    path = latest(directory)
    if path is None:
        return None
    try:
        with safe_open(path, framework="pt") as file:
            header = parse_json((file.metadata() or {}).get("reco_fast", "null"), path)
        found = header["progress"]["fingerprint"]
    except (OSError, SafetensorError, ConfigError, KeyError, TypeError):  # whoever loads it says what is wrong
        return None
    return found if isinstance(found, str) else None


def load(path: Path, state: TrainState) -> dict[str, Any]:
    """Put the checkpoint into `state` and return the saved `progress`.

    Raises ConfigError, with `state` untouched, where the file is damaged or belongs to another model.
    """
    tensors, header = read(path)
    for name, value in _tensors(state).items():
        types = {tensors[name].dtype, value.dtype} if name in tensors else set()
        fitting = len(types) == 1 or (name.startswith("bank.") and types == _BANK_TYPES)
        if not fitting or tensors[name].shape != value.shape:
            found = f"{tensors[name].dtype} {list(tensors[name].shape)}" if name in tensors else "nothing"
            raise ConfigError(f"{path}: expected {name} as {value.dtype} {list(value.shape)}, got {found}")
    if state.scaler.is_enabled() and not header["scaler"]:
        raise ConfigError(f"{path}: expected the scale of a run in fp16 in its header, got none")
    with torch.no_grad():
        for name, value in _tensors(state).items():
            value.copy_(tensors[name])
    state.update_teacher.refresh()
    if state.scaler.is_enabled():
        state.scaler.load_state_dict(header["scaler"])
    state.step = header["step"]
    return header["progress"]


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors of a checkpoint, on the CPU, and its header. Raises ConfigError for a file that is not whole."""
    try:
        with safe_open(path, framework="pt") as file:
            header = parse_json((file.metadata() or {}).get("reco_fast", "null"), path)
            if not isinstance(header, dict) or header.get("format") != FORMAT:
                raise ConfigError(f"{path}: expected a reco_fast checkpoint of format {FORMAT}, got another file")
            _check(header, path)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path}: expected a readable checkpoint, got {str(error).splitlines()[0]}") from None
    if header["crc32"] != _crc32(tensors):
        raise ConfigError(f"{path}: expected the checksum written with it, got another; the file is damaged")
    return tensors, header


@dataclass
class _Header:
    format: int
    step: int
    scaler: dict[str, float]
    progress: dict[str, Any]
    crc32: int


@dataclass
class _Scaler:
    """What torch.amp.GradScaler saves."""

    scale: float
    growth_factor: float
    backoff_factor: float
    growth_interval: int
    _growth_tracker: int


def _check(header: dict[str, Any], path: Path) -> None:
    try:
        as_dataclass(_Header, header)
        if header["scaler"]:  # it is empty where the run needs none
            as_dataclass(_Scaler, header["scaler"])
        if not 0 <= header["step"] <= _MOST_STEPS:
            raise ValueError(f"expected step from 0 to {_MOST_STEPS}, got {header['step']}")
    except ValueError as error:
        raise ConfigError(f"{path}: {error} in its header") from None


def load_encoder(path: Path, encoder: nn.Module, which: str) -> None:
    """Put the `student` or the `teacher` of a checkpoint into `encoder`."""
    tensors, _ = read(path)
    prefix = f"{which}."
    own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    try:
        encoder.load_state_dict(own)
    except RuntimeError as error:
        raise ConfigError(
            f"{path}: expected the {which} of this configuration; {str(error).splitlines()[-1]}"
        ) from None


def _tensors(state: TrainState) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    for prefix, module in (("student", state.student), ("teacher", state.teacher), ("bank", state.bank)):
        named |= {f"{prefix}.{name}": value for name, value in module.state_dict().items()}
    for name, parameter in state.student.named_parameters():
        for key, value in state.optimizer.state.get(parameter, {}).items():
            named[f"optimizer.{name}" if key == "momentum_buffer" else f"optimizer.{name}.{key}"] = value
    for number, group in enumerate(state.optimizer.param_groups):
        if isinstance(group.get("step"), Tensor):  # Apex's LAMB counts on the device
            named[f"optimizer.step.{number}"] = group["step"]
    return named


def _crc32(tensors: dict[str, Tensor]) -> int:
    """Of the tensors' bytes in order of their names."""
    crc = 0
    for name in sorted(tensors):
        value = tensors[name].contiguous().reshape(-1)
        crc = zlib.crc32(value.view(torch.uint8).numpy().data, zlib.crc32(name.encode(), crc))
    return crc
