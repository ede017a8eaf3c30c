"""Every command and every block of Python in README.md and docs/ is run, or named here with the place that runs it.

Sizes are replaced (`TINY`), paths are stand-ins with the same names (`place`), and a launcher runs as one process in
this one; launchers have tests of their own. A new command that is in neither table makes this fail.
"""

import importlib.util
import io
import re
import shlex
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from servers import S3Server

from reco_fast import train
from reco_fast.__main__ import COMMANDS
from reco_fast.make_shards import ShardsCommand, make_shards
from reco_fast.settings import presets
from reco_fast.settings.config import Config, updated

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = ("reco-fast", "python", "python3", "torchrun", "pip", "pytest", "tensorboard", "sbatch", ".venv/bin/")

TINY = {
    "--model.arch": "timm/test_resnet",
    "--model.stem": "standard",
    "--model.bank-size": "16",
    "--model.key-norm": "batch",
    "--model.projection-dim": "8",
    "--train.batch-size": "8",
    "--train.max-steps": "1",
    "--train.device": "cpu",
    "--train.precision": "fp32",
    "--data.image-size": "32",
    "--data.loader": "torch",
    "--data.workers": "1",
}
PLACES = {"/data/train": "train", "/shared/mine": "runs/mine", "/local/cache": "cache-of-shards"}

# What is not run from here, and where it is; the last part of a line is enough.
ELSEWHERE = {
    "python3 -m venv .venv && .venv/bin/pip install -e . && .venv/bin/reco-fast train": "by hand, README.md",
    "python3 -m venv .venv && .venv/bin/pip install -e '.[test,dali]' && .venv/bin/python -m pytest "
    "-n 3 --dist loadfile": ".ci/run",
    "python -m reco_fast.train adapt --data.path photos/ --run.dir runs/adapted": "tests/run/test_initial.py",
    "reco-fast train adapt --data.path images/ --run.dir runs/adapted": "tests/run/test_initial.py",
    "tensorboard --logdir runs": "tests/profiling/test_trace.py",
    "sbatch --nodes 2 --gpus-per-node 4 examples/slurm.sbatch imagenet100 --data.path /data/train "
    "--run.dir /shared/mine": "tests/repository/test_examples_hosts.py",
    "torchrun --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:29400 -m reco_fast.train "
    "quickstart --run.dir runs/two-hosts": "tests/repository/test_examples_hosts.py",
    "python -m reco_fast.ablation quickstart --data.path train10000/ --data.val-path test2000/ --model.bank-size 2048 "
    "--train.epochs 30 --ablation.moco-lr 0.12 --ablation.seeds 0 1 2": "tests/commands/test_ablation.py",
    "python -m reco_fast.profiling.report RUN_DIR": "tests/profiling/test_report.py",
    "python -m reco_fast.profiling.benchmarks.step --against naive,lightly,supervised,torchvision --data.path IMAGES "
    "--output DIR": "tests/benchmarks/test_step_benchmark.py",
    "python -m reco_fast.profiling.benchmarks.growth --output DIR": "tests/benchmarks/test_scaling_benchmark.py",
    "python -m reco_fast.profiling.benchmarks.loader --data.path cifar10/train --image-size 32 --batch-size 256 "
    "--batches 12": "by hand, docs/loader.md",
    "python -m reco_fast.profiling.benchmarks.loader --data.path cifar10/train/airplane --image-size 32 --batch-size "
    "256 --batches 12 --warmup 20": "by hand, docs/loader.md",
    "python -m reco_fast.profiling.benchmarks.loader --data.path photographs --image-size 224 --batch-size 32 "
    "--batches 10": "by hand, docs/loader.md",
}
PYTHON_ELSEWHERE = {
    "import faiss": "tests/commands/test_embed.py",
    "import torch\nimport torchvision": "tests/commands/test_export.py",
    "model = torchvision.models.get_model": "tests/commands/test_export.py",
}


class Block(NamedTuple):
    page: str
    language: str
    text: str


def blocks() -> list[Block]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for indent, language, content in re.findall(r"^( *)```(\w*)\n(.*?)^\1```$", text, re.DOTALL | re.MULTILINE):
            lines = [line.removeprefix(indent) for line in content.splitlines()]
            found.append(Block(page.name, language, "\n".join(lines)))
    return found


def commands() -> list[str]:
    """Of all blocks for a shell, and of those without a language the lines that begin with a program's name."""
    found = []
    for block in blocks():
        if block.language in ("sh", ""):
            for line in re.sub(r"\\\n\s*", "", block.text).splitlines():
                line = re.sub(r"\s+#.*", "", line).strip()
                if block.language == "sh" or line.split(" ")[0] in PROGRAMS:
                    found.append(" ".join(line.split()))
    return sorted(set(found) - {""})


def runnable() -> list[str]:
    """Without `pip install`, whose extras `test_extras_exist` looks at."""
    return [line for line in commands() if line not in ELSEWHERE and not line.startswith("pip install ")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, s3_server: S3Server) -> Iterator[Path]:
    """A folder with everything that the commands name: images, shards, data sets, runs; and shards in a store."""
    root = tmp_path_factory.mktemp("docs")
    rng = np.random.default_rng(0)

    def write(folder: str) -> None:
        (root / folder).mkdir(parents=True)
        for index in range(8):
            Image.fromarray(rng.integers(0, 256, (36, 36, 3), dtype=np.uint8)).save(root / folder / f"{index}.jpg")

    for folder in ("images", "photos", "train", "val"):
        for name in ("cat", "dog"):
            write(f"{folder}/{name}")
    (root / "shards").mkdir()
    for number in range(128):
        with tarfile.open(root / "shards" / f"train-{number:04d}.tar", "w") as tar:
            content = (root / "images" / "cat" / f"{number % 8}.jpg").read_bytes()
            member = tarfile.TarInfo("a.jpg")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    record = np.hstack([np.arange(10)[:, None], rng.integers(0, 256, (10, 3072))]).astype(np.uint8)
    (root / "cache" / "reco_fast" / "cifar10").mkdir(parents=True)
    for name in ("test_batch", *(f"data_batch_{number}" for number in range(1, 6))):
        (root / "cache" / "reco_fast" / "cifar10" / f"{name}.bin").write_bytes(record.tobytes())
    if importlib.util.find_spec("datasets"):
        import datasets

        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
        images = [{"bytes": path.read_bytes()} for path in sorted((root / "images").rglob("*.jpg"))]
        rows = datasets.Dataset.from_dict({"image": images, "label": [0, 1] * 8}, features=features)
        datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(root / "my-data")
    options = [word for pair in TINY.items() for word in pair]
    for name in ("mine", "quickstart", "photos"):
        line = ["cifar10", "--data.path", str(root / "train"), "--data.val-path", str(root / "val"), *options]
        train.train(*train.parse([*line, "--run.dir", str(root / "runs" / name)]))
    s3_server.heal()
    s3_server.empty()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.environment.items():
            patch.setenv(name, value)
        make_shards(ShardsCommand(str(root / "photos"), "s3://images/train"))
        yield root


@pytest.mark.parametrize("command", runnable())
def test_commands_run(command: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    words = [PLACES.get(word, word) for word in shlex.split(command)]
    if words[0] == "reco-fast":
        words = ["python", "-m", COMMANDS[words[1]][0], *words[2:]]
    assert words[0] in ("python", "torchrun"), f"say in ELSEWHERE where this is run: {command}"
    module, arguments = words[words.index("-m") + 1], words[words.index("-m") + 2 :]
    if "hf:my-data" in words:
        pytest.importorskip("datasets", reason="datasets is not installed; pip install 'reco-fast[hf]'")
    if module == "reco_fast.train":
        for flag, value in TINY.items():
            if flag in arguments:
                arguments[arguments.index(flag) + 1] = value
            else:
                arguments += [flag, value]
        if "--run.dir" in arguments:
            arguments[arguments.index("--run.dir") + 1] = str(tmp_path / "run")
    elif module in ("reco_fast.embed", "reco_fast.evaluate"):
        arguments += ["--data.loader", "torch", "--data.workers", "1", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(module).main()
    assert ended.value.code == 0


def test_the_tables_name_only_what_the_pages_show() -> None:
    assert set(ELSEWHERE) <= set(commands())
    assert len(runnable()) >= 10
    for where in [*ELSEWHERE.values(), *PYTHON_ELSEWHERE.values()]:
        if "/" in where:
            assert (ROOT / where.rpartition(" ")[2]).exists()


@pytest.mark.parametrize(
    "block", [block for block in blocks() if block.language == "python"], ids=lambda b: b.text[:30]
)
def test_python_runs(block: Block, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if block.text.startswith(tuple(PYTHON_ELSEWHERE)):
        return
    monkeypatch.chdir(place)
    monkeypatch.setattr(presets, "preset", tiny_preset)
    text = re.sub(r"^(\s+)\.\.\.$", r"\1break", block.text, flags=re.MULTILINE)
    for large, small in (('"cuda"', '"cpu"'), ("256", "8"), ("224", "32"), ("workers=8", "workers=1")):
        text = text.replace(large, small)
    rows = {name: torch.nn.functional.normalize(torch.randn(4, 8)) for name in ("key", "key_weak", "bank", "bank_weak")}
    given = {"query": torch.randn(4, 8, requires_grad=True), "query_mix": torch.randn(4, 8, requires_grad=True)}
    names = {**rows, **given, "permutation": torch.randperm(4), "mix_ratio": 0.3}
    exec(compile(text, block.page, "exec"), names)
    assert "out" not in names or all(tensor.grad.abs().sum() > 0 for tensor in given.values())


def tiny_preset(name: str, **sections: Any) -> Config:
    """`presets.preset`, made small like the flags of commands."""
    config, _ = train.parse([name, *(word for pair in TINY.items() for word in pair)])
    return updated(config, sections)


def test_extras_exist() -> None:
    """Those that pages, messages and tests tell to install."""
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    known = set(re.findall(r'^        "([\w-]+)": (?:\[|[A-Z]+)', setup, re.MULTILINE))
    files = [
        *PAGES,
        *(path for folder in ("reco_fast", "pipelines", "tests") for path in (ROOT / folder).rglob("*.py")),
    ]
    for path in files:
        for extras in re.findall(r"(?:reco-fast|'\.)\[([\w,-]+)\]", path.read_text(encoding="utf-8")):
            assert set(extras.split(",")) <= known, path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?://)([^)]+)\)", text):
        path, _, heading = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles], target


@pytest.mark.parametrize("module", ["train", "evaluate", "embed", "export"])
def test_help_is_a_line_for_each_flag_on_80_columns(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", ["x", "--help"])
    with pytest.raises(SystemExit):
        importlib.import_module(f"reco_fast.{module}").main()
    lines = capsys.readouterr().out.splitlines()
    flags = [line for line in lines if re.match(r"[│ ] --\w", line)]  # without UTF-8 there are no boxes
    assert len(flags) >= 3
    assert max(map(len, flags)) <= 80
    assert all("(default: " in line or "(required)" in line for line in flags)
