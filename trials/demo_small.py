"""The CIFAR-10 demo of MoCo's authors in plain PyTorch, its views made on the device: an independent check.

demo.py IMAGES.npz NAME --epochs (of the schedule) --stop ... ; a line of JSON at each evaluation.
"""
import argparse, copy, json, math, time
import numpy as np, torch, torch.nn.functional as F, torchvision
from torch import nn
from torchvision.transforms._functional_tensor import _rgb2hsv, _hsv2rgb

p = argparse.ArgumentParser()
p.add_argument("images"); p.add_argument("name")
p.add_argument("--epochs", type=int, default=200); p.add_argument("--stop", type=int, default=30); p.add_argument("--every", type=int, default=10)
p.add_argument("--batch", type=int, default=512); p.add_argument("--lr", type=float, default=0.06); p.add_argument("--wd", type=float, default=5e-4)
p.add_argument("--warmup", type=int, default=0)
p.add_argument("--area", type=float, default=0.08); p.add_argument("--student-groups", type=int, default=8); p.add_argument("--groups", type=int, default=8)
p.add_argument("--mlp", action="store_true"); p.add_argument("--symmetric", action="store_true"); p.add_argument("--no-compile", action="store_true"); p.add_argument("--seed", type=int, default=0)
a = p.parse_args()
dev = torch.device("cuda" if torch.cuda.is_available() else "cpu")
torch.manual_seed(a.seed); torch.backends.cudnn.benchmark = True
d = np.load(a.images)
X, Y, XT, YT = (torch.from_numpy(d[k]).to(dev) for k in ("x", "y", "xt", "yt"))
MEAN = torch.tensor([0.4914, 0.4822, 0.4465], device=dev).view(1, 3, 1, 1); STD = torch.tensor([0.2023, 0.1994, 0.2010], device=dev).view(1, 3, 1, 1)

class SplitBN(nn.BatchNorm2d):
    splits = 8
    def forward(self, x):
        if not self.training or self.splits == 1:
            return super().forward(x)
        g = x.float().unflatten(0, (self.splits, -1))
        var, mean = torch.var_mean(g, (1, 3, 4), correction=0, keepdim=True)
        with torch.no_grad():
            n = g[0, :, 0].numel()
            self.running_mean.lerp_(mean.mean(0).flatten(), 0.1); self.running_var.lerp_(var.mean(0).flatten() * n / (n - 1), 0.1)
        out = (g - mean) * torch.rsqrt(var + self.eps) * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)
        return out.to(x.dtype).flatten(0, 1)

def encoder(splits):
    import timm
    net = timm.create_model("test_resnet", num_classes=128)
    for m in net.modules():
        if type(m).__name__ == "BatchNorm2d": m.__class__ = SplitBN; m.splits = splits
    w = net.num_features
    if a.mlp: net.fc = nn.Sequential(nn.Linear(w, w), nn.ReLU(), nn.Linear(w, 128))
    return net

student = encoder(a.student_groups); teacher = encoder(a.groups); teacher.load_state_dict(student.state_dict())
student.to(dev, memory_format=torch.channels_last); teacher.to(dev, memory_format=torch.channels_last).requires_grad_(False)
run_s, run_t = (student, teacher) if a.no_compile else (torch.compile(student, options={"triton.mix_order_reduction": False}), torch.compile(teacher, options={"triton.mix_order_reduction": False}))
opt = torch.optim.SGD(student.parameters(), lr=a.lr, momentum=0.9, weight_decay=a.wd, fused=True)
queue = F.normalize(torch.randn(4096, 128, device=dev), dim=1); ptr = 0

def gray(x): return (x * torch.tensor([0.2989, 0.587, 0.114], device=dev).view(1, 3, 1, 1)).sum(1, keepdim=True)
def uniform(n, lo, hi): return (torch.rand(n, device=dev) * (hi - lo) + lo).view(-1, 1, 1, 1)

def crop(x):
    n, s = len(x), x.shape[-1]
    area = (torch.rand(10, n, device=dev) * (1 - a.area) + a.area) * s * s
    ratio = torch.exp((torch.rand(10, n, device=dev) * 2 - 1) * math.log(4 / 3))
    w, h = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    ok = (w <= s) & (h <= s) & (w > 0) & (h > 0)
    first = ok.float().argmax(0); idx = torch.arange(n, device=dev)
    w, h = torch.where(ok[first, idx], w[first, idx], s), torch.where(ok[first, idx], h[first, idx], s)
    left, top = (torch.rand(n, device=dev) * (s - w + 1)).floor(), (torch.rand(n, device=dev) * (s - h + 1)).floor()
    flip = torch.where(torch.rand(n, device=dev) < 0.5, -1.0, 1.0)
    theta = torch.zeros(n, 2, 3, device=dev)
    theta[:, 0, 0] = w / s * flip; theta[:, 1, 1] = h / s
    theta[:, 0, 2] = (2 * left + w) / s - 1; theta[:, 1, 2] = (2 * top + h) / s - 1
    # a crop's border is its own: clamp the grid to the crop's outermost pixel centres
    g = F.affine_grid(theta, (n, 3, s, s), align_corners=False)
    lo = torch.stack([(2 * left + 1) / s - 1, (2 * top + 1) / s - 1], -1).view(n, 1, 1, 2)
    hi = torch.stack([(2 * (left + w) - 1) / s - 1, (2 * (top + h) - 1) / s - 1], -1).view(n, 1, 1, 2)
    return F.grid_sample(x, torch.minimum(torch.maximum(g, lo), hi), padding_mode="border", align_corners=False)

def view(x):
    x = crop(x); n = len(x); y = x
    b, c, s = uniform(n, 0.6, 1.4), uniform(n, 0.6, 1.4), uniform(n, 0.6, 1.4); h = uniform(n, -0.1, 0.1)
    for op in np.random.permutation(4):
        if op == 0: y = (y * b).clamp(0, 1)
        if op == 1: y = (y * c + (1 - c) * gray(y).mean((2, 3), keepdim=True)).clamp(0, 1)
        if op == 2: y = (y * s + (1 - s) * gray(y)).clamp(0, 1)
        if op == 3:
            v = _rgb2hsv(y); y = _hsv2rgb(torch.cat([(v[:, :1] + h) % 1.0, v[:, 1:]], 1))
    x = torch.where(uniform(n, 0, 1) < 0.8, y, x)
    x = torch.where(uniform(n, 0, 1) < 0.2, gray(x).expand_as(x), x)
    return ((x - MEAN) / STD).to(memory_format=torch.channels_last)

def images(idx): return X[idx].permute(0, 3, 1, 2).float() / 255

@torch.no_grad()
def features(net, x):
    fc, net.fc, out = net.fc, nn.Identity(), ([], [])
    net.eval()
    for part in x.split(1000):
        v = ((part.permute(0, 3, 1, 2).float() / 255 - MEAN) / STD).to(memory_format=torch.channels_last)
        f = net(v); out[0].append(F.normalize(f, dim=1)); out[1].append(F.normalize(fc(f), dim=1))
    net.fc = fc; net.train()
    return [torch.cat(o) for o in out]

@torch.no_grad()
def knn():
    res = []
    for tr, te in zip(features(student, X), features(student, XT)):
        hit = 0
        for f, y in zip(te.split(1000), YT.split(1000)):
            sim, at = (f @ tr.T).topk(min(200, len(tr)), dim=1)
            score = torch.zeros(len(f), 10, device=dev).scatter_add_(1, Y[at], (sim / 0.1).exp())
            hit += (score.argmax(1) == y).sum().item()
        res.append(100 * hit / len(YT))
    return res

def half_step(q_img, k_img):
    global queue, ptr
    with torch.autocast(dev.type, torch.bfloat16):
        q = run_s(q_img)
        with torch.no_grad():
            perm = torch.randperm(len(k_img), device=dev); k = torch.empty(len(k_img), 128, device=dev)
            k[perm] = run_t(k_img[perm]).float()
    q, k = F.normalize(q.float(), dim=1), F.normalize(k, dim=1)
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1) / 0.1
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=dev)), k

t0 = time.time(); spent = 0.0; per = len(X) // a.batch
total = torch.zeros((), device=dev)
print(json.dumps({"name": a.name, "epoch": 0, "knn": knn(), **vars(a)}), flush=True); t0 = time.time()
for epoch in range(a.stop):
    order = torch.randperm(len(X), device=dev); total.zero_()
    for i in range(per):
        lr = a.lr * 0.5 * (1 + math.cos(math.pi * epoch / a.epochs))
        if epoch < a.warmup: lr = a.lr * (epoch * per + i + 1) / (a.warmup * per)
        for g in opt.param_groups: g["lr"] = lr
        with torch.no_grad(): torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 0.01)
        x = images(order[i * a.batch:(i + 1) * a.batch]); v1, v2 = view(x), view(x)
        loss, k = half_step(v1, v2); keys = k
        if a.symmetric:
            other, k2 = half_step(v2, v1); loss, keys = loss + other, torch.cat([k, k2])
        opt.zero_grad(); loss.backward(); opt.step(); total += loss.detach()
        with torch.no_grad():
            at = (torch.arange(len(keys), device=dev) + ptr) % 4096; queue[at] = keys; ptr = (ptr + len(keys)) % 4096
    if (epoch + 1) % a.every == 0 or epoch + 1 == a.stop:
        l = total.item() / per; spent = time.time() - t0
        print(json.dumps({"name": a.name, "epoch": epoch + 1, "knn": knn(), "loss": l, "seconds": round(spent, 1)}), flush=True)
