"""The whole step beside a plain one: they compute the same, the benchmark says which is faster, and why it can be."""

import dataclasses
import json
import sys
from contextlib import closing
from pathlib import Path

import pytest
import torch
from dispatch import Recorder
from torch import Tensor

from reco_fast.method.losses import reco_loss
from reco_fast.method.state import build_state
from reco_fast.method.step import Schedule, draw, train_step
from reco_fast.profiling import machine
from reco_fast.profiling.benchmarks import contestants, step
from reco_fast.profiling.benchmarks.naive import NaiveReCo
from reco_fast.settings.config import Config, DataConfig, LossConfig, ModelConfig, OptimConfig, TrainConfig

CPU = torch.device("cpu")
CONFIG = Config(
    model=ModelConfig(arch="timm/test_resnet", bank_size=64, projection_dim=16, teacher_momentum=0.9),
    loss=LossConfig(mix_anchor="query"),
    optim=OptimConfig(lr=0.1, decay_all=True),
    train=TrainConfig(batch_size=16, precision="fp32"),
)


def views(rows: int, size: int = 32) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(rows, 3, size, size, generator=generator) for _ in range(3))


def test_the_naive_step_computes_what_the_trainer_does() -> None:
    """Three steps from one start: losses, what each weight of both encoders has moved, and both banks are equal."""
    state = build_state(CONFIG, CPU)
    start = [parameter.detach().clone() for parameter in state.student.parameters()]
    naive = NaiveReCo(CONFIG, CPU)
    naive.student.load_state_dict(state.student.state_dict())
    naive.teacher.load_state_dict(state.teacher.state_dict())
    naive.queue, naive.queue_weak = state.bank.keys.T.clone(), state.bank.weak_keys.T.clone()
    given = views(16)
    for _ in range(3):
        drawn = draw(state.step, 16, CONFIG, CPU)
        metrics = train_step(
            state,
            CONFIG,
            tuple(view.to(memory_format=torch.channels_last) for view in given),
            drawn,
            Schedule(CONFIG.optim.lr, 1.0, CONFIG.model.teacher_momentum),
        )
        measured = naive.step(given, drawn[0].permutation, drawn[0].mix_weights)
        assert measured["loss"] == pytest.approx(float(metrics[0]), rel=1e-4)
        assert 0 <= measured["top1"] <= measured["top5"] <= 100
    naive._update_teacher()  # the reference does it at the start of the next step
    for ours, theirs in ((state.student, naive.student), (state.teacher, naive.teacher)):
        for (name, mine), other, before in zip(ours.named_parameters(), theirs.parameters(), start, strict=True):
            moved = (other - before).norm()
            assert (mine - other).norm() < 0.01 * moved + 1e-5, name
    torch.testing.assert_close(state.bank.keys.T, naive.queue, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(state.bank.weak_keys.T, naive.queue_weak, rtol=1e-3, atol=1e-3)


def test_the_supervised_bound_convolves_as_the_trainer_does() -> None:
    seen = []
    for make in (contestants.trainer, contestants.supervised):
        contestant = make(CONFIG, CPU)
        with Recorder() as recorder:
            contestant.train(contestant.views)
        seen.append({name for name in recorder.seen if "convolution" in name})
    assert seen[0] == seen[1] >= {"convolution"}


def test_contestants_train_on_views_of_the_sizes_that_are_said() -> None:
    config = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, weak_size=20))
    for make in (contestants.trainer, contestants.naive):
        contestant = make(config, CPU)
        assert [view.shape[-1] for view in contestant.views] == [CONFIG.data.image_size, CONFIG.data.image_size, 20]
        contestant.train(contestant.views)


def test_the_device_says_to_what_its_libraries_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in machine.HOLDS.values():
        monkeypatch.delenv(name, raising=False)
    plain = machine.device_name(CPU)
    monkeypatch.setenv("MKL_ENABLE_INSTRUCTIONS", "AVX2")
    assert machine.device_name(CPU) == f"{plain}, MKL held to AVX2"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    small = "--model.arch timm/test_resnet --model.bank-size 32 --train.batch-size 16 --train.device cpu".split()
    small += "--rounds 2 --steps 1 --warmup 1".split()
    monkeypatch.setattr(sys, "argv", ["benchmark", *small, *map(str, arguments)])
    return step.main()


def test_the_benchmark_leaves_its_figures_with_what_they_were_measured_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    assert run(monkeypatch, "--against", "naive,supervised", "--output", tmp_path / "out") == 0
    report = json.loads((tmp_path / "out" / "step.json").read_text())
    rounds, results = report["steps"]["rounds"], report["steps"]["results"]
    assert set(results) == {"ours", "naive", "supervised"}
    ratios = sorted(r["naive"]["seconds_per_step"] / r["ours"]["seconds_per_step"] for r in rounds)
    assert results["naive"]["ours_times_as_fast_range"] == pytest.approx([ratios[0], ratios[-1]])
    assert results["naive"]["ours_times_as_fast"] == pytest.approx(sum(ratios) / 2)  # the median of two
    assert results["supervised"]["ours_share_of_bound"] == pytest.approx(
        results["supervised"]["ours_times_as_fast"] * 8 / 3
    )
    assert report["config"]["model"]["bank_size"] == 32
    assert report["environment"]["packages"]["torch"] == torch.__version__.partition("+")[0]
    table = (tmp_path / "out" / "step.md").read_text()
    assert "| naive |" in table
    assert table == capsys.readouterr().out
    assert (tmp_path / "out" / "step.png").read_bytes().startswith(b"\x89PNG")


def test_who_needs_more_memory_than_there_is_is_left_out_and_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")

    def too_large(views: tuple[Tensor, ...]) -> None:
        raise torch.OutOfMemoryError("made up")

    def naive(config: Config, device: torch.device) -> contestants.Contestant:
        return contestants.naive(config, device)._replace(train=too_large)

    monkeypatch.setitem(step.STEPS, "naive", {"naive": naive})
    assert run(monkeypatch, "--against", "naive,supervised", "--output", tmp_path) == 0
    steps = json.loads((tmp_path / "step.json").read_text())["steps"]
    assert steps["left_out"] == ["naive"]
    assert set(steps["results"]) == {"ours", "supervised"}
    assert "Out of memory: naive." in (tmp_path / "step.md").read_text()
    ours = contestants.trainer(CONFIG, CPU)._replace(train=too_large)
    monkeypatch.setattr(contestants, "trainer", lambda *_: ours)
    with pytest.raises(step.ConfigError, match=r"--train\.batch-size: expected a batch that fits, got 16"):
        run(monkeypatch, "--against", "supervised", "--output", tmp_path)


def test_each_way_to_launch_has_its_own_bound(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    eager = {name: make for name, make in step.STEPS["launches"].items() if name.endswith("eager")}
    monkeypatch.setitem(step.STEPS, "supervised", step.STEPS["supervised"] | eager)
    assert run(monkeypatch, "--against", "supervised", "--output", tmp_path) == 0
    steps = json.loads((tmp_path / "step.json").read_text())["steps"]
    assert {"ours, eager", "supervised, eager"} <= set(steps["results"])
    (first, second) = (
        turn["supervised, eager"]["seconds_per_step"] / turn["ours, eager"]["seconds_per_step"]
        for turn in steps["rounds"]
    )
    share = steps["results"]["supervised, eager"]["ours_share_of_bound"]
    assert share == pytest.approx((first + second) / 2 * 8 / 3)
    assert f"{100 * share:.0f} %, eager." in (tmp_path / "step.md").read_text()


def test_lightly_is_compared_by_the_step_and_from_the_same_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, photographs: Path
) -> None:
    pytest.importorskip("lightly")
    pytest.importorskip("matplotlib")
    from reco_fast.profiling.benchmarks import lightly_moco

    read = []
    batches = lightly_moco.batches
    monkeypatch.setattr(
        lightly_moco, "batches", lambda *given: (read.append(views) or views for views in batches(*given))
    )
    where = ["--data.path", photographs, "--output", tmp_path, "--data.workers", 1, "--train.precision", "bf16"]
    assert run(monkeypatch, "--against", "lightly,supervised", "--rounds", 1, *where) == 0
    report = json.loads((tmp_path / "step.json").read_text())
    names = ["ours", "ours, moco", "lightly", "lightly, autocast"]
    assert list(report["steps"]["results"]) == [*names, "supervised"]
    assert list(report["end_to_end"]["results"]) == names
    (turn,), lightly = report["end_to_end"]["rounds"], report["end_to_end"]["results"]["lightly"]
    seconds = {name: turn[name]["seconds_per_step"] for name in names}
    assert lightly["ours_times_as_fast"] == pytest.approx(seconds["lightly"] / seconds["ours"])
    assert lightly["moco_times_as_fast"] == pytest.approx(seconds["lightly"] / seconds["ours, moco"])
    assert lightly["images_per_second"] == pytest.approx(16 / seconds["lightly"])
    assert len(read) == 2 * (report["end_to_end"]["steps_before"] + 1)  # both of Lightly's train on what it loads
    assert report["environment"]["packages"]["lightly"]
    assert (tmp_path / "step.md").read_text().count("| lightly, autocast |") == 2


@pytest.mark.parametrize("autocast", [False, True])
def test_lightlys_step_learns_with_the_loss_that_ours_has(photographs: Path, autocast: bool) -> None:
    """The opponent is no straw man: its loss is MoCo's over K past keys, and training lowers it."""
    pytest.importorskip("lightly")
    from reco_fast.profiling.benchmarks import lightly_moco

    torch.manual_seed(0)
    config = dataclasses.replace(
        CONFIG,
        data=DataConfig(path=photographs, workers=1),
        optim=OptimConfig(lr=0.01),
        train=TrainConfig(batch_size=16, precision="bf16"),
    )
    with closing(lightly_moco.batches(config, CPU)) as batches:
        given = next(batches)
    assert [tuple(view.shape) for view in given] == [(16, 3, 32, 32)] * 2
    assert not torch.equal(*given)
    model = lightly_moco.LightlyMoCo(config, CPU, autocast=autocast)
    start = [parameter.clone() for parameter in model.teacher.parameters()]
    key, bank = model.teacher(given[1]), model.loss.memory_bank.bank.clone()

    def moco() -> float:
        with torch.no_grad():
            query = model.student(given[0])
        return float(reco_loss(query, None, key, None, bank, None, None, 1.0, global_weight=0, local_weight=0)[0])

    first = moco()
    assert float(model.step(given)) == pytest.approx(first, rel=0.02 if autocast else 1e-4)
    assert moco() < first - 0.02  # of the same keys and negatives
    for _ in range(3):
        model.step(given)
    assert int(model.loss.memory_bank.bank_ptr) == 0  # four batches of 16 fill a bank of 64
    assert any(not torch.equal(a, b) for a, b in zip(start, model.teacher.parameters(), strict=True))


def test_without_lightly_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "lightly.data", None)
    monkeypatch.delitem(sys.modules, "reco_fast.profiling.benchmarks.lightly_moco", raising=False)
    monkeypatch.delattr("reco_fast.profiling.benchmarks.lightly_moco", raising=False)
    with pytest.raises(step.ConfigError, match=r"lightly.*reco-fast\[examples\]"):
        run(monkeypatch, "--against", "lightly", "--output", tmp_path / "out")


def test_the_loaders_are_compared_by_their_own_benchmark(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, photographs: Path
) -> None:
    pytest.importorskip("nvidia.dali")
    pytest.importorskip("matplotlib")
    where = ["--data.path", photographs, "--output", tmp_path]
    assert run(monkeypatch, "--against", "torchvision", "--data.workers", 1, "--rounds", 1, *where) == 0
    report = json.loads((tmp_path / "step.json").read_text())
    assert report["loaders"]["results"]["torchvision"]["times"]["torchvision"] == 1
    assert "steps" not in report


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        (("--against", "torchvision"), "--data.path"),
        (("--model.bank-size", 40), "--model.bank-size"),
        (("--loss.objective", "moco"), "--loss.objective"),
        (("--against", "launches"), "--against launches: expected a CUDA device"),
        (("--rounds", 0), "--rounds"),
        (("--against", "lightning"), "lightning"),
    ],
)
def test_mistakes_name_the_flag(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: tuple[object, ...], flag: str
) -> None:
    with pytest.raises(step.ConfigError, match=flag):
        run(monkeypatch, "--output", tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()
