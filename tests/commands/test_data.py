"""The loaders that a configuration asks for: this rank's part, from the step on, and what becomes of a bad image."""

from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import write_classes, write_pictures

from reco_fast import distributed
from reco_fast.data.images import open_data
from reco_fast.data.loaders import open_evaluation_loader, open_training_loader
from reco_fast.errors import DataError
from reco_fast.pipelines.base import Loader
from reco_fast.pipelines.order import EvaluationOrder, TrainingOrder
from reco_fast.pipelines.pixels import Decoding
from reco_fast.pipelines.sources.open import open_source
from reco_fast.settings.config import Config, DataConfig, EvalConfig, TrainConfig

CPU = torch.device("cpu")
DATA = DataConfig(image_size=16, loader="torch", workers=1)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_trains_on_its_part_of_the_global_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    source = open_source(write_pictures(tmp_path, 12))
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    config = Config(data=DATA, train=TrainConfig(batch_size=8, seed=5))
    with open_training_loader(config, source, CPU, torch.float32, first_step=1) as loader:
        indices = next(loader).indices
    _, expected = TrainingOrder(12, 8, seed=5).batch(1)
    assert indices.tolist() == expected[4 * rank : 4 * rank + 4].tolist()


@pytest.mark.parametrize("training", [True, False])
def test_a_bad_image_is_passed_over_or_ends_the_run_as_configured(tmp_path: Path, training: bool) -> None:
    source = open_source(write_pictures(tmp_path, 8))
    (tmp_path / "03.jpg").write_bytes(b"no image")

    def opened(on_bad_image: Any) -> Loader:
        data = DataConfig(image_size=16, loader="torch", workers=1, on_bad_image=on_bad_image)
        if training:
            config = Config(data=data, train=TrainConfig(batch_size=8))
            return open_training_loader(config, source, CPU, torch.float32)
        return open_evaluation_loader(data, source, EvaluationOrder(8, 8), CPU, torch.float32)

    with opened("skip") as loader:
        assert 3 not in next(loader).indices.tolist()
        assert list(loader.bad_images) == ["03.jpg"]
    with opened("raise") as loader, pytest.raises(DataError, match=r"03\.jpg"):
        next(loader)


def test_all_images_of_a_run_are_decoded_as_configured(tmp_path: Path) -> None:
    write_pictures(tmp_path / "photos", 8)
    write_classes(tmp_path / "train", 4)
    write_classes(tmp_path / "val", 4)
    data = DataConfig(path=tmp_path / "photos", val_path=tmp_path / "val", background="red", range=(0, 9))
    config = Config(data=data, eval=EvalConfig(train_path=tmp_path / "train"), train=TrainConfig(batch_size=8))
    _, source, labelled = open_data(config)
    assert labelled is not None
    for images in (source, labelled.train, labelled.val):
        assert images.decoding == Decoding((255, 0, 0), (0, 9))
