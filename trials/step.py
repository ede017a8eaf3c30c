"""step.py PRESET OUT [ARGS]: the step alone in memory, and its kernels."""
import json, statistics, sys, time
import torch
from reco_fast import train
from reco_fast.profiling.benchmarks import contestants
from reco_fast.method.state import pick_device
from reco_fast.run.run_folder import environment
config, _ = train.parse([sys.argv[1], *sys.argv[3:]]); device = pick_device("auto"); gpu = device.type == "cuda"
T0 = time.time(); B = config.train.batch_size; steps = (100 if B == 512 else 20) if gpu else 2
if gpu: torch.cuda.set_per_process_memory_fraction(0.5)
c = contestants.trainer(config, device)
def sync():
    if gpu: torch.cuda.synchronize()
for _ in range(7): c.train(c.views)
sync(); print("ready", round(time.time() - T0, 1), flush=True)
import os
while os.environ.get("GO") and not os.path.exists(os.environ["GO"]): time.sleep(0.1)
rounds = []
for _ in range(5):
    sync(); t = time.perf_counter()
    for _ in range(steps): c.train(c.views)
    sync(); rounds.append(1e3 * (time.perf_counter() - t) / steps)
out = {"environment": environment(), "config": config.to_json(), "gpu": torch.cuda.get_device_name() if gpu else "cpu", "ms": statistics.median(rounds), "rounds": rounds, "images_per_second": 1e3 * B / statistics.median(rounds), "peak_mib": torch.cuda.max_memory_allocated() / 2**20 if gpu else 0}
json.dump(out, open(sys.argv[2], "w"), default=str); print({k: out[k] for k in ("ms", "rounds", "images_per_second", "peak_mib")}, flush=True)
from torch.profiler import ProfilerActivity, profile
with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * gpu) as p:
    for _ in range(3): c.train(c.views)
    sync()
total = {}
for e in p.events():
    if str(e.device_type).endswith("CUDA") or not gpu:
        n, t, most = total.get(e.name, (0, 0.0, 0.0)); ms = (e.self_device_time_total if gpu else e.self_cpu_time_total) / 1e3; total[e.name] = n + 1, t + ms, max(most, ms)
out["kernels"] = sorted(([n[:400], k, round(t, 4), round(m, 4)] for n, (k, t, m) in total.items()), key=lambda r: -r[2])[:150]
json.dump(out, open(sys.argv[2], "w"), default=str); print("done", round(time.time() - T0, 1), flush=True)
