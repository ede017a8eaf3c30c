"""The fused kernel's errors against float64 over the whole grid of sizes, and eager autocast's beside them.

    TRITON_INTERPRET=1 python tests/accuracy.py --output errors.jsonl     # without a GPU: about an hour of one core
    python tests/accuracy.py --output errors.jsonl                        # on a GPU

Each result is a line of the output; a second start goes on from there. Prints the worst of each kind of input as a
Markdown table, and exits with 1 if a bound of the project is broken. In the interpreter the plan is that of an H100,
with tiles enlarged where the real ones would take hours.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from float64_reference import KINDS, errors, make_problem, run, solve

from reco_fast.kernels import launch, relation_loss
from reco_fast.kernels.reference import ReCoLossOutput, reco_loss_torch

ROWS, LENGTHS = (1, 37, 129, 255, 1024), (1, 65, 1000, 2999, 65536)
# Of loss and gradients, relative, by the banks' dtype.
BOUNDS = {"float32": (1e-6, 1e-5), "bfloat16": (2e-3, 5e-3)}
SAME = 1e-6  # an error below float32's own rounding is not worse than another such
MEASURES = ("total", "grad_query", "grad_query_mix")


class Case(NamedTuple):
    kind: str
    rows: int
    length: int
    dtype: str  # of the banks; the rows are float32, so that the returned gradients are not rounded


def cases(kinds: list[str], rows: list[int], lengths: list[int]) -> Iterator[Case]:
    """The cheap ones first, and each size with every kind."""
    sizes = [(count, length) for count in rows for length in lengths]
    for count, length in sorted(sizes, key=lambda size: size[0] * (2000 + size[1])):
        for kind in kinds:
            for dtype in BOUNDS:
                yield Case(kind, count, length, dtype)


def measure(case: Case, device: str) -> dict[str, Any]:
    if device == "cpu":
        _plan_as_on_an_h100(case)
    dtype = getattr(torch, case.dtype)
    problem = make_problem(case.kind, case.rows, case.length, 128, torch.float32, dtype, device)
    expected = solve(problem)
    implementations: dict[str, Any] = {"triton": relation_loss.reco_loss_triton}
    if dtype == torch.bfloat16:
        implementations["autocast"] = eager_autocast
    result: dict[str, Any] = {**case._asdict(), "device": device, "torch": torch.__version__}
    for name, function in implementations.items():
        found = run(function, problem)
        result[name] = vars(errors(found, expected))
    result["vanishing"] = [x for x in MEASURES[1:] if np.linalg.norm(getattr(expected, x)) < 1e-6]
    return result


def eager_autocast(*arguments: Any, **settings: Any) -> ReCoLossOutput:
    with torch.autocast(arguments[0].device.type, torch.bfloat16):
        return reco_loss_torch(*arguments, **settings)


def _plan_as_on_an_h100(case: Case) -> None:
    """The interpreter needs milliseconds for each turn of a loop, however large its tile."""
    launch.architecture = lambda device: "sm_90"
    launch.multiprocessors = lambda device: 132
    tile = launch.TILES["sm_90"][case.dtype, 128][case.rows > 64]
    if case.rows * case.length > 400 * tile.rows * tile.bank_rows:
        tile = launch.Tile(256, 256 if case.length < 4096 else 1024, tile.warps, tile.stages, tile.programs)
    launch.TILES["sm_90"] = {**launch.TILES["sm_90"], (case.dtype, 128): (tile, tile)}
    launch.plan.cache_clear()


def broken(result: dict[str, Any]) -> list[str]:
    loss, grad = BOUNDS[result["dtype"]]
    bounds = dict(zip(MEASURES, (loss, grad, grad), strict=True))
    return [
        name
        for name, bound in bounds.items()
        if not result["triton"][name] < bound and name not in result["vanishing"]  # an error relative to nothing
    ]


def worse(result: dict[str, Any]) -> list[str]:
    """By what the kernel is further from float64 than eager autocast."""
    theirs = result.get("autocast")
    return [name for name in MEASURES if theirs and result["triton"][name] > max(theirs[name], SAME)]


def table(results: list[dict[str, Any]]) -> str:
    """The largest errors over the sizes, by kind of input and dtype of the banks; none relative to a gradient of 0."""
    lines = [
        "| inputs | banks | sizes | total | grad query | grad query_mix | autocast's total | grad query "
        "| grad query_mix | worse than autocast |",
        "|" + 10 * " --- |",
    ]
    for kind in dict.fromkeys(x["kind"] for x in results):
        for dtype in BOUNDS:
            group = [x for x in results if (x["kind"], x["dtype"]) == (kind, dtype)]
            cells = [kind, dtype, str(len(group))]
            for name in ("triton", "autocast"):
                for measure_ in MEASURES:
                    values = [x[name][measure_] for x in group if name in x and measure_ not in x["vanishing"]]
                    cells.append(f"{max(values):.1e}" if values else "")
            cells.append(str(sum(bool(worse(x)) for x in group)) if dtype == "bfloat16" else "")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def quick_interpreter() -> None:
    """Triton's interpreter prepares `triton.language` anew in each call of an inner function, which takes longer than
    the call. Once for each module is enough."""
    from triton.runtime import interpreter

    prepared: set[int] = set()

    def call(self: Any, *arguments: Any, **keywords: Any) -> Any:
        module = id(self.fn.__globals__)
        if module not in prepared:
            interpreter._patch_lang(self.fn)
            prepared.add(module)
        return self.rewrite()(*arguments, **keywords)

    interpreter.InterpretedFunction.__call__ = call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS)
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        quick_interpreter()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.touch()
    results = [json.loads(line) for line in arguments.output.read_text().splitlines()]
    done = {Case(*(x[name] for name in Case._fields)) for x in results}
    with arguments.output.open("a") as file:
        for case in cases(arguments.kinds, arguments.rows, arguments.lengths):
            if case in done:
                continue
            result = measure(case, device)
            results.append(result)
            print(json.dumps(result), file=file, flush=True)
            print(*case, result["triton"], *broken(result), flush=True)
    print(table(results))
    for result in results:
        if broken(result):
            print("beyond the bound:", json.dumps(result))
        elif worse(result):
            print("worse than autocast:", json.dumps(result))
    sys.exit(any(broken(x) for x in results))


if __name__ == "__main__":
    main()
