"""The batch norm of groups, compiled for the card, against float64."""
import torch
from torch import nn
from reco_fast.method.norms import use_groups
from reco_fast.method.state import compile_encoder
dev = "cuda" if torch.cuda.is_available() else "cpu"
def err(a, b): return float((a.double() - b).norm() / b.norm())
for shape, groups, views in [((1024, 64, 32, 32), 1, 2), ((1024, 512, 4, 4), 8, 2), ((1024, 512, 4, 4), 1, 2), ((256, 256, 56, 56), 1, 2), ((130, 24, 7, 5), 1, 2), ((512, 512), 1, 2)][: None if dev == "cuda" else 1]:
    if dev == "cpu": shape = (64, *shape[1:])
    norm = (nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d)(shape[1]).to(dev)
    with torch.no_grad(): norm.weight.uniform_(0.5, 1.5); norm.bias.uniform_(-1, 1)
    ref = (nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d)(shape[1]).to(dev).double(); ref.load_state_dict(norm.state_dict())
    use_groups(norm, groups, views)
    x = (0.5 + 2 * torch.randn(shape, device=dev)).bfloat16()
    if len(shape) == 4: x = x.to(memory_format=torch.channels_last)
    up = torch.randn(shape, device=dev).bfloat16().to(memory_format=torch.channels_last) if len(shape) == 4 else torch.randn(shape, device=dev).bfloat16()
    a, b = x.clone().requires_grad_(), x.double().requires_grad_()
    run = compile_encoder(nn.Sequential(norm, nn.ReLU()))
    out = run(a); out.backward(up)
    parts = [p for v in b.chunk(views) for p in v.chunk(groups)]
    want = torch.cat([ref(p) for p in parts]).relu(); want.backward(up.double())
    print(shape, groups, views, *(f"{err(g, w):.1e}" for g, w in ((out, want), (a.grad, b.grad), (norm.weight.grad, ref.weight.grad), (norm.bias.grad, ref.bias.grad), (norm.running_mean, ref.running_mean), (norm.running_var, ref.running_var))), flush=True)
