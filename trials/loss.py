"""The loss and its gradients a few times, for ncu: loss.py N K"""
import sys, torch, torch.nn.functional as F
from reco_fast import reco_loss
n, k, d = int(sys.argv[1]), int(sys.argv[2]), 128
g = torch.Generator("cuda").manual_seed(0)
r = lambda *s: torch.randn(*s, d, device="cuda", generator=g)
q, m, a, b = r(n).requires_grad_(), r(n).requires_grad_(), r(n), r(n)
A, B = (F.normalize(r(k)).bfloat16() for _ in range(2))
p = torch.randperm(n, device="cuda", generator=g)
for _ in range(6):
    out = reco_loss(q, m, a, b, A, B, p, 0.3, impl="triton"); out.total.backward()
torch.cuda.synchronize(); print(out.total.item())
