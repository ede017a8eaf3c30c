"""Which relation earns its place: MoCo v2 and ReCo's terms on the same images, for as many epochs, as many encoder
passes and as long.

`python -m reco_fast.ablation [PRESET] --data.path TRAIN --data.val-path VAL [--section.field VALUE ...]`

Every run is an ordinary training run in a folder of its own, so a stopped ablation goes on with the same command. The
results: a line for each run in `ablation.jsonl`, the table in `ablation.md`, the learning curves in `ablation.png`.
Where a preset or file has no global relation, such as quickstart, it has weight 1 here unless a flag says otherwise.
"""

import dataclasses
import json
import os
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from reco_fast.data.images import open_data
from reco_fast.errors import ConfigError
from reco_fast.evaluation.features import Features, labelled_features, linear_top1
from reco_fast.method.model import channels_last
from reco_fast.method.phases import passes
from reco_fast.method.state import pick_device
from reco_fast.run import run_folder
from reco_fast.run.arguments import CONFIG_HELP, preset_and_rest
from reco_fast.run.files import parse_json, read_text, write_text
from reco_fast.run.run_folder import load_run
from reco_fast.settings import command_line
from reco_fast.settings.config import Config, LossConfig, updated
from reco_fast.settings.methods import METHODS, RELATIONS
from reco_fast.settings.terminal import say, show
from reco_fast.settings.typed import WithPaths
from reco_fast.train import train

BUDGETS = ("epochs", "seconds", "passes")
RESULT = {"method", "lr", "budget", "epochs", "seed", "seconds", "knn_top1", "linear_top1", "run"}


@dataclass(frozen=True)
class AblationOptions(WithPaths):
    dir: Path = Path("runs/ablation")
    """Folder for the runs and the results."""
    methods: tuple[str, ...] = RELATIONS
    """moco, global, local-cutmix, local-mixup, both; and both with one thing changed: small-mix, half-mix, mix-within,
    small-weak, weak-keys, late, growing, momentum, norm-batch, norm-split, norm-ema."""
    seeds: tuple[int, ...] = (0, 1)
    moco_lr: float | None = None
    """Rate of MoCo; unless said, --optim.lr. The relations add to the gradient, so alone it may want a higher one."""
    budgets: tuple[str, ...] = ("epochs", "seconds")
    """What methods are given alike: the configured epochs; as many epochs as take as long as the slowest; as many as
    make as many encoder passes as the costliest (passes), which is what a GPU is bound by."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for flag, given, known in (("methods", self.methods, tuple(METHODS)), ("budgets", self.budgets, BUDGETS)):
            unknown = [name for name in given if name not in known]
            if unknown or not given:
                got = unknown[0] if unknown else "nothing"
                raise ConfigError(f"--ablation.{flag}: expected some of {', '.join(known)}, got {got}")
        if "epochs" not in self.budgets:  # its runs say how long each method takes, and are the costliest one's
            raise ConfigError(f"--ablation.budgets: expected epochs among them, got {' '.join(self.budgets)}")
        if not self.seeds:
            raise ConfigError("--ablation.seeds: expected at least one number, got nothing")

    def rates(self, lr: float) -> dict[str, float]:
        """Each method's, where `lr` is that of the relations."""
        own = {} if self.moco_lr is None else {"moco": self.moco_lr}
        return {method: own.get(method, lr) for method in self.methods}


@dataclass(frozen=True)
class AblationConfig(Config):
    ablation: AblationOptions = field(default_factory=AblationOptions)


@dataclass(frozen=True)
class Variant:
    """One method at one rate with one budget; a run for each seed."""

    method: str
    lr: float
    budget: str
    epochs: int

    def name(self, seed: int) -> str:
        return f"{self.method}-lr{self.lr:g}-{self.epochs}epochs-seed{seed}"

    def config(self, base: Config, seed: int, folder: Path) -> Config:
        """Raises ConfigError where a method's settings do not go with those of `base`."""
        own: dict[str, Mapping[str, Any]] = {
            "optim": {"lr": self.lr},
            "train": {"seed": seed, "epochs": self.epochs},
            "run": {"dir": folder / self.name(seed)},
        }
        sections = {**own, **METHODS[self.method].changes(base)}
        return dataclasses.replace(
            base, **{name: dataclasses.replace(getattr(base, name), **given) for name, given in sections.items()}
        )


def main() -> NoReturn:
    command_line.run(lambda: ablate(*parse(sys.argv[1:])))


def parse(argv: Sequence[str]) -> tuple[str, AblationConfig]:
    """The preset's name and the configuration that all runs share."""
    preset, default, rest = preset_and_rest(argv)
    if not default.loss.global_weight:  # or "global" would be MoCo, and "both" the local relation
        default = updated(default, {"loss": {"global_weight": LossConfig.global_weight}})
    prog, options = f"python -m reco_fast.ablation {preset}", AblationConfig(**sections(default))
    description = f"{__doc__}\n{CONFIG_HELP}"
    return preset, command_line.parse(AblationConfig, rest, prog=prog, description=description, default=options)


def sections(config: Config) -> dict[str, Any]:
    """What any run is configured by: the fields of `Config`, without those of a subclass."""
    return {section.name: getattr(config, section.name) for section in dataclasses.fields(Config)}


def ablate(preset: str, command: AblationConfig) -> int:
    """All runs that are not done yet, then the table and the picture."""
    options = command.ablation
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(f"torchrun: expected one process for an ablation, got {os.environ['WORLD_SIZE']}")
    base, _, labelled = open_data(Config(**sections(command)))
    if labelled is None:
        raise ConfigError("--data.val-path: expected labelled images to compare with, got nothing")
    folder = options.dir
    folder.mkdir(parents=True, exist_ok=True)
    rates = options.rates(base.optim.lr)
    results = read_results(folder / "ablation.jsonl")
    # The budget of epochs first, since that of seconds has to know how fast each method is.
    for budget in sorted(options.budgets, key=BUDGETS.index):
        for seed in options.seeds:  # seed by seed, so that a stopped ablation has whole comparisons
            for variant in variants(budget, rates, base, results):
                config = variant.config(base, seed, folder)
                if any(line["run"] == variant.name(seed) for line in results):
                    check_same_settings(config)
                    continue
                say(f"{METHODS[variant.method].title}, lr {variant.lr:g}, {variant.epochs} epochs, seed {seed}")
                train(config, preset)
                outcome = judged(config)
                if outcome is None:
                    say(f"stopped; the same command goes on in {folder}")
                    return 0
                results.append({**dataclasses.asdict(variant), "seed": seed, **outcome, "run": variant.name(seed)})
                write_text(folder / "ablation.jsonl", "".join(json.dumps(line) + "\n" for line in results))
                write_text(folder / "ablation.md", table(results))
    show(table(results).rstrip("\n"))
    draw_curves(folder, results)
    return 0


def variants(budget: str, rates: Mapping[str, float], base: Config, results: list[dict[str, Any]]) -> Iterator[Variant]:
    """What to run for one seed. The budget of seconds needs the runs of the budget of epochs to know speeds."""
    epochs = base.train.epochs
    alike = {method: Variant(method, lr, "epochs", epochs) for method, lr in rates.items()}
    if budget == "epochs":
        yield from alike.values()
        return
    if budget == "passes":
        costs = {method: passes(variant.config(base, 0, Path())) for method, variant in alike.items()}
    else:
        costs = {
            method: statistics.median(
                r["seconds"] for r in results if r["method"] == method and r["budget"] == "epochs"
            )
            for method in rates
        }
    for method, lr in rates.items():
        longer = round(epochs * max(costs.values()) / costs[method])
        if longer >= 1.1 * epochs:  # about as costly as the costliest: its line says the same
            yield Variant(method, lr, budget, longer)


def check_same_settings(config: Config) -> None:
    """Raises ConfigError where the run that is done was another."""
    assert config.run.dir is not None
    difference = run_folder.first_difference(config, run_folder.read_config(config.run.dir))
    if difference:
        raise ConfigError(f"--ablation.dir: {config.run.dir} holds a run with other settings: {difference}")


def judged(config: Config) -> dict[str, Any] | None:
    """What became of a run, with a linear probe of its student; None if it is not finished."""
    assert config.run.dir is not None
    end = run_folder.finished(config.run.dir)
    if end is None:
        return None
    _, source, labelled = open_data(config)
    assert labelled is not None
    device = pick_device(config.train.device)
    _, encoder = load_run(config.run.dir, "student")
    backbone = channels_last(encoder.get_submodule("backbone").to(device))
    features = Features.of(labelled, *labelled_features(backbone, labelled, config, device))
    top1, penalty = linear_top1(features)
    kept = ("steps", "seconds", "knn_top1_initial", "knn_top1")
    counted = {"images": len(source), "passes": passes(config)}
    return counted | {name: end[name] for name in kept} | {"linear_top1": top1, "linear_c": penalty}


def read_results(path: Path) -> list[dict[str, Any]]:
    """What a stopped ablation has finished. Raises ConfigError where the file is not one of ours."""
    expected = f"expected a JSON object a line with {', '.join(sorted(RESULT))}"
    results = [parse_json(line, path, expected) for line in read_text(path).splitlines()] if path.exists() else []
    if not all(isinstance(line, dict) and set(line) >= RESULT for line in results):
        raise ConfigError(f"{path}: {expected}")
    return results


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: a row for each method, rate and budget; mean over the seeds with the lowest and the highest."""
    rows = ["| method | lr | epochs | passes | seconds | seeds | kNN top-1 | linear probe |", "|---|" + 7 * "---|"]
    groups: dict[tuple[str, str, float, int], list[dict[str, Any]]] = {}
    for line in results:
        groups.setdefault((line["budget"], line["method"], line["lr"], line["epochs"]), []).append(line)
    order = list(METHODS)
    for (_, method, lr, epochs), lines in sorted(groups.items(), key=lambda g: (g[0][0], order.index(g[0][1]), g[0])):
        seconds = statistics.median(line["seconds"] for line in lines)
        knn, linear = (mean_and_range([line[name] for line in lines]) for name in ("knn_top1", "linear_top1"))
        made = next((f"{line['passes']:.3g}" for line in lines if "passes" in line), "")  # none in older files
        counts = f"{epochs} | {made} | {seconds:.0f} | {len(lines)}"
        rows.append(f"| {METHODS[method].title} | {lr:g} | {counts} | {knn} | {linear} |")
    return "\n".join(rows) + "\n"


def mean_and_range(values: list[float]) -> str:
    """Mean and range, such as 40.1 (39.2 to 41.0)."""
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.1f} to {max(values):.1f})"


def draw_curves(folder: Path, results: list[dict[str, Any]]) -> None:
    """kNN against epochs, minutes of training and, if they were a budget, encoder passes an image: the mean over the
    seeds and their range."""
    try:
        import matplotlib
    except ImportError:
        say("the learning curves need matplotlib; pip install 'reco-fast[profile]'")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    budgets = BUDGETS if any(line["budget"] == "passes" for line in results) else BUDGETS[:2]
    figure, panels = pyplot.subplots(
        1, len(budgets), figsize=(4.5 * len(budgets), 3.2), layout="constrained", sharey=True
    )
    for panel, budget in zip(panels, budgets, strict=True):
        for method in METHODS:
            lines = [line for line in results if line["method"] == method and shown(line, budget, results)]
            if not lines:
                continue
            curves = [curve(folder / line["run"] / "metrics.jsonl") for line in lines]
            x = [epoch for epoch, _ in curves[0]]
            if budget == "seconds":
                each = statistics.median(line["seconds"] / line["epochs"] for line in lines)
                x = [epoch * each / 60 for epoch in x]
            elif budget == "passes":
                x = [epoch * lines[0]["passes"] for epoch in x]
            y = list(zip(*([top1 for _, top1 in points] for points in curves), strict=True))
            (drawn,) = panel.plot(
                x, [statistics.mean(values) for values in y], label=METHODS[method].title, linewidth=1.4
            )
            panel.fill_between(
                x, list(map(min, y)), list(map(max, y)), color=drawn.get_color(), alpha=0.15, linewidth=0
            )
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set(xlabel="epochs", ylabel="kNN top-1, %", title="for as many epochs")
    panels[1].set(xlabel="minutes of training", title="for as long")
    if len(budgets) > 2:
        panels[2].set(xlabel="encoder passes an image", title="for as many passes")
    panels[0].legend(frameon=False, fontsize=8)
    figure.savefig(folder / "ablation.png", dpi=150)
    pyplot.close(figure)


def shown(line: dict[str, Any], budget: str, results: list[dict[str, Any]]) -> bool:
    """Whether a line belongs to the comparison by `budget`; the costliest method's epochs are in each. Lines of earlier
    versions do not know their passes."""
    if line["budget"] == budget:
        return True
    own = any(r["method"] == line["method"] and r["budget"] == budget for r in results)
    return line["budget"] == "epochs" and not own and (budget != "passes" or "passes" in line)


def curve(path: Path) -> list[tuple[float, float]]:
    """(epoch, kNN top-1) of every evaluation of a run."""
    lines = [parse_json(line, path) for line in read_text(path).splitlines()]
    return [(line["epoch"], line["knn_top1"]) for line in lines if line["kind"] == "eval"]


if __name__ == "__main__":
    main()
