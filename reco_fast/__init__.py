"""reco_fast: a fast trainer for relation-aware contrastive learning (ReCo, arXiv 2211.01796).

`from reco_fast import ReCoLoss, reco_loss` for the loss alone; `python -m reco_fast.train` for the trainer.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["ReCoLoss", "ReCoLossOutput", "reco_loss"]

# `kernels/`, `pipelines/` and `profiling/` stand at the top of a checkout but are `reco_fast.kernels` and so on.
# An installed package has them inside it; a bare checkout (no install, or an editable one) finds them here.
_root = Path(__file__).resolve().parents[1]
if (_root / "setup.py").is_file():
    __path__.append(str(_root))

from reco_fast.pipelines.sources import caches  # noqa: E402 - from here on it is found
from reco_fast.settings import terminal  # noqa: E402

if terminal.is_command():
    terminal.leave_at_interrupt()
    caches.find_caches()

if TYPE_CHECKING:
    from reco_fast.method.losses import ReCoLoss, ReCoLossOutput, reco_loss


def __getattr__(name: str) -> Any:
    if name in __all__:  # at first use: processes that only read or decode images do without PyTorch
        from reco_fast.method import losses

        return getattr(losses, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
