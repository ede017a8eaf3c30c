"""Parameter groups, LARS and schedules."""

import copy
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt

from reco_fast.errors import ConfigError
from reco_fast.method.model import Encoder, build_encoder
from reco_fast.method.optim import (
    LARS,
    build_optimizer,
    learning_rate,
    optimizer_name,
    ramp,
    set_learning_rate,
    teacher_momentum,
)
from reco_fast.method.parts import freeze_parts
from reco_fast.method.state import TrainState, build_state, check_device
from reco_fast.method.step import draw, scheduled, train_step
from reco_fast.run import checkpoint
from reco_fast.settings.config import Config, ModelConfig, OptimConfig, TrainConfig


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


@pytest.mark.parametrize(("decay_all", "expected"), [(False, 0.0), (True, 0.1)])
def test_norm_and_bias_parameters_are_not_decayed_unless_asked(decay_all: bool, expected: float) -> None:
    optimizer = build_optimizer(model(), OptimConfig(weight_decay=0.1, decay_all=decay_all))
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.1 if parameter.dim() > 1 else expected)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 6


def vit() -> nn.Module:
    torch.manual_seed(0)
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1}
    return timm.create_model("vit_tiny_patch16_224", num_classes=0, reg_tokens=2, init_values=0.1, **size)


def swin() -> nn.Module:
    size = {"img_size": 32, "window_size": 4, "embed_dim": 8, "depths": (1,), "num_heads": (2,)}
    return timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, **size)


BLOCK = ("attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")


@pytest.mark.parametrize(
    ("backbone", "decaying", "others"),
    [
        (
            vit,
            {"patch_embed.proj.weight", *(f"blocks.0.{name}" for name in BLOCK)},
            {"cls_token", "reg_token", "pos_embed", "norm.weight", "blocks.0.ls1.gamma"},
        ),
        (
            swin,
            {"patch_embed.proj.weight", *(f"layers.0.blocks.0.{name}" for name in BLOCK)},
            {"layers.0.blocks.0.attn.relative_position_bias_table", "norm.weight"},
        ),
        (
            lambda: timm.create_model("convnext_atto", num_classes=0, depths=(1, 1, 1, 1), dims=(4, 8, 8, 8)),
            {"stem.0.weight", *(f"stages.{n}.downsample.1.weight" for n in (1, 2, 3))}
            | {f"stages.{n}.blocks.0.{name}.weight" for n in range(4) for name in ("conv_dw", "mlp.fc1", "mlp.fc2")},
            {"stem.1.weight", "stages.0.blocks.0.gamma", "stages.0.blocks.0.norm.weight"},
        ),
        (
            lambda: ConvNeXt([CNBlockConfig(8, None, 2)], num_classes=2),
            {"features.0.0.weight", "classifier.2.weight"}
            | {f"features.1.{n}.block.{layer}.weight" for n in (0, 1) for layer in (0, 3, 5)},
            {"features.1.0.layer_scale", "features.0.1.weight"},
        ),
        (
            lambda: nn.MultiheadAttention(8, 2, add_bias_kv=True),
            {"in_proj_weight", "out_proj.weight"},
            {"in_proj_bias", "bias_k", "bias_v"},
        ),
    ],
    ids=["vit", "swin", "convnext", "torchvision convnext", "attention"],
)
def test_weights_decay_and_tokens_positions_and_scales_do_not(
    backbone: Callable[[], nn.Module], decaying: set[str], others: set[str]
) -> None:
    net = backbone()
    names = {parameter: name for name, parameter in net.named_parameters()}
    for decay_all in (False, True):
        first, second = build_optimizer(net, OptimConfig(weight_decay=0.1, decay_all=decay_all)).param_groups
        assert {names[parameter] for parameter in first["params"]} == decaying
        assert others <= {names[parameter] for parameter in second["params"]}
        assert len(first["params"]) + len(second["params"]) == len(names)
        assert (first["weight_decay"], first["adapt"]) == (0.1, True)
        assert (second["weight_decay"], second["adapt"]) == (0.1 if decay_all else 0.0, False)


def test_adamw_is_pytorchs_with_a_rate_that_changes() -> None:
    """Against the plain loop in float64; what decays there is named here."""
    ours = vit()
    plain = copy.deepcopy(ours).double()
    optimizer = build_optimizer(ours, OptimConfig(name="adamw", lr=0.01, momentum=0.8, weight_decay=0.5))
    named = dict(plain.named_parameters())
    layers = {name for name in named if name.endswith("weight") and "norm" not in name}
    groups = [
        {"params": [p for name, p in named.items() if name in layers], "weight_decay": 0.5},
        {"params": [p for name, p in named.items() if name not in layers], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, betas=(0.8, 0.999), foreach=False, fused=False)
    for step in range(5):
        torch.manual_seed(step)
        for one, other in zip(ours.parameters(), plain.parameters(), strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.double()
        set_learning_rate(optimizer, 0.01 / (step + 1))
        set_learning_rate(reference, 0.01 / (step + 1))
        optimizer.step()
        reference.step()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.double(), named[name], rtol=1e-5, atol=1e-6, msg=name)


def test_adamw_may_be_captured_in_a_cuda_graph() -> None:
    """PyTorch asks its flag in a capture alone, which a CPU does not have."""
    assert all(group["capturable"] for group in build_optimizer(model(), OptimConfig("adamw", 0.01)).param_groups)


@pytest.mark.parametrize(
    ("arch", "name", "kind"),
    [
        ("resnet18", "auto", torch.optim.SGD),
        ("timm/test_vit", "auto", torch.optim.AdamW),
        ("timm/test_convnext", "auto", torch.optim.AdamW),
        ("timm/test_vit", "sgd", torch.optim.SGD),
        ("resnet18", "adamw", torch.optim.AdamW),
    ],
)
def test_auto_takes_adamw_where_the_backbone_has_no_batch_norm(arch: str, name: Any, kind: type) -> None:
    encoder = build_encoder(ModelConfig(arch=arch), 32)
    encoder.projector.append(nn.BatchNorm1d(4))  # which says nothing about the backbone
    freeze_parts(encoder.backbone, ModelConfig(freeze="norms"))  # nor does it that norms are frozen
    config = OptimConfig(name=name, lr=0.01)
    assert type(build_optimizer(encoder, config)) is kind
    assert optimizer_name(config, encoder.backbone) == kind.__name__.lower()


@pytest.mark.parametrize(
    ("name", "why"), [("adamw", ""), ("auto", r" \(auto took it because the backbone has no batch norm\)")]
)
def test_adamw_refuses_a_rate_of_sgd_in_one_line(name: Any, why: str) -> None:
    encoder = Encoder(nn.Linear(2, 2), nn.Linear(2, 2), 2)
    with pytest.raises(ConfigError, match=rf"^--optim\.lr: expected at most 0\.01 with adamw{why}, got 0\.06$"):
        build_optimizer(encoder, OptimConfig(name=name))
    build_optimizer(encoder, OptimConfig("sgd"))
    build_optimizer(encoder, OptimConfig(name, lr=0.01))


def test_lars_follows_its_equation() -> None:
    weight = nn.Parameter(torch.randn(5, 3))
    bias = nn.Parameter(torch.randn(5))
    start, start_bias = weight.detach().clone(), bias.detach().clone()
    groups = [
        {"params": [weight], "weight_decay": 0.1, "adapt": True},
        {"params": [bias], "weight_decay": 0.0, "adapt": False},
    ]
    optimizer = LARS(groups, lr=0.5, momentum=0.9, trust=0.01)
    momentum, momentum_bias = torch.zeros_like(start), torch.zeros_like(start_bias)
    for step in range(3):
        torch.manual_seed(step)
        weight.grad, bias.grad = torch.randn(5, 3), torch.randn(5)
        direction = weight.grad + 0.1 * start
        momentum = 0.9 * momentum + 0.01 * start.norm() / direction.norm() * direction
        momentum_bias = 0.9 * momentum_bias + bias.grad
        start, start_bias = start - 0.5 * momentum, start_bias - 0.5 * momentum_bias
        optimizer.step()
    torch.testing.assert_close(weight.detach(), start)
    torch.testing.assert_close(bias.detach(), start_bias)


def test_lars_leaves_a_zero_weight_finite() -> None:
    weight = nn.Parameter(torch.zeros(2, 2))
    weight.grad = torch.ones(2, 2)
    LARS([weight], lr=0.1).step()
    torch.testing.assert_close(weight.detach(), torch.full((2, 2), -0.1))


@pytest.mark.parametrize("name", ["sgd", "lars", "adamw"])
def test_a_skipped_step_changes_nothing_and_the_next_one_is_whole(name: str) -> None:
    runs = []
    for skips in (True, False):
        net = model()
        optimizer = build_optimizer(net, OptimConfig(name=name, lr=0.01))
        for bad in (False, True, False, False) if skips else (False, False, False):
            for parameter in net.parameters():
                parameter.grad = torch.full_like(parameter, float("nan") if bad else 0.5)
            optimizer.found_inf = torch.tensor(float(bad))
            optimizer.step()
        runs.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=0)


def test_fused_sgd_is_plain_sgd() -> None:
    ours, plain = model(), model()
    config = OptimConfig(lr=0.1, weight_decay=0.0)
    optimizers = build_optimizer(ours, config), torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    for net, optimizer in zip((ours, plain), optimizers, strict=True):
        for _ in range(3):
            net(torch.ones(4, 3, 3, 3)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_schedules() -> None:
    rates = [learning_rate(step, 100, 10, 2.0) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == rates[10] == 2.0
    assert rates[55] == pytest.approx(1.0)
    assert 0 < rates[99] < 0.01
    assert [ramp(step, 100, 0.5) for step in (0, 24, 49, 50, 99)] == [0.02, 0.5, 1.0, 1.0, 1.0]
    assert ramp(0, 100, 0.0) == 1.0
    assert [ramp(step, 100, 0.5, 20) for step in (0, 19, 20, 44, 69, 99)] == [0.0, 0.0, 0.02, 0.5, 1.0, 1.0]
    assert [ramp(step, 100, 0.0, 20) for step in (19, 20)] == [0.0, 1.0]
    rising = ModelConfig(teacher_momentum=0.9, teacher_momentum_end=1.0)
    momenta = [teacher_momentum(step, 100, rising) for step in range(100)]
    assert momenta == sorted(momenta)
    assert [momenta[0], momenta[50]] == pytest.approx([0.9, 0.95])
    assert 0.9999 < momenta[99] < 1
    assert teacher_momentum(99, 100, ModelConfig(teacher_momentum=0.9)) == 0.9


def test_optimizer_state_can_be_copied() -> None:
    net = model()
    copy.deepcopy(build_optimizer(net, OptimConfig(name="lars")).state_dict())


class FusedSGD(torch.optim.Optimizer):
    """The interface of Apex's, by its source of July 2026: a rate on the host, a skip buffer, no zero_grad argument."""

    def __init__(self, params: Any, lr: float, momentum: float, weight_decay: float = 0, set_grad_none: bool = False):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.set_grad_none = set_grad_none
        self._dummy_overflow_buf = torch.tensor([0], dtype=torch.int)

    def zero_grad(self) -> None:
        assert self.set_grad_none
        super().zero_grad(set_to_none=True)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        if self._dummy_overflow_buf[0]:
            return
        for group in self.param_groups:
            assert isinstance(group["lr"], float)
            for p in group["params"]:
                momentum = self.state[p]["momentum_buffer"]
                momentum.mul_(group["momentum"]).add_(p.grad + group["weight_decay"] * p)
                p.sub_(group["lr"] * momentum)


class FusedMixedPrecisionLamb(torch.optim.Optimizer):
    """Likewise: rate and step on the device, and a GradScaler that is asked for two tensors."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], weight_decay: float = 0.01) -> None:
        defaults = {"lr": torch.tensor(lr), "step": torch.tensor([0], dtype=torch.int)}
        super().__init__(params, defaults | {"betas": betas, "weight_decay": weight_decay})
        for group in self.param_groups:
            group |= {name: group[name].clone() for name in defaults}

    @torch.no_grad()
    def step(self, closure: None = None, grad_scaler: Any = None) -> None:
        found_inf = grad_scaler._check_inf_per_device(self)[torch.device("cpu")]
        for group in self.param_groups:
            group["step"] += (found_inf != 1).to(torch.int)
            for p in group["params"] if not found_inf else ():
                state, (beta1, beta2), gradient = self.state[p], group["betas"], p.grad / grad_scaler._get_scale_async()
                assert set(state) == {"exp_avg", "exp_avg_sq"}
                state["exp_avg"].lerp_(gradient, 1 - beta1)
                state["exp_avg_sq"].lerp_(gradient.square(), 1 - beta2)
                m, v = (
                    state["exp_avg"] / (1 - beta1 ** group["step"]),
                    state["exp_avg_sq"] / (1 - beta2 ** group["step"]),
                )
                update = m / (v.sqrt() + 1e-6) + group["weight_decay"] * p
                p.sub_(group["lr"] * update * (p.norm() / update.norm() if group["weight_decay"] else 1))


@pytest.fixture
def apex(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in, since Apex needs a GPU."""
    package, optimizers = ModuleType("apex"), ModuleType("apex.optimizers")
    optimizers.FusedSGD, optimizers.FusedMixedPrecisionLamb = FusedSGD, FusedMixedPrecisionLamb
    monkeypatch.setitem(sys.modules, "apex", package)
    monkeypatch.setitem(sys.modules, "apex.optimizers", optimizers)


APEX_CONFIG = Config(
    model=ModelConfig(arch="timm/test_resnet", bank_size=16, projection_dim=16),
    optim=OptimConfig(lr=1.0, warmup_epochs=1),
    train=TrainConfig(batch_size=8, precision="fp32", epochs=2),
)


def apex_state(name: str, scaled: bool = False) -> TrainState:
    state = build_state(APEX_CONFIG, torch.device("cpu"))
    state.optimizer = build_optimizer(state.student, dataclasses.replace(APEX_CONFIG.optim, name=name))
    state.scaler = torch.amp.GradScaler("cpu", init_scale=16.0, enabled=scaled)
    return state


def trained(state: TrainState, steps: int, bad: int = -1) -> TrainState:
    while state.step < steps:
        views = torch.randn(3, 8, 3, 32, 32, generator=torch.Generator().manual_seed(state.step))
        views[0, 0] = torch.inf if state.step == bad else views[0, 0]
        draws = draw(state.step, 8, APEX_CONFIG, state.device)
        metrics = train_step(state, APEX_CONFIG, tuple(views), draws, scheduled(state.step, 4, APEX_CONFIG))
        assert metrics[-1] == (state.step - 1 == bad)
    return state


def weights(state: TrainState) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in state.student.parameters()])


@pytest.mark.parametrize("scaled", [False, True])
def test_apex_sgd_gets_what_fused_sgd_gets(apex: None, scaled: bool) -> None:
    """The rate of each step, gradients without the scale, no step where they are not finite, none left over."""
    plain, by_apex = trained(apex_state("sgd", scaled), 4, bad=1), trained(apex_state("apex-sgd", scaled), 4, bad=1)
    assert isinstance(by_apex.optimizer, FusedSGD)
    assert all(parameter.grad is None for parameter in by_apex.student.parameters())
    torch.testing.assert_close(weights(by_apex), weights(plain), rtol=1e-4, atol=1e-5)


def test_apex_lamb_gets_gradients_without_the_scale(apex: None) -> None:
    """Its steps hardly depend on their scale; its averages of them do."""
    plain, scaled = (trained(apex_state("apex-lamb", scaled), 3, bad=1) for scaled in (False, True))
    for one, other in zip(plain.optimizer.state.values(), scaled.optimizer.state.values(), strict=True):
        torch.testing.assert_close(other["exp_avg"], one["exp_avg"], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(weights(scaled), weights(plain), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["apex-sgd", "apex-lamb"])
def test_apex_optimizers_go_on_from_a_checkpoint(apex: None, name: str, tmp_path: Path) -> None:
    with checkpoint.Writer(tmp_path) as writer:
        first = trained(apex_state(name, scaled=True), 2, bad=0)
        writer.save(first, {})
    if name == "apex-lamb":
        assert [group["step"].item() for group in first.optimizer.param_groups] == [1, 1]
    resumed = apex_state(name, scaled=True)
    checkpoint.load(tmp_path / "step-000000002.safetensors", resumed)
    assert torch.equal(weights(trained(resumed, 4)), weights(trained(first, 4)))
    assert not torch.equal(weights(first), weights(apex_state(name)))


@pytest.mark.parametrize("which", ["none", "of PyPI", "without kernels"])
def test_without_the_right_apex_one_line_says_how_to_build_it(
    apex: None, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("apex.optimizers.FusedSGD requires cuda extensions")

    if which == "none":
        monkeypatch.setitem(sys.modules, "apex", None)
    if which != "without kernels":
        monkeypatch.delitem(sys.modules, "apex.optimizers")
    else:
        monkeypatch.setattr(FusedSGD, "__init__", refuse)
    with pytest.raises(ConfigError, match=r"git clone https://github\.com/NVIDIA/apex") as caught:
        build_optimizer(model(), OptimConfig(name="apex-sgd"))
    assert "\n" not in str(caught.value)


def test_apex_is_refused_on_a_cpu() -> None:
    config = dataclasses.replace(APEX_CONFIG, optim=OptimConfig(name="apex-lamb"))
    with pytest.raises(ConfigError, match=r"--optim\.name: expected auto, sgd, adamw or lars on cpu"):
        check_device(config, torch.device("cpu"))
