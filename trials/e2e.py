"""Trial: ResNet-50 end to end from photographs, DALI's options, beside torchvision's loader and Lightly's MoCo."""
import argparse, json, os, subprocess, sys, time, statistics
from contextlib import closing
from dataclasses import replace
from pathlib import Path
import torch
from reco_fast import train
from reco_fast.run.meter import Meter
from reco_fast.profiling.benchmarks import contestants, loader as loader_benchmark
from reco_fast.run.run_folder import environment
from reco_fast.method.state import pick_device
from reco_fast.data import recipe
from reco_fast.pipelines.sources.open import open_source

a = argparse.ArgumentParser(); a.add_argument("--photos"); a.add_argument("--output", type=Path); a.add_argument("--tiny", action="store_true")
a = a.parse_args()
words = ["imagenet100", "--data.path", a.photos, "--train.batch-size", "256"]
if a.tiny:
    words = ["imagenet100", "--data.path", a.photos, "--train.batch-size", "16", "--model.arch", "timm/test_resnet", "--data.image-size", "64", "--model.bank-size", "64", "--data.workers", "2", "--data.loader", "dali"]
config, _ = train.parse(words)
device = pick_device("auto"); on_gpu = device.type == "cuda"
B = config.train.batch_size
LEAD, TIMED, ALONE = (6, 20, 8) if not a.tiny else (3, 4, 3)
out = {"environment": environment(), "config": config.to_json(), "variants": {}}
def save(): a.output.write_text(json.dumps(out, indent=1, default=str))
def say(*x): print(f"{time.perf_counter()-T0:6.1f}", *x, flush=True)
T0 = time.perf_counter()
if on_gpu: torch.cuda.set_per_process_memory_fraction(0.6)
def sync():
    if on_gpu: torch.cuda.synchronize()

import reco_fast.pipelines.dali as dali
import reco_fast.pipelines.dali_graph as dg
original, buffers = dali.graph, dg._decoder_buffers
extra, load = {}, [None]
dali.graph = lambda *p, **k: original(*p, **(k | extra))
def decoder(h, w):
    b = buffers(h, w)
    if load[0] is not None: b["hw_decoder_load"] = load[0]
    return b
dg._decoder_buffers = decoder
from nvidia.dali.pipeline import StreamPolicy
VARIANTS = {
    "as it is": ({}, None),
    "a stream an operator": ({"stream_policy": StreamPolicy.PER_OPERATOR}, None),
    "a stream an operator, no hardware decoder": ({"stream_policy": StreamPolicy.PER_OPERATOR}, 0.0),
    "a stream an operator, 4 ahead": ({"stream_policy": StreamPolicy.PER_OPERATOR, "prefetch_queue_depth": 4}, None),
}
ours = contestants.trainer(config, device)
for _ in range(6): ours.train(ours.views)
sync(); say("ours ready")
auto = None
try:
    auto = contestants.lightly(config, device, autocast=True)
    for _ in range(3): auto.train(auto.views)
    sync(); say("lightly ready")
except Exception as e:
    out["lightly failed"] = repr(e); say("lightly", repr(e))

def in_memory(c, steps=15):
    sync(); t = time.perf_counter()
    for _ in range(steps): c.train(c.views)
    sync(); return 1e3 * (time.perf_counter() - t) / steps

def profile(batches):
    from torch.profiler import profile, ProfilerActivity
    acts = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    with profile(activities=acts) as p:
        for _ in range(3): ours.train(next(batches))
        sync()
    total = {}
    for e in p.events():
        if on_gpu and str(e.device_type).endswith("CUDA"):
            n, t = total.get(e.name[:90], (0, 0.0)); total[e.name[:90]] = n + 1, t + e.self_device_time_total / 1e3
    return sorted(([n, c, round(t, 3)] for n, (c, t) in total.items()), key=lambda r: -r[2])[:60]

while not os.path.exists("/tmp/go"): time.sleep(0.2)
if True:
    say("alone"); out["step in memory, ms"] = in_memory(ours); save(); say("memory", out["step in memory, ms"])
    order = list(VARIANTS)
    for name in order:
        options, share = VARIANTS.get(name, ({}, None))
        extra.clear(); extra.update(options); load[0] = share
        try:
            row = {}
            with closing(ours.batches()) as batches:
                for _ in range(6): next(batches)
                sync(); t = time.perf_counter()
                for _ in range(ALONE): next(batches); sync()
                row["loader alone, ms"] = 1e3 * (time.perf_counter() - t) / ALONE
                for _ in range(LEAD): ours.train(next(batches))
                meter = Meter(device)
                for _ in range(TIMED):
                    with meter.waiting(): views = next(batches)
                    ours.train(views); meter.add(B)
                sync(); rate, waited = meter.read()
                row |= {"images/s": rate, "waits": waited}
                if name in ("as it is", "a stream an operator") and on_gpu:
                    row["profile"] = profile(batches)
        except Exception as e:
            row = {"failed": repr(e)[-1500:]}
        out["variants"][name] = row; save(); say(name, {k: v for k, v in row.items() if k != "profile"})
    out["memory of the process, MiB"] = subprocess.run("nvidia-smi --query-compute-apps=pid,used_memory --format=csv,noheader; echo pid %d" % os.getpid(), shell=True, capture_output=True, text=True).stdout
    out["allocated, MiB"] = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else None
    workers = 16 if not a.tiny else 2
    for name in ("lightly", "torchvision"):
        try:
            if name == "lightly":
                with closing(auto.batches()) as batches:
                    for _ in range(workers + 2): auto.train(next(batches))
                    sync(); t = time.perf_counter()
                    for _ in range(8): auto.train(next(batches))
                    sync(); out["lightly, autocast, images/s"] = 8 * B / (time.perf_counter() - t)
                out["lightly in memory, ms"] = in_memory(auto)
            else:
                args = argparse.Namespace(batch_size=B, workers=workers, device=device.type, warmup=workers + 2, batches=8)
                source = open_source(config.data.path)
                out["torchvision's loader, images/s"] = loader_benchmark.images_per_second(loader_benchmark.torchvision(source, recipe(config), args), args)
        except Exception as e:
            out[name + " failed"] = repr(e)[:300]
        save(); say(name, out.get("lightly, autocast, images/s"), out.get("torchvision's loader, images/s"))
