import json, numpy as np, torch, torch.nn.functional as F
from safetensors.torch import load_file
from reco_fast.method.model import build_encoder
from reco_fast.settings.config import ModelConfig
torch.set_num_threads(2)
d = np.load("cfull.npz"); X, Y, XT, YT = (torch.from_numpy(d[k]) for k in ("x", "y", "xt", "yt"))
M = torch.tensor([0.4914, 0.4822, 0.4465]).view(1, 3, 1, 1); S = torch.tensor([0.2470, 0.2435, 0.2616]).view(1, 3, 1, 1)
net = build_encoder(ModelConfig(arch="resnet18", projector="linear"), 32)
w = load_file("/tmp/g3/record.f16"); print(net.load_state_dict({k[8:]: v.float() for k, v in w.items()}, strict=False))
net.to(memory_format=torch.channels_last).eval()
with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
    f = [torch.cat([net.backbone(((p.permute(0, 3, 1, 2).float() / 255 - M) / S).to(memory_format=torch.channels_last)).float() for p in x.split(500)]) for x in (X, XT)]
np.savez("feat.npz", a=f[0].numpy(), b=f[1].numpy())
