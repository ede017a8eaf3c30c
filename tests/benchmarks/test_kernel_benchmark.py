"""`pytest --benchmark`: every implementation timed, and reported in `.benchmarks/kernels`. Plain `pytest` times none:
it runs each once, at the smallest size, and compares it with the definition in float32."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from reco_fast.profiling.benchmarks import kernels, launch_table
from reco_fast.profiling.benchmarks.kernels import IMPLEMENTATIONS, ON_CPU, Report, Result, Step, ceilings, measure

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
ROWS = kernels.GPU_ROWS if HAS_GPU else kernels.CPU_ROWS
LENGTHS = kernels.GPU_LENGTHS if HAS_GPU else kernels.CPU_LENGTHS


@pytest.fixture(scope="module")
def report() -> Iterator[Report]:
    made = Report(Path(__file__).parents[2] / ".benchmarks" / "kernels", ceilings(DEVICE))
    yield made
    if made.results:
        made.plot()
        print(made.markdown())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "length" in metafunc.fixturenames:
        timing = metafunc.config.getoption("--benchmark")
        metafunc.parametrize("name", IMPLEMENTATIONS)
        metafunc.parametrize("rows", ROWS if timing else ROWS[:1])
        metafunc.parametrize("length", LENGTHS if timing else LENGTHS[:1])


def test_forward_and_backward(benchmark: Any, request: Any, name: str, rows: int, length: int) -> None:
    if name not in ON_CPU and not HAS_GPU:
        pytest.skip(f"{name} is timed on a GPU only")
    if not request.config.getoption("--benchmark"):
        total, *grads = Step(name, rows, length, DEVICE)()
        expected, *expected_grads = Step("fp32", rows, length, DEVICE)()
        torch.testing.assert_close(total, expected, rtol=2e-3, atol=0)
        for grad, wanted in zip(grads, expected_grads, strict=True):
            assert (grad - wanted).norm() <= 2e-2 * wanted.norm()
        benchmark(lambda: None)
        return
    report: Report = request.getfixturevalue("report")
    result = measure(name, rows, length, DEVICE, report.rates.get("matrix_teraflops"))
    report.add(result)
    benchmark.extra_info.update({x: str(y) for x, y in vars(result).items()})
    if result.failed:
        pytest.skip(result.failed)
    step = Step(name, rows, length, DEVICE)

    def timed() -> None:  # pytest-benchmark's own figure is the wall clock of one call; the report's is the device's
        step()
        if HAS_GPU:
            torch.cuda.synchronize()

    benchmark.pedantic(timed, rounds=5, warmup_rounds=1)


def test_the_report_is_written_as_results_come(tmp_path: Path) -> None:
    report = Report(tmp_path, {"matrix_teraflops": 100.0})
    report.add(Result("sdpa", 256, 4096, "a card", 0.5, 10, "graph", 12.0, 4.3, 0.043, 9.0))
    report.add(Result("sdpa", 256, 65536, "a card", 5.0, 10, "graph", 12.0, 6.9, 0.069))
    report.add(Result("fp32", 256, 65536, "a card", failed="out of memory"))
    report.plot()
    stored = json.loads((tmp_path / "kernels.json").read_text())
    assert [x["milliseconds"] for x in stored["results"]] == [0.5, 5.0, None]
    table = (tmp_path / "kernels.md").read_text()
    assert "| 256 | 4096 | sdpa | 0.500 | 4.30 | 4% | 12.0 | 10, graph |" in table
    assert "| 256 | 65536 | fp32 | out of memory |" in table
    assert (tmp_path / "kernels.png").stat().st_size > 1000


def test_a_wrong_loss_is_a_failure(tmp_path: Path) -> None:
    report = Report(tmp_path, {})
    report.add(Result("sdpa", 256, 4096, "a card", 0.5, teraflops=1.0, loss=10.0))
    report.add(Result("triton", 256, 4096, "a card", 0.1, teraflops=1.0, loss=10.01))
    report.add(Result("triton", 256, 4096, "a card", 0.1, teraflops=1.0, loss=9.0))
    assert [bool(x.failed) for x in report.results] == [False, False, True]


def test_what_was_fastest_enters_the_launch_table(tmp_path: Path) -> None:
    report = Report(tmp_path, {}, "sm_90")
    for rows, length, triton, sdpa in [(256, 4096, 2.0, 1.0), (256, 65536, 1.0, 2.0), (1024, 65536, 1.0, 3.0)]:
        report.add(Result("triton", rows, length, "H100", triton, teraflops=1.0))
        report.add(Result("sdpa", rows, length, "H100", sdpa, teraflops=1.0))
    report.add(Result("triton", 4096, 65536, "H100", failed="out of memory"))
    report.add(Result("sdpa", 4096, 65536, "H100", 1.0, teraflops=1.0))
    source = tmp_path / "launch.py"
    original = Path(launch_table.launch.__file__).read_text(encoding="utf-8")
    source.write_text(original, encoding="utf-8")
    for _ in range(2):  # a second time replaces what the first entered
        launch_table.record([tmp_path / "kernels.json"], source)
        filled: dict[str, Any] = {"__name__": "filled"}
        exec(source.read_text(encoding="utf-8"), filled)
        of_card = [x[1:3] for x in filled["MEASURED"] if x.architecture == "sm_90"]
        assert of_card == [(256 * 65536, "triton"), (1, "sdpa")]
        assert [tuple(x) for x in filled["MEASURED"] if x.architecture == "cpu"] == [
            tuple(x) for x in launch_table.launch.MEASURED if x.architecture == "cpu"
        ]


def test_a_failure_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any, **settings: Any) -> None:
        raise RuntimeError("broken on purpose")

    monkeypatch.setitem(IMPLEMENTATIONS, "sdpa", (broken, torch.float32))
    assert measure("sdpa", 4, 8, torch.device("cpu")).failed == "RuntimeError: broken on purpose"
