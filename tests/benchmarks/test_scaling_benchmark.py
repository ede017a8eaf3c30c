"""Growth: every row is measured as it says. Scaling: the bytes are those that a step really exchanges."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from reco_fast.errors import ConfigError
from reco_fast.method.state import build_state
from reco_fast.method.step import Schedule, draw, train_step
from reco_fast.profiling.benchmarks import growth, scaling
from reco_fast.settings import command_line
from reco_fast.settings.config import Config, DataConfig, LossConfig, ModelConfig, TrainConfig

CPU = torch.device("cpu")


@pytest.fixture
def eight_ranks() -> Any:
    """This process as rank 0 of 8 whose collectives end at once and exchange nothing."""
    fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    dist.init_process_group("fake", store=fake.FakeStore(), rank=0, world_size=8)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("number_bytes", [4, 2])
@pytest.mark.parametrize(
    ("objective", "key_norm", "weak"),
    [
        ("reco", "batch", 32),
        ("moco", "batch", 32),
        ("reco", "shuffle", 32),
        ("reco", "shuffle", 20),
        ("moco", "shuffle", 32),
    ],
)
def test_bytes_are_those_that_a_step_exchanges(
    eight_ranks: None, monkeypatch: pytest.MonkeyPatch, objective: Any, key_norm: Any, weak: int, number_bytes: int
) -> None:
    """On a CPU; and with views and banks of two bytes a number, as on a GPU."""
    config = Config(
        data=DataConfig(image_size=32, weak_size=weak),
        model=ModelConfig(arch="timm/test_resnet", bank_size=64, projection_dim=16, key_norm=key_norm),
        loss=LossConfig(objective=objective),
        train=TrainConfig(batch_size=32, precision="fp32" if number_bytes == 4 else "bf16"),
    )
    state = build_state(config, CPU)
    dtype = torch.float32 if number_bytes == 4 else torch.bfloat16
    state.bank.to(dtype)
    gathered: list[int] = []
    reduced: list[int] = []
    real_gather = dist.all_gather_into_tensor

    def gather(output: Tensor, given: Tensor, *rest: Any, **options: Any) -> Any:
        gathered.append(output.numel() * output.element_size())
        return real_gather(output, given, *rest, **options)

    def reduce(_: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        reduced.append(bucket.buffer().numel() * bucket.buffer().element_size())
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    monkeypatch.setattr(dist, "all_gather_into_tensor", gather)
    state.run_student.register_comm_hook(None, reduce)  # type: ignore[operator]
    given = (torch.randn(4, 3, size, size, dtype=dtype) for size in (32, 32, weak))
    views = tuple(view.to(memory_format=torch.channels_last) for view in given)
    views = views if objective == "reco" else views[:2]
    train_step(state, config, views, draw(0, 4, config, CPU), Schedule(0.1, 1.0, 0.99))
    counted = scaling.traffic(config, sum(p.numel() for p in state.student.parameters()), number_bytes=number_bytes)
    assert sum(reduced) == counted.gradients
    assert sum(gathered) == counted.keys + counted.shuffle
    assert (counted.shuffle > 0) == (key_norm == "shuffle")


def test_the_table_of_a_preset(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    given = "scaling quickstart --loss.global-weight 1 --ranks 4 8 16 --rows 128 --images-per-second 1000 --network 1"
    monkeypatch.setattr(sys, "argv", [*given.split(), "--image-bytes", "1000"])
    assert scaling.main() == 0
    head, _, _, _, four, eight, sixteen = capsys.readouterr().out.splitlines()
    parameters = float(head.split(" M parameters")[0].split()[-1]) * 1e6
    cells = [cell.strip() for cell in eight.strip("|").split("|")]
    assert cells[:2] == ["8", "1,024"]
    assert float(cells[2]) == pytest.approx(parameters * 4 / 1e6, abs=0.2)
    assert cells[3] == f"{2 * 1024 * 128 * 2 / 1e6:.2f}"
    sent = 7 / 8 * (2 * 4 * parameters + 2 * 1024 * 128 * 2)
    assert float(cells[4].split()[0]) == pytest.approx(1e3 * sent / 1e9, abs=0.4)
    assert cells[5:] == ["1", "1%", "8,000", "0.01"]  # K = 1,024 of one batch; m = 0.99
    assert four.split("|")[6].strip() == "2"
    assert "--model.bank-size" in sixteen


@pytest.mark.parametrize(
    ("words", "named"), [(["imagenette"], "imagenette"), (["--ranks", "1"], "--ranks"), (["--rows", "0"], "--rows")]
)
def test_mistakes_name_the_flag(monkeypatch: pytest.MonkeyPatch, words: list[str], named: str) -> None:
    monkeypatch.setattr(sys, "argv", ["scaling", *words])
    with pytest.raises(ConfigError, match=named):
        scaling.main()


def test_rows_change_one_thing_and_keep_the_batch_of_a_rank() -> None:
    given = dataclasses.replace(growth.DEFAULT, batches=(64, 128), banks=(1024,), sizes=(64,), ranks=(1, 2, 4))
    middle, *others = growth.rows(given)
    assert [middle[name] for name in growth.FACTORS] == [128, 16384, 32, 1]
    for row in others:
        differing = {name for name in growth.FACTORS if row[name] != middle[name]}
        assert differing <= {row["changed"], "batch"}
        if row["changed"] == "ranks":
            assert row["batch"] == 128 * int(row["ranks"])
            assert int(row["threads"]) * 4 <= max(4, int(middle["threads"]))
    assert [row["changed"] for row in others] == ["batch", "K", "size", "ranks", "ranks", "ranks"]
    assert growth.rows(dataclasses.replace(given, ranks=(1,))) == [middle, *others[:3]]  # one rank is the middle itself


def test_growth_measures_two_ranks_and_says_what_failed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    words = "growth --model.arch timm/test_resnet --model.bank-size 64 --train.batch-size 16 --train.device cpu"
    words += " --rounds 1 --steps 1 --warmup 1 --batches 128 --banks 64 --sizes 32 --ranks 2"
    monkeypatch.setattr(sys, "argv", [*words.split(), "--output", str(tmp_path)])
    every = growth.rows
    monkeypatch.setattr(growth, "rows", lambda given: every(given)[1:])  # each costs processes of its own
    monkeypatch.setattr(growth, "available_cores", lambda: 2)
    start, started = subprocess.Popen, []

    def watched(line: list[str], **options: Any) -> Any:
        if "--measure" in line:
            ranks = line[line.index("--nproc-per-node") + 1] if "--nproc-per-node" in line else "1"
            started.append((ranks, options["env"].get("OMP_NUM_THREADS")))
        return start(line, **options)

    monkeypatch.setattr(subprocess, "Popen", watched)
    assert growth.main() == 0
    assert started == [("1", "2"), ("2", "1")]  # ranks, threads of each
    report = json.loads((tmp_path / "growth.json").read_text())
    failed, two = report["rows"]
    assert two["images_per_second"] == pytest.approx(32 / two["seconds_per_step"][0])
    assert two["peak_mib"] > 100
    assert "--model.bank-size" in failed["failed"]  # a bank of 64 for a batch of 128
    table = (tmp_path / "growth.md").read_text()
    assert table in capsys.readouterr().out
    assert failed["failed"] in table
    assert "| 2 × " in table
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


def test_growth_beside_a_gpu_times_one_row_at_a_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Rows get ready side by side: each has said so before the first is timed, and no two are timed at once."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(growth, "pick_device", lambda name: torch.device("cuda"))
    seen = tmp_path / "seen"
    # What `growth.measure` does with the machine, without a model.
    program = f"""
import json, time
from reco_fast.profiling.machine import Machine
def note(what):
    with open({str(seen)!r}, "a") as file:
        file.write(what + "\\n")
machine = Machine()
note("ready")
time.sleep(0.2)
with machine.alone():
    note("from")
    time.sleep(0.1)
    note("to")
print(json.dumps(dict(images_per_second=1, seconds_per_step=[1], peak_mib=1, device="none", precision="none")))
"""
    start = subprocess.Popen

    def instead(line: list[str], **options: Any) -> Any:
        return start([sys.executable, "-c", program], **options) if "--measure" in line else start(line, **options)

    monkeypatch.setattr(subprocess, "Popen", instead)
    words = "growth --batches 64 256 --banks 1024 --sizes 32 --ranks 1"
    monkeypatch.setattr(sys, "argv", [*words.split(), "--output", str(tmp_path / "growth")])
    assert growth.main() == 0
    lines = seen.read_text().split()
    assert lines == 4 * ["ready"] + 4 * ["from", "to"]
    report = json.loads((tmp_path / "growth" / "growth.json").read_text())
    assert [(row["changed"], row["batch"], row["K"]) for row in report["rows"]] == [
        ("", 128, 16384), ("batch", 64, 16384), ("batch", 256, 16384), ("K", 128, 1024)
    ]  # fmt: skip


def test_growth_refuses_a_number_below_one(refused: Callable[..., str]) -> None:
    line = refused(lambda: command_line.run(growth.main), "--ranks", 0)
    assert line.startswith("error: --ranks: expected 1 or more")
