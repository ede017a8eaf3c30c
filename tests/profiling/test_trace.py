"""A profiled run leaves a trace with every named range, and TensorBoard shows it."""

import gzip
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlencode

import pytest
import torch
from small_runs import PROFILED_STEPS, SMALL, metrics, write_pictures
from torch.profiler import ProfilerActivity, profile

from reco_fast import train
from reco_fast.method.state import TrainState, build_state
from reco_fast.method.step import train_step
from reco_fast.profiling.flops import matmul_rate, step_flops
from reco_fast.profiling.trace import REGIONS, trace
from reco_fast.settings.config import Config, DataConfig, LossConfig, ModelConfig, TrainConfig
from reco_fast.training import loop

T = TypeVar("T")
THROUGHPUT = ("images_per_second", "data_wait_fraction", "step_ms_p50", "step_ms_p95", "model_flops_utilisation")
CPU = torch.device("cpu")
PROFILER = "data/plugin/pytorch_profiler"


def content(folder: Path) -> Any:
    (path,) = folder.glob("*.pt.trace.json.gz")
    return json.loads(gzip.decompress(path.read_bytes()))


def test_the_trace_has_every_named_range_of_every_recorded_step(profiled: Path) -> None:
    events = content(profiled / "tensorboard")["traceEvents"]
    events = [event for event in events if event.get("cat") == "user_annotation"]
    counted = Counter(event["name"] for event in events)
    assert {name: counted[name] for name in REGIONS} == dict.fromkeys(REGIONS, PROFILED_STEPS)
    steps = [event for event in events if event["name"].startswith("ProfilerStep#")]
    assert len(steps) == PROFILED_STEPS
    for step in steps:
        within = [event for event in events if event["name"] in REGIONS and 0 <= event["ts"] - step["ts"] < step["dur"]]
        assert [event["name"] for event in sorted(within, key=lambda event: event["ts"])] == list(REGIONS)
        for event, following in itertools.pairwise(within):  # side by side, none inside another
            assert event["ts"] + event["dur"] <= following["ts"] or following["ts"] + following["dur"] <= event["ts"]


def test_the_trace_has_allocations_and_shapes(profiled: Path) -> None:
    found = content(profiled / "tensorboard")
    assert found["profile_memory"] == found["record_shapes"] == 1
    assert any(event.get("name") == "[memory]" for event in found["traceEvents"])


def test_the_log_has_step_times_and_utilisation(profiled: Path) -> None:
    logged = [line for line in metrics(profiled) if line["kind"] == "train"]
    for line in logged:
        assert 0 < line["step_ms_p50"] <= line["step_ms_p95"]
        assert 0 < line["model_flops_utilisation"] < 1
    # Two steps of 16 images take about twice their median.
    assert any(16e3 / line["images_per_second"] < 2 * line["step_ms_p95"] for line in logged)


def test_nothing_is_recorded_when_it_is_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise AssertionError("a profiler was made")

    monkeypatch.setattr("reco_fast.profiling.trace.profile", fail)
    with trace(None, wait=0, warmup=0, active=1) as hook:
        for _ in range(3):
            hook.step()
    assert list(tmp_path.iterdir()) == []


def test_an_evaluation_ends_the_recording(tmp_path: Path) -> None:
    with trace(tmp_path, wait=1, warmup=1, active=5) as hook:
        for step in range(5):
            torch.ones(4).exp()
            if step in (0, 3):  # before the recording, and in it
                hook.finish()
                torch.ones(4).sigmoid()
            hook.step()
    counted = Counter(event.get("name") for event in content(tmp_path)["traceEvents"])
    assert (counted["aten::exp"], counted["aten::sigmoid"]) == (2, 0)


def test_an_evaluation_of_a_run_ends_the_recording(tmp_path: Path) -> None:
    data = f"--data.path {write_pictures(tmp_path / 'images', 32)} --run.dir {tmp_path / 'run'} --data.loader torch"
    options = "--train.epochs 2 --eval.every 1 --profile.enabled --profile.wait 0 --profile.warmup 1 --profile.active 3"
    train.train(*train.parse(["cifar10", *SMALL, *data.split(), *options.split()]))
    names = {event.get("name", "") for event in content(tmp_path / "run" / "tensorboard")["traceEvents"]}
    assert {name for name in names if name.startswith("ProfilerStep#")} == {"ProfilerStep#1"}  # of steps 1, 2 and 3


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What CUDA's allocator is told. It and its share of the profiler are stand-ins."""
    told: list[str] = []
    memory = torch.cuda.memory

    def on_cpu(activities: list[ProfilerActivity], **options: Any) -> profile:
        assert activities == [ProfilerActivity.CPU, ProfilerActivity.CUDA]
        return profile(activities=activities[:1], **options)

    def history(enabled: str | None = "all", *, stacks: str = "all", **_: object) -> None:
        told.append(f"{stacks} stacks" if enabled else "no history")

    monkeypatch.setattr("reco_fast.profiling.trace.profile", on_cpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(memory, "_record_memory_history", history)
    monkeypatch.setattr(memory, "_dump_snapshot", lambda path: told.append(f"dump {Path(path).relative_to(tmp_path)}"))
    return told


DUMP = [f"dump memory_{os.getpid()}.pickle", "no history"]


@pytest.mark.filterwarnings("ignore:Profiler won't be using warmup")
@pytest.mark.parametrize(("wait", "warmup"), [(1, 1), (0, 0)])
def test_with_cuda_the_recorded_steps_alone_leave_a_timeline_of_their_allocations(
    tmp_path: Path, told: list[str], wait: int, warmup: int
) -> None:
    with trace(tmp_path, wait=wait, warmup=warmup, active=2) as hook:
        for step in range(6):
            told.append(f"step {step}")
            hook.step()
    steps = [f"step {number}" for number in range(6)]
    before, end = wait + warmup, wait + warmup + 2
    assert told == [*steps[:before], "python stacks", *steps[before:end], *DUMP, *steps[end:]]


def test_with_cuda_an_evaluation_ends_the_timeline_of_allocations(tmp_path: Path, told: list[str]) -> None:
    with trace(tmp_path, wait=0, warmup=1, active=5) as hook:
        hook.finish()
        assert told == []
        hook.step()
        hook.finish()
        assert told == ["python stacks", *DUMP]
        hook.step()
    assert told == ["python stacks", *DUMP]


@pytest.mark.parametrize(
    ("settings", "passes", "row_sets"),
    [
        ({}, 8, 4),
        ({"objective": "moco"}, 4, 1),
        ({"objective": "moco", "keys": "weak"}, 4, 1),
        ({"keys": "weak"}, 7, 4),
        ({"mix_size": 16}, 5 + 3 / 4, 4),
        ({"mix_share": 0.5}, 5 + 3 / 2, 3.5),
        ({"mix_share": 0.5, "mix_within": True}, 5, 2),
        ({"keys": "weak", "mix_size": 16, "mix_share": 0.25}, 4 + 3 / 16, 3.25),
    ],
    ids=str,
)
def test_counted_operations_of_a_known_network(settings: dict[str, Any], passes: float, row_sets: float) -> None:
    config = Config(
        model=ModelConfig(arch="resnet18", bank_size=1024), loss=LossConfig(**settings), train=TrainConfig(batch_size=8)
    )
    state = build_state(config, CPU)
    before = {name: value.clone() for name, value in state.student.state_dict().items()}
    forward = 2 * 556.9e6  # multiply-adds of the CIFAR ResNet-18 (3×3 stem) at 32 px: 555.4 M, projector 0.33 M
    bank = row_sets * 4 * 1024 * 128
    assert step_flops(state, config) / 8 == pytest.approx(passes * forward + bank, rel=0.01)
    assert all(torch.equal(value, before[name]) for name, value in state.student.state_dict().items())


def test_a_smaller_weak_view_takes_its_share_of_one_of_eight_passes() -> None:
    """Of what the convolutions cost, which goes with the square of the side; the projector costs the same."""
    model, train_ = ModelConfig(arch="resnet18", bank_size=64), TrainConfig(batch_size=8)
    counted = []
    for weak_size in (None, 16):
        config = Config(data=DataConfig(weak_size=weak_size), model=model, train=train_)
        counted.append(step_flops(build_state(config, CPU), config) / 8)
    projector = 2 * (512 * 512 + 512 * 128)
    bank = 4 * 4 * 64 * 128
    # 3 for forward and backward, but the first layer's images need no gradient.
    images = 2 * 27 * 64 * 32 * 32
    forward = (counted[0] - bank + 2 * images) / 8
    assert counted[0] - counted[1] == pytest.approx((forward - projector) * (1 - 16**2 / 32**2), rel=1e-9)


def test_the_matrix_rate_is_that_of_matrix_products() -> None:
    start = time.perf_counter()
    torch.mm(*torch.randn(2, 1024, 1024))
    slow = 2 * 1024**3 / (time.perf_counter() - start)
    assert matmul_rate(CPU, torch.float32) > 0.3 * slow


# What stands in for Google's chart library, which the page loads from the internet: a chart becomes a list of its rows.
CHARTS = """
const rows = data => data.rows.map(row => row.slice(0, 2).join(' '));
class Table {
  constructor(values = []) { this.rows = values; }
  addColumn() {}
  setProperty() {}
  addRow(row) { this.rows.push(row); }
  addRows(more) { this.rows.push(...more); }
}
class Chart {
  constructor(element) { this.element = element; }
  draw(data) { this.element.innerText = rows(data).join('\\n'); }
  clearChart() {}
}
const library = {DataTable: Table, arrayToDataTable: values => new Table(values), events: {addListener() {}}};
window.google = {charts: {load: () => Promise.resolve()}, visualization: new Proxy(library, {
  get: (known, name) => known[name] ?? Chart})};
"""


@contextmanager
def tensorboard(folder: Path) -> Iterator[str]:
    """The address of a TensorBoard on `folder`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--reload_interval", "1"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Headless Chromium that reaches this machine alone; None where it is not installed (Debian: chromium and
    chromium-driver), where the tests ask TensorBoard for what its page would show."""
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in programs:
        yield None
        return
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for flag in (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --window-size=1400,900"
    ).split():
        options.add_argument(flag)
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(programs[1]))
    driver.set_script_timeout(180)
    driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": CHARTS})
    yield driver
    driver.quit()


def test_tensorboard_shows_the_run_the_overview_and_the_ranges(profiled: Path, browser: Any, tmp_path: Path) -> None:
    pytest.importorskip("torch_tb_profiler", reason="torch-tb-profiler is not installed (the extra `profile`)")
    with tensorboard(profiled) as address:
        (run,) = wait_for(lambda: fetch(address, f"{PROFILER}/runs")["runs"], "TensorBoard to load the run")
        scalars = wait_for(lambda: fetch(address, "data/plugin/scalars/tags").get("tensorboard"), "the run's scalars")
        assert {f"train/{name}" for name in THROUGHPUT} <= set(scalars)

        # The tab, and what its views draw: fetched as the page does.
        tab = fetch(address, "data/plugins_listing")["pytorch_profiler"]
        assert tab["enabled"]
        assert tab["loading_mechanism"]["module_path"] == f"/{PROFILER}/index.js"
        for file, content in (("index.js", b"index.html"), ("index.html", b"Step Time Breakdown")):
            with urllib.request.urlopen(f"{address}/{PROFILER}/{file}", timeout=60) as reply:
                assert content in reply.read(), file
        assert {"Overview", "Operator", "Trace", "Memory"} <= set(fetch(address, f"{PROFILER}/views", run=run))
        (worker,) = fetch(address, f"{PROFILER}/workers", run=run, view="Trace")
        assert worker.startswith(socket.gethostname())
        (span,) = fetch(address, f"{PROFILER}/spans", run=run, worker=worker)
        query = {"run": run, "worker": worker, "span": span}
        overview = fetch(address, f"{PROFILER}/overview", **query, view="Overview")
        assert {"title": "Number of Worker(s)", "value": "1"} in overview["environments"]
        names = [column.get("name") for column in overview["steps"]["columns"]]
        computing = [row[names.index("CPU Exec")] for row in overview["steps"]["rows"]]
        assert len(computing) == PROFILED_STEPS
        assert min(computing) > 0
        (mean,) = overview["performance"]
        shares = {part["name"]: part["value"] for part in mean["children"]}
        assert sum(shares.values()) == pytest.approx(mean["value"], abs=3)
        assert shares["CPU Exec"] == pytest.approx(sum(computing) / PROFILED_STEPS, abs=1)
        events = fetch(address, f"{PROFILER}/trace", **query)["traceEvents"]
        assert set(REGIONS) <= {event["name"] for event in events if event.get("cat") == "user_annotation"}
        curve = fetch(address, f"{PROFILER}/memory_curve", **query)
        allocated = [row[1] for row in curve["rows"]["CPU"]]
        assert len(allocated) > 100
        assert max(allocated) > min(allocated)
        if browser:
            look_at_the_profiler(browser, address, query)
            keep_picture(browser, "tensorboard-overview.png", tmp_path)


def look_at_the_profiler(browser: Any, address: str, query: dict[str, str]) -> None:
    """The page draws the overview, and reaches the trace; to draw that it loads a polyfill from the internet."""

    def text() -> str:
        return str(browser.find_element("css selector", "body").text)

    browser.get(f"{address}/#pytorch_profiler")
    frame = wait_for(lambda: browser.find_elements("css selector", "iframe"), "the profiler's tab")[0]
    browser.switch_to.frame(frame)
    wait_for(lambda: "CPU Exec" in text(), "the overview")
    for shown in ("Overview", "Configuration", "Step Time Breakdown", "CPU Exec", socket.gethostname()):
        assert shown in text(), shown
    drawn = browser.execute_async_script(
        "const [query, done] = arguments;"
        f"fetch('/{PROFILER}/trace?' + query).then(r => r.json()).then("
        "t => done(t.traceEvents.filter(e => e.cat == 'user_annotation').map(e => e.name)))",
        urlencode(query),
    )
    assert set(REGIONS) <= set(drawn)


def test_scalars_are_in_tensorboard_while_the_run_trains(
    photographs: Path, browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, seen = tmp_path / "run", []

    def look_and_step(state: TrainState, *rest: Any) -> torch.Tensor:
        """The step, but before some: what TensorBoard has of the loss, and what its page says."""
        if state.step in (4, 6):
            logged = metrics(run)[-1]
            assert logged["step"] == state.step

            def served() -> bool:
                points = fetch(address, "data/plugin/scalars/scalars", run="run/tensorboard", tag="train/loss")
                return [points[-1][1], round(points[-1][2], 4)] == [state.step, round(logged["loss"], 4)]

            def shown() -> bool:
                browser.find_element("css selector", "app-header-reload button").click()
                lines = browser.find_element("css selector", "body").text.split("\n")
                return {"/loss", f"{logged['loss']:.4f}", str(state.step)} <= set(lines)

            wait_for(served, f"the loss of step {state.step} in TensorBoard", seconds=90)
            if browser:
                wait_for(shown, f"the loss of step {state.step} in the browser", seconds=90)
                keep_picture(browser, "tensorboard-scalars.png", tmp_path)
            seen.append(state.step)
        return train_step(state, *rest)

    monkeypatch.setattr(loop, "train_step", look_and_step)
    with tensorboard(tmp_path) as address:
        wait_for(lambda: fetch(address, "data/runs") == [], "TensorBoard")
        if browser:
            browser.get(f"{address}/?tagFilter=train%2Floss%24#timeseries")  # one card: the last point's value and step
        options = f"--data.path {photographs} --run.dir {run} --train.epochs 2 --run.log-every 2".split()
        train.train(*train.parse(["cifar10", *SMALL, *options]))
    assert seen == [4, 6]


def keep_picture(browser: Any, name: str, folder: Path) -> None:
    """A screenshot in `folder`, or where RECO_FAST_SCREENSHOTS says: the pictures of the docs."""
    browser.save_screenshot(str(Path(os.environ.get("RECO_FAST_SCREENSHOTS", folder)) / name))


def fetch(address: str, what: str, **query: str) -> Any:
    with urllib.request.urlopen(f"{address}/{what}?{urlencode(query)}", timeout=60) as reply:
        content = reply.read()
    return json.loads(gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content)


def wait_for(condition: Callable[[], T], what: str, seconds: float = 180) -> T:
    """The first true value of `condition`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if value := condition():
                return value
        except OSError:  # nobody listens yet, or what is asked for is not there yet
            pass
        time.sleep(0.2)
    raise AssertionError(f"waited {seconds} s for {what}")
