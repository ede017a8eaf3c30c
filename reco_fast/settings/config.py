"""Everything a run can be told, as frozen dataclasses that check themselves.

A wrong value raises `ConfigError` with one line that names the flag, the value and what is allowed.
"""

import dataclasses
import math
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import tyro
from PIL import ImageColor

from reco_fast.errors import ConfigError
from reco_fast.settings.typed import WithPaths, as_dataclass

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")
GONE = {"train": {"convolution"}}
"""Settings that earlier versions wrote and that change nothing that a run learns, by section."""
NEW = {
    "data": {"background", "range", "weak_size", "grow_from", "min_scale", "mean", "std"}
    | {"cache", "cache_gb", "order", "window", "lanes"},
    "model": {"projector", "query_norm", "teacher_momentum_end", "init", "init_which", "init_partial", "init_hash"}
    | {"freeze", "freeze_patch_embed"},
    "loss": {"keys", "mix_size", "mix_share", "mix_within", "start"},
    "optim": {"clip"},
    "train": {"checkpoint_activations"},
    "eval": {"train_path"},
}
"""Settings that earlier versions did not write: their runs have the default, or what these have."""
BEFORE = {"data": {"order": "uniform"}}

Colour = tuple[float, float, float]
Place = Annotated[str | None, tyro.conf.arg(metavar="{None}|PATH")]
"""Where images are, if it is said: one of `PLACES`."""
_MOST_COUNT = 2**40  # far above what is useful, far below what overflows


def _require(ok: bool, flag: str, value: object, expected: str) -> None:
    if not ok or (isinstance(value, int) and value > _MOST_COUNT) or value == float("inf"):
        raise ConfigError(f"--{flag}: expected {expected}, got {value}")


def check_cache(flag: str, gigabytes: float) -> None:
    """Raises ConfigError."""
    _require(0 < gigabytes < 10**9, flag, gigabytes, "a number of gigabytes above 0")


@dataclass(frozen=True)
class DataConfig(WithPaths):
    path: Place = None
    """Training images, without labels: a folder at any depth, .tar shards, their index.json; either by URL (s3://, gs://,
    https://, hf://); cifar10, stl10:unlabeled, hf:NAME."""
    val_path: Place = None
    """Held-out images by class for the kNN evaluation; --data.path, or --eval.train-path, must then be by class too."""
    manifest: Path | None = None
    """What reco_fast.check_images found in --data.path: its bad images are left out unread."""
    generated: bool = False
    """Without --data.path, train on the built-in generated images."""
    image_size: int = 32
    """Side of the training crops in pixels."""
    grow_from: int | None = None
    """Side of the training crops at the start, which then grows up to --data.image-size: early epochs are cheaper."""
    min_scale: float = 0.2
    """Smallest share of an image that a random crop keeps: 0.2 in MoCo v2 and ReCo, 0.08 in MoCo's CIFAR-10 demo."""
    weak_size: int | None = None
    """Side of the weak view, which the teacher alone sees; unless said, --data.image-size. Smaller costs less."""
    loader: Literal["auto", "dali", "torch"] = "auto"
    """auto takes DALI where it is installed."""
    workers: int = 0
    """Loader threads (DALI) or processes (torch) a rank; 0 means one for each core of this rank's share."""
    on_bad_image: Literal["skip", "raise"] = "skip"
    """skip: another image stands in for a file that cannot be decoded, evaluations go without it, and bad_images.txt
    lists it."""
    background: str = "white"
    """Colour behind transparent images: a name or #rrggbb."""
    range: Annotated[tuple[float, float] | None, tyro.conf.arg(metavar="LOW HIGH")] = None
    """Of images of more than 8 bits a channel, the values that become black and white. Unless said: the range that the
    file declares or its type has, else the image's own; a warning says where that leaves little or is a guess."""
    mean: Annotated[Colour | None, tyro.conf.arg(metavar="RED GREEN BLUE")] = None
    """Taken from each channel of an image in 0 to 1. Unless said: as for the weights of --model.init, else
    CIFAR-10's up to 64 px and ImageNet's above."""
    std: Annotated[Colour | None, tyro.conf.arg(metavar="RED GREEN BLUE")] = None
    """By which it is divided then; as --data.mean."""

    order: Literal["auto", "uniform", "blocks"] = "auto"
    """Of an epoch: all images permuted together, or some shards at a time; auto: blocks for shards behind a URL."""
    window: int = 4
    """Shards of a lane whose images are permuted together, with --data.order blocks."""
    lanes: int = 8
    """Parts of each batch with shards of their own, with --data.order blocks: as many hosts, or a divisor of that, each
    fetch their share. A divisor of --train.batch-size."""
    cache: Path | None = None
    """Folder for shards that come from a URL, one for all processes of a host; unless said, in ~/.cache/reco_fast."""
    cache_gb: float = 50.0
    """Most that they take there, in 10⁹ bytes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(1 <= self.window <= 10**6, "data.window", self.window, "a number of shards from 1 up")
        _require(1 <= self.lanes <= 2**16, "data.lanes", self.lanes, "a number from 1 to 65536")
        check_cache("data.cache-gb", self.cache_gb)
        for name, low, expected in (
            ("mean", -1.0, "three numbers from -1 to 2"),
            ("std", 0.001, "three from 0.001 to 2"),
        ):
            values = getattr(self, name)
            ok = values is None or all(low <= value <= 2 for value in values)
            _require(ok, f"data.{name}", values and " ".join(f"{value:g}" for value in values), expected)
        _require(_is_colour(self.background), "data.background", self.background, "a colour such as white or #ffffff")
        ok = self.range is None or (math.isfinite(self.range[1] - self.range[0]) and self.range[0] < self.range[1])
        _require(ok, "data.range", self.range and "{:g} {:g}".format(*self.range), "two numbers, the lower one first")
        _require(16 <= self.image_size <= 1024, "data.image-size", self.image_size, "a size from 16 to 1024")
        _require(0 < self.min_scale <= 1, "data.min-scale", self.min_scale, "a share above 0, at most 1")
        for name in ("weak_size", "grow_from"):
            side, expected = getattr(self, name), f"a size from 16 to --data.image-size, {self.image_size}"
            _require(side is None or 16 <= side <= self.image_size, f"data.{_dashed(name)}", side, expected)
        _require(0 <= self.workers <= 256, "data.workers", self.workers, "a number from 0 to 256")

    @property
    def weak_side(self) -> int:
        """Of the weak view, whether or not it was said."""
        return self.weak_size or self.image_size


@dataclass(frozen=True)
class ModelConfig:
    arch: str = "resnet18"
    """Any torchvision or timm backbone; "timm/NAME" or "torchvision/NAME" where both have it (torchvision first)."""
    stem: Literal["auto", "small", "standard"] = "auto"
    """small, for small images: 3×3 stride 1 without pooling, or patches of a quarter of the side; auto: small up to
    64 px, where it fits, or what the weights of --model.init have."""
    projector: Literal["mlp", "linear"] = "mlp"
    """mlp: two layers, as in MoCo v2 and ReCo; linear: one, as in the CIFAR-10 demo of MoCo's authors."""
    projection_dim: int = 128
    """Width D of the embeddings and of the memory banks."""
    key_norm: Literal["batch", "split", "shuffle", "ema"] = "batch"
    """Teacher's batch norm: of its batch, of groups of it, of images shuffled between ranks, or moving averages."""
    query_norm: Literal["batch", "split"] = "batch"
    """Student's batch norm: of its batch, or of groups of it as in the CIFAR-10 demo of MoCo's authors."""
    norm_groups: int = 8
    """Groups a rank's batch is split into for --model.key-norm split and --model.query-norm split."""
    bank_size: int = 65536
    """K: past embeddings in each memory bank, of which there are two with the global relation and strong keys."""
    teacher_momentum: float = 0.999
    """The teacher becomes m·teacher + (1−m)·student after each step."""
    teacher_momentum_end: float | None = None
    """m at the end, along half a cosine (BYOL, arXiv 2006.07733, section 3.2); unless said, m stays as it is."""
    init: str | None = None
    """Weights to start from: timm or timm:TAG, torchvision or torchvision:NAME (fetched by them), a file
    (.safetensors, .pth), or the folder of a run. Unless said, random ones."""
    init_which: Literal["student", "teacher"] = "student"
    """Whose weights to take where --model.init has both."""
    init_partial: bool = False
    """Take --model.init even where less than 90 % of the backbone's parameters are in it."""
    init_hash: str | None = None
    """SHA-256 of the tensors of --model.init, which a run writes down; give it to be sure that they are those."""
    freeze: str = "nothing"
    """Part of the backbone to keep as it is: a number of stages, of which the stem is the first, or norms."""
    freeze_patch_embed: tyro.conf.FlagCreatePairsOff[bool] = False
    """Keep a transformer's patch embedding as it is (MoCo v3, arXiv 2104.02057, section 4)."""

    def __post_init__(self) -> None:
        ok = self.freeze in ("nothing", "norms") or re.fullmatch("[1-9][0-9]?", self.freeze) is not None
        _require(ok, "model.freeze", self.freeze, "nothing, norms or a number of stages from 1 to 99")
        ok = self.init is None or (self.init != "" and "\0" not in self.init)
        _require(ok, "model.init", repr(self.init), "timm, torchvision, a file or the folder of a run")
        ok = 8 <= self.projection_dim <= 65536
        _require(ok, "model.projection-dim", self.projection_dim, "a number from 8 to 65536")
        _require(self.norm_groups >= 2, "model.norm-groups", self.norm_groups, "2 or more")
        _require(1 <= self.bank_size <= 2**28, "model.bank-size", self.bank_size, "a number from 1 to 2²⁸")
        _require(0 <= self.teacher_momentum < 1, "model.teacher-momentum", self.teacher_momentum, "0 ≤ m < 1")
        end = self.teacher_momentum_end
        _require(end is None or 0 <= end <= 1, "model.teacher-momentum-end", end, "0 ≤ m ≤ 1")


@dataclass(frozen=True)
class LossConfig:
    objective: Literal["reco", "moco"] = "reco"
    """moco is the instance term alone and skips the encoder passes that only the relations need."""
    impl: Literal["auto", "triton", "sdpa", "torch"] = "auto"
    """triton: one fused pass (CUDA); sdpa: PyTorch's attention kernels; torch: the readable definition."""
    mix: Literal["cutmix", "mixup", "both"] = "cutmix"
    """Pixel interpolation of the local relation; both tosses a coin each step."""
    mix_alpha: float = 1.0
    """λ ~ Beta(α, α)."""
    mix_size: int | None = None
    """Side of the mixed view, which is reduced to it; unless said, --data.image-size."""
    mix_share: float = 1.0
    """Share of the images of a batch that are mixed."""
    mix_within: bool = False
    """Mixed images take the place of unmixed ones: the student makes one pass. For a share below 1."""
    mix_anchor: Literal["query", "key"] = "key"
    """Own part of the mix target: the student's query (the first author's code) or the teacher's key."""
    keys: Literal["strong", "weak"] = "strong"
    """The view that gives the keys: a second strong one, beside which the global relation needs the weak one, or the
    weak one, for both (as in ReSSL, arXiv 2107.09282): one teacher pass less, and one memory bank in use. moco has
    strong ones."""
    temperature: float = 0.2
    """Instance and local terms."""
    student_temperature: float = 0.1
    """Student side of the global relation."""
    teacher_temperature: float = 0.04
    """Teacher side of the global relation."""
    global_weight: float = 1.0
    """Weight of the global distribution relation."""
    local_weight: float = 2.0
    """Weight of the local interpolation relation."""
    ramp: float = 0.0
    """Share of the training over which both relation weights grow linearly from 0."""
    start: float = 0.0
    """Share of the training before the relations, and their ramp, begin; until then a step is that of moco."""

    def __post_init__(self) -> None:
        for name in ("mix_alpha", "temperature", "student_temperature", "teacher_temperature"):
            _require(getattr(self, name) > 0, f"loss.{_dashed(name)}", getattr(self, name), "a number above 0")
        for name in ("global_weight", "local_weight"):
            _require(getattr(self, name) >= 0, f"loss.{_dashed(name)}", getattr(self, name), "0 or more")
        _require(0 <= self.ramp <= 1, "loss.ramp", self.ramp, "a share from 0 to 1")
        _require(0 < self.mix_share <= 1, "loss.mix-share", self.mix_share, "a share above 0, at most 1")
        _require(self.mix_size is None or self.mix_size >= 16, "loss.mix-size", self.mix_size, "16 or more")
        if self.mix_within:  # one batch holds both, and a mixed image has no query of its own
            _require(self.mix_share < 1, "loss.mix-share", self.mix_share, "less than 1 with --loss.mix-within")
            _require(self.mix_size is None, "loss.mix-size", self.mix_size, "nothing with --loss.mix-within")
            _require(self.mix_anchor == "key", "loss.mix-anchor", self.mix_anchor, "key with --loss.mix-within")
        _require(0 <= self.start < 1, "loss.start", self.start, "a share from 0 to below 1")

    @property
    def weak_keys(self) -> bool:
        """Whether the teacher sees weak views alone."""
        return self.objective == "reco" and self.keys == "weak"

    @property
    def uses_global(self) -> bool:
        return self.objective == "reco" and self.global_weight > 0

    @property
    def uses_weak_bank(self) -> bool:
        """Whether weak views have a bank beside that of the keys."""
        return self.uses_global and not self.weak_keys

    @property
    def uses_local(self) -> bool:
        return self.objective == "reco" and self.local_weight > 0


@dataclass(frozen=True)
class OptimConfig:
    name: Literal["auto", "sgd", "adamw", "lars", "apex-sgd", "apex-lamb"] = "sgd"
    """auto: adamw where the backbone has no batch norm (transformers, ConvNeXt), else sgd. lars for batches of 1,024
    and more. apex: by NVIDIA Apex, where it is built (CUDA); docs/step.md."""
    lr: float = 0.06
    """Peak learning rate for a global batch of 256; scaled linearly with --train.batch-size. adamw wants a hundredth
    of what sgd does."""
    momentum: float = 0.9
    """Of sgd and lars; β₁ of adamw and apex-lamb."""
    weight_decay: float = 5e-4
    clip: float | None = None
    """Largest norm of the gradient of all parameters together, to which a larger one is scaled down."""
    decay_all: bool = False
    """Decay norms, biases, tokens and positions too, as the reference code does all it has."""
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up before the cosine."""

    def __post_init__(self) -> None:
        _require(self.lr > 0, "optim.lr", self.lr, "a number above 0")
        _require(0 <= self.momentum < 1, "optim.momentum", self.momentum, "0 ≤ momentum < 1")
        _require(self.weight_decay >= 0, "optim.weight-decay", self.weight_decay, "0 or more")
        _require(self.warmup_epochs >= 0, "optim.warmup-epochs", self.warmup_epochs, "0 or more")
        _require(self.clip is None or self.clip > 0, "optim.clip", self.clip, "a number above 0")


@dataclass(frozen=True)
class TrainConfig:
    epochs: int = 200
    batch_size: int = 512
    """Global: all ranks together, and all accumulated parts."""
    accumulate: int = 1
    """Parts that a rank's batch is cut into, to save memory; gradients are summed before the one step."""
    checkpoint_activations: tyro.conf.FlagCreatePairsOff[bool] = False
    """Keep only what enters each block of the backbone, and compute the rest again in the backward pass: less memory,
    one more forward pass of the student."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """auto: bf16 where the device has instructions for it (on a CPU AMX or AVX512_BF16), else fp16 on CUDA, fp32 on a
    CPU. The log says what it took and why."""
    compile: Annotated[bool | None, tyro.conf.arg(metavar="| --train.no-compile")] = None
    """torch.compile of the encoders. Unless said, on with CUDA and off on a CPU."""
    cuda_graph: Annotated[bool | None, tyro.conf.arg(metavar="| --train.no-cuda-graph")] = None
    """Capture the whole step as a CUDA graph: one launch by the host. Unless said, on with one GPU where CUDA can."""
    seed: int = 0
    device: Literal["auto", "cuda", "cpu"] = "auto"
    max_steps: int | None = None
    """Stop after this many steps; the schedule stays that of --train.epochs."""

    def __post_init__(self) -> None:
        _require(self.epochs >= 1, "train.epochs", self.epochs, "1 or more")
        _require(self.batch_size >= 2, "train.batch-size", self.batch_size, "2 or more")
        _require(self.accumulate >= 1, "train.accumulate", self.accumulate, "1 or more")
        _require(0 <= self.seed < 2**31, "train.seed", self.seed, "a number from 0 to 2³¹−1")
        _require(self.max_steps is None or self.max_steps >= 1, "train.max-steps", self.max_steps, "1 or more")


@dataclass(frozen=True)
class EvalConfig(WithPaths):
    train_path: Place = None
    """Images by class for the kNN evaluation's neighbours, where --data.path has no labels; with --data.val-path."""
    every: float = 10.0
    """Epochs between kNN evaluations; there is always one before the first step and one at the end."""
    knn_k: int = 200
    """Neighbours (fewer where the training set is smaller)."""
    knn_temperature: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.every > 0, "eval.every", self.every, "a number above 0")
        _require(self.knn_k >= 1, "eval.knn-k", self.knn_k, "1 or more")
        _require(self.knn_temperature > 0, "eval.knn-temperature", self.knn_temperature, "a number above 0")


@dataclass(frozen=True)
class RunConfig(WithPaths):
    dir: Path | None = None
    """Run folder; unless given, runs/PRESET, or the next free runs/PRESET-2, ... where that one is finished."""
    resume: Literal["auto", "never"] = "auto"
    """auto continues the run that the folder holds."""
    log_every: int = 20
    """Steps between log lines."""
    checkpoint_minutes: float = 10.0
    """Minutes between checkpoints; there is always one at the end, and one when the run is asked to stop."""
    checkpoint_steps: int | None = None
    """Also every so many steps."""
    wandb: str | None = None
    """Weights & Biases project to which the TensorBoard scalars and pictures go as well."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.log_every >= 1, "run.log-every", self.log_every, "1 or more")
        _require(self.checkpoint_minutes > 0, "run.checkpoint-minutes", self.checkpoint_minutes, "a number above 0")
        ok = self.checkpoint_steps is None or self.checkpoint_steps >= 1
        _require(ok, "run.checkpoint-steps", self.checkpoint_steps, "1 or more")


@dataclass(frozen=True)
class ProfileConfig:
    enabled: bool = False
    """Write torch.profiler traces of a few steps for TensorBoard's PyTorch Profiler tab."""
    wait: int = 5
    warmup: int = 3
    active: int = 5
    """Steps left out, run under the profiler but thrown away, and recorded; once a run."""

    def __post_init__(self) -> None:
        _require(self.wait >= 0, "profile.wait", self.wait, "0 or more")
        _require(self.warmup >= 0, "profile.warmup", self.warmup, "0 or more")
        _require(self.active >= 1, "profile.active", self.active, "1 or more")


@dataclass(frozen=True)
class StepConfig:
    """What a training step is configured by."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    @property
    def teacher_sizes(self) -> tuple[int, ...]:
        """Side of each view that the teacher encodes: the strong one, the weak one, or both."""
        if self.loss.weak_keys:
            return (self.data.weak_side,)
        return (self.data.image_size, self.data.weak_side)[: 1 + self.loss.uses_global]

    @property
    def mixed_size(self) -> int:
        """Side of the mixed view."""
        return self.loss.mix_size or self.data.image_size

    def mixed_images(self, images: int) -> int:
        """How many of so many are mixed: the first ones."""
        return max(1, min(round(self.loss.mix_share * images), images - self.loss.mix_within))

    def shares(self, images: int) -> tuple[float, float]:
        """What the terms of the unmixed and of the mixed ones of so many images count in the loss: each in full, or
        where an image is either, as many as it is of."""
        if not (self.loss.mix_within and self.loss.uses_local):
            return 1.0, 1.0
        mixed = self.mixed_images(images) / images
        return 1 - mixed, mixed

    @property
    def mixes_apart(self) -> bool:
        """Whether the student has the mixed images in a pass of their own."""
        return self.loss.uses_local and not self.loss.mix_within

    @property
    def mixes_alike(self) -> bool:
        """Whether it has as many of them there, and of as many pixels, as of the others."""
        return self.mixes_apart and self.loss.mix_share == 1 and self.mixed_size == self.data.image_size


@dataclass(frozen=True)
class Config(StepConfig):
    eval: EvalConfig = field(default_factory=EvalConfig)
    run: RunConfig = field(default_factory=RunConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)

    def __post_init__(self) -> None:
        _require(
            self.model.bank_size >= self.train.batch_size,
            "model.bank-size",
            self.model.bank_size,
            f"at least --train.batch-size, {self.train.batch_size} (a bank smaller than the batch loses keys)",
        )
        mix_size, size = self.loss.mix_size, self.data.image_size
        ok = mix_size is None or mix_size <= size
        _require(ok, "loss.mix-size", mix_size, f"at most --data.image-size, {size}")

    def to_json(self) -> dict[str, Any]:
        """Nested plain values; paths become strings."""
        return _jsonable(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Config":
        """The inverse of `to_json`; takes what an earlier version wrote, too.

        Raises ConfigError where a section or a field is missing, unknown or wrong.
        """
        return updated(cls(), values, whole=True)


def _is_colour(text: str) -> bool:
    """Whether Pillow knows it, as one without transparency."""
    try:
        return len(ImageColor.getrgb(text)) == 3
    except ValueError:
        return False


def updated(base: T, values: object, *, whole: bool = False) -> T:
    """`base`, a dataclass of sections, with the settings that `values` has: such as `Config.to_json` gives, any of them
    left out unless they must be `whole`. Sections of `Config` that `base` lacks belong to other commands and change
    nothing, nor do settings that are gone. A section that lacks `NEW` settings alone is a run's from before there were
    any, and has their defaults.

    Raises ConfigError where a section or a field is unknown, missing or wrong.
    """
    if not isinstance(values, Mapping) or not all(isinstance(given, Mapping) for given in values.values()):
        raise ConfigError("expected an object of sections such as data, model and train, each an object of settings")
    kinds = typing.get_type_hints(type(base))
    unknown = [name for name in values if name not in kinds | typing.get_type_hints(Config)]
    if unknown:
        raise ConfigError(f"expected sections of {', '.join(kinds)}, got {unknown[0]!r}")
    sections: dict[str, Any] = {}
    for name in kinds if whole else set(kinds) & set(values):
        given = {key: value for key, value in values.get(name, {}).items() if key not in GONE.get(name, ())}
        before, new = dataclasses.asdict(getattr(base, name)), NEW.get(name, set())
        if whole or set(before) - new <= set(given):
            before = {key: value for key, value in dataclasses.asdict(kinds[name]()).items() if key in new}
            before |= BEFORE.get(name, {})
        try:
            sections[name] = as_dataclass(kinds[name], _jsonable(before | given))
        except ValueError as error:
            raise ConfigError(f"section {name!r}: {error}") from None
    return dataclasses.replace(base, **sections)


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _jsonable(v) for k, v in value.items()}
    return str(value) if isinstance(value, Path) else value
