import numpy as np, torch, torch.nn.functional as F
from safetensors.torch import load_file
d=np.load("cfull.npz"); Y,YT=(torch.from_numpy(d[k]) for k in ("y","yt")); z=np.load("feat.npz"); A,B=(torch.from_numpy(z[k]) for k in "ab")
w=load_file("/tmp/g3/record.f16"); W,b=w["student.projector.weight"].float(),w["student.projector.bias"].float()
def knn(tr,te,t=.1,k=200):
    hit=0
    for f,y in zip(te.split(500),YT.split(500)):
        s,at=(f@tr.T).topk(k,dim=1); hit+=(torch.zeros(len(f),10).scatter_add_(1,Y[at],(s/t).exp()).argmax(1)==y).sum().item()
    return round(hit/100,2)
n=lambda p,**k: knn(*(F.normalize(v,dim=1) for v in p),**k)
c=A.mean(0); sd=A.std(0)+1e-6
print("norm of mean", float(F.normalize(A,dim=1).mean(0).norm()))
print("backbone",n((A,B)),"t.02",n((A,B),t=.02),"t.01",n((A,B),t=.01),"k20",n((A,B),k=20),"k20 t.02",n((A,B),k=20,t=.02))
P=[v@W.T+b for v in (A,B)]; print("projector",n(P),"t.05",n(P,t=.05))
print("centred",n((A-c,B-c)),"standardised",n(((A-c)/sd,(B-c)/sd)), "sqrt", n((A.sqrt(),B.sqrt())), "sqrt t.02", n((A.sqrt(),B.sqrt()),t=.02))
U,S,V=torch.linalg.svd((A-c)/len(A)**.5,full_matrices=False)
print("whitened", n(((A-c)@V.T/S,(B-c)@V.T/S)), "half-whitened", n(((A-c)@V.T/S.sqrt(),(B-c)@V.T/S.sqrt())))
a,bb=(A-c)/sd,(B-c)/sd
lin=torch.nn.Linear(512,10); opt=torch.optim.LBFGS(lin.parameters(),max_iter=150,line_search_fn="strong_wolfe")
def closure():
    opt.zero_grad(); l=F.cross_entropy(lin(a),Y)+1e-5*lin.weight.square().sum(); l.backward(); return l
opt.step(closure); print("linear",round((lin(bb).argmax(1)==YT).float().mean().item()*100,2),"train",round((lin(a).argmax(1)==Y).float().mean().item()*100,2))
