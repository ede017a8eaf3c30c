"""What the weights of a run know, by Pillow's pixels: probe.py RUN IMAGES.npz ; kNN with running and with batch statistics, and a linear probe."""
import sys, glob, json, numpy as np, torch, torch.nn.functional as F
from safetensors.torch import load_file
from reco_fast.method.model import build_encoder
from reco_fast.settings.config import ModelConfig
run, images = sys.argv[1:3]; m = json.load(open(run + "/config.json"))["model"]; arch, stem = m["arch"], m["stem"]
dev = torch.device("cuda" if torch.cuda.is_available() else "cpu"); d = np.load(images)
X, Y, XT, YT = (torch.from_numpy(d[k]).to(dev) for k in ("x", "y", "xt", "yt"))
w = load_file(sorted(glob.glob(run + "/checkpoints/*.safetensors"))[-1])
M = torch.tensor([0.4914, 0.4822, 0.4465], device=dev).view(1, 3, 1, 1); S = torch.tensor([0.2470, 0.2435, 0.2616], device=dev).view(1, 3, 1, 1)
@torch.no_grad()
def features(net, x): return torch.cat([F.normalize(net.backbone(((p.permute(0, 3, 1, 2).float() / 255 - M) / S).to(memory_format=torch.channels_last)), dim=1) for p in x.split(500)])
def knn(tr, te, t=0.1):
    hit = 0
    for f, y in zip(te.split(1000), YT.split(1000)):
        sim, at = (f @ tr.T).topk(min(200, len(tr)), dim=1)
        hit += (torch.zeros(len(f), 10, device=dev).scatter_add_(1, Y[at], (sim / t).exp()).argmax(1) == y).sum().item()
    return round(100 * hit / len(YT), 2)
out = {"run": run}
for who in ("student", "teacher"):
    for mode in ("eval", "train"):
        net = build_encoder(ModelConfig(arch=arch, stem=stem), 32); w = {k: v for k, v in w.items() if "projector" not in k}; net.load_state_dict({k[len(who) + 1:]: v for k, v in w.items() if k.startswith(who + ".")}, strict=False); net.to(dev)
        net.train(mode == "train"); order, other = (torch.randperm(len(x), device=dev) for x in (X, XT))
        tr, te = features(net, X[order])[order.argsort()], features(net, XT[other])[other.argsort()]; out[f"{who} {mode}"] = knn(tr, te)
        if who == "student" and mode == "eval":
            c = tr.mean(0); out["centred"] = knn(F.normalize(tr - c, dim=1), F.normalize(te - c, dim=1)); out["t 0.07"] = knn(tr, te, 0.07); out["t 0.02"] = knn(tr, te, 0.02)
            s = tr.std(0) + 1e-6; a, b = (tr - c) / s, (te - c) / s
            lin = torch.nn.Linear(a.shape[1], 10).to(dev); opt = torch.optim.LBFGS(lin.parameters(), max_iter=100, line_search_fn="strong_wolfe")
            def closure():
                opt.zero_grad(); loss = F.cross_entropy(lin(a), Y) + 1e-5 * lin.weight.square().sum(); loss.backward(); return loss
            opt.step(closure); out["linear"] = round(100 * (lin(b).argmax(1) == YT).float().mean().item(), 2)
            out["linear, training images"] = round(100 * (lin(a).argmax(1) == Y).float().mean().item(), 2)
print(json.dumps(out), flush=True)
