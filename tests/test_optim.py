"""Parameter groups, LARS and schedules."""

import copy

import pytest
import torch
from torch import nn

from reco_fast.config import OptimConfig
from reco_fast.optim import LARS, build_optimizer, learning_rate, ramp


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


@pytest.mark.parametrize("name", ["sgd", "lars"])
def test_a_skipped_step_changes_nothing_and_the_next_one_is_whole(name: str) -> None:
    runs = []
    for skips in (True, False):
        net = model()
        optimizer = build_optimizer(net, OptimConfig(name=name, lr=0.1))
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


def test_optimizer_state_can_be_copied() -> None:
    net = model()
    copy.deepcopy(build_optimizer(net, OptimConfig(name="lars")).state_dict())
