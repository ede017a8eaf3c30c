"""The ablation: the right runs, one line each, going on where it stopped, and an honest table."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from small_runs import SMALL, write_classes

from reco_fast import ablation
from reco_fast.ablation import AblationOptions, Variant, table, variants
from reco_fast.errors import ConfigError
from reco_fast.settings.config import Config
from reco_fast.settings.methods import METHODS
from reco_fast.settings.presets import preset


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    write_classes(root / "train", 20)
    write_classes(root / "val", 4, seed=1)
    return root


def ablate(images: Path, folder: Path, *arguments: object) -> list[dict[str, Any]]:
    data = ["--data.path", images / "train", "--data.val-path", images / "val", "--ablation.dir", folder]
    preset, command = ablation.parse(
        [str(part) for part in ["cifar10", *data, *SMALL, "--train.epochs", 1, *arguments]]
    )
    assert ablation.ablate(preset, command) == 0
    return results(folder)


def results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "ablation.jsonl").read_text().splitlines()]


FLAGS = ("--ablation.budgets", "epochs", "--ablation.seeds", 3, "--ablation.methods", "moco", "both")


@pytest.fixture(scope="module")
def done(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("done")
    ablate(images, folder, *FLAGS, "--ablation.moco-lr", 0.06)
    return folder


def test_each_method_is_trained_and_reported(done: Path) -> None:
    lines = results(done)
    assert [(line["method"], line["lr"], line["seed"]) for line in lines] == [("moco", 0.06, 3), ("both", 0.03, 3)]
    for line in lines:
        assert 0 <= line["knn_top1"] <= 100
        assert 0 <= line["linear_top1"] <= 100
        settings = json.loads((done / line["run"] / "config.json").read_text())
        assert settings["train"]["seed"] == 3
        assert settings["optim"]["lr"] == line["lr"]
        assert settings["loss"]["objective"] == ("moco" if line["method"] == "moco" else "reco")
    rows = (done / "ablation.md").read_text().splitlines()[2:]
    assert [row.split("|")[1].strip() for row in rows] == ["MoCo v2", "+ both (ReCo)"]
    assert (done / "ablation.png").stat().st_size > 1000


def test_what_is_done_is_not_trained_again(
    images: Path, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(done, tmp_path / "copy"))
    lines = results(folder)
    monkeypatch.setattr(ablation, "train", lambda *_: pytest.fail("trained again"))
    assert ablate(images, folder, *FLAGS, "--ablation.moco-lr", 0.06) == lines
    with pytest.raises(ConfigError, match=r"--ablation\.dir: .* --loss\.temperature is 0\.1 there and 0\.5 now"):
        ablate(images, folder, *FLAGS, "--ablation.moco-lr", 0.06, "--loss.temperature", 0.5)


def test_a_killed_ablation_goes_on_with_the_run_that_it_was_in(images: Path, done: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    folder.mkdir()
    for name in ("ablation.jsonl", "moco-lr0.06-1epochs-seed3"):
        path = done / name
        (shutil.copytree if path.is_dir() else shutil.copy)(path, folder / name)
    whole = results(folder)
    (folder / "ablation.jsonl").write_text(json.dumps(whole[0]) + "\n")
    again = ablate(images, folder, *FLAGS, "--ablation.moco-lr", 0.06)
    for line in (*whole, *again):
        del line["seconds"]
    assert again == whole


def test_a_foreign_file_is_refused(images: Path, tmp_path: Path) -> None:
    for text in ("{", "[1]", '{"method": "moco"}'):
        (tmp_path / "ablation.jsonl").write_text(text + "\n")
        with pytest.raises(ConfigError, match=r"ablation\.jsonl: expected a JSON object a line"):
            ablate(images, tmp_path)


def test_moco_has_its_own_rate_and_runs_only_if_asked_for() -> None:
    assert AblationOptions(methods=("moco", "both"), moco_lr=0.2).rates(0.1) == {"moco": 0.2, "both": 0.1}
    assert AblationOptions(methods=("global", "both"), moco_lr=0.2).rates(0.1) == {"global": 0.1, "both": 0.1}
    assert AblationOptions(methods=("moco",)).rates(0.1) == {"moco": 0.1}


def test_a_budget_gives_cheaper_methods_more_epochs() -> None:
    lines = [
        {"method": method, "budget": "epochs", "lr": 0.1, "seed": seed, "seconds": seconds + seed}
        for method, seconds in (("moco", 50.0), ("both", 99.0))
        for seed in (0, 1, 2)
    ]
    rates, base = {"moco": 0.2, "both": 0.1}, preset("imagenet100", train={"epochs": 10})
    equal = [Variant("moco", 0.2, "epochs", 10), Variant("both", 0.1, "epochs", 10)]
    assert list(variants("epochs", rates, base, lines)) == equal
    assert list(variants("seconds", rates, base, lines)) == [Variant("moco", 0.2, "seconds", 20)]
    # Eight passes an image, four, and six and a half; no run has to be timed for it.
    longer = [Variant("moco", 0.1, "passes", 20), Variant("half-mix", 0.1, "passes", 12)]
    assert list(variants("passes", dict.fromkeys(("moco", "half-mix", "both"), 0.1), base, [])) == longer


def test_the_budget_of_seconds_follows_the_budget_of_epochs(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The training is a stand-in, in which MoCo takes half as long."""
    trained: list[tuple[str, int, int]] = []

    def judged(config: Config) -> dict[str, float]:
        return {"seconds": 30.0 if config.loss.objective == "moco" else 60.0, "knn_top1": 1.0, "linear_top1": 1.0}

    def train(config: Config, _: str) -> None:
        trained.append((config.loss.objective, config.train.epochs, config.train.seed))

    monkeypatch.setattr(ablation, "train", train)
    monkeypatch.setattr(ablation, "judged", judged)
    monkeypatch.setattr(ablation, "draw_curves", lambda *_: None)
    lines = ablate(images, tmp_path, "--ablation.methods", "moco", "both", "--ablation.seeds", 0, 1)
    assert trained == [("moco", 1, 0), ("reco", 1, 0), ("moco", 1, 1), ("reco", 1, 1), ("moco", 2, 0), ("moco", 2, 1)]
    assert [line["budget"] for line in lines] == 4 * ["epochs"] + 2 * ["seconds"]
    assert table(lines) in capsys.readouterr().out  # a line each


def test_curves_of_each_budget_are_of_its_own_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of other budgets are longer: they could not be averaged."""
    lines = []
    for method, budget, epochs in (("moco", "epochs", 2), ("both", "epochs", 2), ("moco", "passes", 4)):
        for seed in (0, 1):
            run = f"{method}-{epochs}-{seed}"
            (tmp_path / run).mkdir()
            evaluations = ({"kind": "eval", "epoch": e, "knn_top1": 10.0 * e + seed} for e in range(epochs + 1))
            (tmp_path / run / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in evaluations))
            each = {"method": method, "budget": budget, "epochs": epochs, "run": run, "seconds": 60.0}
            lines.append(each | {"passes": 4.0 if method == "moco" else 8.0})
    drawn: list[tuple[str, list[float]]] = []
    plot = Axes.plot

    def noted(axes: Axes, x: list[float], y: list[float], **how: Any) -> Any:
        drawn.append((how["label"], x))
        return plot(axes, x, y, **how)

    monkeypatch.setattr(Axes, "plot", noted)
    ablation.draw_curves(tmp_path, lines)
    assert (tmp_path / "ablation.png").stat().st_size > 1000
    both, moco = "+ both (ReCo)", "MoCo v2"
    assert drawn == [
        (moco, [0, 1, 2]), (both, [0, 1, 2]), (moco, [0, 0.5, 1]), (both, [0, 0.5, 1]),
        (moco, [0, 4, 8, 12, 16]), (both, [0, 8, 16]),
    ]  # fmt: skip


def test_the_table_has_means_and_ranges() -> None:
    lines = [
        {
            "method": "both", "budget": "epochs", "lr": 0.06, "epochs": 5, "seed": seed, "seconds": 60.0,
            "knn_top1": knn, "linear_top1": 50.0,
        }
        for seed, knn in ((0, 40.0), (1, 41.0), (2, 45.0))
    ]  # fmt: skip
    assert table(lines).splitlines()[2] == (
        "| + both (ReCo) | 0.06 | 5 |  | 60 | 3 | 42.0 (40.0 to 45.0) | 50.0 (50.0 to 50.0) |"
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ablation.methods", "mocco"], r"--ablation\.methods: expected some of moco, .*, got mocco"),
        (["--ablation.budgets", "minutes"], r"--ablation\.budgets: expected some of epochs, .*, got minutes"),
        (["--ablation.budgets", "passes"], r"--ablation\.budgets: expected epochs among them, got passes"),
        (["--ablation.seeds"], r"--ablation\.seeds: expected at least one number, got nothing"),
        (["--ablation.sed", "1"], r"--ablation\.sed: unknown flag; did you mean --ablation\.seeds\?"),
    ],
)
def test_mistakes_are_one_line(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ablation.parse(flags)


def test_one_process_with_labels(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preset, command = ablation.parse(["cifar10", "--data.path", str(images / "train"), *SMALL])
    with pytest.raises(ConfigError, match=r"--data\.val-path: expected labelled images"):
        ablation.ablate(preset, command)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="expected one process for an ablation, got 2"):
        ablation.ablate(preset, command)


def test_an_ablation_has_a_global_relation_where_the_preset_has_none(tmp_path: Path) -> None:
    assert preset("quickstart").loss.global_weight == 0
    weights = [ablation.parse(flags)[1].loss.global_weight for flags in ([], ["--loss.global-weight", "0"], ["adapt"])]
    assert weights == [1, 0, 1]
    file = tmp_path / "config.json"
    file.write_text(json.dumps(preset("cifar10", loss={"global_weight": 0.25}).to_json()))
    assert ablation.parse(["--config", str(file)])[1].loss.global_weight == 0.25


@pytest.mark.parametrize(("flags", "smaller"), [([], 24), (["imagenet100"], 168), (["--data.image-size", "16"], 16)])
def test_each_method_differs_in_its_own_settings_alone(flags: list[str], smaller: int) -> None:
    _, command = ablation.parse(flags)
    base = command.to_json()
    found = {}
    for method in METHODS:
        variant = Variant(method, command.optim.lr, "epochs", command.train.epochs)
        given = variant.config(command, command.train.seed, Path("x")).to_json()
        found[method] = {
            f"{section}.{name}": value
            for section, values in given.items()
            for name, value in values.items()
            if section not in ("run", "ablation") and value != base[section][name]
        }
    assert found["moco"] == {"loss.objective": "moco"}
    assert found["both"] == {}
    # The quickstart mixes within the batch, which has no view of another size.
    apart = {} if flags == ["imagenet100"] else {"loss.mix_within": False}
    assert found["small-mix"] == {"loss.mix_size": smaller} | apart
    assert found["small-weak"] == {"data.weak_size": smaller}
    assert found["growing"] == {"data.grow_from": smaller}
    assert found["late"] == {"loss.start": 0.25}
    assert found["weak-keys"] == {"loss.keys": "weak"}
    assert found["half-mix"] == (apart or {"loss.mix_share": 0.5})
    assert found["mix-within"] == ({} if apart else {"loss.mix_share": 0.5, "loss.mix_within": True})
    assert found["momentum"] == {"model.teacher_momentum_end": 1.0}
    assert all(len(changed) <= 2 for changed in found.values())
