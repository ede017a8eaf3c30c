"""Faults put into the kernels on purpose, and which test of `test_relation_loss.py` sees each first.

    TRITON_INTERPRET=1 python tests/mutations.py      # the table in docs/kernels.md; about five minutes

`test_a_mutated_kernel_fails` holds the comparison with float64 against each of them in every run of the suite.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = ("relation_kernels.py", "relation_loss.py")  # of kernels/

# Name: what stands in one of the sources, and what stands there instead.
MUTATIONS = {
    "gradient of query zeroed": ("grads + here, grad,", "grads + here, grad * 0,"),
    "gradient of query_mix zeroed": ("D + column, grad,", "D + column, grad * 0,"),
    "gradient not sent through the normalisation": ("grad - tl.sum(grad * q, axis=0) * q)", "grad)"),
    "global term dropped from the loss": ("loss += _number(global_weight) * global_relation", "loss += 0"),
    "global term dropped from the gradient": ("grad += (mean_s - mean_t)", "grad += 0 * (mean_s - mean_t)"),
    "local term dropped from the loss": ("loss += _number(local_weight) * local_relation", "loss += 0"),
    "teacher at the student's temperature": ("scale = teacher_scale", "scale = student_scale"),
    "instance term at the student's temperature": ("LOG2_E / temperature,", "LOG2_E / student_temperature,"),
    "entropy at the wrong temperature": ("mean_t, axis=0) * inverse_teacher", "mean_t, axis=0) * inverse_student"),
    "one split lost": ("mask=split < splits, other=-", "mask=split < splits - 1, other=-"),
    "last bank row ignored": ("tl.minimum(K - start, split_length)", "tl.minimum(K - start, split_length) - 1"),
    "last row of the batch ignored": ("row_valid = first_row + row < N", "row_valid = first_row + row < N - 1"),
    "permutation ignored": ("tl.load(permutation + row)", "row"),
    "mix ratio of the first row for all": ("mix_ratio + row * mix_ratio_stride", "mix_ratio + row * 0"),
    "anchor swapped": ("(q if ANCHOR_IS_QUERY else k)", "(k if ANCHOR_IS_QUERY else q)"),
    "sum of what was cut not used": ("total if DTYPE == tl.float32 else weight", "total"),
    "upstream gradient ignored": ("(grads * grad_total)", "grads"),
    "mean over the batch taken as a sum": ("(q_inverse / N)", "q_inverse"),
    "means never taken": ("== N - 1", "== N"),
    "first TF32 product of three dropped": ("_dot(a_low, b_high,", "_dot(a_low * 0, b_high,"),
    "second TF32 product of three dropped": ("_dot(a_high, b_low,", "_dot(a_high, b_low * 0,"),
    "TF32 sum of a split left in the tensor cores": (
        "mean += _dot_tf32x3(p_high, p_low, tile_high, tile_low, BLOCK_N, BLOCK_D, EMULATE)",
        "mean = _dot(p_high, tile_high, _dot(p_high, tile_low, _dot(p_low, tile_high, mean, EMULATE), EMULATE),"
        " EMULATE)",
    ),
}  # fmt: skip


def mutated(source: str, mutation: str) -> str:
    old, new = MUTATIONS[mutation]
    return source.replace(old, new)


def caught_by(mutation: str) -> str:
    """The first test to fail on a copy of the tree with the mutation."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("reco_fast", "kernels", "pipelines", "profiling", "tests"):
            shutil.copytree(ROOT / name, Path(folder) / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("setup.py", "pyproject.toml"):
            shutil.copy(ROOT / name, folder)
        changed = 0
        for path in (Path(folder) / "kernels" / name for name in SOURCES):
            source = path.read_text(encoding="utf-8")
            changed += mutated(source, mutation) != source
            path.write_text(mutated(source, mutation), encoding="utf-8")
        assert changed == 1, f"the mutation no longer applies: {mutation}"
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-k", "not mutat"]
        done = subprocess.run(
            [*command, "tests/kernels/test_relation_loss.py"],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": folder},
            capture_output=True,
            text=True,
        )
        found = re.search(
            r"^FAILED tests/kernels/test_relation_loss.py::(.+?)(?: - |$)", done.stdout, flags=re.MULTILINE
        )
        return f"`{found[1]}`" if found else f"nothing: {done.stdout[-300:]}"


if __name__ == "__main__":
    print("| mutation | first caught by |\n| --- | --- |")
    for each in MUTATIONS:
        print(f"| {each} | {caught_by(each)} |", flush=True)
