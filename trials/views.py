import numpy as np, torch, json
from reco_fast import data
from reco_fast.settings.presets import preset
from reco_fast.pipelines.sources.open import open_source
from reco_fast.pipelines.loader import open_loader
for name, kw in (("half", dict(loss={"keys":"weak"})), ("half-demo", dict(loss={"keys":"weak"}, data={"min_scale":0.08})), ("moco-demo", dict(loss={"objective":"moco"}, data={"min_scale":0.08}))):
    c = preset("cifar10", **{k: v for k, v in kw.items()}); import dataclasses
    c = dataclasses.replace(c, data=dataclasses.replace(c.data, loader="torch", workers=1))
    src = open_source("/tmp/w/data/train")
    with data.open_training_loader(c, src, torch.device("cpu"), torch.float32, first_step=1500) as l: b = next(l)
    z = np.load(f"/tmp/g2/{name}-check-1500.npz"); S = torch.tensor([0.2470, 0.2435, 0.2616]).view(1,3,1,1) * 255
    for i, v in enumerate(b.views):
        g = torch.from_numpy(z[f"view{i}"]).float(); d = ((v[:64].float() - g) * S).abs().mean((1,2,3))
        print(name, i, "mean abs difference in 0..255:", round(d.mean().item(), 3), "worst image", round(d.max().item(), 2), "spread of the view itself", round(((v[:64]-v[:64].mean())*S).abs().mean().item(), 1))
