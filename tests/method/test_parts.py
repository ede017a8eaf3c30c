"""Parts of the backbone that stay as they are, and blocks that the backward pass computes again."""

import dataclasses
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from dispatch import Tape
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.models import DenseNet, VisionTransformer
from torchvision.models.resnet import BasicBlock

from reco_fast.errors import ConfigError
from reco_fast.method import state as states
from reco_fast.method.model import build_encoder
from reco_fast.method.norms import batch_norms, use_groups
from reco_fast.method.parts import _averages_aside, freeze_parts, recompute_blocks
from reco_fast.method.passes import shared_copy
from reco_fast.method.state import TrainState, build_state
from reco_fast.method.step import draw, scheduled, train_step
from reco_fast.run import checkpoint
from reco_fast.settings.config import Config, DataConfig, LossConfig, ModelConfig, OptimConfig, TrainConfig

CPU = torch.device("cpu")
ROWS = 8


def config(arch: str = "timm/test_resnet", size: int = 32, *, loss: Any = {}, train: Any = {}, **model: Any) -> Config:  # noqa: B006
    model = {"projection_dim": 16, "bank_size": 64, "norm_groups": 2, "teacher_momentum": 0.5} | model
    return Config(
        data=DataConfig(image_size=size),
        model=ModelConfig(arch=arch, **model),
        loss=LossConfig(**loss),
        optim=OptimConfig(weight_decay=0.1, decay_all=True),
        train=TrainConfig(**{"batch_size": ROWS, "precision": "fp32"} | train),
    )


def go_on(state: TrainState, given: Config, steps: int = 1) -> Tensor:
    metrics, side = [], given.data.image_size
    for step in range(state.step, state.step + steps):
        generator = torch.Generator().manual_seed(step)
        views = torch.randn(3, ROWS, 3, side, side, generator=generator)
        shown = tuple(view.contiguous(memory_format=torch.channels_last) for view in views)
        metrics.append(train_step(state, given, shown, draw(step, ROWS, given, CPU), scheduled(step, 10, given)))
    return torch.stack(metrics)


def tensors(state: TrainState) -> dict[str, Tensor]:
    """All that a checkpoint holds, momenta among it: after one step they are the gradients and the decay."""
    return {name: value.clone() for name, value in checkpoint._tensors(state).items()}


def below(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


@pytest.mark.parametrize(
    ("arch", "stages", "kept"),
    [
        ("resnet18", "1", ("conv1", "bn1")),
        ("resnet18", "2", ("conv1", "bn1", "layer1")),
        ("resnet18", "5", ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")),
        ("convnext_tiny", "2", ("features.0", "features.1")),
        ("densenet121", "2", ("features.conv0", "features.norm0", "features.denseblock1", "features.transition1")),
        ("timm/test_resnet", "2", ("conv1", "bn1", "layer1")),
        ("timm/efficientnet_lite0", "2", ("conv_stem", "bn1", "blocks.0")),
        ("timm/test_convnext", "3", ("stem", "stages.0", "stages.1")),
        ("timm/vit_tiny_patch16_224", "3", ("cls_token", "pos_embed", "patch_embed", "blocks.0", "blocks.1")),
    ],
)
def test_the_stem_and_the_first_stages_are_kept(arch: str, stages: str, kept: tuple[str, ...]) -> None:
    encoder = build_encoder(ModelConfig(arch=arch, projection_dim=8), 32)
    names = list(encoder.state_dict())
    freeze_parts(encoder.backbone, ModelConfig(arch=arch, freeze=stages))
    for name, parameter in encoder.backbone.named_parameters():
        assert parameter.requires_grad is not below(name, kept), name
    assert all(parameter.requires_grad for parameter in encoder.projector.parameters())
    active = batch_norms(encoder)
    for name, module in encoder.backbone.named_modules():
        assert not isinstance(module, nn.BatchNorm2d) or (module in active) is module.training is not below(name, kept)
    assert list(encoder.state_dict()) == names


def test_the_stages_of_torchvisions_transformer() -> None:
    backbone = VisionTransformer(32, 16, num_layers=3, num_heads=1, hidden_dim=8, mlp_dim=8)
    freeze_parts(backbone, ModelConfig(arch="vit", freeze="2"))
    kept = ("class_token", "conv_proj", "encoder.pos_embedding", "encoder.layers.encoder_layer_0")
    for name, parameter in backbone.named_parameters():
        assert parameter.requires_grad is not below(name, kept), name
    freeze_parts(backbone, ModelConfig(arch="vit", freeze="4"))
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


@pytest.mark.parametrize("arch", ["timm/test_resnet", "timm/test_vit"])
def test_norms_alone_are_kept(arch: str) -> None:
    backbone = build_encoder(ModelConfig(arch=arch, projection_dim=8), 64).backbone
    freeze_parts(backbone, ModelConfig(arch=arch, freeze="norms"))
    found = {"norm": 0, "other": 0}
    for module in backbone.modules():
        norm = isinstance(module, nn.BatchNorm2d | nn.LayerNorm)
        for parameter in module.parameters(recurse=False):
            found["norm" if norm else "other"] += 1
            assert parameter.requires_grad is not norm
    assert min(found.values()) > 10
    assert batch_norms(backbone) == []


@pytest.mark.parametrize("freeze", ["1", "norms"])
def test_norms_of_other_kinds_and_without_weights_are_kept_too(freeze: str) -> None:
    stem, rest = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False)), nn.GroupNorm(2, 4)
    backbone = nn.ModuleDict({"stem": stem, "layer1": nn.Sequential(nn.Conv2d(4, 4, 1), rest)})
    freeze_parts(backbone, ModelConfig(freeze=freeze))
    assert batch_norms(backbone) == []
    assert rest.weight.requires_grad == (freeze == "1")
    assert stem[0].weight.requires_grad == (freeze == "norms")


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: build_encoder(ModelConfig(arch="timm/test_vit", projection_dim=8), 64).backbone, "patch_embed.proj"),
        (lambda: VisionTransformer(32, 16, num_layers=1, num_heads=1, hidden_dim=8, mlp_dim=8), "conv_proj"),
    ],
)
def test_the_projection_of_patches_is_kept(make: Callable[[], nn.Module], name: str) -> None:
    backbone = make()
    freeze_parts(backbone, ModelConfig(freeze_patch_embed=True))
    kept = {each for each, parameter in backbone.named_parameters() if not parameter.requires_grad}
    assert kept == {f"{name}.weight", f"{name}.bias"}


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (config(freeze="6"), "--model.freeze: expected at most the 5 stages of timm/test_resnet, got 6"),
        (config("googlenet", 64, freeze="1"), "--model.freeze: expected norms for googlenet, whose stages have no "),
        (config(freeze_patch_embed=True), "--model.freeze-patch-embed: expected a transformer of patches, got timm/t"),
    ],
)
def test_a_backbone_without_the_part_is_one_line(given: Config, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_state(given, CPU)
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


def test_a_backbone_without_norms_or_blocks_is_one_line() -> None:
    layers = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1))
    with pytest.raises(
        ConfigError, match=r"^--model.freeze: expected a number of stages for mine, which has no norms$"
    ):
        freeze_parts(layers, ModelConfig(arch="mine", freeze="norms"))
    expected = r"^--train.checkpoint-activations: expected a backbone of repeated blocks, got mine$"
    with pytest.raises(ConfigError, match=expected):
        recompute_blocks(layers, "mine")


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (config(freeze="2", key_norm="split", query_norm="split"), ("conv1", "bn1", "layer1")),
        (config(freeze="2", key_norm="ema", train={"accumulate": 2}), ("conv1", "bn1", "layer1")),
        (config(freeze="2", train={"precision": "bf16"}), ("conv1", "bn1", "layer1")),
        (config(freeze="5"), ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")),
        (config("timm/test_vit", 64, freeze="1"), ("cls_token", "pos_embed", "patch_embed")),
    ],
)
def test_frozen_stages_stay_bit_for_bit_and_the_rest_learns(given: Config, kept: tuple[str, ...]) -> None:
    state = build_state(given, CPU)
    before, of = tensors(state), tuple(f"{which}.backbone.{name}" for which in ("student", "teacher") for name in kept)
    for _ in range(3):
        go_on(state, given)
        state.student.eval().train()  # as an evaluation does
        state.enter(given)  # as a new phase does
    frozen, moved = 0, set()
    for name, value in tensors(state).items():
        if below(name, of):
            frozen += 1
            assert torch.equal(value, before[name]), name
        elif name.startswith(("student", "teacher")) and not torch.equal(value, before[name]):
            moved.add(name)
    assert frozen >= 6
    learning = {f"{which}.{n}" for which in ("student", "teacher") for n, p in state.student.named_parameters()}
    assert {name for name in learning if not below(name, of)} <= moved


@pytest.mark.parametrize("freeze", ["5", "norms"])
def test_frozen_norms_of_both_running_networks_use_what_is_stored(freeze: str) -> None:
    state = build_state(config(freeze=freeze, key_norm="split", query_norm="split"), CPU)
    images = torch.randn(6, 3, 32, 32)
    state.student.train()
    for passes in (state.run_student, state.run_teacher):
        (all_of_them,), (one,) = passes(images), passes(images[:1])
        torch.testing.assert_close(all_of_them[:1], one, rtol=1e-4, atol=1e-5)


def test_frozen_norms_keep_their_weights_and_statistics_while_convolutions_learn() -> None:
    given = config(freeze="norms")
    state = build_state(given, CPU)
    before = tensors(state)
    go_on(state, given, 3)
    norms = tuple(name for name, module in state.student.named_modules() if isinstance(module, nn.BatchNorm2d))
    assert len(norms) > 10
    for name, value in tensors(state).items():
        which, _, rest = name.partition(".")
        if which in ("student", "teacher"):
            assert torch.equal(value, before[name]) is below(rest, norms), name


def test_a_run_with_frozen_stages_goes_on_bit_for_bit(tmp_path: Path) -> None:
    given = config(freeze="2", key_norm="split")
    straight = build_state(given, CPU)
    go_on(straight, given, 2)
    with checkpoint.Writer(tmp_path) as writer:
        writer.save(straight, {})
    resumed = build_state(given, CPU)
    checkpoint.load(checkpoint.latest(tmp_path), resumed)
    for state in (straight, resumed):
        go_on(state, given, 2)
        learning = {parameter for parameter in state.student.parameters() if parameter.requires_grad}
        assert set(state.optimizer.state) == learning
    expected = tensors(straight)
    for name, value in tensors(resumed).items():
        assert torch.equal(value, expected[name]), name


def with_dropout(state: TrainState, given: Config) -> None:
    for module in state.student.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    state.enter(given)


GROUPED = {"key_norm": "split", "query_norm": "split"}
RECOMPUTED = {
    "resnet18": config("resnet18", 16, **GROUPED),
    "accumulate": config(train={"accumulate": 2}, **GROUPED),
    "batch norm": config(),
    "mixed within": config(loss={"mix_within": True, "mix_share": 0.5}, **GROUPED),
    "frozen stages": config(freeze="2"),
    "frozen norms": config(freeze="norms"),
    "bf16": config(train={"precision": "bf16"}),
    "dropout": config("timm/test_vit", 64),
    "ranks": config(),
}


@pytest.mark.parametrize("name", RECOMPUTED)
def test_recomputed_blocks_make_the_same_step_bit_for_bit(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, metrics = {}, {}
    if name == "ranks":
        dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
        monkeypatch.setattr("reco_fast.distributed.world_size", lambda: 2)
        monkeypatch.setattr("reco_fast.distributed.all_gather", lambda rows: rows)
    try:
        for recomputed in (False, True):
            given = RECOMPUTED[name]
            train = dataclasses.replace(given.train, checkpoint_activations=recomputed)
            given = dataclasses.replace(given, train=train)
            state = build_state(given, CPU)
            assert isinstance(state.run_student, DistributedDataParallel) == (name == "ranks")
            if name == "dropout":
                with_dropout(state, given)
            metrics[recomputed], found[recomputed] = [], []
            for _ in range(2):
                metrics[recomputed].append(go_on(state, given))
                found[recomputed].append(tensors(state))
    finally:
        if name == "ranks":
            dist.destroy_process_group()
    assert torch.equal(*(torch.cat(measured) for measured in metrics.values()))
    for plain, again in zip(found[False], found[True], strict=True):
        assert list(plain) == list(again)
        for key, value in plain.items():
            assert torch.equal(value, again[key]), key


@pytest.mark.parametrize(
    ("arch", "blocks"),
    [
        ("resnet18", {"BasicBlock": 8}),
        ("mobilenet_v3_small", {"InvertedResidual": 11}),  # which list smaller blocks beside single layers
        ("timm/test_resnet", {"BasicBlock": 3, "Bottleneck": 1}),
        ("timm/test_efficientnet", {"EdgeResidual": 2, "InvertedResidual": 2}),
        ("timm/test_convnext", {"ConvNeXtBlock": 9}),  # in stages, which are in a list as well
        ("timm/test_vit", {"Block": 6}),
    ],
)
def test_blocks_are_the_innermost_repeated_parts(arch: str, blocks: dict[str, int]) -> None:
    encoder = build_encoder(ModelConfig(arch=arch, projection_dim=8), 64)
    assert not recompute_blocks(encoder, arch)
    kinds = Counter(type(module).__name__ for module in encoder.modules())
    assert {name[10:]: n for name, n in kinds.items() if name.startswith("Recomputed")} == blocks


def kept_for_backward(module: nn.Module, work: Callable[[], object]) -> int:
    """Bytes that `work` saves, but for those of `module`."""
    own = {tensor.untyped_storage().data_ptr() for tensor in module.state_dict().values()}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        work()
    return sum(sizes.values())


@pytest.mark.parametrize(
    ("arch", "size", "share"),
    [("timm/test_resnet", 32, 0.5), ("timm/test_vit", 64, 0.25), ("timm/test_convnext", 32, 0.4)],
)
def test_less_is_kept_for_the_backward_pass(arch: str, size: int, share: float) -> None:
    kept = {}
    for recomputed in (False, True):
        given = config(arch, size, train={"checkpoint_activations": recomputed})
        state = build_state(given, CPU)
        kept[recomputed] = kept_for_backward(state.student, partial(go_on, state, given))
    assert 0 < kept[True] < share * kept[False]


def test_compiled_blocks_are_recomputed_and_follow_their_averages_once() -> None:
    """By the partitioner that stands before Inductor, without its minutes."""
    kept, found = {}, {}
    for recomputed in (False, True):
        torch.compiler.reset()
        torch.manual_seed(0)
        blocks = nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 8))
        network = shared_copy(blocks)
        use_groups(network, 2, views=2)
        if recomputed:
            recompute_blocks(nn.ModuleDict({"layer1": network}), "mine")
        compiled = torch.compile(network, backend="aot_eager_decomp_partition", fullgraph=True, dynamic=False)
        images = torch.randn(8, 8, 6, 6)

        def learn(compiled: Callable[[Tensor], Tensor] = compiled, images: Tensor = images) -> None:
            compiled(images).square().sum().backward()

        kept[recomputed] = kept_for_backward(blocks, learn)
        found[recomputed] = blocks.state_dict() | {f"gradient of {n}": p.grad for n, p in network.named_parameters()}
    assert 0 < kept[True] < 0.6 * kept[False]
    assert not torch.equal(found[True]["0.bn2.running_mean"], torch.zeros(8))
    for name, value in found[False].items():
        torch.testing.assert_close(found[True][name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_a_block_whose_list_of_inputs_grows_later_sees_it_as_it_was() -> None:
    torch.manual_seed(0)
    found = []
    for recomputed in (False, True):
        torch.manual_seed(0)
        network = DenseNet(4, (2, 2), 8, num_classes=4)
        if recomputed:
            recompute_blocks(network, "densenet")
        network(torch.randn(4, 3, 64, 64)).square().sum().backward()
        found.append([parameter.grad for parameter in network.parameters()])
    for plain, again in zip(*found, strict=True):
        assert torch.equal(plain, again)


def test_averages_that_are_put_aside_come_back_after_an_error() -> None:
    norm = nn.BatchNorm2d(4)
    with pytest.raises(ValueError, match="expected 4D"), _averages_aside(norm):
        norm(norm(torch.randn(2, 4, 3, 3))[:, 0])
    assert torch.equal(norm.running_mean, torch.zeros(4))
    assert torch.equal(norm.running_var, torch.ones(4))


def test_dropout_in_recomputed_blocks_keeps_a_step_from_being_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states, "CudaBackend", Tape)
    monkeypatch.setattr(states, "runs_captured", lambda config, device: True)
    given = config("timm/test_vit", 64, train={"checkpoint_activations": True})
    state = build_state(given, CPU)
    assert state.graphed is not None
    with_dropout(state, given)
    assert state.graphed is None
    with pytest.raises(
        ConfigError,
        match=r"^--train.cuda-graph: expected no --train.checkpoint-activations for timm/test_vit with dropout",
    ):
        state.enter(dataclasses.replace(given, train=dataclasses.replace(given.train, cuda_graph=True)))
    plain = dataclasses.replace(given, train=TrainConfig(batch_size=ROWS))
    state.enter(plain)
    assert state.graphed is not None
