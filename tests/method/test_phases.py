"""Phases of a training: where they begin, that each has its step, and that a run crosses their borders."""

import dataclasses
import functools
import gc
import itertools
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from dispatch import Tape
from loading import LOADERS, both_loaders, training
from safetensors.torch import load_file
from small_runs import SMALL, metrics, write_classes, write_pictures
from torch import Tensor, nn

from reco_fast import train
from reco_fast.data.loaders import recipe
from reco_fast.method import state as states
from reco_fast.method.cuda_graph import WARMUP
from reco_fast.method.passes import Passes
from reco_fast.method.phases import Phase, passes, phases
from reco_fast.method.state import TrainState, build_state
from reco_fast.method.step import draw, scheduled, train_step
from reco_fast.pipelines.augmentations import reco_recipe
from reco_fast.pipelines.sources.folders import FolderSource
from reco_fast.pipelines.sources.open import open_source
from reco_fast.settings.config import Config, DataConfig, LossConfig, ModelConfig, TrainConfig
from reco_fast.training import loop, stage

CPU = torch.device("cpu")
BOTH = "--data.grow-from 16 --loss.start 0.5 --loss.ramp 0.3 --train.epochs 3".split()
BOTH += ["--train.precision", "fp32"]  # in bf16 a convolution of 1 × 1 maps is not the same twice on some CPUs
TOTAL = 10  # steps of them: 3 epochs of 56 images, 16 a step
BORDERS = [(0, 16, "moco"), (4, 24, "moco"), (5, 24, "reco"), (8, 32, "reco")]
CLOCKS = {"images_per_second", "data_wait_fraction", "step_ms_p50", "step_ms_p95"}


def configured(size: int, grow_from: int | None = None, **loss: Any) -> Config:
    return Config(data=DataConfig(image_size=size, grow_from=grow_from), loss=LossConfig(**loss))


def seen(found: list[Phase]) -> list[tuple[int, int, str]]:
    def objective(loss: LossConfig) -> str:
        return "reco" if loss.uses_global or loss.uses_local else "moco"

    return [(p.first_step, p.config.data.image_size, objective(p.config.loss)) for p in found]


@pytest.mark.parametrize(
    ("config", "total", "expected"),
    [
        (configured(224, 160), 1000, [(0, 160, "reco"), (375, 192, "reco"), (750, 224, "reco")]),
        (configured(160, 100), 800, [(0, 100, "reco"), (280, 128, "reco"), (600, 160, "reco")]),
        (configured(32, 16, start=0.5), TOTAL, BORDERS),
        (configured(96, 64, start=0.75), 100, [(0, 64, "moco"), (75, 96, "reco")]),  # both at once
        (configured(60, 57), 100, [(0, 57, "reco"), (75, 60, "reco")]),
        (configured(32, start=0.29), 100, [(0, 32, "moco"), (29, 32, "reco")]),
        (configured(32, start=0.999), 100, [(0, 32, "moco"), (99, 32, "reco")]),  # they do begin
        (configured(1024, 16), 2, [(0, 352, "reco"), (1, 1024, "reco")]),  # fewer steps than sizes
        (configured(224, 160, start=0.5), 1, [(0, 224, "reco")]),
        (configured(32, 16, start=0.5, objective="moco"), 8, [(0, 16, "moco"), (3, 24, "moco"), (6, 32, "moco")]),
    ],
)  # fmt: skip
def test_where_phases_begin(config: Config, total: int, expected: list[tuple[int, int, str]]) -> None:
    found = phases(config, total)
    assert seen(found) == expected
    changes = [after[0] for before, after in itertools.pairwise(expected) if before[2] != after[2]]
    assert [phase.first_step for phase in found if phase.fills_weak_bank] == changes
    assert found[-1].config is config


@pytest.mark.parametrize("keys", ["strong", "weak"])
def test_keys_are_of_one_kind_from_the_start(keys: str) -> None:
    found = phases(configured(32, start=0.5, keys=keys), 100)
    assert [phase.fills_weak_bank for phase in found] == [False, keys == "strong"]
    before, after = (recipe(phase.config).views for phase in found)
    weak = [view.jitter_probability == 0 for view in before]
    assert weak == [False, keys == "weak"]
    assert [view.jitter_probability == 0 for view in after] == (weak if keys == "weak" else [*weak, True])


@pytest.mark.parametrize(
    "config",
    [configured(224), configured(64, 64), configured(32, start=0.001), configured(32, start=0.5, objective="moco"),
     configured(32, start=0.5, global_weight=0.0, local_weight=0.0)],
)  # fmt: skip
def test_without_the_settings_or_where_they_change_nothing_the_run_is_one_phase(config: Config) -> None:
    assert phases(config, 100) == [Phase(0, config)]
    assert phases(config, 100)[0].config is config


@pytest.mark.parametrize(
    ("data", "loss", "expected"),
    [
        ({}, {}, 8.0),
        ({}, {"objective": "moco"}, 4.0),
        ({}, {"keys": "weak"}, 7.0),
        ({}, {"mix_size": 16, "mix_share": 0.5}, 5.0 + 3 / 8),
        ({}, {"keys": "weak", "mix_share": 0.5, "mix_within": True}, 4.0),
        ({"weak_size": 16}, {}, 7.25),
        ({}, {"start": 0.25}, 7.0),
        # 16 px until 3/8 of the training, 24 until 3/4.
        ({"grow_from": 16}, {}, 8 * (3 / 8 / 4 + 3 / 8 * 9 / 16 + 1 / 4)),
        ({"grow_from": 16, "weak_size": 24}, {"mix_size": 24}, 2 * 3 / 8 + 4.5 * 3 / 8 + (4 + 4 * 9 / 16) / 4),
    ],
    ids=str,
)
def test_the_passes_of_a_training_are_counted(data: dict[str, Any], loss: dict[str, Any], expected: float) -> None:
    assert passes(Config(data=DataConfig(**data), loss=LossConfig(**loss))) == pytest.approx(expected)


def test_a_smaller_view_is_no_larger_than_one_that_grows() -> None:
    config = Config(data=DataConfig(grow_from=16, weak_size=24), loss=LossConfig(mix_size=20))
    sides = [(p.config.data.image_size, p.config.data.weak_size, p.config.loss.mix_size) for p in phases(config, 100)]
    assert sides == [(16, 16, 16), (24, 24, 20), (32, 24, 20)]
    assert [p.config.data.weak_size for p in phases(Config(data=DataConfig(grow_from=16)), 100)] == 3 * [None]


def test_the_local_relation_alone_reads_no_weak_bank() -> None:
    assert not any(phase.fills_weak_bank for phase in phases(configured(32, start=0.5, global_weight=0.0), 100))


def test_the_relations_weigh_nothing_before_they_begin_and_then_grow() -> None:
    config = configured(32, start=0.2, ramp=0.5)
    weights = [scheduled(step, 100, config).relation_weight for step in range(100)]
    assert weights[:20] == 20 * [0.0]
    assert weights[20:70] == pytest.approx([(n + 1) / 50 for n in range(50)])
    assert weights[70:] == 30 * [1.0]


@pytest.mark.parametrize(("size", "small"), [(96, 64), (64, 16)])
def test_views_that_grow_have_the_blur_and_the_normalisation_of_the_last_ones(size: int, small: int) -> None:
    config = configured(size, small)
    for phase in phases(config, 100):
        assert recipe(phase.config, size) == dataclasses.replace(reco_recipe(size), size=phase.config.data.image_size)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_classes(tmp_path_factory.mktemp("phases") / "train", 28)


def command(images: Path, folder: Path, *arguments: object) -> Config:
    data = ["--data.path", images, "--run.dir", folder, "--run.log-every", 1]
    return train.parse([str(part) for part in ("cifar10", *data, *SMALL, *BOTH, *arguments)])[0]


def train_lines(run: Path) -> list[dict[str, Any]]:
    lines = [line for line in metrics(run) if line["kind"] == "train"]
    return [{name: value for name, value in line.items() if name not in CLOCKS} for line in lines]


@pytest.fixture(scope="module")
def straight(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A run over all borders by one process, with this loader."""

    @functools.cache
    def run(loader: str) -> Path:
        folder = tmp_path_factory.mktemp("straight") / loader
        return train.train(command(images, folder, "--data.loader", loader, "--data.workers", 1))

    return run


def same_ends(one: Path, other: Path) -> None:
    """Weights, teacher, banks, momenta and all that was measured but time."""
    first, second = (load_file(path / f"checkpoints/step-{TOTAL:09d}.safetensors") for path in (one, other))
    assert set(first) == set(second)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    logged = train_lines(one)
    assert len(logged) == TOTAL
    assert logged == train_lines(other)


@pytest.mark.parametrize("loader", LOADERS)
def test_a_run_goes_on_at_every_side_of_every_border_bit_for_bit(
    images: Path, straight: Callable[[str], Path], tmp_path: Path, loader: str
) -> None:
    options = ("--data.loader", loader, "--data.workers", 1)
    for name, stops in (("odd", (3, 5, 6, 8)), ("even", (4, 7, 9))):
        for stop in (*stops, TOTAL):
            train.train(command(images, tmp_path / name, *options, "--train.max-steps", stop))
        same_ends(straight(loader), tmp_path / name)


class Killed(Exception):
    pass


@pytest.mark.parametrize("last", [4, 5])
def test_a_run_that_dies_behind_a_border_crosses_it_again(
    images: Path, straight: Callable[[str], Path], tmp_path: Path, last: int
) -> None:
    """From the checkpoint of the step before, after the dead process had changed loader, step and bank."""
    options = ("--data.loader", "torch", "--data.workers", 1, "--run.checkpoint-steps", 1)

    def die(line: dict[str, Any]) -> None:
        if line["kind"] == "train" and line["step"] == last + 1:
            raise Killed

    with pytest.raises(Killed):
        train.train(command(images, tmp_path / "killed", *options), on_metrics=die)
    newest = sorted((tmp_path / "killed" / "checkpoints").glob("*.safetensors"))[-1]
    assert newest.stem == f"step-{last:09d}"
    train.train(command(images, tmp_path / "killed", *options))
    same_ends(straight("torch"), tmp_path / "killed")


def test_what_a_step_does_and_says_follows_the_phase(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    passes: list[int] = []
    given: list[tuple[int, int, list[int], Tensor]] = []
    forward, step = Passes.forward, loop.train_step

    def counted(self: Passes, *views: Tensor) -> tuple[Tensor, ...]:
        passes.append(len(views))
        return forward(self, *views)

    def watched(state: TrainState, config: Config, views: tuple[Tensor, ...], *rest: Any) -> Tensor:
        passes.clear()
        weak = state.bank.weak_keys.clone()
        same = torch.equal(weak, state.bank.keys)
        metrics = step(state, config, views, *rest)
        given.append((len(views), views[0].shape[-1], passes.copy(), torch.tensor([same])))
        assert torch.equal(weak, state.bank.weak_keys) == (len(views) == 2)
        return metrics

    monkeypatch.setattr(Passes, "forward", counted)
    monkeypatch.setattr(loop, "train_step", watched)
    opened: list[tuple[Any, Any]] = []
    really = stage.open_training_loader

    def opening(*arguments: Any, after: Any, **options: Any) -> Any:
        opened.append((after, really(*arguments, after=after, **options)))
        return opened[-1][1]

    monkeypatch.setattr(stage, "open_training_loader", opening)
    train.train(command(images, tmp_path / "run", "--data.loader", "torch", "--run.log-every", 100))
    early = [(2, 16, [1, 1])] * 4 + [(2, 24, [1, 1])]
    assert [entry[:3] for entry in given] == [*early, *[(3, 24, [2, 2])] * 3, *[(3, 32, [2, 2])] * 2]
    assert [number for number, entry in enumerate(given) if entry[3]] == [5]  # filled once, before that step
    assert [after for after, _ in opened] == [None, *(loader for _, loader in opened[:-1])]  # each takes over
    lines = train_lines(tmp_path / "run")
    assert [line["step"] for line in lines] == [4, 5, 8, 10]  # each is of one phase
    for line in lines:
        before = line["step"] <= 5
        assert ("chance_global" in line, "chance_local" in line) == (not before, not before)
        assert (line["loss_global"] == line["loss_local"] == 0) == before
        assert (line["relation_weight"] == 0) == before
        assert (line["loss"] == line["loss_instance"]) == before
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("from step")]
    assert said == [
        f"from step {first + 1} on: views of {size} px, objective {name}" for first, size, name in BORDERS[1:]
    ]


@both_loaders
def test_a_loader_that_takes_over_knows_what_was_bad_and_gives_the_same_views(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pictures(tmp_path, 22)
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_text("text")
    source, small, large = open_source(tmp_path), reco_recipe(16), reco_recipe(24)
    with training(kind, source, small) as first:
        for _ in range(3):  # an epoch
            next(first)
    bad = first.bad_images
    assert set(bad) == {"a.jpg", "b.jpg"}
    with training(kind, source, large, first_step=3) as fresh:
        expected = next(fresh)
    read: list[int] = []
    if kind == "dali":
        really = FolderSource.read
        monkeypatch.setattr(FolderSource, "read", lambda self, index: read.append(index) or really(self, index))
    with training(kind, source, large, first_step=3, after=first) as second:
        assert second.bad_images == bad
        batch = next(second)
    assert torch.equal(batch.indices, expected.indices)
    for view, other in zip(batch.views, expected.views, strict=True):
        assert torch.equal(view, other)
    assert read == []  # DALI's keeps what has been read


def steps(state: TrainState, found: list[Phase], config: Config, total: int) -> Tensor:
    measured = []
    for number, phase in enumerate(found):
        state.enter(phase.config)
        last = found[number + 1].first_step if phase is not found[-1] else total
        for step in range(state.step, last):
            generator, size = torch.Generator().manual_seed(step), phase.config.data.image_size
            views = torch.randn(2 + phase.config.loss.uses_global, 8, 3, size, size, generator=generator)
            given = tuple(view.contiguous(memory_format=torch.channels_last) for view in views)
            draws = draw(step, 8, phase.config, CPU)
            measured.append(train_step(state, phase.config, given, draws, scheduled(step, total, config)).clone())
    return torch.stack(measured)


def test_a_cuda_graph_is_captured_anew_in_each_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    total = 20
    config = Config(
        model=ModelConfig(arch="timm/test_resnet", bank_size=40, projection_dim=16, norm_groups=2),
        data=DataConfig(image_size=24, grow_from=16),
        loss=LossConfig(start=0.35, ramp=0.4),
        train=TrainConfig(batch_size=8, epochs=2, precision="fp32"),
    )
    found = phases(config, total)
    assert seen(found) == [(0, 16, "moco"), (7, 16, "reco"), (15, 24, "reco")]
    plain = build_state(config, CPU)
    expected = steps(plain, found, config, total)
    tapes: list[Tape] = []
    monkeypatch.setattr(states, "CudaBackend", lambda: tapes.append(Tape()) or tapes[-1])
    monkeypatch.setattr(states, "runs_captured", lambda config, device: True)
    taped = build_state(config, CPU)
    assert torch.equal(steps(taped, found, config, total), expected)
    assert [tape.replays for tape in tapes] == [0, *(count - WARMUP - 1 for count in (7, 8, 5))]
    for kind in ("student", "teacher", "bank"):
        for name, value in getattr(taped, kind).state_dict().items():
            assert torch.equal(value, getattr(plain, kind).state_dict()[name]), name


def test_what_a_step_called_before_is_gone_and_each_size_has_its_own_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hooks of a DistributedDataParallel that is still there would hear of the next one's gradients."""
    compiled: list[nn.Module] = []
    monkeypatch.setattr(states, "compile_encoder", lambda module: compiled.append(module) or module)
    forgotten: list[bool] = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: forgotten.append(True))  # which collects garbage, too
    config = Config(
        model=ModelConfig(arch="timm/test_resnet", bank_size=40, projection_dim=16),
        data=DataConfig(image_size=24, grow_from=16),
        train=TrainConfig(batch_size=8, precision="bf16", compile=True),
    )
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        with monkeypatch.context() as several:
            several.setattr("reco_fast.distributed.world_size", lambda: 2)
            state = build_state(config, CPU)
            before = weakref.ref(state.run_student)
            state.run_student.itself = [state.run_student]  # it may be in such a cycle, but is not always
            gc.disable()  # which might come by chance
            state.enter(phases(config, 8)[0].config)
            gone = before() is None
        assert gone
        assert (len(compiled), len(forgotten)) == (4, 1)
    finally:
        gc.enable()
        dist.destroy_process_group()
    kept: Callable[[], dict[str, Tensor]] = lambda: dict(state.teacher.named_parameters())  # noqa: E731
    with torch.no_grad():
        for weight in kept().values():
            weight.add_(1)
    state.update_teacher.refresh()  # the copies that run now follow the teacher's weights
    copies = dict(state.run_teacher.encoder.named_parameters())
    assert any(copy.dtype == torch.bfloat16 for copy in copies.values())
    for name, weight in kept().items():
        torch.testing.assert_close(copies[name].float(), weight, rtol=0.01, atol=0.01)
