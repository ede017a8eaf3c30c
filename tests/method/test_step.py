"""The step: what it computes, and what it must not do."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dispatch import WAITS, Recorder
from torch._dynamo.utils import counters

from reco_fast import train
from reco_fast.method.state import TrainState, build_state
from reco_fast.method.step import (
    METRICS,
    Draws,
    Schedule,
    _clean_rows,
    _feature_health,
    draw,
    mix_pixels,
    mix_weights,
    scheduled,
    train_step,
)
from reco_fast.run import progress
from reco_fast.settings.config import Config, DataConfig, LossConfig, ModelConfig, OptimConfig, TrainConfig
from reco_fast.training import loop

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
    keys: list[torch.Tensor] = []
    state.run_teacher.register_forward_hook(lambda _, __, rows: keys.extend(rows))
    before = state.bank.keys.clone()
    metrics = train_step(state, CONFIG, views(0), draw(0, 16, CONFIG, CPU), scheduled(0, 10, CONFIG))
    assert dict(zip(METRICS, metrics.tolist(), strict=True))["loss_global"] > 0
    assert torch.equal(state.bank.keys[16:], before[16:])
    torch.testing.assert_close(state.bank.keys[:16].norm(dim=1), torch.ones(16))
    for bank, rows in zip((state.bank.keys, state.bank.weak_keys), keys, strict=True):
        torch.testing.assert_close(bank[:16], rows / rows.norm(dim=1, keepdim=True))
    assert state.step == 1
    assert all(parameter.grad is None for parameter in state.student.parameters())
    assert all(parameter.grad is None for parameter in state.teacher.parameters())


@pytest.mark.parametrize("key_norm", ["batch", "split", "shuffle", "ema"])
def test_a_smaller_weak_view_goes_through_the_teacher_at_its_size(key_norm: Any) -> None:
    model = dataclasses.replace(CONFIG.model, key_norm=key_norm, norm_groups=2)
    data, once = DataConfig(image_size=32, weak_size=20), dataclasses.replace(CONFIG.train, accumulate=2)
    config = dataclasses.replace(CONFIG, model=model, data=data, train=once)
    state = build_state(config, CPU)
    seen: dict[str, list[int]] = {"run_student": [], "run_teacher": []}
    for name, sizes in seen.items():
        encoder = getattr(state, name).encoder
        encoder.register_forward_pre_hook(lambda _, given, sizes=sizes: sizes.append(given[0].shape[-1]))
    first, second, weak = views(0)
    given = first, second, torch.nn.functional.avg_pool2d(weak, 13, stride=1)
    assert given[2].is_contiguous(memory_format=torch.channels_last)
    for step in range(2):
        before = state.bank.weak_keys.clone()
        metrics = train_step(state, config, given, draw(step, 16, config, CPU), scheduled(step, 10, config))
        values = dict(zip(METRICS, metrics.tolist(), strict=True))
        assert values["skipped_steps"] == 0
        assert values["loss_global"] > 0
        assert not torch.equal(state.bank.weak_keys, before)
    assert seen == {"run_student": 8 * [32], "run_teacher": 4 * [32, 20]}


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_a_key_that_overflowed_becomes_zeros_and_the_others_stay(value: float) -> None:
    keys = torch.randn(4, 2, 8)
    expected = keys / keys.norm(dim=-1, keepdim=True)
    keys[1, 0, 5], expected[1, 0] = value, 0
    torch.testing.assert_close(_clean_rows(keys), expected)


def test_feature_health_is_what_its_names_say() -> None:
    query, key = torch.randn(12, 8) + 1, torch.randn(12, 8) + 0.5
    q, k = (rows / rows.norm(dim=1, keepdim=True) for rows in (query, key))
    similar = q @ k.T
    others = similar[~torch.eye(12, dtype=torch.bool)]
    expected = (similar.diag().mean(), others.mean(), q.mean(dim=0).norm(), q.std(dim=0, correction=0).mean() * 8**0.5)
    torch.testing.assert_close(_feature_health(query, key), expected)


@pytest.mark.parametrize("objective", ["moco", "reco"])
def test_moco_skips_the_passes_that_only_the_relations_need(objective: str) -> None:
    config = dataclasses.replace(CONFIG, loss=LossConfig(objective=objective))
    state = build_state(config, CPU)
    calls = {"student": 0, "teacher": 0}
    for name, module in (("student", state.run_student.encoder), ("teacher", state.run_teacher.encoder)):
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
            model=dataclasses.replace(CONFIG.model, arch="timm/test_convnext", stem="standard"),
            train=dataclasses.replace(CONFIG.train, accumulate=parts),
        )
        state = build_state(config, CPU)
        mix = torch.full((32, 32), 0.3)
        draws = [Draws(torch.arange(16 // parts).flip(0) ^ 1, mix, None) for _ in range(parts)]
        if parts == 1:
            within = torch.cat([draws[0].permutation[8:], 8 + draws[0].permutation[8:]])
            draws = [Draws(within, mix, None)]
        train_step(state, config, views(0), draws, Schedule(0.1, 1.0, 0.99))
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


ADAMW = OptimConfig("adamw", lr=0.01, clip=0.1)


@pytest.mark.parametrize(
    ("key_norm", "precision", "rows", "view", "optim"),
    [
        ("ema", "fp32", 8, 0, OptimConfig()),
        ("split", "fp32", 16, 1, OptimConfig(clip=0.1)),
        ("batch", "fp32", 8, 2, ADAMW),
        ("batch", "fp16", 2, 1, OptimConfig()),
        ("batch", "fp16", 2, 0, ADAMW),
    ],
)
def test_a_skipped_step_leaves_no_trace(
    key_norm: Any, precision: Any, rows: int, view: int, optim: OptimConfig
) -> None:
    objective = "moco" if precision == "fp16" else "reco"  # fp16 takes seconds a pass on a CPU
    config = dataclasses.replace(
        CONFIG,
        model=dataclasses.replace(CONFIG.model, key_norm=key_norm),
        loss=LossConfig(objective=objective),
        optim=optim,
        train=TrainConfig(batch_size=rows, precision=precision),
    )
    state = build_state(config, CPU)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=precision == "fp16")

    def everything() -> dict[str, torch.Tensor]:
        modules = {"student": state.student, "teacher": state.teacher, "bank": state.bank}
        found = {f"{name}.{key}": v for name, m in modules.items() for key, v in m.state_dict().items()}
        for number, values in enumerate(state.optimizer.state.values()):
            found |= {f"optimizer.{number}.{key}": value for key, value in values.items()}
        return {name: value.clone() for name, value in found.items()}

    def step(given: tuple[torch.Tensor, ...]) -> float:
        given = given[:2] if objective == "moco" else given
        draws, schedule = draw(state.step, rows, config, CPU), scheduled(state.step, 10, config)
        metrics = train_step(state, config, given, draws, schedule)
        return dict(zip(METRICS, metrics.tolist(), strict=True))["skipped_steps"]

    assert step(views(0, rows)) == 0
    before = everything()
    bad = views(1, rows)
    bad[view][1, 1, 4, 5] = float("inf")
    assert step(bad) == 1
    for name, value in everything().items():
        assert torch.equal(value, before[name]), name
    assert step(views(2, rows)) == 0
    changed = {name for name, value in everything().items() if not torch.equal(value, before[name])}
    assert {"bank.position", "student.backbone.bn1.num_batches_tracked"} <= changed
    assert {name.partition(".")[0] for name in changed} == {"student", "teacher", "bank", "optimizer"}


def clipped_step(clip: float | None, scaled: bool, parts: int, by_hand: float | None = None) -> TrainState:
    """A state after a step; `by_hand` cuts the gradients that the optimizer is about to use, without PyTorch's
    functions for that."""
    config = dataclasses.replace(
        CONFIG,
        loss=LossConfig(objective="moco"),
        optim=OptimConfig(clip=clip),
        train=dataclasses.replace(CONFIG.train, accumulate=parts),
    )
    state = build_state(config, CPU)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)

    def cut(optimizer: torch.optim.Optimizer, *_: object) -> None:
        gradients = [p.grad for p in state.student.parameters()]
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm() / state.scaler.get_scale()
        assert norm > 2 * by_hand
        for gradient in gradients:
            gradient.mul_(by_hand / norm)

    if by_hand is not None:
        state.optimizer.register_step_pre_hook(cut)
    metrics = train_step(state, config, views(0)[:2], draw(0, 16, config, CPU), scheduled(0, 10, config))
    assert metrics[-1] == 0
    return state


@pytest.mark.parametrize(("scaled", "parts"), [(False, 1), (False, 2), (True, 2)])
def test_gradients_are_clipped_by_the_norm_of_all_of_them_together(scaled: bool, parts: int) -> None:
    """Of the sum over parts, and without the factor by which a scaler multiplies them."""
    expected = clipped_step(None, scaled, parts, by_hand=0.2)
    found = clipped_step(0.2, scaled, parts)
    for name, value in found.student.state_dict().items():
        torch.testing.assert_close(value, expected.student.state_dict()[name], rtol=1e-5, atol=1e-6, msg=name)
    for one, other in zip(found.optimizer.state.values(), expected.optimizer.state.values(), strict=True):
        torch.testing.assert_close(one["momentum_buffer"], other["momentum_buffer"], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("scaled", [False, True])
def test_a_clip_above_the_norm_changes_no_bit(scaled: bool) -> None:
    expected, found = clipped_step(None, scaled, 1), clipped_step(1e4, scaled, 1)
    assert all(map(torch.equal, expected.student.state_dict().values(), found.student.state_dict().values()))


class Waits:
    """What waits for the device between log lines of a run: from each step on to the next averages or evaluation."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.found: list[str] = []
        self.steps = 0
        self.watching = False
        self.recorder = Recorder(lambda name, *_: self.found.append(name) if self.watching and name in WAITS else None)
        step, averages = loop.train_step, progress.averages
        monkeypatch.setattr(loop, "train_step", lambda *given: self.watch(True, step, *given))
        monkeypatch.setattr(progress, "averages", lambda *given: self.watch(False, averages, *given))

    def watch(self, on: bool, function: Callable[..., Any], *given: Any) -> Any:
        self.watching = on
        self.steps += on
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("error" if on and self.steps > 3 else "default")  # compilation may wait
        return function(*given)


@pytest.mark.parametrize(
    ("device", "loader", "optim"),
    [
        ("cpu", "torch", ""),
        ("cpu", "torch", "--optim.name adamw --optim.lr 0.01 --optim.clip 0.1"),
        ("cuda", "torch", "--optim.name adamw --optim.lr 0.01 --optim.clip 0.1"),
        ("cuda", "torch", ""),
        ("cuda", "dali", ""),
    ],
)
def test_nothing_waits_for_the_device_between_log_lines(
    cifar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, loader: str, optim: str
) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    waits = Waits(monkeypatch)
    small = "cifar10 --model.arch timm/test_resnet --model.bank-size 64 --train.batch-size 16 --model.norm-groups 2"
    often = "--train.no-cuda-graph --train.max-steps 8 --run.log-every 4 --run.checkpoint-minutes 1000 --data.workers 1"
    where = f"--data.path {cifar} --run.dir {tmp_path / 'run'} --train.device {device} --data.loader {loader}"
    with waits.recorder:
        train.train(*train.parse(f"{small} {often} {where} {optim}".split()))
    assert waits.steps == 8
    assert "index_copy_" in waits.recorder.seen
    assert "_local_scalar_dense" in waits.recorder.seen  # the log lines themselves
    assert waits.found == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("key_norm", ["batch", "split"])
def test_a_compiled_step_waits_for_nothing(key_norm: Any) -> None:
    """Without a recorder, under which torch.compile would leave its code and run the encoders eagerly."""
    config = dataclasses.replace(
        CONFIG,
        model=dataclasses.replace(CONFIG.model, key_norm=key_norm, norm_groups=2),
        train=dataclasses.replace(CONFIG.train, precision="bf16", compile=True, cuda_graph=False),
    )
    device = torch.device("cuda", 0)
    torch.compiler.reset()
    counters.clear()
    state = build_state(config, device)
    given = tuple(view.to(device).contiguous(memory_format=torch.channels_last) for view in views(0))
    try:
        for step in range(8):
            if step == 4:  # what compiles, tunes and allocates has done so
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("error")
            metrics = train_step(state, config, given, draw(step, 16, config, device), scheduled(step, 10, config))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert metrics.isfinite().all()
    assert counters["stats"]["unique_graphs"] >= 2  # student and teacher


class Layouts:
    """Activations [n, C > 1, H > 1, W > 1] in another layout than channels-last, by the operator that left them so,
    and convolutions of anything else. `rows` are the sizes of a batch and its groups, no number of channels."""

    def __init__(self, *rows: int) -> None:
        self.rows = rows
        self.broken: list[tuple[str, tuple[int, ...]]] = []
        self.convolutions = 0
        self.recorder = Recorder(self.look)

    def look(self, name: str, given: list[Any], results: list[Any]) -> None:
        convolves = "convolution" in name
        self.convolutions += convolves
        for position, tensor in enumerate([*results, *(given if convolves else ())]):
            if not isinstance(tensor, torch.Tensor) or tensor.dim() != 4 or min(tensor.shape[1:]) == 1:
                continue
            # The pixel mix looks at its images as [n, H, W, 3]: a view, not a layout.
            activation = len(tensor) in self.rows and tensor.shape[3] != 3
            matters = activation or (convolves and position >= len(results))
            if matters and not tensor.is_contiguous(memory_format=torch.channels_last):
                self.broken.append((name, tuple(tensor.shape)))


# The gradient of global mean pooling is a broadcast of one number a channel, which has no layout yet; the ReLU's
# backward pass, the next operator, writes channels-last.
POOLED = {("expand", shape) for shape in ((6, 512, 4, 4), (6, 2048, 2, 2))}
POOLED |= {("div", shape) for _, shape in POOLED}


@pytest.mark.parametrize(
    ("arch", "size", "precision", "key_norm", "layout"),
    [
        ("resnet18", 32, "fp32", "split", torch.channels_last),
        ("resnet18", 32, "bf16", "batch", torch.channels_last),
        ("resnet50", 64, "bf16", "split", torch.channels_last),
        ("resnet18", 32, "fp32", "split", torch.contiguous_format),
    ],
)
def test_activations_weights_and_gradients_stay_channels_last(
    arch: str, size: int, precision: str, key_norm: str, layout: torch.memory_format
) -> None:
    """A whole step; with views in the other layout the walk must find that it is not so."""
    config = Config(
        data=DataConfig(image_size=size),
        model=ModelConfig(arch=arch, stem="small" if size == 32 else "standard", key_norm=key_norm, norm_groups=2),
        train=TrainConfig(batch_size=6, precision=precision),
    )
    state = build_state(config, CPU)
    given = tuple(torch.randn(6, 3, size, size).contiguous(memory_format=layout) for _ in range(3))
    layouts = Layouts(6, 3)
    with layouts.recorder:
        train_step(state, config, given, draw(0, 6, config, CPU), Schedule(0.1, 1.0, 0.99))
    count = sum(isinstance(module, torch.nn.Conv2d) for module in state.student.modules())
    assert layouts.convolutions == count * (2 + 2 + 2)  # the student forward and back, the teacher forward
    if layout is torch.channels_last:
        assert set(layouts.broken) <= POOLED
    else:
        assert len(set(layouts.broken) - POOLED) > 2


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_makes_no_copy_of_a_bank_and_few_passes_over_the_weights(precision: Any) -> None:
    config = dataclasses.replace(
        CONFIG, loss=LossConfig(impl="sdpa"), train=TrainConfig(batch_size=16, precision=precision)
    )
    state = build_state(config, CPU)
    state.run_teacher.encoder.register_forward_hook(
        lambda _, __, keys: teacher.append((torch.is_grad_enabled(), keys.requires_grad))
    )
    teacher: list[tuple[bool, bool]] = []
    banks = {state.bank.keys.data_ptr(), state.bank.weak_keys.data_ptr()}
    copies = []

    def look(name: str, _: list[Any], results: list[Any]) -> None:
        like_a_bank = (t for t in results if isinstance(t, torch.Tensor) and t.shape[-2:] == (64, 16))
        copies.extend(name for tensor in like_a_bank if tensor.data_ptr() not in banks)

    recorder = Recorder(look)
    given, draws = views(0), draw(0, 16, config, CPU)
    with recorder:
        train_step(state, config, given, draws, scheduled(0, 10, config))
    assert copies == []
    assert recorder.seen.count("_fused_sgd_") == 3  # weights with decay and without, and the teacher's average
    assert teacher == [(False, False)] * 2
