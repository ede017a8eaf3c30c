"""The Triton kernels against float64: on a GPU where there is one, else in Triton's interpreter.

The interpreter must be chosen before Triton is imported, which other test modules do. So without a GPU these tests run
in a process of their own, started by `test_interpreter.py`, or by hand:

    TRITON_INTERPRET=1 python -m pytest tests/kernels/test_relation_loss.py
"""

import functools
import importlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from dispatch import Recorder
from float64_reference import KINDS, Problem, Result, errors, make_problem, run, solve
from mutations import MUTATIONS, ROOT, SOURCES, mutated

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no GPU; test_interpreter.py runs this file under TRITON_INTERPRET=1", allow_module_level=True)

import triton  # noqa: E402

from reco_fast import ReCoLoss, ReCoLossOutput, reco_loss  # noqa: E402
from reco_fast.kernels import launch, relation_loss  # noqa: E402
from reco_fast.kernels.reference import reco_loss_torch  # noqa: E402

DEVICE = "cuda" if HAS_GPU else "cpu"
LONG = "TF32 sum of a split left in the tensor cores"  # the mutation that shows only there
on_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a GPU: too large for the interpreter, or a property of CUDA")
fused = relation_loss.reco_loss_triton
DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16 rows": (torch.float16, torch.bfloat16),
    "fp32 rows": (torch.float32, torch.bfloat16),
}


@pytest.fixture(autouse=True, scope="module")
def _quick_interpreter() -> Iterator[None]:
    """Triton's interpreter does some things over and over: it replaces the functions of `triton.language` for a launch,
    and again in each call of a device function within it, where they are replaced already (two fifths of its time), and
    writes a table of dtypes for each tensor (a tenth of what is left)."""
    from triton.runtime import interpreter

    core = triton.language.core
    with pytest.MonkeyPatch.context() as patch:
        if not HAS_GPU and hasattr(interpreter, "_LangPatchScope"):
            replace = interpreter._patch_lang

            def replace_once(function: Any) -> Any:
                seen = [x for x in function.__globals__.values() if x is triton.language or x is core]
                replaced = not any(core.is_builtin(language.load) for language in seen)
                return interpreter._LangPatchScope() if replaced else replace(function)

            patch.setattr(interpreter, "_patch_lang", replace_once)
        if not HAS_GPU and hasattr(interpreter, "_get_np_dtype"):
            dtype_of = functools.cache(interpreter._get_np_dtype)
            pointer = dtype_of(triton.language.uint64)
            patch.setattr(interpreter, "_get_np_dtype", lambda t: pointer if t.scalar.is_ptr() else dtype_of(t.scalar))
        yield


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """`torch.empty` returns NaN, so that whatever a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def check(implementation: Callable[..., ReCoLossOutput], problem: Problem, expected: Result | None = None) -> None:
    """The bounds of the project: by the dtype of the bank, and of the rows, in which the gradients are returned."""
    low = problem.bank.dtype != torch.float32 or problem.query.dtype != torch.float32
    loss, grad = (2e-3, 5e-3) if low else (1e-6, 1e-5)
    found = errors(run(implementation, problem), solve(problem) if expected is None else expected)
    assert found.total < loss
    assert found.parts < 10 * loss
    assert found.grad_query < grad
    assert found.grad_query_mix < grad


@pytest.mark.parametrize(
    ("rows", "length", "dtypes"),
    [(rows, length, dtypes) for rows, length in [(1, 1), (1, 65), (5, 1000)] for dtypes in DTYPES]
    + [(37, 1, "fp32"), (37, 200, "bf16"), (65, 65, "fp32")],
)
def test_sizes(rows: int, length: int, dtypes: str) -> None:
    check(fused, make_problem("random", rows, length, 128, *DTYPES[dtypes], DEVICE))


@on_gpu
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("length", [1, 65, 1000, 2999, 65536])
@pytest.mark.parametrize("rows", [1, 37, 129, 255, 1024])
def test_large_sizes(rows: int, length: int, dtypes: str) -> None:
    check(fused, make_problem("random", rows, length, 128, *DTYPES[dtypes], DEVICE))


@pytest.mark.parametrize("dtypes", ["fp32", "bf16"])
@pytest.mark.parametrize("mix_anchor", ["query", "key"])
@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind: str, mix_anchor: str, dtypes: str) -> None:
    check(fused, make_problem(kind, 7, 200, 64, *DTYPES[dtypes], DEVICE, mix_anchor=mix_anchor))


@pytest.mark.parametrize("dtypes", ["fp32", "bf16"])
@pytest.mark.parametrize("width", [1, 40, 64, 100, 128, 200, 256])
def test_widths(width: int, dtypes: str) -> None:
    check(fused, make_problem("random", 3, 150, width, *DTYPES[dtypes], DEVICE))


@pytest.mark.parametrize("global_weight", [0, 0.7, "tensor"])
@pytest.mark.parametrize("local_weight", [0, 1.5, "tensor"])
@pytest.mark.parametrize("mix_ratio", [0.3, "tensor", "rows"])
def test_weights_and_ratios(global_weight: Any, local_weight: Any, mix_ratio: Any) -> None:
    def scalar(value: Any) -> Any:
        return torch.tensor(0.6, device=DEVICE) if value == "tensor" else value

    problem = make_problem(
        "random", 5, 100, 64, device=DEVICE, global_weight=scalar(global_weight), local_weight=scalar(local_weight)
    )
    if mix_ratio != "rows":
        problem.mix_ratio = scalar(mix_ratio)
    check(fused, problem)


@pytest.mark.parametrize("kind", KINDS)
def test_no_worse_than_eager_autocast(kind: str) -> None:
    """By the quadratic mean over four draws: in one of a few rows, errors may cancel."""

    def eager_autocast(*args: Any, **settings: Any) -> ReCoLossOutput:
        with torch.autocast(DEVICE, torch.bfloat16):
            return reco_loss_torch(*args, **settings)

    found: dict[str, list[list[float]]] = {"ours": [], "theirs": []}
    for length in range(500, 504):
        problem = make_problem(kind, 8, length, 128, torch.float32, torch.bfloat16, DEVICE)
        expected = solve(problem)
        for name, implementation in (("ours", fused), ("theirs", eager_autocast)):
            found[name].append(list(vars(errors(run(implementation, problem), expected)).values()))
    ours, theirs = (np.sqrt(np.square(found[name]).mean(axis=0)) for name in ("ours", "theirs"))
    assert (ours <= np.maximum(theirs, 1e-6)).all(), (ours, theirs)


def test_the_mean_of_equal_rows_is_that_row() -> None:
    """Whatever was cut from the exponentials before the product: their weights add up to 1."""
    found = errors(run(fused, equal_rows()), solve(equal_rows()))
    assert max(found.grad_query, found.grad_query_mix) < 1e-5


def equal_rows() -> Problem:
    return make_problem("equal_rows", 5, 3, 64, *DTYPES["fp32 rows"], DEVICE)


def test_rows_too_short_to_normalise_count_as_zero() -> None:
    problem, zeroed = (make_problem("random", 5, 40, 64, device=DEVICE) for _ in range(2))
    for given, factor in ((problem, 1e-21), (zeroed, 0.0)):
        given.query[0] *= factor
        given.key[1] *= factor
    assert not run(fused, problem).grad_query[0].any()
    check(fused, problem, solve(zeroed))


def test_a_row_that_is_not_finite_shows_in_the_loss() -> None:
    problem = make_problem("random", 5, 40, 64, device=DEVICE)
    problem.query[0, 0] = float("inf")
    assert np.isnan(run(fused, problem).losses[0])


def test_the_same_bits_twice() -> None:
    problem = make_problem("random", 9, 500, 128, torch.bfloat16, torch.bfloat16, DEVICE)
    first, second = run(fused, problem), run(fused, problem)
    np.testing.assert_array_equal(first.losses, second.losses)
    np.testing.assert_array_equal(first.grad_query, second.grad_query)
    np.testing.assert_array_equal(first.grad_query_mix, second.grad_query_mix)


def test_backward_scales_and_launches_nothing_else() -> None:
    problem = make_problem("random", 5, 100, 64, device=DEVICE)
    leaves = [x.requires_grad_() for x in problem.tensors()[:2]]
    total = fused(*problem.tensors(), **problem.settings).total
    upstream = torch.ones_like(total)
    with Recorder() as recorder:
        torch.autograd.grad(total, leaves, upstream)
    assert recorder.seen == ["mul", "unbind"]


def test_the_banks_may_be_overwritten_before_backward() -> None:
    problem = make_problem("random", 5, 100, 64, device=DEVICE)
    expected = solve(problem)

    def overwriting(*args: Any, **settings: Any) -> ReCoLossOutput:
        output = fused(*args, **settings)
        problem.bank.fill_(float("nan"))
        problem.bank_weak.fill_(float("nan"))
        return output

    assert errors(run(overwriting, problem), expected).grad_query < 1e-5


def test_rows_and_banks_may_be_strided() -> None:
    problem = make_problem("random", 5, 100, 64, device=DEVICE)
    expected = solve(problem)
    problem.bank = torch.cat([problem.bank, problem.bank.new_full((100, 16), float("nan"))], dim=1)[:, :64]
    problem.bank_weak = problem.bank_weak.T.contiguous().T
    problem.key = problem.key.repeat(1, 2)[:, :64]
    problem.permutation = problem.permutation.to(torch.int32).repeat_interleave(2)[::2]
    problem.mix_ratio = problem.mix_ratio.repeat_interleave(2)[::2]  # type: ignore[union-attr]
    found = errors(run(fused, problem), expected)
    assert found.total < 1e-6
    assert found.grad_query < 1e-5


@pytest.mark.parametrize("impl", ["triton", "sdpa"])
def test_a_second_derivative_is_refused(impl: Any) -> None:
    problem = make_problem("random", 3, 20, 16, device=DEVICE)
    query = problem.query.requires_grad_()
    total = reco_loss(query, *problem.tensors()[1:], **problem.settings, impl=impl).total
    (grad,) = torch.autograd.grad(total, query, create_graph=True)
    with pytest.raises(RuntimeError, match=f'"{impl}" has no second derivative; expected "torch"'):
        torch.autograd.grad(grad.square().sum(), query)


def test_autocast_around_it_changes_nothing() -> None:
    problem = make_problem("random", 3, 20, 16, device=DEVICE)
    expected = run(fused, problem)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = run(fused, problem)
    np.testing.assert_array_equal(found.losses, expected.losses)
    np.testing.assert_array_equal(found.grad_query, expected.grad_query)


def test_a_term_that_is_off_needs_no_tensors() -> None:
    problem = make_problem("random", 5, 100, 64, device=DEVICE, global_weight=0, local_weight=0)
    query = problem.query.clone().requires_grad_()
    output = ReCoLoss(global_weight=0, local_weight=0, impl="triton")(
        query, None, problem.key, None, problem.bank, None, None, 1.0
    )
    output.total.backward()
    expected = solve(problem)
    np.testing.assert_allclose(float(output.total.detach()), expected.losses[0], rtol=1e-6)
    assert [float(x) for x in output[2:]] == [0, 0, 0]
    np.testing.assert_allclose(query.grad.cpu().numpy(), expected.grad_query, rtol=1e-4, atol=1e-6)  # type: ignore[union-attr]


def test_torch_compile_traces_the_whole_of_it() -> None:
    problem = make_problem("random", 5, 100, 64, torch.bfloat16, torch.bfloat16, DEVICE)
    backend = "inductor" if HAS_GPU else "aot_eager"

    @torch.compile(fullgraph=True, backend=backend)
    def compiled(*args: Any, **settings: Any) -> ReCoLossOutput:
        return reco_loss(*args, **settings, impl="triton")

    check(compiled, problem)


def test_the_operator_is_well_formed() -> None:
    """Schema, fake tensors, autograd registration and tracing, by PyTorch's own checker."""
    problem = make_problem("random", 5, 70, 32, device=DEVICE)
    query, query_mix = problem.query.requires_grad_(), problem.query_mix.requires_grad_()
    key, key_weak, bank, bank_weak, permutation, ratio = problem.tensors()[2:]
    settings = (0.2, 0.1, 0.04, 1.0, None, 2.0, None, True)
    torch.library.opcheck(
        relation_loss.relation_loss_op,
        (query, query_mix, key, key_weak, bank, bank_weak, permutation, 0.0, ratio, *settings),
    )
    torch.library.opcheck(
        relation_loss.relation_loss_op, (query, None, key, None, bank, None, None, 0.3, None, *settings)
    )


@on_gpu
def test_a_cuda_graph_replays_with_new_weights_and_new_rows() -> None:
    first, second = (make_problem("random", 64, length, device=DEVICE) for length in (4096, 4097))
    second.bank, second.bank_weak = second.bank[:4096], second.bank_weak[:4096]
    weight = torch.tensor(1.0, device=DEVICE)
    for problem in (first, second):
        problem.settings["global_weight"] = weight
    static = [x.clone() for x in first.tensors()]
    leaves = [x.requires_grad_() for x in static[:2]]

    def step() -> tuple[torch.Tensor, ...]:
        total = fused(*static, **first.settings).total
        return total, *torch.autograd.grad(total, leaves)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for place, value in zip(static, second.tensors(), strict=True):
            place.copy_(value)
        weight.fill_(0.25)
    graph.replay()
    expected = solve(second)
    found = Result(expected.losses.copy(), *(x.double().cpu().numpy() for x in captured[1:]))
    found.losses[0] = float(captured[0])
    assert errors(found, expected).total < 1e-6
    assert errors(found, expected).grad_query < 1e-5


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_beyond_inputs_and_outputs(dtype: torch.dtype) -> None:
    problem = make_problem("random", 1024, 65536, 128, dtype, dtype, DEVICE)
    arguments = [x.requires_grad_() for x in problem.tensors()[:2]] + list(problem.tensors()[2:])
    fused(*arguments, **problem.settings).total.backward()  # compiles
    outputs = sum(x.nbytes for x in arguments[:2])
    for x in arguments[:2]:
        x.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    fused(*arguments, **problem.settings).total.backward()
    assert torch.cuda.max_memory_allocated() - before - outputs < 16 * 2**20


@on_gpu
def test_a_million_negatives() -> None:
    problem = make_problem("random", 64, 1_048_576, 128, torch.bfloat16, torch.bfloat16, DEVICE)
    check(fused, problem)


@pytest.fixture
def _one_split(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every bank as one split, as it is with many rows."""
    monkeypatch.setattr(launch, "MOST_SPLITS", 2)  # one is kept for a tail
    launch.plan.cache_clear()
    yield
    launch.plan.cache_clear()


def long_split() -> Problem:
    return make_problem("clustered", 2, 16384, 64, *DTYPES["fp32"], DEVICE, global_weight=0, local_weight=0)


@pytest.mark.usefixtures("_one_split")
def test_float32_holds_over_a_long_split() -> None:
    """Tensor cores cut their sums, and a split has as many as bank tiles."""
    assert launch.plan(2, 16384, 64, 1, torch.float32, torch.device(DEVICE)).splits == 1
    check(fused, long_split())


# Each mutation of the source makes `check` fail on this problem, and unmutated it passes.
def mutation_problem(mutation: str = "") -> Problem:
    """Several splits and a tail, in bfloat16 since its bounds are the wide ones; the last bank row matters."""
    if mutation == LONG:
        return long_split()
    if mutation == "sum of what was cut not used":
        return equal_rows()
    problem = make_problem("clustered", 5, 200, 64, *DTYPES["fp32" if "TF32" in mutation else "bf16"], DEVICE)
    for bank in (problem.bank, problem.bank_weak):
        bank[-1] = torch.nn.functional.normalize(problem.query[0].float(), dim=0)
    return problem


def mutant(mutation: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`relation_loss.py` and its kernels with the mutation, as modules and an operator of their own."""
    name = f"mutant_{list(MUTATIONS).index(mutation) if mutation else 'none'}"
    sources = [(ROOT / "kernels" / file).read_text(encoding="utf-8") for file in SOURCES]
    changed = [mutated(source, mutation) if mutation else source for source in sources]
    assert not mutation or sum(x != y for x, y in zip(sources, changed, strict=True)) == 1, "no longer applies"
    kernels, host = changed
    host = host.replace("reco_fast::relation_loss", f"reco_fast_test::{name}")
    here = "import launch, relation_kernels\n"
    assert here in host
    host = host.replace(here, f"import launch\nimport {name}_kernels as relation_kernels\n")
    (folder / f"{name}_kernels.py").write_text(kernels, encoding="utf-8")
    (folder / f"{name}.py").write_text(host, encoding="utf-8")
    monkeypatch.syspath_prepend(folder)
    return importlib.import_module(name)


@pytest.mark.parametrize("dtype", ["bf16", "TF32"])
def test_the_mutations_start_from_a_kernel_that_passes(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = mutation_problem(dtype)
    check(mutant("", tmp_path, monkeypatch).reco_loss_triton, problem)
    plan = launch.plan(5, 200, 64, 4, problem.bank.dtype, problem.bank.device)
    assert plan.splits > 2
    assert len(plan.parts) == 2


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutated_kernel_fails(mutation: str, tmp_path: Path, request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if mutation == LONG:
        request.getfixturevalue("_one_split")
    implementation = mutant(mutation, tmp_path, monkeypatch).reco_loss_triton
    with pytest.raises(AssertionError):
        check(implementation, mutation_problem(mutation))


def test_every_mutation_is_listed_with_the_test_that_caught_it() -> None:
    documentation = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| (.+?) \| `(test_\w+)(?:\[.*\])?` \|$", documentation, flags=re.MULTILINE))
    assert set(MUTATIONS) == set(listed)
    assert all(callable(globals().get(test)) for test in listed.values())
