"""How good frozen features are: weighted kNN and a linear probe.

`python -m reco_fast.evaluate RUN_DIR --data.path TRAIN --data.val-path VAL`
"""

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import numpy as np
import torch
import tyro
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from reco_fast import checkpoint, cli, distributed, run_folder
from reco_fast.config import Config, ConfigError, DataConfig
from reco_fast.data import LabelledData, loader_workers, open_labelled
from reco_fast.json_files import write_json
from reco_fast.model import build_encoder
from reco_fast.pipelines.augmentations import evaluation_recipe
from reco_fast.pipelines.loader import open_loader
from reco_fast.pipelines.order import EvaluationOrder
from reco_fast.pipelines.sources import ImageSource, open_source
from reco_fast.state import pick_device, pick_precision

PROBE_PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)  # C of scikit-learn's logistic regression


@torch.no_grad()
def extract_features(
    model: nn.Module,
    source: ImageSource,
    data: DataConfig,
    *,
    batch_size: int,
    device: torch.device,
    precision: torch.dtype,
    count: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`model`'s outputs [n, F] float32 for the un-augmented images of `source`, and the images' indices [n].

    With `count`, of at most so many images, evenly chosen. Ranks share the work and each gets the whole; the order is
    that of the loader. The mode of `model` is kept.
    """
    training = model.training
    model.eval()
    order = EvaluationOrder(
        len(source), batch_size, count=count, rank=distributed.rank(), world_size=distributed.world_size()
    )
    features, indices = [], []
    with open_loader(
        data.loader,
        source,
        evaluation_recipe(data.image_size),
        order,
        device=device,
        seed=0,
        workers=loader_workers(data),
        on_bad_image=data.on_bad_image,
        precision=precision,
    ) as loader:
        for batch in loader:
            with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                features.append(model(batch.views[0]).float())
            indices.append(batch.indices)
    model.train(training)
    gathered = distributed.all_gather_uneven(torch.cat(indices).to(device))
    return distributed.all_gather_uneven(torch.cat(features)), gathered.cpu()


def knn_scores(
    queries: Tensor, neighbours: Tensor, labels: Tensor, classes: int, *, k: int, temperature: float
) -> Tensor:
    """Class scores [n, classes] of the k nearest neighbours by cosine, weighted by exp(similarity / τ).

    (Wu et al., arXiv 1805.01978, section 3.4.) Queries go in chunks: memory is O(neighbours), never n × neighbours.
    """
    queries, neighbours = nn.functional.normalize(queries), nn.functional.normalize(neighbours)
    k = min(k, len(neighbours))
    scores = []
    for chunk in queries.split(max(1, 2**24 // len(neighbours))):
        similarity, nearest = (chunk @ neighbours.T).topk(k, dim=1)
        votes = chunk.new_zeros(len(chunk), classes)
        scores.append(votes.scatter_add_(1, labels[nearest], (similarity / temperature).exp()))
    return torch.cat(scores)


class Features(NamedTuple):
    """Neighbours [n, F] and queries [m, F] float32 on the device, and their class numbers [n], [m] on the CPU."""

    train: Tensor
    train_labels: Tensor
    val: Tensor
    val_labels: Tensor


def features_of(
    model: nn.Module, source: ImageSource, config: Config, device: torch.device, count: int | None = None
) -> tuple[Tensor, Tensor]:
    """`extract_features` in the batches and the precision of the training."""
    return extract_features(
        model,
        source,
        config.data,
        batch_size=max(1, config.train.batch_size // distributed.world_size()),
        device=device,
        precision=pick_precision(config.train.precision, device),
        count=count,
    )


def labelled_features(model: nn.Module, data: LabelledData, config: Config, device: torch.device) -> Features:
    """`model`'s features of all images of `data`, un-augmented, in the precision of the training."""
    train, train_indices = features_of(model, data.train, config, device)
    val, val_indices = features_of(model, data.val, config, device)
    return Features(train, data.train_labels[train_indices], val, data.val_labels[val_indices])


def knn_top1(features: Features, classes: int, *, k: int, temperature: float) -> float:
    """Top-1 accuracy in percent of the weighted kNN classifier."""
    labels = features.train_labels.to(features.train.device)
    scores = knn_scores(features.val, features.train, labels, classes, k=k, temperature=temperature)
    return 100 * (scores.argmax(dim=1).cpu() == features.val_labels).float().mean().item()


def linear_probe(features: Features) -> tuple[float, float]:
    """Top-1 in percent of logistic regression on standardised frozen features, and the penalty C it used.

    C is the best of `PROBE_PENALTIES` on a tenth of the training images, never on the held-out ones; then the
    classifier is fitted to all training images.
    """
    x, y = features.train.cpu().numpy(), features.train_labels.numpy()
    fit_x, check_x, fit_y, check_y = train_test_split(x, y, test_size=0.1, random_state=0, stratify=y)

    def fitted(penalty: float, x: np.ndarray, y: np.ndarray) -> Pipeline:
        return make_pipeline(StandardScaler(), LogisticRegression(C=penalty, max_iter=200)).fit(x, y)

    best = max(PROBE_PENALTIES, key=lambda penalty: fitted(penalty, fit_x, fit_y).score(check_x, check_y))
    return 100 * fitted(best, x, y).score(features.val.cpu().numpy(), features.val_labels.numpy()), best


@dataclass(frozen=True)
class EvaluateCommand:
    run_dir: tyro.conf.Positional[Path]
    """Folder of a run."""
    data: DataConfig = field(default_factory=DataConfig)
    """Images to evaluate with; unless said, those of the run."""
    which: Literal["student", "teacher"] = "student"
    """Whose backbone."""
    device: Literal["auto", "cuda", "cpu"] = "auto"


def load_run(folder: Path, which: str) -> tuple[Config, nn.Module]:
    """Configuration and encoder of a run's newest checkpoint. Raises ConfigError where there is none."""
    config = run_folder.read_config(folder)
    path = checkpoint.latest(folder / "checkpoints")
    if path is None:
        raise ConfigError(f"{folder}: expected a run with a checkpoint, got none in {folder / 'checkpoints'}")
    encoder = build_encoder(config.model, config.data.image_size)
    checkpoint.load_encoder(path, encoder, which)
    return config, encoder


def main() -> NoReturn:
    cli.run(
        lambda: evaluate(
            cli.parse(EvaluateCommand, sys.argv[1:], prog="python -m reco_fast.evaluate", description=__doc__)
        )
    )


def evaluate(command: EvaluateCommand) -> int:
    """Print kNN and linear-probe accuracy, and write them to `evaluation.json` in the run folder."""
    config, encoder = load_run(command.run_dir, command.which)
    given = command.data
    data_config = dataclasses.replace(
        config.data,
        path=given.path or config.data.path,
        val_path=given.val_path or config.data.val_path,
        loader=given.loader,
        workers=given.workers,
        on_bad_image=given.on_bad_image,
    )
    if data_config.path is None or data_config.val_path is None:
        raise ConfigError("--data.val-path: expected labelled images to evaluate with, got nothing")
    device = pick_device(command.device)
    config = dataclasses.replace(config, data=data_config)
    data = open_labelled(open_source(data_config.path), data_config.val_path)
    backbone = encoder.get_submodule("backbone").to(device).to(memory_format=torch.channels_last)
    features = labelled_features(backbone, data, config, device)
    k, temperature = min(config.eval.knn_k, len(features.train)), config.eval.knn_temperature
    knn = knn_top1(features, len(data.classes), k=k, temperature=temperature)
    print(f"kNN top-1 {knn:.2f} % (cosine, k = {k}, τ = {temperature})", flush=True)
    probe, penalty = linear_probe(features)
    print(
        f"linear probe top-1 {probe:.2f} % "
        f"(logistic regression, C = {penalty:g} chosen on a tenth of the training images)"
    )
    result: dict[str, Any] = {"which": command.which, "knn_top1": knn, "linear_top1": probe, "linear_c": penalty}
    result |= {"path": str(data_config.path), "val_path": str(data_config.val_path)}
    write_json(command.run_dir / "evaluation.json", result)
    return 0


if __name__ == "__main__":
    main()
