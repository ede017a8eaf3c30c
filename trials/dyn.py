import torch
from torch import nn
from reco_fast.method.norms import use_groups
torch.compiler.is_compiling
def one(shape, groups, views):
    norm = nn.BatchNorm2d(shape[1]); use_groups(norm, groups, views)
    run = torch.compile(nn.Sequential(norm, nn.ReLU()), backend="aot_eager", dynamic=False)
    x = torch.randn(shape).to(memory_format=torch.channels_last).requires_grad_()
    run(x).sum().backward(); print(shape, groups, views, "ok")
one((64, 8, 8, 8), 1, 2); one((64, 16, 4, 4), 8, 2); one((32, 16, 4, 4), 1, 2); one((48, 16, 4, 4), 1, 2)
