"""reco_fast: a fast trainer for relation-aware contrastive learning (ReCo, arXiv 2211.01796).

`from reco_fast import ReCoLoss, reco_loss` for the loss alone; `python -m reco_fast.train` for the trainer.
"""

from pathlib import Path

__version__ = "0.1.0"
__all__ = ["ReCoLoss", "ReCoLossOutput", "reco_loss"]

# `kernels/`, `pipelines/` and `profiling/` stand at the top of a checkout but are `reco_fast.kernels` and so on.
# An installed package has them inside it; a bare checkout (no install, or an editable one) finds them here.
_root = Path(__file__).resolve().parents[1]
if (_root / "setup.py").is_file():
    __path__.append(str(_root))

from reco_fast.losses import ReCoLoss, ReCoLossOutput, reco_loss  # noqa: E402 - needs __path__
