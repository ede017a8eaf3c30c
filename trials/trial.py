"""python trial.py JSON args... : train with a changed step. JSON: keys, mode, share, mixglobal, ..."""
import json, sys, math
import torch, torch.nn.functional as F
from reco_fast.method import step as S
from reco_fast.method import losses
from reco_fast import train as T, data as D
import dataclasses
opt = json.loads(sys.argv[1]); sys.argv = ["train"] + sys.argv[2:]
KEYS = opt.get("keys", "both")          # both | weak | mean
MODE = opt.get("mode", "two")           # two | split | mixonly
SHARE = opt.get("share", 1.0)           # of the batch that is mixed
MG = opt.get("mixglobal", 0.0)          # weight of global relation on mixed rows
LOCAL = opt.get("localon", "A")
unit = S.unit

def ce(x, pos, bank, tau):
    logits = torch.cat([(x * pos).sum(1, keepdim=True), x @ bank.T], 1) / tau
    return F.cross_entropy(logits, torch.zeros(len(x), dtype=torch.long))

def forward(state, config, views, draws):
    loss, model = config.loss, config.model
    w = state.relation_weight
    n = len(views[0])
    if KEYS == "weak":
        x1, xw = views
        x2 = None
    else:
        x1, x2, xw = views
    with torch.no_grad(), state.autocast():
        tv = (xw,) if KEYS == "weak" else (x2, xw)
        keys = [unit(k.float()) for k in S.teacher_forward(state.run_teacher, tv, model.key_norm, draws.shuffle)]
    if KEYS == "weak":
        k = kw = keys[0]; A = B = state.bank.keys
    else:
        k, kw = keys; A, B = state.bank.keys, state.bank.weak_keys
        if KEYS == "mean":
            k = unit(k + kw)
    perm = draws.permutation
    lam = draws.mix_weights.mean()
    other = x2 if (x2 is not None and not opt.get("mixself")) else x1
    t = unit(lam * k + (1 - lam) * k[perm])
    with torch.no_grad():
        p = torch.softmax(kw @ B.T / loss.teacher_temperature, 1)
        pm = lam * p + (1 - lam) * p[perm]
    with state.autocast():
        m = int(round(SHARE * n))
        mixed = S.mix_pixels(x1, other, draws)[:m] if m else None
        if MODE == "two":
            q, qm = state.run_student(x1, mixed)
        elif MODE == "split":     # first m rows mixed, the others plain, one pass
            out, = state.run_student(torch.cat([mixed, x1[m:]]))
            q, qm = out[m:], out[:m]
        elif MODE == "mixonly":
            qm, = state.run_student(mixed); q = None
    qm = unit(qm.float())
    rows = slice(0, n) if MODE == "two" else slice(m, n)
    zero = torch.zeros(())
    inst = glob = ent = zero
    if q is not None:
        q = unit(q.float())
        inst = ce(q, k[rows], A, loss.temperature)
        glob = -(p[rows] * torch.log_softmax(q @ B.T / loss.student_temperature, 1)).sum(1).mean()
    local = ce(qm, t[:m], A, loss.temperature)
    total = zero
    a = (1.0 if MODE == "two" else (n - m) / n)
    b = m / n if opt.get("scaleshare", True) else 1.0
    wl, wg = loss.local_weight * w, loss.global_weight * w
    if MODE == "mixonly":
        total = opt.get("inst", 1.0) * local
        wl = 0
    if MODE == "split":
        b = m / n
        wl = wl if not opt.get("locfull") else loss.local_weight
    total = total + a * (inst + wg * glob) + b * wl * local
    if MG:
        gm = -(pm[:m] * torch.log_softmax(qm @ B.T / loss.student_temperature, 1)).sum(1).mean()
        total = total + b * MG * w * gm
        if MODE == "mixonly": glob = gm
    ref = q if q is not None else qm
    refk = k[rows] if q is not None else k[:m]
    health = S._feature_health(ref.detach(), refk)
    kk = [k] if KEYS == "weak" else [k, kw]
    ret = torch.stack(kk, 1)
    return total, ret, torch.stack([total.detach(), inst.detach(), glob.detach(), local.detach(), ent, *health])

S._forward = forward
S.ReferenceForward = None
S._batches = lambda config, parts, rows: {"student": 1, "teacher": 1}
if KEYS == "weak":
    old = D.recipe
    def recipe(config):
        full = old(config)
        return dataclasses.replace(full, views=(full.views[0], full.views[-1]))
    D.recipe = T.recipe = recipe
if opt.get("tau_t"):
    pass
T.main()
