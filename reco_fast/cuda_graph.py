"""A function of tensors captured as a CUDA graph: one launch by the host in place of thousands."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

WARMUP = 3  # ordinary calls first: they compile, tune and allocate, none of which may happen in a capture

Work = Callable[[], Tensor]


class Backend(Protocol):
    """What `Graphed` asks of the device."""

    def warm_up(self, work: Work) -> Tensor:
        """Run `work`, in a way that a later capture will not be disturbed by."""

    def capture(self, work: Work) -> Work:
        """Record `work` without effect; what it returns runs the record, and gives the same tensor each time."""


class CudaBackend:
    """https://docs.pytorch.org/docs/stable/notes/cuda.html#whole-network-capture"""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()

    def warm_up(self, work: Work) -> Tensor:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            result = work()
        torch.cuda.current_stream().wait_stream(self._stream)
        return result

    def capture(self, work: Work) -> Work:
        graph = torch.cuda.CUDAGraph()
        # The loader's threads allocate meanwhile, which the default mode takes for a mistake of the capture.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            result = work()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


class Graphed:
    """Calls a function on buffers of its own into which each call's tensors are copied: as it is at first, then from
    the graph captured once.

    So the function may depend on what is in its tensors and in others that stay where they are (weights, banks, the
    learning rate), and on no Python value that changes from call to call. Its result is overwritten by the next call.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._buffers: Any = None
        self._calls = 0
        self._replay: Work | None = None

    def __call__(self, function: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """`function(*inputs)`. `inputs` are tensors, in containers or not, of the same shapes at each call."""
        if self._buffers is None:
            self._buffers = pytree.tree_map_only(Tensor, torch.clone, inputs)
        else:
            for buffer, given in zip(pytree.tree_leaves(self._buffers), pytree.tree_leaves(inputs), strict=True):
                if isinstance(buffer, Tensor):
                    buffer.copy_(given, non_blocking=True)
        self._calls += 1
        if self._calls <= WARMUP:
            return self._backend.warm_up(lambda: function(*self._buffers))
        if self._replay is None:
            self._replay = self._backend.capture(lambda: function(*self._buffers))
        return self._replay()
