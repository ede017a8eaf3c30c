"""The presets: each a configuration, and what to expect of it, with no figure that was not measured."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from reco_fast.errors import ConfigError
from reco_fast.settings.config import (
    Config,
    DataConfig,
    EvalConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    updated,
)

QUICKSTART = Config(
    data=DataConfig(generated=True, image_size=32),
    model=ModelConfig(
        arch="timm/test_resnet", stem="standard", projector="linear", bank_size=1024, teacher_momentum=0.99
    ),
    # No global relation: of these images a weak view keeps the colours, which say nothing of the motif.
    loss=LossConfig(mix="mixup", mix_share=0.5, mix_within=True, temperature=0.1, global_weight=0.0, start=0.3),
    optim=OptimConfig(lr=0.12, warmup_epochs=1),
    train=TrainConfig(epochs=41, batch_size=64),
    eval=EvalConfig(every=5),
)

# Projector, batch, bank, momentum, temperature and rate of the MoCo authors' CIFAR demo; as many passes as MoCo makes.
CIFAR10 = Config(
    data=DataConfig(image_size=32),
    model=ModelConfig(arch="resnet18", projector="linear", bank_size=4096, teacher_momentum=0.99, key_norm="split"),
    loss=LossConfig(mix="mixup", mix_share=0.5, mix_within=True, keys="weak", temperature=0.1, ramp=0.5),
    optim=OptimConfig(lr=0.03, warmup_epochs=5),
    train=TrainConfig(epochs=200, batch_size=512),
)

# Chosen on CIFAR-10 at 64 px (docs/quality.md): with batch norms that follow the new images it ends lower.
ADAPT = Config(
    data=DataConfig(image_size=224),
    model=ModelConfig(
        arch="timm/tf_efficientnet_lite0",
        init="timm",
        freeze="norms",
        stem="standard",
        projector="linear",
        bank_size=2048,
        teacher_momentum=0.99,
    ),
    loss=LossConfig(mix="mixup", mix_share=0.5, mix_within=True, keys="weak", temperature=0.1, ramp=0.5),
    optim=OptimConfig(lr=0.003, warmup_epochs=1),
    train=TrainConfig(epochs=10, batch_size=128),
    eval=EvalConfig(every=5),
)

# Rate, decay, warm-up and momentum as MoCo v3 has them for its transformers (arXiv 2104.02057, section 4 and its code).
VIT_SMALL = Config(
    data=DataConfig(image_size=224),
    model=ModelConfig(arch="timm/vit_small_patch16_224", teacher_momentum=0.99, teacher_momentum_end=1.0),
    loss=LossConfig(mix="mixup", mix_share=0.5, mix_within=True, keys="weak", ramp=0.5),
    optim=OptimConfig(name="adamw", lr=1.5e-4, weight_decay=0.1, warmup_epochs=10, clip=1.0),
    train=TrainConfig(epochs=100, batch_size=1024),
)

# The paper's setting: 4 GPUs × 32 images, rate 0.03 for the batch of 128.
IMAGENET100 = Config(
    data=DataConfig(image_size=224),
    model=ModelConfig(arch="resnet50", bank_size=65536, teacher_momentum=0.999, key_norm="split"),
    loss=LossConfig(ramp=0.5),
    optim=OptimConfig(lr=0.06, weight_decay=1e-4),
    train=TrainConfig(epochs=100, batch_size=128),
)

# All of it, as the first author's code has it: its defaults are the loss's, but for the mix target.
PAPER = replace(
    IMAGENET100,
    model=replace(IMAGENET100.model, key_norm="shuffle"),
    loss=LossConfig(mix_anchor="query"),
    optim=replace(IMAGENET100.optim, decay_all=True),
)

# MoCo v2's: rate 0.03 for a batch of 256.
IMAGENET = replace(
    IMAGENET100,
    optim=OptimConfig(lr=0.03, weight_decay=1e-4),
    train=TrainConfig(epochs=200, batch_size=256),
    eval=EvalConfig(every=20),
)

PRESETS: dict[str, tuple[Config, str]] = {
    "quickstart": (
        QUICKSTART,
        """A small ResNet on 5,040 generated JPEGs of 12 motifs. Needs no data and no GPU.

        python -m reco_fast.train

        AMD EPYC with AVX512_BF16, torch 2.14, 2026-11-28, DALI: 134.5 s of training on two cores (kNN 96.5 %, seed 0),
        150 on one; kNN top-1 from 22.9, 21.1, 24.1, 21.1 and 20.8 % to 97.4, 94.7, 96.8, 87.1 and 91.0 % (seeds 0 to
        4, one core each); raw pixels have 20.3 %. Without DALI 216 s on two cores (kNN 96.0 %, seed 0).""",
    ),
    "cifar10": (
        CIFAR10,
        """ResNet-18 with a 3×3 stem on CIFAR-10 or any folder of small images.

        python -m reco_fast.train cifar10 --data.path cifar10 --data.val-path cifar10:test

        With --train.epochs 150, on CIFAR-10 as JPEG, alone on an NVIDIA H200 (torch 2.11, 2026-11-28): 58,000 images/s;
        kNN top-1 37.2 % untrained, 73.2 and 76.0 % after 1.7 and 2.5 minutes of training (epochs 75 and 128), of which
        compilation took 0.7; its end was not seen, nor 200 epochs.""",
    ),
    "adapt": (
        ADAPT,
        """A network that timm has weights for, adapted to a folder of your photographs without labels.

        python -m reco_fast.train adapt --data.path photos/

        5,000 CIFAR-10 images (JPEG) at 64 px for 6 epochs, one core of an AMD EPYC (torch 2.14, 2026-11-28): 327 and
        260 s; kNN top-1 of the test images from 55.8 to 65.0 and 65.7 %, linear probe from 65.5 to 72.5 and 72.3 %
        (seeds 0 and 1). Photographs at 224 px have not been tried.""",
    ),
    "vit-small": (
        VIT_SMALL,
        """ViT-Small by AdamW at 224 px, or of small patches up to 64 px.

        torchrun --standalone --nproc-per-node 4 -m reco_fast.train vit-small --data.path imagenet/train

        Its 100 epochs are not yet run to their end. At 32 px with patches of 4 px, on 5,000 CIFAR-10 images (JPEG), two
        cores of an Intel Xeon (torch 2.14, 2026-11-28), batches of 64, --optim.lr 0.001: 27 images/s, kNN top-1 from
        26.1 to 28.9 % in 8 epochs, 25 minutes. ViT-Tiny, 53 minutes of one core, 20 epochs: from 25.8 to 33.9 %
        (docs/weights.md, with the flags).
        It is meant for a GPU, where it has not run.""",
    ),
    "imagenet100": (
        IMAGENET100,
        """ResNet-50 at 224 px for 100 epochs, the setting of the paper's experiments.

        torchrun --standalone --nproc-per-node 4 -m reco_fast.train imagenet100 --data.path imagenet100/train

        Not yet run to its end: no accuracy to expect is known.""",
    ),
    "paper": (
        PAPER,
        """The recipe of the paper's first author to the letter, where imagenet100 departs from it: the student's own
        query in the mix target, relations at full weight from the start, keys of images shuffled between GPUs, weight
        decay of all parameters.

        torchrun --standalone --nproc-per-node 4 -m reco_fast.train paper --data.path imagenet100/train

        Not yet run to its end. Small networks end ten points lower with this mix target (docs/quality.md).""",
    ),
    "imagenet": (
        IMAGENET,
        """ResNet-50 at 224 px for 200 epochs, the setting of MoCo v2.

        torchrun --standalone --nproc-per-node 8 -m reco_fast.train imagenet --data.path imagenet/train

        Not yet run to its end: no accuracy to expect is known.""",
    ),
}


def preset(name: str, **sections: Mapping[str, Any]) -> Config:
    """The configuration of a preset with some settings changed: `preset("cifar10", train={"epochs": 20})`.

    Raises ConfigError for a name, a section or a setting that there is not, or a wrong value.
    """
    if name not in PRESETS:
        raise ConfigError(f"{name}: expected a preset, one of {', '.join(PRESETS)}")
    return updated(PRESETS[name][0], sections)
