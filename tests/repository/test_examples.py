"""The examples run, learn, and stay short."""

import math
import re
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from launchers import torchrun
from small_runs import write_pictures
from torch import nn

from reco_fast import ReCoLoss
from reco_fast.pipelines.sources import generated

EXAMPLES = Path(__file__).parents[2] / "examples"
FILES = sorted(EXAMPLES.glob("*.py"))


def example(name: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 smooth pictures in one sub-folder."""
    root = tmp_path_factory.mktemp("pictures")
    write_pictures(root / "all", 32, ".png")
    return root


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_examples_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 80


def test_plain_loop_learns() -> None:
    losses = example("plain_loop")["train"](steps=40)
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_from_python_learns_and_embeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a tenth of the built-in images."""
    monkeypatch.setattr(generated, "TRAIN_PER_CLASS", 42)
    monkeypatch.setattr(generated, "VAL_PER_CLASS", 8)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = example("from_python")
    assert len(made["losses"]) == 6
    assert made["losses"][-1] < made["losses"][1]  # while the memory bank fills, it rises
    assert made["scores"]["knn_top1"] > 15  # of twelve classes
    assert made["features"].shape == (len(made["paths"]), 96)
    assert np.isfinite(made["features"]).all()
    assert made["bad"] == {}


def test_in_batch_negatives_learn() -> None:
    losses = example("in_batch_negatives")["train"](steps=30)
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_in_batch_negatives_on_two_ranks() -> None:
    done = torchrun(EXAMPLES / "in_batch_negatives.py")
    assert done.returncode == 0, done.stderr[-3000:]
    found = re.findall(r"rank (\d): loss ([\d.]+) → ([\d.]+), sum of weights (-?\d+\.\d{6})", done.stdout)
    assert sorted(rank for rank, *_ in found) == ["0", "1"]
    assert len({weights for *_, weights in found}) == 1
    assert all(float(last) < 0.8 * float(first) for _, first, last, _ in found)


def test_in_batch_negatives_with_single_rows_is_moco_v3() -> None:
    """With a part for each image and no relations: cross-entropy over all keys, as in MoCo v3 and SimCLR."""
    torch.manual_seed(0)
    student, teacher = nn.Linear(20, 8), nn.Linear(20, 8)
    views = [torch.randn(12, 20) for _ in range(3)]
    loss = example("in_batch_negatives")["in_batch_loss"](
        ReCoLoss(temperature=0.3, global_weight=0, local_weight=0), student, teacher, views, parts=12
    )
    query, key = F.normalize(student(views[0])), F.normalize(teacher(views[1]))
    torch.testing.assert_close(loss, F.cross_entropy(query @ key.T / 0.3, torch.arange(12)))


def test_lightning_module(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("lightning", reason="lightning is not installed; pip install 'reco-fast[examples]'")
    module = example("lightning_module")["train"](
        str(folder), steps=3, batch_size=16, bank_size=64, accelerator="cpu", default_root_dir=tmp_path, logger=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    measured = {name: value.item() for name, value in module.trainer.callback_metrics.items()}
    assert measured["loss/total"] == pytest.approx(
        measured["loss/instance"] + measured["loss/global_relation"] + 2 * measured["loss/local_relation"], rel=1e-4
    )
    assert module.bank.position == 3 * 16
    torch.testing.assert_close(module.bank.keys[32:48], F.normalize(module.new_keys[0]))
    difference = max(
        (slow - fast).abs().max().item()
        for slow, fast in zip(module.teacher.parameters(), module.student.parameters(), strict=True)
    )
    assert difference > 1e-4
    (saved,) = (torch.load(path, weights_only=True) for path in tmp_path.rglob("*.ckpt"))
    torch.testing.assert_close(saved["state_dict"]["bank.keys"], module.bank.keys)


def test_lightly_moco(folder: Path) -> None:
    pytest.importorskip("lightly", reason="lightly is not installed; pip install 'reco-fast[examples]'")
    means = example("lightly_moco")["train"](str(folder), epochs=2, batch_size=16, bank_size=64)
    assert len(means) == 2
    assert all(map(math.isfinite, means))


def test_without_relations_the_loss_is_lightlys() -> None:
    """What the Lightly example replaces, on the same keys and bank."""
    loss = pytest.importorskip("lightly.loss", reason="lightly is not installed; pip install 'reco-fast[examples]'")
    torch.manual_seed(0)
    theirs = loss.NTXentLoss(temperature=0.3, memory_bank_size=(64, 16))
    bank = theirs.memory_bank.bank.clone()
    query, key = torch.randn(8, 16, requires_grad=True), torch.randn(8, 16)
    ours = ReCoLoss(temperature=0.3, global_weight=0, local_weight=0)(query, None, key, None, bank, None, None, 1.0)
    expected = theirs(query, key)
    torch.testing.assert_close(ours.total, expected)
    (gradient,) = torch.autograd.grad(ours.total, query)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, query)[0])
