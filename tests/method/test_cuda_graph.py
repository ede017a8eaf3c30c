"""A captured step does what an ordinary one does: on the CPU with a recorder of operators in the graph's place."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from dispatch import Recorder, Tape
from loading import both_loaders, training
from torch import Tensor, nn

from reco_fast.errors import ConfigError
from reco_fast.method.cuda_graph import WARMUP, CudaBackend, Graphed
from reco_fast.method.state import TrainState, build_state, check_device, runs_captured
from reco_fast.method.step import draw, scheduled, train_step
from reco_fast.pipelines.augmentations import reco_recipe
from reco_fast.pipelines.sources.open import open_source
from reco_fast.settings.config import (
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    ProfileConfig,
    TrainConfig,
)

CPU = torch.device("cpu")
STEPS = WARMUP + 4
BAD = WARMUP + 2  # the step whose gradients are not finite
ADAMW: dict[str, object] = {"name": "adamw", "lr": 0.01, "clip": 0.1}


def config(**train: object) -> Config:
    """Everything that a step can be told changes in these few steps: both relations, the rate, the draws."""
    return Config(
        model=ModelConfig(arch="timm/test_resnet", bank_size=40, projection_dim=16, norm_groups=2),
        loss=LossConfig(ramp=1.0, mix="both"),
        optim=OptimConfig(lr=0.5, warmup_epochs=2.0),
        train=TrainConfig(batch_size=8, epochs=2, **train),
        data=DataConfig(image_size=16),
    )


def run(
    config: Config,
    device: torch.device,
    graphed: Graphed | None,
    *,
    scaled: bool = False,
    around: Callable[[int], contextlib.AbstractContextManager[None]] = lambda step: contextlib.nullcontext(),
) -> tuple[TrainState, Tensor]:
    """State and metrics [STEPS, ...] after `STEPS` steps, the one before last with an overflow."""
    state = build_state(config, device)
    for encoder in (state.run_student.encoder, state.run_teacher.encoder):
        encoder.projector.append(nn.Dropout(0.1))
    state.graphed = graphed
    if scaled:  # as in fp16, in which convolutions on a CPU take for ever
        state.scaler = torch.amp.GradScaler(device.type, growth_interval=2)
    rows = config.train.batch_size
    metrics = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        views = torch.randn(3, rows, 3, 16, 16, generator=generator)
        views[0, 0] = torch.inf if step == BAD else views[0, 0]
        given = tuple(view.to(device).contiguous(memory_format=torch.channels_last) for view in views)
        with around(step):
            draws = draw(step, rows, config, device)
            metrics.append(train_step(state, config, given, draws, scheduled(step, STEPS, config)).clone())
        if step == WARMUP + 1:
            with torch.inference_mode():  # as an evaluation does between two replays
                state.student.backbone.eval()(given[0].float())
            state.student.backbone.train()
    return state, torch.stack(metrics)


def tensors(state: TrainState) -> dict[str, Tensor]:
    found = {
        f"{kind}.{n}": t
        for kind in ("student", "teacher", "bank")
        for n, t in getattr(state, kind).state_dict().items()
    }
    of_weights = enumerate(state.optimizer.state[parameter] for parameter in state.student.parameters())
    return found | {f"optimizer.{number}.{key}": t for number, values in of_weights for key, t in values.items()}


@pytest.mark.parametrize(
    ("optim", "key_norm", "scaled", "train"),
    [
        ({"name": "sgd"}, "batch", False, {"precision": "fp32"}),
        ({"name": "sgd", "clip": 0.1}, "split", False, {"precision": "bf16", "accumulate": 2}),
        ({"name": "lars"}, "ema", True, {"precision": "fp32"}),
        (ADAMW, "batch", True, {"precision": "fp32"}),
        ({"name": "sgd"}, "split", False, {"precision": "fp32", "checkpoint_activations": True}),
    ],
)
def test_operators_run_again_are_the_next_steps_bit_for_bit(
    optim: dict[str, object], key_norm: str, scaled: bool, train: dict[str, object]
) -> None:
    given = config(**train)
    given = dataclasses.replace(
        given,
        model=dataclasses.replace(given.model, key_norm=key_norm, teacher_momentum_end=1.0),
        loss=dataclasses.replace(given.loss, mix_share=0.5 if scaled else 1.0),
        optim=dataclasses.replace(given.optim, **optim),
    )
    tape = Tape()
    plain, plain_metrics = run(given, CPU, None, scaled=scaled)
    taped, taped_metrics = run(given, CPU, Graphed(tape), scaled=scaled)
    assert tape.replays == STEPS - WARMUP - 1
    assert plain_metrics[BAD, -1] == 1
    assert torch.equal(plain_metrics, taped_metrics)
    assert plain.scaler.get_scale() == taped.scaler.get_scale()
    expected = tensors(plain)
    for name, value in tensors(taped).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0, equal_nan=True, msg=name)


def test_a_number_that_python_puts_into_the_step_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def rate_of_the_host(optimizer: torch.optim.Optimizer, lr: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = lr

    monkeypatch.setattr("reco_fast.method.step.set_learning_rate", rate_of_the_host)
    given = config(precision="fp32")
    _, plain = run(given, CPU, None)
    _, taped = run(given, CPU, Graphed(Tape()))
    assert torch.equal(plain[: WARMUP + 2, 0], taped[: WARMUP + 2, 0])  # the next one shows the first wrong rate
    assert not torch.equal(plain[-1, 0], taped[-1, 0])


@pytest.mark.parametrize("arch", ["timm/test_resnet", "resnet18"])
def test_before_a_replay_the_host_only_hands_over_the_batch(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tape, "_run_again", lambda tape: None)
    given = config(precision="fp32")
    given = dataclasses.replace(given, model=dataclasses.replace(given.model, arch=arch, key_norm="split"))
    seen: list[list[str]] = []

    @contextlib.contextmanager
    def recorded(step: int) -> Iterator[None]:
        with Recorder() as recorder:
            yield
        seen.append(recorder.seen)

    run(given, CPU, Graphed(Tape()), around=recorded)
    *_, last = seen
    assert len(seen[0]) > 300
    assert len(last) <= 13  # of them the copy of the metrics is this test's
    assert set(last) == {"lift_fresh", "fill_", "copy_", "clone"}  # numpy's draws; rate and weights; views and draws


def test_inputs_are_copied_into_buffers_of_the_same_layout_that_stay() -> None:
    seen = []

    def double(pair: tuple[Tensor, None]) -> Tensor:
        seen.append(pair[0])
        return 2 * pair[0]

    graphed = Graphed(Tape())
    for step in range(WARMUP + 3):
        given = torch.full((2, 3, 4, 4), float(step)).contiguous(memory_format=torch.channels_last)
        assert torch.equal(graphed(double, (given, None)), 2 * given)
    assert len(seen) == WARMUP + 1  # then the recorder alone
    assert len({tensor.data_ptr() for tensor in seen}) == 1
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("change", "ranks", "device", "message"),
    [
        ({}, 1, "cpu", "--train.cuda-graph: expected a CUDA device, got cpu"),
        ({}, 2, "cuda", "--train.cuda-graph: expected one rank, got 2"),
        ({"optim": OptimConfig(name="apex-sgd")}, 1, "cuda", "--train.cuda-graph: expected another --optim.name"),
        ({"profile": ProfileConfig(enabled=True)}, 1, "cuda", "--train.cuda-graph: expected no --profile.enabled"),
    ],
)
def test_where_it_cannot_work_one_line_says_so_if_it_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, object], ranks: int, device: str, message: str
) -> None:
    monkeypatch.setattr("reco_fast.distributed.world_size", lambda: ranks)
    with pytest.raises(ConfigError, match=message):
        check_device(dataclasses.replace(config(cuda_graph=True), **change), torch.device(device))
    for unasked in (None, False):
        given = dataclasses.replace(config(cuda_graph=unasked), **change)
        assert not runs_captured(given, torch.device(device))
        if given.optim.name == "sgd":  # Apex has a check of its own
            check_device(given, torch.device(device))


@pytest.mark.parametrize(("said", "captured"), [(None, True), (True, True), (False, False)])
def test_one_gpu_runs_a_graph_unless_told_not_to(said: bool | None, captured: bool) -> None:
    assert runs_captured(config(cuda_graph=said), torch.device("cuda")) is captured


def test_a_step_in_which_the_host_waits_stays_as_it_is_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    given = config(precision="fp32")
    tape = Tape()
    tape.waits_in = "backbone.py:7"
    plain, plain_metrics = run(given, CPU, None)
    state, metrics = run(given, CPU, Graphed(tape))
    assert tape.replays == 0
    assert torch.equal(plain_metrics, metrics)
    expected = tensors(plain)
    assert all(torch.equal(value, expected[name]) for name, value in tensors(state).items())
    assert capsys.readouterr().err == "no CUDA graph: the step waits for the GPU in backbone.py:7\n"
    with pytest.raises(ConfigError, match=r"^--train\.cuda-graph: .* backbone\.py:7$"):
        run(given, CPU, Graphed(tape, insist=True))


def test_a_capture_that_fails_is_one_line() -> None:
    class Broken(Tape):
        def capture(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
            try:
                raise RuntimeError("operation not permitted when stream is capturing\nCompile with ...")
            finally:
                raise RuntimeError("operation failed due to a previous error during capture")

    with pytest.raises(
        ConfigError, match=r"got: operation not permitted .* capturing; --train\.no-cuda-graph goes"
    ) as it:
        run(config(precision="fp32"), CPU, Graphed(Broken()))
    assert "\n" not in str(it.value)


def test_a_capture_without_memory_stays_a_matter_of_memory() -> None:
    class Full(Tape):
        def capture(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):  # command_line.py says what needs less
        run(config(precision="fp32"), CPU, Graphed(Full()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("optim", [{}, ADAMW], ids=["sgd", "adamw"])
def test_a_captured_step_is_the_ordinary_one_and_its_replay_waits_for_nothing(
    precision: str, compiled: bool, optim: dict[str, object]
) -> None:
    @contextlib.contextmanager
    def no_waiting_in_replays(step: int) -> Iterator[None]:
        torch.cuda.set_sync_debug_mode("error" if step > WARMUP else "default")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    given = config(precision=precision, compile=compiled)
    given = dataclasses.replace(given, optim=dataclasses.replace(given.optim, **optim))
    device = torch.device("cuda", 0)
    _, plain = run(given, device, None)
    _, captured = run(given, device, Graphed(CudaBackend()), around=no_waiting_in_replays)
    torch.testing.assert_close(captured, plain, rtol=0.02, atol=0.02)  # some of cuDNN's sums have no fixed order


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("waits", [lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: x.cpu()])
def test_where_the_host_waits_for_a_gpu_is_found_before_a_capture(
    waits: Callable[[Tensor], object], capsys: pytest.CaptureFixture[str]
) -> None:
    def work(x: Tensor) -> Tensor:
        x = torch.nn.functional.dropout(x)
        waits(x)
        return 2 * x

    graphed = Graphed(CudaBackend())
    torch.cuda.set_sync_debug_mode("default")
    for _ in range(WARMUP + 3):
        given = torch.randn(5, device="cuda")
        result = graphed(work, given)
        assert ((result == 0) | (result == 4 * given)).all()
    assert f"{__file__}:" in capsys.readouterr().err
    assert torch.cuda.get_sync_debug_mode() == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@both_loaders
@pytest.mark.parametrize("size", [32, 224])
def test_a_capture_and_a_loader_at_work_leave_each_other_alone(
    kind: str, size: int, cifar: Path, photographs: Path
) -> None:
    """A call that synchronises the device from any thread ends a capture."""

    def work(views: tuple[Tensor, ...]) -> Tensor:
        if torch.cuda.is_current_stream_capturing():
            time.sleep(0.2)  # in which the loader makes batches and frees old ones
        return torch.stack([view.float().square().mean((1, 2, 3)) for view in views])

    source = open_source(cifar if size == 32 else photographs)
    with training(kind, source, reco_recipe(size), 16, device="cuda", workers=2) as loader:
        for _ in range(3):  # captures; at 32 px, DALI's second pipeline begins meanwhile
            graphed = Graphed(CudaBackend())
            for _ in range(WARMUP + 9):
                views = next(loader).views
                torch.testing.assert_close(graphed(work, views), work(views))
