"""The presets: each a configuration and what to expect of it, with nothing in it that was not measured."""

from reco_fast.config import (
    Config,
    DataConfig,
    EvalConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)

PRESETS: dict[str, tuple[Config, str]] = {
    "quickstart": (
        Config(
            data=DataConfig(generated=True, image_size=32),
            model=ModelConfig(arch="timm/test_resnet", stem="standard", bank_size=4096, teacher_momentum=0.99),
            loss=LossConfig(),
            optim=OptimConfig(lr=0.12, warmup_epochs=1),
            train=TrainConfig(epochs=30, batch_size=128),
            eval=EvalConfig(every=10),
            run=RunConfig(checkpoint_epochs=10),
        ),
        "",
    ),
    "cifar10": (Config(), ""),
}
