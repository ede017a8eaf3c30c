"""A function of tensors captured as a CUDA graph: one launch by the host in place of thousands."""

import sys
import warnings
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from reco_fast.errors import ConfigError

WARMUP = 3  # ordinary calls first: they compile, tune and allocate, none of which may happen in a capture

Work = Callable[[], Tensor]


class Backend(Protocol):
    """What `Graphed` asks of the device."""

    def warm_up(self, work: Work) -> Tensor:
        """Run `work`, in a way that a later capture will not be disturbed by."""

    def rehearse(self, work: Work) -> tuple[Tensor, str | None]:
        """Run `work`, and say where in it the host waits for the device: no capture survives that."""

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

    def rehearse(self, work: Work) -> tuple[Tensor, str | None]:
        mode = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                result = self.warm_up(work)
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        waits = [f"{w.filename}:{w.lineno}" for w in seen if "synchronizing CUDA operation" in str(w.message)]
        return result, waits[0] if waits else None

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

    A function that makes the host wait for the device is not captured but called as it is: a line on stderr says so.
    With `insist`, that is a ConfigError; a capture that fails for another reason always is.
    """

    def __init__(self, backend: Backend, *, insist: bool = False) -> None:
        self._backend = backend
        self._insist = insist
        self._buffers: Any = None
        self._calls = 0
        self._capturable = True
        self._replay: Work | None = None

    def __call__(self, function: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """`function(*inputs)`. `inputs` are tensors, in containers or not, of the same shapes at each call."""
        if not self._capturable:
            return function(*inputs)
        if self._buffers is None:
            self._buffers = pytree.tree_map_only(Tensor, torch.clone, inputs)
        else:
            for buffer, given in zip(pytree.tree_leaves(self._buffers), pytree.tree_leaves(inputs), strict=True):
                if isinstance(buffer, Tensor):
                    buffer.copy_(given, non_blocking=True)
        self._calls += 1
        if self._calls < WARMUP:
            return self._backend.warm_up(lambda: function(*self._buffers))
        if self._calls == WARMUP:
            result, where = self._backend.rehearse(lambda: function(*self._buffers))
            if where is not None:
                self._give_up(where)
            return result
        if self._replay is None:
            self._replay = self._capture(lambda: function(*self._buffers))
        return self._replay()

    def _capture(self, work: Work) -> Work:
        try:
            return self._backend.capture(work)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            cause: BaseException = error
            while cause.__context__ is not None:  # what broke the capture, not what it was broken for
                cause = cause.__context__
            said, *_ = str(cause).splitlines() or [""]
            raise ConfigError(
                f"--train.cuda-graph: expected a step that CUDA can capture, got: {said}; "
                "--train.no-cuda-graph goes without"
            ) from error

    def _give_up(self, where: str) -> None:
        if self._insist:
            raise ConfigError(f"--train.cuda-graph: expected a step that never waits for the GPU; it does in {where}")
        print(f"no CUDA graph: the step waits for the GPU in {where}", file=sys.stderr)
        self._capturable = False
        self._buffers = None
