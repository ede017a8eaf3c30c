"""The step: what it computes, and that ranks agree."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from reco_fast.config import Config, LossConfig, ModelConfig, TrainConfig
from reco_fast.state import build_state
from reco_fast.step import METRICS, Draws, Schedule, draw, mix_pixels, mix_weights, scheduled, train_step

CPU = torch.device("cpu")
CONFIG = Config(
    model=ModelConfig(arch="timm/test_resnet", bank_size=64, projection_dim=16),
    train=TrainConfig(batch_size=16, precision="fp32"),
)


def views(seed: int, rows: int = 16) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(rows, 3, 32, 32, generator=generator).contiguous(memory_format=torch.channels_last)
        for _ in range(3)
    )


@pytest.mark.parametrize("mix", ["cutmix", "mixup", "both"])
def test_mix_weights_are_a_box_or_a_constant_and_their_mean_is_lambda(mix: str) -> None:
    rng = np.random.default_rng(0)
    means, kinds = [], set()
    for _ in range(400):
        weights = mix_weights(rng, LossConfig(mix=mix), 32)
        means.append(weights.mean())
        box = np.argwhere(weights == 0)
        if len(np.unique(weights)) == 1 and not np.isin(weights[0, 0], (0, 1)):
            kinds.add("mixup")
        elif len(box):
            kinds.add("cutmix")
            assert weights.sum() == 32 * 32 - np.prod(np.ptp(box, axis=0) + 1)  # one full rectangle
    assert kinds == ({"cutmix", "mixup"} if mix == "both" else {mix})
    assert 0.4 < np.mean(means) < 0.75  # Beta(1, 1); clipping at the border makes cutmix boxes smaller


def test_mix_pixels_pastes_from_the_other_view_and_stays_channels_last() -> None:
    first, second, _ = views(0)
    weights = torch.ones(32, 32)
    weights[4:10, 20:] = 0
    permutation = torch.randperm(16)
    mixed = mix_pixels(first, second, Draws(permutation, weights, None))
    expected = first.clone()
    expected[:, :, 4:10, 20:] = second[permutation][:, :, 4:10, 20:]
    torch.testing.assert_close(mixed, expected)
    assert mixed.is_contiguous(memory_format=torch.channels_last)


def test_draws_follow_from_seed_and_step() -> None:
    a, b, c = draw(3, 16, CONFIG, CPU), draw(3, 16, CONFIG, CPU), draw(4, 16, CONFIG, CPU)
    assert torch.equal(a[0].permutation, b[0].permutation)
    assert torch.equal(a[0].mix_weights, b[0].mix_weights)
    assert not torch.equal(a[0].permutation, c[0].permutation)


def test_keys_of_the_step_reach_both_banks_after_the_loss() -> None:
    state = build_state(CONFIG, CPU)
    before = state.bank.keys.clone()
    metrics = train_step(state, CONFIG, views(0), draw(0, 16, CONFIG, CPU), scheduled(0, 10, CONFIG))
    assert dict(zip(METRICS, metrics.tolist(), strict=True))["loss_global"] > 0
    assert torch.equal(state.bank.keys[16:], before[16:])
    torch.testing.assert_close(state.bank.keys[:16].norm(dim=1), torch.ones(16))
    assert not torch.equal(state.bank.keys[:16], state.bank.weak_keys[:16])
    assert state.step == 1
    assert all(parameter.grad is None for parameter in state.student.parameters())
    assert all(parameter.grad is None for parameter in state.teacher.parameters())


@pytest.mark.parametrize("objective", ["moco", "reco"])
def test_moco_skips_the_passes_that_only_the_relations_need(objective: str) -> None:
    config = dataclasses.replace(CONFIG, loss=LossConfig(objective=objective))
    state = build_state(config, CPU)
    calls = {"student": 0, "teacher": 0}
    for name in calls:
        module = getattr(state, name)
        module.register_forward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    given = views(0) if objective == "reco" else views(0)[:2]
    metrics = train_step(state, config, given, draw(0, 16, config, CPU), scheduled(0, 10, config))
    values = dict(zip(METRICS, metrics.tolist(), strict=True))
    if objective == "moco":
        assert calls == {"student": 1, "teacher": 1}
        assert values["loss"] == values["loss_instance"]
        assert values["loss_global"] == values["loss_local"] == 0
    else:
        assert calls == {"student": 2, "teacher": 2}


def test_accumulated_parts_sum_to_the_gradient_of_the_batch() -> None:
    # Layer norm instead of batch norm, so that parts do not change the statistics; one permutation within parts.
    weights = {}
    for parts in (1, 2):
        config = dataclasses.replace(
            CONFIG,
            model=dataclasses.replace(CONFIG.model, arch="timm/test_convnext"),
            train=dataclasses.replace(CONFIG.train, accumulate=parts),
        )
        state = build_state(config, CPU)
        mix = torch.full((32, 32), 0.3)
        draws = [Draws(torch.arange(16 // parts).flip(0) ^ 1, mix, None) for _ in range(parts)]
        if parts == 1:
            within = torch.cat([draws[0].permutation[8:], 8 + draws[0].permutation[8:]])
            draws = [Draws(within, mix, None)]
        train_step(state, config, views(0), draws, Schedule(0.1, 1.0))
        weights[parts] = torch.cat([p.detach().flatten() for p in state.student.parameters()])
    torch.testing.assert_close(weights[1], weights[2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_trains(precision: str) -> None:
    config = dataclasses.replace(
        CONFIG, loss=LossConfig(objective="moco"), train=TrainConfig(batch_size=2, precision=precision)
    )
    state = build_state(config, CPU)
    first = torch.cat([p.detach().flatten() for p in state.student.parameters()])
    for step in range(3):  # in fp16 the first scale overflows and that step is skipped
        metrics = train_step(state, config, views(0, 2)[:2], draw(step, 2, config, CPU), scheduled(step, 10, config))
    last = torch.cat([p.detach().flatten() for p in state.student.parameters()])
    assert metrics.isfinite().all()
    assert last.isfinite().all()
    assert not torch.equal(first, last)


def test_nothing_in_a_step_waits_for_the_device() -> None:
    """`.item()`, `int(tensor)`, `if tensor` and data-dependent shapes all reach one of these operators."""
    waits = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal")

    class Recorder(TorchDispatchMode):
        seen: ClassVar[list[str]] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.seen.append(func._schema.name.removeprefix("aten::"))
            return func(*args, **(kwargs or {}))

    state = build_state(CONFIG, CPU)
    given, draws = views(0), draw(0, 16, CONFIG, CPU)
    with Recorder():
        train_step(state, CONFIG, given, draws, scheduled(0, 10, CONFIG))
    assert "index_copy_" in Recorder.seen
    assert not [name for name in Recorder.seen if name in waits]


WORKER = """
import dataclasses, os, sys, torch
from pathlib import Path
from reco_fast import distributed
from reco_fast.config import Config, ModelConfig, TrainConfig
from reco_fast.state import build_state
from reco_fast.step import Draws, Schedule, train_step
config = Config(model=ModelConfig(arch="timm/test_convnext", bank_size=96, projection_dim=16, teacher_momentum=0.9),
                train=TrainConfig(batch_size=16, precision="fp32"))
cpu = torch.device("cpu")
torch.set_num_threads(1)
with distributed.process_group(cpu):
    rank, ranks = distributed.rank(), distributed.world_size()
    state = build_state(config, cpu)
    losses = []
    for step in range(20):
        generator = torch.Generator().manual_seed(step)
        whole = [torch.randn(16, 3, 32, 32, generator=generator) for _ in range(3)]
        inner = [torch.randperm(8, generator=generator) for _ in range(2)]  # permutations stay within a rank's half
        weights = torch.full((32, 32), 0.5 + 0.02 * step)
        mine = slice(16 // ranks * rank, 16 // ranks * (rank + 1))
        permutation = inner[rank] if ranks == 2 else torch.cat([inner[0], 8 + inner[1]])
        views = tuple(v[mine].contiguous(memory_format=torch.channels_last) for v in whole)
        metrics = train_step(state, config, views, [Draws(permutation, weights, None)], Schedule(0.1, 1.0))
        losses.append(distributed.sum_over_ranks(metrics[:5].clone()) / ranks)
    result = {"losses": torch.stack(losses)} | {f"student.{n}": t for n, t in state.student.state_dict().items()}
    result |= {f"teacher.{n}": t for n, t in state.teacher.state_dict().items()}
    result |= {f"bank.{n}": t for n, t in state.bank.state_dict().items()}
    from safetensors.torch import save_file
    save_file({n: t.contiguous() for n, t in result.items()}, Path(sys.argv[1]) / f"{ranks}-{rank}.safetensors")
"""


def test_one_rank_and_two_agree_over_20_steps(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    for ranks in (1, 2):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        run = subprocess.run(
            [*launcher, str(script), str(tmp_path)],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=False,
        )
        assert run.returncode == 0, run.stderr[-3000:]
    one, first, second = (load_file(tmp_path / f"{name}.safetensors") for name in ("1-0", "2-0", "2-1"))
    for name, value in one.items():
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
        assert torch.equal(first[name], second[name]), f"{name} differs between the two ranks"
    assert one["losses"][-1, 0] != one["losses"][0, 0]
