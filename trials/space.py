"""kNN in the space of the backbone and behind the projector: space.py IMAGES.npz RUN..."""
import sys, glob, json, numpy as np, torch, torch.nn.functional as F
from safetensors.torch import load_file
from reco_fast.method.model import build_encoder
from reco_fast.settings.config import ModelConfig
dev = torch.device("cuda" if torch.cuda.is_available() else "cpu")
d = np.load(sys.argv[1]); X, Y, XT, YT = (torch.from_numpy(d[k]).to(dev) for k in ("x", "y", "xt", "yt"))
M = torch.tensor([0.4914, 0.4822, 0.4465], device=dev).view(1, 3, 1, 1); S = torch.tensor([0.2470, 0.2435, 0.2616], device=dev).view(1, 3, 1, 1)
def knn(tr, te, t=0.1, k=200):
    hit = 0
    for f, y in zip(te.split(1000), YT.split(1000)):
        sim, at = (f @ tr.T).topk(min(k, len(tr)), dim=1)
        hit += (torch.zeros(len(f), 10, device=dev).scatter_add_(1, Y[at], (sim / t).exp()).argmax(1) == y).sum().item()
    return round(100 * hit / len(YT), 1)
for run in sys.argv[2:]:
    m = json.load(open(run + "/config.json"))["model"]
    net = build_encoder(ModelConfig(arch=m["arch"], stem=m["stem"], projector=m.get("projector", "mlp")), 32)
    w = load_file(sorted(glob.glob(run + "/checkpoints/*.safetensors"))[-1]); net.load_state_dict({k[8:]: v for k, v in w.items() if k.startswith("student.")}, strict=False); net.to(dev).eval()
    with torch.no_grad():
        f = [torch.cat([net.backbone(((p.permute(0, 3, 1, 2).float() / 255 - M) / S).to(memory_format=torch.channels_last)) for p in x.split(500)]) for x in (X, XT)]
        z = [net.projector(v) for v in f]; c = f[0].mean(0); sd = f[0].std(0) + 1e-6
        n = lambda pair, t=0.1: knn(*(F.normalize(v, dim=1) for v in pair), t)
        print(run.split("/")[-1], m.get("projector"), {"backbone": n(f), "projector": n(z), "backbone centred": n([v - c for v in f]), "standardised": n([(v - c) / sd for v in f]), "backbone t .02": n(f, .02), "dim": f[0].shape[1]}, flush=True)
