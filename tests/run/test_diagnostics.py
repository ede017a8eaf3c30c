"""What says that a run drifts or collapses: the figures against their definitions, and runs that do."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import SMALL, metrics, write_classes

from reco_fast import reco_loss, train
from reco_fast.method.step import _feature_health
from reco_fast.run.diagnostics import SPREAD_ROWS, Watch, chance_levels, rank_me, spread
from reco_fast.settings.config import Config, LossConfig, ModelConfig, TrainConfig

CONFIG = Config()
RECORDED = Path(__file__).resolve().parents[2] / "docs" / "results"


@pytest.mark.parametrize(("rows", "width"), [(300, 16), (16, 64), (5, 1)])
def test_rank_is_the_entropy_of_the_singular_values(rows: int, width: int) -> None:
    values = np.random.default_rng(0).normal(size=(rows, width)) * np.linspace(0.01, 2, width)
    singular = np.linalg.svd(values, compute_uv=False)
    share = singular / singular.sum() + 1e-7
    assert rank_me(torch.tensor(values)) == pytest.approx(np.exp(-np.sum(share * np.log(share))), rel=1e-6)


def test_rank_counts_dimensions() -> None:
    square = torch.linalg.qr(torch.randn(40, 40, generator=torch.Generator().manual_seed(0)))[0]
    assert rank_me(square[:, :7]) == pytest.approx(7, rel=1e-5)
    assert rank_me(square[:, :1] @ square[:1]) == pytest.approx(1, abs=1e-3)
    assert rank_me(torch.zeros(9, 4)) == 1
    assert rank_me(torch.full((9, 4), math.inf)) == 1


def test_singular_values_are_found_on_one_thread_and_the_others_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    eigvalsh, seen = torch.linalg.eigvalsh, []
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda gram: seen.append(torch.get_num_threads()) or eigvalsh(gram))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        rank_me(torch.randn(9, 4))
        assert (seen, torch.get_num_threads()) == ([1], 3)
    finally:
        torch.set_num_threads(before)


def test_spread_tells_the_sphere_from_a_point() -> None:
    generator = torch.Generator().manual_seed(0)
    sphere = torch.randn(3000, 32, generator=generator)
    around = spread(sphere * torch.rand(3000, 1, generator=generator))  # lengths do not matter to the first two
    assert around.mean_norm < 0.05
    assert around.std == pytest.approx(1, abs=0.01)
    assert 30 < around.rank <= 32
    point = spread(torch.ones(3000, 32) + 1e-4 * sphere)
    assert point.mean_norm == pytest.approx(1, abs=1e-4)
    assert point.std < 1e-3
    assert point.rank < 1.2


def test_spread_of_many_rows_looks_at_all_parts_of_them() -> None:
    rows = torch.eye(4).repeat_interleave(SPREAD_ROWS, dim=0)  # sorted, as features by class are
    assert spread(rows).rank == pytest.approx(4, rel=1e-3)
    assert spread(rows).mean_norm == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize("objective", ["reco", "moco"])
def test_chance_is_the_loss_of_embeddings_that_say_nothing(objective: str) -> None:
    """Queries at right angles to all they are compared with."""
    loss = LossConfig(objective=objective, local_weight=2.0, global_weight=0.5)
    config = Config(model=ModelConfig(bank_size=30), loss=loss, train=TrainConfig(batch_size=6))
    rows = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    bank = torch.nn.functional.normalize(torch.randn(30, 8, generator=torch.Generator().manual_seed(1)))
    query = torch.cat([torch.zeros(6, 8), torch.ones(6, 8)], dim=1)
    key, bank = (torch.cat([part, torch.zeros_like(part)], dim=1) for part in (rows, bank))
    relations = 0.3 if objective == "reco" else 0
    out = reco_loss(
        query, query, key, key, bank, bank, torch.arange(6), 0.4,
        global_weight=0.5 * relations, local_weight=2.0 * relations, mix_anchor="key", impl="torch",
    )  # fmt: skip
    levels = chance_levels(config, 0.3)
    assert levels["chance"] == pytest.approx(out.total.item(), rel=1e-5)
    assert levels["chance_instance"] == pytest.approx(out.instance.item(), rel=1e-5)
    if objective == "moco":
        assert set(levels) == {"chance", "chance_instance"}
    else:
        assert levels["chance_global"] == pytest.approx(out.global_relation.item(), rel=1e-5)
        assert levels["chance_local"] == pytest.approx(out.local_relation.item(), rel=1e-5)


def test_health_of_a_step_is_that_of_all_pairs() -> None:
    rng = np.random.default_rng(0)
    query, key = 0.5 + rng.normal(size=(7, 5)), 0.5 + rng.normal(size=(7, 5))
    q, k = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (query, key))
    similarity = q @ k.T
    expected = [
        similarity.diagonal().mean(),
        similarity[~np.eye(7, dtype=bool)].mean(),
        np.linalg.norm(q.mean(axis=0)),
        q.std(axis=0).mean() * np.sqrt(5),
    ]
    given = [torch.tensor(x, dtype=torch.float32) for x in (query, key)]
    np.testing.assert_allclose([x.item() for x in _feature_health(*given)], expected, rtol=1e-5)


def healthy(**changes: float) -> dict[str, float]:
    values = {"loss_instance": 5.0, "loss_global": 5.0, "loss_local": 4.6, "feature_mean_norm": 0.85, "bank_rank": 40.0}
    return values | changes


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({}, None),
        ({"feature_mean_norm": 0.95}, "collapse"),
        ({"bank_rank": 2.0}, "collapse"),
        ({"loss_local": 2.5, "feature_mean_norm": 0.8}, "drift"),
        ({"loss_local": 2.5, "feature_mean_norm": 0.4}, None),
    ],
)
def test_a_cause_is_named_once_it_lasts_and_said_once(changes: dict[str, float], cause: str | None) -> None:
    watch = Watch()
    for _ in range(5):
        assert watch.reading(healthy(**changes), CONFIG, settled=False) == []
    found = [watch.reading(healthy(**changes), CONFIG, settled=True) for _ in range(4)]
    assert found[:2] == [[], []]
    assert [[(f.cause, f.new) for f in now] for now in found[2:]] == (
        [[], []] if cause is None else [[(cause, True)], [(cause, False)]]
    )
    assert watch.reading(healthy(), CONFIG, settled=True) == []
    assert Watch(**json.loads(json.dumps(vars(watch)))) == watch


@pytest.mark.parametrize(
    ("losses", "accuracies", "images", "warns"),
    [
        ((9, 8, 7, 6), (27.9, 25.7, 25.3, 22.8), 1000, True),  # a run with the student's anchor
        ((9, 8, 7, 6), (27.9, 25.7, 25.3, 22.8), 100, False),  # within the noise of so few images
        ((6, 7, 8, 9), (27.9, 25.7, 25.3, 22.8), 1000, False),  # the loss rises too
        ((9, 8, 7, 6), (84.2, 84.9, 84.7, 84.5), 10000, False),  # a plateau
        ((9, 8, 7, 6), (30, 20, 25, 22), 1000, False),  # once only
    ],
)
def test_loss_and_knn_that_fall_together(
    losses: tuple[float, ...], accuracies: tuple[float, ...], images: int, warns: bool
) -> None:
    watch = Watch()
    assert watch.evaluation(20.0, images, CONFIG) == []  # before the first step
    found = []
    for loss, accuracy in zip(losses, accuracies, strict=True):
        watch.reading(healthy(loss_instance=loss), CONFIG, settled=False)
        found = watch.evaluation(accuracy, images, CONFIG)
    assert [finding.cause for finding in found] == (["loss_without_knn"] if warns else [])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_recorded_healthy_run_gives_no_warning(seed: int) -> None:
    watch, config = Watch(), train.parse(["quickstart"])[0]
    count = 0
    for text in (RECORDED / f"quickstart-seed{seed}.jsonl").read_text().splitlines():
        line = json.loads(text)
        if line["kind"] == "train":
            count += 1
            assert watch.reading({"bank_rank": 40.0} | line, config, settled=line["epoch"] > 1) == []
        elif line["kind"] == "eval":
            assert watch.evaluation(line["knn_top1"], 1008, config) == []
    assert count > 20


FLAGS = [*SMALL, *"--run.log-every 2 --optim.warmup-epochs 0 --data.loader torch".split()]


@pytest.mark.parametrize(
    ("cause", "options", "advice"),
    [
        # Decay alone moves the weights, so that each image ends at the projector's bias.
        ("collapse", "--optim.weight-decay 100 --model.teacher-momentum 0.9 --train.epochs 5", "--optim.lr"),
        # The student's own embedding in the target, and a teacher that cannot keep up.
        (
            "drift",
            "--loss.mix-anchor query --loss.local-weight 4 --loss.temperature 0.1 --model.teacher-momentum 0.999 "
            "--optim.lr 0.5 --train.epochs 5",
            "try --loss.mix-anchor key",
        ),
    ],
)
def test_a_run_that_goes_wrong_says_so(
    cause: str, options: str, advice: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_classes(tmp_path / "images", 28)
    arguments = ["--data.path", str(tmp_path / "images"), "--run.dir", str(tmp_path / "run")]
    train.train(*train.parse(["cifar10", *FLAGS, *arguments, *options.split()]))
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == len(set(warnings))
    assert sum(advice in line for line in warnings) == 1, warnings
    lines = metrics(tmp_path / "run")
    assert cause in lines[-3]["warnings"]
    assert lines[-2]["backbone_rank"] >= 1
