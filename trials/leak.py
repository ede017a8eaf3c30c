"""Does the query read the keys' batch statistics? Loss when the teacher's batch is the query's own, or a mix of strangers."""
import sys, glob, json, copy, torch, torch.nn.functional as F, numpy as np
from safetensors.torch import load_file
from reco_fast.method.model import build_encoder
from reco_fast.settings.config import ModelConfig
from PIL import Image
from torchvision.transforms import v2
run = sys.argv[1]; cfg = json.load(open(run + "/config.json")); m = cfg["model"]; B = cfg["train"]["batch_size"]
print(run, m["key_norm"], m["arch"], B, cfg["loss"]["temperature"], cfg["loss"]["objective"], m["bank_size"])
w = load_file(sorted(glob.glob(run + "/checkpoints/*.safetensors"))[-1])
print([k for k in w if "bank" in k], len(w))
def enc(who):
    e = build_encoder(ModelConfig(arch=m["arch"], stem=m["stem"], projector=m["projector"]), 32)
    e.load_state_dict({k[len(who)+1:]: v for k, v in w.items() if k.startswith(who + ".")}, strict=False); return e
S, T = enc("student"), enc("teacher")
root = "/tmp/w/data/train"; files = sorted(glob.glob(root + "/*/*"))
rng = np.random.default_rng(0); torch.manual_seed(0)
aug = v2.Compose([v2.RandomResizedCrop(32, (0.2, 1)), v2.RandomHorizontalFlip(), v2.RandomApply([v2.ColorJitter(.4,.4,.4,.1)], .8), v2.RandomGrayscale(.2), v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))])
t = cfg["loss"]["temperature"]
# a bank made by the teacher as in training
def views(n):
    im = [Image.open(files[i]).convert("RGB") for i in rng.choice(len(files), n, replace=False)]
    return torch.stack([aug(i) for i in im]), torch.stack([aug(i) for i in im])
S.train(); T.train()
@torch.no_grad()
def main():
    bank = torch.cat([F.normalize(T(views(B)[1])) for _ in range(m["bank_size"] // B)])
    res = {k: [] for k in ("same batch", "key beside strangers", "query beside strangers", "both, different", "groups of 1/8 shuffled")}
    pos = {k: [] for k in res}
    for _ in range(12):
        a, b = views(B); c, d = views(B)
        def loss(q, k, name):
            q, k = F.normalize(q), F.normalize(k); p = (q * k).sum(1); l = torch.cat([p[:, None], q @ bank.T], 1) / t
            res[name].append(F.cross_entropy(l, torch.zeros(len(q), dtype=torch.long)).item()); pos[name].append(p.mean().item())
        h = B // 8
        qa = S(a); kb = T(b)
        loss(qa, kb, "same batch")
        # each eighth of the keys in a batch whose other images are strangers
        kx = torch.cat([T(torch.cat([b[i*h:(i+1)*h], d[h:]]))[:h] for i in range(8)])
        qx = torch.cat([S(torch.cat([a[i*h:(i+1)*h], c[h:]]))[:h] for i in range(8)])
        loss(qa, kx, "key beside strangers"); loss(qx, kb, "query beside strangers"); 
        kx2 = torch.cat([T(torch.cat([b[i*h:(i+1)*h], views(B)[1][h:]]))[:h] for i in range(8)])
        loss(qx, kx2, "both, different")
        perm = torch.randperm(B); k8 = torch.empty_like(kb); k8[perm] = torch.cat([T(x) for x in b[perm].split(max(2, h))])
        loss(qa, k8, "groups of 1/8 shuffled")
    for k in res: print(f"{k:26s} loss {np.mean(res[k]):.3f} ± {np.std(res[k])/12**.5:.3f}  positive {np.mean(pos[k]):.3f}")
main()
