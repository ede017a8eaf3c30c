"""Winograd's convolution against a direct one in float64, and where it is used."""

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dispatch import Recorder
from torch import Tensor, nn

from reco_fast.config import ConfigError
from reco_fast.kernels import winograd
from reco_fast.kernels.winograd import WinogradConv2d, use_winograd, winograd_convolution
from reco_fast.state import pick_winograd

BOUND = 1e-5  # relative Frobenius norm, as for the loss's gradients


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """`torch.empty` returns NaN, so that whatever is left unwritten shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def problem(n: int, inputs: int, outputs: int, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images, filters, and a gradient in the output; images without negative numbers, as after a ReLU."""
    generator = torch.Generator().manual_seed(n + inputs + height)
    images = torch.randn(n, inputs, height, width, generator=generator).abs()
    weight = torch.randn(outputs, inputs, 3, 3, generator=generator)
    return images, weight, torch.randn(n, outputs, height, width, generator=generator)


def solve(convolve: Any, images: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output and both gradients."""
    images, weight = images.detach().requires_grad_(), weight.detach().requires_grad_()
    out = convolve(images, weight)
    return out.detach(), *torch.autograd.grad(out, (images, weight), grad)


def check(images: Tensor, weight: Tensor, grad: Tensor) -> None:
    found = solve(winograd_convolution, images, weight, grad)
    wanted = solve(lambda x, w: F.conv2d(x, w, padding=1), images.double(), weight.double(), grad.double())
    for name, one, exact in zip(("output", "images", "weight"), found, wanted, strict=True):
        assert one.shape == exact.shape
        assert one.dtype == torch.float32
        assert one.is_contiguous(memory_format=torch.channels_last)
        error = (one - exact).norm() / exact.norm()
        print(f"{name}: {error:.1e}")
        assert error < BOUND, name


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (4, 4), (5, 4), (7, 7), (9, 14), (16, 16)])
@pytest.mark.parametrize("channels", [(1, 1), (3, 8), (17, 5)])
@pytest.mark.parametrize("n", [1, 3])
def test_output_and_gradients(n: int, channels: tuple[int, int], size: tuple[int, int]) -> None:
    check(*problem(n, *channels, *size))


@pytest.mark.parametrize(("cached", "most"), [(1, 2**30), (20_000, 2**30), (2**30, 9_000), (20_000, 30_000)])
def test_in_pieces(monkeypatch: pytest.MonkeyPatch, cached: int, most: int) -> None:
    monkeypatch.setattr(winograd, "CACHED_BYTES", cached)
    monkeypatch.setattr(winograd, "MOST_BYTES", most)
    check(*problem(7, 10, 13, 6, 9))


@pytest.mark.parametrize(("threads", "images"), [(1, 2), (4, 8), (64, 16)])
def test_a_piece_grows_with_the_threads_up_to_a_bound(
    monkeypatch: pytest.MonkeyPatch, threads: int, images: int
) -> None:
    """Of 64 images with 6 tiles of 13 channels: 11 KB an image."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(winograd, "CACHED_BYTES", 2 * 36 * 6 * 13 * 4)
    monkeypatch.setattr(winograd, "MOST_BYTES", 16 * 36 * 6 * 13 * 4)
    pieces: list[int] = []
    to_v = winograd._to_v
    monkeypatch.setattr(winograd, "_to_v", lambda part: pieces.append(len(part)) or to_v(part))
    winograd_convolution(*problem(64, 10, 13, 6, 9)[:2])
    assert pieces == [images] * (64 // images)


@pytest.mark.parametrize(("channels", "size"), [(128, 16), (256, 8), (512, 4)])
def test_the_layers_that_it_is_for(channels: int, size: int) -> None:
    check(*problem(6, channels, channels, size, size))


@pytest.mark.parametrize("given", list(itertools.product([torch.contiguous_format, torch.channels_last], repeat=3)))
def test_any_layout(given: tuple[torch.memory_format, ...]) -> None:
    layouts = zip(problem(2, 6, 7, 5, 8), given, strict=True)
    check(*(tensor.contiguous(memory_format=layout) for tensor, layout in layouts))


def test_strided_and_broadcast_inputs() -> None:
    images, weight, grad = problem(4, 6, 7, 8, 8)
    check(images[::2, :, 1:, ::2], weight[:, :, :, [2, 0, 1]], grad[::2, :1, 1:, 4:].expand(2, 7, 7, 4))


@pytest.mark.parametrize("entry", [("TO_V", 7, 7), ("TO_U", 14, 4), ("TO_Y", 5, 22)])
def test_a_wrong_number_in_a_transformation_fails(monkeypatch: pytest.MonkeyPatch, entry: tuple[str, int, int]) -> None:
    name, row, column = entry
    wrong = getattr(winograd, name).clone()
    assert wrong[row, column] != 0
    wrong[row, column] *= 1.01
    monkeypatch.setattr(winograd, name, wrong)
    with pytest.raises(AssertionError, match="output"):
        check(*problem(3, 17, 5, 9, 14))


def test_only_the_gradients_that_are_needed() -> None:
    images, weight, grad = problem(2, 3, 4, 8, 8)
    sizes: list[list[int]] = []

    def look(name: str, _: list[Any], results: list[Any]) -> None:
        if name == "reco_fast::winograd_convolution_backward":
            sizes.append([result.numel() for result in results])

    for needed in (images, weight):
        needed.requires_grad_()
        with Recorder(look):
            (found,) = torch.autograd.grad(winograd_convolution(images, weight), needed, grad)
        assert found.shape == needed.shape
        needed.requires_grad_(False)
    assert sizes == [[images.numel(), 0], [0, weight.numel()]]


def test_the_operators_keep_pytorchs_rules() -> None:
    images, weight, grad = problem(2, 3, 4, 5, 8)
    arguments = images.requires_grad_(), weight.requires_grad_()
    torch.library.opcheck(winograd_convolution, arguments)
    for needs in itertools.product([False, True], repeat=2):
        given = (grad, images.detach(), weight.detach(), *needs)
        torch.library.opcheck(winograd.winograd_convolution_backward, given)


def test_a_second_derivative_is_refused() -> None:
    images, weight, grad = problem(2, 3, 4, 5, 8)
    out = winograd_convolution(images.requires_grad_(), weight.requires_grad_())
    (first,) = torch.autograd.grad(out, images, grad, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        first.sum().backward()


def test_torch_compile_traces_the_whole_of_it() -> None:
    given = problem(6, 17, 16, 8, 8)
    compiled = torch.compile(winograd_convolution, fullgraph=True, backend="aot_eager")
    for one, other in zip(solve(compiled, *given), solve(winograd_convolution, *given), strict=True):
        torch.testing.assert_close(one, other)


def used(module: nn.Module, images: Tensor) -> bool:
    with Recorder() as recorder:
        module(images)
    return "reco_fast::winograd_convolution" in recorder.seen


def of_size(n: int, channels: int, size: int) -> Tensor:
    return torch.randn(n, channels, size, size).contiguous(memory_format=torch.channels_last)


def test_modules_stay_what_they_are() -> None:
    model = nn.Sequential(nn.Conv2d(128, 160, 3, padding=1), nn.ReLU(), nn.Conv2d(160, 128, 3, padding=1, bias=False))
    plain, parameters = copy.deepcopy(model), list(model.parameters())
    use_winograd(model)
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    assert model.state_dict().keys() == plain.state_dict().keys()
    copied = copy.deepcopy(model)
    assert isinstance(copied[0], WinogradConv2d)
    images = of_size(16, 128, 8)
    assert used(model, images)
    assert not used(plain, images)
    torch.testing.assert_close(copied(images), plain(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(128, 128, 3, padding=1, stride=2),
        nn.Conv2d(128, 128, 3, padding=1, groups=2),
        nn.Conv2d(128, 128, 3, padding=1, dilation=2),
        nn.Conv2d(128, 128, 3),
        nn.Conv2d(128, 128, 3, padding="same"),
        nn.Conv2d(128, 128, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(128, 128, 5, padding=1),
        nn.ConvTranspose2d(128, 128, 3, padding=1),
        nn.modules.conv.LazyConv2d(128, 3, padding=1),
    ],
)
def test_other_convolutions_are_left_alone(module: nn.Module) -> None:
    kind = type(module)
    use_winograd(nn.Sequential(module))
    assert type(module) is kind


def test_it_is_used_where_it_can_and_pays() -> None:
    module = nn.Conv2d(128, 128, 3, padding=1)
    use_winograd(module)
    assert isinstance(module, WinogradConv2d)
    assert used(module, of_size(16, 128, 8))
    assert not used(module, of_size(16, 128, 6))  # tiles of 4×4 that are half empty
    assert not used(module, of_size(1, 128, 4))  # one tile, and all filters to transform
    with torch.autocast("cpu", torch.bfloat16):
        assert not used(module, of_size(16, 128, 8))
    assert not used(copy.deepcopy(module).bfloat16(), of_size(16, 128, 8).bfloat16())
    assert not used(copy.deepcopy(module).double(), of_size(16, 128, 8).double())
    assert not used(copy.deepcopy(module).to("meta"), of_size(16, 128, 8).to("meta"))
    narrow = nn.Conv2d(64, 64, 3, padding=1)
    use_winograd(narrow)
    assert not used(narrow, of_size(8, 64, 32))


LAYERS = [(64, 32), (128, 28), (128, 16), (256, 14), (256, 8), (512, 7), (512, 4)]  # channels and side, of ResNets


@pytest.mark.parametrize("by", ["direct", "winograd"])
@pytest.mark.parametrize(("channels", "size"), LAYERS)
def test_forward_and_backward(benchmark: Any, request: Any, channels: int, size: int, by: str) -> None:
    """`pytest --benchmark tests/test_winograd.py -k backward`: 128 images, channels-last."""
    torch.use_deterministic_algorithms(False)  # which fills memory with NaN
    n = 128 if request.config.getoption("--benchmark") else 2
    given = [x.contiguous(memory_format=torch.channels_last) for x in problem(n, channels, channels, size, size)]
    convolve = winograd_convolution if by == "winograd" else lambda x, w: F.conv2d(x, w, padding=1)
    benchmark.group = f"{channels} channels, {size}×{size}, pays: {winograd.pays(given[0].shape, given[1].shape)}"
    out = benchmark.pedantic(solve, (convolve, *given), rounds=7, warmup_rounds=1)
    assert all(tensor.isfinite().all() for tensor in out)


@pytest.mark.parametrize("mkl", [True, False])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_trainer_takes_it_for_float32_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, device: str, precision: torch.dtype, mkl: bool
) -> None:
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    where = torch.device(device), precision
    possible = device == "cpu" and precision == torch.float32
    assert not pick_winograd("direct", *where)
    assert pick_winograd("auto", *where) == (possible and mkl)
    if possible:
        assert pick_winograd("winograd", *where)
    else:
        with pytest.raises(ConfigError, match=rf"--train\.convolution: .*, got {str(precision)[6:]} on {device}"):
            pick_winograd("winograd", *where)
