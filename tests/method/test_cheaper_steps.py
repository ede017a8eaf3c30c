"""Settings that make a step of ReCo cheaper: each is what its plain definition says, in losses, weights and banks."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from reco_fast.data.loaders import recipe
from reco_fast.errors import ConfigError
from reco_fast.method.state import build_state
from reco_fast.method.step import METRICS, Draws, Schedule, draw, mixed_view, train_step
from reco_fast.settings.config import Config, LossConfig, ModelConfig, OptimConfig, TrainConfig

CPU = torch.device("cpu")
ROWS = 14
CONFIG = Config(
    model=ModelConfig(arch="timm/test_resnet", bank_size=50, projection_dim=16),
    optim=OptimConfig(momentum=0.0, weight_decay=0.0),
    train=TrainConfig(batch_size=ROWS, precision="fp32"),
)
SETTINGS: list[dict[str, Any]] = [
    {"keys": "weak"},
    {"mix_size": 16},
    {"mix_share": 0.4},
    {"mix_share": 0.4, "mix_anchor": "query"},
    {"keys": "weak", "mix_size": 20, "mix_share": 0.25, "mix": "mixup"},
    {"keys": "weak", "mix_share": 0.5, "mix_within": True},
    {"mix_share": 0.3, "mix_within": True},
    {"mix_share": 0.3, "mix_within": True, "global_weight": 0.0, "mix": "mixup"},
    {"keys": "weak", "local_weight": 0.0},
    {"keys": "weak", "global_weight": 0.0},
    {"keys": "weak", "objective": "moco"},
]


def views(count: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    images = (torch.randn(ROWS, 3, 32, 32, generator=generator) for _ in range(count))
    return tuple(view.contiguous(memory_format=torch.channels_last) for view in images)


def by_definition(
    student: Any, teacher: Any, given: tuple[Tensor, ...], draws: Draws, loss: LossConfig, bank: Any
) -> list[Tensor]:
    """Instance, global and local term of docs/method.md for the settings of `loss`, with their graph."""
    other, count = draws.permutation, round(loss.mix_share * ROWS)
    with torch.no_grad():
        keys = [F.normalize(teacher(view)) for view in given[1:]]
    own, weak_bank = keys[0], bank.keys if loss.keys == "weak" else bank.weak_keys
    rows = slice(0, ROWS)
    if loss.mix_within:
        rows = slice(count, ROWS)
        partner = given[0] if loss.keys == "weak" else given[1]
        mixed = draws.mix_weights * given[0] + (1 - draws.mix_weights) * partner[other]
        both = F.normalize(student(torch.cat([mixed[:count], given[0][count:]])))
        query_mix, query = both[:count], both[count:]
    else:
        query = F.normalize(student(given[0]))

    def against_bank(x: Tensor, target: Tensor) -> Tensor:
        logits = torch.cat([(x * target).sum(dim=1, keepdim=True), x @ bank.keys.T], dim=1) / loss.temperature
        return -logits.log_softmax(dim=1)[:, 0].mean()

    terms = [against_bank(query, own[rows]), query.new_zeros(()), query.new_zeros(())]
    if loss.uses_global:
        target = (keys[-1][rows] @ weak_bank.T / loss.teacher_temperature).softmax(dim=1)
        terms[1] = -(target * (query @ weak_bank.T / loss.student_temperature).log_softmax(dim=1)).sum(dim=1).mean()
    if loss.uses_local:
        partner = given[0] if loss.keys == "weak" else given[1]
        mixed = draws.mix_weights * given[0] + (1 - draws.mix_weights) * partner[other]
        mixed = F.interpolate(mixed[:count], size=[loss.mix_size or 32] * 2, mode="bilinear", antialias=True)
        ratio = draws.mix_weights.mean()
        anchor = query.detach() if loss.mix_anchor == "query" else own
        query_mix = query_mix if loss.mix_within else F.normalize(student(mixed))
        terms[2] = against_bank(query_mix, F.normalize(ratio * anchor + (1 - ratio) * own[other])[:count])
    return terms


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("impl", ["torch", "sdpa"])
def test_a_step_is_its_definition(settings: dict[str, Any], impl: Any) -> None:
    config = dataclasses.replace(CONFIG, loss=LossConfig(impl=impl, **settings))
    loss, state = config.loss, build_state(config, CPU)
    given = views(len(recipe(config).views))
    student, teacher, bank = copy.deepcopy(state.student), copy.deepcopy(state.teacher), copy.deepcopy(state.bank)
    for module in (student, teacher):  # batch statistics, as in a step
        module.train()
    (drawn,) = draw(3, ROWS, config, CPU)
    terms = by_definition(student, teacher, given, drawn, loss, bank)
    weights = (1.0, 0.7 * loss.global_weight * loss.uses_global, 0.7 * loss.local_weight * loss.uses_local)
    if loss.mix_within:
        share = round(loss.mix_share * ROWS) / ROWS
        weights = ((1 - share), (1 - share) * weights[1], share * weights[2])
    total = sum(weight * term for weight, term in zip(weights, terms, strict=True))
    total.backward()

    metrics = train_step(state, config, given, [drawn], Schedule(0.1, 0.7, 0.9))
    values = dict(zip(METRICS, metrics.tolist(), strict=True))
    named = {"loss": total, "loss_instance": terms[0], "loss_global": terms[1], "loss_local": terms[2]}
    assert values.items() >= {name: pytest.approx(term.item(), rel=1e-4) for name, term in named.items()}.items()
    for (name, after), before in zip(state.student.named_parameters(), student.parameters(), strict=True):
        moved, expected = after.detach() - before.detach(), -0.1 * before.grad
        assert (moved - expected).norm() <= 1e-3 * expected.norm() + 1e-7, name
    # Keys go to the bank that they are compared with; with weak keys there is no other.
    if len(given) == 3:
        assert torch.equal(state.bank.weak_keys[ROWS:], bank.weak_keys[ROWS:])
        assert not torch.equal(state.bank.weak_keys, bank.weak_keys)
    else:
        assert state.bank.weak_keys is None
    assert not torch.equal(state.bank.keys[:ROWS], bank.keys[:ROWS])


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_no_more_passes_than_the_setting_says(settings: dict[str, Any]) -> None:
    config = dataclasses.replace(CONFIG, loss=LossConfig(**settings))
    state, seen = build_state(config, CPU), {"student": [], "teacher": []}
    for name, module in (("student", state.run_student.encoder), ("teacher", state.run_teacher.encoder)):
        module.register_forward_pre_hook(lambda _, images, name=name: seen[name].append(images[0].shape))
    count = config.mixed_images(ROWS)
    train_step(state, config, views(len(recipe(config).views)), draw(0, ROWS, config, CPU), Schedule(0.1, 1.0, 0.9))
    apart = config.loss.uses_local and not config.loss.mix_within
    mixed = [(count, 3, config.mixed_size, config.mixed_size)] if apart else []
    assert seen["student"] == [(ROWS, 3, 32, 32), *mixed]
    assert len(seen["teacher"]) == 1 + (config.loss.uses_global and config.loss.keys == "strong")


def test_a_mixed_view_stays_channels_last() -> None:
    config = dataclasses.replace(CONFIG, loss=LossConfig(mix_size=16, mix_share=0.5))
    mixed = mixed_view(config, views(3), draw(0, ROWS, config, CPU)[0])
    assert mixed.shape == (7, 3, 16, 16)
    assert mixed.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("settings", [{}, *SETTINGS], ids=str)
def test_compiled_views_are_one_batch_only_where_they_are_alike(settings: dict[str, Any]) -> None:
    """Views of two sizes, or of more and fewer images, are no batch whose norms could keep them apart."""
    config = dataclasses.replace(
        CONFIG, loss=LossConfig(**settings), train=dataclasses.replace(CONFIG.train, compile=True)
    )
    student = config.loss.uses_local and not set(settings) & {"mix_size", "mix_share"}
    teacher = config.loss.uses_global and config.loss.keys == "strong"
    state = build_state(config, CPU)
    assert (state.run_student.together, state.run_teacher.together) == (student, teacher)


def test_a_mixed_view_larger_than_the_others_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--loss.mix-size: expected at most --data.image-size, 32, got 48"):
        dataclasses.replace(CONFIG, loss=LossConfig(mix_size=48))
