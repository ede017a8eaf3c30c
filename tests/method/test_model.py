"""Backbones by name, the small stem, and the memory banks: nothing lost, any batch size, position on the device."""

from typing import Any

import pytest
import torch

from reco_fast.errors import ConfigError
from reco_fast.method.model import Encoder, MemoryBank, build_encoder, patch_size
from reco_fast.method.state import build_state
from reco_fast.settings.config import Config, DataConfig, LossConfig, ModelConfig, TrainConfig


@pytest.mark.parametrize(
    ("arch", "features"),
    [
        ("resnet18", 512),
        ("timm/resnet18", 512),
        ("torchvision/mobilenet_v3_small", 1024),
        ("timm/test_resnet", 96),
        ("timm/test_convnext", 64),
        ("timm/vit_tiny_patch16_224", 192),
    ],
)
def test_any_backbone_gives_one_feature_vector_an_image(arch: str, features: int) -> None:
    encoder = build_encoder(ModelConfig(arch=arch, projection_dim=32), 32)
    assert encoder.feature_dim == features
    assert encoder(torch.randn(2, 3, 32, 32)).shape == (2, 32)


@pytest.mark.parametrize(("projector", "layers"), [("mlp", 2), ("linear", 1)])
def test_projector_has_as_many_layers_as_its_name_says(projector: str, layers: int) -> None:
    encoder = build_encoder(ModelConfig(arch="timm/test_resnet", projector=projector, projection_dim=32), 32)
    images = torch.randn(2, 3, 32, 32)
    assert encoder(images).shape == (2, 32)
    assert sum(isinstance(module, torch.nn.Linear) for module in encoder.projector.modules()) == layers


@pytest.mark.parametrize(("stem", "size", "resolution"), [("auto", 64, 64), ("auto", 96, 24), ("standard", 64, 16)])
def test_small_stem_keeps_the_resolution_up_to_64_px(stem: str, size: int, resolution: int) -> None:
    encoder = build_encoder(ModelConfig(arch="resnet18", stem=stem), size)
    seen = {}
    encoder.backbone.layer1.register_forward_pre_hook(lambda module, args: seen.update(size=args[0].shape[-1]))
    encoder(torch.randn(2, 3, size, size))
    assert seen["size"] == resolution


@pytest.mark.parametrize(
    ("arch", "stem", "size", "expected"),
    [
        ("test_vit", "auto", 32, 4),
        ("test_vit", "auto", 96, 16),
        ("test_vit", "small", 96, 4),
        ("test_vit", "standard", 32, 16),
        ("test_convnext", "auto", 32, 1),
        ("mixer_s16_224", "auto", 32, 16),  # timm's constructor takes no other
    ],
)
def test_small_images_are_cut_into_small_patches(arch: str, stem: Any, size: int, expected: int) -> None:
    encoder = build_encoder(ModelConfig(arch=f"timm/{arch}", stem=stem, projection_dim=16), size)
    assert patch_size(encoder.backbone) == expected
    assert encoder(torch.zeros(2, 3, size, size)).shape == (2, 16)


def test_unknown_backbone_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean resnet50"):
        build_encoder(ModelConfig(arch="resnet5o"), 32)


def test_backbone_that_does_not_fit_the_images_is_one_line() -> None:
    with pytest.raises(ConfigError, match="cannot take 32 px") as caught:
        build_encoder(ModelConfig(arch="inception_v3"), 32)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("arch", "size"), [("googlenet", 64), ("inception_v3", 96), ("timm/inception_v3", 96)])
def test_a_backbone_with_auxiliary_outputs_trains_by_its_main_one(arch: str, size: int) -> None:
    encoder = build_encoder(ModelConfig(arch=arch, projection_dim=16), size)
    assert encoder.training
    encoder(torch.randn(2, 3, size, size)).sum().backward()
    assert [name for name, parameter in encoder.named_parameters() if parameter.grad is None] == []


OWN_STEM = ["levit_128s", "gcvit_xxtiny", "fastvit_t8", "visformer_tiny", "volo_d1_224"]


def built(arch: str, stem: str) -> Encoder:
    torch.manual_seed(3)
    return build_encoder(ModelConfig(arch=arch, stem=stem, projection_dim=16), 64)  # type: ignore[arg-type]


@pytest.mark.parametrize("arch", OWN_STEM)
def test_a_backbone_that_does_not_fit_behind_the_small_stem_keeps_its_own(arch: str) -> None:
    chosen, standard = built(f"timm/{arch}", "auto"), built(f"timm/{arch}", "standard")
    (note,) = chosen.notes
    assert note.startswith(f"timm/{arch} keeps its own stem: behind the small one it cannot take 64 px images: ")
    assert "\n" not in note
    assert standard.notes == ()
    for (name, one), other in zip(chosen.state_dict().items(), standard.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    with pytest.raises(
        ConfigError, match=rf"--model.stem: expected auto or standard for timm/{arch} at 64 px"
    ) as caught:
        built(f"timm/{arch}", "small")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("arch", ["mobilenet_v3_small", "timm/efficientnet_b0"])  # with dropout and batch norms
def test_the_trial_leaves_no_trace(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = built(arch, "auto")
    monkeypatch.setattr("reco_fast.method.model._feature_dim", lambda *_: tried.feature_dim)
    untried = built(arch, "auto")
    for (name, one), other in zip(tried.state_dict().items(), untried.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    assert all(parameter.grad is None for parameter in tried.parameters())


def test_what_fails_in_training_alone_is_found_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fails(torch.nn.Flatten):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            if self.training:
                raise ZeroDivisionError("only in training")
            return super().forward(images)

    monkeypatch.setattr("reco_fast.method.model._create", lambda arch, size: Fails())
    with pytest.raises(ConfigError, match=r"--model.arch mine cannot take 32 px images: only in training"):
        build_encoder(ModelConfig(arch="mine"), 32)


def test_what_fails_in_the_backward_pass_alone_is_found_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fails(torch.nn.Conv2d):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            features = super().forward(images).mean((2, 3)).exp()
            features.detach().mul_(2)  # exp's gradient needs what it was
            return features

    monkeypatch.setattr("reco_fast.method.model._create", lambda arch, size: Fails(3, 8, 3))
    with pytest.raises(ConfigError, match=r"--model.arch mine cannot take 32 px images: one of the variables"):
        build_encoder(ModelConfig(arch="mine"), 32)


def of_small_weak_views(arch: str, objective: Any) -> Config:
    return Config(
        data=DataConfig(image_size=64, weak_size=32),
        model=ModelConfig(arch=arch, bank_size=8, projection_dim=16),
        loss=LossConfig(objective=objective),
        train=TrainConfig(batch_size=4),
    )


def test_a_backbone_for_one_size_takes_no_smaller_weak_view() -> None:
    expected = r"--data.weak-size: expected a size that timm/vit_tiny_patch16_224 takes .* for 64 px, got 32 \(.*\)$"
    with pytest.raises(ConfigError, match=expected) as caught:
        build_state(of_small_weak_views("timm/vit_tiny_patch16_224", "reco"), torch.device("cpu"))
    assert "\n" not in str(caught.value)
    build_state(of_small_weak_views("timm/vit_tiny_patch16_224", "moco"), torch.device("cpu"))  # has no weak view


def test_a_trial_of_the_weak_view_leaves_no_trace() -> None:
    tried = build_state(of_small_weak_views("timm/efficientnet_b0", "reco"), torch.device("cpu"))
    untried = build_state(of_small_weak_views("timm/efficientnet_b0", "moco"), torch.device("cpu"))
    assert tried.student.training
    for (name, one), other in zip(
        tried.student.state_dict().items(), untried.student.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), name


def test_weights_of_volumes_are_no_hindrance_to_channels_last() -> None:
    model, data = ModelConfig(arch="timm/lambda_resnet26t", bank_size=8), DataConfig(image_size=64)
    state = build_state(Config(data=data, model=model, train=TrainConfig(batch_size=4)), torch.device("cpu"))
    kernels = [p for p in state.student.parameters() if p.dim() == 4 and p.shape[1] > 1 and p.shape[2] > 1]
    assert kernels
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)


def rows(start: int, count: int) -> torch.Tensor:
    return torch.arange(start, start + count, dtype=torch.float32)[:, None].expand(-1, 8)


@pytest.mark.parametrize("batch", [1, 3, 7, 10, 23])
def test_holds_the_last_k_keys(batch: int) -> None:
    bank = MemoryBank(10, 8)
    pushed = 0
    while pushed < 50:
        bank.enqueue(rows(pushed, batch), -rows(pushed, batch))
        pushed += batch
    last = set(range(pushed - 10, pushed))
    assert set(bank.keys[:, 0].int().tolist()) == last
    assert set((-bank.weak_keys[:, 0]).int().tolist()) == last
    # The oldest key is the next to be overwritten.
    assert bank.keys[bank.position, 0] == pushed - 10
    assert bank.newest(4)[:, 0].tolist() == [pushed - 1, pushed - 2, pushed - 3, pushed - 4]


def test_both_banks_keep_rows_of_one_image_at_one_place() -> None:
    bank = MemoryBank(7, 8)
    for step in range(5):
        bank.enqueue(rows(3 * step, 3), -rows(3 * step, 3))
    assert torch.equal(bank.keys, -bank.weak_keys)


def test_starts_with_random_unit_rows_that_follow_from_the_seed() -> None:
    a, b, c = MemoryBank(64, 16, seed=1), MemoryBank(64, 16, seed=1), MemoryBank(64, 16, seed=2)
    torch.testing.assert_close(a.keys.norm(dim=1), torch.ones(64))
    assert torch.equal(a.keys, b.keys)
    assert not torch.equal(a.keys, c.keys)
    assert not torch.equal(a.keys, a.weak_keys)


def test_without_weak_keys_that_bank_stays() -> None:
    bank = MemoryBank(4, 8, dtype=torch.bfloat16)
    before = bank.weak_keys.clone()
    bank.enqueue(rows(0, 2))
    assert torch.equal(bank.weak_keys, before)
    assert bank.keys.dtype == torch.bfloat16


def test_one_bank_is_the_first_of_two() -> None:
    one, two = (MemoryBank(4, 8, weak=weak, seed=3) for weak in (False, True))
    assert one.weak_keys is None
    assert {*one.state_dict()} == {"keys", "position"}
    for bank in (one, two):
        bank.enqueue(rows(0, 2))
    assert torch.equal(one.keys, two.keys)
    assert torch.equal(one.position, two.position)


def test_is_no_parameter() -> None:
    assert not list(MemoryBank(4, 8).parameters())
