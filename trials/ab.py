"""One pass for both views beside two, in one process: ab.py ARCH SIZE BATCH GO OUT [SECONDS]"""
import json, os, sys, time, statistics
import torch
from reco_fast.method import state as S
from reco_fast.profiling.benchmarks import contestants
from reco_fast.settings.presets import preset
arch, size, batch, go, out = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
device = S.pick_device("auto")
K = min(65536, 128 * batch)
config = preset("cifar10", model={"arch": arch, "bank_size": K}, data={"image_size": size}, train={"batch_size": batch})
student, teacher = S.running_student, S.running_teacher
def make(together):
    S.running_student = lambda m, size, views: student(m, size, views if together else 1)
    S.running_teacher = lambda m, c, p, size, views=1: teacher(m, c, p, size, views if together else 1)
    before = torch.cuda.memory_allocated()
    c = contestants.trainer(config, device); start = time.time()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(7): c.train(c.views)
    torch.cuda.synchronize()
    print(arch, "together" if together else "apart", "ready", round(time.time() - start, 1), flush=True)
    return c, {"allocated": torch.cuda.memory_allocated() - before, "peak": torch.cuda.max_memory_allocated() - before, "reserved": torch.cuda.memory_reserved()}
made = {"together": make(True), "apart": make(False)}
if size == 32:  # the same without split, as a user without the preset has it
    pass
while not os.path.exists(go): time.sleep(0.2)
if len(sys.argv) > 6:
    while os.path.exists(sys.argv[6]): time.sleep(0.2)
steps = 100 if size == 32 else 12
rounds = []
for r in range(7):
    row = {}
    for name in (made if r % 2 == 0 else reversed(list(made))):
        c = made[name][0]; c.train(c.views); torch.cuda.synchronize()
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        for _ in range(steps): c.train(c.views)
        b.record(); b.synchronize(); row[name] = a.elapsed_time(b) / steps
    rounds.append(row)
ratio = [r["apart"] / r["together"] for r in rounds]
result = {"arch": arch, "size": size, "batch": batch, "bank": K, "ms": {n: statistics.median(r[n] for r in rounds) for n in made},
          "apart_over_together": statistics.median(ratio), "range": [min(ratio), max(ratio)], "memory": {n: made[n][1] for n in made}, "rounds": rounds,
          "gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
json.dump(result, open(out, "w")); print(json.dumps({k: v for k, v in result.items() if k != "rounds"}), flush=True)
open(out + ".done", "w").close()
