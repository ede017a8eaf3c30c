"""A run folder that version a5337e5 wrote (27 November 2026, before the modules had their rooms) still serves.

It was made of the images below: `timm/test_efficientnet` at 32 px, fp32 on a CPU, six steps of twelve. The weights of
the checkpoint were then made coarse, so that the file packs well. The figures are what a5337e5 made of it.
"""

import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import SMALL, metrics, write_classes

from reco_fast import evaluate, export, train
from reco_fast.embed import embed_images
from reco_fast.run.run_folder import load_run, read_config

LOSSES = {7: 10.736337661743164, 8: 10.542667388916016, 9: 12.053447723388672}
FEATURES = [0.06338528, 0.05963726, 0.08236082, -0.10133561, 0.15814163]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)  # its config.json has relative paths
    write_classes(Path("images"), 12, suffix=".bmp")
    write_classes(Path("val"), 4, suffix=".bmp", seed=1)
    with tarfile.open(Path(__file__).with_name("earlier_run.tar.xz")) as archive:
        archive.extractall(tmp_path, filter="data")
    return Path("earlier").rename("run")


def test_it_goes_on_where_it_stopped(folder: Path) -> None:
    more = ["--run.dir", str(folder), "--train.max-steps", "9"]
    config, name = train.parse(["--config", str(folder / "config.json"), *more])
    assert train.train(config, name) == folder
    lines = [line for line in metrics(folder) if line["kind"] == "train"]
    assert [line["step"] for line in lines] == list(range(1, 10))
    assert {line["step"]: line["loss"] for line in lines[6:]} == pytest.approx(LOSSES, rel=2e-3)
    assert "convolution" not in (folder / "config.json").read_text()
    assert metrics(folder)[-1]["steps"] == 9


def test_it_is_evaluated_embedded_and_exported(folder: Path, call: Callable[..., int]) -> None:
    assert read_config(folder).train.precision == "fp32"
    result = evaluate.evaluate(evaluate.EvaluateCommand(folder, device="cpu"))
    assert result["knn_top1"] == 100
    found = embed_images(folder, "val", device="cpu")
    assert found.features.shape == (8, 256)
    np.testing.assert_allclose(found.features[0, :5], FEATURES, rtol=1e-3, atol=1e-3)
    assert found.paths[0] == "dark/0.bmp"
    assert found.bad == {}
    assert call(export.main, folder, "--format", "timm", "--output", "backbone.pth") == 0
    weights = torch.load("backbone.pth", weights_only=True)
    assert sum(value.numel() for value in weights.values()) > 90_000


def test_a_transformer_of_whole_patches_is_loaded_as_it_was(cifar: Path, tmp_path: Path) -> None:
    """Until 28 November 2026 --model.stem auto left patches as they were at any size."""
    small = [*SMALL, "--model.arch", "timm/test_vit", "--train.max-steps", "1", "--data.workers", "1"]
    run = train.train(
        *train.parse(["quickstart", *small, "--data.path", str(cifar), "--run.dir", str(tmp_path / "run")])
    )
    _, expected = load_run(run, "student")
    config = json.loads((run / "config.json").read_text())
    assert config["model"]["stem"] == "standard"
    config["model"]["stem"] = "auto"
    (run / "config.json").write_text(json.dumps(config))
    _, found = load_run(run, "student")
    for (name, one), other in zip(expected.state_dict().items(), found.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
