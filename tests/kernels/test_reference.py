"""The two PyTorch implementations against float64."""

import numpy as np
import pytest
import torch
from float64_reference import KINDS, Problem, errors, make_problem, run, solve

from reco_fast.kernels import reference
from reco_fast.kernels.reference import BFLOAT16_ATTENTION, CudaAttention, reco_loss_sdpa, reco_loss_torch

IMPLEMENTATIONS = {"torch": reco_loss_torch, "sdpa": reco_loss_sdpa}


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest):  # type: ignore[no-untyped-def]
    return IMPLEMENTATIONS[request.param]


def check(implementation, problem: Problem, loss: float = 1e-6, grad: float = 1e-5) -> None:  # type: ignore[no-untyped-def]
    found = errors(run(implementation, problem), solve(problem))
    assert found.total < loss
    assert found.parts < 10 * loss
    assert found.grad_query < grad
    assert found.grad_query_mix < grad


def test_the_float64_gradient_is_the_slope_of_the_float64_loss() -> None:
    # The anchor is the key: the mix target is a constant of the loss, and would move with the query.
    problem = make_problem("random", 3, 11, 8, row_dtype=torch.float64, mix_anchor="key")
    expected = solve(problem)
    for name, grad in (("query", expected.grad_query), ("query_mix", expected.grad_query_mix)):
        direction = torch.randn(3, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        moved = []
        for step in (1e-6, -1e-6):
            fields = {**vars(problem), name: getattr(problem, name) + step * direction}
            moved.append(solve(Problem(**fields)).losses[0])
        slope = (moved[0] - moved[1]) / 2e-6
        np.testing.assert_allclose(slope, (grad * direction.numpy()).sum(), rtol=1e-6)


@pytest.mark.parametrize("rows", [1, 7, 64])
@pytest.mark.parametrize("length", [1, 33, 4096])
def test_sizes(implementation, rows: int, length: int) -> None:  # type: ignore[no-untyped-def]
    check(implementation, make_problem("random", rows, length), grad=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mix_anchor", ["query", "key"])
def test_kinds(implementation, kind: str, mix_anchor: str) -> None:  # type: ignore[no-untyped-def]
    check(implementation, make_problem(kind, 7, 33, mix_anchor=mix_anchor))


@pytest.mark.parametrize("global_weight", [0.0, 0, 0.7, torch.tensor(0.7)])
@pytest.mark.parametrize("local_weight", [0.0, 1.5, torch.tensor(1.5)])
def test_weights(implementation, global_weight, local_weight) -> None:  # type: ignore[no-untyped-def]
    problem = make_problem("random", 7, 33, global_weight=global_weight, local_weight=local_weight)
    check(implementation, problem)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_bank_of_every_kind(implementation, kind: str) -> None:  # type: ignore[no-untyped-def]
    check(implementation, make_problem(kind, 16, 1000, bank_dtype=torch.bfloat16), loss=2e-3, grad=5e-3)


def test_rows_too_short_to_normalise_count_as_zero(implementation) -> None:  # type: ignore[no-untyped-def]
    problem = make_problem("random", 5, 40)
    problem.query[0] *= 1e-17  # not yet
    expected = solve(problem)
    np.testing.assert_allclose(run(implementation, problem).losses, expected.losses, rtol=1e-5)
    problem.query[0] *= 1e-4
    problem.key[1] *= 1e-21
    found = run(implementation, problem)
    assert np.isfinite(found.losses).all()
    assert not found.grad_query[0].any()
    assert np.isfinite(found.grad_query).all()


def test_attention_in_float16_as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem("clustered", 16, 1000, bank_dtype=torch.bfloat16)
    monkeypatch.setitem(BFLOAT16_ATTENTION, "cpu", torch.float16)
    check(reco_loss_sdpa, problem, loss=2e-3, grad=5e-3)
    monkeypatch.setitem(BFLOAT16_ATTENTION, "cpu", torch.bfloat16)  # what it is there for
    assert errors(run(reco_loss_sdpa, problem), solve(problem)).grad_query > 5e-3


def test_bfloat16_bank(implementation) -> None:  # type: ignore[no-untyped-def]
    problem = make_problem("random", 64, 4096, row_dtype=torch.bfloat16, bank_dtype=torch.bfloat16)
    check(implementation, problem, loss=2e-3, grad=5e-3)


def test_splits_of_a_bank_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: seven splits and a rest."""
    monkeypatch.setattr(reference, "_split_count", lambda *_: 7)
    check(reco_loss_sdpa, make_problem("clustered", 16, 1000))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("attention", [CudaAttention(), CudaAttention(programs=0), CudaAttention("cudnn", 1)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_attention_of_a_gpu(attention: CudaAttention, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "CUDA_ATTENTION", attention)
    problem = make_problem(kind, 100, 5001, bank_dtype=torch.bfloat16, device="cuda")
    check(reco_loss_sdpa, problem, loss=2e-3, grad=5e-3)
