"""What the host launches in one compiled step: kernels of the compiled encoders, and operators around them."""
import sys, collections, re
sys.path.insert(0,'/work/main/tests')
import torch, torch._inductor.config as ic
from torch import nn
from torch._inductor.graph import GraphLowering
from dispatch import Recorder
import reco_fast.state as S
from reco_fast.config import *
from reco_fast.step import *
ic.force_disable_caches=True
CPU=torch.device('cpu'); arch,kn,rows,size=sys.argv[1],sys.argv[2],128,32
calls=collections.Counter(); mods={}
class Op(torch.autograd.Function):
    @staticmethod
    def forward(ctx,n,*ps):
        ctx.ps=ps
        with torch._C._DisableTorchDispatch(): return torch.randn(n,128)
    @staticmethod
    def backward(ctx,g):
        with torch._C._DisableTorchDispatch(): return (None,*[torch.zeros_like(p) for p in ctx.ps])
class Opaque(nn.Module):
    def __init__(self,m): super().__init__(); self.m=m
    def forward(self,x):
        gr=torch.is_grad_enabled(); k=(id(self.m),tuple(x.shape),x.dtype,gr); calls[k]+=1; mods[k]=self.m
        ps=[p for p in self.m.parameters() if p.requires_grad]
        if gr: return Op.apply(len(x),*ps)
        with torch._C._DisableTorchDispatch(): return torch.randn(len(x),128)
real=torch.compile
torch.compile=lambda m,*a,**k: Opaque(m)
c=Config(data=DataConfig(image_size=size),model=ModelConfig(arch=arch,bank_size=256,key_norm=kn),train=TrainConfig(batch_size=rows,precision='bf16',compile=True))
s=S.build_state(c,CPU)
torch.compile=real
import reco_fast.step as T
from reco_fast.losses import *
from reco_fast.kernels.reference import *
import reco_fast.losses as L
Out=[v for v in vars(L).values() if isinstance(v,type) and hasattr(v,'_fields') and 'teacher_entropy' in v._fields][0]
class OpL(torch.autograd.Function):
    @staticmethod
    def forward(ctx,q,m):
        ctx.qm=(q,m)
        with torch._C._DisableTorchDispatch(): return torch.ones(())
    @staticmethod
    def backward(ctx,g):
        with torch._C._DisableTorchDispatch(): return tuple(torch.zeros_like(t) for t in ctx.qm)
def fake(q,m,*a,**k):
    t=OpL.apply(q,m)
    with torch._C._DisableTorchDispatch(): z=[torch.zeros(()) for _ in range(4)]
    return Out(t,*z)
T.reco_loss=fake
def step(st):
    v=tuple(torch.randn(rows,3,size,size).contiguous(memory_format=torch.channels_last) for _ in range(3))
    d=draw(st,rows,c,CPU); sc=scheduled(st,10,c)
    calls.clear()
    r=Recorder()
    with r: train_step(s,c,v,d,sc)
    return r.seen
step(0); seen=step(1)
NOT={'scalar_tensor','view','as_strided','empty','detach','select','slice','permute','t','transpose','expand','reshape','empty_strided','empty_like','unsqueeze','alias','chunk','split','unbind','narrow','squeeze','_unsafe_view','lift_fresh','set_','split_with_sizes','new_empty','_reshape_alias'}
outside=[n for n in seen if n not in NOT and '::' not in n]
codes=[]
GraphLowering.save_output_code=staticmethod(codes.append)
total=0; detail=[]
for k,n in calls.items():
    m=mods[k]; codes.clear(); torch._dynamo.reset()
    x=torch.randn(k[1]).to(k[2]).contiguous(memory_format=torch.channels_last)
    with torch.set_grad_enabled(k[3]):
        with torch.autocast('cpu',torch.bfloat16): o=torch.compile(m)(x)
        if k[3]: o.float().sum().backward()
    kern=[]
    for code in codes:
        body=code[code.index('def call('):]
        kern.append(len(re.findall(r'^\s+(?:\w+ = )?cpp_\w*fused\w*\(|extern_kernels\.\w+\(|= torch\.ops\.\w+\.\w+',body,re.M)))
    total+=n*sum(kern); detail.append((k[1],k[3],n,kern))
print(arch,kn,'outside',len(outside),'encoders',total,'all',len(outside)+total,detail)
print(collections.Counter(outside).most_common(8))
