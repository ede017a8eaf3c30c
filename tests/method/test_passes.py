"""How the teacher follows the student, and how it normalises."""

import copy

import pytest
import torch
from torch import nn

from reco_fast.method.passes import TeacherUpdate, follow_mode, teacher_forward


def small_pair() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    student = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.Flatten(), nn.LazyLinear(4))
    student(torch.randn(4, 3, 8, 8))
    return student, copy.deepcopy(student).requires_grad_(False)


@pytest.mark.parametrize("key_norm", ["batch", "ema"])
def test_teacher_update_is_the_moving_average(key_norm: str) -> None:
    student, teacher = small_pair()
    with torch.no_grad():
        for value in (*student.parameters(), student[1].running_mean):
            value.add_(1.0)
    before = copy.deepcopy(teacher.state_dict())
    TeacherUpdate(teacher, student, key_norm)(torch.tensor(0.1))
    for name, value in teacher.named_parameters():
        torch.testing.assert_close(value, 0.9 * before[name] + 0.1 * student.get_parameter(name))
    moved = 0.1 if key_norm == "ema" else 0.0
    torch.testing.assert_close(teacher[1].running_mean, before["1.running_mean"] + moved)


def test_teacher_mode_touches_batch_norm_alone() -> None:
    _, teacher = small_pair()
    follow_mode(teacher, "batch")
    assert teacher[1].training
    assert not teacher[2].training
    follow_mode(teacher, "ema")
    assert not teacher[1].training


def test_images_shuffled_between_ranks_are_sent_and_stay_channels_last(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_two_equal_ranks(rows: torch.Tensor) -> torch.Tensor:
        assert rows.is_contiguous()
        return torch.cat([rows, rows])

    def teacher(*views: torch.Tensor) -> tuple[torch.Tensor, ...]:
        assert all(view.is_contiguous(memory_format=torch.channels_last) for view in views)
        return tuple(view.mean(dim=(2, 3)) for view in views)

    monkeypatch.setattr("reco_fast.distributed.world_size", lambda: 2)
    monkeypatch.setattr("reco_fast.distributed.all_gather", of_two_equal_ranks)
    images = torch.randn(4, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    keys = teacher_forward(teacher, (images, images), "shuffle", torch.randperm(8))
    assert [rows.shape for rows in keys] == [(4, 3), (4, 3)]


def test_keys_of_shuffled_images_come_back_in_their_order() -> None:
    def teacher(*views: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(view.mean(dim=(2, 3)) for view in views)

    images = torch.randn(8, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    expected = images.mean(dim=(2, 3))
    for key_norm in ("batch", "split", "shuffle"):
        keys = teacher_forward(teacher, (images, 2 * images), key_norm, torch.randperm(8))
        torch.testing.assert_close(keys, (expected, 2 * expected))
