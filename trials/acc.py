"""Gradients of a resnet18 on 2 x 64 images against float64: two passes of PyTorch's norms, and one of ours, fp32 and bf16."""
import torch, copy, sys
from reco_fast.method.norms import use_groups
from reco_fast.method.model import build_encoder
from reco_fast.settings.config import ModelConfig
torch.manual_seed(0)
enc = build_encoder(ModelConfig(arch="resnet18"), 32).train().to(memory_format=torch.channels_last)
x = torch.randn(128, 3, 32, 32).to(memory_format=torch.channels_last); up = torch.randn(128, 128)
def grads(m, one, dtype):
    m = copy.deepcopy(m)
    if dtype == torch.float64: m.double()
    if one: use_groups(m, 1, 2)
    given, u = (x.double(), up.double()) if dtype == torch.float64 else (x, up)
    real = torch.compiler.is_compiling
    if one: torch.compiler.is_compiling = lambda: True
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = m(given) if one else torch.cat([m(v) for v in given.chunk(2)])
    torch.compiler.is_compiling = real
    out.backward(u.to(out.dtype))
    return {n: p.grad.double() for n, p in m.named_parameters()}
true = grads(enc, False, torch.float64)
for one in (False, True):
    for dtype in (torch.float32, torch.bfloat16):
        g = grads(enc, one, dtype)
        e = sorted(((g[n] - t).norm() / t.norm()).item() for n, t in true.items())
        print("ours" if one else "PyTorch's, a pass a view", dtype, "median %.1e, 90%% %.1e, worst %.1e" % (e[len(e)//2], e[int(.9*len(e))], e[-1]))
