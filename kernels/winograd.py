"""3×3 convolutions with fewer multiplications: Winograd's minimal filtering, F(4×4, 3×3) of Lavin and Gray
(arXiv 1509.09308), in float32 on a CPU.

A tile of 4×4 outputs of one pair of channels takes 36 multiplications instead of 144. With d the 6×6 inputs of a tile
and g a 3×3 filter,

    Y = Aᵀ [(G g Gᵀ) ⊙ (Bᵀ d B)] A

and where the sum over input channels is taken, ⊙ becomes 36 matrix products, one for each place in a 6×6 tile:

    M[s] = V[s] · U[s]ᵀ      V = (Bᵀ⊗Bᵀ) d  [36, tiles, C_in]      U = (G⊗G) g  [36, C_out, C_in]      Y = (Aᵀ⊗Aᵀ) M

The gradient in the images is such a convolution too, of the gradient with the filters turned by half a turn and their
channels exchanged; the gradient in the filters is the adjoint:

    ∂/∂g = (G⊗G)ᵀ ∂/∂U       ∂/∂U[s] = Z[s]ᵀ · V[s]       Z = (Aᵀ⊗Aᵀ)ᵀ ∂/∂Y  [36, tiles, C_out]

Images are read and written channels-last. Everything is a few matrix products on pieces that stay in a core's cache.
Its relative error is 1e-6 to 4e-6 where a direct convolution in float32 has 2e-7 to 5e-7.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TILE, INPUTS = 4, 6  # a side of the outputs and of the inputs of a tile
FEWER = 2.5  # times, from which on it was faster than oneDNN's direct convolution with AVX2 and with AVX-512
CACHED_BYTES = 2 * 2**20  # a thread, of one of V, M and Z at a time
# Of U, and of the others whatever the threads: glibc maps what is larger than 32 MiB anew each time, and touching new
# pages takes longer than filling them.
MOST_BYTES = 16 * 2**20

B_T = torch.tensor(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ],
    dtype=torch.float64,
)
G = torch.tensor([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]], dtype=torch.float64) / 24
A_T = torch.tensor(
    [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]], dtype=torch.float64
)
TO_V, TO_U, TO_Y = (torch.kron(m, m).float() for m in (B_T, G, A_T))  # [36, 36], [36, 9], [16, 36]


def pays(images: torch.Size, weight: torch.Size) -> bool:
    """Whether a convolution of `images` [n, C_in, H, W] by `weight` [C_out, C_in, 3, 3] takes so many fewer
    multiplications, those of the transformations included, that it is faster."""
    n, inputs, height, width = images
    outputs, tiles = weight[0], n * math.prod(_rows_and_columns(images))
    direct = 9 * n * height * width * inputs * outputs
    products = INPUTS**2 * tiles * inputs * outputs
    transformations = TO_V.numel() * tiles * inputs + TO_Y.numel() * tiles * outputs + TO_U.numel() * inputs * outputs
    return direct >= FEWER * (products + transformations)


@torch.library.custom_op("reco_fast::winograd_convolution", mutates_args=())
def winograd_convolution(images: Tensor, weight: Tensor) -> Tensor:
    """`F.conv2d(images, weight, padding=1)` for float32 `images` [n, C_in, H, W] and `weight` [C_out, C_in, 3, 3]."""
    return _convolve(images, [_to_u(part).transpose(1, 2) for part in weight.chunk(_weight_parts(weight))])


@torch.library.custom_op("reco_fast::winograd_convolution_backward", mutates_args=())
def winograd_convolution_backward(
    grad: Tensor, images: Tensor, weight: Tensor, needs_images: bool, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    """The gradients in `images` and `weight`, of their shapes, from that in the output [n, C_out, H, W]; empty where
    not needed."""
    grad_images, grad_weight = grad.new_empty(0), grad.new_empty(0)
    parts = _weight_parts(weight)
    if needs_images:
        grad_images = _convolve(grad, [_to_u(part) for part in weight.flip(2, 3).chunk(parts, dim=1)])
    if needs_weight:
        grad_weight = _weight_gradient(grad, images, parts)
    return grad_images, grad_weight


@winograd_convolution.register_fake
def _(images: Tensor, weight: Tensor) -> Tensor:
    shape = images.shape[0], weight.shape[0], *images.shape[2:]
    return images.new_empty(shape).to(memory_format=torch.channels_last)


@winograd_convolution_backward.register_fake
def _(grad: Tensor, images: Tensor, weight: Tensor, needs_images: bool, needs_weight: bool) -> tuple[Tensor, Tensor]:
    def like(x: Tensor, needed: bool) -> Tensor:
        return torch.empty_like(x, memory_format=torch.channels_last) if needed else x.new_empty(0)

    return like(images, needs_images), like(weight, needs_weight)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grads = winograd_convolution_backward(grad, *ctx.saved_tensors, *ctx.needs_input_grad)
    return tuple(x if needed else None for x, needed in zip(grads, ctx.needs_input_grad, strict=True))


winograd_convolution.register_autograd(_backward, setup_context=_setup_context)


class WinogradConv2d(nn.Conv2d):
    """`nn.Conv2d`, by Winograd's algorithm where it can and where that pays."""

    def forward(self, input: Tensor) -> Tensor:
        can = input.device.type == "cpu" and input.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        if not (can and pays(input.shape, self.weight.shape)):
            return super().forward(input)
        out = winograd_convolution(input, self.weight)
        return out if self.bias is None else out + self.bias[:, None, None]


def use_winograd(model: nn.Module) -> None:
    """Make every 3×3 convolution of stride 1 in `model` a `WinogradConv2d`; parameters and state dict stay."""
    for module in model.modules():
        if type(module) is nn.Conv2d and _is_plain(module):
            module.__class__ = WinogradConv2d


def _is_plain(module: nn.Conv2d) -> bool:
    strides = module.stride == module.dilation == module.padding == (1, 1)
    return strides and module.kernel_size == (3, 3) and module.groups == 1 and module.padding_mode == "zeros"


def _convolve(images: Tensor, us: list[Tensor]) -> Tensor:
    """[n, C_out, H, W], channels-last, from `images` [n, C_in, H, W] and Uᵀ [36, C_in, C_out], cut along C_out."""
    n, _, height, width = images.shape
    rows, columns = _rows_and_columns(images.shape)
    outputs = [u.shape[2] for u in us]
    out = images.new_empty(n, rows, TILE, columns, TILE, sum(outputs))
    parts = _image_parts(images, sum(outputs))
    for part, to in zip(_nhwc(images).chunk(parts), out.permute(2, 4, 0, 1, 3, 5).chunk(parts, dim=2), strict=True):
        v = _to_v(part)
        for u, to_channels in zip(us, to.split(outputs, dim=-1), strict=True):
            y = TO_Y @ torch.bmm(v, u).view(len(TO_V), -1)
            to_channels.copy_(y.view(to_channels.shape))
    return out.view(n, rows * TILE, columns * TILE, -1)[:, :height, :width].contiguous().permute(0, 3, 1, 2)


def _weight_gradient(grad: Tensor, images: Tensor, weight_parts: int) -> Tensor:
    """[C_out, C_in, 3, 3], channels-last."""
    inputs = images.shape[1]
    grad_us = [grad.new_zeros(len(TO_U), part.shape[1], inputs) for part in grad.chunk(weight_parts, dim=1)]
    parts = _image_parts(images, grad.shape[1])
    for image, above in zip(_nhwc(images).chunk(parts), _nhwc(grad).chunk(parts), strict=True):
        v = _to_v(image)
        for grad_u, channels in zip(grad_us, above.chunk(weight_parts, dim=-1), strict=True):
            grad_u.baddbmm_(_to_z(channels).transpose(1, 2), v)
    grads = [(TO_U.T @ grad_u.view(len(TO_U), -1)).view(3, 3, -1, inputs) for grad_u in grad_us]
    return torch.cat(grads, dim=2).permute(2, 3, 0, 1).contiguous(memory_format=torch.channels_last)


def _to_u(weight: Tensor) -> Tensor:
    """U [36, C_out, C_in] of filters [C_out, C_in, 3, 3]."""
    outputs, inputs = weight.shape[:2]
    return (TO_U @ weight.permute(2, 3, 0, 1).reshape(9, -1)).view(-1, outputs, inputs)


def _to_v(images: Tensor) -> Tensor:
    """V [36, tiles, C] of images [n, H, W, C]; tiles overlap by two."""
    height, width, channels = images.shape[1:]
    padded = F.pad(images, (0, 0, 1, 1 + -width % TILE, 1, 1 + -height % TILE))
    tiles = padded.unfold(1, INPUTS, TILE).unfold(2, INPUTS, TILE)  # [n, rows, columns, C, 6, 6]
    return (TO_V @ tiles.permute(4, 5, 0, 1, 2, 3).reshape(len(TO_V), -1)).view(len(TO_V), -1, channels)


def _to_z(grad: Tensor) -> Tensor:
    """Z [36, tiles, C] of the gradient in outputs [n, H, W, C]."""
    height, width, channels = grad.shape[1:]
    if height % TILE or width % TILE:
        grad = F.pad(grad, (0, 0, 0, -width % TILE, 0, -height % TILE))
    tiles = grad.unflatten(2, (-1, TILE)).unflatten(1, (-1, TILE))  # [n, rows, 4, columns, 4, C]
    tiles = tiles.permute(2, 4, 0, 1, 3, 5).reshape(len(TO_Y), -1)
    return (TO_Y.T @ tiles).view(len(TO_V), -1, channels)


def _nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def _rows_and_columns(images: torch.Size) -> tuple[int, int]:
    """Of tiles, on images [n, C, H, W]."""
    return math.ceil(images[2] / TILE), math.ceil(images[3] / TILE)


def _image_parts(images: Tensor, outputs: int) -> int:
    tiles, channels = len(images) * math.prod(_rows_and_columns(images.shape)), max(images.shape[1], outputs)
    cached = min(CACHED_BYTES * torch.get_num_threads(), MOST_BYTES)
    return math.ceil(4 * len(TO_V) * tiles * channels / cached)


def _weight_parts(weight: Tensor) -> int:
    return math.ceil(4 * len(TO_V) * weight.shape[0] * weight.shape[1] / MOST_BYTES)
