"""The device and the precision of a run."""

import pytest
import torch

from reco_fast.errors import ConfigError
from reco_fast.method.state import fastest_precision, pick_device, pick_precision

CPU = torch.device("cpu")


def test_cudnn_looks_for_the_fastest_convolution_where_a_cuda_device_is_picked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    pick_device("cpu")
    assert not torch.backends.cudnn.benchmark
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.set_device", lambda device: None)
    assert pick_device("auto").type == "cuda"
    assert torch.backends.cudnn.benchmark


@pytest.mark.parametrize(("rank", "ranks"), [("0", "4"), ("3", "4"), ("2", None)])
def test_more_ranks_than_gpus_is_one_line_on_each(
    monkeypatch: pytest.MonkeyPatch, rank: str, ranks: str | None
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.set_device", lambda device: pytest.fail("no such device"))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", rank)
    if ranks is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    for name in ("auto", "cuda"):
        with pytest.raises(ConfigError, match=r"--nproc-per-node: expected at most the 2 GPUs .* got [34] ranks"):
            pick_device(name)
    assert pick_device("cpu") == CPU


@pytest.mark.parametrize(
    ("units", "isa", "precision", "why"),
    [
        ({"amx_tile", "avx512_bf16"}, None, torch.bfloat16, "the CPU has AMX"),
        ({"amx_tile", "avx512_bf16"}, "all", torch.bfloat16, "the CPU has AMX"),
        ({"amx_tile", "avx512_bf16"}, "avx512_core_amx", torch.bfloat16, "the CPU has AMX"),
        ({"amx_tile", "avx512_bf16"}, "AVX512_CORE_BF16", torch.bfloat16, "the CPU has AVX512_BF16"),
        ({"avx512_bf16"}, None, torch.bfloat16, "the CPU has AVX512_BF16"),
        ({"avx512_bf16"}, "AVX512_CORE_AMX", torch.bfloat16, "the CPU has AVX512_BF16"),
        ({"amx_tile", "avx512_bf16"}, "AVX512_CORE", torch.float32, "the CPU has neither AMX nor AVX512_BF16"),
        (set(), None, torch.float32, "the CPU has neither AMX nor AVX512_BF16"),
    ],
)
def test_auto_precision_asks_what_the_cpu_has_and_onednn_may_use(
    monkeypatch: pytest.MonkeyPatch, units: set[str], isa: str | None, precision: torch.dtype, why: str
) -> None:
    for name in ("amx_tile", "avx512_bf16"):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda name=name: name in units)
    if isa is None:
        monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    else:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", isa)
    assert fastest_precision(CPU) == (precision, why)
    assert pick_precision("auto", CPU) == precision
    assert pick_precision("fp16", CPU) == torch.float16
