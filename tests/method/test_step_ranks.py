"""The step on several ranks: what they send each other, what they draw, and that they agree."""

import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from launchers import ENVIRONMENT, torchrun
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel

from reco_fast.method.state import build_state
from reco_fast.method.step import draw, scheduled, train_step
from reco_fast.settings.config import Config, ModelConfig, TrainConfig

CPU = torch.device("cpu")
CONFIG = Config(
    model=ModelConfig(arch="timm/test_resnet", bank_size=64, projection_dim=16),
    train=TrainConfig(batch_size=16, precision="fp32"),
)


def test_ranks_send_each_other_gradients_and_keys_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No broadcast of batch-norm buffers, the teacher or the banks in a step."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        with monkeypatch.context() as several:
            several.setattr("reco_fast.distributed.world_size", lambda: 2)
            state = build_state(CONFIG, CPU)
        assert isinstance(state.run_student, DistributedDataParallel)
        given = tuple(torch.randn(16, 3, 32, 32).contiguous(memory_format=torch.channels_last) for _ in range(3))
        draws = draw(0, 16, CONFIG, CPU)
        with torch.profiler.profile() as profile:
            train_step(state, CONFIG, given, draws, scheduled(0, 10, CONFIG))
        names = {event.name for event in profile.events() or ()}
        assert any("allreduce" in name for name in names)
        assert not [name for name in names if "broadcast" in name and "c10d" in name]
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("key_norm", ["split", "shuffle"])
def test_draws_differ_from_rank_to_rank_but_for_the_shuffle_of_all(
    key_norm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By global rank: nothing repeats on the next node, whose local ranks are the same."""
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, key_norm=key_norm))
    drawn = []
    monkeypatch.setenv("LOCAL_RANK", "0")
    for rank in range(3):
        monkeypatch.setattr("reco_fast.distributed.rank", lambda rank=rank: rank)
        drawn.append(draw(0, 16, config, CPU)[0])
    for one, other in itertools.combinations(drawn, 2):
        assert not torch.equal(one.permutation, other.permutation)
        assert not torch.equal(one.mix_weights, other.mix_weights)
        assert torch.equal(one.shuffle, other.shuffle) == (key_norm == "shuffle")


WORKER = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import save_file
from reco_fast import distributed
from reco_fast.settings.config import Config, ModelConfig, OptimConfig, TrainConfig
from reco_fast.method.state import build_state
from reco_fast.method.step import Draws, Schedule, train_step
cpu = torch.device("cpu")
torch.set_num_threads(1)
model = ModelConfig(
    arch="timm/test_convnext", stem="standard", bank_size=96, projection_dim=16, teacher_momentum=0.9
)
with distributed.process_group(cpu):
    rank, ranks = distributed.rank(), distributed.world_size()
    for name, optim in json.loads(sys.argv[2]).items():
        config = Config(model=model, optim=OptimConfig(**optim), train=TrainConfig(batch_size=16, precision="fp32"))
        state = build_state(config, cpu)
        losses = []
        for step in range(20):
            generator = torch.Generator().manual_seed(step)
            whole = [torch.randn(16, 3, 32, 32, generator=generator) for _ in range(3)]
            inner = [torch.randperm(8, generator=generator) for _ in range(2)]  # permutations stay in a rank's half
            weights = torch.full((32, 32), 0.5 + 0.02 * step)
            mine = slice(16 // ranks * rank, 16 // ranks * (rank + 1))
            permutation = inner[rank] if ranks == 2 else torch.cat([inner[0], 8 + inner[1]])
            views = tuple(v[mine].contiguous(memory_format=torch.channels_last) for v in whole)
            schedule = Schedule(config.optim.lr, 1.0, 0.99)
            metrics = train_step(state, config, views, [Draws(permutation, weights, None)], schedule)
            losses.append(distributed.sum_over_ranks(metrics[:5].clone()) / ranks)
        result = {"losses": torch.stack(losses)} | {f"student.{n}": t for n, t in state.student.state_dict().items()}
        result |= {f"teacher.{n}": t for n, t in state.teacher.state_dict().items()}
        result |= {f"bank.{n}": t for n, t in state.bank.state_dict().items()}
        path = Path(sys.argv[1]) / f"{name}-{ranks}-{rank}.safetensors"
        save_file({n: t.contiguous() for n, t in result.items()}, path)
"""


def test_one_rank_and_two_agree_over_20_steps(tmp_path: Path) -> None:
    optims = {"sgd": {"lr": 0.1}, "adamw": {"name": "adamw", "lr": 0.001, "clip": 0.1}}
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    # One rank needs no launcher, which would import PyTorch once more.
    alone = subprocess.run(
        [sys.executable, script, tmp_path, json.dumps(optims)], capture_output=True, text=True, env=ENVIRONMENT
    )
    for run in (alone, torchrun(script, tmp_path, json.dumps(optims))):
        assert run.returncode == 0, run.stderr[-3000:]
    for optim in optims:
        one, first, second = (load_file(tmp_path / f"{optim}-{name}.safetensors") for name in ("1-0", "2-0", "2-1"))
        for name, value in one.items():
            said = f"{optim}, {name}"
            torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-4, msg=lambda m, n=said: f"{n}: {m}")
            assert torch.equal(first[name], second[name]), f"{said} differs between the two ranks"
        assert one["losses"][-1, 0] != one["losses"][0, 0]
