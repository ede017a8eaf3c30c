"""Gluon versions of `attend_kernel` against the repository's, on one Hopper GPU: results, races, and times.

    cd REPOSITORY && python /path/to/bench_gluon.py --output result.json [--seconds 40] [--variants NAME ...]

Each variant has a process of its own. They import and compile side by side; then one after the other has the GPU, for
at most 25 s each: a hang or a fault of one costs the others nothing. `result.json` is written anew after each.
`--dry`: all that needs no GPU (compiling for sm_90, arguments, reference, combination).
"""

import argparse
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [os.getcwd(), str(HERE)]
SHAPES = [(256, 65536), (37, 4096), (1024, 65536)]
TEMPERATURES = (0.2, 0.1, 0.04)
NAMES = ("specialised", "ahead128", "ahead64", "specialisedheld", "late128", "late128held", "sync64")
LIMIT = 10.0  # seconds of the GPU for one variant, which needs about three
D = 128


# ---------------------------------------------------------------- one variant


def problem(n, k, device, dtype=None):
    """Unit rows and banks; a third of the rows lie close to a bank row, so that their softmax is peaked."""
    import torch

    generator = torch.Generator(device).manual_seed(n + k)

    def unit(*shape):
        x = torch.randn(*shape, D, device=device, generator=generator)
        return torch.nn.functional.normalize(x, dim=-1)

    bank, bank_weak = unit(2, k)
    rows = unit(3, n)
    near = torch.randint(k, (3, n), device=device, generator=generator)
    close = torch.nn.functional.normalize(bank[near] + bank_weak[near] + 0.5 * rows, dim=-1)
    pick = (torch.arange(n, device=device) % 3 == 0)[None, :, None]
    rows = torch.where(pick, close, rows)
    # One piece of memory for both banks: the copies' descriptor spans them.
    both = torch.stack((bank, bank_weak)).to(torch.bfloat16)
    return rows.to(torch.bfloat16).contiguous(), both[0], both[1]


def row_sets(rows, bank, bank_weak):
    """(rows, bank, temperature) of q|A, m|A, q|B, v|B."""
    tau, tau_s, tau_t = TEMPERATURES
    return [(rows[0], bank, tau), (rows[1], bank, tau), (rows[0], bank_weak, tau_s), (rows[2], bank_weak, tau_t)]


def reference(rows, bank, bank_weak):
    """O [4, N, D] and lse [4, N] (base 2) in float64."""
    import torch

    means, lses = [], []
    for x, b, tau in row_sets(rows, bank, bank_weak):
        x = x.double()
        total = x.new_zeros(len(x))
        mean = x.new_zeros(len(x), D)
        for chunk in b.split(8192):
            chunk = chunk.double()
            p = ((x @ chunk.T - 1) / tau).exp()
            total += p.sum(1)
            mean += p @ chunk
        means.append(mean / total[:, None])
        lses.append((1 / tau + total.log()) / math.log(2))
    return torch.stack(means), torch.stack(lses)


def combine(partial_mean, partial_lse):
    lse = partial_lse.double()
    peak = lse.amax(-1, keepdim=True)
    share = (lse - peak).exp2()
    total = share.sum(-1, keepdim=True)
    mean = (partial_mean.double() * (share / total)[..., None]).sum(-2)
    return mean, (peak + total.log2())[..., 0]


class Outputs:
    """Partial results with a guard behind each."""

    GUARD = 4096

    def __init__(self, n, splits, device):
        import torch

        self.flat_mean = torch.empty(4 * n * splits * D + self.GUARD, dtype=torch.float16, device=device)
        self.flat_lse = torch.empty(4 * n * splits + self.GUARD, device=device)
        self.mean = self.flat_mean[: -self.GUARD].view(4, n, splits, D)
        self.lse = self.flat_lse[: -self.GUARD].view(4, n, splits)

    def poison(self):
        for x in (self.flat_mean, self.flat_lse):
            x.fill_(math.nan)
            x[-self.GUARD :] = 7.0

    def guards_hold(self):
        return all(bool((x[-self.GUARD :] == 7.0).all()) for x in (self.flat_mean, self.flat_lse))


class Plain:
    name = "attend_kernel"

    def __init__(self, n, k, rows, bank, bank_weak, device, multiprocessors):
        import torch

        from reco_fast.kernels import launch, relation_kernels

        if device.type == "cpu":  # --dry
            launch.architecture = lambda device: "sm_90"
            launch.multiprocessors = lambda device: multiprocessors
        self.plan = launch.plan(n, k, D, 4, torch.bfloat16, device)
        assert len(self.plan.parts) == 1
        self.part = self.plan.parts[0]
        self.kernel, self.splits = relation_kernels.attend_kernel, self.plan.splits
        self.inputs = (rows, bank, bank_weak)
        self.n = n
        self.out = Outputs(n, self.splits, device)

    def launch(self, warmup=False):
        p, part = self.plan, self.part
        scales = [math.log2(math.e) / x for x in TEMPERATURES]
        arguments = (*self.inputs, self.out.mean, self.out.lse, self.n, part.length, part.split_length,
                     part.first_split, p.splits, *scales)  # fmt: skip
        options = {
            **{"BANK_STRIDE": D, "BANK_WEAK_STRIDE": D, "D": D, "BLOCK_D": p.block_d, "BLOCK_N": p.tile.rows},
            **{"BLOCK_K": p.tile.bank_rows, "LOCAL": True, "MASKED": part.masked, "ONLINE": False, "EMULATE": False},
            **{"num_warps": p.tile.warps, "num_stages": p.tile.stages, "enable_fp_fusion": True},
        }
        grid = (p.row_tiles, 4, part.splits)
        return self.kernel.warmup(*arguments, grid=grid, **options) if warmup else self.kernel[grid](
            *arguments, **options)  # fmt: skip


class Gluon:
    def __init__(self, name, n, k, rows, bank, bank_weak, device, multiprocessors):
        import attend_gluon

        self.name, self.module = name, attend_gluon
        self.variant = attend_gluon.VARIANTS[name]
        self.plan = attend_gluon.plan(n, k, 4, self.variant, multiprocessors)
        self.splits = self.plan.splits
        self.inputs = (rows, bank, bank_weak)
        self.out = Outputs(n, self.splits, device)

    def launch(self, warmup=False):
        scales = [math.log2(math.e) / x for x in TEMPERATURES]
        return self.module.attend(*self.inputs, self.out.mean, self.out.lse, self.plan, scales, self.variant,
                                  warmup=warmup)  # fmt: skip


def check(kernel, ref_mean, ref_lse, repeats=20):
    import torch

    first, equal, guards = None, True, True
    for _ in range(1 + repeats):
        kernel.out.poison()
        kernel.launch()
        torch.cuda.synchronize()
        guards &= kernel.out.guards_hold()
        here = (kernel.out.mean.clone(), kernel.out.lse.clone())
        if first is None:
            first = here
        equal &= all(bool((a.view(torch.int16) == b.view(torch.int16)).all()) for a, b in zip(first, here, strict=True))
    mean, lse = combine(*first)
    return {
        "O_relative_error": float((mean - ref_mean).norm() / ref_mean.norm()),
        "O_relative_error_by_set": [float((a - b).norm() / b.norm()) for a, b in zip(mean, ref_mean, strict=True)],
        "lse_relative_error": float((lse - ref_lse).norm() / ref_lse.norm()),
        "lse_largest_error": float((lse - ref_lse).abs().max()),
        "not_finite": int((~first[0].isfinite()).sum() + (~first[1].isfinite()).sum()),
        "runs_equal": equal,
        "guards_hold": guards,
        "splits": kernel.splits,
    }


def captured(kernel, times=1):
    import torch

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            kernel.launch()
    return graph


def elapsed(action, before=None):
    """An event pair around the action, recorded; read it after a synchronisation."""
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if before is not None:
        before()
    start.record()
    action()
    end.record()
    return start, end


def clock(kernels, rounds=30):
    """Microseconds of each: one launch after the L2 cache was flushed, and one of 20 launches back to back."""
    import torch

    flush = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")
    single = {x.name: captured(x) for x in kernels}
    many = {x.name: captured(x, 20) for x in kernels}
    for graph in (*single.values(), *many.values()):
        graph.replay()
    events = {x.name: [] for x in kernels}
    for turn in range(rounds):
        for x in kernels if turn % 2 == 0 else reversed(kernels):
            events[x.name].append(elapsed(single[x.name].replay, flush.zero_))
    row = {x.name: [] for x in kernels}
    for turn in range(12):
        for x in kernels if turn % 2 == 0 else reversed(kernels):
            row[x.name].append(elapsed(many[x.name].replay))
    torch.cuda.synchronize()
    result = {}
    for x in kernels:
        flushed = sorted(1e3 * a.elapsed_time(b) for a, b in events[x.name])
        steady = [1e3 * a.elapsed_time(b) / 20 for a, b in row[x.name]]
        result[x.name] = {
            "us": statistics.median(flushed),
            "us_quartiles": [flushed[len(flushed) // 4], flushed[3 * len(flushed) // 4]],
            "us_least": flushed[0],
            "us_back_to_back": statistics.median(steady),
        }
    return result


def matmul_rate():
    import torch

    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    for _ in range(10):
        torch.mm(a, b, out=out)
    pairs = [elapsed(lambda: torch.mm(a, b, out=out)) for _ in range(20)]
    torch.cuda.synchronize()
    return 2 * 8192**3 / (statistics.median(x.elapsed_time(y) for x, y in pairs) * 1e-3) / 1e12


def compiled(kernel):
    """What the driver says of a loaded kernel, if this Triton tells."""
    told = {"shared": kernel.metadata.shared, "warps": kernel.metadata.num_warps}
    for name in ("n_regs", "n_spills"):
        told[name] = getattr(kernel, name, None)
    return told


def worker(name, folder, dry):
    import torch
    import triton

    result = {"variant": name, "stage": "importing", "torch": torch.__version__, "triton": triton.__version__}

    def write(stage):
        result["stage"], result["seconds"] = stage, round(time.time() - began, 2)
        temporary = folder / f"{name}.tmp"
        temporary.write_text(json.dumps(result))
        temporary.replace(folder / f"{name}.json")

    began = time.time()
    try:
        device = torch.device("cpu" if dry else "cuda:0")
        if dry:
            from triton.backends.compiler import GPUTarget
            from triton.runtime import driver

            class Offline:
                def get_current_target(self):
                    return GPUTarget("cuda", 90, 32)

                def get_current_device(self):
                    return 0

                def get_current_stream(self, device):
                    return 0

            driver.set_active(Offline())
            multiprocessors = 132
        else:
            properties = torch.cuda.get_device_properties(device)
            multiprocessors = properties.multi_processor_count
            result |= {"device": properties.name, "multiprocessors": multiprocessors}
        write("compiling")
        both = []
        for n, k in SHAPES:
            if dry:  # memory that no one reads, the banks whole rows apart as from PyTorch's allocator for GPUs
                bank, bank_weak = torch.empty(2, k, D, dtype=torch.bfloat16)
                rows = torch.empty(3, n, D, dtype=torch.bfloat16)
            else:
                rows, bank, bank_weak = problem(n, k, device)
            both.append((Plain(n, k, rows, bank, bank_weak, device, multiprocessors),
                         Gluon(name, n, k, rows, bank, bank_weak, device, multiprocessors)))  # fmt: skip
            told = [x.launch(warmup=True) for x in both[-1]]
            loaded = {x.name: y for x, y in zip(both[-1], told, strict=True)}
        result["compiled"] = {name: compiled(x) for name, x in loaded.items()}
        if dry:
            emulate(result)
            write("done")
            return
        torch.cuda.synchronize()
        write("ready")
        while not (folder / f"{name}.go").exists():
            time.sleep(0.02)
        began = time.time()
        write("checking")
        result["checks"] = {}
        good = True
        for (n, k), kernels in zip(SHAPES, both, strict=True):
            ref = reference(*kernels[0].inputs)
            here = {x.name: check(x, *ref) for x in kernels}
            plain, gluon = here["attend_kernel"], here[name]
            gluon["good"] = (
                gluon["not_finite"] == 0
                and gluon["runs_equal"]
                and gluon["guards_hold"]
                and gluon["O_relative_error"] < 1.5 * plain["O_relative_error"] + 1e-5
                and gluon["lse_largest_error"] < 1.5 * plain["lse_largest_error"] + 1e-5
            )
            good &= gluon["good"]
            result["checks"][f"{n}, {k}"] = here
            write("checking")
        result["good"] = good
        result["compiled"] = {name: compiled(x) for name, x in loaded.items()}
        result["matmul_tflops"] = matmul_rate()
        result["times"] = {}
        for (n, k), kernels in zip(SHAPES, both, strict=True):
            if k != 65536:
                continue
            times = clock(kernels)
            flops = 4 * n * k * D * 4
            for x in times.values():
                x["tflops"] = flops / x["us"] / 1e6
                x["tflops_back_to_back"] = flops / x["us_back_to_back"] / 1e6
            times["speedup"] = times["attend_kernel"]["us"] / times[name]["us"]
            result["times"][f"{n}, {k}"] = times
            write("timing")
        result["matmul_tflops_after"] = matmul_rate()
        write("done")
    except BaseException:
        result["error"] = traceback.format_exc()[-3000:]
        write("failed in " + result["stage"])
        raise


def emulate(result):
    """`--dry`: partial results as the kernels should write them, in float32 on the CPU, through `combine`."""
    import torch

    n, k = 5, 512
    rows, bank, bank_weak = problem(n, k, "cpu")
    means, lses = [], []
    for x, b, tau in row_sets(rows, bank, bank_weak):
        scale = math.log2(math.e) / tau
        parts = []
        for chunk in b.split(128):
            p = torch.exp2(x.float() @ chunk.float().T * scale - scale)
            cut = (p.view(torch.int32) & -65536).view(torch.float32)
            mean = (cut @ chunk.float()) / cut.sum(1, keepdim=True)
            parts.append((mean.half(), scale + p.sum(1).log2()))
        means.append(torch.stack([a for a, _ in parts], 1))
        lses.append(torch.stack([a for _, a in parts], 1))
    mean, lse = combine(torch.stack(means), torch.stack(lses))
    ref_mean, ref_lse = reference(rows, bank, bank_weak)
    result["emulated"] = {
        "O_relative_error": float((mean - ref_mean).norm() / ref_mean.norm()),
        "lse_largest_error": float((lse - ref_lse).abs().max()),
    }
    assert result["emulated"]["O_relative_error"] < 2e-3 and result["emulated"]["lse_largest_error"] < 1e-4, result


# ---------------------------------------------------------------- all variants


def kill(process):
    if process.poll() is None:
        try:
            os.killpg(process.pid, signal.SIGKILL)  # its own session: itself and the compilers it started
        except ProcessLookupError:
            pass


def stage(folder, name):
    try:
        return json.loads((folder / f"{name}.json").read_text())
    except FileNotFoundError:
        return {"variant": name, "stage": "starting"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=40.0, help="of all variants together")
    parser.add_argument("--variants", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--dry", action="store_true", help="what needs no GPU")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker, arguments.folder, arguments.dry)
        return

    began = time.time()
    folder = Path(tempfile.mkdtemp(prefix="gluon_"))
    output = {"seconds": arguments.seconds, "variants": {}}

    def note(name, **more):
        output["variants"][name] = stage(folder, name) | more
        output["elapsed"] = round(time.time() - began, 2)
        arguments.output.write_text(json.dumps(output, indent=1))

    def start(name):
        command = [sys.executable, __file__, "--worker", name, "--folder", str(folder), "--output", "unused"]
        command += ["--dry"] if arguments.dry else []
        with (folder / f"{name}.log").open("w") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def log(name):
        return (folder / f"{name}.log").read_text()[-2000:]

    def left():
        return arguments.seconds - (time.time() - began)

    if arguments.dry:  # one after the other: no clock, and few CPUs
        for name in arguments.variants:
            process = start(name)
            process.wait()
            note(name, exit=process.returncode, log=log(name))
            print(name, output["variants"][name], flush=True)
        return

    running = {name: start(name) for name in arguments.variants}
    try:
        # Nothing runs on the GPU for timing while others still compile and make their contexts, unless one dawdles.
        patience = min(25.0, arguments.seconds * 0.6)
        while time.time() - began < patience and any(
            p.poll() is None and stage(folder, name)["stage"] != "ready" for name, p in running.items()
        ):
            time.sleep(0.05)
        output["compiled_after"] = round(time.time() - began, 2)
        for name, process in running.items():
            if stage(folder, name)["stage"] != "ready" or process.poll() is not None or left() < 2:
                kill(process)
                process.wait()
                note(name, outcome="not started", exit=process.returncode, log=log(name))
                continue
            (folder / f"{name}.go").touch()
            end = time.time() + min(LIMIT, left())
            while process.poll() is None and time.time() < end:
                time.sleep(0.02)
            outcome = "ended" if process.poll() is not None else "killed: out of time"
            kill(process)
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                outcome += ", and it does not die"
            note(name, outcome=outcome, exit=process.returncode, log=log(name))
            report(output["variants"][name])
    finally:
        for process in running.values():
            kill(process)
    print(json.dumps({"elapsed": output.get("elapsed"), "compiled_after": output["compiled_after"]}))


def report(row):
    name = row["variant"]
    line = [f"{name}: {row['outcome']}, {row['stage']}, good {row.get('good')}"]
    for shape, here in row.get("checks", {}).items():
        for kernel, x in here.items():
            line.append(f"  {shape} {kernel}: O {x['O_relative_error']:.2e}, lse {x['lse_largest_error']:.2e}, "
                        f"not finite {x['not_finite']}, equal {x['runs_equal']}, guards {x['guards_hold']}, "
                        f"splits {x['splits']}")  # fmt: skip
    for shape, here in row.get("times", {}).items():
        for kernel, x in here.items():
            if kernel != "speedup":
                line.append(f"  {shape} {kernel}: {x['us']:.1f} us {x['tflops']:.0f} TFLOP/s; back to back "
                            f"{x['us_back_to_back']:.1f} us {x['tflops_back_to_back']:.0f} TFLOP/s")  # fmt: skip
        line.append(f"  {shape} speedup {here['speedup']:.3f}")
    if "matmul_tflops" in row:
        line.append(f"  8192³ bf16: {row['matmul_tflops']:.0f} TFLOP/s, after {row.get('matmul_tflops_after', 0):.0f}")
    if "error" in row:
        line.append("  " + row["error"][-600:])
    elif row["exit"] != 0:
        line.append("  " + row["log"][-600:])
    print("\n".join(line), flush=True)


if __name__ == "__main__":
    main()
