"""How good frozen features are: weighted kNN, a linear probe, and pictures of both.

`python -m reco_fast.evaluate RUN_DIR --data.path TRAIN --data.val-path VAL`

Without labels: how the features fill their space, nearest neighbours, and a map.
"""

import dataclasses
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
import torch
import tyro
from torch import Tensor, nn

from reco_fast.data.images import LabelledData, open_images, open_labelled
from reco_fast.errors import ConfigError
from reco_fast.evaluation import classifiers, pictures
from reco_fast.evaluation.embedding_files import name_bad_images
from reco_fast.evaluation.features import Extracted, features_of
from reco_fast.method.model import channels_last
from reco_fast.method.state import pick_device
from reco_fast.pipelines.sources.image_source import ImageSource
from reco_fast.pipelines.sources.labels import BESIDE
from reco_fast.run import checkpoint, quarantine
from reco_fast.run.diagnostics import spread
from reco_fast.run.files import write_json, write_text
from reco_fast.run.places import is_there, located, same_place
from reco_fast.run.report import progress, warn_of
from reco_fast.run.run_folder import load_run
from reco_fast.settings import command_line
from reco_fast.settings.config import Config, DataConfig
from reco_fast.settings.terminal import say
from reco_fast.settings.typed import WithPaths

SWEEP_K = (1, 5, 10, 20, 50, 100, 200, 500)
SWEEP_TEMPERATURES = (0.03, 0.07, 0.1, 0.2, 1.0)


OF_IMAGES = ("path", "val_path", "loader", "workers", "on_bad_image", "range", "cache", "cache_gb")
"""Settings of data that may be others than those of the run."""


@dataclass(frozen=True)
class EvaluateCommand(WithPaths):
    run_dir: tyro.conf.Positional[Path]
    """Folder of a run."""
    data: DataConfig = field(default_factory=DataConfig)
    """Images to evaluate with; unless said, those of the run."""
    which: Literal["student", "teacher"] = "student"
    """Whose backbone."""
    device: Literal["auto", "cuda", "cpu"] = "auto"


def main() -> NoReturn:
    command_line.serve("evaluate", EvaluateCommand, evaluate, __doc__)


def evaluate(command: EvaluateCommand) -> dict[str, Any]:
    """Print what was measured, and leave it in the run folder: pictures in `evaluation/`, and `evaluation.json`, whose
    content it returns. Raises ConfigError or DataError."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("WORLD_SIZE: expected one process, without torchrun, got more")
    config, encoder = load_run(command.run_dir, command.which)
    device = pick_device(command.device, "--device")
    run = located(config, command.run_dir)
    data, flag = chosen_data(command.data, run, own=are_own(command.data, run, command.run_dir))
    config = dataclasses.replace(config, data=data)
    path, val_path = config.data.path, config.data.val_path
    if path is None:
        raise ConfigError("--data.path: expected images to evaluate with, got nothing")
    source = open_images(path, config.data)
    labelled = open_labelled(source, val_path, flag, data=config.data) if val_path is not None else None
    for line in (*source.notes, source.passed_over.line()):
        say(line)
    if BESIDE in source.unlabelled:
        say(f"no labels: {source.unlabelled}")
    say(labelled.val.passed_over.line() if labelled is not None else "")
    folder = command.run_dir / "evaluation"
    clear_pictures(folder)
    sources = {"train": source} if labelled is None else {"train": source, "val": labelled.val}
    sources = {f"{name}-{images.names.digest().hex()[:16]}": images for name, images in sources.items()}
    for line in quarantine.leave_out(folder, config.data.loader, sources):
        say(line)

    backbone = channels_last(encoder.get_submodule("backbone").to(device))
    train = extracted(source, backbone, config, device)
    fill = spread(train.features)
    say(
        f"{len(train.features):,} images, {train.features.shape[1]} features: effective rank {fill.rank:.1f}, "
        f"norm of the mean {fill.mean_norm:.2f}",
    )
    result: dict[str, Any] = {"which": command.which, "knn_top1": None, "linear_top1": None, "linear_c": None}
    result |= {"path": path, "val_path": val_path}
    bad = train.bad
    result |= {
        "images": len(train.features),
        "bad_images": len(bad),
        **{f"backbone_{name}": value for name, value in fill._asdict().items()},
    }
    if labelled is None:
        say("no --data.val-path, so no kNN and no linear probe: those need held-out images in one folder a class")
        shown = train
    else:
        shown = extracted(labelled.val, backbone, config, device)
        bad = bad | {f"{val_path}/{name}": reason for name, reason in shown.bad.items()}
        result |= classify(train, shown, labelled, config, folder)
    if pictures.available():
        picture_neighbours(folder, shown, train)
        picture_map(folder, shown)
        names = sorted(name for name in pictures.PICTURES if (folder / name).exists())
        say(f"pictures: {folder}/{{{','.join(names)}}}")
    else:
        say("pictures need matplotlib: pip install 'reco-fast[evaluate]'")
    name_bad_images(folder / "bad_images.txt", bad)
    quarantine.tidy(folder)
    write_json(command.run_dir / "evaluation.json", result)
    return result


def extracted(source: ImageSource, backbone: nn.Module, config: Config, device: torch.device) -> Extracted:
    """Features of all good images, with progress and what there is to say of them shown."""
    with progress(len(source), 0) as advance:
        found = features_of(backbone, source, config, device, advance=advance)
    warn_of(source)
    return found


def are_own(given: DataConfig, run: Config, folder: Path) -> bool:
    """Whether the images `given` are those that the run in `folder` was trained on, which may lie elsewhere now."""
    if given.path is None or same_place(given.path, run.data.path):
        return True
    val_path = run.data.val_path
    if given.val_path is not None or val_path is None or not is_there(val_path):  # then nothing depends on it
        return False
    return open_images(given.path, given).fingerprint() == checkpoint.fingerprint(folder / "checkpoints")


def chosen_data(given: DataConfig, run: Config, *, own: bool) -> tuple[DataConfig, str]:
    """The run's images unless others are given: those of its evaluation where it has some apart, the held-out ones only
    beside the run's own. And the flag that names the first. Raises ConfigError for what the network learned with and
    nothing can change any more, such as the size of its images."""
    for setting in dataclasses.fields(given):
        value = getattr(given, setting.name)
        if setting.name not in OF_IMAGES and value not in (setting.default, getattr(run.data, setting.name)):
            raise ConfigError(
                f"--data.{setting.name.replace('_', '-')}: expected that of the run, "
                f"{getattr(run.data, setting.name)}, got {value}"
            )
    apart = run.eval.train_path
    path: str | None
    if given.path is None and apart is not None:
        path, flag = apart, "--eval.train-path"
    else:
        path, flag = given.path or run.data.path, "--data.path"
        own = own and (given.path is None or apart is None)
    said = {name: getattr(given, name) for name in OF_IMAGES} | {
        "path": path,
        "val_path": given.val_path or (run.data.val_path if own else None),
        "range": given.range or run.data.range,
    }
    return dataclasses.replace(run.data, **said), flag


def clear_pictures(folder: Path) -> None:
    """An empty place for the pictures: those of an earlier evaluation do not belong to this one."""
    try:
        folder.mkdir(exist_ok=True)
        for name in (*pictures.PICTURES, "confusion.json"):
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder}: expected a folder that can be written, got {error.strerror}") from None


def classify(train: Extracted, val: Extracted, data: LabelledData, config: Config, folder: Path) -> dict[str, Any]:
    """Print and draw both classifiers' accuracies; returns their part of evaluation.json."""
    device, count = train.features.device, len(data.classes)
    labels, truth = data.train_labels[train.places].to(device), data.val_labels[val.places].to(device)
    k, temperature = min(config.eval.knn_k, len(labels)), config.eval.knn_temperature
    ks = sorted({k, *(each for each in SWEEP_K if each <= len(labels))})
    temperatures = sorted({temperature, *SWEEP_TEMPERATURES})

    found = classifiers.nearest(val.features, train.features, max(ks))
    sweep = classifiers.knn_sweep(found, labels, count, truth, ks, temperatures)
    knn = classifiers.knn_scores(found, labels, count, k=k, temperature=temperature)
    low, high = (limit(entry["top1"] for entry in sweep) for limit in (min, max))
    say(
        f"kNN {top_text(knn, truth)} (cosine, k = {k}, τ = {temperature:g}; "
        f"{low:.2f} to {high:.2f} % over k = {ks[0]} to {ks[-1]} and τ = {temperatures[0]:g} to {temperatures[-1]:g})",
    )
    probe = classifiers.linear_probe(train.features, labels, count, val.features, say)
    chosen = "chosen on a tenth of the training images" if probe.tried else "of so few images not chosen"
    say(f"linear probe {top_text(probe.scores, truth)} (logistic regression, C = {probe.penalty:g} {chosen})")

    scores = {"knn": knn, "linear": probe.scores}
    matrices = {name: classifiers.confusion(each, truth, count).numpy() for name, each in scores.items()}
    by_class = {name: diagonal_percent(matrix) for name, matrix in matrices.items()}
    counts = {"classes": [readable(name) for name in data.classes]}
    counts |= {name: matrix.tolist() for name, matrix in matrices.items()}
    write_text(folder / "confusion.json", json.dumps(counts) + "\n")
    if pictures.available():
        titles = {"knn": f"kNN, k = {k}", "linear": "linear probe"}
        pictures.draw_knn(folder / "knn.png", sweep, (k, temperature, classifiers.accuracy(knn, truth, 1)))
        pictures.draw_confusion(
            folder / "confusion.png", {titles[name]: each for name, each in matrices.items()}, data.classes
        )
        pictures.draw_classes(
            folder / "classes.png", {titles[name]: each for name, each in by_class.items()}, data.classes
        )
    return {
        "val_images": len(truth),
        "val_bad_images": len(val.bad),
        "classes": count,
        "knn_top1": classifiers.accuracy(knn, truth, 1),
        "knn_top5": classifiers.accuracy(knn, truth, 5) if count > 5 else None,
        "knn_k": k,
        "knn_temperature": temperature,
        "knn_sweep": sweep,
        "linear_top1": classifiers.accuracy(probe.scores, truth, 1),
        "linear_top5": classifiers.accuracy(probe.scores, truth, 5) if count > 5 else None,
        "linear_c": probe.penalty,
        "linear_tried": [{"c": c, "top1_on_training_images_left_out": top1} for c, top1 in probe.tried.items()],
        "per_class": [
            {"class": readable(name), "images": int(images)}
            | {f"{kind}_top1": None if math.isnan(each[number]) else each[number] for kind, each in by_class.items()}
            for number, (name, images) in enumerate(zip(data.classes, matrices["knn"].sum(axis=1), strict=True))
        ],
    }


def top_text(scores: Tensor, truth: Tensor) -> str:
    """`top-1 …` and, of more than five classes, top-5 in percent."""
    tops = (1, 5) if scores.shape[1] > 5 else (1,)
    return ", ".join(f"top-{top} {classifiers.accuracy(scores, truth, top):.2f} %" for top in tops)


def diagonal_percent(matrix: np.ndarray) -> np.ndarray:
    """Percent of each row of counts [C, C] that lies on the diagonal; NaN for an empty row."""
    images = matrix.sum(axis=1)
    return np.where(images > 0, 100 * matrix.diagonal() / np.maximum(images, 1), np.nan)


def readable(name: str) -> str:
    """A folder's name as JSON can hold it: names need not be UTF-8."""
    return os.fsencode(name).decode("utf-8", "replace")


def picture_neighbours(folder: Path, queries: Extracted, candidates: Extracted) -> None:
    """Some images, evenly chosen, beside those that are nearest to them; none is its own neighbour."""
    rows = evenly(len(queries.features), pictures.SHEET_QUERIES)
    same = queries is candidates
    found = classifiers.nearest(queries.features[rows], candidates.features, pictures.SHEET_NEIGHBOURS + same)
    similarity, nearest = found.similarity.cpu(), found.rows.cpu()
    if same:
        # Where copies tie with it, the image itself may not be among its nearest: then the last one goes.
        own = nearest == rows[:, None]
        own[:, -1] |= ~own.any(dim=1)
        similarity, nearest = (part[~own].view(len(rows), -1) for part in (similarity, nearest))
    if nearest.shape[1] > 0:
        pictures.draw_neighbours(
            folder / "neighbours.png",
            (queries.source, queries.places[rows].numpy()),
            (candidates.source, candidates.places[nearest].numpy()),
            similarity.numpy(),
            by_class=queries.source.labels is not None and candidates.source.labels is not None,
        )


def picture_map(folder: Path, images: Extracted) -> None:
    rows = evenly(len(images.features), pictures.MAP_POINTS)
    if len(rows) >= 4:  # fewer make no map
        say(f"map of {len(rows):,} images by t-SNE ...")
        labels = images.source.labels
        of_rows = None if labels is None else labels[images.places[rows].numpy()]
        points = pictures.project(images.features[rows].cpu().numpy())
        pictures.draw_map(folder / "map.png", points, of_rows, images.source.classes)


def evenly(count: int, wanted: int) -> Tensor:
    """At most `wanted` of `count` row numbers, evenly chosen: of features by class, some of each."""
    wanted = min(count, wanted)
    return torch.arange(wanted) * count // wanted


if __name__ == "__main__":
    main()
