"""Batch norm of groups in one pass, and what the running modules share with those that are saved."""

import copy
import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from dispatch import Recorder
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn

from reco_fast.method import state as state_module
from reco_fast.method.model import build_encoder
from reco_fast.method.norms import NormBuffers, batch_norms, can_group, use_groups
from reco_fast.method.passes import (
    InGroups,
    Passes,
    RunningTeacher,
    follow_mode,
    running_student,
    running_teacher,
    teacher_forward,
)
from reco_fast.method.state import TrainState, build_state
from reco_fast.method.step import _apply_gradients, draw, scheduled, train_step
from reco_fast.settings.config import Config, DataConfig, ModelConfig, TrainConfig

CPU = torch.device("cpu")


def channels_last(*shape: int, seed: int = 0) -> Tensor:
    images = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return images.contiguous(memory_format=torch.channels_last)


def in_a_loop(module: nn.Module, x: Tensor, groups: int, views: int = 1) -> Tensor:
    """The definition: a call for each group of each view."""
    return torch.cat([module(part) for view in x.chunk(views) for part in view.chunk(groups)])


def error(got: Tensor, expected: Tensor) -> float:
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).norm() / expected.norm())


def scattered(norm: nn.Module) -> nn.Module:
    """With weights and averages that are not those of the beginning."""
    torch.manual_seed(1)
    with torch.no_grad():
        for value in (*norm.parameters(), *(b for b in norm.buffers() if b.dim() == 1)):
            value.copy_(torch.rand_like(value) + 0.5)
    return norm


@pytest.mark.parametrize("plain", [False, True], ids=["eager", "as on a GPU"])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.BatchNorm2d(8), (12, 8, 32, 24)),  # from 1,024 values a group and channel on, another operator
        (lambda: nn.BatchNorm2d(8, momentum=0.3, eps=1e-3), (12, 8, 3, 5)),
        (lambda: nn.BatchNorm2d(8), (11, 8, 32, 24)),  # groups of 4, 4 and 3
        (lambda: nn.BatchNorm2d(8), (4, 8, 32, 24)),  # chunk(3) makes two of 4
        (lambda: nn.BatchNorm2d(8, affine=False), (12, 8, 32, 24)),
        (lambda: nn.BatchNorm2d(8, track_running_stats=False), (12, 8, 32, 24)),
        (lambda: nn.BatchNorm1d(8), (12, 8)),
        (lambda: nn.BatchNorm1d(8), (12, 8, 7)),
        (lambda: BatchNormAct2d(8), (12, 8, 32, 24)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("groups", "views"), [(3, 1), (3, 2), (1, 2)])
def test_groups_in_one_pass_are_those_of_a_loop(
    make: Callable[[], nn.Module],
    shape: tuple[int, ...],
    groups: int,
    views: int,
    dtype: torch.dtype,
    plain: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if plain:
        monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)
    loop = scattered(make())
    grouped = copy.deepcopy(loop)
    assert can_group(nn.Sequential(grouped))
    use_groups(grouped, groups, views)
    x = 3 + 2 * torch.randn(views * shape[0], *shape[1:], generator=torch.Generator().manual_seed(0))
    x[: shape[0]] *= 1.5
    x = x.to(dtype).contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.to(dtype)
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    expected, got = in_a_loop(loop, inputs[0], groups, views), grouped(inputs[1])
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(got, expected, **tolerance)
    expected.backward(upstream), got.backward(upstream)
    bound = 1e-5 if dtype == torch.float32 else 1e-2
    assert error(inputs[1].grad, inputs[0].grad) < bound
    for one, other in zip(grouped.parameters(), loop.parameters(), strict=True):
        assert error(one.grad, other.grad) < bound
    assert got.dtype == dtype
    assert x.dim() < 4 or got.is_contiguous(memory_format=torch.channels_last)
    for name in ("running_mean", "running_var"):
        one, other = getattr(grouped, name), getattr(loop, name)
        assert one is other is None or torch.allclose(one, other, rtol=bound / 10, atol=1e-5)
        assert one is None or not one.requires_grad
    loop.eval(), grouped.eval()
    torch.testing.assert_close(grouped(x.float()), loop(x.float()), rtol=1e-4, atol=1e-4)


def of_an_arch(
    arch: str, size: int, precision: torch.dtype = torch.float32, key_norm: str = "split", views: int = 1
) -> tuple[nn.Module, RunningTeacher]:
    config = ModelConfig(arch=arch, projection_dim=16, key_norm=key_norm, norm_groups=4)
    torch.manual_seed(0)
    teacher = build_encoder(config, size).to(memory_format=torch.channels_last).requires_grad_(False)
    follow_mode(teacher, key_norm)
    return teacher, running_teacher(teacher, config, precision, size, views)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize(
    ("arch", "size", "rows"),
    [
        ("timm/test_resnet", 32, 32),
        ("timm/test_resnet", 32, 18),
        ("resnet18", 32, 16),
        ("resnet50", 32, 8),
        ("timm/test_efficientnet", 64, 16),  # norm and activation in one module
    ],
)
def test_the_split_teacher_runs_once_a_view_or_once_and_its_keys_and_averages_stay(
    arch: str, size: int, rows: int, together: bool
) -> None:
    teacher, running = of_an_arch(arch, size, views=1 + together)
    assert running.together == together
    before = copy.deepcopy(teacher)
    views, shuffle = tuple(channels_last(rows, 3, size, size, seed=seed) for seed in (0, 1)), torch.randperm(rows)
    calls: list[int] = []
    running.module.register_forward_hook(lambda *_: calls.append(1))
    first = next(m for m in running.module.modules() if isinstance(m, nn.Conv2d))
    first.register_forward_hook(lambda *_: calls.append(2))
    with torch.no_grad():
        passes = Passes(running.module, together=together)
        keys = torch.stack(teacher_forward(passes, views, "split", shuffle))
        expected = torch.empty_like(keys)
        for view, rows_of_view in zip(views, expected, strict=True):
            rows_of_view[shuffle] = in_a_loop(before, view[shuffle], 4)
    assert sorted(calls) == [1, 2] if together else [1, 1, 2, 2]
    assert arch != "timm/test_efficientnet" or any(isinstance(n, BatchNormAct2d) for n in batch_norms(teacher))
    torch.testing.assert_close(keys, expected, rtol=1e-3, atol=1e-4)
    for one, other in zip(batch_norms(teacher), batch_norms(before), strict=True):
        torch.testing.assert_close(one.running_mean, other.running_mean, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(one.running_var, other.running_var, rtol=1e-3, atol=1e-4)
    whole = teacher_forward(Passes(teacher, together=False), views, "batch", None)
    assert not torch.allclose(keys, torch.stack(whole), atol=1e-2)


@pytest.mark.parametrize(
    ("arch", "size", "can"),
    [
        ("resnet18", 32, True),
        ("timm/test_efficientnet", 64, True),  # norm and activation in one module
        ("timm/test_vit", 64, True),  # no batch norm
        ("timm/levit_128s", 224, False),  # batch norms over tokens: no row an image
    ],
)
@pytest.mark.parametrize(("groups", "views"), [(1, 2), (3, 1), (3, 2)])
def test_the_student_is_the_student_on_each_group_of_each_view(
    arch: str, size: int, can: bool, groups: int, views: int
) -> None:
    torch.manual_seed(0)
    norm: Any = "batch" if groups == 1 else "split"
    config = ModelConfig(arch=arch, projection_dim=16, query_norm=norm, norm_groups=max(2, groups))
    student = build_encoder(config, size).to(memory_format=torch.channels_last)
    alone = copy.deepcopy(student).double()  # in float32 a ReLU here and there falls to the other side
    running = running_student(student, config, size, views)
    assert (running.together, isinstance(running.module, InGroups)) == (can and views > 1, not can and groups > 1)
    passes = Passes(running.module, together=running.together).double()
    images = [channels_last(8, 3, size, size, seed=seed).double() + seed for seed in range(views)]  # 3, 3 and 2
    upstream = torch.randn(views, 8, 16).double()
    got = torch.stack(passes(*images))
    expected = torch.stack([in_a_loop(alone, view, groups) for view in images])
    assert error(got, expected) < 1e-8
    got.backward(upstream), expected.backward(upstream)
    gradients = [torch.cat([p.grad.flatten() for p in module.parameters()]) for module in (student, alone)]
    assert error(*gradients) < 1e-6
    for one, other in zip(batch_norms(passes), batch_norms(alone), strict=True):
        torch.testing.assert_close(one.running_mean, other.running_mean)
        torch.testing.assert_close(one.running_var, other.running_var)


class Doubled(nn.BatchNorm2d):
    """A norm that nobody knows."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class RowsOfPixels(nn.Module):
    """A norm over [n·H·W, C]: more rows than images."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1).flatten(0, 2)).view(len(x), -1).unflatten(1, (-1, 4)).mean(1)


@pytest.mark.parametrize("norm", [lambda: nn.Sequential(Doubled(4), nn.Flatten()), RowsOfPixels])
def test_a_norm_that_cannot_be_grouped_gets_a_loop(norm: Callable[[], nn.Module]) -> None:
    teacher = nn.Sequential(nn.Conv2d(3, 4, 3), norm()).requires_grad_(False)
    follow_mode(teacher, "split")
    config = ModelConfig(key_norm="split", norm_groups=3)
    running = running_teacher(teacher, config, torch.float32, 8)
    assert isinstance(running.module, InGroups)
    before, images = copy.deepcopy(teacher), channels_last(8, 3, 8, 8)
    torch.testing.assert_close(running.module(images), in_a_loop(before, images, 3))


class LeavesAutocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.linear(x.float().mean(dim=(2, 3)))


def test_a_network_that_leaves_autocast_keeps_its_weights() -> None:
    teacher = LeavesAutocast().requires_grad_(False)
    running = running_teacher(teacher, ModelConfig(), torch.bfloat16, 8)
    assert running.copies == []
    assert running.module.linear.weight is teacher.linear.weight


@pytest.mark.parametrize("key_norm", ["batch", "split", "ema"])
def test_the_running_teacher_shares_all_but_weights_in_the_runs_precision(key_norm: str) -> None:
    teacher, plain = of_an_arch("timm/test_efficientnet", 32, key_norm=key_norm)
    own = {id(t) for t in (*teacher.parameters(), *teacher.buffers())}
    assert {id(t) for t in plain.module.parameters()} <= own
    assert plain.copies == []
    _, low = of_an_arch("timm/test_efficientnet", 32, torch.bfloat16, key_norm)
    for name, value in low.module.named_parameters():
        module = low.module.get_submodule(name.rpartition(".")[0])
        assert value.dtype == (torch.float32 if isinstance(module, nn.BatchNorm2d) else torch.bfloat16), name
        assert value.dim() < 4 or value.is_contiguous(memory_format=torch.channels_last), name
    assert len(low.copies) == sum(p.dtype == torch.bfloat16 for p in low.module.parameters())
    modes = {type(m).__name__: m.training for m in low.module.modules()}
    assert [n.training for n in batch_norms(low.module)] == len(batch_norms(teacher)) * [key_norm != "ema"]
    assert not modes["Conv2d"]


def small(precision: str = "fp32", key_norm: str = "split", arch: str = "timm/test_resnet") -> Config:
    return Config(
        data=DataConfig(image_size=32),
        model=ModelConfig(arch=arch, bank_size=64, projection_dim=16, key_norm=key_norm, norm_groups=2),
        train=TrainConfig(batch_size=8, precision=precision),
    )


def step(state: TrainState, config: Config, *, bad: bool = False) -> None:
    sizes = (32, 32, config.data.weak_side)
    views = tuple(channels_last(8, 3, side, side, seed=10 * state.step + n) for n, side in enumerate(sizes))
    if bad:
        views[0][0, 0, 0, 0] = torch.inf
    train_step(state, config, views, draw(state.step, 8, config, CPU), scheduled(state.step, 10, config))


def test_the_teachers_weights_are_cast_once_a_step_and_follow_it() -> None:
    config = small("bf16")
    state = build_state(config, CPU)
    masters = {p.data_ptr() for p in state.teacher.parameters() if p.dim() > 1}
    casts: list[str] = []

    def look(name: str, given: list[object], _: list[object]) -> None:
        if name in ("_to_copy", "_foreach_copy_"):
            casts.extend(name for t in given if isinstance(t, Tensor) and t.data_ptr() in masters)

    for bad in (False, True):
        casts.clear()
        with Recorder(look):
            step(state, config, bad=bad)
        assert casts == len(masters) * ["_foreach_copy_"]
        running = dict(state.run_teacher.encoder.named_parameters())
        for name, value in state.teacher.named_parameters():
            assert torch.equal(running[name], value.to(running[name].dtype)), name
    assert not torch.equal(state.teacher.projector[0].weight, state.student.projector[0].weight)


@pytest.mark.parametrize(
    ("key_norm", "query_norm", "loss", "student_batches", "teacher_batches"),
    [
        ("batch", "batch", {}, 2, 2),
        ("split", "batch", {}, 2, 4),
        ("ema", "batch", {}, 2, 0),
        ("batch", "split", {}, 4, 2),
        ("batch", "split", {"mix_share": 0.5, "mix_within": True}, 2, 2),
    ],
)
def test_batches_are_counted_once_a_step_and_not_in_a_skipped_one(
    key_norm: str, query_norm: Any, loss: dict[str, Any], student_batches: int, teacher_batches: int
) -> None:
    config = small(key_norm=key_norm)
    model = dataclasses.replace(config.model, query_norm=query_norm)
    config = dataclasses.replace(config, model=model, loss=dataclasses.replace(config.loss, **loss))
    state = build_state(config, CPU)
    fresh = build_encoder(config.model, 32).state_dict()
    counts = {t.data_ptr() for m in (state.student, state.teacher) for t in m.buffers() if t.dim() == 0}
    counting: list[str] = []

    def look(name: str, given: list[object], _: list[object]) -> None:
        counting.extend([name][: any(isinstance(t, Tensor) and t.data_ptr() in counts for t in given)])

    for bad in (False, True):
        counting.clear()
        with Recorder(look):
            step(state, config, bad=bad)
        assert counting == (1 if key_norm == "ema" else 2) * ["_foreach_add_"]
        for module, batches in ((state.student, student_batches), (state.teacher, teacher_batches)):
            assert list(module.state_dict()) == list(fresh)
            found = [int(t) for name, t in module.state_dict().items() if name.endswith("num_batches_tracked")]
            assert found == len(batch_norms(module)) * [batches]


def test_keeping_and_restoring_averages_takes_a_few_operators_whatever_the_layers() -> None:
    student, teacher = nn.Sequential(*(nn.BatchNorm2d(4) for _ in range(50))), nn.BatchNorm2d(4)
    buffers = NormBuffers(student, teacher.eval())
    recorder = Recorder()
    with recorder:
        before = buffers.copy()
    for norm in student:
        norm.running_mean.fill_(torch.nan)
    with recorder:
        buffers.restore(before, torch.tensor(0.0))
        assert all(norm.running_mean.isnan().all() for norm in student)
        buffers.restore(before, torch.tensor(1.0))
    assert all(torch.equal(norm.running_mean, torch.zeros(4)) for norm in student)
    assert len([name for name in recorder.seen if name not in ("isnan", "all", "ne", "_local_scalar_dense")]) <= 12


@pytest.mark.parametrize("value", [torch.nan, -torch.inf, 1e38])
def test_whether_gradients_are_finite_is_one_operator_over_all_of_them(value: float) -> None:
    config = small(arch="resnet18", key_norm="batch")
    state = build_state(config, CPU)
    for parameter in state.student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    state.student.projector[2].bias.grad[3] = value
    before = state.student.projector[2].bias.detach().clone()
    recorder = Recorder()
    with recorder:
        skipped = _apply_gradients(state, None)
    assert float(skipped) == (value != 1e38)
    assert torch.equal(state.student.projector[2].bias, before) == (value != 1e38)
    assert recorder.seen.count("_amp_foreach_non_finite_check_and_unscale_") == 1
    assert len([name for name in recorder.seen if "::" not in name]) <= 8  # without the profiler's


def test_a_compiled_step_has_static_code_for_a_smaller_weak_view(monkeypatch: pytest.MonkeyPatch) -> None:
    symbols: list[bool] = []  # of each compiled graph: whether it is for any size

    def backend(graph: torch.fx.GraphModule, given: list[object]) -> Callable[..., object]:
        symbols.append(any(isinstance(each, torch.SymInt) for each in given))
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(
        state_module.torch, "compile", lambda module, options, **given: compile_(module, backend=backend, **given)
    )
    torch.compiler.reset()
    config = small()
    data, compiled = DataConfig(image_size=32, weak_size=24), dataclasses.replace(config.train, compile=True)
    config = dataclasses.replace(config, data=data, train=compiled)
    state = build_state(config, CPU)
    calls: list[tuple[int, ...]] = []
    for passes in (state.run_student, state.run_teacher):
        passes.encoder.register_forward_hook(lambda _, given, __: calls.append(given[0].shape))
    for _ in range(2):
        step(state, config)
    assert calls == 2 * [(8, 3, 32, 32), (8, 3, 24, 24), (16, 3, 32, 32)]
    assert symbols == 3 * [False]


def test_a_compiled_step_takes_both_views_in_one_pass_and_is_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_ = partial(torch.compile, backend="aot_eager")  # traced as for any compiler, without one's minutes
    monkeypatch.setattr(state_module.torch, "compile", compile_)
    torch.compiler.reset()
    results = {}
    for compiled in (False, True):
        config = small(arch="timm/test_efficientnet")
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, compile=compiled))
        state = build_state(config, CPU)
        calls: list[int] = []
        for passes in (state.run_student, state.run_teacher):
            passes.encoder.register_forward_hook(lambda _, given, __, calls=calls: calls.append(len(given[0])))
        for _ in range(2):
            step(state, config)
        assert calls[:4] == [16, 16, 16, 16] if compiled else [8, 8, 8, 8]
        modules = {"student": state.student, "teacher": state.teacher, "bank": state.bank}
        results[compiled] = {f"{n}.{k}": v for n, m in modules.items() for k, v in m.state_dict().items()}
    for name, value in results[False].items():
        torch.testing.assert_close(results[True][name], value, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
