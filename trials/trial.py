"""python trial2.py JSON args...: weak keys within a batch, changed. See trial.py."""
import json, sys
import torch, torch.nn.functional as F
from reco_fast.method import step as S, state as ST
opt = json.loads(sys.argv[1]); sys.argv = ["train"] + sys.argv[2:]
from reco_fast import train as T
unit = S.unit
G = opt.get
pred = None
if G("pred"):
    h = G("pred")
    torch.manual_seed(5)
    pred = torch.nn.Sequential(torch.nn.Linear(128, h), torch.nn.BatchNorm1d(h), torch.nn.ReLU(), torch.nn.Linear(h, 128)) if not G("plainpred") else torch.nn.Sequential(torch.nn.Linear(128, h), torch.nn.ReLU(), torch.nn.Linear(h, 128))
    old = ST.build_optimizer
    def bo(student, cfg):
        o = old(student, cfg)
        g = {k: v for k, v in o.param_groups[0].items() if k != "params"}
        o.add_param_group({**g, "params": list(pred.parameters())})
        return o
    ST.build_optimizer = bo

def logits(x, pos, bank, tau):
    return torch.cat([(x * pos).sum(1, keepdim=True), x @ bank.T], 1) / tau
def ce0(l):
    return F.cross_entropy(l, torch.zeros(len(l), dtype=torch.long))

def forward(state, config, views, draws):
    loss, model = config.loss, config.model
    w = state.relation_weight
    n = len(views[0]); x1 = views[0]
    weak = loss.keys == "weak"
    with torch.no_grad(), state.autocast():
        keys = [unit(k.float()) for k in S.teacher_forward(state.run_teacher, views[1:], model.key_norm, draws.shuffle)]
    k, kw = keys[0], keys[-1]
    A = state.bank.keys; B = A if weak else state.bank.weak_keys
    perm = draws.permutation; lam = draws.mix_weights.mean()
    t = unit(lam * k + (1 - lam) * k[perm])
    tt, ts, tc = loss.teacher_temperature, loss.student_temperature, loss.temperature
    with torch.no_grad():
        pl = kw @ B.T
        p = torch.softmax(pl / tt, 1)
    m = config.mixed_images(n)
    with state.autocast():
        others = x1 if weak else views[1]
        mixed = S.mix_pixels(x1[:m], others, draws)
        out, = state.run_student(torch.cat([mixed, x1[m:]]))
    out = out.float()
    if pred is not None:
        out = pred(out)
    q, qm = unit(out[m:]), unit(out[:m])
    kr = k[m:]; pr = p[m:]
    lq = logits(q, kr, A, tc)
    if G("nn"):        # positive: the key's nearest in the bank, mean of nn
        with torch.no_grad():
            top = (kr @ A.T).topk(G("nn"), 1).indices
            pos = A[top]           # r, nn, D
        inst = ce0(lq) * (1 - G("nnw", .5))
        ln = logits(q, unit(pos.mean(1)), A, tc)
        inst = inst + G("nnw", .5) * ce0(ln)
    else:
        inst = ce0(lq)
    glob = -(pr * torch.log_softmax(q @ B.T / ts, 1)).sum(1).mean()
    local = ce0(logits(qm, t[:m], A, tc))
    b = m / n; a = 1 - b
    wl, wg = loss.local_weight * w, loss.global_weight * w
    if "locstart" in opt:    # local weight from locstart to local_weight by the ramp
        wl = G("locstart") + (loss.local_weight - G("locstart")) * w
    if "globstart" in opt:
        wg = G("globstart") + (loss.global_weight - G("globstart")) * w
    total = a * (inst + wg * glob) + b * wl * local
    if G("mg"):
        pm = lam * p[:m] + (1 - lam) * p[perm[:m]]
        gm = -(pm * torch.log_softmax(qm @ B.T / ts, 1)).sum(1).mean()
        total = total + b * G("mg") * w * gm
    if G("norml"):   # constant total weight: divide by the sum
        total = total / (a * (1 + wg) + b * wl)
    health = S._feature_health(q.detach(), kr)
    return total, torch.stack(keys, 1), torch.stack([total.detach(), inst.detach(), glob.detach(), local.detach(), torch.zeros(()), *health])
S._forward = forward
T.main()
