"""What an ablation compares: methods, each as what it changes in a configuration."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from reco_fast.settings.config import Config

Changes = Mapping[str, Mapping[str, Any]]


class Method(NamedTuple):
    """A row of the table, and the settings by section in which it differs from the configuration."""

    title: str
    changes: Callable[[Config], Changes]


def _changed(title: str, **sections: Mapping[str, Any]) -> Method:
    return Method(title, lambda base: sections)


def _smaller(base: Config) -> int:
    """About three quarters of the side: half of the pixels."""
    return max(16, base.data.image_size * 3 // 32 * 8)


METHODS = {
    "moco": _changed("MoCo v2", loss={"objective": "moco"}),
    "global": _changed("+ global", loss={"local_weight": 0.0}),
    "local-cutmix": _changed("+ local, cutmix", loss={"global_weight": 0.0, "mix": "cutmix"}),
    "local-mixup": _changed("+ local, mixup", loss={"global_weight": 0.0, "mix": "mixup"}),
    "both": _changed("+ both (ReCo)"),
    "small-mix": Method(
        "both, a smaller mixed view", lambda base: {"loss": {"mix_size": _smaller(base), "mix_within": False}}
    ),
    "half-mix": _changed("both, half of the images mixed beside", loss={"mix_share": 0.5, "mix_within": False}),
    "mix-within": _changed("both, half mixed in place", loss={"mix_share": 0.5, "mix_within": True}),
    "small-weak": Method("both, a smaller weak view", lambda base: {"data": {"weak_size": _smaller(base)}}),
    "weak-keys": _changed("both, weak keys", loss={"keys": "weak"}),
    "late": _changed("both, relations after a quarter", loss={"start": 0.25}),
    "growing": Method("both, growing images", lambda base: {"data": {"grow_from": _smaller(base)}}),
    "momentum": _changed("both, teacher slower and slower", model={"teacher_momentum_end": 1.0}),
    "norm-batch": _changed("both, teacher's norm of its batch", model={"key_norm": "batch"}),
    "norm-split": _changed("both, teacher's norm of groups", model={"key_norm": "split"}),
    "norm-ema": _changed("both, teacher's norm by averages", model={"key_norm": "ema"}),
}
RELATIONS = ("moco", "global", "local-cutmix", "local-mixup", "both")
