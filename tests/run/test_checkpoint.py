"""A checkpoint gives back what was saved, and refuses what is not one."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from reco_fast.errors import ConfigError
from reco_fast.method.state import TrainState, build_state
from reco_fast.method.step import draw, scheduled, train_step
from reco_fast.run import checkpoint
from reco_fast.settings.config import Config, LossConfig, ModelConfig, OptimConfig, TrainConfig

CONFIG = Config(
    model=ModelConfig(arch="timm/test_resnet", bank_size=64, projection_dim=16),
    train=TrainConfig(batch_size=8, precision="fp32"),
)


def save(state: TrainState, directory: Path, progress: dict[str, object]) -> Path:
    with checkpoint.Writer(directory) as writer:
        writer.save(state, progress)
    newest = checkpoint.latest(directory)
    assert newest is not None
    return newest


def trained(steps: int, seed: int = 0, config: Config = CONFIG) -> TrainState:
    state = build_state(config, torch.device("cpu"))
    go_on(state, steps, seed, config)
    return state


def go_on(state: TrainState, steps: int, seed: int = 0, config: Config = CONFIG) -> None:
    for _ in range(steps):
        torch.manual_seed(100 * seed + state.step)
        views = [torch.randn(8, 3, 32, 32).contiguous(memory_format=torch.channels_last) for _ in range(3)]
        views = tuple(views[: 1 + len(config.teacher_sizes)])
        train_step(state, config, views, draw(state.step, 8, config, state.device), scheduled(state.step, 10, config))


@pytest.mark.parametrize(
    ("precision", "key_norm", "optim"),
    [
        ("fp32", "batch", OptimConfig()),
        ("bf16", "batch", OptimConfig()),
        ("bf16", "split", OptimConfig()),
        ("fp32", "batch", OptimConfig("adamw", lr=0.01, clip=0.1)),
    ],
)
def test_training_goes_on_from_a_checkpoint_bit_for_bit(
    tmp_path: Path, precision: Any, key_norm: Any, optim: OptimConfig
) -> None:
    config = dataclasses.replace(
        CONFIG,
        model=dataclasses.replace(CONFIG.model, key_norm=key_norm, norm_groups=2, teacher_momentum=0.5),
        optim=optim,
        train=dataclasses.replace(CONFIG.train, precision=precision),
    )
    straight = trained(5, config=config)
    save(trained(3, config=config), tmp_path, {"note": [0.1, None]})
    resumed = build_state(config, torch.device("cpu"))
    assert checkpoint.load(checkpoint.latest(tmp_path), resumed) == {"note": [0.1, None]}
    assert resumed.step == 3
    go_on(resumed, 2, config=config)
    for a, b in (
        (straight.student, resumed.student),
        (straight.teacher, resumed.teacher),
        (straight.bank, resumed.bank),
    ):
        for name, value in a.state_dict().items():
            assert torch.equal(value, b.state_dict()[name]), name
    for one, other in zip(straight.optimizer.state.values(), resumed.optimizer.state.values(), strict=True):
        assert all(torch.equal(value, other[key]) for key, value in one.items())


def test_the_two_newest_are_kept_and_no_temporary_file(tmp_path: Path) -> None:
    state = trained(0)
    for step in (1, 2, 10):
        state.step = step
        save(state, tmp_path, {})
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "step-000000002.safetensors",
        "step-000000010.safetensors",
    ]
    assert checkpoint.latest(tmp_path).name == "step-000000010.safetensors"


@pytest.mark.parametrize(
    "damage", ["truncated", "flipped byte", "not a checkpoint", "pickle", "other format", "no step", "missing"]
)
def test_damaged_or_foreign_files_are_refused_and_change_nothing(tmp_path: Path, damage: str) -> None:
    path = save(trained(1), tmp_path, {})
    data = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(data[:-100])
    elif damage == "flipped byte":
        data[-1000] ^= 1
        path.write_bytes(data)
    elif damage == "not a checkpoint":
        path.write_text("hello")
    elif damage == "pickle":
        trap = tmp_path / "trap"
        path.write_bytes(b"cos\nsystem\n(S'touch " + bytes(trap) + b"'\ntR.")
    elif damage == "other format":
        save_file({"x": torch.zeros(1)}, path, metadata={"reco_fast": json.dumps({"format": 99})})
    elif damage == "no step":
        save_file({"x": torch.zeros(1)}, path, metadata={"reco_fast": json.dumps({"format": 1, "progress": {}})})
    else:
        path.unlink()
    state = trained(0)
    before = {name: value.clone() for name, value in state.student.state_dict().items()}
    with pytest.raises(ConfigError) as caught:
        checkpoint.load(path, state)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "trap").exists()
    assert all(torch.equal(value, before[name]) for name, value in state.student.state_dict().items())


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    path = save(trained(0), tmp_path, {})
    other = Config(model=ModelConfig(arch="timm/test_resnet", bank_size=128, projection_dim=16), train=CONFIG.train)
    with pytest.raises(ConfigError, match=r"bank\.keys"):
        checkpoint.load(path, build_state(other, torch.device("cpu")))


@pytest.mark.parametrize("loss", [{"keys": "weak"}, {"objective": "moco"}, {"global_weight": 0.0}], ids=str)
def test_a_run_of_one_bank_goes_on_from_a_version_that_had_two(tmp_path: Path, loss: dict[str, Any]) -> None:
    config = dataclasses.replace(CONFIG, loss=LossConfig(**loss))
    straight = build_state(config, torch.device("cpu"))
    go_on(straight, 1, config=config)
    tensors, _ = checkpoint.read(save(straight, tmp_path, {}))
    assert "bank.weak_keys" not in tensors
    straight.bank.weak_keys = torch.randn(64, 16)
    path = save(straight, tmp_path, {})
    straight.bank.weak_keys = None
    resumed = build_state(config, torch.device("cpu"))
    checkpoint.load(path, resumed)
    for state in (straight, resumed):
        go_on(state, 1, config=config)
    assert all(map(torch.equal, straight.student.parameters(), resumed.student.parameters()))
    assert torch.equal(straight.bank.keys, resumed.bank.keys)


def test_a_run_goes_on_upon_a_device_that_keeps_its_banks_in_another_type(tmp_path: Path) -> None:
    state = trained(1)
    state.bank.to(torch.bfloat16)
    path = save(state, tmp_path, {})
    resumed = build_state(CONFIG, torch.device("cpu"))
    checkpoint.load(path, resumed)
    for name in ("keys", "weak_keys"):
        assert torch.equal(getattr(resumed.bank, name), getattr(state.bank, name).float())
    go_on(resumed, 1)
    state.student.to(torch.bfloat16)  # and of all else another type is another model
    with pytest.raises(ConfigError, match=r"expected student\.\S+ as torch\.float32 .*, got torch\.bfloat16"):
        checkpoint.load(save(state, tmp_path, {}), resumed)


def test_what_changes_after_save_is_not_in_it(tmp_path: Path) -> None:
    state = trained(0)
    before = state.student.projector[0].weight.detach().clone()
    with checkpoint.Writer(tmp_path) as writer:
        writer.save(state, {})
        go_on(state, 1)
    fresh = build_state(CONFIG, torch.device("cpu"))
    checkpoint.load(checkpoint.latest(tmp_path), fresh)
    assert torch.equal(fresh.student.projector[0].weight, before)


def test_a_failed_write_is_one_line_and_keeps_the_last_good_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = trained(0)
    good = save(state, tmp_path, {})

    def full(*args: object, **kwargs: object) -> None:
        (tmp_path / "step-000000005.tmp").touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    state.step = 5
    with pytest.raises(ConfigError, match="No space left on device"), checkpoint.Writer(tmp_path) as writer:
        writer.save(state, {})
    assert list(tmp_path.iterdir()) == [good]
    checkpoint.load(good, state)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("step", -1),
        ("step", 2**60),
        ("step", 3.0),
        ("step", True),
        ("scaler", []),
        ("scaler", {"scale": "x"}),
        ("scaler", {"scale": float("nan")}),
        ("progress", [1]),
        ("crc32", None),
        ("crc32", "0"),
        ("another", 1),
    ],
)
def test_a_header_field_of_a_wrong_type_is_one_line(field: str, value: object, tmp_path: Path) -> None:
    header = {"format": 1, "step": 0, "scaler": {}, "progress": {}, "crc32": 0, field: value}
    save_file({"x": torch.zeros(1)}, tmp_path / "c.safetensors", metadata={"reco_fast": json.dumps(header)})
    with pytest.raises(ConfigError, match="in its header") as caught:
        checkpoint.read(tmp_path / "c.safetensors")
    assert field in str(caught.value)


def test_what_is_no_checkpoint_of_ours_is_not_the_latest(tmp_path: Path) -> None:
    good = tmp_path / "step-000000002.safetensors"
    good.touch()
    (tmp_path / "step-zzz.safetensors").touch()
    (tmp_path / "step-000000009.safetensors").mkdir()
    os.mkfifo(tmp_path / "step-000000010.safetensors")
    assert checkpoint.latest(tmp_path) == good
