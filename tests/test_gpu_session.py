"""The unattended session: every command line is understood, and nothing that goes wrong ends it."""

import json
import sys
from pathlib import Path

import pytest

from reco_fast import cli, train
from reco_fast.profiling import benchmark, gpu_session, growth
from reco_fast.profiling.gpu_session import Part, parts, session


def test_a_part_that_fails_or_hangs_is_recorded_and_the_next_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_session, "GRACE", 1)
    python = [sys.executable, "-c"]
    chosen = {
        "fails": Part(1, [[*python, "raise SystemExit(3)"], [*python, "print('never')"]]),
        "hangs": Part(0.02, [[*python, "import time; print('here', flush=True); time.sleep(60)"]]),
        "missing": Part(1, [["/no/such/program"]]),
        "works": Part(1, [[*python, "print('one')"], [*python, "print('two')"]]),
    }
    (tmp_path / "session.json").write_text(json.dumps({"parts": {"earlier": {"ended": "done"}}}))
    assert not session(chosen, tmp_path)
    written = json.loads((tmp_path / "session.json").read_text())
    how = {name: part["ended"] for name, part in written["parts"].items()}
    assert how.pop("missing").startswith("did not start")
    assert how == {"earlier": "done", "fails": "exit 3", "hangs": "stopped after 0.02 minutes", "works": "done"}
    assert (tmp_path / "fails.log").read_text() == ""
    assert (tmp_path / "works.log").read_text() == "one\ntwo\n"
    assert written["environment"]["packages"]["torch"]
    assert session({"works": chosen["works"]}, tmp_path)


@pytest.mark.parametrize("tiny", [False, True])
def test_every_part_fits_its_time_and_its_command_line_is_understood(tmp_path: Path, tiny: bool) -> None:
    known = parts(tmp_path, tmp_path / "cifar", tmp_path / "photographs", tiny)
    assert {"step-resnet50", "cuda-graph", "profile", "quality-reco", "quality-moco", "loader-224"} <= set(known)
    assert {"profile-224", "growth"} <= set(known)
    for part in known.values():
        assert 60 * part.minutes + gpu_session.GRACE < 600
        for _, _, module, *arguments in part.commands:
            if module == "reco_fast.train":
                _, config = train.parse(arguments)
                assert config.data.path in (tmp_path / "cifar" / "train", tmp_path / "photographs")
            elif module == "reco_fast.profiling.benchmark":
                parsed = cli.parse(benchmark.Benchmark, arguments, prog="", description="", default=benchmark.DEFAULT)
                assert parsed.model.arch == ("timm/test_resnet" if tiny else parsed.model.arch)
                assert parsed.against
            elif module == "reco_fast.profiling.growth":
                grown = cli.parse(growth.Growth, arguments, prog="", description="", default=growth.DEFAULT)
                assert grown.batches == ((8,) if tiny else (128, 256, 1024))
            else:
                assert module == "pytest" or (Path(benchmark.__file__).parent / f"{module.split('.')[-1]}.py").is_file()
                assert all((gpu_session.HERE / a).is_file() for a in arguments if a.startswith("tests/"))
