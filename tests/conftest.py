"""Shared fixtures, and `pytest --benchmark`: plain `pytest` runs every check without timing."""

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--benchmark", action="store_true", help="time what is marked as a benchmark, and report")


def pytest_configure(config: pytest.Config) -> None:
    config.option.benchmark_disable = not config.getoption("--benchmark")
