"""Train, watch, evaluate and embed from Python: cell by cell, as in a notebook. No data and no GPU, half a minute.

python examples/from_python.py
"""

# %% What to train on, and how long. Without `max_steps` it is the whole quickstart.
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from reco_fast.embed import embed_images
from reco_fast.evaluate import EvaluateCommand, evaluate
from reco_fast.settings.presets import preset
from reco_fast.train import train

folder = Path(mkdtemp())
config = preset(
    "quickstart",
    train={"max_steps": 60, "device": "cpu"},
    run={"dir": folder / "run", "log_every": 10},
    eval={"every": 100},
)

# %% Train. Each line of metrics.jsonl comes to the callback when it is written.
losses: list[float] = []


def follow(line: dict[str, Any]) -> None:
    if line["kind"] == "train":
        losses.append(line["loss_instance"])


run = train(config, on_metrics=follow)

# %% How good are the features? Also in run/evaluation.json, with pictures in run/evaluation/.
scores = evaluate(EvaluateCommand(run, device="cpu"))
print(f"kNN {scores['knn_top1']:.1f} %, linear probe {scores['linear_top1']:.1f} %")

# %% Features of any folder, as an array: here of the images that the run was evaluated with.
features, paths, bad = embed_images(run, scores["val_path"], device="cpu")
print(features.shape, paths[0], f"{len(bad)} left out")
