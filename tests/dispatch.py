"""Operators as PyTorch dispatches them: counted, looked at, or recorded to be run again."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# `.item()`, `int(tensor)`, `if tensor` and shapes that depend on data all reach one of these.
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique_dim", "_unique2"}


def name_of(func: Any) -> str:
    return func._schema.name.removeprefix("aten::")


class Recorder(TorchDispatchMode):
    """Names of the operators in `seen`; `look` is shown each one's name, arguments and results."""

    def __init__(self, look: Callable[[str, list[Any], list[Any]], None] | None = None) -> None:
        super().__init__()
        self.seen: list[str] = []
        self._look = look

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.seen.append(name_of(func))
        if self._look is not None:
            self._look(name_of(func), tree_leaves((args, kwargs)), tree_leaves(result))
        return result


class Tape(TorchDispatchMode):
    """A CUDA graph's stand-in on the CPU: runs the same operators with the same numbers on the same tensors again.

    No line of Python runs again, so whatever Python put in as a number stays as it was, as it would in a graph.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[tuple[Any, Any, Any, Any]] = []
        self.replays = 0
        self.waits_in: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operators.append((func, args, kwargs or {}, result))
        return result

    def warm_up(self, work: Callable[[], Tensor]) -> Tensor:
        return work()

    def rehearse(self, work: Callable[[], Tensor]) -> tuple[Tensor, str | None]:
        return work(), self.waits_in

    def capture(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        recorded: list[Tensor] = []

        def replay() -> Tensor:
            if recorded:
                self._run_again()
            else:  # a CUDA graph is recorded without effect, operators on a CPU are not
                with self:
                    recorded.append(work())
            return recorded[0]

        return replay

    @torch.no_grad()
    def _run_again(self) -> None:
        self.replays += 1
        for func, args, kwargs, before in self.operators:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(before), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)
