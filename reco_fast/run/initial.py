"""Where the weights that a run starts from come from, and the settings that follow from them."""

import argparse
import contextlib
import dataclasses
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from reco_fast import distributed
from reco_fast.errors import ConfigError
from reco_fast.method.model import SMALL_IMAGE, Encoder, build_encoder, library_of, timm_backbone
from reco_fast.method.weights import digest, fit, load_weights
from reco_fast.pipelines.augmentations import evaluation_recipe
from reco_fast.run import checkpoint, run_folder
from reco_fast.settings.config import Colour, Config
from reco_fast.settings.typed import at_home, first_line

Stem = Literal["auto", "small", "standard"]
DEEPEST = 4  # dictionaries in one another that tensors are looked for in; a file may hold one that holds itself


class Weights(NamedTuple):
    """Tensors by name, and how images were normalised for them, where that is known."""

    tensors: dict[str, Tensor]
    mean: Colour | None = None
    std: Colour | None = None


def initial_student(config: Config) -> tuple[Config, Encoder | None]:
    """The encoder with the weights of `--model.init`, and `config` with what follows from them: their hash, the
    normalisation of images, the stem. None for random weights, and where the run in --run.dir has a checkpoint: its
    weights are there. Raises ConfigError."""
    if config.model.init is None:
        return config, None
    before = _begun(config)
    if before is not None:
        stem = before.model.stem if config.model.stem == "auto" else config.model.stem
        return _settled(config, before.model.init_hash, stem, before.data.mean, before.data.std), None
    weights = distributed.first_rank_first(lambda: _open(config))  # one rank fetches
    found = digest(weights.tensors)
    if config.model.init_hash not in (None, found):
        raise ConfigError(
            f"--model.init-hash: expected that of {config.model.init}, {found}, got {config.model.init_hash}"
        )
    student, stem = _built(config, weights.tensors)
    config = _settled(config, found, stem, weights.mean, weights.std)
    recipe = evaluation_recipe(config.data.image_size, config.data.mean, config.data.std)
    mean, std = (" ".join(f"{value:.3g}" for value in values) for values in (recipe.mean, recipe.std))
    told = f"images are normalised by mean {mean} and standard deviation {std}"
    student.notes = (load_weights(student, weights.tensors, config.model), told, *student.notes)
    return config, student


def _begun(config: Config) -> Config | None:
    """The configuration of the run that --run.dir holds, if it is to be continued and began with the same weights."""
    folder, model = config.run.dir, config.model
    if folder is None or config.run.resume == "never" or not (folder / "config.json").exists():
        return None
    if checkpoint.latest(folder / "checkpoints") is None:
        return None
    before = run_folder.read_config(folder)
    same = before.model.init == model.init and model.init_hash in (None, before.model.init_hash)
    return before if same else None


def _settled(config: Config, found: str | None, stem: Stem, mean: Colour | None, std: Colour | None) -> Config:
    """`config` with these, but for a normalisation that was asked for."""
    data = dataclasses.replace(config.data, mean=config.data.mean or mean, std=config.data.std or std)
    return dataclasses.replace(config, data=data, model=dataclasses.replace(config.model, init_hash=found, stem=stem))


def _built(config: Config, tensors: dict[str, Tensor]) -> tuple[Encoder, Stem]:
    """An encoder with random weights, and its stem: unless one is asked for, the usual one for the image size, or the
    other where more of the weights fit it."""

    def built(stem: Stem) -> tuple[Encoder, float]:
        torch.manual_seed(config.train.seed)
        encoder = build_encoder(dataclasses.replace(config.model, stem=stem), config.data.image_size)
        return encoder, fit(encoder.backbone, tensors, config.model.init_which).share

    asked = config.model.stem
    usual, share = built(asked)
    if asked == "auto" and share < 1:
        other: Stem = "standard" if config.data.image_size <= SMALL_IMAGE else "small"
        with contextlib.suppress(ConfigError):  # not every network has both
            encoder, fitting = built(other)
            if fitting > share:
                return encoder, other
    return usual, asked


def _open(config: Config) -> Weights:
    source = config.model.init
    assert source is not None
    kind, _, name = source.partition(":")
    if kind in ("timm", "torchvision"):
        library, arch = library_of(config.model.arch)
        if kind != library:
            raise ConfigError(
                f"--model.init: expected {library}, a file or a run for --model.arch {config.model.arch}, got {source} "
                f"(--model.arch {kind}/{arch} would be {kind}'s network)"
            )
        return _of_timm(arch, name, config) if kind == "timm" else _of_torchvision(arch, name)
    path = at_home(source)
    if (path / "config.json").is_file():
        return _of_run(path, config)
    if not path.is_file():
        raise ConfigError(
            "--model.init: expected timm, timm:TAG, torchvision, torchvision:NAME, a file (.safetensors, .pth) or the "
            f"folder of a run, got {source}{'' if path.exists() else ', which is not there'}"
        )
    return Weights(_of_file(path), *_usual(config.model.arch))


def _of_timm(arch: str, tag: str, config: Config) -> Weights:
    import timm

    arch = arch.partition(".")[0]
    tags = [name.partition(".")[2] for name in timm.list_pretrained(f"{arch}.*")]
    if not tags or (tag and tag not in tags):
        has = ", ".join(tags) or "none"
        raise ConfigError(
            f"--model.init: expected one of timm's weights for {arch} ({has}), got timm:{tag or 'DEFAULT'}"
        )
    name = f"{arch}.{tag}" if tag else arch
    known: Any = timm.models.get_pretrained_cfg(name)
    hub = f"https://huggingface.co/{known.hf_hub_id}/resolve/main/model.safetensors"
    with _fetched(hub if known.hf_hub_id else known.url):
        model = timm_backbone(name, config.data.image_size, pretrained=True)
    return Weights(model.state_dict(), tuple(known.mean), tuple(known.std))


def _of_torchvision(arch: str, name: str) -> Weights:
    import torchvision

    weights = torchvision.models.get_model_weights(arch).__members__
    if (name or "DEFAULT") not in weights:
        has = ", ".join(weights) or "none"
        raise ConfigError(
            f"--model.init: expected one of torchvision's weights for {arch} ({has}), got torchvision:{name}"
        )
    chosen: Any = weights[name or "DEFAULT"]
    with _fetched(chosen.url):
        tensors = chosen.get_state_dict(progress=False, check_hash=True, weights_only=True)
    return Weights(tensors, *_usual_of_torchvision(chosen))


@contextlib.contextmanager
def _fetched(place: str) -> Iterator[None]:
    """Around what fetches weights: one line where it fails."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of each try
    try:
        yield
    except Exception as error:  # these libraries raise many types
        raise ConfigError(
            f"--model.init: expected weights from {place} or in the cache, got: {first_line(error)}; without a "
            "network, bring that file here and give its path"
        ) from None


def _usual(arch: str) -> tuple[Colour | None, Colour | None]:
    """How images are normalised for the weights that the library of a network has for it."""
    library, name = library_of(arch)
    if library == "torchvision":
        import torchvision

        weights: Any = torchvision.models.get_model_weights(name).__members__.get("DEFAULT")
        return _usual_of_torchvision(weights) if weights is not None else (None, None)
    import timm

    known: Any = timm.models.get_pretrained_cfg(name.partition(".")[0])
    return (None, None) if known is None else (tuple(known.mean), tuple(known.std))


def _usual_of_torchvision(weights: Any) -> tuple[Colour, Colour]:
    transforms = weights.transforms()
    return tuple(transforms.mean), tuple(transforms.std)


def _of_run(folder: Path, config: Config) -> Weights:
    before, encoder = run_folder.load_run(folder, config.model.init_which)
    if before.model.arch != config.model.arch:
        raise ConfigError(
            f"--model.arch: expected {before.model.arch}, as the run {folder} has, got {config.model.arch}"
        )
    recipe = evaluation_recipe(before.data.image_size, before.data.mean, before.data.std)
    return Weights(encoder.state_dict(), recipe.mean, recipe.std)


def _of_file(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by their names, with those of the dictionaries around them in front."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # What DINO, MAE and others keep beside the weights: a plain object with attributes.
        with warnings.catch_warnings(action="ignore"), torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # truncated and foreign files raise many types
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            raise ConfigError(
                f"--model.init: expected tensors alone in {path}, got an object, {found.group(1)}, which is not loaded "
                "since it could run code; save its state_dict as .safetensors where you trust it"
            ) from None
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0].split(". ")[0]
        raise ConfigError(f"--model.init: expected a file of weights, got {path} ({reason})") from None
    tensors = dict(_flat(content))
    if not tensors:
        raise ConfigError(f"--model.init: expected tensors by name in {path}, got none")
    return tensors


def _flat(content: object, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Tensors in dictionaries in dictionaries."""
    for name, value in content.items() if isinstance(content, dict) else ():
        if isinstance(value, Tensor):
            if value.layout is torch.strided and not value.is_quantized:
                yield f"{prefix}{name}", value
        elif depth < DEEPEST:
            yield from _flat(value, f"{prefix}{name}.", depth + 1)
