"""Compile every launch configuration for every architecture, without a GPU, and say what became of it.

    python -m reco_fast.kernels.compile_matrix [--architecture sm_90 ...] [--json]

Registers, stack (spills go there) and machine code are read from the cubin, by the tools that come with Triton.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from reco_fast.kernels import launch, relation_kernels, relation_loss

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Most shared memory of one program. The sm_80 tiles also run on 8.6, 8.9 and 12.0, whose limit is 99 KiB.
SHARED_LIMIT = {"sm_80": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
TENSOR_INSTRUCTION = {"sm_80": r"HMMA", "sm_90": r"HGMMA|HMMA", "sm_100": r"UTC\w*MMA|HMMA", "gfx942": r"v_mfma"}
TRITON_DTYPE = {"bfloat16": "bf16", "float32": "fp32"}


@dataclass
class Compiled:
    architecture: str
    kernel: str
    configuration: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    tensor_instructions: dict[str, int]
    instructions: int
    warps: int
    dots: int  # `tl.dot` in the source as Triton reads it
    tf32_instructions: int  # of NVIDIA's virtual machine code
    programs: int = 0  # that the launch table counts on, a multiprocessor; 0 where it does not matter


def matrix(architecture: str) -> Iterator[Compiled]:
    """The attention kernel in each of its tiles, at its lightest and at its heaviest (the tail's mask, the running
    maximum), then the rest in the largest form."""
    for (dtype, block_d), tiles in launch.TILES[architecture].items():
        for tile in sorted(set(tiles)):
            for online, masked in ((False, False), (True, True)):
                compiled = attend(architecture, dtype, block_d, tile, online, masked)
                yield replace(compiled, programs=tile.programs)
    widest = {"D": launch.WIDEST, "BLOCK_D": launch.WIDEST}
    yield _compile(
        architecture,
        relation_kernels.unit_kernel,
        {"N": "i32", "unit_rows": "*bf16", "done": "*i32"},
        {**widest, "BLOCK_N": 16, "DTYPE": triton.language.bfloat16, "EMULATE": False},
        "D 256",
    )
    for kind in ("*fp32", "fp32"):  # a tensor or a number
        scalars = dict.fromkeys(("mix_ratio", "global_weight", "local_weight"), kind)
        name = "tensor weights" if kind == "*fp32" else "number weights"
        yield _compile(
            architecture,
            relation_kernels.combine_kernel,
            {
                **dict.fromkeys(("N", "splits", "mix_ratio_stride"), "i32"),
                **dict.fromkeys((f"inverse_{x}temperature" for x in ("", "student_", "teacher_")), "fp32"),
                **{"permutation": "*i64", "unit_rows": "*bf16", "partial_mean": "*fp16", "done": "*i32"},
                **scalars,
            },
            {**widest, "BLOCK_S": launch.MOST_SPLITS, "GLOBAL": True, "LOCAL": True, "ANCHOR_IS_QUERY": True},
            f"D 256, 64 splits, {name}",
            warps=relation_loss.COMBINE_WARPS,
        )


def attend(architecture: str, dtype: str, block_d: int, tile: launch.Tile, online: bool, masked: bool) -> Compiled:
    element = TRITON_DTYPE[dtype]
    signature = {
        **dict.fromkeys(("N", "K", "split_length", "first_split", "splits"), "i32"),
        **dict.fromkeys(("scale", "student_scale", "teacher_scale"), "fp32"),
        **dict.fromkeys(("unit_rows", "bank", "bank_weak"), f"*{element}"),
        "partial_mean": "*fp16" if element == "bf16" else "*fp32",
    }
    constants = {
        **{"BANK_STRIDE": block_d, "BANK_WEAK_STRIDE": block_d, "D": block_d, "BLOCK_D": block_d},
        **{"BLOCK_N": tile.rows, "BLOCK_K": tile.bank_rows},
        **{"LOCAL": True, "MASKED": masked, "ONLINE": online, "EMULATE": False},
    }
    name = f"{dtype} D {block_d}, {tile.rows}×{tile.bank_rows}, {tile.warps} warps, {tile.stages} stages"
    name += f", {'online' if online else 'fixed'} maximum{', tail' if masked else ''}"
    return _compile(architecture, relation_kernels.attend_kernel, signature, constants, name, tile.warps, tile.stages)


def _compile(
    architecture: str,
    kernel: Any,
    signature: dict[str, str],
    constants: dict[str, Any],
    configuration: str,
    warps: int = 4,
    stages: int = 3,
) -> Compiled:
    """`signature` gives the types that are not `*fp32`. Pointers and row counts are taken as divisible by 16."""
    types = {x: "constexpr" if x in constants else signature.get(x, "*fp32") for x in kernel.arg_names}
    aligned = [i for i, x in enumerate(types.values()) if x.startswith("*")]
    source = ASTSource(kernel, types, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=TARGETS[architecture], options=options)
    if architecture.startswith("gfx"):
        code = compiled.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s*(\d+)", code)[1])  # type: ignore[index]
        stack = int(re.search(r"\.private_segment_fixed_size:\s*(\d+)", code)[1])  # type: ignore[index]
        count = len(re.findall(r"^\t[sv]_\w+|^\tds_\w+|^\tglobal_\w+|^\tbuffer_\w+", code, flags=re.MULTILINE))
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            usage, code = (_cuobjdump(option, file.name) for option in ("-res-usage", "-sass"))
        registers = int(re.search(r"REG:(\d+)", usage)[1])  # type: ignore[index]
        stack = int(re.search(r"STACK:(\d+)", usage)[1])  # type: ignore[index]
        count = len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s", code, flags=re.MULTILINE))
    found = re.findall(TENSOR_INSTRUCTION[architecture], code)
    return Compiled(
        architecture,
        kernel.__name__,
        configuration,
        registers,
        stack,
        compiled.metadata.shared,
        {name: found.count(name) for name in sorted(set(found))},
        count,
        warps,
        len(re.findall(r"= tt\.dot ", compiled.asm["ttir"])),
        len(re.findall(r"mma\S*\.(?:f32\.)?(?:kind::)?tf32", compiled.asm.get("ptx", ""))),
    )


def _cuobjdump(option: str, path: str) -> str:
    tool = triton.knobs.nvidia.cuobjdump.path
    done = subprocess.run([tool, option, path], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of a Markdown table")
    arguments = parser.parse_args()
    if not arguments.json:
        print(f"Triton {triton.__version__}\n")
        print("| architecture | kernel | configuration | registers | stack | shared memory | tensor instructions |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
    for architecture in arguments.architecture:
        for row in matrix(architecture):
            if arguments.json:
                print(json.dumps(asdict(row)), flush=True)
                continue
            tensor = ", ".join(f"{count} {name}" for name, count in row.tensor_instructions.items()) or "none needed"
            cells = [architecture, row.kernel, row.configuration, row.registers, row.stack_bytes]
            print("|", *(f"{x} |" for x in (*cells, f"{row.shared_bytes / 1024:.1f} KiB", tensor)), flush=True)


if __name__ == "__main__":
    main()
