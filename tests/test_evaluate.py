"""kNN and linear probe against independent implementations, and class matching."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from reco_fast.config import ConfigError, DataConfig
from reco_fast.data import open_labelled
from reco_fast.evaluate import Features, extract_features, knn_scores, knn_top1, linear_probe
from reco_fast.pipelines.sources import open_source


@pytest.mark.parametrize("k", [1, 5, 1000])
def test_knn_is_the_weighted_vote_of_the_nearest(k: int) -> None:
    rng = np.random.default_rng(0)
    neighbours, queries = rng.normal(size=(50, 6)), rng.normal(size=(9, 6))
    labels = rng.integers(4, size=50)
    expected = np.zeros((9, 4))
    for row, query in enumerate(queries):
        similarity = neighbours @ query / np.linalg.norm(neighbours, axis=1) / np.linalg.norm(query)
        for nearest in np.argsort(-similarity)[:k]:
            expected[row, labels[nearest]] += np.exp(similarity[nearest] / 0.1)
    scores = knn_scores(
        torch.tensor(queries), torch.tensor(neighbours), torch.from_numpy(labels), 4, k=k, temperature=0.1
    )
    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-9)


def test_knn_never_builds_the_whole_similarity_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0
    topk = torch.Tensor.topk

    def spy(self: torch.Tensor, *args: object, **kwargs: object) -> object:
        nonlocal largest
        largest = max(largest, self.numel())
        return topk(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "topk", spy)
    many = torch.randn(9000, 4)
    knn_scores(many, many, torch.zeros(9000, dtype=torch.long), 2, k=3, temperature=0.1)
    assert 0 < largest <= 2**24


def clusters(spread: float) -> Features:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(5, 16, generator=generator)
    labels = torch.arange(500) % 5
    points = centres[labels] + spread * torch.randn(500, 16, generator=generator)
    return Features(points[:400], labels[:400], points[400:], labels[400:])


def test_both_classifiers_find_clusters_and_nothing_in_noise() -> None:
    easy, noise = clusters(0.2), clusters(100.0)
    assert knn_top1(easy, 5, k=20, temperature=0.1) > 99
    assert linear_probe(easy)[0] > 99
    assert knn_top1(noise, 5, k=20, temperature=0.1) < 45
    assert linear_probe(noise)[0] < 45


def write_folder(root: Path, classes: dict[str, int]) -> Path:
    for number, (name, count) in enumerate(classes.items()):
        (root / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (32, 32), (40 * number, 5 * index, 0)).save(root / name / f"{index}.png")
    return root


def test_features_are_those_of_each_image_in_eval_mode(tmp_path: Path) -> None:
    source = open_source(write_folder(tmp_path / "a", {"x": 5, "y": 4}))
    model = nn.Sequential(nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).train()
    options = {"batch_size": 4, "device": torch.device("cpu"), "precision": torch.float32}
    features, indices = extract_features(model, source, DataConfig(loader="torch", workers=1), **options)
    assert indices.tolist() == list(range(9))
    assert features.shape == (9, 3)
    assert len(features.unique(dim=0)) == 9
    assert model.training
    assert model[0].num_batches_tracked == 0


def test_classes_are_matched_by_name(tmp_path: Path) -> None:
    train = open_source(write_folder(tmp_path / "train", {"a": 2, "b": 2, "c": 2}))
    write_folder(tmp_path / "val", {"a": 1, "c": 2})
    data = open_labelled(train, tmp_path / "val")
    assert data.val_labels.tolist() == [0, 2, 2]
    write_folder(tmp_path / "other", {"a": 1, "z": 2})
    with pytest.raises(ConfigError, match="got another: z"):
        open_labelled(train, tmp_path / "other")
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "flat" / "1.png")
    with pytest.raises(ConfigError, match="without classes"):
        open_labelled(train, tmp_path / "flat")
