"""Lightly's MoCo, our settings, kNN by our functions: lightly_check.py TRAIN VAL EPOCHS SEED"""
import sys, time, math, torch
from dataclasses import replace
from reco_fast import train
from reco_fast.data import open_data
from reco_fast.features import labelled_features, knn_top1
from reco_fast.profiling.lightly_moco import LightlyMoCo, batches
tr, va, epochs, seed = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
_, config = train.parse(["quickstart", "--data.path", tr, "--data.val-path", va, "--model.bank-size", "2048", "--loss.objective", "moco", "--optim.lr", "0.12", "--data.workers", "1", "--train.epochs", str(epochs), "--train.seed", str(seed)])
config, source, labelled = open_data(config)
torch.manual_seed(seed)
device = torch.device("cpu")
m = LightlyMoCo(config, device, autocast=True)
per = len(source) // 128; total = epochs * per; peak = 0.12 * 128 / 256
it = batches(config, device); t0 = time.time()
def knn():
    bb = m.student[0]
    f = labelled_features(bb, labelled, config, device)
    return knn_top1(f, 10, k=200, temperature=0.1)
print(0, knn(), flush=True)
for s in range(total):
    warm = per
    lr = peak * (s / warm) if s < warm else peak * 0.5 * (1 + math.cos(math.pi * (s - warm) / (total - warm)))
    for g in m.optimizer.param_groups: g["lr"] = lr
    m.student.train(); m.teacher.train()
    loss = m.step(next(it))
    if (s + 1) % (per * 5) == 0: print((s + 1) / per, round(knn(), 2), float(loss), round(time.time() - t0), flush=True)
