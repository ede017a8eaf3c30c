"""The command: what it writes, that it goes on exactly, and what it refuses."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from launchers import torchrun
from loading import LOADERS
from safetensors.torch import load_file
from small_runs import SMALL, metrics, write_classes

from reco_fast import distributed, evaluate, train
from reco_fast.errors import ConfigError
from reco_fast.method.state import fastest_precision
from reco_fast.pipelines.augmentations import reco_recipe
from reco_fast.pipelines.base import Batch
from reco_fast.run import progress
from reco_fast.run.report import wandb_beside
from reco_fast.settings import command_line
from reco_fast.settings.config import Config
from reco_fast.training import loop

FLAGS = [*SMALL, "--run.log-every", "2"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """56 labelled JPEGs to train on and 16 held out, two classes by colour."""
    root = tmp_path_factory.mktemp("images")
    write_classes(root / "train", 28)
    write_classes(root / "val", 8, seed=1)
    return root


def command(*arguments: object) -> tuple[Config, str]:
    return train.parse([str(argument) for argument in arguments])


def run(images: Path, folder: Path, *arguments: object) -> list[dict[str, object]]:
    """Train in this process and return the lines of metrics.jsonl."""
    data = ["--data.path", images / "train", "--run.dir", folder]
    train.train(*command("cifar10", *data, *FLAGS, *arguments))
    return metrics(folder)


@pytest.mark.parametrize("loader", LOADERS)
def test_a_run_leaves_what_the_contract_says(
    images: Path, tmp_path: Path, loader: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    lines = run(images, folder, "--train.epochs", 2, "--data.val-path", images / "val", "--data.loader", loader)
    assert [line["kind"] for line in lines] == ["eval", "train", "train", "train", "train", "eval", "end"]
    assert {
        "step", "epoch", "loss", "loss_instance", "loss_global", "loss_local", "teacher_entropy", "lr",
        "images_per_second", "data_wait_fraction",
    } <= set(lines[1])  # fmt: skip
    assert lines[1]["loss"] == pytest.approx(
        lines[1]["loss_instance"] + lines[1]["loss_global"] + 2 * lines[1]["loss_local"], rel=1e-5
    )
    end = lines[-1]
    assert set(end) - {"kind"} == {
        "epochs", "steps", "seconds", "images_per_second", "knn_top1_initial", "knn_top1",
    }  # fmt: skip
    assert end["steps"] == 7
    assert end["epochs"] == 2
    assert 0 <= end["knn_top1"] <= 100
    for name in ("config.json", "environment.json", "checkpoints/step-000000007.safetensors", "tensorboard"):
        assert (folder / name).exists(), name
    assert not (folder / "bad_images.txt").exists()
    shown = capsys.readouterr()
    assert "step 7" in shown.out
    assert "Warning" not in shown.err


def test_training_is_timed_up_to_each_evaluation(images: Path, tmp_path: Path) -> None:
    """An evaluation between two log lines costs the count no step, and the clock stands still during it."""
    options = ["--train.max-steps", 4, "--run.log-every", 100, "--eval.every", 0.3, "--data.val-path", images / "val"]
    lines = run(images, tmp_path / "run", *options)
    evaluations, end = [line for line in lines if line["kind"] == "eval"], lines[-1]
    clock = [line["seconds"] for line in evaluations]
    assert [line["step"] for line in evaluations] == [0, 2, 3, 4]
    assert clock[0] == 0
    assert clock == sorted(set(clock))
    assert clock[-1] == pytest.approx(end["seconds"], abs=0.01)
    assert end["images_per_second"] * end["seconds"] == pytest.approx(4 * 16)


def test_evaluate_reads_a_run_and_writes_beside_it(
    images: Path,
    tmp_path: Path,
    call: Callable[..., int],
    refused: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(images, tmp_path / "run", "--train.max-steps", 1)
    data = ["--data.path", images / "train", "--data.val-path", images / "val"]
    assert call(evaluate.main, tmp_path / "run", *data) == 0
    result = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert result["knn_top1"] == result["linear_top1"] == 100  # dark against light
    assert "kNN top-1 100.00 %" in capsys.readouterr().out
    assert "config.json" in refused(evaluate.main, tmp_path / "nothing")


def test_images_without_labels_train(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flat = tmp_path / "flat" / "deeper"
    flat.mkdir(parents=True)
    for index, path in enumerate(sorted((images / "train").rglob("*.jpg"))):
        shutil.copy(path, flat / f"{index} ä.jpg")
    (flat / "bad.jpg").write_text("not an image")
    (Path(os.fsdecode(os.fsencode(flat) + b"/not utf-8 \xff.jpg"))).write_text("nor this")
    (flat / "two\nlines.jpg").touch()
    data = ["--data.path", tmp_path / "flat", "--run.dir", tmp_path / "run", "--loss.objective", "moco"]
    train.train(*command("cifar10", *data, *FLAGS, "--train.epochs", 2))
    lines = metrics(tmp_path / "run")
    assert lines[-1]["knn_top1"] is None
    assert lines[-2]["kind"] == "eval"
    printed = capsys.readouterr().out.splitlines()
    assert "no kNN evaluation" in printed[1]
    assert printed[-1].startswith(f"done; python -m reco_fast.embed {tmp_path / 'run'} --data.path {tmp_path / 'flat'}")
    listed = (tmp_path / "run" / "bad_images.txt").read_bytes().splitlines()
    assert [line.split(b"\t")[0] for line in listed] == [
        b"deeper/bad.jpg",
        b"deeper/not utf-8 \xff.jpg",
        b"deeper/two\\nlines.jpg",
    ]


@pytest.mark.parametrize(
    "cheaper",
    [
        (),
        ("--data.weak-size", 20, "--data.min-scale", 0.08, "--loss.mix-size", 24, "--loss.mix-share", 0.5),
        (
            *("--loss.keys", "weak", "--loss.mix-share", 0.5, "--loss.mix-within", "--model.teacher-momentum-end", 1),
            *("--model.query-norm", "split", "--model.norm-groups", 4),
        ),
    ],
    ids=["", "smaller views", "fewer passes"],
)
@pytest.mark.parametrize("loader", LOADERS)
def test_a_run_goes_on_in_the_middle_of_an_epoch_bit_for_bit(
    images: Path, tmp_path: Path, loader: str, cheaper: tuple[object, ...]
) -> None:
    options = ("--train.epochs", 2, "--data.loader", loader, *cheaper)
    straight = run(images, tmp_path / "straight", *options)
    run(images, tmp_path / "parts", *options, "--train.max-steps", 3)
    resumed = run(images, tmp_path / "parts", *options)
    name = "checkpoints/step-000000007.safetensors"
    first, second = (load_file(tmp_path / part / name) for part in ("straight", "parts"))
    assert set(first) == set(second)
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
    assert straight[-3]["loss"] == resumed[-3]["loss"]
    assert [line["kind"] for line in resumed].count("end") == 1


def test_the_grid_of_views_shows_a_smaller_one_enlarged() -> None:
    shown = reco_recipe(32, 16)
    first, second, weak = (torch.randn(3, 3, size, size) for size in shown.sizes)
    grid = loop.view_grid(Batch((first, second, weak), torch.arange(3)), shown)
    assert grid.shape == (3, 3 * 34 + 2, 3 * 34 + 2)  # two pixels between them and around
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (shown.mean, shown.std))
    assert torch.equal(grid[:, 2:34, 36:68], (second[0] * std + mean).clamp(0, 1))
    assert torch.equal(grid[:, 2:34, 70:102][:, ::2, ::2], (weak[0] * std + mean).clamp(0, 1))
    assert torch.equal(grid[:, 2:34, 70:102][:, 1::2, 1::2], (weak[0] * std + mean).clamp(0, 1))


def test_a_run_does_not_go_on_with_other_images(images: Path, tmp_path: Path) -> None:
    shutil.copytree(images, tmp_path / "images")
    run(tmp_path / "images", tmp_path / "run", "--train.max-steps", 1)
    (tmp_path / "images" / "train" / "dark" / "3.jpg").unlink()
    with pytest.raises(ConfigError, match="expected the images that this run began with"):
        run(tmp_path / "images", tmp_path / "run", "--train.max-steps", 2)


def test_a_finished_run_is_left_alone(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(images, tmp_path / "run", "--train.max-steps", 1)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    run(images, tmp_path / "run", "--train.max-steps", 1)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    assert "is finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.path", "{tmp}/missing"], "missing"),
        (["--data.path", "{tmp}/empty"], "empty"),
        (["--data.path", "{tmp}/texts"], "texts"),
        (["--data.path", "{images}", "--model.arch", "resnet5o"], "--model.arch"),
        (["--data.path", "{images}", "--train.batch-size", "512", "--model.bank-size", "512"], "--train.batch-size"),
        (["--data.path", "{images}", "--model.bank-size", "8"], "--model.bank-size"),
        (["--data.path", "{images}", "--train.device", "cuda"], "--train.device"),
        (["--data.path", "{images}", "--run.dir", "/proc/reco_fast_run"], "--run.dir"),
        (["--data.path", "{images}", "--data.val-path", "{tmp}/missing"], "missing"),
        (["--data.path", "{images}", "--model.key-norm", "shuffle"], "--model.key-norm"),
        (["--data.path", "{images}", "--model.key-norm", "split", "--model.norm-groups", "9"], "--model.norm-groups"),
        (["--data.path", "{images}", "--model.query-norm", "split", "--model.norm-groups", "9"], "--model.norm-groups"),
        (
            ["--data.path", "{images}", "--model.query-norm", "split", "--loss.mix-share", "0.5"],
            "--model.norm-groups: expected at most half of the 8 images that a rank normalises together, got 8",
        ),
        (
            ["--data.path", "{images}", "--model.arch", "timm/test_vit", "--model.query-norm", "split"],
            "--model.query-norm: expected batch for timm/test_vit, which has no batch norm, got split",
        ),
        (["--data.path", "{images}", "--train.accumulate", "3"], "ranks × --train.accumulate = 3, got 16"),
        (
            ["--data.path", "{images}", "--train.accumulate", "16", "--loss.mix-share", "0.5", "--loss.mix-within"],
            "--loss.mix-within: expected 2 or more images a rank, mixed and not, got 1",
        ),
        (["--data.path", "{images}", "--loss.impl", "triton"], "--loss.impl"),
        (["--data.path", "{images}", "--data.weak-size", "33"], "--data.weak-size"),
        (
            ["--data.path", "{images}", "--model.arch", "timm/vit_tiny_patch16_224", "--data.weak-size", "16"],
            "--data.weak-size",
        ),
        (
            ["--data.path", "{images}", "--model.arch", "timm/test_vit", "--data.grow-from", "16"],
            "--data.grow-from: expected a size that timm/",
        ),
        (
            ["--data.path", "{images}", "--model.arch", "timm/test_vit", "--optim.name", "auto", "--optim.lr", "0.06"],
            "--optim.lr: expected at most 0.01 with adamw (auto took it because the backbone has no batch norm)",
        ),
        ([], "--data.path"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    arguments: list[str],
    message: str,
    images: Path,
    tmp_path: Path,
    refused: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # or asking for it might be no mistake
    if message == "--loss.impl":
        monkeypatch.setattr(pytest.importorskip("reco_fast.kernels.relation_loss"), "INTERPRETED", False)
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("hello")
    monkeypatch.chdir(tmp_path)
    filled = [a.format(tmp=tmp_path, images=images / "train") for a in arguments]
    given = ["cifar10", *FLAGS, *filled]
    given += [] if "--run.dir" in given else ["--run.dir", str(tmp_path / "run")]
    assert message in refused(train.main, *given)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "texts"]


def test_errors_of_the_program_itself_are_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        command_line.run(lambda: 1 // 0)


def test_a_checkpoint_between_two_log_lines_changes_neither(images: Path, tmp_path: Path) -> None:
    options = ("--train.max-steps", 6, "--train.precision", "fp32", "--run.log-every", 3)
    saved = run(images, tmp_path / "saved", *options, "--run.checkpoint-steps", 2)
    plain = run(images, tmp_path / "plain", *options)
    losses = [[line["loss"] for line in lines if line["kind"] == "train"] for lines in (saved, plain)]
    assert len(losses[0]) == 2
    assert losses[0] == losses[1]


@pytest.mark.parametrize("precision", ["auto", "bf16", "fp32"])
def test_the_first_line_says_the_precision_and_why(
    precision: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(images, tmp_path / "run", "--train.max-steps", 1, "--train.precision", precision)
    line = capsys.readouterr().out.splitlines()[0]
    dtype, why = fastest_precision(torch.device("cpu"))
    auto = f"{'bf16' if dtype == torch.bfloat16 else 'fp32'} ({why})"
    assert line.endswith(f"on 56 images, cpu in {auto if precision == 'auto' else precision}")


def test_two_ranks_train_under_torchrun(images: Path, tmp_path: Path) -> None:
    data = ["--data.path", images / "train", "--data.val-path", images / "val", "--run.dir", tmp_path / "run"]
    options = ["--train.epochs", 2, "--model.key-norm", "shuffle"]
    done = torchrun("-m", "reco_fast.train", "cifar10", *data, *FLAGS, *options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert metrics(tmp_path / "run")[-1]["steps"] == 7
    assert done.stdout.count("step 7") == 1


def test_sigterm_saves_and_the_same_command_goes_on(images: Path, tmp_path: Path) -> None:
    arguments = ["-m", "reco_fast.train", "cifar10", "--data.path", images / "train", "--run.dir", tmp_path / "run"]
    options = ("--train.epochs", 8, "--run.log-every", "1", "--data.loader", "torch")
    line = [str(part) for part in (sys.executable, *arguments, *FLAGS, *options)]
    pipe = subprocess.PIPE
    with subprocess.Popen(line, stdout=pipe, stderr=pipe, text=True, start_new_session=True) as running:
        for shown in running.stdout:
            if shown.startswith("step 5 "):
                os.killpg(running.pid, signal.SIGTERM)  # as Ctrl-C and torchrun do
                break
        rest, errors = running.communicate(timeout=300)
    assert running.returncode == 0, errors
    assert "SIGTERM" in rest
    assert "--run.dir" in rest
    stopped_at = int(rest.split("stopped at step ")[1].split()[0])
    assert (tmp_path / "run" / "checkpoints" / f"step-{stopped_at:09d}.safetensors").exists()
    lines = run(images, tmp_path / "run", *options)
    assert [entry["step"] for entry in lines if entry["kind"] == "train"] == list(range(1, 29))
    assert lines[-1]["kind"] == "end"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("images", "9"),
        ("images", -1),
        ("images", True),
        ("seconds", float("nan")),
        ("sums", [1.0, "x"]),
        ("sums", None),
        ("sums", [[1.0]]),
        ("summed_steps", 1.5),
        ("knn_top1", []),
        ("fingerprint", 3),
        ("watch", {"evaluations": [[1.0, 2.0, 3.0]]}),
        ("watch", 1),
        ("another", 1),
    ],
)
def test_progress_of_a_wrong_type_is_one_line(
    field: str, value: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(progress.checkpoint, "load", lambda path, state: {field: value})
    with pytest.raises(ConfigError, match="in its progress") as caught:
        progress.Progress.restore(tmp_path / "step", None)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_a_run_without_finite_gradients_gives_up(images: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no finite gradient in the last"):
        run(images, tmp_path / "run", "--train.epochs", 20, "--optim.lr", "1e30")


def test_weights_and_biases_gets_what_tensorboard_gets(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed; pip install 'reco-fast[wandb]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb.teardown()  # a test before this one may have made it read other variables
    run(images, tmp_path / "run", "--run.wandb", "mine", "--train.max-steps", 2)
    (written,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    content = written.read_bytes()
    for word in (b"train/loss_instance", b"augmented views", b"bank_size", b"mine"):
        assert word in content
    run(images, tmp_path / "run", "--train.max-steps", 4)  # the flag may differ when a run goes on
    assert written.read_bytes() == content


def test_weights_and_biases_goes_on_with_the_run_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    wandb: Any = ModuleType("wandb")  # a stand-in
    wandb.Error, wandb.tensorboard = RuntimeError, SimpleNamespace(unpatch=lambda: told.append("unpatched"))
    wandb.init = lambda **options: told.append(options) or nullcontext()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: wandb)
    for folder in ("one", "one", "another"):
        with wandb_beside(tmp_path / folder, "mine", {}):
            pass
    first, again, other = told[::2]
    assert first == again
    assert first["id"] != other["id"]
    assert (first["project"], first["name"], first["resume"]) == ("mine", "one", "allow")
    assert told[1::2] == 3 * ["unpatched"]


def test_weights_and_biases_without_the_package_is_one_line(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find_spec(name))
    with pytest.raises(ConfigError, match=r"--run\.wandb: expected the wandb package.* 'reco-fast\[wandb\]'"):
        run(images, tmp_path / "run", "--run.wandb", "mine")


def test_ranks_that_see_different_run_folders_are_refused(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "all_gather", lambda own: torch.cat([own, own + 5]))
    with pytest.raises(ConfigError, match="a folder that all machines share, ranks found runs at step 0 and 5"):
        run(images, tmp_path / "run")
