# ruff: noqa: E501
"""The public function: what it accepts, what it refuses and how, and that its choices agree."""

import re
from typing import Any

import pytest
import torch
from float64_reference import Problem, errors, make_problem, run, solve
from torch import Tensor

from reco_fast import ReCoLoss, ReCoLossOutput, reco_loss

N, K, D = 6, 40, 16
NAMES = ("query", "query_mix", "key", "key_weak", "bank", "bank_weak", "permutation", "mix_ratio")


@pytest.fixture
def problem() -> Problem:
    return make_problem("random", N, K, D)


def call(problem: Problem, **changes: Any) -> ReCoLossOutput:
    tensors = [changes.pop(name) if name in changes else getattr(problem, name) for name in NAMES]
    return reco_loss(*tensors, **(problem.settings | changes))


@pytest.mark.parametrize("impl", ["auto", "torch", "sdpa"])
def test_every_choice_gives_the_same_numbers(problem: Problem, impl: str) -> None:
    problem.settings["impl"] = impl
    expected = solve(Problem(*problem.tensors(), {x: y for x, y in problem.settings.items() if x != "impl"}))
    found = errors(run(reco_loss, problem), expected)
    assert found.total < 1e-6
    assert max(found.grad_query, found.grad_query_mix) < 1e-5


def test_the_module_gives_the_numbers_of_the_function(problem: Problem) -> None:
    settings = {"temperature": 0.3, "student_temperature": 0.2, "teacher_temperature": 0.1, "global_weight": 0.5}
    module = ReCoLoss(**settings, local_weight=1.0, mix_anchor="key", impl="torch")  # type: ignore[arg-type]
    expected = call(problem, **settings, local_weight=1.0, mix_anchor="key", impl="torch")
    assert module(*problem.tensors()) == expected
    assert "temperature=0.3" in repr(module)
    assert "impl='torch'" in repr(module)


def test_without_relations_it_is_infonce(problem: Problem) -> None:
    unit = torch.nn.functional.normalize
    q, k = unit(problem.query), unit(problem.key)
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ problem.bank.T], dim=1) / 0.2
    expected = torch.nn.functional.cross_entropy(logits, torch.zeros(N, dtype=torch.long))
    off: dict[str, Any] = {"global_weight": 0, "local_weight": 0.0}
    absent = dict.fromkeys(("query_mix", "key_weak", "bank_weak", "permutation"))
    found = call(problem, **off, **absent)
    torch.testing.assert_close(found.total, expected)
    torch.testing.assert_close(found.instance, expected)
    assert [float(x) for x in found[2:]] == [0, 0, 0]


def test_only_the_total_carries_a_gradient_and_only_to_the_student(problem: Problem) -> None:
    for name in NAMES[:6]:
        getattr(problem, name).requires_grad_()
    problem.mix_ratio.requires_grad_()  # type: ignore[union-attr]
    output = call(problem)
    assert [x.requires_grad for x in output] == [True, False, False, False, False]
    assert all(x.dtype == torch.float32 and x.dim() == 0 for x in output)
    output.total.backward()
    with_gradient = [name for name in NAMES if isinstance(x := getattr(problem, name), Tensor) and x.grad is not None]
    assert with_gradient == ["query", "query_mix"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_rows_of_any_float_dtype(problem: Problem, dtype: torch.dtype) -> None:
    rows = {name: getattr(problem, name).to(dtype) for name in NAMES[:4]}
    torch.testing.assert_close(call(problem, **rows).total, call(problem).total, rtol=2e-2, atol=2e-2)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "query of one dimension": ({"query": torch.ones(D)}, "query: expected a floating-point tensor [N, D]"),
    "query of integers": ({"query": torch.ones(N, D, dtype=torch.long)}, "query: expected a floating-point"),
    "query without rows": ({"query": torch.ones(0, D)}, "query: expected"),
    "query_mix of another shape": ({"query_mix": torch.ones(N, D + 1)}, f"query_mix: expected a floating-point tensor [{N}, {D}], got torch.float32 [{N}, {D + 1}]"),
    "query_mix missing": ({"query_mix": None}, f"query_mix: expected a floating-point tensor [{N}, {D}], got NoneType"),
    "key of another shape": ({"key": torch.ones(N + 1, D)}, "key: expected"),
    "key_weak of integers": ({"key_weak": torch.ones(N, D, dtype=torch.int8)}, "key_weak: expected"),
    "bank empty": ({"bank": torch.ones(0, D)}, f"bank: expected a tensor [K, {D}] with K ≥ 1, got torch.float32 [0, {D}]"),
    "bank of another width": ({"bank": torch.ones(K, D + 1)}, "bank: expected"),
    "bank in half precision": ({"bank": torch.ones(K, D).half()}, "bank: expected float32 or bfloat16, got torch.float16"),
    "bank_weak of another length": ({"bank_weak": torch.ones(K + 1, D)}, f"bank_weak: expected the shape of bank, [{K}, {D}]"),
    "permutation of floats": ({"permutation": torch.ones(N)}, f"permutation: expected an integer tensor [{N}]"),
    "permutation too short": ({"permutation": torch.arange(N - 1)}, "permutation: expected"),
    "ratio above 1": ({"mix_ratio": 1.5}, "mix_ratio: expected a number in [0, 1], got 1.5"),
    "ratio not a number": ({"mix_ratio": float("nan")}, "mix_ratio: expected a number in [0, 1], got nan"),
    "ratio of another length": ({"mix_ratio": torch.ones(N + 1)}, "mix_ratio: expected a number or"),
    "temperature 0": ({"temperature": 0.0}, "temperature: expected a number above 0, got 0.0"),
    "student_temperature below 0": ({"student_temperature": -1.0}, "student_temperature: expected"),
    "teacher_temperature not a number": ({"teacher_temperature": float("nan")}, "teacher_temperature: expected"),
    "global_weight of many": ({"global_weight": torch.ones(2)}, "global_weight: expected a number or a 0-d tensor"),
    "local_weight elsewhere": ({"local_weight": torch.ones((), device="meta")}, "local_weight: expected a number or a 0-d tensor on cpu"),
    "bank elsewhere": ({"bank": torch.ones(K, D, device="meta")}, "bank: expected a tensor on cpu like query, got one on meta"),
    "mix_anchor unknown": ({"mix_anchor": "other"}, 'mix_anchor: expected "query" or "key", got \'other\''),
    "impl unknown": ({"impl": "other"}, 'impl: expected "auto", "triton", "sdpa" or "torch", got \'other\''),
}  # fmt: skip


@pytest.mark.parametrize("mistake", WRONG)
def test_a_mistake_names_the_argument_what_was_expected_and_what_came(problem: Problem, mistake: str) -> None:
    changes, message = WRONG[mistake]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        call(problem, **changes)


def test_triton_says_what_it_needs(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    relation_loss = pytest.importorskip("reco_fast.kernels.relation_loss")
    monkeypatch.setattr(relation_loss, "INTERPRETED", False)
    with pytest.raises(ValueError, match=r'^impl: "triton" expected tensors on a GPU, got cpu$'):
        call(problem, impl="triton")
    monkeypatch.setattr(relation_loss, "INTERPRETED", True)
    wide = make_problem("random", N, K, 300)
    with pytest.raises(ValueError, match=r'^impl: "triton" expected D of at most 256, got 300$'):
        call(wide, impl="triton")


@pytest.mark.parametrize("impl", ["torch", "sdpa"])
def test_the_banks_may_be_overwritten_before_backward(problem: Problem, impl: str) -> None:
    gradients = []
    for overwrite in (False, True):
        query = problem.query.clone().requires_grad_()
        bank, bank_weak = problem.bank.clone(), problem.bank_weak.clone()
        out = call(problem, query=query, bank=bank, bank_weak=bank_weak, impl=impl)
        if overwrite:
            bank.zero_()
            bank_weak.fill_(float("nan"))
        out.total.backward()
        gradients.append(query.grad)
    assert torch.equal(gradients[0], gradients[1])
